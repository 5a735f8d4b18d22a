package backendfake

import (
	"context"
	"fmt"
	"sync"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/failpoint"
)

// Op names a call of the provider's API. Each is a hook point.
type Op string

// The calls of the provider's API.
const (
	// OpCreate makes an instance.
	OpCreate Op = "create"
	// OpDescribe reads one instance.
	OpDescribe Op = "describe"
	// OpReady blocks until an instance runs or has ended.
	OpReady Op = "ready"
	// OpWait blocks until an instance has ended, or for a while.
	OpWait Op = "wait"
	// OpStop ends an instance and keeps its record.
	OpStop Op = "stop"
	// OpDelete begins to remove an instance with its record.
	OpDelete Op = "delete"
	// OpConfirm blocks until nothing of an instance is left.
	OpConfirm Op = "confirm"
	// OpList reads all instances of one bridge.
	OpList Op = "list"
)

// Kind is a kind of fault.
type Kind int

// The kinds of fault. All but LostAnswer and CrashAfter keep the call from
// having its effect.
const (
	// Capacity: the provider has no room.
	Capacity Kind = iota + 1
	// Quota: a limit of the account.
	Quota
	// Denied: the credentials lack a right.
	Denied
	// Unauthenticated: the credentials are refused.
	Unauthenticated
	// Throttled: too many calls.
	Throttled
	// Unavailable: the provider answers with a server error.
	Unavailable
	// Slow: the call hangs until the fault is released, and then goes on, or
	// until its context ends.
	Slow
	// LostAnswer: the call has its effect, and its answer is lost.
	LostAnswer
	// CrashBefore: the process that calls dies before the call has its effect.
	CrashBefore
	// CrashAfter: the process that calls dies after the call had its effect.
	CrashAfter
)

// String returns the kind's name.
func (k Kind) String() string {
	names := [...]string{
		Capacity: "capacity", Quota: "quota", Denied: "denied", Unauthenticated: "unauthenticated", Throttled: "throttled",
		Unavailable: "unavailable", Slow: "slow", LostAnswer: "lost answer", CrashBefore: "crash before", CrashAfter: "crash after",
	}
	if k > 0 && int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("kind(%d)", int(k))
}

// Fault says what goes wrong, and when.
type Fault struct {
	Kind Kind
	// Skip lets so many calls of the op pass before the fault begins.
	Skip int
	// Times is how many calls it hits; 0 means 1, less means all until
	// [Injection.Release].
	Times int
	// GrantID, if set, lets calls for other grants pass.
	GrantID backend.GrantID
}

// Injection is a fault at its hook point. Its methods may be called by several
// goroutines.
type Injection struct {
	op      Op
	trigger *failpoint.Trigger

	// Guarded by the provider's mutex.
	fault Fault
	hits  int
}

// Reached is closed when the fault has hit a call; with a crash the process is
// dead by then.
func (i *Injection) Reached() <-chan struct{} { return i.trigger.Reached() }

// Release ends the fault: calls that hang go on, and no later call is hit. When
// it returns, Reached is closed or never will be. It may be called again.
func (i *Injection) Release() { i.trigger.Release() }

func (i *Injection) over() bool {
	return i.trigger.Over() || i.fault.Times >= 0 && i.hits >= max(i.fault.Times, 1)
}

// Inject puts a fault at a hook point, for whichever driver calls there. If
// several are there, the oldest comes first.
func (p *Provider) Inject(op Op, f Fault) *Injection {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := &Injection{op: op, trigger: failpoint.New(), fault: f}
	p.injections = append(p.injections, i)
	return i
}

// FailNext makes the next call of op fail.
func (p *Provider) FailNext(op Op, kind Kind) *Injection { return p.Inject(op, Fault{Kind: kind}) }

// take returns the fault that hits this call, if any. The mutex is held.
func (p *Provider) take(op Op, id backend.GrantID) *Injection {
	kept := p.injections[:0]
	var hit *Injection
	for _, i := range p.injections {
		switch {
		case i.over():
			continue
		case hit != nil, i.op != op, i.fault.GrantID != (backend.GrantID{}) && i.fault.GrantID != id:
		case i.fault.Skip > 0:
			i.fault.Skip--
		case i.fault.Kind == CrashBefore, i.fault.Kind == CrashAfter, i.trigger.Strike(nil):
			i.hits++
			hit = i // A crash strikes when the process dies.
		}
		kept = append(kept, i)
	}
	clear(p.injections[len(kept):])
	p.injections = kept
	return hit
}

// Call is one call of the provider's API, as [Provider.Calls] lists it.
type Call struct {
	Op Op
	// GrantID is the grant it was for, zero for a list that was for none in
	// particular.
	GrantID backend.GrantID
	// Err is what the caller got, "" for success, "pending" while it is under
	// way.
	Err string
	// Effect says that the call changed something.
	Effect bool
}

// Mutates reports whether calls of the op may change something.
func (o Op) Mutates() bool { return o == OpCreate || o == OpStop || o == OpDelete }

// Calls returns the calls since the provider was made, in the order in which
// they began.
func (p *Provider) Calls() []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := make([]Call, len(p.calls))
	for i, c := range p.calls {
		calls[i] = *c
	}
	return calls
}

// Mutations returns how many calls have changed something.
func (p *Provider) Mutations() int {
	n := 0
	for _, c := range p.Calls() {
		if c.Effect {
			n++
		}
	}
	return n
}

// process is the life of one driver. When it is over, every call fails.
type process struct {
	once sync.Once
	died chan struct{}
	// last, if set, is what is done at death.
	last func()
}

func newProcess() *process { return &process{died: make(chan struct{})} }

func (c *process) kill() {
	c.once.Do(func() {
		close(c.died)
		if c.last != nil {
			c.last()
		}
	})
}

func (c *process) dead() bool {
	select {
	case <-c.died:
		return true
	default:
		return false
	}
}

// call passes the hook point of op and then runs effect, which reports whether
// it changed something; it runs with the mutex held.
func (p *Provider) call(ctx context.Context, from *process, op Op, id backend.GrantID, effect func() (bool, error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if from.dead() {
		return errKilled
	}
	record := &Call{Op: op, GrantID: id, Err: "pending"}
	p.calls = append(p.calls, record)
	finish := func(err error) error {
		record.Err = ""
		if err != nil {
			record.Err = err.Error()
		}
		return err
	}
	if err := ctx.Err(); err != nil {
		return finish(err)
	}
	kind := Kind(0)
	hit := p.take(op, id)
	if hit != nil {
		kind = hit.fault.Kind
		if kind == Slow {
			p.mu.Unlock()
			err := hang(ctx, from, hit)
			p.mu.Lock()
			if err != nil {
				return finish(err)
			}
		}
	}
	if kind == CrashBefore && hit.trigger.Strike(from.kill) {
		return finish(errKilled)
	}
	if code, ok := refusals[kind]; ok {
		return finish(&APIError{Code: code, Message: "injected: " + kind.String()})
	}
	changed, err := effect()
	record.Effect = changed
	switch {
	case kind == CrashAfter && hit.trigger.Strike(from.kill), from.dead():
		return finish(errKilled)
	case kind == LostAnswer:
		return finish(&APIError{Code: CodeUnavailable, Message: "injected: the answer is lost"})
	}
	return finish(err)
}

func hang(ctx context.Context, from *process, i *Injection) error {
	select {
	case <-i.trigger.Released():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-from.died:
		return errKilled
	}
}
