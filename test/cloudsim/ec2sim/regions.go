package ec2sim

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Region is a region as the simulator starts with it.
type Region struct {
	Name   string
	Zones  []Zone
	Images []Image
	// Types are what the region offers, in every zone but those that lack one.
	Types  []InstanceType
	Quotas Quotas
}

// Zone is an availability zone, with one default subnet.
type Zone struct {
	Name string
	// Lacks are types that aren't offered here.
	Lacks []string
}

// Quotas are the account's limits in a region, in vCPUs of what is pending or
// running. The service's defaults are lower still in a new account.
type Quotas struct {
	// OnDemand is "Running On-Demand Standard instances".
	OnDemand int64
	// Spot is "All Standard Spot Instance Requests".
	Spot int64
}

// Image is a machine image.
type Image struct {
	ID    string
	Name  string
	Owner string
	// Architecture is "x86_64" or "arm64".
	Architecture string
	RootDevice   string
	// SizeGiB is that of its root snapshot, and the least that a root volume has.
	SizeGiB int64
	Created time.Time
	// Parameter is the public SSM parameter that names it, if one does.
	Parameter string
	// Deprecated images are found only by those who ask for them.
	Deprecated bool
}

// InstanceType is a type's data, as DescribeInstanceTypes has it.
type InstanceType struct {
	Name         string
	VCPUs        int64
	MemoryMiB    int64
	Architecture string
}

func (t InstanceType) threadsPerCore() int64 {
	if t.Architecture == archARM {
		return 1
	}
	return 2
}

func (t InstanceType) burstable() bool { return strings.HasPrefix(t.Name, "t") }

const (
	archX86 = "x86_64"
	archARM = "arm64"
)

// Owners of the images that everybody starts from, as their makers publish them.
const (
	OwnerDebian    = "136693071363"
	OwnerCanonical = "099720109477"
)

// Public SSM parameters of images that [DefaultImages] has.
const (
	ParameterDebian12      = "/aws/service/debian/release/12/latest/amd64"
	ParameterDebian13      = "/aws/service/debian/release/13/latest/amd64"
	ParameterDebian13ARM64 = "/aws/service/debian/release/13/latest/arm64"
)

// DefaultRegions are two regions with the images and types that tests start from.
// A type's size is the real one.
func DefaultRegions() []Region {
	quotas := Quotas{OnDemand: 640, Spot: 640}
	return []Region{
		{
			Name: "eu-central-1",
			// That newer zones lack types is ordinary.
			Zones:  []Zone{{Name: "eu-central-1a"}, {Name: "eu-central-1b"}, {Name: "eu-central-1c", Lacks: []string{"c7i.4xlarge"}}},
			Images: DefaultImages("eu-central-1"), Types: DefaultTypes(), Quotas: quotas,
		},
		{
			Name:   "us-east-1",
			Zones:  []Zone{{Name: "us-east-1a"}, {Name: "us-east-1b"}},
			Images: DefaultImages("us-east-1"), Types: DefaultTypes(), Quotas: quotas,
		},
	}
}

// DefaultImages are Debian's and Ubuntu's, in the names that their makers give
// them, with a different id in every region.
func DefaultImages(region string) []Image {
	var images []Image
	add := func(image Image) {
		image.ID = ImageID(region, image.Name)
		images = append(images, image)
	}
	for _, arch := range []struct{ image, short string }{{archX86, "amd64"}, {archARM, "arm64"}} {
		for _, debian := range []struct {
			release, build string
			created        time.Time
			parameter      bool
		}{
			{"12", "20250703-2162", time.Date(2025, 7, 3, 6, 12, 0, 0, time.UTC), false},
			{"12", "20260914-2480", time.Date(2026, 9, 14, 6, 10, 0, 0, time.UTC), true},
			{"13", "20250814-2204", time.Date(2025, 8, 14, 7, 1, 0, 0, time.UTC), false},
			{"13", "20261012-2508", time.Date(2026, 10, 12, 6, 44, 0, 0, time.UTC), true},
		} {
			image := Image{
				Name:  fmt.Sprintf("debian-%s-%s-%s", debian.release, arch.short, debian.build),
				Owner: OwnerDebian, Architecture: arch.image, RootDevice: "/dev/xvda", SizeGiB: 8, Created: debian.created,
			}
			if debian.parameter {
				image.Parameter = fmt.Sprintf("/aws/service/debian/release/%s/latest/%s", debian.release, arch.short)
			}
			add(image)
		}
		for _, ubuntu := range []struct{ release, code, store string }{
			{"22.04", "jammy", "ebs-gp2"}, {"24.04", "noble", "ebs-gp3"},
		} {
			disk := map[string]string{"ebs-gp2": "hvm-ssd", "ebs-gp3": "hvm-ssd-gp3"}[ubuntu.store]
			add(Image{
				Name:  fmt.Sprintf("ubuntu/images/%s/ubuntu-%s-%s-%s-server-20261015", disk, ubuntu.code, ubuntu.release, arch.short),
				Owner: OwnerCanonical, Architecture: arch.image, RootDevice: "/dev/sda1", SizeGiB: 8,
				Created:   time.Date(2026, 10, 15, 4, 30, 0, 0, time.UTC),
				Parameter: fmt.Sprintf("/aws/service/canonical/ubuntu/server/%s/stable/current/%s/hvm/%s/ami-id", ubuntu.release, arch.short, ubuntu.store),
			})
		}
	}
	return images
}

// ImageID is the id that [DefaultImages] gives to an image: of the region and the
// name, so that it is the same in every run.
func ImageID(region, name string) string {
	return "ami-" + digest(region, name)
}

// digest is 17 hexadecimal digits, as ids have them.
func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:])[:17]
}

// DefaultTypes are types that a bridge would allow, with their real sizes.
func DefaultTypes() []InstanceType {
	const gib = 1024
	families := []struct {
		name, architecture string
		sizes              []string
		// perVCPU is the memory that goes with a vCPU; 0 for the T families, whose
		// sizes have their own.
		perVCPU int64
	}{
		{"t3", archX86, burstableSizes, 0},
		{"t3a", archX86, burstableSizes, 0},
		{"t4g", archARM, burstableSizes, 0},
		{"m6i", archX86, fixedSizes, 4 * gib},
		{"m7i", archX86, fixedSizes, 4 * gib},
		{"m7g", archARM, fixedSizes, 4 * gib},
		{"c7i", archX86, fixedSizes, 2 * gib},
		{"c7g", archARM, fixedSizes, 2 * gib},
		{"r7i", archX86, fixedSizes, 8 * gib},
	}
	vcpus := map[string]int64{"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "8xlarge": 32}
	burstable := map[string]InstanceType{
		"nano": {VCPUs: 2, MemoryMiB: gib / 2}, "micro": {VCPUs: 2, MemoryMiB: gib}, "small": {VCPUs: 2, MemoryMiB: 2 * gib},
		"medium": {VCPUs: 2, MemoryMiB: 4 * gib}, "large": {VCPUs: 2, MemoryMiB: 8 * gib},
		"xlarge": {VCPUs: 4, MemoryMiB: 16 * gib}, "2xlarge": {VCPUs: 8, MemoryMiB: 32 * gib},
	}
	var types []InstanceType
	for _, family := range families {
		for _, size := range family.sizes {
			t := burstable[size]
			if family.perVCPU > 0 {
				t = InstanceType{VCPUs: vcpus[size], MemoryMiB: vcpus[size] * family.perVCPU}
			}
			t.Name, t.Architecture = family.name+"."+size, family.architecture
			types = append(types, t)
		}
	}
	return types
}

var (
	burstableSizes = []string{"nano", "micro", "small", "medium", "large", "xlarge", "2xlarge"}
	fixedSizes     = []string{"large", "xlarge", "2xlarge", "4xlarge", "8xlarge"}
)

// typeNamed finds a type that the region has, in whichever zone.
func (r *region) typeNamed(name string) (InstanceType, bool) {
	i := slices.IndexFunc(r.Types, func(t InstanceType) bool { return t.Name == name })
	if i < 0 {
		return InstanceType{}, false
	}
	return r.Types[i], true
}

func (r *region) image(id string) (Image, bool) {
	i := slices.IndexFunc(r.Images, func(image Image) bool { return image.ID == id })
	if i < 0 {
		return Image{}, false
	}
	return r.Images[i], true
}
