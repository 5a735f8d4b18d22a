package ec2backend

import (
	"context"
	"regexp"
	"slices"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Codes of StateReason, which says why an instance changed its state
// (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_StateReason.html).
const (
	reasonPoweredOff    = "Client.InstanceInitiatedShutdown"
	reasonByUser        = "Client.UserInitiatedShutdown"
	reasonSpotTaken     = "Server.SpotInstanceTermination"
	reasonSpotShutdown  = "Server.SpotInstanceShutdown"
	reasonScheduledStop = "Server.ScheduledStop"
)

// Watch implements worker.Driver.
func (b *Backend) Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return backend.Exit{}, err
	}
	open := slices.IndexFunc(attempts, func(a worker.Attempt) bool { return !a.Gone })
	if open < 0 {
		saved, err := b.env.Journal.SavedLog(ctx, id)
		switch {
		case err != nil:
			return backend.Exit{}, err
		case saved == nil:
			return backend.Exit{}, backenderr.New(backenderr.InstanceNotFound, "no instance of grant %s", id)
		}
		return saved.Exit, nil
	}
	r := b.byName[backend.Region(attempts[open].Placement)]
	if r == nil {
		return backend.Exit{}, backenderr.New(backenderr.ProviderUnavailable, "the instance is in region %s, which is no longer in the configuration",
			attempts[open].Placement)
	}
	return b.watch(ctx, r, identity{id, attempts[open].Number}, usage)
}

func (b *Backend) watch(ctx context.Context, r *region, id identity, usage func(backend.Usage)) (backend.Exit, error) {
	settled := b.settled(id)
	missed := 0 // reads in a row that didn't show it
	var seen time.Time
	reported := time.Now()
	for {
		all, err := r.instances.next(ctx, seen, b.config.PollInterval.Duration)
		if ctx.Err() != nil {
			return backend.Exit{}, classify(ctx.Err(), "watch")
		}
		if !all.asked.IsZero() {
			seen = all.asked
		}
		if err != nil {
			// Not seen is not gone: others say what is wrong.
			if b.life.Err() != nil {
				return backend.Exit{}, classify(err, "watch")
			}
			continue
		}
		i, found := all.value.of(id)
		if missed++; found {
			missed = 0
		}
		switch {
		case found && i.over():
			return b.unlessSaved(ctx, id, b.exitOf(ctx, r, i))
		case missed > 1 && seen.After(settled):
			return b.unlessSaved(ctx, id, backend.Exit{Reason: backend.EndVanished, Message: "EC2 shows the instance no more"})
		}
		if now := time.Now(); now.Sub(reported) >= b.config.UsageInterval.Duration && found {
			// What is allocated follows from the time; what CloudWatch measures
			// costs money to ask for, and is read once, at the end.
			reported = now
			usage(backend.Usage{})
		}
	}
}

// unlessSaved returns an exit, or the one on record if this one knows of no cause:
// another replica may have ended the instance, and has said why before it did.
func (b *Backend) unlessSaved(ctx context.Context, id identity, exit backend.Exit) (backend.Exit, error) {
	if exit.Reason != backend.EndVanished {
		return exit, nil
	}
	saved, err := b.env.Journal.SavedLog(ctx, id.grant)
	switch {
	case err != nil:
		return backend.Exit{}, err
	case saved != nil && saved.Attempt == id.attempt:
		return saved.Exit, nil
	}
	return exit, nil
}

// exitOf says how an instance ended that runs no more.
func (b *Backend) exitOf(ctx context.Context, r *region, i instance) backend.Exit {
	at, known := i.endedAt()
	late := !i.validTo.IsZero() && !at.Before(i.validTo)
	switch i.reasonCode {
	case reasonSpotTaken, reasonSpotShutdown, reasonScheduledStop:
		return backend.Exit{Reason: backend.EndInterrupted, Message: i.reason}
	case reasonPoweredOff:
		if late && known {
			return backend.Exit{Reason: backend.EndDeadline}
		}
		// At the deadline a guest says nothing of how the workload ended.
		exit, told := b.exitOfGuest(ctx, r, i)
		if !told && !time.Now().Before(i.validTo) && !i.validTo.IsZero() {
			return backend.Exit{Reason: backend.EndDeadline}
		}
		return exit
	case reasonByUser:
		if late {
			return backend.Exit{Reason: backend.EndDeadline}
		}
		return backend.Exit{Reason: backend.EndVanished, Message: "somebody else ended the instance: " + i.transition}
	}
	return backend.Exit{Reason: backend.EndVanished, Message: orUnknown(i.reason)}
}

// exitOfGuest reads from the console how the workload ended. Nothing is billed
// by it.
func (b *Backend) exitOfGuest(ctx context.Context, r *region, i instance) (exit backend.Exit, told bool) {
	exited := func(text []byte) (guestapi.Verdict, bool) {
		return guestapi.FindVerdict(text, i.grant.String(), i.attempt)
	}
	console := b.console(ctx, r, i.id, func(text []byte) bool {
		v, ok := exited(text)
		return ok && v.Phase != guestapi.PhaseReady
	})
	out := backend.Exit{Reason: backend.EndWorkloadExited}
	v, ok := exited(console)
	if !ok || v.Phase == guestapi.PhaseReady {
		out.Message = "the instance powered itself off; its console doesn't say with which status the workload ended"
		return out, false
	}
	if v.Reason == backend.EndOutOfMemory.String() {
		out.Reason = backend.EndOutOfMemory
	}
	out.Code, out.Signal, out.Message = v.Code, v.Signal, v.Message
	return out, true
}

// transitionTime is in StateTransitionReason, "User initiated (2026-11-22
// 10:11:12 GMT)".
var transitionTime = regexp.MustCompile(`\((\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}) GMT\)`)

// endedAt is when an instance that runs no more ended, as EC2 tells, and whether
// it does: for one that powered itself off it doesn't, and it is the latest that
// it can be. EC2 tells the second: it is the end of that.
func (i instance) endedAt() (at time.Time, known bool) {
	now := time.Now().UTC()
	if m := transitionTime.FindStringSubmatch(i.transition); m != nil {
		if at, err := time.Parse(time.DateTime, m[1]); err == nil && at.Add(time.Second).After(i.launched) && at.Before(now) {
			return earlier(at.Add(time.Second).UTC(), now), true
		}
	}
	if i.validTo.After(i.launched) {
		return earlier(now, i.validTo), false
	}
	return now, false
}
