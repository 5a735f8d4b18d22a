package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// Closure says that a grant is over: nothing may be created for it any more.
type Closure struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Reason says why, in a form that the caller can parse again.
	Reason string
	// By is the identity of who closed it.
	By string
	// At is when; CloseGrant sets it when it is zero.
	At time.Time
}

func closure(ctx context.Context, q querier, id RequestID) (Closure, error) {
	var c Closure
	var at int64
	err := q.QueryRowContext(ctx, `SELECT request_id, reason, closed_by, closed_at FROM closures WHERE request_id = ?`, id[:]).
		Scan(scan32{(*[32]byte)(&c.RequestID)}, &c.Reason, &c.By, &at)
	c.At = timeOf(at)
	return c, err
}

// CloseGrant stores c when the grant has no closure yet, and returns the
// closure that is stored and whether it is this one. The grant need not have a
// claim. After it has returned no attempt begins for the grant, in whatever
// process.
func (l *Ledger) CloseGrant(ctx context.Context, c Closure) (stored Closure, created bool, err error) {
	c.At = orNow(c.At)
	err = l.update(ctx, c.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		created, err = changed(tx.ExecContext(ctx, `INSERT INTO closures (request_id, reason, closed_by, closed_at)
			VALUES (?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING`, c.RequestID[:], c.Reason, c.By, micros(c.At)))
		if err != nil {
			return err
		}
		stored, err = closure(ctx, tx, c.RequestID)
		return err
	})
	if err != nil {
		return Closure{}, false, fmt.Errorf("close grant: %w", err)
	}
	return stored, created, nil
}

// Closure returns the closure of a grant, or [ErrNotFound] while it is open.
func (l *Ledger) Closure(ctx context.Context, id RequestID) (Closure, error) {
	c, err := read(ctx, l, func(ctx context.Context, q querier) (Closure, error) { return closure(ctx, q, id) })
	if err != nil {
		return Closure{}, fmt.Errorf("read closure: %w", err)
	}
	return c, nil
}
