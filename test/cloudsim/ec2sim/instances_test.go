package ec2sim_test

import (
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

func TestAnInstanceIsLaunchedAsOrdered(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	i := s.show(t, id)
	if *i.PublicIpAddress != "127.0.0.9" || *i.PrivateIpAddress != "127.0.0.9" {
		t.Errorf("its addresses are %q and %q, want the machine's", *i.PublicIpAddress, *i.PrivateIpAddress)
	}
	if *i.ClientToken != "one" || i.InstanceType != types.InstanceTypeT3Micro || i.Architecture != types.ArchitectureValuesX8664 {
		t.Errorf("it has the token %q and is a %s of %s", *i.ClientToken, i.InstanceType, i.Architecture)
	}
	if i.MetadataOptions.HttpTokens != types.HttpTokensStateRequired || *i.MetadataOptions.HttpPutResponseHopLimit != 1 {
		t.Errorf("its metadata service is %+v", i.MetadataOptions)
	}
	if want := []types.Tag{{Key: aws.String(ec2tags.Bridge), Value: aws.String("b")}}; *i.Tags[0].Key != *want[0].Key || len(i.Tags) != 2 {
		t.Errorf("its tags are %v", i.Tags)
	}
	m := s.racks.get(t, id)
	if string(m.boot.UserData) != "#cloud-config\n" || m.boot.DiskGiB != 20 || m.boot.Architecture != "x86_64" || m.boot.Image != *i.ImageId {
		t.Errorf("its machine was told %+v", m.boot)
	}
	if m.boot.Metadata["placement/region"] != home || m.boot.Metadata["instance-id"] != id {
		t.Errorf("its metadata is %v", m.boot.Metadata)
	}
	volumes, err := s.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{
		Filters: []types.Filter{{Name: aws.String("attachment.instance-id"), Values: []string{id}}},
	})
	if err != nil || len(volumes.Volumes) != 1 {
		t.Fatalf("its volumes: %v, %v", volumes, err)
	}
	if v := volumes.Volumes[0]; !*v.Encrypted || *v.Size != 20 || v.VolumeType != types.VolumeTypeGp3 || v.State != types.VolumeStateInUse ||
		*v.VolumeId != *i.BlockDeviceMappings[0].Ebs.VolumeId || len(v.Tags) != 2 {
		t.Errorf("its volume is %+v", v)
	}
	interfaces, err := s.ec2.DescribeNetworkInterfaces(t.Context(), &ec2.DescribeNetworkInterfacesInput{
		Filters: []types.Filter{{Name: aws.String("tag:" + ec2tags.Grant), Values: []string{grant}}},
	})
	if err != nil || len(interfaces.NetworkInterfaces) != 1 {
		t.Fatalf("its interfaces: %v, %v", interfaces, err)
	}
	if n := interfaces.NetworkInterfaces[0]; *n.Attachment.InstanceId != id || *n.Association.PublicIp != "127.0.0.9" ||
		*n.NetworkInterfaceId != *i.NetworkInterfaces[0].NetworkInterfaceId {
		t.Errorf("its interface is %+v", n)
	}
}

func TestAnInstanceTakesItsPartsAlong(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	wantCode(t, s.terminate(t, id), "")
	s.until(t, id, ec2sim.StateTerminated)
	eventually(t, "its volume is gone", func() bool { return len(s.Volumes()) == 0 })
	if n := s.NetworkInterfaces(); len(n) != 0 {
		t.Errorf("it left %v", n)
	}
	if !s.racks.get(t, id).isStopped() {
		t.Error("its machine was not removed")
	}
	i := s.show(t, id)
	if i.State.Name != types.InstanceStateNameTerminated || *i.StateReason.Code != "Client.UserInitiatedShutdown" || i.PublicIpAddress != nil {
		t.Errorf("it shows as %+v, %+v", i.State, i.StateReason)
	}
	// It may be terminated again.
	wantCode(t, s.terminate(t, id), "")
}

func TestWhatIsDetachedStaysBehind(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	volume, nic := s.Volumes()[0].ID, s.NetworkInterfaces()[0].ID
	_, err := s.ec2.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &volume})
	wantCode(t, err, "VolumeInUse")
	_, err = s.ec2.DeleteNetworkInterface(t.Context(), &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: &nic})
	wantCode(t, err, "InvalidNetworkInterface.InUse")
	if err := s.LeaveParts(id); err != nil {
		t.Fatal(err)
	}
	wantCode(t, s.terminate(t, id), "")
	eventually(t, "both are available", func() bool {
		return s.Volumes()[0].Instance == "" && s.NetworkInterfaces()[0].Instance == ""
	})
	_, err = s.ec2.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &volume})
	wantCode(t, err, "")
	_, err = s.ec2.DeleteNetworkInterface(t.Context(), &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: &nic})
	wantCode(t, err, "")
	_, err = s.ec2.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &volume})
	wantCode(t, err, "InvalidVolume.NotFound")
	_, err = s.ec2.DeleteNetworkInterface(t.Context(), &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: &nic})
	wantCode(t, err, "InvalidNetworkInterfaceID.NotFound")
}

func TestANewInstanceIsNotFoundAtFirst(t *testing.T) {
	var ahead atomic.Int64
	s := open(t, ec2sim.Options{Speed: 1, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
	id := s.launch(t, order("one"))
	_, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
	wantCode(t, err, "InvalidInstanceID.NotFound")
	wantCode(t, s.terminate(t, id), "InvalidInstanceID.NotFound")
	mine := []types.Filter{{Name: aws.String("tag:" + ec2tags.Grant), Values: []string{grant}}}
	found, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{Filters: mine})
	if err != nil || len(found.Reservations) != 0 {
		t.Errorf("a filter finds %v, %v", found, err)
	}
	volumes, err := s.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{Filters: mine})
	if err != nil || len(volumes.Volumes) != 0 {
		t.Errorf("a filter finds %v, %v", volumes, err)
	}
	// The token is known at once.
	if again := s.launch(t, order("one")); again != id {
		t.Errorf("the same token launched %s, and %s", id, again)
	}
	ahead.Store(int64(2 * time.Second))
	if state := s.show(t, id).State.Name; state != types.InstanceStateNamePending {
		t.Errorf("after two seconds it is %s, want it to be pending still", state)
	}
	// Nothing waits for a minute at the end.
	wantCode(t, s.terminate(t, id), "")
}

func TestATokenLaunchesOnce(t *testing.T) {
	s := open(t, ec2sim.Options{NoBuckets: true})
	first := s.launch(t, order("one"))
	for _, c := range []struct {
		name  string
		input *ec2.RunInstancesInput
		code  string
		same  bool
	}{
		{"the same", order("one"), "", true},
		{"another type", order("one", func(i *ec2.RunInstancesInput) { i.InstanceType = types.InstanceTypeT3Small }), "IdempotentParameterMismatch", false},
		{"other user-data", order("one", func(i *ec2.RunInstancesInput) { i.UserData = aws.String("eA==") }), "IdempotentParameterMismatch", false},
		{"another token", order("two"), "", false},
		{"too long a token", order(strings.Repeat("x", 65)), "InvalidParameterValue", false},
		{"a token that is no ASCII", order("ü"), "InvalidParameterValue", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			answer, err := s.ec2.RunInstances(t.Context(), c.input)
			wantCode(t, err, c.code)
			if err == nil && (*answer.Instances[0].InstanceId == first) != c.same {
				t.Errorf("answered %s, the first was %s", *answer.Instances[0].InstanceId, first)
			}
		})
	}
	s.until(t, first, ec2sim.StateRunning)
	wantCode(t, s.terminate(t, first), "")
	s.until(t, first, ec2sim.StateTerminated)
	_, err := s.ec2.RunInstances(t.Context(), order("one"))
	wantCode(t, err, "IdempotentInstanceTerminated")
	// Other regions know nothing of it, nor of the image.
	_, err = ec2.NewFromConfig(s.config(t, "us-east-1")).RunInstances(t.Context(), order("one"))
	wantCode(t, err, "InvalidAMIID.NotFound")
}

func TestLaunchesAreRefused(t *testing.T) {
	s := open(t, ec2sim.Options{NoBuckets: true, Regions: []ec2sim.Region{func() ec2sim.Region {
		r := ec2sim.DefaultRegions()[0]
		r.Quotas = ec2sim.Quotas{OnDemand: 8, Spot: 2}
		return r
	}()}})
	defer s.StockOut(home, "eu-central-1b", "t3.small")()
	random := strings.Repeat("x", 16<<10+1)
	for _, c := range []struct {
		name, code string
		change     func(*ec2.RunInstancesInput)
	}{
		{"no such image", "InvalidAMIID.NotFound", func(i *ec2.RunInstancesInput) { i.ImageId = aws.String("ami-00000000000000000") }},
		{"an image's name", "InvalidAMIID.Malformed", func(i *ec2.RunInstancesInput) { i.ImageId = aws.String("debian") }},
		{"no such type", "InvalidParameterValue", func(i *ec2.RunInstancesInput) { i.InstanceType = "t3.gigantic" }},
		{"another architecture", "InvalidParameterValue", func(i *ec2.RunInstancesInput) { i.InstanceType = types.InstanceTypeT4gMicro }},
		{"too much user-data", "InvalidParameterValue", func(i *ec2.RunInstancesInput) {
			i.UserData = aws.String(base64.StdEncoding.EncodeToString([]byte(random)))
		}},
		{"user-data that isn't encoded", "InvalidParameterValue", func(i *ec2.RunInstancesInput) { i.UserData = aws.String("#!") }},
		{"a key pair", "UnknownParameter", func(i *ec2.RunInstancesInput) { i.KeyName = aws.String("k") }},
		{"no such subnet", "InvalidSubnetID.NotFound", func(i *ec2.RunInstancesInput) { i.NetworkInterfaces[0].SubnetId = aws.String("subnet-1") }},
		{"no such zone", "InvalidParameterValue", func(i *ec2.RunInstancesInput) {
			i.Placement = &types.Placement{AvailabilityZone: aws.String("eu-central-1z")}
		}},
		{"no such group", "InvalidGroup.NotFound", func(i *ec2.RunInstancesInput) { i.NetworkInterfaces[0].Groups = []string{"sg-00000000000000000"} }},
		{"groups twice", "InvalidParameterCombination", func(i *ec2.RunInstancesInput) { i.SecurityGroupIds = []string{"sg-00000000000000000"} }},
		{"a small disk", "InvalidBlockDeviceMapping", func(i *ec2.RunInstancesInput) { i.BlockDeviceMappings[0].Ebs.VolumeSize = aws.Int32(4) }},
		{"a huge disk", "InvalidParameterValue", func(i *ec2.RunInstancesInput) { i.BlockDeviceMappings[0].Ebs.VolumeSize = aws.Int32(20000) }},
		{"a key for what isn't encrypted", "InvalidParameterDependency", func(i *ec2.RunInstancesInput) {
			i.BlockDeviceMappings[0].Ebs.Encrypted, i.BlockDeviceMappings[0].Ebs.KmsKeyId = nil, aws.String("alias/k")
		}},
		{"a tag twice", "InvalidParameterValue", func(i *ec2.RunInstancesInput) {
			i.TagSpecifications[0].Tags = append(slices.Clone(i.TagSpecifications[0].Tags), i.TagSpecifications[0].Tags[0])
		}},
		{"a tag of the service's", "InvalidParameterValue", func(i *ec2.RunInstancesInput) {
			i.TagSpecifications[0].Tags = []types.Tag{{Key: aws.String("aws:x"), Value: aws.String("")}}
		}},
		{"tags of an image", "InvalidParameterValue", func(i *ec2.RunInstancesInput) { i.TagSpecifications[0].ResourceType = types.ResourceTypeImage }},
		{"nobody has it in the zone", "InsufficientInstanceCapacity", func(i *ec2.RunInstancesInput) {
			i.InstanceType, i.Placement = types.InstanceTypeT3Small, &types.Placement{AvailabilityZone: aws.String("eu-central-1b")}
		}},
		{"the zone doesn't offer it", "Unsupported", func(i *ec2.RunInstancesInput) {
			i.InstanceType, i.Placement = "c7i.4xlarge", &types.Placement{AvailabilityZone: aws.String("eu-central-1c")}
		}},
		{"too many vCPUs", "VcpuLimitExceeded", func(i *ec2.RunInstancesInput) { i.InstanceType = "m7i.4xlarge" }},
		{"too many vCPUs as spot", "MaxSpotInstanceCountExceeded", func(i *ec2.RunInstancesInput) {
			i.InstanceType, i.InstanceMarketOptions = "m7i.xlarge", &types.InstanceMarketOptionsRequest{MarketType: types.MarketTypeSpot}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.ec2.RunInstances(t.Context(), order("token", c.change))
			wantCode(t, err, c.code)
		})
	}
	if all := s.History(); len(all) != 0 {
		t.Errorf("%d were launched all the same", len(all))
	}
	// Where no zone is asked for, one is found; and a refused token is as good as new.
	s.launch(t, order("token", func(i *ec2.RunInstancesInput) { i.InstanceType = types.InstanceTypeT3Small }))
}

func TestLaunchesFailAfterTheAnswer(t *testing.T) {
	s := open(t, ec2sim.Options{})
	for _, c := range []struct {
		name, reason string
		fail         func() func()
	}{
		{"no capacity", "Server.InsufficientInstanceCapacity", func() func() { return s.StockOutAfterLaunch(home, "", "t3.micro") }},
		{"too many volumes", "Client.VolumeLimitExceeded", func() func() {
			return s.FailAfterLaunch(home, "", "", "Client.VolumeLimitExceeded", "Volume limit exceeded")
		}},
		{"no machine", "Server.InternalError", func() func() {
			s.racks.refuse = errors.New("no machine")
			return func() { s.racks.refuse = nil }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			repair := c.fail()
			id := s.launch(t, order(c.name))
			s.until(t, id, ec2sim.StateTerminated)
			repair()
			if i := s.show(t, id); *i.StateReason.Code != c.reason {
				t.Errorf("its reason is %q, want %q", *i.StateReason.Code, c.reason)
			}
		})
	}
	eventually(t, "no volume is left", func() bool { return len(s.Volumes()) == 0 })
}

func TestAnInstanceEndsByItself(t *testing.T) {
	powerOff := func(t *testing.T, s *site, id string) {
		t.Helper()
		s.racks.get(t, id).powerOff()
	}
	interrupt := func(t *testing.T, s *site, id string) {
		t.Helper()
		if err := s.Interrupt(id); err != nil {
			t.Error(err)
		}
	}
	for _, c := range []struct {
		name, reason string
		end          func(*testing.T, *site, string)
		behavior     types.ShutdownBehavior
		state        ec2sim.State
	}{
		{"it powers off", "Client.InstanceInitiatedShutdown", powerOff, types.ShutdownBehaviorTerminate, ec2sim.StateTerminated},
		{"it powers off to stop", "Client.InstanceInitiatedShutdown", powerOff, types.ShutdownBehaviorStop, ec2sim.StateStopped},
		{"it is taken back", "Server.SpotInstanceTermination", interrupt, types.ShutdownBehaviorTerminate, ec2sim.StateTerminated},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, ec2sim.Options{})
			id := s.launch(t, order("one", func(i *ec2.RunInstancesInput) {
				i.InstanceInitiatedShutdownBehavior = c.behavior
				i.InstanceMarketOptions = &types.InstanceMarketOptionsRequest{MarketType: types.MarketTypeSpot}
			}))
			s.until(t, id, ec2sim.StateRunning)
			c.end(t, s, id)
			s.until(t, id, c.state)
			i := s.show(t, id)
			if *i.StateReason.Code != c.reason || i.InstanceLifecycle != types.InstanceLifecycleTypeSpot {
				t.Errorf("its reason is %q, and it is a %q instance", *i.StateReason.Code, i.InstanceLifecycle)
			}
			wantCode(t, s.terminate(t, id), "")
			s.until(t, id, ec2sim.StateTerminated)
		})
	}
}

func TestAVanishedInstanceNeverWas(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	if err := s.Vanish(id); err != nil {
		t.Fatal(err)
	}
	_, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
	wantCode(t, err, "InvalidInstanceID.NotFound")
	if len(s.Instances())+len(s.Volumes())+len(s.NetworkInterfaces()) != 0 {
		t.Error("something of it is left")
	}
	eventually(t, "its machine is removed", s.racks.get(t, id).isStopped)
	if again := s.launch(t, order("one")); again == id {
		t.Error("its token still stands for it")
	}
	if err := s.Vanish("i-00000000000000000"); err == nil {
		t.Error("one that never was could vanish")
	}
	if h := s.History(); len(h) != 2 || h[0].ID != id {
		t.Errorf("the history is %v", h)
	}
}

func TestAPlantedInstanceIsOneOfTheTagged(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id, err := s.Plant(home, map[string]string{ec2tags.Grant: grant})
	if err != nil {
		t.Fatal(err)
	}
	if i := s.show(t, id); i.State.Name != types.InstanceStateNameRunning || *i.Tags[0].Value != grant {
		t.Errorf("it is %s with %v", i.State.Name, i.Tags)
	}
	if v, n := s.Volumes(), s.NetworkInterfaces(); v[0].Tags[ec2tags.Grant] != grant || n[0].Tags[ec2tags.Grant] != grant {
		t.Errorf("its parts are %v and %v", v, n)
	}
	wantCode(t, s.terminate(t, id), "")
	s.until(t, id, ec2sim.StateTerminated)
}

func TestTerminateIsForAllOrNone(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	wantCode(t, s.terminate(t, id, "i-00000000000000000"), "InvalidInstanceID.NotFound")
	wantCode(t, s.terminate(t, id, "i-1"), "InvalidInstanceID.Malformed")
	s.until(t, id, ec2sim.StateRunning)
}

func TestInstancesAreFilteredAndPaged(t *testing.T) {
	s := open(t, ec2sim.Options{NoBuckets: true})
	var ids []string
	for n := range 12 {
		ids = append(ids, s.launch(t, order(string(rune('a'+n)), func(i *ec2.RunInstancesInput) {
			if n >= 7 {
				i.TagSpecifications[0].Tags = []types.Tag{{Key: aws.String("other"), Value: aws.String("x-y")}}
			}
		})))
	}
	for _, c := range []struct {
		name, filter string
		values       []string
		want         []string
	}{
		{"a tag", "tag:" + ec2tags.Grant, []string{grant}, ids[:7]},
		{"a tag's pattern", "tag:other", []string{"x*", "nothing"}, ids[7:]},
		{"another pattern", "tag:other", []string{"x?y"}, ids[7:]},
		{"no pattern", "tag:other", []string{`x\*`}, nil},
		{"a tag's key", "tag-key", []string{"other"}, ids[7:]},
		{"a token", "client-token", []string{"c", "d"}, ids[2:4]},
		{"an id", "instance-id", []string{ids[5]}, ids[5:6]},
		{"a type", "instance-type", []string{"t3.*"}, ids},
	} {
		t.Run(c.name, func(t *testing.T) {
			var found []string
			pages := ec2.NewDescribeInstancesPaginator(s.ec2, &ec2.DescribeInstancesInput{
				MaxResults: aws.Int32(5), Filters: []types.Filter{{Name: &c.filter, Values: c.values}},
			})
			for pages.HasMorePages() {
				answer, err := pages.NextPage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if len(answer.Reservations) > 5 {
					t.Errorf("a page has %d", len(answer.Reservations))
				}
				for _, r := range answer.Reservations {
					found = append(found, *r.Instances[0].InstanceId)
				}
			}
			if !slices.Equal(found, c.want) {
				t.Errorf("found %v, want %v", found, c.want)
			}
		})
	}
	for _, c := range []struct {
		name, code string
		input      ec2.DescribeInstancesInput
	}{
		{"an unknown filter", "InvalidParameterValue", ec2.DescribeInstancesInput{Filters: []types.Filter{{Name: aws.String("colour"), Values: []string{"x"}}}}},
		{"too small a page", "InvalidParameterValue", ec2.DescribeInstancesInput{MaxResults: aws.Int32(4)}},
		{"pages of named ones", "InvalidParameterCombination", ec2.DescribeInstancesInput{MaxResults: aws.Int32(5), InstanceIds: ids[:1]}},
		{"no token", "InvalidNextToken", ec2.DescribeInstancesInput{NextToken: aws.String("?")}},
		{"too many values", "FilterLimitExceeded", ec2.DescribeInstancesInput{Filters: []types.Filter{{Name: aws.String("instance-id"), Values: make([]string, 201)}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.ec2.DescribeInstances(t.Context(), &c.input)
			wantCode(t, err, c.code)
		})
	}
}

func TestTheConsoleIsKeptAfterTheEnd(t *testing.T) {
	s := open(t, ec2sim.Options{})
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	read := func() string {
		answer, err := s.ec2.GetConsoleOutput(t.Context(), &ec2.GetConsoleOutputInput{InstanceId: &id, Latest: aws.Bool(true)})
		if err != nil {
			t.Fatal(err)
		}
		text, err := base64.StdEncoding.DecodeString(aws.ToString(answer.Output))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	want := "booted " + id + "\r\n"
	if got := read(); got != want {
		t.Errorf("the console is %q, want %q", got, want)
	}
	wantCode(t, s.terminate(t, id), "")
	s.until(t, id, ec2sim.StateTerminated)
	if got := read(); got != want {
		t.Errorf("after the end the console is %q, want %q", got, want)
	}
}

func TestCloseStopsEveryMachine(t *testing.T) {
	s := open(t, ec2sim.Options{Speed: 1})
	machine := s.racks.get(t, s.launch(t, order("one")))
	s.Close()
	if !machine.isStopped() {
		t.Error("a machine outlives its cloud")
	}
	if _, err := s.Plant(home, nil); err == nil {
		t.Error("a closed cloud takes instances")
	}
	s.Close()
}
