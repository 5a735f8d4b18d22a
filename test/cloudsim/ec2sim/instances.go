package ec2sim

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// State is an instance's.
type State string

// The states of instances.
const (
	StatePending      State = "pending"
	StateRunning      State = "running"
	StateShuttingDown State = "shutting-down"
	StateTerminated   State = "terminated"
	StateStopping     State = "stopping"
	StateStopped      State = "stopped"
)

func (s State) code() int {
	return map[State]int{StateRunning: 16, StateShuttingDown: 32, StateTerminated: 48, StateStopping: 64, StateStopped: 80}[s]
}

// Instance is what there is to know of an instance.
type Instance struct {
	ID, Region, Zone string
	Type, Image      string
	ClientToken      string
	State            State
	// Reason and ReasonMessage are the StateReason, once the end has begun.
	Reason, ReasonMessage string
	// Addr is its public and its private address, once its machine has started.
	Addr     netip.Addr
	Launched time.Time
	// Terminated is zero until it is.
	Terminated       time.Time
	Tags             map[string]string
	UserData         []byte
	SecurityGroups   []string
	Subnet           string
	ShutdownBehavior string
	Metadata         Metadata
	Spot             bool
	Public           bool
}

// instance is one with all that makes it go. The cloud's mu guards it.
type instance struct {
	Instance
	serial      int64
	reservation string
	kind        InstanceType
	image       Image
	spot        bool
	detailed    bool
	visible     time.Time
	// transition is the time and cause of the last change of state.
	transition string
	started    time.Time
	planted    bool
	disks      []*volume
	nic        *netInterface
	machine    cloudsim.Machine
	// console is what was left of it when the machine was removed.
	console []byte
	failure *launchFailure
	// kill is closed when its end has begun.
	kill chan struct{}
	// gone is closed when it is forgotten at once.
	gone chan struct{}
}

func (i *instance) order() int64 { return i.serial }

// begun says whether its end has.
func (i *instance) begun() bool {
	return i.State == StateShuttingDown || i.State == StateTerminated
}

func newID() string {
	var raw [9]byte
	// It never fails.
	_, _ = rand.Read(raw[:])
	return hex.EncodeToString(raw[:])[:17]
}

// make puts an instance and what belongs to it into the state. The caller holds
// mu.
func (c *Cloud) make(r *region, l *launch, image Image, kind InstanceType, place subnet) *instance {
	now := c.clock.Now()
	i := &instance{
		Instance: Instance{
			ID: "i-" + newID(), Region: r.Name, Zone: place.zone, Type: kind.Name, Image: image.ID,
			ClientToken: l.clientToken, State: StatePending, Launched: now, Tags: maps.Clone(l.instanceTags),
			UserData: l.userData, Subnet: place.id, ShutdownBehavior: l.shutdownBehavior,
			Metadata: l.metadata, Spot: l.spot,
			// Default subnets give public addresses.
			Public: l.public == nil || *l.public,
		},
		serial: c.nextSerial(), kind: kind, image: image, spot: l.spot, detailed: l.detailed,
		visible: now.Add(max(c.clock.Scale(visibleAfter), c.options.HiddenAtLeast)), kill: make(chan struct{}), gone: make(chan struct{}),
	}
	i.SecurityGroups = l.groups
	if len(i.SecurityGroups) == 0 {
		i.SecurityGroups = []string{r.defaultGroup()}
	}
	if i.Tags == nil {
		i.Tags = map[string]string{}
	}
	for _, failure := range r.failures {
		if failure.covers(i.Zone, i.Type) {
			i.failure = failure
			break
		}
	}
	r.instances[i.ID] = i
	c.history = append(c.history, i)
	root := disk{device: image.RootDevice, kind: "gp2", sizeGiB: image.SizeGiB}
	disks := []disk{root}
	for _, d := range l.disks {
		if d.device != image.RootDevice {
			disks = append(disks, d)
			continue
		}
		if d.sizeGiB == 0 {
			d.sizeGiB = image.SizeGiB
		}
		disks[0] = d
	}
	for _, d := range disks {
		i.disks = append(i.disks, c.makeVolume(r, i, d, l.volumeTags))
	}
	i.nic = c.makeInterface(r, i, l)
	return i
}

// live is an instance's life, from the launch until it is forgotten.
func (c *Cloud) live(r *region, i *instance) {
	var machine cloudsim.Machine
	switch {
	case i.planted:
		select {
		case <-i.kill:
		case <-c.life.Done():
		}
	case i.failure == nil:
		var err error
		machine, err = c.options.Machines.Start(c.life, c.boot(i))
		c.mu.Lock()
		switch {
		case err != nil:
			c.log.Error("A machine did not start", "instance", i.ID, "error", err)
			c.endInstance(i, "Server.InternalError", "Server.InternalError: Internal error on launch")
		default:
			i.machine, i.Addr = machine, machine.Addr()
		}
		c.mu.Unlock()
	}
	if !i.planted {
		c.clock.Wait(c.life, pendingFor, i.kill)
	}
	c.mu.Lock()
	switch {
	case i.failure != nil:
		c.endInstance(i, i.failure.Code, i.failure.Code+": "+i.failure.Message)
	case i.State == StatePending:
		i.State, i.started = StateRunning, c.clock.Now()
	}
	c.mu.Unlock()
	if machine != nil {
		c.outlive(i, machine)
	}
	if i.failure == nil {
		// What never ran has nothing to shut down.
		c.clock.Wait(c.life, shuttingDownFor, i.gone)
	}
	c.mu.Lock()
	i.State, i.Terminated = StateTerminated, c.clock.Now()
	i.Addr = netip.Addr{}
	if !i.nic.stays {
		delete(r.interfaces, i.nic.ID)
	} else {
		i.nic.instance = nil
	}
	c.mu.Unlock()
	c.clock.Wait(c.life, volumesAfter, i.gone)
	c.mu.Lock()
	for _, v := range i.disks {
		if v.stays {
			v.instance = nil
		} else {
			delete(r.volumes, v.ID)
		}
	}
	c.mu.Unlock()
	// A quick cloud keeps them for as long as somebody takes to look.
	cloudsim.WaitReal(c.life, max(c.clock.Scale(terminatedFor), terminatedAtLeast), i.gone)
	c.mu.Lock()
	delete(r.instances, i.ID)
	c.mu.Unlock()
}

// outlive waits for the end of a machine, by itself or not, and removes it.
func (c *Cloud) outlive(i *instance, machine cloudsim.Machine) {
	select {
	case <-machine.Off():
		c.mu.Lock()
		if i.ShutdownBehavior == "stop" && !i.begun() {
			i.State = StateStopped
			i.Reason, i.ReasonMessage = ownShutdown, ownShutdown+": Instance initiated shutdown"
			c.mu.Unlock()
			// Nothing starts it again here; it waits for its end.
			select {
			case <-i.kill:
			case <-c.life.Done():
			}
		} else {
			c.endInstance(i, ownShutdown, ownShutdown+": Instance initiated shutdown")
			c.mu.Unlock()
		}
	case <-i.kill:
	case <-c.life.Done():
	}
	// The cloud may be closing, which waits for this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.life), time.Minute)
	defer cancel()
	if err := machine.Stop(ctx); err != nil {
		c.log.Error("A machine did not stop", "instance", i.ID, "error", err)
	}
	console := machine.Console()
	c.mu.Lock()
	i.console = console
	c.mu.Unlock()
}

// ownShutdown is the StateReason of an instance that powered itself off.
const ownShutdown = "Client.InstanceInitiatedShutdown"

// endInstance begins the end of an instance, unless it has begun. The caller holds
// mu.
func (c *Cloud) endInstance(i *instance, reason, message string) {
	if i.begun() {
		return
	}
	i.State, i.Reason, i.ReasonMessage = StateShuttingDown, reason, message
	// Of an instance that shut itself down the service tells no time.
	if reason != ownShutdown {
		who := "Server"
		if strings.HasPrefix(reason, "Client.User") {
			who = "User initiated"
		}
		i.transition = fmt.Sprintf("%s (%s)", who, c.clock.Now().UTC().Format("2006-01-02 15:04:05 GMT"))
	}
	close(i.kill)
}

// boot is what an instance's machine is told.
func (c *Cloud) boot(i *instance) cloudsim.Boot {
	metadata := map[string]string{
		"ami-id":                      i.Image,
		"ami-launch-index":            "0",
		"instance-id":                 i.ID,
		"instance-type":               i.Type,
		"instance-action":             "none",
		"instance-life-cycle":         i.lifecycle(),
		"placement/availability-zone": i.Zone,
		"placement/region":            i.Region,
		"reservation-id":              i.reservation,
		"services/domain":             "amazonaws.com",
		"services/partition":          "aws",
		"mac":                         i.nic.mac,
		"block-device-mapping/ami":    i.image.RootDevice,
		"block-device-mapping/root":   i.image.RootDevice,
	}
	if i.Metadata.Tags == "enabled" {
		for key, value := range i.Tags {
			metadata["tags/instance/"+key] = value
		}
	}
	return cloudsim.Boot{
		ID: i.ID, Image: i.Image, Architecture: i.kind.Architecture, UserData: i.UserData,
		Metadata: metadata, DiskGiB: i.disks[0].SizeGiB,
	}
}

func (i *instance) lifecycle() string {
	if i.spot {
		return "spot"
	}
	return "on-demand"
}

// find looks instances up by id, those that can be seen. The caller holds mu.
func (c *Cloud) find(r *region, ids []string) ([]*instance, *Error) {
	var found []*instance
	var missing []string
	for _, id := range ids {
		if !instanceID.MatchString(id) {
			return nil, refusal("InvalidInstanceID.Malformed", "Invalid id: \"%s\"", id)
		}
		i := r.instances[id]
		if i == nil || c.clock.Now().Before(i.visible) {
			missing = append(missing, id)
			continue
		}
		found = append(found, i)
	}
	switch len(missing) {
	case 0:
		return found, nil
	case 1:
		return nil, refusal("InvalidInstanceID.NotFound", "The instance ID '%s' does not exist", missing[0])
	default:
		return nil, refusal("InvalidInstanceID.NotFound", "The instance IDs '%s' do not exist", strings.Join(missing, ", "))
	}
}

func terminateInstances(q *call) effect {
	ids := q.params.list("InstanceId")
	if len(ids) == 0 {
		q.params.fail(refusal("MissingParameter", "The request must contain the parameter InstanceId"))
	}
	return func() (any, *Error) {
		if q.region.limits(q.cloud, "TerminateInstances", len(ids)) {
			return nil, Throttled()
		}
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		return q.cloud.terminate(q.region, ids)
	}
}

// terminate begins the end of instances, of all or none. The caller holds mu.
func (c *Cloud) terminate(r *region, ids []string) (any, *Error) {
	found, fault := c.find(r, ids)
	if fault != nil {
		return nil, fault
	}
	changes := element{name: "instancesSet"}
	for _, i := range found {
		before := i.State
		c.endInstance(i, "Client.UserInitiatedShutdown", "Client.UserInitiatedShutdown: User initiated shutdown")
		changes.kids = append(changes.kids, node("item",
			text("instanceId", i.ID), stateElement("currentState", i.State), stateElement("previousState", before)))
	}
	return []element{changes}, nil
}

func stateElement(name string, state State) element {
	return node(name, number("code", state.code()), text("name", string(state)))
}

func instanceAttributes() attributes[*instance] {
	one := func(get func(*instance) string) func(*instance) []string {
		return func(i *instance) []string { return []string{get(i)} }
	}
	return attributes[*instance]{
		"architecture":        one(func(i *instance) string { return i.kind.Architecture }),
		"availability-zone":   one(func(i *instance) string { return i.Zone }),
		"client-token":        one(func(i *instance) string { return i.ClientToken }),
		"image-id":            one(func(i *instance) string { return i.Image }),
		"instance-id":         one(func(i *instance) string { return i.ID }),
		"instance-state-code": one(func(i *instance) string { return fmt.Sprint(i.State.code()) }),
		"instance-state-name": one(func(i *instance) string { return string(i.State) }),
		"instance-type":       one(func(i *instance) string { return i.Type }),
		"instance.group-id":   func(i *instance) []string { return i.SecurityGroups },
		"private-ip-address":  func(i *instance) []string { return addresses(i.Addr) },
		"reservation-id":      one(func(i *instance) string { return i.reservation }),
		"state-reason-code":   one(func(i *instance) string { return i.Reason }),
		"subnet-id":           one(func(i *instance) string { return i.Subnet }),
		"vpc-id":              one(func(i *instance) string { return "vpc-" + digest(i.Region) }),
		"instance-lifecycle": func(i *instance) []string {
			if !i.spot {
				return nil
			}
			return []string{"spot"}
		},
	}
}

func addresses(addr netip.Addr) []string {
	if !addr.IsValid() {
		return nil
	}
	return []string{addr.String()}
}

func describeInstances(q *call) effect {
	known := instanceAttributes()
	ids := q.params.list("InstanceId")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		all := inOrder(r.instances)
		if len(ids) > 0 {
			found, fault := c.find(r, ids)
			if fault != nil {
				return nil, fault
			}
			all = found
		}
		now := c.clock.Now()
		var matching []*instance
		for _, i := range all {
			if !now.Before(i.visible) && passes(i, filters, known, i.Tags) {
				matching = append(matching, i)
			}
		}
		matching, token := cut(matching, wanted, (*instance).order)
		list := element{name: "reservationSet"}
		for _, i := range matching {
			list.kids = append(list.kids, node("item", reservationElements(i.reservation, []*instance{i})...))
		}
		return []element{list, token}, nil
	}
}

func reservationElements(id string, instances []*instance) []element {
	return []element{
		text("reservationId", id), text("ownerId", Account), node("groupSet"),
		set("instancesSet", instances, (*instance).elements),
	}
}

// elements are an instance as DescribeInstances shows it. The caller holds the
// cloud's mu.
func (i *instance) elements() []element {
	public := i.Addr.IsValid() && i.Public
	elements := []element{
		text("instanceId", i.ID), text("imageId", i.Image), stateElement("instanceState", i.State),
		optional("reason", i.transition), text("amiLaunchIndex", "0"), node("productCodes"),
		text("instanceType", i.Type), instant("launchTime", i.Launched),
		node("placement", text("availabilityZone", i.Zone), text("groupName", ""), text("tenancy", "default")),
		node("monitoring", text("state", map[bool]string{true: "enabled", false: "disabled"}[i.detailed])),
		optional("clientToken", i.ClientToken),
		text("architecture", i.kind.Architecture), text("rootDeviceType", "ebs"), text("rootDeviceName", i.image.RootDevice),
		text("virtualizationType", "hvm"), text("hypervisor", "xen"), boolean("ebsOptimized", false), boolean("enaSupport", true),
		node("cpuOptions", number("coreCount", max(1, i.kind.VCPUs/i.kind.threadsPerCore())), number("threadsPerCore", i.kind.threadsPerCore())),
		node("metadataOptions",
			text("state", "applied"), text("httpTokens", i.Metadata.Tokens), number("httpPutResponseHopLimit", i.Metadata.HopLimit),
			text("httpEndpoint", i.Metadata.Endpoint), text("httpProtocolIpv6", i.Metadata.IPv6), text("instanceMetadataTags", i.Metadata.Tags)),
		text("platformDetails", "Linux/UNIX"), text("usageOperation", "RunInstances"),
		instant("usageOperationUpdateTime", i.Launched),
		tagSet(i.Tags),
	}
	if i.spot {
		elements = append(elements, text("instanceLifecycle", "spot"), text("spotInstanceRequestId", "sir-"+digest(i.ID)[:8]))
	}
	if i.Reason != "" {
		elements = append(elements, node("stateReason", text("code", i.Reason), text("message", i.ReasonMessage)))
	}
	if i.State == StateTerminated {
		return append(elements, node("blockDeviceMapping"), node("networkInterfaceSet"), node("groupSet"))
	}
	elements = append(elements,
		text("subnetId", i.Subnet), text("vpcId", "vpc-"+digest(i.Region)), boolean("sourceDestCheck", true),
		optional("privateIpAddress", strings.Join(addresses(i.Addr), "")),
		set("groupSet", i.nic.groups(), groupIdentifier),
		set("blockDeviceMapping", i.disks, func(v *volume) []element {
			return []element{text("deviceName", v.Device), node("ebs",
				text("volumeId", v.ID), text("status", v.attachment()), instant("attachTime", i.Launched), boolean("deleteOnTermination", !v.stays))}
		}),
		set("networkInterfaceSet", []*netInterface{i.nic}, func(n *netInterface) []element { return n.attachedElements() }),
	)
	if public {
		elements = append(elements, text("ipAddress", i.Addr.String()))
	}
	return elements
}
