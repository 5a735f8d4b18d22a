package imagestore

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"

	"lukechampine.com/blake3"
)

// Algorithm is a hash algorithm by which images are named.
type Algorithm string

// The algorithms that are supported; both have 32-byte digests.
const (
	// SHA256 is FIPS 180-4's.
	SHA256 Algorithm = "sha256"
	// BLAKE3 is BLAKE3 with its default output length, without a key.
	BLAKE3 Algorithm = "blake3"
)

// New returns a new hash, or an error for an unknown algorithm.
func (a Algorithm) New() (hash.Hash, error) {
	switch a {
	case SHA256:
		return sha256.New(), nil
	case BLAKE3:
		return blake3.New(32, nil), nil
	default:
		return nil, fmt.Errorf("unknown hash algorithm %q, want %s or %s", string(a), SHA256, BLAKE3)
	}
}

// Digest names bytes by their hash.
type Digest struct {
	Algorithm Algorithm
	Sum       [32]byte
}

// ParseDigest reads the form of [Digest.String]: the algorithm, a colon, and 64
// lower-case hexadecimal digits.
func ParseDigest(s string) (Digest, error) {
	algorithm, digits, ok := strings.Cut(s, ":")
	if !ok {
		return Digest{}, errors.New("digest: want algorithm:hex")
	}
	d := Digest{Algorithm: Algorithm(algorithm)}
	if !d.valid() {
		return Digest{}, fmt.Errorf("digest: unknown algorithm %q", algorithm)
	}
	if len(digits) != 2*len(d.Sum) || digits != strings.ToLower(digits) {
		return Digest{}, fmt.Errorf("digest: want %d lower-case hexadecimal digits", 2*len(d.Sum))
	}
	if _, err := hex.Decode(d.Sum[:], []byte(digits)); err != nil {
		return Digest{}, fmt.Errorf("digest: %w", err)
	}
	return d, nil
}

func (d Digest) valid() bool { return d.Algorithm == SHA256 || d.Algorithm == BLAKE3 }

// Hex returns the sum as 64 lower-case hexadecimal digits.
func (d Digest) Hex() string { return hex.EncodeToString(d.Sum[:]) }

// String returns the digest as algorithm:hex.
func (d Digest) String() string { return string(d.Algorithm) + ":" + d.Hex() }

// VerifyingReader passes bytes on, counts and hashes them, and ends with
// [ErrHashMismatch] or [ErrTooLarge] instead of [io.EOF] when they are not what
// was expected. It is not safe for concurrent use.
type VerifyingReader struct {
	r    io.Reader
	want Digest
	hash hash.Hash
	max  int64
	n    int64
	err  error
}

// NewVerifyingReader returns a reader over r that expects at most limit bytes
// with the digest want. An unknown algorithm is an error of the first Read.
func NewVerifyingReader(r io.Reader, want Digest, limit int64) *VerifyingReader {
	h, err := want.Algorithm.New()
	return &VerifyingReader{r: r, want: want, hash: h, max: limit, err: err}
}

// Read implements [io.Reader]. Its errors stay: each later Read repeats them.
func (v *VerifyingReader) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := v.r.Read(p)
	v.n += int64(n)
	if v.n > v.max {
		v.err = fmt.Errorf("%w: longer than %d bytes", ErrTooLarge, v.max)
		return 0, v.err
	}
	_, _ = v.hash.Write(p[:n]) // A hash never fails.
	switch {
	case errors.Is(err, io.EOF):
		var got Digest
		got.Algorithm = v.want.Algorithm
		v.hash.Sum(got.Sum[:0])
		if got != v.want {
			err = fmt.Errorf("%w: got %s, want %s", ErrHashMismatch, got, v.want)
		}
		v.err = err
	case err != nil:
		v.err = err
	}
	return n, err
}

// BytesRead returns how many bytes have been passed on.
func (v *VerifyingReader) BytesRead() int64 { return v.n }

// readCloser is a verified stream with what must be closed below it.
type readCloser struct {
	*VerifyingReader
	io.Closer
}
