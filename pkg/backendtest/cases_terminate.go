package backendtest

import (
	"context"
	"runtime"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// ending is how a Terminate ended.
type ending struct {
	termination backend.Termination
	err         error
}

func (e *env) beginTerminate(ctx context.Context, h backend.Handle) <-chan ending {
	done := make(chan ending, 1)
	b := e.b
	go func() {
		t, err := b.Terminate(ctx, h)
		done <- ending{t, err}
	}()
	return done
}

func terminateCases() []testCase {
	return []testCase{
		{name: "terminate/leaves nothing and tells what was used", run: func(e *env) {
			_, _, p := e.ready()
			log := e.terminate(p.Instance.Handle)
			if left := e.left(); len(left) > 0 {
				e.Errorf("left over: %v", left)
			}
			e.checkLog(p, log, backend.EndTerminated)
			if e.f.Measures && (log.Log.Partial || log.Log.Usage.CPU == nil) {
				e.Errorf("the provider measures, and the log says partial=%v with the usage %+v", log.Log.Partial, log.Log.Usage)
			}
		}},
		{name: "terminate/again answers the same", run: func(e *env) {
			_, _, p := e.ready()
			log := e.terminate(p.Instance.Handle)
			for range 2 {
				e.same("logs of repeated Terminate", log, e.terminate(p.Instance.Handle))
			}
		}},
		{name: "terminate/again after a restart answers the same", needs: []need{needReopen}, run: func(e *env) {
			_, _, p := e.ready()
			log := e.terminate(p.Instance.Handle)
			e.reopen()
			e.same("logs before and after a restart", log, e.terminate(p.Instance.Handle))
		}},
		{name: "terminate/works after a restart", needs: []need{needReopen}, run: func(e *env) {
			_, _, p := e.ready()
			e.reopen()
			e.checkLog(p, e.terminate(p.Instance.Handle), backend.EndTerminated)
		}},
		{name: "terminate/several at once agree", run: func(e *env) {
			_, _, p := e.ready()
			var calls []<-chan ending
			for range 5 {
				calls = append(calls, e.beginTerminate(e.ctx(), p.Instance.Handle))
			}
			var log *backend.SignedLog
			for _, c := range calls {
				got := receive(e, "Terminate", c)
				if got.err != nil || got.termination.State != backend.StateTerminated {
					e.Fatalf("Terminate: %s, %s", got.termination.State, describe(got.err))
				}
				if log == nil {
					log = got.termination.Log
				}
				e.same("logs of Terminate at the same time", log, got.termination.Log)
			}
		}},
		{name: "terminate/a grant never seen is closed", run: func(e *env) {
			g, _ := e.grant()
			if log := e.terminate(e.handle(g.ID)); log != nil && !log.Log.StartedAt.IsZero() {
				e.Errorf("a grant that never ran has the log %+v", log.Log)
			}
			e.terminate(e.handle(g.ID))
		}},
		{name: "terminate/a grant never seen while the provider can't be read", needs: []need{needInject}, run: func(e *env) {
			g, _ := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.ReadPoint, Kind: FaultUnavailable, Always: true})
			defer fault.Release()
			t, err := e.b.Terminate(e.ctx(), e.handle(g.ID))
			if err == nil && t.State == backend.StateTerminated {
				e.Errorf("TERMINATED, without having seen the provider")
			}
			if err != nil {
				e.want(err, "Terminate", backenderr.ProviderUnavailable)
			}
			fault.Release()
			// The backend may have to connect again.
			e.eventually("Terminate, once the provider can be read", func() bool {
				t, err := e.b.Terminate(e.ctx(), e.handle(g.ID))
				if err != nil {
					e.want(err, "Terminate", backenderr.ProviderUnavailable)
				}
				return err == nil && t.State == backend.StateTerminated
			})
		}},
		{name: "terminate/a grant never seen while the provider hangs", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.ReadPoint, Kind: FaultSlow, Always: true})
			defer fault.Release()
			ctx, cancel := context.WithTimeout(e.ctx(), 3*time.Second)
			defer cancel()
			t, err := e.b.Terminate(ctx, e.handle(g.ID))
			if err != nil || t.State != backend.StateTerminating {
				e.Errorf("near its deadline Terminate has to answer TERMINATING, not %s, %s", t.State, describe(err))
			}
			fault.Release()
			e.terminate(e.handle(g.ID))
			_, err = e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of a closed grant", backenderr.GrantEnded)
		}},
		{name: "terminate/during Provision, at each step", needs: []need{needInject}, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				g, envelope := e.grant()
				fault := e.f.Inject(Fault{Point: point, Kind: FaultSlow, GrantID: g.ID})
				call := e.begin(e.ctx(), g, envelope)
				receive(e, "the provider call "+point, fault.Reached())
				end := e.beginTerminate(e.ctx(), e.handle(g.ID))
				e.want(receive(e, "Provision", call).err, "Provision, terminated at "+point, backenderr.GrantEnded)
				fault.Release()
				got := receive(e, "Terminate", end)
				if got.err != nil || got.termination.State != backend.StateTerminated {
					e.Errorf("Terminate at %s: %s, %s", point, got.termination.State, describe(got.err))
				}
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision after Terminate at "+point, backenderr.GrantEnded)
			}
		}},
		{name: "terminate/at the same time as Provision", run: func(e *env) {
			for round := range 8 {
				g, envelope := e.grant()
				call := e.begin(e.ctx(), g, envelope)
				if round%2 == 1 {
					runtime.Gosched()
				}
				end := receive(e, "Terminate", e.beginTerminate(e.ctx(), e.handle(g.ID)))
				if end.err != nil || end.termination.State != backend.StateTerminated {
					e.Errorf("Terminate: %s, %s", end.termination.State, describe(end.err))
				}
				if o := receive(e, "Provision", call); o.err != nil {
					e.want(o.err, "Provision", backenderr.GrantEnded)
				}
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision after both", backenderr.GrantEnded)
				if left := e.left(g.ID); len(left) > 0 {
					e.Errorf("left over: %v", left)
				}
			}
		}},
		{name: "terminate/during a watch, which then ends", run: func(e *env) {
			_, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			w.state()
			log := e.terminate(p.Instance.Handle)
			e.same("the logs of Terminate and the watch", log, w.log())
		}},
		{name: "terminate/frees only its own reservation", run: func(e *env) {
			var all []backend.Provisioned
			for range e.f.Capacity {
				_, _, p := e.ready()
				all = append(all, p)
			}
			e.terminate(all[0].Instance.Handle)
			for _, p := range all[1:] {
				if len(e.left(p.Instance.GrantID)) == 0 {
					e.Errorf("ending one grant ended another")
				}
			}
			e.ready()
			g, envelope := e.grant()
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "a second grant in the place of one", backenderr.CapacityExhausted, backenderr.WorkerFull)
		}},
		{name: "terminate/goes on until it is done, whatever fails", needs: []need{needInject}, run: func(e *env) {
			for _, point := range sample(e.endPoints(), e.h.Sweep, e.random()) {
				for _, kind := range []FaultKind{FaultUnavailable, FaultThrottled, FaultLostAnswer} {
					_, _, p := e.ready()
					fault := e.f.Inject(Fault{Point: point, Kind: kind, GrantID: p.Instance.GrantID})
					t, err := e.b.Terminate(e.ctx(), p.Instance.Handle)
					if err == nil && t.State != backend.StateTerminated {
						err = backenderr.New(backenderr.ProviderUnavailable, "%s", t.State)
					}
					if err != nil {
						e.want(err, "Terminate with "+point+" "+string(kind), backenderr.ProviderUnavailable)
					}
					fault.Release()
					e.terminate(p.Instance.Handle)
				}
			}
		}},
		{name: "terminate/is honest while it can't finish", needs: []need{needInject}, run: func(e *env) {
			g, envelope, p := e.ready()
			var faults []Injection
			defer func() {
				for _, fault := range faults {
					fault.Release()
				}
			}()
			for _, point := range e.endPoints() {
				faults = append(faults, e.f.Inject(Fault{Point: point, Kind: FaultSlow, GrantID: g.ID, Always: true}))
			}
			ctx, cancel := context.WithTimeout(e.ctx(), 3*time.Second)
			defer cancel()
			t, err := e.b.Terminate(ctx, p.Instance.Handle)
			if err == nil && t.State != backend.StateTerminating {
				e.Errorf("Terminate answered %s while deletes hang", t.State)
			}
			if err != nil {
				e.Errorf("Terminate, near its deadline, has to answer TERMINATING: %s", describe(err))
			}
			_, err = e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision while it is ended", backenderr.GrantEnded)
		}},
		{name: "terminate/cancelling stops the call and not the end", needs: []need{needInject}, run: func(e *env) {
			g, envelope, p := e.ready()
			fault := e.f.Inject(Fault{Point: e.endPoints()[0], Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			ctx, cancel := context.WithCancel(e.ctx())
			call := e.beginTerminate(ctx, p.Instance.Handle)
			receive(e, "the delete", fault.Reached())
			cancel()
			if got := receive(e, "the cancelled Terminate", call); got.err != nil {
				e.want(got.err, "the cancelled Terminate", backenderr.Cancelled)
			}
			fault.Release()
			e.eventually("the end goes on", func() bool { return len(e.left(g.ID)) == 0 })
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision after a cancelled Terminate", backenderr.GrantEnded)
		}},
		{name: "terminate/malformed handles", run: func(e *env) {
			g, _ := e.f.Satisfiable()
			for _, h := range []backend.Handle{"", "nonsense", "../" + backend.HandleFor(g.ID), backend.HandleFor(g.ID) + "0"} {
				_, err := e.b.Terminate(e.ctx(), h)
				e.want(err, "Terminate of handle "+string(h), backenderr.RequestInvalid)
			}
		}},
	}
}
