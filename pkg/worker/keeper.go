package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// phase is where a keeper begins.
type phase int

const (
	phaseProvision phase = iota // make the instance
	phaseWatch                  // it is ready: wait for its end
	phaseEnd                    // the grant is closed: tear down, write the log
	phaseUndo                   // an abandoned attempt: tear down, leave the grant open
)

// heartbeatInterval keeps watches alive through proxies; the contract promises
// 30 s.
const heartbeatInterval = 15 * time.Second

// Back-off between tries of what must succeed some day.
const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 15 * time.Second
)

// errLeaving says that the keeper ends without a final log.
var errLeaving = errors.New("keeper is leaving")

// keeper is the life of one grant in this process. Its goroutine makes every
// driver call for the grant, so that none runs at the same time as another.
type keeper struct {
	runtime *Runtime
	claim   ledger.Claim
	id      backend.GrantID
	begin   phase
	// done is closed when the keeper has left, after it is off the runtime's
	// list.
	done chan struct{}
	// ending is closed when the grant is to end; endReason says why.
	ending chan struct{}

	mu        sync.Mutex // protects the fields below
	state     snapshot
	changed   chan struct{} // closed and replaced at each change of state
	callers   int           // of Provision that wait
	abandon   context.CancelFunc
	abandoned bool
	endReason backend.EndReason
	failure   error // of Provision
	other     error // why the grant is left to another replica
	quit      context.CancelFunc
}

// snapshot is a grant at one moment.
type snapshot struct {
	at       time.Time
	instance backend.Instance
	ready    *backend.Provisioned
	usage    *backend.SignedLog
	final    *backend.SignedLog
	left     bool // the keeper does nothing more
}

func newKeeper(r *Runtime, claim ledger.Claim, ready *backend.Provisioned, p phase, reason backend.EndReason) *keeper {
	// The ledger keeps microseconds; the record has what was granted.
	if grant, _, err := claimContent(claim); err == nil {
		claim.ValidTo = grant.ValidTo
	}
	k := &keeper{
		runtime: r, claim: claim, id: backend.GrantID(claim.RequestID), begin: p,
		done: make(chan struct{}), ending: make(chan struct{}), changed: make(chan struct{}),
	}
	k.state = snapshot{at: time.Now(), instance: r.instanceOf(claim), ready: ready}
	if ready != nil {
		k.state.instance = ready.Instance
	}
	if p == phaseProvision {
		// Its maker, who would be late for an attempt that fails at once.
		k.callers = 1
	}
	if reason != 0 {
		k.end(reason)
	}
	return k
}

// end tells the keeper to end the grant. The first reason stays.
func (k *keeper) end(reason backend.EndReason) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.endReason != 0 {
		return
	}
	k.endReason = reason
	close(k.ending)
	if k.abandon != nil {
		k.abandon()
	}
}

// update changes the state and tells everybody.
func (k *keeper) update(change func(*snapshot)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(&k.state)
	k.state.at = time.Now()
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *keeper) snapshot() snapshot {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state
}

func (k *keeper) observe() (snapshot, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state, k.changed
}

func (k *keeper) usageSoFar() *backend.SignedLog { return k.snapshot().usage }

// wait waits until the keeper has left.
func (k *keeper) wait(ctx context.Context) error {
	select {
	case <-k.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join waits as a caller of Provision, who may have been counted in already,
// for the ready instance. errLeaving means that the caller came too late for
// this keeper's attempt and that the keeper has left: the next keeper makes the
// next attempt.
func (k *keeper) join(ctx context.Context, joined bool) (backend.Provisioned, error) {
	k.mu.Lock()
	late := !joined && (k.abandoned || k.failure != nil || k.begin == phaseUndo)
	if !late && !joined {
		k.callers++
	}
	k.mu.Unlock()
	if !late {
		defer func() { k.leave(ctx.Err() != nil) }()
	}
	for {
		s, changed := k.observe()
		k.mu.Lock()
		failure, closing := k.failure, k.endReason != 0
		k.mu.Unlock()
		switch {
		case closing:
			return backend.Provisioned{}, ended(k.id)
		case s.ready != nil:
			return *s.ready, nil
		case failure != nil && !late:
			return backend.Provisioned{}, failure
		case s.left:
			return backend.Provisioned{}, errLeaving
		}
		select {
		case <-changed:
		case <-k.ending:
		case <-ctx.Done():
			return backend.Provisioned{}, callerGone(ctx.Err())
		}
	}
}

// leave counts a caller of Provision out. If it is the last one and has gone
// before there was an answer, the attempt is undone.
func (k *keeper) leave(gone bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.callers--
	if !gone || k.callers > 0 || k.state.ready != nil || k.begin != phaseProvision {
		return
	}
	k.abandoned = true
	if k.abandon != nil {
		k.abandon()
	}
}

// watch reports the grant's events until the final compute log, errLeaving if
// the keeper leaves without one.
func (k *keeper) watch(ctx context.Context, emit func(backend.Event) error) error {
	heartbeat := time.NewTicker(heartbeatInterval)
	defer heartbeat.Stop()
	var last snapshot
	for {
		s, changed := k.observe()
		if s.instance.State != last.instance.State || s.instance.Progress != last.instance.Progress {
			instance := s.instance
			if err := emit(backend.Event{At: s.at, Instance: &instance}); err != nil {
				return err
			}
		}
		if s.usage != nil && s.usage != last.usage {
			if err := emit(backend.Event{At: s.at, Usage: s.usage}); err != nil {
				return err
			}
		}
		if s.final != nil {
			return emit(backend.Event{At: s.at, Log: s.final})
		}
		if s.left {
			return errLeaving
		}
		last = s
		select {
		case <-changed:
		case <-heartbeat.C:
			if err := emit(backend.Event{At: time.Now(), Heartbeat: true}); err != nil {
				return err
			}
		case <-ctx.Done():
			return callerGone(ctx.Err())
		}
	}
}

// run is the keeper's goroutine. ctx is the life of the process.
func (k *keeper) run(ctx context.Context) {
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	k.mu.Lock()
	k.quit = quit
	k.mu.Unlock()
	defer k.update(func(s *snapshot) { s.left = true })
	k.runtime.metrics.live(1)
	defer k.runtime.metrics.live(-1)

	var exit backend.Exit
	switch k.begin {
	case phaseUndo:
		k.undo(ctx)
		return
	case phaseProvision:
		if !k.provision(ctx) {
			return
		}
		exit = k.watchInstance(ctx)
	case phaseWatch:
		exit = k.watchInstance(ctx)
	case phaseEnd:
	}
	if ctx.Err() != nil || k.gaveWay() != nil {
		return
	}
	k.finish(ctx, exit)
}

// provision makes the instance. It returns true if there is something to go on
// with: a ready instance, or a grant that must be ended.
func (k *keeper) provision(process context.Context) bool {
	ctx, cancel := context.WithDeadline(process, k.claim.ValidTo)
	defer cancel()
	k.mu.Lock()
	k.abandon = cancel
	closing, abandoned := k.endReason != 0, k.abandoned
	k.mu.Unlock()
	if closing {
		return true
	}
	if abandoned {
		k.fail(backenderr.New(backenderr.Cancelled, "every caller has gone"))
		return false
	}
	k.update(func(s *snapshot) { s.instance.State = backend.StateProvisioning })
	log := k.runtime.log.With("grant_id", k.id.String())
	log.InfoContext(ctx, "Provisioning")

	ready, made, err := k.make(ctx)
	if err == nil && k.give(ready) {
		log.InfoContext(process, "Provisioned instance", "instance_id", string(ready.Instance.ID), "region", string(ready.Instance.Region),
			"attempt", ready.Instance.Attempt)
		return true
	}
	if process.Err() != nil {
		// The process stops; the next one settles what is left.
		k.fail(stopping())
		return false
	}
	if err == nil {
		err = backenderr.New(backenderr.Cancelled, "every caller has gone")
	}
	if k.isEnding() {
		return true
	}
	if !time.Now().Before(k.claim.ValidTo) {
		k.end(backend.EndDeadline)
		return true
	}
	if made != nil {
		// There is an instance that nobody was told of.
		err = k.takeBack(process, *made, err)
	}
	classified := backenderr.From(err)
	log.WarnContext(process, "Provision failed", "reason", string(classified.Reason), "created", string(backenderr.CreatedOf(err)), "error", err.Error())
	k.update(func(s *snapshot) {
		s.instance.State, s.instance.EndReason = backend.StateFailed, backend.EndProvisionFailed
	})
	k.fail(err)
	return false
}

// give makes the instance the answer to whoever waits, unless all have gone.
func (k *keeper) give(ready *backend.Provisioned) bool {
	k.mu.Lock()
	abandoned := k.abandoned
	if !abandoned {
		k.state.ready, k.state.instance = ready, ready.Instance
	}
	k.mu.Unlock()
	if !abandoned {
		k.update(func(*snapshot) {})
	}
	return !abandoned
}

// takeBack undoes an attempt that the driver had finished, and says in the
// error whether that is confirmed.
func (k *keeper) takeBack(process context.Context, made Attempt, cause error) error {
	failure := backenderr.From(cause).Clone()
	err := k.runtime.endMade(process, made)
	if err == nil {
		_, err = k.runtime.driver.Terminate(process, k.id)
	}
	if err != nil {
		k.runtime.log.WarnContext(process, "Undoing an attempt failed", "grant_id", k.id.String(), "error", err.Error())
		return failure.WithCreated(backenderr.CreatedUnknown) // settle tries again
	}
	return failure.WithCreated(backenderr.CreatedNone)
}

func (k *keeper) isEnding() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.endReason != 0
}

func (k *keeper) fail(err error) {
	k.mu.Lock()
	k.failure = err
	k.mu.Unlock()
	k.update(func(*snapshot) {})
}

// make has the driver make the instance and stores the answer. made is its
// attempt if there is an instance, also with an error.
func (k *keeper) make(ctx context.Context) (ready *backend.Provisioned, made *Attempt, err error) {
	r := k.runtime
	grant, envelope, err := claimContent(k.claim)
	if err != nil {
		return nil, nil, err
	}
	// The attempt begins, if one does, under the fence of the call.
	result, err := r.driver.Provision(backend.WithFence(ctx, k.claim.Fence), Order{
		Grant:        grant,
		ImagePointer: envelope.ImagePointer,
		LoginKey:     k.claim.LoginPublicKey,
		Nonce:        envelope.Nonce,
		Progress: func(text string) {
			k.update(func(s *snapshot) { s.instance.Progress = text })
		},
	})
	if err != nil {
		return nil, nil, err
	}
	made = &Attempt{GrantID: k.id, Number: result.Instance.Attempt, ResumedAt: result.ResumedAt}
	instance := result.Instance
	instance.Handle, instance.GrantID, instance.Backend = backend.HandleFor(k.id), k.id, r.config.Backend
	instance.Owner, instance.ValidTo, instance.State = k.claim.Owner, k.claim.ValidTo, backend.StateReady
	receipt, err := r.keys.receipt(k.claim, envelope)
	if err != nil {
		return nil, made, err
	}
	receipt.Host, receipt.Port, receipt.User, receipt.HostKey, receipt.Evidence = result.Host, result.Port, result.User, result.HostKey, result.Evidence
	answer := backend.Provisioned{Instance: instance, Receipt: receipt}
	body, err := proto.Marshal(backendgrpc.ProvisionedToProto(answer))
	if err != nil {
		return nil, made, backenderr.Wrap(backenderr.Internal, err, "marshal instance")
	}

	// Once more before it is given out: a closure that came in the meantime
	// wins.
	if err := r.journal.Check(ctx, k.id); err != nil {
		return nil, made, err
	}
	stored, created, err := r.config.Ledger.PutInstance(ctx, ledger.Instance{RequestID: k.claim.RequestID, Attempt: instance.Attempt, Body: body})
	switch {
	case errors.Is(err, ledger.ErrConflict):
		// Who undid it took this process for dead.
		return nil, made, backenderr.Wrap(backenderr.ProviderUnavailable, err, "attempt %d was undone by another process; call again", instance.Attempt).
			WithRetryAfter(ledgerRetry)
	case err != nil:
		return nil, made, ledgerError(err, "store instance")
	}
	if !created {
		// Another replica was at the attempt, too, and has told of it.
		ready, err := unmarshalReady(stored.Body)
		return ready, made, err
	}
	return &answer, made, nil
}

// watchInstance waits for the end of a ready instance: its own, the deadline,
// a call of Terminate, or the end of the process.
func (k *keeper) watchInstance(process context.Context) backend.Exit {
	if k.isEnding() || k.snapshot().ready == nil {
		return backend.Exit{}
	}
	ctx, cancel := context.WithDeadline(process, k.claim.ValidTo)
	defer cancel()
	go func() {
		select {
		case <-k.ending:
			cancel()
		case <-ctx.Done():
		}
	}()
	backoff := minBackoff
	for {
		exit, err := k.runtime.driver.Watch(ctx, k.id, k.reportUsage)
		switch {
		case process.Err() != nil:
			return backend.Exit{}
		case err == nil:
			k.end(exit.Reason)
			return exit
		case k.isEnding(), k.giveWay(err):
			return backend.Exit{}
		case !time.Now().Before(k.claim.ValidTo):
			k.end(backend.EndDeadline)
			return backend.Exit{}
		case backenderr.Is(err, backenderr.InstanceNotFound):
			k.end(backend.EndVanished)
			return backend.Exit{Reason: backend.EndVanished, Message: "the instance is gone and left no trace"}
		}
		k.runtime.log.WarnContext(process, "Watch failed", "grant_id", k.id.String(), "error", err.Error())
		pause(ctx, &backoff)
	}
}

func (k *keeper) reportUsage(usage backend.Usage) {
	s := k.snapshot()
	log := k.logFrom(s.instance)
	log.Usage = usage
	log.Usage.Allocated(log.Shape, log.StartedAt, time.Now())
	log.Partial = true
	signed, err := k.runtime.keys.signer.sign(log)
	if err != nil {
		return
	}
	k.update(func(s *snapshot) { s.usage = signed })
}

// logFrom returns a compute log with what is known of the instance.
func (k *keeper) logFrom(i backend.Instance) backend.ComputeLog {
	log := backend.ComputeLog{
		GrantID: k.id, Backend: k.runtime.config.Backend, InstanceID: i.ID, Region: i.Region, Attempt: i.Attempt,
		Shape: i.Shape, StartedAt: i.StartedAt, ValidTo: k.claim.ValidTo, Sequence: 1,
	}
	if grant, _, err := claimContent(k.claim); err == nil {
		log.ProviderID = grant.ProviderID
	}
	return log
}

// finish closes the grant, tears everything down until that is confirmed, and
// writes the final compute log. It gives up only with the process.
func (k *keeper) finish(ctx context.Context, exit backend.Exit) {
	k.mu.Lock()
	reason := k.endReason
	k.mu.Unlock()
	if reason == 0 {
		reason = backend.EndVanished
	}
	state := backend.StateTerminating
	switch reason {
	case backend.EndDeadline:
		state = backend.StateExpired
	case backend.EndWorkloadExited, backend.EndOutOfMemory, backend.EndHostRebooted, backend.EndVanished, backend.EndInterrupted:
		state = backend.StateExited
	case backend.EndTerminated, backend.EndCancelled, backend.EndProvisionFailed:
	}
	k.update(func(s *snapshot) { s.instance.State, s.instance.EndReason = state, reason })
	log := k.runtime.log.With("grant_id", k.id.String(), "end_reason", reason.String())
	log.InfoContext(ctx, "Ending grant")

	var closure ledger.Closure
	k.insist(ctx, "close grant", func() (err error) {
		closure, _, err = k.runtime.config.Ledger.CloseGrant(ctx, ledger.Closure{RequestID: k.claim.RequestID, Reason: reason.String(), By: "worker"})
		return ledgerError(err, "close grant")
	})
	var last *backend.ComputeLog
	k.insist(ctx, "tear down", func() (err error) {
		last, err = k.runtime.driver.Terminate(ctx, k.id)
		if k.giveWay(err) {
			return nil
		}
		return err
	})
	if k.gaveWay() != nil {
		return
	}
	var final *backend.SignedLog
	k.insist(ctx, "write compute log", func() (err error) {
		final, err = k.writeFinal(ctx, last, exit, closureReason(closure))
		return err
	})
	if ctx.Err() != nil {
		return
	}
	log.InfoContext(ctx, "Ended grant", "exit_reason", final.Log.Exit.Reason.String())
	k.runtime.metrics.ended(final.Log.Exit.Reason)
	k.update(func(s *snapshot) {
		s.final = final
		s.instance.State, s.instance.EndReason, s.instance.Progress = backend.StateTerminated, final.Log.Exit.Reason, ""
	})
}

// writeFinal signs and stores the final compute log. What the driver read of
// the provider goes before what the keeper believes.
func (k *keeper) writeFinal(ctx context.Context, last *backend.ComputeLog, exit backend.Exit, reason backend.EndReason) (*backend.SignedLog, error) {
	s := k.snapshot()
	ran := s.ready != nil || last != nil
	log := k.logFrom(s.instance)
	if last != nil {
		log.InstanceID, log.Region = cmp.Or(last.InstanceID, log.InstanceID), cmp.Or(last.Region, log.Region)
		log.Attempt, log.Shape = cmp.Or(last.Attempt, log.Attempt), cmp.Or(last.Shape, log.Shape)
		log.StartedAt, log.EndedAt = cmp.Or(last.StartedAt, log.StartedAt), last.EndedAt
		log.Exit, log.Usage, log.Partial = last.Exit, last.Usage, last.Partial
	}
	if log.Exit.Reason == 0 {
		message := log.Exit.Message
		if log.Exit.Code == nil && log.Exit.Signal == "" {
			log.Exit = exit
		}
		log.Exit.Reason = reason
		if log.Exit.Message == "" {
			log.Exit.Message = message
		}
	}
	// How the workload ended may have been there to read for Watch only.
	if log.Exit.Reason == exit.Reason && log.Exit.Code == nil && log.Exit.Signal == "" {
		log.Exit = exit
	}
	if ran && last == nil {
		log.Partial = true
	}
	if log.EndedAt.IsZero() {
		log.EndedAt = time.Now()
	}
	if !log.StartedAt.IsZero() {
		log.Usage.Allocated(log.Shape, log.StartedAt, log.EndedAt)
	}
	log.Final, log.Sequence = true, 2
	signed, err := k.runtime.keys.signer.sign(log)
	if err != nil {
		return nil, err
	}
	body, err := marshalSigned(signed)
	if err != nil {
		return nil, err
	}
	stored, created, err := k.runtime.config.Ledger.PutFinal(ctx, ledger.Log{RequestID: k.claim.RequestID, Sequence: 2, Body: body, KeyID: signed.KeyID})
	if err != nil {
		return nil, ledgerError(err, "write final compute log")
	}
	if created {
		return signed, nil
	}
	return unmarshalSigned(stored.Body)
}

// undo tears down an abandoned attempt; the grant stays open.
func (k *keeper) undo(ctx context.Context) {
	k.update(func(s *snapshot) { s.instance.State = backend.StateTerminating })
	err := k.runtime.endOrphan(ctx, k.id)
	if err == nil {
		_, err = k.runtime.driver.Terminate(ctx, k.id)
	}
	if err != nil {
		if k.giveWay(err) {
			return
		}
		k.runtime.log.WarnContext(ctx, "Undoing an abandoned attempt failed", "grant_id", k.id.String(), "error", err.Error())
		return // the next sweep tries again
	}
	k.runtime.log.InfoContext(ctx, "Undid an abandoned attempt", "grant_id", k.id.String())
	// Somebody asked for the end meanwhile: the grant is closed and needs its
	// log.
	if k.isEnding() {
		k.finish(ctx, backend.Exit{})
	}
}

// insist repeats what must succeed, with back-off, until it does or the process
// stops.
func (k *keeper) insist(ctx context.Context, what string, do func() error) {
	backoff := minBackoff
	for ctx.Err() == nil {
		err := do()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			return
		}
		k.runtime.metrics.retried(what)
		k.runtime.log.WarnContext(ctx, "Will try again", "what", what, "grant_id", k.id.String(), "error", err.Error())
		k.update(func(s *snapshot) { s.instance.Progress = fmt.Sprintf("%s: %v", what, err) })
		pause(ctx, &backoff)
	}
}

// pause waits for the back-off's time or the end of ctx, and doubles it.
func pause(ctx context.Context, backoff *time.Duration) {
	timer := time.NewTimer(*backoff)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	*backoff = min(2**backoff, maxBackoff)
}
