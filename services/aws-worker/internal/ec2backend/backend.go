// Package ec2backend runs grants as EC2 instances. It implements worker.Driver.
//
// A grant's attempt is one RunInstances call: its client token is a hash of
// bridge, grant and attempt, its tags say whose it is, its user-data carries all
// that the instance needs, and its volume and network interface die with it.
// What is shared, security groups, is made once per set of rules, and deleted when
// nobody uses it and the account has room for no more.
//
// What runs is read from EC2, never remembered: one read of each region serves
// all grants that wait for one. What EC2 doesn't show counts as gone only once it
// had the time to show it.
package ec2backend

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

const (
	// refreshInterval is how often types, offerings, subnets and images are read
	// again.
	refreshInterval = time.Hour
	// retryRefresh is how soon again after a failure.
	retryRefresh = time.Minute
	// freshGap is the time between two reads of a region that somebody waits
	// for, as a part of the poll interval.
	freshGap = 5
)

// Backend runs grants on EC2.
type Backend struct {
	config    Config
	env       worker.Env
	log       *slog.Logger
	clients   *clients
	catalogue *catalogue
	images    *images
	store     *store
	groups    groups
	regions   []*region // in the operator's order
	byName    map[backend.Region]*region

	life   context.Context //nolint:containedctx // the process's, not a call's
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu sync.Mutex // protects what follows
	// held are the attempts that take room: those that the ledger had open when
	// it was last asked, of whichever replica, and those of this process.
	held map[identity]holding
	// sent is when a create call of an attempt was last sent, as far as this
	// process can tell.
	sent map[identity]time.Time
}

// holding is where an attempt takes room.
type holding struct {
	region backend.Region
	since  time.Time // when this process learnt of it
}

// region is a region of the allowlist.
type region struct {
	name      backend.Region
	clients   *regionClients
	instances *shared[instances]
	parts     *shared[parts]
	schedules *shared[[]identity]
}

var _ worker.Replicated = (*Backend)(nil)

// Open checks identity, permissions and clock in every region, and reads what
// it offers. It fails if something is wrong, unless the configuration is
// lenient.
func Open(ctx context.Context, c Config, env worker.Env) (worker.Driver, error) {
	clients, err := newClients(ctx, c, env)
	if err != nil {
		return nil, err
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b := &Backend{
		config: c, env: env, log: env.Log, clients: clients, life: life, cancel: cancel,
		byName: map[backend.Region]*region{}, held: map[identity]holding{}, sent: map[identity]time.Time{},
	}
	b.catalogue = newCatalogue(c, clients)
	b.images = newImages(c, clients)
	if b.store, err = newStore(c, clients); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	gap := c.PollInterval.Duration / freshGap
	for _, rc := range c.Regions {
		client, err := clients.region(backend.Region(rc.Name))
		if err != nil {
			return nil, errors.Join(err, b.Close())
		}
		r := &region{name: backend.Region(rc.Name), clients: client}
		r.instances = newShared(life, gap, func(ctx context.Context) (instances, error) { return b.readInstances(ctx, client) })
		r.parts = newShared(life, gap, func(ctx context.Context) (parts, error) { return b.readParts(ctx, client) })
		r.schedules = newShared(life, gap, func(ctx context.Context) ([]identity, error) { return b.readSchedules(ctx, r) })
		b.regions = append(b.regions, r)
		b.byName[r.name] = r
	}
	if env.Janitor {
		return b, nil
	}
	if err := b.prepare(ctx); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// prepare does what a worker needs before it takes grants.
func (b *Backend) prepare(ctx context.Context) error {
	if _, err := b.takeStock(ctx); err != nil {
		return err
	}
	b.log.InfoContext(ctx, "Prices choose between types", "built_in_as_of", pricesAsOf, "own", len(b.config.Prices), "own_oldest", oldestPrice(b.config.Prices))
	problems := []error{b.clients.check(ctx)}
	for _, r := range b.regions {
		problems = append(problems, b.refresh(ctx, r))
		// What runs takes room, also if the ledger doesn't know of it.
		if _, err := r.instances.now(ctx); err != nil {
			problems = append(problems, fmt.Errorf("region %s: %w", r.name, err))
		}
	}
	if err := errors.Join(problems...); err != nil {
		if !b.config.LenientBoot {
			return err
		}
		b.log.WarnContext(ctx, "Starting although not all is well", "error", err.Error())
	}
	for _, r := range b.regions {
		b.tasks.Go(func() { b.keepFresh(r) })
	}
	b.tasks.Go(b.keepLooking)
	return nil
}

// keepLooking looks again at what the start found wrong, until all is well.
func (b *Backend) keepLooking() {
	for len(b.clients.problems()) > 0 && sleep(b.life, retryRefresh) == nil {
		if err := b.clients.recheck(b.life); err != nil && b.life.Err() == nil {
			b.log.WarnContext(b.life, "Not all is well", "error", err.Error())
		}
	}
}

// refresh reads what a region offers.
func (b *Backend) refresh(ctx context.Context, r *region) error {
	if err := b.catalogue.refresh(ctx, r.name); err != nil {
		return fmt.Errorf("region %s: %w", r.name, err)
	}
	return nil
}

// keepFresh reads again and again what a region offers.
func (b *Backend) keepFresh(r *region) {
	wait := refreshInterval
	if ok, _ := b.catalogue.fits(r.name, backend.Shape{}); !ok {
		wait = retryRefresh
	}
	for {
		if sleep(b.life, wait) != nil {
			return
		}
		wait = refreshInterval
		if err := b.refresh(b.life, r); err != nil && b.life.Err() == nil {
			b.log.WarnContext(b.life, "Reading what a region offers failed", "region", string(r.name), "error", err.Error())
			wait = retryRefresh
		}
	}
}

// Close implements worker.Driver.
func (b *Backend) Close() error {
	b.cancel()
	b.tasks.Wait()
	for _, r := range b.regions {
		r.instances.close()
		r.parts.close()
		r.schedules.close()
	}
	b.clients.close()
	return nil
}

// ProvisionTimeout implements worker.Replicated: an attempt's boot and its
// undoing, with the calls around them. Each offer is an attempt of its own.
func (b *Backend) ProvisionTimeout() time.Duration {
	const calls, backoff = 3, 20 * time.Second // the SDK's longest pause
	return b.config.BootTimeout.Duration + b.config.UndoTimeout.Duration + calls*callAttempts*(callTimeout+backoff) + consoleTimeout
}

// Capabilities implements worker.Driver.
func (b *Backend) Capabilities(context.Context) (backend.Capabilities, error) {
	c := backend.Capabilities{ObservedAt: time.Now().UTC(), Warnings: b.clients.problems()}
	for _, r := range b.regions {
		largest, known := b.catalogue.largest(r.name)
		if !known {
			c.Warnings = append(c.Warnings, fmt.Sprintf("region %s: what it offers could not be read yet", r.name))
			continue
		}
		active := b.active(r.name)
		free := max(0, b.config.MaxConcurrentInstances-active)
		caps := backend.RegionCapabilities{
			Region: r.name, Isolation: []backend.Isolation{backend.IsolationVM}, Enforcement: b.enforcement(),
			Total: largest.Times(b.config.MaxConcurrentInstances), Free: largest.Times(free), LargestSingle: largest,
			ActiveInstances: active, MaxInstances: b.config.MaxConcurrentInstances,
			NetworkModes: []backend.NetworkMode{backend.NetworkOpen}, StorageEnforced: true,
		}
		if free > 0 {
			caps.LargestFree = largest
		}
		if len(r.clients.config.AllowlistEgress) > 0 {
			caps.NetworkModes = append(caps.NetworkModes, backend.NetworkAllowlist)
		}
		c.Regions = append(c.Regions, caps)
	}
	slices.SortFunc(c.Regions, func(x, y backend.RegionCapabilities) int { return strings.Compare(string(x.Region), string(y.Region)) })
	// Nothing seen of any region is no knowledge of an empty provider.
	c.Stale = len(c.Regions) == 0
	return c, nil
}

func (b *Backend) enforcement() backend.DeadlineEnforcement {
	if b.platformDeadline() {
		return backend.EnforcedByPlatform
	}
	return backend.EnforcedByGuest
}

// CanSatisfy implements worker.Driver.
func (b *Backend) CanSatisfy(_ context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	no := func(format string, args ...any) (backend.Satisfaction, error) {
		return backend.Satisfaction{Reason: fmt.Sprintf(format, args...)}, nil
	}
	if grant.MinIsolation > backend.IsolationVM {
		return no("isolation %s is not on offer; EC2 has no TDX, only virtual machines", grant.MinIsolation)
	}
	if grant.Image.Kind != backend.ImageOCIArchive {
		return no("image kind %s is not supported; only OCI archive is", grant.Image.Kind)
	}
	if slices.Contains(grant.Ports, backend.Port{Number: sshPort, Protocol: backend.TCP}) {
		return no("port %d/tcp is the one that SSH itself has here", sshPort)
	}
	var reasons []string
	for _, r := range b.candidates(grant) {
		if why := b.unfit(grant, r); why != "" {
			reasons = append(reasons, why)
			continue
		}
		ok, why := b.catalogue.fits(r.name, grant.Shape)
		if ok {
			return backend.Satisfaction{Satisfiable: true}, nil
		}
		reasons = append(reasons, why)
	}
	if len(reasons) == 0 {
		return no("%s", b.outside(grant.Region))
	}
	return no("%s", strings.Join(reasons, "; "))
}

// unfit says why a region can't take a grant, whatever types it has; "" if it
// can.
func (b *Backend) unfit(grant backend.Grant, r *region) string {
	if grant.Network.Mode == backend.NetworkAllowlist && len(r.clients.config.AllowlistEgress) == 0 {
		return fmt.Sprintf("region %s has no allowlist_egress, without which an instance couldn't fetch its image", r.name)
	}
	if n := rulesOf(grant, r.clients.config).most(); n > maxRules {
		return fmt.Sprintf("region %s: the ports or the network policy need %d rules of a security group, which has %d", r.name, n, maxRules)
	}
	if err := b.tryUserData(grant); err != nil {
		return fmt.Sprintf("region %s: %v", r.name, err)
	}
	return ""
}

// candidates are the regions that a grant may be in, in order.
func (b *Backend) candidates(grant backend.Grant) []*region {
	if grant.Region == "" {
		return b.regions
	}
	if r := b.byName[grant.Region]; r != nil {
		return []*region{r}
	}
	return nil
}

func (b *Backend) outside(name backend.Region) string {
	var names []string
	for _, r := range b.regions {
		names = append(names, string(r.name))
	}
	return fmt.Sprintf("region %q is not in the operator's allowlist (%s)", name, strings.Join(names, ", "))
}

// active is how many attempts take room in a region.
func (b *Backend) active(name backend.Region) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.activeLocked(name)
}

// activeLocked counts what is held, and what was last seen to live beside it, as
// when the ledger is an older copy.
func (b *Backend) activeLocked(name backend.Region) int64 {
	var n int64
	for _, h := range b.held {
		if h.region == name {
			n++
		}
	}
	for _, list := range b.byName[name].instances.peek() {
		for _, i := range list {
			if _, held := b.held[i.identity]; !held && !i.terminated() {
				n++
			}
		}
	}
	return n
}

// reserve takes room in a region for an attempt, which is released in one place,
// when the attempt is gone.
func (b *Backend) reserve(id identity, name backend.Region) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.activeLocked(name) >= b.config.MaxConcurrentInstances {
		return full(name)
	}
	b.held[id] = holding{name, time.Now()}
	return nil
}

// hold records that an attempt takes room that was begun elsewhere.
func (b *Backend) hold(id identity, name backend.Region) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[id] = holding{name, time.Now()}
}

// takeStock reads from the ledger which attempts take room, those of other
// replicas too, and forgets those that others have ended.
func (b *Backend) takeStock(ctx context.Context) ([]worker.Attempt, error) {
	asked := time.Now()
	open, err := b.env.Journal.Open(ctx)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	known := map[identity]bool{}
	for _, a := range open {
		id := identity{a.GrantID, a.Number}
		known[id] = true
		if _, held := b.held[id]; !held {
			b.held[id] = holding{backend.Region(a.Placement), asked}
		}
	}
	for id, h := range b.held {
		if !known[id] && h.since.Before(asked) {
			delete(b.held, id)
			delete(b.sent, id)
		}
	}
	return open, nil
}

// crowded reports whether an attempt that was begun is one too many in its
// region: replicas that begin at once each find room. The oldest stay.
func (b *Backend) crowded(open []worker.Attempt, id identity, name backend.Region) bool {
	open = slices.DeleteFunc(slices.Clone(open), func(a worker.Attempt) bool { return a.Placement != string(name) })
	slices.SortFunc(open, func(x, y worker.Attempt) int {
		return cmp.Or(x.BeganAt.Compare(y.BeganAt), slices.Compare(x.GrantID[:], y.GrantID[:]))
	})
	at := slices.IndexFunc(open, func(a worker.Attempt) bool { return identity{a.GrantID, a.Number} == id })
	return int64(at) >= b.config.MaxConcurrentInstances
}

func full(name backend.Region) error {
	return backenderr.New(backenderr.WorkerFull, "region %s holds as many instances as max_concurrent_instances allows", name).
		WithCreated(backenderr.CreatedNone).WithRetryAfter(retryFull)
}

func (b *Backend) release(id identity) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.held, id)
	delete(b.sent, id)
}

// retryFull is when a grant may try again that found no room: about as long as
// an instance takes to end.
const retryFull = 30 * time.Second

// sending records that a create call of an attempt is about to be sent.
func (b *Backend) sending(id identity) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent[id] = time.Now()
}

// settled is from when on EC2 shows an attempt if there is one. Of what another
// process sent nothing is known but that it was before it was first looked for.
func (b *Backend) settled(id identity) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sent[id].IsZero() {
		b.sent[id] = time.Now()
	}
	return b.sent[id].Add(b.config.VisibilityDelay.Duration)
}

// forgetSent is for a create call that EC2 refused: as far as this process has
// sent it, there is nothing that could become visible.
func (b *Backend) forgetSent(id identity) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent[id] = time.Now().Add(-b.config.VisibilityDelay.Duration)
}

// contentOf hashes what makes two grants of one id the same to a requester.
func contentOf(order worker.Order) string {
	h := sha256.New()
	g := order.Grant
	fmt.Fprintf(h, "%x %d %v %v %s %d %q %d\n", g.PostHash, g.Image.Kind, g.Image.Digest, g.Shape, order.LoginKey, g.Network.Mode,
		g.Network.AllowedPrefixes, g.ValidTo.UnixNano())
	fmt.Fprintf(h, "%v %q\n", g.Ports, order.ImagePointer)
	for _, key := range slices.Sorted(maps.Keys(g.Environment)) {
		fmt.Fprintf(h, "%q=%q\n", key, g.Environment[key])
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
