package backendfake

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// DriverOptions say what a driver is configured with. Zero durations mean the
// defaults.
type DriverOptions struct {
	// Isolation are the levels on offer; empty means container only.
	Isolation []backend.Isolation
	// NetworkModes are the policies on offer; empty means open only.
	NetworkModes []backend.NetworkMode
	// BootTimeout is how long an instance may take to become ready; 10 s.
	BootTimeout time.Duration
	// CleanUpTimeout is how long an undo may take; 10 s.
	CleanUpTimeout time.Duration
	// UsageInterval is how often Watch reports usage; 1 s.
	UsageInterval time.Duration
	// RetryInterval is how long to wait between tries of a call; 2 ms.
	RetryInterval time.Duration
	// Tries is how often a call is sent while its outcome is unclear; 3.
	Tries int
	// OnDeath, if set, is called when the driver's process dies, by Kill or by a
	// fault, before any call can notice: to make dead what else belongs to the
	// process. It must neither block nor use the provider.
	OnDeath func()
	// Bugs make the driver break its promises, to try a test suite on.
	Bugs []Bug
}

// Driver is a worker.Driver on a [Provider]. It keeps all seven laws and can
// serve as the example for others.
type Driver struct {
	provider *Provider
	env      worker.Env
	options  DriverOptions
	process  *process
	journal  worker.Journal

	// loaded is full once reserved holds what earlier processes began. Who
	// takes its false out may load.
	loaded chan bool

	mu       sync.Mutex
	reserved map[attemptKey]reservation
}

type attemptKey struct {
	id      backend.GrantID
	attempt uint32
}

type reservation struct {
	host  string
	shape backend.Shape
}

// params are what an attempt was begun with, as the journal keeps them.
type params struct {
	Shape    backend.Shape
	Region   backend.Region
	ValidTo  time.Time
	LoginKey string
	Grant    [sha256.Size]byte
	Ports    []backend.Port
}

var _ worker.Driver = (*Driver)(nil)

// Open returns a new driver on the provider, as a process that starts.
func Open(provider *Provider, env worker.Env, options DriverOptions) *Driver {
	if len(options.Isolation) == 0 {
		options.Isolation = []backend.Isolation{backend.IsolationContainer}
	}
	if len(options.NetworkModes) == 0 {
		options.NetworkModes = []backend.NetworkMode{backend.NetworkOpen}
	}
	options.BootTimeout = cmp.Or(options.BootTimeout, 10*time.Second)
	options.CleanUpTimeout = cmp.Or(options.CleanUpTimeout, 10*time.Second)
	options.UsageInterval = cmp.Or(options.UsageInterval, time.Second)
	options.RetryInterval = cmp.Or(options.RetryInterval, 2*time.Millisecond)
	options.Tries = cmp.Or(options.Tries, 3)
	d := &Driver{provider: provider, env: env, options: options, process: newProcess(), reserved: map[attemptKey]reservation{}, loaded: make(chan bool, 1)}
	d.process.last = options.OnDeath
	d.loaded <- false
	d.journal = mortalJournal{env.Journal, d.process}
	return d
}

// bridge is whose resources the driver takes for its own.
func (d *Driver) bridge() string {
	if d.has(BugEveryBridge) {
		return everyBridge
	}
	return d.env.BridgeID
}

func (d *Driver) has(b Bug) bool { return slices.Contains(d.options.Bugs, b) }

// Kill makes this and every later call of the driver fail, as if its process
// were dead: neither the provider nor the journal hears of it again.
func (d *Driver) Kill() { d.process.kill() }

// Killed is closed when the driver's process is dead, by Kill or by a fault.
func (d *Driver) Killed() <-chan struct{} { return d.process.died }

// Close lets go of nothing: there are no connections.
func (d *Driver) Close() error { return nil }

func (d *Driver) name(id backend.GrantID, attempt uint32) string {
	if d.has(BugSecondInstance) {
		return fmt.Sprintf("cb-%s-%p-%s-%d", d.env.BridgeID, d, id, attempt)
	}
	return fmt.Sprintf("cb-%s-%s-%d", d.env.BridgeID, id, attempt)
}

func (d *Driver) token(id backend.GrantID, attempt uint32) string {
	sum := sha256.Sum256([]byte(d.name(id, attempt)))
	return hex.EncodeToString(sum[:16])
}

// Capabilities implements worker.Driver.
func (d *Driver) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	loadErr := d.load(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	regions := map[backend.Region]*backend.RegionCapabilities{}
	for _, h := range d.provider.options.Hosts {
		r, ok := regions[h.Region]
		if !ok {
			r = &backend.RegionCapabilities{
				Region: h.Region, Isolation: slices.Clone(d.options.Isolation), NetworkModes: slices.Clone(d.options.NetworkModes),
				Enforcement: backend.EnforcedByPlatform, StorageEnforced: true,
			}
			slices.Sort(r.Isolation)
			slices.Sort(r.NetworkModes)
			regions[h.Region] = r
		}
		used, active := d.used(h.Name)
		free := h.Capacity.Sub(used).Max(backend.Shape{})
		if h.MaxInstances > 0 && active >= h.MaxInstances {
			free = backend.Shape{}
		}
		r.Total, r.Free = r.Total.Add(h.Capacity), r.Free.Add(free)
		r.LargestSingle, r.LargestFree = larger(r.LargestSingle, h.Capacity), larger(r.LargestFree, free)
		r.ActiveInstances += int64(active)
		r.MaxInstances += int64(d.most(h))
	}
	out := backend.Capabilities{ObservedAt: time.Now().UTC(), Stale: loadErr != nil}
	for _, r := range regions {
		out.Regions = append(out.Regions, *r)
	}
	slices.SortFunc(out.Regions, func(a, b backend.RegionCapabilities) int { return cmp.Compare(a.Region, b.Region) })
	return out, nil
}

func larger(a, b backend.Shape) backend.Shape {
	if cmp.Or(cmp.Compare(a.CPU, b.CPU), cmp.Compare(a.RAM, b.RAM), cmp.Compare(a.Storage, b.Storage)) >= 0 {
		return a
	}
	return b
}

// most is how many instances a host may hold; without a limit as many as have
// a thousandth of a core each.
func (d *Driver) most(h Host) int {
	if h.MaxInstances > 0 {
		return h.MaxInstances
	}
	return int(h.Capacity.CPU)
}

// used sums up what is reserved on a host. The mutex is held.
func (d *Driver) used(host string) (backend.Shape, int) {
	var sum backend.Shape
	n := 0
	for _, r := range d.reserved {
		if r.host == host {
			sum = sum.Add(r.shape)
			n++
		}
	}
	return sum, n
}

// CanSatisfy implements worker.Driver.
func (d *Driver) CanSatisfy(_ context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	no := func(format string, args ...any) (backend.Satisfaction, error) {
		return backend.Satisfaction{Reason: fmt.Sprintf(format, args...)}, nil
	}
	if best := slices.Max(d.options.Isolation); grant.MinIsolation > best {
		return no("no isolation stronger than %s on offer", best)
	}
	if mode := max(grant.Network.Mode, backend.NetworkOpen); !slices.Contains(d.options.NetworkModes, mode) {
		return no("network policy %s is not enforced here", mode)
	}
	if grant.Image.Kind != backend.ImageOCIArchive && grant.Image.Kind != backend.ImageOCIReference {
		return no("no images of kind %s", grant.Image.Kind)
	}
	known := false
	for _, h := range d.provider.options.Hosts {
		if grant.Region != "" && h.Region != grant.Region {
			continue
		}
		known = true
		if grant.Shape.Fits(h.Capacity) {
			return backend.Satisfaction{Satisfiable: true}, nil
		}
	}
	if !known {
		return no("no region %q", grant.Region)
	}
	return no("no host has room for %s", grant.Shape)
}

// load reads once what earlier processes have begun, so that their
// reservations count.
func (d *Driver) load(ctx context.Context) (err error) {
	var done bool
	select {
	case done = <-d.loaded:
	case <-ctx.Done():
		return classify(ctx.Err(), "read what exists")
	}
	defer func() { d.loaded <- done }()
	if done || d.has(BugForgetsReservations) {
		return nil
	}
	open, err := d.journal.Open(ctx)
	if err != nil {
		return err
	}
	views, err := d.provider.list(ctx, d.process, backend.GrantID{}, d.bridge())
	if err != nil && !d.has(BugBlind) {
		return classify(err, "list instances")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range open {
		p, err := parse(a)
		if err != nil {
			return err
		}
		d.reserved[attemptKey{a.GrantID, a.Number}] = reservation{a.Placement, p.Shape}
	}
	for _, v := range views {
		d.reserved[attemptKey{v.id, v.attempt}] = reservation{v.host, v.shape}
	}
	done = true
	return nil
}

func parse(a worker.Attempt) (params, error) {
	var p params
	if err := json.Unmarshal(a.Params, &p); err != nil {
		return params{}, backenderr.Wrap(backenderr.Internal, err, "read the parameters of attempt %d of grant %s", a.Number, a.GrantID)
	}
	return p, nil
}

// reserve finds a host for a grant and takes the room, under the number that
// the next attempt will have.
func (d *Driver) reserve(key attemptKey, grant backend.Grant) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fits, crowded := false, false
	for _, h := range d.provider.options.Hosts {
		if (grant.Region != "" && h.Region != grant.Region) || !grant.Shape.Fits(h.Capacity) {
			continue
		}
		fits = true
		used, n := d.used(h.Name)
		switch {
		case n >= d.most(h):
			crowded = true
		case d.has(BugNoReservation):
			return h.Name, nil
		case grant.Shape.Fits(h.Capacity.Sub(used)):
			d.reserved[key] = reservation{h.Name, grant.Shape}
			return h.Name, nil
		}
	}
	switch {
	case !fits:
		return "", backenderr.New(backenderr.GrantNotSatisfiable, "no host in region %q has room for %s", grant.Region, grant.Shape).
			WithCreated(backenderr.CreatedNone)
	case crowded:
		return "", backenderr.New(backenderr.WorkerFull, "every host holds as many instances as it may").
			WithCreated(backenderr.CreatedNone).WithRetryAfter(5 * time.Second)
	}
	return "", backenderr.New(backenderr.CapacityExhausted, "no host has %s free", grant.Shape).
		WithCreated(backenderr.CreatedNone).WithRetryAfter(5 * time.Second)
}

func (d *Driver) release(key attemptKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.has(BugFreesAll) {
		clear(d.reserved)
	}
	delete(d.reserved, key)
}

// begun is an attempt that may go on.
type begun struct {
	worker.Attempt
	params
	// fresh says that nothing was sent for the attempt before.
	fresh bool
}

// begin returns the grant's open attempt with its parameters, or a new one with
// a reservation.
func (d *Driver) begin(ctx context.Context, order worker.Order) (begun, error) {
	attempts, err := d.journal.Attempts(ctx, order.Grant.ID)
	if err != nil {
		return begun{}, err
	}
	key := attemptKey{order.Grant.ID, 1}
	for _, a := range attempts {
		if a.Gone {
			key.attempt = a.Number + 1
			continue
		}
		if err := d.load(ctx); err != nil {
			return begun{}, err
		}
		p, err := parse(a)
		return begun{Attempt: a, params: p}, err
	}
	// Nothing of the grant exists, so that nothing does when this fails.
	if err := d.load(ctx); err != nil {
		return begun{}, none(err)
	}
	p, err := paramsOf(order)
	if err != nil {
		return begun{}, none(err)
	}
	rendered, err := json.Marshal(p)
	if err != nil {
		return begun{}, none(backenderr.Wrap(backenderr.Internal, err, "render the parameters"))
	}
	host, err := d.reserve(key, order.Grant)
	if err != nil {
		return begun{}, err
	}
	if d.has(BugCreateFirst) {
		if err := d.createFirst(ctx, key, host, string(rendered), p); err != nil {
			return begun{}, err
		}
	}
	attempt, err := d.journal.Begin(ctx, order.Grant.ID, host, rendered)
	if err != nil {
		// Whatever the journal holds now, nothing was sent.
		d.release(key)
		return begun{}, none(err)
	}
	return begun{Attempt: attempt, params: p, fresh: true}, nil
}

// createFirst is [BugCreateFirst].
func (d *Driver) createFirst(ctx context.Context, key attemptKey, host, rendered string, p params) error {
	private, _, err := d.env.HostKey(key.id, key.attempt)
	if err != nil {
		return err
	}
	_, err = d.provider.create(ctx, d.process, request{
		bridge: d.env.BridgeID, id: key.id, attempt: key.attempt, name: d.name(key.id, key.attempt), token: d.token(key.id, key.attempt),
		host: host, params: rendered, shape: p.Shape, validTo: p.ValidTo, hostKey: private, loginKey: p.LoginKey,
	})
	return err
}

func paramsOf(order worker.Order) (params, error) {
	grant, err := json.Marshal(order.Grant)
	if err != nil {
		return params{}, backenderr.Wrap(backenderr.Internal, err, "render the grant")
	}
	return params{
		Shape: order.Grant.Shape, Region: order.Grant.Region, ValidTo: order.Grant.ValidTo, LoginKey: order.LoginKey,
		Grant: sha256.Sum256(grant), Ports: order.Grant.Ports,
	}, nil
}

// none states that nothing exists.
func none(err error) error { return backenderr.From(err).Clone().WithCreated(backenderr.CreatedNone) }

// Provision implements worker.Driver.
func (d *Driver) Provision(ctx context.Context, order worker.Order) (worker.Ready, error) {
	for {
		ready, err := d.provision(ctx, order)
		if !errors.Is(err, errOver) {
			return ready, err
		}
	}
}

// errOver says that an attempt had been undone, and that this is on record now:
// the next one may begin.
var errOver = errors.New("the attempt is over")

func (d *Driver) provision(ctx context.Context, order worker.Order) (worker.Ready, error) {
	attempt, err := d.begin(ctx, order)
	if err != nil {
		return worker.Ready{}, err
	}
	ready, err := d.makeReady(ctx, order, &attempt)
	if err == nil {
		return ready, nil
	}
	over := errors.Is(err, errOver)
	failure := classify(err, "provision")
	if ctx.Err() != nil && !backenderr.Is(failure, backenderr.GrantEnded) {
		failure = classify(ctx.Err(), "provision")
	}
	cleanUp, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.options.CleanUpTimeout)
	defer cancel()
	if err := d.giveUp(cleanUp, attempt); err != nil {
		d.env.Log.WarnContext(ctx, "Clean-up of a failed attempt is not confirmed",
			"grant_id", order.Grant.ID.String(), "attempt", attempt.Number, "error", err.Error())
		return worker.Ready{}, failure.WithCreated(backenderr.CreatedUnknown).
			WithMetadata(backenderr.MetaLeaked, d.name(order.Grant.ID, attempt.Number))
	}
	if over && ctx.Err() == nil {
		return worker.Ready{}, errOver
	}
	return worker.Ready{}, failure.WithCreated(backenderr.CreatedNone)
}

// giveUp leaves nothing of an attempt.
func (d *Driver) giveUp(ctx context.Context, attempt begun) error {
	switch {
	case d.has(BugNoUndo):
		return errors.New("left as it is")
	case d.has(BugSaysNone):
		return nil
	}
	if !attempt.fresh {
		return d.undo(ctx, attempt.GrantID, attempt.Number)
	}
	if err := d.journal.Gone(ctx, attempt.GrantID, attempt.Number); err != nil {
		return err
	}
	d.release(attemptKey{attempt.GrantID, attempt.Number})
	return nil
}

func (d *Driver) makeReady(ctx context.Context, order worker.Order, attempt *begun) (worker.Ready, error) {
	progress := order.Progress
	if progress == nil {
		progress = func(string) {}
	}
	private, public, err := d.env.HostKey(order.Grant.ID, attempt.Number)
	if err != nil {
		return worker.Ready{}, backenderr.Wrap(backenderr.Internal, err, "derive the host key")
	}
	progress("creating the instance")
	r := request{
		bridge: d.env.BridgeID, id: order.Grant.ID, attempt: attempt.Number,
		name: d.name(order.Grant.ID, attempt.Number), token: d.token(order.Grant.ID, attempt.Number),
		host: attempt.Placement, params: string(attempt.Attempt.Params), shape: attempt.Shape, validTo: attempt.ValidTo,
		hostKey: private, loginKey: attempt.LoginKey, environment: order.Grant.Environment,
	}
	if d.has(BugArmsLate) {
		r.validTo = time.Time{}
	}
	v, err := d.create(ctx, attempt, r)
	if err != nil {
		return worker.Ready{}, err
	}
	progress("waiting for SSH")
	if v, err = d.awaitReady(ctx, v.request, public); err != nil {
		return worker.Ready{}, err
	}
	if d.has(BugArmsLate) {
		v = d.provider.arm(d.process, v, attempt.ValidTo)
	}
	if err := d.journal.Check(ctx, order.Grant.ID); err != nil {
		return worker.Ready{}, err
	}
	ready := worker.Ready{
		Instance: backend.Instance{
			GrantID: v.id, ID: v.instanceID, Region: v.region, Isolation: slices.Max(d.options.Isolation), Shape: v.shape,
			Attempt: v.attempt, StartedAt: v.startedAt.UTC(), ValidTo: v.validTo.UTC(), Enforcement: backend.EnforcedByPlatform,
		},
		Host: loopback, Port: v.sshPort, User: User, HostKey: public,
	}
	for n, port := range attempt.Ports {
		ready.Instance.Ports = append(ready.Instance.Ports, backend.PublishedPort{
			Port: port, PublicHost: loopback, PublicPort: uint16(40000 + n),
		})
	}
	return ready, nil
}

// create adopts what exists under the attempt's name, or makes it.
func (d *Driver) create(ctx context.Context, attempt *begun, r request) (view, error) {
	v, err := d.describe(ctx, r.id, r.name)
	if err == nil {
		return d.adopt(v, r)
	}
	if codeOf(err) != CodeNotFound {
		return view{}, err
	}
	if err := d.journal.Check(ctx, r.id); err != nil && !d.has(BugNoCheck) {
		return view{}, err
	}
	attempt.fresh = false
	tries := 0
	err = d.retry(ctx, func() (err error) {
		if tries++; tries > 1 && d.has(BugNewToken) {
			r.name = fmt.Sprintf("cb-%s-%s-%s-%d", r.bridge, rand.Text(), r.id, r.attempt)
			r.token = r.name
		}
		v, err = d.provider.create(ctx, d.process, r)
		return err
	})
	switch codeOf(err) {
	case CodeNameInUse, CodeMismatch:
		if v, err = d.describe(ctx, r.id, r.name); err != nil {
			return view{}, err
		}
		return d.adopt(v, r)
	case CodeTokenSpent:
		return view{}, errOver
	}
	return v, err
}

// adopt takes over an instance that an earlier call made for the same attempt.
// One that the driver itself has begun to undo, and then died, isn't taken up
// again: two instances would have one attempt.
func (d *Driver) adopt(v view, r request) (view, error) {
	if (v.deleting || v.exit.Reason == backend.EndTerminated) && !d.has(BugResumes) {
		return view{}, errOver
	}
	if !v.same(r) {
		return view{}, backenderr.New(backenderr.Internal, "instance %s was made with other parameters", r.name)
	}
	return v, nil
}

func (d *Driver) describe(ctx context.Context, id backend.GrantID, name string) (v view, err error) {
	err = d.retry(ctx, func() (err error) {
		v, err = d.provider.describe(ctx, d.process, id, name)
		return err
	})
	return v, err
}

// retry repeats a call that is idempotent while its outcome is unclear.
func (d *Driver) retry(ctx context.Context, call func() error) error {
	for try := 1; ; try++ {
		err := call()
		code := codeOf(err)
		if (code != CodeUnavailable && code != CodeThrottled) || try >= d.options.Tries {
			return err
		}
		if err := d.pause(ctx, try); err != nil {
			return err
		}
	}
}

func (d *Driver) pause(ctx context.Context, factor int) error {
	timer := time.NewTimer(time.Duration(factor) * d.options.RetryInterval)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitReady blocks until the instance runs and answers with its host key.
func (d *Driver) awaitReady(ctx context.Context, r request, hostKey string) (view, error) {
	waiting, cancel := context.WithTimeout(ctx, d.options.BootTimeout)
	defer cancel()
	visible := time.Now().Add(d.provider.options.VisibleAfter)
	for {
		asked := time.Now() // What counts is what could be seen then.
		v, err := d.provider.until(waiting, d.process, OpReady, r.id, r.name, func(v view) bool {
			return v.running() || !v.endedAt.IsZero()
		})
		switch code := codeOf(err); {
		case err == nil && !v.endedAt.IsZero():
			return view{}, backenderr.New(backenderr.WorkloadFailed, "the workload ended before it was ready").WithConsole(v.console)
		case err == nil:
			if d.provider.options.WithSSH {
				if err := probe(waiting, v.sshPort, hostKey); err != nil {
					return view{}, err
				}
			}
			return v, nil
		case code == CodeNotFound && !asked.Before(visible):
			return view{}, backenderr.New(backenderr.ProviderUnavailable, "the instance vanished while it was made").WithRetryAfter(time.Second)
		case code == CodeNotFound, code == CodeUnavailable, code == CodeThrottled:
			err = d.pause(waiting, 1)
		}
		if ctx.Err() == nil && waiting.Err() != nil {
			return view{}, backenderr.New(backenderr.BootTimeout, "not ready after %s", d.options.BootTimeout)
		}
		if err != nil {
			return view{}, err
		}
	}
}

// undo removes everything of an attempt and then gives back its room.
func (d *Driver) undo(ctx context.Context, id backend.GrantID, attempt uint32) error {
	if d.has(BugGoneFirst) {
		if err := d.journal.Gone(ctx, id, attempt); err != nil {
			return err
		}
	}
	if err := d.erase(ctx, id, attempt); err != nil {
		return err
	}
	if err := d.journal.Gone(ctx, id, attempt); err != nil {
		return err
	}
	d.release(attemptKey{id, attempt})
	return nil
}

// erase deletes an attempt's instance until the provider confirms that nothing
// of it is left. That it isn't to be found counts only once the provider has
// had the time to show it.
func (d *Driver) erase(ctx context.Context, id backend.GrantID, attempt uint32) error {
	name := d.name(id, attempt)
	settled := time.Now().Add(d.provider.options.VisibleAfter)
	for {
		asked := time.Now()
		err := d.retry(ctx, func() error { return d.provider.delete(ctx, d.process, id, name) })
		if err == nil && d.has(BugEarlyGone) {
			return nil
		}
		if err == nil {
			err = d.retry(ctx, func() error {
				_, err := d.provider.until(ctx, d.process, OpConfirm, id, name, func(view) bool { return false })
				return err
			})
		}
		switch {
		case codeOf(err) != CodeNotFound:
			return classify(err, "delete the instance")
		case !asked.Before(settled):
			return nil
		}
		if err := d.pause(ctx, 1); err != nil {
			return classify(err, "delete the instance")
		}
	}
}

// Watch implements worker.Driver.
func (d *Driver) Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
	visible := time.Now().Add(d.provider.options.VisibleAfter)
	for {
		exit, over, err := d.watch(ctx, id, usage, visible)
		switch {
		case over || backenderr.Is(err, backenderr.InstanceNotFound):
			return exit, err
		case ctx.Err() != nil:
			return backend.Exit{}, classify(ctx.Err(), "watch")
		case d.process.dead():
			<-ctx.Done()
			return backend.Exit{}, classify(ctx.Err(), "watch")
		case err != nil:
			if err := d.pause(ctx, 5); err != nil {
				return backend.Exit{}, classify(err, "watch")
			}
		}
	}
}

// watch looks until the end, or until it fails.
func (d *Driver) watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage), visible time.Time) (exit backend.Exit, over bool, err error) {
	attempts, err := d.journal.Attempts(ctx, id)
	if err != nil {
		return backend.Exit{}, false, err
	}
	open := slices.IndexFunc(attempts, func(a worker.Attempt) bool { return !a.Gone })
	if open < 0 {
		saved, err := d.journal.SavedLog(ctx, id)
		switch {
		case err != nil:
			return backend.Exit{}, false, err
		case saved == nil:
			return backend.Exit{}, false, backenderr.New(backenderr.InstanceNotFound, "no instance of grant %s", id)
		}
		return saved.Exit, true, nil
	}
	for {
		asked := time.Now()
		v, err := d.wait(ctx, id, d.name(id, attempts[open].Number))
		switch {
		case err == nil:
			return v.exit, true, nil
		case codeOf(err) == CodeNotFound && !asked.Before(visible):
			if saved, err := d.journal.SavedLog(ctx, id); err != nil || saved != nil {
				return exitOf(saved), err == nil, err
			}
			return backend.Exit{Reason: backend.EndVanished}, true, nil
		case !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil:
			return backend.Exit{}, false, err
		}
		if v.running() {
			usage(account(v, time.Now()))
		}
	}
}

// wait waits for an instance's end for one interval.
func (d *Driver) wait(ctx context.Context, id backend.GrantID, name string) (view, error) {
	ctx, cancel := context.WithTimeout(ctx, d.options.UsageInterval)
	defer cancel()
	return d.provider.until(ctx, d.process, OpWait, id, name, func(v view) bool { return !v.endedAt.IsZero() })
}

func exitOf(log *backend.ComputeLog) backend.Exit {
	if log == nil {
		return backend.Exit{}
	}
	return log.Exit
}

// account adds to what is measured what follows from the reservation.
func account(v view, to time.Time) backend.Usage {
	u := v.usage
	u.Allocated(v.shape, v.startedAt, to)
	return u
}

// Terminate implements worker.Driver.
func (d *Driver) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	if err := d.load(ctx); err != nil {
		return nil, err
	}
	attempts, err := d.journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	var views []view
	err = d.retry(ctx, func() (err error) {
		views, err = d.provider.list(ctx, d.process, id, d.bridge())
		return err
	})
	if err != nil && !d.has(BugBlind) {
		return nil, classify(err, "list instances")
	}
	numbers := map[uint32]bool{}
	for _, a := range attempts {
		if !a.Gone {
			numbers[a.Number] = true
		}
	}
	for _, v := range views {
		if v.id == id {
			if _, began := numbers[v.attempt]; !began {
				numbers[v.attempt] = false
			}
		}
	}
	if d.has(BugEveryBridge) {
		for _, v := range views {
			if v.id == id && v.bridge != d.env.BridgeID {
				return nil, classify(d.provider.delete(ctx, d.process, id, v.name), "delete the instance")
			}
		}
	}
	for n, began := range numbers {
		if err := d.settle(ctx, id, n); err != nil {
			return nil, err
		}
		if !began {
			// Nobody wrote down that it began; there is nothing to cross out.
			if err := d.erase(ctx, id, n); err != nil {
				return nil, err
			}
			continue
		}
		if err := d.undo(ctx, id, n); err != nil {
			return nil, err
		}
	}
	saved, err := d.journal.SavedLog(ctx, id)
	if saved != nil && d.has(BugEndsAgain) {
		saved.EndedAt = time.Now().UTC()
	}
	return saved, err
}

// settle stops an attempt's instance and saves its final account, before that
// is deleted with it.
func (d *Driver) settle(ctx context.Context, id backend.GrantID, attempt uint32) error {
	name := d.name(id, attempt)
	exit := backend.Exit{Reason: backend.EndTerminated}
	v, err := d.describe(ctx, id, name)
	if err == nil && !v.deleting {
		if !time.Now().Before(v.validTo) {
			exit.Reason = backend.EndDeadline
		}
		err = d.retry(ctx, func() (err error) {
			v, err = d.provider.stop(ctx, d.process, id, name, exit)
			return err
		})
	}
	if codeOf(err) == CodeNotFound {
		return nil
	}
	if err != nil {
		return classify(err, "stop the instance")
	}
	if v.startedAt.IsZero() || d.has(BugLosesUsage) {
		return nil
	}
	return d.journal.SaveLog(ctx, backend.ComputeLog{
		GrantID: id, InstanceID: v.instanceID, Region: v.region, Attempt: attempt, Shape: v.shape,
		StartedAt: v.startedAt.UTC(), EndedAt: v.endedAt.UTC(), ValidTo: v.validTo.UTC(),
		Exit: v.exit, Usage: account(v, v.endedAt),
	})
}

// List implements backend.Inventory.
func (d *Driver) List(ctx context.Context) (backend.Listing, error) {
	views, err := d.provider.list(ctx, d.process, backend.GrantID{}, d.bridge())
	if err != nil {
		return backend.Listing{}, classify(err, "list instances")
	}
	var out backend.Listing
	for _, v := range views {
		out.Resources = append(out.Resources, backend.Resource{
			GrantID: v.id, Attempt: v.attempt, InstanceID: v.instanceID, Placement: v.host, Running: v.running(),
			CreatedAt: v.createdAt.UTC(), ValidTo: v.validTo.UTC(),
		})
	}
	return out, nil
}
