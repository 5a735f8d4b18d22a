// Package claims keeps the fleet's claims in the ledger.
package claims

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// closedByRouter is the reason of the closures that routers write: somebody
// called Terminate.
const closedByRouter = "TERMINATED"

// leavingMark follows the backend of a claim that is leaving it; no name of a
// backend has it. The ledger moves a claim from "metal" by way of "metal!", so
// that each step is one compare-and-swap.
const leavingMark = "!"

// Ledger is what claims need of a [ledger.Ledger], whose documentation says what
// the methods do.
type Ledger interface {
	PutClaim(ctx context.Context, c ledger.Claim) (stored ledger.Claim, created bool, err error)
	Claim(ctx context.Context, id ledger.RequestID) (ledger.Claim, error)
	MoveClaim(ctx context.Context, m ledger.Move) error
	RefuseClaims(ctx context.Context, id ledger.RequestID, fence uint64, backend string, generation uint64) (uint64, error)
	CloseGrant(ctx context.Context, c ledger.Closure) (stored ledger.Closure, created bool, err error)
	Closure(ctx context.Context, id ledger.RequestID) (ledger.Closure, error)
}

// Store is a [fleet.Claims] in a ledger.
type Store struct{ ledger Ledger }

var _ fleet.Claims = (*Store)(nil)

// New returns the claims in l, which the caller closes.
func New(l Ledger) *Store { return &Store{ledger: l} }

// Get implements [fleet.Claims].
func (s *Store) Get(ctx context.Context, id backend.GrantID) (fleet.Claim, error) {
	stored, err := s.ledger.Claim(ctx, ledger.RequestID(id))
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		return fleet.Claim{}, err
	}
	stored.RequestID = ledger.RequestID(id)
	return s.read(ctx, stored)
}

// read adds to a stored claim whether the grant is closed. Reading the closure
// after the claim errs on the side of closed.
func (s *Store) read(ctx context.Context, c ledger.Claim) (fleet.Claim, error) {
	claim := fleet.Claim{GrantID: backend.GrantID(c.RequestID), Owner: c.Owner, Content: c.ContentHash, ValidTo: c.ValidTo, Generation: c.Generation}
	claim.Backend, claim.Leaving = strings.CutSuffix(c.Backend, leavingMark)
	_, err := s.ledger.Closure(ctx, c.RequestID)
	switch {
	case err == nil:
		claim.Closed = true
	case !errors.Is(err, ledger.ErrNotFound):
		return fleet.Claim{}, err
	}
	return claim, nil
}

// Put implements [fleet.Claims].
func (s *Store) Put(ctx context.Context, c fleet.Claim, fence uint64) (fleet.Claim, bool, error) {
	stored, created, err := s.ledger.PutClaim(ctx, ledger.Claim{
		RequestID: ledger.RequestID(c.GrantID), Backend: c.Backend, Owner: c.Owner, ContentHash: c.Content, ValidTo: c.ValidTo,
		Generation: 1, Fence: fence,
	})
	if err != nil {
		return fleet.Claim{}, false, refusedError(err)
	}
	claim, err := s.read(ctx, stored)
	return claim, created, err
}

// Leave implements [fleet.Claims].
func (s *Store) Leave(ctx context.Context, was fleet.Claim) (fleet.Claim, error) {
	claim, _, err := s.move(ctx, ledger.Move{
		RequestID: ledger.RequestID(was.GrantID), From: was.Backend, Generation: was.Generation,
		To: was.Backend + leavingMark, Next: was.Generation,
	})
	return claim, err
}

// Move implements [fleet.Claims].
func (s *Store) Move(ctx context.Context, was fleet.Claim, to string, above, fence uint64) (fleet.Claim, bool, error) {
	return s.move(ctx, ledger.Move{
		RequestID: ledger.RequestID(was.GrantID), From: placeOf(was), Generation: was.Generation,
		To: to, Next: max(was.Generation, above) + 1, Fence: fence,
	})
}

// placeOf is how a claim's place is stored.
func placeOf(c fleet.Claim) string {
	if c.Leaving {
		return c.Backend + leavingMark
	}
	return c.Backend
}

func (s *Store) move(ctx context.Context, m ledger.Move) (fleet.Claim, bool, error) {
	err := s.ledger.MoveClaim(ctx, m)
	if err != nil && !errors.Is(err, ledger.ErrConflict) && !errors.Is(err, ledger.ErrClosed) {
		return fleet.Claim{}, false, refusedError(err)
	}
	claim, readErr := s.Get(ctx, backend.GrantID(m.RequestID))
	return claim, err == nil, readErr
}

// Refuse implements [fleet.Claims].
func (s *Store) Refuse(ctx context.Context, at fleet.Claim, fence uint64) (uint64, error) {
	return s.ledger.RefuseClaims(ctx, ledger.RequestID(at.GrantID), fence, placeOf(at), at.Generation)
}

// refusedError says in the fleet's words that a call came too late.
func refusedError(err error) error {
	if fenced, ok := errors.AsType[ledger.FencedError](err); ok {
		return fmt.Errorf("%w: %w", &fleet.RefusedError{Fence: fenced.Refused}, err)
	}
	return err
}

// Close implements [fleet.Claims].
func (s *Store) Close(ctx context.Context, id backend.GrantID, by string) error {
	if _, _, err := s.ledger.CloseGrant(ctx, ledger.Closure{RequestID: ledger.RequestID(id), Reason: closedByRouter, By: by}); err != nil {
		return fmt.Errorf("close grant: %w", err)
	}
	return nil
}
