package ec2sim

import (
	"fmt"
	"slices"
	"strings"
)

// numbered is a resource that is where it is in a list: the catalogue doesn't
// change.
type numbered[T any] struct {
	serial int64
	value  T
}

func number1[T any](values []T) []numbered[T] {
	all := make([]numbered[T], len(values))
	for i, value := range values {
		all[i] = numbered[T]{serial: int64(i) + 1, value: value}
	}
	return all
}

// choose takes what passes the filters, one page of it.
func choose[T any](values []T, filters []filter, known attributes[T], wanted page) ([]T, element) {
	all := slices.DeleteFunc(number1(values), func(n numbered[T]) bool { return !passes(n.value, filters, known, nil) })
	all, token := cut(all, wanted, func(n numbered[T]) int64 { return n.serial })
	chosen := make([]T, len(all))
	for i, n := range all {
		chosen[i] = n.value
	}
	return chosen, token
}

func describeInstanceTypes(q *call) effect {
	known := attributes[InstanceType]{
		"bare-metal":                            func(InstanceType) []string { return []string{"false"} },
		"current-generation":                    func(InstanceType) []string { return []string{"true"} },
		"hypervisor":                            func(InstanceType) []string { return []string{"nitro"} },
		"instance-type":                         func(t InstanceType) []string { return []string{t.Name} },
		"processor-info.supported-architecture": func(t InstanceType) []string { return []string{t.Architecture} },
		"supported-usage-class":                 func(InstanceType) []string { return []string{"on-demand", "spot"} },
		"supported-virtualization-type":         func(InstanceType) []string { return []string{"hvm"} },
	}
	names := q.params.list("InstanceType")
	filters := readFilters(q.params, known, false)
	wanted := readPage(q.params, 5, 100, names)
	if len(names) > 100 {
		q.params.fail(invalidValue("At most 100 instance types can be named"))
	}
	return func() (any, *Error) {
		types := q.region.Types
		if len(names) > 0 {
			types = nil
			var missing []string
			for _, name := range names {
				if t, ok := q.region.typeNamed(name); ok {
					types = append(types, t)
				} else {
					missing = append(missing, name)
				}
			}
			if len(missing) > 0 {
				return nil, refusal("InvalidInstanceType", "The following supplied instance types do not exist: [%s]", strings.Join(missing, ", "))
			}
		}
		types, token := choose(types, filters, known, wanted)
		return []element{set("instanceTypeSet", types, InstanceType.elements), token}, nil
	}
}

func (t InstanceType) elements() []element {
	return []element{
		text("instanceType", t.Name), boolean("currentGeneration", true), boolean("freeTierEligible", t.Name == "t3.micro"),
		texts("supportedUsageClasses", []string{"on-demand", "spot"}), texts("supportedRootDeviceTypes", []string{"ebs"}),
		texts("supportedVirtualizationTypes", []string{"hvm"}), boolean("bareMetal", false), text("hypervisor", "nitro"),
		node("processorInfo", texts("supportedArchitectures", []string{t.Architecture})),
		node("vCpuInfo", number("defaultVCpus", t.VCPUs), number("defaultCores", max(1, t.VCPUs/t.threadsPerCore())),
			number("defaultThreadsPerCore", t.threadsPerCore())),
		node("memoryInfo", number("sizeInMiB", t.MemoryMiB)), boolean("instanceStorageSupported", false),
		node("ebsInfo", text("ebsOptimizedSupport", "default"), text("encryptionSupport", "supported"), text("nvmeSupport", "required")),
		node("networkInfo", text("enaSupport", "required"), boolean("ipv6Supported", true), boolean("encryptionInTransitSupported", true)),
		boolean("hibernationSupported", false), boolean("burstablePerformanceSupported", t.burstable()),
		boolean("dedicatedHostsSupported", !t.burstable()), boolean("autoRecoverySupported", true),
	}
}

// offering is a type where it is offered.
type offering struct{ instanceType, kind, location string }

func describeOfferings(q *call) effect {
	known := attributes[offering]{
		"instance-type": func(o offering) []string { return []string{o.instanceType} },
		"location":      func(o offering) []string { return []string{o.location} },
	}
	kind := q.params.oneOf("LocationType", "region", "availability-zone")
	filters := readFilters(q.params, known, false)
	wanted := readPage(q.params, 5, 1000, nil)
	return func() (any, *Error) {
		var all []offering
		for _, t := range q.region.Types {
			if kind == "region" {
				all = append(all, offering{t.Name, kind, q.region.Name})
				continue
			}
			for _, zone := range q.region.Zones {
				if q.region.offered(zone.Name, t.Name) {
					all = append(all, offering{t.Name, kind, zone.Name})
				}
			}
		}
		all, token := choose(all, filters, known, wanted)
		return []element{set("instanceTypeOfferingSet", all, func(o offering) []element {
			return []element{text("instanceType", o.instanceType), text("locationType", o.kind), text("location", o.location)}
		}), token}, nil
	}
}

func describeImages(q *call) effect {
	known := attributes[Image]{
		"architecture":        func(i Image) []string { return []string{i.Architecture} },
		"image-id":            func(i Image) []string { return []string{i.ID} },
		"image-type":          func(Image) []string { return []string{"machine"} },
		"is-public":           func(Image) []string { return []string{"true"} },
		"name":                func(i Image) []string { return []string{i.Name} },
		"owner-id":            func(i Image) []string { return []string{i.Owner} },
		"root-device-type":    func(Image) []string { return []string{"ebs"} },
		"state":               func(Image) []string { return []string{"available"} },
		"virtualization-type": func(Image) []string { return []string{"hvm"} },
	}
	ids, owners := q.params.list("ImageId"), q.params.list("Owner")
	deprecated := q.params.boolean("IncludeDeprecated", false)
	filters := readFilters(q.params, known, false)
	wanted := readPage(q.params, 1, 1000, ids)
	return func() (any, *Error) {
		images := slices.Clone(q.region.Images)
		if len(ids) > 0 {
			images = nil
			for _, id := range ids {
				image, ok := q.region.image(id)
				if !ok {
					return nil, imageNotFound(id)
				}
				images = append(images, image)
			}
		}
		images = slices.DeleteFunc(images, func(i Image) bool {
			owned := len(owners) == 0 || slices.Contains(owners, i.Owner) || i.Owner == Account && slices.Contains(owners, "self")
			// Those that are named are found, deprecated or not.
			return !owned || i.Deprecated && !deprecated && len(ids) == 0
		})
		images, token := choose(images, filters, known, wanted)
		return []element{set("imagesSet", images, Image.elements), token}, nil
	}
}

func imageNotFound(id string) *Error {
	if !strings.HasPrefix(id, "ami-") {
		return refusal("InvalidAMIID.Malformed", "Invalid id: \"%s\" (expecting \"ami-...\")", id)
	}
	return refusal("InvalidAMIID.NotFound", "The image id '[%s]' does not exist", id)
}

func (i Image) elements() []element {
	return []element{
		text("imageId", i.ID), text("imageLocation", i.Owner+"/"+i.Name), text("imageState", "available"),
		text("imageOwnerId", i.Owner), boolean("isPublic", true), text("architecture", i.Architecture), text("imageType", "machine"),
		text("platformDetails", "Linux/UNIX"), text("usageOperation", "RunInstances"), text("name", i.Name),
		text("rootDeviceType", "ebs"), text("rootDeviceName", i.RootDevice), text("virtualizationType", "hvm"),
		text("hypervisor", "xen"), boolean("enaSupport", true), text("bootMode", "uefi-preferred"),
		text("creationDate", i.Created.UTC().Format("2006-01-02T15:04:05.000Z")),
		node("blockDeviceMapping", node("item", text("deviceName", i.RootDevice), node("ebs",
			text("snapshotId", "snap-"+digest(i.ID)), number("volumeSize", i.SizeGiB), text("volumeType", "gp3"),
			boolean("deleteOnTermination", true), boolean("encrypted", false)))),
	}
}

func describeVPCs(q *call) effect {
	known := attributes[string]{
		"is-default": func(string) []string { return []string{"true"} },
		"isDefault":  func(string) []string { return []string{"true"} },
		"owner-id":   func(string) []string { return []string{Account} },
		"state":      func(string) []string { return []string{"available"} },
		"vpc-id":     func(id string) []string { return []string{id} },
	}
	ids := q.params.list("VpcId")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		for _, id := range ids {
			if id != q.region.vpc {
				return nil, vpcNotFound(id)
			}
		}
		vpcs, token := choose([]string{q.region.vpc}, filters, known, wanted)
		return []element{set("vpcSet", vpcs, func(id string) []element {
			elements := []element{
				text("vpcId", id), text("ownerId", Account), text("state", "available"), text("cidrBlock", "172.31.0.0/16"),
				text("dhcpOptionsId", "dopt-"+digest(id)), text("instanceTenancy", "default"), boolean("isDefault", true), node("tagSet"),
			}
			if block := q.region.ipv6; block != "" {
				elements = append(elements, set("ipv6CidrBlockAssociationSet", []string{block}, func(block string) []element {
					return []element{
						text("associationId", "vpc-cidr-assoc-"+digest(block)), text("ipv6CidrBlock", block),
						node("ipv6CidrBlockState", text("state", "associated")),
					}
				}))
			}
			return elements
		}), token}, nil
	}
}

func vpcNotFound(id string) *Error {
	return refusal("InvalidVpcID.NotFound", "The vpc ID '%s' does not exist", id)
}

func describeSubnets(q *call) effect {
	r := q.region
	yes := func(subnet) []string { return []string{"true"} }
	known := attributes[subnet]{
		"availability-zone":       func(s subnet) []string { return []string{s.zone} },
		"default-for-az":          yes,
		"defaultForAz":            yes,
		"map-public-ip-on-launch": yes,
		"owner-id":                func(subnet) []string { return []string{Account} },
		"state":                   func(subnet) []string { return []string{"available"} },
		"subnet-id":               func(s subnet) []string { return []string{s.id} },
		"vpc-id":                  func(subnet) []string { return []string{r.vpc} },
	}
	ids := q.params.list("SubnetId")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		subnets := r.subnets
		if len(ids) > 0 {
			subnets = nil
			for _, id := range ids {
				i := slices.IndexFunc(r.subnets, func(s subnet) bool { return s.id == id })
				if i < 0 {
					return nil, refusal("InvalidSubnetID.NotFound", "The subnet ID '%s' does not exist", id)
				}
				subnets = append(subnets, r.subnets[i])
			}
		}
		subnets, token := choose(subnets, filters, known, wanted)
		return []element{set("subnetSet", subnets, func(s subnet) []element {
			return []element{
				text("subnetId", s.id), text("state", "available"), text("vpcId", r.vpc), text("cidrBlock", s.cidr),
				// Of a /20 the service keeps five.
				number("availableIpAddressCount", 4091), text("availabilityZone", s.zone), boolean("defaultForAz", true),
				boolean("mapPublicIpOnLaunch", true), boolean("assignIpv6AddressOnCreation", false), text("ownerId", Account),
				text("subnetArn", fmt.Sprintf("arn:aws:ec2:%s:%s:subnet/%s", r.Name, Account, s.id)), node("tagSet"),
			}
		}), token}, nil
	}
}

// prefixList is a list of networks that the service keeps.
type prefixList struct {
	id, name string
	cidrs    []string
}

func (r *region) prefixLists() []prefixList {
	lists := []prefixList{
		{name: "com.amazonaws." + r.Name + ".s3", cidrs: []string{"3.5.134.0/23", "52.219.46.0/23"}},
		{name: "com.amazonaws." + r.Name + ".dynamodb", cidrs: []string{"52.94.17.0/24"}},
	}
	for i := range lists {
		lists[i].id = "pl-" + digest(lists[i].name)
	}
	return lists
}

func (r *region) prefixList(id string) (prefixList, *Error) {
	lists := r.prefixLists()
	i := slices.IndexFunc(lists, func(l prefixList) bool { return l.id == id })
	if i < 0 {
		return prefixList{}, refusal("InvalidPrefixListID.NotFound", "The prefix list ID '%s' does not exist", id)
	}
	return lists[i], nil
}

func describePrefixLists(q *call) effect {
	known := attributes[prefixList]{
		"owner-id":         func(prefixList) []string { return []string{"AWS"} },
		"prefix-list-id":   func(l prefixList) []string { return []string{l.id} },
		"prefix-list-name": func(l prefixList) []string { return []string{l.name} },
	}
	ids := q.params.list("PrefixListId")
	filters := readFilters(q.params, known, false)
	wanted := readPage(q.params, 1, 100, ids)
	return func() (any, *Error) {
		lists := q.region.prefixLists()
		if len(ids) > 0 {
			lists = nil
			for _, id := range ids {
				one, fault := q.region.prefixList(id)
				if fault != nil {
					return nil, fault
				}
				lists = append(lists, one)
			}
		}
		lists, token := choose(lists, filters, known, wanted)
		return []element{set("prefixListSet", lists, func(l prefixList) []element {
			return []element{
				text("prefixListId", l.id), text("prefixListName", l.name), text("ownerId", "AWS"), text("addressFamily", "IPv4"),
				text("state", "create-complete"), text("prefixListArn", fmt.Sprintf("arn:aws:ec2:%s:aws:prefix-list/%s", q.region.Name, l.id)),
			}
		}), token}, nil
	}
}

func getPrefixListEntries(q *call) effect {
	id := q.params.required("PrefixListId")
	wanted := readPage(q.params, 1, 100, nil)
	return func() (any, *Error) {
		one, fault := q.region.prefixList(id)
		if fault != nil {
			return nil, fault
		}
		cidrs, token := choose(one.cidrs, nil, nil, wanted)
		return []element{set("entrySet", cidrs, func(cidr string) []element { return []element{text("cidr", cidr)} }), token}, nil
	}
}
