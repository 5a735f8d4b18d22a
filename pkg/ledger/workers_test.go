package ledger_test

import (
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

func TestWhoWorksIsKnownUntilItLeaves(t *testing.T) { both(t, testWhoWorksIsKnownUntilItLeaves) }

func testWhoWorksIsKnownUntilItLeaves(t *testing.T, s store) {
	l := s.open(t)
	last := func(backend string) time.Time {
		t.Helper()
		at, err := l.LastBeat(t.Context(), backend, "")
		must(t, err)
		return at
	}
	if at := last("metal"); !at.IsZero() {
		t.Fatalf("last beat of nobody: %v", at)
	}
	before := time.Now().Truncate(time.Microsecond)
	must(t, l.Beat(t.Context(), "metal", "a"))
	first := last("metal")
	if first.Before(before) || first.After(time.Now()) {
		t.Errorf("last beat is %v", first)
	}
	if at := last("cloud"); !at.IsZero() {
		t.Errorf("another backend's beat counts: %v", at)
	}
	must(t, l.Beat(t.Context(), "metal", "b"))
	must(t, l.Beat(t.Context(), "metal", "a")) // Again: one row each.
	must(t, l.Leave(t.Context(), "metal", "a"))
	must(t, l.Leave(t.Context(), "metal", "a"))
	// Another process, of the same file, sees the one that is left.
	other := s.open(t)
	if at, err := other.LastBeat(t.Context(), "metal", ""); err != nil || at.Before(first) {
		t.Errorf("after one has left: %v, %v", at, err)
	}
	must(t, other.Leave(t.Context(), "metal", "b"))
	if at := last("metal"); !at.IsZero() {
		t.Errorf("all have left: %v", at)
	}
}

// An attempt that another process has undone has no instance any more.
func TestNoInstanceOfAnAttemptThatIsGone(t *testing.T) { both(t, testNoInstanceOfAnAttemptThatIsGone) }

func testNoInstanceOfAnAttemptThatIsGone(t *testing.T, s store) {
	l := s.open(t)
	_, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)
	_, _, err = l.BeginAttempt(t.Context(), id(1), hash("content"), render("a"))
	must(t, err)
	must(t, l.MarkGone(t.Context(), id(1), 1))
	_, _, err = l.PutInstance(t.Context(), ledger.Instance{RequestID: id(1), Attempt: 1, Body: []byte("b")})
	wantErr(t, err, ledger.ErrConflict)
	_, err = l.Instance(t.Context(), id(1))
	wantErr(t, err, ledger.ErrNotFound)
}
