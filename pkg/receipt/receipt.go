// Package receipt protects the two things that a bridge hands over through
// parties that it does not trust: a login key that it made, sealed to the
// requester, and the compute log, signed by the worker.
//
// # Sealed keys
//
// [Seal] encrypts with HPKE (RFC 9180) in base mode, single shot: DHKEM(X25519,
// HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305. A sealed key is
//
//	version (1 byte, 0x01) || encapsulated key (32 bytes) || ciphertext and tag
//
// with info = the ASCII string "compute-bridge/v1/sealed-login-key" and
// aad = version || request id (32 bytes). Whoever carries it can neither read it
// nor pass it off as that of another grant. HPKE in base mode does not say who sealed: that the receipt is
// the bridge's follows from the channel that it came through.
//
// # Signed logs
//
// [SignLog] makes an Ed25519 signature (RFC 8032) over the ASCII string
// "compute-bridge/v1/compute-log", a zero byte and the message's exact bytes.
package receipt

import (
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

const (
	// PublicKeyBytes is the length of an X25519 public key.
	PublicKeyBytes = 32

	sealVersion = 0x01
	sealInfo    = "compute-bridge/v1/sealed-login-key"
	tagBytes    = 16
	// maxPlainBytes is far above any private key.
	maxPlainBytes = 64 << 10
)

var (
	// ErrInvalidKey says that an X25519 key cannot be used.
	ErrInvalidKey = errors.New("invalid X25519 key")
	// ErrOpen says that a sealed key is damaged, or is for another key or
	// grant. It does not say which, because it cannot know.
	ErrOpen = errors.New("cannot open the sealed key")
)

// aad binds a sealed key to its grant.
func aad(requestID [32]byte) []byte { return append([]byte{sealVersion}, requestID[:]...) }

// CheckPublicKey reports whether public can be sealed to: 32 bytes, and not one
// of the points of low order (the zero key among them), with which everyone
// would know the shared secret. Its errors are [ErrInvalidKey].
func CheckPublicKey(public []byte) error {
	if len(public) != PublicKeyBytes {
		return fmt.Errorf("%w: public key has %d bytes, want %d", ErrInvalidKey, len(public), PublicKeyBytes)
	}
	key, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidKey, err)
	}
	probe, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("check X25519 key: %w", err)
	}
	// A private key is a multiple of 8, the order of the small subgroup, so
	// that any of them shows a point of low order by an all-zero result, which
	// ECDH reports.
	if _, err := probe.ECDH(key); err != nil {
		return fmt.Errorf("%w: public key is zero or of low order", ErrInvalidKey)
	}
	return nil
}

// GenerateKey makes a key pair for a requester.
func GenerateKey() (private redact.Secret, public []byte, err error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return redact.Secret{}, nil, fmt.Errorf("generate X25519 key: %w", err)
	}
	raw := key.Bytes()
	defer clear(raw)
	return redact.New(raw), key.PublicKey().Bytes(), nil
}

// Seal encrypts plain to an X25519 public key. Two calls with the same
// arguments give different results: whoever must answer the same twice stores
// the first.
func Seal(public []byte, requestID [32]byte, plain redact.Secret) ([]byte, error) {
	if err := CheckPublicKey(public); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	if plain.Len() > maxPlainBytes {
		return nil, fmt.Errorf("seal: plaintext has %d bytes, want at most %d", plain.Len(), maxPlainBytes)
	}
	key, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("seal: %w: %w", ErrInvalidKey, err)
	}
	enc, sender, err := hpke.NewSender(key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte(sealInfo))
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	ciphertext, err := sender.Seal(aad(requestID), plain.Expose())
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return append(append([]byte{sealVersion}, enc...), ciphertext...), nil
}

// Open decrypts what [Seal] made for the private key's public half and the same
// binding. A key that is no X25519 private key is [ErrInvalidKey]; everything
// else that can go wrong is [ErrOpen].
func Open(private redact.Secret, requestID [32]byte, sealed []byte) (redact.Secret, error) {
	key, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(private.Expose())
	if err != nil {
		return redact.Secret{}, fmt.Errorf("%w: private key has %d bytes, want 32", ErrInvalidKey, private.Len())
	}
	if len(sealed) < 1+PublicKeyBytes+tagBytes || len(sealed) > 1+PublicKeyBytes+maxPlainBytes+tagBytes {
		return redact.Secret{}, fmt.Errorf("%w: %d bytes long", ErrOpen, len(sealed))
	}
	if sealed[0] != sealVersion {
		return redact.Secret{}, fmt.Errorf("%w: unknown version %d", ErrOpen, sealed[0])
	}
	enc, ciphertext := sealed[1:1+PublicKeyBytes], sealed[1+PublicKeyBytes:]
	recipient, err := hpke.NewRecipient(enc, key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte(sealInfo))
	if err != nil {
		return redact.Secret{}, fmt.Errorf("%w: %w", ErrOpen, err)
	}
	plain, err := recipient.Open(aad(requestID), ciphertext)
	if err != nil {
		return redact.Secret{}, fmt.Errorf("%w: damaged, or for another key or grant", ErrOpen)
	}
	defer clear(plain)
	return redact.New(plain), nil
}
