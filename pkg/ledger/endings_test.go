package ledger_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// begun begins attempts of several grants.
func begun(t *testing.T, l *ledger.Ledger, ids ...ledger.RequestID) {
	t.Helper()
	for _, id := range ids {
		_, _, err := l.BeginAttempt(t.Context(), id, hash("content"), render("a"))
		must(t, err)
	}
}

func TestExactlyOneOfResumingAndEndingWins(t *testing.T) {
	both(t, testExactlyOneOfResumingAndEndingWins)
}

func testExactlyOneOfResumingAndEndingWins(t *testing.T, s store) {
	one, other := s.open(t), s.open(t)
	for n := range 20 {
		begun(t, one, id(n))
		var resumed, ended error
		var both sync.WaitGroup
		both.Go(func() { _, resumed = one.ResumeAttempt(t.Context(), id(n), 1) })
		both.Go(func() { ended = other.EndAttempt(t.Context(), ledger.End{RequestID: id(n), Number: 1}) })
		both.Wait()
		if (resumed == nil) == (ended == nil) {
			t.Fatalf("resuming: %v, ending: %v", resumed, ended)
		}
		wantErr(t, errors.Join(resumed, ended), ledger.ErrConflict)
		all, err := one.Attempts(t.Context(), id(n))
		if err != nil || all[0].ResumedAt.IsZero() == (resumed == nil) || all[0].EndingAt.IsZero() == (ended == nil) {
			t.Fatalf("%+v, %v; resuming: %v, ending: %v", all, err, resumed, ended)
		}
	}
}

func TestWhoEndsAnAttemptKnowsWhoIsAtIt(t *testing.T) { both(t, testWhoEndsAnAttemptKnowsWhoIsAtIt) }

func testWhoEndsAnAttemptKnowsWhoIsAtIt(t *testing.T, s store) {
	l := s.open(t)
	begun(t, l, id(1))
	end := ledger.End{RequestID: id(1), Number: 1}
	first, err := l.ResumeAttempt(t.Context(), id(1), 1)
	must(t, err)
	second, err := l.ResumeAttempt(t.Context(), id(1), 1)
	must(t, err)
	if !second.ResumedAt.After(first.ResumedAt) || !second.Open {
		t.Errorf("resumed at %v, again: %+v", first.ResumedAt, second)
	}
	wantErr(t, l.EndAttempt(t.Context(), end), ledger.ErrConflict)
	end.ResumedAt = first.ResumedAt
	wantErr(t, l.EndAttempt(t.Context(), end), ledger.ErrConflict)
	end.ResumedAt = second.ResumedAt
	must(t, l.EndAttempt(t.Context(), end))
	must(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(1), Number: 1})) // Anyone finishes it.
	_, err = l.ResumeAttempt(t.Context(), id(1), 1)
	wantErr(t, err, ledger.ErrConflict)
	_, _, err = l.PutInstance(t.Context(), ledger.Instance{RequestID: id(1), Attempt: 1, Body: []byte("b")})
	wantErr(t, err, ledger.ErrConflict)
	a, created, err := l.BeginAttempt(t.Context(), id(1), hash("content"), render("a"))
	if err != nil || created || a.EndingAt.IsZero() || !a.ResumedAt.Equal(second.ResumedAt) {
		t.Errorf("%+v, %t, %v; want the attempt that is being ended", a, created, err)
	}
	must(t, l.MarkGone(t.Context(), id(1), 1))
	must(t, l.EndAttempt(t.Context(), end))
	_, err = l.ResumeAttempt(t.Context(), id(1), 1)
	wantErr(t, err, ledger.ErrConflict)
	_, err = l.ResumeAttempt(t.Context(), id(1), 2)
	wantErr(t, err, ledger.ErrNotFound)
	wantErr(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(1), Number: 2}), ledger.ErrNotFound)
}

func TestAnAttemptThatWasAnsweredWithIsNoOrphan(t *testing.T) {
	both(t, testAnAttemptThatWasAnsweredWithIsNoOrphan)
}

func testAnAttemptThatWasAnsweredWithIsNoOrphan(t *testing.T, s store) {
	l := s.open(t)
	begun(t, l, id(1), id(2))
	_, _, err := l.PutInstance(t.Context(), ledger.Instance{RequestID: id(1), Attempt: 1, Body: []byte("b")})
	must(t, err)
	wantErr(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(1), Number: 1, Unanswered: true}), ledger.ErrConflict)
	must(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(1), Number: 1}))
	must(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(2), Number: 1, Unanswered: true}))
}

func TestAnAttemptOfAClosedGrantIsEverybodysToEnd(t *testing.T) {
	both(t, testAnAttemptOfAClosedGrantIsEverybodysToEnd)
}

func testAnAttemptOfAClosedGrantIsEverybodysToEnd(t *testing.T, s store) {
	l := s.open(t)
	begun(t, l, id(1))
	_, err := l.ResumeAttempt(t.Context(), id(1), 1)
	must(t, err)
	_, _, err = l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(1), Reason: "TERMINATED", By: "alice"})
	must(t, err)
	_, err = l.ResumeAttempt(t.Context(), id(1), 1)
	wantErr(t, err, ledger.ErrClosed)
	must(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(1), Number: 1, Unanswered: true}))
}

func TestAnEndThatWasBegunStays(t *testing.T) { both(t, testAnEndThatWasBegunStays) }

func testAnEndThatWasBegunStays(t *testing.T, s store) {
	l := s.open(t)
	begun(t, l, id(1), id(2))
	a, err := l.ResumeAttempt(t.Context(), id(1), 1)
	must(t, err)
	must(t, l.EndAttempt(t.Context(), ledger.End{RequestID: id(2), Number: 1}))
	for what, statement := range map[string]string{
		"resumed earlier":    `UPDATE intents SET resumed_at = resumed_at - 1 WHERE resumed_at IS NOT NULL`,
		"never resumed":      `UPDATE intents SET resumed_at = NULL WHERE resumed_at IS NOT NULL`,
		"not being ended":    `UPDATE intents SET ending_at = NULL WHERE ending_at IS NOT NULL`,
		"being ended, later": `UPDATE intents SET ending_at = ending_at + 1 WHERE ending_at IS NOT NULL`,
		"resumed at the end": `UPDATE intents SET resumed_at = 1 WHERE ending_at IS NOT NULL`,
	} {
		if _, err := s.raw(t).ExecContext(t.Context(), statement); err == nil {
			t.Errorf("%s: the database took it", what)
		}
	}
	all, err := l.Attempts(t.Context(), id(1))
	if err != nil || !all[0].ResumedAt.Equal(a.ResumedAt) {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestTheBeatsOfOthersAreKnown(t *testing.T) { both(t, testTheBeatsOfOthersAreKnown) }

func testTheBeatsOfOthersAreKnown(t *testing.T, s store) {
	l := s.open(t)
	others := func(process string) time.Time {
		t.Helper()
		at, err := l.LastBeat(t.Context(), "cloud", process)
		must(t, err)
		return at
	}
	must(t, l.Beat(t.Context(), "cloud", "a"))
	if !others("a").IsZero() || others("b").IsZero() || others("").IsZero() {
		t.Errorf("a alone has said that it works: others than a %v, than b %v, all %v", others("a"), others("b"), others(""))
	}
	must(t, l.Beat(t.Context(), "cloud", "b"))
	if others("a").IsZero() {
		t.Error("b's beat doesn't count")
	}
}
