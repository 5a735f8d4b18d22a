package pgtest_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// site is a ledger behind a tap, and the same beside it.
type site struct {
	tap           *pgtest.Tap
	tapped, plain *ledger.Ledger
}

func newSite(t *testing.T) site {
	t.Helper()
	server := pgtest.Shared(t)
	dsn := server.Database(t)
	tap := pgtest.NewTap(t, server)
	open := func(dsn string) *ledger.Ledger {
		l, err := ledger.Open(t.Context(), ledger.Config{Driver: ledger.DriverPostgres, DSN: dsn})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
		return l
	}
	return site{tap, open(tap.DSN(dsn)), open(dsn)}
}

var one, two = ledger.RequestID{1}, ledger.RequestID{2}

func claim(id ledger.RequestID) ledger.Claim { return ledger.Claim{RequestID: id, Backend: "a"} }

func (s site) put(ctx context.Context, id ledger.RequestID) error {
	_, _, err := s.tapped.PutClaim(ctx, claim(id))
	return err
}

func (s site) has(t *testing.T, id ledger.RequestID) bool {
	t.Helper()
	_, err := s.plain.Claim(t.Context(), id)
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

// putPoints are the calls of a PutClaim.
func putPoints(id ledger.RequestID) []ledgertest.Call {
	return []ledgertest.Call{
		{Point: "ledger.LOCK", RequestID: id},
		{Point: "ledger.INSERT claims", RequestID: id, Mutates: true},
		{Point: "ledger.SELECT claims", RequestID: id},
		{Point: "ledger.COMMIT", RequestID: id, Mutates: true},
	}
}

func TestStatementsAreRecordedByGrant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for range 2 { // the second time, statements are prepared already
		all, some := s.tap.Record(), s.tap.Record(two)
		for _, id := range []ledger.RequestID{one, two} {
			if err := s.put(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.tapped.Closure(t.Context(), two); !errors.Is(err, ledger.ErrNotFound) {
			t.Fatal(err)
		}
		if err := s.tapped.MoveClaim(t.Context(), ledger.Move{RequestID: one, From: "a", Generation: 1, To: "a", Next: 1}); err != nil {
			t.Fatal(err)
		}
		for _, err := range s.tapped.LiveClaims(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
		}
		closure := ledgertest.Call{Point: "ledger.SELECT closures", RequestID: two}
		if diff := cmp.Diff(append(putPoints(two), closure), some()); diff != "" {
			t.Errorf("of one grant (-want +got):\n%s", diff)
		}
		begin := ledgertest.Call{Point: "ledger.BEGIN"}
		want := append([]ledgertest.Call{begin}, putPoints(one)...)
		want = append(append(append(want, begin), putPoints(two)...), closure, begin)
		got := all()
		if diff := cmp.Diff(want, got[:min(len(got), len(want))]); diff != "" {
			t.Errorf("of all (-want +got):\n%s", diff)
		}
		if last := got[len(got)-1]; last != (ledgertest.Call{Point: "ledger.SELECT claims"}) {
			t.Errorf("a listing is %+v", last)
		}
	}
}

func TestEveryStatementCanFail(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if err := s.put(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	n := byte(10)
	for _, kind := range ledgertest.Kinds() {
		for _, point := range putPoints(one) {
			n++
			id := ledger.RequestID{n}
			t.Run(fmt.Sprintf("%s/%s", kind, point.Point), func(t *testing.T) {
				crashed := make(chan struct{})
				fault := s.tap.Inject(ledgertest.Fault{Point: point.Point, RequestID: id, Kind: kind, Crash: func() { close(crashed) }})
				failed := make(chan error, 1)
				go func() { failed <- s.put(t.Context(), id) }()
				<-fault.Reached()
				if kind == ledgertest.Slow {
					if s.has(t, id) {
						t.Error("there is an effect already")
					}
					if err := s.put(t.Context(), two); err != nil {
						t.Errorf("another grant waits too: %v", err)
					}
					fault.Release()
					if err := <-failed; err != nil {
						t.Errorf("after the release: %v", err)
					}
					return
				}
				if err := <-failed; !errors.Is(err, ledger.ErrUnavailable) {
					t.Errorf("error = %v", err)
				}
				if kind == ledgertest.CrashBefore || kind == ledgertest.CrashAfter {
					<-crashed
				}
				after := kind == ledgertest.LoseAnswer || kind == ledgertest.CrashAfter
				if want := after && point.Point == "ledger.COMMIT"; s.has(t, id) != want {
					t.Errorf("effect = %v, want %v", !want, want)
				}
				if err := s.put(t.Context(), id); err != nil {
					t.Errorf("again: %v", err)
				}
			})
		}
	}
}

func TestAStatementIsSlowUntilItsCallerLeaves(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.tap.Inject(ledgertest.Fault{Point: "ledger.COMMIT", RequestID: one, Kind: ledgertest.Slow})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.put(ctx, one); !errors.Is(err, ledger.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v", err)
	}
	// The server still waits for the rest of the transaction, but not as long as
	// the next one waits for the grant.
	if err := s.put(t.Context(), one); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestConnectionsAreCutRefusedAndSwallowed(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for i := range 3 {
		if err := s.put(t.Context(), two); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		s.tap.Cut() // The next call makes a new connection.
	}
	s.tap.Refuse(true)
	s.tap.Cut()
	if err := s.put(t.Context(), one); !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("refused: %v", err)
	}
	s.tap.Refuse(false)
	if err := s.put(t.Context(), two); err != nil {
		t.Errorf("welcome again: %v", err)
	}
	s.tap.Blackhole(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.put(ctx, one); !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("swallowed: %v", err)
	}
	s.tap.Blackhole(false)
	s.tap.Delay(time.Millisecond)
	if err := s.put(t.Context(), two); err != nil {
		t.Errorf("through again: %v", err)
	}
}
