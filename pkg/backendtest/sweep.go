package backendtest

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// tries is how often a sweep tries to reach a call before it gives up.
const tries = 3

// script is a way through the contract that a sweep goes again and again: once
// cleanly, to learn which calls it takes, and then once for each thing that may
// go wrong at each of them.
type script struct {
	// prepare is what comes before; nothing goes wrong in it. Optional.
	prepare func(r *run)
	// act is what is swept. It returns an error only for what should have
	// worked; an error is expected of it once something has gone wrong. It must
	// not end its goroutine.
	act func(r *run) error
	// settle asks for the same again, with everything in order, and checks what
	// must hold now. Every grant has ended when it returns.
	settle func(r *run)
	// held is a point whose first call act holds, so that it can't be swept.
	held string
	// everything means that all calls count, not only those for the grant.
	everything bool
	// varies means that several things go on at once, in an order that differs.
	varies bool
	// insists means that act doesn't come to an end while a call fails.
	insists bool
}

// run is one way through a script.
type run struct {
	*env
	g        backend.Grant
	envelope backend.Envelope
	// key is the requester's, where the login key is sealed to it.
	key *ecdh.PrivateKey
	// ending and cutOff are further grants, of the script restarting.
	ending, cutOff *run
	// crashed says that the worker died and was started again, down that it
	// didn't come up.
	crashed, down bool
	// retries says that Provision is to be retried before the end.
	retries bool
	// p is the answer of Provision, as soon as one came.
	p *backend.Provisioned
	// log is the final compute log, as soon as one was seen.
	log *backend.SignedLog
	// failure is the error of the call that is swept.
	failure error
	// within is how much time the calls of act have.
	within time.Duration
}

// limited returns a context for the calls of act.
func (r *run) limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(backend.WithCaller(r.Context(), owner), r.within)
}

// told takes note of an answer of Provision, which must be the same each time.
func (r *run) told(p backend.Provisioned) {
	r.Helper()
	if r.p == nil {
		r.p = &p
	}
	r.same("answers of Provision", *r.p, p)
}

// logged takes note of a final log, which must be the same each time.
func (r *run) logged(log *backend.SignedLog) {
	r.Helper()
	if r.log == nil {
		r.log = log
	}
	r.same("final logs", r.log, log)
}

// again provisions the grant once more, which must work.
func (r *run) again() {
	r.Helper()
	r.told(r.provision(r.g, r.envelope))
	r.told(r.provision(r.g, r.envelope))
	r.onlyOne()
}

// onlyOne fails if there ever were two instances, or more than attempts.
func (r *run) onlyOne() {
	r.Helper()
	if r.f.History == nil {
		return
	}
	h := r.f.History(r.g.ID)
	if h.AtOnce > 1 {
		r.Errorf("%d instances at once", h.AtOnce)
	}
	if r.p != nil && h.Created > int(r.p.Instance.Attempt) {
		r.Errorf("%d instances were made in %d attempts", h.Created, r.p.Instance.Attempt)
	}
}

// over ends the grant and checks that it has ended for good: with one log, the
// same for everybody, with nothing left, and never to run again.
func (r *run) over(reason backend.EndReason) {
	r.Helper()
	h := r.handle(r.g.ID)
	for range 2 {
		if log := r.terminate(h); log != nil || r.p != nil || r.log != nil {
			r.logged(log)
		}
	}
	if r.p != nil {
		r.checkLog(*r.p, r.log, reason)
	}
	if r.log != nil {
		r.logged(r.watch(r.ctx(), h).log())
	}
	_, err := r.b.Provision(r.ctx(), r.g, r.envelope)
	r.want(err, "Provision of an ended grant", backenderr.GrantEnded)
	if left := r.left(r.g.ID); len(left) > 0 {
		r.Errorf("left over: %v", left)
	}
	r.onlyOne()
}

// watched watches the grant until its final log, without failing.
func (r *run) watched(ctx context.Context) error {
	var log *backend.SignedLog
	err := r.b.WatchUntilExit(ctx, r.handle(r.g.ID), func(event backend.Event) error {
		if event.Log != nil {
			log = event.Log
		}
		return nil
	})
	if err == nil && log != nil {
		r.logged(log)
	}
	return err
}

// ended terminates the grant, without failing.
func (r *run) ended(ctx context.Context) error {
	t, err := r.b.Terminate(ctx, r.handle(r.g.ID))
	if err == nil && t.State == backend.StateTerminated && t.Log != nil {
		r.logged(t.Log)
	}
	if err == nil && t.State != backend.StateTerminated {
		err = backenderr.New(backenderr.DeadlineExceeded, "Terminate answered %s", t.State)
	}
	return err
}

// notStuck fails if a call didn't even fail.
func (r *run) notStuck(err error) {
	r.Helper()
	if stuck, ok := errors.AsType[*stuckError](err); ok {
		r.Errorf("%v", stuck)
	}
}

// held waits until a call that was begun is held at a point.
func (r *run) held(hold Injection, call <-chan outcome) (o outcome, held bool, err error) {
	select {
	case <-hold.Reached():
		return outcome{}, true, nil
	case o = <-call:
		return o, false, nil
	case <-time.After(r.patience):
		return outcome{}, false, &stuckError{"a call to be held", r.patience}
	}
}

// gone waits until nothing of the grant is left and the worker is done with it,
// without failing. It asks the worker more and more seldom: each time the worker asks
// its ledger, and how often it does should not differ much between runs.
func (r *run) gone() error {
	const often, seldom = 2 * time.Millisecond, 100 * time.Millisecond
	deadline := time.Now().Add(r.patience)
	for wait := often; !r.isCut(); {
		if len(r.left(r.g.ID)) == 0 {
			if state, err := r.stateSeen(r.ctx()); err != nil || state == 0 {
				return err
			}
			wait = min(2*wait, seldom)
		}
		if time.Now().After(deadline) {
			return &stuckError{"the undoing of a cancelled Provision", r.patience}
		}
		timer := time.NewTimer(wait)
		<-timer.C
	}
	return nil
}

// stateSeen returns the state of the grant, 0 if it has no instance.
func (r *run) stateSeen(ctx context.Context) (state backend.State, err error) {
	err = r.b.WatchUntilExit(ctx, r.handle(r.g.ID), func(event backend.Event) error {
		if event.Instance == nil {
			return nil
		}
		state = event.Instance.State
		return &emitError{}
	})
	if state != 0 || backenderr.Is(err, backenderr.InstanceNotFound) {
		err = nil
	}
	return state, err
}

func (r *run) state() backend.State {
	r.Helper()
	state, err := r.stateSeen(r.ctx())
	if err != nil {
		r.Fatalf("WatchUntilExit: %s", describe(err))
	}
	return state
}

// settledAlone waits until the worker has undone what nobody asks for, or has it
// ready for who may ask.
func (r *run) settledAlone() {
	r.Helper()
	r.eventually("what was cut off is undone, or ready", func() bool {
		return len(r.left(r.g.ID)) == 0 || r.state() == backend.StateReady
	})
}

// stuckError says that something neither worked nor failed.
type stuckError struct {
	what  string
	after time.Duration
}

func (s *stuckError) Error() string { return fmt.Sprintf("waited %s for %s", s.after, s.what) }

// await waits for one value of a channel, without failing.
func await[T any](e *env, what string, c <-chan T) (T, error) {
	select {
	case v := <-c:
		return v, nil
	case <-time.After(e.patience):
		var zero T
		return zero, &stuckError{what, e.patience}
	}
}

// orFailed returns the first error.
func orFailed(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// failed is an error of the suite's own.
func failed(format string, args ...any) error { return fmt.Errorf(format, args...) }

// canary is a secret of every grant that a sweep makes.
const canary = "backendtest-canary-71d0ab"

// begun returns a run through a script that is about to act.
func (e *env) begun(s script) *run {
	e.Helper()
	r := &run{env: e, within: e.patience}
	r.g, r.envelope = e.grant()
	r.g.Environment = maps.Clone(r.g.Environment)
	if r.g.Environment == nil {
		r.g.Environment = map[string]string{}
	}
	r.g.Environment["TOKEN"] = canary
	e.secret(canary)
	if s.prepare != nil {
		s.prepare(r)
	}
	return r
}

func (s script) scope(r *run) backend.GrantID {
	if s.everything {
		return backend.GrantID{}
	}
	return r.g.ID
}

// clean goes through a script with nothing going wrong, and returns the calls
// that it took and how long.
func (e *env) clean(s script) ([]Call, time.Duration) {
	e.Helper()
	r := e.begun(s)
	stop := e.f.Record(s.scope(r))
	began := time.Now()
	err := s.act(r)
	took := time.Since(began)
	calls := stop()
	if err != nil {
		e.Fatalf("a clean run: %s", describe(err))
	}
	s.settle(r)
	return calls, took
}

// job is one run of a sweep: one thing that goes wrong at one call.
type job struct {
	Call
	nth     int
	kind    FaultKind
	always  bool
	reasons []backenderr.Reason
}

func (j job) String() string {
	times := ""
	if j.always {
		times = " (always)"
	}
	return fmt.Sprintf("%s, %s call %s #%d%s", j.kind, j.Side, j.Point, j.nth, times)
}

func (j job) fault(id backend.GrantID) Fault {
	return Fault{Side: j.Side, Point: j.Point, Nth: j.nth, Kind: j.kind, Always: j.always, GrantID: id}
}

// sweep records a clean run and then does each job that follows from it.
func (e *env) sweep(s script, jobsAt func(Call) []job, do func(e *env, j job, clean time.Duration) (reached bool)) {
	e.Helper()
	e.clean(s) // The first run may find less prepared than the others.
	before, _ := e.clean(s)
	calls, took := e.clean(s)
	if len(calls) == 0 {
		e.Fatalf("a clean run made no calls")
	}
	tally := e.tally(calls)
	var jobs []job
	seen, usual := map[Call]int{}, map[Call]int{}
	for _, c := range before {
		usual[Call{Side: c.Side, Point: c.Point}]++
	}
	for _, c := range calls {
		key := Call{Side: c.Side, Point: c.Point}
		seen[key]++
		polled := c.Varies
		c.Varies = c.Varies || s.varies || seen[key] > usual[key]
		if c.Side == SideProvider && c.Point == s.held && seen[key] == 1 || polled && seen[key] > 2 || e.h.Sweep.MutatingOnly && !c.Mutates {
			continue
		}
		for _, j := range jobsAt(c) {
			j.Call, j.nth = c, seen[key]
			jobs = append(jobs, j)
		}
	}
	all := len(jobs)
	jobs = sample(jobs, e.h.Sweep, e.random())
	tally.leftOut(all - len(jobs))

	queue := make(chan job, len(jobs))
	for _, j := range jobs {
		queue <- j
	}
	close(queue)
	e.inParallel(min(max(e.h.Sweep.Parallel, 1), len(jobs)), func(e *env, stop <-chan struct{}) {
		defer e.at("")
		for j := range queue {
			select {
			case <-stop:
				return
			default:
			}
			e.at(j.String() + ": ")
			reached := false
			for try := 0; !reached && try < tries; try++ {
				reached = do(e, j, took<<try)
			}
			tally.did(j, reached)
			// How often something is read may differ in ways that no clean run
			// shows.
			if !reached && !j.Varies && (j.nth == 1 || j.Mutates) && e.makes(s, j) {
				e.Errorf("clean runs made this call, and %d others did not", tries)
			}
		}
	})
	if missed := tally.missed(); missed > mayMiss(len(jobs)) {
		e.Errorf("%d of %d runs never reached the call that they were for", missed, len(jobs))
	}
}

// mayMiss is how many runs of a sweep may never reach the call that they are
// for: how often a call that varies is made, nobody knows before. A small sample
// may have drawn two of those.
func mayMiss(runs int) int { return max(2, runs/3) }

// makes reports whether a further clean run makes a job's call. One that repeats
// a call until its effect shows makes it more often on a busy machine.
func (e *env) makes(s script, j job) bool {
	e.Helper()
	calls, _ := e.clean(s)
	n := 0
	for _, c := range calls {
		if c.Side == j.Side && c.Point == j.Point {
			n++
		}
	}
	return n >= j.nth
}

// inParallel does something with n environments at once, of which the first is
// e. When one of them fails for good, stop is closed.
func (e *env) inParallel(n int, do func(e *env, stop <-chan struct{})) {
	e.Helper()
	stop := make(chan struct{})
	stopped := sync.OnceFunc(func() { close(stop) })
	var workers sync.WaitGroup
	for i := range n {
		sub := e
		if i > 0 {
			sub = newEnv(e.TB, e.h, e.h.Open(e.TB), e.m)
			sub.name, sub.report = e.name, e.report
		}
		sub.fatal = runtime.Goexit // FailNow is for the test's own goroutine.
		workers.Go(func() {
			finished := false
			defer func() {
				if !finished {
					stopped()
				}
			}()
			do(sub, stop)
			if i > 0 {
				sub.finish()
			}
			finished = true
		})
	}
	workers.Wait()
	e.fatal = nil
	select {
	case <-stop:
		e.FailNow()
	default:
	}
}

// faults says which faults can hit a call, and as what they are told.
func (e *env) faults(c Call) map[FaultKind][]backenderr.Reason {
	if e.f.Faults != nil {
		return e.f.Faults(c)
	}
	return DefaultFaults(e.f.CreatePoint)(c)
}

// provisionPoints returns the provider calls of a new grant's Provision, each
// once and in order, as far as the harness wants them swept.
func (e *env) provisionPoints() []string {
	e.Helper()
	return sample(e.allProvisionPoints(), e.h.Sweep, e.random())
}

func (e *env) allProvisionPoints() []string {
	e.Helper()
	g, envelope := e.grant()
	stop := e.f.Record(g.ID)
	p := e.provision(g, envelope)
	points := pointsOf(stop())
	e.terminate(p.Instance.Handle)
	if len(points) == 0 {
		e.Fatalf("Provision made no call to the provider")
	}
	return points
}

// endPoints returns the provider calls of a ready grant's Terminate, each once
// and in order. Without all of them nothing can be ended.
func (e *env) endPoints() []string {
	e.Helper()
	g, _, p := e.ready()
	stop := e.f.Record(g.ID)
	e.terminate(p.Instance.Handle)
	points := pointsOf(stop())
	if len(points) == 0 {
		e.Fatalf("Terminate made no call to the provider")
	}
	return points
}

func pointsOf(calls []Call) []string {
	var points []string
	for _, c := range calls {
		if c.Side == SideProvider && !c.Varies && !slices.Contains(points, c.Point) {
			points = append(points, c.Point)
		}
	}
	return points
}

// random returns the generator of the sweep's choices.
func (e *env) random() *rand.Rand {
	seed := e.h.Sweep.Seed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	if e.h.Sweep.Sample > 0 {
		e.Logf("the sample's seed is %d", seed)
	}
	return rand.New(rand.NewPCG(seed, 0))
}

// sample chooses as many as the sweep wants, and keeps their order.
func sample[T any](all []T, s Sweep, r *rand.Rand) []T {
	if s.Sample == 0 || s.Sample >= len(all) {
		return all
	}
	chosen := r.Perm(len(all))[:s.Sample]
	slices.Sort(chosen)
	out := make([]T, len(chosen))
	for i, n := range chosen {
		out[i] = all[n]
	}
	return out
}
