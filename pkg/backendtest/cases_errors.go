package backendtest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// faultReasons are what each fault may end as, when it stays.
var faultReasons = map[FaultKind][]backenderr.Reason{
	FaultCapacity:        {backenderr.CapacityExhausted},
	FaultQuota:           {backenderr.QuotaExceeded},
	FaultDenied:          {backenderr.ProviderDenied},
	FaultUnauthenticated: {backenderr.ProviderUnauthenticated},
	FaultThrottled:       {backenderr.ProviderUnavailable, backenderr.BootTimeout},
	FaultUnavailable:     {backenderr.ProviderUnavailable, backenderr.BootTimeout},
	FaultLostAnswer:      {backenderr.ProviderUnavailable, backenderr.BootTimeout},
}

func errorCases() []testCase {
	return []testCase{
		{name: "errors/every refusal has its reason and leaves nothing", needs: []need{needInject}, direct: true, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				kinds := []FaultKind{FaultDenied, FaultUnauthenticated, FaultUnavailable}
				if point == e.f.CreatePoint {
					kinds = append(kinds, FaultCapacity, FaultQuota, FaultThrottled)
				}
				for _, kind := range kinds {
					e.failsAt(point, kind, true)
				}
			}
		}},
		{name: "errors/a short fault is survived or told", needs: []need{needInject}, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				for _, kind := range []FaultKind{FaultUnavailable, FaultThrottled, FaultLostAnswer} {
					e.failsAt(point, kind, false)
				}
			}
		}},
		{name: "errors/an answer lost for good", needs: []need{needInject}, run: func(e *env) {
			e.failsAt(e.f.CreatePoint, FaultLostAnswer, true)
		}},
		{name: "errors/clean-up that isn't confirmed is unknown", needs: []need{needInject}, run: func(e *env) {
			making := e.allProvisionPoints()
			ending := e.endPoints()
			g, envelope := e.grant()
			faults := []Injection{e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultLostAnswer, Always: true, GrantID: g.ID})}
			for _, point := range ending {
				if slices.Contains(making, point) {
					continue // It would fail before anything is made.
				}
				faults = append(faults, e.f.Inject(Fault{Point: point, Kind: FaultUnavailable, Always: true, GrantID: g.ID}))
			}
			_, err := e.b.Provision(e.ctx(), g, envelope)
			if err == nil {
				e.Fatalf("Provision succeeded although no answer ever came")
			}
			if len(e.left(g.ID)) == 0 {
				e.Fatalf("nothing exists, although nothing could be deleted")
			}
			if backenderr.CreatedOf(err) != backenderr.CreatedUnknown {
				e.Errorf("something exists, and the error says %s", describe(err))
			}
			for _, f := range faults {
				f.Release()
			}
			p := e.provisionAfter(FaultLostAnswer, "Provision after an unclear attempt", g, envelope)
			e.same("answers after an unclear attempt", p, e.provision(g, envelope))
		}},
		{name: "errors/a workload that fails is told with its console", needs: []need{needFailBoot}, run: func(e *env) {
			const console = "backendtest: no such file or directory"
			g, envelope := e.grant()
			e.f.FailBoot("line\n" + console)
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of a workload that fails", backenderr.WorkloadFailed)
			if err != nil && !strings.Contains(backenderr.From(err).Metadata[backenderr.MetaConsole], console) {
				e.Errorf("the console is not told: %v", backenderr.From(err).Metadata)
			}
			e.wantNone(err, "Provision of a workload that fails")
			e.provision(g, envelope)
		}},
		{name: "errors/cancelling can be told by errors.Is", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			ctx, cancel := context.WithCancel(e.ctx())
			call := e.begin(ctx, g, envelope)
			receive(e, "the create call", fault.Reached())
			cancel()
			err := receive(e, "the cancelled call", call).err
			e.want(err, "the cancelled call", backenderr.Cancelled)
			if !errors.Is(err, context.Canceled) {
				e.Errorf("errors.Is doesn't find context.Canceled in %v", err)
			}
			e.eventually("it is undone", func() bool { return len(e.left(g.ID)) == 0 })
		}},
		{name: "errors/a caller's deadline is told as such", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			ctx, cancel := context.WithTimeout(e.ctx(), 300*time.Millisecond)
			defer cancel()
			_, err := e.b.Provision(ctx, g, envelope)
			e.want(err, "a call whose deadline passed", backenderr.DeadlineExceeded)
			e.eventually("it is undone", func() bool { return len(e.left(g.ID)) == 0 })
		}},
		{name: "errors/no secret of the grant is told", needs: []need{needInject}, run: func(e *env) {
			const canary = "backendtest-canary-5e3f1c"
			e.secret(canary)
			for _, kind := range []FaultKind{FaultDenied, FaultLostAnswer} {
				g, envelope := e.grant()
				g.Environment = map[string]string{"TOKEN": canary}
				e.sealed(&envelope)
				fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: kind, Always: true, GrantID: g.ID})
				if _, err := e.b.Provision(e.ctx(), g, envelope); err == nil {
					e.Errorf("Provision succeeded under %s", kind)
				}
				fault.Release()
				p := e.provisionAfter(kind, "Provision after "+string(kind), g, envelope)
				other := g
				other.Shape.CPU--
				_, err := e.b.Provision(e.ctx(), other, envelope)
				e.want(err, "Provision with another shape", backenderr.GrantConflict)
				e.terminate(p.Instance.Handle)
				_, err = e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision of an ended grant", backenderr.GrantEnded)
			}
		}},
		{name: "errors/mixed calls at once", run: func(e *env) {
			e.mix(500 * time.Millisecond)
		}},
	}
}

// failsAt provisions a new grant while a provider call fails, in a way that it
// can fail in, then without fault, and ends it.
func (e *env) failsAt(point string, kind FaultKind, always bool) {
	e.Helper()
	what := "Provision while " + point + " is " + string(kind)
	reasons := faultReasons[kind]
	if e.f.Faults != nil {
		var can bool
		if reasons, can = e.f.Faults(Call{Side: SideProvider, Point: point})[kind]; !can {
			return
		}
	}
	g, envelope := e.grant()
	fault := e.f.Inject(Fault{Point: point, Kind: kind, Always: always, GrantID: g.ID})
	defer fault.Release()
	_, err := e.b.Provision(e.ctx(), g, envelope)
	select {
	case <-fault.Reached(): // which a wire may tell only after what it did
	case <-time.After(e.patience):
		e.Errorf("%s: the call was never made", what)
	}
	if err == nil && always && kind != FaultLostAnswer {
		e.Errorf("%s: it succeeded", what)
	}
	if err != nil {
		e.want(err, what, reasons...)
		if slices.Contains([]FaultKind{FaultCapacity, FaultQuota, FaultDenied, FaultUnauthenticated}, kind) && point == e.f.CreatePoint {
			e.wantNone(err, what)
		}
		if backenderr.CreatedOf(err) == backenderr.CreatedNone && backenderr.Retryable(err) && backenderr.From(err).RetryAfter <= 0 &&
			backenderr.Is(err, backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.ProviderUnavailable) {
			e.Errorf("%s: no hint when to retry: %s", what, describe(err))
		}
	}
	fault.Release()
	p := e.provisionAfter(kind, what+", and again", g, envelope)
	if e.f.History != nil {
		if h := e.f.History(g.ID); h.AtOnce > 1 {
			e.Errorf("%s, and again: %d instances at once", what, h.AtOnce)
		}
	}
	e.terminate(p.Instance.Handle)
}

// provisionAfter provisions a grant when a fault of a kind is over. A lost answer
// may have cost the backend its connection: a call that comes while it is losing
// that one, or has no other yet, is told so, for as long as the fixture says.
func (e *env) provisionAfter(kind FaultKind, what string, g backend.Grant, envelope backend.Envelope) backend.Provisioned {
	e.Helper()
	p, err := e.b.Provision(e.ctx(), g, envelope)
	if kind == FaultLostAnswer {
		for end := time.Now().Add(e.f.Reconnects); backenderr.Is(err, backenderr.ProviderUnavailable) && time.Now().Before(end); {
			<-time.After(100 * time.Millisecond)
			p, err = e.b.Provision(e.ctx(), g, envelope)
		}
	}
	if err != nil {
		e.Fatalf("%s: %s", what, describe(err))
	}
	return p
}

// mix makes all kinds of calls at once for a while. What holds in every case is
// checked all the time.
func (e *env) mix(d time.Duration) {
	e.Helper()
	stop := time.Now().Add(d)
	var callers sync.WaitGroup
	for n := range 4 {
		ctx := e.ctx()
		callers.Go(func() {
			var watches []*watcher
			defer func() {
				for _, w := range watches {
					if err := <-w.done; err != nil {
						e.Errorf("WatchUntilExit: %s", describe(err))
					}
				}
			}()
			for round := 0; time.Now().Before(stop); round++ {
				g, envelope := e.grant()
				p, err := e.b.Provision(ctx, g, envelope)
				if err != nil {
					e.want(err, "Provision", backenderr.CapacityExhausted, backenderr.WorkerFull)
					continue
				}
				if (round+n)%2 == 0 {
					if _, err := e.b.Capabilities(ctx); err != nil {
						e.Errorf("Capabilities: %s", describe(err))
					}
					watches = append(watches, e.watch(ctx, p.Instance.Handle))
				}
				if t, err := e.b.Terminate(ctx, p.Instance.Handle); err != nil || t.State != backend.StateTerminated {
					e.Errorf("Terminate: %s, %s", t.State, describe(err))
				}
			}
		})
	}
	callers.Wait()
}

func ownershipCases() []testCase {
	denied := []backenderr.Reason{backenderr.CallerDenied, backenderr.InstanceNotFound}
	return []testCase{
		{name: "ownership/a stranger may not watch", run: func(e *env) {
			_, _, p := e.ready()
			w := e.watch(e.as(stranger), p.Instance.Handle)
			e.want(w.err(), "a stranger's watch", denied...)
			if len(w.events) > 0 {
				e.Errorf("a stranger's watch got an event")
			}
		}},
		{name: "ownership/a stranger may not terminate", run: func(e *env) {
			g, envelope, p := e.ready()
			_, err := e.b.Terminate(e.as(stranger), p.Instance.Handle)
			e.want(err, "a stranger's Terminate", denied...)
			e.same("answers before and after a stranger's Terminate", p, e.provision(g, envelope))
		}},
		{name: "ownership/a stranger gets no receipt", run: func(e *env) {
			g, envelope, p := e.ready()
			_, err := e.b.Provision(e.as(stranger), g, envelope)
			e.want(err, "a stranger's Provision of the same grant", backenderr.GrantConflict, backenderr.CallerDenied)
			e.terminate(p.Instance.Handle)
			w := e.watch(e.as(stranger), p.Instance.Handle)
			e.want(w.err(), "a stranger's watch after the end", denied...)
		}},
		{name: "ownership/a stranger gets nothing after the end", run: func(e *env) {
			_, _, p := e.ready()
			e.terminate(p.Instance.Handle)
			t, err := e.b.Terminate(e.as(stranger), p.Instance.Handle)
			e.want(err, "a stranger's Terminate after the end", denied...)
			if t.Log != nil {
				e.Errorf("a stranger got the compute log")
			}
		}},
		{name: "ownership/nobody is nobody", run: func(e *env) {
			_, _, p := e.ready()
			nobody := e.as(backend.Caller{})
			_, err := e.b.Terminate(nobody, p.Instance.Handle)
			e.want(err, "Terminate by nobody", append(denied, backenderr.CallerUnauthenticated)...)
			e.want(e.watch(nobody, p.Instance.Handle).err(), "a watch by nobody", append(denied, backenderr.CallerUnauthenticated)...)
		}},
		{name: "ownership/an operator may watch and terminate", run: func(e *env) {
			_, _, p := e.ready()
			w := e.watch(e.as(operator), p.Instance.Handle)
			if s := w.state(); s != backend.StateReady {
				e.Errorf("an operator's watch begins with %s", s)
			}
			t, err := e.b.Terminate(e.as(operator), p.Instance.Handle)
			if err != nil || t.State != backend.StateTerminated {
				e.Fatalf("an operator's Terminate: %s, %s", t.State, describe(err))
			}
			e.checkLog(p, t.Log, backend.EndTerminated)
			w.log()
		}},
		{name: "ownership/outlives a restart", needs: []need{needReopen}, run: func(e *env) {
			_, _, p := e.ready()
			e.reopen()
			_, err := e.b.Terminate(e.as(stranger), p.Instance.Handle)
			e.want(err, "a stranger's Terminate after a restart", denied...)
			e.terminate(p.Instance.Handle)
		}},
	}
}
