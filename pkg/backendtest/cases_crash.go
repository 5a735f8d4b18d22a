package backendtest

import (
	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// crashCases kill the worker at each provider call of a way through the
// contract, start it again, and then ask for the same.
func crashCases() []testCase {
	needs := []need{needInject, needReopen, needHistory}
	return []testCase{
		{name: "crash/during Provision, which is then retried", needs: needs, direct: true, run: func(e *env) {
			e.crashes(e.provisionPoints(), func(fault func(backend.GrantID) Injection) {
				g, envelope := e.grant()
				injection := fault(g.ID)
				call := e.begin(e.ctx(), g, envelope)
				receive(e, "the crash", injection.Reached())
				e.reopen()
				p := e.provision(g, envelope)
				if o := receive(e, "the call that the crash cut off", call); o.err == nil {
					e.same("answers before and after a crash", o.provisioned, p)
				}
				e.checkLog(p, e.terminate(p.Instance.Handle), backend.EndTerminated)
			})
		}},
		{name: "crash/during Provision, and then Terminate", needs: needs, direct: true, run: func(e *env) {
			e.crashes(e.provisionPoints(), func(fault func(backend.GrantID) Injection) {
				g, envelope := e.grant()
				injection := fault(g.ID)
				call := e.begin(e.ctx(), g, envelope)
				receive(e, "the crash", injection.Reached())
				e.reopen()
				receive(e, "the call that the crash cut off", call)
				e.terminate(e.handle(g.ID))
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision after crash and Terminate", backenderr.GrantEnded)
			})
		}},
		{name: "crash/during Terminate, which is then retried", needs: needs, direct: true, run: func(e *env) {
			e.crashes(e.endPoints(), func(fault func(backend.GrantID) Injection) {
				g, envelope, p := e.ready()
				injection := fault(g.ID)
				call := e.beginTerminate(e.ctx(), p.Instance.Handle)
				receive(e, "the crash", injection.Reached())
				e.reopen()
				if got := receive(e, "the call that the crash cut off", call); got.err == nil && got.termination.State == backend.StateTerminated {
					e.Errorf("a dead worker answered TERMINATED")
				}
				e.checkLog(p, e.terminate(p.Instance.Handle), backend.EndTerminated)
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision after crash and Terminate", backenderr.GrantEnded)
			})
		}},
		{name: "crash/during Terminate, which nobody retries", needs: needs, direct: true, run: func(e *env) {
			e.crashes(e.endPoints(), func(fault func(backend.GrantID) Injection) {
				g, _, p := e.ready()
				injection := fault(g.ID)
				call := e.beginTerminate(e.ctx(), p.Instance.Handle)
				receive(e, "the crash", injection.Reached())
				e.reopen()
				receive(e, "the call that the crash cut off", call)
				e.eventually("the new worker finishes what the dead one began", func() bool { return len(e.left(g.ID)) == 0 })
				e.checkLog(p, e.watch(e.ctx(), p.Instance.Handle).log(), backend.EndTerminated)
			})
		}},
	}
}

// crashes runs a scenario once for each point, before and after its effect.
func (e *env) crashes(points []string, scenario func(fault func(backend.GrantID) Injection)) {
	e.Helper()
	for _, point := range points {
		for _, kind := range []FaultKind{FaultCrashBefore, FaultCrashAfter} {
			scenario(func(id backend.GrantID) Injection {
				e.Logf("%s %s", kind, point)
				return e.f.Inject(Fault{Point: point, Kind: kind, GrantID: id})
			})
		}
	}
}
