package worker

import (
	"context"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// hasReplicas reports whether other processes may serve this backend's grants.
func (r *Runtime) hasReplicas() bool {
	_, divided := r.driver.(Divided)
	_, replicated := r.driver.(Replicated)
	return divided || replicated
}

// lastAt is when somebody was last known to be at the attempt.
func (a Attempt) lastAt() time.Time {
	if a.ResumedAt.After(a.BeganAt) {
		return a.ResumedAt
	}
	return a.BeganAt
}

// orphaned reports whether nobody is at an open attempt any more, as far as can
// be known: this process isn't, by the caller's account, and it is too old for
// another that lives.
func (r *Runtime) orphaned(ctx context.Context, a Attempt) (bool, error) {
	age := time.Since(a.lastAt())
	if age < r.config.OrphanAge {
		return false, nil
	}
	// An end that was begun is anyone's to finish.
	d, replicated := r.driver.(Replicated)
	if !replicated || a.Ending || age >= d.ProvisionTimeout()+r.config.OrphanAge {
		return true, nil
	}
	others, err := r.config.Ledger.LastBeat(ctx, r.config.Backend, r.process)
	if err != nil {
		return false, ledgerError(err, "read which workers live")
	}
	return !r.lives(others, time.Now()), nil
}

// lives reports whether a process that said at last that it works still does.
func (r *Runtime) lives(last, now time.Time) bool { return now.Sub(last) < 4*r.beatInterval() }

// endOrphan says in the ledger that this process undoes what is left of an
// unfinished attempt, where another replica might take it up. OTHER_REPLICA says
// that one has. An attempt that another may be at stays out of it: so does the
// driver's Terminate then.
func (r *Runtime) endOrphan(ctx context.Context, id backend.GrantID) error {
	if _, replicated := r.driver.(Replicated); !replicated {
		return nil
	}
	attempts, err := r.journal.Attempts(ctx, id)
	if err != nil {
		return err
	}
	for _, a := range attempts {
		if a.Gone {
			continue
		}
		orphaned, err := r.orphaned(ctx, a)
		if err != nil {
			return err
		}
		if orphaned {
			return r.journal.end(ctx, a, true)
		}
	}
	return nil
}

// endMade says in the ledger that this process takes back an attempt that its
// driver had finished.
func (r *Runtime) endMade(ctx context.Context, a Attempt) error {
	if _, replicated := r.driver.(Replicated); !replicated {
		return nil
	}
	return r.journal.End(ctx, a)
}

// answersFor makes sure that no replica takes a ready instance back of which this
// one tells. It reports whether there is one to tell of: it may be on its way
// back already.
func (r *Runtime) answersFor(ctx context.Context, ready backend.Instance) (bool, error) {
	if _, replicated := r.driver.(Replicated); !replicated {
		return true, nil
	}
	_, err := r.journal.Resume(ctx, ready.GrantID, ready.Attempt)
	if backenderr.Is(err, backenderr.OperationInProgress) {
		return false, nil
	}
	return err == nil, err
}
