// Package filedigest hashes files for the worker on its host: what a host's disk holds is hashed there, not sent back.
package filedigest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"

	"lukechampine.com/blake3"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Algorithms that [File] knows.
const (
	SHA256 = "sha256"
	BLAKE3 = "blake3"
)

// blake3 hashes long inputs on several cores when it is handed enough at once.
const bufferBytes = 1 << 20

// File hashes the regular file at path.
func File(algorithm, path string) (guestapi.Digest, error) {
	var h hash.Hash
	switch algorithm {
	case SHA256:
		h = sha256.New()
	case BLAKE3:
		h = blake3.New(32, nil)
	default:
		return guestapi.Digest{}, fmt.Errorf("unknown algorithm %q; known are %s and %s", algorithm, SHA256, BLAKE3)
	}
	f, err := os.Open(path)
	if err != nil {
		return guestapi.Digest{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return guestapi.Digest{}, err
	}
	if !info.Mode().IsRegular() {
		return guestapi.Digest{}, fmt.Errorf("%s is not a regular file", path)
	}
	// The struct hides os.File's WriterTo, which would bring a small buffer of its own.
	size, err := io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, bufferBytes))
	if err != nil {
		return guestapi.Digest{}, fmt.Errorf("read %s: %w", path, err)
	}
	return guestapi.Digest{Algorithm: algorithm, Hex: hex.EncodeToString(h.Sum(nil)), Size: size}, nil
}
