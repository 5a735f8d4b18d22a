package ec2backend

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

// pageSize is the most that one Describe call returns
// (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeInstances.html).
const pageSize = 1000

// shared is a read of the provider which all who need it at the same time share,
// so that what is read doesn't grow with the number of grants.
type shared[T any] struct {
	life context.Context //nolint:containedctx // the process's: a read outlives whoever asked first
	read func(context.Context) (T, error)
	gap  time.Duration // between the beginnings of two reads, at least

	mu      sync.Mutex
	last    result[T]
	good    T // what the last read found that didn't fail
	running bool
	closed  bool
	changed chan struct{} // closed and replaced after each read
	reads   sync.WaitGroup
}

// result is what a read found.
type result[T any] struct {
	asked time.Time // when it began: what was true then, or later, is in it
	value T
	err   error
}

func newShared[T any](life context.Context, gap time.Duration, read func(context.Context) (T, error)) *shared[T] {
	return &shared[T]{life: life, read: read, gap: gap, changed: make(chan struct{})}
}

// now returns what a read finds that begins after this call did.
func (s *shared[T]) now(ctx context.Context) (result[T], error) {
	return s.next(ctx, time.Now().Add(-1), 0)
}

// next returns the first result that was asked for after seen. It waits for
// others to ask for one until the interval since then is over.
func (s *shared[T]) next(ctx context.Context, seen time.Time, interval time.Duration) (result[T], error) {
	for {
		s.mu.Lock()
		last, changed := s.last, s.changed
		if last.asked.After(seen) {
			s.mu.Unlock()
			return last, last.err
		}
		wait := time.Until(seen.Add(interval))
		if wait <= 0 {
			s.begin()
			wait = time.Hour // the read says when
		}
		s.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return result[T]{}, ctx.Err()
		case <-s.life.Done():
			timer.Stop()
			return result[T]{}, context.Canceled
		}
		timer.Stop()
	}
}

// peek returns what was last read, however old.
func (s *shared[T]) peek() T {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.good
}

// close waits for the read that runs, and lets none begin any more. The life of
// the process has ended.
func (s *shared[T]) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.reads.Wait()
}

// begin starts a read unless one runs already; that one may have begun too early
// for who waits, who then starts the next. The mutex is held.
func (s *shared[T]) begin() {
	if s.running || s.closed || s.life.Err() != nil {
		return
	}
	s.running = true
	pause := time.Until(s.last.asked.Add(s.gap))
	s.reads.Go(func() {
		if pause > 0 {
			timer := time.NewTimer(pause)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-s.life.Done():
			}
		}
		asked := time.Now()
		value, err := s.read(s.life)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.last, s.running = result[T]{asked, value, err}, false
		if err == nil {
			s.good = value
		}
		close(s.changed)
		s.changed = make(chan struct{})
	})
}

// instance is an EC2 instance of the bridge, as DescribeInstances tells.
type instance struct {
	labels

	id         string
	state      types.InstanceStateName
	reasonCode string // StateReason.Code
	reason     string // StateReason.Message
	transition string // StateTransitionReason, which has the time of the end
	public     netip.Addr
	private    netip.Addr
	zone       string
	kind       string // instance type
	launched   time.Time
	volumes    []string
	spot       bool
}

// over says that it runs no more, or is about to, for good or not.
func (i instance) over() bool {
	switch i.state {
	case types.InstanceStateNamePending, types.InstanceStateNameRunning:
		return false
	case types.InstanceStateNameShuttingDown, types.InstanceStateNameTerminated,
		types.InstanceStateNameStopping, types.InstanceStateNameStopped:
	}
	return true
}

// terminated says that it is confirmed gone. Such instances are shown for about
// an hour more.
func (i instance) terminated() bool { return i.state == types.InstanceStateNameTerminated }

// instances are all of the bridge in a region, by grant.
type instances map[backend.GrantID][]instance

// of returns the instance of an attempt. If a grant was made twice under one
// number, which its token prevents, the one that lives goes first.
func (all instances) of(id identity) (instance, bool) {
	var out instance
	found := false
	for _, i := range all[id.grant] {
		if i.attempt == id.attempt && (!found || out.terminated()) {
			out, found = i, true
		}
	}
	return out, found
}

// part is a volume or a network interface.
type part struct {
	labels

	id        string
	isVolume  bool
	attached  bool
	createdAt time.Time
}

// parts are all of the bridge in a region, by grant.
type parts map[backend.GrantID][]part

// readInstances lists the bridge's instances in a region.
func (b *Backend) readInstances(ctx context.Context, rc *regionClients) (instances, error) {
	out := instances{}
	pages := ec2.NewDescribeInstancesPaginator(rc.ec2, &ec2.DescribeInstancesInput{Filters: b.ownFilters(), MaxResults: aws.Int32(pageSize)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "list the instances in "+rc.name)
		}
		for _, r := range page.Reservations {
			for _, i := range r.Instances {
				if read, ok := instanceOf(i); ok {
					out[read.grant] = append(out[read.grant], read)
				}
			}
		}
	}
	return out, nil
}

func instanceOf(i types.Instance) (instance, bool) {
	tags, ok := readTags(i.Tags)
	if !ok {
		return instance{}, false
	}
	out := instance{
		labels: tags, id: aws.ToString(i.InstanceId), transition: aws.ToString(i.StateTransitionReason),
		kind: string(i.InstanceType), launched: aws.ToTime(i.LaunchTime), spot: i.InstanceLifecycle == types.InstanceLifecycleTypeSpot,
	}
	if i.State != nil {
		out.state = i.State.Name
	}
	if i.StateReason != nil {
		out.reasonCode, out.reason = aws.ToString(i.StateReason.Code), aws.ToString(i.StateReason.Message)
	}
	if i.Placement != nil {
		out.zone = aws.ToString(i.Placement.AvailabilityZone)
	}
	// They are empty until the instance has them.
	out.public, _ = netip.ParseAddr(aws.ToString(i.PublicIpAddress))
	out.private, _ = netip.ParseAddr(aws.ToString(i.PrivateIpAddress))
	for _, m := range i.BlockDeviceMappings {
		if m.Ebs != nil {
			out.volumes = append(out.volumes, aws.ToString(m.Ebs.VolumeId))
		}
	}
	return out, true
}

// readParts lists the bridge's volumes and network interfaces in a region.
func (b *Backend) readParts(ctx context.Context, rc *regionClients) (parts, error) {
	out := parts{}
	volumes := ec2.NewDescribeVolumesPaginator(rc.ec2, &ec2.DescribeVolumesInput{Filters: b.ownFilters(), MaxResults: aws.Int32(pageSize)})
	for volumes.HasMorePages() {
		page, err := volumes.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "list the volumes in "+rc.name)
		}
		for _, v := range page.Volumes {
			if tags, ok := readTags(v.Tags); ok && v.State != types.VolumeStateDeleted {
				out[tags.grant] = append(out[tags.grant], part{
					labels: tags, id: aws.ToString(v.VolumeId), isVolume: true, attached: v.State != types.VolumeStateAvailable && v.State != types.VolumeStateError,
					createdAt: aws.ToTime(v.CreateTime),
				})
			}
		}
	}
	interfaces := ec2.NewDescribeNetworkInterfacesPaginator(rc.ec2,
		&ec2.DescribeNetworkInterfacesInput{Filters: b.ownFilters(), MaxResults: aws.Int32(pageSize)})
	for interfaces.HasMorePages() {
		page, err := interfaces.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "list the network interfaces in "+rc.name)
		}
		for _, n := range page.NetworkInterfaces {
			if tags, ok := readTags(n.TagSet); ok {
				out[tags.grant] = append(out[tags.grant], part{
					labels: tags, id: aws.ToString(n.NetworkInterfaceId), attached: n.Status != types.NetworkInterfaceStatusAvailable,
				})
			}
		}
	}
	return out, nil
}
