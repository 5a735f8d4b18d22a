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
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, path string) (*claims.Store, *ledger.Ledger) {
	t.Helper()
	l, err := ledger.Open(t.Context(), ledger.Config{Path: path})
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

func claimOf(name string) fleet.Claim {
	return fleet.Claim{GrantID: id, Backend: name, Owner: "alice", Content: [32]byte{2}, ValidTo: time.Unix(2_000_000_000, 0).UTC()}
}

func TestAClaimIsPutOnceAndMovesByCompareAndSwap(t *testing.T) {
	s, _ := open(t, filepath.Join(t.TempDir(), "router.db"))
	ctx := t.Context()
	want := func(step string, got fleet.Claim, err error, wanted fleet.Claim) {
		t.Helper()
		if diff := cmp.Diff(wanted, got); diff != "" || err != nil {
			t.Fatalf("%s: %v (-want +got):\n%s", step, err, diff)
		}
	}
	got, err := s.Get(ctx, id)
	want("nothing yet", got, err, fleet.Claim{GrantID: id})
	got, created, err := s.Put(ctx, claimOf("a"))
	want("put", got, err, claimOf("a"))
	if !created {
		t.Error("the first put created nothing")
	}
	other := claimOf("b")
	other.Owner = "bob"
	got, created, err = s.Put(ctx, other)
	want("put again", got, err, claimOf("a"))
	if created {
		t.Error("the second put created a claim")
	}
	got, err = s.Move(ctx, claimOf("b"), "c")
	want("move from elsewhere", got, err, claimOf("a"))
	got, err = s.Leave(ctx, id, "b")
	want("leave elsewhere", got, err, claimOf("a"))
	leaving := claimOf("a")
	leaving.Leaving = true
	got, err = s.Move(ctx, leaving, "c")
	want("move what is not leaving", got, err, claimOf("a"))
	for range 2 {
		got, err = s.Leave(ctx, id, "a")
		want("leave", got, err, leaving)
	}
	got, err = s.Get(ctx, id)
	want("get while leaving", got, err, leaving)
	got, err = s.Move(ctx, claimOf("a"), "c")
	want("move by one who has not seen it leave", got, err, leaving)
	got, err = s.Move(ctx, leaving, "a")
	want("move after leaving", got, err, claimOf("a"))
	got, err = s.Move(ctx, claimOf("a"), "b")
	want("move", got, err, claimOf("b"))
	for range 2 {
		if err := s.Close(ctx, id, "alice"); err != nil {
			t.Fatal(err)
		}
	}
	closed := claimOf("b")
	closed.Closed = true
	got, err = s.Move(ctx, claimOf("b"), "c")
	want("move when closed", got, err, closed)
	got, err = s.Leave(ctx, id, "b")
	want("leave when closed", got, err, closed)
	got, err = s.Get(ctx, id)
	want("get when closed", got, err, closed)
	if err := s.Close(ctx, backend.GrantID{9}, "alice"); err != nil {
		t.Fatal(err)
	}
	got, err = s.Get(ctx, backend.GrantID{9})
	want("closed and never seen", got, err, fleet.Claim{GrantID: backend.GrantID{9}, Closed: true})
}

func TestOneOfManyRoutersClaims(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.db")
	one, _ := open(t, path)
	two, _ := open(t, path)
	stores := []*claims.Store{one, two}
	const routers = 16
	got := make([]string, routers)
	made := make([]bool, routers)
	var wg sync.WaitGroup
	for i := range routers {
		wg.Go(func() {
			c, created, err := stores[i%2].Put(t.Context(), claimOf(string(rune('a'+i))))
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

func TestALedgerThatIsGoneIsAnError(t *testing.T) {
	s, l := open(t, filepath.Join(t.TempDir(), "router.db"))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(context.Context) error{
		"get":   func(ctx context.Context) error { _, err := s.Get(ctx, id); return err },
		"put":   func(ctx context.Context) error { _, _, err := s.Put(ctx, claimOf("a")); return err },
		"move":  func(ctx context.Context) error { _, err := s.Move(ctx, claimOf("a"), "b"); return err },
		"leave": func(ctx context.Context) error { _, err := s.Leave(ctx, id, "a"); return err },
		"close": func(ctx context.Context) error { return s.Close(ctx, id, "alice") },
	}
	for name, call := range calls {
		if err := call(t.Context()); !errors.Is(err, ledger.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
