package guestapi

import (
	"fmt"
	"io"
	"log/slog"
)

// redacted stands in for every secret value in whatever is printed, logged or marshalled.
const redacted = "[redacted]"

// HostKey is the private SSH host key of one instance, as PEM. Every verb of fmt, every slog handler and json.Marshal
// show a placeholder; only [HostKey.Reveal] and [Encode] give the key away. The zero value is an absent key.
type HostKey struct {
	// A pointer, because fmt prints unexported strings of nested structs without asking their methods.
	pem *string
}

// NewHostKey wraps a private key in PEM form (OpenSSH or PKCS#8). It does not look at it; [Config.Validate] does.
func NewHostKey(pem string) HostKey { return HostKey{pem: &pem} }

// Reveal returns the PEM text, or "" for the zero value.
func (k HostKey) Reveal() string {
	if k.pem == nil {
		return ""
	}
	return *k.pem
}

// Equal says whether both hold the same text. It makes go-cmp work on the type.
func (k HostKey) Equal(other HostKey) bool { return k.Reveal() == other.Reveal() }

// Format implements [fmt.Formatter] with a placeholder for every verb and flag.
func (k HostKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements [fmt.Stringer] with a placeholder.
func (k HostKey) String() string { return redacted }

// LogValue implements [slog.LogValuer] with a placeholder.
func (k HostKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler], and so JSON, with a placeholder: see [Encode].
func (k HostKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }
