package hostbackend

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

const (
	// undoTimeout bounds the clean-up of a failed attempt before the caller
	// gets its answer: longer than a unit's whole stop takes.
	undoTimeout = 75 * time.Second
	// Pauses between tries; the first comes at once.
	minReadyPause = 10 * time.Millisecond
	maxReadyPause = 250 * time.Millisecond
	// maxPortTries bounds the attempts that give up for a port that something else
	// has, each of which learns of at least one.
	maxPortTries = 4
	// avoidPort is how long such a port is left alone before it is tried again.
	avoidPort = 10 * time.Minute
	// logTail is how many lines of a failed unit's journal are looked at.
	logTail = "20"
)

// Provision implements worker.Driver.
func (b *Backend) Provision(ctx context.Context, order worker.Order) (worker.Ready, error) {
	id := order.Grant.ID
	defer b.work(id)()
	a, err := b.begin(ctx, order.Grant)
	if err == nil && a.touched {
		if h := b.byName[a.params.Host]; h != nil {
			if err := h.elsewhere(); err != nil {
				return worker.Ready{}, err
			}
		}
		a, err = b.finishUndo(ctx, order.Grant, a)
	}
	if err != nil {
		return worker.Ready{}, err
	}
	for try := 1; ; try++ {
		h := b.byName[a.params.Host]
		if h == nil {
			return worker.Ready{}, backenderr.New(backenderr.ProviderUnavailable, "attempt %d is on host %s, which is no longer in the configuration", a.number, a.params.Host)
		}
		h.images.use(id, a.params.Image)
		ready, err := h.provision(ctx, order, a)
		if err == nil {
			return ready, nil
		}
		failure := b.undo(ctx, h, id, a, err)
		if other := h.elsewhere(); other != nil && backenderr.CreatedOf(failure) == backenderr.CreatedUnknown {
			// The replica that has the host now goes on with the attempt.
			return worker.Ready{}, backenderr.Wrap(backenderr.OtherReplica, failure, "%s", other).WithRetryAfter(retryElsewhere)
		}
		// A port that something else has is no reason to send the grant away: the
		// next attempt gets others.
		if !b.avoidForeignPorts(ctx, h, err) || try == maxPortTries || backenderr.CreatedOf(failure) != backenderr.CreatedNone {
			return worker.Ready{}, failure
		}
		if a, err = b.begin(ctx, order.Grant); err != nil {
			return worker.Ready{}, err
		}
	}
}

// avoidForeignPorts keeps ports that an attempt found taken from grants for a
// while. It reports whether that was the matter.
func (b *Backend) avoidForeignPorts(ctx context.Context, h *host, err error) bool {
	foreign, ok := errors.AsType[*foreignPortsError](err)
	if !ok {
		return false
	}
	b.log.WarnContext(ctx, "Something else on the host has ports of the grants' range", "host", h.config.Name, "ports", foreign.ports)
	for _, port := range foreign.ports {
		b.inventory.SetPortForeign(h.config.Name, port, time.Now().Add(avoidPort))
	}
	return true
}

// finishUndo returns the open attempt, or, if it has ended meanwhile, undoes it
// and begins another: an undo that failed, or whose process ended, or a workload
// that ended before anybody was told that it was ready. What has the mark of an
// end never starts. Nor does an attempt of which the host has nothing: another
// replica may have undone it that was stopped just before it could say so, and
// would say so now.
func (b *Backend) finishUndo(ctx context.Context, grant backend.Grant, a *attempt) (*attempt, error) {
	h := b.byName[a.params.Host]
	if h == nil {
		return a, nil
	}
	switch marked, err := h.fs.Exists(ctx, h.backend.dirs.grant(grant.ID)+"/"+guestapi.EndedFileName); {
	case err != nil:
		return nil, err
	case !marked:
		// The record is the first file there and the first to go.
		if there, err := h.fs.Exists(ctx, h.backend.dirs.grant(grant.ID)+"/"+recordFile); err != nil || there {
			return a, err
		}
	}
	b.log.InfoContext(ctx, "Finishing the undoing of an attempt", "grant_id", grant.ID.String(), "host", h.config.Name, "attempt", a.number)
	if err := h.clear(ctx, grant.ID, false); err != nil {
		return nil, err
	}
	if err := b.env.Journal.Gone(ctx, grant.ID, a.number); err != nil {
		return nil, err
	}
	b.release(grant.ID)
	return b.begin(ctx, grant)
}

// attempt is a try to run a grant on a host.
type attempt struct {
	number uint32
	params params
	// touched says that something of it may be on the host: it was, or an
	// earlier process may have.
	touched bool
}

// begin returns the grant's open attempt or reserves room and begins one.
func (b *Backend) begin(ctx context.Context, grant backend.Grant) (*attempt, error) {
	attempts, err := b.env.Journal.Attempts(ctx, grant.ID)
	if err != nil {
		return nil, err // an earlier attempt may have left something
	}
	if n := len(attempts); n > 0 && !attempts[n-1].Gone {
		return b.resume(attempts[n-1], true)
	}
	if r, ok := b.inventory.Get(grant.ID); ok && b.byName[r.Host].elsewhere() != nil {
		b.inventory.Release(grant.ID) // what another replica held for it is over
	}
	reservation, err := b.inventory.Reserve(grant.ID, needOf(grant))
	if err != nil {
		return nil, err
	}
	p := paramsFor(grant, reservation, b.byName[reservation.Host].config.Region)
	rendered, err := json.Marshal(p)
	if err != nil {
		b.release(grant.ID)
		return nil, backenderr.Wrap(backenderr.Internal, err, "render parameters").WithCreated(backenderr.CreatedNone)
	}
	begun, err := b.env.Journal.Begin(ctx, grant.ID, p.Host, rendered)
	if err != nil {
		// Nothing was sent. But an intent that was stored although the ledger
		// failed will be taken up by the next try, with what is reserved now.
		look, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
		defer cancel()
		stored, errRead := b.env.Journal.Attempts(look, grant.ID)
		if n := len(stored); errRead == nil && (n == 0 || stored[n-1].Gone) {
			b.release(grant.ID)
		}
		return nil, none(err)
	}
	return b.resume(begun, !begun.New)
}

func (b *Backend) resume(a worker.Attempt, touched bool) (*attempt, error) {
	out := &attempt{number: a.Number, touched: touched}
	if err := json.Unmarshal(a.Params, &out.params); err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "parameters of attempt %d in the ledger", a.Number)
	}
	b.inventory.Restore(out.params.reservation(a.GrantID))
	return out, nil
}

func none(err error) error { return backenderr.From(err).Clone().WithCreated(backenderr.CreatedNone) }

// undo takes back a failed attempt and says whether that is confirmed.
func (b *Backend) undo(ctx context.Context, h *host, id backend.GrantID, a *attempt, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(b.config.undoLimit, undoTimeout))
	defer cancel()
	failure := backenderr.From(cause).Clone()
	if backenderr.Is(failure, backenderr.ProviderUnavailable) && failure.RetryAfter <= 0 {
		failure = failure.WithRetryAfter(retryProbe)
	}
	var err error
	if a.touched {
		err = h.clear(ctx, id, false)
	}
	if err == nil {
		err = b.env.Journal.Gone(ctx, id, a.number)
	}
	if err != nil {
		b.log.WarnContext(ctx, "Undoing an attempt failed", "grant_id", id.String(), "host", h.config.Name, "error", err.Error())
		return failure.WithCreated(backenderr.CreatedUnknown).WithMetadata(backenderr.MetaLeaked, h.config.Name+"/"+id.String())
	}
	b.release(id)
	return failure.WithCreated(backenderr.CreatedNone)
}

// provision runs the grant on the host and waits until SSH answers.
func (h *host) provision(ctx context.Context, order worker.Order, a *attempt) (worker.Ready, error) {
	// A host that can't be reached now is no place for a new grant.
	found, err := h.usable()
	if err != nil {
		return worker.Ready{}, err
	}
	ctx = sshconn.Bind(ctx, found.generation)
	id := order.Grant.ID
	w := h.workload(found, order.Grant, a)
	private, public, err := h.backend.env.HostKey(id, a.number)
	if err != nil {
		return worker.Ready{}, err
	}
	status, err := h.bus.Status(ctx, w.names.unit())
	if err != nil {
		return worker.Ready{}, err
	}
	if !status.Running() {
		image, err := h.images.ensure(ctx, found, order.Grant.Image, order.ImagePointer, order.Progress)
		if err != nil {
			return worker.Ready{}, err
		}
		w.imageID = image.ID
		guest, err := guestConfig(order, image, private.Expose(), h.backend.config.StopGrace.Duration)
		if err != nil {
			return worker.Ready{}, err
		}
		if err := h.backend.env.Journal.Check(ctx, id); err != nil {
			return worker.Ready{}, err
		}
		order.Progress("starting")
		a.touched = true
		if err := h.writeFiles(ctx, found, w, order.Grant, guest); err != nil {
			return worker.Ready{}, err
		}
		if err := h.start(ctx, w); err != nil {
			return worker.Ready{}, err
		}
	}
	order.Progress("waiting for SSH")
	started, err := h.waitForSSH(ctx, w, public)
	if err != nil {
		return worker.Ready{}, err
	}
	order.Progress("")
	return worker.Ready{
		Instance: backend.Instance{
			ID: backend.InstanceID(h.config.Name + "/" + w.names.unit()), Region: backend.Region(a.params.Region), Isolation: backend.IsolationContainer,
			Shape: a.params.Shape, Attempt: a.number, StartedAt: started, Ports: a.params.published(h.config.PublicHost), Enforcement: backend.EnforcedByPlatform,
		},
		Host: h.config.PublicHost, Port: a.params.SSHPort, User: guestapi.DefaultUser, HostKey: public,
	}, nil
}

// workload returns what the grant's unit is rendered from, all but the image.
func (h *host) workload(found *facts, grant backend.Grant, a *attempt) workload {
	c := h.backend.config
	return workload{
		names:   names{bridge: h.backend.env.BridgeID, grant: grant.ID, attempt: a.number},
		params:  a.params,
		dir:     h.backend.dirs.grant(grant.ID),
		runRoot: runDir + "/" + h.backend.env.BridgeID + "/" + grant.ID.String(),
		guest:   found.guest, images: found.imageStore, subnet: c.subnet(a.params.Slot), uidBase: c.uidBase(a.params.Slot),
		table: h.nft.Table(), firewallScript: h.firewallScript(), firewalld: found.firewalld, zone: h.config.FirewalldZone,
		grant: grant, stopGrace: c.StopGrace.Duration,
	}
}

// guestConfig is what the guest is told: the image's own command, wrapped.
func guestConfig(order worker.Order, image podman.Image, hostKey []byte, grace time.Duration) ([]byte, error) {
	encoded, err := guestapi.Encode(guestapi.Config{
		Version:          guestapi.ConfigVersion,
		HostKey:          guestapi.NewHostKey(string(hostKey)),
		AuthorizedKeys:   []string{order.LoginKey},
		Command:          append(append([]string(nil), image.Entrypoint...), image.Cmd...),
		Environment:      order.Grant.Environment,
		WorkingDir:       image.WorkingDir,
		RunAs:            image.User,
		StopGraceSeconds: uint32(grace / time.Second), //nolint:gosec // at most 30
	})
	if err != nil {
		return nil, backenderr.Wrap(backenderr.ImageInvalid, err, "the image's configuration")
	}
	return encoded, nil
}

// writeFiles writes the grant's directory; the record first, so that whatever
// else is there can be told.
func (h *host) writeFiles(ctx context.Context, found *facts, w workload, grant backend.Grant, guest []byte) error {
	data, err := marshalRecord(record{
		GrantID: grant.ID, params: w.params, Attempt: w.names.attempt, ValidTo: grant.ValidTo, Network: grant.Network, BootID: found.bootID, CreatedAt: time.Now(),
	})
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "grant record")
	}
	// The mount point needs to be passed through by the container's users,
	// which aren't the host's root.
	for _, dir := range []string{w.dir, w.disk()} {
		if err := h.fs.MkdirAll(ctx, dir, 0o711); err != nil {
			return err
		}
	}
	if err := h.fs.WriteFile(ctx, w.dir+"/"+recordFile, data, 0o600); err != nil {
		return err
	}
	// Under the mount there is a file where podman's store is on the disk: a
	// clean-up before the disk is mounted must not make podman set up a store.
	switch exists, err := h.fs.Exists(ctx, w.store()); {
	case err != nil:
		return err
	case !exists:
		if err := h.fs.WriteFile(ctx, w.store(), nil, 0o600); err != nil {
			return err
		}
	}
	config := w.dir + "/" + guestapi.ConfigFileName
	if err := h.fs.WriteFile(ctx, config, guest, 0o600); err != nil {
		return err
	}
	// The guest reads it as the container's root. An id-mapped mount would do,
	// too, but not on every file system.
	if err := h.fs.Chown(ctx, config, w.uidBase, w.uidBase); err != nil {
		return err
	}
	// What ends the grant on a full disk makes room for the usage by this.
	if err := h.fs.WriteFile(ctx, w.dir+"/"+guestapi.ReserveFileName, make([]byte, guestapi.MaxSpoolBytes), 0o600); err != nil {
		return err
	}
	return h.fs.WriteFile(ctx, w.dir+"/"+attemptFile(w.names.attempt), nil, 0o600)
}

// start starts the unit, or finds it started.
func (h *host) start(ctx context.Context, w workload) error {
	// Now, and not before the image was sent: systemd counts from the start.
	w.lifetime = time.Until(w.grant.ValidTo)
	if w.lifetime <= 0 {
		return backenderr.New(backenderr.GrantEnded, "the grant's deadline has passed")
	}
	unit, err := w.unit()
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "render unit")
	}
	err = h.bus.StartTransient(ctx, unit)
	switch {
	case err == nil, errors.Is(err, systemd.ErrUnitExists):
		return nil
	case errors.Is(err, systemd.ErrConditionFailed):
		return backenderr.Wrap(backenderr.GrantEnded, err, "host %s: the grant has ended there", h.config.Name)
	}
	if _, failed := jobFailed(err); failed {
		return h.workloadFailed(ctx, w, "the instance could not be started")
	}
	return err
}

// workloadFailed describes a unit that failed: the workload's console if it has
// said anything, else what systemd and podman said.
func (h *host) workloadFailed(ctx context.Context, w workload, what string) error {
	console, err := h.fs.Tail(ctx, w.dir+"/"+consoleFile, 4*backenderr.MaxConsoleTail)
	if err == nil && len(console) > 0 {
		return backenderr.New(backenderr.WorkloadFailed, "%s on host %s", what, h.config.Name).WithConsole(consoleText(string(console)))
	}
	journal, err := h.conn.Run(ctx, sshconn.Command{Args: []string{
		"journalctl", "--unit=" + w.names.unit(), "--output=cat", "--no-pager", "--lines=" + logTail,
	}})
	if err != nil {
		return err
	}
	// Most of what stops a container before its first word is in its image. The
	// host is at fault where these say so, which are systemd's words about the
	// programs that run before the container, and about missing ones: no image can
	// make them.
	reason := backenderr.WorkloadFailed
	text := string(journal.Stdout)
	if strings.Contains(text, addressInUse) {
		foreign, err := h.foreignPorts(ctx, w)
		if err != nil {
			return err
		}
		if len(foreign) > 0 {
			return backenderr.Wrap(backenderr.HostUnfit, &foreignPortsError{ports: foreign}, "%s on host %s", what, h.config.Name).WithConsole(text)
		}
		// It has gone since.
		return backenderr.New(backenderr.ProviderUnavailable, "%s on host %s: a port was taken", what, h.config.Name).WithConsole(text)
	}
	for _, sign := range []string{"Control process exited", "start-pre operation timed out", "Unable to locate executable"} {
		if strings.Contains(text, sign) {
			reason = backenderr.HostUnfit
		}
	}
	return backenderr.New(reason, "%s on host %s", what, h.config.Name).WithConsole(text)
}

// consoleText takes the stamps off the lines of conmon's k8s-file format:
// "2026-11-21T22:00:00.000000000+00:00 stdout F text".
func consoleText(log string) string {
	var out strings.Builder
	for line := range strings.Lines(log) {
		fields := strings.SplitN(line, " ", 4)
		if len(fields) == 4 && (fields[1] == "stdout" || fields[1] == "stderr") && (fields[2] == "F" || fields[2] == "P") {
			line = fields[3]
		}
		out.WriteString(line)
	}
	return out.String()
}

// waitForSSH waits until the instance answers with its host key and still runs
// then. It returns when it started.
func (h *host) waitForSSH(ctx context.Context, w workload, hostKey string) (time.Time, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.backend.config.ReadyTimeout.Duration, errReadyTimeout)
	defer cancel()
	want, err := sshkey.ParsePublicKey(hostKey)
	if err != nil {
		return time.Time{}, backenderr.Wrap(backenderr.Internal, err, "host key")
	}
	// A unit that ends takes the hole in the firewall with it, and then nothing
	// answers at all: its end ends the try.
	alive, dead := context.WithCancel(ctx)
	defer dead()
	go func() {
		for status := range h.bus.Watch(alive, w.names.unit()) {
			if over(status) {
				dead()
			}
		}
	}()
	pause := minReadyPause
	var last error
	for {
		last = sshkey.Probe(alive, h.sshEndpoint(w.params.SSHPort), guestapi.DefaultUser, want)
		status, err := h.bus.Status(ctx, w.names.unit())
		switch {
		case err != nil && ctx.Err() == nil:
			return time.Time{}, err
		case err == nil && over(status):
			return time.Time{}, h.workloadFailed(context.WithoutCancel(ctx), w, "the workload ended before SSH was ready")
		case err == nil && last == nil && status.ActiveState == "active":
			return status.ActiveEnter, nil
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxReadyPause)
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), errReadyTimeout) {
				return time.Time{}, h.bootTimeout(context.WithoutCancel(ctx), w, last)
			}
			return time.Time{}, backenderr.Wrap(backenderr.From(ctx.Err()).Reason, ctx.Err(), "wait for SSH")
		}
	}
}

// over says that a unit which was started no longer runs, or is about to end.
func over(s systemd.UnitStatus) bool { return !s.Running() || s.ActiveState == "deactivating" }

var errReadyTimeout = errors.New("instance took too long")

func (h *host) bootTimeout(ctx context.Context, w workload, last error) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	console, err := h.fs.Tail(ctx, w.dir+"/"+consoleFile, 4*backenderr.MaxConsoleTail)
	if err != nil {
		console = nil // the timeout is what counts
	}
	return backenderr.Wrap(backenderr.BootTimeout, last, "SSH did not answer within %s on host %s", h.backend.config.ReadyTimeout.Duration, h.config.Name).
		WithConsole(consoleText(string(console)))
}
