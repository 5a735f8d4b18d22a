package hostbackend

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/inventory"
)

// stateDir is where a host keeps everything of ours. Its parent is Debian's
// place for variable state of services.
const stateDir = "/var/lib/compute-bridge"

// containersDir is where the bridges keep their unpacked images.
const containersDir = "/var/lib/containers/compute-bridge"

// runDir is where podman keeps what a reboot may forget.
const runDir = "/run/compute-bridge"

// interfacePrefix begins the names of grants' bridge interfaces.
const interfacePrefix = "cbg"

// Files of a grant's directory beside those that guestapi names.
const (
	recordFile  = "grant.json"
	consoleFile = "console.log"
	podmanFile  = "podman.log"
	diskFile    = "disk.img"
	diskDir     = "disk"
)

// attemptFile is the mark without which an attempt's unit does not start.
func attemptFile(attempt uint32) string { return "attempt-" + strconv.FormatUint(uint64(attempt), 10) }

// stoppedMark is the content of the ended file when the worker asked for the
// end: what then looks like an exit of the workload's own isn't.
const stoppedMark = "stopped\n"

// record is a grant's grant.json: all that adopting the instance needs. It is
// written before the unit is started and stays until everything else is gone.
type record struct {
	Version int             `json:"version"`
	GrantID backend.GrantID `json:"-"`
	ID      string          `json:"grant_id"`
	params
	Attempt uint32    `json:"attempt"`
	ValidTo time.Time `json:"valid_to"`
	// Network is the grant's policy, to restore it in the firewall.
	Network backend.NetworkPolicy `json:"network"`
	// BootID tells whether the host was rebooted since.
	BootID    string    `json:"boot_id"`
	CreatedAt time.Time `json:"created_at"`
}

// complete says that the record was read, and not only its directory's name.
func (r record) complete() bool { return r.Version != 0 }

// params are an attempt's rendered parameters, as the ledger keeps them: what
// was chosen once and must be the same at every retry.
type params struct {
	Host    string        `json:"host"`
	Region  string        `json:"region"`
	Image   string        `json:"image"`
	Shape   backend.Shape `json:"shape"`
	SSHPort uint16        `json:"ssh_port"`
	Ports   []portParams  `json:"ports,omitempty"`
	Slot    int           `json:"slot"`
}

type portParams struct {
	HostPort uint16 `json:"host_port"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
}

func paramsFor(grant backend.Grant, r inventory.Reservation, region string) params {
	p := params{Host: r.Host, Region: region, Image: grant.Image.Digest.String(), Shape: r.Shape, SSHPort: r.Ports[0], Slot: r.Slot}
	for i, port := range grant.Ports {
		p.Ports = append(p.Ports, portParams{HostPort: r.Ports[i+1], Port: port.Number, Protocol: port.Protocol.String()})
	}
	return p
}

// reservation is what the parameters hold of the host.
func (p params) reservation(id backend.GrantID) inventory.Reservation {
	r := inventory.Reservation{Grant: id, Host: p.Host, Shape: p.Shape, Slot: p.Slot, Ports: []uint16{p.SSHPort}}
	for _, port := range p.Ports {
		r.Ports = append(r.Ports, port.HostPort)
	}
	return r
}

// firewallPorts are the host ports that are open for the grant.
func (p params) firewallPorts() []firewall.Port {
	ports := []firewall.Port{{Number: p.SSHPort, Protocol: "tcp"}}
	for _, port := range p.Ports {
		ports = append(ports, firewall.Port{Number: port.HostPort, Protocol: port.Protocol})
	}
	return ports
}

// published are the grant's ports as the requester sees them.
func (p params) published(publicHost string) []backend.PublishedPort {
	var out []backend.PublishedPort
	for _, port := range p.Ports {
		protocol := backend.TCP
		if port.Protocol == backend.UDP.String() {
			protocol = backend.UDP
		}
		out = append(out, backend.PublishedPort{
			Port: backend.Port{Number: port.Port, Protocol: protocol}, PublicHost: publicHost, PublicPort: port.HostPort,
		})
	}
	return out
}

// subnet is the network of a slot.
func (c Config) subnet(slot int) netip.Prefix {
	pool, err := netip.ParsePrefix(c.SubnetPool)
	if err != nil {
		return netip.Prefix{} // validated
	}
	a := pool.Addr().As4()
	n := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
	n += uint32(slot) << (32 - subnetBits) //nolint:gosec // slots fit the pool

	return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}), subnetBits) //nolint:gosec // bytes of n
}

func (c Config) uidBase(slot int) uint32 {
	return c.FirstUID + uint32(slot)*uidsPerSlot //nolint:gosec // slots fit, see Config.slots
}

// marshalRecord writes grant.json.
func marshalRecord(r record) ([]byte, error) {
	r.Version, r.ID = 1, r.GrantID.String()
	return json.MarshalIndent(r, "", "  ")
}

func unmarshalRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("%s: %w", recordFile, err)
	}
	if r.Version != 1 {
		return record{}, fmt.Errorf("%s: version %d; this worker knows 1", recordFile, r.Version)
	}
	id, err := backend.ParseGrantID(r.ID)
	if err != nil {
		return record{}, fmt.Errorf("%s: %w", recordFile, err)
	}
	r.GrantID = id
	return r, nil
}

// names are the names of everything that an attempt makes on a host.
type names struct {
	bridge  string
	grant   backend.GrantID
	attempt uint32
}

// stem names unit, container and network.
func (n names) stem() string { return fmt.Sprintf("cb-%s-%s-%d", n.bridge, n.grant, n.attempt) }
func (n names) unit() string { return n.stem() + ".service" }

// networkInterface is within Linux's 15 bytes: 48 bits of a hash.
func (n names) networkInterface() string {
	sum := sha256.Sum256([]byte(n.stem()))
	return interfacePrefix + hex.EncodeToString(sum[:6])
}

// unitPattern matches all units of a grant, or of the bridge for nil.
func unitPattern(bridge string, id *backend.GrantID) string {
	if id == nil {
		return "cb-" + bridge + "-*.service"
	}
	return "cb-" + bridge + "-" + id.String() + "-*.service"
}

var unitName = regexp.MustCompile(`^cb-([a-z][a-z0-9-]*)-([0-9a-f]{64})-(\d{1,10})\.service$`)

// parseUnit reads the name of a unit of ours.
func parseUnit(name string) (names, bool) {
	m := unitName.FindStringSubmatch(name)
	if m == nil {
		return names{}, false
	}
	id, err := backend.ParseGrantID(m[2])
	attempt, errN := strconv.ParseUint(m[3], 10, 32)
	if err != nil || errN != nil {
		return names{}, false
	}
	return names{bridge: m[1], grant: id, attempt: uint32(attempt)}, true
}

// dirs are the places of one bridge on a host.
type dirs struct {
	base, guest, cache, index, grants hostfs.Base
	// images is podman's store of the bridge's images. It is where the host has
	// its other containers: an overlay needs a file system that can carry one.
	images hostfs.Base
}

func newDirs(bridge string) (dirs, error) {
	top, err := hostfs.NewBase(stateDir)
	if err != nil {
		return dirs{}, err
	}
	var d dirs
	if d.base, err = top.Base(bridge); err != nil {
		return dirs{}, err
	}
	for _, sub := range []struct {
		dir  *hostfs.Base
		name string
	}{{&d.guest, "guest"}, {&d.cache, "cache"}, {&d.index, "index"}, {&d.grants, "grants"}} {
		if *sub.dir, err = d.base.Base(sub.name); err != nil {
			return dirs{}, err
		}
	}
	containers, err := hostfs.NewBase(containersDir)
	if err != nil {
		return dirs{}, err
	}
	if d.images, err = containers.Base(bridge); err != nil {
		return dirs{}, err
	}
	return d, nil
}

func (d dirs) grant(id backend.GrantID) string { return d.grants.String() + "/" + id.String() }
