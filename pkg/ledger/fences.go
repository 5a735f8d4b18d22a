package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// A router numbers the placements of a claim, and each call that it makes under
// one carries the number: its fence. Who refuses such a call, so that the grant
// may go elsewhere, records first that all calls up to this fence are refused:
// one that is still on its way then finds the door shut, in whatever process it
// arrives. A fence of 0 is none and checked nowhere.

// FencedError says that a call came too late: calls with its fence were refused
// before.
type FencedError struct {
	// Refused is the highest fence that was refused.
	Refused uint64
}

// Error implements error.
func (e FencedError) Error() string {
	return fmt.Sprintf("calls up to fence %d were refused before", e.Refused)
}

// maxFence is what the store's integers hold.
const maxFence = 1<<63 - 1

// fence returns a FencedError for a call that was refused before.
func fence(ctx context.Context, q querier, id RequestID, fence uint64) error {
	if fence == 0 {
		return nil
	}
	refused, err := refused(ctx, q, id)
	if err == nil && fence <= refused {
		return FencedError{refused}
	}
	return err
}

func refused(ctx context.Context, q querier, id RequestID) (uint64, error) {
	var n int64
	err := q.QueryRowContext(ctx, `SELECT refused FROM fences WHERE request_id = ?`, id[:]).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return uint64(n), err //nolint:gosec // A constraint bounds it.
}

// Refused returns the highest fence that was refused for a grant, 0 if none
// was.
func (l *Ledger) Refused(ctx context.Context, id RequestID) (uint64, error) {
	n, err := read(ctx, l, func(ctx context.Context, q querier) (uint64, error) { return refused(ctx, q, id) })
	if err != nil {
		return 0, fmt.Errorf("read fence: %w", err)
	}
	return n, nil
}

// RefuseAttempts records, for a process that makes attempts, that calls up to
// fence are refused, and returns the highest fence that is. After it has
// returned no attempt begins under such a call. With an attempt that is open it
// records nothing and returns [ErrConflict]: that one may make something yet.
func (l *Ledger) RefuseAttempts(ctx context.Context, id RequestID, fence uint64) (uint64, error) {
	return l.refuse(ctx, id, fence, func(ctx context.Context, tx *sql.Tx) error {
		var open int64
		err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM intents WHERE request_id = ? AND state = 'open'`, id[:]).Scan(&open)
		if err == nil && open > 0 {
			return fmt.Errorf("%w: an attempt is open", ErrConflict)
		}
		return err
	})
}

// RefuseClaims records, for a process that moves claims, that calls up to fence
// are refused, and returns the highest fence that is. After it has returned no
// claim is put or moved under such a call. The caller has confirmed that
// nothing exists under the claim's placement at backend with this generation,
// or, with an empty backend, that there is no claim; otherwise it records
// nothing and returns [ErrConflict].
func (l *Ledger) RefuseClaims(ctx context.Context, id RequestID, fence uint64, backend string, generation uint64) (uint64, error) {
	return l.refuse(ctx, id, fence, func(ctx context.Context, tx *sql.Tx) error {
		c, err := claim(ctx, tx, id)
		switch {
		case errors.Is(err, sql.ErrNoRows) && backend == "":
			return nil
		case err == nil && (c.Backend != backend || c.Generation != generation):
			return fmt.Errorf("%w: the claim is with %q, generation %d", ErrConflict, c.Backend, c.Generation)
		}
		return err
	})
}

func (l *Ledger) refuse(ctx context.Context, id RequestID, fence uint64, check func(context.Context, *sql.Tx) error) (highest uint64, err error) {
	if fence == 0 || fence > maxFence {
		return 0, fmt.Errorf("refuse: %w: fence %d", ErrConflict, fence)
	}
	err = l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		if err := check(ctx, tx); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO fences (request_id, refused) VALUES (?, ?)
			ON CONFLICT (request_id) DO UPDATE SET refused = excluded.refused WHERE fences.refused < excluded.refused`,
			id[:], int64(fence)) //nolint:gosec // It was looked at.
		if err != nil {
			return err
		}
		highest, err = refused(ctx, tx, id)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("refuse: %w", err)
	}
	return highest, nil
}
