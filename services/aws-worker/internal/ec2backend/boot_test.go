package ec2backend

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// checked opens everything that the check needs, in two regions.
func checked(t *testing.T, c Config) *clients {
	t.Helper()
	second := c.Regions[0]
	second.Name = "us-east-1"
	c.Regions = append(slices.Clone(c.Regions), second)
	all := openClients(t, c)
	newCatalogue(c, all)
	newImages(c, all)
	return all
}

func TestTheCheckMakesNothing(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	all := checked(t, c)
	if err := all.check(t.Context()); err != nil || len(all.problems()) != 0 {
		t.Errorf("%v, %v", err, all.problems())
	}
	tried := map[string]bool{}
	for _, r := range cloud.Requests() {
		if r.Mutates && !r.DryRun {
			t.Errorf("the check sent %s", r.Action)
		}
		if r.DryRun {
			tried[r.Region+" "+r.Action] = true
		}
	}
	for _, want := range []string{"eu-central-1 RunInstances", "eu-central-1 TerminateInstances", "us-east-1 RunInstances", "us-east-1 TerminateInstances"} {
		if !tried[want] {
			t.Errorf("%s was not tried", want)
		}
	}
}

// The rights that docs/aws.md proposes depend on tags.
func TestTheTriedLaunchIsTaggedAsARealOne(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	if err := checked(t, c).check(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range cloud.Requests() {
		if r.Action != "RunInstances" {
			continue
		}
		kinds := 0
		for name, values := range r.Params {
			if strings.HasSuffix(name, ".Key") && values[0] == tagBridge && r.Params.Get(strings.TrimSuffix(name, "Key")+"Value") == "test" {
				kinds++
			}
		}
		if kinds != 3 {
			t.Errorf("the bridge's tag is on %d kinds of resources, want instance, volume and network interface: %v", kinds, r.Params)
		}
	}
}

// What a right or a role is missing for shows at the start, and not with the
// first grant.
func TestTheTriedLaunchSaysWhatARealOneSays(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){
		"on demand": func(*Config) {},
		"spot":      func(c *Config) { c.Market = marketSpot },
		"encrypted": func(c *Config) { c.KMSKey = "alias/bridge" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, b := openBridge(t, change)
			g, _ := s.provision(t, b)
			terminate(t, b, g.ID)
			// Of each grant its own.
			own := []string{"ClientToken", "UserData", "DryRun", "NetworkInterface.1.SecurityGroupId.1", "NetworkInterface.1.SubnetId", "BlockDeviceMapping.1.Ebs.VolumeSize"}
			said := map[bool]map[string]string{}
			for _, r := range s.cloud.Cloud.Requests() {
				if r.Action != "RunInstances" {
					continue
				}
				said[r.DryRun] = map[string]string{}
				for key := range r.Params {
					if !slices.Contains(own, key) && !strings.HasPrefix(key, "TagSpecification.") {
						said[r.DryRun][key] = r.Params.Get(key)
					}
				}
			}
			if diff := cmp.Diff(said[false], said[true]); diff != "" || len(said[true]) == 0 {
				t.Errorf("a launch and its trial differ: %s", diff)
			}
		})
	}
}

func TestAMissingRightIsReportedByName(t *testing.T) {
	t.Parallel()
	for right, prepare := range map[string]func(*ec2sim.Cloud, *Config){
		"ec2:RunInstances":              nil,
		"ec2:DescribeInstances":         nil,
		"ec2:DescribeVolumes":           nil,
		"ec2:DescribeNetworkInterfaces": nil,
		"ec2:DescribeSecurityGroups":    nil,
		"ec2:CreateSecurityGroup":       nil,
		"ec2:TerminateInstances": func(cloud *ec2sim.Cloud, _ *Config) {
			for _, region := range []string{"eu-central-1", "us-east-1"} {
				if _, err := cloud.Plant(region, map[string]string{tagBridge: "test", tagBackend: "aws"}); err != nil {
					t.Error(err)
				}
			}
		},
		"scheduler:ListSchedules": func(_ *ec2sim.Cloud, c *Config) { c.Deadline = deadlinePlatform },
	} {
		t.Run(right, func(t *testing.T) {
			t.Parallel()
			cloud, c := simulated(t, ec2sim.Options{})
			if prepare != nil {
				prepare(cloud, &c)
			}
			cloud.Deny(right)
			all := checked(t, c)
			err := all.check(t.Context())
			if !backenderr.Is(err, backenderr.ProviderDenied) {
				t.Fatalf("%v", err)
			}
			for _, region := range []string{"eu-central-1", "us-east-1"} {
				if !strings.Contains(err.Error(), "region "+region) || !strings.Contains(err.Error(), right) {
					t.Errorf("%q doesn't name %s in %s", err, right, region)
				}
			}
			if len(all.problems()) != 2 {
				t.Errorf("problems: %q", all.problems())
			}
			cloud.Allow(right)
			if err := all.recheck(t.Context()); err != nil || len(all.problems()) != 0 {
				t.Errorf("mended: %v, %q", err, all.problems())
			}
		})
	}
}

// A right that depends on an instance's tags can't be seen without an instance.
func TestARightThatCantBeSeenIsNoProblem(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	cloud.Deny("ec2:TerminateInstances")
	if err := checked(t, c).check(t.Context()); err != nil {
		t.Errorf("%v", err)
	}
}

func TestOnlyWhatHadProblemsIsLookedAtAgain(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	all := checked(t, c)
	cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Region == "us-east-1" && r.Action == "GetCallerIdentity" {
			return ec2sim.Intervention{After: func() (lost bool) { return true }}
		}
		return ec2sim.Intervention{}
	})
	if err := all.check(t.Context()); !backenderr.Is(err, backenderr.ProviderUnavailable) || strings.Contains(err.Error(), "eu-central-1") {
		t.Errorf("%v", err)
	}
	cloud.Intercept(nil)
	cloud.ForgetRequests()
	if err := all.recheck(t.Context()); err != nil {
		t.Error(err)
	}
	for _, r := range cloud.Requests() {
		if r.Region != "us-east-1" {
			t.Errorf("%s in %s, where all was well", r.Action, r.Region)
		}
	}
	cloud.ForgetRequests()
	if err := all.recheck(t.Context()); err != nil || len(cloud.Requests()) != 0 {
		t.Errorf("all is well, %v, and %d requests", err, len(cloud.Requests()))
	}
}

func TestAWrongClockIsReported(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		ahead time.Duration
		fine  bool
	}{{10 * time.Second, true}, {-10 * time.Second, true}, {time.Minute, false}, {-time.Minute, false}, {10 * time.Minute, false}, {-10 * time.Minute, false}} {
		_, c := simulated(t, ec2sim.Options{Now: func() time.Time { return time.Now().Add(test.ahead) }})
		err := checked(t, c).check(t.Context())
		if test.fine != (err == nil) || err != nil && !backenderr.Is(err, backenderr.ClockSkew) {
			t.Errorf("AWS %s ahead: %v", test.ahead, err)
		}
	}
}

func TestAKeyThatAWSDoesntKnowIsReported(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	c.CredentialsFile = credentialsFile(t, "default", "AKIAUNKNOWN", "whatever")
	err := checked(t, c).check(t.Context())
	if !backenderr.Is(err, backenderr.ProviderUnauthenticated) || !strings.Contains(err.Error(), "sts:GetCallerIdentity") {
		t.Errorf("%v", err)
	}
}

// Whether there is room just now is not the question at the start.
func TestAStockOutOrAFullQuotaIsNoProblemAtTheStart(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"InsufficientInstanceCapacity", "VcpuLimitExceeded"} {
		cloud, c := simulated(t, ec2sim.Options{})
		cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
			if r.Action == "RunInstances" {
				return ec2sim.Intervention{Refuse: &ec2sim.Error{Status: 400, Code: code, Message: "not now"}}
			}
			return ec2sim.Intervention{}
		})
		if err := checked(t, c).check(t.Context()); err != nil {
			t.Errorf("%s: %v", code, err)
		}
	}
}

func TestTheCheckEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	all := checked(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := all.check(ctx); !backenderr.Is(err, backenderr.Cancelled) {
		t.Errorf("%v", err)
	}
}
