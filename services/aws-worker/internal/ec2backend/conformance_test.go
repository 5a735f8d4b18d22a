package ec2backend

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
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
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
)

// suiteShape is what a grant of the suite takes: a small type, of which some fit
// into suiteRoom instances.
var suiteShape = backend.Shape{CPU: 500, RAM: 256, Storage: 1}

const (
	suiteRegion = "eu-central-1"
	// suiteRoom is how many grants fit at once.
	suiteRoom = 4
	// suiteSpeed is how many times faster than the real one the cloud is: an
	// instance is pending for 5 ms and takes 30 ms to end.
	suiteSpeed = 1000
	// suitePatience is how long a busy machine with two cores may take for what
	// takes a second on an idle one.
	suitePatience = 60 * time.Second
	// suiteUsageInterval is how often the suite's watches report usage.
	suiteUsageInterval = 200 * time.Millisecond
	// suiteOrphanAge is short, for there are cases that wait for a sweep, but long
	// enough that most restarts come before one.
	suiteOrphanAge = 3 * time.Second
)

// TestConformance holds the driver to the Backend contract on a simulated EC2. What
// is about who calls and what is said goes over gRPC, too; what is about ending,
// the built worker's test has (test/conformance/aws).
func TestConformance(t *testing.T) {
	conform(t, backendtest.Harness{Only: []string{"identity", "satisfy", "ownership"}}, 0)
	conform(t, backendtest.Harness{
		Only: []string{"capabilities", "provision", "watch", "errors"}, DirectOnly: true, Sweep: backendtest.Sweep{Sample: 3},
	}, 0)
}

// TestLongConformance does so with all over gRPC, with the worker killed at every
// call, and with a sample of all the calls that may fail.
func TestLongConformance(t *testing.T) {
	t.Run("grpc", func(t *testing.T) {
		conform(t, backendtest.Harness{
			Only: []string{"capabilities", "provision", "watch", "terminate", "errors"}, Sweep: backendtest.Sweep{Sample: 3},
		}, 0)
	})
	t.Run("crash", func(t *testing.T) {
		conform(t, backendtest.Harness{
			Only: []string{"crash"}, DirectOnly: true, Sweep: backendtest.Sweep{Parallel: suiteParallel},
		}, 0)
	})
	t.Run("faults", func(t *testing.T) {
		conform(t, backendtest.Harness{
			Only: []string{"faults"}, DirectOnly: true, Sweep: backendtest.Sweep{Sample: 40, Parallel: suiteParallel},
		}, 0)
	})
	t.Run("orphans", func(t *testing.T) {
		conform(t, backendtest.Harness{
			Only: []string{"orphans"}, DirectOnly: true, Sweep: backendtest.Sweep{Parallel: suiteParallel},
		}, suiteOrphanAge)
	})
}

// suiteParallel is how many sites a sweep uses at once: most of the time they
// wait.
const suiteParallel = 6

// conform runs the suite. Each of its fixtures has a cloud of its own. orphanAge
// is how soon the worker takes what is cut off for an orphan; 0 means so late that
// no case sees it, so that it can't hide what a retry should have done.
func conform(t *testing.T, harness backendtest.Harness, orphanAge time.Duration) {
	t.Helper()
	conformAs(t, harness, orphanAge, func(*Config) {}, func(*backendtest.Fixture) {})
}

// conformAs is conform with a changed configuration and a changed fixture.
func conformAs(t *testing.T, harness backendtest.Harness, orphanAge time.Duration, change func(*Config), wrap func(*backendtest.Fixture)) {
	t.Helper()
	harness.Skip = maps.Clone(harness.Skip)
	if harness.Skip == nil {
		harness.Skip = map[string]string{}
	}
	if orphanAge == 0 {
		harness.Skip["orphans/only what is over, and the bridge's own, is swept"] = "needs a worker that soon looks for orphans: TestLongConformance/orphans"
	}
	harness.Open = func(t testing.TB) *backendtest.Fixture {
		t.Helper()
		s := openSuiteSite(t, orphanAge)
		change(&s.config)
		f := s.fixture(t)
		wrap(f)
		return f
	}
	backendtest.Run(t, harness)
}

// suiteSite is a worker on a simulated EC2, as a case's fixture.
type suiteSite struct {
	cloud     *ec2fixture.Site
	config    Config
	ledger    *ledger.Ledger
	points    *ledgertest.Points
	secret    redact.Secret
	login     string
	orphanAge time.Duration
	logs      backendtest.Log

	mu      sync.Mutex // protects what follows
	life    *ledgertest.Ledger
	runtime *worker.Runtime
	driver  worker.Driver
	give    context.CancelFunc // ends the opening of the driver
	dead    bool
}

// openSuiteSite has a ledger and a cloud of its own, so that each case's worker
// is new.
func openSuiteSite(t testing.TB, orphanAge time.Duration, options ...func(*ec2fixture.Options)) *suiteSite {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // Never fails.
	s := &suiteSite{secret: redact.New(secret), points: new(ledgertest.Points), orphanAge: orphanAge, login: backendtest.NewLogin(t)}
	o := ec2fixture.Options{BridgeID: "test", Backend: "aws", Region: suiteRegion, Speed: suiteSpeed, Kill: s.kill, Ledger: s.points}
	for _, change := range options {
		change(&o)
	}
	s.cloud = ec2fixture.Open(t, o)
	s.config = suiteConfig(t, s.cloud)
	s.ledger = ledgertest.Open(t)
	t.Cleanup(func() {
		s.stop(t)
		s.cloud.CheckNothingIsLeft(t)
		if t.Failed() {
			t.Logf("the worker's log:\n%s", s.logs.Bytes())
		}
	})
	return s
}

// suiteConfig is a configuration whose waits fit the cloud's speed.
func suiteConfig(t testing.TB, cloud *ec2fixture.Site) Config {
	t.Helper()
	var c Config
	c.SetDefaults()
	credentials := filepath.Join(t.TempDir(), "credentials")
	text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", cloud.AccessKey, cloud.SecretKey)
	if err := os.WriteFile(credentials, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c.CredentialsFile = config.Path(credentials)
	c.Endpoint = cloud.Endpoint
	c.Regions = []RegionConfig{{Name: suiteRegion, Image: ImageConfig{SSMParameter: cloud.ImageParameter}}}
	c.InstanceFamilies = []string{"t3"}
	c.MaxConcurrentInstances = suiteRoom
	c.Guest.AMD64 = GuestBinary{File: config.Path(cloud.GuestFile), URL: cloud.GuestURL}
	c.ImageStore.Base = cloud.StoreBase
	c.BootTimeout.Duration = 5 * time.Second
	c.UndoTimeout.Duration = 2 * time.Second
	c.PollInterval.Duration = 40 * time.Millisecond
	c.UsageInterval.Duration = suiteUsageInterval
	c.VisibilityDelay.Duration = 20 * time.Millisecond
	c.MetricsTimeout.Duration = time.Second
	c.StockOutMemory.Duration = time.Millisecond // or a retry is refused what a fault has refused
	// The cloud has no limits either: the suite would mostly wait for them.
	c.APILimits = []APILimitConfig{{Action: anyAction, Burst: 10000, PerSecond: 10000}}
	c.retryBackoff = 10 * time.Millisecond
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return c
}

// start starts a worker, as a new process would.
func (s *suiteSite) start(t testing.TB) (backend.Backend, error) {
	t.Helper()
	life := ledgertest.New(s.ledger, s.points)
	c := worker.RuntimeConfig{
		BridgeID: "test", Backend: "aws", Ledger: life, Secret: s.secret, Metrics: prometheus.NewRegistry(),
		Log: slog.New(slog.NewJSONHandler(&s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if s.orphanAge > 0 {
		c.SweepInterval, c.OrphanAge = s.orphanAge/4, s.orphanAge
	}
	runtime, err := worker.NewRuntime(c)
	if err != nil {
		return nil, err
	}
	ctx, give := context.WithCancel(context.WithoutCancel(t.Context()))
	defer give()
	s.cloud.Refuse(false)
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

// kill makes the worker dead at once: it reaches neither the cloud nor its ledger
// any more. What it had sent may still have its effect.
func (s *suiteSite) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life.Kill()
	s.give()
	s.dead = true
	s.cloud.Refuse(true)
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
	// One that is dead has nothing to do in good order before it loses the cloud.
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
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	f := &backendtest.Fixture{
		Backend:       b,
		Capacity:      suiteRoom,
		ShortestLife:  2 * time.Second,
		Patience:      suitePatience,
		UsageInterval: suiteUsageInterval,
		OrphanAge:     s.orphanAge,
		Logs:          s.logs.Bytes,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			return backendtest.NewGrant(s.cloud.Image, suiteShape, s.login)
		},
		Kill: s.kill,
		CloseGrant: func(ctx context.Context, id backend.GrantID) error {
			return ledgertest.CloseGrant(ctx, s.ledger, ledger.RequestID(id), backend.EndTerminated.String())
		},
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			s.stop(t)
			return s.start(t)
		},
	}
	s.cloud.Fill(t, f)
	f.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := f.Satisfiable()
		g.Shape.CPU = 64000 // more than any t3 has
		return g, envelope
	}
	return f
}
