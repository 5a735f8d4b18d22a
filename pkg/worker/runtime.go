// Package worker is the runtime of a worker process: everything that is the
// same for every kind of place, done once. [Main] is a worker's main function;
// [Runtime] makes a backend.Backend of a [Driver].
//
// One goroutine per live grant, its keeper, does everything that touches the
// grant's instance, one after the other: provision, watch, tear down, write
// the final compute log. Callers attach to it and leave it. Truth is with the
// provider and in the ledger: a runtime that starts takes up every grant that
// has no final log, wherever an earlier process left it.
package worker

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// RuntimeConfig is what a runtime needs beside its driver.
type RuntimeConfig struct {
	// BridgeID and Backend are names, [a-z][a-z0-9-]*.
	BridgeID string
	Backend  string
	// Ledger is kept by the caller, who closes it after the runtime.
	Ledger Ledger
	// Secret is the worker secret, from which host keys and the key that signs
	// compute logs are derived. Replicas share it.
	Secret redact.Secret
	// MaxDuration is the longest time until a grant's deadline. Default 31 days.
	MaxDuration time.Duration
	// AllowPlaintextReceipts gives a grant with neither SSH key nor x25519 key
	// an unprotected private key. For development.
	AllowPlaintextReceipts bool
	// SweepInterval is how often the provider is searched for what should not
	// exist. Default 30 s.
	SweepInterval time.Duration
	// OrphanAge is how old an unfinished attempt that nobody works on must be
	// before it is undone: as long as a caller's retry may take. Default 2 min.
	OrphanAge time.Duration
	// Grace is how long after its deadline an instance may be seen before sweep
	// ends it. Default 60 s.
	Grace time.Duration
	// Janitor says that the runtime is only for [Runtime.SweepOnce].
	Janitor bool
	// DryRun says that it changes nothing.
	DryRun  bool
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

func (c *RuntimeConfig) setDefaults() {
	setDefault(&c.MaxDuration, 31*24*time.Hour)
	setDefault(&c.SweepInterval, 30*time.Second)
	setDefault(&c.OrphanAge, 2*time.Minute)
	setDefault(&c.Grace, time.Minute)
}

func setDefault(d *time.Duration, value time.Duration) {
	if *d == 0 {
		*d = value
	}
}

// Runtime serves a driver as a backend.Backend. Build it with [NewRuntime],
// open the driver with its [Runtime.Env], then [Runtime.Start] it.
type Runtime struct {
	config  RuntimeConfig
	keys    *keys
	journal *journal
	metrics *metrics
	log     *slog.Logger
	process string // names this process in the ledger

	driver Driver
	// live is the life of the process; keepers run under it.
	live     context.Context //nolint:containedctx // the process's, not a call's
	stop     context.CancelFunc
	routines sync.WaitGroup
	draining atomic.Bool

	// wake has an item when settle is due at once.
	wake chan struct{}

	mu      sync.Mutex // protects keepers
	keepers map[backend.GrantID]*keeper

	sweeping sync.Mutex // one sweep at a time; protects sighted
	sighted  map[sighting]bool
}

var _ backend.Backend = (*Runtime)(nil)

// NewRuntime returns a runtime without a driver.
func NewRuntime(c RuntimeConfig) (*Runtime, error) {
	c.setDefaults()
	for _, n := range []struct{ what, name string }{{"bridge id", c.BridgeID}, {"backend name", c.Backend}} {
		if !backend.ValidName(n.name) {
			return nil, fmt.Errorf("%s %q: want [a-z][a-z0-9-]*, at most 32 bytes", n.what, n.name)
		}
	}
	k, err := newKeys(c.Secret)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	return &Runtime{
		config:  c,
		keys:    k,
		journal: &journal{ledger: c.Ledger, signer: k.signer, now: time.Now},
		metrics: m,
		log:     c.Log,
		process: rand.Text(),
		wake:    make(chan struct{}, 1),
		keepers: map[backend.GrantID]*keeper{},
		sighted: map[sighting]bool{},
	}, nil
}

// Env returns what the driver is opened with.
func (r *Runtime) Env() Env {
	return Env{
		BridgeID: r.config.BridgeID,
		Backend:  r.config.Backend,
		Log:      r.config.Log,
		Journal:  r.journal,
		HostKey:  r.keys.hostKey,
		Metrics:  r.config.Metrics,
		Janitor:  r.config.Janitor,
		DryRun:   r.config.DryRun,
		TookOver: r.wakeUp,
	}
}

// Start takes up what earlier processes left: it watches every ready instance,
// goes on ending what was being ended, and starts the sweep. It fails only if
// the ledger can't be read. Close stops it all.
func (r *Runtime) Start(ctx context.Context, driver Driver) error {
	r.attach(ctx, driver)
	if err := r.config.Ledger.Beat(ctx, r.config.Backend, r.process); err != nil {
		r.stop()
		return ledgerError(err, "record that this process works")
	}
	for claim, err := range r.config.Ledger.LiveClaims(ctx, r.config.Backend) {
		if err != nil {
			r.stop()
			return ledgerError(err, "read live grants")
		}
		if err := r.takeUp(ctx, claim); err != nil && !backenderr.Is(err, backenderr.OtherReplica) {
			r.stop()
			return err
		}
	}
	r.routines.Go(r.sweepForEver)
	r.routines.Go(r.beatForEver)
	if r.hasReplicas() {
		r.routines.Go(r.followOthers)
	}
	return nil
}

// attach gives the runtime its driver and its life.
func (r *Runtime) attach(ctx context.Context, driver Driver) {
	r.driver = guard(driver, r.log)
	r.live, r.stop = context.WithCancel(context.WithoutCancel(ctx))
}

// minBeat bounds how often a process says that it works.
const minBeat = 250 * time.Millisecond

// leaveLimit is how long saying that it works no more may take.
const leaveLimit = time.Second

// beatInterval is how often a process says that it works: several times within
// the age from which on an unfinished attempt may be an orphan.
func (r *Runtime) beatInterval() time.Duration { return max(r.config.OrphanAge/4, minBeat) }

// beatForEver records for a sweep that runs by itself ([Runtime.SweepOnce]), and
// for other replicas, that this process works, and with it on every attempt that
// it has begun.
func (r *Runtime) beatForEver() {
	ticker := time.NewTicker(r.beatInterval())
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if err := r.config.Ledger.Beat(r.live, r.config.Backend, r.process); err != nil && r.live.Err() == nil {
				r.log.WarnContext(r.live, "Recording that this process works failed", "error", err.Error())
			}
		case <-r.live.Done():
			r.leave()
			return
		}
	}
}

// leave records that this process works no more, with a limit: a ledger that
// hangs must not keep it. Without this farewell it counts as working for one
// orphan age more.
func (r *Runtime) leave() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.live), leaveLimit)
	defer cancel()
	if err := r.config.Ledger.Leave(ctx, r.config.Backend, r.process); err != nil {
		r.log.InfoContext(ctx, "Recording that this process works no more failed", "error", err.Error())
	}
}

// Close stops every goroutine of the runtime and waits for them. Instances keep
// running; the next process takes them up. A Provision under way fails, and its
// driver undoes it, which may take as long as a driver's clean-up may.
func (r *Runtime) Close() {
	r.mu.Lock()
	r.stop() // under mu: no keeper starts after this
	r.mu.Unlock()
	r.routines.Wait()
}

// takeUp starts the keeper of a grant that an earlier process left without a
// final log, if there is something to keep. OTHER_REPLICA says that there is none
// here.
func (r *Runtime) takeUp(ctx context.Context, claim ledger.Claim) error {
	id := backend.GrantID(claim.RequestID)
	if r.keeper(id) != nil {
		return nil
	}
	if err := r.elsewhere(ctx, id); err != nil {
		return err
	}
	// Read again: a keeper may have ended the grant since.
	claim, err := r.config.Ledger.Claim(ctx, claim.RequestID)
	if err != nil {
		return ledgerError(err, "read claim")
	}
	if !claim.EndedAt.IsZero() {
		return nil
	}
	closure, err := r.config.Ledger.Closure(ctx, claim.RequestID)
	if err == nil {
		r.keep(claim, nil, phaseEnd, closureReason(closure))
		return nil
	}
	if !errors.Is(err, ledger.ErrNotFound) {
		return ledgerError(err, "read closure")
	}
	ready, err := r.readyInstance(ctx, id)
	switch {
	case err != nil:
		return err
	case ready != nil:
		switch answers, err := r.answersFor(ctx, ready.Instance); {
		case backenderr.Is(err, backenderr.GrantEnded):
			return r.takeUp(ctx, claim) // It was closed since.
		case err != nil:
			return err
		case answers:
			r.keep(claim, ready, phaseWatch, 0)
		}
	case time.Now().After(claim.ValidTo):
		r.keep(claim, nil, phaseEnd, backend.EndDeadline)
	}
	return nil
}

// readyInstance returns the stored answer to a successful Provision, nil if the
// grant's last attempt has none: an instance whose attempt is gone, or is being
// taken back, is no longer an answer.
func (r *Runtime) readyInstance(ctx context.Context, id backend.GrantID) (*backend.Provisioned, error) {
	stored, err := r.config.Ledger.Instance(ctx, ledger.RequestID(id))
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return nil, nil //nolint:nilnil // none is an answer
	case err != nil:
		return nil, ledgerError(err, "read instance")
	}
	attempts, err := r.journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, a := range attempts {
		if a.Number == stored.Attempt && (a.Gone || a.Ending) {
			return nil, nil //nolint:nilnil // none is an answer
		}
	}
	return unmarshalReady(stored.Body)
}

func unmarshalReady(body []byte) (*backend.Provisioned, error) {
	var p bridgev1.ProvisionResponse
	if err := proto.Unmarshal(body, &p); err != nil {
		return nil, backenderr.Wrap(backenderr.LedgerUnavailable, err, "instance in the ledger is damaged")
	}
	ready := backendgrpc.ProvisionedFromProto(&p)
	return &ready, nil
}

// Name implements backend.Backend.
func (r *Runtime) Name(context.Context) (string, error) { return r.config.Backend, nil }

// Capabilities implements backend.Backend.
func (r *Runtime) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	c, err := r.driver.Capabilities(ctx)
	if err != nil {
		return backend.Capabilities{}, err
	}
	c.Backend = r.config.Backend
	c.Draining = r.draining.Load()
	c.LogKeys = []backend.LogKey{r.keys.signer.logKey()}
	return c, nil
}

// SetDraining stops or resumes taking new grants.
func (r *Runtime) SetDraining(draining bool) {
	if r.draining.Swap(draining) != draining {
		r.log.Info("Set draining", "draining", draining)
	}
}

// CanSatisfy implements backend.Backend.
func (r *Runtime) CanSatisfy(ctx context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	if err := backend.ValidateGrant(grant, time.Now(), r.config.MaxDuration); err != nil {
		return backend.Satisfaction{}, err
	}
	if r.keeper(grant.ID) != nil {
		return backend.Satisfaction{Satisfiable: true}, nil
	}
	return r.driver.CanSatisfy(ctx, grant)
}

// Provision implements backend.Backend.
func (r *Runtime) Provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope) (backend.Provisioned, error) {
	began := time.Now()
	p, err := r.provision(ctx, grant, envelope)
	if err != nil {
		err = r.refusal(ctx, grant.ID, err)
	}
	r.metrics.provisioned(backenderr.ReasonOf(err), time.Since(began))
	return p, err
}

// refusal makes the answer of a Provision that failed. If a router called, and
// nothing exists, it records first that all its calls up to this one are
// refused: it may now give the grant to another backend, and a call that is
// still on its way, from whatever router, must not make a second instance here.
func (r *Runtime) refusal(ctx context.Context, id backend.GrantID, failure error) error {
	fence := backend.FenceFrom(ctx)
	if fence == 0 {
		return failure
	}
	e := backenderr.From(failure)
	if late, ok := errors.AsType[ledger.FencedError](failure); ok {
		e = backend.WithRefusedFence(backenderr.New(backenderr.OperationInProgress, "the call came late: %v", late), late.Refused).
			WithCreated(backenderr.CreatedNone)
	}
	if backenderr.CreatedOf(e) != backenderr.CreatedNone {
		return e
	}
	refused, err := r.config.Ledger.RefuseAttempts(ctx, ledger.RequestID(id), fence)
	if err != nil {
		if !errors.Is(err, ledger.ErrConflict) {
			r.log.WarnContext(ctx, "Could not record a refusal", "grant_id", id.String(), "error", err.Error())
		}
		return e.Clone().WithCreated(backenderr.CreatedUnknown)
	}
	return backend.WithRefusedFence(e.Clone(), refused)
}

func (r *Runtime) provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope) (backend.Provisioned, error) {
	caller, fence := backend.CallerFrom(ctx), backend.FenceFrom(ctx)
	grant = grant.WithRegionHint(envelope.RegionHint)
	// The transactions that claim the grant and begin an attempt check it again;
	// here it spares the provider the questions.
	if fence != 0 {
		refused, err := r.config.Ledger.Refused(ctx, ledger.RequestID(grant.ID))
		if err == nil && fence <= refused {
			err = ledger.FencedError{Refused: refused}
		}
		if err != nil {
			return backend.Provisioned{}, ledgerError(err, "check fence")
		}
	}
	claim, err := r.claimed(ctx, caller, grant, envelope)
	if err != nil {
		return backend.Provisioned{}, err
	}
	claim.Fence = fence
	for {
		k, joined, err := r.provisioner(ctx, claim)
		if err != nil {
			return backend.Provisioned{}, err
		}
		p, err := k.join(ctx, joined)
		if errors.Is(err, errLeaving) {
			// It is being undone because its callers had gone; this one comes
			// after them.
			if err := k.wait(ctx); err != nil {
				return backend.Provisioned{}, callerGone(err)
			}
			continue
		}
		var late ledger.FencedError
		if errors.As(err, &late) && (fence == 0 || fence > late.Refused) {
			continue // It was late for the caller that it joined, not for this one.
		}
		if err != nil {
			return backend.Provisioned{}, err
		}
		return r.answer(caller, p), nil
	}
}

// claimed returns the grant's claim, made now if there is none, after all
// checks that need no provider.
func (r *Runtime) claimed(ctx context.Context, caller backend.Caller, grant backend.Grant, envelope backend.Envelope) (ledger.Claim, error) {
	record, err := proto.MarshalOptions{Deterministic: true}.Marshal(&bridgev1.ProvisionRequest{
		Grant: backendgrpc.GrantToProto(grant), Envelope: backendgrpc.EnvelopeToProto(envelope),
	})
	if err != nil {
		return ledger.Claim{}, backenderr.Wrap(backenderr.Internal, err, "marshal grant").WithCreated(backenderr.CreatedNone)
	}
	stored, err := r.config.Ledger.Claim(ctx, ledger.RequestID(grant.ID))
	if err == nil {
		return stored, sameGrant(stored, caller, record)
	}
	if !errors.Is(err, ledger.ErrNotFound) {
		// What exists is unknown: an earlier call may have made the instance.
		return ledger.Claim{}, ledgerError(err, "read claim")
	}

	if err := backend.Validate(grant, envelope, time.Now(), r.config.MaxDuration); err != nil {
		return ledger.Claim{}, err
	}
	if err := r.journal.Check(ctx, grant.ID); err != nil {
		return ledger.Claim{}, r.unclaimed(ctx, grant.ID, err)
	}
	if r.draining.Load() {
		return ledger.Claim{}, r.unclaimed(ctx, grant.ID,
			backenderr.New(backenderr.WorkerFull, "this worker drains and takes no new grants").WithRetryAfter(time.Minute))
	}
	answer, err := r.driver.CanSatisfy(ctx, grant)
	if err != nil {
		return ledger.Claim{}, r.unclaimed(ctx, grant.ID, err)
	}
	if !answer.Satisfiable {
		return ledger.Claim{}, backenderr.New(backenderr.GrantNotSatisfiable, "%s", answer.Reason).WithCreated(backenderr.CreatedNone)
	}
	login, err := r.keys.login(grant.ID, envelope, r.config.AllowPlaintextReceipts)
	if err != nil {
		return ledger.Claim{}, err
	}
	stored, created, err := r.config.Ledger.PutClaim(ctx, ledger.Claim{
		RequestID:      ledger.RequestID(grant.ID),
		Backend:        r.config.Backend,
		ContentHash:    sha256.Sum256(record),
		Owner:          caller.Identity,
		ValidTo:        grant.ValidTo,
		Record:         record,
		SealedKey:      login.sealed,
		LoginPublicKey: login.public,
		Fence:          backend.FenceFrom(ctx),
	})
	if err != nil {
		return ledger.Claim{}, ledgerError(err, "claim grant")
	}
	if !created {
		return stored, sameGrant(stored, caller, record)
	}
	return stored, nil
}

// sameGrant checks a repeated Provision against the claim: same content, same
// client.
func sameGrant(stored ledger.Claim, caller backend.Caller, record []byte) error {
	var before, now bridgev1.ProvisionRequest
	if err := errors.Join(proto.Unmarshal(stored.Record, &before), proto.Unmarshal(record, &now)); err != nil {
		return backenderr.Wrap(backenderr.LedgerUnavailable, err, "claim in the ledger is damaged").WithCreated(backenderr.CreatedNone)
	}
	id := backend.GrantID(stored.RequestID)
	// Not an equal hash but an equal message: another version of the protobuf
	// library may write the same content in another order.
	if !proto.Equal(&before, &now) {
		return backenderr.New(backenderr.GrantConflict, "grant %s was provisioned with other content", id).WithCreated(backenderr.CreatedNone)
	}
	if !caller.Owns(stored.Owner) {
		return backenderr.New(backenderr.GrantConflict, "grant %s belongs to another client", id).WithCreated(backenderr.CreatedNone)
	}
	if !stored.EndedAt.IsZero() {
		return ended(id).WithCreated(backenderr.CreatedNone)
	}
	return nil
}

// unclaimed says of an error of a call that found no claim that nothing exists,
// unless another call for the grant has made one since.
func (r *Runtime) unclaimed(ctx context.Context, id backend.GrantID, err error) error {
	refused := backenderr.From(err).Clone().WithCreated(backenderr.CreatedUnknown)
	if _, err := r.config.Ledger.Claim(ctx, ledger.RequestID(id)); errors.Is(err, ledger.ErrNotFound) {
		refused.Created = backenderr.CreatedNone
	}
	return refused
}

// provisioner returns the keeper of the grant: the one that runs, or a new one
// that provisions, which its maker has joined, or, if the grant is ready,
// watches.
func (r *Runtime) provisioner(ctx context.Context, claim ledger.Claim) (k *keeper, joined bool, err error) {
	id := backend.GrantID(claim.RequestID)
	if k := r.keeper(id); k != nil {
		return k, false, nil
	}
	if r.live.Err() != nil {
		return nil, false, stopping()
	}
	if err := r.journal.Check(ctx, id); err != nil {
		return nil, false, err
	}
	ready, err := r.readyInstance(ctx, id)
	if err != nil {
		return nil, false, err
	}
	if ready != nil {
		// Also where another replica has it: the answer is in the ledger.
		answers, err := r.answersFor(ctx, ready.Instance)
		if err != nil {
			return nil, false, err
		}
		if answers {
			return r.keep(claim, ready, phaseWatch, 0), false, nil
		}
	}
	if err := r.elsewhere(ctx, id); err != nil {
		return nil, false, err
	}
	k, joined = r.keepOrFind(claim, nil, phaseProvision, 0)
	return k, joined, nil
}

// keeper returns the grant's keeper, nil if none runs.
func (r *Runtime) keeper(id backend.GrantID) *keeper {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keepers[id]
}

// keep returns the grant's keeper, a new one in the given phase if none runs.
// Once the runtime stops, a new one has left already.
func (r *Runtime) keep(claim ledger.Claim, ready *backend.Provisioned, p phase, reason backend.EndReason) *keeper {
	k, _ := r.keepOrFind(claim, ready, p, reason)
	return k
}

// keepOrFind is keep, and says whether the keeper is new.
func (r *Runtime) keepOrFind(claim ledger.Claim, ready *backend.Provisioned, p phase, reason backend.EndReason) (k *keeper, made bool) {
	id := backend.GrantID(claim.RequestID)
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.keepers[id]; k != nil {
		return k, false
	}
	k = newKeeper(r, claim, ready, p, reason)
	if r.live.Err() != nil {
		k.failure, k.state.left = stopping(), true
		close(k.done)
		return k, true
	}
	r.keepers[id] = k
	r.routines.Go(func() {
		k.run(r.live)
		r.mu.Lock()
		delete(r.keepers, id)
		r.mu.Unlock()
		close(k.done)
	})
	return k, true
}

// WatchUntilExit implements backend.Backend.
func (r *Runtime) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	claim, err := r.ownedClaim(ctx, handle)
	if err != nil {
		return err
	}
	if claim == nil {
		return notFound(handle)
	}
	id := backend.GrantID(claim.RequestID)
	var other error // why there is no keeper here
	for {
		k := r.keeper(id)
		if k == nil {
			other = r.takeUp(ctx, *claim)
			if other != nil && !backenderr.Is(other, backenderr.OtherReplica) {
				return other
			}
			if k = r.keeper(id); k == nil {
				break
			}
		}
		err := k.watch(ctx, func(e backend.Event) error { return emit(shown(backend.CallerFrom(ctx), e)) })
		if !errors.Is(err, errLeaving) {
			return err
		}
		// The keeper left without a final log: a failed attempt, whose grant may
		// have been closed meanwhile, or the process stops.
		if err := k.wait(ctx); err != nil {
			return callerGone(err)
		}
		if other = k.gaveWay(); other != nil || r.live.Err() != nil {
			break
		}
	}
	err = r.watchEnded(ctx, *claim, emit)
	if other != nil && backenderr.Is(err, backenderr.InstanceNotFound) {
		return other // It was the other's a moment ago.
	}
	return err
}

// watchEnded reports a grant that no keeper has.
func (r *Runtime) watchEnded(ctx context.Context, claim ledger.Claim, emit func(backend.Event) error) error {
	id := backend.GrantID(claim.RequestID)
	log, err := readLog(ctx, r.config.Ledger, id)
	if err != nil {
		return err
	}
	if log == nil || !log.Log.Final {
		if r.live.Err() != nil {
			return stopping()
		}
		if err := r.elsewhere(ctx, id); err != nil {
			return err
		}
		return backenderr.New(backenderr.InstanceNotFound, "grant %s has no instance at the moment", id)
	}
	instance := r.instanceOf(claim)
	instance.State, instance.EndReason = backend.StateTerminated, log.Log.Exit.Reason
	instance.ID, instance.Attempt, instance.StartedAt = log.Log.InstanceID, log.Log.Attempt, log.Log.StartedAt
	if err := emit(shown(backend.CallerFrom(ctx), backend.Event{At: log.Log.EndedAt, Instance: &instance})); err != nil {
		return err
	}
	return emit(backend.Event{At: log.Log.EndedAt, Log: log})
}

// ownedClaim returns the claim that a handle names if the caller may touch it,
// nil if there is none.
func (r *Runtime) ownedClaim(ctx context.Context, handle backend.Handle) (*ledger.Claim, error) {
	id, err := workerHandle(handle)
	if err != nil {
		return nil, err
	}
	claim, err := r.config.Ledger.Claim(ctx, ledger.RequestID(id))
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return nil, nil //nolint:nilnil // none is an answer
	case err != nil:
		return nil, ledgerError(err, "read claim")
	}
	if caller := backend.CallerFrom(ctx); !caller.Owns(claim.Owner) {
		return nil, backenderr.New(backenderr.CallerDenied, "grant %s belongs to another client than %q", id, caller.Identity).
			WithCreated(backenderr.CreatedNone)
	}
	return &claim, nil
}

func workerHandle(handle backend.Handle) (backend.GrantID, error) {
	if _, _, routed := handle.Split(); routed {
		return backend.GrantID{}, backenderr.Invalid(backenderr.RequestInvalid,
			backenderr.Violation{Field: "handle", Description: fmt.Sprintf("%q is a router's; a worker's handle has no path", handle)})
	}
	id, err := handle.GrantID()
	if err != nil {
		return backend.GrantID{}, backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{Field: "handle", Description: err.Error()})
	}
	return id, nil
}

func notFound(handle backend.Handle) error {
	return backenderr.New(backenderr.InstanceNotFound, "no grant with handle %s", handle).WithCreated(backenderr.CreatedNone)
}

// answerMargin is how long before its caller's deadline Terminate answers that
// it is still at work, so that the answer arrives.
const answerMargin = 500 * time.Millisecond

// Terminate implements backend.Backend.
func (r *Runtime) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	id, err := workerHandle(handle)
	if err != nil {
		return backend.Termination{}, err
	}
	claim, err := r.ownedClaim(ctx, handle)
	if err != nil {
		return backend.Termination{}, err
	}
	if claim != nil && !claim.EndedAt.IsZero() {
		return r.terminated(ctx, id)
	}
	closure, _, err := r.config.Ledger.CloseGrant(ctx, ledger.Closure{
		RequestID: ledger.RequestID(id), Reason: backend.EndTerminated.String(), By: backend.CallerFrom(ctx).Identity,
	})
	if err != nil {
		return backend.Termination{}, ledgerError(err, "close grant")
	}
	whole := ctx
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-answerMargin))
		defer cancel()
	}
	// A Provision may have claimed the grant before the closure was written. It
	// has a keeper then, which must end before anything is torn down.
	if claim == nil {
		if claim, err = r.ownedClaim(ctx, handle); err != nil {
			return backend.Termination{}, err
		}
	}
	if claim == nil {
		// Never seen: there is nothing to log, but the provider must say so.
		if _, err := r.driver.Terminate(ctx, id); err != nil {
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return backend.Termination{State: backend.StateTerminating}, nil
			}
			return backend.Termination{}, err
		}
		return backend.Termination{State: backend.StateTerminated}, nil
	}
	for {
		// The grant is closed; the replica that can act learns of it here or from
		// the ledger.
		if err := r.elsewhere(ctx, id); err != nil {
			return backend.Termination{}, err
		}
		k := r.keep(*claim, nil, phaseEnd, closureReason(closure))
		k.end(closureReason(closure))
		if err := k.wait(ctx); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				return backend.Termination{State: backend.StateTerminating, Log: cloneLog(k.usageSoFar())}, nil
			}
			return backend.Termination{}, callerGone(err)
		}
		// The keeper may have been one that was just leaving a failed attempt.
		t, err := r.terminated(whole, id)
		if err != nil || t.State == backend.StateTerminated {
			return t, err
		}
		if err := k.gaveWay(); err != nil {
			return backend.Termination{}, err
		}
	}
}

// terminated answers for a grant whose keeper has finished.
func (r *Runtime) terminated(ctx context.Context, id backend.GrantID) (backend.Termination, error) {
	log, err := readLog(ctx, r.config.Ledger, id)
	if err != nil {
		return backend.Termination{}, err
	}
	if log == nil || !log.Log.Final {
		if r.live.Err() != nil {
			return backend.Termination{}, stopping()
		}
		return backend.Termination{State: backend.StateTerminating, Log: log}, nil
	}
	return backend.Termination{State: backend.StateTerminated, Log: log}, nil
}

// Instances returns the instances that exist or are being made, as far as the
// caller may see them, in no order.
func (r *Runtime) Instances(ctx context.Context) []backend.Instance {
	caller := backend.CallerFrom(ctx)
	r.mu.Lock()
	keepers := make([]*keeper, 0, len(r.keepers))
	for _, k := range r.keepers {
		keepers = append(keepers, k)
	}
	r.mu.Unlock()
	var out []backend.Instance
	for _, k := range keepers {
		i := k.snapshot().instance
		if caller.SeesAll() || caller.Owns(i.Owner) {
			out = append(out, shownInstance(caller, i))
		}
	}
	return r.withOthers(ctx, caller, out)
}

// ComputeLogs returns final compute logs, oldest first, as far as the caller
// may see them.
func (r *Runtime) ComputeLogs(ctx context.Context, since time.Time, limit int) ([]backend.SignedLog, error) {
	caller := backend.CallerFrom(ctx)
	after := ledger.Position{At: since}
	var out []backend.SignedLog
	for len(out) < limit {
		page, err := r.config.Ledger.Finals(ctx, after, limit)
		if err != nil {
			return nil, ledgerError(err, "read compute logs")
		}
		for _, stored := range page {
			after = stored.Position()
			if len(out) == limit {
				break
			}
			if !caller.SeesAll() {
				claim, err := r.config.Ledger.Claim(ctx, stored.RequestID)
				if err != nil && !errors.Is(err, ledger.ErrNotFound) {
					return nil, ledgerError(err, "read claim")
				}
				if err != nil || !caller.Owns(claim.Owner) {
					continue
				}
			}
			log, err := unmarshalSigned(stored.Body)
			if err != nil {
				return nil, err
			}
			out = append(out, *log)
		}
		if len(page) < limit {
			break
		}
	}
	return out, nil
}

// ComputeLog returns a grant's final compute log, else the interim one, nil if
// there is none or the caller may not see it.
func (r *Runtime) ComputeLog(ctx context.Context, id backend.GrantID) (*backend.SignedLog, error) {
	caller := backend.CallerFrom(ctx)
	claim, err := r.config.Ledger.Claim(ctx, ledger.RequestID(id))
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return nil, nil //nolint:nilnil // none is an answer
	case err != nil:
		return nil, ledgerError(err, "read claim")
	case !caller.SeesAll() && !caller.Owns(claim.Owner):
		return nil, nil //nolint:nilnil // not theirs to see
	}
	return readLog(ctx, r.config.Ledger, id)
}

// instanceOf returns what the claim alone says of the instance.
func (r *Runtime) instanceOf(claim ledger.Claim) backend.Instance {
	id := backend.GrantID(claim.RequestID)
	i := backend.Instance{
		Handle:  backend.HandleFor(id),
		GrantID: id,
		Backend: r.config.Backend,
		Owner:   claim.Owner,
		ValidTo: claim.ValidTo,
		State:   backend.StatePending,
	}
	if grant, _, err := claimContent(claim); err == nil {
		i.Shape, i.Region, i.ValidTo = grant.Shape, grant.Region, grant.ValidTo
	}
	return i
}

func claimContent(claim ledger.Claim) (backend.Grant, backend.Envelope, error) {
	var p bridgev1.ProvisionRequest
	if err := proto.Unmarshal(claim.Record, &p); err != nil {
		return backend.Grant{}, backend.Envelope{}, backenderr.Wrap(backenderr.LedgerUnavailable, err, "claim in the ledger is damaged")
	}
	return backendgrpc.GrantFromProto(p.GetGrant()), backendgrpc.EnvelopeFromProto(p.GetEnvelope()), nil
}

// answer returns a copy of a ready instance as the caller may see it. A private
// key in clear is put in: it is derived, not stored.
func (r *Runtime) answer(caller backend.Caller, p backend.Provisioned) backend.Provisioned {
	p = backendgrpc.ProvisionedFromProto(backendgrpc.ProvisionedToProto(p))
	p.Instance = shownInstance(caller, p.Instance)
	if p.Receipt.PlaintextKey != nil {
		if private, _, err := r.keys.plaintextLogin(p.Receipt.GrantID); err == nil {
			p.Receipt.PlaintextKey.PrivateKey = private
		}
	}
	return p
}

// shown returns a copy of an event as the caller may see it; watchers must not
// share what one of them may change.
func shown(caller backend.Caller, e backend.Event) backend.Event {
	if e.Instance != nil {
		instance := shownInstance(caller, *e.Instance)
		e.Instance = &instance
	}
	e.Usage, e.Log = cloneLog(e.Usage), cloneLog(e.Log)
	return e
}

// shownInstance returns a copy of an instance as the caller may see it: only
// operators see whose it is.
func shownInstance(caller backend.Caller, i backend.Instance) backend.Instance {
	i.Ports = slices.Clone(i.Ports)
	if caller.Role != backend.RoleOperator {
		i.Owner = ""
	}
	return i
}

func cloneLog(log *backend.SignedLog) *backend.SignedLog {
	return backendgrpc.SignedLogFromProto(backendgrpc.SignedLogToProto(log))
}

func stopping() *backenderr.Error {
	return backenderr.New(backenderr.ProviderUnavailable, "the worker is stopping; call again")
}

func callerGone(err error) error {
	return backenderr.Wrap(backenderr.From(err).Reason, err, "the caller has gone")
}

func closureReason(c ledger.Closure) backend.EndReason {
	for reason := backend.EndWorkloadExited; reason <= backend.EndProvisionFailed; reason++ {
		if reason.String() == c.Reason {
			return reason
		}
	}
	return backend.EndTerminated
}
