package backendtest

import (
	"slices"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// faultCases have each call to the provider and to the ledger fail on a way
// through the contract, once and for as long as the fault stays, and then ask
// for the same with everything in order.
func faultCases() []testCase {
	needs := func(more ...need) []need { return append([]need{needInject, needHistory}, more...) }
	return []testCase{
		{name: "faults/at each call of Provision", needs: needs(), run: func(e *env) {
			e.fails(script{
				act: provisions,
				settle: func(r *run) {
					if r.failure == nil || r.retries {
						r.again()
					}
					r.over(backend.EndTerminated)
				},
			}, true)
		}},
		{name: "faults/at each call of Terminate", needs: needs(), run: func(e *env) {
			e.fails(script{
				insists: true,
				prepare: isReady, act: terminates, settle: func(r *run) { r.over(backend.EndTerminated) },
			}, false)
		}},
		{name: "faults/at each call of a watch until the workload's end", needs: needs(needExit), run: func(e *env) {
			e.fails(script{insists: true, prepare: isReady, act: watchesExit, settle: exited}, false)
		}},
		{name: "faults/at each call of a restart", needs: needs(needReopen), direct: true, run: func(e *env) {
			s := restarting(e)
			s.insists = true
			e.fails(s, false)
		}},
	}
}

// fails sweeps a script with faults. strict says that what the calls return is
// the answer to the fault itself.
func (e *env) fails(s script, strict bool) {
	e.Helper()
	e.sweep(s, func(c Call) []job {
		var jobs []job
		for kind, reasons := range e.faults(c) {
			jobs = append(jobs, job{kind: kind, reasons: reasons}, job{kind: kind, reasons: reasons, always: true})
		}
		slices.SortStableFunc(jobs, func(a, b job) int {
			switch {
			case a.kind < b.kind:
				return -1
			case a.kind > b.kind:
				return 1
			}
			return 0
		})
		return jobs
	}, func(e *env, j job, clean time.Duration) bool { return e.fail(s, j, strict, clean) })
}

// fail goes through a script with one fault.
func (e *env) fail(s script, j job, strict bool, clean time.Duration) (reached bool) {
	e.Helper()
	r := e.begun(s)
	r.retries = j.always
	limited := j.always && (j.kind == FaultSlow || s.insists)
	if limited {
		// Near its deadline Terminate answers that it is still at work.
		r.within = 3*clean + 700*time.Millisecond
	}
	injection := e.f.Inject(j.fault(s.scope(r)))
	defer injection.Release()
	acted := make(chan error, 1)
	go func() { acted <- s.act(r) }()
	reached, err := e.reaches(injection, acted, func() {
		if j.kind == FaultSlow && !j.always || s.everything {
			timer := time.NewTimer(clean/4 + 10*time.Millisecond)
			<-timer.C
			injection.Release()
		}
	})
	r.notStuck(err)
	r.failure = err
	switch {
	case !reached:
		if err != nil && !limited {
			e.Fatalf("nothing went wrong, and yet: %s", describe(err))
		}
	case strict:
		e.checkFailure(r, j, err)
	}
	injection.Release()
	s.settle(r)
	return reached
}

// checkFailure checks how Provision answered to a fault.
func (e *env) checkFailure(r *run, j job, err error) {
	e.Helper()
	creating := j.Side == SideProvider && j.Point == e.f.CreatePoint
	refused := slices.Contains([]FaultKind{FaultCapacity, FaultQuota, FaultDenied, FaultUnauthenticated}, j.kind)
	if err == nil {
		if creating && j.always && j.kind != FaultLostAnswer {
			e.Errorf("Provision succeeded")
		}
		if j.kind == FaultSlow && !j.always {
			return
		}
		return
	}
	if j.kind == FaultSlow && !j.always {
		e.Errorf("Provision failed although the call went on: %s", describe(err))
		return
	}
	e.want(err, "Provision", j.reasons...)
	if creating && refused && j.nth == 1 {
		e.wantNone(err, "Provision")
	}
	if backenderr.CreatedOf(err) != backenderr.CreatedNone {
		return
	}
	if backenderr.Is(err, backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.ProviderUnavailable) && backenderr.From(err).RetryAfter <= 0 {
		e.Errorf("no hint when to retry: %s", describe(err))
	}
	// It was looked at when the answer came; what comes later would be as bad.
	timer := time.NewTimer(20 * time.Millisecond)
	<-timer.C
	if left := e.left(r.g.ID); len(left) > 0 {
		e.Errorf("Provision said created=none, and later %v exists: %s", left, describe(err))
	}
}
