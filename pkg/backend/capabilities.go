package backend

import (
	"slices"
	"strings"
	"time"
)

// Capabilities is what a backend can do, as far as it knows.
type Capabilities struct {
	Backend string
	// Regions, sorted by name, each once.
	Regions    []RegionCapabilities
	ObservedAt time.Time
	// Stale says that the value is old: the worker doesn't answer.
	Stale    bool
	LogKeys  []LogKey
	Draining bool
	// Warnings are for the operator.
	Warnings []string
}

// RegionCapabilities is what a backend can do in one region.
type RegionCapabilities struct {
	Region          Region
	Isolation       []Isolation
	Enforcement     DeadlineEnforcement
	Total           Shape
	Free            Shape
	LargestSingle   Shape
	LargestFree     Shape
	ActiveInstances int64
	MaxInstances    int64
	NetworkModes    []NetworkMode
	StorageEnforced bool
}

// LogKey is a key that signs compute logs.
type LogKey struct {
	ID string
	// PublicKey is an Ed25519 public key.
	PublicKey []byte
}

// TDX reports whether any region offers TDX.
func (c Capabilities) TDX() bool {
	return slices.ContainsFunc(c.Regions, func(r RegionCapabilities) bool {
		return slices.Contains(r.Isolation, IsolationTDX)
	})
}

// Union folds the capabilities of several backends into one: sums saturate,
// LargestSingle is the largest of any one backend, enforcement the weakest.
// Stale and draining backends count with what they last declared; nothing of
// theirs is free.
func Union(name string, all []Capabilities) Capabilities {
	union := Capabilities{Backend: name}
	regions := map[Region]*RegionCapabilities{}
	for _, c := range all {
		if union.ObservedAt.IsZero() || c.ObservedAt.Before(union.ObservedAt) {
			union.ObservedAt = c.ObservedAt
		}
		union.LogKeys = append(union.LogKeys, c.LogKeys...)
		for _, r := range c.Regions {
			if c.Stale || c.Draining {
				r.Free, r.LargestFree = Shape{}, Shape{}
			}
			u, ok := regions[r.Region]
			if !ok {
				u = &RegionCapabilities{Region: r.Region, Enforcement: r.Enforcement, StorageEnforced: true}
				regions[r.Region] = u
			}
			u.add(r)
		}
	}
	for _, r := range regions {
		union.Regions = append(union.Regions, *r)
	}
	slices.SortFunc(union.Regions, func(a, b RegionCapabilities) int { return strings.Compare(string(a.Region), string(b.Region)) })
	return union
}

func (u *RegionCapabilities) add(r RegionCapabilities) {
	u.Isolation = merge(u.Isolation, r.Isolation)
	u.NetworkModes = merge(u.NetworkModes, r.NetworkModes)
	u.Enforcement = min(u.Enforcement, r.Enforcement)
	u.Total = u.Total.Add(r.Total)
	u.Free = u.Free.Add(r.Free)
	u.LargestSingle = larger(u.LargestSingle, r.LargestSingle)
	u.LargestFree = larger(u.LargestFree, r.LargestFree)
	u.ActiveInstances = addSat(u.ActiveInstances, r.ActiveInstances)
	u.MaxInstances = addSat(u.MaxInstances, r.MaxInstances)
	u.StorageEnforced = u.StorageEnforced && r.StorageEnforced
}

// larger returns the one of two instances that has more CPU, then more memory,
// then more disk: mixing dimensions would promise an instance that nobody has.
func larger(a, b Shape) Shape {
	if c := compareShapes(a, b); c >= 0 {
		return a
	}
	return b
}

func compareShapes(a, b Shape) int {
	switch {
	case a.CPU != b.CPU:
		return compare(a.CPU, b.CPU)
	case a.RAM != b.RAM:
		return compare(a.RAM, b.RAM)
	}
	return compare(a.Storage, b.Storage)
}

func compare[T ~int64](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func merge[T ~int32](a, b []T) []T {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}
