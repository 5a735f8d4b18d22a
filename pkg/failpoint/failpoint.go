// Package failpoint is what all injected faults have in common, wherever they are
// injected: each waits for the call that it hits, tells when it has, and can be
// taken back. What may come at the same time, as a fault that hits and its being
// taken back, is decided here once:
//
//	trigger := failpoint.New() // handed to the test
//	...
//	if trigger.Strike(killTheWorker) { // at the call
//		return errDead
//	}
package failpoint

import "sync"

// Trigger is a fault that waits for its call, or is at work. Its methods may be
// called by several goroutines.
type Trigger struct {
	reach    sync.Once
	reached  chan struct{}
	release  sync.Once
	released chan struct{}

	// striking is taken from the decision to strike until it has struck. It is no
	// mutex, so that in a bubble of testing/synctest time passes for who waits.
	striking chan struct{}
}

// New returns a trigger of a fault that has hit nothing yet.
func New() *Trigger {
	return &Trigger{reached: make(chan struct{}), released: make(chan struct{}), striking: make(chan struct{}, 1)}
}

// Strike has the fault hit: it calls effect, if that isn't nil, and then closes
// Reached. It returns false, and does nothing, if the fault was released before.
// Effect must not call Release.
func (t *Trigger) Strike(effect func()) bool {
	t.striking <- struct{}{}
	defer func() { <-t.striking }()
	if t.Over() {
		return false
	}
	if effect != nil {
		effect()
	}
	t.reach.Do(func() { close(t.reached) })
	return true
}

// Reached is closed once the fault has hit, and its effect is there.
func (t *Trigger) Reached() <-chan struct{} { return t.reached }

// Release ends the fault: calls that it holds go on, and it hits nothing any
// more. A strike that has begun is over when Release returns, so that Reached is
// closed by then or never will be. It may be called again.
func (t *Trigger) Release() {
	t.release.Do(func() { close(t.released) })
	t.striking <- struct{}{}
	<-t.striking
}

// Released is closed by Release.
func (t *Trigger) Released() <-chan struct{} { return t.released }

// Over reports whether the fault was released.
func (t *Trigger) Over() bool {
	select {
	case <-t.released:
		return true
	default:
		return false
	}
}
