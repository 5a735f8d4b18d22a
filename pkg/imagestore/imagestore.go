// Package imagestore fetches images from a store that the operator chose, by
// digest.
//
// A store is a directory or an HTTPS server. An image lies at
// <base>/<algorithm>/<hex digest>, or where the requester's pointer says. A
// pointer is relative to the base and cannot leave it: the requester chooses
// among what the store offers, and makes the bridge talk to nothing else.
// Whatever arrives is hashed on the way, and the reader ends with
// [ErrHashMismatch] instead of the end of file when it is not what was asked
// for.
//
// Nothing is cached here and nothing is tried again; the caller does both,
// since it alone knows what it has and for how long it may wait.
package imagestore

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"time"
)

// The errors that callers act on; match them with [errors.Is].
var (
	// ErrNotFound says that the store has no such image.
	ErrNotFound = errors.New("image not found in the store")
	// ErrUnavailable says that the store could not be read: unreachable, denied,
	// failing, stalled or ended too early. Trying again may help.
	ErrUnavailable = errors.New("image store unavailable")
	// ErrHashMismatch says that the store has other bytes than asked for.
	ErrHashMismatch = errors.New("image has the wrong hash")
	// ErrTooLarge says that the image is longer than allowed.
	ErrTooLarge = errors.New("image too large")
	// ErrInvalidPointer says that a pointer is malformed or leaves the base.
	ErrInvalidPointer = errors.New("invalid image pointer")
)

const (
	// defaultMaxBytes is above any container image in practice, and low enough
	// not to fill a host for ever.
	defaultMaxBytes = 64 << 30
	// defaultIdleTimeout is how long a healthy server may be silent, such as
	// while object storage gets an object from its slower tier.
	defaultIdleTimeout = 30 * time.Second
)

// Config says where a store is and what is allowed.
type Config struct {
	// Base is an absolute directory, a file:// URL of one, or an https:// URL.
	// http:// is allowed for loopback addresses, or with Insecure.
	Base string
	// Insecure allows http:// to other machines. The digest still protects the
	// content, but not its secrecy.
	Insecure bool
	// MaxBytes bounds every image; zero means 64 GiB.
	MaxBytes int64
	// IdleTimeout ends a transfer in which no byte arrives for so long; there
	// is no limit on the whole. Zero means 30 s.
	IdleTimeout time.Duration
	// RootCAs verifies HTTPS servers; nil means the system's.
	RootCAs *x509.CertPool
}

// Image says what to fetch.
type Image struct {
	// Digest is what the bytes must hash to.
	Digest Digest
	// Pointer is where the image lies below the base; empty means at
	// <algorithm>/<hex digest>.
	Pointer string
	// MaxBytes bounds this image; zero means the store's bound, which also
	// holds otherwise.
	MaxBytes int64
}

// Store is a place with images. Implementations are safe for concurrent use.
type Store interface {
	// Open begins to fetch an image and returns a reader over it and its size
	// in bytes, -1 when the store does not tell. It blocks until the store
	// answers. The reader hashes: its last Read returns [ErrHashMismatch]
	// instead of [io.EOF] when the bytes are wrong, so nothing read may be used
	// before the end was seen. It must be closed, and fails once ctx ends.
	Open(ctx context.Context, image Image) (r io.ReadCloser, size int64, err error)
	// Close releases idle connections. Readers that are open go on.
	Close() error
}

// New returns the store at cfg.Base. It does not contact it.
func New(cfg Config) (Store, error) {
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = defaultMaxBytes
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = defaultIdleTimeout
	}
	if cfg.MaxBytes < 0 || cfg.IdleTimeout < 0 {
		return nil, errors.New("image store: negative limit")
	}
	if cfg.Base == "" {
		return nil, errors.New("image store: base: empty")
	}
	if filepath.IsAbs(cfg.Base) {
		return &dirStore{dir: filepath.Clean(cfg.Base), max: cfg.MaxBytes}, nil
	}
	base, err := url.Parse(cfg.Base)
	if err != nil {
		return nil, fmt.Errorf("image store: base: %w", err)
	}
	if base.User != nil || base.RawQuery != "" || base.ForceQuery || base.Fragment != "" || base.Opaque != "" {
		return nil, fmt.Errorf("image store: base: %s has user information, a query or a fragment", base.Redacted())
	}
	switch base.Scheme {
	case "file":
		if base.Host != "" || !filepath.IsAbs(base.Path) {
			return nil, fmt.Errorf("image store: base: %s: want file:///absolute/directory", base)
		}
		return &dirStore{dir: filepath.Clean(base.Path), max: cfg.MaxBytes}, nil
	case "http":
		if !cfg.Insecure && !loopback(base.Hostname()) {
			return nil, fmt.Errorf("image store: base: %s: plain http is for loopback addresses only", base)
		}
	case "https":
	default:
		return nil, fmt.Errorf("image store: base: %s: want an absolute directory, file:// or https://", base)
	}
	if base.Host == "" {
		return nil, fmt.Errorf("image store: base: %s: no host", base)
	}
	base.Path = strings.TrimRight(base.Path, "/")
	base.RawPath = ""
	return newHTTPStore(base, cfg), nil
}

// loopback reports whether a host name is this machine by its own text, without
// a look-up that someone else could answer.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// limit is the smaller of the store's bound and the image's.
func limit(store int64, image Image) (int64, error) {
	switch {
	case image.MaxBytes < 0:
		return 0, errors.New("negative size limit")
	case image.MaxBytes > 0 && image.MaxBytes < store:
		return image.MaxBytes, nil
	default:
		return store, nil
	}
}

// maxPointerBytes is far above any sensible object name.
const maxPointerBytes = 1024

// Path returns where an image lies below a base, which has no slash at its end:
// slash-separated, clean, and made of characters that mean the same in a file
// name and in a URL. It fails with [ErrInvalidPointer].
func (i Image) Path(base string) (string, error) {
	if !i.Digest.valid() {
		return "", fmt.Errorf("%w: no valid digest", ErrInvalidPointer)
	}
	if i.Pointer == "" {
		return string(i.Digest.Algorithm) + "/" + i.Digest.Hex(), nil
	}
	return resolvePointer(base, i.Pointer)
}

// resolvePointer returns a pointer's path below the base. It takes a relative
// path, or an address that begins with the base's own.
func resolvePointer(base, pointer string) (string, error) {
	if len(pointer) > maxPointerBytes {
		return "", fmt.Errorf("%w: longer than %d bytes", ErrInvalidPointer, maxPointerBytes)
	}
	rel := strings.TrimPrefix(pointer, base+"/")
	for segment := range strings.SplitSeq(rel, "/") {
		switch segment {
		case "":
			return "", fmt.Errorf("%w: %q: not a path relative to the store's base", ErrInvalidPointer, pointer)
		case ".", "..":
			return "", fmt.Errorf("%w: %q: has the segment %q", ErrInvalidPointer, pointer, segment)
		}
		for _, r := range segment {
			// No colon, percent, question mark, hash or backslash: with these a
			// path becomes another host, an escape, a query or a drive.
			if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-+=,~", r)) {
				return "", fmt.Errorf("%w: %q: the character %q is not allowed", ErrInvalidPointer, pointer, r)
			}
		}
	}
	return rel, nil
}
