package ledgertest_test

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

var _ worker.Ledger = (*ledgertest.Ledger)(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEveryMethodIsWatched(t *testing.T) {
	t.Parallel()
	plain, watched := reflect.TypeFor[*ledger.Ledger](), reflect.TypeFor[*ledgertest.Ledger]()
	for m := range plain.Methods() {
		if m.Name == "Close" {
			continue
		}
		w, ok := watched.MethodByName(m.Name)
		if !ok {
			t.Errorf("%s is not watched", m.Name)
			continue
		}
		for i := 1; i < max(m.Type.NumIn(), w.Type.NumIn()); i++ { // 0 is the receiver
			if m.Type.NumIn() != w.Type.NumIn() || m.Type.In(i) != w.Type.In(i) {
				t.Errorf("%s takes %s, want %s", m.Name, w.Type, m.Type)
				break
			}
		}
	}
}

var (
	one = ledger.RequestID{1}
	two = ledger.RequestID{2}
)

// calls are one call of each method for grant id, in an order in which each of
// them succeeds, with what is recorded of it. done tells whether the effect of
// a call that writes is there.
type step struct {
	want ledgertest.Call
	call func(context.Context, *ledgertest.Ledger) error
	done func(context.Context, *ledger.Ledger) bool
}

func last[T any](_ T, _ bool, err error) error { return err }

func second[T any](_ T, err error) error { return err }

func drain[T any](all func(func(T, error) bool)) error {
	var failed error
	for _, err := range all {
		failed = errors.Join(failed, err)
	}
	return failed
}

func steps(id ledger.RequestID) []step {
	type (
		ctxt  = context.Context
		seen  = *ledgertest.Ledger
		plain = *ledger.Ledger
	)
	return []step{
		{
			ledgertest.Call{Point: "ledger.PutClaim", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error {
				return last(l.PutClaim(ctx, ledger.Claim{RequestID: id, Backend: "a"}))
			},
			func(ctx ctxt, l plain) bool { _, err := l.Claim(ctx, id); return err == nil },
		},
		{
			ledgertest.Call{Point: "ledger.MoveClaim", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error {
				return l.MoveClaim(ctx, ledger.Move{RequestID: id, From: "a", Generation: 1, To: "b", Next: 2})
			},
			func(ctx ctxt, l plain) bool { c, err := l.Claim(ctx, id); return err == nil && c.Backend == "b" },
		},
		{
			ledgertest.Call{Point: "ledger.RefuseAttempts", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return second(l.RefuseAttempts(ctx, id, 1)) },
			func(ctx ctxt, l plain) bool { n, err := l.Refused(ctx, id); return err == nil && n == 1 },
		},
		{
			ledgertest.Call{Point: "ledger.RefuseClaims", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return second(l.RefuseClaims(ctx, id, 2, "b", 2)) },
			func(ctx ctxt, l plain) bool { n, err := l.Refused(ctx, id); return err == nil && n == 2 },
		},
		{
			ledgertest.Call{Point: "ledger.Refused", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Refused(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.SetSealedKey", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return last(l.SetSealedKey(ctx, id, []byte("k"), "p")) },
			func(ctx ctxt, l plain) bool { c, err := l.Claim(ctx, id); return err == nil && c.SealedKey != nil },
		},
		{
			ledgertest.Call{Point: "ledger.Claim", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Claim(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.LiveClaims"},
			func(ctx ctxt, l seen) error { return drain(l.LiveClaims(ctx, "")) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.BeginAttempt", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error {
				return last(l.BeginAttempt(ctx, id, [32]byte{}, func(uint32) (ledger.AttemptParams, error) { return ledger.AttemptParams{}, nil }))
			},
			func(ctx ctxt, l plain) bool { all, err := l.Attempts(ctx, id); return err == nil && len(all) == 1 },
		},
		{
			ledgertest.Call{Point: "ledger.OpenIntents"},
			func(ctx ctxt, l seen) error { return drain(l.OpenIntents(ctx)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.PutInstance", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error {
				return last(l.PutInstance(ctx, ledger.Instance{RequestID: id, Attempt: 1}))
			},
			func(ctx ctxt, l plain) bool { _, err := l.Instance(ctx, id); return err == nil },
		},
		{
			ledgertest.Call{Point: "ledger.Instance", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Instance(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.MarkGone", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return l.MarkGone(ctx, id, 1) },
			func(ctx ctxt, l plain) bool {
				all, err := l.Attempts(ctx, id)
				return err == nil && len(all) == 1 && !all[0].Open
			},
		},
		{
			ledgertest.Call{Point: "ledger.Attempts", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Attempts(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.CloseGrant", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return last(l.CloseGrant(ctx, ledger.Closure{RequestID: id})) },
			func(ctx ctxt, l plain) bool { _, err := l.Closure(ctx, id); return err == nil },
		},
		{
			ledgertest.Call{Point: "ledger.Closure", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Closure(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.PutInterim", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return l.PutInterim(ctx, ledger.Log{RequestID: id, Sequence: 1}) },
			func(ctx ctxt, l plain) bool { g, err := l.Log(ctx, id); return err == nil && !g.Final },
		},
		{
			ledgertest.Call{Point: "ledger.PutFinal", RequestID: id, Mutates: true},
			func(ctx ctxt, l seen) error { return last(l.PutFinal(ctx, ledger.Log{RequestID: id})) },
			func(ctx ctxt, l plain) bool { g, err := l.Log(ctx, id); return err == nil && g.Final },
		},
		{
			ledgertest.Call{Point: "ledger.Log", RequestID: id},
			func(ctx ctxt, l seen) error { return second(l.Log(ctx, id)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.Finals"},
			func(ctx ctxt, l seen) error { return second(l.Finals(ctx, ledger.Position{}, 9)) }, nil,
		},
		{
			ledgertest.Call{Point: "ledger.Check"},
			func(ctx ctxt, l seen) error { return l.Check(ctx) }, nil,
		},
	}
}

func TestCallsAreRecorded(t *testing.T) {
	t.Parallel()
	points := new(ledgertest.Points)
	l := ledgertest.New(ledgertest.Open(t), points)
	all, some := points.Record(), points.Record(two)
	var want, wantSome []ledgertest.Call
	for _, id := range []ledger.RequestID{one, two} {
		for _, s := range steps(id) {
			if err := s.call(t.Context(), l); err != nil {
				t.Fatalf("%s: %v", s.want.Point, err)
			}
			want = append(want, s.want)
			if s.want.RequestID == two {
				wantSome = append(wantSome, s.want)
			}
		}
	}
	if diff := cmp.Diff(want, all()); diff != "" {
		t.Errorf("recorded (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantSome, some()); diff != "" {
		t.Errorf("recorded for one grant (-want +got):\n%s", diff)
	}
}

// Every call is hit by every kind of fault, after the calls before it.
func TestEveryCallCanFail(t *testing.T) {
	t.Parallel()
	for _, kind := range ledgertest.Kinds() {
		for n, hit := range steps(one) {
			t.Run(string(kind)+"/"+hit.want.Point, func(t *testing.T) {
				t.Parallel()
				plain, points := ledgertest.Open(t), new(ledgertest.Points)
				l := ledgertest.New(plain, points)
				for _, s := range steps(one)[:n] {
					if err := s.call(t.Context(), l); err != nil {
						t.Fatalf("%s: %v", s.want.Point, err)
					}
				}
				crashed := 0
				fault := points.Inject(ledgertest.Fault{
					Point: hit.want.Point, RequestID: hit.want.RequestID, Kind: kind, Crash: func() { crashed++ },
				})
				failed := make(chan error, 1)
				go func() { failed <- hit.call(t.Context(), l) }()
				<-fault.Reached()
				wantEffect := true
				switch kind {
				case ledgertest.Slow:
					if hit.done != nil && hit.done(t.Context(), plain) {
						t.Error("it had its effect before it was released")
					}
					fault.Release()
					if err := <-failed; err != nil {
						t.Errorf("after the release: %v", err)
					}
				case ledgertest.Refuse, ledgertest.CrashBefore:
					wantEffect = false
					fallthrough
				default:
					if err := <-failed; !errors.Is(err, ledger.ErrUnavailable) {
						t.Errorf("the call that was hit: %v", err)
					}
				}
				if hit.done != nil && hit.done(t.Context(), plain) != wantEffect {
					t.Errorf("effect = %v, want %v", !wantEffect, wantEffect)
				}
				dead := kind == ledgertest.CrashBefore || kind == ledgertest.CrashAfter
				if (crashed == 1) != dead {
					t.Errorf("crashed %d times", crashed)
				}
				for _, s := range steps(two) {
					err := s.call(t.Context(), l)
					if dead != errors.Is(err, ledger.ErrUnavailable) || (!dead && err != nil) {
						t.Errorf("%s afterwards: %v", s.want.Point, err)
					}
				}
				if _, err := plain.Claim(t.Context(), two); dead != errors.Is(err, ledger.ErrNotFound) {
					t.Errorf("effect of a later call: %v", err)
				}
				// The next life finds everything as it was left.
				next := ledgertest.New(plain, points)
				if err := next.Check(t.Context()); err != nil {
					t.Errorf("next life: %v", err)
				}
			})
		}
	}
}

func TestFaultsHitTheCallsThatTheyName(t *testing.T) {
	t.Parallel()
	points := new(ledgertest.Points)
	l := ledgertest.New(ledgertest.Open(t), points)
	claim := func(id ledger.RequestID) bool {
		_, err := l.Claim(t.Context(), id)
		return errors.Is(err, ledger.ErrUnavailable)
	}
	expect := func(what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: hit %v, want %v", what, got, want)
		}
	}
	third := points.Inject(ledgertest.Fault{Point: "ledger.Claim", RequestID: one, Nth: 3, Kind: ledgertest.Refuse})
	expect("first", claim(one), false)
	expect("other grant", claim(two), false)
	expect("second", claim(one), false)
	if err := l.Check(t.Context()); err != nil {
		t.Errorf("other method: %v", err)
	}
	select {
	case <-third.Reached():
		t.Error("reached too early")
	default:
	}
	expect("third", claim(one), true)
	<-third.Reached()
	expect("fourth", claim(one), false)

	always := points.Inject(ledgertest.Fault{Nth: 2, Always: true, Kind: ledgertest.Refuse})
	expect("first of any", claim(one), false)
	expect("second of any", claim(two), true)
	if err := l.Check(t.Context()); !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("third of any: %v", err)
	}
	always.Release()
	always.Release()
	expect("after the release", claim(one), false)
}

func TestASlowCallEndsWithItsContextAndWithTheProcess(t *testing.T) {
	t.Parallel()
	points := new(ledgertest.Points)
	plain := ledgertest.Open(t)
	l := ledgertest.New(plain, points)
	points.Inject(ledgertest.Fault{Kind: ledgertest.Slow, Always: true})

	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, _, err := l.PutClaim(ctx, ledger.Claim{RequestID: one})
	if !errors.Is(err, ledger.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past its deadline: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, _, err = l.PutClaim(ctx, ledger.Claim{RequestID: one}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	failed := make(chan error)
	go func() { failed <- second(l.Claim(t.Context(), one)) }()
	l.Kill()
	if err := <-failed; !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("killed: %v", err)
	}
	if _, err := plain.Claim(t.Context(), one); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("there was an effect: %v", err)
	}
}

func TestAListingIsLostInTheMiddle(t *testing.T) {
	t.Parallel()
	points := new(ledgertest.Points)
	l := ledgertest.New(ledgertest.Open(t), points)
	for _, id := range []ledger.RequestID{one, two} {
		if _, _, err := l.PutClaim(t.Context(), ledger.Claim{RequestID: id}); err != nil {
			t.Fatal(err)
		}
	}
	points.Inject(ledgertest.Fault{Point: "ledger.LiveClaims", Kind: ledgertest.LoseAnswer})
	var seen []ledger.RequestID
	var failed error
	for c, err := range l.LiveClaims(t.Context(), "") {
		if failed = err; err == nil {
			seen = append(seen, c.RequestID)
		}
	}
	if !errors.Is(failed, ledger.ErrUnavailable) || len(seen) != 1 {
		t.Errorf("saw %d of 2, then %v", len(seen), failed)
	}
}
