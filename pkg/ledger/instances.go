package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// Instance is what the first success of an attempt returned to the requester.
type Instance struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Attempt is the number of the attempt that succeeded, from 1.
	Attempt uint32
	// Body is the ready instance with its receipt as it was sent.
	Body []byte
	// ReadyAt is when; PutInstance sets it when it is zero.
	ReadyAt time.Time
}

const instanceColumns = `request_id, attempt, body, ready_at`

func scanInstance(row scanner) (Instance, error) {
	var i Instance
	var attempt, readyAt int64
	err := row.Scan(scan32{(*[32]byte)(&i.RequestID)}, &attempt, &i.Body, &readyAt)
	if err != nil {
		return Instance{}, err
	}
	i.Attempt, i.ReadyAt = uint32(attempt), timeOf(readyAt) //nolint:gosec // A constraint bounds it.
	return i, nil
}

// PutInstance stores i when its attempt has no instance yet, and returns the
// one that is stored and whether it is this one. The caller answers with the
// stored one, so that every retry is answered with the same bytes. For an
// attempt that is gone, or is being ended, it returns [ErrConflict]: another
// process undoes it.
func (l *Ledger) PutInstance(ctx context.Context, i Instance) (stored Instance, created bool, err error) {
	i.ReadyAt = orNow(i.ReadyAt)
	err = l.update(ctx, i.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		var gone int64
		err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM intents
			WHERE request_id = ? AND attempt = ? AND (state = 'gone' OR ending_at IS NOT NULL)`,
			i.RequestID[:], int64(i.Attempt)).Scan(&gone)
		if err != nil {
			return err
		}
		if gone > 0 {
			return fmt.Errorf("%w: attempt %d is gone, or is being ended", ErrConflict, i.Attempt)
		}
		created, err = changed(tx.ExecContext(ctx, `INSERT INTO instances (request_id, attempt, body, ready_at)
			VALUES (?, ?, ?, ?) ON CONFLICT (request_id, attempt) DO NOTHING`,
			i.RequestID[:], int64(i.Attempt), blob(i.Body), micros(i.ReadyAt)))
		if err != nil {
			return err
		}
		stored, err = scanInstance(tx.QueryRowContext(ctx,
			`SELECT `+instanceColumns+` FROM instances WHERE request_id = ? AND attempt = ?`, i.RequestID[:], int64(i.Attempt)))
		return err
	})
	if err != nil {
		return Instance{}, false, fmt.Errorf("put instance: %w", err)
	}
	return stored, created, nil
}

// Instance returns the instance of a grant's latest attempt that had one, or
// [ErrNotFound].
func (l *Ledger) Instance(ctx context.Context, id RequestID) (Instance, error) {
	i, err := read(ctx, l, func(ctx context.Context, q querier) (Instance, error) {
		return scanInstance(q.QueryRowContext(ctx,
			`SELECT `+instanceColumns+` FROM instances WHERE request_id = ? ORDER BY attempt DESC LIMIT 1`, id[:]))
	})
	if err != nil {
		return Instance{}, fmt.Errorf("read instance: %w", err)
	}
	return i, nil
}
