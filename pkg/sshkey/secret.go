package sshkey

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

const (
	// minSecretBytes is the strength of the keys derived, 256 bits.
	minSecretBytes = 32
	// maxSecretBytes keeps a mistaken path from being read whole.
	maxSecretBytes = 4096
)

// checkSecret refuses what cannot be random bytes: too short, or with so few
// distinct byte values that 32 random ones practically never look so.
func checkSecret(secret redact.Secret) error {
	if secret.Len() < minSecretBytes {
		return fmt.Errorf("has %d bytes, want at least %d random ones", secret.Len(), minSecretBytes)
	}
	var seen [256]bool
	distinct := 0
	for _, b := range secret.Expose() {
		if !seen[b] {
			seen[b] = true
			distinct++
		}
	}
	if distinct < 8 {
		return errors.New("is not random")
	}
	return nil
}

// LoadSecret reads a worker's secret: the raw bytes of a file with 32 to 4096
// random bytes that nobody but its owner may access.
func LoadSecret(path string) (redact.Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return redact.Secret{}, fmt.Errorf("load secret: %w", err)
	}
	defer func() { _ = f.Close() }() // Nothing was written.
	info, err := f.Stat()
	if err != nil {
		return redact.Secret{}, fmt.Errorf("load secret: %w", err)
	}
	if !info.Mode().IsRegular() {
		return redact.Secret{}, fmt.Errorf("load secret: %s: not a regular file", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return redact.Secret{}, fmt.Errorf("load secret: %s: mode %04o lets others than the owner in, want 0600", path, perm)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxSecretBytes+1))
	defer clear(raw)
	if err != nil {
		return redact.Secret{}, fmt.Errorf("load secret: %w", err)
	}
	if len(raw) > maxSecretBytes {
		return redact.Secret{}, fmt.Errorf("load secret: %s: longer than %d bytes", path, maxSecretBytes)
	}
	secret := redact.New(raw)
	if err := checkSecret(secret); err != nil {
		secret.Wipe()
		return redact.Secret{}, fmt.Errorf("load secret: %s: %w", path, err)
	}
	return secret, nil
}

// CreateSecret writes a new random secret with mode 0600 when path does not
// exist, and then loads whatever is there. Processes that do so at once all get
// the same one, and none ever sees half a file.
func CreateSecret(path string) (redact.Secret, error) {
	if _, err := os.Lstat(path); err == nil {
		return LoadSecret(path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return redact.Secret{}, fmt.Errorf("create secret: %w", err)
	}
	if err := writeSecret(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return redact.Secret{}, fmt.Errorf("create secret: %w", err)
	}
	return LoadSecret(path)
}

// writeSecret makes the file complete under another name and links it, which,
// other than renaming, never replaces one that came first.
func writeSecret(path string) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".secret-*") // With mode 0600.
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	raw := make([]byte, minSecretBytes)
	defer clear(raw)
	_, _ = rand.Read(raw) // It never fails.
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
