package ec2backend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

const (
	// codeDryRun is EC2's answer to a dry run that would have succeeded (pageEC2).
	codeDryRun = "DryRunOperation"
	// probedInstance is an id that no instance has: EC2 gives out random ones.
	probedInstance = "i-00000000000000000"
	// probePage is the smallest page that EC2 allows.
	probePage = 5
)

// check looks in all regions at once whether the worker can work there: who it
// is, whether its clock is right, and whether it has the rights to see, make and
// end instances and their parts. The error names every problem, by region and by
// what is lacking. Rights that need something to act on, such as those to a group's
// rules, can't be tried.
func (c *clients) check(ctx context.Context) error { return c.checkRegions(ctx, c.order) }

// recheck looks again at the regions that had problems.
func (c *clients) recheck(ctx context.Context) error {
	c.mu.Lock()
	var again []*regionClients
	for _, r := range c.order {
		if len(c.found[r.name]) > 0 {
			again = append(again, r)
		}
	}
	c.mu.Unlock()
	return c.checkRegions(ctx, again)
}

func (c *clients) checkRegions(ctx context.Context, regions []*regionClients) error {
	failures := make([]error, len(regions))
	var wg sync.WaitGroup
	for i, r := range regions {
		wg.Go(func() {
			problems := c.checkRegion(ctx, r)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.found[r.name] = nil
			for _, p := range problems {
				c.found[r.name] = append(c.found[r.name], p.Error())
			}
			failures[i] = errors.Join(problems...)
		})
	}
	wg.Wait()
	return errors.Join(failures...)
}

// problems are what the last check of each region found, for people.
func (c *clients) problems() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, r := range c.order {
		out = append(out, c.found[r.name]...)
	}
	return out
}

func (c *clients) checkRegion(ctx context.Context, r *regionClients) []error {
	who, err := r.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		// Nothing else would do better.
		return []error{classify(err, fmt.Sprintf("region %s: sts:GetCallerIdentity", r.name))}
	}
	c.log.InfoContext(ctx, "Connected to AWS", "region", r.name, "account", aws.ToString(who.Account), "arn", aws.ToString(who.Arn))
	var problems []error
	if skew := r.skew(); tooSkewed(skew) {
		problems = append(problems, backenderr.New(backenderr.ClockSkew, "region %s: this machine's clock is %s off AWS's; deadlines would be as wrong", r.name, skew.Round(time.Second)))
	}
	for _, probe := range []struct {
		right string
		try   func(context.Context, *regionClients) error
	}{
		{"ec2:DescribeInstances and ec2:TerminateInstances", c.tryTerminate},
		{"ec2:RunInstances", c.tryRun},
		{"ec2:DescribeVolumes", func(ctx context.Context, r *regionClients) error {
			_, err := r.ec2.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{DryRun: aws.Bool(true)})
			return unlessDryRun(err)
		}},
		{"ec2:DescribeNetworkInterfaces", func(ctx context.Context, r *regionClients) error {
			_, err := r.ec2.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{DryRun: aws.Bool(true)})
			return unlessDryRun(err)
		}},
		{"ec2:DescribeSecurityGroups", func(ctx context.Context, r *regionClients) error {
			_, err := r.ec2.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{DryRun: aws.Bool(true)})
			return unlessDryRun(err)
		}},
		{"ec2:CreateSecurityGroup", c.tryGroup},
		{"scheduler:ListSchedules", c.trySchedules},
	} {
		if err := probe.try(ctx, r); err != nil {
			problems = append(problems, classify(err, fmt.Sprintf("region %s: %s", r.name, probe.right)))
		}
	}
	return problems
}

// tryTerminate asks whether an instance of this worker might be terminated. Of
// one that doesn't exist EC2 says that it isn't found, unless the right depends
// on the instance's tags, as it does in the policy that docs/aws.md proposes:
// then the right to end what isn't there is refused, and nothing is learnt.
func (c *clients) tryTerminate(ctx context.Context, r *regionClients) error {
	own, err := r.ec2.DescribeInstances(ctx, &ec2.DescribeInstancesInput{
		Filters: []types.Filter{
			{Name: aws.String("tag:" + tagBridge), Values: []string{c.env.BridgeID}},
			{Name: aws.String("tag:" + tagBackend), Values: []string{c.env.Backend}},
			{Name: aws.String("instance-state-name"), Values: []string{string(types.InstanceStateNamePending), string(types.InstanceStateNameRunning)}},
		},
		MaxResults: aws.Int32(probePage),
	})
	if err != nil {
		return err
	}
	id, exists := probedInstance, false
	for _, reservation := range own.Reservations {
		for _, i := range reservation.Instances {
			id, exists = aws.ToString(i.InstanceId), true
		}
	}
	_, err = r.ec2.TerminateInstances(ctx, &ec2.TerminateInstancesInput{InstanceIds: []string{id}, DryRun: aws.Bool(true)})
	switch code := codeOf(err); {
	case code == codeDryRun || notFound(err):
		return nil
	case code == "UnauthorizedOperation" && !exists:
		c.log.WarnContext(ctx, "The right to terminate instances can't be confirmed while there is none", "region", r.name, "error", describe(err))
		return nil
	}
	return err
}

// tryRun asks whether an instance might be made. Capacity and quotas are not the
// question.
func (c *clients) tryRun(ctx context.Context, r *regionClients) error {
	input, err := c.probeLaunch(ctx, r)
	if err != nil {
		return err
	}
	_, err = r.ec2.RunInstances(ctx, input)
	row, _ := known(vendorErrors, codeOf(err))
	if codeOf(err) == codeDryRun || row.effect == capacity || row.reason == backenderr.QuotaExceeded {
		return nil
	}
	return err
}

// tryGroup asks whether a security group might be made. A full account is not the
// question.
func (c *clients) tryGroup(ctx context.Context, r *regionClients) error {
	offers, err := c.catalogue.offers(ctx, backend.Region(r.name), backend.Shape{}, nil)
	if err != nil {
		return err
	}
	name := "cb-" + c.env.BridgeID + "-check"
	_, err = r.ec2.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{
		GroupName: aws.String(name), Description: aws.String("Compute bridge " + c.env.BridgeID + ": never made"), VpcId: aws.String(offers[0].VPC),
		DryRun: aws.Bool(true),
		TagSpecifications: []types.TagSpecification{{
			ResourceType: types.ResourceTypeSecurityGroup, Tags: tagList(map[string]string{tagBridge: c.env.BridgeID, tagName: name}),
		}},
	})
	if row, _ := known(vendorErrors, codeOf(err)); row.reason == backenderr.QuotaExceeded {
		return nil
	}
	return unlessDryRun(err)
}

// unlessDryRun is nil if a dry run would have succeeded.
func unlessDryRun(err error) error {
	if codeOf(err) == codeDryRun {
		return nil
	}
	return err
}

// probeLaunch renders a call like those for grants: rights may depend on its
// tags, on how it protects its metadata, on its address and on the market.
func (c *clients) probeLaunch(ctx context.Context, r *regionClients) (*ec2.RunInstancesInput, error) {
	if c.catalogue == nil || c.images == nil {
		return nil, backenderr.New(backenderr.Internal, "no catalogue")
	}
	offers, err := c.catalogue.offers(ctx, backend.Region(r.name), backend.Shape{}, nil)
	if err != nil {
		return nil, err
	}
	image, err := c.images.resolve(ctx, backend.Region(r.name), offers[0].Architecture)
	if err != nil {
		return nil, err
	}
	tags := []types.Tag{
		{Key: aws.String(tagBackend), Value: aws.String(c.env.Backend)},
		{Key: aws.String(tagBridge), Value: aws.String(c.env.BridgeID)},
		{Key: aws.String(tagName), Value: aws.String("cb-" + c.env.BridgeID + "-check")},
	}
	disk := &types.EbsBlockDevice{
		DeleteOnTermination: aws.Bool(true), Encrypted: aws.Bool(true), VolumeType: types.VolumeType(c.config.VolumeType),
		VolumeSize: aws.Int32(int32(min(max(image.MinDiskGiB, c.config.ExtraDiskGiB), maxVolumeGiB))), //nolint:gosec // at most maxVolumeGiB
	}
	if c.config.KMSKey != "" {
		disk.KmsKeyId = aws.String(c.config.KMSKey)
	}
	input := &ec2.RunInstancesInput{
		ImageId: aws.String(image.ID), InstanceType: types.InstanceType(offers[0].Type),
		// In the VPC's default group: there is none yet that is the bridge's.
		NetworkInterfaces: []types.InstanceNetworkInterfaceSpecification{{
			DeviceIndex: aws.Int32(0), SubnetId: aws.String(offers[0].Subnet), DeleteOnTermination: aws.Bool(true),
			AssociatePublicIpAddress: aws.Bool(r.config.public()),
		}},
		MinCount: aws.Int32(1), MaxCount: aws.Int32(1), DryRun: aws.Bool(true),
		InstanceInitiatedShutdownBehavior: types.ShutdownBehaviorTerminate,
		MetadataOptions: &types.InstanceMetadataOptionsRequest{
			HttpTokens: types.HttpTokensStateRequired, HttpPutResponseHopLimit: aws.Int32(1), HttpEndpoint: types.InstanceMetadataEndpointStateEnabled,
		},
		BlockDeviceMappings: []types.BlockDeviceMapping{{DeviceName: aws.String(image.RootDevice), Ebs: disk}},
		TagSpecifications: []types.TagSpecification{
			{ResourceType: types.ResourceTypeInstance, Tags: tags},
			{ResourceType: types.ResourceTypeVolume, Tags: tags},
			{ResourceType: types.ResourceTypeNetworkInterface, Tags: tags},
		},
	}
	if c.config.Market == marketSpot {
		input.InstanceMarketOptions = &types.InstanceMarketOptionsRequest{
			MarketType: types.MarketTypeSpot,
			SpotOptions: &types.SpotMarketOptions{
				SpotInstanceType: types.SpotInstanceTypeOneTime, InstanceInterruptionBehavior: types.InstanceInterruptionBehaviorTerminate,
			},
		}
	}
	return input, nil
}

// trySchedules asks for schedules, if the worker makes any. Scheduler knows no
// dry run.
func (c *clients) trySchedules(ctx context.Context, r *regionClients) error {
	if c.config.Deadline != deadlinePlatform {
		return nil
	}
	_, err := r.scheduler.ListSchedules(ctx, &scheduler.ListSchedulesInput{GroupName: aws.String(c.config.ScheduleGroup), MaxResults: aws.Int32(1)})
	return err
}
