// Package fleet is the heart of the router: an ordered list of backends that is
// a backend itself.
//
// A grant goes to the first member, in the operator's order, that satisfies it.
// Before the first Provision the fleet claims the grant for that member, put if
// absent, in a store that all routers of the same grants share; whatever is
// stored holds, so that two routers, or one that was restarted in the middle,
// never give a grant to two members. The claim moves on by compare-and-swap and
// only when it is certain that nothing of the grant is left at the member that
// had it: the member said created=none, or Terminate there has confirmed it. A
// member that has the claim and can't be reached means that the caller has to
// wait, never that another member is tried.
//
// Each placement of a claim has a number, and a member that refuses a call made
// under it records that it refuses all of them: the call of another router that
// read the claim before it moved, and arrives after, makes nothing.
//
// A fleet may be the member of another one. Every fleet that can choose between
// members keeps claims, nested ones too: the claim of the outer one names the
// inner fleet as a whole, and only the inner one knows which of its own members
// an answer was lost from.
//
// It knows nothing of gRPC, so that tests run it over fakes.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Member is one backend of a fleet.
type Member struct {
	// Name is the first part of the handles of what runs there.
	Name string
	// Backend itself. Its methods must return when their context ends.
	Backend backend.Backend
	// AnswerTimeout is how long the fleet waits for its CanSatisfy before it
	// skips the member for a new grant.
	AnswerTimeout time.Duration
	// Observe returns what was last seen of the member. It doesn't block.
	Observe func() Observation
}

// Observation is what is known of a member without asking it now.
type Observation struct {
	// Capabilities that it last declared, if LastSeen says that it ever did.
	Capabilities backend.Capabilities
	// Backends are the names of the members of a member that is a router
	// itself, in order; nil otherwise.
	Backends []string
	// LastSeen is when it last answered, zero if never.
	LastSeen time.Time
	// LastError says why it doesn't answer now, "" while it does.
	LastError string
}

// Config describes a fleet.
type Config struct {
	// Name of the fleet as a backend.
	Name string
	// Members in the operator's order of preference.
	Members []Member
	// Claims of this fleet.
	Claims Claims
	// StrictFirstMatch answers with the error of the first member that
	// satisfies a grant, instead of trying the next one.
	StrictFirstMatch bool
	Log              *slog.Logger
}

// Fleet is an ordered list of backends that is one backend. It is safe for
// concurrent use.
type Fleet struct {
	name        string
	members     []*Member
	byName      map[string]*Member
	claims      Claims
	fallThrough bool
	log         *slog.Logger

	mu       sync.Mutex // protects fields below
	full     map[string][]shortage
	degraded map[string]string
}

// shortage is what a member could not give.
type shortage struct {
	region    backend.Region
	isolation backend.Isolation
	shape     backend.Shape
	until     time.Time
}

var _ backend.Backend = (*Fleet)(nil)

// New returns a fleet. It fails if there is no member, or two of one name.
func New(c Config) (*Fleet, error) {
	f := &Fleet{
		name: c.Name, byName: map[string]*Member{}, claims: c.Claims, fallThrough: !c.StrictFirstMatch, log: c.Log,
		full: map[string][]shortage{}, degraded: map[string]string{},
	}
	if len(c.Members) == 0 {
		return nil, errors.New("a fleet needs at least one backend")
	}
	for _, m := range c.Members {
		if f.byName[m.Name] != nil {
			return nil, fmt.Errorf("two backends are called %q", m.Name)
		}
		f.members = append(f.members, &m)
		f.byName[m.Name] = &m
	}
	return f, nil
}

// Name implements [backend.Backend].
func (f *Fleet) Name(context.Context) (string, error) { return f.name, nil }

// CanSatisfy implements [backend.Backend]: yes, if any member says yes.
func (f *Fleet) CanSatisfy(ctx context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	if err := checkHops(ctx); err != nil {
		return backend.Satisfaction{}, err
	}
	if err := backend.ValidateGrant(grant, time.Now(), math.MaxInt64); err != nil {
		return backend.Satisfaction{}, err
	}
	s := f.search(grant)
	defer s.stop()
	s.ask(ctx)
	for i, m := range f.members {
		switch a := s.answers[i](); {
		case a.Satisfiable && a.err == nil:
			return backend.Satisfaction{Satisfiable: true}, nil
		case backenderr.Is(a.err, backenderr.GrantInvalid):
			return backend.Satisfaction{}, m.fails(a.err).WithCreated(backenderr.CreatedNone)
		case a.err != nil:
			s.refuse(m, a.err)
		default:
			s.refuse(m, backenderr.New(backenderr.GrantNotSatisfiable, "%s", a.Reason))
		}
	}
	if ctx.Err() != nil {
		return backend.Satisfaction{}, gone(ctx)
	}
	err := s.failure()
	if backenderr.Is(err, backenderr.GrantNotSatisfiable) {
		return backend.Satisfaction{Reason: err.Error()}, nil
	}
	return backend.Satisfaction{}, err
}

// Provision implements [backend.Backend].
func (f *Fleet) Provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope) (backend.Provisioned, error) {
	if err := checkHops(ctx); err != nil {
		return backend.Provisioned{}, err
	}
	fence := backend.FenceFrom(ctx)
	search := f.search(grant.WithRegionHint(envelope.RegionHint))
	defer search.stop()
	provisioned, err := f.provision(backend.WithFence(ctx, 0), grant, envelope, fence, search)
	if err != nil {
		return backend.Provisioned{}, f.refusal(ctx, grant.ID, err, fence, search.nothing)
	}
	return provisioned, nil
}

// refusal makes the answer of a failure: with created=none it is recorded first
// that calls up to this one's fence are refused, so that none that is still on
// its way, to whatever router of these claims, makes anything later. nothing is
// the claim at which that is certain.
func (f *Fleet) refusal(ctx context.Context, id backend.GrantID, failure error, fence uint64, nothing *Claim) error {
	if late, ok := errors.AsType[*RefusedError](failure); ok {
		return backend.WithRefusedFence(backenderr.From(failure).Clone(), late.Fence)
	}
	// What a member said of fences was about ours.
	e := backend.WithoutRefusedFence(backenderr.From(failure))
	if fence == 0 || nothing == nil || e.Created != backenderr.CreatedNone {
		return e
	}
	refused, err := f.claims.Refuse(ctx, *nothing, fence)
	if err != nil {
		f.log.WarnContext(ctx, "Could not record a refusal", "grant_id", id.String(), "fence", fence, "error", err)
		return e.Clone().WithCreated(backenderr.CreatedUnknown)
	}
	return backend.WithRefusedFence(e.Clone(), refused)
}

// provision is Provision for a call with a fence, 0 for none.
func (f *Fleet) provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope, fence uint64, search *search) (backend.Provisioned, error) {
	want := Claim{
		GrantID: grant.ID, Owner: backend.CallerFrom(ctx).Identity,
		Content: Content(grant, envelope), ValidTo: grant.ValidTo,
	}
	claim, err := f.claim(ctx, want, fence, search, func() error {
		return backend.Validate(grant, envelope, time.Now(), math.MaxInt64)
	})
	if err != nil {
		return backend.Provisioned{}, err
	}
	// Other routers may move the claim while this one works, each time for a
	// reason. More often than this, somebody moves it in circles.
	for range 2*len(f.members) + 1 {
		if err := permits(ctx, claim, want); err != nil {
			return backend.Provisioned{}, err
		}
		m, ok := f.byName[claim.Backend]
		if !ok {
			return backend.Provisioned{}, notConfigured(claim)
		}
		search.passed[m.Name] = true
		if claim.Leaving {
			if claim, err = f.finishLeaving(ctx, m, claim, fence, search); err != nil {
				return backend.Provisioned{}, err
			}
			continue
		}
		a, err := f.attempt(ctx, m, claim, grant, envelope, fence, search)
		if err != nil {
			return backend.Provisioned{}, err
		}
		claim = a.claim
		switch {
		case a.moved:
			continue
		case a.failure == nil:
			search.ours = false
			if claim, err = f.settle(ctx, m, claim); err != nil || holds(claim, m) {
				return a.provisioned, err
			}
			continue
		case backenderr.Is(a.failure, backenderr.GrantEnded):
			// Perhaps it was only ended there, by a router that has moved it since.
			now, err := f.claims.Get(ctx, claim.GrantID)
			if err != nil {
				return backend.Provisioned{}, ledgerError(err)
			}
			if now.Backend != claim.Backend || now.Generation != claim.Generation || now.Leaving {
				claim, search.ours = now, false
				continue
			}
		}
		if certain(a.failure, claim) {
			search.nothing = &a.claim
		}
		if claim, err = f.moveOn(ctx, m, claim, a.failure, fence, search); err != nil {
			return backend.Provisioned{}, err
		}
	}
	return backend.Provisioned{}, backenderr.New(backenderr.OperationInProgress, "other routers keep moving the grant").WithRetryAfter(time.Second)
}

// certain reports whether a member's failure says that nothing exists under the
// claim and, because the member has recorded the refusal, that nothing will:
// not by a call either that another router has made and that is on its way.
func certain(failure error, claim Claim) bool {
	return backenderr.CreatedOf(failure) == backenderr.CreatedNone && backend.RefusedFence(failure) >= claim.Generation
}

// claim returns the grant's claim: the one that is stored, or else a new one
// for the first member that satisfies it. A grant that isn't valid gets none, so
// that it may be sent again corrected.
func (f *Fleet) claim(ctx context.Context, want Claim, fence uint64, search *search, validate func() error) (Claim, error) {
	claim, err := f.claims.Get(ctx, want.GrantID)
	if err != nil {
		return Claim{}, ledgerError(err)
	}
	if claim.Backend != "" || claim.Closed {
		search.inherited = claim.Backend
		if claim.Backend == "" {
			search.nothing = &claim
		}
		return claim, nil
	}
	search.nothing = &claim
	if err := validate(); err != nil {
		return Claim{}, err
	}
	first, err := search.next(ctx)
	if err != nil {
		return Claim{}, err
	}
	if first == nil {
		return Claim{}, search.failure()
	}
	want.Backend, search.nothing = first.Name, nil
	claim, created, err := f.claims.Put(ctx, want, fence)
	switch {
	case err != nil:
		return Claim{}, ledgerError(err)
	case !created:
		// Another router, or another call, was faster. Whatever it chose holds.
		delete(search.passed, first.Name)
		search.inherited = claim.Backend
		return claim, nil
	}
	search.ours = true
	f.log.InfoContext(ctx, "Claimed grant", "grant_id", want.GrantID.String(), "backend", first.Name)
	return claim, nil
}

// permits checks that the caller may provision under the claim. While there is
// one, what exists is unknown: the claim's instance may run, or not be gone yet.
func permits(ctx context.Context, claim, want Claim) error {
	switch {
	case claim.Backend != "" && !mine(ctx, claim):
		return backenderr.New(backenderr.GrantConflict, "the request id is taken by another client")
	case claim.Backend != "" && claim.Content != want.Content:
		return backenderr.New(backenderr.GrantConflict, "the request id is taken by a grant of other content")
	case claim.Closed && claim.Backend != "":
		return backenderr.New(backenderr.GrantEnded, "the grant was ended")
	case claim.Closed:
		return backenderr.New(backenderr.GrantEnded, "the grant was ended").WithCreated(backenderr.CreatedNone)
	}
	return nil
}

// attempted is how an attempt at one member ended.
type attempted struct {
	provisioned backend.Provisioned
	// failure is the member's, nil if it provisioned.
	failure error
	// claim under which it was asked last.
	claim Claim
	// moved says that another router has moved claim meanwhile, to what it is
	// now.
	moved bool
}

// attempt provisions at one member. While the outcome is in doubt it asks the
// same member again, a bounded number of times: Provision is idempotent. It
// asks under another placement when the member refuses what is asked under this
// one. The error is the router's own.
func (f *Fleet) attempt(ctx context.Context, m *Member, claim Claim, grant backend.Grant, envelope backend.Envelope, fence uint64, search *search) (attempted, error) {
	// What another call made under its claim may exist.
	doubt := !search.ours
	late := false
	for n := 1; ; n++ {
		provisioned, err := m.Backend.Provision(backend.WithFence(ctx, claim.Generation), grant, envelope)
		if err == nil {
			provisioned.Instance.Handle = provisioned.Instance.Handle.Via(m.Name)
			f.remember(m, grant.WithRegionHint(envelope.RegionHint), nil)
			return attempted{provisioned: provisioned, claim: claim}, nil
		}
		refused := backend.RefusedFence(err)
		// The call came after a refusal of another one under the same placement.
		first := !late
		late = refused >= claim.Generation && backenderr.Is(err, backenderr.OperationInProgress)
		// A member that didn't look doesn't clear up what an earlier call left.
		if doubt && blind(err) {
			err = backenderr.From(err).Clone().WithCreated(backenderr.CreatedUnknown)
		}
		doubt = doubt || backenderr.CreatedOf(err) == backenderr.CreatedUnknown
		if ctx.Err() != nil || n >= attempts(err) {
			f.remember(m, grant.WithRegionHint(envelope.RegionHint), err)
			return attempted{failure: err, claim: claim}, nil //nolint:nilerr // The answer is the member's, though the call be over.
		}
		f.log.WarnContext(ctx, "Provision failed, asking the same backend again", "grant_id", grant.ID.String(), "backend", m.Name,
			"reason", string(backenderr.ReasonOf(err)), "attempt", n, "error", err)
		if !late || !first {
			timer := time.NewTimer(pause(n, err))
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return attempted{failure: err, claim: claim}, nil
			}
		}
		if refused < claim.Generation {
			continue
		}
		now, moved, moveErr := f.claims.Move(ctx, claim, m.Name, refused, fence)
		if moveErr != nil {
			return attempted{}, ledgerError(moveErr)
		}
		search.ours = search.ours && moved
		if claim = now; !holds(claim, m) {
			return attempted{claim: claim, moved: true}, nil
		}
	}
}

// settle looks, after the success of a Provision, whether the member still has
// the claim. If a router has moved it, or somebody has ended the grant, in the
// moment between our reading of the claim and the member's receiving our call,
// what was made is ended at once.
func (f *Fleet) settle(ctx context.Context, m *Member, was Claim) (Claim, error) {
	now, err := f.claims.Get(ctx, was.GrantID)
	if err != nil {
		return Claim{}, ledgerError(err)
	}
	if holds(now, m) {
		return now, nil
	}
	f.log.WarnContext(ctx, "Claim moved during Provision, ending what was made", "grant_id", was.GrantID.String(), "backend", m.Name, "now", now.Backend)
	if err := f.end(ctx, m, was.GrantID); err != nil {
		return Claim{}, m.fails(err).WithCreated(backenderr.CreatedUnknown)
	}
	return now, nil
}

// holds reports whether the member has the claim, to keep.
func holds(c Claim, m *Member) bool { return c.Backend == m.Name && !c.Leaving && !c.Closed }

// moveOn decides by the error table what follows from a member's failure. It
// returns the claim as it is after it was given to the next member, or the
// error for the caller.
func (f *Fleet) moveOn(ctx context.Context, m *Member, claim Claim, failure error, fence uint64, search *search) (Claim, error) {
	rule, certain := ruleFor(failure), certain(failure, claim)
	movable := rule.then == next || rule.then == again || search.gaveUp(m, failure)
	// A claim that another call made may stand for an instance that runs well while
	// its backend is in trouble. Only a clear refusal says that there is none.
	if !movable || !f.fallThrough || ctx.Err() != nil || (!search.ours && !certain) {
		return Claim{}, m.fails(failure)
	}
	search.refuse(m, failure)
	to, err := search.next(ctx)
	switch {
	case err != nil:
		return Claim{}, m.fails(failure)
	case to == nil && backenderr.CreatedOf(failure) == backenderr.CreatedUnknown:
		return Claim{}, m.fails(failure)
	case to == nil:
		return Claim{}, search.failure()
	}
	if !certain {
		was := claim
		if claim, err = f.claims.Leave(ctx, was); err != nil {
			return Claim{}, ledgerError(err)
		}
		if claim.Backend != m.Name || claim.Generation != was.Generation || claim.Closed {
			delete(search.passed, to.Name)
			search.ours = false
			return claim, nil
		}
		if err := f.end(ctx, m, claim.GrantID); err != nil {
			f.log.WarnContext(ctx, "Could not confirm the end of an unclear attempt", "grant_id", claim.GrantID.String(), "backend", m.Name, "error", err)
			return Claim{}, m.fails(failure).WithCreated(backenderr.CreatedUnknown)
		}
	}
	return f.move(ctx, claim, to, fence, search, backenderr.ReasonOf(failure))
}

// finishLeaving goes on where another call stopped that was taking the grant away
// from the member. It can't stay: that call may have ended it there already.
func (f *Fleet) finishLeaving(ctx context.Context, m *Member, claim Claim, fence uint64, search *search) (Claim, error) {
	if err := f.end(ctx, m, claim.GrantID); err != nil {
		return Claim{}, m.fails(err).WithCreated(backenderr.CreatedUnknown)
	}
	search.nothing = &claim
	search.refuse(m, backenderr.New(backenderr.GrantNotSatisfiable, "an attempt with an unclear outcome was given up there"))
	to, err := search.next(ctx)
	switch {
	case err != nil:
		return Claim{}, err
	case to == nil:
		return Claim{}, search.failure()
	}
	return f.move(ctx, claim, to, fence, search, backenderr.Unknown)
}

// move gives the grant to another member and returns the claim as it is then.
func (f *Fleet) move(ctx context.Context, claim Claim, to *Member, fence uint64, search *search, reason backenderr.Reason) (Claim, error) {
	search.nothing = nil
	now, moved, err := f.claims.Move(ctx, claim, to.Name, 0, fence)
	if err != nil {
		return Claim{}, ledgerError(err)
	}
	// Another router may have moved it before; whatever is stored holds.
	search.ours = moved
	if now.Backend != to.Name {
		delete(search.passed, to.Name)
	}
	f.log.InfoContext(ctx, "Moved grant", "grant_id", claim.GrantID.String(), "from", claim.Backend, "backend", now.Backend,
		"generation", now.Generation, "reason", string(reason))
	return now, nil
}

// end terminates the grant at one member and returns nil only when the member
// has confirmed that nothing of it is left there.
func (f *Fleet) end(ctx context.Context, m *Member, id backend.GrantID) error {
	ctx, cancel := context.WithTimeout(ctx, endWithin)
	defer cancel()
	for {
		t, err := m.Backend.Terminate(ctx, backend.HandleFor(id))
		if err != nil {
			return err
		}
		if t.State == backend.StateTerminated {
			return nil
		}
		timer := time.NewTimer(firstPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("terminate: %w", ctx.Err())
		}
	}
}

// gone is the error when the caller went before any backend got the grant.
func gone(ctx context.Context) error {
	e := backenderr.From(ctx.Err())
	return backenderr.Wrap(e.Reason, ctx.Err(), "ask backends").WithCreated(backenderr.CreatedNone)
}

// mine reports whether the caller is the claim's owner, or an operator.
func mine(ctx context.Context, c Claim) bool {
	caller := backend.CallerFrom(ctx)
	return caller.Role == backend.RoleOperator || caller.Identity == c.Owner
}

// checkHops refuses a call that one more router would make too long.
func checkHops(ctx context.Context) error {
	if backend.CallerFrom(ctx).Hops < backend.MaxHops {
		return nil
	}
	return backenderr.New(backenderr.HopLimitExceeded, "the call has passed %d routers already; is there a loop of routers?", backend.MaxHops).
		WithCreated(backenderr.CreatedNone)
}

// ledgerError is a failure of the claim store. What exists is unknown: an
// earlier call may have made something, and only the store would say where.
func ledgerError(err error) error {
	if _, ok := errors.AsType[*RefusedError](err); ok {
		return backenderr.Wrap(backenderr.OperationInProgress, err, "the call came too late").WithRetryAfter(firstPause)
	}
	if r := backenderr.ReasonOf(err); r != backenderr.Unknown {
		return backenderr.Wrap(r, err, "router's ledger")
	}
	return backenderr.Wrap(backenderr.LedgerUnavailable, err, "router's ledger").WithRetryAfter(time.Second)
}

// notConfigured says that the member that has the claim is gone from the
// operator's list. What runs there is still the grant's instance.
func notConfigured(c Claim) error {
	return backenderr.New(backenderr.BackendUnreachable, "backend %s has the grant and is not in this router's configuration", c.Backend).
		WithRetryAfter(unreachableRetry)
}
