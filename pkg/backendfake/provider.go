package backendfake

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshtest"
)

// Host is a place with room for instances.
type Host struct {
	Name   string
	Region backend.Region
	// Capacity is what the driver may give to grants.
	Capacity backend.Shape
	// MaxInstances is how many instances it may hold at once; 0 means no limit
	// but the room.
	MaxInstances int
}

// Options say how a provider behaves. The zero value is a provider without
// hosts that does everything at once.
type Options struct {
	Hosts []Host
	// BootTime passes from the creation of an instance until it runs.
	BootTime time.Duration
	// DeleteTime passes from a delete until nothing of the instance is left.
	DeleteTime time.Duration
	// VisibleAfter passes from the creation of an instance until reads and
	// deletes find it. Creates see it at once.
	VisibleAfter time.Duration
	// EnforceCapacity makes the provider refuse what doesn't fit into a host.
	EnforceCapacity bool
	// IgnoreDeadlines makes the platform not end anything by itself.
	IgnoreDeadlines bool
	// WithSSH gives each instance a real SSH server on loopback. Without it, a
	// receipt names a port where nobody listens.
	WithSSH bool
}

// Provider is an in-memory provider. It is safe for concurrent use.
type Provider struct {
	options Options
	closing sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	next       int
	instances  map[string]*instance // by name
	spent      map[string]bool      // tokens of instances that are gone
	history    map[backend.GrantID]*History
	injections []*Injection
	calls      []*Call
	failBoot   []ExitStatus
}

// History is what was ever made for a grant.
type History struct {
	// Created counts the instances that were ever made.
	Created int
	// AtOnce is how many existed at the same time, at most.
	AtOnce int
}

// ExitStatus is how a workload ends by itself.
type ExitStatus struct {
	// Code is the exit status; used when Signal is empty.
	Code int32
	// Signal is the signal that ended it ("KILL").
	Signal string
	// OutOfMemory says that the kernel ended it for memory.
	OutOfMemory bool
	// Console is the last that it printed.
	Console string
}

// request is what a create call carries.
type request struct {
	bridge   string
	id       backend.GrantID
	attempt  uint32
	name     string
	token    string
	host     string
	params   string
	shape    backend.Shape
	validTo  time.Time
	hostKey  redact.Secret
	loginKey string
	// environment is what logins get. Params tell it apart from others.
	environment map[string]string
}

// view is what a read of an instance returns.
type view struct {
	request
	instanceID backend.InstanceID
	region     backend.Region
	createdAt  time.Time
	startedAt  time.Time
	endedAt    time.Time
	deleting   bool
	exit       backend.Exit
	console    string
	usage      backend.Usage
	sshPort    uint16
}

func (v view) running() bool { return !v.startedAt.IsZero() && v.endedAt.IsZero() }

type instance struct {
	view
	visibleAt time.Time
	fixed     *backend.Usage
	ssh       *sshtest.Server
	boot      *time.Timer
	deadline  *time.Timer
	removal   *time.Timer
	// changed is closed and replaced at each change.
	changed chan struct{}
}

// NewProvider returns a provider. Close it to stop its timers and SSH servers.
func NewProvider(options Options) *Provider {
	options.Hosts = slices.Clone(options.Hosts)
	return &Provider{options: options, instances: map[string]*instance{}, spent: map[string]bool{}, history: map[backend.GrantID]*History{}}
}

// Close ends everything that the provider runs.
func (p *Provider) Close() {
	p.mu.Lock()
	p.closed = true
	var servers []*sshtest.Server
	for _, i := range p.instances {
		i.stopTimers()
		if i.ssh != nil {
			servers = append(servers, i.ssh)
			i.ssh = nil
		}
	}
	for _, i := range p.injections {
		i.Release()
	}
	p.mu.Unlock()
	for _, s := range servers {
		s.Close()
	}
	p.closing.Wait()
}

// Names returns the names of all instances of which anything is left, whatever
// bridge they belong to, sorted.
func (p *Provider) Names() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.instances))
	for name := range p.instances {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Running returns how many instances of a grant run.
func (p *Provider) Running(id backend.GrantID) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, i := range p.instances {
		if i.id == id && i.running() {
			n++
		}
	}
	return n
}

// History returns what was ever made for a grant.
func (p *Provider) History(id backend.GrantID) History {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h, ok := p.history[id]; ok {
		return *h
	}
	return History{}
}

// Exit makes the workload of a grant end by itself. It reports whether one
// ran.
func (p *Provider) Exit(id backend.GrantID, status ExitStatus) bool {
	return p.each(id, func(i *instance) { p.end(i, status.exit(), status.Console) })
}

// Interrupt ends a grant's instance as a provider does that needs the room. It
// reports whether one ran.
func (p *Provider) Interrupt(id backend.GrantID) bool {
	return p.each(id, func(i *instance) { p.end(i, backend.Exit{Reason: backend.EndInterrupted}, "") })
}

// Vanish removes a grant's instance without a trace. It reports whether one
// ran.
func (p *Provider) Vanish(id backend.GrantID) bool {
	return p.each(id, func(i *instance) { p.remove(i) })
}

// Plant puts an instance on the first host that no driver has asked for, as an
// earlier process of a bridge might have left it. Its deadline isn't enforced.
func (p *Provider) Plant(bridge string, id backend.GrantID, validTo time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := fmt.Sprintf("cb-%s-%s-1", bridge, id)
	i := &instance{changed: make(chan struct{})}
	i.request = request{bridge: bridge, id: id, attempt: 1, name: name, token: name, host: p.options.Hosts[0].Name, validTo: validTo}
	i.region, i.createdAt, i.startedAt = p.options.Hosts[0].Region, time.Now(), time.Now()
	i.instanceID = backend.InstanceID("planted-" + id.String()[:8])
	p.instances[name] = i
}

// Uproot removes what Plant made, if it is still there.
func (p *Provider) Uproot(bridge string, id backend.GrantID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i, ok := p.instances[fmt.Sprintf("cb-%s-%s-1", bridge, id)]; ok {
		p.remove(i)
	}
}

// SetUsage fixes what the provider measures for a grant's instance from now
// on. It reports whether one ran.
func (p *Provider) SetUsage(id backend.GrantID, usage backend.Usage) bool {
	return p.each(id, func(i *instance) { i.fixed = &usage })
}

// FailBoot makes the next instance end in place of running.
func (p *Provider) FailBoot(status ExitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failBoot = append(p.failBoot, status)
}

func (p *Provider) each(id backend.GrantID, do func(*instance)) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	found := false
	for _, i := range p.instances {
		if i.id == id && i.running() {
			do(i)
			found = true
		}
	}
	return found
}

func (s ExitStatus) exit() backend.Exit {
	exit := backend.Exit{Reason: backend.EndWorkloadExited, Signal: s.Signal}
	if s.OutOfMemory {
		exit.Reason = backend.EndOutOfMemory
	}
	if s.Signal == "" {
		code := s.Code
		exit.Code = &code
	}
	return exit
}

func (i *instance) stopTimers() {
	for _, t := range []*time.Timer{i.boot, i.deadline, i.removal} {
		if t != nil {
			t.Stop()
		}
	}
}

func (i *instance) notify() {
	close(i.changed)
	i.changed = make(chan struct{})
}

// end ends the instance and keeps its record. The first end counts.
func (p *Provider) end(i *instance, exit backend.Exit, console string) {
	if !i.endedAt.IsZero() {
		return
	}
	i.endedAt, i.exit, i.console = time.Now(), exit, console
	i.usage = i.measure()
	for _, t := range []*time.Timer{i.boot, i.deadline} {
		if t != nil {
			t.Stop()
		}
	}
	if i.ssh != nil {
		p.closing.Go(i.ssh.Close)
		i.ssh = nil
	}
	i.notify()
}

// measure returns the counters: CPU as if one core was busy all the time.
func (i *instance) measure() backend.Usage {
	if i.startedAt.IsZero() {
		return backend.Usage{}
	}
	if i.fixed != nil {
		return *i.fixed
	}
	to := i.endedAt
	if to.IsZero() {
		to = time.Now()
	}
	elapsed := to.Sub(i.startedAt)
	figure := func(v int64) *backend.Measurement {
		return &backend.Measurement{Value: v, Source: backend.UsageHostMeasured, From: i.startedAt, To: to}
	}
	return backend.Usage{
		CPU: figure(elapsed.Milliseconds()), RAMPeak: figure(64 << 20), NetworkReceived: figure(elapsed.Milliseconds()),
		NetworkSent: figure(elapsed.Milliseconds()), DiskRead: figure(0), DiskWritten: figure(0),
	}
}

func (p *Provider) remove(i *instance) {
	if p.instances[i.name] != i {
		return
	}
	p.end(i, backend.Exit{Reason: backend.EndVanished}, "")
	i.stopTimers()
	delete(p.instances, i.name)
	p.spent[i.token] = true
	i.notify()
}

// find returns an instance that reads can see.
func (p *Provider) find(name string) (*instance, error) {
	i, ok := p.instances[name]
	if !ok || time.Now().Before(i.visibleAt) {
		return nil, &APIError{Code: CodeNotFound, Message: "no instance " + name}
	}
	return i, nil
}

func (p *Provider) host(name string) (Host, bool) {
	i := slices.IndexFunc(p.options.Hosts, func(h Host) bool { return h.Name == name })
	if i < 0 {
		return Host{}, false
	}
	return p.options.Hosts[i], true
}

// create makes an instance, or returns the one that the same request made. A
// token makes one instance and never another, also when that is gone.
func (p *Provider) create(ctx context.Context, from *process, r request) (view, error) {
	var out view
	err := p.call(ctx, from, OpCreate, r.id, func() (bool, error) {
		for _, i := range p.instances {
			if i.token != r.token {
				continue
			}
			if !i.same(r) {
				return false, &APIError{Code: CodeMismatch, Message: "the token was used with other parameters"}
			}
			out = i.view
			return false, nil
		}
		if p.spent[r.token] {
			return false, &APIError{Code: CodeTokenSpent, Message: "the instance that the token made is gone"}
		}
		if _, taken := p.instances[r.name]; taken {
			return false, &APIError{Code: CodeNameInUse, Message: "there is an instance " + r.name}
		}
		i, err := p.make(r)
		if err != nil {
			return false, err
		}
		out = i.view
		return true, nil
	})
	return out, err
}

func (r request) same(o request) bool {
	return r.name == o.name && r.host == o.host && r.params == o.params && r.hostKey.Equal(o.hostKey) && r.loginKey == o.loginKey
}

// make makes the instance of a new request. The mutex is held.
func (p *Provider) make(r request) (*instance, error) {
	host, ok := p.host(r.host)
	switch {
	case p.closed:
		return nil, &APIError{Code: CodeUnavailable, Message: "closed"}
	case !ok:
		return nil, &APIError{Code: CodeUnavailable, Message: "no host " + r.host}
	case p.options.EnforceCapacity && !r.shape.Fits(host.Capacity.Sub(p.used(r.host))):
		return nil, &APIError{Code: CodeCapacity, Message: "host " + r.host + " is full"}
	}
	p.next++
	now := time.Now()
	i := &instance{changed: make(chan struct{}), visibleAt: now.Add(p.options.VisibleAfter)}
	i.request, i.region, i.createdAt = r, host.Region, now
	i.instanceID = backend.InstanceID(fmt.Sprintf("i-%06d", p.next))
	i.sshPort = uint16(20000 + p.next%20000)
	if p.options.WithSSH {
		server, port, err := startSSH(r)
		if err != nil {
			return nil, &APIError{Code: CodeUnavailable, Message: err.Error()}
		}
		i.ssh, i.sshPort = server, port
	}
	p.instances[r.name] = i
	p.remember(r.id)
	if !r.validTo.IsZero() {
		p.endAt(i, r.validTo)
	}
	start := func() { p.start(i) }
	if p.options.BootTime == 0 {
		start()
	} else {
		i.boot = time.AfterFunc(p.options.BootTime, func() { p.locked(start) })
	}
	return i, nil
}

// endAt has the platform end an instance. The mutex is held.
func (p *Provider) endAt(i *instance, deadline time.Time) {
	if p.options.IgnoreDeadlines {
		return
	}
	i.deadline = time.AfterFunc(time.Until(deadline), func() {
		p.locked(func() { p.end(i, backend.Exit{Reason: backend.EndDeadline}, "") })
	})
}

// arm gives a deadline to an instance that has none, for [BugArmsLate].
func (p *Provider) arm(from *process, v view, deadline time.Time) view {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.instances[v.name]; i != nil && !from.dead() && i.validTo.IsZero() {
		i.validTo = deadline
		p.endAt(i, deadline)
	}
	v.validTo = deadline
	return v
}

func (p *Provider) locked(do func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		do()
	}
}

func (p *Provider) start(i *instance) {
	if !i.endedAt.IsZero() {
		return
	}
	i.startedAt = time.Now()
	if len(p.failBoot) > 0 {
		status := p.failBoot[0]
		p.failBoot = p.failBoot[1:]
		p.end(i, status.exit(), status.Console)
		return
	}
	i.notify()
}

func (p *Provider) remember(id backend.GrantID) {
	h, ok := p.history[id]
	if !ok {
		h = &History{}
		p.history[id] = h
	}
	h.Created++
	atOnce := 0
	for _, i := range p.instances {
		if i.id == id {
			atOnce++
		}
	}
	h.AtOnce = max(h.AtOnce, atOnce)
}

func (p *Provider) used(host string) backend.Shape {
	var sum backend.Shape
	for _, i := range p.instances {
		if i.request.host == host {
			sum = sum.Add(i.shape)
		}
	}
	return sum
}

func (i *instance) read() view {
	v := i.view
	v.usage = i.measure()
	return v
}

func (p *Provider) describe(ctx context.Context, from *process, id backend.GrantID, name string) (view, error) {
	var out view
	err := p.call(ctx, from, OpDescribe, id, func() (bool, error) {
		i, err := p.find(name)
		if err == nil {
			out = i.read()
		}
		return false, err
	})
	return out, err
}

// everyBridge lists what all bridges have.
const everyBridge = "*"

// list is made for one grant, or for none in particular.
func (p *Provider) list(ctx context.Context, from *process, id backend.GrantID, bridge string) ([]view, error) {
	var out []view
	err := p.call(ctx, from, OpList, id, func() (bool, error) {
		for _, i := range p.instances {
			if (i.bridge == bridge || bridge == everyBridge) && !time.Now().Before(i.visibleAt) {
				out = append(out, i.read())
			}
		}
		return false, nil
	})
	slices.SortFunc(out, func(a, b view) int {
		return cmp.Or(slices.Compare(a.id[:], b.id[:]), cmp.Compare(a.attempt, b.attempt))
	})
	return out, err
}

func (p *Provider) stop(ctx context.Context, from *process, id backend.GrantID, name string, exit backend.Exit) (view, error) {
	var out view
	err := p.call(ctx, from, OpStop, id, func() (bool, error) {
		i, err := p.find(name)
		if err != nil {
			return false, err
		}
		ran := i.endedAt.IsZero()
		p.end(i, exit, "")
		out = i.read()
		return ran, nil
	})
	return out, err
}

func (p *Provider) delete(ctx context.Context, from *process, id backend.GrantID, name string) error {
	return p.call(ctx, from, OpDelete, id, func() (bool, error) {
		i, err := p.find(name)
		if err != nil || i.deleting {
			return false, err
		}
		p.end(i, backend.Exit{Reason: backend.EndTerminated}, "")
		i.deleting = true
		if p.options.DeleteTime == 0 {
			p.remove(i)
		} else {
			i.removal = time.AfterFunc(p.options.DeleteTime, func() { p.locked(func() { p.remove(i) }) })
		}
		return true, nil
	})
}

// until passes the hook point of op and blocks until done says so of the
// instance, it is not to be found, or ctx ends; it returns what it saw last.
func (p *Provider) until(ctx context.Context, from *process, op Op, id backend.GrantID, name string, done func(view) bool) (view, error) {
	if err := p.call(ctx, from, op, id, func() (bool, error) { return false, nil }); err != nil {
		return view{}, err
	}
	for {
		p.mu.Lock()
		i, err := p.find(name)
		var seen view
		var changed chan struct{}
		if err == nil {
			seen, changed = i.read(), i.changed
		}
		p.mu.Unlock()
		if err != nil || done(seen) {
			return seen, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return seen, ctx.Err()
		case <-from.died:
			return view{}, errKilled
		}
	}
}
