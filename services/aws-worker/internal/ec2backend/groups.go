package ec2backend

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// sshPort is where the guest serves SSH: a machine has its own address.
const sshPort = 22

// Codes of EC2's that say how a race for a group went
// (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html).
const (
	codeGroupExists      = "InvalidGroup.Duplicate"
	codeGroupGone        = "InvalidGroup.NotFound"
	codePermissionExists = "InvalidPermission.Duplicate"
	codePermissionGone   = "InvalidPermission.NotFound"
	codeGroupsFull       = "SecurityGroupLimitExceeded"
)

// maxRules is how many rules a security group has in each direction, counted for
// each version of IP
// (https://docs.aws.amazon.com/vpc/latest/userguide/amazon-vpc-limits.html). An
// account may have more, which nobody can ask for.
const maxRules = 60

// maxCollected bounds how many unused groups are deleted at once: EC2 lets 50
// such calls through, and then 5 each second (pageThrottling).
const maxCollected = 20

// rules are what a security group lets through.
type rules struct {
	ports []backend.Port // inbound from everywhere, sorted
	// open lets everything out; else only to these prefixes.
	open     bool
	prefixes []string // sorted
	lists    []string // managed prefix lists, sorted
}

// rulesOf returns the rules of a grant: SSH and its ports in; out what its
// policy says, with the destinations that every instance needs for its start.
func rulesOf(grant backend.Grant, rc RegionConfig) rules {
	out := rules{
		ports: append([]backend.Port{{Number: sshPort, Protocol: backend.TCP}}, grant.Ports...),
		open:  grant.Network.Mode != backend.NetworkAllowlist,
	}
	if !out.open {
		for _, to := range slices.Concat(grant.Network.AllowedPrefixes, rc.AllowlistEgress) {
			if strings.HasPrefix(to, "pl-") {
				out.lists = append(out.lists, to)
			} else {
				out.prefixes = append(out.prefixes, to)
			}
		}
	}
	slices.SortFunc(out.ports, func(x, y backend.Port) int {
		return cmp.Or(cmp.Compare(x.Protocol, y.Protocol), cmp.Compare(x.Number, y.Number))
	})
	slices.Sort(out.prefixes)
	slices.Sort(out.lists)
	out.ports, out.prefixes, out.lists = slices.Compact(out.ports), slices.Compact(out.prefixes), slices.Compact(out.lists)
	return out
}

// key names rules: equal rules have one group.
func (r rules) key() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%v %t %q %q", r.ports, r.open, r.prefixes, r.lists))
	return hex.EncodeToString(sum[:8])
}

// most is how many rules there are in the direction, and of the version of IP,
// that has most of them. A prefix list counts as one: AWS's own for S3 does, others
// may count as more.
func (r rules) most() int {
	four, six := len(r.lists), len(r.lists)
	for _, to := range r.prefixes {
		if prefix, err := netip.ParsePrefix(to); err == nil && prefix.Addr().Is6() {
			six++
		} else {
			four++
		}
	}
	return max(len(r.ports), four, six)
}

// ingress is what the group lets in.
func (r rules) ingress() []types.IpPermission {
	out := make([]types.IpPermission, 0, len(r.ports))
	for _, port := range r.ports {
		out = append(out, types.IpPermission{
			IpProtocol: aws.String(port.Protocol.String()), FromPort: aws.Int32(int32(port.Number)), ToPort: aws.Int32(int32(port.Number)),
			IpRanges:   []types.IpRange{{CidrIp: aws.String("0.0.0.0/0")}},
			Ipv6Ranges: []types.Ipv6Range{{CidrIpv6: aws.String("::/0")}},
		})
	}
	return out
}

// egress is what the group lets out beside what is always open.
func (r rules) egress() types.IpPermission {
	out := types.IpPermission{IpProtocol: aws.String("-1")}
	for _, to := range r.prefixes {
		if prefix, err := netip.ParsePrefix(to); err == nil && prefix.Addr().Is6() {
			out.Ipv6Ranges = append(out.Ipv6Ranges, types.Ipv6Range{CidrIpv6: aws.String(to)})
		} else {
			out.IpRanges = append(out.IpRanges, types.IpRange{CidrIp: aws.String(to)})
		}
	}
	for _, list := range r.lists {
		out.PrefixListIds = append(out.PrefixListIds, types.PrefixListId{PrefixListId: aws.String(list)})
	}
	return out
}

// allowed is one peer that a rule lets through.
type allowed struct {
	protocol string
	from, to int32 // -1 with protocols that have no ports
	peer     string
}

// allowedBy takes permissions apart. A network is written in one way only, as EC2
// does it.
func allowedBy(permissions []types.IpPermission) []allowed {
	var out []allowed
	for _, p := range permissions {
		one := allowed{protocol: aws.ToString(p.IpProtocol), from: -1, to: -1}
		if p.FromPort != nil && p.ToPort != nil && one.protocol != allProtocols {
			one.from, one.to = *p.FromPort, *p.ToPort
		}
		add := func(peer *string) {
			one.peer = aws.ToString(peer)
			if network, err := netip.ParsePrefix(one.peer); err == nil {
				one.peer = network.Masked().String()
			}
			out = append(out, one)
		}
		for _, to := range p.IpRanges {
			add(to.CidrIp)
		}
		for _, to := range p.Ipv6Ranges {
			add(to.CidrIpv6)
		}
		for _, to := range p.PrefixListIds {
			add(to.PrefixListId)
		}
		for _, to := range p.UserIdGroupPairs {
			add(to.GroupId)
		}
	}
	return out
}

// allProtocols is EC2's word for them.
const allProtocols = "-1"

// permission is the rule that lets one peer through.
func (a allowed) permission() types.IpPermission {
	out := types.IpPermission{IpProtocol: aws.String(a.protocol)}
	if a.protocol != allProtocols {
		out.FromPort, out.ToPort = aws.Int32(a.from), aws.Int32(a.to)
	}
	switch {
	case strings.HasPrefix(a.peer, "pl-"):
		out.PrefixListIds = []types.PrefixListId{{PrefixListId: aws.String(a.peer)}}
	case strings.HasPrefix(a.peer, "sg-"):
		out.UserIdGroupPairs = []types.UserIdGroupPair{{GroupId: aws.String(a.peer)}}
	case strings.Contains(a.peer, ":"):
		out.Ipv6Ranges = []types.Ipv6Range{{CidrIpv6: aws.String(a.peer)}}
	default:
		out.IpRanges = []types.IpRange{{CidrIp: aws.String(a.peer)}}
	}
	return out
}

// lacking are the rules of want that have lacks.
func lacking(have, want []types.IpPermission) []types.IpPermission {
	there := allowedBy(have)
	var out []types.IpPermission
	for _, a := range allowedBy(want) {
		if !slices.Contains(there, a) {
			out = append(out, a.permission())
			there = append(there, a) // once
		}
	}
	return out
}

// groups remembers the groups that this process has seen whole.
type groups struct {
	mu    sync.Mutex
	known map[string]string // region, VPC and rules to group id
	// asked is when a group's name was last asked for: it is about to be used.
	asked map[string]time.Time

	// turns are what one at a time does, by its name; closed when it is done.
	turns map[string]chan struct{}
}

// turn begins what the name says, or waits until somebody of this process who is
// at it is done, and says which. Who has begun it ends it.
func (g *groups) turn(ctx context.Context, name string) (end func(), first bool, err error) {
	g.mu.Lock()
	other := g.turns[name]
	if other == nil {
		if g.turns == nil {
			g.turns = map[string]chan struct{}{}
		}
		own := make(chan struct{})
		g.turns[name] = own
		g.mu.Unlock()
		return func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			delete(g.turns, name)
			close(own)
		}, true, nil
	}
	g.mu.Unlock()
	select {
	case <-other:
		return func() {}, false, nil
	case <-ctx.Done():
		return nil, false, classify(ctx.Err(), "wait for "+name)
	}
}

// alone waits until nobody else of this process does what the name says.
func (g *groups) alone(ctx context.Context, name string) (end func(), err error) {
	for {
		if end, first, err := g.turn(ctx, name); first || err != nil {
			return end, err
		}
	}
}

func (g *groups) get(key string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known[key]
}

func (g *groups) set(key, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known == nil {
		g.known = map[string]string{}
	}
	g.known[key] = id
}

// use says that a group is about to be used.
func (g *groups) use(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.asked == nil {
		g.asked = map[string]time.Time{}
	}
	g.asked[name] = time.Now()
}

// used says whether a group was about to be used not long ago, and forgets those
// that weren't.
func (g *groups) used(name string, within time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Since(g.asked[name]) < within {
		return true
	}
	delete(g.asked, name)
	return false
}

// drop forgets one group.
func (g *groups) drop(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	maps.DeleteFunc(g.known, func(_, known string) bool { return known == id })
}

// forget is for when EC2 says that groups aren't there that we thought are.
func (g *groups) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.known = nil
}

// group returns the security group with these rules in a VPC, made if there is
// none. Whoever dies half way leaves a group that the next one finishes; of two
// processes that make it at once, one gets the other's.
func (b *Backend) group(ctx context.Context, r *region, vpc string, want rules) (string, error) {
	key := strings.Join([]string{string(r.name), vpc, want.key()}, " ")
	name := "cb-" + b.env.BridgeID + "-" + want.key()
	b.groups.use(name)
	if id := b.groups.get(key); id != "" {
		return id, nil
	}
	// Grants that come together ask once; if that fails, each for itself.
	end, _, err := b.groups.turn(ctx, "the security group "+name+" in "+vpc)
	if err != nil {
		return "", err
	}
	defer end()
	if id := b.groups.get(key); id != "" {
		return id, nil
	}
	found, err := b.findGroup(ctx, r, vpc, name)
	if err != nil {
		return "", err
	}
	if found == nil {
		if err := b.makeGroup(ctx, r, vpc, name, want); err != nil {
			return "", err
		}
		if found, err = b.awaitGroup(ctx, r, vpc, name); err != nil {
			return "", err
		}
	}
	id := aws.ToString(found.GroupId)
	if err := b.completeGroup(ctx, r, *found, want); err != nil {
		return "", err
	}
	b.groups.set(key, id)
	return id, nil
}

// makeGroup makes a group that isn't there. That it is there after all is fine.
func (b *Backend) makeGroup(ctx context.Context, r *region, vpc, name string, want rules) error {
	create := func() error {
		_, err := r.clients.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{
			GroupName: aws.String(name), VpcId: aws.String(vpc),
			Description: aws.String("Compute bridge " + b.env.BridgeID + ": shared by the instances with the same ports and network policy"),
			TagSpecifications: []types.TagSpecification{{
				ResourceType: types.ResourceTypeSecurityGroup,
				Tags:         tagList(map[string]string{tagBridge: b.env.BridgeID, tagGroup: want.key(), tagName: name}),
			}},
		})
		if codeOf(err) == codeGroupExists {
			return nil
		}
		return err
	}
	err := create()
	if codeOf(err) == codeGroupsFull {
		// Requesters choose ports and destinations: what they chose once and nobody
		// uses now makes room.
		end, waited := b.groups.alone(ctx, "room for security groups in "+string(r.name))
		if waited != nil {
			return waited
		}
		defer end()
		if err = create(); codeOf(err) == codeGroupsFull && b.collectGroups(ctx, r) > 0 {
			err = create()
		}
	}
	if err != nil {
		return classify(err, "create the security group "+name)
	}
	return nil
}

// collectGroups deletes some of the bridge's groups in a region that nothing
// uses, and returns how many. EC2 itself refuses to delete one in use; a grant
// whose group is deleted just before its launch gets it again with its next
// attempt.
func (b *Backend) collectGroups(ctx context.Context, r *region) int {
	own := []types.Filter{{Name: aws.String("tag:" + tagBridge), Values: []string{b.env.BridgeID}}}
	inUse := map[string]bool{}
	interfaces := ec2.NewDescribeNetworkInterfacesPaginator(r.clients.ec2, &ec2.DescribeNetworkInterfacesInput{Filters: own, MaxResults: aws.Int32(pageSize)})
	for interfaces.HasMorePages() {
		page, err := interfaces.NextPage(ctx)
		if err != nil {
			b.log.WarnContext(ctx, "Unused security groups can't be told", "region", string(r.name), "error", describe(err))
			return 0
		}
		for _, n := range page.NetworkInterfaces {
			for _, g := range n.Groups {
				inUse[aws.ToString(g.GroupId)] = true
			}
		}
	}
	deleted := 0
	all := ec2.NewDescribeSecurityGroupsPaginator(r.clients.ec2, &ec2.DescribeSecurityGroupsInput{Filters: own, MaxResults: aws.Int32(pageSize)})
	for tried := 0; all.HasMorePages() && tried < maxCollected; {
		page, err := all.NextPage(ctx)
		if err != nil {
			b.log.WarnContext(ctx, "Unused security groups can't be listed", "region", string(r.name), "error", describe(err))
			break
		}
		for _, g := range page.SecurityGroups {
			id, name := aws.ToString(g.GroupId), aws.ToString(g.GroupName)
			made := slices.ContainsFunc(g.Tags, func(tag types.Tag) bool { return aws.ToString(tag.Key) == tagGroup })
			if !made || inUse[id] || tried == maxCollected || b.groups.used(name, b.groupInUse()) {
				continue
			}
			tried++
			_, err := r.clients.ec2.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{GroupId: g.GroupId})
			if err != nil && !notFound(err) {
				b.log.WarnContext(ctx, "Can't delete an unused security group", "region", string(r.name), "group", name, "error", describe(err))
				continue
			}
			deleted++
			b.groups.drop(id)
		}
	}
	b.log.InfoContext(ctx, "Deleted unused security groups", "region", string(r.name), "count", deleted)
	return deleted
}

// groupInUse is how long after it was asked for a group may not show what uses it.
func (b *Backend) groupInUse() time.Duration {
	return callAttempts*callTimeout + b.config.VisibilityDelay.Duration
}

// findGroup returns nil if there is no such group.
func (b *Backend) findGroup(ctx context.Context, r *region, vpc, name string) (*types.SecurityGroup, error) {
	answer, err := r.clients.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{Filters: []types.Filter{
		{Name: aws.String("vpc-id"), Values: []string{vpc}},
		{Name: aws.String("group-name"), Values: []string{name}},
		{Name: aws.String("tag:" + tagBridge), Values: []string{b.env.BridgeID}},
	}})
	if err != nil {
		return nil, classify(err, "look for the security group "+name)
	}
	if len(answer.SecurityGroups) == 0 {
		return nil, nil //nolint:nilnil // none is an answer
	}
	return &answer.SecurityGroups[0], nil
}

// groupLooks is how often a group is looked at at least before EC2 counts as at
// odds with itself, however long that takes.
const groupLooks = 5

// awaitGroup waits until EC2 shows a group that exists.
func (b *Backend) awaitGroup(ctx context.Context, r *region, vpc, name string) (*types.SecurityGroup, error) {
	until := time.Now().Add(b.config.VisibilityDelay.Duration)
	for look := 1; ; look++ {
		found, err := b.findGroup(ctx, r, vpc, name)
		if err != nil || found != nil {
			return found, err
		}
		if look >= groupLooks && time.Now().After(until) {
			// A group of this name exists that isn't the bridge's, or EC2 is late.
			return nil, backenderr.New(backenderr.ProviderUnavailable, "the security group %s exists, but isn't shown with this bridge's tag", name).
				WithRetryAfter(b.config.VisibilityDelay.Duration)
		}
		if err := sleep(ctx, b.config.PollInterval.Duration/freshGap); err != nil {
			return nil, classify(err, "wait for the security group "+name)
		}
	}
}

// completeGroup gives a group its rules. Others may be at it, too: then it looks
// again what is left to do.
func (b *Backend) completeGroup(ctx context.Context, r *region, have types.SecurityGroup, want rules) error {
	until := time.Now().Add(b.config.VisibilityDelay.Duration)
	for look := 1; ; look++ {
		raced, err := b.fillGroup(ctx, r, have, want)
		if err != nil || !raced {
			return err
		}
		answer, err := r.clients.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{GroupIds: []string{aws.ToString(have.GroupId)}})
		switch {
		case err != nil:
			return classify(err, "look for the security group "+aws.ToString(have.GroupName))
		case len(answer.SecurityGroups) == 1:
			have = answer.SecurityGroups[0]
		}
		if look >= groupLooks && time.Now().After(until) {
			return backenderr.New(backenderr.ProviderUnavailable, "the rules of the security group %s keep changing", aws.ToString(have.GroupName)).
				WithRetryAfter(b.config.VisibilityDelay.Duration)
		}
		if err := sleep(ctx, b.config.PollInterval.Duration/freshGap); err != nil {
			return classify(err, "complete the security group "+aws.ToString(have.GroupName))
		}
	}
}

// fillGroup gives a group the rules that it lacks, and takes away what it lets
// out besides; EC2 lets everything out of a new one. raced says that EC2 knows
// other rules than have, of which a call does nothing then.
func (b *Backend) fillGroup(ctx context.Context, r *region, have types.SecurityGroup, want rules) (raced bool, err error) {
	id, name := have.GroupId, aws.ToString(have.GroupName)
	// What may go out first: the group is whole only when all of it is done, and
	// is used only then.
	if !want.open {
		egress := []types.IpPermission{want.egress()}
		if unwanted := lacking(egress, have.IpPermissionsEgress); len(unwanted) > 0 {
			_, err := r.clients.ec2.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{GroupId: id, IpPermissions: unwanted})
			if raced, err := lost(err, codePermissionGone, "close the security group "+name); raced || err != nil {
				return raced, err
			}
		}
		if missing := lacking(have.IpPermissionsEgress, egress); len(missing) > 0 {
			_, err := r.clients.ec2.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{GroupId: id, IpPermissions: missing})
			if raced, err := lost(err, codePermissionExists, "open the destinations of the security group "+name); raced || err != nil {
				return raced, err
			}
		}
	}
	missing := lacking(have.IpPermissions, want.ingress())
	if len(missing) == 0 {
		return false, nil
	}
	_, err = r.clients.ec2.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{GroupId: id, IpPermissions: missing})
	return lost(err, codePermissionExists, "open the ports of the security group "+name)
}

// lost tells a race that another has won from other failures.
func lost(err error, code, doing string) (bool, error) {
	switch {
	case err == nil:
		return false, nil
	case codeOf(err) == code:
		return true, nil
	}
	return false, classify(err, doing)
}
