package worker

import (
	"context"
	"iter"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// Ledger is what a runtime needs of a [ledger.Ledger], whose documentation says
// what the methods do. It is an interface so that tests can watch the calls and
// let them fail.
type Ledger interface {
	PutClaim(ctx context.Context, c ledger.Claim) (stored ledger.Claim, created bool, err error)
	Claim(ctx context.Context, id ledger.RequestID) (ledger.Claim, error)
	LiveClaims(ctx context.Context, backend string) iter.Seq2[ledger.Claim, error]

	BeginAttempt(ctx context.Context, id ledger.RequestID, contentHash [32]byte,
		render func(number uint32) (ledger.AttemptParams, error)) (a ledger.Attempt, created bool, err error)
	ResumeAttempt(ctx context.Context, id ledger.RequestID, number uint32) (ledger.Attempt, error)
	EndAttempt(ctx context.Context, e ledger.End) error
	MarkGone(ctx context.Context, id ledger.RequestID, number uint32) error
	Attempts(ctx context.Context, id ledger.RequestID) ([]ledger.Attempt, error)
	OpenIntents(ctx context.Context) iter.Seq2[ledger.Attempt, error]

	CloseGrant(ctx context.Context, c ledger.Closure) (stored ledger.Closure, created bool, err error)
	Closure(ctx context.Context, id ledger.RequestID) (ledger.Closure, error)

	Refused(ctx context.Context, id ledger.RequestID) (uint64, error)
	RefuseAttempts(ctx context.Context, id ledger.RequestID, fence uint64) (uint64, error)

	PutInterim(ctx context.Context, g ledger.Log) error
	PutFinal(ctx context.Context, g ledger.Log) (stored ledger.Log, created bool, err error)
	Log(ctx context.Context, id ledger.RequestID) (ledger.Log, error)
	Finals(ctx context.Context, after ledger.Position, limit int) ([]ledger.Log, error)

	PutInstance(ctx context.Context, i ledger.Instance) (stored ledger.Instance, created bool, err error)
	Instance(ctx context.Context, id ledger.RequestID) (ledger.Instance, error)

	Beat(ctx context.Context, backend, process string) error
	Leave(ctx context.Context, backend, process string) error
	LastBeat(ctx context.Context, backend, butProcess string) (time.Time, error)
}

var _ Ledger = (*ledger.Ledger)(nil)
