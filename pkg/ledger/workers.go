package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// forgetWorkers is when a process that was never heard of again, and that said
// no farewell, is forgotten. Nobody asks about one that was silent for so long.
const forgetWorkers = 24 * time.Hour

// noGrant is what writes that are for no grant are serialised by.
func noGrant() RequestID { return RequestID{} }

// Beat records that a process works for a backend now.
func (l *Ledger) Beat(ctx context.Context, backend, process string) error {
	now := time.Now()
	err := l.update(ctx, noGrant(), func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM workers WHERE seen_at < ?`, micros(now.Add(-forgetWorkers))); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO workers (backend, process, seen_at) VALUES (?, ?, ?)
			ON CONFLICT (backend, process) DO UPDATE SET seen_at = excluded.seen_at`, backend, process, micros(now))
		return err
	})
	if err != nil {
		return fmt.Errorf("record that a process works: %w", err)
	}
	return nil
}

// Leave records that a process works no more. It is idempotent.
func (l *Ledger) Leave(ctx context.Context, backend, process string) error {
	err := l.update(ctx, noGrant(), func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM workers WHERE backend = ? AND process = ?`, backend, process)
		return err
	})
	if err != nil {
		return fmt.Errorf("record that a process works no more: %w", err)
	}
	return nil
}

// LastBeat returns when any process but one last said that it works for a
// backend, zero if none has, or all have left. An empty name leaves out none.
func (l *Ledger) LastBeat(ctx context.Context, backend, butProcess string) (time.Time, error) {
	last, err := read(ctx, l, func(ctx context.Context, q querier) (last sql.NullInt64, err error) {
		err = q.QueryRowContext(ctx, `SELECT MAX(seen_at) FROM workers WHERE backend = ? AND process <> ?`, backend, butProcess).Scan(&last)
		return last, err
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("read which processes work: %w", err)
	}
	if !last.Valid {
		return time.Time{}, nil
	}
	return timeOf(last.Int64), nil
}
