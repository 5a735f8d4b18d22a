package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// sighting names a resource that a sweep found wrong. Only the second sweep in
// a row that finds it deletes it: one look may fall into the middle of a
// change.
type sighting struct {
	grant   backend.GrantID
	attempt uint32
}

// Swept is a resource that should not exist.
type Swept struct {
	Resource backend.Resource
	// Why it should not exist, for people.
	Why string
	// Deleted says that it is confirmed gone.
	Deleted bool
	// Err says why it is not.
	Err error
}

func (r *Runtime) sweepForEver() {
	ticker := time.NewTicker(r.config.SweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-r.live.Done():
			return
		}
		if err := r.settle(r.live); err != nil && r.live.Err() == nil {
			r.log.WarnContext(r.live, "Looking for unfinished grants failed", "error", err.Error())
			continue
		}
		if _, err := r.Sweep(r.live, false); err != nil && r.live.Err() == nil {
			r.log.WarnContext(r.live, "Sweep failed", "error", err.Error())
		}
	}
}

// settle gives a keeper to every grant that needs one: past its deadline,
// closed but not torn down, or with an attempt that nobody works on.
func (r *Runtime) settle(ctx context.Context) error {
	for claim, err := range r.config.Ledger.LiveClaims(ctx, r.config.Backend) {
		if err != nil {
			return ledgerError(err, "read live grants")
		}
		if err := r.takeUp(ctx, claim); err != nil && !backenderr.Is(err, backenderr.OtherReplica) {
			return err
		}
	}
	open, err := r.journal.Open(ctx)
	if err != nil {
		return err
	}
	for _, attempt := range open {
		if r.keeper(attempt.GrantID) != nil {
			continue
		}
		orphaned, err := r.orphaned(ctx, attempt)
		if err != nil {
			return err
		}
		if !orphaned {
			continue
		}
		switch err := r.elsewhere(ctx, attempt.GrantID); {
		case backenderr.Is(err, backenderr.OtherReplica):
			continue
		case err != nil:
			return err
		}
		claim, err := r.config.Ledger.Claim(ctx, ledger.RequestID(attempt.GrantID))
		if err != nil {
			return ledgerError(err, "read claim")
		}
		if claim.EndedAt.IsZero() && claim.Backend == r.config.Backend {
			r.keep(claim, nil, phaseUndo, 0)
		}
	}
	return nil
}

// Sweep looks at what the provider really holds and deletes what should not
// exist and has been seen by the sweep before, too. A dry run deletes nothing.
// If the ledger or the provider can't be read, it deletes nothing and fails.
//
// What should not exist: resources of a grant that has ended; resources past
// their own deadline and grace; parts of an attempt that doesn't run, has no
// live intent and is older than the orphan age. An instance that runs within
// its deadline stays, even if this ledger has never heard of it: the ledger may
// be an older copy.
func (r *Runtime) Sweep(ctx context.Context, dryRun bool) ([]Swept, error) {
	out, _, err := r.sweep(ctx, dryRun)
	return out, err
}

// sweep is Sweep, and names what of the provider could not be seen.
func (r *Runtime) sweep(ctx context.Context, dryRun bool) (_ []Swept, blind []string, _ error) {
	r.sweeping.Lock()
	defer r.sweeping.Unlock()
	// The provider first: what is made after this list isn't judged by it.
	listing, err := r.driver.List(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("list what exists: %w", err)
	}
	now := time.Now()
	found := map[sighting]bool{}
	var out []Swept
	for _, resource := range listing.Resources {
		if r.keeper(resource.GrantID) != nil {
			continue
		}
		why, err := r.judge(ctx, resource, now)
		if err != nil {
			return nil, nil, err
		}
		if why == "" {
			continue
		}
		seen := sighting{resource.GrantID, resource.Attempt}
		found[seen] = true
		swept := Swept{Resource: resource, Why: why}
		if !dryRun && r.sighted[seen] {
			swept.Err = r.removeWithin(ctx, resource, r.config.SweepInterval)
			swept.Deleted = swept.Err == nil
			r.metrics.swept(swept.Deleted)
			r.log.WarnContext(ctx, "Swept", "grant_id", resource.GrantID.String(), "instance_id", string(resource.InstanceID),
				"why", why, "deleted", swept.Deleted)
		}
		out = append(out, swept)
	}
	if !dryRun {
		r.sighted = found
	}
	r.metrics.suspects(len(out))
	return out, listing.Blind, nil
}

// judge says why a resource should not exist, "" if it may.
func (r *Runtime) judge(ctx context.Context, resource backend.Resource, now time.Time) (string, error) {
	id := ledger.RequestID(resource.GrantID)
	log, err := readLog(ctx, r.config.Ledger, resource.GrantID)
	if err != nil {
		return "", err
	}
	if log != nil && log.Log.Final {
		return "the grant ended at " + log.Log.EndedAt.UTC().Format(time.RFC3339), nil
	}
	closure, err := r.config.Ledger.Closure(ctx, id)
	switch {
	case err == nil:
		return "the grant was closed: " + closure.Reason, nil
	case !errors.Is(err, ledger.ErrNotFound):
		return "", ledgerError(err, "read closure")
	}
	if !resource.ValidTo.IsZero() && now.After(resource.ValidTo.Add(r.config.Grace)) {
		return "past its deadline of " + resource.ValidTo.UTC().Format(time.RFC3339), nil
	}
	if resource.Running {
		return "", nil
	}
	attempts, err := r.journal.Attempts(ctx, resource.GrantID)
	if err != nil {
		return "", err
	}
	for _, a := range attempts {
		if a.Number == resource.Attempt && !a.Gone {
			return "", nil
		}
	}
	if !resource.CreatedAt.IsZero() && now.Sub(resource.CreatedAt) > r.config.OrphanAge {
		return "left over from an attempt without a live intent", nil
	}
	return "", nil
}

// removeWithin gives a removal its time: a host that doesn't answer must not
// keep the sweep from the others. A keeper goes on by itself.
func (r *Runtime) removeWithin(ctx context.Context, resource backend.Resource, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return r.remove(ctx, resource)
}

// remove deletes everything of the resource's grant. A grant with a claim goes
// the way of every end, so that its log is written.
func (r *Runtime) remove(ctx context.Context, resource backend.Resource) error {
	claim, err := r.config.Ledger.Claim(ctx, ledger.RequestID(resource.GrantID))
	if err == nil && claim.EndedAt.IsZero() && claim.Backend == r.config.Backend {
		reason := backend.EndDeadline
		closure, err := r.config.Ledger.Closure(ctx, claim.RequestID)
		switch {
		case err == nil:
			reason = closureReason(closure)
		case !errors.Is(err, ledger.ErrNotFound):
			return ledgerError(err, "read closure")
		case time.Now().Before(claim.ValidTo):
			return r.keep(claim, nil, phaseUndo, 0).wait(ctx)
		}
		return r.keep(claim, nil, phaseEnd, reason).wait(ctx)
	}
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		return ledgerError(err, "read claim")
	}
	_, err = r.driver.Terminate(ctx, resource.GrantID)
	return err
}
