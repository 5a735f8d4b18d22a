// Package ledgertest watches the calls that a process makes to its ledger, and
// lets chosen ones fail.
//
// [New] puts a [Ledger] around a real one, with the same methods, for one life
// of a process. Its [Points], which several lives may share, hold what is
// recorded and what is to fail:
//
//	points := new(ledgertest.Points)
//	l := ledgertest.New(real, points) // give it to a worker or to claims
//	stop := points.Record(id)
//	... a clean run ...
//	calls := stop() // [{ledger.Claim ...} {ledger.PutClaim ... Mutates}]
//	hit := points.Inject(ledgertest.Fault{Point: "ledger.PutClaim", RequestID: id, Kind: ledgertest.LoseAnswer})
//	<-hit.Reached()
//
// A call is named by its method: "ledger.PutClaim". A watcher somewhere else,
// such as on the wire to a database, uses the same Points with names of its own.
package ledgertest

import (
	"slices"
	"sync"

	"github.com/compute-bridge/compute-bridge/pkg/failpoint"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// Call is one call to a ledger.
type Call struct {
	// Point names it: "ledger.PutClaim".
	Point string
	// RequestID is the grant that it is for, zero if it is for none, as a
	// listing is, or if nobody can tell.
	RequestID ledger.RequestID
	// Mutates is true if the call writes, or would if there were something to.
	Mutates bool
}

// Kind is a kind of fault.
type Kind string

// The kinds of fault. What fails, fails with [ledger.ErrUnavailable].
const (
	// Refuse: the call fails without effect.
	Refuse Kind = "unavailable"
	// LoseAnswer: the call has its effect and fails. A listing yields one entry
	// and fails.
	LoseAnswer Kind = "lost answer"
	// Slow: the call waits until it is released or its context ends, and then
	// goes on.
	Slow Kind = "slow"
	// CrashBefore: the process dies instead of making the call.
	CrashBefore Kind = "crash before"
	// CrashAfter: the process dies once the call had its effect. A listing has
	// yielded everything by then.
	CrashAfter Kind = "crash after"
)

// Kinds are all kinds of fault.
func Kinds() []Kind { return []Kind{Refuse, LoseAnswer, Slow, CrashBefore, CrashAfter} }

// Fault is something that goes wrong with a call.
type Fault struct {
	// Point is the call that it hits; empty means any.
	Point string
	// RequestID, if it isn't zero, lets calls for other grants, and those for
	// none, pass.
	RequestID ledger.RequestID
	// Nth is which of the calls that match is hit, counted from 1 since the
	// fault was injected; 0 means 1.
	Nth  int
	Kind Kind
	// Always means that all calls that match from the Nth on are hit, until
	// the fault is released; else it hits one.
	Always bool
	// Crash, if set, is called by the crash kinds to kill the rest of the
	// process: from the goroutine of the call, which has not returned. It must
	// not wait for that goroutine, nor release the fault.
	Crash func()
}

// Points is where calls pass. The zero value lets all pass. It is safe for
// concurrent use.
type Points struct {
	mu        sync.Mutex // protects all below
	recorders []*recorder
	faults    []*Injection
}

type recorder struct {
	ids   []ledger.RequestID
	calls []Call
}

// Record records the calls for the given grants, or all calls, listings among
// them, if none is given, until stop is called, which returns them in the order
// in which they began.
func (p *Points) Record(ids ...ledger.RequestID) (stop func() []Call) {
	r := &recorder{ids: ids}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recorders = append(p.recorders, r)
	return func() []Call {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.recorders = slices.DeleteFunc(p.recorders, func(other *recorder) bool { return other == r })
		return slices.Clone(r.calls)
	}
}

// Inject lets f wait for its call. When several faults match a call, the one
// that was injected first hits it; the others don't count the call.
func (p *Points) Inject(f Fault) *Injection {
	i := &Injection{trigger: failpoint.New(), fault: f, left: max(f.Nth, 1)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, i)
	return i
}

// Reach is for those who watch calls: it records that c begins, and returns the
// fault that hits it, or nil.
func (p *Points) Reach(c Call) *Injection {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.recorders {
		if len(r.ids) == 0 || slices.Contains(r.ids, c.RequestID) {
			r.calls = append(r.calls, c)
		}
	}
	p.faults = slices.DeleteFunc(p.faults, (*Injection).over)
	for _, i := range p.faults {
		if i.hits(c) {
			return i
		}
	}
	return nil
}

// Injection is a fault that is waiting or at work.
type Injection struct {
	trigger *failpoint.Trigger
	fault   Fault

	// left and done are protected by the mutex of the Points: how many calls
	// that match there are until it hits, and whether it has and won't again.
	left int
	done bool
}

// Fault returns what was injected.
func (i *Injection) Fault() Fault { return i.fault }

// Crash is for those who watch calls, when a crash has hit one: it kills the
// process as the fault says. It returns false, and does nothing, if the fault was
// released meanwhile; the call goes on then.
func (i *Injection) Crash() bool { return i.crash(nil) }

func (i *Injection) crash(first func()) bool {
	return i.trigger.Strike(func() {
		if first != nil {
			first()
		}
		if i.fault.Crash != nil {
			i.fault.Crash()
		}
	})
}

// Reached is closed once the fault has hit: for [LoseAnswer] before the call has
// its effect, for the crash kinds when the process is dead.
func (i *Injection) Reached() <-chan struct{} { return i.trigger.Reached() }

// Release ends the fault: it hits no call any more, and calls that it holds go
// on. When it returns, Reached is closed or never will be.
func (i *Injection) Release() { i.trigger.Release() }

// Released is closed by Release.
func (i *Injection) Released() <-chan struct{} { return i.trigger.Released() }

// over reports whether it will hit nothing any more.
func (i *Injection) over() bool { return i.done || i.trigger.Over() }

func (i *Injection) hits(c Call) bool {
	if i.fault.Point != "" && i.fault.Point != c.Point {
		return false
	}
	if i.fault.RequestID != (ledger.RequestID{}) && i.fault.RequestID != c.RequestID {
		return false
	}
	if i.left > 1 {
		i.left--
		return false
	}
	i.done = !i.fault.Always
	if i.fault.Kind == CrashBefore || i.fault.Kind == CrashAfter {
		return true // Who watches calls Crash.
	}
	return i.trigger.Strike(nil)
}
