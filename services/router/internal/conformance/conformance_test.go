// Package conformance_test holds the router's fleet to the Backend contract. It
// is apart from the fleet's own tests because it takes a minute.
package conformance_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A router is a backend: it is held to the same contract, by the same suite,
// with a real worker runtime behind it, and before that in order a backend that
// never takes anything.
//
// What a worker's calls and crashes do to it is swept where the worker is
// tested, and behind a router in TestLongAFleetHonoursTheContract.
func TestAFleetHonoursTheContract(t *testing.T) {
	h := fleetHarness(backendtest.Sweep{Sample: 2, Parallel: 4})
	h.Only = []string{"identity", "capabilities", "satisfy", "provision", "watch", "terminate", "errors", "ownership"}
	h.DirectOnly = true
	backendtest.Run(t, h)
}

// TestLongAFleetHonoursTheContract runs all of the suite, in process and over
// gRPC.
func TestLongAFleetHonoursTheContract(t *testing.T) {
	backendtest.Run(t, fleetHarness(backendtest.Sweep{Sample: 8, Parallel: 4}))
}

func fleetHarness(sweep backendtest.Sweep) backendtest.Harness {
	return backendtest.Harness{
		Sweep: sweep,
		Open: func(t testing.TB) *backendtest.Fixture {
			t.Helper()
			return openSite(t).fixture(t)
		},
		Skip: map[string]string{
			"orphans/of a crash during Provision, which nobody retries": "the worker behind a router does this, whatever the router does",
			"orphans/of a crash while a cancelled Provision is undone":  "the worker behind a router does this, whatever the router does",
			"orphans/only what is over, and the bridge's own, is swept": "the worker behind a router does this, whatever the router does",
			"provision/the receipt's key logs in":                       "receipts pass a router unchanged; the suite logs in where they are made",
			"errors/clean-up that isn't confirmed is unknown": "a router asks the same backend again, " +
				"which then finds what it had lost, so that Provision succeeds",
		},
	}
}

// site is a worker on a fake provider, with a router before it.
type site struct {
	provider *backendfake.Provider
	secret   redact.Secret
	ledgers  map[string]*ledger.Ledger
	logs     *backendtest.Log

	mu      sync.Mutex
	runtime *worker.Runtime
	driver  *backendfake.Driver
}

// never is a backend that never takes anything, and so has nothing to end.
type never struct{ backend.Backend }

func (never) CanSatisfy(context.Context, backend.Grant) (backend.Satisfaction, error) {
	return backend.Satisfaction{Reason: "never"}, nil
}

func (never) Terminate(context.Context, backend.Handle) (backend.Termination, error) {
	return backend.Termination{State: backend.StateTerminated}, nil
}

// usageInterval is how often the worker looks at usage.
const usageInterval = 50 * time.Millisecond

var (
	siteShape = backend.Shape{CPU: 1000, RAM: 512, Storage: 4}
	siteImage = backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{1}}, Kind: backend.ImageOCIArchive}
)

func openSite(t testing.TB) *site {
	t.Helper()
	s := &site{
		logs: &backendtest.Log{}, ledgers: map[string]*ledger.Ledger{},
		provider: backendfake.NewProvider(backendfake.Options{
			BootTime: 3 * time.Millisecond, DeleteTime: 5 * time.Millisecond,
			Hosts: []backendfake.Host{
				{Name: "one", Region: "east", Capacity: siteShape.Times(2)}, {Name: "two", Region: "west", Capacity: siteShape.Times(2)},
			},
		}),
	}
	t.Cleanup(s.provider.Close)
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		t.Fatal(err)
	}
	s.secret = redact.New(secret)
	for _, name := range []string{"worker", "router"} {
		s.ledgers[name] = ledgertest.Open(t)
	}
	t.Cleanup(s.stop)
	return s
}

// start starts the worker and the router.
func (s *site) start(t testing.TB) backend.Backend {
	t.Helper()
	log := slog.New(slog.NewJSONHandler(s.logs, nil))
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "fake", Ledger: s.ledgers["worker"], Secret: s.secret, Log: log, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	driver := backendfake.Open(s.provider, runtime.Env(), backendfake.DriverOptions{BootTimeout: 4 * time.Second, UsageInterval: usageInterval})
	if err := runtime.Start(context.WithoutCancel(t.Context()), driver); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.runtime, s.driver = runtime, driver
	s.mu.Unlock()
	router, err := fleet.New(fleet.Config{
		// Called like the worker, because an instance tells the name of that.
		Name: "fake", Claims: claims.New(s.ledgers["router"]), Log: log,
		Members: []fleet.Member{{
			Name: "never", Backend: never{}, AnswerTimeout: 10 * time.Second,
			Observe: func() fleet.Observation { return fleet.Observation{LastSeen: time.Now()} },
		}, {
			Name: "fake", Backend: runtime, AnswerTimeout: 10 * time.Second,
			Observe: func() fleet.Observation {
				c, err := runtime.Capabilities(context.WithoutCancel(t.Context()))
				if err != nil {
					return fleet.Observation{LastError: err.Error()}
				}
				return fleet.Observation{Capabilities: c, LastSeen: time.Now()}
			},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return router
}

// stop ends the worker process, which counts as dead from the first moment.
func (s *site) stop() {
	s.mu.Lock()
	runtime, driver := s.runtime, s.driver
	s.runtime = nil
	s.mu.Unlock()
	if runtime != nil {
		driver.Kill()
		runtime.Close()
	}
}

func (s *site) fixture(t testing.TB) *backendtest.Fixture {
	t.Helper()
	login := backendtest.NewLogin(t)
	fixture := &backendtest.Fixture{
		Backend: s.start(t),
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			return backendtest.NewGrant(siteImage, siteShape, login)
		},
		Capacity:     4,
		ShortestLife: time.Second,
		Leftovers: func(context.Context) ([]backendtest.Leftover, error) {
			var all []backendtest.Leftover
			for _, name := range s.provider.Names() {
				parts := strings.Split(name, "-") // cb-<bridge>-<request id>-<attempt>
				id, err := backend.ParseGrantID(parts[len(parts)-2])
				if err != nil {
					return nil, err
				}
				all = append(all, backendtest.Leftover{GrantID: id, Name: name})
			}
			return all, nil
		},
		History:   func(id backend.GrantID) backendtest.History { return backendtest.History(s.provider.History(id)) },
		Mutations: s.provider.Mutations,
		Exit: func(id backend.GrantID, status backendtest.ExitStatus) error {
			if !s.provider.Exit(id, backendfake.ExitStatus{Code: status.Code, Signal: status.Signal}) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		Vanish: func(id backend.GrantID) error {
			if !s.provider.Vanish(id) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		Interrupt: func(id backend.GrantID) error {
			if !s.provider.Interrupt(id) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		FailBoot:      func(console string) { s.provider.FailBoot(backendfake.ExitStatus{Code: 127, Console: console}) },
		UsageInterval: usageInterval,
		Inject: func(f backendtest.Fault) backendtest.Injection {
			times := 1
			if f.Always {
				times = -1
			}
			return s.provider.Inject(backendfake.Op(f.Point), backendfake.Fault{
				Kind: faults[f.Kind], Skip: max(f.Nth, 1) - 1, Times: times, GrantID: f.GrantID,
			})
		},
		Record: func(id backend.GrantID) func() []backendtest.Call {
			before := len(s.provider.Calls())
			return func() []backendtest.Call {
				var calls []backendtest.Call
				for _, c := range s.provider.Calls()[before:] {
					if id == (backend.GrantID{}) || c.GrantID == id {
						calls = append(calls, backendtest.Call{
							Side: backendtest.SideProvider, Point: string(c.Op), Mutates: c.Op.Mutates(), Varies: c.Op == backendfake.OpWait,
						})
					}
				}
				return calls
			}
		},
		CreatePoint: string(backendfake.OpCreate),
		ReadPoint:   string(backendfake.OpList),
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			s.stop()
			return s.start(t), nil
		},
		Kill: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.driver.Kill()
		},
		CloseGrant: func(ctx context.Context, id backend.GrantID) error {
			return ledgertest.CloseGrant(ctx, s.ledgers["worker"], ledger.RequestID(id), backend.EndTerminated.String())
		},
		Runs: func(id backend.GrantID) bool { return s.provider.Running(id) > 0 },
		Logs: s.logs.Bytes,
	}
	fixture.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := fixture.Satisfiable()
		g.Shape = siteShape.Times(3)
		return g, envelope
	}
	return fixture
}

var faults = map[backendtest.FaultKind]backendfake.Kind{
	backendtest.FaultCapacity: backendfake.Capacity, backendtest.FaultQuota: backendfake.Quota, backendtest.FaultDenied: backendfake.Denied,
	backendtest.FaultUnauthenticated: backendfake.Unauthenticated, backendtest.FaultThrottled: backendfake.Throttled,
	backendtest.FaultUnavailable: backendfake.Unavailable, backendtest.FaultSlow: backendfake.Slow,
	backendtest.FaultLostAnswer: backendfake.LostAnswer, backendtest.FaultCrashBefore: backendfake.CrashBefore,
	backendtest.FaultCrashAfter: backendfake.CrashAfter,
}
