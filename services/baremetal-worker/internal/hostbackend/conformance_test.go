package hostbackend

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/hostfixture"
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
		hostfixture.MakeFaulty(t, h)
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
	(&hostfixture.Site{BridgeID: "test", Hosts: hosts}).CheckNothingIsLeft(t)
}

// suiteSite is a worker on hosts, as a case's fixture.
type suiteSite struct {
	hosts  *hostfixture.Site
	config Config
	image  backend.Image
	ledger *ledger.Ledger
	secret redact.Secret
	logs   lockedBuffer

	runtime *worker.Runtime
	driver  worker.Driver
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
	s := &suiteSite{secret: redact.New(secret)}
	s.hosts = &hostfixture.Site{BridgeID: "test", Hosts: hosts, Patience: suitePatience, Usable: s.usable}
	digest, err := backend.ParseDigest("sha256:" + image.sha256)
	if err != nil {
		t.Fatal(err)
	}
	s.image = backend.Image{Digest: digest, Kind: backend.ImageOCIArchive}
	s.config.SetDefaults()
	s.config.GuestBinary = config.Path(filepath.Join(dir, "guest"))
	s.config.ImageStore.Base = filepath.Join(dir, "images")
	s.config.StopGrace.Duration = time.Second
	s.config.UsageInterval.Duration = suiteUsageInterval
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
		Logs:          s.logs.bytes,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			g, envelope := grant(s.image, owner)
			g.Shape, g.Environment, g.AlmanacSequence = suiteShape, map[string]string{"NAME": "value"}, 3
			return g, envelope
		},
		Kill: func() { s.stop(t) },
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			s.stop(t)
			return s.start(t), nil
		},
	}
	s.hosts.Fill(t, f)
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

// usable waits until the worker, if it runs, can use its hosts.
func (s *suiteSite) usable(ctx context.Context) error {
	b, ok := s.driver.(*Backend)
	if !ok {
		return nil // stopped
	}
	var errs []error
	for _, h := range b.hosts {
		errs = append(errs, h.wait(ctx))
	}
	return errors.Join(errs...)
}

// exceptedOnHosts names the cases that can't apply.
func exceptedOnHosts() map[string]string {
	const elsewhere = "a process can't be killed from within; test/e2e kills the worker's own"
	return map[string]string{
		"watch/an instance that the provider took back is INTERRUPTED":    "the operator's own hosts take nothing back",
		"errors/every refusal has its reason and leaves nothing":          "a host that lets the worker in refuses it nothing, and has no quota",
		"errors/clean-up that isn't confirmed is unknown":                 "the steps of a host's clean-up make up for each other: one that fails keeps nothing",
		"errors/no secret of the grant is told":                           "a host that lets the worker in refuses it nothing",
		"crash/during Provision with a sealed key, which is then retried": elsewhere,
		"orphans/of a crash during Provision, which nobody retries":       elsewhere,
		"orphans/only what is over, and the bridge's own, is swept":       elsewhere,
		"orphans/of a crash while a cancelled Provision is undone":        elsewhere,
		"crash/while a cancelled Provision is retried":                    elsewhere,
		"crash/during a watch until the workload's end":                   elsewhere,
		"crash/during a watch until the deadline":                         elsewhere,
		"crash/during Terminate of what is being made":                    elsewhere,
		"crash/during a restart":                                          elsewhere,
		"faults/at each call of Provision":                                elsewhere,
		"faults/at each call of Terminate":                                elsewhere,
		"faults/at each call of a watch until the workload's end":         elsewhere,
		"faults/at each call of a restart":                                elsewhere,
		"crash/during Provision, which is then retried":                   elsewhere,
		"crash/during Provision, and then Terminate":                      elsewhere,
		"crash/during Terminate, which is then retried":                   elsewhere,
		"crash/during Terminate, which nobody retries":                    elsewhere,
	}
}
