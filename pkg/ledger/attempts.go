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
	// ResumedAt is when a process last took it up that had not begun it, zero if
	// none did. It is another one each time.
	ResumedAt time.Time
	// EndingAt is when a process first said that it undoes it, zero before.
	EndingAt time.Time
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

const attemptColumns = `request_id, attempt, content_hash, params, placement, state, created_at, gone_at, resumed_at, ending_at`

func scanAttempt(row scanner) (Attempt, error) {
	var a Attempt
	var number, createdAt int64
	var state string
	var goneAt, resumedAt, endingAt sql.NullInt64
	err := row.Scan(scan32{(*[32]byte)(&a.RequestID)}, &number, scan32{&a.ContentHash}, &a.Params, &a.Placement, &state, &createdAt, &goneAt, &resumedAt, &endingAt)
	if err != nil {
		return Attempt{}, err
	}
	a.Number, a.Open, a.CreatedAt = uint32(number), state == "open", timeOf(createdAt) //nolint:gosec // A constraint bounds it.
	a.GoneAt, a.ResumedAt, a.EndingAt = timeOrNever(goneAt), timeOrNever(resumedAt), timeOrNever(endingAt)
	return a, nil
}

func timeOrNever(at sql.NullInt64) time.Time {
	if !at.Valid {
		return time.Time{}
	}
	return timeOf(at.Int64)
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
		_, err = attempt(ctx, tx, id, number)
		return err
	})
	if err != nil {
		return fmt.Errorf("mark attempt gone: %w", err)
	}
	return nil
}

// ResumeAttempt records that a process takes up an open attempt which another
// may be at, too, and returns it as it is stored then. From then on nobody ends
// it who has not seen that ([Ledger.EndAttempt]). An attempt that is being ended
// or is gone is [ErrConflict], that of a grant which is closed or ended
// [ErrClosed], and one that was never begun [ErrNotFound]. When the answer is
// lost the caller asks again.
func (l *Ledger) ResumeAttempt(ctx context.Context, id RequestID, number uint32) (a Attempt, err error) {
	err = l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		if a, err = attempt(ctx, tx, id, number); err != nil {
			return err
		}
		ended, err := over(ctx, tx, id)
		switch {
		case err != nil:
			return err
		case ended:
			return ErrClosed
		case !a.Open:
			return fmt.Errorf("%w: attempt %d is gone", ErrConflict, number)
		case !a.EndingAt.IsZero():
			return fmt.Errorf("%w: attempt %d is being ended", ErrConflict, number)
		}
		// Clocks differ, and two may come at the same time.
		now := timeOf(micros(time.Now()))
		if next := a.ResumedAt.Add(time.Microsecond); !a.ResumedAt.IsZero() && now.Before(next) {
			now = next
		}
		a.ResumedAt = now
		_, err = tx.ExecContext(ctx, `UPDATE intents SET resumed_at = ? WHERE request_id = ? AND attempt = ?`,
			micros(now), id[:], int64(number))
		return err
	})
	if err != nil {
		return Attempt{}, fmt.Errorf("resume attempt: %w", err)
	}
	return a, nil
}

// End says which attempt is ended, and what who ends it knows.
type End struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Number is the attempt's.
	Number uint32
	// ResumedAt is the attempt's as the caller knows it.
	ResumedAt time.Time
	// Unanswered ends only an attempt that has no instance, which is one that
	// nobody was told of.
	Unanswered bool
}

// EndAttempt records that a process undoes an attempt: it is never resumed
// again, and no instance is put for it. It returns [ErrConflict] when the
// attempt was resumed since the caller looked, so that somebody else is at it,
// or when the caller wants one without an instance and it has one. An attempt
// of a grant that is closed or ended is everybody's to undo, and so is one that
// is being ended already or is gone. One that was never begun is [ErrNotFound].
func (l *Ledger) EndAttempt(ctx context.Context, e End) error {
	id := e.RequestID
	err := l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		a, err := attempt(ctx, tx, id, e.Number)
		if err != nil || !a.Open || !a.EndingAt.IsZero() {
			return err
		}
		ended, err := over(ctx, tx, id)
		if err != nil {
			return err
		}
		if !ended {
			if !a.ResumedAt.Equal(e.ResumedAt) {
				return fmt.Errorf("%w: attempt %d was resumed", ErrConflict, e.Number)
			}
			var answers int64
			err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM instances WHERE request_id = ? AND attempt = ?`, id[:], int64(e.Number)).Scan(&answers)
			if err != nil {
				return err
			}
			if e.Unanswered && answers > 0 {
				return fmt.Errorf("%w: attempt %d is ready", ErrConflict, e.Number)
			}
		}
		_, err = tx.ExecContext(ctx, `UPDATE intents SET ending_at = ? WHERE request_id = ? AND attempt = ?`,
			micros(time.Now()), id[:], int64(e.Number))
		return err
	})
	if err != nil {
		return fmt.Errorf("end attempt: %w", err)
	}
	return nil
}

// attempt reads one attempt.
func attempt(ctx context.Context, q querier, id RequestID, number uint32) (Attempt, error) {
	return scanAttempt(q.QueryRowContext(ctx,
		`SELECT `+attemptColumns+` FROM intents WHERE request_id = ? AND attempt = ?`, id[:], int64(number)))
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
