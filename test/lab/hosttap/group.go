package hosttap

import (
	"regexp"
	"slices"
	"sync"

	"github.com/compute-bridge/compute-bridge/pkg/failpoint"
)

// Call is something that the worker asked of a host.
type Call struct {
	// Point names what was asked, without anything that differs between runs.
	Point string
	// Mutates says that it may change something on the host.
	Mutates bool
	// Mentions are the 64-digit ids in it, a grant's among them.
	Mentions []string
}

// Kind is a way in which a call fails.
type Kind string

// The ways, with the names that pkg/backendtest has for them. The first five
// answer for the host, which never sees the call.
const (
	Capacity        Kind = "capacity"
	Quota           Kind = "quota"
	Denied          Kind = "denied"
	Unauthenticated Kind = "unauthenticated"
	Throttled       Kind = "throttled"
	Unavailable     Kind = "unavailable"
	// Slow holds the call until the fault is released, and then lets it go on.
	Slow Kind = "slow"
	// LostAnswer lets the call have its effect; its connection is then cut in
	// place of the answer.
	LostAnswer Kind = "lost answer"
	// CrashBefore kills the worker; the call is never forwarded.
	CrashBefore Kind = "crash before"
	// CrashAfter kills the worker once the host has answered; it never gets the
	// answer.
	CrashAfter Kind = "crash after"
)

// Fault is what is to go wrong.
type Fault struct {
	// Point is the call that it hits.
	Point string
	// Nth counts the calls since Inject, from 1; 0 means 1.
	Nth  int
	Kind Kind
	// Always hits all calls from the n-th on until the fault is released.
	Always bool
	// Grant, if set, leaves out the calls that don't mention this id.
	Grant string
}

// Injection is a fault that waits or is at work.
type Injection struct {
	trigger *failpoint.Trigger
	fault   Fault
	group   *Group
	seen    int // protected by group.mu
}

// Reached is closed once the fault has hit: after a crash when the worker is
// dead, after a lost answer when the connection is cut.
func (i *Injection) Reached() <-chan struct{} { return i.trigger.Reached() }

// Release ends the fault. A call that is held goes on. When it returns, Reached
// is closed or never will be.
func (i *Injection) Release() {
	i.group.mu.Lock()
	i.group.faults = slices.DeleteFunc(i.group.faults, func(o *Injection) bool { return o == i })
	i.group.mu.Unlock()
	i.trigger.Release()
}

// Group is the taps of one worker. Its methods may be called at any time.
type Group struct {
	kill func()

	mu         sync.Mutex // protects the fields below
	faults     []*Injection
	recordings []*recording
	links      map[*link]struct{}
	refusing   bool
	thawed     chan struct{} // not nil while nothing is forwarded
}

// recording collects calls.
type recording struct {
	grant string
	calls []Call
}

// NewGroup returns a group without taps. kill ends the worker at a crash point;
// when it returns the worker must do nothing any more. It must not wait for a
// tap to close.
func NewGroup(kill func()) *Group {
	return &Group{kill: kill, links: map[*link]struct{}{}}
}

// Record collects the calls that mention an id, or all if it is empty, in the
// order in which they come, until the returned function is called.
func (g *Group) Record(grant string) (stop func() []Call) {
	r := &recording{grant: grant}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.recordings = append(g.recordings, r)
	return func() []Call {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.recordings = slices.DeleteFunc(g.recordings, func(o *recording) bool { return o == r })
		return slices.Clone(r.calls)
	}
}

// Inject has a call fail.
func (g *Group) Inject(f Fault) *Injection {
	f.Nth = max(f.Nth, 1)
	i := &Injection{trigger: failpoint.New(), fault: f, group: g}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.faults = append(g.faults, i)
	return i
}

// arrive takes note of a call and returns the fault that hits it, if any.
func (g *Group) arrive(c *Call) *Injection {
	if c == nil {
		return nil
	}
	mentions := func(grant string) bool { return grant == "" || slices.Contains(c.Mentions, grant) }
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.recordings {
		if mentions(r.grant) {
			r.calls = append(r.calls, *c)
		}
	}
	var hit *Injection
	for _, i := range g.faults {
		f := i.fault
		if f.Point != c.Point || !mentions(f.Grant) {
			continue
		}
		i.seen++
		if hit == nil && (i.seen == f.Nth || f.Always && i.seen > f.Nth) {
			hit = i
		}
	}
	return hit
}

// crash kills the worker: nothing is forwarded any more, and then the connections
// end.
func (g *Group) crash() {
	links := g.current()
	for _, l := range links {
		l.dead.Store(true)
	}
	if g.kill != nil {
		g.kill()
	}
	for _, l := range links {
		l.close()
	}
}

func (g *Group) current() []*link {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []*link
	for l := range g.links {
		out = append(out, l)
	}
	return out
}

// Cut ends all connections, to the worker and to the hosts. What is held is
// never forwarded.
func (g *Group) Cut() {
	for _, l := range g.current() {
		l.close()
	}
}

// Refuse says whether new connections are closed at once. Refusing ends those
// that there are.
func (g *Group) Refuse(refuse bool) {
	g.mu.Lock()
	g.refusing = refuse
	g.mu.Unlock()
	if refuse {
		g.Cut()
	}
}

// Freeze stops forwarding, without a word to either side, until the returned
// function is called: the connections are half-open. The worker's bytes are
// still acknowledged by the kernel, as those to a hung sshd are; see
// lab.Host.CutOff for packets that are lost.
func (g *Group) Freeze() (thaw func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.thawed == nil {
		g.thawed = make(chan struct{})
	}
	thawed := g.thawed
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.thawed == thawed {
			g.thawed = nil
			close(thawed)
		}
	})
}

// add takes a connection in, unless connections are refused.
func (g *Group) add(l *link) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refusing {
		return false
	}
	g.links[l] = struct{}{}
	return true
}

func (g *Group) remove(l *link) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.links, l)
}

// frozen returns a channel that is closed when forwarding goes on, nil if it
// does.
func (g *Group) frozen() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.thawed
}

var (
	idPattern     = regexp.MustCompile(`[0-9a-f]{64}`)
	tempPattern   = regexp.MustCompile(`\.tmp-[0-9a-f]+`)
	bridgePattern = regexp.MustCompile(`cb[0-9a-f]{10}`)
	digitPattern  = regexp.MustCompile(`[0-9]+`)
)

// mentioned returns the ids in texts.
func mentioned(texts ...[]byte) []string {
	var out []string
	for _, text := range texts {
		for _, id := range idPattern.FindAll(text, -1) {
			if !slices.Contains(out, string(id)) {
				out = append(out, string(id))
			}
		}
	}
	return out
}

// stable leaves out of a name what differs between runs.
func stable(name string) string {
	name = idPattern.ReplaceAllString(name, "ID")
	name = tempPattern.ReplaceAllString(name, ".tmp")
	name = bridgePattern.ReplaceAllString(name, "cbX")
	return digitPattern.ReplaceAllString(name, "N")
}
