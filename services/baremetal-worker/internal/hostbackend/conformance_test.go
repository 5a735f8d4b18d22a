package hostbackend

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
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
	suitePatience = 90 * time.Second
	// suiteUsageInterval is how often the suite's watches report usage.
	suiteUsageInterval = 200 * time.Millisecond
	// suiteSweepInterval and suiteOrphanAge are short, for there are cases that
	// wait for a sweep, but long enough that most restarts come before one.
	suiteSweepInterval = 2 * time.Second
	suiteOrphanAge     = 5 * time.Second
)

// TestLongConformance holds the driver to the Backend contract where something
// goes wrong, on lab hosts that all cases share: what a case leaves behind fails
// that case, by a quick look, and at the end the hosts are searched thoroughly.
// Each sweep takes some of the calls that the worker makes to its hosts and to
// its ledger, at random. The rest of the suite is for the built worker: see
// test/conformance.
func TestLongConformance(t *testing.T) {
	conform(t, backendtest.Harness{
		Only: []string{"errors", "crash", "faults", "orphans"},
		Skip: exceptedOnHosts(), DirectOnly: true, Sweep: backendtest.Sweep{Sample: 6, Parallel: 4},
	})
}

// conform runs the suite. Each of its fixtures has hosts of its own.
func conform(t *testing.T, harness backendtest.Harness) {
	t.Helper()
	free := make(chan []*lab.Host, max(1, harness.Sweep.Parallel))
	var all []*lab.Host
	for range cap(free) {
		var hosts []*lab.Host
		for range suiteRoom {
			hosts = append(hosts, lab.NewHost(t, lab.HostOptions{}))
		}
		free <- hosts
		all = append(all, hosts...)
	}
	dir, image := suiteFiles(t)
	harness.Open = func(t testing.TB) *backendtest.Fixture {
		t.Helper()
		hosts := <-free
		t.Cleanup(func() { free <- hosts })
		return openSuiteSite(t, hosts, dir, image).fixture(t)
	}
	backendtest.Run(t, harness)
	(&hostfixture.Site{BridgeID: "test", Hosts: all}).CheckNothingIsLeft(t)
}

// suiteFiles makes the files that all cases share, none of which the worker
// writes: the guest, and a store with an image.
func suiteFiles(t *testing.T) (dir string, image archive) {
	t.Helper()
	guest, err := guestBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	image = makeArchive(t, ociimage.Shell)
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
	return dir, image
}

// suiteSite is a worker on hosts, as a case's fixture.
type suiteSite struct {
	hosts  *hostfixture.Site
	config Config
	image  backend.Image
	ledger *ledger.Ledger
	secret redact.Secret
	logs   backendtest.Log

	wires *hostfixture.Wires

	mu      sync.Mutex // protects what follows
	life    *ledgertest.Ledger
	runtime *worker.Runtime
	driver  worker.Driver
	give    context.CancelFunc // ends the opening of the driver
	dead    bool
}

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
	s.config.ConnectTimeout.Duration, s.config.LeaseTTL.Duration = callTimeout, 10*time.Second
	s.config.UsageInterval.Duration = suiteUsageInterval
	s.wires = hostfixture.NewWires(new(ledgertest.Points), s.kill)
	for n, tap := range s.wires.Open(t, hosts...) {
		var key config.SecretFile
		loadKey(t, &key, hosts[n].UserKeyFile)
		room := suiteShape.Times(suiteRoom[n])
		s.config.Hosts = append(s.config.Hosts, HostConfig{
			Name: hosts[n].Name, Address: tap.Addr(), PublicHost: hosts[n].Addr.String(), User: "root", KeyFile: key,
			HostKeys: []string{tap.HostKeyLine()}, Region: "lab", Ports: hostfixture.Ports,
			CPUMillicores: int64(room.CPU), RAMMiB: int64(room.RAM), StorageGiB: int64(room.Storage), MaxInstances: 20,
		})
	}
	s.ledger = ledgertest.Open(t)
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("the worker's log:\n%s", s.logs.Bytes())
		}
	})
	return s
}

// start starts a worker, as a new process would.
func (s *suiteSite) start(t testing.TB) (backend.Backend, error) {
	t.Helper()
	life := ledgertest.New(s.ledger, s.wires.Ledger)
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "baremetal", Ledger: life, Secret: s.secret, Metrics: prometheus.NewRegistry(),
		SweepInterval: suiteSweepInterval, OrphanAge: suiteOrphanAge,
		Log: slog.New(slog.NewJSONHandler(&s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		return nil, err
	}
	ctx, give := context.WithCancel(context.WithoutCancel(t.Context()))
	defer give()
	s.wires.Hosts.Refuse(false)
	s.mu.Lock()
	s.life, s.give, s.dead = life, give, false
	s.mu.Unlock()
	driver, err := Open(ctx, s.config, runtime.Env())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.driver, s.runtime = driver, runtime
	s.mu.Unlock()
	if err := runtime.Start(ctx, driver); err != nil {
		s.stop(t)
		return nil, err
	}
	return runtime, nil
}

// kill makes the worker dead at once: it reaches neither its hosts nor its
// ledger any more. What it had sent may still have its effect.
func (s *suiteSite) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life.Kill()
	s.give()
	s.dead = true
	s.wires.Hosts.Refuse(true)
}

// stop ends the worker, if it still runs, and leaves its grants alone.
func (s *suiteSite) stop(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	runtime, driver, dead := s.runtime, s.driver, s.dead
	s.runtime, s.driver = nil, nil
	s.mu.Unlock()
	if driver == nil {
		return
	}
	// One that is dead has nothing to do in good order before it loses its hosts.
	if !dead {
		runtime.Close()
	}
	if err := driver.Close(); err != nil {
		t.Errorf("close the driver: %v", err)
	}
	runtime.Close()
}

func (s *suiteSite) fixture(t testing.TB) *backendtest.Fixture {
	t.Helper()
	owner := newLogin(t)
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	f := &backendtest.Fixture{
		Backend:       b,
		ShortestLife:  2 * time.Second,
		Patience:      suitePatience,
		UsageInterval: suiteUsageInterval,
		Measures:      true,
		Logs:          s.logs.Bytes,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			g, envelope := grant(s.image, owner)
			g.Shape, g.Environment, g.AlmanacSequence = suiteShape, map[string]string{"NAME": "value"}, 3
			return g, envelope
		},
		OrphanAge: suiteOrphanAge,
		Kill:      s.kill,
		CloseGrant: func(ctx context.Context, id backend.GrantID) error {
			return ledgertest.CloseGrant(ctx, s.ledger, ledger.RequestID(id), backend.EndTerminated.String())
		},
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			s.stop(t)
			return s.start(t)
		},
	}
	s.hosts.Fill(t, f)
	s.wires.Fill(t, s.hosts, f)
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

// usable waits until the worker, if it runs, can use its hosts for new grants.
func (s *suiteSite) usable(ctx context.Context) error {
	s.mu.Lock()
	b, ok := s.driver.(*Backend)
	dead := s.dead
	s.mu.Unlock()
	if !ok || dead {
		return nil
	}
	var errs []error
	for _, h := range b.hosts {
		errs = append(errs, poll(ctx, func() error {
			_, err := h.usable()
			return err
		}))
	}
	return errors.Join(errs...)
}

// exceptedOnHosts names the cases that can't apply.
func exceptedOnHosts() map[string]string {
	return map[string]string{
		"watch/an instance that the provider took back is INTERRUPTED": "the operator's own hosts take nothing back",
		"orphans/only what is over, and the bridge's own, is swept":    "the built worker's test, test/e2e, plants things on hosts and sweeps",
	}
}
