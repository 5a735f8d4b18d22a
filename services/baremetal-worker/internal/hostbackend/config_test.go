package hostbackend

import (
	"encoding/pem"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/config"
)

// validConfig is a configuration without problems.
func validConfig(t testing.TB) Config {
	t.Helper()
	key := newLogin(t)
	block, err := ssh.MarshalPrivateKey(key.private, "")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	var secret config.SecretFile
	loadKey(t, &secret, file)
	var c Config
	c.SetDefaults()
	c.GuestBinary = config.Path(file)
	c.ImageStore.Base = t.TempDir()
	c.Hosts = []HostConfig{{
		Name: "host-1", Address: "192.0.2.1:22", KeyFile: secret, HostKeys: []string{key.line},
		Region: "here", CPUMillicores: 1000, RAMMiB: 1024, StorageGiB: 10,
	}}
	return c
}

func TestEveryKeyOfTheConfigurationIsChecked(t *testing.T) {
	t.Parallel()
	if err := validConfig(t).Validate(); err != nil {
		t.Fatal(err)
	}
	host := func(change func(*HostConfig)) func(*Config) { return func(c *Config) { change(&c.Hosts[0]) } }
	for _, tt := range []struct {
		want   string
		change func(*Config)
	}{
		{"backend.guest_binary: missing", func(c *Config) { c.GuestBinary = "" }},
		{"backend.guest_binary: stat /no/such/guest", func(c *Config) { c.GuestBinary = "/no/such/guest" }},
		{"backend.lease_ttl: 1.999s is not between 2s and 1m0s", func(c *Config) { c.LeaseTTL.Duration = 1999 * time.Millisecond }},
		{"backend.lease_ttl: 1m1s is not between 2s and 1m0s", func(c *Config) { c.LeaseTTL.Duration = 61 * time.Second }},
		{"backend.stop_grace: 0s is not between", func(c *Config) { c.StopGrace.Duration = 0 }},
		{"backend.stop_grace: 31s is not between", func(c *Config) { c.StopGrace.Duration = 31 * time.Second }},
		{"backend.usage_interval: 0s is less than", func(c *Config) { c.UsageInterval.Duration = 0 }},
		{"backend.connect_timeout: ", func(c *Config) { c.ConnectTimeout.Duration = 0 }},
		{"backend.ready_timeout: ", func(c *Config) { c.ReadyTimeout.Duration = -time.Second }},
		{"backend.subnet_pool: ", func(c *Config) { c.SubnetPool = "10.0.0.0" }},
		{"backend.subnet_pool: 2001:db8::/64 is no IPv4", func(c *Config) { c.SubnetPool = "2001:db8::/64" }},
		{"backend.subnet_pool: 10.0.0.1/16 is no IPv4", func(c *Config) { c.SubnetPool = "10.0.0.1/16" }},
		{"backend.subnet_pool: 10.0.0.0/30 is no IPv4", func(c *Config) { c.SubnetPool = "10.0.0.0/30" }},
		{"backend.host[0].max_instances: 100 is more", func(c *Config) { c.SubnetPool = "10.0.0.0/24" }},
		{"backend.host[0].max_instances: 100 is more", func(c *Config) { c.FirstUID = 1<<32 - 10*uidsPerSlot }},
		{"backend.first_uid: 1000 is below", func(c *Config) { c.FirstUID = 1000 }},
		{"backend.denied_egress[0]: ", func(c *Config) { c.DeniedEgress = []string{"10.0.0.0/8; flush ruleset"} }},
		{"backend.image_store.base: missing", func(c *Config) { c.ImageStore.Base = "" }},
		{"backend.image_store: ", func(c *Config) { c.ImageStore.Base = "http://images.example.org/" }},
		{"backend.image_store: ", func(c *Config) { c.ImageStore.Base = "relative/directory" }},
		{"backend.image_store: ", func(c *Config) { c.ImageStore.MaxMiB = -1 }},
		{"backend.host: no [[backend.host]] section", func(c *Config) { c.Hosts = nil }},
		{"backend.host[1].name: \"host-1\" is used", func(c *Config) { c.Hosts = append(c.Hosts, c.Hosts[0]) }},
		{"backend.host[1].address: \"192.0.2.1:22\" is used", func(c *Config) { c.Hosts = append(c.Hosts, c.Hosts[0]) }},
		{"backend.host[0].name: \"\": want", host(func(h *HostConfig) { h.Name = "" })},
		{"backend.host[0].name: \"../x\": want", host(func(h *HostConfig) { h.Name = "../x" })},
		{"backend.host[0].address: \"192.0.2.1\": want host:port", host(func(h *HostConfig) { h.Address = "192.0.2.1" })},
		{"backend.host[0].address: \":22\": want host:port", host(func(h *HostConfig) { h.Address = ":22" })},
		{"backend.host[0].address: \"192.0.2.1:ssh\": want host:port", host(func(h *HostConfig) { h.Address = "192.0.2.1:ssh" })},
		{"backend.host[0].key_file: missing", host(func(h *HostConfig) { h.KeyFile = config.SecretFile{} })},
		{"backend.host[0].host_keys: missing", host(func(h *HostConfig) { h.HostKeys = nil })},
		{"backend.host[0].host_keys[0]: ", host(func(h *HostConfig) { h.HostKeys = []string{"ssh-ed25519 AAAA"} })},
		{"backend.host[0].region: \"%i\": want", host(func(h *HostConfig) { h.Region = "%i" })},
		{"backend.host[0].cpu_millicores: is 0", host(func(h *HostConfig) { h.CPUMillicores = 0 })},
		{"backend.host[0].ram_mib: is -1", host(func(h *HostConfig) { h.RAMMiB = -1 })},
		{"backend.host[0].storage_gib: is 0", host(func(h *HostConfig) { h.StorageGiB = 0 })},
		{"backend.host[0].max_instances: is -1", host(func(h *HostConfig) { h.MaxInstances = -1 })},
		{"backend.host[0].cache_gib: is -1", host(func(h *HostConfig) { h.CacheGiB = -1 })},
		{"backend.host[0].ports: \"40000\": want", host(func(h *HostConfig) { h.Ports = "40000" })},
		{"backend.host[0].ports: \"80-90\": want", host(func(h *HostConfig) { h.Ports = "80-90" })},
		{"backend.host[0].ports: \"50000-40000\": want", host(func(h *HostConfig) { h.Ports = "50000-40000" })},
		{"backend.host[0].ports: \"40000-70000\": want", host(func(h *HostConfig) { h.Ports = "40000-70000" })},
		{"backend.host[0].firewalld_zone: ", host(func(h *HostConfig) { h.FirewalldZone = "--zone x" })},
		{"backend.host[0].public_host: ", host(func(h *HostConfig) { h.PublicHost = "bad host" })},
		{"backend.host[0].user: ", host(func(h *HostConfig) { h.User = "root;reboot" })},
	} {
		t.Run(tt.want, func(t *testing.T) {
			c := validConfig(t)
			tt.change(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestSlotsShareNeitherAddressesNorUsers(t *testing.T) {
	t.Parallel()
	c := validConfig(t)
	pool := netip.MustParsePrefix(c.SubnetPool)
	slots := c.slots(pool)
	if slots != 1<<13 {
		t.Fatalf("%s has %d slots", pool, slots)
	}
	end := uint64(c.FirstUID)
	var last netip.Prefix
	for slot := range slots {
		subnet, first := c.subnet(slot), uint64(c.uidBase(slot))
		if first != end {
			t.Fatalf("slot %d: first uid %d, want %d", slot, first, end)
		}
		if end = first + uidsPerSlot; end > 1<<32-1 {
			t.Fatalf("slot %d: last uid %d", slot, end-1)
		}
		if !pool.Contains(subnet.Addr()) || subnet != subnet.Masked() || subnet.Bits() != subnetBits {
			t.Fatalf("slot %d: subnet %s", slot, subnet)
		}
		if last.IsValid() && (last.Overlaps(subnet) || !last.Addr().Less(subnet.Addr())) {
			t.Fatalf("slot %d: subnet %s after %s", slot, subnet, last)
		}
		last = subnet
	}
	for pool, want := range map[string]int{"10.0.0.0/29": 1, "10.0.0.0/24": 32, "10.0.0.0/8": 65519} {
		if got := c.slots(netip.MustParsePrefix(pool)); got != want {
			t.Errorf("%s has %d slots, want %d", pool, got, want)
		}
	}
}

func TestLeaseLastsAsConfigured(t *testing.T) {
	t.Parallel()
	d, err := newDirs("test")
	if err != nil {
		t.Fatal(err)
	}
	b := &Backend{dirs: d, guestSum: strings.Repeat("0f", 32)}
	b.config.LeaseTTL.Duration = 17 * time.Second
	if c, err := (&host{backend: b}).leaseConfig(); err != nil || c.TTL != 17*time.Second {
		t.Errorf("lease of %s, %v", c.TTL, err)
	}
}
