package backendtest

import (
	"context"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

// crashCases kill the worker before and after each call that it makes to its
// provider and to its ledger on a way through the contract, start it again, and
// ask for the same.
func crashCases() []testCase {
	needs := func(more ...need) []need { return append([]need{needInject, needReopen, needHistory}, more...) }
	retried := func(r *run) {
		r.again()
		r.over(backend.EndTerminated)
	}
	return []testCase{
		{name: "crash/during Provision, which is then retried", needs: needs(), run: func(e *env) {
			e.crashes(script{act: provisions, settle: retried})
		}},
		{name: "crash/during Provision with a sealed key, which is then retried", needs: needs(), direct: true, run: func(e *env) {
			e.crashes(script{
				prepare: func(r *run) { r.key = r.sealed(&r.envelope) },
				act:     provisions,
				settle: func(r *run) {
					r.again()
					key := r.open(r.key, r.p.Receipt)
					if r.f.Login != nil {
						if err := r.f.Login(r.ctx(), r.p.Receipt, key); err != nil {
							r.Errorf("login: %v", err)
						}
					}
					r.over(backend.EndTerminated)
				},
			})
		}},
		{name: "crash/during Provision, and then Terminate", needs: needs(), run: func(e *env) {
			e.crashes(script{act: provisions, settle: func(r *run) { r.over(backend.EndTerminated) }})
		}},
		{name: "orphans/of a crash during Provision, which nobody retries", needs: needs(needOrphanAge), direct: true, run: func(e *env) {
			e.crashes(script{act: provisions, settle: func(r *run) {
				r.settledAlone()
				retried(r)
			}})
		}},
		{name: "orphans/of a crash while a cancelled Provision is undone", needs: needs(needOrphanAge), direct: true, run: func(e *env) {
			e.crashes(cancelled(e, func(r *run) {
				r.settledAlone()
				retried(r)
			}))
		}},
		{name: "crash/while a cancelled Provision is undone, which is then retried", needs: needs(), direct: true, run: func(e *env) {
			e.crashes(cancelled(e, retried))
		}},
		{name: "crash/while a cancelled Provision is retried", needs: needs(), direct: true, run: func(e *env) {
			create := e.f.CreatePoint
			e.crashes(script{
				held: create,
				// The retry may come before the undoing has begun.
				varies: true,
				act: func(r *run) error {
					var second <-chan outcome
					left, err := r.leaves(create, func(hold Injection) {
						second = r.begin(r.ctx(), r.g, r.envelope)
						hold.Release()
					})
					if !left || err != nil {
						return err
					}
					o, err := await(r.env, "the retried Provision", second)
					if err == nil && o.err == nil {
						r.told(o.provisioned)
					}
					return orFailed(o.err, err)
				},
				settle: retried,
			})
		}},
		{name: "crash/during a watch until the workload's end", needs: needs(needExit), run: func(e *env) {
			e.crashes(script{prepare: isReady, act: watchesExit, settle: exited})
		}},
		{name: "crash/during a watch until the deadline", needs: needs(), direct: true, run: func(e *env) {
			e.crashes(script{
				prepare: func(r *run) {
					for life := r.f.ShortestLife; ; life *= 2 {
						g, envelope, p := r.shortFrom(life)
						r.g, r.envelope = g, envelope
						if r.attended() {
							r.told(p)
							return
						}
					}
				},
				act: func(r *run) error {
					ctx, cancel := r.limited()
					defer cancel()
					return r.watched(ctx)
				},
				settle: func(r *run) {
					r.logged(r.watch(r.ctx(), r.handle(r.g.ID)).log())
					r.over(backend.EndDeadline)
				},
			})
		}},
		{name: "crash/during Terminate, which is then retried", needs: needs(), run: func(e *env) {
			e.crashes(script{prepare: isReady, act: terminates, settle: func(r *run) { r.over(backend.EndTerminated) }})
		}},
		{name: "crash/during Terminate, which nobody retries", needs: needs(), direct: true, run: func(e *env) {
			e.crashes(script{prepare: isReady, act: terminates, settle: func(r *run) {
				if r.state() != backend.StateReady { // Then the call never arrived.
					r.eventually("the new worker finishes what the dead one began", func() bool { return len(r.left(r.g.ID)) == 0 })
					r.logged(r.watch(r.ctx(), r.handle(r.g.ID)).log())
				}
				r.over(backend.EndTerminated)
			}})
		}},
		{name: "crash/during Terminate of what is being made", needs: needs(), direct: true, run: func(e *env) {
			create := e.f.CreatePoint
			e.crashes(script{
				held: create,
				act: func(r *run) error {
					hold := r.f.Inject(Fault{Point: create, Kind: FaultSlow, GrantID: r.g.ID})
					defer hold.Release()
					making := r.begin(r.ctx(), r.g, r.envelope)
					if o, held, err := r.held(hold, making); !held {
						return orFailed(o.err, err)
					}
					err := r.ended(r.ctx())
					// A worker's Terminate has ended the call by now (the case
					// "terminate/during Provision, at each step" holds it to that);
					// between a router and its worker it would hang on.
					hold.Release()
					if _, late := await(r.env, "Provision", making); late != nil {
						return late
					}
					return err
				},
				settle: func(r *run) { r.over(backend.EndTerminated) },
			})
		}},
		{name: "orphans/only what is over, and the bridge's own, is swept", needs: needs(needOrphanAge, needPlant), direct: true, run: func(e *env) {
			// What lives is of an earlier process and of this one.
			earlierGrant, earlierEnvelope, earlier := e.ready()
			e.reopen()
			g, envelope, p := e.ready()
			plant := func(bridge string, validTo time.Time) Planted {
				other, _ := e.f.Satisfiable()
				planted := Planted{GrantID: other.ID, Bridge: bridge, ValidTo: validTo.UTC().Truncate(time.Second)}
				if err := e.f.Plant(e.ctx(), planted); err != nil {
					e.Fatalf("Plant: %v", err)
				}
				return planted
			}
			there := func(planted Planted) bool { return len(e.left(planted.GrantID)) > 0 }
			past, future := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
			blind := e.f.Inject(Fault{Point: e.f.ReadPoint, Kind: FaultUnavailable, Always: true})
			defer blind.Release()
			over, others, running := plant("", past), plant("backendtest-other", past), plant("", future)
			receive(e, "a look at the provider", blind.Reached())
			timer := time.NewTimer(3 * e.f.OrphanAge)
			<-timer.C
			if !there(over) {
				e.Errorf("something was swept while nothing could be seen")
			}
			blind.Release()
			e.eventually("what is past its deadline is swept", func() bool { return !there(over) })
			timer.Reset(3 * e.f.OrphanAge)
			<-timer.C
			if !there(others) {
				e.Errorf("what another bridge has was swept")
			}
			if !there(running) {
				e.Errorf("what is within its deadline was swept, which another ledger may know of")
			}
			for _, live := range []struct {
				g        backend.Grant
				envelope backend.Envelope
				p        backend.Provisioned
			}{{g, envelope, p}, {earlierGrant, earlierEnvelope, earlier}} {
				if state := (&run{env: e, g: live.g}).state(); state != backend.StateReady || !there(Planted{GrantID: live.g.ID}) {
					e.Errorf("after some sweeps a live grant is %s", state)
				}
				e.same("answers before and after a sweep", live.p, e.provision(live.g, live.envelope))
			}
			for _, planted := range []Planted{others, running} {
				if err := e.f.Uproot(e.ctx(), planted); err != nil {
					e.Errorf("Uproot: %v", err)
				}
			}
		}},
		{name: "crash/during a restart", needs: needs(), direct: true, run: func(e *env) {
			e.crashes(restarting(e))
		}},
	}
}

// crashes sweeps a script with crashes.
func (e *env) crashes(s script) {
	e.Helper()
	e.sweep(s, func(Call) []job { return []job{{kind: FaultCrashBefore}, {kind: FaultCrashAfter}} },
		func(e *env, j job, _ time.Duration) bool { return e.crash(s, j) })
}

// crash goes through a script with one crash.
func (e *env) crash(s script, j job) (reached bool) {
	e.Helper()
	r := e.begun(s)
	injection := e.f.Inject(j.fault(s.scope(r)))
	defer injection.Release()
	acted := make(chan error, 1)
	go func() { acted <- s.act(r) }()
	reached, err := e.reaches(injection, acted, e.cut)
	if !reached {
		if err != nil {
			e.Fatalf("nothing went wrong, and yet: %s", describe(err))
		}
		s.settle(r)
		return false
	}
	r.notStuck(err)
	r.crashed, r.down = true, false
	e.reopen()
	s.settle(r)
	return true
}

// linger is how long after the end of what is swept a call may come that was
// part of it.
const linger = 200 * time.Millisecond

// reaches waits until something has acted, and does what is to be done when the
// fault has hit.
func (e *env) reaches(injection Injection, acted <-chan error, hit func()) (reached bool, err error) {
	e.Helper()
	select {
	case <-injection.Reached():
		hit()
		return true, receive(e, "what is swept", acted)
	case err = <-acted:
	}
	timer := time.NewTimer(linger)
	defer timer.Stop()
	select {
	case <-injection.Reached():
	case <-timer.C:
		injection.Release()
	}
	select {
	case <-injection.Reached():
		hit()
		return true, err
	default:
		return false, err
	}
}

// The scripts that crashes and faults share.

func provisions(r *run) error {
	ctx, cancel := r.limited()
	defer cancel()
	p, err := r.b.Provision(ctx, r.g, r.envelope)
	if err == nil {
		r.told(p)
	}
	return err
}

// isReady provisions the grant.
func isReady(r *run) {
	r.Helper()
	r.told(r.provision(r.g, r.envelope))
	if !r.attended() {
		r.Fatalf("the grant ended by itself")
	}
}

// attended waits until the worker watches the instance, so that the calls by
// which it begins to don't mix with those that follow. It returns false if the
// grant ends before that.
func (r *run) attended() bool {
	r.Helper()
	if r.f.UsageInterval == 0 {
		return true
	}
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	w := r.watch(ctx, r.handle(r.g.ID))
	patience := time.After(r.patience)
	for {
		select {
		case event, ok := <-w.events:
			if event.Usage != nil {
				return true
			}
			if ok {
				continue
			}
			if err := w.err(); err != nil {
				r.Fatalf("WatchUntilExit: %s", describe(err))
			}
			return false
		case <-patience:
			r.Fatalf("waited %s for usage so far", r.patience)
		}
	}
}

// leaves provisions the grant, and has the caller leave when the first call of a
// point is held; meanwhile is what goes on before Provision has returned. left is
// false if the call was never made, as when it failed before.
func (r *run) leaves(point string, meanwhile func(hold Injection)) (left bool, err error) {
	hold := r.f.Inject(Fault{Point: point, Kind: FaultSlow, GrantID: r.g.ID})
	defer hold.Release()
	ctx, leave := context.WithCancel(r.ctx())
	defer leave()
	call := r.begin(ctx, r.g, r.envelope)
	if o, held, err := r.held(hold, call); !held {
		return false, orFailed(o.err, err)
	}
	leave()
	meanwhile(hold)
	_, err = await(r.env, "the cancelled Provision", call)
	return true, err
}

// cancelled is a Provision whose caller leaves at its last call to the provider,
// and the undoing that follows.
func cancelled(e *env, settle func(r *run)) script {
	e.Helper()
	points := e.allProvisionPoints()
	last := points[len(points)-1]
	return script{
		held: last,
		act: func(r *run) error {
			if left, err := r.leaves(last, func(Injection) {}); !left || err != nil {
				return err
			}
			return r.gone()
		},
		settle: settle,
	}
}

func terminates(r *run) error {
	ctx, cancel := r.limited()
	defer cancel()
	return r.ended(ctx)
}

// exitCode is how the sweeps' workloads end.
const exitCode = 7

func watchesExit(r *run) error {
	ctx, cancel := r.limited()
	defer cancel()
	watched := make(chan error, 1)
	go func() { watched <- r.watched(ctx) }()
	if err := r.f.Exit(r.g.ID, ExitStatus{Code: exitCode}); err != nil {
		return err
	}
	err, late := await(r.env, "the watch", watched)
	return orFailed(err, late)
}

func exited(r *run) {
	r.Helper()
	r.logged(r.watch(r.ctx(), r.handle(r.g.ID)).log())
	r.over(backend.EndWorkloadExited)
	if exit := r.log.Log.Exit; exit.Code == nil || *exit.Code != exitCode {
		r.Errorf("exit is %+v, want code %d", exit, exitCode)
	}
}

// restarting is a restart of the worker with one grant that is ready, one that
// is being ended and one whose Provision was cut off.
func restarting(e *env) script {
	e.Helper()
	ending := e.endPoints()
	last := ending[len(ending)-1]
	// crashed has the worker die in a call.
	crashed := func(r *run, f Fault, call func() error) {
		r.Helper()
		f.Kind = FaultCrashBefore
		injection := r.f.Inject(f)
		defer injection.Release()
		acted := make(chan error, 1)
		go func() { acted <- call() }()
		if reached, _ := r.reaches(injection, acted, r.cut); !reached {
			r.Fatalf("the worker never called %s", f.Point)
		}
	}
	return script{
		everything: true,
		varies:     true,
		prepare: func(r *run) {
			g, envelope := r.grant()
			r.cutOff = &run{env: r.env, g: g, envelope: envelope, within: r.within}
			crashed(r, Fault{Point: r.f.CreatePoint, GrantID: g.ID}, func() error { return provisions(r.cutOff) })
			r.reopen()
			r.told(r.provision(r.g, r.envelope))
			g, envelope = r.grant()
			r.ending = &run{env: r.env, g: g, envelope: envelope, within: r.within}
			r.ending.told(r.provision(g, envelope))
			crashed(r, Fault{Point: last, GrantID: g.ID}, func() error { return terminates(r.ending) })
			r.revive() // The next one lives.
		},
		act: func(r *run) error {
			b, err := r.f.Reopen(r.TB)
			if r.down = err != nil; r.down {
				return err
			}
			r.use(b)
			ctx, cancel := r.limited()
			defer cancel()
			// Unchecked: it may die now, and its connection with it.
			if _, err := b.Capabilities(ctx); err != nil {
				return err
			}
			if state, err := r.stateSeen(ctx); err != nil || state != backend.StateReady {
				return orFailed(err, failed("a ready grant is %s after a restart", state))
			}
			return r.ending.watched(ctx)
		},
		settle: func(r *run) {
			if r.down {
				r.reopen()
			}
			r.again()
			r.over(backend.EndTerminated)
			r.ending.over(backend.EndTerminated)
			r.cutOff.again()
			r.cutOff.over(backend.EndTerminated)
		},
	}
}
