package backend

import (
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// GrantID is the key of a grant: the market's request id.
type GrantID [32]byte

// String returns the id as lower-case hex.
func (id GrantID) String() string { return hex.EncodeToString(id[:]) }

// ParseGrantID reads 64 hex digits, in either case.
func ParseGrantID(s string) (GrantID, error) {
	var id GrantID
	if len(s) != hex.EncodedLen(len(id)) {
		return GrantID{}, fmt.Errorf("grant id has %d characters, want %d hex digits", len(s), hex.EncodedLen(len(id)))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return GrantID{}, fmt.Errorf("grant id: %w", err)
	}
	return id, nil
}

// Handle names an instance to Watch and Terminate. It is opaque to clients;
// see [Handle.Split].
type Handle string

// MaxHops is how many routers a call may pass.
const MaxHops = 8

// HandleFor returns the handle that a worker gives to a grant's instance: the
// grant id. Routers put "name/" before it.
func HandleFor(id GrantID) Handle { return Handle(id.String()) }

// Via returns the handle as the router that calls this backend by name shows
// it.
func (h Handle) Via(name string) Handle { return Handle(name) + "/" + h }

// Split takes the first router hop off the handle. ok is false if there is
// none, which makes it a worker's handle.
func (h Handle) Split() (name string, rest Handle, ok bool) {
	name, r, ok := strings.Cut(string(h), "/")
	return name, Handle(r), ok
}

// GrantID returns the grant that a handle names, whatever its path.
func (h Handle) GrantID() (GrantID, error) {
	s := string(h)
	id, err := ParseGrantID(s[strings.LastIndexByte(s, '/')+1:])
	if err != nil {
		return GrantID{}, fmt.Errorf("handle: %w", err)
	}
	return id, nil
}

// InstanceID is a provider's own name of an instance.
type InstanceID string

// Region is an operator's region label.
type Region string

// Amounts of compute, each in the unit of its name.
type (
	// Millicores is CPU in thousandths of a core.
	Millicores int64
	// MiB is memory in units of 2^20 bytes.
	MiB int64
	// GiB is disk in units of 2^30 bytes.
	GiB int64
)

// Shape is the size of an instance, or an amount of capacity.
type Shape struct {
	CPU     Millicores
	RAM     MiB
	Storage GiB
}

// Fits reports whether s fits into room in every dimension.
func (s Shape) Fits(room Shape) bool {
	return s.CPU <= room.CPU && s.RAM <= room.RAM && s.Storage <= room.Storage
}

// String returns the shape for people.
func (s Shape) String() string {
	return fmt.Sprintf("%d millicores, %d MiB, %d GiB", s.CPU, s.RAM, s.Storage)
}

// Add returns s + t. It saturates instead of wrapping.
func (s Shape) Add(t Shape) Shape {
	return Shape{CPU: addSat(s.CPU, t.CPU), RAM: addSat(s.RAM, t.RAM), Storage: addSat(s.Storage, t.Storage)}
}

// Sub returns s - t, which may be negative when a host is over-committed. It
// saturates instead of wrapping.
func (s Shape) Sub(t Shape) Shape {
	return Shape{CPU: subSat(s.CPU, t.CPU), RAM: subSat(s.RAM, t.RAM), Storage: subSat(s.Storage, t.Storage)}
}

// Times returns s taken n times. It saturates instead of wrapping.
func (s Shape) Times(n int64) Shape {
	return Shape{CPU: mulSat(s.CPU, n), RAM: mulSat(s.RAM, n), Storage: mulSat(s.Storage, n)}
}

// Max returns the larger of s and t in each dimension.
func (s Shape) Max(t Shape) Shape {
	return Shape{CPU: max(s.CPU, t.CPU), RAM: max(s.RAM, t.RAM), Storage: max(s.Storage, t.Storage)}
}

const (
	maxInt64 = 1<<63 - 1
	minInt64 = -1 << 63
)

func addSat[T ~int64](a, b T) T {
	sum := a + b
	switch {
	case a > 0 && b > 0 && sum < 0:
		return maxInt64
	case a < 0 && b < 0 && sum >= 0:
		return minInt64
	}
	return sum
}

func subSat[T ~int64](a, b T) T {
	difference := a - b
	switch {
	case a >= 0 && b < 0 && difference < 0:
		return maxInt64
	case a < 0 && b > 0 && difference >= 0:
		return minInt64
	}
	return difference
}

func mulSat[T ~int64](a T, n int64) T {
	if a == 0 || n == 0 {
		return 0
	}
	product := int64(a) * n
	if product/n != int64(a) || (int64(a) == minInt64 && n == -1) {
		if (a < 0) == (n < 0) {
			return maxInt64
		}
		return minInt64
	}
	return T(product)
}

// Isolation is how strongly an instance is kept apart. Larger is stronger.
type Isolation int32

// The isolation levels, with the numbers of the wire.
const (
	IsolationContainer Isolation = 1
	IsolationVM        Isolation = 2
	IsolationTDX       Isolation = 3
)

// String returns "container", "vm" or "tdx".
func (i Isolation) String() string {
	switch i {
	case IsolationContainer:
		return "container"
	case IsolationVM:
		return "vm"
	case IsolationTDX:
		return "tdx"
	}
	return fmt.Sprintf("isolation(%d)", int32(i))
}

// DigestAlgorithm names a hash function with a 32-byte result.
type DigestAlgorithm int32

// The hash functions, with the numbers of the wire.
const (
	SHA256 DigestAlgorithm = 1
	BLAKE3 DigestAlgorithm = 2
)

// String returns "sha256" or "blake3".
func (a DigestAlgorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case BLAKE3:
		return "blake3"
	}
	return fmt.Sprintf("digest(%d)", int32(a))
}

// Digest is a hash with its algorithm.
type Digest struct {
	Algorithm DigestAlgorithm
	Sum       [32]byte
}

// String returns "sha256:<hex>".
func (d Digest) String() string { return d.Algorithm.String() + ":" + hex.EncodeToString(d.Sum[:]) }

// ParseDigest reads "sha256:<64 hex digits>" or "blake3:…".
func ParseDigest(s string) (Digest, error) {
	name, sum, ok := strings.Cut(s, ":")
	var d Digest
	switch {
	case !ok:
		return Digest{}, fmt.Errorf("digest %q has no algorithm; want sha256:<hex> or blake3:<hex>", s)
	case name == "sha256":
		d.Algorithm = SHA256
	case name == "blake3":
		d.Algorithm = BLAKE3
	default:
		return Digest{}, fmt.Errorf("digest %q: unknown algorithm %q; want sha256 or blake3", s, name)
	}
	if len(sum) != hex.EncodedLen(len(d.Sum)) {
		return Digest{}, fmt.Errorf("digest %q has %d hex digits, want %d", s, len(sum), hex.EncodedLen(len(d.Sum)))
	}
	if _, err := hex.Decode(d.Sum[:], []byte(sum)); err != nil {
		return Digest{}, fmt.Errorf("digest %q: %w", s, err)
	}
	return d, nil
}

// ImageKind tells how an image's bytes are read.
type ImageKind int32

// The kinds of image, with the numbers of the wire.
const (
	ImageOCIArchive   ImageKind = 1
	ImageOCIReference ImageKind = 2
	ImageDisk         ImageKind = 3
	ImageTDBundle     ImageKind = 4
)

// String returns the kind for people.
func (k ImageKind) String() string {
	switch k {
	case ImageOCIArchive:
		return "OCI archive"
	case ImageOCIReference:
		return "OCI reference"
	case ImageDisk:
		return "disk image"
	case ImageTDBundle:
		return "TD bundle"
	}
	return fmt.Sprintf("image kind %d", int32(k))
}

// Image says which bytes are to run.
type Image struct {
	Digest Digest
	Kind   ImageKind
}

// Protocol is a transport protocol.
type Protocol int32

// The protocols, with the numbers of the wire.
const (
	TCP Protocol = 1
	UDP Protocol = 2
)

// String returns "tcp" or "udp".
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("protocol(%d)", int32(p))
}

// Port is a port that a workload listens on.
type Port struct {
	Number   uint16
	Protocol Protocol
}

// String returns "8080/tcp".
func (p Port) String() string { return fmt.Sprintf("%d/%s", p.Number, p.Protocol) }

// NetworkMode is how far a workload's own connections may go.
type NetworkMode int32

// The network modes, with the numbers of the wire.
const (
	NetworkOpen      NetworkMode = 1
	NetworkAllowlist NetworkMode = 2
)

// String returns "open" or "allowlist".
func (m NetworkMode) String() string {
	switch m {
	case NetworkOpen:
		return "open"
	case NetworkAllowlist:
		return "allowlist"
	}
	return fmt.Sprintf("network mode %d", int32(m))
}

// NetworkPolicy says what a workload may reach.
type NetworkPolicy struct {
	Mode NetworkMode
	// AllowedPrefixes, with NetworkAllowlist: where new connections may go, in
	// CIDR notation.
	AllowedPrefixes []string
}

// Grant is what the market committed.
type Grant struct {
	ID GrantID
	// ProviderID is the market's name of the provider, empty or 32 bytes.
	ProviderID []byte
	// PostHash is the market's identity of the image.
	PostHash     [32]byte
	Image        Image
	Shape        Shape
	MinIsolation Isolation
	// Region is empty when any region does.
	Region      Region
	Ports       []Port
	Environment map[string]string
	Network     NetworkPolicy
	// ValidTo is when the instance ends at the latest.
	ValidTo time.Time
	// AlmanacSequence correlates ValidTo with the market's almanac. It is not a
	// clock.
	AlmanacSequence uint64
}

// Envelope is what the requester sent along with its request.
type Envelope struct {
	PeerID []byte
	// X25519PublicKey is empty or 32 bytes.
	X25519PublicKey []byte
	// SSHPublicKey is one authorized_keys line without options, or empty.
	SSHPublicKey string
	PostHash     [32]byte
	// ImagePointer is where in the image store the image is; empty: under its
	// digest.
	ImagePointer string
	RegionHint   Region
	Nonce        []byte
}

// WithRegionHint returns the grant with the requester's hint as its region, if
// it has none of its own.
func (g Grant) WithRegionHint(hint Region) Grant {
	if g.Region == "" {
		g.Region = hint
	}
	return g
}
