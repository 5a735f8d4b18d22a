package backendtest

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// breakage is what a broken worker does differently.
type breakage struct {
	// provider changes the provider.
	provider func(*backendfake.Options)
	// patience is the suite's; 0 means one in which what hangs fails soon.
	patience time.Duration
	// bugs are the driver's.
	bugs []backendfake.Bug
	// orphanAge is how soon the worker takes what is cut off for an orphan; 0
	// means too late for any case.
	orphanAge time.Duration
	// amnesia gives the worker an empty ledger at each restart.
	amnesia bool
	// ledger wraps what the worker has of the ledger.
	ledger func(worker.Ledger) worker.Ledger
	// janitor, if not nil, runs beside each worker, on its part of the provider,
	// until ctx ends.
	janitor func(ctx context.Context, l *ledger.Ledger, d *backendfake.Driver)
	// backend wraps the whole.
	backend func(backend.Backend) backend.Backend
}

// fake is a worker on a fake provider, as a test's fixture.
type fake struct {
	provider *backendfake.Provider
	ledger   *ledger.Ledger
	secret   redact.Secret
	logs     *Log
	broken   breakage
	// lags is set if a read may show what was, so that a delete is repeated for as
	// long as that takes.
	lags bool

	// points is where the calls of all lives to their ledger pass.
	points *ledgertest.Points

	mu      sync.Mutex
	runtime *worker.Runtime
	driver  *backendfake.Driver
	// dismiss ends the janitor.
	dismiss func()
}

// The fake hosts: two grants fit on each.
var (
	fakeImage = backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{1}}, Kind: backend.ImageOCIArchive}
	fakeShape = backend.Shape{CPU: 1000, RAM: 512, Storage: 4}
	fakeHosts = []backendfake.Host{
		{Name: "one", Region: "east", Capacity: fakeShape.Times(2).Add(backend.Shape{CPU: 10})},
		{Name: "two", Region: "west", Capacity: fakeShape.Times(2).Add(backend.Shape{RAM: 100})},
	}
)

// openFake returns an opener of fixtures with a worker that is broken in one
// way, or in none.
func openFake(options backendfake.Options, broken breakage) func(testing.TB) *Fixture {
	return func(t testing.TB) *Fixture {
		t.Helper()
		options := options
		options.Hosts = fakeHosts
		if broken.provider != nil {
			broken.provider(&options)
		}
		f := &fake{provider: backendfake.NewProvider(options), logs: &Log{}, broken: broken, points: &ledgertest.Points{}, lags: options.VisibleAfter > 0}
		t.Cleanup(f.provider.Close)
		secret := make([]byte, 32)
		_, _ = rand.Read(secret) // Never fails.
		f.secret = redact.New(secret)
		f.ledger = ledgertest.Open(t)
		t.Cleanup(func() {
			f.kill()
			f.stop()
		})
		return f.fixture(t, options)
	}
}

func (f *fake) fixture(t testing.TB, options backendfake.Options) *Fixture {
	t.Helper()
	login := NewLogin(t)
	opened, err := f.start(t)
	if err != nil {
		t.Fatal(err)
	}
	fixture := &Fixture{
		Backend: opened,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			return NewGrant(fakeImage, fakeShape, login)
		},
		Capacity:     4,
		ShortestLife: 500 * time.Millisecond,
		Leftovers: func(context.Context) ([]Leftover, error) {
			var out []Leftover
			for _, name := range f.provider.Names() {
				// cb-<bridge>-<request id>-<attempt>
				parts := strings.Split(name, "-")
				id, err := backend.ParseGrantID(parts[len(parts)-2])
				if err != nil {
					return nil, err
				}
				out = append(out, Leftover{GrantID: id, Name: name})
			}
			return out, nil
		},
		History:   func(id backend.GrantID) History { return History(f.provider.History(id)) },
		Mutations: f.provider.Mutations,
		Exit: func(id backend.GrantID, status ExitStatus) error {
			if !f.provider.Exit(id, backendfake.ExitStatus{Code: status.Code, Signal: status.Signal}) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		Vanish: func(id backend.GrantID) error {
			if !f.provider.Vanish(id) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		Interrupt: func(id backend.GrantID) error {
			if !f.provider.Interrupt(id) {
				return fmt.Errorf("nothing runs for grant %s", id)
			}
			return nil
		},
		FailBoot:      func(console string) { f.provider.FailBoot(backendfake.ExitStatus{Code: 127, Console: console}) },
		UsageInterval: usageInterval,
		Measures:      true,
		Inject:        f.inject,
		Record:        f.record,
		CreatePoint:   string(backendfake.OpCreate),
		ReadPoint:     string(backendfake.OpList),
		Reopen: func(t testing.TB) (backend.Backend, error) {
			t.Helper()
			f.stop()
			if f.broken.amnesia {
				f.ledger = ledgertest.Open(t)
				t.Cleanup(f.stop) // Before the ledger is closed.
			}
			return f.start(t)
		},
		Kill: f.kill,
		CloseGrant: func(ctx context.Context, id backend.GrantID) error {
			return ledgertest.CloseGrant(ctx, f.ledger, ledger.RequestID(id), backend.EndTerminated.String())
		},
		Plant: func(_ context.Context, p Planted) error {
			f.provider.Plant(cmp.Or(p.Bridge, "test"), p.GrantID, p.ValidTo)
			return nil
		},
		Uproot: func(_ context.Context, p Planted) error {
			f.provider.Uproot(cmp.Or(p.Bridge, "test"), p.GrantID)
			return nil
		},
		Runs:      func(id backend.GrantID) bool { return f.provider.Running(id) > 0 },
		OrphanAge: f.broken.orphanAge,
		Logs:      f.logs.Bytes,
	}
	fixture.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := fixture.Satisfiable()
		g.Shape = fakeShape.Times(3)
		return g, envelope
	}
	if options.WithSSH {
		fixture.Login = LogIn
	}
	return fixture
}

// record writes down the calls for a grant, or all.
func (f *fake) record(id backend.GrantID) (stop func() []Call) {
	before := len(f.provider.Calls())
	var ids []ledger.RequestID
	if id != (backend.GrantID{}) {
		ids = append(ids, ledger.RequestID(id))
	}
	ledgerCalls := f.points.Record(ids...)
	return func() []Call {
		var calls []Call
		for _, c := range ledgerCalls() {
			// The background makes calls for nobody in particular.
			varies := c.RequestID == ledger.RequestID{}
			calls = append(calls, Call{Side: SideLedger, Point: c.Point, Mutates: c.Mutates, Varies: varies})
		}
		deleted := map[backend.GrantID]bool{}
		for _, c := range f.provider.Calls()[before:] {
			if id == (backend.GrantID{}) || c.GrantID == id {
				again := c.Op == backendfake.OpDelete && deleted[c.GrantID]
				deleted[c.GrantID] = deleted[c.GrantID] || c.Op == backendfake.OpDelete
				varies := c.Op == backendfake.OpWait || c.GrantID == backend.GrantID{} || again && f.lags
				calls = append(calls, Call{Side: SideProvider, Point: string(c.Op), Mutates: c.Op.Mutates(), Varies: varies})
			}
		}
		return calls
	}
}

func (f *fake) inject(fault Fault) Injection {
	if fault.Side == SideLedger {
		return f.points.Inject(ledgertest.Fault{
			Point: fault.Point, Nth: fault.Nth, Kind: fakeLedgerKinds[fault.Kind], Always: fault.Always,
			RequestID: ledger.RequestID(fault.GrantID), Crash: f.kill,
		})
	}
	times := 1
	if fault.Always {
		times = -1
	}
	return f.provider.Inject(backendfake.Op(fault.Point), backendfake.Fault{
		Kind: fakeKinds[fault.Kind], Skip: max(fault.Nth, 1) - 1, Times: times, GrantID: fault.GrantID,
	})
}

// fakeLedgerKinds translates the suite's faults of the ledger.
var fakeLedgerKinds = map[FaultKind]ledgertest.Kind{
	FaultUnavailable: ledgertest.Refuse, FaultSlow: ledgertest.Slow, FaultLostAnswer: ledgertest.LoseAnswer,
	FaultCrashBefore: ledgertest.CrashBefore, FaultCrashAfter: ledgertest.CrashAfter,
}

// fakeKinds translates the suite's faults.
var fakeKinds = map[FaultKind]backendfake.Kind{
	FaultCapacity: backendfake.Capacity, FaultQuota: backendfake.Quota, FaultDenied: backendfake.Denied,
	FaultUnauthenticated: backendfake.Unauthenticated, FaultThrottled: backendfake.Throttled,
	FaultUnavailable: backendfake.Unavailable, FaultSlow: backendfake.Slow, FaultLostAnswer: backendfake.LostAnswer,
	FaultCrashBefore: backendfake.CrashBefore, FaultCrashAfter: backendfake.CrashAfter,
}

// usageInterval is how often the fake reports usage.
const usageInterval = 20 * time.Millisecond

// start starts a worker process.
func (f *fake) start(t testing.TB) (backend.Backend, error) {
	t.Helper()
	life := ledgertest.New(f.ledger, f.points)
	var store worker.Ledger = life
	if f.broken.ledger != nil {
		store = f.broken.ledger(life)
	}
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "fake", Ledger: store, Secret: f.secret,
		SweepInterval: f.broken.orphanAge / 4, OrphanAge: f.broken.orphanAge, // 0 means the defaults
		Log: slog.New(slog.NewJSONHandler(f.logs, nil)), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		return nil, err
	}
	driver := backendfake.Open(f.provider, runtime.Env(), backendfake.DriverOptions{
		BootTimeout: 4 * time.Second, UsageInterval: usageInterval, Bugs: f.broken.bugs,
		OnDeath: life.Kill,
	})
	f.mu.Lock()
	f.runtime, f.driver = runtime, driver
	f.mu.Unlock()
	if err := runtime.Start(t.Context(), driver); err != nil {
		f.stop()
		return nil, err
	}
	if f.broken.janitor != nil {
		f.employ(t, driver)
	}
	if f.broken.backend != nil {
		return f.broken.backend(runtime), nil
	}
	return runtime, nil
}

// employ runs the janitor until the worker stops.
func (f *fake) employ(t testing.TB, driver *backendfake.Driver) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var working sync.WaitGroup
	working.Go(func() { f.broken.janitor(ctx, f.ledger, driver) })
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dismiss = func() {
		cancel()
		working.Wait()
	}
}

// stop stops the worker process in good order, if it isn't dead.
func (f *fake) stop() {
	f.mu.Lock()
	runtime, dismiss := f.runtime, f.dismiss
	f.runtime, f.dismiss = nil, nil
	f.mu.Unlock()
	if dismiss != nil {
		dismiss()
	}
	if runtime != nil {
		runtime.Close()
	}
}

// kill ends the worker process.
func (f *fake) kill() {
	f.mu.Lock()
	driver := f.driver
	f.mu.Unlock()
	driver.Kill()
}

// plain is a provider that takes a little time for everything.
var plain = backendfake.Options{BootTime: 3 * time.Millisecond, DeleteTime: 5 * time.Millisecond, WithSSH: true}

// lagging is a provider like many clouds: reads and deletes find an instance
// only some time after it was made, and its own limits count too.
var lagging = backendfake.Options{
	BootTime: 5 * time.Millisecond, DeleteTime: 15 * time.Millisecond, VisibleAfter: 20 * time.Millisecond, EnforceCapacity: true,
}

func TestFakeHonoursTheContractWhenReadsLag(t *testing.T) {
	h := Harness{Open: openFake(lagging, breakage{}), Sweep: Sweep{Sample: 4, Parallel: 4}}
	for _, c := range cases() {
		group, _, _ := strings.Cut(c.name, "/")
		if slices.Contains([]string{"provision", "terminate", "errors", "crash"}, group) && slices.Contains(c.needs, needInject) {
			t.Run(c.name, func(t *testing.T) { runCase(t, h, c, direct, &report{}) })
		}
	}
}

// needOrphans names the cases that need a worker which soon looks for orphans.
// Elsewhere such a one would hide that a call doesn't clean up after itself.
func needOrphans() map[string]string {
	skip := map[string]string{}
	for _, c := range cases() {
		if slices.Contains(c.needs, needOrphanAge) {
			skip[c.name] = "needs a worker that soon looks for orphans: TestFakeUndoesOrphans"
		}
	}
	return skip
}

var withOrphans = breakage{orphanAge: 300 * time.Millisecond}

func TestFakeHonoursTheContract(t *testing.T) {
	Run(t, Harness{Open: openFake(plain, breakage{}), Skip: needOrphans(), Sweep: Sweep{Sample: 16, Parallel: 4}})
}

func TestFakeUndoesOrphans(t *testing.T) {
	Run(t, Harness{Open: openFake(plain, withOrphans), Only: []string{"orphans"}, Sweep: Sweep{Sample: 16, Parallel: 4}})
}

func TestLongFakeSurvivesEveryCrashAndFault(t *testing.T) {
	Run(t, Harness{Open: openFake(plain, breakage{}), Only: []string{"crash", "faults"}, Sweep: Sweep{Parallel: 6}})
}

func TestLongFakeUndoesOrphansOfEveryCrash(t *testing.T) {
	Run(t, Harness{Open: openFake(plain, withOrphans), Only: []string{"orphans"}, Sweep: Sweep{Parallel: 6}})
}

func TestLongFakeSurvivesEveryCrashAndFaultWhenReadsLag(t *testing.T) {
	Run(t, Harness{Open: openFake(lagging, breakage{}), Only: []string{"crash", "faults"}, Sweep: Sweep{Parallel: 6}, DirectOnly: true})
}
