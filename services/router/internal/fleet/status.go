package fleet

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Health is whether a member takes grants.
type Health int

// The healths.
const (
	// Serving: answers and takes grants.
	Serving Health = iota + 1
	// Degraded: answers, and an operator should read its warnings.
	Degraded
	// Draining: answers; takes nothing new.
	Draining
	// Unreachable: doesn't answer; skipped for new grants.
	Unreachable
)

// Status is a member as the fleet sees it.
type Status struct {
	Name   string
	Health Health
	// Observation, with stale capabilities marked and the fleet's own warnings
	// among them.
	Observation
}

// Status returns all members in the operator's order.
func (f *Fleet) Status() []Status {
	all := make([]Status, len(f.members))
	for i, m := range f.members {
		s := Status{Name: m.Name, Health: Serving, Observation: m.Observe()}
		c := &s.Capabilities
		c.Stale = c.Stale || s.LastError != ""
		c.Warnings = slices.Clone(c.Warnings)
		f.mu.Lock()
		if why := f.degraded[m.Name]; why != "" {
			c.Warnings = append(c.Warnings, why)
		}
		f.mu.Unlock()
		switch {
		case s.LastSeen.IsZero() || s.LastError != "":
			s.Health = Unreachable
		case c.Draining:
			s.Health = Draining
		case len(c.Warnings) > 0:
			s.Health = Degraded
		}
		all[i] = s
	}
	return all
}

// Capabilities implements [backend.Backend]: the union of what the members last
// declared. It asks nobody, and a member that doesn't answer keeps its last
// known value; the union itself is stale when no member answers. Where routers
// nest so that several members lead to the same workers, these count once, by
// the member that answers and comes first.
func (f *Fleet) Capabilities(context.Context) (backend.Capabilities, error) {
	var all []backend.Capabilities
	var warnings []string
	stale, draining := true, true
	counted := map[string]string{} // by log key, the member that it counts with
	status := f.Status()
	slices.SortStableFunc(status, func(a, b Status) int { return staleLast(a.Capabilities) - staleLast(b.Capabilities) })
	for _, s := range status {
		if s.LastError != "" {
			warnings = append(warnings, fmt.Sprintf("backend %s does not answer: %s", s.Name, s.LastError))
		}
		if s.LastSeen.IsZero() {
			continue
		}
		for _, w := range s.Capabilities.Warnings {
			warnings = append(warnings, fmt.Sprintf("backend %s: %s", s.Name, w))
		}
		stale = stale && s.Capabilities.Stale
		draining = draining && s.Capabilities.Draining
		again, warning := count(counted, s)
		if warning != "" {
			warnings = append(warnings, warning)
		}
		if !again {
			all = append(all, s.Capabilities)
		}
	}
	union := backend.Union(f.name, all)
	union.Stale, union.Draining, union.Warnings = stale, draining && len(all) > 0, warnings
	return union, nil
}

func staleLast(c backend.Capabilities) int {
	if c.Stale {
		return 1
	}
	return 0
}

// count notes which workers a member leads to; they are known by the keys that
// sign their compute logs, which replicas share and others don't. again says
// that all of them count with other members already. The warning tells of that,
// and of sums that count a part twice, which nobody can take apart.
func count(counted map[string]string, s Status) (again bool, warning string) {
	var other string
	shared := 0
	for _, key := range s.Capabilities.LogKeys {
		if name, ok := counted[key.ID]; ok {
			other, shared = name, shared+1
			continue
		}
		counted[key.ID] = s.Name
	}
	switch {
	case shared == 0:
		return false, ""
	case shared == len(s.Capabilities.LogKeys):
		return true, fmt.Sprintf("backend %s leads only to workers that count with backend %s", s.Name, other)
	}
	return false, fmt.Sprintf("backends %s and %s lead to the same worker, whose capacity is counted twice", other, s.Name)
}

// Backends returns the names of all backends in order, those of a member that
// is a router itself as "site/name". Names that a call could not follow, because
// routers form a loop, are left out.
func (f *Fleet) Backends() []string {
	var names []string
	for _, m := range f.members {
		nested := m.Observe().Backends
		if nested == nil {
			names = append(names, m.Name)
		}
		for _, n := range nested {
			if strings.Count(n, "/") >= backend.MaxHops-1 {
				continue
			}
			names = append(names, m.Name+"/"+n)
		}
	}
	return names
}

// remember keeps what the end of a Provision says about the member.
func (f *Fleet) remember(m *Member, grant backend.Grant, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.degraded, m.Name)
		return
	}
	switch ruleFor(err).remember {
	case nothing:
	case degraded:
		f.degraded[m.Name] = string(backenderr.ReasonOf(err)) + ": " + shorten(err.Error(), longestReason)
	case full:
		now := time.Now()
		f.full[m.Name] = append(f.recent(m, now), shortage{grant.Region, grant.MinIsolation, grant.Shape, now.Add(fullFor)})
	}
}

// isFull reports whether the member was out of room, not long ago, for the same
// or less in the same place.
func (f *Fleet) isFull(m *Member, grant backend.Grant) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full[m.Name] = f.recent(m, time.Now())
	return slices.ContainsFunc(f.full[m.Name], func(s shortage) bool {
		return s.region == grant.Region && s.isolation == grant.MinIsolation && s.shape.Fits(grant.Shape)
	})
}

// maxShortages bounds what is remembered of one member; the oldest go first.
const maxShortages = 100

// recent returns the member's shortages that still count. The mutex is held.
func (f *Fleet) recent(m *Member, now time.Time) []shortage {
	kept := slices.DeleteFunc(f.full[m.Name], func(s shortage) bool { return !now.Before(s.until) })
	return kept[max(0, len(kept)-maxShortages):]
}

// freed forgets a member's shortages: something ended there.
func (f *Fleet) freed(m *Member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.full, m.Name)
}
