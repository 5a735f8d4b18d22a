package hostbackend

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostlease"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
)

// Limits of what a probe accepts.
const (
	// maxClockSkew: deadlines are kept by the host's clock, and the contract
	// allows an instance to outlive its own by 60 s.
	maxClockSkew = 60 * time.Second
	// minSystemd is Debian 12's; the unit's properties are all known to it.
	minSystemd = 252
	// minPodman: additional image stores with id-mapped layers, split cgroups.
	minPodman = 4
	// minFree is the least room on the disk of the state directory, in bytes.
	minFree = 1 << 30
)

// Pauses before a host that can't be used is looked at again.
const (
	retryProbe = 2 * time.Second
	retryUnfit = 30 * time.Second
)

// recheckFit is how often a host that is fit is looked at again. A connection may
// last for months, in which clocks drift, disks fill up and packages go; what
// that does to a grant is found out soon, but by failing it. The look costs a
// host some twenty small calls, and ends nothing.
const recheckFit = 3 * time.Minute

const (
	maxRecordBytes = 64 << 10
	maxGuestBytes  = 256 << 20
	// maxMountsBytes is for thousands of grants with a handful of mounts each.
	maxMountsBytes = 16 << 20
)

// host is one of the operator's machines: its connection, what speaks over it,
// and what was found there.
type host struct {
	config  HostConfig
	backend *Backend
	log     *slog.Logger
	conn    *sshconn.Conn
	fs      *hostfs.FS
	bus     *systemd.Client
	podman  *podman.Client
	nft     *firewall.Firewall
	images  *imageCache

	restoring sync.Mutex // one restoration of the firewall at a time
	// turning is held while the host becomes ours, and while its reservations
	// are taken from the ledger because it isn't.
	turning sync.Mutex

	leaseMu     sync.Mutex       // protects the next three
	lease       *hostlease.Lease // of the connection leased; nil before the first
	leased      uint64
	leasePulse  chan struct{} // closed and replaced when there is another lease
	guestNeeded bool          // a connection is to bring the guest; used by follow alone

	checked time.Time // when the host was last found fit; used by follow alone

	mu      sync.Mutex // protects the fields below
	found   *facts     // nil while the host can't be seen
	problem error      // why it can't be seen, or takes nothing new; nil if all is well
	changed chan struct{}
}

// facts is what is known of a host that can be seen. That is enough to watch
// and end what runs there; new grants need it to be fit, too.
type facts struct {
	generation uint64
	bootID     string
	guest      string // path of the guest binary
	imageStore string // directory of the bridge's store of unpacked images
	firewalld  bool
	transient  bool // podman has transient stores
}

func newHost(ctx context.Context, b *Backend, c HostConfig) (*host, error) {
	signer, err := ssh.ParsePrivateKey(c.KeyFile.Secret().Expose())
	if err != nil {
		return nil, fmt.Errorf("host %s: key_file: %w", c.Name, err)
	}
	var pinned []ssh.PublicKey
	for _, line := range c.HostKeys {
		key, err := sshkey.ParsePublicKey(line)
		if err != nil {
			return nil, fmt.Errorf("host %s: host_keys: %w", c.Name, err)
		}
		pinned = append(pinned, key.SSH())
	}
	h := &host{
		config: c, backend: b, log: b.log.With("host", c.Name), problem: errors.New("not connected yet"),
		changed: make(chan struct{}), leasePulse: make(chan struct{}),
	}
	lease, err := h.leaseConfig()
	if err != nil {
		return nil, err
	}
	conn := sshconn.Config{Name: c.Name, Address: c.Address, User: c.User, Key: signer, HostKeys: pinned}
	if !b.env.DryRun {
		// Who only looks may look at a host that another has. Who changes
		// something has the host, the janitor, too: a worker that lives keeps it
		// away, one that hangs loses its lease.
		conn.First, conn.Admit = lease.Args(), h.admit
	}
	if b.config.connection != nil {
		b.config.connection(&conn)
	}
	h.conn, err = sshconn.Open(ctx, conn, b.log)
	if err != nil {
		return nil, err
	}
	first, last, err := c.ports()
	if err != nil {
		return nil, err
	}
	h.nft, err = firewall.New(h.conn, firewall.Table{Bridge: b.env.BridgeID, FirstPort: first, LastPort: last, InterfacePrefix: interfacePrefix, Denied: b.denied})
	if err != nil {
		return nil, err
	}
	h.fs = hostfs.New(h.conn)
	h.bus = systemd.Open(ctx, h.conn, b.log)
	h.podman = podman.New(h.conn)
	h.images = newImageCache(h)
	return h, nil
}

func (h *host) close() {
	h.podman.Close()
	_ = h.bus.Close() // the connection ends next
	_ = h.conn.Close()
}

// follow keeps the host in use: whenever the connection is new and has the
// host's lease it takes up what runs there, and then sees whether it is fit for
// more. It returns when ctx ends.
func (h *host) follow(ctx context.Context) {
	unfitPause := retryProbe
	for ctx.Err() == nil {
		state, changed := h.conn.Changed()
		var again <-chan time.Time
		var turned <-chan struct{}
		if !state.Connected {
			err := state.LastError
			if err == nil {
				err = errors.New("not connected yet")
			}
			if _, problem := h.known(); !errors.As(problem, new(*leaseError)) {
				h.setUnseen(err)
			}
		} else {
			var err error
			if turned, err = h.turn(ctx, state.Generation); err != nil {
				pause := retryProbe
				if unfit(err) {
					// What a host that has just booted lacks it may have soon; what
					// an operator must mend takes longer.
					pause = unfitPause
					unfitPause = min(2*unfitPause, retryUnfit)
				}
				again = time.After(pause)
			} else {
				unfitPause = retryProbe
				again = h.recheckDue()
			}
		}
		select {
		case <-changed:
		case <-turned:
		case <-again:
		case <-ctx.Done():
		}
	}
	h.setUnseen(errStopping)
}

var errStopping = errors.New("the worker is stopping")

// bring brings a host that is ours into use, as far as that isn't done yet.
func (h *host) bring(ctx context.Context, generation uint64) error {
	found, problem := h.known()
	if found != nil && found.generation == generation && problem == nil {
		return h.recheck(ctx, found)
	}
	if found == nil || found.generation != generation {
		var err error
		if found, err = h.look(ctx); err == nil {
			found.generation = generation
			err = h.takeUp(ctx)
		}
		if err != nil {
			h.setUnseen(err)
			return err
		}
	}
	if h.backend.env.Janitor {
		// It takes no grants, but it judges deadlines: by a clock that differs
		// from the host's it might end what lives.
		err := h.checkClock(ctx)
		if err != nil {
			h.setUnseen(err)
			return err
		}
		h.setSeen(found, nil)
		return nil
	}
	err := h.check(ctx, found)
	h.checked = time.Now()
	h.setSeen(found, err)
	h.backend.tookOver()
	return err
}

// recheck sees whether a host in use is still fit, if it is time for that. One
// that isn't takes nothing new until bring finds it fit again; what runs there is
// watched and ended all the same.
func (h *host) recheck(ctx context.Context, found *facts) error {
	if h.backend.env.Janitor || time.Since(h.checked) < h.recheckInterval() {
		return nil
	}
	if err := h.checkFit(ctx); err != nil {
		if ctx.Err() == nil {
			h.setSeen(found, err)
		}
		return err
	}
	h.checked = time.Now()
	return nil
}

// recheckDue returns when a host that is in use is to be looked at again; never,
// if it isn't.
func (h *host) recheckDue() <-chan time.Time {
	if found, problem := h.known(); found == nil || problem != nil || h.backend.env.Janitor {
		return nil
	}
	return time.After(h.recheckInterval() - time.Since(h.checked))
}

func (h *host) recheckInterval() time.Duration {
	return cmp.Or(h.backend.config.recheckInterval, recheckFit)
}

func unfit(err error) bool {
	var mismatch *sshconn.HostKeyMismatchError
	var auth *sshconn.AuthError
	return errors.As(err, &mismatch) || errors.As(err, &auth) || errors.As(err, new(*leaseError)) || backenderr.Is(err, backenderr.HostUnfit, backenderr.ClockSkew)
}

// known returns what is known of the host, nil if it can't be seen, and what is
// the matter with it.
func (h *host) known() (*facts, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.found, h.problem
}

// setSeen says that what runs on the host can be seen and ended, and whether
// something is the matter that keeps new grants away.
func (h *host) setSeen(found *facts, problem error) {
	if problem == nil {
		h.log.Info("Host is ready", "firewalld", found.firewalld)
		h.backend.inventory.SetUsable(h.config.Name)
	}
	h.set(found, problem)
}

// setUnseen says that nothing can be said of what runs on the host.
func (h *host) setUnseen(err error) { h.set(nil, err) }

func (h *host) set(found *facts, problem error) {
	switch {
	case problem == nil:
	case isElsewhere(problem):
		h.backend.inventory.SetElsewhere(h.config.Name, problem.Error())
	case unfit(problem):
		h.backend.inventory.SetUnfit(h.config.Name, problem.Error())
	default:
		h.backend.inventory.SetUnreachable(h.config.Name, problem.Error())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if problem != nil && (h.problem == nil || h.problem.Error() != problem.Error()) {
		h.log.Warn("Host is not ready", "error", problem.Error(), "seen", found != nil)
	}
	h.found, h.problem = found, problem
	close(h.changed)
	h.changed = make(chan struct{})
}

// usable returns what is known of a host that may take new grants, or why it
// may not.
func (h *host) usable() (*facts, error) {
	found, problem := h.known()
	if problem != nil {
		return nil, h.unavailable(problem)
	}
	return found, nil
}

// ready returns what is known of a host whose grants can be seen and ended, or
// why they can't.
func (h *host) ready() (*facts, error) {
	found, problem := h.known()
	if found == nil {
		return nil, h.unavailable(problem)
	}
	return found, nil
}

// wait blocks until the host's grants can be seen and ended. While another
// replica has the host it fails with OTHER_REPLICA.
func (h *host) wait(ctx context.Context) error {
	for {
		h.mu.Lock()
		found, problem, changed := h.found, h.problem, h.changed
		h.mu.Unlock()
		state := h.conn.State()
		switch {
		case found != nil && state.Connected && state.Generation == found.generation:
			return nil
		case found != nil:
			// Its connection has just been lost, which follow is about to notice.
		case isElsewhere(problem):
			return h.unavailable(problem)
		}
		select {
		case <-changed:
		case <-h.backend.closed:
			return h.unavailable(errStopping)
		case <-ctx.Done():
			return h.unavailable(errors.Join(problem, ctx.Err()))
		}
	}
}

func (h *host) unavailable(err error) error {
	if isElsewhere(err) {
		return backenderr.Wrap(backenderr.OtherReplica, err, "host %s", h.config.Name).WithRetryAfter(retryElsewhere)
	}
	reason := backenderr.ProviderUnavailable
	if unfit(err) {
		reason = backenderr.HostUnfit
	}
	return backenderr.Wrap(reason, err, "host %s", h.config.Name).WithRetryAfter(retryUnfit)
}

// look finds out what is needed to see and end what runs on the host.
func (h *host) look(ctx context.Context) (*facts, error) {
	if err := h.bus.Wait(ctx); err != nil {
		return nil, err
	}
	guest, err := h.backend.dirs.guest.Join(h.backend.guestSum)
	if err != nil {
		return nil, err
	}
	found := &facts{guest: guest, imageStore: h.backend.dirs.images.String()}
	if found.bootID, err = h.bootID(ctx); err != nil {
		return nil, err
	}
	if found.firewalld, err = firewall.NewFirewalld(h.bus).Active(ctx); err != nil {
		return nil, err
	}
	// Where there is no podman, that is for check to say.
	known, err := h.conn.Run(ctx, sshconn.Command{Args: []string{podman.DefaultBinary, podman.TransientOption, "--version"}})
	if err != nil {
		return nil, err
	}
	found.transient = known.ExitCode == 0
	return found, nil
}

// check finds out whether the host has all that a new grant needs, and sets up
// what all grants share.
func (h *host) check(ctx context.Context, found *facts) error {
	d := h.backend.dirs
	if err := h.checkPrograms(ctx); err != nil {
		return err
	}
	if err := h.checkClock(ctx); err != nil {
		return err
	}
	for _, dir := range []hostfs.Base{d.base, d.guest, d.cache, d.index, d.images, d.grants} {
		if err := h.fs.MkdirAll(ctx, dir.String(), 0o711); err != nil {
			return err
		}
	}
	if err := h.checkSpace(ctx); err != nil {
		return err
	}
	return h.setUp(ctx, found)
}

// checkFit finds out whether a host that is set up still has all that a new grant
// needs. It changes nothing there, but that it starts podman's socket.
func (h *host) checkFit(ctx context.Context) error {
	for _, check := range []func(context.Context) error{h.checkPrograms, h.checkClock, h.checkSpace} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (h *host) checkPrograms(ctx context.Context) error {
	version, err := h.bus.Version(ctx)
	if err != nil {
		return err
	}
	if n := leadingNumber(version); n < minSystemd {
		return h.unfit("systemd %s is older than %d", version, minSystemd)
	}
	if missing, err := h.missingPrograms(ctx); err != nil {
		return err
	} else if len(missing) > 0 {
		return h.unfit("missing on the host: %s", strings.Join(missing, ", "))
	}
	if err := h.bus.Start(ctx, "podman.socket"); err != nil {
		return fmt.Errorf("start podman.socket: %w", err)
	}
	podmanVersion, err := h.podman.Version(ctx)
	if err != nil {
		return err
	}
	if leadingNumber(podmanVersion) < minPodman {
		return h.unfit("podman %s is older than %d", podmanVersion, minPodman)
	}
	return nil
}

func (h *host) checkSpace(ctx context.Context) error {
	base := h.backend.dirs.base.String()
	space, err := h.fs.Free(ctx, base)
	if err != nil {
		return err
	}
	if space.Bytes < minFree {
		return h.unfit("%s has %d MiB free; at least %d MiB are needed", base, space.Bytes>>20, minFree>>20)
	}
	return nil
}

func (h *host) checkClock(ctx context.Context) error {
	clock, err := h.conn.Clock(ctx)
	if err != nil {
		return err
	}
	if skew := clock.Offset.Abs() - clock.Uncertainty; skew > maxClockSkew {
		return backenderr.New(backenderr.ClockSkew, "host %s: its clock is %s off ours; at most %s is allowed, for deadlines are kept by it",
			h.config.Name, clock.Offset.Round(time.Second), maxClockSkew)
	}
	return nil
}

// bootID is another one after each boot (random(4)).
func (h *host) bootID(ctx context.Context) (string, error) {
	id, err := h.fs.ReadFile(ctx, "/proc/sys/kernel/random/boot_id", 128)
	return strings.TrimSpace(string(id)), err
}

// setUp brings what all grants share: guest binary, firewall.
func (h *host) setUp(ctx context.Context, found *facts) error {
	if err := h.putGuest(ctx, found.guest); err != nil {
		return err
	}
	script, err := h.nft.Table().Script()
	if err != nil {
		return err
	}
	if err := h.fs.WriteFile(ctx, h.firewallScript(), []byte(script), 0o600); err != nil {
		return err
	}
	return h.nft.Ensure(ctx)
}

// removeTemps removes what transfers left that an earlier connection, or
// process, did not finish. It runs before anything is sent over a new one.
func (h *host) removeTemps(ctx context.Context) error {
	d := h.backend.dirs
	for _, dir := range []hostfs.Base{d.base, d.guest, d.cache, d.index} {
		entries, err := h.fs.ReadDir(ctx, dir.String())
		if err != nil && !isMissing(err) {
			return err
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), hostfs.TempPrefix) {
				continue
			}
			if err := h.fs.RemoveAll(ctx, dir.String()+"/"+e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// restoreFirewall puts back what the running grants have in the firewall, if
// somebody took it away: a reload of the host's own rules often flushes all.
// Until then they have no rights at all, rather than too many.
func (h *host) restoreFirewall(ctx context.Context, records []record, active map[string]bool) error {
	if len(records) == 0 {
		return nil
	}
	h.restoring.Lock()
	defer h.restoring.Unlock()
	state, err := h.nft.Read(ctx)
	if errors.Is(err, firewall.ErrNoTable) {
		err = h.nft.Ensure(ctx)
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range records {
		n := h.names(r)
		_, there := state.Counters[n.networkInterface()]
		if !there && r.complete() && active[n.unit()] && time.Now().Before(r.ValidTo) {
			errs = append(errs, h.restoreGrant(ctx, r))
		}
	}
	return errors.Join(errs...)
}

// restoreGrant puts a running grant back into the firewall.
func (h *host) restoreGrant(ctx context.Context, r record) error {
	w := h.recorded(r)
	grant, err := w.firewallGrant()
	if err != nil {
		return err
	}
	h.log.WarnContext(ctx, "Restoring a grant in the firewall", "grant_id", r.GrantID.String())
	// podman's own rules went with ours, and it doesn't look after them. They
	// come first: by what is in our table we see that it is done.
	reload, err := podman.NetworkReloadArgs(w.engine(), w.names.stem())
	if err != nil {
		return err
	}
	result, err := h.conn.Run(ctx, sshconn.Command{Args: reload, Timeout: commandTimeout})
	if err == nil {
		err = result.Err("podman network reload")
	}
	if err != nil {
		return err
	}
	if err := h.nft.Open(ctx, grant, max(0, time.Until(r.ValidTo))+time.Minute); err != nil {
		return err
	}
	// A unit that ended meanwhile has done its own clean-up already.
	status, err := h.bus.Status(ctx, w.names.unit())
	if err == nil && status.ActiveState != "active" {
		err = h.nft.Close(ctx, grant)
	}
	return err
}

func (h *host) firewallScript() string { return h.backend.dirs.base.String() + "/firewall.nft" }

// putGuest brings the guest binary to the host, under its own hash, and checks
// what is there by the host's own sha256sum.
func (h *host) putGuest(ctx context.Context, name string) error {
	if ok, err := h.hasSum(ctx, name, h.backend.guestSum); err != nil || ok {
		return err
	}
	if _, err := h.fs.Upload(ctx, name, 0o755, bytes.NewReader(h.backend.guest), nil); err != nil {
		return err
	}
	ok, err := h.hasSum(ctx, name, h.backend.guestSum)
	if err == nil && !ok {
		err = h.unfit("%s has another hash than what was written", name)
	}
	return err
}

func (h *host) hasSum(ctx context.Context, name, want string) (bool, error) {
	exists, err := h.fs.Exists(ctx, name)
	if err != nil || !exists {
		return false, err
	}
	result, err := h.conn.Run(ctx, sshconn.Command{Args: []string{"sha256sum", "--", name}})
	if err != nil {
		return false, err
	}
	if err := result.Err("sha256sum"); err != nil {
		return false, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", h.config.Name)
	}
	got, _, _ := strings.Cut(string(result.Stdout), " ")
	return got == want, nil
}

// missingPrograms names what a grant's unit needs and the host lacks.
func (h *host) missingPrograms(ctx context.Context) ([]string, error) {
	var missing []string
	for _, p := range []struct{ path, why string }{
		{podman.DefaultBinary, "package podman"},
		{firewall.DefaultBinary, "package nftables"},
		{mkfsProgram, "package e2fsprogs"},
		{mountProgram, "package mount"},
		{umountProgram, "package mount"},
		{truncateProgram, "package coreutils"},
		{rmProgram, "package coreutils"},
		{ipProgram, "package iproute2"},
		{"/dev/loop-control", "kernel's loop devices, for the grants' disks"},
	} {
		switch exists, err := h.fs.Exists(ctx, p.path); {
		case err != nil:
			return nil, err
		case !exists:
			missing = append(missing, p.path+" ("+p.why+")")
		}
	}
	return missing, nil
}

// takeUp restores the reservations of the grants that are on the host, or may
// be, and lets go of those that no longer are.
func (h *host) takeUp(ctx context.Context) error {
	h.turning.Lock()
	defer h.turning.Unlock()
	// Only what was held, and not being worked on, before the look can be found
	// missing by it.
	var settled []backend.GrantID
	for _, id := range h.backend.inventory.Held(h.config.Name) {
		if !h.backend.isWorking(id) {
			settled = append(settled, id)
		}
	}
	if !h.backend.env.Janitor {
		// A worker that lives may be at a transfer.
		if err := h.removeTemps(ctx); err != nil {
			return err
		}
	}
	open, err := h.backend.env.Journal.Open(ctx)
	if err != nil {
		return err
	}
	records, err := h.records(ctx)
	if err != nil {
		return err
	}
	kept := map[backend.GrantID]bool{}
	keep := func(id backend.GrantID, p params) {
		kept[id] = true
		h.backend.inventory.Restore(p.reservation(id))
		h.images.use(id, p.Image)
	}
	for _, r := range records {
		if r.complete() {
			keep(r.GrantID, r.params)
		}
	}
	// An attempt of which nothing is there, because the process that began it
	// ended, keeps its place until it is taken up or undone: nobody else may get
	// its ports meanwhile.
	for _, a := range open {
		if a.Placement != h.config.Name || kept[a.GrantID] {
			continue
		}
		var p params
		if err := json.Unmarshal(a.Params, &p); err != nil {
			return backenderr.Wrap(backenderr.Internal, err, "parameters of an attempt of grant %s in the ledger", a.GrantID)
		}
		keep(a.GrantID, p)
	}
	for _, id := range settled {
		if !kept[id] && !h.backend.isWorking(id) {
			h.backend.release(id)
		}
	}
	// What ended during the look must not have been restored after its release.
	still, err := h.backend.env.Journal.Open(ctx)
	if err != nil {
		return err
	}
	for _, a := range open {
		gone := !slices.ContainsFunc(still, func(s worker.Attempt) bool { return s.GrantID == a.GrantID })
		if gone && kept[a.GrantID] && !h.backend.isWorking(a.GrantID) {
			h.backend.release(a.GrantID)
		}
	}
	return nil
}

// records reads the grant.json of every grant on the host. A directory without
// one is a grant whose first file wasn't written, or whose last was just
// deleted; it has a record with nothing but its id. So has one whose file is
// damaged: a single file must not keep a host from being used.
func (h *host) records(ctx context.Context) ([]record, error) {
	entries, err := h.fs.ReadDir(ctx, h.backend.dirs.grants.String())
	if err != nil && !isMissing(err) {
		return nil, err
	}
	var out []record
	for _, e := range entries {
		id, err := backend.ParseGrantID(e.Name())
		if err != nil {
			continue // not ours
		}
		r, err := h.record(ctx, id)
		switch {
		case isMissing(err):
			r = record{GrantID: id, CreatedAt: e.ModTime()}
			r.Host = h.config.Name
		case err != nil:
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// record reads a grant's record. One that is damaged is missing.
func (h *host) record(ctx context.Context, id backend.GrantID) (record, error) {
	data, err := h.fs.ReadFile(ctx, h.backend.dirs.grant(id)+"/"+recordFile, maxRecordBytes)
	if errors.Is(err, hostfs.ErrTooLarge) {
		data, err = nil, nil
	}
	if err != nil {
		return record{}, err
	}
	r, err := unmarshalRecord(data)
	if err != nil {
		h.log.ErrorContext(ctx, "Record of a grant is damaged", "grant_id", id.String(), "error", err.Error())
		return record{}, fs.ErrNotExist
	}
	return r, nil
}

// recorded returns the workload that a record describes.
func (h *host) recorded(r record) workload {
	found, _ := h.known()
	if found == nil {
		found = &facts{}
	}
	return h.workload(found, backend.Grant{ID: r.GrantID, ValidTo: r.ValidTo, Network: r.Network}, &attempt{number: r.Attempt, params: r.params})
}

func (h *host) unfit(format string, args ...any) error {
	return backenderr.New(backenderr.HostUnfit, "host %s: %s", h.config.Name, fmt.Sprintf(format, args...))
}

// sshEndpoint is where the worker itself reaches a published port.
func (h *host) sshEndpoint(port uint16) string {
	name, _, err := net.SplitHostPort(h.config.Address)
	if err != nil {
		name = h.config.Address // validated
	}
	return net.JoinHostPort(name, strconv.Itoa(int(port)))
}

func leadingNumber(s string) int {
	end := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(s)
	}
	n, _ := strconv.Atoi(s[:end]) // 0 is too old for everything
	return n
}

// readGuest reads the guest binary and its hash.
func readGuest(path string) (data []byte, sum string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, "", err
	}
	if info.Size() > maxGuestBytes {
		return nil, "", fmt.Errorf("%s has %d bytes; that is no guest binary", path, info.Size())
	}
	if data, err = os.ReadFile(path); err != nil {
		return nil, "", err
	}
	hash := sha256.Sum256(data)
	return data, hex.EncodeToString(hash[:]), nil
}

func parsePrefixes(all []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range all {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}
