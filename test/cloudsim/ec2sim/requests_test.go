package ec2sim_test

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

// asks are one request to each service.
func asks(config aws.Config) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"ec2": func(ctx context.Context) error {
			_, err := ec2.NewFromConfig(config).DescribeVpcs(ctx, &ec2.DescribeVpcsInput{})
			return err
		},
		"sts": func(ctx context.Context) error {
			_, err := sts.NewFromConfig(config).GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
			return err
		},
		"ssm": func(ctx context.Context) error {
			_, err := ssm.NewFromConfig(config).GetParameter(ctx, &ssm.GetParameterInput{Name: aws.String(ec2sim.ParameterDebian13)})
			return err
		},
		"scheduler": func(ctx context.Context) error {
			_, err := scheduler.NewFromConfig(config).ListSchedules(ctx, &scheduler.ListSchedulesInput{})
			return err
		},
		"monitoring": func(ctx context.Context) error {
			_, err := cloudwatch.NewFromConfig(config).GetMetricData(ctx, metricsOf("i-00000000000000000", "CPUUtilization", time.Now().Add(-time.Hour)))
			return err
		},
	}
}

// everyService wants an answer of each service.
func everyService(t *testing.T, config aws.Config, want map[string]string) {
	t.Helper()
	for name, ask := range asks(config) {
		if got := code(ask(t.Context())); got != want[name] {
			t.Errorf("%s answers %q, want %q", name, got, want[name])
		}
	}
}

func TestWhoAsksIsLookedAt(t *testing.T) {
	var ahead atomic.Int64
	s := open(t, ec2sim.Options{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
	everyService(t, s.aws, nil)

	stranger := s.config(t, home)
	stranger.Credentials = credentials.NewStaticCredentialsProvider("AKIASOMEBODYELSE0000", "x", "")
	unknown := map[string]string{
		"ec2": "AuthFailure", "sts": "InvalidClientTokenId", "ssm": "UnrecognizedClientException",
		"scheduler": "UnrecognizedClientException", "monitoring": "InvalidClientTokenId",
	}
	everyService(t, stranger, unknown)
	everyService(t, s.config(t, "eu-nowhere-1"), unknown)

	s.Deny("ec2:DescribeVpcs", "sts:GetCallerIdentity", "ssm:GetParameter", "scheduler:ListSchedules", "monitoring:GetMetricData")
	everyService(t, s.aws, map[string]string{
		"ec2": "UnauthorizedOperation", "sts": "AccessDenied", "ssm": "AccessDeniedException",
		"scheduler": "AccessDeniedException", "monitoring": "AccessDenied",
	})
	s.Allow("ec2:DescribeVpcs", "sts:GetCallerIdentity", "ssm:GetParameter", "scheduler:ListSchedules", "monitoring:GetMetricData")

	late := map[string]string{
		"ec2": "RequestExpired", "sts": "SignatureDoesNotMatch", "ssm": "InvalidSignatureException",
		"scheduler": "InvalidSignatureException", "monitoring": "SignatureDoesNotMatch",
	}
	for _, off := range []time.Duration{6 * time.Minute, -6 * time.Minute} {
		ahead.Store(int64(off))
		everyService(t, s.aws, late)
	}
}

func TestADryRunHasNoEffect(t *testing.T) {
	s := open(t, ec2sim.Options{})
	dry := order("one", func(i *ec2.RunInstancesInput) { i.DryRun = aws.Bool(true) })
	_, err := s.ec2.RunInstances(t.Context(), dry)
	wantCode(t, err, "DryRunOperation")
	end := &ec2.TerminateInstancesInput{DryRun: aws.Bool(true), InstanceIds: []string{"i-00000000000000000"}}
	_, err = s.ec2.TerminateInstances(t.Context(), end)
	wantCode(t, err, "DryRunOperation")
	s.Deny("ec2:RunInstances")
	_, err = s.ec2.RunInstances(t.Context(), dry)
	wantCode(t, err, "UnauthorizedOperation")
	s.Allow("ec2:RunInstances")
	if len(s.History()) != 0 {
		t.Error("something was launched")
	}
	for _, r := range s.Requests() {
		if !r.DryRun || r.Mutates {
			t.Errorf("%s is logged as one that mutates, or not as a dry run", r.Action)
		}
	}
}

func TestWhatIsNotServedIsAnError(t *testing.T) {
	s := open(t, ec2sim.Options{})
	_, err := s.ec2.StopInstances(t.Context(), &ec2.StopInstancesInput{InstanceIds: []string{"i-00000000000000000"}})
	wantCode(t, err, "InvalidAction")
	_, err = s.ec2.DescribeInstanceTypes(t.Context(), &ec2.DescribeInstanceTypesInput{IncludeUnsupportedInRegion: aws.Bool(true)})
	wantCode(t, err, "UnknownParameter")
	_, err = sts.NewFromConfig(s.aws).GetSessionToken(t.Context(), &sts.GetSessionTokenInput{})
	wantCode(t, err, "InvalidAction")
	_, err = ssm.NewFromConfig(s.aws).GetParameters(t.Context(), &ssm.GetParametersInput{Names: []string{"x"}})
	wantCode(t, err, "UnknownOperationException")
	_, err = cloudwatch.NewFromConfig(s.aws).ListMetrics(t.Context(), &cloudwatch.ListMetricsInput{})
	wantCode(t, err, "InvalidAction")
	_, err = scheduler.NewFromConfig(s.aws).GetScheduleGroup(t.Context(), &scheduler.GetScheduleGroupInput{Name: aws.String("default")})
	wantCode(t, err, "ResourceNotFoundException")
	_, err = ssm.NewFromConfig(s.aws).GetParameter(t.Context(), &ssm.GetParameterInput{Name: aws.String("/aws/service/nothing")})
	wantCode(t, err, "ParameterNotFound")
}

func TestRequestsAreThrottledByTheDocumentedBuckets(t *testing.T) {
	s := open(t, ec2sim.Options{})
	throttled := func(most int, ask func() error) int {
		for n := range most {
			if err := ask(); err != nil {
				wantCode(t, err, "RequestLimitExceeded")
				return n
			}
		}
		return most
	}
	// A burst of 5, and 2 more each second, of which none or few have passed.
	n := 0
	if got := throttled(50, func() error {
		n++
		_, err := s.ec2.RunInstances(t.Context(), order(strings.Repeat("x", n)))
		return err
	}); got < 5 || got > 15 {
		t.Errorf("%d launches passed at once, want 5 and what came in meanwhile", got)
	}
	describe := func(input *ec2.DescribeInstancesInput) func() error {
		return func() error {
			_, err := s.ec2.DescribeInstances(t.Context(), input)
			return err
		}
	}
	if got := throttled(1000, describe(&ec2.DescribeInstancesInput{})); got < 50 || got > 95 {
		t.Errorf("%d reads of all passed at once, want 50 and what came in meanwhile", got)
	}
	if got := throttled(1000, describe(&ec2.DescribeInstancesInput{MaxResults: aws.Int32(1000)})); got < 100 || got == 1000 {
		t.Errorf("%d reads by page passed at once, want 100 and what came in meanwhile", got)
	}
	// Each region has buckets of its own.
	_, err := ec2.NewFromConfig(s.config(t, "us-east-1")).DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{})
	wantCode(t, err, "")
}

func TestAnInterceptorDecides(t *testing.T) {
	s := open(t, ec2sim.Options{NoBuckets: true})
	var seen []string
	launch := func(token string) error {
		_, err := s.ec2.RunInstances(t.Context(), order(token))
		return err
	}
	before := func(err error) func(context.Context) error {
		return func(context.Context) error { seen = append(seen, "before"); return err }
	}
	after := func(lost bool) func() bool {
		return func() bool { seen = append(seen, "after"); return lost }
	}
	for _, c := range []struct {
		name     string
		i        ec2sim.Intervention
		answer   string
		launched bool
		seen     []string
	}{
		{"nothing", ec2sim.Intervention{}, "", true, nil},
		{"both sides", ec2sim.Intervention{Before: before(nil), After: after(false)}, "", true, []string{"before", "after"}},
		{"a refusal", ec2sim.Intervention{Refuse: ec2sim.InternalError(), After: after(false)}, "InternalError", false, []string{"after"}},
		{"a lost answer", ec2sim.Intervention{After: after(true)}, "lost", true, []string{"after"}},
		{"a cut connection", ec2sim.Intervention{Before: before(errors.New("cut")), After: after(false)}, "lost", false, []string{"before"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seen = nil
			count := len(s.History())
			s.ForgetRequests()
			s.Intercept(func(ec2sim.Request) ec2sim.Intervention { return c.i })
			err := launch(c.name)
			s.Intercept(nil)
			if got := code(err); got != c.answer && (c.answer != "lost" || !strings.HasPrefix(got, "no answer")) {
				t.Errorf("answered %q, want %q", got, c.answer)
			}
			if got := len(s.History()) > count; got != c.launched {
				t.Errorf("launched: %t, want %t", got, c.launched)
			}
			if !slices.Equal(seen, c.seen) {
				t.Errorf("called %v, want %v", seen, c.seen)
			}
			r := s.Requests()
			if len(r) != 1 || r[0].Lost != (c.answer == "lost") || !r[0].Mutates || !slices.Equal(r[0].Grants, []string{grant}) {
				t.Errorf("logged %+v", r)
			}
		})
	}
}

func TestRequestsSayForWhichGrant(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	s.show(t, id)
	mine := []types.Filter{{Name: aws.String("tag:" + ec2tags.Grant), Values: []string{grant}}}
	if _, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{Filters: mine}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{VolumeIds: []string{s.Volumes()[0].ID}}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, s.terminate(t, id), "")
	for _, r := range s.Requests() {
		if !slices.Equal(r.Grants, []string{grant}) {
			t.Errorf("%s is for %v", r.Action, r.Grants)
		}
	}
	s.ForgetRequests()
	if _, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{}); err != nil {
		t.Fatal(err)
	}
	if r := s.Requests(); len(r[0].Grants) != 0 || r[0].Mutates || r[0].Answer != "" {
		t.Errorf("a read of all is logged as %+v", r[0])
	}
}

func TestNoAnswerWithoutASignature(t *testing.T) {
	s := open(t, ec2sim.Options{})
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.url, strings.NewReader("Action=DescribeVpcs&Version=2016-11-15"))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := s.aws.HTTPClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("answered %s", answer.Status)
	}
}

// groupRules allow one port from everywhere.
func groupRules(port int32, cidr string) []types.IpPermission {
	return []types.IpPermission{{
		IpProtocol: aws.String("tcp"), FromPort: &port, ToPort: &port, IpRanges: []types.IpRange{{CidrIp: &cidr}},
	}}
}

func TestSecurityGroupsAreSharedSafely(t *testing.T) {
	s := open(t, ec2sim.Options{})
	create := func(name string) (string, error) {
		answer, err := s.ec2.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{
			GroupName: &name, Description: aws.String("of a test"),
			TagSpecifications: []types.TagSpecification{{
				ResourceType: types.ResourceTypeSecurityGroup, Tags: []types.Tag{{Key: aws.String(ec2tags.Group), Value: aws.String("h")}},
			}},
		})
		if err != nil {
			return "", err
		}
		return *answer.GroupId, nil
	}
	id, err := create("cb-b-1")
	wantCode(t, err, "")
	_, err = create("cb-b-1")
	wantCode(t, err, "InvalidGroup.Duplicate")
	_, err = create("sg-1")
	wantCode(t, err, "InvalidParameterValue")

	allow := func(id string, permissions []types.IpPermission) error {
		_, err := s.ec2.AuthorizeSecurityGroupIngress(t.Context(), &ec2.AuthorizeSecurityGroupIngressInput{GroupId: &id, IpPermissions: permissions})
		return err
	}
	wantCode(t, allow(id, groupRules(22, "0.0.0.0/0")), "")
	wantCode(t, allow(id, groupRules(22, "0.0.0.0/0")), "InvalidPermission.Duplicate")
	wantCode(t, allow(id, groupRules(22, "0.0.0.0")), "InvalidParameterValue")
	wantCode(t, allow(id, groupRules(70000, "0.0.0.0/0")), "InvalidParameterValue")
	wantCode(t, allow("sg-00000000000000000", groupRules(22, "0.0.0.0/0")), "InvalidGroup.NotFound")
	everything := []types.IpPermission{{IpProtocol: aws.String("-1"), IpRanges: []types.IpRange{{CidrIp: aws.String("0.0.0.0/0")}}}}
	revoke := func() error {
		_, err := s.ec2.RevokeSecurityGroupEgress(t.Context(), &ec2.RevokeSecurityGroupEgressInput{GroupId: &id, IpPermissions: everything})
		return err
	}
	wantCode(t, revoke(), "")
	wantCode(t, revoke(), "InvalidPermission.NotFound")
	_, err = s.ec2.AuthorizeSecurityGroupEgress(t.Context(), &ec2.AuthorizeSecurityGroupEgressInput{GroupId: &id, IpPermissions: groupRules(443, "10.0.0.0/8")})
	wantCode(t, err, "")

	found, err := s.ec2.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{
		Filters: []types.Filter{{Name: aws.String("tag:" + ec2tags.Group), Values: []string{"h"}}},
	})
	if err != nil || len(found.SecurityGroups) != 1 {
		t.Fatalf("found %v, %v", found, err)
	}
	g := found.SecurityGroups[0]
	if *g.GroupId != id || *g.IpPermissions[0].FromPort != 22 || *g.IpPermissions[0].IpRanges[0].CidrIp != "0.0.0.0/0" ||
		len(g.IpPermissionsEgress) != 1 || *g.IpPermissionsEgress[0].ToPort != 443 {
		t.Errorf("it is %+v", g)
	}

	instance := s.launch(t, order("one", func(i *ec2.RunInstancesInput) { i.NetworkInterfaces[0].Groups = []string{id} }))
	s.until(t, instance, ec2sim.StateRunning)
	remove := func() error {
		_, err := s.ec2.DeleteSecurityGroup(t.Context(), &ec2.DeleteSecurityGroupInput{GroupId: &id})
		return err
	}
	wantCode(t, remove(), "DependencyViolation")
	wantCode(t, s.terminate(t, instance), "")
	s.until(t, instance, ec2sim.StateTerminated)
	wantCode(t, remove(), "")
	wantCode(t, remove(), "InvalidGroup.NotFound")
	for _, g := range s.SecurityGroups() {
		if g.Name != "default" {
			t.Errorf("%v is left", g)
		}
	}
}

func TestANewGroupLetsEverythingOutThatItsVPCHas(t *testing.T) {
	for _, dual := range []bool{false, true} {
		s := open(t, ec2sim.Options{DualStack: dual})
		vpcs, err := s.ec2.DescribeVpcs(t.Context(), &ec2.DescribeVpcsInput{})
		if err != nil || len(vpcs.Vpcs) != 1 {
			t.Fatalf("%v, %v", vpcs, err)
		}
		if blocks := vpcs.Vpcs[0].Ipv6CidrBlockAssociationSet; (len(blocks) == 1) != dual {
			t.Errorf("IPv6 %t: blocks %+v", dual, blocks)
		} else if dual {
			if block, err := netip.ParsePrefix(*blocks[0].Ipv6CidrBlock); err != nil || block.Bits() != 56 || block != block.Masked() {
				t.Errorf("block %v, %v", block, err)
			}
		}
		if _, err := s.ec2.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{GroupName: aws.String("g"), Description: aws.String("d")}); err != nil {
			t.Fatal(err)
		}
		groups, err := s.ec2.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{})
		if err != nil || len(groups.SecurityGroups) != 2 {
			t.Fatalf("%v, %v", groups, err)
		}
		for _, g := range groups.SecurityGroups {
			out := g.IpPermissionsEgress
			if len(out) != 1 || len(out[0].IpRanges) != 1 || (len(out[0].Ipv6Ranges) == 1) != dual || dual && *out[0].Ipv6Ranges[0].CidrIpv6 != "::/0" {
				t.Errorf("IPv6 %t: %s lets out %+v", dual, *g.GroupName, out)
			}
		}
	}
}

func TestANewGroupMayNotBeFoundAtFirst(t *testing.T) {
	var ahead atomic.Int64
	s := open(t, ec2sim.Options{
		Speed: 1, GroupVisible: time.Second, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) },
	})
	made, err := s.ec2.CreateSecurityGroup(t.Context(), &ec2.CreateSecurityGroupInput{GroupName: aws.String("g"), Description: aws.String("d")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.ec2.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{GroupIds: []string{*made.GroupId}})
	wantCode(t, err, "InvalidGroup.NotFound")
	_, err = s.ec2.RunInstances(t.Context(), order("one", func(i *ec2.RunInstancesInput) { i.NetworkInterfaces[0].Groups = []string{*made.GroupId} }))
	wantCode(t, err, "InvalidGroup.NotFound")
	ahead.Store(int64(2 * time.Second))
	_, err = s.ec2.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{GroupIds: []string{*made.GroupId}})
	wantCode(t, err, "")
}

func TestTheCatalogueIsTheRegions(t *testing.T) {
	s := open(t, ec2sim.Options{NoBuckets: true})
	types1, err := s.ec2.DescribeInstanceTypes(t.Context(), &ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{"m7i.4xlarge", "t4g.micro"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		vcpus        int32
		memory       int64
		architecture types.ArchitectureType
	}{{16, 65536, types.ArchitectureTypeX8664}, {2, 1024, types.ArchitectureTypeArm64}} {
		got := types1.InstanceTypes[i]
		if *got.VCpuInfo.DefaultVCpus != want.vcpus || *got.MemoryInfo.SizeInMiB != want.memory || got.ProcessorInfo.SupportedArchitectures[0] != want.architecture {
			t.Errorf("%s is %+v", got.InstanceType, got)
		}
	}
	_, err = s.ec2.DescribeInstanceTypes(t.Context(), &ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{"m9z.huge"}})
	wantCode(t, err, "InvalidInstanceType")
	count := 0
	pages := ec2.NewDescribeInstanceTypesPaginator(s.ec2, &ec2.DescribeInstanceTypesInput{
		MaxResults: aws.Int32(5), Filters: []types.Filter{{Name: aws.String("instance-type"), Values: []string{"t3.*", "m7i.*"}}},
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		count += len(page.InstanceTypes)
	}
	if count != 12 {
		t.Errorf("%d types of two families, want 12", count)
	}
	offerings, err := s.ec2.DescribeInstanceTypeOfferings(t.Context(), &ec2.DescribeInstanceTypeOfferingsInput{
		LocationType: types.LocationTypeAvailabilityZone, Filters: []types.Filter{{Name: aws.String("instance-type"), Values: []string{"c7i.4xlarge"}}},
	})
	if err != nil || len(offerings.InstanceTypeOfferings) != 2 {
		t.Errorf("offered in %v, %v; want all zones but one", offerings, err)
	}
	images, err := s.ec2.DescribeImages(t.Context(), &ec2.DescribeImagesInput{
		Owners: []string{ec2sim.OwnerDebian}, Filters: []types.Filter{{Name: aws.String("name"), Values: []string{"debian-13-amd64-*"}}},
	})
	if err != nil || len(images.Images) != 2 {
		t.Fatalf("images are %v, %v", images, err)
	}
	parameter, err := ssm.NewFromConfig(s.aws).GetParameter(t.Context(), &ssm.GetParameterInput{Name: aws.String(ec2sim.ParameterDebian13)})
	if err != nil || *parameter.Parameter.Value != image("debian-13-amd64-20261012-2508") {
		t.Errorf("the parameter is %v, %v", parameter, err)
	}
	_, err = s.ec2.DescribeImages(t.Context(), &ec2.DescribeImagesInput{ImageIds: []string{"ami-00000000000000000"}})
	wantCode(t, err, "InvalidAMIID.NotFound")
	vpcs, err := s.ec2.DescribeVpcs(t.Context(), &ec2.DescribeVpcsInput{Filters: []types.Filter{{Name: aws.String("is-default"), Values: []string{"true"}}}})
	if err != nil || len(vpcs.Vpcs) != 1 {
		t.Fatalf("VPCs are %v, %v", vpcs, err)
	}
	subnets, err := s.ec2.DescribeSubnets(t.Context(), &ec2.DescribeSubnetsInput{Filters: []types.Filter{{Name: aws.String("vpc-id"), Values: []string{*vpcs.Vpcs[0].VpcId}}}})
	if err != nil || len(subnets.Subnets) != 3 || *subnets.Subnets[2].AvailabilityZone != "eu-central-1c" {
		t.Errorf("subnets are %v, %v", subnets, err)
	}
	lists, err := s.ec2.DescribeManagedPrefixLists(t.Context(), &ec2.DescribeManagedPrefixListsInput{
		Filters: []types.Filter{{Name: aws.String("prefix-list-name"), Values: []string{"com.amazonaws.eu-central-1.s3"}}},
	})
	if err != nil || len(lists.PrefixLists) != 1 {
		t.Fatalf("prefix lists are %v, %v", lists, err)
	}
	entries, err := s.ec2.GetManagedPrefixListEntries(t.Context(), &ec2.GetManagedPrefixListEntriesInput{PrefixListId: lists.PrefixLists[0].PrefixListId})
	if err != nil || len(entries.Entries) == 0 {
		t.Errorf("its entries are %v, %v", entries, err)
	}
}

func TestTagsAreAdded(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	tag := []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}
	all := []string{id, s.Volumes()[0].ID, s.NetworkInterfaces()[0].ID, s.SecurityGroups()[0].ID}
	_, err := s.ec2.CreateTags(t.Context(), &ec2.CreateTagsInput{Resources: all, Tags: tag})
	wantCode(t, err, "")
	for _, tags := range []map[string]string{
		s.Instances()[0].Tags, s.Volumes()[0].Tags, s.NetworkInterfaces()[0].Tags, s.SecurityGroups()[0].Tags,
	} {
		if tags["k"] != "v" {
			t.Errorf("tags are %v", tags)
		}
	}
	for id, want := range map[string]string{
		"i-00000000000000000": "InvalidInstanceID.NotFound", "vol-00000000000000000": "InvalidVolume.NotFound",
		"eni-00000000000000000": "InvalidNetworkInterfaceID.NotFound", "sg-00000000000000000": "InvalidGroup.NotFound", "x": "InvalidID",
	} {
		_, err := s.ec2.CreateTags(t.Context(), &ec2.CreateTagsInput{Resources: []string{id}, Tags: tag})
		wantCode(t, err, want)
	}
}
