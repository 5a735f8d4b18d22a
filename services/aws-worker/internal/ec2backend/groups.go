package ec2backend

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

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
)

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

// everywhere is the rule for what goes out that EC2 gives to every new group.
func everywhere() types.IpPermission {
	return types.IpPermission{IpProtocol: aws.String("-1"), IpRanges: []types.IpRange{{CidrIp: aws.String("0.0.0.0/0")}}}
}

// groups remembers the groups that this process has seen whole.
type groups struct {
	mu    sync.Mutex
	known map[string]string // region, VPC and rules to group id
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

// forget is for when EC2 says that groups aren't there that we thought are.
func (g *groups) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.known = nil
}

// group returns the security group with these rules in a VPC, made if there is
// none. Whoever dies half way leaves a group that the next one finishes; of two
// who make it at once, one gets the other's.
func (b *Backend) group(ctx context.Context, r *region, vpc string, want rules) (string, error) {
	key := strings.Join([]string{string(r.name), vpc, want.key()}, " ")
	if id := b.groups.get(key); id != "" {
		return id, nil
	}
	name := "cb-" + b.env.BridgeID + "-" + want.key()
	found, err := b.findGroup(ctx, r, vpc, name)
	if err != nil {
		return "", err
	}
	if found == nil {
		_, err := r.clients.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{
			GroupName: aws.String(name), VpcId: aws.String(vpc),
			Description: aws.String("Compute bridge " + b.env.BridgeID + ": shared by the instances with the same ports and network policy"),
			TagSpecifications: []types.TagSpecification{{
				ResourceType: types.ResourceTypeSecurityGroup,
				Tags:         tagList(map[string]string{tagBridge: b.env.BridgeID, tagGroup: want.key(), tagName: name}),
			}},
		})
		if err != nil && codeOf(err) != codeGroupExists {
			return "", classify(err, "create the security group "+name)
		}
		if found, err = b.awaitGroup(ctx, r, vpc, name); err != nil {
			return "", err
		}
	}
	if err := b.fillGroup(ctx, r, *found, want); err != nil {
		return "", err
	}
	id := aws.ToString(found.GroupId)
	b.groups.set(key, id)
	return id, nil
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

// awaitGroup waits until EC2 shows a group that exists.
func (b *Backend) awaitGroup(ctx context.Context, r *region, vpc, name string) (*types.SecurityGroup, error) {
	ctx, cancel := context.WithTimeout(ctx, b.config.VisibilityDelay.Duration)
	defer cancel()
	for {
		found, err := b.findGroup(ctx, r, vpc, name)
		if err != nil || found != nil {
			return found, err
		}
		if err := sleep(ctx, b.config.PollInterval.Duration/freshGap); err != nil {
			// A group of this name exists that isn't the bridge's, or EC2 is late.
			return nil, backenderr.New(backenderr.ProviderUnavailable, "the security group %s exists, but isn't shown with this bridge's tag", name).
				WithRetryAfter(b.config.VisibilityDelay.Duration)
		}
	}
}

// fillGroup gives a group the rules that it lacks.
func (b *Backend) fillGroup(ctx context.Context, r *region, have types.SecurityGroup, want rules) error {
	id, name := have.GroupId, aws.ToString(have.GroupName)
	var missing []types.IpPermission
	for _, p := range want.ingress() {
		there := func(h types.IpPermission) bool {
			return aws.ToInt32(h.FromPort) == *p.FromPort && aws.ToString(h.IpProtocol) == *p.IpProtocol
		}
		if !slices.ContainsFunc(have.IpPermissions, there) {
			missing = append(missing, p)
		}
	}
	// What may go out first: the group is whole only when all of it is done, and
	// is used only then.
	if !want.open {
		if err := b.closeEgress(ctx, r, have, want); err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	_, err := r.clients.ec2.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{GroupId: id, IpPermissions: missing})
	if err != nil && codeOf(err) != codePermissionExists {
		return classify(err, "open the ports of the security group "+name)
	}
	return nil
}

func (b *Backend) closeEgress(ctx context.Context, r *region, have types.SecurityGroup, want rules) error {
	id, name := have.GroupId, aws.ToString(have.GroupName)
	wide := func(p types.IpPermission) bool {
		return slices.ContainsFunc(p.IpRanges, func(to types.IpRange) bool { return aws.ToString(to.CidrIp) == "0.0.0.0/0" })
	}
	if slices.ContainsFunc(have.IpPermissionsEgress, wide) && !slices.Contains(want.prefixes, "0.0.0.0/0") {
		_, err := r.clients.ec2.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{GroupId: id, IpPermissions: []types.IpPermission{everywhere()}})
		if err != nil && codeOf(err) != codePermissionGone {
			return classify(err, "close the security group "+name)
		}
	}
	let := func(p types.IpPermission) int { return len(p.IpRanges) + len(p.Ipv6Ranges) + len(p.PrefixListIds) }
	allowed := 0
	for _, p := range have.IpPermissionsEgress {
		if !wide(p) {
			allowed += let(p)
		}
	}
	if egress := want.egress(); allowed < let(egress) {
		_, err := r.clients.ec2.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{GroupId: id, IpPermissions: []types.IpPermission{egress}})
		if err != nil && codeOf(err) != codePermissionExists {
			return classify(err, "open the destinations of the security group "+name)
		}
	}
	return nil
}
