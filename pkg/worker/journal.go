package worker

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// journal is a [Journal] over the ledger.
type journal struct {
	ledger Ledger
	signer *signer
	now    func() time.Time
}

var _ Journal = (*journal)(nil)

// Begin implements [Journal].
func (j *journal) Begin(ctx context.Context, id backend.GrantID, placement string, params []byte) (Attempt, error) {
	claim, err := j.ledger.Claim(ctx, ledger.RequestID(id))
	if err != nil {
		return Attempt{}, ledgerError(err, "begin attempt")
	}
	a, created, err := j.ledger.BeginAttempt(ctx, ledger.RequestID(id), claim.ContentHash, func(uint32) (ledger.AttemptParams, error) {
		return ledger.AttemptParams{Params: params, Placement: placement, Fence: backend.FenceFrom(ctx)}, nil
	})
	if err != nil {
		return Attempt{}, ledgerError(err, "begin attempt")
	}
	begun := attemptOf(a)
	begun.New = created
	return begun, nil
}

// Check implements [Journal].
func (j *journal) Check(ctx context.Context, id backend.GrantID) error {
	_, err := j.ledger.Closure(ctx, ledger.RequestID(id))
	switch {
	case err == nil:
		return ended(id)
	case errors.Is(err, ledger.ErrNotFound):
		return nil
	}
	return ledgerError(err, "check for closure")
}

// Resume implements [Journal].
func (j *journal) Resume(ctx context.Context, id backend.GrantID, attempt uint32) (Attempt, error) {
	a, err := j.ledger.ResumeAttempt(ctx, ledger.RequestID(id), attempt)
	switch {
	case errors.Is(err, ledger.ErrConflict):
		return Attempt{}, backenderr.Wrap(backenderr.OperationInProgress, err, "resume attempt").WithRetryAfter(otherRetry)
	case err != nil:
		return Attempt{}, ledgerError(err, "resume attempt")
	}
	return attemptOf(a), nil
}

// End implements [Journal].
func (j *journal) End(ctx context.Context, a Attempt) error {
	return j.end(ctx, a, false)
}

// end is End, which may be for an attempt only that nobody was told of.
func (j *journal) end(ctx context.Context, a Attempt, unanswered bool) error {
	err := j.ledger.EndAttempt(ctx, ledger.End{
		RequestID: ledger.RequestID(a.GrantID), Number: a.Number, ResumedAt: a.ResumedAt, Unanswered: unanswered,
	})
	if errors.Is(err, ledger.ErrConflict) {
		return backenderr.Wrap(backenderr.OtherReplica, err, "end attempt").WithRetryAfter(otherRetry)
	}
	return ledgerError(err, "end attempt")
}

// otherRetry is when a caller may ask again for what another replica is at.
const otherRetry = time.Second

// Gone implements [Journal].
func (j *journal) Gone(ctx context.Context, id backend.GrantID, attempt uint32) error {
	return ledgerError(j.ledger.MarkGone(ctx, ledger.RequestID(id), attempt), "record that attempt is gone")
}

// Attempts implements [Journal].
func (j *journal) Attempts(ctx context.Context, id backend.GrantID) ([]Attempt, error) {
	all, err := j.ledger.Attempts(ctx, ledger.RequestID(id))
	if err != nil {
		return nil, ledgerError(err, "read attempts")
	}
	out := make([]Attempt, len(all))
	for i, a := range all {
		out[i] = attemptOf(a)
	}
	return out, nil
}

// Open implements [Journal].
func (j *journal) Open(ctx context.Context) ([]Attempt, error) {
	var out []Attempt
	for a, err := range j.ledger.OpenIntents(ctx) {
		if err != nil {
			return nil, ledgerError(err, "read open attempts")
		}
		out = append(out, attemptOf(a))
	}
	return out, nil
}

func attemptOf(a ledger.Attempt) Attempt {
	return Attempt{
		GrantID: backend.GrantID(a.RequestID), Number: a.Number, Placement: a.Placement, Params: a.Params,
		BeganAt: a.CreatedAt, ResumedAt: a.ResumedAt, Ending: !a.EndingAt.IsZero(), Gone: !a.Open,
	}
}

// SaveLog implements [Journal].
func (j *journal) SaveLog(ctx context.Context, log backend.ComputeLog) error {
	log.Final = false
	sequence := rank(log, j.now())
	log.Sequence = 1
	signed, err := j.signer.sign(log)
	if err != nil {
		return err
	}
	body, err := marshalSigned(signed)
	if err != nil {
		return err
	}
	err = j.ledger.PutInterim(ctx, ledger.Log{RequestID: ledger.RequestID(log.GrantID), Sequence: sequence, Body: body, KeyID: signed.KeyID})
	if errors.Is(err, ledger.ErrStale) {
		return nil // the stored one says more
	}
	return ledgerError(err, "save compute log")
}

// rank orders the interim logs of a grant: that of a later attempt says more,
// then a full one, then a later one (the time grows across restarts without
// being stored). The ledger compares ranks as it stores a log, so that two
// processes that end one grant, a worker and the janitor, keep the best one
// although neither sees what the other has read.
func rank(log backend.ComputeLog, now time.Time) uint64 {
	const timeBits, attemptBits = 53, 9 // 63 in all: the ledger's numbers are signed
	out := uint64(min(log.Attempt, 1<<attemptBits-1)) << (timeBits + 1)
	if !log.Partial {
		out |= 1 << timeBits
	}
	return out | uint64(max(1, now.UnixMicro()))
}

// SavedLog implements [Journal].
func (j *journal) SavedLog(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	signed, err := readLog(ctx, j.ledger, id)
	if err != nil || signed == nil {
		return nil, err
	}
	return &signed.Log, nil
}

// readLog returns the final log of a grant, else the interim one, else nil.
func readLog(ctx context.Context, l Ledger, id backend.GrantID) (*backend.SignedLog, error) {
	stored, err := l.Log(ctx, ledger.RequestID(id))
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return nil, nil //nolint:nilnil // no log is an answer
	case err != nil:
		return nil, ledgerError(err, "read compute log")
	}
	return unmarshalSigned(stored.Body)
}

func marshalSigned(log *backend.SignedLog) ([]byte, error) {
	body, err := proto.Marshal(backendgrpc.SignedLogToProto(log))
	if err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "marshal compute log")
	}
	return body, nil
}

func unmarshalSigned(body []byte) (*backend.SignedLog, error) {
	var p bridgev1.SignedComputeLog
	if err := proto.Unmarshal(body, &p); err != nil {
		return nil, backenderr.Wrap(backenderr.LedgerUnavailable, err, "compute log in the ledger is damaged")
	}
	return backendgrpc.SignedLogFromProto(&p), nil
}

// ledgerError classifies an error of the ledger, nil to nil.
func ledgerError(err error, what string) error {
	var late ledger.FencedError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &late):
		return backenderr.Wrap(backenderr.OperationInProgress, err, "%s", what)
	case errors.Is(err, ledger.ErrClosed):
		return backenderr.Wrap(backenderr.GrantEnded, err, "%s", what)
	case errors.Is(err, context.Canceled):
		return backenderr.Wrap(backenderr.Cancelled, err, "%s", what)
	case errors.Is(err, context.DeadlineExceeded):
		return backenderr.Wrap(backenderr.DeadlineExceeded, err, "%s", what)
	case errors.Is(err, ledger.ErrUnavailable):
		return backenderr.Wrap(backenderr.LedgerUnavailable, err, "%s", what).WithRetryAfter(ledgerRetry)
	}
	return backenderr.Wrap(backenderr.Internal, err, "%s", what)
}

// ledgerRetry is when a caller may try again after the ledger failed.
const ledgerRetry = 5 * time.Second

// ended says that a grant is closed. What it left may still be there.
func ended(id backend.GrantID) *backenderr.Error {
	return backenderr.New(backenderr.GrantEnded, "grant %s has ended and never runs again", id)
}
