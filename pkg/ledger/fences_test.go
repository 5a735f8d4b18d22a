package ledger_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// moveClaim moves a claim from where it is at the moment, if that is from, to
// the next generation.
func moveClaim(t *testing.T, l *ledger.Ledger, id ledger.RequestID, from, to string) error {
	t.Helper()
	c, err := l.Claim(t.Context(), id)
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		t.Fatal(err)
	}
	return l.MoveClaim(t.Context(), ledger.Move{RequestID: id, From: from, Generation: c.Generation, To: to, Next: c.Generation + 1})
}

func wantFenced(t *testing.T, err error, refused uint64) {
	t.Helper()
	var fenced ledger.FencedError
	if !errors.As(err, &fenced) || fenced.Refused != refused {
		t.Fatalf("error = %v, want that calls up to fence %d were refused", err, refused)
	}
}

func refuse(t *testing.T, l *ledger.Ledger, fence, want uint64) {
	t.Helper()
	got, err := l.RefuseAttempts(t.Context(), id(1), fence)
	must(t, err)
	if got != want {
		t.Fatalf("refused up to %d, want %d", got, want)
	}
}

func TestARefusedCallNeverBeginsAnything(t *testing.T) { both(t, testARefusedCallNeverBeginsAnything) }

func testARefusedCallNeverBeginsAnything(t *testing.T, s store) {
	l := s.open(t)
	refuse(t, l, 2, 2)
	refuse(t, l, 1, 2) // It never shrinks.
	c := aClaim(1)
	c.Fence = 2
	_, _, err := l.PutClaim(t.Context(), c)
	wantFenced(t, err, 2)
	if _, err := l.Claim(t.Context(), id(1)); !errors.Is(err, ledger.ErrNotFound) {
		t.Fatalf("a refused call left a claim: %v", err)
	}
	c.Fence = 3
	_, created, err := l.PutClaim(t.Context(), c)
	if err != nil || !created {
		t.Fatalf("PutClaim with a fresh fence = %v, %v", created, err)
	}
	for _, fence := range []uint64{1, 2} {
		_, _, err = l.BeginAttempt(t.Context(), id(1), hash("content"), func(uint32) (ledger.AttemptParams, error) {
			return ledger.AttemptParams{Fence: fence}, nil
		})
		wantFenced(t, err, 2)
	}
	begin := func(fence uint64) ledger.Attempt {
		a, created, err := l.BeginAttempt(t.Context(), id(1), hash("content"), func(uint32) (ledger.AttemptParams, error) {
			return ledger.AttemptParams{Fence: fence}, nil
		})
		if err != nil || !created {
			t.Fatalf("BeginAttempt with fence %d = %v, %v", fence, created, err)
		}
		return a
	}
	a := begin(3)
	// What may make something yet can't be refused.
	_, err = l.RefuseAttempts(t.Context(), id(1), 3)
	wantErr(t, err, ledger.ErrConflict)
	must(t, l.MarkGone(t.Context(), id(1), a.Number))
	refuse(t, l, 3, 3)
	begin(0) // No fence is checked nowhere.
}

func TestAClaimIsRefusedWhereItIs(t *testing.T) { both(t, testAClaimIsRefusedWhereItIs) }

func testAClaimIsRefusedWhereItIs(t *testing.T, s store) {
	l := s.open(t)
	refuse := func(fence uint64, backend string, generation uint64) error {
		_, err := l.RefuseClaims(t.Context(), id(1), fence, backend, generation)
		return err
	}
	move := func(generation uint64, to string, next, fence uint64) error {
		return l.MoveClaim(t.Context(), ledger.Move{RequestID: id(1), From: "metal", Generation: generation, To: to, Next: next, Fence: fence})
	}
	must(t, refuse(1, "", 0))
	c := aClaim(1)
	c.Fence = 1
	_, _, err := l.PutClaim(t.Context(), c)
	wantFenced(t, err, 1)
	c.Fence = 2
	_, _, err = l.PutClaim(t.Context(), c)
	must(t, err)
	wantErr(t, refuse(2, "", 0), ledger.ErrConflict)
	wantErr(t, refuse(2, "metal", 2), ledger.ErrConflict)
	wantErr(t, refuse(2, "cloud", 1), ledger.ErrConflict)
	wantErr(t, move(2, "cloud", 3, 2), ledger.ErrConflict)
	wantErr(t, move(1, "cloud", 0, 2), ledger.ErrConflict)
	must(t, move(1, "metal", 5, 2))
	must(t, refuse(2, "metal", 5))
	wantFenced(t, move(5, "cloud", 6, 2), 2)
	must(t, move(5, "cloud", 6, 3))
	stored, err := l.Claim(t.Context(), id(1))
	must(t, err)
	if stored.Backend != "cloud" || stored.Generation != 6 {
		t.Errorf("the claim is with %q, generation %d", stored.Backend, stored.Generation)
	}
	if n, err := l.Refused(t.Context(), id(1)); n != 2 || err != nil {
		t.Errorf("Refused = %d, %v", n, err)
	}
	if n, err := l.Refused(t.Context(), id(2)); n != 0 || err != nil {
		t.Errorf("Refused of a grant that was never seen = %d, %v", n, err)
	}
	wantErr(t, refuse(0, "cloud", 6), ledger.ErrConflict)
}

// Of a call that begins an attempt and one that refuses it, one comes first:
// they never both succeed.
func TestARefusalAndAnAttemptExcludeEachOther(t *testing.T) {
	both(t, testARefusalAndAnAttemptExcludeEachOther)
}

func testARefusalAndAnAttemptExcludeEachOther(t *testing.T, s store) {
	l, other := s.open(t), s.open(t)
	for n := 1; n <= 30; n++ {
		_, _, err := l.PutClaim(t.Context(), aClaim(n))
		must(t, err)
		var wg sync.WaitGroup
		var begun, refused bool
		wg.Go(func() {
			_, begun, _ = l.BeginAttempt(t.Context(), id(n), hash("content"), func(uint32) (ledger.AttemptParams, error) {
				return ledger.AttemptParams{Fence: 1}, nil
			})
		})
		wg.Go(func() {
			_, err := other.RefuseAttempts(t.Context(), id(n), 1)
			refused = err == nil
		})
		wg.Wait()
		if begun == refused {
			t.Fatalf("grant %d: begun %v, refused %v", n, begun, refused)
		}
	}
}
