package backend

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestUnionOfNothingOffersNothing(t *testing.T) {
	t.Parallel()
	if diff := cmp.Diff(Capabilities{Backend: "all"}, Union("all", nil)); diff != "" {
		t.Error(diff)
	}
}

func TestUnionFoldsRegionByRegion(t *testing.T) {
	t.Parallel()
	early, late := time.Unix(100, 0), time.Unix(200, 0)
	metal := Capabilities{
		Backend: "metal", ObservedAt: late, LogKeys: []LogKey{{ID: "m"}},
		Regions: []RegionCapabilities{
			{
				Region: "west", Isolation: []Isolation{IsolationVM, IsolationContainer}, Enforcement: EnforcedByPlatform,
				Total: cube(10), Free: cube(4), LargestSingle: Shape{CPU: 8, RAM: 1, Storage: 1}, LargestFree: Shape{CPU: 2, RAM: 9, Storage: 9},
				ActiveInstances: 3, MaxInstances: 7, NetworkModes: []NetworkMode{NetworkAllowlist, NetworkOpen}, StorageEnforced: true,
			},
			{Region: "north", Enforcement: EnforcedByPlatform, Total: cube(1), StorageEnforced: true},
		},
	}
	cloud := Capabilities{
		Backend: "cloud", ObservedAt: early, LogKeys: []LogKey{{ID: "c"}},
		Regions: []RegionCapabilities{{
			Region: "west", Isolation: []Isolation{IsolationVM, IsolationTDX}, Enforcement: EnforcedByGuest,
			Total: cube(5), Free: cube(5), LargestSingle: Shape{CPU: 8, RAM: 2, Storage: 0}, LargestFree: Shape{CPU: 3, RAM: 1, Storage: 1},
			ActiveInstances: 1, MaxInstances: 2, NetworkModes: []NetworkMode{NetworkOpen},
		}},
	}
	want := Capabilities{
		Backend: "all", ObservedAt: early, LogKeys: []LogKey{{ID: "m"}, {ID: "c"}},
		Regions: []RegionCapabilities{
			{Region: "north", Enforcement: EnforcedByPlatform, Total: cube(1), StorageEnforced: true},
			{
				Region: "west", Isolation: []Isolation{IsolationContainer, IsolationVM, IsolationTDX}, Enforcement: EnforcedByGuest,
				Total: cube(15), Free: cube(9), LargestSingle: Shape{CPU: 8, RAM: 2, Storage: 0}, LargestFree: Shape{CPU: 3, RAM: 1, Storage: 1},
				ActiveInstances: 4, MaxInstances: 9, NetworkModes: []NetworkMode{NetworkOpen, NetworkAllowlist},
			},
		},
	}
	if diff := cmp.Diff(want, Union("all", []Capabilities{metal, cloud})); diff != "" {
		t.Errorf("union differs (-want +got):\n%s", diff)
	}
	if !Union("all", []Capabilities{metal, cloud}).TDX() || metal.TDX() {
		t.Error("TDX is on offer exactly where a region says so")
	}
	if order := []Isolation{IsolationVM, IsolationContainer}; !slices.Equal(metal.Regions[0].Isolation, order) {
		t.Error("the union sorted its argument's levels")
	}
}

func TestUnionSaturates(t *testing.T) {
	t.Parallel()
	huge := Capabilities{Regions: []RegionCapabilities{{
		Region: "r", Total: cube(math.MaxInt64), Free: cube(math.MaxInt64 - 1), LargestSingle: cube(math.MaxInt64),
		ActiveInstances: math.MaxInt64, MaxInstances: math.MaxInt64,
	}}}
	got := Union("all", []Capabilities{huge, huge, huge}).Regions[0]
	if got.Total != cube(math.MaxInt64) || got.Free != cube(math.MaxInt64) || got.LargestSingle != cube(math.MaxInt64) ||
		got.ActiveInstances != math.MaxInt64 || got.MaxInstances != math.MaxInt64 {
		t.Errorf("sums wrapped: %+v", got)
	}
}

func TestNothingOfAStaleOrDrainingBackendIsFree(t *testing.T) {
	t.Parallel()
	region := RegionCapabilities{Region: "r", Total: cube(4), Free: cube(3), LargestSingle: cube(2), LargestFree: cube(1), ActiveInstances: 1, MaxInstances: 4}
	for name, c := range map[string]Capabilities{
		"stale":    {Stale: true, Regions: []RegionCapabilities{region}},
		"draining": {Draining: true, Regions: []RegionCapabilities{region}},
	} {
		got := Union("all", []Capabilities{c}).Regions[0]
		if got.Free != (Shape{}) || got.LargestFree != (Shape{}) {
			t.Errorf("%s: %v is free", name, got.Free)
		}
		if got.Total != cube(4) || got.LargestSingle != cube(2) || got.ActiveInstances != 1 || got.MaxInstances != 4 {
			t.Errorf("%s: what was declared is lost: %+v", name, got)
		}
		if c.Regions[0].Free != cube(3) {
			t.Errorf("%s: the union changed its argument", name)
		}
	}
}

func TestUnionIsTheSameWhateverTheOrder(t *testing.T) {
	t.Parallel()
	var all []Capabilities
	for i := range 6 {
		n := int64(i)
		all = append(all, Capabilities{ObservedAt: time.Unix(n, 0), Regions: []RegionCapabilities{
			{Region: "b", Total: cube(n), LargestSingle: Shape{CPU: Millicores(n % 2), RAM: MiB(n)}, Enforcement: DeadlineEnforcement(1 + n%3)},
			{Region: Region(rune('a' + i)), Total: cube(1), Isolation: []Isolation{IsolationVM}},
		}})
	}
	want := Union("all", all)
	if !slices.IsSortedFunc(want.Regions, func(a, b RegionCapabilities) int {
		if a.Region < b.Region {
			return -1
		}
		return 1
	}) {
		t.Error("regions aren't sorted, or not unique")
	}
	for range 20 {
		slices.Reverse(all)
		all[1], all[4] = all[4], all[1]
		if diff := cmp.Diff(want, Union("all", all)); diff != "" {
			t.Fatalf("another order, another union:\n%s", diff)
		}
	}
}
