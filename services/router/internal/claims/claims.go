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
	MoveClaim(ctx context.Context, id ledger.RequestID, from, to string) error
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
	claim := fleet.Claim{GrantID: backend.GrantID(c.RequestID), Owner: c.Owner, Content: c.ContentHash, ValidTo: c.ValidTo}
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
func (s *Store) Put(ctx context.Context, c fleet.Claim) (fleet.Claim, bool, error) {
	stored, created, err := s.ledger.PutClaim(ctx, ledger.Claim{
		RequestID: ledger.RequestID(c.GrantID), Backend: c.Backend, Owner: c.Owner, ContentHash: c.Content, ValidTo: c.ValidTo,
	})
	if err != nil {
		return fleet.Claim{}, false, err
	}
	claim, err := s.read(ctx, stored)
	return claim, created, err
}

// Leave implements [fleet.Claims].
func (s *Store) Leave(ctx context.Context, id backend.GrantID, from string) (fleet.Claim, error) {
	return s.move(ctx, id, from, from+leavingMark)
}

// Move implements [fleet.Claims].
func (s *Store) Move(ctx context.Context, was fleet.Claim, to string) (fleet.Claim, error) {
	from := was.Backend
	if was.Leaving {
		from += leavingMark
	}
	return s.move(ctx, was.GrantID, from, to)
}

func (s *Store) move(ctx context.Context, id backend.GrantID, from, to string) (fleet.Claim, error) {
	err := s.ledger.MoveClaim(ctx, ledger.RequestID(id), from, to)
	if err != nil && !errors.Is(err, ledger.ErrConflict) && !errors.Is(err, ledger.ErrClosed) {
		return fleet.Claim{}, err
	}
	return s.Get(ctx, id)
}

// Close implements [fleet.Claims].
func (s *Store) Close(ctx context.Context, id backend.GrantID, by string) error {
	if _, _, err := s.ledger.CloseGrant(ctx, ledger.Closure{RequestID: ledger.RequestID(id), Reason: closedByRouter, By: by}); err != nil {
		return fmt.Errorf("close grant: %w", err)
	}
	return nil
}
