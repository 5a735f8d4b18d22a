package ec2sim

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// place is a zone and a type, of which empty means any.
type place struct {
	zone, instanceType string
}

func (p place) covers(zone, instanceType string) bool {
	return (p.zone == "" || p.zone == zone) && (p.instanceType == "" || p.instanceType == instanceType)
}

// launchFailure is what becomes of instances after RunInstances has said yes.
type launchFailure struct {
	place
	// Code and Message are those of the StateReason.
	Code, Message string
}

// StockOut has launches refused in a zone, of a type: an empty zone is all of the
// region's, an empty type all types. What it returns ends it.
func (c *Cloud) StockOut(region, zone, instanceType string) (restock func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, out := c.regions[region], &place{zone: zone, instanceType: instanceType}
	r.stockOuts = append(r.stockOuts, out)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		r.stockOuts = slices.DeleteFunc(r.stockOuts, func(other *place) bool { return other == out })
	}
}

// StockOutAfterLaunch has launches accepted that find no capacity then: pending,
// and terminated with the StateReason Server.InsufficientInstanceCapacity.
func (c *Cloud) StockOutAfterLaunch(region, zone, instanceType string) (restock func()) {
	return c.FailAfterLaunch(region, zone, instanceType, "Server.InsufficientInstanceCapacity",
		"Insufficient capacity to satisfy instance request")
}

// FailAfterLaunch has launches accepted that fail with a StateReason then
// ("Client.VolumeLimitExceeded", "Client.InternalError").
func (c *Cloud) FailAfterLaunch(region, zone, instanceType, code, message string) (repair func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.regions[region]
	failure := &launchFailure{place: place{zone: zone, instanceType: instanceType}, Code: code, Message: message}
	r.failures = append(r.failures, failure)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		r.failures = slices.DeleteFunc(r.failures, func(other *launchFailure) bool { return other == failure })
	}
}

// SetQuota changes the account's limits in a region.
func (c *Cloud) SetQuota(region string, quotas Quotas) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.regions[region].Quotas = quotas
}

// Interrupt takes an instance back, as the service does with spot instances. It
// fails if there is none.
func (c *Cloud) Interrupt(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, _ := c.instance(id)
	if i == nil {
		return fmt.Errorf("no instance %q", id)
	}
	c.endInstance(i, "Server.SpotInstanceTermination", "Server.SpotInstanceTermination: Spot instance termination")
	return nil
}

// Vanish removes an instance and all of its, as if there had never been any. It
// fails if there is none.
func (c *Cloud) Vanish(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, r := c.instance(id)
	if i == nil {
		return fmt.Errorf("no instance %q", id)
	}
	delete(r.instances, id)
	delete(r.interfaces, i.nic.ID)
	for _, v := range i.disks {
		delete(r.volumes, v.ID)
	}
	maps.DeleteFunc(r.tokens, func(_ string, made *launched) bool { return slices.Contains(made.instances, i) })
	c.endInstance(i, "Server.InternalError", "Server.InternalError: vanished")
	close(i.gone)
	return nil
}

// instance finds one in whichever region. The caller holds mu.
func (c *Cloud) instance(id string) (*instance, *region) {
	for _, r := range c.regions {
		if i := r.instances[id]; i != nil {
			return i, r
		}
	}
	return nil, nil
}

// Machine is what an instance runs on, nil before it has started.
func (c *Cloud) Machine(id string) cloudsim.Machine {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, _ := c.instance(id)
	if i == nil {
		return nil
	}
	return i.machine
}

// Instances are all of all regions that aren't forgotten, terminated ones too,
// whether a caller would find them yet or not.
func (c *Cloud) Instances() []Instance {
	return list(c, func(r *region) map[string]*instance { return r.instances }, (*instance).snapshot)
}

// History are all instances that there ever were, those too that are forgotten.
func (c *Cloud) History() []Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]Instance, len(c.history))
	for i, one := range c.history {
		all[i] = one.snapshot()
	}
	return all
}

func (i *instance) snapshot() Instance {
	snapshot := i.Instance
	snapshot.Tags = maps.Clone(i.Tags)
	return snapshot
}

// Plant puts a running instance behind everybody's back, with a volume and an
// interface, which all have the tags. It runs on no machine and has no address.
func (c *Cloud) Plant(regionName string, tags map[string]string) (id string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.regions[regionName]
	if r == nil || len(r.Images) == 0 {
		return "", fmt.Errorf("no region %q with an image", regionName)
	}
	image := r.Images[0]
	fits := slices.IndexFunc(r.Types, func(t InstanceType) bool { return t.Architecture == image.Architecture })
	if fits < 0 {
		return "", fmt.Errorf("no type in region %q fits its image", regionName)
	}
	l := &launch{
		shutdownBehavior: "terminate", instanceTags: tags, volumeTags: tags, interfaceTags: tags,
		metadata: Metadata{Tokens: "required", HopLimit: 1, Endpoint: "enabled", IPv6: "disabled", Tags: "disabled"},
	}
	i := c.make(r, l, image, r.Types[fits], r.subnets[0])
	i.reservation = "r-" + newID()
	i.State, i.planted, i.failure = StateRunning, true, nil
	if !c.background(func() { c.live(r, i) }) {
		return "", errors.New("the cloud is closed")
	}
	return i.ID, nil
}

// Volumes are all that exist.
func (c *Cloud) Volumes() []Volume {
	return list(c, func(r *region) map[string]*volume { return r.volumes }, func(v *volume) Volume {
		snapshot := v.Volume
		snapshot.Tags = maps.Clone(v.Tags)
		if v.instance == nil {
			snapshot.Instance = ""
		}
		return snapshot
	})
}

// NetworkInterfaces are all that exist.
func (c *Cloud) NetworkInterfaces() []NetworkInterface {
	return list(c, func(r *region) map[string]*netInterface { return r.interfaces }, func(n *netInterface) NetworkInterface {
		snapshot := n.NetworkInterface
		snapshot.Tags, snapshot.Addr = maps.Clone(n.Tags), n.addr()
		if n.instance == nil {
			snapshot.Instance = ""
		}
		return snapshot
	})
}

// SecurityGroups are all that exist, the VPCs' own too.
func (c *Cloud) SecurityGroups() []SecurityGroup {
	return list(c, func(r *region) map[string]*group { return r.groups }, func(g *group) SecurityGroup {
		snapshot := g.SecurityGroup
		snapshot.Tags = maps.Clone(g.Tags)
		snapshot.Ingress, snapshot.Egress = slices.Clone(g.Ingress), slices.Clone(g.Egress)
		return snapshot
	})
}

// list takes snapshots out of all regions, in the order in which things were made.
func list[T interface{ order() int64 }, S any](c *Cloud, of func(*region) map[string]T, snapshot func(T) S) []S {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []T
	for _, r := range c.regions {
		all = append(all, slices.Collect(maps.Values(of(r)))...)
	}
	slices.SortFunc(all, func(a, b T) int { return int(a.order() - b.order()) })
	snapshots := make([]S, len(all))
	for i, one := range all {
		snapshots[i] = snapshot(one)
	}
	return snapshots
}

// limits takes resource tokens of one of the two actions that have such a bucket
// beside that of the requests, and says whether there were too few.
func (r *region) limits(c *Cloud, action string, n int) bool {
	of := resourcesRun
	if action == "TerminateInstances" {
		of = resourcesTerminate
	}
	return !c.take(r.Name, "ec2", action+" resources", limits[of], n)
}
