package worker

import (
	"context"
	"errors"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// followInterval is how often a replica looks in the ledger for what others did
// to grants that it keeps: the longest that an end which one replica was asked
// for takes to reach the one that can act.
const followInterval = 5 * time.Second

// elsewhere fails with OTHER_REPLICA while another replica has what a grant
// needs.
func (r *Runtime) elsewhere(ctx context.Context, id backend.GrantID) error {
	if d, ok := r.driver.(Divided); ok {
		return d.Elsewhere(ctx, id)
	}
	return nil
}

// Serving says why this process has nothing to serve with, because other
// replicas have it all; nil if it has.
func (r *Runtime) Serving() error {
	if d, ok := r.driver.(Divided); ok {
		return d.Serving()
	}
	return nil
}

// servingInterval is how often it is looked whether there is something to serve
// with. The router sees a change within a round trip.
const servingInterval = 250 * time.Millisecond

// reportServing tells set whether this process has something to serve with, now
// and whenever that changes, until the runtime is closed.
func (r *Runtime) reportServing(set func(bool)) {
	why := r.Serving()
	set(why == nil)
	if _, divided := r.driver.(Divided); !divided {
		return
	}
	if why != nil {
		r.log.Info("Standing by", "reason", why.Error())
	}
	r.routines.Go(func() {
		ticker := time.NewTicker(servingInterval)
		defer ticker.Stop()
		before := why == nil
		for {
			select {
			case <-ticker.C:
			case <-r.live.Done():
				return
			}
			why := r.Serving()
			serving := why == nil
			if serving == before {
				continue
			}
			before = serving
			set(serving)
			if serving {
				r.log.Info("Serving")
			} else {
				r.log.Info("Standing by", "reason", why.Error())
			}
		}
	})
}

// wakeUp makes settle due at once.
func (r *Runtime) wakeUp() {
	select {
	case r.wake <- struct{}{}:
	default: // It is due already.
	}
}

// followOthers does what other replicas have asked for or finished.
func (r *Runtime) followOthers() {
	ticker := time.NewTicker(followInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-r.wake:
			// Not at the next sweep: what came with a host is nobody's until then.
			if err := r.settle(r.live); err != nil && r.live.Err() == nil {
				r.log.WarnContext(r.live, "Looking for grants that were taken over failed", "error", err.Error())
				time.AfterFunc(minBackoff, r.wakeUp)
			}
			continue
		case <-r.live.Done():
			return
		}
		if err := r.follow(r.live); err != nil && r.live.Err() == nil {
			r.log.WarnContext(r.live, "Looking for what other replicas did failed", "error", err.Error())
		}
	}
}

// follow looks at every grant that has a keeper: one that another replica has
// closed is ended, one that another replica has ended has its last word.
func (r *Runtime) follow(ctx context.Context) error {
	r.mu.Lock()
	keepers := make([]*keeper, 0, len(r.keepers))
	for _, k := range r.keepers {
		keepers = append(keepers, k)
	}
	r.mu.Unlock()
	if len(keepers) == 0 {
		return nil
	}
	live := map[backend.GrantID]bool{}
	for claim, err := range r.config.Ledger.LiveClaims(ctx, r.config.Backend) {
		if err != nil {
			return ledgerError(err, "read live grants")
		}
		live[backend.GrantID(claim.RequestID)] = true
	}
	for _, k := range keepers {
		if !live[k.id] {
			final, err := readLog(ctx, r.config.Ledger, k.id)
			if err != nil {
				return err
			}
			if final != nil && final.Log.Final {
				k.conclude(final)
			}
			continue
		}
		if k.isEnding() {
			continue
		}
		closure, err := r.config.Ledger.Closure(ctx, ledger.RequestID(k.id))
		switch {
		case err == nil:
			k.end(closureReason(closure))
		case !errors.Is(err, ledger.ErrNotFound):
			return ledgerError(err, "read closure")
		}
	}
	return nil
}

// withOthers adds the ready instances that other replicas keep, as the ledger
// has them: whichever replica is asked, the list is the worker's.
func (r *Runtime) withOthers(ctx context.Context, caller backend.Caller, own []backend.Instance) []backend.Instance {
	if !r.hasReplicas() {
		return own
	}
	known := map[backend.GrantID]bool{}
	for _, i := range own {
		known[i.GrantID] = true
	}
	for claim, err := range r.config.Ledger.LiveClaims(ctx, r.config.Backend) {
		var ready *backend.Provisioned
		id := backend.GrantID(claim.RequestID)
		if err == nil && (known[id] || (!caller.SeesAll() && !caller.Owns(claim.Owner))) {
			continue
		}
		if err == nil {
			ready, err = r.readyInstance(ctx, id)
		}
		if err != nil {
			r.log.WarnContext(ctx, "Listing the instances of other replicas failed", "error", err.Error())
			return own
		}
		if ready != nil {
			own = append(own, shownInstance(caller, ready.Instance))
		}
	}
	return own
}

// conclude gives the keeper the final log that another replica has written. It
// has nothing more to do.
func (k *keeper) conclude(final *backend.SignedLog) {
	k.mu.Lock()
	done := k.state.final != nil || k.state.left
	quit := k.quit
	k.mu.Unlock()
	if done {
		return
	}
	k.runtime.log.Info("Another replica has ended the grant", "grant_id", k.id.String())
	k.update(func(s *snapshot) {
		s.final = final
		s.instance.State, s.instance.EndReason, s.instance.Progress = backend.StateTerminated, final.Log.Exit.Reason, ""
	})
	k.end(final.Log.Exit.Reason)
	if quit != nil {
		quit()
	}
}

// giveWay notes that another replica has what the grant needs, so that the
// keeper must leave. It reports whether err says so.
func (k *keeper) giveWay(err error) bool {
	if !backenderr.Is(err, backenderr.OtherReplica) {
		return false
	}
	k.mu.Lock()
	k.other = err
	k.mu.Unlock()
	k.runtime.log.Info("Leaving the grant to another replica", "grant_id", k.id.String(), "error", err.Error())
	return true
}

// gaveWay returns why the keeper has left the grant to another replica, nil if
// it has not.
func (k *keeper) gaveWay() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.other
}
