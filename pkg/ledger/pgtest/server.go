// Package pgtest runs real PostgreSQL servers for tests, and a proxy in front of
// them that watches the calls and lets chosen ones fail.
//
// [Shared] is one server for all tests of a process, [Start] one for a test that
// stops or kills it. Each [Server.Database] is a database of its own. A server
// listens on a Unix socket and on a port of the loopback interface of whatever
// network namespace the process is in. It touches no cluster of the machine's:
// everything is in a temporary directory, under a user without privileges, and
// is gone when the process is, however that ends.
//
// The binaries are those of Debian's package postgresql.
package pgtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

const (
	// startTimeout is how long a server may take to start on a busy machine.
	startTimeout = 5 * time.Minute
	// stopTimeout is when a server that doesn't stop is killed.
	stopTimeout = 2 * time.Minute
	superuser   = "bridge"
)

// Options are what a server is started with.
type Options struct {
	// SmallDisk, if positive, is the size in bytes of a file system of its own
	// for the databases made by [Server.SmallDatabase]. It needs root.
	SmallDisk int64
}

// Server is a PostgreSQL server.
type Server struct {
	// CAFile is the certificate that signed the server's, for TLS to 127.0.0.1
	// or localhost.
	CAFile string

	options Options
	bin     string
	dir     string
	port    int
	cred    *syscall.Credential
	private bool // its databases go with it

	// watchdog stops the server and removes dir when guard, its standard input,
	// is closed, which the end of this process does too.
	watchdog *exec.Cmd
	guard    io.Closer

	mu  sync.Mutex // protects cmd
	cmd *exec.Cmd  // nil while it is stopped

	databases atomic.Int64
}

//nolint:gochecknoglobals // One server for all tests of a process is what it is for.
var shared struct {
	once   sync.Once
	server *Server
	err    error
}

// Shared returns the server that all tests of this process share, which must not
// stop it.
func Shared(t testing.TB) *Server {
	t.Helper()
	// It outlives the test that happens to be the first.
	ctx := context.WithoutCancel(t.Context())
	shared.once.Do(func() { shared.server, shared.err = newServer(ctx, Options{}) })
	if shared.err != nil {
		t.Fatalf("PostgreSQL: %v", shared.err)
	}
	return shared.server
}

// Start starts a server of the test's own, which is gone at its end.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := newServer(context.WithoutCancel(t.Context()), o)
	if err != nil {
		t.Fatalf("PostgreSQL: %v", err)
	}
	s.private = true
	t.Cleanup(func() {
		if err := s.destroy(); err != nil {
			t.Errorf("PostgreSQL: %v", err)
		}
	})
	return s
}

// binaries finds the newest server that is installed.
func binaries() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", errors.New("no server in /usr/lib/postgresql: install Debian's package postgresql (make prerequisites)")
	}
	version := func(path string) int {
		n, _ := strconv.Atoi(strings.Split(path, "/")[4])
		return n
	}
	slices.SortFunc(found, func(a, b string) int { return version(a) - version(b) })
	return filepath.Dir(found[len(found)-1]), nil
}

// credential is who the server runs as: it refuses to run as root.
func credential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil //nolint:nilnil // as who we are
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), NoSetGroups: false}, nil
	}
	return nil, errors.New("neither user postgres nor nobody exists to run the server as")
}

// newServer makes a server, which runs until ctx is over or it is destroyed.
func newServer(ctx context.Context, o Options) (*Server, error) {
	s := &Server{options: o}
	var err error
	if s.bin, err = binaries(); err != nil {
		return nil, err
	}
	if s.cred, err = credential(); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "pgtest-"); err != nil {
		return nil, err
	}
	if err := s.guardDir(ctx); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir))
	}
	if err := s.make(ctx); err != nil {
		return nil, errors.Join(err, s.destroy())
	}
	return s, nil
}

// cleanUp waits for the end of its standard input and then removes every trace
// of the server. An immediate stop frees the server's shared memory; after a
// kill it is what the last start wrote down. A process counts as the server only
// if it works in its directory, in case its number was used again.
const cleanUp = `cat >/dev/null
file=$1/data/postmaster.pid
if [ -s "$file" ]; then
	pid=$(sed -n 1p "$file")
	memory=$(sed -n 7p "$file")
	ours() { [ "$(readlink "/proc/$pid/cwd")" = "$1/data" ]; }
	if ours "$1"; then
		kill -QUIT "$pid"
		n=0
		while ours "$1" && [ "$n" -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
		if ours "$1"; then kill -KILL "$pid"; fi
	fi
	if [ -n "$memory" ]; then ipcrm -m "${memory##* }"; fi
fi
n=0
until rm -rf "$1" && [ ! -e "$1" ] || [ "$n" -ge 100 ]; do sleep 0.1; n=$((n + 1)); done
`

func (s *Server) guardDir(ctx context.Context) error {
	if s.cred != nil {
		if err := os.Chown(s.dir, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			return err
		}
	}
	s.watchdog = exec.CommandContext(ctx, "sh", "-c", cleanUp, "pgtest", s.dir)
	s.watchdog.Dir = "/"
	// A session of its own: a signal from the terminal must not end it.
	s.watchdog.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: s.cred}
	guard, err := s.watchdog.StdinPipe()
	if err != nil {
		return err
	}
	s.guard = guard
	return s.watchdog.Start()
}

// make makes the cluster and starts the server.
func (s *Server) make(ctx context.Context) error {
	initdb := exec.CommandContext(ctx, filepath.Join(s.bin, "initdb"), "--pgdata", s.data(), "--username", superuser, "--auth", "trust",
		"--encoding", "UTF8", "--locale", "C", "--wal-segsize", "1", "--no-sync", "--no-instructions")
	initdb.Dir = "/"
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	key, certificate, err := newCertificate()
	if err != nil {
		return err
	}
	s.CAFile = filepath.Join(s.dir, "ca.pem")
	for path, content := range map[string][]byte{
		filepath.Join(s.data(), "server.key"):  key,
		filepath.Join(s.data(), "server.crt"):  certificate,
		filepath.Join(s.data(), "pg_hba.conf"): []byte("local all all trust\nhost all locked all scram-sha-256\nhost all all all trust\n"),
		s.CAFile:                               certificate,
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
		if s.cred != nil {
			if err := os.Chown(path, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
				return err
			}
		}
	}
	if s.options.SmallDisk > 0 {
		if err := os.Mkdir(s.small(), 0o700); err != nil {
			return err
		}
	}
	// Another process may take the port before the server does.
	for range 5 {
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
		s.port = l.Addr().(*net.TCPAddr).Port //nolint:errcheck // It is TCP.
		if err = errors.Join(l.Close(), s.start(ctx)); err == nil {
			return nil
		}
	}
	return err
}

func newCertificate() (key, certificate []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "pgtest"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func (s *Server) data() string  { return filepath.Join(s.dir, "data") }
func (s *Server) small() string { return filepath.Join(s.dir, "small") }

// inSmallDisk mounts the small disk where only the server sees it, gives up root
// and becomes the server.
const inSmallDisk = `disk=$1 size=$2 uid=$3 gid=$4
shift 4
mount -t tmpfs -o "size=$size,mode=0700,uid=$uid,gid=$gid" pgtest "$disk"
exec setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"
`

func (s *Server) start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		return errors.New("it runs already")
	}
	args := []string{filepath.Join(s.bin, "postgres"), "-D", s.data()}
	for _, setting := range []string{
		"port=" + strconv.Itoa(s.port), "listen_addresses=127.0.0.1", "unix_socket_directories=" + s.dir,
		"fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=300", "huge_pages=off",
		"wal_level=minimal", "max_wal_senders=0", "min_wal_size=4MB", "max_wal_size=64MB", "ssl=on",
		// In files of its own, not in the machine's.
		"dynamic_shared_memory_type=mmap",
	} {
		args = append(args, "-c", setting)
	}
	logFile, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = logFile.Close() }() // the server has its own
	attributes := &syscall.SysProcAttr{Setsid: true, Credential: s.cred}
	if s.options.SmallDisk > 0 {
		if s.cred == nil {
			return errors.New("a small disk needs root")
		}
		attributes = &syscall.SysProcAttr{Setsid: true, Unshareflags: syscall.CLONE_NEWNS}
		args = append([]string{
			"sh", "-ec", inSmallDisk, "pgtest", s.small(), strconv.FormatInt(s.options.SmallDisk, 10),
			strconv.FormatUint(uint64(s.cred.Uid), 10), strconv.FormatUint(uint64(s.cred.Gid), 10),
		}, args...)
	}
	// No goroutine waits for it, as ctx is never over, so that tests may look for
	// leaks.
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = "/", logFile, logFile, attributes
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := s.ready(ctx, cmd.Process.Pid, time.Now().Add(startTimeout)); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		text, _ := os.ReadFile(logFile.Name())
		return fmt.Errorf("%w\n%s", err, text[max(0, len(text)-4000):])
	}
	s.cmd = cmd
	return nil
}

// ready waits until the server takes connections.
func (s *Server) ready(ctx context.Context, pid int, deadline time.Time) error {
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := s.try(ctx)
		if err == nil {
			return nil
		}
		var status syscall.WaitStatus
		if ended, _ := syscall.Wait4(pid, &status, syscall.WNOHANG, nil); ended == pid {
			return fmt.Errorf("the server ended with status %d", status.ExitStatus())
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server takes no connections: %w", err)
		}
		<-again.C
	}
}

func (s *Server) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn("postgres"))
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

func (s *Server) dsn(database string) string { return dsn(s.Addr(), database) }

func dsn(address, database string) string {
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", superuser, address, database)
}

// Addr is the server's address, host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// SocketDir is the directory of the server's Unix socket.
func (s *Server) SocketDir() string { return s.dir }

// Database makes an empty database, for the test, and returns its address.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	return s.dsn(s.database(t, ""))
}

// SmallDatabase makes an empty database on the small disk and returns its
// address. Its log of transactions is elsewhere and doesn't get full.
func (s *Server) SmallDatabase(t testing.TB) string {
	t.Helper()
	s.Exec(t, "postgres", fmt.Sprintf("CREATE TABLESPACE small LOCATION '%s'", s.small()))
	return s.dsn(s.database(t, " TABLESPACE small"))
}

func (s *Server) database(t testing.TB, where string) string {
	t.Helper()
	name := fmt.Sprintf("test%d", s.databases.Add(1))
	s.Exec(t, "postgres", "CREATE DATABASE "+name+where)
	if !s.private {
		t.Cleanup(func() { s.Exec(t, "postgres", "DROP DATABASE "+name+" WITH (FORCE)") })
	}
	return name
}

// Exec runs statements as the superuser in the named database; "postgres" is
// always there.
func (s *Server) Exec(t testing.TB, database, statements string) {
	t.Helper()
	// Databases are dropped when the test is over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn(database))
	if err != nil {
		t.Fatalf("PostgreSQL: %v", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.Exec(ctx, statements); err != nil {
		t.Fatalf("PostgreSQL: %s: %v", statements, err)
	}
}

// Open connects to a database by an address that [Server.Database] returned, as
// another program would, until the end of the test.
func Open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	db := stdlib.OpenDB(*config)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// Stop shuts the server down as its operator would: calls under way fail, and
// what was committed stays.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if err := s.end(syscall.SIGINT); err != nil {
		t.Fatalf("stop PostgreSQL: %v", err)
	}
}

// Kill ends the server as a crash does. Its children, who answer on until they
// notice, have ended when Kill returns.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	if err := s.end(syscall.SIGKILL); err != nil {
		t.Fatalf("kill PostgreSQL: %v", err)
	}
}

// Start starts it again after [Server.Stop] or [Server.Kill], at the same
// address.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if err := s.start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatalf("start PostgreSQL: %v", err)
	}
}

// SmallDiskRoot is the small disk as this process sees it while the server runs.
func (s *Server) SmallDiskRoot() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("/proc/%d/root%s", s.cmd.Process.Pid, s.small())
}

func (s *Server) end(signal syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(signal); err != nil {
		return err
	}
	kill := time.AfterFunc(stopTimeout, func() { _ = s.cmd.Process.Kill() })
	err := s.cmd.Wait()
	s.cmd = nil
	if !kill.Stop() {
		return fmt.Errorf("it did not stop within %s", stopTimeout)
	}
	if _, ok := errors.AsType[*exec.ExitError](err); !ok && err != nil {
		return err
	}
	return s.deserted()
}

// deserted waits until no process of a server that ended works in its directory.
func (s *Server) deserted() error {
	data := s.data()
	for deadline := time.Now().Add(stopTimeout); ; <-time.After(10 * time.Millisecond) {
		cwds, err := filepath.Glob("/proc/[0-9]*/cwd")
		if err != nil {
			return err
		}
		left := slices.DeleteFunc(cwds, func(cwd string) bool {
			// Processes end meanwhile.
			dir, err := os.Readlink(cwd)
			return err != nil || dir != data
		})
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%v still work in %s after %s", left, data, stopTimeout)
		}
	}
}

// destroy stops the server and has the watchdog remove what is left.
func (s *Server) destroy() error {
	err := errors.Join(s.end(syscall.SIGQUIT), s.guard.Close(), s.watchdog.Wait())
	if _, left := os.Stat(s.dir); !errors.Is(left, fs.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("%s is still there", s.dir))
	}
	return err
}
