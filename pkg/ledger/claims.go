package ledger

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"time"
)

// Claim says which backend has a grant, and what exactly was granted.
type Claim struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// Backend is the name of the backend that has the grant.
	Backend string
	// Generation numbers the placements of the claim from 1; it never shrinks.
	// PutClaim takes 0 for 1.
	Generation uint64
	// Fence is that of the call for which PutClaim is called, 0 for none. It is
	// checked and not stored.
	Fence uint64
	// ContentHash is the caller's digest of the grant's and envelope's content.
	ContentHash [32]byte
	// Owner is the client identity that provisioned.
	Owner string
	// ValidTo is the grant's deadline.
	ValidTo time.Time
	// CreatedAt is when the claim was made; PutClaim sets it when it is zero.
	CreatedAt time.Time
	// Record is what the caller wants back, such as the grant itself.
	Record []byte
	// SealedKey is the login key made by us, sealed to the requester; nil until
	// [Ledger.SetSealedKey], and for ever when the requester has a key.
	SealedKey []byte
	// LoginPublicKey is the SSH public key that may log in.
	LoginPublicKey string
	// EndedAt is when the final log was stored, zero while the grant lives.
	// Only the ledger sets it.
	EndedAt time.Time
}

// claimColumns is the order that scanClaim expects.
const claimColumns = `request_id, backend, content_hash, owner, valid_to, created_at, record, sealed_key, login_public_key, ended_at, generation`

func scanClaim(row scanner) (Claim, error) {
	var c Claim
	var validTo, createdAt, generation int64
	var endedAt sql.NullInt64
	err := row.Scan(scan32{(*[32]byte)(&c.RequestID)}, &c.Backend, scan32{&c.ContentHash}, &c.Owner, &validTo, &createdAt,
		&c.Record, &c.SealedKey, &c.LoginPublicKey, &endedAt, &generation)
	if err != nil {
		return Claim{}, err
	}
	c.ValidTo, c.CreatedAt, c.Generation = timeOf(validTo), timeOf(createdAt), uint64(generation) //nolint:gosec // A constraint bounds it.
	if endedAt.Valid {
		c.EndedAt = timeOf(endedAt.Int64)
	}
	return c, nil
}

// querier is a transaction or a handle.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

func claim(ctx context.Context, q querier, id RequestID) (Claim, error) {
	return scanClaim(q.QueryRowContext(ctx, `SELECT `+claimColumns+` FROM claims WHERE request_id = ?`, id[:]))
}

// PutClaim stores c when the grant has no claim yet, and returns the claim that
// is stored and whether it is this one. Whatever the stored claim says is what
// holds: the caller compares its content hash, backend and owner. A claim may
// be put for a closed grant; [Ledger.BeginAttempt] is what refuses those. A
// claim for a call that was refused before is not put; the error is a
// [FencedError].
func (l *Ledger) PutClaim(ctx context.Context, c Claim) (stored Claim, created bool, err error) {
	c.CreatedAt = orNow(c.CreatedAt)
	err = l.update(ctx, c.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		if err := fence(ctx, tx, c.RequestID, c.Fence); err != nil {
			return err
		}
		var sealed any
		if c.SealedKey != nil {
			sealed = c.SealedKey
		}
		created, err = changed(tx.ExecContext(ctx, `INSERT INTO claims
			(request_id, backend, content_hash, owner, valid_to, created_at, record, sealed_key, login_public_key, generation, ended_at)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?,
				(SELECT logged_at FROM compute_logs WHERE request_id = ? AND kind = 'final'))
			ON CONFLICT (request_id) DO NOTHING`,
			c.RequestID[:], c.Backend, c.ContentHash[:], c.Owner, micros(c.ValidTo), micros(c.CreatedAt), blob(c.Record),
			sealed, c.LoginPublicKey, int64(max(1, c.Generation)), c.RequestID[:])) //nolint:gosec // Far from the limit.
		if err != nil {
			return err
		}
		stored, err = claim(ctx, tx, c.RequestID)
		return err
	})
	if err != nil {
		return Claim{}, false, fmt.Errorf("put claim: %w", err)
	}
	return stored, created, nil
}

// Claim returns the claim of a grant, or [ErrNotFound].
func (l *Ledger) Claim(ctx context.Context, id RequestID) (Claim, error) {
	c, err := read(ctx, l, func(ctx context.Context, q querier) (Claim, error) { return claim(ctx, q, id) })
	if err != nil {
		return Claim{}, fmt.Errorf("read claim: %w", err)
	}
	return c, nil
}

// Move is one compare-and-swap of a claim's placement.
type Move struct {
	// RequestID is the grant's identity.
	RequestID RequestID
	// From and Generation say where the claim must be.
	From       string
	Generation uint64
	// To and Next say where it is afterwards; Next is at least Generation.
	To   string
	Next uint64
	// Fence is that of the call for which the claim moves, 0 for none.
	Fence uint64
}

// MoveClaim places the claim anew when it is still where m says, by
// compare-and-swap. It returns [ErrNotFound] without a claim, [ErrClosed] for a
// grant that is closed or ended, [FencedError] for a call that was refused
// before, and [ErrConflict] when the claim is elsewhere, which after an unclear
// error of an earlier call may be where it should be: the caller reads it
// again. Only who has confirmed that nothing of the grant exists at m.From may
// give it to another backend.
func (l *Ledger) MoveClaim(ctx context.Context, m Move) error {
	if m.Next < m.Generation || m.Next > maxFence {
		return fmt.Errorf("move claim: %w: generation %d after %d", ErrConflict, m.Next, m.Generation)
	}
	err := l.update(ctx, m.RequestID, func(ctx context.Context, tx *sql.Tx) error {
		ended, err := over(ctx, tx, m.RequestID)
		if err != nil {
			return err
		}
		if ended {
			return ErrClosed
		}
		if err := fence(ctx, tx, m.RequestID, m.Fence); err != nil {
			return err
		}
		moved, err := changed(tx.ExecContext(ctx,
			`UPDATE claims SET backend = ?, generation = ? WHERE request_id = ? AND backend = ? AND generation = ?`,
			m.To, int64(m.Next), m.RequestID[:], m.From, int64(m.Generation))) //nolint:gosec // Next was looked at, and Generation is no more.
		if err != nil || moved {
			return err
		}
		c, err := claim(ctx, tx, m.RequestID)
		if err != nil {
			return err
		}
		return fmt.Errorf("%w: the claim is with %q, generation %d, not with %q, generation %d",
			ErrConflict, c.Backend, c.Generation, m.From, m.Generation)
	})
	if err != nil {
		return fmt.Errorf("move claim: %w", err)
	}
	return nil
}

// SetSealedKey stores a sealed login key and its public half when the claim
// has none yet, and returns the claim as stored and whether the key is this
// one. It returns [ErrNotFound] without a claim.
func (l *Ledger) SetSealedKey(ctx context.Context, id RequestID, sealed []byte, loginPublicKey string) (stored Claim, created bool, err error) {
	err = l.update(ctx, id, func(ctx context.Context, tx *sql.Tx) error {
		created, err = changed(tx.ExecContext(ctx,
			`UPDATE claims SET sealed_key = ?, login_public_key = ? WHERE request_id = ? AND sealed_key IS NULL`,
			blob(sealed), loginPublicKey, id[:]))
		if err != nil {
			return err
		}
		stored, err = claim(ctx, tx, id)
		return err
	})
	if err != nil {
		return Claim{}, false, fmt.Errorf("set sealed key: %w", err)
	}
	return stored, created, nil
}

// pageSize bounds how much one read of a listing holds in memory and for how
// long it holds a snapshot.
const pageSize = 500

// LiveClaims yields the claims that have no final log yet, of one backend or,
// when backend is empty, of all, in the order of their ids. It reads page by
// page: a claim that is made or ended meanwhile may or may not be seen. The
// first error ends the sequence.
func (l *Ledger) LiveClaims(ctx context.Context, backend string) iter.Seq2[Claim, error] {
	// No id sorts before the empty string, so that the all-zero id is seen too.
	next := func(after []byte) ([]Claim, error) {
		return list(ctx, l, scanClaim, `SELECT `+claimColumns+` FROM claims
			WHERE ended_at IS NULL AND request_id > ? AND (? = '' OR backend = ?) ORDER BY request_id LIMIT ?`,
			after, backend, backend, pageSize)
	}
	return pages("list live claims", next, func(c Claim) RequestID { return c.RequestID })
}

// list returns all rows of one query.
func list[T any](ctx context.Context, l *Ledger, scan func(scanner) (T, error), query string, args ...any) ([]T, error) {
	return read(ctx, l, func(ctx context.Context, q querier) ([]T, error) {
		rows, err := q.QueryContext(ctx, query, args...)
		if err != nil {
			return nil, err
		}
		defer func() { _ = rows.Close() }() // Its error is that of rows.Err.
		var all []T
		for rows.Next() {
			row, err := scan(rows)
			if err != nil {
				return nil, err
			}
			all = append(all, row)
		}
		return all, rows.Err()
	})
}

// pages turns reads of one page each, which begin after an id, into a sequence.
func pages[T any](what string, next func(after []byte) ([]T, error), id func(T) RequestID) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		after := []byte{}
		for {
			page, err := next(after)
			if err != nil {
				var zero T
				yield(zero, fmt.Errorf("%s: %w", what, err))
				return
			}
			for _, row := range page {
				if !yield(row, nil) {
					return
				}
			}
			if len(page) < pageSize {
				return
			}
			last := id(page[len(page)-1])
			after = last[:]
		}
	}
}
