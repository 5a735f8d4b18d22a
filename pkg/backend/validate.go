package backend

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Bounds of a grant, the same as in the proto files.
const (
	// MaxCPU is 4096 cores.
	MaxCPU Millicores = 4096 * 1000
	// MaxRAM is 64 TiB.
	MaxRAM MiB = 64 << 20
	// MaxStorage is 1 PiB.
	MaxStorage GiB = 1 << 20
	// MaxPorts is how many ports a grant may publish.
	MaxPorts = 32
	// MaxEnvironmentBytes bounds names and values of the environment in all.
	MaxEnvironmentBytes = 32 << 10
	// MaxPrefixes bounds a network policy.
	MaxPrefixes = 64
)

var (
	environmentName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	regionLabel     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	nameLabel       = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
)

// ValidRegion reports whether s can be a region label.
func ValidRegion(s string) bool { return len(s) <= 64 && regionLabel.MatchString(s) }

// ValidName reports whether s can be the name of a backend or a bridge.
func ValidName(s string) bool { return len(s) <= 32 && nameLabel.MatchString(s) }

// ValidateGrant checks everything about a grant that depends on nothing but
// the grant and the time. It returns GRANT_INVALID with every violation, or
// nil. now decides whether the deadline is past; a deadline later than
// maxDuration from now is refused, so that a slip of the market's pen does not
// hold a machine for a century.
func ValidateGrant(g Grant, now time.Time, maxDuration time.Duration) error {
	v := violations{}
	v.grant(g, now, maxDuration)
	return v.err()
}

// Validate checks a grant with its envelope. It returns GRANT_INVALID with
// every violation, IMAGE_MISMATCH, or nil. How a login key is made of the
// envelope is the worker's to check.
func Validate(g Grant, e Envelope, now time.Time, maxDuration time.Duration) error {
	v := violations{}
	v.grant(g, now, maxDuration)
	v.envelope(e)
	if err := v.err(); err != nil {
		return err
	}
	if g.PostHash != e.PostHash {
		return backenderr.New(backenderr.ImageMismatch, "grant.post_hash %x and envelope.post_hash %x differ: grant and request are for different images",
			g.PostHash, e.PostHash).WithCreated(backenderr.CreatedNone)
	}
	return nil
}

type violations []backenderr.Violation

func (v *violations) add(field, format string, args ...any) {
	*v = append(*v, backenderr.Violation{Field: field, Description: fmt.Sprintf(format, args...)})
}

func (v violations) err() error {
	if len(v) == 0 {
		return nil
	}
	return backenderr.Invalid(backenderr.GrantInvalid, v...)
}

func inRange[T ~int64](v *violations, field string, value, limit T) {
	if value < 1 || value > limit {
		v.add(field, "is %d; must be from 1 to %d", value, limit)
	}
}

func (v *violations) grant(g Grant, now time.Time, maxDuration time.Duration) {
	if g.ID == (GrantID{}) {
		v.add("grant.request_id", "must be 32 bytes, not all zero")
	}
	if n := len(g.ProviderID); n != 0 && n != 32 {
		v.add("grant.provider_id", "has %d bytes; must be empty or 32", n)
	}
	if d := g.Image.Digest; d.Algorithm != SHA256 && d.Algorithm != BLAKE3 {
		v.add("grant.image.digest.algorithm", "must be sha256 or blake3")
	} else if d.Sum == ([32]byte{}) {
		v.add("grant.image.digest.value", "must be 32 bytes, not all zero")
	}
	if g.Image.Kind < ImageOCIArchive || g.Image.Kind > ImageTDBundle {
		v.add("grant.image.kind", "must be one of the kinds of image")
	}
	inRange(v, "grant.shape.cpu_millicores", g.Shape.CPU, MaxCPU)
	inRange(v, "grant.shape.ram_mib", g.Shape.RAM, MaxRAM)
	inRange(v, "grant.shape.storage_gib", g.Shape.Storage, MaxStorage)
	if g.MinIsolation < IsolationContainer || g.MinIsolation > IsolationTDX {
		v.add("grant.min_isolation", "must be container, vm or tdx")
	}
	if g.Region != "" && !ValidRegion(string(g.Region)) {
		v.add("grant.region", "%q is no region label ([a-z0-9-], at most 64)", g.Region)
	}
	v.ports(g.Ports)
	v.environment(g.Environment)
	v.network(g.Network)
	switch {
	case g.ValidTo.IsZero():
		v.add("grant.valid_to", "is missing")
	case !g.ValidTo.After(now):
		v.add("grant.valid_to", "%s is in the past", g.ValidTo.UTC().Format(time.RFC3339))
	case g.ValidTo.Sub(now) > maxDuration:
		v.add("grant.valid_to", "%s is more than %s from now", g.ValidTo.UTC().Format(time.RFC3339), maxDuration)
	}
}

func (v *violations) ports(ports []Port) {
	if len(ports) > MaxPorts {
		v.add("grant.ports", "has %d ports; at most %d are allowed", len(ports), MaxPorts)
		return
	}
	seen := make(map[Port]bool, len(ports))
	for i, p := range ports {
		field := fmt.Sprintf("grant.ports[%d]", i)
		switch {
		case p.Number == 0:
			v.add(field+".number", "must be from 1 to 65535")
		case p.Protocol != TCP && p.Protocol != UDP:
			v.add(field+".protocol", "must be tcp or udp")
		case seen[p]:
			v.add(field, "%s is named twice", p)
		}
		seen[p] = true
	}
}

func (v *violations) environment(env map[string]string) {
	size := 0
	for name, value := range env {
		size += len(name) + len(value)
		field := fmt.Sprintf("grant.environment[%q]", name)
		if !environmentName.MatchString(name) || len(name) > 128 {
			v.add(field, "the name must match [A-Za-z_][A-Za-z0-9_]* and have at most 128 bytes")
		}
		switch {
		case strings.ContainsAny(value, "\x00\r\n"):
			v.add(field, "the value must not contain NUL or line breaks")
		case !utf8.ValidString(value):
			v.add(field, "the value is not UTF-8")
		case len(value) > 8192:
			v.add(field, "the value has %d bytes; at most 8192 are allowed", len(value))
		}
	}
	if len(env) > 128 || size > MaxEnvironmentBytes {
		v.add("grant.environment", "has %d entries of %d bytes; at most 128 of %d are allowed", len(env), size, MaxEnvironmentBytes)
	}
}

func (v *violations) network(n NetworkPolicy) {
	const field = "grant.network_policy"
	switch {
	case n.Mode != NetworkOpen && n.Mode != NetworkAllowlist && n.Mode != 0:
		v.add(field+".mode", "must be open or allowlist")
	case n.Mode != NetworkAllowlist && len(n.AllowedPrefixes) > 0:
		v.add(field+".allowed_prefixes", "needs mode allowlist")
	case len(n.AllowedPrefixes) > MaxPrefixes:
		v.add(field+".allowed_prefixes", "has %d entries; at most %d are allowed", len(n.AllowedPrefixes), MaxPrefixes)
		return
	}
	seen := make(map[string]bool, len(n.AllowedPrefixes))
	for i, s := range n.AllowedPrefixes {
		field := fmt.Sprintf("%s.allowed_prefixes[%d]", field, i)
		// An IPv4 prefix in IPv6's clothes would match nothing in a firewall.
		if p, err := netip.ParsePrefix(s); err != nil || p != p.Masked() || p.Addr().Is4In6() {
			v.add(field, "%q is no network prefix such as 192.0.2.0/24", s)
		} else if seen[s] {
			v.add(field, "%q is named twice", s)
		}
		seen[s] = true
	}
}

func (v *violations) envelope(e Envelope) {
	if len(e.PeerID) > 64 {
		v.add("envelope.peer_id", "has %d bytes; at most 64 are allowed", len(e.PeerID))
	}
	if n := len(e.X25519PublicKey); n != 0 && n != 32 {
		v.add("envelope.x25519_public_key", "has %d bytes; must be empty or 32", n)
	}
	if e.SSHPublicKey != "" {
		if problem := sshPublicKeyProblem(e.SSHPublicKey); problem != "" {
			v.add("envelope.ssh_public_key", "%s", problem)
		}
	}
	if len(e.ImagePointer) > 1024 {
		v.add("envelope.image_pointer", "has %d bytes; at most 1024 are allowed", len(e.ImagePointer))
	} else if !utf8.ValidString(e.ImagePointer) {
		v.add("envelope.image_pointer", "is not UTF-8")
	}
	if e.RegionHint != "" && !ValidRegion(string(e.RegionHint)) {
		v.add("envelope.region_hint", "%q is no region label ([a-z0-9-], at most 64)", e.RegionHint)
	}
	if len(e.Nonce) > 64 {
		v.add("envelope.nonce", "has %d bytes; at most 64 are allowed", len(e.Nonce))
	}
}

// sshPublicKeyProblem says what is wrong with the form of an authorized_keys
// line: one line, type and base64 of which the blob begins with the same type
// (RFC 4253, 6.6). The key itself is checked by the worker, which links an SSH
// library; routers don't.
func sshPublicKeyProblem(line string) string {
	if len(line) > 8192 || strings.ContainsAny(strings.TrimRight(line, "\n"), "\x00\r\n") || !utf8.ValidString(line) {
		return "must be one line of at most 8192 bytes of UTF-8"
	}
	fields := strings.Fields(line)
	if len(fields) < 2 {
		return "must be a line such as \"ssh-ed25519 AAAA… comment\""
	}
	blob, err := base64.StdEncoding.DecodeString(fields[1])
	if err != nil || len(blob) < 4 {
		return "must begin with key type and base64, without options"
	}
	n, rest := binary.BigEndian.Uint32(blob), blob[4:]
	if uint64(n) > uint64(len(rest)) || string(rest[:n]) != fields[0] {
		return fmt.Sprintf("is no key of type %q", fields[0])
	}
	return ""
}
