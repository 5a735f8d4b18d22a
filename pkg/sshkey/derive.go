package sshkey

import (
	"crypto"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// The labels keep the derived keys apart from each other and from whatever else
// may once be derived from the same secret. A change of a label changes every
// key, and so every pinned host key.
const (
	hostKeyLabel = "compute-bridge/v1/ssh-host-key"
	logKeyLabel  = "compute-bridge/v1/compute-log-key"
)

// maxEpochBytes bounds the epoch tag, which is a word such as "2031-04".
const maxEpochBytes = 64

// Deriver derives keys from a worker's secret. It is safe for concurrent use.
type Deriver struct {
	secret redact.Secret
	epoch  string
}

// NewDeriver returns a deriver over a worker's secret of at least 32 bytes, see
// [LoadSecret]. The epoch tag is part of every host key: an operator who changes
// it gets new ones for the grants to come. It must be the same for as long as a
// grant is being provisioned, so the caller stores it with the grant's attempt.
func NewDeriver(secret redact.Secret, epoch string) (*Deriver, error) {
	if err := checkSecret(secret); err != nil {
		return nil, fmt.Errorf("worker secret: %w", err)
	}
	if len(epoch) > maxEpochBytes {
		return nil, fmt.Errorf("epoch: longer than %d bytes", maxEpochBytes)
	}
	return &Deriver{secret: secret, epoch: epoch}, nil
}

// derive returns the Ed25519 key with this label and context (RFC 5869, without
// salt: the secret is uniformly random).
func (d *Deriver) derive(info []byte) (ed25519.PrivateKey, error) {
	seed, err := hkdf.Key(sha256.New, d.secret.Expose(), nil, string(info), ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	defer clear(seed)
	return ed25519.NewKeyFromSeed(seed), nil
}

// HostKey derives the SSH host key of one attempt of a grant. The same inputs
// yield the same bytes, the PEM block included. Attempts count from 1.
func (d *Deriver) HostKey(requestID [32]byte, attempt uint32) (KeyPair, error) {
	if attempt == 0 {
		return KeyPair{}, errors.New("derive host key: attempt 0")
	}
	// Only the epoch varies in length, and its length goes before it, so that
	// no two inputs share an encoding.
	info := append([]byte(hostKeyLabel), 0, byte(len(d.epoch))) //nolint:gosec // NewDeriver bounds it.
	info = append(info, d.epoch...)
	info = append(info, requestID[:]...)
	info = binary.BigEndian.AppendUint32(info, attempt)
	private, err := d.derive(info)
	if err != nil {
		return KeyPair{}, err
	}
	defer clear(private)
	public := sha256.Sum256(private[ed25519.SeedSize:])
	// The check bytes only tell a wrong passphrase; any fixed value does.
	return keyPair(private, binary.BigEndian.Uint32(public[:4]), "compute-bridge host key")
}

// LogKey derives the key that signs this worker's compute logs. It does not
// depend on the epoch: whoever pinned the worker's log key goes on verifying.
func (d *Deriver) LogKey() (*LogKey, error) {
	private, err := d.derive(append([]byte(logKeyLabel), 0))
	if err != nil {
		return nil, err
	}
	defer clear(private)
	public := ed25519.PublicKey(append([]byte(nil), private[ed25519.SeedSize:]...))
	return &LogKey{seed: redact.New(private.Seed()), public: public, id: LogKeyID(public)}, nil
}

// LogKey signs compute logs. It implements [crypto.Signer] for Ed25519 and is
// safe for concurrent use.
type LogKey struct {
	seed   redact.Secret
	public ed25519.PublicKey
	id     string
}

var _ crypto.Signer = (*LogKey)(nil)

// LogKeyID names a log key: "ed25519:" and the first 16 bytes of the public
// key's SHA-256 as hexadecimal digits.
func LogKeyID(public ed25519.PublicKey) string {
	sum := sha256.Sum256(public)
	return "ed25519:" + hex.EncodeToString(sum[:16])
}

// ID returns the key's id, see [LogKeyID].
func (k *LogKey) ID() string { return k.id }

// PublicKey returns the 32 bytes of the Ed25519 public key.
func (k *LogKey) PublicKey() ed25519.PublicKey { return append(ed25519.PublicKey(nil), k.public...) }

// Public returns the [ed25519.PublicKey].
func (k *LogKey) Public() crypto.PublicKey { return k.PublicKey() }

// Sign signs message itself, which must not be hashed before.
func (k *LogKey) Sign(rand io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	private := ed25519.NewKeyFromSeed(k.seed.Expose())
	defer clear(private)
	return private.Sign(rand, message, opts)
}
