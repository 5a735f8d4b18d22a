// Package sshkey checks the SSH public keys that requesters send, makes login
// keys, and derives the keys that a worker must be able to make again: the
// host key of every instance and the key that signs compute logs.
//
// Host keys are derived and not drawn, so that a create call that is repeated
// after a crash is equal byte for byte, and so that the receipt can name the
// host key before the instance exists.
package sshkey

import (
	"bytes"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

const (
	// maxLineBytes bounds an authorized_keys line. The longest key that the ssh
	// package takes, RSA with 16384 bits, needs some 2800 bytes.
	maxLineBytes = 8 << 10
	// minRSABits is what NIST SP 800-57 part 1 allows today.
	minRSABits = 2048
)

// ErrInvalidKey is in every error about a public key that is not accepted.
var ErrInvalidKey = errors.New("invalid SSH public key")

// PublicKey is an SSH public key that passed [ParsePublicKey]. The zero value
// is no key.
type PublicKey struct{ key ssh.PublicKey }

// accepted reports whether keys of this type may log in.
func accepted(keyType string) bool {
	switch keyType {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoRSA,
		ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		return true
	}
	return false
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalidKey}, args...)...)
}

// ParsePublicKey parses one line as it stands in a .pub file: key type, base64
// and an optional comment, which is dropped, because the line ends up in files
// on other machines. It accepts Ed25519, ECDSA, RSA from 2048 bits, and the
// first two on security keys (sk-). It refuses options, certificates, DSA and
// more than one line. All its errors are [ErrInvalidKey].
func ParsePublicKey(line string) (PublicKey, error) {
	if len(line) > maxLineBytes {
		return PublicKey{}, invalid("longer than %d bytes", maxLineBytes)
	}
	// One line end at the end is what reading a .pub file yields.
	line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
	for _, r := range line {
		if r == '\n' || r == '\r' {
			return PublicKey{}, invalid("more than one line")
		}
		if (r < ' ' && r != '\t') || r == 0x7f || r == '\uFFFD' {
			return PublicKey{}, invalid("control or malformed character")
		}
	}
	fields := strings.Fields(line)
	if len(fields) == 0 {
		return PublicKey{}, invalid("empty")
	}
	keyType := fields[0]
	switch {
	case accepted(keyType):
	case strings.Contains(keyType, "-cert-v"):
		return PublicKey{}, invalid("certificates are not accepted, only plain keys")
	case strings.HasPrefix(keyType, "-----BEGIN"):
		return PublicKey{}, invalid("this is a PEM block, want the line from the .pub file")
	case keyType == "ssh-dss":
		return PublicKey{}, invalid("DSA keys are not accepted")
	default:
		if slices.ContainsFunc(fields[1:], accepted) {
			return PublicKey{}, invalid("options before the key are not accepted")
		}
		return PublicKey{}, invalid("unknown key type %s", quoteShort(keyType))
	}
	if len(fields) < 2 {
		return PublicKey{}, invalid("the base64 part is missing")
	}
	wire, err := base64.StdEncoding.Strict().DecodeString(fields[1])
	if err != nil {
		return PublicKey{}, invalid("base64: %v", err)
	}
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return PublicKey{}, invalid("%v", err)
	}
	if key.Type() != keyType {
		return PublicKey{}, invalid("the line says %s, the key is %s", keyType, quoteShort(key.Type()))
	}
	if !bytes.Equal(key.Marshal(), wire) {
		return PublicKey{}, invalid("not in canonical form")
	}
	if crypto, ok := key.(ssh.CryptoPublicKey); ok {
		if k, ok := crypto.CryptoPublicKey().(*rsa.PublicKey); ok {
			if bits := k.N.BitLen(); bits < minRSABits {
				return PublicKey{}, invalid("RSA with %d bits, want at least %d", bits, minRSABits)
			}
		}
	}
	return PublicKey{key: key}, nil
}

// quoteShort quotes foreign text for an error message.
func quoteShort(s string) string {
	const most = 40
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}

// IsZero reports whether there is no key.
func (k PublicKey) IsZero() bool { return k.key == nil }

// Type returns the key's SSH type, such as ssh-ed25519.
func (k PublicKey) Type() string {
	if k.IsZero() {
		return ""
	}
	return k.key.Type()
}

// String returns the canonical line, type and base64, with neither comment nor
// line end. [ParsePublicKey] reads it.
func (k PublicKey) String() string {
	if k.IsZero() {
		return ""
	}
	return k.key.Type() + " " + base64.StdEncoding.EncodeToString(k.key.Marshal())
}

// Wire returns the key in SSH wire format.
func (k PublicKey) Wire() []byte {
	if k.IsZero() {
		return nil
	}
	return k.key.Marshal()
}

// SSH returns the key for use with golang.org/x/crypto/ssh, such as in
// [ssh.FixedHostKey]; nil for the zero value.
func (k PublicKey) SSH() ssh.PublicKey { return k.key }

// Fingerprint returns the key's SHA-256 as OpenSSH prints it: "SHA256:" and
// base64.
func (k PublicKey) Fingerprint() string {
	if k.IsZero() {
		return ""
	}
	return ssh.FingerprintSHA256(k.key)
}

// Equal reports whether both are the same key.
func (k PublicKey) Equal(other PublicKey) bool { return bytes.Equal(k.Wire(), other.Wire()) }

// KnownHostsLine returns the line that pins key as the host key of host (a name
// or an IP address) at port, without a line end. It refuses hosts whose text
// has a meaning in known_hosts, such as patterns and lists.
func KnownHostsLine(host string, port uint16, key PublicKey) (string, error) {
	if key.IsZero() {
		return "", errors.New("known hosts: no key")
	}
	if port == 0 {
		return "", errors.New("known hosts: port 0")
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if host == "" {
		return "", errors.New("known hosts: empty host")
	}
	for _, r := range host {
		if !(r == '.' || r == '-' || r == '_' || r == ':' || r == '%' ||
			'0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z') {
			return "", fmt.Errorf("known hosts: host %s has the character %q", quoteShort(host), r)
		}
	}
	return knownhosts.Line([]string{net.JoinHostPort(host, strconv.Itoa(int(port)))}, key.key), nil
}
