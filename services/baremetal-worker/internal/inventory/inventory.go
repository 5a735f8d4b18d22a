// Package inventory keeps what every host has and what of it is taken.
//
// A grant is reserved before any I/O is done for it, and its reservation is
// given back in one place, when the host has confirmed that nothing of it is
// left. A reservation is everything that two grants must not share: CPU,
// memory, disk, host ports, and a slot, from which the ranges of user ids and
// addresses follow.
//
// Nothing here does I/O. The hosts' own directories are the truth; at start,
// and whenever a host comes back, reservations are restored from them.
package inventory

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// retryFull is when a caller may ask again after there was no room: as long as
// a short grant may last.
const retryFull = 30 * time.Second

// retryElsewhere is when a caller may ask for another replica again.
const retryElsewhere = 500 * time.Millisecond

// Host is a host as the operator declares it.
type Host struct {
	Name     string
	Region   backend.Region
	Capacity backend.Shape
	// MaxInstances is how many grants it runs at once; the number of its slots.
	MaxInstances int
	// FirstPort and LastPort are the host ports that may be published.
	FirstPort, LastPort uint16
}

// Need is what a grant needs of a host.
type Need struct {
	// Region is empty when any does.
	Region backend.Region
	Shape  backend.Shape
	// Ports is how many host ports.
	Ports int
}

// Reservation is what a grant holds of a host.
type Reservation struct {
	Grant backend.GrantID
	Host  string
	Shape backend.Shape
	// Ports are host ports, in the order in which they were asked for.
	Ports []uint16
	// Slot counts from 0; no two grants of a host share one.
	Slot int
}

type host struct {
	Host
	// problem says why nothing new is placed here, "" if it may be; unfit, that
	// an operator must act, not only wait.
	problem string
	unfit   bool
	// elsewhere says that another replica of the worker has it, as problem tells:
	// what the host holds is known, and it takes grants, but not from here.
	elsewhere bool

	used backend.Shape
	// held says by itself which slots and ports are taken. Two grants may hold
	// the same one while a host changes hands between replicas: the later got it
	// where the earlier's end was known first. A set beside it, from which the
	// end of one grant removes what it held, would then call free what the other
	// lives in.
	held map[backend.GrantID]Reservation
	// foreign are ports that something else on the host has, until when that is
	// believed.
	foreign map[uint16]time.Time
}

// Inventory is safe for concurrent use.
type Inventory struct {
	mu      sync.Mutex // protects all below
	hosts   []*host    // in the operator's order
	byName  map[string]*host
	byGrant map[backend.GrantID]*host
}

// New returns an inventory of hosts on which nothing may be placed until
// [Inventory.SetUsable] says so.
func New(hosts []Host) *Inventory {
	inv := &Inventory{byName: map[string]*host{}, byGrant: map[backend.GrantID]*host{}}
	for _, h := range hosts {
		entry := &host{
			Host: h, problem: "not connected yet",
			held: map[backend.GrantID]Reservation{}, foreign: map[uint16]time.Time{},
		}
		inv.hosts = append(inv.hosts, entry)
		inv.byName[h.Name] = entry
	}
	return inv
}

// SetUsable says that new grants may be placed on a host.
func (inv *Inventory) SetUsable(name string) { inv.set(name, "", false, false) }

// SetUnreachable says that a host can't be seen at the moment. What it holds
// stays reserved: unreachable isn't dead.
func (inv *Inventory) SetUnreachable(name, why string) { inv.set(name, why, false, false) }

// SetUnfit says that a host lacks something that an operator must mend.
func (inv *Inventory) SetUnfit(name, why string) { inv.set(name, why, true, false) }

// SetElsewhere says that another replica of the worker has a host. It counts as
// what the worker has, all replicas together, and nothing is placed there by
// this one.
func (inv *Inventory) SetElsewhere(name, why string) { inv.set(name, why, false, true) }

func (inv *Inventory) set(name, problem string, unfit, elsewhere bool) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if h := inv.byName[name]; h != nil {
		h.problem, h.unfit, h.elsewhere = problem, unfit, elsewhere
	}
}

// SetPortForeign says that something else on a host has a port, so that no grant
// gets it for a while.
func (inv *Inventory) SetPortForeign(name string, port uint16, until time.Time) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if h := inv.byName[name]; h != nil {
		h.foreign[port] = until
	}
}

// CanEverFit answers whether any host, idle, could hold the need; if not, why.
func (inv *Inventory) CanEverFit(n Need) (ok bool, why string) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	var reasons []string
	for _, h := range inv.hosts {
		if n.Region != "" && n.Region != h.Region {
			continue
		}
		if problem := h.tooSmallFor(n); problem != "" {
			reasons = append(reasons, problem)
			continue
		}
		return true, ""
	}
	if len(reasons) == 0 {
		return false, fmt.Sprintf("no host in region %q; there are %s", n.Region, strings.Join(inv.regionNames(), ", "))
	}
	return false, "no single host is large enough: " + strings.Join(reasons, "; ")
}

func (inv *Inventory) regionNames() []string {
	var names []string
	for _, h := range inv.hosts {
		names = append(names, string(h.Region))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// tooSmallFor says why the idle host can't hold the need.
func (h *host) tooSmallFor(n Need) string {
	switch ports := int(h.LastPort) - int(h.FirstPort) + 1; {
	case !n.Shape.Fits(h.Capacity):
		return fmt.Sprintf("host %s has %s, the grant needs %s", h.Name, h.Capacity, n.Shape)
	case n.Ports > ports:
		return fmt.Sprintf("host %s publishes %d ports, the grant needs %d", h.Name, ports, n.Ports)
	case h.MaxInstances < 1:
		return fmt.Sprintf("host %s takes no instances", h.Name)
	}
	return ""
}

// Reserve picks the first host, in the operator's order, that has room now, and
// reserves it. A grant that holds a reservation gets the same one again.
//
// Reasons: GRANT_NOT_SATISFIABLE when no host could ever hold it,
// OTHER_REPLICA when only hosts have room that another replica has,
// CAPACITY_EXHAUSTED or WORKER_FULL when hosts are full, PROVIDER_UNAVAILABLE
// when only hosts that can't be seen have room, HOST_UNFIT when only hosts that
// need an operator do. Nothing is created in any case.
func (inv *Inventory) Reserve(id backend.GrantID, n Need) (Reservation, error) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if h := inv.byGrant[id]; h != nil {
		return h.held[id].clone(), nil
	}
	var full, slotless, elsewhere, unseen, unfit []string
	for _, h := range inv.hosts {
		if (n.Region != "" && n.Region != h.Region) || h.tooSmallFor(n) != "" {
			continue
		}
		fits := n.Shape.Fits(h.Capacity.Sub(h.used))
		var ports []uint16
		if fits {
			ports = h.freePorts(n.Ports)
		}
		switch {
		case h.noSlot():
			slotless = append(slotless, h.Name)
		case !fits || len(ports) < n.Ports:
			full = append(full, h.Name)
		case h.elsewhere:
			elsewhere = append(elsewhere, h.Name+": "+h.problem)
		case h.unfit:
			unfit = append(unfit, h.Name+": "+h.problem)
		case h.problem != "":
			unseen = append(unseen, h.Name+": "+h.problem)
		default:
			r := Reservation{Grant: id, Host: h.Name, Shape: n.Shape, Ports: ports, Slot: h.freeSlot()}
			inv.take(h, r)
			return r.clone(), nil
		}
	}
	switch {
	case len(elsewhere) > 0:
		// What exists is unknown: the other replica may be at work for it.
		return Reservation{}, refuse(backenderr.OtherReplica, "only another replica's host has room:", elsewhere).
			WithCreated(backenderr.CreatedUnknown).WithRetryAfter(retryElsewhere)
	case len(unseen) > 0:
		return Reservation{}, refuse(backenderr.ProviderUnavailable, "no reachable host has room", unseen).WithRetryAfter(retryFull)
	case len(full) > 0:
		return Reservation{}, refuse(backenderr.CapacityExhausted, "no room at the moment on", full).WithRetryAfter(retryFull)
	case len(slotless) > 0:
		return Reservation{}, refuse(backenderr.WorkerFull, "max_instances is reached on", slotless).WithRetryAfter(retryFull)
	case len(unfit) > 0:
		return Reservation{}, refuse(backenderr.HostUnfit, "hosts need an operator", unfit)
	}
	return Reservation{}, refuse(backenderr.GrantNotSatisfiable, "no host can hold the grant", nil)
}

func refuse(reason backenderr.Reason, what string, hosts []string) *backenderr.Error {
	if len(hosts) > 0 {
		what += " " + strings.Join(hosts, "; ")
	}
	return backenderr.New(reason, "%s", what).WithCreated(backenderr.CreatedNone)
}

// Restore records a reservation that exists on a host, whether or not there is
// room: what is there is there. It replaces one of the same grant.
func (inv *Inventory) Restore(r Reservation) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	h := inv.byName[r.Host]
	if h == nil {
		return
	}
	inv.release(r.Grant)
	inv.take(h, r.clone())
}

// Release gives a grant's reservation back, and no other's.
func (inv *Inventory) Release(id backend.GrantID) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	inv.release(id)
}

// Get returns a grant's reservation.
func (inv *Inventory) Get(id backend.GrantID) (Reservation, bool) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	h := inv.byGrant[id]
	if h == nil {
		return Reservation{}, false
	}
	return h.held[id].clone(), true
}

// Held returns the grants that hold something of a host, in no order.
func (inv *Inventory) Held(name string) []backend.GrantID {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	h := inv.byName[name]
	if h == nil {
		return nil
	}
	ids := make([]backend.GrantID, 0, len(h.held))
	for id := range h.held {
		ids = append(ids, id)
	}
	return ids
}

func (inv *Inventory) take(h *host, r Reservation) {
	h.used = h.used.Add(r.Shape)
	h.held[r.Grant] = r
	inv.byGrant[r.Grant] = h
}

func (inv *Inventory) release(id backend.GrantID) {
	h := inv.byGrant[id]
	if h == nil {
		return
	}
	h.used = h.used.Sub(h.held[id].Shape)
	delete(h.held, id)
	delete(inv.byGrant, id)
}

// freePorts returns the n lowest free ports, fewer if there are not so many.
func (h *host) freePorts(n int) []uint16 {
	taken := map[uint16]bool{}
	for _, r := range h.held {
		for _, p := range r.Ports {
			taken[p] = true
		}
	}
	var free []uint16
	h.forgetForeign(time.Now())
	for p := int(h.FirstPort); p <= int(h.LastPort) && len(free) < n; p++ {
		port := uint16(p) //nolint:gosec // bounded by LastPort
		if _, foreign := h.foreign[port]; !foreign && !taken[port] {
			free = append(free, port)
		}
	}
	return free
}

func (h *host) forgetForeign(now time.Time) {
	for port, until := range h.foreign {
		if now.After(until) {
			delete(h.foreign, port)
		}
	}
}

// noSlot answers whether the host runs as many grants as it may.
func (h *host) noSlot() bool { return len(h.held) >= h.MaxInstances }

// freeSlot returns the lowest slot that no grant holds. Unless [host.noSlot], it
// is one of the host's: fewer grants than it has slots hold one each.
func (h *host) freeSlot() int {
	taken := map[int]bool{}
	for _, r := range h.held {
		taken[r.Slot] = true
	}
	slot := 0
	for taken[slot] {
		slot++
	}
	return slot
}

func (r Reservation) clone() Reservation {
	r.Ports = slices.Clone(r.Ports)
	return r
}

// Region is the sum of the hosts of one region.
type Region struct {
	Name                      backend.Region
	Total, Free               backend.Shape
	LargestSingle             backend.Shape
	LargestFree               backend.Shape
	Active, MaxInstances      int64
	Reachable, Hosts, Problem int
}

// Regions returns the regions, sorted by name, and what is wrong with hosts.
func (inv *Inventory) Regions() (regions []Region, problems []string) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	byName := map[backend.Region]*Region{}
	for _, h := range inv.hosts {
		r := byName[h.Region]
		if r == nil {
			r = &Region{Name: h.Region}
			byName[h.Region] = r
		}
		r.Hosts++
		r.Total = r.Total.Add(h.Capacity)
		r.LargestSingle = larger(r.LargestSingle, h.Capacity)
		r.Active += int64(len(h.held))
		r.MaxInstances += int64(h.MaxInstances)
		if h.problem != "" {
			problems = append(problems, fmt.Sprintf("host %s: %s", h.Name, h.problem))
		}
		if h.problem != "" && !h.elsewhere {
			r.Problem++
			continue
		}
		r.Reachable++
		h.forgetForeign(time.Now())
		if len(h.foreign) > 0 {
			ports := slices.Sorted(maps.Keys(h.foreign))
			problems = append(problems, fmt.Sprintf("host %s: something else has ports of the grants' range: %s", h.Name, strings.Trim(fmt.Sprint(ports), "[]")))
		}
		free := h.Capacity.Sub(h.used).Max(backend.Shape{})
		if h.noSlot() {
			free = backend.Shape{}
		}
		r.Free = r.Free.Add(free)
		r.LargestFree = larger(r.LargestFree, free)
	}
	for _, r := range byName {
		regions = append(regions, *r)
	}
	slices.SortFunc(regions, func(a, b Region) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return regions, problems
}

// larger returns the one of two shapes with more CPU, then memory, then disk.
func larger(a, b backend.Shape) backend.Shape {
	if a.CPU > b.CPU || (a.CPU == b.CPU && (a.RAM > b.RAM || (a.RAM == b.RAM && a.Storage >= b.Storage))) {
		return a
	}
	return b
}
