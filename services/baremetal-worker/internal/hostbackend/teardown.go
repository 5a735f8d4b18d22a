package hostbackend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// clear removes everything of a grant from the host and returns when that is
// confirmed. With save, what the instance used goes to the journal first.
func (h *host) clear(ctx context.Context, id backend.GrantID, save bool) error {
	if err := h.wait(ctx); err != nil {
		return err
	}
	if h.backend.env.Janitor {
		// A worker has prepared the host for this when it connected. Since then
		// it may have been rebooted.
		if err := errors.Join(h.bus.Start(ctx, "podman.socket"), h.nft.Ensure(ctx)); err != nil {
			return err
		}
	}
	found, err := h.ready()
	if err != nil {
		return err
	}
	ctx = sshconn.Bind(ctx, found.generation)
	dir := h.backend.dirs.grant(id)
	r, err := h.recordOrIntent(ctx, id)
	recorded := err == nil
	if err != nil && !isMissing(err) {
		return err
	}
	if r.complete() {
		// On a full disk there can be no mark. The grant ends all the same.
		if err := h.markStopped(ctx, dir); err != nil {
			h.log.WarnContext(ctx, "Marking a grant as stopped failed", "grant_id", id.String(), "error", err.Error())
		}
	}
	units, err := h.bus.List(ctx, unitPattern(h.backend.env.BridgeID, &id))
	if err != nil {
		return err
	}
	stopped := false
	for _, u := range units {
		stopped = stopped || u.ActiveState == "active" || u.ActiveState == "activating"
		if err := h.bus.Stop(ctx, u.Name); err != nil {
			return err
		}
		if err := h.bus.ResetFailed(ctx, u.Name); err != nil {
			return err
		}
	}
	if recorded {
		if save && r.complete() {
			if err := h.saveLog(ctx, r, stopped); err != nil {
				return err
			}
		}
		if err := h.removeLeftovers(ctx, r); err != nil {
			return err
		}
	}
	// The record first: what is half removed when the worker dies must not be
	// read for another log, nor taken for an attempt to go on with. Then the
	// file without which a call that comes late starts nothing; the mark of the
	// end alone would be gone too soon.
	for _, path := range []string{dir + "/" + recordFile, dir + "/" + attemptFile(r.Attempt), dir} {
		if err := h.fs.RemoveAll(ctx, path); err != nil {
			return err
		}
	}
	left, err := h.bus.List(ctx, unitPattern(h.backend.env.BridgeID, &id))
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return backenderr.New(backenderr.ProviderUnavailable, "host %s: unit %s is still there", h.config.Name, left[0].Name)
	}
	return nil
}

// recordOrIntent returns a grant's record; if it is missing, what the ledger
// knows of an attempt here that isn't gone.
func (h *host) recordOrIntent(ctx context.Context, id backend.GrantID) (record, error) {
	r, err := h.record(ctx, id)
	if !isMissing(err) {
		return r, err
	}
	attempts, errJournal := h.backend.env.Journal.Attempts(ctx, id)
	if errJournal != nil {
		return record{}, errJournal
	}
	for _, a := range attempts {
		if a.Gone || a.Placement != h.config.Name {
			continue
		}
		r := record{GrantID: id, Attempt: a.Number, CreatedAt: a.BeganAt}
		if err := json.Unmarshal(a.Params, &r.params); err != nil {
			return record{}, backenderr.Wrap(backenderr.Internal, err, "parameters of an attempt of grant %s in the ledger", id)
		}
		return r, nil
	}
	return record{}, err
}

// markStopped sets the ended mark before the unit is stopped: nothing starts the
// grant any more, and its end isn't taken for one of the workload's own. A mark
// that is there already, which the unit's own end set, stays.
func (h *host) markStopped(ctx context.Context, dir string) error {
	mark := dir + "/" + guestapi.EndedFileName
	switch exists, err := h.fs.Exists(ctx, mark); {
	case err != nil:
		return err
	case exists:
		return nil
	}
	return h.fs.WriteFile(ctx, mark, []byte(stoppedMark), 0o600)
}

// dropNamespaces removes the network namespaces that have an address of a
// subnet. podman, which made them, leaves them when the disk with its database
// is full, and names them at random.
const dropNamespaces = `for file in /run/netns/netns-*; do
	name=${file##*/}
	[ -z "$(ip -netns "$name" -oneline address show to "$1")" ] || ip netns delete "$name"
done`

// removeLeftovers checks what the unit's own clean-up should have removed, and
// removes what is left: after a reboot, or when a command of it failed.
func (h *host) removeLeftovers(ctx context.Context, r record) error {
	w := h.recorded(r)
	// Always: it may have been opened again while the unit was ending.
	grant, err := w.firewallGrant()
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "render clean-up")
	}
	if err := h.nft.Close(ctx, grant); err != nil {
		return err
	}
	left, err := h.leftovers(ctx, w)
	if err != nil || left == "" {
		return err
	}
	h.log.InfoContext(ctx, "Cleaning up after a unit", "grant_id", r.GrantID.String(), "left", left)
	commands, err := w.cleanup()
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "render clean-up")
	}
	switch mounted, err := h.mounted(ctx, w.disk()); {
	case err != nil:
		return err
	case !mounted:
		// The container's records were on the disk. podman would begin a store
		// of another kind in the empty directory.
		commands = commands[1:]
	}
	commands = append(commands, systemd.Exec{Args: []string{"sh", "-c", dropNamespaces, "sh", w.subnet.String()}})
	var failed []error
	for _, c := range commands {
		result, err := h.conn.Run(ctx, sshconn.Command{Args: c.Args, Timeout: commandTimeout})
		if err != nil {
			return err
		}
		// Most of them have nothing to do and say so. What counts is what is
		// left afterwards.
		if err := result.Err(c.Args[0]); err != nil {
			failed = append(failed, err)
		}
	}
	rules, err := h.staleRules(ctx, w)
	if err != nil {
		return err
	}
	if rules != "" {
		result, err := h.conn.Run(ctx, sshconn.Command{Args: []string{firewall.DefaultBinary, rules}, Timeout: commandTimeout})
		if err != nil {
			return err
		}
		if err := result.Err("nft"); err != nil {
			failed = append(failed, err)
		}
	}
	if left, err = h.leftovers(ctx, w); err != nil {
		return err
	}
	if left != "" {
		return backenderr.Wrap(backenderr.ProviderUnavailable, errors.Join(failed...), "host %s: %s of grant %s is still there", h.config.Name, left, r.GrantID)
	}
	return nil
}

// leftovers names something of the grant that is still on the host beside its
// directory, "" if there is nothing.
func (h *host) leftovers(ctx context.Context, w workload) (string, error) {
	for _, path := range []string{w.dir + "/" + diskFile, w.runRoot, "/sys/class/net/" + w.names.networkInterface()} {
		exists, err := h.fs.Exists(ctx, path)
		if err != nil {
			return "", err
		}
		if exists {
			return path, nil
		}
	}
	networks, err := h.podman.ListNetworks(ctx, labelGrant+"="+w.names.grant.String())
	if err != nil {
		return "", err
	}
	for _, n := range networks {
		if n.Name == w.names.stem() {
			return "network " + n.Name, nil
		}
	}
	mounted, err := h.mounted(ctx, w.disk())
	if err != nil {
		return "", err
	}
	if mounted {
		return "mount " + w.disk(), nil
	}
	rules, err := h.staleRules(ctx, w)
	if err != nil {
		return "", err
	}
	if rules != "" {
		return "rules of netavark", nil
	}
	return "", nil
}

// mounted reports whether something is mounted on a directory.
func (h *host) mounted(ctx context.Context, dir string) (bool, error) {
	mounts, err := h.fs.ReadFile(ctx, "/proc/self/mounts", maxMountsBytes)
	return strings.Contains(string(mounts), " "+dir+" "), err
}

// watch blocks until the grant's unit no longer runs.
func (h *host) watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
	for {
		if err := h.wait(ctx); err != nil {
			return backend.Exit{}, err // ctx has ended
		}
		exit, ended, err := h.watchOnce(ctx, id, usage)
		switch {
		case ended || backenderr.Is(err, backenderr.InstanceNotFound):
			return exit, err
		case ctx.Err() != nil:
			return backend.Exit{}, backenderr.Wrap(backenderr.From(ctx.Err()).Reason, ctx.Err(), "watch")
		}
		if err != nil {
			h.log.InfoContext(ctx, "Watching again", "grant_id", id.String(), "error", err.Error())
		}
		select {
		case <-time.After(retryProbe / 4):
		case <-ctx.Done():
		}
	}
}

// watchOnce watches as long as the host stays as it is.
func (h *host) watchOnce(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (exit backend.Exit, ended bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, err := h.record(ctx, id)
	if isMissing(err) {
		// A damaged record is no reason to end what runs.
		there, errExists := h.fs.Exists(ctx, h.backend.dirs.grant(id)+"/"+recordFile)
		if errExists != nil {
			return backend.Exit{}, false, errExists
		}
		if there {
			r, err = h.recordOrIntent(ctx, id)
		}
	}
	if isMissing(err) {
		return backend.Exit{}, false, backenderr.New(backenderr.InstanceNotFound, "host %s has nothing of grant %s", h.config.Name, id)
	}
	if err != nil {
		return backend.Exit{}, false, err
	}
	unit := h.names(r).unit()
	statuses := h.bus.Watch(ctx, unit)
	ticker := time.NewTicker(h.backend.config.UsageInterval.Duration)
	defer ticker.Stop()
	for {
		select {
		case status, ok := <-statuses:
			if !ok {
				return backend.Exit{}, false, nil
			}
			if status.Running() {
				continue
			}
			log, err := h.logOf(ctx, r, false)
			if err != nil {
				return backend.Exit{}, false, err
			}
			return log.Exit, true, nil
		case <-ticker.C:
			if status, err := h.bus.Status(ctx, unit); err == nil && status.Running() {
				usage(usageSoFar(status))
			}
		case <-ctx.Done():
			return backend.Exit{}, false, nil
		}
	}
}

// saveLog reads what the instance used and how it ended into the journal.
func (h *host) saveLog(ctx context.Context, r record, stopped bool) error {
	log, err := h.logOf(ctx, r, stopped)
	if err != nil || log.StartedAt.IsZero() {
		return err
	}
	return h.backend.env.Journal.SaveLog(ctx, log)
}

// logOf reads the end of a grant's instance from its directory. stopped says
// that it ran until the worker ended it just now, which the mark of an earlier
// call may say, too.
func (h *host) logOf(ctx context.Context, r record, stopped bool) (backend.ComputeLog, error) {
	dir := h.backend.dirs.grant(r.GrantID)
	log := backend.ComputeLog{
		GrantID: r.GrantID, Backend: h.backend.env.Backend, InstanceID: backend.InstanceID(h.config.Name + "/" + h.names(r).unit()),
		Region: backend.Region(r.Region), Attempt: r.Attempt, Shape: r.Shape, ValidTo: r.ValidTo,
	}
	data, err := h.fs.ReadFile(ctx, dir+"/"+guestapi.SpoolFileName, maxRecordBytes)
	if isMissing(err) {
		return h.logWithoutSpool(ctx, r, log, stopped)
	}
	if err != nil {
		return backend.ComputeLog{}, err
	}
	spool, err := guestapi.DecodeSpool(bytes.NewReader(data))
	if err != nil {
		h.log.WarnContext(ctx, "Spool is damaged", "grant_id", r.GrantID.String(), "error", err.Error())
		return h.logWithoutSpool(ctx, r, log, stopped)
	}
	mark, err := h.fs.ReadFile(ctx, dir+"/"+guestapi.EndedFileName, maxRecordBytes)
	if err != nil && !isMissing(err) {
		return backend.ComputeLog{}, err
	}
	readSpool(&log, spool, stopped || string(mark) == stoppedMark)
	return log, nil
}

// logWithoutSpool is the log of an instance whose unit left no usage: the host
// was rebooted under it, or the unit never got so far.
func (h *host) logWithoutSpool(ctx context.Context, r record, log backend.ComputeLog, stopped bool) (backend.ComputeLog, error) {
	log.Partial = true
	log.StartedAt = r.CreatedAt
	// Not what the last probe found: this may be the first to see the new boot.
	bootID, err := h.bootID(ctx)
	if err != nil {
		return backend.ComputeLog{}, err
	}
	if r.complete() && bootID != r.BootID {
		log.Exit = backend.Exit{Reason: backend.EndHostRebooted, Message: "host " + h.config.Name + " was rebooted"}
		return log, nil
	}
	if stopped {
		log.Exit = backend.Exit{Message: "the unit left no usage"}
		return log, nil
	}
	log.Exit = backend.Exit{Reason: backend.EndVanished, Message: "the unit is gone and left no usage"}
	return log, nil
}

// readSpool takes over what the unit left. stopped says that the worker asked
// for the end, so that how the workload then ended is no reason.
func readSpool(log *backend.ComputeLog, s guestapi.Spool, stopped bool) {
	if s.StartedAt != nil {
		log.StartedAt = *s.StartedAt
	}
	log.EndedAt = s.RecordedAt
	if s.StoppedAt != nil {
		log.EndedAt = *s.StoppedAt
	}
	log.Exit = exitOf(text(s.Result), text(s.ExitCode), text(s.ExitStatus))
	// systemd has one word for a deadline that passed and for a stop that took too
	// long. The host's clock may be off, but not by more than this.
	if log.Exit.Reason == backend.EndDeadline && log.EndedAt.Before(log.ValidTo.Add(-maxClockSkew)) {
		log.Exit.Reason = backend.EndWorkloadExited
	}
	if stopped && log.Exit.Reason != backend.EndDeadline && log.Exit.Reason != backend.EndOutOfMemory {
		log.Exit.Reason = 0
	}
	measured := func(v *uint64, divide uint64) *backend.Measurement {
		if v == nil {
			return nil
		}
		return &backend.Measurement{Value: saturate(*v / divide), Source: backend.UsageHostMeasured, From: log.StartedAt, To: log.EndedAt}
	}
	log.Usage = backend.Usage{
		CPU:             measured(s.Usage.CPUUsageUsec, 1000),
		RAMPeak:         measured(s.Usage.MemoryPeakBytes, 1),
		NetworkReceived: measured(s.Usage.NetworkReceivedBytes, 1),
		NetworkSent:     measured(s.Usage.NetworkSentBytes, 1),
		DiskRead:        measured(s.Usage.IOReadBytes, 1),
		DiskWritten:     measured(s.Usage.IOWriteBytes, 1),
	}
	log.Partial = log.Usage.CPU == nil || log.Usage.NetworkReceived == nil || log.StartedAt.IsZero()
}

func text(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func saturate(v uint64) int64 { return int64(min(v, 1<<63-1)) }

// exitOf reads systemd's words for how a unit ended: $SERVICE_RESULT,
// $EXIT_CODE, $EXIT_STATUS (systemd.exec(5)).
func exitOf(result, code, status string) backend.Exit {
	exit := backend.Exit{Reason: backend.EndWorkloadExited}
	switch result {
	case "timeout":
		// RuntimeMaxSec, the deadline; or else a stop that took too long.
		exit.Reason = backend.EndDeadline
	case "oom-kill":
		exit.Reason = backend.EndOutOfMemory
	}
	switch code {
	case "exited":
		if n, err := strconv.ParseInt(status, 10, 32); err == nil {
			c := int32(n)
			exit.Code = &c
			// The guest tells a signal so, as shells do. A workload may exit with
			// such a code, too: then what it says is believed.
			if name, ok := strings.CutPrefix(unix.SignalName(unix.Signal(n-guestapi.ExitSignalBase)), "SIG"); ok {
				exit.Signal = name
			}
		}
	case "killed", "dumped":
		exit.Signal = status
	}
	return exit
}
