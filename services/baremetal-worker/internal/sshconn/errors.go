package sshconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// ErrClosed is the cause of errors after Close.
var ErrClosed = errors.New("connection is closed for good")

// HostKeyMismatchError says that a host has shown a key that isn't pinned. It
// is never overcome by trying again: either the pin is outdated, or someone
// else answers at this address.
type HostKeyMismatchError struct {
	// Host is the name from the configuration.
	Host string
	// Got is the fingerprint that was shown, empty if the host offered no key
	// of a pinned type.
	Got string
	// Want are the pinned fingerprints.
	Want []string
}

// Error names all fingerprints.
func (e *HostKeyMismatchError) Error() string {
	want := strings.Join(e.Want, " or ")
	if e.Got == "" {
		return fmt.Sprintf("host %s has no host key of a pinned type; pinned is %s", e.Host, want)
	}
	return fmt.Sprintf("host %s shows host key %s; pinned is %s", e.Host, e.Got, want)
}

// AuthError says that a host refuses the key that the worker logs in with.
type AuthError struct {
	// Host is the name from the configuration.
	Host string
	// User is the login name.
	User string
	// Fingerprint is that of the worker's key.
	Fingerprint string
	// Penalised is set when sshd doesn't even listen to this address now,
	// because of earlier failures (PerSourcePenalties of OpenSSH 9.8 and later).
	Penalised bool
}

// Error says what was refused.
func (e *AuthError) Error() string {
	if e.Penalised {
		return fmt.Sprintf("host %s refuses connections from this address for a while because of earlier failures (sshd PerSourcePenalties)", e.Host)
	}
	return fmt.Sprintf("host %s refuses user %s with key %s", e.Host, e.User, e.Fingerprint)
}

// refused reports whether err is something that only an operator can change.
func refused(err error) bool {
	var key *HostKeyMismatchError
	var auth *AuthError
	return errors.As(err, &key) || errors.As(err, &auth)
}

// classify gives an error of the connection its reason.
func (c *Conn) classify(err error, doing string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*backenderr.Error](err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return backenderr.Wrap(backenderr.Cancelled, err, "host %s: %s", c.cfg.Name, doing)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: %s: no answer in time", c.cfg.Name, doing)
	}
	if refused(err) {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: %s", c.cfg.Name, doing)
	}
	return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: %s", c.cfg.Name, doing)
}

// dialError says what a failed handshake means. The texts are those of
// x/crypto, which has no types for them, and of sshd.
func (c *Conn) dialError(err error, mismatch *HostKeyMismatchError, greeting []byte) error {
	var negotiation *ssh.AlgorithmNegotiationError
	switch {
	case mismatch != nil:
		return mismatch
	case errors.As(err, &negotiation) && strings.Contains(err.Error(), "host key"):
		return &HostKeyMismatchError{Host: c.cfg.Name, Want: fingerprints(c.cfg.HostKeys)}
	case strings.Contains(err.Error(), "unable to authenticate"):
		return &AuthError{Host: c.cfg.Name, User: c.cfg.User, Fingerprint: ssh.FingerprintSHA256(c.cfg.Key.PublicKey())}
	case strings.HasPrefix(string(greeting), "Not allowed at this time"):
		return &AuthError{Host: c.cfg.Name, User: c.cfg.User, Penalised: true}
	case errors.Is(err, io.EOF) && len(greeting) > 0 && !strings.HasPrefix(string(greeting), "SSH-"):
		first, _, _ := strings.Cut(string(greeting), "\n")
		return fmt.Errorf("sshd says %q: %w", strings.TrimSpace(first), err)
	}
	return err
}

func fingerprints(keys []ssh.PublicKey) []string {
	out := make([]string, len(keys))
	for i, k := range keys {
		out[i] = ssh.FingerprintSHA256(k)
	}
	return out
}
