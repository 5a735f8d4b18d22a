// Package redact holds secrets in memory in a form that cannot be printed.
//
// A byte slice with a String method still leaks: fmt's %d prints its numbers,
// a JSON log handler encodes it as base64, and inside another struct's
// unexported field fmt cannot call methods at all and dumps the bytes.
// [Secret] is a struct around a pointer to a pointer to the slice: where
// methods can be called they say [Placeholder], and where they cannot, fmt
// prints an address only.
//
// What it does not do: a secret that was exposed and copied is out of its
// hands, and the garbage collector may have moved earlier copies. It protects
// from accidents in logs and errors, not from a debugger.
package redact

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// Placeholder is what stands in every output in place of a secret.
const Placeholder = "[redacted]"

// errMarshal is the answer of binary encoders.
var errMarshal = errors.New("a secret cannot be marshalled")

// Secret holds bytes that must not be printed, logged or marshalled. The zero
// value is an empty secret. Copies of a Secret share the same bytes, so that
// [Secret.Wipe] reaches all of them.
//
// A Secret may be read by several goroutines at once; Wipe must not run at the
// same time as anything else. Compare with [Secret.Equal]: the operator ==
// compares identity.
type Secret struct {
	// p is a pointer to a pointer because fmt, when it may not call methods
	// (unexported fields), prints a nested pointer as an address. One level is
	// not enough: a verb that does not fit a pointer (%s, %q) sends fmt down
	// its bad-verb path, which starts again at depth 0 and there follows a
	// pointer to a slice, but never a pointer to a pointer.
	p **[]byte
}

// New returns a Secret with a copy of b; the caller should clear its own.
func New(b []byte) Secret {
	c := new(append([]byte(nil), b...))
	return Secret{p: &c}
}

// Expose returns the secret bytes themselves, not a copy: they must not be
// changed, and they become zeros when the secret is wiped. It is named so that
// every place where a secret leaves its type can be found by one search.
func (s Secret) Expose() []byte {
	if s.p == nil {
		return nil
	}
	return **s.p
}

// Len returns the number of secret bytes.
func (s Secret) Len() int { return len(s.Expose()) }

// IsZero reports whether the secret is empty, because it was never set or
// because it was wiped.
func (s Secret) IsZero() bool { return s.Len() == 0 }

// Equal reports whether both secrets hold the same bytes, in a time that
// depends on the lengths only.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare(s.Expose(), other.Expose()) == 1
}

// Wipe overwrites the bytes with zeros and empties this Secret and all its
// copies. Wiping twice does no harm.
func (s Secret) Wipe() {
	if s.p == nil {
		return
	}
	clear(**s.p)
	**s.p = nil
}

// Format implements [fmt.Formatter], which fmt asks before anything else, so
// that every verb and flag yields the placeholder.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, Placeholder) }

// String returns the placeholder.
func (s Secret) String() string { return Placeholder }

// GoString returns the placeholder.
func (s Secret) GoString() string { return Placeholder }

// LogValue implements [slog.LogValuer] and yields the placeholder.
func (s Secret) LogValue() slog.Value { return slog.StringValue(Placeholder) }

// MarshalText implements [encoding.TextMarshaler], which JSON, XML and TOML
// encoders use, and yields the placeholder. There is no UnmarshalText: a
// configuration names a file with the secret and never holds it.
func (s Secret) MarshalText() ([]byte, error) { return []byte(Placeholder), nil }

// MarshalJSON implements [encoding/json.Marshaler] and yields the placeholder.
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + Placeholder + `"`), nil }

// MarshalBinary implements [encoding.BinaryMarshaler] and always fails, so that
// encoders such as gob cannot carry a secret, nor silently lose it.
func (s Secret) MarshalBinary() ([]byte, error) {
	return nil, errMarshal
}
