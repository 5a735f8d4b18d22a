package ledgertest

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// Ledger is a [ledger.Ledger] as one life of a process sees it. It has all the
// methods of the real one but Close: who opened the real one closes it.
type Ledger struct {
	real   *ledger.Ledger
	points *Points

	kill sync.Once
	dead chan struct{}
}

// New returns l as a process sees it that is alive. Its calls pass p.
func New(l *ledger.Ledger, p *Points) *Ledger {
	return &Ledger{real: l, points: p, dead: make(chan struct{})}
}

// Kill makes the process dead: every later call, and every one that a fault
// holds, fails without effect. What is under way at the real ledger may still
// have its effect, as with a process that is killed. The next life is another
// [New].
func (l *Ledger) Kill() { l.kill.Do(func() { close(l.dead) }) }

func (l *Ledger) isDead() bool {
	select {
	case <-l.dead:
		return true
	default:
		return false
	}
}

// failure is the error of a call that a fault hit, or that came after the death.
func failure(c Call, what string) error {
	return fmt.Errorf("%s: %w: %s (injected)", c.Point, ledger.ErrUnavailable, what)
}

const afterDeath = "the process is dead"

// before is the part of a fault that comes before the effect. It returns an
// error if the call must not be made.
func (l *Ledger) before(ctx context.Context, c Call) (*Injection, error) {
	if l.isDead() {
		return nil, failure(c, afterDeath)
	}
	hit := l.points.Reach(c)
	if hit == nil {
		return nil, nil //nolint:nilnil // no fault is an answer
	}
	switch hit.fault.Kind {
	case Refuse:
		return nil, failure(c, "refused")
	case Slow:
		select {
		case <-hit.Released():
		case <-ctx.Done(): // the real ledger says what that means
		case <-l.dead:
			return nil, failure(c, afterDeath)
		}
	case CrashBefore:
		if hit.crash(l.Kill) {
			return nil, failure(c, afterDeath)
		}
	case LoseAnswer, CrashAfter:
	default:
		panic(fmt.Sprintf("ledgertest: unknown kind of fault %q", hit.fault.Kind))
	}
	return hit, nil
}

// after is the part that comes after the effect.
func (l *Ledger) after(c Call, hit *Injection) error {
	if hit == nil {
		return nil
	}
	switch hit.fault.Kind { //nolint:exhaustive // the others are done
	case LoseAnswer:
		return failure(c, "answer lost")
	case CrashAfter:
		if hit.crash(l.Kill) {
			return failure(c, afterDeath)
		}
	}
	return nil
}

func one[T any](ctx context.Context, l *Ledger, c Call, do func() (T, error)) (T, error) {
	var zero T
	hit, err := l.before(ctx, c)
	if err != nil {
		return zero, err
	}
	value, err := do()
	if lost := l.after(c, hit); lost != nil {
		return zero, lost
	}
	return value, err
}

func none(ctx context.Context, l *Ledger, c Call, do func() error) error {
	_, err := one(ctx, l, c, func() (struct{}, error) { return struct{}{}, do() })
	return err
}

func put[T any](ctx context.Context, l *Ledger, c Call, do func() (T, bool, error)) (T, bool, error) {
	type answer struct {
		stored  T
		created bool
	}
	a, err := one(ctx, l, c, func() (answer, error) {
		stored, created, err := do()
		return answer{stored, created}, err
	})
	return a.stored, a.created, err
}

func sequence[T any](ctx context.Context, l *Ledger, c Call, all iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		hit, err := l.before(ctx, c)
		if err != nil {
			yield(zero, err)
			return
		}
		losing := hit != nil && hit.fault.Kind == LoseAnswer
		for value, err := range all {
			if l.isDead() {
				yield(zero, failure(c, afterDeath))
				return
			}
			if !yield(value, err) {
				return
			}
			if losing {
				break
			}
		}
		if err := l.after(c, hit); err != nil {
			yield(zero, err)
		}
	}
}

func read(method string, id ledger.RequestID) Call {
	return Call{Point: "ledger." + method, RequestID: id}
}

func write(method string, id ledger.RequestID) Call {
	return Call{Point: "ledger." + method, RequestID: id, Mutates: true}
}

// PutClaim is [ledger.Ledger.PutClaim].
func (l *Ledger) PutClaim(ctx context.Context, c ledger.Claim) (stored ledger.Claim, created bool, err error) {
	return put(ctx, l, write("PutClaim", c.RequestID), func() (ledger.Claim, bool, error) { return l.real.PutClaim(ctx, c) })
}

// Claim is [ledger.Ledger.Claim].
func (l *Ledger) Claim(ctx context.Context, id ledger.RequestID) (ledger.Claim, error) {
	return one(ctx, l, read("Claim", id), func() (ledger.Claim, error) { return l.real.Claim(ctx, id) })
}

// MoveClaim is [ledger.Ledger.MoveClaim].
func (l *Ledger) MoveClaim(ctx context.Context, m ledger.Move) error {
	return none(ctx, l, write("MoveClaim", m.RequestID), func() error { return l.real.MoveClaim(ctx, m) })
}

// Refused is [ledger.Ledger.Refused].
func (l *Ledger) Refused(ctx context.Context, id ledger.RequestID) (uint64, error) {
	return one(ctx, l, read("Refused", id), func() (uint64, error) { return l.real.Refused(ctx, id) })
}

// RefuseAttempts is [ledger.Ledger.RefuseAttempts].
func (l *Ledger) RefuseAttempts(ctx context.Context, id ledger.RequestID, fence uint64) (uint64, error) {
	return one(ctx, l, write("RefuseAttempts", id), func() (uint64, error) { return l.real.RefuseAttempts(ctx, id, fence) })
}

// RefuseClaims is [ledger.Ledger.RefuseClaims].
func (l *Ledger) RefuseClaims(ctx context.Context, id ledger.RequestID, fence uint64, backend string, generation uint64) (uint64, error) {
	return one(ctx, l, write("RefuseClaims", id), func() (uint64, error) { return l.real.RefuseClaims(ctx, id, fence, backend, generation) })
}

// SetSealedKey is [ledger.Ledger.SetSealedKey].
func (l *Ledger) SetSealedKey(ctx context.Context, id ledger.RequestID, sealed []byte, loginPublicKey string) (stored ledger.Claim, created bool, err error) {
	return put(ctx, l, write("SetSealedKey", id), func() (ledger.Claim, bool, error) {
		return l.real.SetSealedKey(ctx, id, sealed, loginPublicKey)
	})
}

// LiveClaims is [ledger.Ledger.LiveClaims].
func (l *Ledger) LiveClaims(ctx context.Context, backend string) iter.Seq2[ledger.Claim, error] {
	return sequence(ctx, l, read("LiveClaims", ledger.RequestID{}), l.real.LiveClaims(ctx, backend))
}

// BeginAttempt is [ledger.Ledger.BeginAttempt].
func (l *Ledger) BeginAttempt(ctx context.Context, id ledger.RequestID, contentHash [32]byte,
	render func(number uint32) (ledger.AttemptParams, error),
) (a ledger.Attempt, created bool, err error) {
	return put(ctx, l, write("BeginAttempt", id), func() (ledger.Attempt, bool, error) {
		return l.real.BeginAttempt(ctx, id, contentHash, render)
	})
}

// MarkGone is [ledger.Ledger.MarkGone].
func (l *Ledger) MarkGone(ctx context.Context, id ledger.RequestID, number uint32) error {
	return none(ctx, l, write("MarkGone", id), func() error { return l.real.MarkGone(ctx, id, number) })
}

// ResumeAttempt is [ledger.Ledger.ResumeAttempt].
func (l *Ledger) ResumeAttempt(ctx context.Context, id ledger.RequestID, number uint32) (ledger.Attempt, error) {
	return one(ctx, l, write("ResumeAttempt", id), func() (ledger.Attempt, error) { return l.real.ResumeAttempt(ctx, id, number) })
}

// EndAttempt is [ledger.Ledger.EndAttempt].
func (l *Ledger) EndAttempt(ctx context.Context, e ledger.End) error {
	return none(ctx, l, write("EndAttempt", e.RequestID), func() error { return l.real.EndAttempt(ctx, e) })
}

// Attempts is [ledger.Ledger.Attempts].
func (l *Ledger) Attempts(ctx context.Context, id ledger.RequestID) ([]ledger.Attempt, error) {
	return one(ctx, l, read("Attempts", id), func() ([]ledger.Attempt, error) { return l.real.Attempts(ctx, id) })
}

// OpenIntents is [ledger.Ledger.OpenIntents].
func (l *Ledger) OpenIntents(ctx context.Context) iter.Seq2[ledger.Attempt, error] {
	return sequence(ctx, l, read("OpenIntents", ledger.RequestID{}), l.real.OpenIntents(ctx))
}

// CloseGrant is [ledger.Ledger.CloseGrant].
func (l *Ledger) CloseGrant(ctx context.Context, c ledger.Closure) (stored ledger.Closure, created bool, err error) {
	return put(ctx, l, write("CloseGrant", c.RequestID), func() (ledger.Closure, bool, error) { return l.real.CloseGrant(ctx, c) })
}

// Closure is [ledger.Ledger.Closure].
func (l *Ledger) Closure(ctx context.Context, id ledger.RequestID) (ledger.Closure, error) {
	return one(ctx, l, read("Closure", id), func() (ledger.Closure, error) { return l.real.Closure(ctx, id) })
}

// PutInterim is [ledger.Ledger.PutInterim].
func (l *Ledger) PutInterim(ctx context.Context, g ledger.Log) error {
	return none(ctx, l, write("PutInterim", g.RequestID), func() error { return l.real.PutInterim(ctx, g) })
}

// PutFinal is [ledger.Ledger.PutFinal].
func (l *Ledger) PutFinal(ctx context.Context, g ledger.Log) (stored ledger.Log, created bool, err error) {
	return put(ctx, l, write("PutFinal", g.RequestID), func() (ledger.Log, bool, error) { return l.real.PutFinal(ctx, g) })
}

// Log is [ledger.Ledger.Log].
func (l *Ledger) Log(ctx context.Context, id ledger.RequestID) (ledger.Log, error) {
	return one(ctx, l, read("Log", id), func() (ledger.Log, error) { return l.real.Log(ctx, id) })
}

// Finals is [ledger.Ledger.Finals].
func (l *Ledger) Finals(ctx context.Context, after ledger.Position, limit int) ([]ledger.Log, error) {
	return one(ctx, l, read("Finals", ledger.RequestID{}), func() ([]ledger.Log, error) { return l.real.Finals(ctx, after, limit) })
}

// PutInstance is [ledger.Ledger.PutInstance].
func (l *Ledger) PutInstance(ctx context.Context, i ledger.Instance) (stored ledger.Instance, created bool, err error) {
	return put(ctx, l, write("PutInstance", i.RequestID), func() (ledger.Instance, bool, error) { return l.real.PutInstance(ctx, i) })
}

// Instance is [ledger.Ledger.Instance].
func (l *Ledger) Instance(ctx context.Context, id ledger.RequestID) (ledger.Instance, error) {
	return one(ctx, l, read("Instance", id), func() (ledger.Instance, error) { return l.real.Instance(ctx, id) })
}

// Check is [ledger.Ledger.Check].
func (l *Ledger) Check(ctx context.Context) error {
	return none(ctx, l, read("Check", ledger.RequestID{}), func() error { return l.real.Check(ctx) })
}

// Beat is [ledger.Ledger.Beat].
func (l *Ledger) Beat(ctx context.Context, backend, process string) error {
	return none(ctx, l, write("Beat", ledger.RequestID{}), func() error { return l.real.Beat(ctx, backend, process) })
}

// Leave is [ledger.Ledger.Leave].
func (l *Ledger) Leave(ctx context.Context, backend, process string) error {
	return none(ctx, l, write("Leave", ledger.RequestID{}), func() error { return l.real.Leave(ctx, backend, process) })
}

// LastBeat is [ledger.Ledger.LastBeat].
func (l *Ledger) LastBeat(ctx context.Context, backend, butProcess string) (time.Time, error) {
	return one(ctx, l, read("LastBeat", ledger.RequestID{}), func() (time.Time, error) { return l.real.LastBeat(ctx, backend, butProcess) })
}
