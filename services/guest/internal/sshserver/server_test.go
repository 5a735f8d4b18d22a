package sshserver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"go.uber.org/goleak"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/sftpserver"
)

// sftpChild makes this test binary the SFTP server that sessions start.
const sftpChild = "sftp-server-of-this-test"

// patience bounds every wait; nothing waits that long unless it fails.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == sftpChild {
		if err := sftpserver.Serve(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Commands inherit what is ignored, as SIGHUP is under nohup.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	goleak.VerifyTestMain(m)
}

// fixture is a running server with a root file system of its own.
type fixture struct {
	addr      string
	root      string
	hostKey   gossh.PublicKey
	clientKey gossh.Signer
	server    *Server
	// stop ends the instance and returns what Serve returned.
	stop func() error
	log  *syncBuffer
}

// syncBuffer is a bytes.Buffer for concurrent use.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func newSigner(t *testing.T) gossh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// startServer starts a server whose users all have this process's uid. shell says whether its root has one.
func startServer(t *testing.T, shell bool, adjust func(*Options)) *fixture {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"etc", "bin", "home/compute", "root"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	passwd := fmt.Sprintf("root:x:0:0::/root:/bin/bash\ncompute:x:%d:%d::/home/compute:/bin/bash\n", os.Geteuid(), os.Getegid())
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644); err != nil {
		t.Fatal(err)
	}
	if shell {
		if err := os.Symlink("/bin/bash", filepath.Join(root, "bin/bash")); err != nil {
			t.Fatal(err)
		}
	}
	f := &fixture{root: root, clientKey: newSigner(t), log: &syncBuffer{}}
	hostKey := newSigner(t)
	f.hostKey = hostKey.PublicKey()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	opts := Options{
		HostKey:        hostKey,
		AuthorizedKeys: []gossh.PublicKey{newSigner(t).PublicKey(), f.clientKey.PublicKey()},
		User:           "compute",
		Accounts:       account.Open(root),
		Env:            []string{"PATH=/usr/local/bin:/usr/bin:/bin", "IMAGE=yes", "USER=image", "SSH_TTY=stale"},
		SFTPCommand:    []string{executable, sftpChild},
		Logger:         slog.New(slog.NewTextHandler(f.log, nil)),
		// No test waits for these, however long its processes are kept from the
		// processor: those that need the end of a grace set a short one.
		KillGrace: time.Minute,
		StopGrace: time.Minute,
	}
	if adjust != nil {
		adjust(&opts)
	}
	server, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	f.server = server
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-served:
			return err
		case <-time.After(patience):
			return errors.New("Serve did not return")
		}
	})
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return f
}

func (f *fixture) config(user string, auth ...gossh.AuthMethod) *gossh.ClientConfig {
	if auth == nil {
		auth = []gossh.AuthMethod{gossh.PublicKeys(f.clientKey)}
	}
	return &gossh.ClientConfig{
		User: user, Auth: auth, HostKeyCallback: gossh.FixedHostKey(f.hostKey), Timeout: patience,
	}
}

func (f *fixture) dial(t *testing.T) *gossh.Client {
	t.Helper()
	client, err := gossh.Dial("tcp", f.addr, f.config("compute"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func newSession(t *testing.T, client *gossh.Client) *gossh.Session {
	t.Helper()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = session.Close() })
	return session
}

// result runs a command and returns what a shell would show.
func result(t *testing.T, client *gossh.Client, command string) (stdout, stderr, exit string) {
	t.Helper()
	session := newSession(t, client)
	var out, errOut bytes.Buffer
	session.Stdout, session.Stderr = &out, &errOut
	return finish(t, session.Run(command), &out, &errOut)
}

func finish(t *testing.T, err error, out, errOut *bytes.Buffer) (stdout, stderr, exit string) {
	t.Helper()
	var exitErr *gossh.ExitError
	switch {
	case err == nil:
		exit = "0"
	case errors.As(err, &exitErr) && exitErr.Signal() != "":
		exit = "SIG" + exitErr.Signal()
	case errors.As(err, &exitErr):
		exit = strconv.Itoa(exitErr.ExitStatus())
	default:
		t.Fatalf("run: %v", err)
	}
	return out.String(), errOut.String(), exit
}

// eventually polls until ok, which is the only way to see another process's doing.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("did not happen: %s", what)
		}
	}
}

func within[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("did not happen: %s", what)
		panic("unreachable")
	}
}

func TestExecKeepsExitCodesSignalsAndStreams(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	for _, tc := range []struct{ command, stdout, stderr, exit string }{
		{"exit 0", "", "", "0"},
		{"exit 7", "", "", "7"},
		{"exit 255", "", "", "255"},
		{"kill -KILL $$", "", "", "SIGKILL"},
		{"kill -TERM $$", "", "", "SIGTERM"},
		{"kill -SYS $$", "", "", "SIGSYS@openssh.com"},
		{"echo out; echo err >&2; exit 3", "out\n", "err\n", "3"},
		{"printf '%s|' \"a b\" '$HOME' \\;", "a b|$HOME|;|", "", "0"},
		{"cat /dev/null", "", "", "0"},
		{"", "", "", "0"},
		{"(sleep 0.2; echo late) & echo early", "early\nlate\n", "", "0"},
	} {
		stdout, stderr, exit := result(t, client, tc.command)
		if stdout != tc.stdout || stderr != tc.stderr || exit != tc.exit {
			t.Errorf("%q: got (%q, %q, %s), want (%q, %q, %s)", tc.command, stdout, stderr, exit, tc.stdout, tc.stderr, tc.exit)
		}
	}
	if _, stderr, exit := result(t, client, "no-such-program-at-all"); exit != "127" || stderr == "" {
		t.Errorf("missing program: got %q, %s; want a message and 127", stderr, exit)
	}
	if _, _, exit := result(t, client, "/etc/passwd"); exit != "126" {
		t.Errorf("file without execute bit: got %s, want 126", exit)
	}
}

func TestLargeBinaryDataIsUnchangedBothWays(t *testing.T) {
	f := startServer(t, true, nil)
	data := make([]byte, 10<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	session := newSession(t, f.dial(t))
	session.Stdin = bytes.NewReader(data)
	got := sha256.New()
	session.Stdout = got
	if err := session.Run("cat"); err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(got.Sum(nil), want[:]) {
		t.Error("what came back differs from what was sent")
	}
}

func TestSessionEnvironment(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	session := newSession(t, client)
	var out bytes.Buffer
	session.Stdout = &out
	for name, accepted := range map[string]bool{
		"LANG": true, "LC_ALL": true, "TERM": true, "NO_COLOR": true,
		"LD_PRELOAD": false, "PATH": false, "FOO": false, "LC_": false, "lang": false, "LC_X=Y": false,
	} {
		if err := session.Setenv(name, "set by client"); (err == nil) != accepted {
			t.Errorf("Setenv(%s): %v, want accepted = %v", name, err, accepted)
		}
	}
	if err := session.Setenv("LANG", "a\x00b"); err == nil {
		t.Error("a value with NUL was accepted")
	}
	if err := session.Run("env"); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for line := range strings.Lines(out.String()) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		env[name] = value
	}
	host, port, _ := net.SplitHostPort(f.addr)
	_, clientPort, _ := net.SplitHostPort(client.LocalAddr().String())
	home := filepath.Join(f.root, "home/compute")
	for name, want := range map[string]string{
		"USER": "compute", "LOGNAME": "compute", "HOME": home, "PWD": home, "IMAGE": "yes",
		"SHELL": filepath.Join(f.root, "bin/bash"), "PATH": "/usr/local/bin:/usr/bin:/bin",
		"LANG": "set by client", "LC_ALL": "set by client",
		"SSH_CLIENT":     fmt.Sprintf("%s %s %s", host, clientPort, port),
		"SSH_CONNECTION": fmt.Sprintf("%s %s %s %s", host, clientPort, host, port),
	} {
		if env[name] != want {
			t.Errorf("%s is %q, want %q", name, env[name], want)
		}
	}
	for _, name := range []string{"SSH_TTY", "LD_PRELOAD", "FOO", "SSH_AUTH_SOCK"} {
		if value, ok := env[name]; ok {
			t.Errorf("%s is set to %q", name, value)
		}
	}
}

func TestOnlyTheConfiguredKeysAndUsersLogIn(t *testing.T) {
	f := startServer(t, true, nil)
	for name, config := range map[string]*gossh.ClientConfig{
		"other key":            f.config("compute", gossh.PublicKeys(newSigner(t))),
		"unknown user":         f.config("admin"),
		"empty user":           f.config(""),
		"password":             f.config("compute", gossh.Password("compute")),
		"keyboard-interactive": f.config("root", gossh.KeyboardInteractive(func(string, string, []string, []bool) ([]string, error) { return nil, nil })),
		"nothing":              f.config("compute", []gossh.AuthMethod{}...),
	} {
		if name == "nothing" {
			config.Auth = nil
		}
		client, err := gossh.Dial("tcp", f.addr, config)
		if err == nil {
			_ = client.Close()
			t.Errorf("%s: logged in", name)
		} else if !strings.Contains(err.Error(), "unable to authenticate") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, user := range []string{"compute", "root"} {
		client, err := gossh.Dial("tcp", f.addr, f.config(user))
		if err != nil {
			t.Errorf("%s: %v", user, err)
			continue
		}
		_ = client.Close()
	}
	pinned := f.config("compute")
	pinned.HostKeyCallback = gossh.FixedHostKey(newSigner(t).PublicKey())
	if _, err := gossh.Dial("tcp", f.addr, pinned); err == nil {
		t.Error("the server has another host key than the configured one")
	}
}

func TestOldAlgorithmsAreRefused(t *testing.T) {
	f := startServer(t, true, nil)
	for name, adjust := range map[string]func(*gossh.Config){
		"kex":    func(c *gossh.Config) { c.KeyExchanges = []string{gossh.InsecureKeyExchangeDH14SHA1} },
		"cipher": func(c *gossh.Config) { c.Ciphers = []string{gossh.InsecureCipherAES128CBC} },
		"mac": func(c *gossh.Config) {
			c.Ciphers, c.MACs = []string{gossh.CipherAES128CTR}, []string{gossh.HMACSHA1}
		},
	} {
		config := f.config("compute")
		adjust(&config.Config)
		if client, err := gossh.Dial("tcp", f.addr, config); err == nil {
			_ = client.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestBannerIsShown(t *testing.T) {
	f := startServer(t, true, func(o *Options) { o.Banner = "for the market only\n" })
	var banner string
	config := f.config("compute")
	config.BannerCallback = func(message string) error { banner = message; return nil }
	client, err := gossh.Dial("tcp", f.addr, config)
	if err != nil {
		t.Fatal(err)
	}
	_ = client.Close()
	if banner != "for the market only\n" {
		t.Errorf("got %q", banner)
	}
}

func TestImageWithoutShellRunsProgramsDirectly(t *testing.T) {
	f := startServer(t, false, nil)
	client := f.dial(t)
	for _, tc := range []struct{ command, stdout, stderr, exit string }{
		{`printf %s| 'a  b' "c'd" e\ f '' $HOME`, "a  b|c'd|e f||$HOME|", "", "0"},
		{`/bin/bash -c 'exit 7'`, "", "", "7"},
		{``, "", "", "0"},
		{`no-such-program`, "", "no-such-program: no such file or directory (this image has no shell", "127"},
		{`/etc/passwd`, "", "/etc/passwd: not an executable file", "126"},
		{`echo "unfinished`, "", "can't split the command", "2"},
	} {
		stdout, stderr, exit := result(t, client, tc.command)
		if stdout != tc.stdout || !strings.Contains(stderr, tc.stderr) || exit != tc.exit {
			t.Errorf("%q: got (%q, %q, %s), want (%q, %q, %s)", tc.command, stdout, stderr, exit, tc.stdout, tc.stderr, tc.exit)
		}
	}
	session := newSession(t, client)
	var out, errOut bytes.Buffer
	session.Stdout, session.Stderr = &out, &errOut
	if err := session.Shell(); err != nil {
		t.Fatal(err)
	}
	_, stderr, exit := finish(t, session.Wait(), &out, &errOut)
	if exit != "127" || !strings.Contains(stderr, "this image has no shell. Run one of its programs directly") {
		t.Errorf("shell: got %q, %s", stderr, exit)
	}
}

// ptySession is a session with a terminal whose output can be waited for.
type ptySession struct {
	*gossh.Session
	in  io.WriteCloser
	out *syncBuffer
}

func openPTY(t *testing.T, client *gossh.Client, modes gossh.TerminalModes) *ptySession {
	t.Helper()
	p := &ptySession{Session: newSession(t, client), out: &syncBuffer{}}
	p.Stdout, p.Stderr = p.out, p.out
	in, err := p.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	if err := p.RequestPty("xterm-test", 24, 80, modes); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *ptySession) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(p.in, text); err != nil {
		t.Fatal(err)
	}
}

func (p *ptySession) expect(t *testing.T, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	eventually(t, "output "+pattern, func() bool { return re.MatchString(p.out.String()) })
}

func TestTerminal(t *testing.T) {
	f := startServer(t, true, nil)
	p := openPTY(t, f.dial(t), gossh.TerminalModes{gossh.ECHO: 0, gossh.VERASE: 8})
	if err := p.Shell(); err != nil {
		t.Fatal(err)
	}
	p.send(t, "stty size; stty -a | grep -o -e '[-]echo ' -e 'erase = [^;]*'; echo $TERM; echo tty=$SSH_TTY; echo $0; tty\n")
	p.expect(t, `24 80\r\n`)
	p.expect(t, `erase = \^H`)
	p.expect(t, `-echo `)
	p.expect(t, `xterm-test\r\n`)
	p.expect(t, `tty=/dev/pts/\d+`)
	p.expect(t, `-bash\r\n`)
	if err := p.WindowChange(50, 132); err != nil {
		t.Fatal(err)
	}
	p.send(t, "stty size\n")
	p.expect(t, `50 132\r\n`)
	p.send(t, "sleep 1000; echo code=$?\n")
	eventually(t, "interrupt by ^C", func() bool {
		_, _ = io.WriteString(p.in, "\x03\n")
		return strings.Contains(p.out.String(), "^C") || strings.Contains(p.out.String(), "code=130")
	})
	p.send(t, "stty raw; printf 'a\\nb\\n'; stty sane; exit 9\n")
	var exitErr *gossh.ExitError
	if err := p.Wait(); !errors.As(err, &exitErr) || exitErr.ExitStatus() != 9 {
		t.Errorf("got %v, want exit 9", err)
	}
	if !strings.Contains(p.out.String(), "a\nb\n") {
		t.Errorf("raw output was changed: %q", p.out.String())
	}
}

func TestTerminalEndsWithItsCommandAndNotItsBackground(t *testing.T) {
	f := startServer(t, true, nil)
	p := openPTY(t, f.dial(t), nil)
	// The background process keeps the terminal open, and ignores its hang-up.
	finished := make(chan error, 1)
	go func() { finished <- p.Run("trap '' HUP; sleep 1000 & echo $! > pid; echo done") }()
	pid := pidOf(t, filepath.Join(f.root, "home/compute/pid"))
	defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
	if err := within(t, "end of the session", finished); err != nil {
		t.Fatal(err)
	}
	if got := p.out.String(); !strings.Contains(got, "done\r\n") {
		t.Errorf("got %q", got)
	}
	if !alive(pid) {
		t.Error("the background process was killed")
	}
}

func TestClientSignalReachesTheCommand(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	for sig, want := range map[gossh.Signal]string{gossh.SIGTERM: "TERM", gossh.SIGKILL: "KILL", gossh.SIGUSR1: "USR1"} {
		session := newSession(t, client)
		if err := session.Start("exec sleep 1000"); err != nil {
			t.Fatal(err)
		}
		if err := session.Signal(sig); err != nil {
			t.Fatal(err)
		}
		var exitErr *gossh.ExitError
		if err := session.Wait(); !errors.As(err, &exitErr) || exitErr.Signal() != want {
			t.Errorf("got %v, want signal %s", err, want)
		}
	}
}

// shortGrace is for processes that stay until they are killed.
const shortGrace = 100 * time.Millisecond

// pidOf waits for a file with a process id.
func pidOf(t *testing.T, path string) int {
	t.Helper()
	var pid int
	eventually(t, "pid file "+path, func() bool {
		data, _ := os.ReadFile(path)
		var err error
		pid, err = strconv.Atoi(strings.TrimSpace(string(data)))
		return err == nil && bytes.HasSuffix(data, []byte("\n"))
	})
	return pid
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestClientGoneEndsTerminalCommands(t *testing.T) {
	t.Run("that go by themselves", func(t *testing.T) {
		f := startServer(t, true, nil)
		endOfTerminal(t, f, "trap 'echo hup > hup; exit' HUP")
		if _, err := os.Stat(filepath.Join(f.root, "home/compute/hup")); err != nil {
			t.Errorf("no SIGHUP before the end: %v", err)
		}
	})
	t.Run("that stay", func(t *testing.T) {
		f := startServer(t, true, func(o *Options) { o.KillGrace = shortGrace })
		endOfTerminal(t, f, "trap '' HUP")
	})
}

// endOfTerminal waits for the end of a shell on a terminal whose client has gone,
// after a command of the shell's.
func endOfTerminal(t *testing.T, f *fixture, command string) {
	t.Helper()
	client := f.dial(t)
	if err := openPTY(t, client, nil).Start(command + "; echo $$ > pid; while :; do sleep 0.01; done"); err != nil {
		t.Fatal(err)
	}
	pid := pidOf(t, filepath.Join(f.root, "home/compute/pid"))
	_ = client.Close()
	eventually(t, "end of the command", func() bool { return !alive(pid) })
}

func TestClientGoneLeavesOtherCommandsUntilTheInstanceEnds(t *testing.T) {
	f := startServer(t, true, func(o *Options) { o.StopGrace = shortGrace })
	client := f.dial(t)
	session := newSession(t, client)
	in, err := session.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := session.Start("echo $$ > pid; cat; echo eof > eof; trap '' HUP; while :; do sleep 0.01; done"); err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(f.root, "home/compute")
	pid := pidOf(t, home+"/pid")
	_ = client.Close()
	eventually(t, "end of input", func() bool { _, err := os.Stat(home + "/eof"); return err == nil })
	if !alive(pid) {
		t.Error("the command was killed")
	}
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if alive(pid) {
		t.Error("the command outlived the instance")
	}
}

func TestInstanceEndClosesSessionsCleanly(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	p := openPTY(t, client, nil)
	if err := p.Shell(); err != nil {
		t.Fatal(err)
	}
	p.send(t, "echo re''ady\n")
	p.expect(t, "ready\r\n")
	session := newSession(t, client)
	if err := session.Start("exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	idle := f.dial(t)
	begin := time.Now()
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > f.server.opts.StopGrace {
		t.Errorf("took %v", took)
	}
	var exitErr *gossh.ExitError
	if err := session.Wait(); !errors.As(err, &exitErr) || exitErr.Signal() != "HUP" {
		t.Errorf("command: got %v, want signal HUP", err)
	}
	if err := p.Wait(); !errors.As(err, &exitErr) {
		t.Errorf("shell: got %v, want an exit status", err)
	}
	if !strings.Contains(p.out.String(), "the instance has ended") {
		t.Errorf("the terminal shows %q", p.out.String())
	}
	if err := idle.Wait(); err == nil {
		t.Error("idle connection was not closed")
	}
	if _, err := net.Dial("tcp", f.addr); err == nil {
		t.Error("the port is still open")
	}
}

// TestNoConnectionSurvivesTheEnd stops a server at all moments of a login; the library doesn't know a connection yet when
// it has just authenticated.
func TestNoConnectionSurvivesTheEnd(t *testing.T) {
	for range 10 {
		f := startServer(t, true, nil)
		client, err := gossh.Dial("tcp", f.addr, f.config("compute"))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.stop(); err != nil {
			t.Fatal(err)
		}
		closed := make(chan struct{})
		go func() {
			_ = client.Wait()
			close(closed)
		}()
		within(t, "end of the connection", closed)
		_ = client.Close()
	}
}

func TestSFTP(t *testing.T) {
	f := startServer(t, false, nil)
	client, err := sftp.NewClient(f.dial(t))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := client.Getwd()
	if err != nil || dir != filepath.Join(f.root, "home/compute") {
		t.Errorf("working directory %q, %v", dir, err)
	}
	file, err := client.Create("file")
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if _, err := file.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(f.root, "home/compute/file"))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes arrived, %v", len(got), err)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	if err := newSession(t, f.dial(t)).RequestSubsystem("netconf"); err == nil {
		t.Error("an unknown subsystem was accepted")
	}
}

// echoUpper answers with the upper case of all that it was sent, once it has seen the end: it works only if half-closed
// connections do.
func echoUpper(conn net.Conn) {
	defer conn.Close()
	data, err := io.ReadAll(conn)
	if err == nil {
		_, _ = conn.Write(bytes.ToUpper(data))
	}
}

func listen(t *testing.T, network, address string, handle func(net.Conn)) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go handle(conn)
		}
	}()
	return l
}

func askUpper(t *testing.T, conn net.Conn) {
	t.Helper()
	defer conn.Close()
	text := strings.Repeat("forward ", 1<<15)
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		t.Fatalf("%T can't be half-closed", conn)
	}
	if err := half.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != strings.ToUpper(text) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
}

func TestLocalForwarding(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	tcp := listen(t, "tcp", "127.0.0.1:0", echoUpper)
	unix := listen(t, "unix", filepath.Join(t.TempDir(), "s"), echoUpper)
	for _, target := range []net.Addr{tcp.Addr(), unix.Addr()} {
		conn, err := client.Dial(target.Network(), target.String())
		if err != nil {
			t.Fatal(err)
		}
		askUpper(t, conn)
	}
	_ = tcp.Close()
	if _, err := client.Dial("tcp", tcp.Addr().String()); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("closed port: %v", err)
	}
	if _, err := client.Dial("unix", "/no/such/socket"); err == nil {
		t.Error("missing socket: connected")
	}
}

func TestForwardingEndsWithTheConnection(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	closed := make(chan struct{})
	l := listen(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
		// It never writes and never closes first.
		_, _ = io.Copy(io.Discard, conn)
		_, _ = conn.Read(make([]byte, 1))
		close(closed)
		_ = conn.Close()
	})
	if _, err := client.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	_ = client.Close()
	within(t, "end of the forwarded connection", closed)
}

func TestRemoteForwarding(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	remote, err := client.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := remote.Accept()
			if err != nil {
				return
			}
			go echoUpper(conn)
		}
	}()
	address := remote.Addr().String()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	askUpper(t, conn)

	if other, err := f.dial(t).Listen("tcp", address); err == nil {
		_ = other.Close()
		t.Error("a port that is taken was forwarded again")
	}
	if err := remote.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "cancelled port closed", func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})

	second := f.dial(t)
	left, err := second.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
	eventually(t, "port of a lost connection closed", func() bool {
		conn, err := net.Dial("tcp", left.Addr().String())
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	eventually(t, "no forwardings left", func() bool {
		f.server.forward.mu.Lock()
		defer f.server.forward.mu.Unlock()
		return len(f.server.forward.listeners) == 0 && len(f.server.forward.count) == 0
	})
}

func TestRemoteForwardingIsBounded(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	for range maxForwards {
		if _, err := client.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Listen("tcp", "127.0.0.1:0"); err == nil {
		t.Error("one more than the limit was accepted")
	}
}

func TestAgentForwarding(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	keyring := agent.NewKeyring()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := keyring.Add(agent.AddedKey{PrivateKey: private, Comment: "key of the agent"}); err != nil {
		t.Fatal(err)
	}
	if err := agent.ForwardToAgent(client, keyring); err != nil {
		t.Fatal(err)
	}
	session := newSession(t, client)
	if err := agent.RequestAgentForwarding(session); err != nil {
		t.Fatal(err)
	}
	out, err := session.CombinedOutput("ssh-add -l; echo $SSH_AUTH_SOCK")
	if err != nil || !strings.Contains(string(out), "key of the agent") {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	socket := lines[len(lines)-1]
	eventually(t, "agent socket removed", func() bool { _, err := os.Stat(socket); return os.IsNotExist(err) })
}

func TestKeepalivesAreAnswered(t *testing.T) {
	f := startServer(t, true, nil)
	client := f.dial(t)
	if _, _, err := client.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		t.Errorf("global: %v", err)
	}
	session := newSession(t, client)
	if _, err := session.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		t.Errorf("channel: %v", err)
	}
	if ok, err := session.SendRequest("x11-req", true, nil); ok || err != nil {
		t.Errorf("unknown request: %v, %v", ok, err)
	}
	if _, _, err := client.OpenChannel("x11", nil); err == nil {
		t.Error("unknown channel type was opened")
	}
}

func TestOneCommandPerSession(t *testing.T) {
	f := startServer(t, true, nil)
	session := newSession(t, f.dial(t))
	if err := session.Start("sleep 1000"); err != nil {
		t.Fatal(err)
	}
	ok, err := session.SendRequest("exec", true, gossh.Marshal(struct{ Command string }{"true"}))
	if ok || err != nil {
		t.Errorf("second command: %v, %v", ok, err)
	}
	ok, err = session.SendRequest("pty-req", true, []byte("short"))
	if ok || err != nil {
		t.Errorf("malformed request: %v, %v", ok, err)
	}
}

// closedByPeer waits until the peer has closed the connection.
func closedByPeer(t *testing.T, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("connection was not closed")
	}
}

func TestSilentClientsAreEvictedAndRealOnesStay(t *testing.T) {
	f := startServer(t, true, func(o *Options) { o.MaxHandshakes = 4 })
	tenant := f.dial(t)
	var silent []net.Conn
	for range 10 {
		conn, err := net.Dial("tcp", f.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
		// The banner shows that the server has taken the connection in.
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range silent[:6] {
		closedByPeer(t, conn)
	}
	if _, _, exit := result(t, f.dial(t), "exit 0"); exit != "0" {
		t.Errorf("a real client got %s", exit)
	}
	if _, _, exit := result(t, tenant, "exit 0"); exit != "0" {
		t.Errorf("the tenant's connection got %s", exit)
	}
}

func TestSlowHandshakeEndsAndIdleSessionsDoNot(t *testing.T) {
	f := startServer(t, true, func(o *Options) { o.HandshakeTimeout = 4 * time.Second })
	tenant := f.dial(t)
	conn, err := net.Dial("tcp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// Closed only after the time that would also have ended the tenant's.
	closedByPeer(t, conn)
	if _, _, exit := result(t, tenant, "exit 0"); exit != "0" {
		t.Errorf("got %s", exit)
	}
}

func TestAnOfferedKeyIsNoLogin(t *testing.T) {
	f := startServer(t, true, func(o *Options) { o.HandshakeTimeout = 500 * time.Millisecond })
	// The client asks whether the key would do, which it would, and never signs.
	dialed, err := net.Dial("tcp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	conn := &lossyConn{Conn: dialed, lost: make(chan struct{})}
	config := f.config("compute", gossh.PublicKeys(neverSigns{f.clientKey, conn.lost}))
	client, _, _, err := gossh.NewClientConn(conn, f.addr, config)
	if err == nil {
		_ = client.Close()
		t.Fatal("logged in without a signature")
	}
	select {
	case <-conn.lost:
	default:
		t.Error("the handshake was not ended")
	}
}

// lossyConn tells when the other side has ended the connection.
type lossyConn struct {
	net.Conn
	once sync.Once
	lost chan struct{}
}

func (c *lossyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.lost) })
	}
	return n, err
}

// neverSigns has the public key only, and takes longer than the handshake may.
type neverSigns struct {
	gossh.Signer
	lost <-chan struct{}
}

func (n neverSigns) Sign(io.Reader, []byte) (*gossh.Signature, error) {
	select {
	case <-n.lost:
	case <-time.After(patience):
	}
	return nil, errors.New("no private key")
}

func FuzzPTYRequest(f *testing.F) {
	f.Add(gossh.Marshal(struct {
		Term       string
		C, R, W, H uint32
		Modes      string
	}{"xterm", 80, 24, 0, 0, "\x03\x00\x00\x00\x7f\x35\x00\x00\x00\x01\x00"}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, payload []byte) {
		req, err := parsePTYRequest(payload)
		if err != nil {
			return
		}
		if strings.ContainsAny(req.term, "\x00\n ") {
			t.Errorf("terminal type %q", req.term)
		}
		for _, mode := range req.modes {
			if mode.opcode == 0 || mode.opcode >= 160 {
				t.Errorf("opcode %d", mode.opcode)
			}
		}
	})
}
