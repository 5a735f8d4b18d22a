package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"time"
)

// Attempt is one intent to create something for a grant.
type Attempt struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Number counts a grant's attempts from 1.
	Number uint32
	// ContentHash is that of the claim which the attempt serves.
	ContentHash [32]byte
	AttemptParams
	// Open is true until the attempt was confirmed gone.
	Open bool
	// CreatedAt is when the attempt was begun.
	CreatedAt time.Time
	// GoneAt is when it was confirmed gone, zero before.
	GoneAt time.Time
}

// AttemptParams is what an attempt was begun with and keeps for ever.
type AttemptParams struct {
	// Params are the rendered parameters of the create call, which every retry
	// of the attempt sends unchanged.
	Params []byte
	// Placement says where, such as a host or a zone, in the backend's words.
	Placement string
	// Fence is that of the call which begins the attempt, 0 for none. It is
	// checked and not stored.
	Fence uint64
}

const attemptColumns = `request_id, attempt, content_hash, params, placement, state, created_at, gone_at`

func scanAttempt(row scanner) (Attempt, error) {
	var a Attempt
	var number, createdAt int64
	var state string
	var goneAt sql.NullInt64
	err := row.Scan(scan32{(*[32]byte)(&a.RequestID)}, &number, scan32{&a.ContentHash}, &a.Params, &a.Placement, &state, &createdAt, &goneAt)
	if err != nil {
		return Attempt{}, err
	}
	a.Number, a.Open, a.CreatedAt = uint32(number), state == "open", timeOf(createdAt) //nolint:gosec // A constraint bounds it.
	if goneAt.Valid {
		a.GoneAt = timeOf(goneAt.Int64)
	}
	return a, nil
}

// over reports whether the grant has a closure or a final log.
func over(ctx context.Context, q querier, id RequestID) (bool, error) {
	var n int64
	err := q.QueryRowContext(ctx, `SELECT (SELECT COUNT(*) FROM closures WHERE request_id = ?)
		+ (SELECT COUNT(*) FROM compute_logs WHERE request_id = ? AND kind = 'final')`, id[:], id[:]).Scan(&n)
	return n > 0, err
}

// BeginAttempt returns the grant's open attempt, or begins the next one. In one
// transaction it refuses with [ErrClosed] when the grant has a closure or a
// final log; else, when an attempt is open, returns that one exactly as it was
// stored, and created false; else calls render with the next number and stores
// what it returns.
//
// An open attempt with another content hash is [ErrConflict]. The callback runs
// while the store is locked for writing, so it must neither block nor use the
// ledger; its error ends the call, unchanged, and nothing is stored. An attempt
// with a fence that was refused before does not begin; the error is a
// [FencedError].
func (l *Ledger) BeginAttempt(ctx context.Context, id RequestID, contentHash [32]byte,
	render func(number uint32) (AttemptParams, error),
) (a Attempt, created bool, err error) {
	err = l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		ended, err := over(ctx, tx, id)
		if err != nil {
			return err
		}
		if ended {
			return ErrClosed
		}
		a, err = scanAttempt(tx.QueryRowContext(ctx,
			`SELECT `+attemptColumns+` FROM intents WHERE request_id = ? AND state = 'open'`, id[:]))
		if err == nil {
			if a.ContentHash != contentHash {
				return fmt.Errorf("%w: attempt %d is open with other content", ErrConflict, a.Number)
			}
			return nil
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		var last int64
		err = tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(attempt), 0) FROM intents WHERE request_id = ?`, id[:]).Scan(&last)
		if err != nil {
			return err
		}
		number := uint32(last + 1) //nolint:gosec // A constraint bounds it.
		params, err := render(number)
		if err != nil {
			return callerError{err}
		}
		if err := fence(ctx, tx, id, params.Fence); err != nil {
			return err
		}
		params.Fence = 0
		created = true
		a = Attempt{
			RequestID: id, Number: number, ContentHash: contentHash, AttemptParams: params, Open: true,
			CreatedAt: timeOf(micros(time.Now())),
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO intents
			(request_id, attempt, content_hash, params, placement, state, created_at) VALUES (?, ?, ?, ?, ?, 'open', ?)`,
			id[:], last+1, contentHash[:], blob(params.Params), params.Placement, micros(a.CreatedAt))
		return err
	})
	if err != nil {
		return Attempt{}, false, fmt.Errorf("begin attempt: %w", err)
	}
	return a, created, nil
}

// MarkGone records that nothing of an attempt exists any more, which the caller
// must have confirmed with the platform. It is idempotent; an attempt that was
// never begun is [ErrNotFound].
func (l *Ledger) MarkGone(ctx context.Context, id RequestID, number uint32) error {
	err := l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		gone, err := changed(tx.ExecContext(ctx, `UPDATE intents SET state = 'gone', gone_at = ?
			WHERE request_id = ? AND attempt = ? AND state = 'open'`, micros(time.Now()), id[:], int64(number)))
		if err != nil || gone {
			return err
		}
		_, err = scanAttempt(tx.QueryRowContext(ctx,
			`SELECT `+attemptColumns+` FROM intents WHERE request_id = ? AND attempt = ?`, id[:], int64(number)))
		return err
	})
	if err != nil {
		return fmt.Errorf("mark attempt gone: %w", err)
	}
	return nil
}

// Attempts returns all attempts of a grant in the order of their numbers; none
// is not an error.
func (l *Ledger) Attempts(ctx context.Context, id RequestID) ([]Attempt, error) {
	all, err := list(ctx, l, scanAttempt, `SELECT `+attemptColumns+` FROM intents WHERE request_id = ? ORDER BY attempt`, id[:])
	if err != nil {
		return nil, fmt.Errorf("list attempts: %w", err)
	}
	return all, nil
}

// OpenIntents yields the open attempts of all grants in the order of their
// request ids, with the same guarantees as [Ledger.LiveClaims]. A grant has at
// most one.
func (l *Ledger) OpenIntents(ctx context.Context) iter.Seq2[Attempt, error] {
	next := func(after []byte) ([]Attempt, error) {
		return list(ctx, l, scanAttempt, `SELECT `+attemptColumns+` FROM intents
			WHERE state = 'open' AND request_id > ? ORDER BY request_id LIMIT ?`, after, pageSize)
	}
	return pages("list open intents", next, func(a Attempt) RequestID { return a.RequestID })
}
