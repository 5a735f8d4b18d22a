package hostbackend

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/inventory"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Config is the [backend] section of the worker's configuration.
type Config struct {
	// GuestBinary is the guest for the hosts' architecture. Default: the file
	// "guest" beside the worker's own program.
	GuestBinary config.Path `toml:"guest_binary"`
	// Replica names this process among the replicas of the worker, for people.
	// Default: the machine's name.
	Replica string `toml:"replica"`
	// LeaseTTL is how long this process may be silent before a host ends its
	// connection, so that another replica can take the host over.
	LeaseTTL config.Duration `toml:"lease_ttl"`
	// LenientBoot starts although hosts can't be reached or are unfit; they
	// join when they come.
	LenientBoot bool `toml:"lenient_boot"`
	// ConnectTimeout is how long the start waits for the hosts.
	ConnectTimeout config.Duration `toml:"connect_timeout"`
	// ReadyTimeout is how long an instance may take from its start until SSH
	// answers.
	ReadyTimeout config.Duration `toml:"ready_timeout"`
	// StopGrace is the time between SIGTERM and SIGKILL for a workload. The end
	// of an instance must fit the 60 s that the contract allows.
	StopGrace config.Duration `toml:"stop_grace"`
	// UsageInterval is how often a watch reads usage so far: one question to
	// the host for each instance.
	UsageInterval config.Duration `toml:"usage_interval"`
	// SubnetPool is where the grants' networks are taken from, /29 each.
	SubnetPool string `toml:"subnet_pool"`
	// FirstUID is the first host user id of the first slot; each slot has
	// 65536.
	FirstUID uint32 `toml:"first_uid"`
	// DeniedEgress are destinations that no grant reaches, beside other grants
	// and the hosts themselves.
	DeniedEgress []string `toml:"denied_egress"`

	ImageStore ImageStoreConfig `toml:"image_store"`
	Hosts      []HostConfig     `toml:"host"`

	// For tests, in which a host is silent for seconds instead of minutes.
	connection      func(*sshconn.Config)
	undoLimit       time.Duration // 0: undoTimeout
	recheckInterval time.Duration // 0: recheckFit
}

// ImageStoreConfig says where images come from.
type ImageStoreConfig struct {
	// Base is a directory or an https:// URL.
	Base string `toml:"base"`
	// Insecure allows http:// to other machines than this one.
	Insecure bool `toml:"insecure"`
	// MaxMiB bounds an image.
	MaxMiB int64 `toml:"max_mib"`
}

// HostConfig is a host.
type HostConfig struct {
	// Name is the operator's, [a-z][a-z0-9-]*.
	Name string `toml:"name"`
	// Address is host:port of its sshd.
	Address string `toml:"address"`
	// PublicHost is what receipts name. Default: the host of Address.
	PublicHost string `toml:"public_host"`
	// User logs in with KeyFile; it needs root's rights.
	User    string            `toml:"user"`
	KeyFile config.SecretFile `toml:"key_file"`
	// HostKeys are the keys that sshd may show, in authorized_keys format. At
	// least one: nothing is trusted on first use.
	HostKeys []string `toml:"host_keys"`
	Region   string   `toml:"region"`
	// What the operator sells of the host.
	CPUMillicores int64 `toml:"cpu_millicores"`
	RAMMiB        int64 `toml:"ram_mib"`
	StorageGiB    int64 `toml:"storage_gib"`
	// MaxInstances is how many grants run at once.
	MaxInstances int `toml:"max_instances"`
	// Ports is the range of host ports for grants, "40000-40999".
	Ports string `toml:"ports"`
	// CacheGiB bounds the images that are kept beyond those in use.
	CacheGiB int64 `toml:"cache_gib"`
	// Standby leaves the host to another replica that wants it: with each host
	// on standby at all replicas but one, they share the hosts out.
	Standby bool `toml:"standby"`
	// FirewalldZone is where ports are opened if firewalld runs; empty: its
	// default zone.
	FirewalldZone string `toml:"firewalld_zone"`
}

// Defaults of [Config] and [HostConfig].
const (
	defaultLeaseTTL       = guestapi.DefaultLeaseTTL
	minLeaseTTL           = 2 * time.Second
	maxLeaseTTL           = time.Minute
	defaultConnectTimeout = 30 * time.Second
	defaultReadyTimeout   = time.Minute
	defaultStopGrace      = 10 * time.Second
	maxStopGrace          = 30 * time.Second
	defaultUsageInterval  = 30 * time.Second
	minUsageInterval      = 100 * time.Millisecond
	defaultSubnetPool     = "10.213.0.0/16"
	defaultFirstUID       = 1 << 20
	uidsPerSlot           = 1 << 16
	subnetBits            = 29 // network, gateway, instance, broadcast, and room
	defaultPorts          = "40000-40999"
	defaultMaxInstances   = 100
	defaultCacheGiB       = 50
	defaultMaxImageMiB    = 64 << 10
)

var (
	// hostName is a name, or an address of either family.
	hostName = regexp.MustCompile(`^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9:])?$`)
	userName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	// zoneName is within firewalld's own limit.
	zoneName = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_/-]{0,16}$`)
)

// SetDefaults implements config.Defaulter.
func (c *Config) SetDefaults() {
	if program, err := os.Executable(); err == nil {
		c.GuestBinary = config.Path(filepath.Join(filepath.Dir(program), "guest"))
	}
	c.Replica, _ = os.Hostname() // it may stay empty
	c.LeaseTTL.Duration = defaultLeaseTTL
	c.ConnectTimeout.Duration = defaultConnectTimeout
	c.ReadyTimeout.Duration = defaultReadyTimeout
	c.StopGrace.Duration = defaultStopGrace
	c.UsageInterval.Duration = defaultUsageInterval
	c.SubnetPool = defaultSubnetPool
	c.FirstUID = defaultFirstUID
	c.ImageStore.MaxMiB = defaultMaxImageMiB
	for _, p := range firewall.DefaultDenied() {
		c.DeniedEgress = append(c.DeniedEgress, p.String())
	}
}

// setHostDefaults fills in what a host's section left out.
func (h *HostConfig) setDefaults() {
	if h.User == "" {
		h.User = "root"
	}
	if h.Ports == "" {
		h.Ports = defaultPorts
	}
	if h.MaxInstances == 0 {
		h.MaxInstances = defaultMaxInstances
	}
	if h.CacheGiB == 0 {
		h.CacheGiB = defaultCacheGiB
	}
	if h.PublicHost == "" {
		if host, _, err := net.SplitHostPort(h.Address); err == nil {
			h.PublicHost = host
		}
	}
}

// Validate implements config.Validator.
func (c Config) Validate() error {
	var p config.Problems
	if c.GuestBinary == "" {
		p.Add("backend.guest_binary", "missing")
	} else if _, err := os.Stat(string(c.GuestBinary)); err != nil {
		p.Add("backend.guest_binary", "%v", err)
	}
	if c.LeaseTTL.Duration < minLeaseTTL || c.LeaseTTL.Duration > maxLeaseTTL {
		p.Add("backend.lease_ttl", "%s is not between %s and %s", c.LeaseTTL.Duration, minLeaseTTL, maxLeaseTTL)
	}
	if c.StopGrace.Duration < time.Second || c.StopGrace.Duration > maxStopGrace {
		p.Add("backend.stop_grace", "%s is not between 1s and %s", c.StopGrace.Duration, maxStopGrace)
	}
	if c.UsageInterval.Duration < minUsageInterval {
		p.Add("backend.usage_interval", "%s is less than %s", c.UsageInterval.Duration, minUsageInterval)
	}
	for key, value := range map[string]time.Duration{"connect_timeout": c.ConnectTimeout.Duration, "ready_timeout": c.ReadyTimeout.Duration} {
		if value <= 0 {
			p.Add("backend."+key, "%s; must be positive", value)
		}
	}
	pool, err := netip.ParsePrefix(c.SubnetPool)
	switch {
	case err != nil:
		p.Add("backend.subnet_pool", "%v", err)
	case !pool.Addr().Is4() || pool.Bits() > subnetBits || pool != pool.Masked():
		p.Add("backend.subnet_pool", "%s is no IPv4 network of at least a /%d", pool, subnetBits)
	}
	if c.FirstUID < uidsPerSlot {
		p.Add("backend.first_uid", "%d is below %d: grants would share user ids with the host", c.FirstUID, uidsPerSlot)
	}
	for i, s := range c.DeniedEgress {
		if _, err := netip.ParsePrefix(s); err != nil {
			p.Add(config.Key("backend", "denied_egress", i), "%v", err)
		}
	}
	if c.ImageStore.Base == "" {
		p.Add("backend.image_store.base", "missing: a directory or an https:// URL")
	} else if _, err := imagestore.New(c.imageStore()); err != nil {
		p.Add("backend.image_store", "%v", err)
	}
	if len(c.Hosts) == 0 {
		p.Add("backend.host", "no [[backend.host]] section: there is no host to run grants on")
	}
	seen := map[string]string{}
	for i, h := range c.Hosts {
		h.setDefaults()
		h.validate(&p, i, seen)
		if slots := c.slots(pool); h.MaxInstances > slots {
			p.Add(config.Key("backend", "host", i, "max_instances"), "%d is more than subnet_pool and first_uid have room for (%d)", h.MaxInstances, slots)
		}
	}
	return p.Err()
}

// slots is how many grants a host can tell apart.
func (c Config) slots(pool netip.Prefix) int {
	bySubnet := 0
	if pool.IsValid() && pool.Bits() <= subnetBits {
		bySubnet = 1 << (subnetBits - pool.Bits())
	}
	return min(bySubnet, int((1<<32-1-int64(c.FirstUID))/uidsPerSlot))
}

func (h HostConfig) validate(p *config.Problems, i int, seen map[string]string) {
	add := func(key, format string, args ...any) { p.Add(config.Key("backend", "host", i, key), format, args...) }
	if !backend.ValidName(h.Name) {
		add("name", "%q: want [a-z][a-z0-9-]*, at most 32 bytes", h.Name)
	}
	for what, value := range map[string]string{"name": h.Name, "address": h.Address} {
		if value == "" {
			continue
		}
		if other, dup := seen[what+value]; dup {
			add(what, "%q is used by %s, too", value, other)
		}
		seen[what+value] = fmt.Sprintf("host %d", i)
	}
	if host, port, err := net.SplitHostPort(h.Address); err != nil || !hostName.MatchString(host) || !isPort(port) {
		add("address", "%q: want host:port", h.Address)
	}
	if h.PublicHost != "" && !hostName.MatchString(h.PublicHost) {
		add("public_host", "%q is neither a name nor an address", h.PublicHost)
	}
	if !userName.MatchString(h.User) {
		add("user", "%q: want [a-z_][a-z0-9_-]*, at most 32 bytes", h.User)
	}
	if h.FirewalldZone != "" && !zoneName.MatchString(h.FirewalldZone) {
		add("firewalld_zone", "%q: want [a-zA-Z0-9_/-], at most 17 bytes", h.FirewalldZone)
	}
	if h.KeyFile.Path() == "" {
		add("key_file", "missing")
	} else if _, err := ssh.ParsePrivateKey(h.KeyFile.Secret().Expose()); err != nil {
		add("key_file", "%v", err)
	}
	if len(h.HostKeys) == 0 {
		add("host_keys", "missing: the host's key must be pinned (see /etc/ssh/ssh_host_ed25519_key.pub on the host)")
	}
	for j, line := range h.HostKeys {
		if _, err := sshkey.ParsePublicKey(line); err != nil {
			p.Add(config.Key("backend", "host", i, "host_keys", j), "%v", err)
		}
	}
	if !backend.ValidRegion(h.Region) {
		add("region", "%q: want [a-z0-9-], at most 64 bytes", h.Region)
	}
	for key, value := range map[string]int64{"cpu_millicores": h.CPUMillicores, "ram_mib": h.RAMMiB, "storage_gib": h.StorageGiB} {
		if value < 1 {
			add(key, "is %d; must be positive", value)
		}
	}
	if h.MaxInstances < 1 {
		add("max_instances", "is %d; must be positive", h.MaxInstances)
	}
	if h.CacheGiB < 1 {
		add("cache_gib", "is %d; must be positive", h.CacheGiB)
	}
	if _, _, err := h.ports(); err != nil {
		add("ports", "%v", err)
	}
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// ports reads the port range.
func (h HostConfig) ports() (first, last uint16, err error) {
	from, to, ok := strings.Cut(h.Ports, "-")
	a, errA := strconv.ParseUint(from, 10, 16)
	b, errB := strconv.ParseUint(to, 10, 16)
	if !ok || errA != nil || errB != nil || a < 1024 || b < a {
		return 0, 0, fmt.Errorf("%q: want a range such as %s, from 1024 on", h.Ports, defaultPorts)
	}
	return uint16(a), uint16(b), nil
}

func (h HostConfig) inventory() inventory.Host {
	first, last, _ := h.ports() // validated
	return inventory.Host{
		Name: h.Name, Region: backend.Region(h.Region), MaxInstances: h.MaxInstances, FirstPort: first, LastPort: last,
		Capacity: backend.Shape{CPU: backend.Millicores(h.CPUMillicores), RAM: backend.MiB(h.RAMMiB), Storage: backend.GiB(h.StorageGiB)},
	}
}

func (c Config) imageStore() imagestore.Config {
	return imagestore.Config{Base: c.ImageStore.Base, Insecure: c.ImageStore.Insecure, MaxBytes: c.ImageStore.MaxMiB << 20}
}
