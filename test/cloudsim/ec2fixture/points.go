package ec2fixture

import (
	"slices"
	"sync"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/failpoint"
)

// call is one request to the cloud as the suite counts them. It may name several
// grants, or none: then it may be for any.
type call struct {
	backendtest.Call
	grants []backend.GrantID
}

// isFor tells whether a call counts for a grant; the zero id counts all.
func (c call) isFor(id backend.GrantID) bool {
	return id == backend.GrantID{} || len(c.grants) == 0 || slices.Contains(c.grants, id)
}

// points are where requests pass. The zero value lets all pass.
type points struct {
	mu         sync.Mutex // protects all below
	recorders  []*recorder
	injections []*injection
}

type recorder struct {
	id    backend.GrantID
	calls []backendtest.Call
}

// record records the calls for a grant, or all.
func (p *points) record(id backend.GrantID) (stop func() []backendtest.Call) {
	r := &recorder{id: id}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recorders = append(p.recorders, r)
	return func() []backendtest.Call {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.recorders = slices.DeleteFunc(p.recorders, func(other *recorder) bool { return other == r })
		return slices.Clone(r.calls)
	}
}

// inject lets a fault wait for its call. When several match a call, the one that
// came first hits it, and the others don't count the call.
func (p *points) inject(f backendtest.Fault) *injection {
	i := &injection{Trigger: failpoint.New(), fault: f, left: max(f.Nth, 1)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.injections = append(p.injections, i)
	return i
}

// reach notes that a call begins, and returns the fault that hits it, or nil.
func (p *points) reach(c call) *injection {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.recorders {
		if !c.isFor(r.id) {
			continue
		}
		noted := c.Call
		if !noted.Varies && slices.Contains(r.calls, noted) && r.id != (backend.GrantID{}) {
			noted.Varies = true // A deletion is repeated until it shows.
		}
		r.calls = append(r.calls, noted)
	}
	p.injections = slices.DeleteFunc(p.injections, (*injection).over)
	for _, i := range p.injections {
		if i.hits(c) {
			return i
		}
	}
	return nil
}

// injection is a fault that is waiting or at work.
type injection struct {
	*failpoint.Trigger
	fault backendtest.Fault
	// left and done are protected by the mutex of the points: how many calls that
	// match there are until it hits, and whether it has and won't again.
	left int
	done bool
}

var _ backendtest.Injection = (*injection)(nil)

// over reports whether it will hit nothing any more.
func (i *injection) over() bool { return i.done || i.Over() }

func (i *injection) hits(c call) bool {
	if i.fault.Point != c.Point || !c.isFor(i.fault.GrantID) {
		return false
	}
	if i.left > 1 {
		i.left--
		return false
	}
	i.done = !i.fault.Always
	return true
}
