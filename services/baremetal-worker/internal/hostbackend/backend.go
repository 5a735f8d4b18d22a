// Package hostbackend runs grants as containers on the operator's own machines,
// over one persistent SSH connection per host. It implements worker.Driver.
//
// A workload is a systemd unit: one call starts it with its deadline, limits,
// accounting and clean-up, so that the host ends and removes it with every
// process of the bridge dead. What a grant has on a host:
//
//   - a directory with its record, its guest configuration, its console and its
//     disk, /var/lib/compute-bridge/<bridge>/grants/<grant>;
//   - the unit cb-<bridge>-<grant>-<attempt>.service, the container and the
//     network of the same name, a bridge interface;
//   - elements of the bridge's nftables sets: open ports, which close by
//     themselves, counters, allowed destinations.
//
// The unit's own clean-up removes all but the directory, into which it first
// writes the usage. The worker takes the usage from there into its ledger and
// removes the directory last: as long as it is there, the grant isn't gone.
package hostbackend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/inventory"
)

// commandTimeout bounds clean-up steps that must not hang.
const commandTimeout = 30 * time.Second

// Backend runs grants on hosts.
type Backend struct {
	config    Config
	env       worker.Env
	holder    string // of leases: this process and no other
	log       *slog.Logger
	dirs      dirs
	denied    []netip.Prefix
	store     imagestore.Store
	guest     []byte
	guestSum  string
	inventory *inventory.Inventory
	hosts     []*host // in the operator's order
	byName    map[string]*host

	cancel    context.CancelFunc
	closed    <-chan struct{} // closed when Close begins: nothing is waited for any more
	followers sync.WaitGroup

	mu      sync.Mutex
	working map[backend.GrantID]bool // being provisioned or torn down now
}

var _ worker.Driver = (*Backend)(nil)

// Open connects to all hosts. It waits until each is ready and fails if one
// doesn't get ready in time, unless the configuration is lenient.
func Open(ctx context.Context, c Config, env worker.Env) (worker.Driver, error) {
	for i := range c.Hosts {
		c.Hosts[i].setDefaults()
	}
	d, err := newDirs(env.BridgeID)
	if err != nil {
		return nil, err
	}
	denied, err := parsePrefixes(c.DeniedEgress)
	if err != nil {
		return nil, err
	}
	guest, sum, err := readGuest(string(c.GuestBinary))
	if err != nil {
		return nil, fmt.Errorf("guest binary: %w", err)
	}
	store, err := imagestore.New(c.imageStore())
	if err != nil {
		return nil, err
	}
	b := &Backend{
		config: c, env: env, log: env.Log, dirs: d, denied: denied, store: store, guest: guest, guestSum: sum,
		byName: map[string]*host{}, working: map[backend.GrantID]bool{},
	}
	// A process that was started anew under the same name is another one: what
	// the one before had is not its own.
	b.holder = strings.TrimSpace(c.Replica + " " + rand.Text()[:8])
	var declared []inventory.Host
	for _, h := range c.Hosts {
		declared = append(declared, h.inventory())
	}
	b.inventory = inventory.New(declared)
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b.cancel, b.closed = cancel, life.Done()
	for _, hc := range c.Hosts {
		h, err := newHost(life, b, hc)
		if err != nil {
			return nil, errors.Join(err, b.Close())
		}
		b.hosts = append(b.hosts, h)
		b.byName[hc.Name] = h
		b.followers.Go(func() { h.follow(life) })
	}
	b.followers.Go(func() { b.followElsewhere(life) })
	if err := b.waitForHosts(ctx); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// waitForHosts waits until all hosts are ready, or the start's patience ends. A
// host that waiting won't mend ends it early.
func (b *Backend) waitForHosts(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, b.config.ConnectTimeout.Duration)
	defer cancel()
	var wg sync.WaitGroup
	problems := make([]error, len(b.hosts))
	for i, h := range b.hosts {
		wg.Go(func() { problems[i] = h.waitForBoot(ctx) })
	}
	wg.Wait()
	err := errors.Join(problems...)
	if err != nil && (b.config.LenientBoot || b.env.Janitor) {
		b.log.WarnContext(ctx, "Starting without all hosts", "error", err.Error())
		return nil
	}
	return err
}

func (h *host) waitForBoot(ctx context.Context) error {
	for {
		h.mu.Lock()
		problem, changed := h.problem, h.changed
		h.mu.Unlock()
		if problem == nil || isElsewhere(problem) {
			return nil
		}
		if unfit(problem) {
			return fmt.Errorf("host %s is unfit: %w", h.config.Name, problem)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("host %s is not ready: %w", h.config.Name, problem)
		}
	}
}

// Close implements worker.Driver.
func (b *Backend) Close() error {
	b.cancel()
	b.followers.Wait()
	for _, h := range b.hosts {
		h.close()
	}
	return b.store.Close()
}

// Capabilities implements worker.Driver.
func (b *Backend) Capabilities(context.Context) (backend.Capabilities, error) {
	regions, problems := b.inventory.Regions()
	c := backend.Capabilities{ObservedAt: time.Now(), Warnings: problems}
	for _, r := range regions {
		c.Regions = append(c.Regions, backend.RegionCapabilities{
			Region:          r.Name,
			Isolation:       []backend.Isolation{backend.IsolationContainer},
			Enforcement:     backend.EnforcedByPlatform,
			Total:           r.Total,
			Free:            r.Free,
			LargestSingle:   r.LargestSingle,
			LargestFree:     r.LargestFree,
			ActiveInstances: r.Active,
			MaxInstances:    r.MaxInstances,
			NetworkModes:    []backend.NetworkMode{backend.NetworkOpen, backend.NetworkAllowlist},
			StorageEnforced: true,
		})
	}
	return c, nil
}

// CanSatisfy implements worker.Driver.
func (b *Backend) CanSatisfy(_ context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	if grant.MinIsolation > backend.IsolationContainer {
		return backend.Satisfaction{Reason: fmt.Sprintf("isolation %s is not on offer; only container is", grant.MinIsolation)}, nil
	}
	if grant.Image.Kind != backend.ImageOCIArchive {
		return backend.Satisfaction{Reason: fmt.Sprintf("image kind %s is not supported; only OCI archive is", grant.Image.Kind)}, nil
	}
	ok, why := b.inventory.CanEverFit(needOf(grant))
	return backend.Satisfaction{Satisfiable: ok, Reason: why}, nil
}

// needOf returns what a grant needs of a host: one port is for SSH.
func needOf(grant backend.Grant) inventory.Need {
	return inventory.Need{Region: grant.Region, Shape: grant.Shape, Ports: 1 + len(grant.Ports)}
}

// Watch implements worker.Driver.
func (b *Backend) Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
	h, err := b.locate(ctx, id)
	if err != nil {
		return backend.Exit{}, err
	}
	if h == nil {
		return backend.Exit{}, backenderr.New(backenderr.InstanceNotFound, "no host has grant %s", id)
	}
	return h.watch(ctx, id, usage)
}

// Terminate implements worker.Driver.
func (b *Backend) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	defer b.work(id)()
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	hosts, err := b.hostsOf(id, attempts)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if len(attempts) == 0 && h.elsewhere() != nil {
			err = h.lacks(ctx, id)
		} else {
			err = h.clear(ctx, id, true)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, a := range attempts {
		if a.Gone {
			continue
		}
		if err := b.env.Journal.Gone(ctx, id, a.Number); err != nil {
			return nil, err
		}
	}
	b.release(id)
	return b.env.Journal.SavedLog(ctx, id)
}

// hostsOf returns the hosts that may have something of a grant: those of the
// attempts and the one that holds a reservation; all of them for a grant that
// the ledger doesn't know.
func (b *Backend) hostsOf(id backend.GrantID, attempts []worker.Attempt) ([]*host, error) {
	if len(attempts) == 0 {
		// Nobody insists on an end of what perhaps never was: a host that can't
		// be seen is an answer.
		for _, h := range b.hosts {
			if _, err := h.ready(); err != nil && h.elsewhere() == nil {
				return nil, err
			}
		}
		return b.hosts, nil
	}
	var names []string
	if r, ok := b.inventory.Get(id); ok {
		names = append(names, r.Host)
	}
	for _, a := range attempts {
		switch h := b.byName[a.Placement]; {
		case !a.Gone:
			names = append(names, a.Placement)
		case h != nil:
			// Confirmed gone, and yet a sweep may have found it: somebody brought
			// the host's disk back. Nobody waits for such a host.
			if _, err := h.ready(); err == nil {
				names = append(names, a.Placement)
			}
		}
	}
	slices.Sort(names)
	var hosts []*host
	for _, name := range slices.Compact(names) {
		h := b.byName[name]
		if h == nil {
			return nil, backenderr.New(backenderr.ProviderUnavailable,
				"grant %s was placed on host %s, which is no longer in the configuration: put it back until its grants have ended", id, name)
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

// locate returns the host of a grant's live attempt, nil if there is none.
func (b *Backend) locate(ctx context.Context, id backend.GrantID) (*host, error) {
	if r, ok := b.inventory.Get(id); ok {
		return b.byName[r.Host], nil
	}
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, a := range attempts {
		if !a.Gone {
			return b.byName[a.Placement], nil
		}
	}
	return nil, nil //nolint:nilnil // none is an answer
}

// List implements backend.Inventory.
func (b *Backend) List(ctx context.Context) (backend.Listing, error) {
	var listing backend.Listing
	for _, h := range b.hosts {
		if _, err := h.ready(); err != nil {
			listing.Blind = append(listing.Blind, h.config.Name)
			continue
		}
		resources, err := h.list(ctx)
		if err != nil {
			listing.Blind = append(listing.Blind, h.config.Name)
			h.log.WarnContext(ctx, "Listing failed", "error", err.Error())
			continue
		}
		listing.Resources = append(listing.Resources, resources...)
	}
	slices.SortFunc(listing.Resources, func(a, b backend.Resource) int {
		if c := strings.Compare(a.GrantID.String(), b.GrantID.String()); c != 0 {
			return c
		}
		return int(a.Attempt) - int(b.Attempt)
	})
	return listing, nil
}

// list returns what one host has: the grants' directories, and units without
// one.
func (h *host) list(ctx context.Context) ([]backend.Resource, error) {
	records, err := h.records(ctx)
	if err != nil {
		return nil, err
	}
	units, err := h.bus.List(ctx, unitPattern(h.backend.env.BridgeID, nil))
	if err != nil {
		return nil, err
	}
	running, active := map[string]bool{}, map[string]bool{}
	for _, u := range units {
		running[u.Name] = true
		active[u.Name] = u.ActiveState == "active"
	}
	if !h.backend.env.Janitor {
		if err := h.restoreFirewall(ctx, records, active); err != nil {
			h.log.WarnContext(ctx, "Looking after the firewall failed", "error", err.Error())
		}
	}
	var out []backend.Resource
	for _, r := range records {
		unit := h.names(r).unit()
		out = append(out, backend.Resource{
			GrantID: r.GrantID, Attempt: r.Attempt, InstanceID: backend.InstanceID(h.config.Name + "/" + unit), Placement: h.config.Name,
			Running: running[unit], CreatedAt: r.CreatedAt, ValidTo: r.ValidTo,
		})
		delete(running, unit)
	}
	for unit := range running {
		n, ok := parseUnit(unit)
		if !ok || n.bridge != h.backend.env.BridgeID {
			continue
		}
		out = append(out, backend.Resource{
			GrantID: n.grant, Attempt: n.attempt, InstanceID: backend.InstanceID(h.config.Name + "/" + unit), Placement: h.config.Name, Running: true,
		})
	}
	return out, nil
}

func (h *host) names(r record) names {
	return names{bridge: h.backend.env.BridgeID, grant: r.GrantID, attempt: r.Attempt}
}

// work marks a grant as worked on until the returned function is called: its
// reservation is not touched by taking up a host.
func (b *Backend) work(id backend.GrantID) func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.working[id] = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.working, id)
	}
}

func (b *Backend) isWorking(id backend.GrantID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.working[id]
}

// release is the one place where a grant's reservation is given back.
func (b *Backend) release(id backend.GrantID) {
	if r, ok := b.inventory.Get(id); ok {
		if h := b.byName[r.Host]; h != nil {
			h.images.release(id)
		}
	}
	b.inventory.Release(id)
}

func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
