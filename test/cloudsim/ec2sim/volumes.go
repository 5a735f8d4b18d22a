package ec2sim

import (
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"time"
)

var instanceID = regexp.MustCompile(`^i-[0-9a-f]{17}$`)

// Volume is what there is to know of a volume.
type Volume struct {
	ID, Region, Zone string
	// Instance is empty when it isn't attached.
	Instance  string
	Device    string
	Type      string
	SizeGiB   int64
	Encrypted bool
	KMSKey    string
	Tags      map[string]string
}

// volume is a volume in its place. The cloud's mu guards it.
type volume struct {
	Volume
	serial   int64
	made     time.Time
	visible  time.Time
	iops     int64
	through  int64
	stays    bool
	instance *instance
}

func (v *volume) order() int64 { return v.serial }

func (v *volume) state() string {
	switch {
	case v.instance == nil:
		return "available"
	case v.instance.State == StatePending:
		return "creating"
	default:
		return "in-use"
	}
}

func (v *volume) attachment() string {
	switch {
	case v.instance == nil:
		return "detached"
	case v.instance.State == StatePending:
		return "attaching"
	default:
		return "attached"
	}
}

func (c *Cloud) makeVolume(r *region, i *instance, d disk, tags map[string]string) *volume {
	v := &volume{
		Volume: Volume{
			ID: "vol-" + newID(), Region: r.Name, Zone: i.Zone, Instance: i.ID, Device: d.device, Type: d.kind,
			SizeGiB: d.sizeGiB, Encrypted: d.encrypted, KMSKey: d.kmsKey, Tags: cloned(tags),
		},
		serial: c.nextSerial(), made: i.Launched, visible: i.visible, stays: d.stays, instance: i,
		iops: d.iops, through: d.throughput,
	}
	if v.Type == "gp3" {
		// What every gp3 volume has.
		v.iops, v.through = max(v.iops, 3000), max(v.through, 125)
	}
	if v.Encrypted && v.KMSKey == "" {
		v.KMSKey = "arn:aws:kms:" + r.Name + ":" + Account + ":key/" + digest(r.Name, "ebs")
	}
	r.volumes[v.ID] = v
	return v
}

func cloned(tags map[string]string) map[string]string {
	if tags == nil {
		return map[string]string{}
	}
	return maps.Clone(tags)
}

// tagSet is tags in an order that doesn't change.
func tagSet(tags map[string]string) element {
	return set("tagSet", slices.Sorted(maps.Keys(tags)), func(key string) []element {
		return []element{text("key", key), text("value", tags[key])}
	})
}

func volumeAttributes() attributes[*volume] {
	return attributes[*volume]{
		"attachment.instance-id": func(v *volume) []string {
			if v.instance == nil {
				return nil
			}
			return []string{v.instance.ID}
		},
		"attachment.status": func(v *volume) []string { return []string{v.attachment()} },
		"availability-zone": func(v *volume) []string { return []string{v.Zone} },
		"status":            func(v *volume) []string { return []string{v.state()} },
		"volume-id":         func(v *volume) []string { return []string{v.ID} },
	}
}

func describeVolumes(q *call) effect {
	known := volumeAttributes()
	ids := q.params.list("VolumeId")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		all, fault := pick(ids, r.volumes, func(v *volume) bool { return c.clock.Now().Before(v.visible) }, volumeNotFound)
		if fault != nil {
			return nil, fault
		}
		all = slices.DeleteFunc(all, func(v *volume) bool { return !passes(v, filters, known, v.Tags) })
		all, token := cut(all, wanted, (*volume).order)
		return []element{set("volumeSet", all, (*volume).elements), token}, nil
	}
}

// pick finds what is named, or all that can be seen.
func pick[T interface{ order() int64 }](ids []string, all map[string]T, hidden func(T) bool, missing func(string) *Error) ([]T, *Error) {
	if len(ids) == 0 {
		return slices.DeleteFunc(inOrder(all), hidden), nil
	}
	var found []T
	for _, id := range ids {
		resource, ok := all[id]
		if !ok || hidden(resource) {
			return nil, missing(id)
		}
		found = append(found, resource)
	}
	slices.SortFunc(found, func(a, b T) int { return int(a.order() - b.order()) })
	return found, nil
}

func (v *volume) elements() []element {
	elements := []element{
		text("volumeId", v.ID), number("size", v.SizeGiB), text("availabilityZone", v.Zone), text("status", v.state()),
		instant("createTime", v.made), text("volumeType", v.Type), boolean("encrypted", v.Encrypted),
		optional("kmsKeyId", v.KMSKey), boolean("multiAttachEnabled", false), tagSet(v.Tags),
	}
	if v.iops > 0 {
		elements = append(elements, number("iops", v.iops))
	}
	if v.through > 0 {
		elements = append(elements, number("throughput", v.through))
	}
	attachments := []*volume{v}
	if v.instance == nil {
		attachments = nil
	}
	return append(elements, set("attachmentSet", attachments, func(v *volume) []element {
		return []element{
			text("volumeId", v.ID), text("instanceId", v.instance.ID), text("device", v.Device), text("status", v.attachment()),
			instant("attachTime", v.made), boolean("deleteOnTermination", !v.stays),
		}
	}))
}

// NetworkInterface is what there is to know of a network interface.
type NetworkInterface struct {
	ID, Region, Zone, Subnet string
	// Instance is empty when it isn't attached.
	Instance       string
	Addr           netip.Addr
	Public         bool
	SecurityGroups []string
	Tags           map[string]string
}

// netInterface is a network interface in its place. The cloud's mu guards it.
type netInterface struct {
	NetworkInterface
	serial      int64
	region      *region
	made        time.Time
	visible     time.Time
	description string
	mac         string
	attachID    string
	stays       bool
	instance    *instance
}

func (n *netInterface) order() int64 { return n.serial }

func (c *Cloud) makeInterface(r *region, i *instance, l *launch) *netInterface {
	id := newID()
	n := &netInterface{
		NetworkInterface: NetworkInterface{
			ID: "eni-" + id, Region: r.Name, Zone: i.Zone, Subnet: i.Subnet, Instance: i.ID,
			Public: i.Public, SecurityGroups: i.SecurityGroups, Tags: cloned(l.interfaceTags),
		},
		serial: c.nextSerial(), region: r, made: i.Launched, visible: i.visible, instance: i, stays: l.interfaceStays,
		description: l.interfaceDescription, attachID: "eni-attach-" + newID(),
		// Locally administered, of the id.
		mac: "02:" + id[0:2] + ":" + id[2:4] + ":" + id[4:6] + ":" + id[6:8] + ":" + id[8:10],
	}
	r.interfaces[n.ID] = n
	return n
}

func (n *netInterface) status() string {
	if n.instance == nil {
		return "available"
	}
	return "in-use"
}

func (n *netInterface) addr() netip.Addr {
	if n.instance == nil {
		return netip.Addr{}
	}
	return n.instance.Addr
}

// groups are its security groups.
func (n *netInterface) groups() []*group {
	var groups []*group
	for _, id := range n.SecurityGroups {
		if g := n.region.groups[id]; g != nil {
			groups = append(groups, g)
		}
	}
	return groups
}

func (n *netInterface) attachment() element {
	if n.instance == nil {
		return element{}
	}
	status := "attached"
	if n.instance.State == StatePending {
		status = "attaching"
	}
	return node("attachment",
		text("attachmentId", n.attachID), text("deviceIndex", "0"), text("networkCardIndex", "0"), text("status", status),
		instant("attachTime", n.made), boolean("deleteOnTermination", !n.stays))
}

// shared are what both actions show that describe interfaces.
func (n *netInterface) shared() []element {
	elements := []element{
		text("networkInterfaceId", n.ID), text("subnetId", n.Subnet), text("vpcId", n.region.vpc), text("description", n.description),
		text("ownerId", Account), text("status", n.status()), text("macAddress", n.mac), boolean("sourceDestCheck", true),
		set("groupSet", n.groups(), groupIdentifier), text("interfaceType", "interface"),
	}
	addr := n.addr()
	if !addr.IsValid() {
		return elements
	}
	association := element{}
	if n.Public {
		association = node("association", text("publicIp", addr.String()), text("publicDnsName", ""), text("ipOwnerId", "amazon"))
	}
	return append(elements, text("privateIpAddress", addr.String()), association,
		node("privateIpAddressesSet", node("item", text("privateIpAddress", addr.String()), boolean("primary", true), association)))
}

func (n *netInterface) attachedElements() []element {
	return append(n.shared(), n.attachment())
}

func (n *netInterface) elements() []element {
	attachment := n.attachment()
	if n.instance != nil {
		attachment.kids = append(attachment.kids, text("instanceId", n.instance.ID), text("instanceOwnerId", Account))
	}
	return append(n.shared(), attachment, text("availabilityZone", n.Zone), boolean("requesterManaged", false),
		set("tagSet", slices.Sorted(maps.Keys(n.Tags)), func(key string) []element {
			return []element{text("key", key), text("value", n.Tags[key])}
		}))
}

func interfaceAttributes() attributes[*netInterface] {
	return attributes[*netInterface]{
		"attachment.instance-id": func(n *netInterface) []string {
			if n.instance == nil {
				return nil
			}
			return []string{n.instance.ID}
		},
		"group-id":             func(n *netInterface) []string { return n.SecurityGroups },
		"network-interface-id": func(n *netInterface) []string { return []string{n.ID} },
		"status":               func(n *netInterface) []string { return []string{n.status()} },
		"subnet-id":            func(n *netInterface) []string { return []string{n.Subnet} },
		"vpc-id":               func(n *netInterface) []string { return []string{n.region.vpc} },
	}
}

func describeInterfaces(q *call) effect {
	known := interfaceAttributes()
	ids := q.params.list("NetworkInterfaceId")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		all, fault := pick(ids, r.interfaces, func(n *netInterface) bool { return c.clock.Now().Before(n.visible) }, interfaceNotFound)
		if fault != nil {
			return nil, fault
		}
		all = slices.DeleteFunc(all, func(n *netInterface) bool { return !passes(n, filters, known, n.Tags) })
		all, token := cut(all, wanted, (*netInterface).order)
		return []element{set("networkInterfaceSet", all, (*netInterface).elements), token}, nil
	}
}
