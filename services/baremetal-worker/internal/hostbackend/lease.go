package hostbackend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostlease"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Replicas of the worker share hosts out by leases: each host has one owner, the
// replica whose connection has a session that holds the lock there. Only the
// owner does anything on the host; its connection is closed to everything until
// it has the lease (sshconn.Config.First), and the host ends it when the lease
// ends (package hostlease). The others wait for the lease over connections of
// their own, and the next one has it the moment it is free.

const (
	// standbyDelay is how long a replica leaves a free host to those that don't
	// have it on standby: longer than it takes them to connect.
	standbyDelay = 3 * time.Second
	// elsewhereInterval is how often what other replicas' hosts hold is read
	// from the ledger.
	elsewhereInterval = 3 * time.Second
	// retryElsewhere is when a caller may ask for another replica again.
	retryElsewhere = 500 * time.Millisecond
)

// elsewhereError says that another replica has a host.
type elsewhereError struct {
	holder guestapi.LeaseHolder
}

// Error names the other replica.
func (e *elsewhereError) Error() string {
	name := e.holder.Name
	if name == "" {
		name = "another replica"
	}
	if e.holder.Since.IsZero() {
		return "held by " + name
	}
	return fmt.Sprintf("held by %s since %s", name, e.holder.Since.UTC().Format(time.RFC3339))
}

func isElsewhere(err error) bool { return errors.As(err, new(*elsewhereError)) }

// leaseError says that a host can't give leases. An operator must act.
type leaseError struct {
	why string
}

// Error says what the guest said.
func (e *leaseError) Error() string { return "no lease: " + e.why }

func (h *host) leaseConfig() (hostlease.Config, error) {
	guest, err := h.backend.dirs.guest.Join(h.backend.guestSum)
	if err != nil {
		return hostlease.Config{}, err
	}
	c := hostlease.Config{Guest: guest, File: runDir + "/" + h.backend.env.BridgeID + "/lease", Name: h.backend.holder, TTL: h.backend.config.LeaseTTL.Duration}
	if h.config.Standby {
		c.After = standbyDelay
	}
	return c, nil
}

// leaseOn returns the lease of the connection of a generation.
func (h *host) leaseOn(generation uint64) (*hostlease.Lease, error) {
	h.leaseMu.Lock()
	defer h.leaseMu.Unlock()
	if h.lease != nil && h.leased == generation {
		return h.lease, nil
	}
	stream, err := h.conn.First(generation)
	if err != nil {
		return nil, err
	}
	c, err := h.leaseConfig()
	if err != nil {
		return nil, err
	}
	lease := hostlease.Start(c, stream)
	h.lease, h.leased = lease, generation
	close(h.leasePulse)
	h.leasePulse = make(chan struct{})
	// Not h.lease, which may be the next one's by the time that guard begins.
	h.backend.followers.Go(func() { h.guard(lease, generation) })
	return lease, nil
}

// guard ends the connection with its lease, at once: whatever is under way on it
// must not go on. The host does the same.
func (h *host) guard(lease *hostlease.Lease, generation uint64) {
	asked := true
	for {
		status, changed := lease.Observe()
		switch status.State {
		case hostlease.Asked:
		case hostlease.Waiting, hostlease.Held:
			asked = false
		case hostlease.Lost:
			// One that was never answered may lack the guest: see withoutLease.
			if !asked {
				h.log.Warn("Lost the lease of the host", "error", status.Err.Error(), "generation", generation)
				h.conn.Cut(generation, false)
			}
			return
		}
		<-changed
	}
}

// admit makes a further connection to the host end with the lease.
func (h *host) admit(ctx context.Context, sshd int) error {
	for {
		h.leaseMu.Lock()
		lease, pulse := h.lease, h.leasePulse
		h.leaseMu.Unlock()
		if lease != nil {
			status, changed := lease.Observe()
			switch {
			case status.State == hostlease.Waiting || status.State == hostlease.Held:
				return lease.Join(ctx, sshd)
			case status.State == hostlease.Lost && h.bringsGuest():
				return nil // nothing but the guest is sent
			case status.State == hostlease.Asked:
				select {
				case <-changed:
				case <-ctx.Done():
					return ctx.Err()
				}
				continue
			}
		}
		select {
		case <-pulse:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *host) bringsGuest() bool {
	h.leaseMu.Lock()
	defer h.leaseMu.Unlock()
	return h.guestNeeded
}

func (h *host) setBringsGuest(brings bool) {
	h.leaseMu.Lock()
	defer h.leaseMu.Unlock()
	h.guestNeeded = brings
}

// turn does what a connection's lease allows, as far as that isn't done yet. The
// returned channel is closed when the lease has changed.
func (h *host) turn(ctx context.Context, generation uint64) (<-chan struct{}, error) {
	if h.backend.env.DryRun {
		return nil, h.bring(ctx, generation)
	}
	lease, err := h.leaseOn(generation)
	if err != nil {
		h.setUnseen(err)
		return nil, err
	}
	status, changed := lease.Observe()
	switch status.State {
	case hostlease.Asked:
		if _, problem := h.known(); !errors.As(problem, new(*leaseError)) {
			h.setUnseen(errors.New("asking for the host's lease"))
		}
		return changed, nil
	case hostlease.Waiting:
		if status.Holder.Name == guestapi.LeaseHolderName(h.backend.holder) {
			// Nobody else has the host: our own lost connection still has it, for
			// as long as the host waits for signs of life.
			h.setUnseen(errors.New("waiting for the lease of the connection before to run out"))
			return changed, nil
		}
		h.standAside(ctx, status.Holder)
		return changed, nil
	case hostlease.Lost:
		err := h.withoutLease(ctx, generation, status.Err)
		if h.conn.State().Connected {
			h.setUnseen(err)
		}
		return nil, err
	case hostlease.Held:
	}
	h.conn.Allow(generation)
	// Who waits for something of this connection must not outlast it: the next one
	// is let in by who waits.
	ctx, cancel := context.WithCancel(sshconn.Bind(ctx, generation))
	defer cancel()
	go func() {
		select {
		case <-changed: // The lease is lost, and the connection with it.
			cancel()
		case <-ctx.Done():
		}
	}()
	return changed, h.bring(ctx, generation)
}

// withoutLease finds out why a connection has no lease, and mends it if it can:
// a host that is new, or a worker that is, has no such guest yet.
func (h *host) withoutLease(ctx context.Context, generation uint64, cause error) error {
	ctx, cancel := context.WithTimeout(sshconn.Ungated(sshconn.Bind(ctx, generation)), guestTimeout)
	defer cancel()
	h.setBringsGuest(true)
	defer h.setBringsGuest(false)
	lease, err := h.leaseConfig()
	if err != nil {
		return err
	}
	there, err := h.hasSum(ctx, lease.Guest, h.backend.guestSum)
	if err != nil {
		return err
	}
	if !there {
		// Every replica may send it: the file is named by its content, and is
		// moved into its place when it is complete.
		if err := h.fs.MkdirAll(ctx, h.backend.dirs.guest.String(), 0o711); err != nil {
			return err
		}
		if err := h.putGuest(ctx, lease.Guest); err != nil {
			return err
		}
		h.conn.Cut(generation, true)
		return errors.New("the host got the guest binary; asking for its lease")
	}
	why := cause.Error()
	if stream, err := h.conn.First(generation); err == nil && stream.Why() != "" {
		why = strings.ReplaceAll(stream.Why(), "\n", "; ")
	}
	h.conn.Cut(generation, false)
	return &leaseError{why: why}
}

// guestTimeout bounds the sending of the guest binary, some MiB.
const guestTimeout = 2 * time.Minute

// standAside leaves the host to the replica that has it.
func (h *host) standAside(ctx context.Context, holder guestapi.LeaseHolder) {
	h.set(nil, &elsewhereError{holder})
	if err := h.readElsewhere(ctx); err != nil && ctx.Err() == nil {
		h.log.WarnContext(ctx, "Reading what another replica's host holds failed", "error", err.Error())
	}
}

// elsewhere fails with OTHER_REPLICA while another replica has the host.
func (h *host) elsewhere() error {
	if _, problem := h.known(); isElsewhere(problem) {
		return h.unavailable(problem)
	}
	return nil
}

// followElsewhere keeps what other replicas' hosts hold as the ledger says it,
// so that every replica says the same of the worker as a whole.
func (b *Backend) followElsewhere(ctx context.Context) {
	ticker := time.NewTicker(elsewhereInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for _, h := range b.hosts {
			if h.elsewhere() == nil {
				continue
			}
			if err := h.readElsewhere(ctx); err != nil && ctx.Err() == nil {
				b.log.WarnContext(ctx, "Reading what another replica's host holds failed", "host", h.config.Name, "error", err.Error())
			}
		}
	}
}

// readElsewhere takes the reservations of a host that isn't ours from the
// ledger.
func (h *host) readElsewhere(ctx context.Context) error {
	h.turning.Lock()
	defer h.turning.Unlock()
	if h.elsewhere() == nil {
		return nil
	}
	open, err := h.backend.env.Journal.Open(ctx)
	if err != nil {
		return err
	}
	kept := map[backend.GrantID]bool{}
	for _, a := range open {
		if a.Placement != h.config.Name {
			continue
		}
		var p params
		if err := json.Unmarshal(a.Params, &p); err != nil {
			return backenderr.Wrap(backenderr.Internal, err, "parameters of an attempt of grant %s in the ledger", a.GrantID)
		}
		kept[a.GrantID] = true
		h.backend.inventory.Restore(p.reservation(a.GrantID))
	}
	for _, id := range h.backend.inventory.Held(h.config.Name) {
		if !kept[id] {
			h.backend.inventory.Release(id)
		}
	}
	return nil
}

var _ worker.Divided = (*Backend)(nil)

// Elsewhere implements worker.Divided.
func (b *Backend) Elsewhere(ctx context.Context, id backend.GrantID) error {
	if r, ok := b.inventory.Get(id); ok && b.byName[r.Host].elsewhere() == nil {
		return nil
	}
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return err
	}
	for _, a := range attempts {
		if h := b.byName[a.Placement]; !a.Gone && h != nil {
			return h.elsewhere()
		}
	}
	return nil
}

// Serving implements worker.Divided: a replica serves unless others have all
// that can be had.
func (b *Backend) Serving() error {
	var held []string
	for _, h := range b.hosts {
		switch found, problem := h.known(); {
		case found != nil:
			return nil
		case isElsewhere(problem):
			held = append(held, h.config.Name+" is "+problem.Error())
		}
	}
	if len(held) > 0 {
		return errors.New("no host is held here: " + strings.Join(held, "; "))
	}
	return nil
}

// tookOver tells the runtime that grants may have come with a host.
func (b *Backend) tookOver() {
	if b.env.TookOver != nil {
		b.env.TookOver()
	}
}

// lacks confirms that a host of another replica's has nothing of a grant that
// the ledger knows no attempt of. It only looks.
func (h *host) lacks(ctx context.Context, id backend.GrantID) error {
	ctx = sshconn.Ungated(ctx)
	other := h.elsewhere()
	exists, err := h.fs.Exists(ctx, h.backend.dirs.grant(id))
	if err != nil {
		return err
	}
	result, err := h.conn.Run(ctx, sshconn.Command{Args: []string{
		"systemctl", "list-units", "--all", "--plain", "--no-legend", "--", unitPattern(h.backend.env.BridgeID, &id),
	}, Timeout: commandTimeout})
	if err != nil {
		return err
	}
	if err := result.Err("systemctl"); err != nil {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s", h.config.Name)
	}
	if exists || strings.TrimSpace(string(result.Stdout)) != "" {
		return other
	}
	return nil
}
