package claims_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// both runs a test on both kinds of ledger, each of which it may open several
// times, as routers do that share it.
func both(t *testing.T, test func(*testing.T, ledger.Config)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) {
		test(t, ledger.Config{Driver: ledger.DriverSQLite, Path: filepath.Join(t.TempDir(), "router.db")})
	})
	t.Run("postgres", func(t *testing.T) {
		test(t, ledger.Config{Driver: ledger.DriverPostgres, DSN: pgtest.Shared(t).Database(t)})
	})
}

func open(t *testing.T, c ledger.Config) (*claims.Store, *ledger.Ledger) {
	t.Helper()
	l, err := ledger.Open(context.WithoutCancel(t.Context()), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return claims.New(l), l
}

var id = backend.GrantID{1}

func claimOf(name string, generation uint64) fleet.Claim {
	return fleet.Claim{
		GrantID: id, Backend: name, Generation: generation, Owner: "alice", Content: [32]byte{2}, ValidTo: time.Unix(2_000_000_000, 0).UTC(),
	}
}

func TestAClaimIsPutOnceAndMovesByCompareAndSwap(t *testing.T) { both(t, testPutOnceAndMoved) }

func testPutOnceAndMoved(t *testing.T, c ledger.Config) {
	s, _ := open(t, c)
	ctx := t.Context()
	want := func(step string, got fleet.Claim, err error, wanted fleet.Claim) {
		t.Helper()
		if diff := cmp.Diff(wanted, got); diff != "" || err != nil {
			t.Fatalf("%s: %v (-want +got):\n%s", step, err, diff)
		}
	}
	move := func(step string, was fleet.Claim, to string, above uint64, wanted fleet.Claim, wantMoved bool) {
		t.Helper()
		got, moved, err := s.Move(ctx, was, to, above, 0)
		want(step, got, err, wanted)
		if moved != wantMoved {
			t.Errorf("%s: moved is %t", step, moved)
		}
	}
	got, err := s.Get(ctx, id)
	want("nothing yet", got, err, fleet.Claim{GrantID: id})
	got, created, err := s.Put(ctx, claimOf("a", 0), 0)
	want("put", got, err, claimOf("a", 1))
	if !created {
		t.Error("the first put created nothing")
	}
	other := claimOf("b", 0)
	other.Owner = "bob"
	got, created, err = s.Put(ctx, other, 0)
	want("put again", got, err, claimOf("a", 1))
	if created {
		t.Error("the second put created a claim")
	}
	move("move from elsewhere", claimOf("b", 1), "c", 0, claimOf("a", 1), false)
	move("move from another generation", claimOf("a", 2), "c", 0, claimOf("a", 1), false)
	got, err = s.Leave(ctx, claimOf("b", 1))
	want("leave elsewhere", got, err, claimOf("a", 1))
	got, err = s.Leave(ctx, claimOf("a", 2))
	want("leave another generation", got, err, claimOf("a", 1))
	leaving := claimOf("a", 1)
	leaving.Leaving = true
	move("move what is not leaving", leaving, "c", 0, claimOf("a", 1), false)
	for range 2 {
		got, err = s.Leave(ctx, claimOf("a", 1))
		want("leave", got, err, leaving)
	}
	got, err = s.Get(ctx, id)
	want("get while leaving", got, err, leaving)
	move("move by one who has not seen it leave", claimOf("a", 1), "c", 0, leaving, false)
	move("move after leaving", leaving, "a", 0, claimOf("a", 2), true)
	move("stay, in another generation", claimOf("a", 2), "a", 6, claimOf("a", 7), true)
	move("move", claimOf("a", 7), "b", 3, claimOf("b", 8), true)
	for range 2 {
		if err := s.Close(ctx, id, "alice"); err != nil {
			t.Fatal(err)
		}
	}
	closed := claimOf("b", 8)
	closed.Closed = true
	move("move when closed", claimOf("b", 8), "c", 0, closed, false)
	got, err = s.Leave(ctx, claimOf("b", 8))
	want("leave when closed", got, err, closed)
	got, err = s.Get(ctx, id)
	want("get when closed", got, err, closed)
	if err := s.Close(ctx, backend.GrantID{9}, "alice"); err != nil {
		t.Fatal(err)
	}
	got, err = s.Get(ctx, backend.GrantID{9})
	want("closed and never seen", got, err, fleet.Claim{GrantID: backend.GrantID{9}, Closed: true})
}

func TestACallThatWasRefusedNeitherPutsNorMovesAClaim(t *testing.T) { both(t, testRefused) }

func testRefused(t *testing.T, c ledger.Config) {
	s, _ := open(t, c)
	ctx := t.Context()
	late := func(err error, fence uint64) {
		t.Helper()
		var refused *fleet.RefusedError
		if !errors.As(err, &refused) || refused.Fence != fence {
			t.Errorf("error %v, want that fence %d was refused", err, fence)
		}
	}
	if n, err := s.Refuse(ctx, fleet.Claim{GrantID: id}, 4); n != 4 || err != nil {
		t.Fatalf("Refuse: %d, %v", n, err)
	}
	_, _, err := s.Put(ctx, claimOf("a", 0), 4)
	late(err, 4)
	if _, created, err := s.Put(ctx, claimOf("a", 0), 5); !created || err != nil {
		t.Fatalf("a later call: %t, %v", created, err)
	}
	if _, err := s.Refuse(ctx, fleet.Claim{GrantID: id}, 5); !errors.Is(err, ledger.ErrConflict) {
		t.Errorf("refused although there is a claim: %v", err)
	}
	leaving := claimOf("a", 1)
	leaving.Leaving = true
	if _, err := s.Refuse(ctx, leaving, 5); !errors.Is(err, ledger.ErrConflict) {
		t.Errorf("refused although the claim is not leaving: %v", err)
	}
	if n, err := s.Refuse(ctx, claimOf("a", 1), 5); n != 5 || err != nil {
		t.Fatalf("Refuse: %d, %v", n, err)
	}
	_, _, err = s.Move(ctx, claimOf("a", 1), "b", 0, 5)
	late(err, 5)
	if _, moved, err := s.Move(ctx, claimOf("a", 1), "b", 0, 6); !moved || err != nil {
		t.Fatalf("a later call: %t, %v", moved, err)
	}
}

func TestOneOfManyRoutersClaims(t *testing.T) { both(t, testOneOfMany) }

func testOneOfMany(t *testing.T, shared ledger.Config) {
	one, _ := open(t, shared)
	two, _ := open(t, shared)
	stores := []*claims.Store{one, two}
	const routers = 16
	got := make([]string, routers)
	made := make([]bool, routers)
	var wg sync.WaitGroup
	for i := range routers {
		wg.Go(func() {
			c, created, err := stores[i%2].Put(t.Context(), claimOf(string(rune('a'+i)), 0), 0)
			if err != nil {
				t.Error(err)
			}
			got[i], made[i] = c.Backend, created
		})
	}
	wg.Wait()
	winners := 0
	for i := range routers {
		if got[i] != got[0] {
			t.Errorf("router %d sees %q, router 0 %q", i, got[i], got[0])
		}
		if made[i] {
			winners++
		}
	}
	if winners != 1 {
		t.Errorf("%d routers made the claim", winners)
	}
}

func TestALedgerThatIsGoneIsAnError(t *testing.T) { both(t, testGone) }

func testGone(t *testing.T, c ledger.Config) {
	s, l := open(t, c)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(context.Context) error{
		"get":    func(ctx context.Context) error { _, err := s.Get(ctx, id); return err },
		"put":    func(ctx context.Context) error { _, _, err := s.Put(ctx, claimOf("a", 0), 0); return err },
		"move":   func(ctx context.Context) error { _, _, err := s.Move(ctx, claimOf("a", 1), "b", 0, 0); return err },
		"leave":  func(ctx context.Context) error { _, err := s.Leave(ctx, claimOf("a", 1)); return err },
		"refuse": func(ctx context.Context) error { _, err := s.Refuse(ctx, claimOf("a", 1), 1); return err },
		"close":  func(ctx context.Context) error { return s.Close(ctx, id, "alice") },
	}
	for name, call := range calls {
		if err := call(t.Context()); !errors.Is(err, ledger.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
