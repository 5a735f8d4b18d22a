package ledger_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

func open(t *testing.T, path string) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(t.Context(), ledger.Config{Path: path})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

func id(n int) ledger.RequestID {
	return sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func hash(s string) [32]byte { return sha256.Sum256([]byte(s)) }

var deadline = time.Date(2031, 4, 5, 6, 7, 8, 9000, time.UTC)

func aClaim(n int) ledger.Claim {
	return ledger.Claim{
		RequestID: id(n), Backend: "metal", Generation: 1, ContentHash: hash("content"), Owner: "spiffe://market", ValidTo: deadline,
		CreatedAt: deadline.Add(-time.Hour), Record: []byte{0, 1, 2}, LoginPublicKey: "ssh-ed25519 AAAA",
	}
}

func render(params string) func(uint32) (ledger.AttemptParams, error) {
	return func(n uint32) (ledger.AttemptParams, error) {
		return ledger.AttemptParams{Params: fmt.Appendf(nil, "%s-%d", params, n), Placement: "host-1"}, nil
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("error = %v, want %v", got, want)
	}
	for _, other := range []error{ledger.ErrUnavailable, ledger.ErrNotFound, ledger.ErrClosed, ledger.ErrConflict, ledger.ErrStale} {
		if !errors.Is(want, other) && errors.Is(got, other) {
			t.Fatalf("error %v is also %v", got, other)
		}
	}
}

func TestClaimIsPutOnceAndReadBackUnchanged(t *testing.T) {
	both(t, testClaimIsPutOnceAndReadBackUnchanged)
}

func testClaimIsPutOnceAndReadBackUnchanged(t *testing.T, s store) {
	l := s.open(t)
	want := aClaim(1)
	stored, created, err := l.PutClaim(t.Context(), want)
	if err != nil || !created {
		t.Fatalf("PutClaim = created %v, %v", created, err)
	}
	if diff := cmp.Diff(want, stored); diff != "" {
		t.Errorf("stored claim (-want +got):\n%s", diff)
	}
	other := want
	other.Backend, other.ContentHash, other.Record = "cloud", hash("other"), nil
	stored, created, err = l.PutClaim(t.Context(), other)
	if err != nil || created {
		t.Fatalf("second PutClaim = created %v, %v", created, err)
	}
	if diff := cmp.Diff(want, stored); diff != "" {
		t.Errorf("claim after the second put (-want +got):\n%s", diff)
	}
	got, err := l.Claim(t.Context(), want.RequestID)
	must(t, err)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("claim read back (-want +got):\n%s", diff)
	}
	_, err = l.Claim(t.Context(), id(2))
	wantErr(t, err, ledger.ErrNotFound)
}

func TestEmptyValuesAreStored(t *testing.T) { both(t, testEmptyValuesAreStored) }

func testEmptyValuesAreStored(t *testing.T, s store) {
	l := s.open(t)
	stored, created, err := l.PutClaim(t.Context(), ledger.Claim{})
	if err != nil || !created {
		t.Fatalf("PutClaim of the zero claim = %v, %v", created, err)
	}
	if stored.CreatedAt.IsZero() || !stored.ValidTo.IsZero() || stored.SealedKey != nil {
		t.Errorf("zero claim came back as %+v", stored)
	}
	_, _, err = l.BeginAttempt(t.Context(), ledger.RequestID{}, [32]byte{}, func(uint32) (ledger.AttemptParams, error) {
		return ledger.AttemptParams{}, nil
	})
	must(t, err)
	must(t, l.PutInterim(t.Context(), ledger.Log{}))
	_, _, err = l.PutInstance(t.Context(), ledger.Instance{Attempt: 1})
	must(t, err)
	var seen int
	for c, err := range l.LiveClaims(t.Context(), "") {
		must(t, err)
		if c.RequestID == (ledger.RequestID{}) {
			seen++
		}
	}
	if seen != 1 {
		t.Errorf("the all-zero id was listed %d times", seen)
	}
}

func TestClaimMovesByCompareAndSwap(t *testing.T) { both(t, testClaimMovesByCompareAndSwap) }

func testClaimMovesByCompareAndSwap(t *testing.T, s store) {
	l := s.open(t)
	wantErr(t, moveClaim(t, l, id(1), "metal", "cloud"), ledger.ErrNotFound)
	_, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)
	must(t, moveClaim(t, l, id(1), "metal", "cloud"))
	wantErr(t, moveClaim(t, l, id(1), "metal", "other"), ledger.ErrConflict)
	c, err := l.Claim(t.Context(), id(1))
	must(t, err)
	if c.Backend != "cloud" {
		t.Errorf("backend = %q, want cloud", c.Backend)
	}
	_, _, err = l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(1), Reason: "r", By: "b"})
	must(t, err)
	wantErr(t, moveClaim(t, l, id(1), "cloud", "metal"), ledger.ErrClosed)
}

func TestSealedKeyIsSetOnce(t *testing.T) { both(t, testSealedKeyIsSetOnce) }

func testSealedKeyIsSetOnce(t *testing.T, s store) {
	l := s.open(t)
	_, _, err := l.SetSealedKey(t.Context(), id(1), []byte("a"), "pub-a")
	wantErr(t, err, ledger.ErrNotFound)
	c := aClaim(1)
	c.LoginPublicKey = ""
	_, _, err = l.PutClaim(t.Context(), c)
	must(t, err)
	for i, want := range []bool{true, false} {
		stored, created, err := l.SetSealedKey(t.Context(), id(1), fmt.Appendf(nil, "sealed-%d", i), fmt.Sprintf("pub-%d", i))
		must(t, err)
		if created != want || string(stored.SealedKey) != "sealed-0" || stored.LoginPublicKey != "pub-0" {
			t.Errorf("call %d: created %v, stored %q %q", i, created, stored.SealedKey, stored.LoginPublicKey)
		}
	}
}

func TestLiveClaimsLeavesOutTheEnded(t *testing.T) { both(t, testLiveClaimsLeavesOutTheEnded) }

func testLiveClaimsLeavesOutTheEnded(t *testing.T, s store) {
	l := s.open(t)
	const n = 1234 // More than two pages.
	want := map[ledger.RequestID]bool{}
	for i := range n {
		c := aClaim(i)
		if i%10 == 0 {
			c.Backend = "cloud"
		}
		_, _, err := l.PutClaim(t.Context(), c)
		must(t, err)
		want[id(i)] = true
	}
	// An end is counted whether it is stored after the claim or before.
	_, _, err := l.PutFinal(t.Context(), ledger.Log{RequestID: id(7)})
	must(t, err)
	delete(want, id(7))
	_, _, err = l.PutFinal(t.Context(), ledger.Log{RequestID: id(n)})
	must(t, err)
	late, _, err := l.PutClaim(t.Context(), aClaim(n))
	must(t, err)
	if late.EndedAt.IsZero() {
		t.Error("a claim put after the final log lives")
	}

	counts := map[string]int{}
	for _, backend := range []string{"", "cloud", "metal", "nowhere"} {
		var last ledger.RequestID
		for c, err := range l.LiveClaims(t.Context(), backend) {
			must(t, err)
			if !want[c.RequestID] || (backend != "" && c.Backend != backend) {
				t.Fatalf("LiveClaims(%q) yields %s of %s", backend, c.RequestID, c.Backend)
			}
			if counts[backend] > 0 && string(last[:]) >= string(c.RequestID[:]) {
				t.Fatalf("LiveClaims(%q) is out of order at %s", backend, c.RequestID)
			}
			last = c.RequestID
			counts[backend]++
		}
	}
	if diff := cmp.Diff(map[string]int{"": n - 1, "cloud": 124, "metal": n - 1 - 124}, counts); diff != "" {
		t.Errorf("live claims (-want +got):\n%s", diff)
	}
	for _, err := range l.LiveClaims(t.Context(), "") {
		must(t, err)
		break // A caller may stop early.
	}
}

func TestRetryFindsTheOpenAttemptUnchanged(t *testing.T) {
	both(t, testRetryFindsTheOpenAttemptUnchanged)
}

func testRetryFindsTheOpenAttemptUnchanged(t *testing.T, s store) {
	l := s.open(t)
	first, created, err := l.BeginAttempt(t.Context(), id(1), hash("c"), render("first"))
	if err != nil || !created {
		t.Fatalf("BeginAttempt = %v, %v", created, err)
	}
	want := ledger.Attempt{
		RequestID: id(1), Number: 1, ContentHash: hash("c"), Open: true, CreatedAt: first.CreatedAt,
		AttemptParams: ledger.AttemptParams{Params: []byte("first-1"), Placement: "host-1"},
	}
	if diff := cmp.Diff(want, first); diff != "" {
		t.Errorf("attempt (-want +got):\n%s", diff)
	}
	again, created, err := l.BeginAttempt(t.Context(), id(1), hash("c"), func(uint32) (ledger.AttemptParams, error) {
		t.Error("the parameters of an open attempt were rendered again")
		return ledger.AttemptParams{}, nil
	})
	must(t, err)
	if diff := cmp.Diff(want, again); created || diff != "" {
		t.Errorf("retried attempt, created %v (-want +got):\n%s", created, diff)
	}
	_, _, err = l.BeginAttempt(t.Context(), id(1), hash("other"), render("x"))
	wantErr(t, err, ledger.ErrConflict)
}

func TestNumberAdvancesOnlyWhenGone(t *testing.T) { both(t, testNumberAdvancesOnlyWhenGone) }

func testNumberAdvancesOnlyWhenGone(t *testing.T, s store) {
	l := s.open(t)
	wantErr(t, l.MarkGone(t.Context(), id(1), 1), ledger.ErrNotFound)
	for n := uint32(1); n <= 3; n++ {
		a, created, err := l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
		must(t, err)
		if !created || a.Number != n {
			t.Fatalf("attempt %d created %v, want %d", a.Number, created, n)
		}
		must(t, l.MarkGone(t.Context(), id(1), n))
		must(t, l.MarkGone(t.Context(), id(1), n))
	}
	wantErr(t, l.MarkGone(t.Context(), id(1), 4), ledger.ErrNotFound)
	all, err := l.Attempts(t.Context(), id(1))
	must(t, err)
	for i, a := range all {
		if a.Number != uint32(i+1) || a.Open || a.GoneAt.IsZero() {
			t.Errorf("attempt %d = %+v, want it gone", i+1, a)
		}
	}
	none, err := l.Attempts(t.Context(), id(2))
	if err != nil || len(none) != 0 || len(all) != 3 {
		t.Errorf("attempts: %d and %d, %v; want 3 and none", len(all), len(none), err)
	}
}

func TestRenderErrorStoresNothingAndComesBackUnchanged(t *testing.T) {
	both(t, testRenderErrorStoresNothingAndComesBackUnchanged)
}

func testRenderErrorStoresNothingAndComesBackUnchanged(t *testing.T, s store) {
	l := s.open(t)
	full := errors.New("no room")
	_, created, err := l.BeginAttempt(t.Context(), id(1), hash("c"), func(uint32) (ledger.AttemptParams, error) {
		return ledger.AttemptParams{}, full
	})
	if created {
		t.Error("an attempt was begun")
	}
	wantErr(t, err, full)
	all, err := l.Attempts(t.Context(), id(1))
	if err != nil || len(all) != 0 {
		t.Errorf("attempts = %v, %v; want none", all, err)
	}
}

func TestNothingBeginsAfterTheEnd(t *testing.T) { both(t, testNothingBeginsAfterTheEnd) }

func testNothingBeginsAfterTheEnd(t *testing.T, s store) {
	l := s.open(t)
	_, err := l.Closure(t.Context(), id(1))
	wantErr(t, err, ledger.ErrNotFound)
	want := ledger.Closure{RequestID: id(1), Reason: "TERMINATED", By: "spiffe://market", At: deadline}
	got, created, err := l.CloseGrant(t.Context(), want)
	if err != nil || !created || !cmp.Equal(got, want) {
		t.Fatalf("CloseGrant = %+v, %v, %v", got, created, err)
	}
	got, created, err = l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(1), Reason: "OTHER", By: "x"})
	if err != nil || created || !cmp.Equal(got, want) {
		t.Fatalf("second CloseGrant = %+v, %v, %v", got, created, err)
	}
	got, err = l.Closure(t.Context(), id(1))
	if err != nil || !cmp.Equal(got, want) {
		t.Fatalf("Closure = %+v, %v", got, err)
	}
	_, _, err = l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
	wantErr(t, err, ledger.ErrClosed)

	// An open attempt is not handed out again after the closure either, but
	// can still be marked gone.
	_, _, err = l.BeginAttempt(t.Context(), id(2), hash("c"), render("p"))
	must(t, err)
	_, _, err = l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(2)})
	must(t, err)
	_, _, err = l.BeginAttempt(t.Context(), id(2), hash("c"), render("p"))
	wantErr(t, err, ledger.ErrClosed)
	must(t, l.MarkGone(t.Context(), id(2), 1))

	_, _, err = l.PutFinal(t.Context(), ledger.Log{RequestID: id(3)})
	must(t, err)
	_, _, err = l.BeginAttempt(t.Context(), id(3), hash("c"), render("p"))
	wantErr(t, err, ledger.ErrClosed)
}

func TestOpenIntentsAreListed(t *testing.T) { both(t, testOpenIntentsAreListed) }

func testOpenIntentsAreListed(t *testing.T, s store) {
	l := s.open(t)
	want := map[ledger.RequestID]uint32{}
	for i := range 5 {
		_, _, err := l.BeginAttempt(t.Context(), id(i), hash("c"), render("p"))
		must(t, err)
		want[id(i)] = 1
	}
	must(t, l.MarkGone(t.Context(), id(0), 1))
	delete(want, id(0))
	must(t, l.MarkGone(t.Context(), id(1), 1))
	_, _, err := l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
	must(t, err)
	want[id(1)] = 2
	got := map[ledger.RequestID]uint32{}
	for a, err := range l.OpenIntents(t.Context()) {
		must(t, err)
		got[a.RequestID] = a.Number
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("open intents (-want +got):\n%s", diff)
	}
}

func TestInterimGrowsAndFinalStays(t *testing.T) { both(t, testInterimGrowsAndFinalStays) }

func testInterimGrowsAndFinalStays(t *testing.T, s store) {
	l := s.open(t)
	_, err := l.Log(t.Context(), id(1))
	wantErr(t, err, ledger.ErrNotFound)
	log := func(seq uint64, body string) ledger.Log {
		return ledger.Log{RequestID: id(1), Sequence: seq, Body: []byte(body), KeyID: "k1", At: deadline}
	}
	must(t, l.PutInterim(t.Context(), log(1, "one")))
	must(t, l.PutInterim(t.Context(), log(5, "five")))
	wantErr(t, l.PutInterim(t.Context(), log(5, "again")), ledger.ErrStale)
	wantErr(t, l.PutInterim(t.Context(), log(4, "late")), ledger.ErrStale)
	got, err := l.Log(t.Context(), id(1))
	must(t, err)
	if diff := cmp.Diff(log(5, "five"), got); diff != "" {
		t.Errorf("interim (-want +got):\n%s", diff)
	}
	want := log(6, "final")
	want.Final = true
	stored, created, err := l.PutFinal(t.Context(), log(6, "final"))
	if diff := cmp.Diff(want, stored); err != nil || !created || diff != "" {
		t.Errorf("PutFinal = %v, %v (-want +got):\n%s", created, err, diff)
	}
	stored, created, err = l.PutFinal(t.Context(), log(9, "other"))
	if diff := cmp.Diff(want, stored); err != nil || created || diff != "" {
		t.Errorf("second PutFinal = %v, %v (-want +got):\n%s", created, err, diff)
	}
	wantErr(t, l.PutInterim(t.Context(), log(10, "after")), ledger.ErrStale)
	got, err = l.Log(t.Context(), id(1))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Log = %v (-want +got):\n%s", err, diff)
	}
	if err := l.PutInterim(t.Context(), log(1<<63, "huge")); err == nil {
		t.Error("a sequence beyond 63 bits was stored")
	}
}

func TestFinalsArePagedWithoutLoss(t *testing.T) { both(t, testFinalsArePagedWithoutLoss) }

func testFinalsArePagedWithoutLoss(t *testing.T, s store) {
	l := s.open(t)
	want := map[ledger.RequestID]bool{}
	for i := range 25 {
		// Ten logs share each time, more than a page.
		_, _, err := l.PutFinal(t.Context(), ledger.Log{RequestID: id(i), At: deadline.Add(time.Duration(i/10) * time.Second)})
		must(t, err)
		want[id(i)] = true
	}
	must(t, l.PutInterim(t.Context(), ledger.Log{RequestID: id(100)}))
	got := map[ledger.RequestID]bool{}
	var at ledger.Position
	for {
		page, err := l.Finals(t.Context(), at, 4)
		must(t, err)
		if len(page) == 0 {
			break
		}
		for _, g := range page {
			if got[g.RequestID] {
				t.Fatalf("%s was listed twice", g.RequestID)
			}
			got[g.RequestID] = true
		}
		at = page[len(page)-1].Position()
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("finals (-want +got):\n%s", diff)
	}
}

func TestInstanceIsPutOncePerAttempt(t *testing.T) { both(t, testInstanceIsPutOncePerAttempt) }

func testInstanceIsPutOncePerAttempt(t *testing.T, s store) {
	l := s.open(t)
	_, err := l.Instance(t.Context(), id(1))
	wantErr(t, err, ledger.ErrNotFound)
	first := ledger.Instance{RequestID: id(1), Attempt: 1, Body: []byte("one"), ReadyAt: deadline}
	for i, in := range []ledger.Instance{first, {RequestID: id(1), Attempt: 1, Body: []byte("other")}} {
		got, created, err := l.PutInstance(t.Context(), in)
		if err != nil || created != (i == 0) || !cmp.Equal(got, first) {
			t.Errorf("put %d = %+v, %v, %v", i, got, created, err)
		}
	}
	second := ledger.Instance{RequestID: id(1), Attempt: 2, Body: []byte("two"), ReadyAt: deadline}
	_, _, err = l.PutInstance(t.Context(), second)
	must(t, err)
	got, err := l.Instance(t.Context(), id(1))
	if err != nil || !cmp.Equal(got, second) {
		t.Errorf("Instance = %+v, %v; want that of the latest attempt", got, err)
	}
}

// race runs fn on 50 goroutines that start together.
func race(fn func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range 50 {
		wg.Go(func() {
			<-start
			fn(i)
		})
	}
	close(start)
	wg.Wait()
}

func TestPutIfAbsentHasOneWinner(t *testing.T) { both(t, testPutIfAbsentHasOneWinner) }

func testPutIfAbsentHasOneWinner(t *testing.T, s store) {
	l := s.open(t)
	second := s.open(t)
	puts := map[string]func(*ledger.Ledger, int) (string, bool, error){
		"claim": func(l *ledger.Ledger, i int) (string, bool, error) {
			c := aClaim(1)
			c.Owner = fmt.Sprint(i)
			s, created, err := l.PutClaim(t.Context(), c)
			return s.Owner, created, err
		},
		"closure": func(l *ledger.Ledger, i int) (string, bool, error) {
			s, created, err := l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(2), By: fmt.Sprint(i)})
			return s.By, created, err
		},
		"final": func(l *ledger.Ledger, i int) (string, bool, error) {
			s, created, err := l.PutFinal(t.Context(), ledger.Log{RequestID: id(3), KeyID: fmt.Sprint(i)})
			return s.KeyID, created, err
		},
		"instance": func(l *ledger.Ledger, i int) (string, bool, error) {
			s, created, err := l.PutInstance(t.Context(), ledger.Instance{RequestID: id(4), Attempt: 1, Body: []byte(fmt.Sprint(i))})
			return string(s.Body), created, err
		},
		"attempt": func(l *ledger.Ledger, i int) (string, bool, error) {
			a, created, err := l.BeginAttempt(t.Context(), id(5), hash("c"), render(fmt.Sprint(i)))
			return string(a.Params), created, err
		},
		"sealed key": func(l *ledger.Ledger, i int) (string, bool, error) {
			c := aClaim(6)
			if _, _, err := l.PutClaim(t.Context(), c); err != nil {
				return "", false, err
			}
			s, created, err := l.SetSealedKey(t.Context(), id(6), []byte(fmt.Sprint(i)), "p")
			return string(s.SealedKey), created, err
		},
	}
	for name, put := range puts {
		t.Run(name, func(t *testing.T) {
			var winners atomic.Int64
			var values sync.Map
			race(func(i int) {
				handle := l
				if i%2 == 1 {
					handle = second
				}
				value, created, err := put(handle, i)
				if err != nil {
					t.Error(err)
				}
				if created {
					winners.Add(1)
				}
				values.Store(value, true)
			})
			var distinct int
			values.Range(func(any, any) bool { distinct++; return true })
			if winners.Load() != 1 || distinct != 1 {
				t.Errorf("%d winners, %d distinct values seen; want 1 of each", winners.Load(), distinct)
			}
		})
	}
}

func TestClosureAndBeginNeverBothPass(t *testing.T) { both(t, testClosureAndBeginNeverBothPass) }

func testClosureAndBeginNeverBothPass(t *testing.T, s store) {
	l := s.open(t)
	second := s.open(t)
	for n := range 20 {
		var mu sync.Mutex
		var closed bool // Protected by mu: CloseGrant has returned.
		race(func(i int) {
			if i == n {
				_, _, err := second.CloseGrant(t.Context(), ledger.Closure{RequestID: id(n)})
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				closed = true
				mu.Unlock()
				return
			}
			mu.Lock()
			before := closed
			mu.Unlock()
			a, _, err := l.BeginAttempt(t.Context(), id(n), hash("c"), render("p"))
			switch {
			case err == nil && before:
				t.Errorf("attempt %d began after the closure had returned", a.Number)
			case err != nil && !errors.Is(err, ledger.ErrClosed):
				t.Error(err)
			}
		})
	}
}

func TestMoveClaimHasOneWinner(t *testing.T) { both(t, testMoveClaimHasOneWinner) }

func testMoveClaimHasOneWinner(t *testing.T, s store) {
	l := s.open(t)
	_, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)
	var winners atomic.Int64
	race(func(i int) {
		switch err := moveClaim(t, l, id(1), "metal", fmt.Sprint(i)); {
		case err == nil:
			winners.Add(1)
		case !errors.Is(err, ledger.ErrConflict):
			t.Error(err)
		}
	})
	if winners.Load() != 1 {
		t.Errorf("%d moves succeeded, want 1", winners.Load())
	}
}

// raw opens the file as another program would.
func raw(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	must(t, err)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func TestLawsAreHeldByTheDatabaseItself(t *testing.T) { both(t, testLawsAreHeldByTheDatabaseItself) }

func testLawsAreHeldByTheDatabaseItself(t *testing.T, s store) {
	l := s.open(t)
	_, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)
	_, _, err = l.SetSealedKey(t.Context(), id(1), []byte("k"), "p")
	must(t, err)
	_, _, err = l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
	must(t, err)
	must(t, l.MarkGone(t.Context(), id(1), 1))
	_, _, err = l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
	must(t, err)
	must(t, l.PutInterim(t.Context(), ledger.Log{RequestID: id(1), Sequence: 5}))
	_, _, err = l.PutInstance(t.Context(), ledger.Instance{RequestID: id(1), Attempt: 2})
	must(t, err)
	must(t, l.PutInterim(t.Context(), ledger.Log{RequestID: id(2), Sequence: 5}))
	_, _, err = l.PutClaim(t.Context(), aClaim(3))
	must(t, err)
	_, _, err = l.PutFinal(t.Context(), ledger.Log{RequestID: id(3)})
	must(t, err)
	_, _, err = l.CloseGrant(t.Context(), ledger.Closure{RequestID: id(4)})
	must(t, err)
	_, _, err = l.PutFinal(t.Context(), ledger.Log{RequestID: id(1)})
	must(t, err)
	_, err = l.RefuseAttempts(t.Context(), id(4), 2)
	must(t, err)

	db := s.raw(t)
	h1, h2, h3, h4 := s.bytes(id(1).String()), s.bytes(id(2).String()), s.bytes(id(3).String()), s.bytes(id(4).String())
	h9 := s.bytes(id(9).String())
	none, some, more := s.bytes(""), s.bytes("01"), s.bytes("ff")
	intent := func(id string, n int, state string) string {
		return fmt.Sprintf("INSERT INTO intents (request_id, attempt, content_hash, params, placement, state, created_at, gone_at) VALUES (%s, %d, %s, %s, '', '%s', 1, %s)", id, n, h1, none, state,
			map[string]string{"open": "NULL", "gone": "1"}[state])
	}
	statements := []string{
		"UPDATE claims SET content_hash = " + h2 + " WHERE request_id = " + h1,
		"UPDATE claims SET owner = 'thief' WHERE request_id = " + h1,
		"UPDATE claims SET record = " + more + " WHERE request_id = " + h1,
		"UPDATE claims SET valid_to = valid_to + 1 WHERE request_id = " + h1,
		"UPDATE claims SET sealed_key = " + some + " WHERE request_id = " + h1,
		"UPDATE claims SET sealed_key = NULL WHERE request_id = " + h1,
		"UPDATE claims SET backend = 'x' WHERE request_id = " + h3,
		"UPDATE claims SET ended_at = NULL WHERE request_id = " + h3,
		"INSERT INTO claims SELECT " + some + ", backend, content_hash, owner, 1, 1, " + none + ", NULL, '', NULL, 1 FROM claims LIMIT 1",
		"UPDATE claims SET generation = 0 WHERE request_id = " + h1,
		"UPDATE fences SET refused = refused - 1",
		"DELETE FROM fences",
		"INSERT INTO fences VALUES (" + some + ", 1)",
		"INSERT INTO fences VALUES (" + h9 + ", 0)",
		"UPDATE closures SET reason = 'x'",
		"DELETE FROM closures",
		"UPDATE intents SET state = 'open', gone_at = NULL WHERE attempt = 1",
		"UPDATE intents SET params = " + some + " WHERE attempt = 2",
		"UPDATE intents SET attempt = 7 WHERE attempt = 2",
		"UPDATE intents SET state = 'gone' WHERE attempt = 2",
		"UPDATE intents SET state = 'half', gone_at = 1 WHERE attempt = 2",
		"DELETE FROM intents",
		intent(h9, 2, "open"),
		intent(h9, 0, "open"),
		intent(h4, 1, "open"),
		intent(h3, 1, "gone"),
		"UPDATE compute_logs SET body = " + some + " WHERE kind = 'final'",
		"UPDATE compute_logs SET kind = 'interim' WHERE kind = 'final'",
		"UPDATE compute_logs SET sequence = 5 WHERE request_id = " + h2,
		"UPDATE compute_logs SET sequence = 99 WHERE kind = 'interim' AND request_id = " + h1,
		"INSERT INTO compute_logs VALUES (" + h3 + ", 'interim', 1, " + none + ", '', 1)",
		"INSERT INTO compute_logs VALUES (" + h3 + ", 'final', 1, " + none + ", '', 1)",
		"INSERT INTO compute_logs VALUES (" + h9 + ", 'other', 1, " + none + ", '', 1)",
		"DELETE FROM compute_logs WHERE kind = 'final'",
		"UPDATE instances SET body = " + some,
	}
	if s.postgres() {
		statements = append(statements, "TRUNCATE closures", "TRUNCATE intents", "TRUNCATE compute_logs", "TRUNCATE fences",
			// An old snapshot doesn't see a closure that was written meanwhile.
			"BEGIN ISOLATION LEVEL SERIALIZABLE; "+intent(h9, 1, "open"))
	}
	for _, statement := range statements {
		_, err := db.ExecContext(t.Context(), statement)
		if err == nil {
			t.Errorf("the database allowed: %s", statement)
		} else if !s.refusedByLaw(err) {
			t.Errorf("%s: refused for another reason: %v", statement, err)
		}
	}
	// Two attempts of an open grant at a time.
	if _, err := db.ExecContext(t.Context(), intent(h9, 1, "open")); err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), intent(h9, 2, "open")); err == nil {
		t.Error("the database allowed two open attempts")
	}
}

func TestFileIsPrivate(t *testing.T) {
	t.Parallel()
	s := sqliteStore(t)
	l, path := s.open(t), s.config.Path
	_, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + suffix)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o, want 0600", info.Name(), info.Mode().Perm())
		}
	}
	open := filepath.Join(t.TempDir(), "open.db")
	must(t, os.WriteFile(open, nil, 0o600))
	must(t, os.Chmod(open, 0o640))
	_, err = ledger.Open(t.Context(), ledger.Config{Path: open})
	if err == nil || !strings.Contains(err.Error(), "0640") {
		t.Errorf("Open of a file that the group may read = %v", err)
	}
}

func TestOddPathsAreOpenedAsTheyAre(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a b.db", "q?x=1&_pragma=foo(1).db", "50%25.db", "h#f.db", "ü.db", ":memory:"} {
		path := filepath.Join(t.TempDir(), name)
		l := open(t, path)
		_, _, err := l.PutClaim(t.Context(), aClaim(1))
		must(t, err)
		info, err := os.Stat(path)
		if err != nil || info.Size() == 0 {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestBadConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		cfg  ledger.Config
		want string
	}{
		"no path":          {ledger.Config{}, "path: empty"},
		"unknown driver":   {ledger.Config{Driver: "oracle", Path: "x"}, `driver: unknown value "oracle"`},
		"negative timeout": {ledger.Config{Path: "x", BusyTimeout: -1}, "negative"},
		"no directory":     {ledger.Config{Path: filepath.Join(dir, "absent", "l.db")}, "no such file"},
		"a directory":      {ledger.Config{Path: dir}, "directory"},
	} {
		_, err := ledger.Open(t.Context(), tc.cfg)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q in it", name, err, tc.want)
		}
	}
}

func TestDamageAndForeignFilesAreUnavailable(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "l.db")
	must(t, os.WriteFile(path, []byte(strings.Repeat("not a database ", 1000)), 0o600))
	_, err := ledger.Open(t.Context(), ledger.Config{Path: path})
	wantErr(t, err, ledger.ErrUnavailable)
}

func TestLockedFileIsUnavailableAndRecovers(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "l.db")
	l, err := ledger.Open(t.Context(), ledger.Config{Path: path, BusyTimeout: 20 * time.Millisecond})
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	must(t, l.Check(t.Context()))
	_, _, err = l.PutClaim(t.Context(), aClaim(1))
	must(t, err)

	conn, err := raw(t, path).Conn(t.Context())
	must(t, err)
	defer func() { _ = conn.Close() }()
	_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	must(t, err)
	wantErr(t, l.Check(t.Context()), ledger.ErrUnavailable)
	_, _, err = l.PutClaim(t.Context(), aClaim(2))
	wantErr(t, err, ledger.ErrUnavailable)
	if _, err := l.Claim(t.Context(), id(1)); err != nil {
		t.Errorf("reading while another process writes: %v", err)
	}
	_, err = conn.ExecContext(t.Context(), "ROLLBACK")
	must(t, err)
	must(t, l.Check(t.Context()))
	_, _, err = l.PutClaim(t.Context(), aClaim(2))
	must(t, err)
}

func TestContextEndsAWaitingWrite(t *testing.T) { both(t, testContextEndsAWaitingWrite) }

func testContextEndsAWaitingWrite(t *testing.T, s store) {
	s.config.BusyTimeout = time.Hour
	l := s.open(t)
	unlock := s.lock(t)

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, _, err := l.PutClaim(ctx, aClaim(1))
	wantErr(t, err, ledger.ErrUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v, want the deadline in it", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = l.PutClaim(cancelled, aClaim(1))
	wantErr(t, err, context.Canceled)
	_, err = l.Claim(cancelled, id(1))
	wantErr(t, err, context.Canceled)
	for _, err := range l.LiveClaims(cancelled, "") {
		wantErr(t, err, context.Canceled)
	}
	unlock()
	_, created, err := l.PutClaim(t.Context(), aClaim(1))
	if err != nil || !created {
		t.Errorf("after the waits: created %v, %v", created, err)
	}
}

func TestClosedLedgerIsUnavailable(t *testing.T) { both(t, testClosedLedgerIsUnavailable) }

func testClosedLedgerIsUnavailable(t *testing.T, s store) {
	l, err := ledger.Open(t.Context(), s.config)
	must(t, err)
	must(t, l.Close())
	_, err = l.Claim(t.Context(), id(1))
	wantErr(t, err, ledger.ErrUnavailable)
	_, _, err = l.PutClaim(t.Context(), aClaim(1))
	wantErr(t, err, ledger.ErrUnavailable)
	for _, err := range l.OpenIntents(t.Context()) {
		wantErr(t, err, ledger.ErrUnavailable)
	}
}
