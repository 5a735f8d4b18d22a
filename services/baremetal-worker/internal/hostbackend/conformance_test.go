package hostbackend

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// suiteShape is what a grant of the suite takes, suiteRoom how many of them fit
// on each host.
var (
	suiteShape = backend.Shape{CPU: 500, RAM: 128, Storage: 1}
	suiteRoom  = []int64{2, 1}
)

const (
	// suitePatience is how long a busy machine with two cores may take for what
	// takes a second on an idle one.
	suitePatience = 60 * time.Second
	// suiteUsageInterval is how often the suite's watches report usage.
	suiteUsageInterval = 200 * time.Millisecond
)

// TestConformance holds the worker to the Backend contract, on lab hosts that
// all cases share: what a case leaves behind fails that case, by a quick look,
// and at the end the hosts are searched thoroughly.
func TestConformance(t *testing.T) {
	var hosts []*lab.Host
	for range suiteRoom {
		h := lab.NewHost(t, lab.HostOptions{})
		makeFaulty(t, h)
		hosts = append(hosts, h)
	}
	guest, err := guestBinary()
	if err != nil {
		t.Fatal(err)
	}
	// Files that all cases share, none of which the worker writes.
	dir := t.TempDir()
	image := makeArchive(t, ociimage.Shell)
	store := filepath.Join(dir, "images", "sha256")
	for _, err := range []error{
		os.WriteFile(filepath.Join(dir, "guest"), guest, 0o755),
		os.MkdirAll(store, 0o755),
		os.WriteFile(filepath.Join(store, image.sha256), image.data, 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	backendtest.Run(t, backendtest.Harness{
		Open: func(t testing.TB) *backendtest.Fixture {
			t.Helper()
			return openSuiteSite(t, hosts, dir, image).fixture(t)
		},
		Skip: exceptedOnHosts(),
	})
	for _, h := range hosts {
		left, err := h.Leftovers(t.Context(), "image ")
		if err != nil {
			t.Error(err)
		}
		if len(left) > 0 {
			t.Errorf("left behind on %s:\n\t%s", h.Name, strings.Join(left, "\n\t"))
		}
	}
}

// suiteSite is a worker on hosts, as a case's fixture.
type suiteSite struct {
	hosts  []*lab.Host
	config Config
	image  backend.Image
	ledger *ledger.Ledger
	secret redact.Secret
	logs   lockedBuffer

	runtime *worker.Runtime
	driver  worker.Driver

	mu        sync.Mutex // protects what follows
	state     [sha256.Size]byte
	mutations int
	faults    int
}

// lockedBuffer collects logs.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}

// emptyLedger is the file of a ledger that was just made. Under the race
// detector making one takes much longer than copying it.
var emptyLedger = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "hostbackend-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	file := filepath.Join(dir, "ledger.db")
	l, err := ledger.Open(context.Background(), ledger.Config{Path: file})
	if err != nil {
		return nil, err
	}
	if err := l.Close(); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
})

// openSuiteSite has a ledger of its own, so that each case's worker is new.
func openSuiteSite(t testing.TB, hosts []*lab.Host, dir string, image archive) *suiteSite {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	s := &suiteSite{hosts: hosts, secret: redact.New(secret)}
	digest, err := backend.ParseDigest("sha256:" + image.sha256)
	if err != nil {
		t.Fatal(err)
	}
	s.image = backend.Image{Digest: digest, Kind: backend.ImageOCIArchive}
	s.config.SetDefaults()
	s.config.GuestBinary = config.Path(filepath.Join(dir, "guest"))
	s.config.ImageStore.Base = filepath.Join(dir, "images")
	s.config.StopGrace.Duration = time.Second
	s.config.usageInterval = suiteUsageInterval
	for n, h := range hosts {
		var key config.SecretFile
		loadKey(t, &key, h.UserKeyFile)
		room := suiteShape.Times(suiteRoom[n])
		s.config.Hosts = append(s.config.Hosts, HostConfig{
			Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root", KeyFile: key,
			HostKeys: []string{h.HostKeyLine()}, Region: "lab",
			CPUMillicores: int64(room.CPU), RAMMiB: int64(room.RAM), StorageGiB: int64(room.Storage), MaxInstances: 20,
		})
	}
	file := filepath.Join(t.TempDir(), "ledger.db")
	empty, err := emptyLedger()
	if err == nil {
		err = os.WriteFile(file, empty, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s.ledger, err = ledger.Open(t.Context(), ledger.Config{Path: file}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.ledger.Close(); err != nil {
			t.Errorf("close the ledger: %v", err)
		}
	})
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("the worker's log:\n%s", s.logs.bytes())
		}
	})
	return s
}

// start starts a worker, as a new process would.
func (s *suiteSite) start(t testing.TB) backend.Backend {
	t.Helper()
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "baremetal", Ledger: s.ledger, Secret: s.secret, Metrics: prometheus.NewRegistry(),
		Log: slog.New(slog.NewJSONHandler(&s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	driver, err := Open(ctx, s.config, runtime.Env())
	if err != nil {
		t.Fatal(err)
	}
	s.driver = driver
	if err := runtime.Start(ctx, driver); err != nil {
		t.Fatal(err)
	}
	s.runtime = runtime
	return runtime
}

// stop ends the worker, if it still runs, and leaves its grants alone. After it
// the worker does nothing any more, which is all that the end of a process can
// bring about: nothing that it might still have done is waited for.
func (s *suiteSite) stop(t testing.TB) {
	t.Helper()
	if s.runtime != nil {
		s.runtime.Close()
		s.runtime = nil
	}
	if s.driver != nil {
		if err := s.driver.Close(); err != nil {
			t.Errorf("close the driver: %v", err)
		}
		s.driver = nil
	}
}

func (s *suiteSite) fixture(t testing.TB) *backendtest.Fixture {
	t.Helper()
	owner := newLogin(t)
	f := &backendtest.Fixture{
		Backend:       s.start(t),
		ShortestLife:  2 * time.Second,
		Patience:      suitePatience,
		UsageInterval: suiteUsageInterval,
		Measures:      true,
		Login:         logIn,
		Logs:          s.logs.bytes,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			g, envelope := grant(s.image, owner)
			g.Shape, g.Environment, g.AlmanacSequence = suiteShape, map[string]string{"NAME": "value"}, 3
			return g, envelope
		},
		Leftovers: s.leftovers,
		Runs: func(id backend.GrantID) bool {
			units, err := s.everywhere(t.Context(), "systemctl", "list-units", "--plain", "--no-legend", unitPattern("test", &id))
			if err != nil {
				t.Errorf("list units: %v", err)
			}
			return len(units) > 0
		},
		Mutations: func() int { return s.countMutations(t) },
		Exit: func(id backend.GrantID, status backendtest.ExitStatus) error {
			line := "exit " + strconv.Itoa(int(status.Code))
			if status.Signal != "" {
				line = "kill -" + status.Signal + " $$"
			}
			return s.typeInto(t.Context(), unitPattern("test", &id), line)
		},
		Vanish:   func(id backend.GrantID) error { return s.vanish(t.Context(), id) },
		FailBoot: func(console string) { s.failBoot(t, console) },
		Kill:     func() { s.stop(t) },
		History:  func(id backend.GrantID) backendtest.History { return s.history(t, id) },
		Inject:   func(fault backendtest.Fault) backendtest.Injection { return s.inject(t, fault) },

		Record:      func(id backend.GrantID) func() []backendtest.Call { return s.record(t, id) },
		CreatePoint: stepDisk,
		ReadPoint:   lookAtHosts,
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			s.stop(t)
			return s.start(t), nil
		},
	}
	for _, n := range suiteRoom {
		f.Capacity += int(n)
	}
	f.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := f.Satisfiable()
		g.Shape = suiteShape.Times(3) // more than any one host has
		return g, envelope
	}
	return f
}

// everywhere runs a command on all hosts and returns the lines that it prints.
func (s *suiteSite) everywhere(ctx context.Context, args ...string) ([]string, error) {
	var lines []string
	for _, h := range s.hosts {
		out, err := h.Exec(ctx, args...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			lines = append(lines, h.Name+": "+strings.TrimSpace(line))
		}
	}
	return lines, nil
}

// quickLook lists what a grant makes on a host, by one command: h.Leftovers
// finds more and takes half a second. Containers and disks are in the grants'
// directories.
const quickLook = `
cd /var/lib/compute-bridge/test/grants 2>/dev/null && find . -mindepth 1 -maxdepth 1 -printf 'directory %f\n'
systemctl list-units --all --plain --no-legend 'cb-*' | while read -r unit rest; do echo "unit $unit"; done
for file in /etc/containers/networks/cb-* /sys/class/net/cb* /run/compute-bridge/test/*; do [ ! -e "$file" ] || echo "$file"; done
grep -o ' /var/lib/compute-bridge/[^ ]* ' /proc/self/mounts
nft list table inet compute_bridge_test 2>/dev/null | grep 'elements ='
true`

var (
	grantIDs  = regexp.MustCompile(`[0-9a-f]{64}`)
	unitNamed = regexp.MustCompile(`cb-test-[0-9a-f]{64}-[0-9]+\.service`)
)

func (s *suiteSite) leftovers(ctx context.Context) ([]backendtest.Leftover, error) {
	lines, err := s.everywhere(ctx, "sh", "-c", quickLook)
	var out []backendtest.Leftover
	for _, line := range lines {
		l := backendtest.Leftover{Name: line}
		if text := grantIDs.FindString(line); text != "" {
			if l.GrantID, err = backend.ParseGrantID(text); err != nil {
				return nil, err
			}
		}
		out = append(out, l)
	}
	return out, err
}

// countMutations counts how often the hosts were found changed.
func (s *suiteSite) countMutations(t testing.TB) int {
	t.Helper()
	lines, err := s.everywhere(t.Context(), "sh", "-c", quickLook+`
find /var/lib/compute-bridge /etc/containers -printf '%p %s %T@ %C@\n' | sort
nft list ruleset
podman images --all --quiet --no-trunc`)
	if err != nil {
		t.Errorf("look at the hosts: %v", err)
	}
	state := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	s.mu.Lock()
	defer s.mu.Unlock()
	if state != s.state {
		s.state = state
		s.mutations++
	}
	return s.mutations
}

// typeLine writes a line to the standard input of a unit's workload, which is a
// shell. Its exit code is 3 if there is none.
const typeLine = `
for unit in $(systemctl list-units --plain --no-legend "$1" | cut -d ' ' -f 1); do
	group=$(systemctl show --property=ControlGroup --value "$unit")
	for pid in $(find "/sys/fs/cgroup$group" -name cgroup.procs -exec cat {} +); do
		if [ "$(tr '\0' ' ' <"/proc/$pid/cmdline")" = 'sh ' ]; then
			echo "$2" >"/proc/$pid/fd/0"
			exit 0
		fi
	done
done
exit 3`

var errNoWorkload = errors.New("no workload runs")

// typeInto types a line into the workload of a unit.
func (s *suiteSite) typeInto(ctx context.Context, units, line string) error {
	for _, h := range s.hosts {
		_, err := h.Exec(ctx, "sh", "-c", typeLine, "sh", units, line)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 3 {
			continue
		}
		return err
	}
	return errNoWorkload
}

// vanish takes away a grant's instance with all traces. Its unit ends in good
// order, so that nothing stays on the host, but it can't write down its usage,
// for a directory is in the place of that file.
func (s *suiteSite) vanish(ctx context.Context, id backend.GrantID) error {
	_, err := s.everywhere(ctx, "sh", "-c", `
cd /var/lib/compute-bridge/test/grants && [ -d "$1" ] || exit 0
mkdir "$1/$3"
systemctl stop "$2"
rm --recursive --force "$1"`,
		"sh", id.String(), unitPattern("test", &id), guestapi.SpoolFileName)
	return err
}

// failBoot has the next workload end before it is ready: its SSH is kept closed
// meanwhile.
func (s *suiteSite) failBoot(t testing.TB, console string) {
	t.Helper()
	for _, h := range s.hosts {
		if _, err := h.Exec(t.Context(), "nft", "add table inet closed; add chain inet closed forward { type filter hook forward priority -500; }; "+
			"add rule inet closed forward tcp dport 61022 reject with tcp reset"); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), suitePatience)
	done := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-done
	})
	go func() {
		defer close(done)
		defer cancel()
		all := unitPattern("test", nil)
		quoted := "'" + strings.ReplaceAll(console, "\n", `\n`) + `\n'`
		if err := poll(ctx, func() error { return s.typeInto(ctx, all, "printf "+quoted+"; exit 127") }); err != nil {
			t.Errorf("make a workload fail: %v", err)
		}
		err := poll(ctx, func() error {
			units, err := s.everywhere(ctx, "systemctl", "list-units", "--plain", "--no-legend", all)
			if err == nil && len(units) > 0 {
				err = fmt.Errorf("still there: %s", units)
			}
			return err
		})
		if err != nil {
			t.Errorf("wait for the end of a failed workload: %v", err)
		}
		if _, err := s.everywhere(ctx, "nft", "delete table inet closed"); err != nil {
			t.Errorf("open SSH again: %v", err)
		}
	}()
}

// logIn logs in as a requester does and runs a command.
func logIn(ctx context.Context, r backend.Receipt, key redact.Secret) error {
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(r.HostKey))
	if err != nil {
		return fmt.Errorf("host key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(key.Expose())
	if err != nil {
		return fmt.Errorf("login key: %w", err)
	}
	address := net.JoinHostPort(r.Host, strconv.Itoa(int(r.Port)))
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	c, channels, requests, err := ssh.NewClientConn(conn, address, &ssh.ClientConfig{
		User: r.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey),
		HostKeyAlgorithms: []string{hostKey.Type()},
	})
	if err != nil {
		return err
	}
	client := ssh.NewClient(c, channels, requests)
	defer client.Close() //nolint:errcheck // all was read
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	out, err := session.Output("echo $NAME")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(out)); got != "value" {
		return fmt.Errorf("the workload's environment has NAME=%q", got)
	}
	return nil
}

// exceptedOnHosts names the cases that can't apply.
func exceptedOnHosts() map[string]string {
	const elsewhere = "a process can't be killed from within; test/e2e kills the worker's own"
	return map[string]string{
		"watch/an instance that the provider took back is INTERRUPTED": "the operator's own hosts take nothing back",
		"errors/every refusal has its reason and leaves nothing":       "a host that lets the worker in refuses it nothing, and has no quota",
		"errors/clean-up that isn't confirmed is unknown":              "the steps of a host's clean-up make up for each other: one that fails keeps nothing",
		"errors/no secret of the grant is told":                        "a host that lets the worker in refuses it nothing",
		"crash/during Provision, which is then retried":                elsewhere,
		"crash/during Provision, and then Terminate":                   elsewhere,
		"crash/during Terminate, which is then retried":                elsewhere,
		"crash/during Terminate, which nobody retries":                 elsewhere,
	}
}
