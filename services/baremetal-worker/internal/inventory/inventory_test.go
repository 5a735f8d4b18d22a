package inventory

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

func id(n int) (g backend.GrantID) {
	copy(g[:], fmt.Sprintf("%032d", n))
	return g
}

func usable(hosts ...Host) *Inventory {
	inv := New(hosts)
	for _, h := range hosts {
		inv.SetUsable(h.Name)
	}
	return inv
}

func small(name string) Host {
	return Host{Name: name, Region: "r1", Capacity: backend.Shape{CPU: 4000, RAM: 8192, Storage: 100}, MaxInstances: 8, FirstPort: 40000, LastPort: 40009}
}

func need(cpu backend.Millicores) Need {
	return Need{Shape: backend.Shape{CPU: cpu, RAM: 1024, Storage: 10}, Ports: 1}
}

func TestReserveTakesTheFirstHostWithRoom(t *testing.T) {
	inv := usable(small("a"), small("b"))
	for i, want := range []string{"a", "b", "b"} {
		r, err := inv.Reserve(id(i), need([]backend.Millicores{3000, 2000, 1500}[i]))
		if err != nil {
			t.Fatal(err)
		}
		if r.Host != want {
			t.Errorf("grant %d is on %s, want %s", i, r.Host, want)
		}
	}
}

func TestReserveAgainReturnsTheSame(t *testing.T) {
	inv := usable(small("a"))
	first, err := inv.Reserve(id(1), need(1000))
	if err != nil {
		t.Fatal(err)
	}
	again, err := inv.Reserve(id(1), need(1000))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again); diff != "" {
		t.Error(diff)
	}
	again.Ports[0] = 1
	if kept, _ := inv.Get(id(1)); kept.Ports[0] == 1 {
		t.Error("the caller's copy is the inventory's own")
	}
}

func TestReleaseFreesOnlyItsOwnReservation(t *testing.T) {
	inv := usable(small("a"))
	for i := range 3 {
		if _, err := inv.Reserve(id(i), need(1000)); err != nil {
			t.Fatal(err)
		}
	}
	inv.Release(id(1))
	inv.Release(id(1))
	regions, _ := inv.Regions()
	if got := regions[0]; got.Active != 2 || got.Free.CPU != 2000 {
		t.Errorf("after one release: %d active, %d millicores free; want 2, 2000", got.Active, got.Free.CPU)
	}
	r, err := inv.Reserve(id(9), need(1000))
	if err != nil {
		t.Fatal(err)
	}
	if r.Slot != 1 || r.Ports[0] != 40001 {
		t.Errorf("slot %d, port %d; want the released ones, 1 and 40001", r.Slot, r.Ports[0])
	}
}

// A host that changes hands between replicas shows the next holder of a slot
// and a port before the end of the one before is known here.
func TestWhatHasGoneFreesNothingOfWhoCameAfter(t *testing.T) {
	inv := usable(small("a"))
	gone, err := inv.Reserve(id(1), need(1000))
	if err != nil {
		t.Fatal(err)
	}
	next := gone
	next.Grant = id(2)
	inv.Restore(next)
	inv.Release(id(1))
	r, err := inv.Reserve(id(3), need(1000))
	if err != nil {
		t.Fatal(err)
	}
	if r.Slot == next.Slot || r.Ports[0] == next.Ports[0] {
		t.Errorf("a new grant got slot %d and port %d; a living one has %d and %d", r.Slot, r.Ports[0], next.Slot, next.Ports[0])
	}
	inv.Release(id(2))
	if r, err = inv.Reserve(id(4), need(1000)); err != nil || r.Slot != next.Slot || r.Ports[0] != next.Ports[0] {
		t.Errorf("%+v, %v; want slot %d and port %d, which nobody has any more", r, err, next.Slot, next.Ports[0])
	}
}

func TestRefusals(t *testing.T) {
	full := small("a")
	tests := map[string]struct {
		inv  func() *Inventory
		need Need
		want backenderr.Reason
	}{
		"larger than any host": {func() *Inventory { return usable(full, small("b")) }, need(5000), backenderr.GrantNotSatisfiable},
		"unknown region":       {func() *Inventory { return usable(full) }, Need{Region: "mars", Shape: backend.Shape{CPU: 1, RAM: 1, Storage: 1}}, backenderr.GrantNotSatisfiable},
		"more ports than any":  {func() *Inventory { return usable(full) }, Need{Shape: backend.Shape{CPU: 1, RAM: 1, Storage: 1}, Ports: 11}, backenderr.GrantNotSatisfiable},
		"no room": {func() *Inventory {
			inv := usable(full)
			_, _ = inv.Reserve(id(100), need(3000))
			return inv
		}, need(2000), backenderr.CapacityExhausted},
		"no slot": {func() *Inventory {
			one := full
			one.MaxInstances = 1
			inv := usable(one)
			_, _ = inv.Reserve(id(100), need(1))
			return inv
		}, need(1), backenderr.WorkerFull},
		"no port left": {func() *Inventory {
			inv := usable(full)
			_, _ = inv.Reserve(id(100), Need{Shape: backend.Shape{CPU: 1, RAM: 1, Storage: 1}, Ports: 10})
			return inv
		}, need(1), backenderr.CapacityExhausted},
		"unreachable": {func() *Inventory { return New([]Host{full}) }, need(1), backenderr.ProviderUnavailable},
		"unfit": {func() *Inventory {
			inv := usable(full)
			inv.SetUnfit("a", "podman is missing")
			return inv
		}, need(1), backenderr.HostUnfit},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := test.inv().Reserve(id(1), test.need)
			if got := backenderr.ReasonOf(err); got != test.want {
				t.Errorf("got %s (%v), want %s", got, err, test.want)
			}
			if backenderr.CreatedOf(err) != backenderr.CreatedNone {
				t.Error("a refusal before any I/O must say created=none")
			}
		})
	}
}

func TestParallelReservationsNeverExceedCapacity(t *testing.T) {
	inv := usable(small("a"), small("b"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	granted := map[string]backend.Shape{}
	ports := map[string]bool{}
	for i := range 100 {
		wg.Go(func() {
			r, err := inv.Reserve(id(i), need(1000))
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			granted[r.Host] = granted[r.Host].Add(r.Shape)
			key := fmt.Sprint(r.Host, r.Ports[0])
			if ports[key] {
				t.Errorf("port %s was given twice", key)
			}
			ports[key] = true
		})
	}
	wg.Wait()
	for host, sum := range granted {
		if !sum.Fits(small(host).Capacity) {
			t.Errorf("host %s is over-committed: %s", host, sum)
		}
	}
	if len(ports) != 8 {
		t.Errorf("%d grants placed, want 8", len(ports))
	}
}

func TestRestoreRecordsWhatIsThereEvenWithoutRoom(t *testing.T) {
	inv := usable(small("a"))
	for i := range 3 {
		inv.Restore(Reservation{Grant: id(i), Host: "a", Shape: backend.Shape{CPU: 3000}, Slot: i})
	}
	regions, _ := inv.Regions()
	if got := regions[0]; got.Free.CPU != 0 || got.Active != 3 {
		t.Errorf("over-committed host shows %d free, %d active; want 0, 3", got.Free.CPU, got.Active)
	}
	for i := range 3 {
		inv.Release(id(i))
	}
	regions, _ = inv.Regions()
	if got := regions[0].Free.CPU; got != 4000 {
		t.Errorf("%d millicores free after all releases, want 4000", got)
	}
}

func TestUnreachableHostKeepsItsReservationsAndOffersNothing(t *testing.T) {
	inv := usable(small("a"))
	if _, err := inv.Reserve(id(1), need(1000)); err != nil {
		t.Fatal(err)
	}
	inv.SetUnreachable("a", "connection lost")
	regions, problems := inv.Regions()
	if got := regions[0]; got.Free != (backend.Shape{}) || got.Active != 1 || got.Total.CPU != 4000 {
		t.Errorf("unreachable host: %+v", got)
	}
	if len(problems) != 1 {
		t.Errorf("problems: %v", problems)
	}
	if ok, why := inv.CanEverFit(need(1000)); !ok {
		t.Errorf("CanEverFit looks at the declared hosts, not at what is seen now: %s", why)
	}
}

func BenchmarkReserveRelease(b *testing.B) {
	hosts := make([]Host, 1000)
	for i := range hosts {
		hosts[i] = small(fmt.Sprint("h", i))
	}
	inv := usable(hosts...)
	for i := range 3000 {
		if _, err := inv.Reserve(id(i), need(1000)); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := inv.Reserve(id(9999), need(1000)); err != nil {
			b.Fatal(err)
		}
		inv.Release(id(9999))
	}
}

func TestAHostOfAnotherReplicaCountsAndTakesNothingFromHere(t *testing.T) {
	inv := usable(small("a"), small("b"))
	if _, err := inv.Reserve(id(1), need(3000)); err != nil {
		t.Fatal(err)
	}
	inv.SetElsewhere("b", "held by w2")
	inv.Restore(Reservation{Grant: id(2), Host: "b", Shape: need(1000).Shape, Ports: []uint16{40000}})
	regions, problems := inv.Regions()
	if got := regions[0]; got.Free.CPU != 4000 || got.Active != 2 || got.LargestFree.CPU != 3000 {
		t.Errorf("%+v; want what all replicas have", got)
	}
	if diff := cmp.Diff([]string{"host b: held by w2"}, problems); diff != "" {
		t.Error(diff)
	}
	_, err := inv.Reserve(id(3), need(3000))
	if !backenderr.Is(err, backenderr.OtherReplica) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown || backenderr.From(err).RetryAfter <= 0 {
		t.Errorf("a grant that only the other replica has room for: %v", err)
	}
	// No replica has room: a clean refusal, whoever is asked.
	if _, err := inv.Reserve(id(3), need(3500)); !backenderr.Is(err, backenderr.CapacityExhausted) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("a grant that nobody has room for: %v", err)
	}
	if r, err := inv.Reserve(id(4), need(1000)); err != nil || r.Host != "a" {
		t.Errorf("%+v, %v; want the host that is ours", r, err)
	}
	inv.SetUsable("b")
	if r, err := inv.Reserve(id(3), need(3000)); err != nil || r.Host != "b" {
		t.Errorf("%+v, %v; want the host that was taken over", r, err)
	}
}

func TestForeignPortsAreLeftOutForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := small("a")
		h.LastPort = h.FirstPort + 2
		inv := usable(h)
		inv.SetPortForeign("a", 40000, time.Now().Add(time.Minute))
		inv.SetPortForeign("a", 40002, time.Now().Add(2*time.Minute))
		inv.SetPortForeign("nobody", 40001, time.Now().Add(time.Minute))
		r, err := inv.Reserve(id(1), need(100))
		if err != nil || r.Ports[0] != 40001 {
			t.Fatalf("%+v, %v", r, err)
		}
		if _, err := inv.Reserve(id(2), need(100)); !backenderr.Is(err, backenderr.CapacityExhausted) {
			t.Errorf("no port is left: %v", err)
		}
		_, problems := inv.Regions()
		if want := []string{"host a: something else has ports of the grants' range: 40000 40002"}; !slices.Equal(problems, want) {
			t.Errorf("problems %q, want %q", problems, want)
		}
		<-time.After(time.Minute + time.Second)
		if r, err = inv.Reserve(id(2), need(100)); err != nil || r.Ports[0] != 40000 {
			t.Fatalf("a minute later: %+v, %v", r, err)
		}
		<-time.After(time.Minute)
		if _, problems = inv.Regions(); len(problems) > 0 {
			t.Errorf("two minutes later: %q", problems)
		}
	})
}
