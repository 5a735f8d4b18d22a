package ec2sim

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
)

// Limits of what is launched.
const (
	// maxUserData is of RunInstances' page, before it is encoded.
	maxUserData = 16 << 10
	// maxToken is of
	// https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-idempotency.html.
	maxToken = 64
	// Tags are restricted by
	// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html.
	maxTags     = 50
	maxTagKey   = 128
	maxTagValue = 256
)

// launch is what RunInstances asks for.
type launch struct {
	image, instanceType      string
	count                    int64
	clientToken              string
	hash                     string
	userData                 []byte
	shutdownBehavior         string
	zone, subnet             string
	groups                   []string
	public                   *bool
	interfaceDescription     string
	interfaceStays           bool
	disks                    []disk
	metadata                 Metadata
	spot                     bool
	detailed                 bool
	instanceTags, volumeTags map[string]string
	interfaceTags            map[string]string
}

// disk is one entry of BlockDeviceMapping.
type disk struct {
	device, kind, kmsKey string
	sizeGiB              int64
	iops, throughput     int64
	encrypted, stays     bool
}

// launched is what a client token stands for.
type launched struct {
	hash        string
	reservation string
	instances   []*instance
}

func runInstances(q *call) effect {
	p := q.params
	l := &launch{
		image:        p.required("ImageId"),
		instanceType: p.required("InstanceType"),
		clientToken:  p.text("ClientToken"),
		hash:         idempotencyHash(p.values),
		userData:     readUserData(p),
		// The default is to stop, which leaves a disk that costs.
		shutdownBehavior: p.oneOf("InstanceInitiatedShutdownBehavior", "stop", "terminate"),
		metadata:         readMetadata(p.below("MetadataOptions")),
		spot:             readMarket(p.below("InstanceMarketOptions")),
		detailed:         p.below("Monitoring").boolean("Enabled", false),
		disks:            readDisks(p),
	}
	least, most := p.integer("MinCount", 0), p.integer("MaxCount", 0)
	p.required("MinCount")
	p.required("MaxCount")
	if least < 1 || most < least {
		p.fail(invalidValue("The value of MinCount must be at least 1 and not above that of MaxCount"))
	}
	l.count = most
	if len(l.clientToken) > maxToken || strings.ContainsFunc(l.clientToken, func(r rune) bool { return r > '~' }) {
		p.fail(invalidValue("The client token must be at most %d ASCII characters", maxToken))
	}
	p.boolean("EbsOptimized", false)
	p.below("CreditSpecification").oneOf("CpuCredits", "", "standard", "unlimited")
	l.readTags(p)
	l.readPlace(p)
	return func() (any, *Error) {
		if q.region.limits(q.cloud, "RunInstances", int(l.count)) {
			return nil, Throttled()
		}
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		return q.cloud.launch(q.region, l)
	}
}

// idempotencyHash is of all parameters but the token, as repeats must have them
// the same.
func idempotencyHash(values url.Values) string {
	hash := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if name != "ClientToken" && name != "DryRun" {
			fmt.Fprintf(hash, "%q=%q;", name, values[name])
		}
	}
	return hex.EncodeToString(hash.Sum(nil))
}

func readUserData(p params) []byte {
	encoded, ok := p.get("UserData")
	if !ok {
		return nil
	}
	data, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		p.fail(invalidValue("Invalid BASE64 encoding of user data."))
	}
	if len(data) > maxUserData {
		p.fail(invalidValue("User data is limited to %d bytes", maxUserData))
	}
	return data
}

// Metadata is how an instance's metadata service answers.
type Metadata struct {
	// Tokens is "required" where it is IMDSv2 only.
	Tokens   string
	HopLimit int64
	// Endpoint, IPv6 and Tags are "enabled" or "disabled".
	Endpoint, IPv6, Tags string
}

func readMetadata(p params) Metadata {
	m := Metadata{
		// Defaults of images that say nothing themselves.
		Tokens:   p.oneOf("HttpTokens", "optional", "required"),
		HopLimit: p.integer("HttpPutResponseHopLimit", 1),
		Endpoint: p.oneOf("HttpEndpoint", "enabled", "disabled"),
		IPv6:     p.oneOf("HttpProtocolIpv6", "disabled", "enabled"),
		Tags:     p.oneOf("InstanceMetadataTags", "disabled", "enabled"),
	}
	if m.HopLimit < 1 || m.HopLimit > 64 {
		p.fail(invalidValue("HttpPutResponseHopLimit must be from 1 to 64"))
	}
	return m
}

// readMarket says whether a spot instance is asked for.
func readMarket(p params) bool {
	if p.oneOf("MarketType", "", "spot") == "" {
		return false
	}
	spot := p.below("SpotOptions")
	spot.oneOf("SpotInstanceType", "one-time")
	// Others need a persistent request.
	spot.oneOf("InstanceInterruptionBehavior", "terminate")
	spot.text("MaxPrice")
	return true
}

func readDisks(p params) []disk {
	var disks []disk
	for _, below := range p.structs("BlockDeviceMapping") {
		ebs := below.below("Ebs")
		d := disk{
			device:     below.required("DeviceName"),
			sizeGiB:    ebs.integer("VolumeSize", 0),
			kind:       ebs.oneOf("VolumeType", "gp2", "gp3", "io1", "io2", "st1", "sc1", "standard"),
			iops:       ebs.integer("Iops", 0),
			throughput: ebs.integer("Throughput", 0),
			encrypted:  ebs.boolean("Encrypted", false),
			kmsKey:     ebs.text("KmsKeyId"),
			// What isn't said stays, but for the root's.
			stays: !ebs.boolean("DeleteOnTermination", true),
		}
		// 16 TiB, of every type that isn't larger (io2 is, with some instances).
		if d.sizeGiB < 0 || d.sizeGiB > 16<<10 {
			p.fail(invalidValue("Volume of %dGiB is too large for volume type %s; maximum is 16384GiB", d.sizeGiB, d.kind))
		}
		if d.kmsKey != "" && !d.encrypted {
			p.fail(refusal("InvalidParameterDependency", "The parameter KmsKeyId requires the parameter Encrypted to be set."))
		}
		if d.throughput != 0 && d.kind != "gp3" {
			p.fail(refusal("InvalidParameterCombination", "The parameter throughput is not supported for %s volumes", d.kind))
		}
		disks = append(disks, d)
	}
	return disks
}

func (l *launch) readTags(p params) {
	for _, below := range p.structs("TagSpecification") {
		kind := below.required("ResourceType")
		tags := readTags(below)
		switch kind {
		case "instance":
			l.instanceTags = tags
		case "volume":
			l.volumeTags = tags
		case "network-interface":
			l.interfaceTags = tags
		case "spot-instances-request":
			if !l.spot {
				p.fail(invalidValue("'spot-instances-request' is not a valid taggable resource type for this operation."))
			}
		default:
			p.fail(invalidValue("'%s' is not a valid taggable resource type for this operation.", kind))
		}
	}
}

// readTags reads Tag.N.
func readTags(p params) map[string]string {
	tags := map[string]string{}
	for _, tag := range p.structs("Tag") {
		key, value := tag.required("Key"), tag.text("Value")
		switch _, twice := tags[key]; {
		case twice:
			p.fail(invalidValue("Duplicate tag key '%s' specified.", key))
		case strings.HasPrefix(key, "aws:"):
			p.fail(invalidValue("Tag keys starting with 'aws:' are reserved for internal use"))
		case len(key) > maxTagKey:
			p.fail(invalidValue("Tag key exceeds the maximum length of %d characters", maxTagKey))
		case len(value) > maxTagValue:
			p.fail(invalidValue("Tag value exceeds the maximum length of %d characters", maxTagValue))
		}
		tags[key] = value
	}
	if len(tags) > maxTags {
		p.fail(refusal("TagLimitExceeded", "The maximum number of Tags for a resource has been reached."))
	}
	return tags
}

// readPlace reads zone, subnet, security groups and the interface.
func (l *launch) readPlace(p params) {
	l.zone = p.below("Placement").text("AvailabilityZone")
	p.below("Placement").oneOf("Tenancy", "default")
	l.subnet = p.text("SubnetId")
	l.groups = p.list("SecurityGroupId")
	interfaces := p.structs("NetworkInterface")
	if len(interfaces) == 0 {
		return
	}
	if l.subnet != "" || len(l.groups) > 0 {
		p.fail(refusal("InvalidParameterCombination",
			"Network interfaces and an instance-level subnet ID or security groups may not be specified on the same request"))
	}
	if len(interfaces) > 1 {
		p.fail(refusal("UnsupportedOperation", "This simulator's instances have one network interface"))
	}
	below := interfaces[0]
	if index, ok := below.get("DeviceIndex"); !ok || index != "0" {
		p.fail(invalidValue("The primary network interface must have the device index 0"))
	}
	l.subnet = below.text("SubnetId")
	l.groups = below.list("SecurityGroupId")
	l.interfaceDescription = below.text("Description")
	l.interfaceStays = !below.boolean("DeleteOnTermination", true)
	below.oneOf("InterfaceType", "interface")
	if _, said := below.get("AssociatePublicIpAddress"); said {
		public := below.boolean("AssociatePublicIpAddress", false)
		l.public = &public
	}
}

// launch carries RunInstances out. The caller holds mu.
func (c *Cloud) launch(r *region, l *launch) (any, *Error) {
	if known := r.tokens[l.clientToken]; known != nil && l.clientToken != "" {
		if known.hash != l.hash {
			return nil, refusal("IdempotentParameterMismatch", "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).")
		}
		for _, i := range known.instances {
			if i.State == StateTerminated {
				return nil, refusal("IdempotentInstanceTerminated",
					"The request to launch an instance uses the same client token as a previous request for which the instance has been terminated.")
			}
		}
		return c.reservation(known), nil
	}
	image, ok := r.image(l.image)
	if !ok {
		return nil, imageNotFound(l.image)
	}
	kind, ok := r.typeNamed(l.instanceType)
	if !ok {
		return nil, invalidValue("Invalid value '%s' for InstanceType.", l.instanceType)
	}
	if kind.Architecture != image.Architecture {
		return nil, invalidValue("The architecture '%s' of the specified instance type does not match the architecture '%s' of the specified AMI. "+
			"Specify an instance type and an AMI that have matching architectures, and try again.", kind.Architecture, image.Architecture)
	}
	if fault := l.checkDisks(image); fault != nil {
		return nil, fault
	}
	if fault := l.checkGroups(r, c.clock.Now()); fault != nil {
		return nil, fault
	}
	place, fault := c.place(r, l, kind)
	if fault != nil {
		return nil, fault
	}
	if fault := r.checkQuota(l, kind); fault != nil {
		return nil, fault
	}
	made := &launched{hash: l.hash, reservation: "r-" + newID()}
	for range l.count {
		i := c.make(r, l, image, kind, place)
		i.reservation = made.reservation
		made.instances = append(made.instances, i)
		if !c.background(func() { c.live(r, i) }) {
			return nil, InternalError()
		}
	}
	if l.clientToken != "" {
		r.tokens[l.clientToken] = made
	}
	return c.reservation(made), nil
}

func (c *Cloud) reservation(made *launched) []element {
	return reservationElements(made.reservation, made.instances)
}

func (l *launch) checkDisks(image Image) *Error {
	for _, d := range l.disks {
		if d.device == image.RootDevice && d.sizeGiB != 0 && d.sizeGiB < image.SizeGiB {
			return refusal("InvalidBlockDeviceMapping", "Volume of size %dGB is smaller than snapshot 'snap-%s', expect size>= %dGB",
				d.sizeGiB, digest(image.ID), image.SizeGiB)
		}
		if d.device != image.RootDevice && d.sizeGiB == 0 {
			return refusal("MissingParameter", "The request must contain the parameter size or snapshotId")
		}
	}
	return nil
}

// place finds the subnet: the one that is named, or one in the zone that is, or
// any where there is capacity.
func (c *Cloud) place(r *region, l *launch, kind InstanceType) (subnet, *Error) {
	candidates := r.subnets
	switch {
	case l.subnet != "":
		i := slices.IndexFunc(r.subnets, func(s subnet) bool { return s.id == l.subnet })
		if i < 0 {
			return subnet{}, refusal("InvalidSubnetID.NotFound", "The subnet ID '%s' does not exist", l.subnet)
		}
		if l.zone != "" && l.zone != r.subnets[i].zone {
			return subnet{}, invalidValue("The availability zone '%s' does not match the zone of subnet '%s'", l.zone, l.subnet)
		}
		candidates = r.subnets[i : i+1]
	case l.zone != "":
		i := slices.IndexFunc(r.subnets, func(s subnet) bool { return s.zone == l.zone })
		if i < 0 {
			return subnet{}, invalidValue("Invalid availability zone: [%s]", l.zone)
		}
		candidates = r.subnets[i : i+1]
	}
	var fault *Error
	for _, s := range candidates {
		switch {
		case !r.offered(s.zone, kind.Name):
			if fault == nil {
				fault = refusal("Unsupported", "Your requested instance type (%s) is not supported in your requested Availability Zone (%s).", kind.Name, s.zone)
			}
		case slices.ContainsFunc(r.stockOuts, func(out *place) bool { return out.covers(s.zone, kind.Name) }):
			fault = NoCapacity(kind.Name, s.zone)
		default:
			return s, nil
		}
	}
	return subnet{}, fault
}

// offered says whether a zone has a type.
func (r *region) offered(zone, instanceType string) bool {
	for _, z := range r.Zones {
		if z.Name == zone {
			return !slices.Contains(z.Lacks, instanceType)
		}
	}
	return false
}

// checkQuota counts the vCPUs of what is pending or running
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-on-demand-instances.html).
func (r *region) checkQuota(l *launch, kind InstanceType) *Error {
	var used int64
	for _, i := range r.instances {
		if i.spot == l.spot && (i.State == StatePending || i.State == StateRunning) {
			used += i.kind.VCPUs
		}
	}
	wanted := used + l.count*kind.VCPUs
	switch {
	case l.spot && wanted > r.Quotas.Spot:
		return refusal("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
	case !l.spot && wanted > r.Quotas.OnDemand:
		return refusal("VcpuLimitExceeded", "You have requested more vCPU capacity than your current vCPU limit of %d allows "+
			"for the instance bucket that the specified instance type belongs to. "+
			"Please visit http://aws.amazon.com/contact-us/ec2-request to request an adjustment to this limit.", r.Quotas.OnDemand)
	}
	return nil
}
