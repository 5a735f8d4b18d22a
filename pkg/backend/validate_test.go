package backend

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

const longest = 24 * time.Hour

// An Ed25519 public key: the type, then 32 bytes.
var someSSHKey = sshLine("ssh-ed25519", "ssh-ed25519", 32)

// sshLine is an authorized_keys line of one type with a blob of another.
func sshLine(kind, blobKind string, size int) string {
	blob := append([]byte{0, 0, 0, byte(len(blobKind))}, blobKind...)
	blob = append(append(blob, 0, 0, 0, byte(size)), make([]byte, size)...)
	return kind + " " + base64.StdEncoding.EncodeToString(blob)
}

var someTime = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func validGrant() (Grant, Envelope) {
	g := Grant{
		ID: GrantID{1}, ProviderID: make([]byte, 32), PostHash: [32]byte{2},
		Image:        Image{Digest: Digest{Algorithm: SHA256, Sum: [32]byte{3}}, Kind: ImageOCIArchive},
		Shape:        Shape{CPU: 1000, RAM: 512, Storage: 1},
		MinIsolation: IsolationContainer, Region: "eu-west-1",
		Ports:       []Port{{80, TCP}, {80, UDP}, {65535, TCP}},
		Environment: map[string]string{"A": "", "_b9": "a=b $HOME %i"},
		Network:     NetworkPolicy{Mode: NetworkAllowlist, AllowedPrefixes: []string{"192.0.2.0/24", "2001:db8::/32"}},
		ValidTo:     someTime.Add(time.Hour),
	}
	e := Envelope{
		PeerID: []byte("peer"), X25519PublicKey: make([]byte, 32), SSHPublicKey: someSSHKey, PostHash: g.PostHash,
		ImagePointer: "images/a.tar", RegionHint: "eu", Nonce: []byte("nonce"),
	}
	return g, e
}

// fieldsOf returns the violated fields of GRANT_INVALID, sorted.
func fieldsOf(t *testing.T, err error) []string {
	t.Helper()
	var e *backenderr.Error
	if !errors.As(err, &e) || e.Reason != backenderr.GrantInvalid {
		t.Fatalf("got %v, want GRANT_INVALID", err)
	}
	if e.Created != backenderr.CreatedNone {
		t.Error("a grant that is refused at sight may have created something")
	}
	var fields []string
	for _, v := range e.Violations {
		if v.Description == "" || !strings.Contains(err.Error(), v.Description) {
			t.Errorf("the text %q lacks what is wrong with %s: %q", err, v.Field, v.Description)
		}
		fields = append(fields, v.Field)
	}
	slices.Sort(fields)
	return fields
}

func TestValidGrantsPass(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Grant, *Envelope){
		"as it is":             func(*Grant, *Envelope) {},
		"the least":            func(g *Grant, _ *Envelope) { g.Shape = cube(1) },
		"the most":             func(g *Grant, _ *Envelope) { g.Shape = Shape{CPU: MaxCPU, RAM: MaxRAM, Storage: MaxStorage} },
		"no provider":          func(g *Grant, _ *Envelope) { g.ProviderID = nil },
		"no region":            func(g *Grant, e *Envelope) { g.Region, e.RegionHint = "", "" },
		"no network policy":    func(g *Grant, _ *Envelope) { g.Network = NetworkPolicy{} },
		"open network":         func(g *Grant, _ *Envelope) { g.Network = NetworkPolicy{Mode: NetworkOpen} },
		"nothing is allowed":   func(g *Grant, _ *Envelope) { g.Network = NetworkPolicy{Mode: NetworkAllowlist} },
		"no keys":              func(_ *Grant, e *Envelope) { e.X25519PublicKey, e.SSHPublicKey = nil, "" },
		"key with a comment":   func(_ *Grant, e *Envelope) { e.SSHPublicKey += " a b c\n" },
		"the last moment":      func(g *Grant, _ *Envelope) { g.ValidTo = someTime.Add(longest) },
		"the first moment":     func(g *Grant, _ *Envelope) { g.ValidTo = someTime.Add(1) },
		"other time zone":      func(g *Grant, _ *Envelope) { g.ValidTo = g.ValidTo.In(time.FixedZone("x", 3600*9)) },
		"any pointer":          func(_ *Grant, e *Envelope) { e.ImagePointer = "../$(id) %i ; drop" },
		"BLAKE3 and TD bundle": func(g *Grant, _ *Envelope) { g.Image.Digest.Algorithm, g.Image.Kind = BLAKE3, ImageTDBundle },
		"all ports": func(g *Grant, _ *Envelope) {
			g.Ports = nil
			for i := range MaxPorts {
				g.Ports = append(g.Ports, Port{uint16(i + 1), UDP})
			}
		},
		"largest environment": func(g *Grant, _ *Envelope) {
			g.Environment = map[string]string{}
			for i := range 4 {
				g.Environment[string(rune('a'+i))] = strings.Repeat("v", 8191)
			}
		},
	} {
		g, e := validGrant()
		change(&g, &e)
		if err := Validate(g, e, someTime, longest); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := ValidateGrant(g, someTime, longest); err != nil {
			t.Errorf("%s, without the envelope: %v", name, err)
		}
	}
}

func TestEachViolationNamesItsField(t *testing.T) {
	t.Parallel()
	const envelope, grant = "envelope.", "grant."
	type change = func(*Grant, *Envelope)
	cases := []struct {
		name   string
		change change
		fields []string
	}{
		{"no id", func(g *Grant, _ *Envelope) { g.ID = GrantID{} }, []string{"grant.request_id"}},
		{"short provider", func(g *Grant, _ *Envelope) { g.ProviderID = make([]byte, 31) }, []string{"grant.provider_id"}},
		{"long provider", func(g *Grant, _ *Envelope) { g.ProviderID = make([]byte, 33) }, []string{"grant.provider_id"}},
		{"no digest", func(g *Grant, _ *Envelope) { g.Image.Digest.Sum = [32]byte{} }, []string{"grant.image.digest.value"}},
		{"no algorithm", func(g *Grant, _ *Envelope) { g.Image.Digest.Algorithm = 0 }, []string{"grant.image.digest.algorithm"}},
		{"unknown algorithm", func(g *Grant, _ *Envelope) { g.Image.Digest.Algorithm = 3 }, []string{"grant.image.digest.algorithm"}},
		{"no image at all", func(g *Grant, _ *Envelope) { g.Image = Image{} }, []string{"grant.image.digest.algorithm", "grant.image.kind"}},
		{"unknown kind", func(g *Grant, _ *Envelope) { g.Image.Kind = 5 }, []string{"grant.image.kind"}},
		{"negative kind", func(g *Grant, _ *Envelope) { g.Image.Kind = -1 }, []string{"grant.image.kind"}},
		{"no isolation", func(g *Grant, _ *Envelope) { g.MinIsolation = 0 }, []string{"grant.min_isolation"}},
		{"unknown isolation", func(g *Grant, _ *Envelope) { g.MinIsolation = 4 }, []string{"grant.min_isolation"}},
		{"no deadline", func(g *Grant, _ *Envelope) { g.ValidTo = time.Time{} }, []string{"grant.valid_to"}},
		{"deadline past", func(g *Grant, _ *Envelope) { g.ValidTo = someTime.Add(-time.Second) }, []string{"grant.valid_to"}},
		{"deadline now", func(g *Grant, _ *Envelope) { g.ValidTo = someTime }, []string{"grant.valid_to"}},
		{"deadline too far", func(g *Grant, _ *Envelope) { g.ValidTo = someTime.Add(longest + 1) }, []string{"grant.valid_to"}},
		{"deadline in a thousand years", func(g *Grant, _ *Envelope) { g.ValidTo = someTime.AddDate(1000, 0, 0) }, []string{"grant.valid_to"}},
		{"deadline at the epoch", func(g *Grant, _ *Envelope) { g.ValidTo = time.Unix(0, 0) }, []string{"grant.valid_to"}},

		{"port 0", func(g *Grant, _ *Envelope) { g.Ports = []Port{{0, TCP}} }, []string{"grant.ports[0].number"}},
		{"port twice", func(g *Grant, _ *Envelope) { g.Ports = []Port{{80, TCP}, {80, UDP}, {80, TCP}} }, []string{"grant.ports[2]"}},
		{"no protocol", func(g *Grant, _ *Envelope) { g.Ports = []Port{{80, TCP}, {80, 0}} }, []string{"grant.ports[1].protocol"}},
		{"unknown protocol", func(g *Grant, _ *Envelope) { g.Ports = []Port{{80, 3}} }, []string{"grant.ports[0].protocol"}},
		{"too many ports", func(g *Grant, _ *Envelope) { g.Ports = make([]Port, MaxPorts+1) }, []string{"grant.ports"}},

		{"too much environment", func(g *Grant, _ *Envelope) {
			g.Environment = map[string]string{}
			for i := range 5 {
				g.Environment[string(rune('a'+i))] = strings.Repeat("v", 8000)
			}
		}, []string{"grant.environment"}},
		{"too many variables", func(g *Grant, _ *Envelope) {
			g.Environment = map[string]string{}
			for i := range 129 {
				g.Environment[fmt.Sprint("v", i)] = ""
			}
		}, []string{"grant.environment"}},

		{"unknown network mode", func(g *Grant, _ *Envelope) { g.Network = NetworkPolicy{Mode: 3} }, []string{"grant.network_policy.mode"}},
		{"prefixes without allowlist", func(g *Grant, _ *Envelope) { g.Network.Mode = NetworkOpen }, []string{"grant.network_policy.allowed_prefixes"}},
		{"too many prefixes", func(g *Grant, _ *Envelope) {
			g.Network.AllowedPrefixes = slices.Repeat([]string{"192.0.2.0/24"}, MaxPrefixes+1)
		}, []string{"grant.network_policy.allowed_prefixes"}},
		{"the same prefix twice", func(g *Grant, _ *Envelope) {
			g.Network.AllowedPrefixes = []string{"192.0.2.0/24", "198.51.100.0/24", "192.0.2.0/24"}
		}, []string{"grant.network_policy.allowed_prefixes[2]"}},

		{"long peer id", func(_ *Grant, e *Envelope) { e.PeerID = make([]byte, 65) }, []string{"envelope.peer_id"}},
		{"short x25519 key", func(_ *Grant, e *Envelope) { e.X25519PublicKey = make([]byte, 31) }, []string{"envelope.x25519_public_key"}},
		{"long x25519 key", func(_ *Grant, e *Envelope) { e.X25519PublicKey = make([]byte, 33) }, []string{"envelope.x25519_public_key"}},
		{"long pointer", func(_ *Grant, e *Envelope) { e.ImagePointer = strings.Repeat("p", 1025) }, []string{"envelope.image_pointer"}},
		{"pointer with bad UTF-8", func(_ *Grant, e *Envelope) { e.ImagePointer = "a\xff" }, []string{"envelope.image_pointer"}},
		{"value with bad UTF-8", func(g *Grant, _ *Envelope) { g.Environment = map[string]string{"A": "a\xff"} }, []string{`grant.environment["A"]`}},
		{"long nonce", func(_ *Grant, e *Envelope) { e.Nonce = make([]byte, 65) }, []string{"envelope.nonce"}},
		{"several at once", func(g *Grant, e *Envelope) {
			g.ID, g.Shape.RAM, e.Nonce = GrantID{}, 0, make([]byte, 65)
		}, []string{"envelope.nonce", "grant.request_id", "grant.shape.ram_mib"}},
	}
	for _, n := range []int64{0, -1, math.MinInt64, math.MaxInt64} {
		cases = append(cases, []struct {
			name   string
			change change
			fields []string
		}{
			{fmt.Sprint("CPU ", n), func(g *Grant, _ *Envelope) { g.Shape.CPU = Millicores(n) }, []string{"grant.shape.cpu_millicores"}},
			{fmt.Sprint("RAM ", n), func(g *Grant, _ *Envelope) { g.Shape.RAM = MiB(n) }, []string{"grant.shape.ram_mib"}},
			{fmt.Sprint("storage ", n), func(g *Grant, _ *Envelope) { g.Shape.Storage = GiB(n) }, []string{"grant.shape.storage_gib"}},
		}...)
	}
	cases = append(cases, struct {
		name   string
		change change
		fields []string
	}{
		"one above each limit", func(g *Grant, _ *Envelope) { g.Shape = Shape{MaxCPU + 1, MaxRAM + 1, MaxStorage + 1} },
		[]string{"grant.shape.cpu_millicores", "grant.shape.ram_mib", "grant.shape.storage_gib"},
	})
	for _, region := range []string{"EU", "eu_west", "-eu", "eu-", "eu west", "eu/west", "../eu", "eu\n", "é", strings.Repeat("r", 65), "%i", "$HOME"} {
		cases = append(cases, []struct {
			name   string
			change change
			fields []string
		}{
			{fmt.Sprintf("region %q", region), func(g *Grant, _ *Envelope) { g.Region = Region(region) }, []string{grant + "region"}},
			{fmt.Sprintf("hint %q", region), func(_ *Grant, e *Envelope) { e.RegionHint = Region(region) }, []string{envelope + "region_hint"}},
		}...)
	}
	for _, name := range []string{"", "A=B", "A\n", "A\x00", "1A", "A-B", "A B", "É", "%i", "$A", strings.Repeat("A", 129)} {
		cases = append(cases, struct {
			name   string
			change change
			fields []string
		}{
			fmt.Sprintf("variable named %q", name), func(g *Grant, _ *Envelope) { g.Environment = map[string]string{name: "v"} },
			[]string{fmt.Sprintf("grant.environment[%q]", name)},
		})
	}
	for _, value := range []string{"a\nb", "a\r", "\x00", strings.Repeat("v", 8193)} {
		cases = append(cases, struct {
			name   string
			change change
			fields []string
		}{fmt.Sprintf("value %.10q", value), func(g *Grant, _ *Envelope) { g.Environment = map[string]string{"A": value} }, []string{`grant.environment["A"]`}})
	}
	for _, prefix := range []string{"", "192.0.2.1/24", "192.0.2.0", "192.0.2.0/33", "2001:db8::1/32", "::ffff:192.0.2.0/120", "fe80::%eth0/64", "any", "0.0.0.0/0 ; flush ruleset", "192.0.2.0/024"} {
		cases = append(cases, struct {
			name   string
			change change
			fields []string
		}{fmt.Sprintf("prefix %q", prefix), func(g *Grant, _ *Envelope) { g.Network.AllowedPrefixes = []string{"192.0.2.0/24", prefix} }, []string{"grant.network_policy.allowed_prefixes[1]"}})
	}
	for _, key := range []string{
		" ", "ssh-ed25519", "ssh-ed25519 !!!", "ssh-ed25519 AAAA", "ssh-ed25519 ", `no-pty ` + someSSHKey, `command="id" ` + someSSHKey,
		sshLine("ssh-ed25519", "ssh-rsa", 32), someSSHKey + "\n" + someSSHKey, "\x00", someSSHKey + " a\rb", someSSHKey + " " + strings.Repeat("c", 8192),
		"-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-ed25519 /////w==", someSSHKey + " a\xff",
	} {
		cases = append(cases, struct {
			name   string
			change change
			fields []string
		}{fmt.Sprintf("key %.40q", key), func(_ *Grant, e *Envelope) { e.SSHPublicKey = key }, []string{"envelope.ssh_public_key"}})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g, e := validGrant()
			c.change(&g, &e)
			err := Validate(g, e, someTime, longest)
			if got := fieldsOf(t, err); !slices.Equal(got, c.fields) {
				t.Errorf("fields %q, want %q: %v", got, c.fields, err)
			}
			// Without the envelope, only what is wrong with the grant counts.
			var ofGrant []string
			for _, f := range c.fields {
				if strings.HasPrefix(f, grant) {
					ofGrant = append(ofGrant, f)
				}
			}
			switch err := ValidateGrant(g, someTime, longest); {
			case len(ofGrant) == 0 && err != nil:
				t.Errorf("the grant alone is refused: %v", err)
			case len(ofGrant) > 0 && !slices.Equal(fieldsOf(t, err), ofGrant):
				t.Errorf("the grant alone: %v, want %q", err, ofGrant)
			}
		})
	}
}

func TestDifferentPostHashesAreAnImageMismatch(t *testing.T) {
	t.Parallel()
	g, e := validGrant()
	e.PostHash[31]++
	err := Validate(g, e, someTime, longest)
	if !backenderr.Is(err, backenderr.ImageMismatch) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("got %v", err)
	}
	// What is malformed is said first: the hashes may be a consequence.
	g.ID = GrantID{}
	if err := Validate(g, e, someTime, longest); !backenderr.Is(err, backenderr.GrantInvalid) {
		t.Errorf("a malformed grant with another hash: %v", err)
	}
}

func TestValidNames(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "metal-1", strings.Repeat("a", 32)} {
		if !ValidName(s) {
			t.Errorf("%q is no name", s)
		}
	}
	for _, s := range []string{"", "1a", "-a", "A", "a_b", "a/b", "a\n", strings.Repeat("a", 33), "é"} {
		if ValidName(s) {
			t.Errorf("%q is a name", s)
		}
	}
}

func FuzzSSHPublicKey(f *testing.F) {
	f.Add(someSSHKey)
	f.Add("ssh-ed25519 AAAA")
	f.Add("ssh-ed25519 /////w==")
	f.Add("\x00")
	f.Fuzz(func(t *testing.T, line string) {
		g, e := validGrant()
		e.SSHPublicKey = line
		if err := Validate(g, e, someTime, longest); err == nil && strings.ContainsAny(strings.TrimRight(line, "\n"), "\n\r\x00") {
			t.Errorf("%q is one line", line)
		}
	})
}
