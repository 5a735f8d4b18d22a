package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"time"
)

// Log is a compute log: the signed account of a grant.
type Log struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Final is true for the one that closes the account. Only the ledger sets
	// it, by the method that stores the log.
	Final bool
	// Sequence orders the interim logs of a grant; at most [math.MaxInt64].
	Sequence uint64
	// Body is the signed message as it was sent.
	Body []byte
	// KeyID names the key that signed it.
	KeyID string
	// At is when it was stored; the methods set it when it is zero.
	At time.Time
}

const logColumns = `request_id, kind, sequence, body, key_id, logged_at`

func scanLog(row scanner) (Log, error) {
	var g Log
	var kind string
	var sequence, at int64
	err := row.Scan(scan32{(*[32]byte)(&g.RequestID)}, &kind, &sequence, &g.Body, &g.KeyID, &at)
	if err != nil {
		return Log{}, err
	}
	g.Final, g.Sequence, g.At = kind == "final", uint64(sequence), timeOf(at) //nolint:gosec // A constraint keeps it positive.
	return g, nil
}

func logOf(ctx context.Context, q querier, id RequestID, kind string) (Log, error) {
	return scanLog(q.QueryRowContext(ctx, `SELECT `+logColumns+` FROM compute_logs WHERE request_id = ? AND kind = ?`, id[:], kind))
}

// sequenceOf checks that the number fits the databases' signed 64 bits.
func sequenceOf(g Log) (int64, error) {
	if g.Sequence > math.MaxInt64 {
		return 0, fmt.Errorf("sequence %d is too large", g.Sequence)
	}
	return int64(g.Sequence), nil
}

// PutInterim stores an account so far, in place of an earlier one. It returns
// [ErrStale], and changes nothing, when the stored one has the same or a higher
// sequence number, or when the final log is stored.
func (l *Ledger) PutInterim(ctx context.Context, g Log) error {
	g.At = orNow(g.At)
	sequence, err := sequenceOf(g)
	if err != nil {
		return fmt.Errorf("put interim log: %w", err)
	}
	err = l.update(ctx, g.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		_, err := logOf(ctx, tx, g.RequestID, "final")
		if err == nil {
			return ErrStale
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		put, err := changed(tx.ExecContext(ctx, `INSERT INTO compute_logs (request_id, kind, sequence, body, key_id, logged_at)
			VALUES (?, 'interim', ?, ?, ?, ?)
			ON CONFLICT (request_id, kind) DO UPDATE SET sequence = excluded.sequence, body = excluded.body,
				key_id = excluded.key_id, logged_at = excluded.logged_at
			WHERE excluded.sequence > compute_logs.sequence`,
			g.RequestID[:], sequence, blob(g.Body), g.KeyID, micros(g.At)))
		if err == nil && !put {
			return ErrStale
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("put interim log: %w", err)
	}
	return nil
}

// PutFinal stores the closing account when the grant has none yet, ends its
// claim, and returns the final log that is stored and whether it is this one.
func (l *Ledger) PutFinal(ctx context.Context, g Log) (stored Log, created bool, err error) {
	g.At = orNow(g.At)
	sequence, err := sequenceOf(g)
	if err != nil {
		return Log{}, false, fmt.Errorf("put final log: %w", err)
	}
	err = l.update(ctx, g.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		created, err = changed(tx.ExecContext(ctx, `INSERT INTO compute_logs (request_id, kind, sequence, body, key_id, logged_at)
			VALUES (?, 'final', ?, ?, ?, ?) ON CONFLICT (request_id, kind) DO NOTHING`,
			g.RequestID[:], sequence, blob(g.Body), g.KeyID, micros(g.At)))
		if err != nil {
			return err
		}
		if stored, err = logOf(ctx, tx, g.RequestID, "final"); err != nil || !created {
			return err
		}
		_, err = tx.ExecContext(ctx, `UPDATE claims SET ended_at = ? WHERE request_id = ? AND ended_at IS NULL`,
			micros(g.At), g.RequestID[:])
		return err
	})
	if err != nil {
		return Log{}, false, fmt.Errorf("put final log: %w", err)
	}
	return stored, created, nil
}

// Log returns the final log of a grant, or its interim log while there is no
// final one, or [ErrNotFound].
func (l *Ledger) Log(ctx context.Context, id RequestID) (Log, error) {
	g, err := read(ctx, l, func(ctx context.Context, q querier) (Log, error) {
		return scanLog(q.QueryRowContext(ctx,
			// 'final' sorts before 'interim'.
			`SELECT `+logColumns+` FROM compute_logs WHERE request_id = ? ORDER BY kind LIMIT 1`, id[:]))
	})
	if err != nil {
		return Log{}, fmt.Errorf("read log: %w", err)
	}
	return g, nil
}

// Position is a place in the order of final logs, by time and then id. The zero
// value is before all of them.
type Position struct {
	At        time.Time
	RequestID RequestID
}

// Position returns the place of the log, to go on after it.
func (g Log) Position() Position { return Position{At: g.At, RequestID: g.RequestID} }

// Finals returns up to limit final logs after a position, oldest first. The
// order is that of their times, which clocks of several processes and
// transactions under way may store slightly out of order: a reader that must
// miss none begins again somewhat before its last position.
func (l *Ledger) Finals(ctx context.Context, after Position, limit int) ([]Log, error) {
	at := micros(after.At)
	all, err := list(ctx, l, scanLog, `SELECT `+logColumns+` FROM compute_logs
		WHERE kind = 'final' AND (logged_at > ? OR (logged_at = ? AND request_id > ?))
		ORDER BY logged_at, request_id LIMIT ?`, at, at, after.RequestID[:], limit)
	if err != nil {
		return nil, fmt.Errorf("list final logs: %w", err)
	}
	return all, nil
}
