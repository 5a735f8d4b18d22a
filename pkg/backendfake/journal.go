package backendfake

import (
	"context"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// mortalJournal is a journal that a dead process can't reach.
type mortalJournal struct {
	inner   worker.Journal
	process *process
}

func (j mortalJournal) alive() error {
	if j.process.dead() {
		return backenderr.Wrap(backenderr.LedgerUnavailable, errKilled, "use the journal")
	}
	return nil
}

func (j mortalJournal) Begin(ctx context.Context, id backend.GrantID, placement string, params []byte) (worker.Attempt, error) {
	if err := j.alive(); err != nil {
		return worker.Attempt{}, err
	}
	return j.inner.Begin(ctx, id, placement, params)
}

func (j mortalJournal) Check(ctx context.Context, id backend.GrantID) error {
	if err := j.alive(); err != nil {
		return err
	}
	return j.inner.Check(ctx, id)
}

func (j mortalJournal) Gone(ctx context.Context, id backend.GrantID, attempt uint32) error {
	if err := j.alive(); err != nil {
		return err
	}
	return j.inner.Gone(ctx, id, attempt)
}

func (j mortalJournal) Resume(ctx context.Context, id backend.GrantID, attempt uint32) (worker.Attempt, error) {
	if err := j.alive(); err != nil {
		return worker.Attempt{}, err
	}
	return j.inner.Resume(ctx, id, attempt)
}

func (j mortalJournal) End(ctx context.Context, a worker.Attempt) error {
	if err := j.alive(); err != nil {
		return err
	}
	return j.inner.End(ctx, a)
}

func (j mortalJournal) Attempts(ctx context.Context, id backend.GrantID) ([]worker.Attempt, error) {
	if err := j.alive(); err != nil {
		return nil, err
	}
	return j.inner.Attempts(ctx, id)
}

func (j mortalJournal) Open(ctx context.Context) ([]worker.Attempt, error) {
	if err := j.alive(); err != nil {
		return nil, err
	}
	return j.inner.Open(ctx)
}

func (j mortalJournal) SaveLog(ctx context.Context, log backend.ComputeLog) error {
	if err := j.alive(); err != nil {
		return err
	}
	return j.inner.SaveLog(ctx, log)
}

func (j mortalJournal) SavedLog(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	if err := j.alive(); err != nil {
		return nil, err
	}
	return j.inner.SavedLog(ctx, id)
}
