package ec2backend

import (
	"context"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/ssm"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// imageAge is how long it is known which image a region's instances boot. New
// ones come every few weeks.
const imageAge = time.Hour

// images finds the disk images that instances boot.
type images struct {
	clients *clients

	mu    sync.Mutex // protects the field below
	known map[imageKey]knownImage
}

type imageKey struct {
	region backend.Region
	arch   string
}

type knownImage struct {
	image machineImage
	at    time.Time
}

// machineImage is a disk image.
type machineImage struct {
	ID string
	// RootDevice is the name that the image gives to its root volume.
	RootDevice string
	// Architecture is "amd64" or "arm64".
	Architecture string
	// MinDiskGiB is the smallest root volume that it fits on.
	MinDiskGiB int64
}

func newImages(_ Config, clients *clients) *images {
	out := &images{clients: clients, known: map[imageKey]knownImage{}}
	clients.images = out
	return out
}

// resolve returns what instances of an architecture boot in a region. Its errors
// name the part of the configuration to mend.
func (i *images) resolve(ctx context.Context, region backend.Region, arch string) (machineImage, error) {
	r, err := i.clients.region(region)
	if err != nil {
		return machineImage{}, err
	}
	key := imageKey{region, arch}
	i.mu.Lock()
	found, ok := i.known[key]
	i.mu.Unlock()
	if ok && time.Since(found.at) < imageAge {
		return found.image, nil
	}
	image, err := r.findImage(ctx, arch)
	if err != nil {
		return machineImage{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.known[key] = knownImage{image, time.Now()}
	return image, nil
}

// forget makes resolve look again: EC2 says that there is no such image.
func (i *images) forget(region backend.Region) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for key := range i.known {
		if key.region == region {
			delete(i.known, key)
		}
	}
}

// ec2Architecture is EC2's name.
func ec2Architecture(arch string) string {
	if arch == archARM64 {
		return string(types.ArchitectureValuesArm64)
	}
	return string(types.ArchitectureValuesX8664)
}

func (r *regionClients) findImage(ctx context.Context, arch string) (machineImage, error) {
	input, key, err := r.imageQuery(ctx, arch)
	if err != nil {
		return machineImage{}, err
	}
	answer, err := r.ec2.DescribeImages(ctx, input)
	switch codeOf(err) {
	case "":
		if err != nil {
			return machineImage{}, classify(err, "look for the image of "+r.name)
		}
	case "InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable":
		return machineImage{}, r.noImage(key, "%s", describe(err))
	default:
		return machineImage{}, classify(err, "look for the image of "+r.name)
	}
	var newest *types.Image
	for n := range answer.Images {
		image := &answer.Images[n]
		if newest == nil || aws.ToString(image.CreationDate) > aws.ToString(newest.CreationDate) ||
			aws.ToString(image.CreationDate) == aws.ToString(newest.CreationDate) && aws.ToString(image.ImageId) > aws.ToString(newest.ImageId) {
			newest = image
		}
	}
	switch {
	case newest == nil:
		return machineImage{}, r.noImage(key, "there is no such image")
	case newest.State != types.ImageStateAvailable:
		return machineImage{}, r.noImage(key, "image %s is %s", aws.ToString(newest.ImageId), newest.State)
	case string(newest.Architecture) != ec2Architecture(arch):
		return machineImage{}, r.noImage(key, "image %s is for %s, not for %s", aws.ToString(newest.ImageId), newest.Architecture, ec2Architecture(arch))
	case newest.RootDeviceType != types.DeviceTypeEbs || aws.ToString(newest.RootDeviceName) == "":
		return machineImage{}, r.noImage(key, "image %s has no root volume on EBS", aws.ToString(newest.ImageId))
	}
	out := machineImage{ID: aws.ToString(newest.ImageId), RootDevice: aws.ToString(newest.RootDeviceName), Architecture: arch}
	for _, m := range newest.BlockDeviceMappings {
		if aws.ToString(m.DeviceName) == out.RootDevice && m.Ebs != nil {
			out.MinDiskGiB = int64(aws.ToInt32(m.Ebs.VolumeSize))
		}
	}
	return out, nil
}

// imageQuery returns the question for the region's image, and the key of the
// configuration that it comes from.
func (r *regionClients) imageQuery(ctx context.Context, arch string) (input *ec2.DescribeImagesInput, key string, err error) {
	c := r.config.Image
	switch {
	case c.ID != "":
		return &ec2.DescribeImagesInput{ImageIds: []string{c.ID}}, "id", nil
	case c.Name != "":
		return &ec2.DescribeImagesInput{Owners: []string{c.Owner}, Filters: []types.Filter{
			{Name: aws.String("name"), Values: []string{c.Name}},
			{Name: aws.String("architecture"), Values: []string{ec2Architecture(arch)}},
			{Name: aws.String("state"), Values: []string{string(types.ImageStateAvailable)}},
		}}, "name", nil
	}
	name, key := c.SSMParameter, "ssm_parameter"
	if arch == archARM64 {
		name, key = c.SSMParameterARM64, "ssm_parameter_arm64"
	}
	answer, err := r.ssm.GetParameter(ctx, &ssm.GetParameterInput{Name: aws.String(name)})
	switch {
	case codeOf(err) == "ParameterNotFound":
		return nil, "", r.noImage(key, "there is no parameter %s", name)
	case err != nil:
		return nil, "", classify(err, "read the parameter "+name+" in "+r.name)
	case answer.Parameter == nil || !imageID.MatchString(aws.ToString(answer.Parameter.Value)):
		return nil, "", r.noImage(key, "the value of %s is no id of an image", name)
	}
	return &ec2.DescribeImagesInput{ImageIds: []string{aws.ToString(answer.Parameter.Value)}}, key, nil
}

func (r *regionClients) noImage(key, format string, args ...any) error {
	reason := backenderr.New(backenderr.GrantNotSatisfiable, format, args...)
	return backenderr.New(backenderr.GrantNotSatisfiable, "region %s: image.%s: %s", r.name, key, reason.Error()).WithCreated(backenderr.CreatedNone)
}
