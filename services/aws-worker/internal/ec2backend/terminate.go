package ec2backend

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Terminate implements worker.Driver. Of a grant that isn't closed it leaves
// alone what another replica may be at.
func (b *Backend) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	closed, err := b.closed(ctx, id)
	if err != nil {
		return nil, err
	}
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	recorded := map[backend.Region]bool{}
	for _, a := range attempts {
		recorded[backend.Region(a.Placement)] = true
		if a.Gone || !closed && !a.Ending {
			continue
		}
		r := b.byName[backend.Region(a.Placement)]
		if r == nil {
			return nil, backenderr.New(backenderr.ProviderUnavailable, "attempt %d is in region %s, which is no longer in the configuration", a.Number, a.Placement)
		}
		attempt := identity{id, a.Number}
		if err := b.settle(ctx, r, attempt); err != nil {
			return nil, err
		}
		if err := b.undo(ctx, r, attempt, false); err != nil {
			return nil, err
		}
	}
	// The ledger may be an older copy: EC2 has to be read. What it can't show of
	// regions in which the grant never was, as far as is known, keeps nothing up.
	for _, r := range b.regions {
		err := b.clearUnrecorded(ctx, r, id, closed)
		switch {
		case err == nil:
		case len(recorded) == 0 || recorded[r.name] || ctx.Err() != nil:
			return nil, err
		default:
			b.log.WarnContext(ctx, "A region can't be searched for what else the grant may have", "grant_id", id.String(), "region", string(r.name), "error", err.Error())
		}
	}
	return b.env.Journal.SavedLog(ctx, id)
}

// closed reports whether a grant has ended, so that nothing more is begun for it.
func (b *Backend) closed(ctx context.Context, id backend.GrantID) (bool, error) {
	err := b.env.Journal.Check(ctx, id)
	if backenderr.Is(err, backenderr.GrantEnded) {
		return true, nil
	}
	return false, err
}

// clearUnrecorded deletes what exists of a grant in a region, but for attempts
// that somebody may be at.
func (b *Backend) clearUnrecorded(ctx context.Context, r *region, id backend.GrantID, closed bool) error {
	found, err := b.existing(ctx, r)
	if err != nil {
		return err
	}
	// Only now: what was seen may have been begun since the first look.
	attempts, err := b.env.Journal.Attempts(ctx, id)
	if err != nil {
		return err
	}
	begun := map[uint32]bool{}
	for _, a := range attempts {
		begun[a.Number] = !a.Gone && !a.Ending && !closed
	}
	for attempt := range found {
		if attempt.grant != id || begun[attempt.attempt] {
			continue
		}
		if err := b.settle(ctx, r, attempt); err != nil {
			return err
		}
		if err := b.erase(ctx, r, attempt); err != nil {
			return err
		}
		b.release(attempt)
	}
	return nil
}

// settle saves an attempt's final account, before its instance is deleted.
func (b *Backend) settle(ctx context.Context, r *region, id identity) error {
	all, err := r.instances.now(ctx)
	if err != nil {
		return classify(err, "look for the instance")
	}
	i, found := all.value.of(id)
	if !found || i.state == types.InstanceStateNamePending {
		return nil
	}
	saved, err := b.env.Journal.SavedLog(ctx, id.grant)
	if err != nil {
		return err
	}
	if saved != nil && saved.Attempt == id.attempt {
		return nil // an earlier try read it when it ended
	}
	log := backend.ComputeLog{
		GrantID: id.grant, InstanceID: backend.InstanceID(i.id), Region: r.name, Attempt: id.attempt, Shape: i.shape,
		StartedAt: i.launched.UTC(), EndedAt: time.Now().UTC(), ValidTo: i.validTo,
		Exit: backend.Exit{Reason: backend.EndTerminated},
	}
	known := true
	switch {
	case i.over():
		log.EndedAt, known = i.endedAt()
		log.Exit = b.exitOf(ctx, r, i)
	case !log.EndedAt.Before(i.validTo) && !i.validTo.IsZero():
		log.Exit.Reason = backend.EndDeadline
	}
	log.Usage, log.Partial = b.usageOf(ctx, r, i, log.EndedAt)
	log.Partial = log.Partial || !known
	log.Usage.Allocated(log.Shape, log.StartedAt, log.EndedAt)
	return b.env.Journal.SaveLog(ctx, log)
}

// usageOf reads what CloudWatch has measured so far, and says whether that is
// less than all: it lags by minutes, and nobody waits for it.
func (b *Backend) usageOf(ctx context.Context, r *region, i instance, to time.Time) (u backend.Usage, partial bool) {
	u, err := r.clients.usage(ctx, i.id, b.catalogue.cpus(r.name, i.kind), i.launched, to)
	if err != nil {
		b.log.WarnContext(ctx, "CloudWatch tells no usage", "grant_id", i.grant.String(), "instance_id", i.id, "error", err.Error())
		return backend.Usage{}, true
	}
	for _, m := range []*backend.Measurement{u.CPU, u.NetworkReceived, u.NetworkSent} {
		if m == nil || m.To.Before(to) {
			partial = true
		}
	}
	return u, partial
}

// undo deletes everything of an attempt, records that it is gone, and gives back
// its room.
func (b *Backend) undo(ctx context.Context, r *region, id identity, fresh bool) error {
	if !fresh {
		if err := b.erase(ctx, r, id); err != nil {
			return err
		}
	}
	if err := b.env.Journal.Gone(ctx, id.grant, id.attempt); err != nil {
		return err
	}
	b.release(id)
	return nil
}

// erase deletes what exists of an attempt until EC2 confirms that nothing is
// left. That nothing is to be found counts only once EC2 had the time to show
// it.
func (b *Backend) erase(ctx context.Context, r *region, id identity) error {
	settled := b.settled(id)
	told := map[string]time.Time{}
	for {
		all, err := r.instances.now(ctx)
		if err != nil {
			return classify(err, "look for the instance")
		}
		var living []instance
		found := false
		for _, i := range all.value[id.grant] {
			if i.attempt == id.attempt {
				found = true
				if !i.terminated() {
					living = append(living, i)
				}
			}
		}
		if !found && !all.asked.After(settled) {
			if err := sleep(ctx, min(time.Until(settled)+time.Millisecond, b.config.PollInterval.Duration)); err != nil {
				return classify(err, "wait until the instance would be seen")
			}
			continue
		}
		if len(living) == 0 {
			left, err := b.eraseParts(ctx, r, id)
			switch {
			case err != nil:
				return err
			case !left:
				if b.platformDeadline() {
					return b.disarm(ctx, r, id)
				}
				return nil
			}
		}
		for _, i := range living {
			// One that EC2 took and forgot is told again.
			if time.Since(told[i.id]) < b.config.VisibilityDelay.Duration || i.state == types.InstanceStateNameShuttingDown {
				continue
			}
			_, err := r.clients.ec2.TerminateInstances(ctx, &ec2.TerminateInstancesInput{InstanceIds: []string{i.id}})
			switch {
			case err == nil:
				told[i.id] = time.Now()
			case !notFound(err): // which is EC2's list and its calls at odds
				return classify(err, "terminate instance "+i.id)
			}
		}
		if err := sleep(ctx, b.config.PollInterval.Duration/freshGap); err != nil {
			return classify(err, "wait until the instance is terminated")
		}
	}
}

// eraseParts reports whether volumes or interfaces of an attempt are left, whose
// instance is gone. EC2 deletes them with it; what it left all the same is
// deleted here.
func (b *Backend) eraseParts(ctx context.Context, r *region, id identity) (left bool, err error) {
	all, err := r.parts.now(ctx)
	if err != nil {
		return false, classify(err, "look for volumes and network interfaces")
	}
	for _, p := range all.value[id.grant] {
		if p.attempt != id.attempt {
			continue
		}
		left = true
		if p.attached {
			continue // it is going with its instance
		}
		if p.isVolume {
			_, err = r.clients.ec2.DeleteVolume(ctx, &ec2.DeleteVolumeInput{VolumeId: aws.String(p.id)})
		} else {
			_, err = r.clients.ec2.DeleteNetworkInterface(ctx, &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: aws.String(p.id)})
		}
		if err != nil && !notFound(err) && !stillInUse(err) {
			return true, classify(err, "delete "+p.id)
		}
	}
	return left, nil
}

// stillInUse says that a part is just going away with its instance.
func stillInUse(err error) bool {
	return slices.Contains([]string{"VolumeInUse", "IncorrectState", "InvalidParameterValue", "InvalidNetworkInterface.InUse"}, codeOf(err))
}

// existing lists which attempts have anything in a region.
func (b *Backend) existing(ctx context.Context, r *region) (map[identity]backend.Resource, error) {
	all, err := r.instances.now(ctx)
	if err != nil {
		return nil, classify(err, "list instances")
	}
	rest, err := r.parts.now(ctx)
	if err != nil {
		return nil, classify(err, "list volumes and network interfaces")
	}
	out := map[identity]backend.Resource{}
	for _, list := range all.value {
		for _, i := range list {
			if i.terminated() {
				continue
			}
			out[i.identity] = backend.Resource{
				GrantID: i.grant, Attempt: i.attempt, InstanceID: backend.InstanceID(i.id), Placement: string(r.name), Running: !i.over(),
				CreatedAt: i.launched.UTC(), ValidTo: i.validTo,
			}
		}
	}
	for _, list := range rest.value {
		for _, p := range list {
			if _, known := out[p.identity]; !known {
				out[p.identity] = backend.Resource{
					GrantID: p.grant, Attempt: p.attempt, InstanceID: backend.InstanceID(p.id), Placement: string(r.name),
					CreatedAt: p.createdAt.UTC(), ValidTo: p.validTo,
				}
			}
		}
	}
	if !b.platformDeadline() {
		return out, nil
	}
	schedules, err := r.schedules.now(ctx)
	if err != nil {
		return nil, classify(err, "list schedules")
	}
	for _, id := range schedules.value {
		if _, known := out[id]; !known {
			out[id] = backend.Resource{GrantID: id.grant, Attempt: id.attempt, InstanceID: backend.InstanceID(b.scheduleName(id)), Placement: string(r.name)}
		}
	}
	return out, nil
}

// List implements backend.Inventory.
func (b *Backend) List(ctx context.Context) (backend.Listing, error) {
	// Which is asked for at each sweep: what others ended is free from now on.
	if _, err := b.takeStock(ctx); err != nil {
		return backend.Listing{}, err
	}
	var (
		out      backend.Listing
		problems []error
	)
	for _, r := range b.regions {
		found, err := b.existing(ctx, r)
		if skew := r.clients.skew(); err == nil && tooSkewed(skew) {
			// Deadlines are judged by what is listed.
			err = backenderr.New(backenderr.ClockSkew, "this machine's clock is %s off that of region %s", skew.Round(time.Second), r.name)
		}
		if err != nil {
			problems = append(problems, err)
			out.Blind = append(out.Blind, string(r.name))
			continue
		}
		for _, resource := range found {
			out.Resources = append(out.Resources, resource)
		}
	}
	if len(problems) == len(b.regions) {
		return backend.Listing{}, classify(errors.Join(problems...), "list what exists")
	}
	slices.SortFunc(out.Resources, func(x, y backend.Resource) int {
		if c := slices.Compare(x.GrantID[:], y.GrantID[:]); c != 0 {
			return c
		}
		return int(x.Attempt) - int(y.Attempt)
	})
	return out, nil
}
