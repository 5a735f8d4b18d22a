package backendtest

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// recorder is a test whose failures are written down.
type recorder struct {
	testing.TB
	ctx    context.Context //nolint:containedctx // It is a test's.
	cancel context.CancelFunc

	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (r *recorder) Context() context.Context { return r.ctx }
func (r *recorder) Helper()                  {}
func (r *recorder) Log(...any)               {}
func (r *recorder) Logf(string, ...any)      {}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) Errorf(format string, args ...any) { r.Error(fmt.Sprintf(format, args...)) }

func (r *recorder) Error(args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprint(args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Error(fmt.Sprintf(format, args...))
	runtime.Goexit()
}

func (r *recorder) Fatal(args ...any) {
	r.Error(args...)
	runtime.Goexit()
}

func (r *recorder) Fail()    { r.Error("failed") }
func (r *recorder) FailNow() { r.Fatal("failed") }

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failures) > 0
}

// record runs one case and returns its failures.
func record(t *testing.T, open func(testing.TB) *Fixture, name string) []string {
	t.Helper()
	all := cases()
	n := slices.IndexFunc(all, func(c testCase) bool { return c.name == name })
	if n < 0 {
		t.Fatalf("no case %q", name)
	}
	r := &recorder{TB: t}
	r.ctx, r.cancel = context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			r.cancel()
			for len(r.cleanups) > 0 {
				last := r.cleanups[len(r.cleanups)-1]
				r.cleanups = r.cleanups[:len(r.cleanups)-1]
				last()
			}
		}()
		runCase(r, Harness{Open: open, Sweep: Sweep{Parallel: 8}}, all[n], direct, &report{})
	}()
	<-done
	return r.failures
}

// wrap is a backend that does some things differently.
type wrap struct {
	backend.Backend
	provision  func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error)
	canSatisfy func(ctx context.Context, b backend.Backend, g backend.Grant) (backend.Satisfaction, error)
	watch      func(ctx context.Context, b backend.Backend, h backend.Handle, emit func(backend.Event) error) error
	terminate  func(ctx context.Context, b backend.Backend, h backend.Handle) (backend.Termination, error)
	name       func() string
	// capabilities are changed in place.
	capabilities func(*backend.Capabilities)
}

func (w wrap) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	c, err := w.Backend.Capabilities(ctx)
	if w.capabilities != nil {
		w.capabilities(&c)
	}
	return c, err
}

func (w wrap) Name(ctx context.Context) (string, error) {
	if w.name != nil {
		return w.name(), nil
	}
	return w.Backend.Name(ctx)
}

func (w wrap) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	if w.canSatisfy != nil {
		return w.canSatisfy(ctx, w.Backend, g)
	}
	return w.Backend.CanSatisfy(ctx, g)
}

func (w wrap) Provision(ctx context.Context, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
	if w.provision != nil {
		return w.provision(ctx, w.Backend, g, v)
	}
	return w.Backend.Provision(ctx, g, v)
}

func (w wrap) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	if w.watch != nil {
		return w.watch(ctx, w.Backend, h, emit)
	}
	return w.Backend.WatchUntilExit(ctx, h, emit)
}

func (w wrap) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	if w.terminate != nil {
		return w.terminate(ctx, w.Backend, h)
	}
	return w.Backend.Terminate(ctx, h)
}

func wrapped(w wrap) breakage {
	return breakage{backend: func(b backend.Backend) backend.Backend {
		w := w
		w.Backend = b
		return w
	}}
}

func buggy(bugs ...backendfake.Bug) breakage { return breakage{bugs: bugs} }

// slowlyDeleting is for bugs that show while something is being deleted, which
// takes longer than a restart of the worker.
func slowlyDeleting(bugs ...backendfake.Bug) breakage {
	return breakage{bugs: bugs, patience: time.Minute, provider: func(o *backendfake.Options) {
		o.DeleteTime = 500 * time.Millisecond
	}}
}

// answers remembers what was provisioned.
type answers struct {
	mu     sync.Mutex
	grants map[backend.GrantID]backend.Grant
	ready  map[backend.GrantID]backend.Provisioned
}

func newAnswers() *answers {
	return &answers{grants: map[backend.GrantID]backend.Grant{}, ready: map[backend.GrantID]backend.Provisioned{}}
}

// armedCase is about the moment between the creation and the answer.
const armedCase = "watch/the deadline needs no worker, even one that died as it created"

// broken is a table of backends that each break one promise, and the cases
// that must notice.
func broken(t *testing.T) map[string]struct {
	breakage
	caughtBy []string
} {
	t.Helper()
	type entry = struct {
		breakage
		caughtBy []string
	}
	first, conflicts, shared, again := newAnswers(), newAnswers(), newAnswers(), newAnswers()
	rewritten := &rewrites{finals: map[ledger.RequestID]ledger.Log{}}
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	return map[string]entry{
		"forgets undo": {buggy(backendfake.BugNoUndo), []string{
			"provision/cancelled at each step is undone and may be retried",
		}},
		"says created=none while something exists": {buggy(backendfake.BugSaysNone), []string{
			"errors/clean-up that isn't confirmed is unknown", "errors/an answer lost for good", "faults/at each call of Provision",
		}},
		"second instance on retry": {buggy(backendfake.BugSecondInstance), []string{
			"crash/during Provision, which is then retried", "terminate/works after a restart",
		}},
		"creates before the intent is on record": {breakage{bugs: []backendfake.Bug{backendfake.BugCreateFirst}, orphanAge: withOrphans.orphanAge}, []string{
			"orphans/of a crash during Provision, which nobody retries",
		}},
		"records that it is gone before it is": {slowlyDeleting(backendfake.BugGoneFirst), []string{
			"crash/while a cancelled Provision is undone, which is then retried",
		}},
		"sends another token at each try": {buggy(backendfake.BugNewToken), []string{"faults/at each call of Provision"}},
		"takes up what was being undone": {slowlyDeleting(backendfake.BugResumes), []string{
			"crash/while a cancelled Provision is undone, which is then retried",
		}},
		"sweeps what others have": {breakage{bugs: []backendfake.Bug{backendfake.BugEveryBridge}, orphanAge: withOrphans.orphanAge}, []string{
			"orphans/only what is over, and the bridge's own, is swept",
		}},
		"doesn't look for closures": {breakage{ledger: func(l worker.Ledger) worker.Ledger { return noClosures{l} }}, []string{
			"crash/during Terminate, which nobody retries",
		}},
		"closes a grant after its end": {breakage{ledger: func(l worker.Ledger) worker.Ledger {
			return &lateClosures{Ledger: l, late: map[ledger.RequestID]ledger.Closure{}}
		}}, []string{"crash/during Terminate, which nobody retries"}},
		"doesn't look for a closure before it creates": {buggy(backendfake.BugNoCheck), []string{
			"provision/a closure by another process is seen before anything is made",
		}},
		"doesn't look for a closure before it answers": {breakage{ledger: func(l worker.Ledger) worker.Ledger { return noClosures{l} }}, []string{
			"provision/a closure by another process is seen before it is ready",
		}},
		"writes the final log twice": {breakage{bugs: []backendfake.Bug{backendfake.BugEndsAgain}, ledger: rewritten.wrap}, []string{
			"terminate/again answers the same", "terminate/leaves nothing and tells what was used", "watch/answers after the end and a restart",
			"crash/during Terminate, which is then retried",
		}},
		"counts its logs backwards": {breakage{backend: func(b backend.Backend) backend.Backend { return backwards(b) }}, []string{
			"watch/usage so far grows and is signed",
		}},
		"gives the final log an earlier number": {breakage{backend: func(b backend.Backend) backend.Backend { return finalFirst(b) }}, []string{
			"watch/usage so far grows and is signed", "crash/during a watch until the workload's end",
		}},
		"forgets the final log": {breakage{ledger: func(l worker.Ledger) worker.Ledger { return noFinals{l} }}, []string{
			"terminate/again answers the same", "faults/at each call of Terminate",
		}},
		"tells of more than there is": {wrapped(wrap{capabilities: func(c *backend.Capabilities) {
			for i := range c.Regions {
				c.Regions[i].Free, c.Regions[i].ActiveInstances = c.Regions[i].Total, 0
			}
		}}), []string{"capabilities/count what exists"}},
		"over-commits": {buggy(backendfake.BugNoReservation), []string{
			"provision/parallel grants never exceed capacity", "capabilities/count what exists",
		}},
		"forgets reservations at a restart": {buggy(backendfake.BugForgetsReservations), []string{
			"provision/capacity outlives a restart", "capabilities/count what exists after a restart",
		}},
		"frees other grants' reservations": {buggy(backendfake.BugFreesAll), []string{"terminate/frees only its own reservation"}},
		"counts an accepted delete as done": {slowlyDeleting(backendfake.BugEarlyGone), []string{
			"terminate/leaves nothing and tells what was used", "terminate/works after a restart",
		}},
		"takes blindness for emptiness": {buggy(backendfake.BugBlind), []string{"terminate/a grant never seen while the provider can't be read"}},
		"loses the usage":               {buggy(backendfake.BugLosesUsage), []string{"terminate/leaves nothing and tells what was used"}},
		"doesn't enforce deadlines": {
			breakage{provider: func(o *backendfake.Options) { o.IgnoreDeadlines = true }},
			[]string{"watch/the deadline needs no worker"},
		},
		"arms the end after the beginning": {buggy(backendfake.BugArmsLate), []string{armedCase}},
		"sweeps what lives": {breakage{orphanAge: withOrphans.orphanAge, janitor: sweepsWhatLives}, []string{
			"orphans/only what is over, and the bridge's own, is swept",
		}},
		"ignores conflicts": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			conflicts.mu.Lock()
			known, ok := conflicts.ready[g.ID]
			conflicts.mu.Unlock()
			if ok {
				return known, nil
			}
			p, err := b.Provision(ctx, g, v)
			if err == nil {
				conflicts.mu.Lock()
				conflicts.ready[g.ID] = p
				conflicts.mu.Unlock()
			}
			return p, err
		}}), []string{"provision/other content is a conflict", "ownership/a stranger gets no receipt", "provision/never again after Terminate"}},
		"takes an ended grant for a live one": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			again.mu.Lock()
			defer again.mu.Unlock()
			if err == nil {
				again.ready[g.ID] = p
			} else if known, ok := again.ready[g.ID]; ok && backenderr.Is(err, backenderr.GrantEnded) {
				return known, nil
			}
			return p, err
		}}), []string{
			"provision/never again after Terminate", "provision/never again after the workload's end", "provision/never again after the end and a restart",
		}},
		"runs again after a restart that lost the ledger": {breakage{amnesia: true}, []string{
			"provision/never again after the end and a restart", "provision/the same answer after a restart",
		}},
		"lets the first caller decide for all": {breakage{backend: func(b backend.Backend) backend.Backend {
			return &firstDecides{Backend: b, calls: map[backend.GrantID]*call{}}
		}}, []string{"provision/one of several callers may go"}},
		"answers a repeated call otherwise": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			first.mu.Lock()
			defer first.mu.Unlock()
			if _, known := first.grants[g.ID]; known {
				p.Receipt.Port++
			}
			first.grants[g.ID] = g
			return p, err
		}}), []string{"provision/twice is one instance and the same answer", "provision/joined calls are one instance"}},
		"leaks a key in an error": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			if err != nil {
				e := backenderr.From(err)
				err = backenderr.Wrap(e.Reason, err, "user data was -----BEGIN OPENSSH PRIVATE KEY-----").WithCreated(e.Created).WithRetryAfter(e.RetryAfter)
			}
			return p, err
		}}), []string{"errors/every refusal has its reason and leaves nothing", "errors/no secret of the grant is told"}},
		"tells the environment in an error": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			if err != nil {
				e := backenderr.From(err)
				err = backenderr.Wrap(e.Reason, err, "%v", g.Environment).WithCreated(e.Created)
			}
			return p, err
		}}), []string{"errors/no secret of the grant is told"}},
		"doesn't classify errors": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			if err != nil {
				err = errors.New(err.Error())
			}
			return p, err
		}}), []string{"errors/every refusal has its reason and leaves nothing", "provision/malformed grants are refused"}},
		"never says created=none": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			if err != nil {
				err = backenderr.From(err).Clone().WithCreated(backenderr.CreatedUnknown)
			}
			return p, err
		}}), []string{"satisfy/no means that Provision refuses", "provision/parallel grants never exceed capacity"}},
		"shares its data with callers": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			shared.mu.Lock()
			known, ok := shared.ready[g.ID]
			shared.mu.Unlock()
			if ok {
				return known, nil
			}
			p, err := b.Provision(ctx, g, v)
			if err == nil {
				shared.mu.Lock()
				shared.ready[g.ID] = p
				shared.mu.Unlock()
			}
			return p, err
		}}), []string{"provision/what is passed and returned isn't shared"}},
		"changes what it is given": {wrapped(wrap{provision: func(ctx context.Context, b backend.Backend, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
			p, err := b.Provision(ctx, g, v)
			delete(g.Environment, "NAME")
			return p, err
		}}), []string{"provision/what is passed and returned isn't shared"}},
		"says yes to everything": {wrapped(wrap{canSatisfy: func(context.Context, backend.Backend, backend.Grant) (backend.Satisfaction, error) {
			return backend.Satisfaction{Satisfiable: true}, nil
		}}), []string{
			"satisfy/no means that Provision refuses", "satisfy/unknown region, stronger isolation and huge sizes are no",
			"satisfy/sizes out of all bounds are no or an error",
		}},
		"says no when it is full": {wrapped(wrap{canSatisfy: func(ctx context.Context, b backend.Backend, g backend.Grant) (backend.Satisfaction, error) {
			c, err := b.Capabilities(ctx)
			if free, _ := sum(c); err == nil && !g.Shape.Fits(free) {
				return backend.Satisfaction{Reason: "full"}, nil
			}
			return b.CanSatisfy(ctx, g)
		}}), []string{"satisfy/a full backend says yes"}},
		"watches never end": {wrapped(wrap{watch: func(ctx context.Context, b backend.Backend, h backend.Handle, emit func(backend.Event) error) error {
			err := b.WatchUntilExit(ctx, h, func(e backend.Event) error {
				if e.Log != nil {
					return nil
				}
				return emit(e)
			})
			if err != nil {
				return err
			}
			<-ctx.Done()
			return backenderr.From(ctx.Err())
		}}), []string{"watch/begins with the state and ends with the log", "terminate/during a watch, which then ends"}},
		"watches end without the log": {wrapped(wrap{watch: func(ctx context.Context, b backend.Backend, h backend.Handle, emit func(backend.Event) error) error {
			return b.WatchUntilExit(ctx, h, func(e backend.Event) error {
				if e.Log != nil {
					return nil
				}
				return emit(e)
			})
		}}), []string{"watch/begins with the state and ends with the log"}},
		"watches don't begin with the state": {wrapped(wrap{watch: func(ctx context.Context, b backend.Backend, h backend.Handle, emit func(backend.Event) error) error {
			return b.WatchUntilExit(ctx, h, func(e backend.Event) error {
				if e.Instance != nil {
					return nil
				}
				return emit(e)
			})
		}}), []string{"watch/answers after the end", "watch/begins with the state and ends with the log"}},
		"watchers get different logs": {wrapped(wrap{watch: func(ctx context.Context, b backend.Backend, h backend.Handle, emit func(backend.Event) error) error {
			return b.WatchUntilExit(ctx, h, func(e backend.Event) error {
				if e.Log != nil {
					log := *e.Log
					log.Signature = make([]byte, 64)
					_, _ = rand.Read(log.Signature) // Never fails.
					e.Log = &log
				}
				return emit(e)
			})
		}}), []string{"watch/watchers agree", "watch/begins with the state and ends with the log"}},
		"says TERMINATED too early": {wrapped(wrap{terminate: func(ctx context.Context, b backend.Backend, h backend.Handle) (backend.Termination, error) {
			go func() { _, _ = b.Terminate(context.WithoutCancel(ctx), h) }() // Its end is not waited for: that is the bug.
			return backend.Termination{State: backend.StateTerminated}, nil
		}}), []string{"terminate/leaves nothing and tells what was used", "terminate/is honest while it can't finish"}},
		"doesn't close what it has never seen": {wrapped(wrap{terminate: func(ctx context.Context, b backend.Backend, h backend.Handle) (backend.Termination, error) {
			watching, cancel := context.WithCancel(ctx)
			defer cancel()
			err := b.WatchUntilExit(watching, h, func(backend.Event) error { cancel(); return nil })
			if backenderr.Is(err, backenderr.InstanceNotFound) {
				return backend.Termination{State: backend.StateTerminated}, nil
			}
			return b.Terminate(ctx, h)
		}}), []string{"provision/never after Terminate came first"}},
		"asks nobody who they are": {breakage{backend: func(b backend.Backend) backend.Backend { return anybody{b} }}, []string{
			"ownership/a stranger may not watch", "ownership/a stranger may not terminate", "ownership/a stranger gets nothing after the end",
		}},
		"changes its name": {wrapped(wrap{name: func() string {
			return fmt.Sprintf("fake-%d", time.Now().UnixNano())
		}}), []string{"identity/name is well-formed and constant", "capabilities/repeatable and complete"}},
		"leaves goroutines": {wrapped(wrap{canSatisfy: func(ctx context.Context, b backend.Backend, g backend.Grant) (backend.Satisfaction, error) {
			go func() { <-release }()
			return b.CanSatisfy(ctx, g)
		}}), []string{"satisfy/asking changes nothing"}},
	}
}

// noClosures is a ledger in which closures aren't found, but by who begins an
// attempt.
type noClosures struct{ worker.Ledger }

func (noClosures) Closure(context.Context, ledger.RequestID) (ledger.Closure, error) {
	return ledger.Closure{}, ledger.ErrNotFound
}

// lateClosures is a ledger that has closures only once the final log is there.
type lateClosures struct {
	worker.Ledger
	mu   sync.Mutex
	late map[ledger.RequestID]ledger.Closure
}

func (l *lateClosures) CloseGrant(_ context.Context, c ledger.Closure) (ledger.Closure, bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if known, ok := l.late[c.RequestID]; ok {
		return known, false, nil
	}
	l.late[c.RequestID] = c
	return c, true, nil
}

func (l *lateClosures) PutFinal(ctx context.Context, g ledger.Log) (ledger.Log, bool, error) {
	l.mu.Lock()
	c, ok := l.late[g.RequestID]
	l.mu.Unlock()
	if ok {
		if _, _, err := l.Ledger.CloseGrant(ctx, c); err != nil {
			return ledger.Log{}, false, err
		}
	}
	return l.Ledger.PutFinal(ctx, g)
}

// noFinals is a ledger that says that it has the final log, and hasn't.
type noFinals struct{ worker.Ledger }

func (noFinals) PutFinal(_ context.Context, g ledger.Log) (ledger.Log, bool, error) {
	g.Final = true
	return g, true, nil
}

// rewrites is where the ledgers of all lives keep final logs: the last one that
// was written, and nobody learns that there was one before.
type rewrites struct {
	mu     sync.Mutex
	finals map[ledger.RequestID]ledger.Log
}

func (r *rewrites) wrap(l worker.Ledger) worker.Ledger { return rewriting{l, r} }

type rewriting struct {
	worker.Ledger
	all *rewrites
}

func (r rewriting) PutFinal(_ context.Context, g ledger.Log) (ledger.Log, bool, error) {
	r.all.mu.Lock()
	defer r.all.mu.Unlock()
	g.Final = true
	r.all.finals[g.RequestID] = g
	return g, true, nil
}

func (r rewriting) Log(ctx context.Context, id ledger.RequestID) (ledger.Log, error) {
	r.all.mu.Lock()
	g, ok := r.all.finals[id]
	r.all.mu.Unlock()
	if ok {
		return g, nil
	}
	return r.Ledger.Log(ctx, id)
}

// renumbers gives logs other numbers, and signs them as a worker does.
type renumbers struct {
	backend.Backend
	key ed25519.PrivateKey
	// number is that of the nth log of a watch.
	number func(n int, final bool) uint32
}

// Numbers that a worker might have used up before it died, if it began again
// from 1.
const highNumber = 1000

func renumbered(b backend.Backend, number func(n int, final bool) uint32) backend.Backend {
	_, key, _ := ed25519.GenerateKey(rand.Reader) // Never fails.
	return &renumbers{Backend: b, key: key, number: number}
}

func backwards(b backend.Backend) backend.Backend {
	return renumbered(b, func(n int, final bool) uint32 {
		if final {
			return 2 * highNumber
		}
		return highNumber - uint32(n)
	})
}

func finalFirst(b backend.Backend) backend.Backend {
	return renumbered(b, func(_ int, final bool) uint32 {
		if final {
			return 2
		}
		return highNumber
	})
}

const renumbersKeyID = "renumbers"

func (r *renumbers) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	c, err := r.Backend.Capabilities(ctx)
	public, _ := r.key.Public().(ed25519.PublicKey) // It always is one.
	c.LogKeys = append(c.LogKeys, backend.LogKey{ID: renumbersKeyID, PublicKey: public})
	return c, err
}

func (r *renumbers) sign(log *backend.SignedLog, n int) *backend.SignedLog {
	if log == nil {
		return nil
	}
	out := *log
	out.Log.Sequence = r.number(n, log.Log.Final)
	out.Body, _ = proto.Marshal(backendgrpc.LogToProto(out.Log)) // It was marshalled before.
	out.KeyID, out.Signature = renumbersKeyID, ed25519.Sign(r.key, slices.Concat([]byte("compute-bridge/v1/compute-log\x00"), out.Body))
	return &out
}

func (r *renumbers) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	n := 0
	return r.Backend.WatchUntilExit(ctx, h, func(e backend.Event) error {
		if e.Usage != nil || e.Log != nil {
			n++
		}
		e.Usage, e.Log = r.sign(e.Usage, n), r.sign(e.Log, n)
		return emit(e)
	})
}

func (r *renumbers) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	t, err := r.Backend.Terminate(ctx, h)
	t.Log = r.sign(t.Log, 0)
	return t, err
}

// sweepsWhatLives is a janitor that takes whatever has been there for a while,
// and that its own ledger knows of, for left over.
func sweepsWhatLives(ctx context.Context, l *ledger.Ledger, d *backendfake.Driver) {
	tick := time.NewTicker(withOrphans.orphanAge / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		listing, err := d.List(ctx)
		if err != nil {
			continue
		}
		for _, r := range listing.Resources {
			attempts, err := l.Attempts(ctx, ledger.RequestID(r.GrantID))
			if err == nil && len(attempts) > 0 && time.Since(r.CreatedAt) > withOrphans.orphanAge {
				_, _ = d.Terminate(ctx, r.GrantID) // The next look tries again.
			}
		}
	}
}

// firstDecides joins calls to the first one, which takes the others with it
// when it goes.
type firstDecides struct {
	backend.Backend
	mu    sync.Mutex
	calls map[backend.GrantID]*call
}

type call struct {
	done   chan struct{}
	result outcome
}

func (f *firstDecides) Provision(ctx context.Context, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
	f.mu.Lock()
	joined, ok := f.calls[g.ID]
	if ok {
		f.mu.Unlock()
		if g.AlmanacSequence != 3 { // The one difference that the case makes.
			return f.Backend.Provision(ctx, g, v)
		}
		<-joined.done
		return joined.result.provisioned, joined.result.err
	}
	c := &call{done: make(chan struct{})}
	f.calls[g.ID] = c
	f.mu.Unlock()
	c.result.provisioned, c.result.err = f.Backend.Provision(ctx, g, v)
	close(c.done)
	return c.result.provisioned, c.result.err
}

// anybody makes an operator of everyone.
type anybody struct{ backend.Backend }

func everybody(ctx context.Context) context.Context {
	return backend.WithCaller(ctx, backend.Caller{Identity: owner.Identity, Role: backend.RoleOperator})
}

func (a anybody) Provision(ctx context.Context, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
	return a.Backend.Provision(everybody(ctx), g, v)
}

func (a anybody) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	return a.Backend.WatchUntilExit(everybody(ctx), h, emit)
}

func (a anybody) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	return a.Backend.Terminate(everybody(ctx), h)
}

// hasty makes broken backends fail soon.
func hasty(patience time.Duration, open func(testing.TB) *Fixture) func(testing.TB) *Fixture {
	return func(t testing.TB) *Fixture {
		t.Helper()
		f := open(t)
		f.Patience = cmp.Or(patience, time.Second)
		return f
	}
}

// That the cases pass on the sound backend, so that it is the bug that they
// catch, is TestFakeHonoursTheContract's.
func TestBrokenBackendsAreCaught(t *testing.T) {
	for name, b := range broken(t) {
		t.Run(name, func(t *testing.T) {
			for _, c := range b.caughtBy {
				var failures []string
				// What a retry meets depends on the moment when it comes: a bug
				// that shows only then may hide from one run, not from several.
				tries := 0
				for ; tries < 12 && len(failures) == 0; tries++ {
					failures = record(t, hasty(b.patience, openFake(plain, b.breakage)), c)
				}
				if len(failures) == 0 {
					t.Errorf("%q doesn't notice", c)
					continue
				}
				message, _, _ := strings.Cut(failures[0], "\n")
				t.Logf("%s, at try %d: %.150s", c, tries, message)
			}
		})
	}
}

// The cases that notice the bugs of a slowlyDeleting backend must do so by the
// bugs, not by its slowness.
func TestSlowDeletionIsNoBug(t *testing.T) {
	for _, c := range []string{
		"crash/while a cancelled Provision is undone, which is then retried",
		"terminate/leaves nothing and tells what was used", "terminate/works after a restart",
	} {
		sound := slowlyDeleting()
		for _, failure := range record(t, hasty(sound.patience, openFake(plain, sound)), c) {
			t.Errorf("%s: %s", c, failure)
		}
	}
}

// reconnecting is a backend that a lost answer costs its connection: for as long
// as another takes, every Provision is told so.
type reconnecting struct {
	backend.Backend
	mu    sync.Mutex
	until time.Time
}

func (r *reconnecting) Provision(ctx context.Context, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
	r.mu.Lock()
	lost := time.Now().Before(r.until)
	r.mu.Unlock()
	if lost {
		return backend.Provisioned{}, backenderr.New(backenderr.ProviderUnavailable, "the connection was lost").WithRetryAfter(time.Second)
	}
	return r.Backend.Provision(ctx, g, v)
}

// connection is a fault that costs the backend its connection when it is over.
type connection struct {
	Injection
	lose func()
}

func (c connection) Release() {
	c.Injection.Release()
	c.lose()
}

func TestTheTimeToReconnectIsGiven(t *testing.T) {
	const takes = 300 * time.Millisecond
	open := openFake(plain, breakage{})
	losing := func(given time.Duration) func(testing.TB) *Fixture {
		return func(t testing.TB) *Fixture {
			t.Helper()
			f := open(t)
			b := &reconnecting{Backend: f.Backend}
			inject := f.Inject
			f.Backend, f.Reconnects = b, given
			f.Inject = func(fault Fault) Injection {
				i := inject(fault)
				if fault.Kind != FaultLostAnswer {
					return i
				}
				return connection{i, sync.OnceFunc(func() {
					b.mu.Lock()
					defer b.mu.Unlock()
					b.until = time.Now().Add(takes)
				})}
			}
			return f
		}
	}
	for _, c := range []string{
		"errors/a short fault is survived or told", "errors/an answer lost for good", "errors/clean-up that isn't confirmed is unknown", "errors/no secret of the grant is told",
	} {
		if failures := record(t, losing(time.Minute), c); len(failures) > 0 {
			t.Errorf("%s, with the time to reconnect: %q", c, failures)
		}
		if failures := record(t, losing(0), c); len(failures) == 0 {
			t.Errorf("%s: a backend that may lose no connection lost one, and nobody noticed", c)
		}
	}
}

// A worker that asks its provider for all grants together, now or a while ago,
// makes no call for one before it has its instance made.
func TestAClosureIsSeenWhereTheFirstCallCreates(t *testing.T) {
	read := func(c Call) bool { return c.Point == string(backendfake.OpDescribe) }
	open := openFake(plain, breakage{})
	for name, asksNow := range map[string]bool{"asks for all": true, "has asked before": false} {
		failures := record(t, func(t testing.TB) *Fixture {
			t.Helper()
			f := open(t)
			recorded := f.Record
			f.Record = func(id backend.GrantID) func() []Call {
				stop, all := recorded(id), recorded(backend.GrantID{})
				return func() (calls []Call) {
					for _, c := range all() {
						if read(c) && asksNow {
							c.Varies = true
							calls = append(calls, c)
						}
					}
					return append(calls, slices.DeleteFunc(stop(), read)...)
				}
			}
			return f
		}, "provision/a closure by another process is seen before anything is made")
		if len(failures) > 0 {
			t.Errorf("%s: %q", name, failures)
		}
	}
}

func TestASweepBearsThatCallsThatVaryAreMissed(t *testing.T) {
	for _, c := range []struct{ runs, missed int }{{1, 2}, {4, 2}, {8, 2}, {9, 3}, {16, 5}, {300, 100}} {
		if got := mayMiss(c.runs); got != c.missed {
			t.Errorf("of %d runs, %d may miss their call; want %d", c.runs, got, c.missed)
		}
	}
}

func TestNothingIsLeftOutSilently(t *testing.T) {
	for name, take := range map[string]func(*Fixture){
		"Inject": func(f *Fixture) { f.Inject = nil },
		"Reopen": func(f *Fixture) { f.Reopen = nil },
	} {
		open := openFake(plain, breakage{})
		failures := record(t, func(t testing.TB) *Fixture {
			t.Helper()
			f := open(t)
			take(f)
			return f
		}, "crash/during Provision, which is then retried")
		if len(failures) != 1 || !strings.Contains(failures[0], "no "+name) {
			t.Errorf("without %s: %q", name, failures)
		}
	}
	for name, c := range map[string]struct {
		skip map[string]string
		want string
	}{
		"unknown name": {map[string]string{"provision/nonsense": "because"}, "no case"},
		"no reason":    {map[string]string{"terminate/malformed handles": " "}, "no reason"},
	} {
		if problems := checkHarness(cases(), Harness{Skip: c.skip}); len(problems) != 1 || !strings.Contains(problems[0], c.want) {
			t.Errorf("%s: %q", name, problems)
		}
	}
	if problems := checkHarness(cases(), Harness{Skip: map[string]string{"terminate/malformed handles": "a reason"}}); len(problems) > 0 {
		t.Errorf("a proper exception: %q", problems)
	}
}

func TestCaseNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases() {
		if seen[c.name] {
			t.Errorf("two cases are named %q", c.name)
		}
		seen[c.name] = true
		if group, rest, ok := strings.Cut(c.name, "/"); !ok || group == "" || rest == "" {
			t.Errorf("case %q is not group/case", c.name)
		}
	}
}
