package ec2backend

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ec2"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/quickvm"
)

// simulated is a cloud and a configuration for it.
func simulated(t *testing.T, options ec2sim.Options) (*ec2sim.Cloud, Config) {
	t.Helper()
	options.Machines = quickvm.New(quickvm.Options{})
	options.NoBuckets = true
	cloud := ec2sim.New(options)
	c := validConfig(t, cloud.Start(t))
	c.CredentialsFile = credentialsFile(t, "default", ec2sim.AccessKeyID, ec2sim.SecretAccessKey)
	c.Regions[0].Image = ImageConfig{SSMParameter: ec2sim.ParameterDebian13}
	return cloud, c
}

func openCatalogue(t *testing.T, c Config) *catalogue {
	t.Helper()
	out := newCatalogue(c, openClients(t, c))
	if err := out.refresh(t.Context(), testRegion); err != nil {
		t.Fatal(err)
	}
	return out
}

// places are offers as "type@zone".
func places(offers []offer) []string {
	var out []string
	for _, o := range offers {
		out = append(out, o.Type+"@"+strings.TrimPrefix(o.Zone, testRegion))
	}
	return out
}

var twoCores = backend.Shape{CPU: 2000, RAM: 4096, Storage: 10}

func TestTheCheapestTypeThatFitsComesFirst(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	c.InstanceFamilies = []string{"m7i", "t3"}
	c.Regions[0].Zones = []string{"eu-central-1b", "eu-central-1a"}
	cat := openCatalogue(t, c)
	got, err := cat.offers(t.Context(), testRegion, twoCores, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"t3.medium@b", "t3.medium@a", "t3.large@b", "t3.large@a", "m7i.large@b", "m7i.large@a"}
	if !slices.Equal(places(got)[:len(want)], want) {
		t.Errorf("in the order %v, want %v first", places(got), want)
	}
	for _, o := range got {
		if o.CPU < twoCores.CPU || o.RAM < twoCores.RAM || o.Subnet == "" || o.VPC == "" || o.Architecture != archAMD64 {
			t.Errorf("offers %+v", o)
		}
	}
	if n := cat.cpus(testRegion, "t3.xlarge"); n != 4 {
		t.Errorf("t3.xlarge has %d CPUs", n)
	}
	if n := cat.cpus(testRegion, "x9.large"); n != 0 {
		t.Errorf("a type that isn't there has %d CPUs", n)
	}
}

func TestTheOperatorsPriceChangesTheOrder(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	c.Prices = []PriceConfig{{Type: "m7i.large", USDPerHour: 0.001}}
	got, err := openCatalogue(t, c).offers(t.Context(), testRegion, twoCores, nil)
	if err != nil || got[0].Type != "m7i.large" || got[0].USDPerHour != 0.001 {
		t.Errorf("%v, %v", places(got), err)
	}
}

func TestOnlyTheFamiliesAndArchitecturesThatAreAllowed(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	c.InstanceFamilies = []string{"t3", "t4g"}
	for _, test := range []struct {
		architectures []string
		families      []string
	}{
		{[]string{archAMD64}, []string{"t3"}},
		{[]string{archARM64}, []string{"t4g"}},
		{[]string{archAMD64, archARM64}, []string{"t3", "t4g"}},
	} {
		c.Regions[0].Architectures = test.architectures
		got, err := openCatalogue(t, c).offers(t.Context(), testRegion, twoCores, nil)
		if err != nil {
			t.Fatal(err)
		}
		var families []string
		for _, o := range got {
			family, _, _ := strings.Cut(o.Type, ".")
			families = append(families, family)
			if (o.Architecture == archARM64) != (family == "t4g") {
				t.Errorf("%s has the architecture %s", o.Type, o.Architecture)
			}
		}
		slices.Sort(families)
		if families = slices.Compact(families); !slices.Equal(families, test.families) {
			t.Errorf("%v: offers of %v", test.architectures, families)
		}
	}
}

func TestATypeIsOfferedOnlyWhereAZoneHasIt(t *testing.T) {
	t.Parallel()
	regions := ec2sim.DefaultRegions()
	regions[0].Zones[0].Lacks = []string{"t3.medium"}
	_, c := simulated(t, ec2sim.Options{Regions: regions})
	got, err := openCatalogue(t, c).offers(t.Context(), testRegion, twoCores, nil)
	if err != nil || len(got) < 3 || !slices.Equal(places(got)[:3], []string{"t3.medium@b", "t3.medium@c", "t3.large@a"}) {
		t.Errorf("%v, %v", places(got), err)
	}
}

func TestWhatHadNoCapacityIsLeftAloneForAWhile(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	c.InstanceFamilies = []string{"m7i"}
	c.Regions[0].Zones = []string{"eu-central-1a", "eu-central-1b"}
	read := openCatalogue(t, c)
	synctest.Test(t, func(t *testing.T) {
		cat := newCatalogue(c, &clients{})
		cat.regions[testRegion] = read.of(testRegion)
		// Fits the largest type alone.
		shape := backend.Shape{CPU: 32000}
		all, err := cat.offers(t.Context(), testRegion, shape, nil)
		if err != nil || len(all) != 2 {
			t.Fatalf("%v, %v", places(all), err)
		}
		cat.unavailable(testRegion, "eu-central-1a", all[0].Type)
		if got, err := cat.offers(t.Context(), testRegion, shape, nil); err != nil || len(got) != 1 || got[0].Zone != "eu-central-1b" {
			t.Errorf("without the first zone: %v, %v", places(got), err)
		}
		<-time.After(time.Minute)
		cat.unavailable(testRegion, "eu-central-1b", all[0].Type)
		_, err = cat.offers(t.Context(), testRegion, shape, nil)
		full := backenderr.From(err)
		if full == nil || full.Reason != backenderr.CapacityExhausted || full.Created != backenderr.CreatedNone || full.RetryAfter != 2*time.Minute {
			t.Errorf("without both: %v, retry after %v", err, full.RetryAfter)
		}
		if ok, why := cat.fits(testRegion, shape); !ok {
			t.Errorf("a stock-out is no reason to say never: %s", why)
		}
		<-time.After(full.RetryAfter)
		if got, err := cat.offers(t.Context(), testRegion, shape, nil); err != nil || len(got) != 1 || got[0].Zone != "eu-central-1a" {
			t.Errorf("when the first is over: %v, %v", places(got), err)
		}
	})
}

func TestWhatNeverFitsIsRefusedWithTheReason(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	cat := openCatalogue(t, c)
	for _, test := range []struct {
		shape backend.Shape
		says  string
	}{
		{backend.Shape{CPU: 1_000_000}, "no type of the families t3, m7i"},
		{backend.Shape{RAM: 1 << 40}, "no type of the families t3, m7i"},
		{backend.Shape{Storage: maxVolumeGiB}, "no volume has room"},
	} {
		ok, why := cat.fits(testRegion, test.shape)
		_, err := cat.offers(t.Context(), testRegion, test.shape, nil)
		if ok || !strings.Contains(why, test.says) || !backenderr.Is(err, backenderr.GrantNotSatisfiable) {
			t.Errorf("%s: %t, %q, %v", test.shape, ok, why, err)
		}
	}
}

func TestBeforeItIsReadNothingIsPromised(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	cat := newCatalogue(c, openClients(t, c))
	if ok, why := cat.fits(testRegion, twoCores); ok || why == "" {
		t.Errorf("fits: %t, %q", ok, why)
	}
	if _, known := cat.largest(testRegion); known {
		t.Error("the largest type is known")
	}
	if got, err := cat.offers(t.Context(), testRegion, twoCores, nil); err != nil || len(got) == 0 {
		t.Errorf("an offer makes it read: %v, %v", got, err)
	}
	if _, err := cat.offers(t.Context(), "us-east-1", twoCores, nil); !backenderr.Is(err, backenderr.GrantNotSatisfiable) {
		t.Errorf("outside the allowlist: %v", err)
	}
}

func TestTheLargestIsOneThatExists(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	cat := openCatalogue(t, c)
	largest, known := cat.largest(testRegion)
	if !known || largest.Storage != backend.GiB(maxVolumeGiB-c.ExtraDiskGiB) {
		t.Fatalf("%v, %t", largest, known)
	}
	got, err := cat.offers(t.Context(), testRegion, largest, nil)
	if err != nil {
		t.Fatalf("nobody has the largest, %s: %v", largest, err)
	}
	if o := got[0]; o.CPU != largest.CPU || o.RAM != largest.RAM {
		t.Errorf("the largest is %s, and %+v has it", largest, o)
	}
	if ok, _ := cat.fits(testRegion, backend.Shape{CPU: largest.CPU + 1}); ok {
		t.Error("there is a larger one")
	}
}

func TestAFailedReadLeavesWhatWasKnown(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	cat := openCatalogue(t, c)
	cloud.Deny("ec2:DescribeInstanceTypeOfferings")
	if err := cat.refresh(t.Context(), testRegion); !backenderr.Is(err, backenderr.ProviderDenied) {
		t.Errorf("refresh: %v", err)
	}
	if ok, why := cat.fits(testRegion, twoCores); !ok {
		t.Errorf("forgot what it knew: %s", why)
	}
}

func TestTheNetworkIsTheConfigurations(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	answer, err := openClients(t, c).order[0].ec2.DescribeSubnets(t.Context(), &ec2.DescribeSubnetsInput{})
	if err != nil || len(answer.Subnets) < 2 {
		t.Fatalf("%d subnets, %v", len(answer.Subnets), err)
	}
	first, vpc := answer.Subnets[0], *answer.Subnets[0].VpcId
	for _, test := range []struct {
		name  string
		adapt func(*RegionConfig)
		zones int
		says  string // empty: no error
	}{
		{"all of the default VPC", func(*RegionConfig) {}, 3, ""},
		{"all of a VPC", func(r *RegionConfig) { r.VPC = vpc }, 3, ""},
		{"one subnet", func(r *RegionConfig) { r.Subnets = []string{*first.SubnetId} }, 1, ""},
		{"one zone", func(r *RegionConfig) { r.Zones = []string{*first.AvailabilityZone} }, 1, ""},
		{"a zone without a subnet", func(r *RegionConfig) { r.Zones = []string{testRegion + "f"} }, 0, "no subnet in zone eu-central-1f"},
		{"a subnet of another VPC", func(r *RegionConfig) { r.Subnets, r.VPC = []string{*first.SubnetId}, "vpc-00000000" }, 0, "is not in vpc vpc-00000000"},
		{"a VPC that isn't there", func(r *RegionConfig) { r.VPC = "vpc-00000000" }, 0, "there are no subnets"},
		{"a subnet that isn't there", func(r *RegionConfig) { r.Subnets = []string{"subnet-00000000"} }, 0, "InvalidSubnetID.NotFound"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			adapted := c
			adapted.Regions = slices.Clone(c.Regions)
			test.adapt(&adapted.Regions[0])
			cat := newCatalogue(adapted, openClients(t, adapted))
			err := cat.refresh(t.Context(), testRegion)
			if test.says != "" {
				if !backenderr.Is(err, backenderr.GrantNotSatisfiable) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("%v; want %q", err, test.says)
				}
				return
			}
			if err != nil || len(cat.of(testRegion).zones) != test.zones {
				t.Fatalf("%+v, %v; want %d zones", cat.of(testRegion), err, test.zones)
			}
		})
	}
}
