package ec2backend

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

func TestEqualRulesShareAGroup(t *testing.T) {
	t.Parallel()
	tcp := func(n uint16) backend.Port { return backend.Port{Number: n, Protocol: backend.TCP} }
	udp := func(n uint16) backend.Port { return backend.Port{Number: n, Protocol: backend.UDP} }
	allow := func(prefixes ...string) backend.NetworkPolicy {
		return backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: prefixes}
	}
	rc := RegionConfig{AllowlistEgress: []string{"198.51.100.0/24", "pl-1"}}
	base := backend.Grant{Ports: []backend.Port{tcp(80), tcp(443)}}
	same := backend.Grant{Ports: []backend.Port{tcp(443), tcp(80)}, Network: backend.NetworkPolicy{Mode: backend.NetworkOpen}}
	if rulesOf(base, rc).key() != rulesOf(same, rc).key() {
		t.Error("the order of ports makes another group")
	}
	others := map[string]backend.Grant{
		"no ports":  {},
		"udp":       {Ports: []backend.Port{udp(80), tcp(443)}},
		"allowlist": {Ports: base.Ports, Network: allow("203.0.113.0/24")},
		"another":   {Ports: base.Ports, Network: allow("203.0.113.0/25")},
	}
	seen := map[string]string{rulesOf(base, rc).key(): "base"}
	for name, g := range others {
		key := rulesOf(g, rc).key()
		if with, dup := seen[key]; dup {
			t.Errorf("%s shares its group with %s", name, with)
		}
		seen[key] = name
	}
}

func TestAllowlistHasWhatEveryInstanceNeedsForItsStart(t *testing.T) {
	t.Parallel()
	g := backend.Grant{Network: backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"203.0.113.0/24", "2001:db8::/32"}}}
	got := rulesOf(g, RegionConfig{AllowlistEgress: []string{"198.51.100.7/32", "pl-0123"}}).egress()
	var v4, v6, lists []string
	for _, r := range got.IpRanges {
		v4 = append(v4, *r.CidrIp)
	}
	for _, r := range got.Ipv6Ranges {
		v6 = append(v6, *r.CidrIpv6)
	}
	for _, r := range got.PrefixListIds {
		lists = append(lists, *r.PrefixListId)
	}
	want := [][]string{{"198.51.100.7/32", "203.0.113.0/24"}, {"2001:db8::/32"}, {"pl-0123"}}
	if diff := cmp.Diff(want, [][]string{v4, v6, lists}); diff != "" {
		t.Error(diff)
	}
}

// grouper is a process of the bridge's that makes groups.
type grouper struct {
	*Backend
	region *region
	vpc    string
}

func openGrouper(t *testing.T, c Config) grouper {
	t.Helper()
	c.PollInterval.Duration = 10 * time.Millisecond
	all := openClients(t, c)
	env := testEnv(t)
	b := &Backend{config: c, env: env, log: env.Log, clients: all}
	g := grouper{Backend: b, region: &region{name: testRegion, clients: all.order[0]}}
	vpcs, err := g.region.clients.ec2.DescribeVpcs(t.Context(), &ec2.DescribeVpcsInput{})
	if err != nil || len(vpcs.Vpcs) != 1 {
		t.Fatalf("%v, %v", vpcs, err)
	}
	g.vpc = aws.ToString(vpcs.Vpcs[0].VpcId)
	return g
}

func (g grouper) make(t *testing.T, want rules) (string, error) {
	t.Helper()
	return g.group(t.Context(), g.region, g.vpc, want)
}

// allowlist are the rules of a grant that may reach these networks.
func allowlist(prefixes ...string) rules {
	return rulesOf(backend.Grant{Network: backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: prefixes}}, RegionConfig{})
}

// egressOf is where a group lets traffic to, sorted.
func egressOf(cloud *ec2sim.Cloud, id string) []string {
	var out []string
	for _, g := range cloud.SecurityGroups() {
		for _, rule := range g.Egress {
			if g.ID == id {
				out = append(out, rule.Protocol+" "+rule.Peer)
			}
		}
	}
	slices.Sort(out)
	return out
}

func TestAnAllowlistIsAllThatAGroupLetsOut(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		to   []string
		want []string
	}{
		"one network":                  {[]string{"203.0.113.0/24"}, []string{"-1 203.0.113.0/24"}},
		"both families":                {[]string{"203.0.113.0/24", "2001:db8::/32"}, []string{"-1 2001:db8::/32", "-1 203.0.113.0/24"}},
		"all of IPv4":                  {[]string{"0.0.0.0/0"}, []string{"-1 0.0.0.0/0"}},
		"all of IPv4, and what's more": {[]string{"0.0.0.0/0", "2001:db8::/32"}, []string{"-1 0.0.0.0/0", "-1 2001:db8::/32"}},
		"all of IPv6, and what's more": {[]string{"::/0", "203.0.113.0/24"}, []string{"-1 203.0.113.0/24", "-1 ::/0"}},
	} {
		for _, dual := range []bool{false, true} {
			cloud, c := simulated(t, ec2sim.Options{DualStack: dual})
			id, err := openGrouper(t, c).make(t, allowlist(test.to...))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, egressOf(cloud, id)); diff != "" {
				t.Errorf("%s, with IPv6 %t: %s", name, dual, diff)
			}
		}
	}
}

// Whoever dies half way leaves a group that looks much like a whole one.
func TestAGroupThatWasLeftHalfWayIsCompleted(t *testing.T) {
	t.Parallel()
	for _, last := range []string{"CreateSecurityGroup", "RevokeSecurityGroupEgress", "AuthorizeSecurityGroupEgress", "AuthorizeSecurityGroupIngress"} {
		for _, dual := range []bool{false, true} {
			cloud, c := simulated(t, ec2sim.Options{DualStack: dual})
			want, over := allowlist("203.0.113.0/24"), false
			cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
				if over {
					return ec2sim.Intervention{Refuse: ec2sim.Unauthorized()}
				}
				over = r.Action == last
				return ec2sim.Intervention{}
			})
			if _, err := openGrouper(t, c).make(t, want); err == nil && last != "AuthorizeSecurityGroupIngress" {
				t.Fatalf("%s was not the last call", last)
			}
			cloud.Intercept(nil)
			id, err := openGrouper(t, c).make(t, want)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"-1 203.0.113.0/24"}, egressOf(cloud, id)); diff != "" {
				t.Errorf("left after %s, with IPv6 %t: lets out %s", last, dual, diff)
			}
			for _, g := range cloud.SecurityGroups() {
				if g.ID == id && len(g.Ingress) != 2 {
					t.Errorf("left after %s: lets in %v", last, g.Ingress)
				}
			}
		}
	}
}

// A rule of somebody else's neither lets anything out nor passes for one that is
// missing.
func TestForeignRulesHideNothing(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	want := allowlist("203.0.113.0/24")
	first := openGrouper(t, c)
	id, err := first.make(t, want)
	if err != nil {
		t.Fatal(err)
	}
	api := first.region.clients.ec2
	if _, err := api.RevokeSecurityGroupEgress(t.Context(), &ec2.RevokeSecurityGroupEgressInput{
		GroupId: &id, IpPermissions: []types.IpPermission{want.egress()},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.AuthorizeSecurityGroupEgress(t.Context(), &ec2.AuthorizeSecurityGroupEgressInput{GroupId: &id, IpPermissions: []types.IpPermission{
		{
			IpProtocol: aws.String("tcp"), FromPort: aws.Int32(25), ToPort: aws.Int32(25),
			IpRanges: []types.IpRange{{CidrIp: aws.String("203.0.113.0/24")}}, UserIdGroupPairs: []types.UserIdGroupPair{{GroupId: &id}},
		},
	}}); err != nil {
		t.Fatal(err)
	}
	if _, err := openGrouper(t, c).make(t, want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"-1 203.0.113.0/24"}, egressOf(cloud, id)); diff != "" {
		t.Error(diff)
	}
}

func TestProcessesThatMakeAGroupAtOnceGetOneThatIsWhole(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{DualStack: true})
	var wg sync.WaitGroup
	ids := make([]string, 6)
	for n := range ids {
		process := openGrouper(t, c)
		wg.Go(func() {
			id, err := process.make(t, allowlist("203.0.113.0/24", "2001:db8::/32"))
			if err != nil {
				t.Error(err)
				return
			}
			ids[n] = id
			if diff := cmp.Diff([]string{"-1 2001:db8::/32", "-1 203.0.113.0/24"}, egressOf(cloud, id)); diff != "" {
				t.Errorf("used when it lets out %s", diff)
			}
		})
	}
	wg.Wait()
	slices.Sort(ids)
	if len(slices.Compact(ids)) != 1 {
		t.Errorf("groups %v", ids)
	}
}

// forgetAsked makes what was asked for something of long ago.
func (g *groups) forgetAsked() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = nil
}

// fillUp lets the account have only so many groups of the bridge's.
func fillUp(cloud *ec2sim.Cloud, most int) {
	cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action == "CreateSecurityGroup" && len(groupNames(cloud, "test")) >= most {
			return ec2sim.Intervention{Refuse: &ec2sim.Error{Status: 400, Code: codeGroupsFull, Message: "The maximum number of security groups has been reached."}}
		}
		return ec2sim.Intervention{}
	})
}

// groupNames are the ids of a bridge's groups by name.
func groupNames(cloud *ec2sim.Cloud, bridge string) map[string]string {
	out := map[string]string{}
	for _, g := range cloud.SecurityGroups() {
		if g.Tags[ec2tags.Bridge] == bridge {
			out[g.Name] = g.ID
		}
	}
	return out
}

// Requesters choose ports, so that there may be a group for each grant that ever
// was.
func TestUnusedGroupsMakeRoomForNewOnes(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	before := openGrouper(t, c)
	var ids []string
	for _, prefix := range []string{"203.0.113.0/24", "203.0.113.0/25", "203.0.113.0/26"} {
		id, err := before.make(t, allowlist(prefix))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	api := before.region.clients.ec2
	for name, tags := range map[string]map[string]string{
		"not by the bridge": {tagBridge: "test"}, "another bridge": {tagBridge: "other", tagGroup: "0"}, "of nobody": {"a": "b"},
	} {
		if _, err := api.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{
			GroupName: aws.String(name), Description: aws.String("x"), VpcId: aws.String(before.vpc),
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSecurityGroup, Tags: tagList(tags)}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	// One has an interface of an instance that isn't the bridge's.
	newCatalogue(c, before.clients)
	newImages(c, before.clients)
	launch, err := before.clients.probeLaunch(t.Context(), before.region.clients)
	if err != nil {
		t.Fatal(err)
	}
	launch.DryRun, launch.TagSpecifications, launch.NetworkInterfaces[0].Groups = nil, nil, []string{ids[1]}
	launch.ClientToken = aws.String("one")
	if _, err := api.RunInstances(t.Context(), launch); err != nil {
		t.Fatal(err)
	}

	fillUp(cloud, 4)
	later := openGrouper(t, c)
	made, err := later.make(t, allowlist("198.51.100.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	left := slices.Sorted(maps.Values(groupNames(cloud, "test")))
	want := slices.Sorted(slices.Values([]string{ids[1], made, groupNames(cloud, "test")["not by the bridge"]}))
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("left: %s", diff)
	}
	if len(groupNames(cloud, "other")) != 1 {
		t.Error("another bridge's group is gone")
	}
	// The one that is about to be used stays, and then there is no room.
	fillUp(cloud, 3)
	if _, err := later.make(t, allowlist("198.51.100.0/25")); !backenderr.Is(err, backenderr.QuotaExceeded) {
		t.Errorf("with all in use: %v", err)
	}
	if groupNames(cloud, "test")["cb-test-"+allowlist("198.51.100.0/24").key()] != made {
		t.Error("a group was deleted just before its use")
	}
	// What was deleted elsewhere is made again.
	fillUp(cloud, 4)
	later.groups.forgetAsked()
	if _, err := later.make(t, allowlist("198.51.100.0/25")); err != nil {
		t.Error(err)
	}
	fillUp(cloud, 3)
	later.groups.forgetAsked()
	if id, err := later.make(t, allowlist("198.51.100.0/26")); err != nil || id == "" {
		t.Error(err)
	}
	if id := later.groups.get(strings.Join([]string{testRegion, later.vpc, allowlist("198.51.100.0/25").key()}, " ")); id != "" {
		t.Errorf("%s was deleted and is still known", id)
	}
}

func TestWithoutTheRightToDeleteAFullAccountIsStillAQuota(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	if _, err := openGrouper(t, c).make(t, allowlist("203.0.113.0/24")); err != nil {
		t.Fatal(err)
	}
	fillUp(cloud, 1)
	cloud.Deny("ec2:DeleteSecurityGroup")
	if _, err := openGrouper(t, c).make(t, allowlist("203.0.113.0/25")); !backenderr.Is(err, backenderr.QuotaExceeded) {
		t.Errorf("%v", err)
	}
}

// Many grants that come together make their group with the calls of one, and who
// waits for another can leave.
func TestGrantsThatComeTogetherMakeTheirGroupOnce(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	g := openGrouper(t, c)
	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action == "CreateSecurityGroup" {
			once.Do(func() { close(begun) })
			<-goOn
		}
		return ec2sim.Intervention{}
	})
	cloud.ForgetRequests()
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() {
			if _, err := g.make(t, allowlist("203.0.113.0/24")); err != nil {
				t.Error(err)
			}
		})
	}
	<-begun
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := g.group(gone, g.region, g.vpc, allowlist("203.0.113.0/24")); !errors.Is(err, context.Canceled) && !backenderr.Is(err, backenderr.Cancelled) {
		t.Errorf("who has left waits on: %v", err)
	}
	close(goOn)
	wg.Wait()
	made := 0
	for _, r := range cloud.Requests() {
		if r.Action == "CreateSecurityGroup" {
			made++
		}
	}
	if made != 1 {
		t.Errorf("%d calls to make one group", made)
	}
}
