package ec2backend

import (
	"cmp"
	"context"
	"fmt"
	"math"
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

const (
	// typesPage and offeringsPage are the largest that EC2 allows.
	typesPage     = 100
	offeringsPage = 1000
)

// catalogue knows which instance types each region offers, where, and for how
// much. What it knows is read by refresh, which somebody has to call now and
// then; all else answers from memory.
type catalogue struct {
	config  Config
	clients *clients
	prices  prices

	mu      sync.Mutex // protects the fields below
	regions map[backend.Region]*offerings
	// without are the places that had no capacity, and until when they are left
	// alone.
	without map[place]time.Time
}

// place is a type in a zone.
type place struct {
	region backend.Region
	zone   string
	kind   string
}

// offerings is what a region offers. It doesn't change once it is made.
type offerings struct {
	types []instanceType // cheapest first
	zones []zone         // in the operator's order
}

// instanceType is one that the operator allows.
type instanceType struct {
	name  string
	arch  string
	cpus  int64
	ram   backend.MiB
	price float64
	zones map[string]bool // that have it
}

// zone is one with a subnet.
type zone struct{ name, subnet, vpc string }

// offer is a way to run a grant.
type offer struct {
	Zone, Subnet, VPC, Type string
	// Architecture is "amd64" or "arm64".
	Architecture string
	// CPU and RAM are what the type has.
	CPU backend.Millicores
	RAM backend.MiB
	// USDPerHour by the price table; infinite if that doesn't know the type.
	USDPerHour float64
}

func newCatalogue(c Config, clients *clients) *catalogue {
	out := &catalogue{
		config: c, clients: clients, prices: newPrices(c.Prices),
		regions: map[backend.Region]*offerings{}, without: map[place]time.Time{},
	}
	clients.catalogue = out
	return out
}

func (t instanceType) shape(storage backend.GiB) backend.Shape {
	return backend.Shape{CPU: backend.Millicores(t.cpus * 1000), RAM: t.ram, Storage: storage}
}

// maxStorage is the largest disk that a grant can have.
func (c *catalogue) maxStorage() backend.GiB {
	return backend.GiB(maxVolumeGiB - c.config.ExtraDiskGiB)
}

// offers returns the ways to run a grant of this size in a region: by price,
// and for each type the zones in the operator's order. What was tried, and what
// had no capacity a short time ago, is left out. It fails with GRANT_NOT_SATISFIABLE if nothing is
// large enough, and with CAPACITY_EXHAUSTED if all that is was left out. It
// reads the region's catalogue if that wasn't done yet.
func (c *catalogue) offers(ctx context.Context, region backend.Region, shape backend.Shape, tried map[place]bool) ([]offer, error) {
	known := c.of(region)
	if known == nil {
		if err := c.refresh(ctx, region); err != nil {
			return nil, err
		}
		known = c.of(region)
	}
	if ok, why := c.fits(region, shape); !ok {
		return nil, backenderr.New(backenderr.GrantNotSatisfiable, "%s", why).WithCreated(backenderr.CreatedNone)
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []offer
	var free time.Time // when the first of those left out is tried again
	for _, t := range known.types {
		if !shape.Fits(t.shape(c.maxStorage())) {
			continue
		}
		for _, z := range known.zones {
			if !t.zones[z.name] {
				continue
			}
			at := place{region, z.name, t.name}
			if tried[at] {
				continue
			}
			if until, bad := c.without[at]; bad {
				if now.Before(until) {
					if free.IsZero() || until.Before(free) {
						free = until
					}
					continue
				}
				delete(c.without, at)
			}
			out = append(out, offer{
				Zone: z.name, Subnet: z.subnet, VPC: z.vpc, Type: t.name, Architecture: t.arch,
				CPU: backend.Millicores(t.cpus * 1000), RAM: t.ram, USDPerHour: t.price,
			})
		}
	}
	if len(out) == 0 {
		return nil, backenderr.New(backenderr.CapacityExhausted, "region %s had no capacity for any type that fits %s", region, shape).
			WithCreated(backenderr.CreatedNone).WithRetryAfter(max(retryOthers, free.Sub(now)))
	}
	return out, nil
}

// unavailable remembers that a type had no capacity in a zone.
func (c *catalogue) unavailable(region backend.Region, zone, instanceType string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.without[place{region, zone, instanceType}] = time.Now().Add(c.config.StockOutMemory.Duration)
}

// fits reports whether a region has a type for a grant of this size, if it has
// capacity; if not, why.
func (c *catalogue) fits(region backend.Region, shape backend.Shape) (ok bool, why string) {
	known := c.of(region)
	if known == nil {
		return false, fmt.Sprintf("region %s: what it offers could not be read yet", region)
	}
	for _, t := range known.types {
		if shape.Fits(t.shape(c.maxStorage())) {
			return true, ""
		}
	}
	if shape.Storage > c.maxStorage() {
		return false, fmt.Sprintf("region %s: no volume has room for %d GiB beside the %d GiB of extra_disk_gib", region, shape.Storage, c.config.ExtraDiskGiB)
	}
	return false, fmt.Sprintf("region %s: no type of the families %s has %s", region, strings.Join(c.config.InstanceFamilies, ", "), shape)
}

// largest returns what the largest type of a region that is allowed gives to a
// grant; false if the region's catalogue isn't known yet.
func (c *catalogue) largest(region backend.Region) (backend.Shape, bool) {
	known := c.of(region)
	if known == nil {
		return backend.Shape{}, false
	}
	// Largest in both would be an instance that nobody has.
	t := slices.MaxFunc(known.types, func(a, b instanceType) int { return cmp.Or(cmp.Compare(a.cpus, b.cpus), cmp.Compare(a.ram, b.ram)) })
	return t.shape(c.maxStorage()), true
}

// cpus returns how many virtual CPUs a type has, zero if it isn't known.
func (c *catalogue) cpus(region backend.Region, instanceType string) int64 {
	known := c.of(region)
	if known == nil {
		return 0
	}
	for _, t := range known.types {
		if t.name == instanceType {
			return t.cpus
		}
	}
	return 0
}

func (c *catalogue) of(region backend.Region) *offerings {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.regions[region]
}

// refresh reads a region's types, where they are offered, and the subnets. What
// was known before stays if it fails.
func (c *catalogue) refresh(ctx context.Context, region backend.Region) error {
	r, err := c.clients.region(region)
	if err != nil {
		return err
	}
	zones, err := r.zones(ctx)
	if err != nil {
		return err
	}
	found, err := c.types(ctx, r)
	if err != nil {
		return err
	}
	if err := r.locate(ctx, c.config.InstanceFamilies, found); err != nil {
		return err
	}
	fresh := &offerings{zones: zones}
	for _, t := range found {
		if slices.ContainsFunc(zones, func(z zone) bool { return t.zones[z.name] }) {
			fresh.types = append(fresh.types, *t)
		}
	}
	if len(fresh.types) == 0 {
		return backenderr.New(backenderr.GrantNotSatisfiable, "region %s offers no type of the families %s (instance_families) for %s in a zone with a subnet",
			region, strings.Join(c.config.InstanceFamilies, ", "), strings.Join(r.config.Architectures, " or "))
	}
	slices.SortFunc(fresh.types, func(a, b instanceType) int {
		return cmp.Or(cmp.Compare(a.price, b.price), cmp.Compare(a.cpus, b.cpus), cmp.Compare(a.ram, b.ram), cmp.Compare(a.name, b.name))
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.regions[region] = fresh
	return nil
}

// familyFilter selects the types of the families that are allowed.
func familyFilter(families []string) []types.Filter {
	values := make([]string, len(families))
	for i, f := range families {
		values[i] = f + ".*"
	}
	return []types.Filter{{Name: aws.String("instance-type"), Values: values}}
}

// types reads the types that are allowed in a region, by name.
func (c *catalogue) types(ctx context.Context, r *regionClients) (map[string]*instanceType, error) {
	out := map[string]*instanceType{}
	pages := ec2.NewDescribeInstanceTypesPaginator(r.ec2, &ec2.DescribeInstanceTypesInput{
		Filters: familyFilter(c.config.InstanceFamilies), MaxResults: aws.Int32(typesPage),
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "read the instance types of "+r.name)
		}
		for _, info := range page.InstanceTypes {
			if t, ok := c.allowed(r, info); ok {
				out[t.name] = t
			}
		}
	}
	return out, nil
}

// allowed returns the type if it can run a grant.
func (c *catalogue) allowed(r *regionClients, info types.InstanceTypeInfo) (*instanceType, bool) {
	t := &instanceType{name: string(info.InstanceType), zones: map[string]bool{}, price: math.Inf(1)}
	// The filter's pattern is EC2's to interpret.
	family, _, _ := strings.Cut(t.name, ".")
	if !slices.Contains(c.config.InstanceFamilies, family) || aws.ToBool(info.BareMetal) {
		return nil, false
	}
	if info.ProcessorInfo == nil || info.VCpuInfo == nil || info.MemoryInfo == nil {
		return nil, false
	}
	for _, a := range info.ProcessorInfo.SupportedArchitectures {
		switch {
		case a == types.ArchitectureTypeX8664 && slices.Contains(r.config.Architectures, archAMD64):
			t.arch = archAMD64
		case a == types.ArchitectureTypeArm64 && slices.Contains(r.config.Architectures, archARM64):
			t.arch = archARM64
		}
	}
	market := types.UsageClassTypeOnDemand
	if c.config.Market == marketSpot {
		market = types.UsageClassTypeSpot
	}
	if t.arch == "" || !slices.Contains(info.SupportedUsageClasses, market) {
		return nil, false
	}
	// Every volume is encrypted.
	if info.EbsInfo != nil && info.EbsInfo.EncryptionSupport == types.EbsEncryptionSupportUnsupported {
		return nil, false
	}
	t.cpus = int64(aws.ToInt32(info.VCpuInfo.DefaultVCpus))
	t.ram = backend.MiB(aws.ToInt64(info.MemoryInfo.SizeInMiB))
	if price, ok := c.prices.of(t.name, r.name); ok {
		t.price = price
	}
	return t, t.cpus > 0 && t.ram > 0
}

// locate reads which zones have which types.
func (r *regionClients) locate(ctx context.Context, families []string, found map[string]*instanceType) error {
	pages := ec2.NewDescribeInstanceTypeOfferingsPaginator(r.ec2, &ec2.DescribeInstanceTypeOfferingsInput{
		LocationType: types.LocationTypeAvailabilityZone, Filters: familyFilter(families), MaxResults: aws.Int32(offeringsPage),
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return classify(err, "read where "+r.name+" offers instance types")
		}
		for _, o := range page.InstanceTypeOfferings {
			if t := found[string(o.InstanceType)]; t != nil {
				t.zones[aws.ToString(o.Location)] = true
			}
		}
	}
	return nil
}

// zones returns the zones to use with their subnets, in the operator's order.
func (r *regionClients) zones(ctx context.Context) ([]zone, error) {
	input := &ec2.DescribeSubnetsInput{SubnetIds: r.config.Subnets}
	if len(r.config.Subnets) == 0 {
		vpc, own := r.config.VPC, true
		if vpc == "" {
			found, err := r.defaultVPC(ctx)
			if err != nil {
				return nil, err
			}
			vpc, own = found, false
		}
		input.Filters = []types.Filter{{Name: aws.String("vpc-id"), Values: []string{vpc}}}
		if !own {
			input.Filters = append(input.Filters, types.Filter{Name: aws.String("default-for-az"), Values: []string{"true"}})
		}
	}
	answer, err := r.ec2.DescribeSubnets(ctx, input)
	if err != nil {
		return nil, classify(err, "read the subnets of "+r.name)
	}
	byZone := map[string]zone{}
	for _, s := range answer.Subnets {
		z := zone{name: aws.ToString(s.AvailabilityZone), subnet: aws.ToString(s.SubnetId), vpc: aws.ToString(s.VpcId)}
		if r.config.VPC != "" && z.vpc != r.config.VPC {
			return nil, backenderr.New(backenderr.GrantNotSatisfiable, "region %s: subnet %s is not in vpc %s but in %s", r.name, z.subnet, r.config.VPC, z.vpc)
		}
		// Always the same one of several: the first by name.
		if before, ok := byZone[z.name]; !ok || z.subnet < before.subnet {
			byZone[z.name] = z
		}
	}
	order := r.config.Zones
	if len(order) == 0 {
		for name := range byZone {
			order = append(order, name)
		}
		slices.Sort(order)
	}
	var out []zone
	for _, name := range order {
		z, ok := byZone[name]
		if !ok {
			return nil, backenderr.New(backenderr.GrantNotSatisfiable, "region %s: there is no subnet in zone %s (zones, subnets, vpc)", r.name, name)
		}
		out = append(out, z)
	}
	if len(out) == 0 {
		return nil, backenderr.New(backenderr.GrantNotSatisfiable, "region %s: there are no subnets (subnets, vpc)", r.name)
	}
	return out, nil
}

func (r *regionClients) defaultVPC(ctx context.Context) (string, error) {
	answer, err := r.ec2.DescribeVpcs(ctx, &ec2.DescribeVpcsInput{Filters: []types.Filter{{Name: aws.String("is-default"), Values: []string{"true"}}}})
	if err != nil {
		return "", classify(err, "look for the default VPC of "+r.name)
	}
	if len(answer.Vpcs) == 0 {
		return "", backenderr.New(backenderr.GrantNotSatisfiable, "region %s has no default VPC: name one (vpc), or subnets", r.name)
	}
	return aws.ToString(answer.Vpcs[0].VpcId), nil
}
