package worker_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// Ages of the workers here; they are the defaults.
const (
	orphanAge = 2 * time.Minute
	grace     = time.Minute
)

// world is a fake provider and the workers and janitors that come and go.
type world struct {
	t        *testing.T
	provider *backendfake.Provider
	ledger   *ledger.Ledger
	points   *ledgertest.Points
	bridge   string
	backend  string
}

func newWorld(t *testing.T, options backendfake.Options) *world {
	t.Helper()
	options.Hosts = []backendfake.Host{{Name: "host-1", Region: "r", Capacity: backend.Shape{CPU: 100_000, RAM: 100_000, Storage: 1000}}}
	w := &world{t: t, provider: backendfake.NewProvider(options), points: &ledgertest.Points{}, bridge: "test", backend: "fake"}
	t.Cleanup(w.provider.Close)
	w.newLedger()
	return w
}

// newLedger is what an operator has who lost the old one.
func (w *world) newLedger() {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "ledger.db")
	err := ledgertest.Create(path)
	if err == nil {
		w.ledger, err = ledger.Open(w.t.Context(), ledger.Config{Path: path})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	l := w.ledger
	w.t.Cleanup(func() { _ = l.Close() })
}

func (w *world) runtime(l worker.Ledger, janitor bool) *worker.Runtime {
	w.t.Helper()
	secret := sha256.Sum256([]byte("one for all of them"))
	r, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: w.bridge, Backend: w.backend, Ledger: l, Secret: redact.New(secret[:]), Janitor: janitor,
		OrphanAge: orphanAge, Grace: grace, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// life is a worker's process.
type life struct {
	*worker.Runtime
	driver *backendfake.Driver
	ledger *ledgertest.Ledger
}

func (w *world) work() *life {
	w.t.Helper()
	l := &life{ledger: ledgertest.New(w.ledger, &ledgertest.Points{})}
	l.Runtime = w.runtime(l.ledger, false)
	l.driver = backendfake.Open(w.provider, l.Env(), backendfake.DriverOptions{})
	if err := l.Start(w.t.Context(), l.driver); err != nil {
		w.t.Fatal(err)
	}
	return l
}

// kill is kill -9: neither provider nor ledger hear of the process again.
func (l *life) kill() {
	l.driver.Kill()
	l.ledger.Kill()
	l.Close()
}

func janitorGrant(t *testing.T, n byte) (backend.Grant, backend.Envelope) {
	t.Helper()
	pair, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	g := backend.Grant{
		ID: backend.GrantID{n}, PostHash: [32]byte{7}, ProviderID: slices.Repeat([]byte{5}, 32),
		Image:        backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{8}}, Kind: backend.ImageOCIArchive},
		Shape:        backend.Shape{CPU: 1000, RAM: 512, Storage: 2},
		MinIsolation: backend.IsolationContainer, ValidTo: time.Now().Add(time.Hour),
	}
	return g, backend.Envelope{SSHPublicKey: pair.Public.String(), PostHash: g.PostHash}
}

func client(t *testing.T) context.Context {
	t.Helper()
	return backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleOperator})
}

// provision makes grant n with its worker.
func (l *life) provision(t *testing.T, n byte) (backend.GrantID, error) {
	t.Helper()
	g, e := janitorGrant(t, n)
	_, err := l.Provision(client(t), g, e)
	return g.ID, err
}

// ready is a grant that runs.
func (l *life) ready(t *testing.T, n byte) backend.GrantID {
	t.Helper()
	id, err := l.provision(t, n)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// sweep is one run of the janitor. Nothing may change in a dry run.
func (w *world) sweep(dryRun bool) (worker.SweepReport, error) {
	w.t.Helper()
	before := w.provider.Mutations()
	recorded := w.points.Record()
	r := w.runtime(ledgertest.New(w.ledger, w.points), true)
	driver := backendfake.Open(w.provider, r.Env(), backendfake.DriverOptions{})
	report, err := r.SweepOnce(w.t.Context(), driver, worker.SweepOptions{DryRun: dryRun, ActLimit: 10 * time.Second})
	calls := recorded()
	if dryRun {
		if n := w.provider.Mutations() - before; n > 0 {
			w.t.Errorf("a dry run made %d changes at the provider", n)
		}
		for _, c := range calls {
			if c.Mutates {
				w.t.Errorf("a dry run called %s", c.Point)
			}
		}
	}
	return report, err
}

func (w *world) final(id backend.GrantID) *backend.SignedLog {
	w.t.Helper()
	log, err := w.runtime(w.ledger, true).ComputeLog(client(w.t), id)
	if err != nil {
		w.t.Fatal(err)
	}
	if log == nil || !log.Log.Final {
		return nil
	}
	return log
}

func (w *world) openAttempts(id backend.GrantID) int {
	w.t.Helper()
	attempts, err := w.ledger.Attempts(w.t.Context(), ledger.RequestID(id))
	if err != nil {
		w.t.Fatal(err)
	}
	return len(slices.DeleteFunc(attempts, func(a ledger.Attempt) bool { return !a.Open }))
}

// Every state in which a worker may leave a grant, and what the janitor does
// about it. Each is swept dry first, which must find the same and change
// nothing.
func TestWhatTheJanitorDoesAboutEveryState(t *testing.T) {
	t.Parallel()
	const n = 1
	id := backend.GrantID{n}
	// age lets a dead process be forgotten and an attempt be old.
	age := func() { time.Sleep(10 * time.Minute) } //nolint:forbidigo // time in a bubble
	for name, c := range map[string]struct {
		options backendfake.Options
		prepare func(t *testing.T, w *world)
		// action is "" if nothing may be touched.
		action worker.SweepAction
		why    string
		// end is how the grant's final log says it ended, 0 if there is none.
		end backend.EndReason
		// holds is how many instances the provider has afterwards.
		holds int
	}{
		"runs, and its worker lives": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				t.Cleanup(l.Close)
				l.ready(t, n)
				age()
			},
			holds: 1,
		},
		"runs, and its worker is dead": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				age()
			},
			holds: 1,
		},
		"runs past its deadline, within grace": {
			options: backendfake.Options{IgnoreDeadlines: true},
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				time.Sleep(time.Hour + grace/2) //nolint:forbidigo // time in a bubble
			},
			holds: 1,
		},
		"runs past deadline and grace": {
			options: backendfake.Options{IgnoreDeadlines: true},
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				time.Sleep(time.Hour + 2*grace) //nolint:forbidigo // time in a bubble
			},
			action: worker.SweepEnd, why: "past its deadline", end: backend.EndDeadline,
		},
		"was ended by the platform at its deadline, with nobody there": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				time.Sleep(time.Hour + 2*grace) //nolint:forbidigo // time in a bubble
			},
			action: worker.SweepEnd, why: "past its deadline", end: backend.EndDeadline,
		},
		"is gone without a trace, and its deadline is over": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.provider.Vanish(id)
				time.Sleep(time.Hour + 2*grace) //nolint:forbidigo // time in a bubble
			},
			action: worker.SweepEnd, why: "past its deadline", end: backend.EndDeadline,
		},
		"ended by itself, with nobody there": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.provider.Exit(id, backendfake.ExitStatus{Code: 3})
				age()
			},
			action: worker.SweepFinish, why: "its instance has ended", end: backend.EndWorkloadExited,
		},
		"ended by itself, and somebody may be at it": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				age()
				l.kill()
				w.provider.Exit(id, backendfake.ExitStatus{Code: 3})
			},
			holds: 1,
		},
		"is gone without a trace before its deadline": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.provider.Vanish(id)
				age()
			},
		},
		"was closed, and the worker died": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.close(id, backend.EndTerminated)
				age()
			},
			action: worker.SweepEnd, why: "closed: " + backend.EndTerminated.String(), end: backend.EndTerminated,
		},
		"was closed just now": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.close(id, backend.EndTerminated)
				time.Sleep(orphanAge / 2) //nolint:forbidigo // time in a bubble
			},
			holds: 1,
		},
		"was torn down, and the worker died before it wrote the log": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				w.provider.Inject(backendfake.OpConfirm, backendfake.Fault{Kind: backendfake.CrashAfter})
				ctx, cancel := context.WithTimeout(client(t), time.Second)
				defer cancel()
				_, _ = l.Terminate(ctx, backend.HandleFor(id)) // Nobody answers.
				l.kill()
				age()
			},
			action: worker.SweepEnd, why: "closed", end: backend.EndTerminated,
		},
		"half made: the worker died after the create call": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashAfter})
				l.die(t)
				age()
			},
			action: worker.SweepUndo, why: "never finished",
		},
		"half made just now": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashAfter})
				l.die(t)
				time.Sleep(orphanAge / 2) //nolint:forbidigo // time in a bubble
			},
			holds: 1,
		},
		"half made after the worker's last word": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				time.Sleep(orphanAge / 5) //nolint:forbidigo // time in a bubble
				w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashAfter})
				l.die(t)
				time.Sleep(orphanAge - orphanAge/10) //nolint:forbidigo // time in a bubble
			},
			holds: 1,
		},
		"only begun: the worker died before the create call": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashBefore})
				l.die(t)
				age()
			},
			action: worker.SweepUndo, why: "never finished",
		},
		"another worker's, for another backend with this ledger": {
			prepare: func(t *testing.T, w *world) {
				w.backend = "other"
				l := w.work()
				w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashAfter})
				l.die(t)
				w.backend = "fake"
				age()
			},
			holds: 1,
		},
		"another bridge's, past its deadline": {
			options: backendfake.Options{IgnoreDeadlines: true},
			prepare: func(t *testing.T, w *world) {
				w.bridge = "test-2"
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.bridge = "test"
				w.newLedger()
				time.Sleep(2 * time.Hour) //nolint:forbidigo // time in a bubble
			},
			holds: 1,
		},
		"the ledger is lost, and it runs": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.newLedger()
				age()
			},
			holds: 1,
		},
		"the ledger is lost, and it runs past its deadline": {
			options: backendfake.Options{IgnoreDeadlines: true},
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.newLedger()
				time.Sleep(time.Hour + 2*grace) //nolint:forbidigo // time in a bubble
			},
			action: worker.SweepDelete, why: "past its deadline",
		},
		"the ledger is lost, and parts are left": {
			prepare: func(t *testing.T, w *world) {
				l := w.work()
				l.ready(t, n)
				l.kill()
				w.newLedger()
				w.provider.Exit(id, backendfake.ExitStatus{})
				age()
			},
			action: worker.SweepDelete, why: "without a live intent",
		},
		"the grant has ended, and an older copy of it is back": {
			prepare: func(t *testing.T, w *world) {
				old := w.ledger
				l := w.work()
				l.ready(t, n)
				if _, err := l.Terminate(client(t), backend.HandleFor(id)); err != nil {
					t.Fatal(err)
				}
				l.Close()
				w.newLedger() // A worker that knows nothing of it makes it again.
				l = w.work()
				l.ready(t, n)
				l.kill()
				w.ledger = old
			},
			action: worker.SweepDelete, why: "the grant ended at", end: backend.EndTerminated,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, c.options)
				c.prepare(t, w)
				before := w.provider.Names()
				for _, dryRun := range []bool{true, false} {
					report, err := w.sweep(dryRun)
					if err != nil {
						t.Fatal(err)
					}
					if c.action == "" {
						if len(report.Findings) > 0 || !slices.Equal(before, w.provider.Names()) {
							t.Errorf("found %+v; at the provider are %q, were %q", report.Findings, w.provider.Names(), before)
						}
						continue
					}
					if len(report.Findings) != 1 {
						t.Fatalf("found %+v", report.Findings)
					}
					want := worker.SweepDone
					if dryRun {
						want = worker.SweepWould
					}
					f := report.Findings[0]
					if f.GrantID != id || f.Action != c.action || !strings.Contains(f.Why, c.why) || f.Result != want || f.Err != nil {
						t.Errorf("found %+v; want %s, %q, %s", f, c.action, c.why, want)
					}
				}
				if left := w.provider.Names(); len(left) != c.holds {
					t.Errorf("at the provider are %q", left)
				}
				switch log := w.final(id); {
				case c.end == 0 && log != nil:
					t.Errorf("it has a final log: %+v", log.Log)
				case c.end != 0 && (log == nil || log.Log.Exit.Reason != c.end):
					t.Errorf("its final log is %+v, want the end %s", log, c.end)
				}
				if c.action != "" {
					if open := w.openAttempts(id); open > 0 {
						t.Error("its attempt is still open")
					}
					if report, err := w.sweep(false); err != nil || len(report.Findings) > 0 {
						t.Errorf("the next run finds %+v, %v", report.Findings, err)
					}
				}
			})
		})
	}
}

// die lets a worker begin grant 1 and die of an injected fault.
func (l *life) die(t *testing.T) {
	t.Helper()
	failed := make(chan struct{})
	go func() {
		defer close(failed)
		if _, err := l.provision(t, 1); err == nil {
			t.Error("it was provisioned")
		}
	}()
	<-l.driver.Killed()
	l.kill()
	<-failed
}

func (w *world) close(id backend.GrantID, reason backend.EndReason) {
	w.t.Helper()
	if _, _, err := w.ledger.CloseGrant(w.t.Context(), ledger.Closure{RequestID: ledger.RequestID(id), Reason: reason.String()}); err != nil {
		w.t.Fatal(err)
	}
}

// What the janitor undid may be provisioned again: the grant is open.
func TestAGrantThatWasUndoneMayComeAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, backendfake.Options{})
		l := w.work()
		w.provider.Inject(backendfake.OpCreate, backendfake.Fault{Kind: backendfake.CrashAfter})
		g, e := janitorGrant(t, 1)
		go func() { _, _ = l.Provision(client(t), g, e) }() // It dies.
		<-l.driver.Killed()
		l.kill()
		time.Sleep(10 * time.Minute) //nolint:forbidigo // time in a bubble
		if report, err := w.sweep(false); err != nil || len(report.Findings) != 1 {
			t.Fatalf("%+v, %v", report, err)
		}
		next := w.work()
		defer next.Close()
		p, err := next.Provision(client(t), g, e)
		if err != nil || p.Instance.Attempt != 2 {
			t.Errorf("attempt %d, %v", p.Instance.Attempt, err)
		}
		if h := w.provider.History(g.ID); h.AtOnce != 1 {
			t.Errorf("%d instances at once", h.AtOnce)
		}
	})
}

// A Provision that takes long is no orphan as long as its worker lives.
func TestTheJanitorLeavesAProvisionInFlight(t *testing.T) {
	t.Parallel()
	for _, op := range []backendfake.Op{backendfake.OpDescribe, backendfake.OpCreate, backendfake.OpReady} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, backendfake.Options{})
				l := w.work()
				defer l.Close()
				slow := w.provider.Inject(op, backendfake.Fault{Kind: backendfake.Slow})
				done := make(chan error, 1)
				go func() {
					_, err := l.provision(t, 1)
					done <- err
				}()
				<-slow.Reached()
				for range 20 {
					time.Sleep(7 * time.Second) //nolint:forbidigo // time in a bubble
					if op == backendfake.OpReady {
						break // A boot has a time limit of its own.
					}
				}
				if report, err := w.sweep(false); err != nil || len(report.Findings) > 0 || report.Looked != 1 {
					t.Errorf("found %+v, %v", report, err)
				}
				slow.Release()
				if err := <-done; op != backendfake.OpReady && err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Whatever can't be read, at whichever look, nothing is touched.
func TestTheJanitorIsBlindWithoutPlatformOrLedger(t *testing.T) {
	t.Parallel()
	prepare := func(t *testing.T) *world {
		t.Helper()
		w := newWorld(t, backendfake.Options{IgnoreDeadlines: true})
		l := w.work()
		l.ready(t, 1)
		l.kill()
		time.Sleep(2 * time.Hour) //nolint:forbidigo // time in a bubble
		return w
	}
	untouched := func(t *testing.T, w *world) {
		t.Helper()
		before := w.provider.Mutations()
		report, err := w.sweep(false)
		if err == nil || len(report.Findings) > 0 {
			t.Errorf("it found %+v, %v", report, err)
		}
		if w.provider.Mutations() != before {
			t.Error("it changed something while blind")
		}
	}
	for look := range 2 {
		t.Run(fmt.Sprintf("the platform at look %d", look+1), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := prepare(t)
				w.provider.Inject(backendfake.OpList, backendfake.Fault{Kind: backendfake.Unavailable, Skip: look, Times: -1})
				untouched(t, w)
			})
		})
	}
	for _, point := range []string{"ledger.LastBeat", "ledger.LiveClaims", "ledger.Log", "ledger.Claim", "ledger.Closure"} {
		for nth := 1; nth <= 2; nth++ {
			t.Run(fmt.Sprintf("%s, call %d", point, nth), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w := prepare(t)
					w.points.Inject(ledgertest.Fault{Point: point, Nth: nth, Kind: ledgertest.Refuse, Always: true})
					untouched(t, w)
				})
			})
		}
	}
}

// A removal that fails is said, and the next run goes on.
func TestTheJanitorSaysWhatFailed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, backendfake.Options{IgnoreDeadlines: true})
		l := w.work()
		for n := range byte(3) {
			l.ready(t, n+1)
		}
		l.kill()
		time.Sleep(2 * time.Hour) //nolint:forbidigo // time in a bubble
		stuck := w.provider.Inject(backendfake.OpDelete, backendfake.Fault{Kind: backendfake.Denied, GrantID: backend.GrantID{2}, Times: -1})
		report, err := w.sweep(false)
		if err != nil || len(report.Findings) != 3 {
			t.Fatalf("%+v, %v", report, err)
		}
		for i, f := range report.Findings {
			want := worker.SweepDone
			if i == 1 {
				want = worker.SweepFailed
			}
			if f.Result != want || (want == worker.SweepFailed) != (f.Err != nil) {
				t.Errorf("grant %s: %s, %v", f.GrantID, f.Result, f.Err)
			}
		}
		stuck.Release()
		time.Sleep(2 * orphanAge) //nolint:forbidigo // time in a bubble
		if report, err := w.sweep(false); err != nil || len(report.Findings) != 1 || report.Findings[0].Result != worker.SweepDone {
			t.Errorf("the next run: %+v, %v", report, err)
		}
		if left := w.provider.Names(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// listing is a driver whose list a test writes.
type listing struct {
	*backendfake.Driver
	list       func() (backend.Listing, error)
	terminated *[]backend.GrantID
}

func (d listing) List(context.Context) (backend.Listing, error) { return d.list() }

func (d listing) Terminate(_ context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	*d.terminated = append(*d.terminated, id)
	return nil, nil
}

// Cases that need a platform which says more than the fake one can.
func TestTheJanitorJudgesAGrantAsAWhole(t *testing.T) {
	t.Parallel()
	id := backend.GrantID{1}
	past, old := -2*time.Hour, -time.Hour
	for name, c := range map[string]struct {
		first, second []backend.Resource
		blind         []string
		result        worker.SweepResult // "" if nothing is found
	}{
		"parts of one attempt beside another that runs": {
			first: []backend.Resource{{Attempt: 1}, {Attempt: 2, Running: true}},
		},
		"parts that are young beside parts that are old": {
			first: []backend.Resource{{Attempt: 1}, {Attempt: 2, CreatedAt: time.Unix(1<<40, 0)}},
		},
		"parts without an age": {first: []backend.Resource{{Attempt: 1, CreatedAt: time.Unix(0, 0)}}},
		"parts that both looks see": {
			first: []backend.Resource{{Attempt: 1}}, result: worker.SweepDone,
		},
		"parts that the second look sees no more": {first: []backend.Resource{{Attempt: 1}}, second: []backend.Resource{}},
		"parts that only the second look sees":    {first: []backend.Resource{}, second: []backend.Resource{{Attempt: 1}}},
		"parts that are others at the second look": {
			first: []backend.Resource{{Attempt: 1}}, second: []backend.Resource{{Attempt: 2}},
		},
		"parts, and the ledger doesn't know where more may be": {
			first: []backend.Resource{{Attempt: 1}}, blind: []string{"host-2"}, result: worker.SweepBlind,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, backendfake.Options{})
				if c.second == nil {
					c.second = c.first
				}
				looks := [][]backend.Resource{c.first, c.second}
				now := time.Now()
				fill := func(all []backend.Resource) []backend.Resource {
					out := slices.Clone(all)
					for i := range out {
						r := &out[i]
						r.GrantID, r.Placement, r.InstanceID = id, "host-1", backend.InstanceID(fmt.Sprint(r.Attempt))
						switch {
						case r.CreatedAt.IsZero():
							r.CreatedAt = now.Add(old)
						case r.CreatedAt.Equal(time.Unix(0, 0)):
							r.CreatedAt = time.Time{}
						default:
							r.CreatedAt = now
						}
						if r.Running {
							r.ValidTo = now.Add(-past)
						}
					}
					return out
				}
				var terminated []backend.GrantID
				r := w.runtime(w.ledger, true)
				d := listing{Driver: backendfake.Open(w.provider, r.Env(), backendfake.DriverOptions{}), terminated: &terminated}
				d.list = func() (backend.Listing, error) {
					out := backend.Listing{Resources: fill(looks[0]), Blind: c.blind}
					if len(looks) > 1 {
						looks = looks[1:]
					}
					return out, nil
				}
				report, err := r.SweepOnce(t.Context(), d, worker.SweepOptions{})
				if err != nil || !slices.Equal(report.Blind, c.blind) {
					t.Fatalf("%+v, %v", report, err)
				}
				if c.result == "" {
					if len(report.Findings) > 0 || len(terminated) > 0 {
						t.Errorf("found %+v, terminated %v", report.Findings, terminated)
					}
					return
				}
				if len(report.Findings) != 1 || report.Findings[0].Result != c.result || (len(terminated) > 0) != (c.result == worker.SweepDone) {
					t.Errorf("found %+v, terminated %v", report.Findings, terminated)
				}
			})
		})
	}
}

// An attempt that somebody else has undone is not given out.
func TestNothingUndoneIsGivenOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, backendfake.Options{})
		l := w.work()
		defer l.Close()
		slow := w.provider.Inject(backendfake.OpReady, backendfake.Fault{Kind: backendfake.Slow})
		done := make(chan error, 1)
		go func() {
			_, err := l.provision(t, 1)
			done <- err
		}()
		<-slow.Reached()
		if err := w.ledger.MarkGone(t.Context(), ledger.RequestID{1}, 1); err != nil {
			t.Fatal(err)
		}
		slow.Release()
		if err := <-done; !backenderr.Is(err, backenderr.ProviderUnavailable) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
			t.Errorf("got %v, created %s", err, backenderr.CreatedOf(err))
		}
		if left := w.provider.Names(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}
