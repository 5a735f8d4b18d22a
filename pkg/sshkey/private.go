package sshkey

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// KeyPair is an Ed25519 key with its private half.
type KeyPair struct {
	// Public is the public half.
	Public PublicKey
	// Private is the private half as a PEM block in OpenSSH's format.
	Private redact.Secret
}

// Signer returns the pair for use with golang.org/x/crypto/ssh.
func (p KeyPair) Signer() (ssh.Signer, error) {
	signer, err := ssh.ParsePrivateKey(p.Private.Expose())
	if err != nil {
		return nil, fmt.Errorf("parse private key: %w", err)
	}
	return signer, nil
}

// GenerateLoginKey makes a random key for a requester that sent none.
func GenerateLoginKey() (KeyPair, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return KeyPair{}, fmt.Errorf("generate login key: %w", err)
	}
	defer clear(private)
	var check [4]byte
	_, _ = rand.Read(check[:]) // It never fails.
	return keyPair(private, binary.BigEndian.Uint32(check[:]), "compute-bridge login key")
}

// keyPair encodes a key in OpenSSH's format (PROTOCOL.key in its sources).
// The ssh package can do this too, but with random check bytes, while a derived
// key has to come out the same each time.
func keyPair(private ed25519.PrivateKey, check uint32, comment string) (KeyPair, error) {
	public, ok := private.Public().(ed25519.PublicKey)
	if !ok {
		return KeyPair{}, errors.New("not an Ed25519 key")
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return KeyPair{}, fmt.Errorf("encode public key: %w", err)
	}
	secret := ssh.Marshal(struct {
		Check1, Check2  uint32
		Type            string
		Public, Private []byte
		Comment         string
	}{check, check, ssh.KeyAlgoED25519, public, private, comment})
	defer clear(secret)
	// Unencrypted keys are padded to 8 bytes with 1, 2, 3, ...
	for i := byte(1); len(secret)%8 != 0; i++ {
		secret = append(secret, i)
	}
	blob := append([]byte("openssh-key-v1\x00"), ssh.Marshal(struct {
		Cipher, KDF, KDFOptions string
		Keys                    uint32
		Public, Private         []byte
	}{"none", "none", "", 1, key.Marshal(), secret})...)
	defer clear(blob)
	text := pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: blob})
	defer clear(text)
	return KeyPair{Public: PublicKey{key: key}, Private: redact.New(text)}, nil
}
