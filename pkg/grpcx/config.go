// Package grpcx is how the bridge's processes speak gRPC to each other: which
// listeners there are and who may call what, mutual TLS whose certificates
// reload without a restart, and one order of interceptors for all.
//
// A caller's identity is the first URI of its certificate (or the first DNS
// name, or the common name, if it has none), "unix:UID" on a unix socket, and
// "insecure" on a plaintext listener. Only identities that the configuration
// lists may call; a router's identity may speak for its own caller.
package grpcx

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
)

// InsecureIdentity is the identity of whoever calls on a plaintext TCP
// listener.
const InsecureIdentity = "insecure"

// TLSConfig names the files of one side of mutual TLS, all PEM.
type TLSConfig struct {
	// CertFile is this process's certificate chain.
	CertFile config.Path `toml:"cert_file"`
	// KeyFile is its private key.
	KeyFile config.Path `toml:"key_file"`
	// CAFile has the authorities whose certificates are believed.
	CAFile config.Path `toml:"ca_file"`
}

// ListenConfig is one listener.
type ListenConfig struct {
	// Address is "host:port" or "unix:/path". A unix socket is plaintext, mode
	// 0600.
	Address string `toml:"address"`
	// Insecure allows plaintext TCP. Loopback addresses only.
	Insecure bool `toml:"insecure"`
}

// ClientEntry is an identity that may call.
type ClientEntry struct {
	// Identity as package grpcx derives it.
	Identity string `toml:"identity"`
	// Role is reader, client or operator: what it may do in its own name.
	Role string `toml:"role"`
	// Router lets it speak for its own callers, as client or less; operators'
	// calls it passes on as operator.
	Router bool `toml:"router"`
}

// ServerConfig is what a serving process needs to know.
type ServerConfig struct {
	Listen  []ListenConfig `toml:"listen"`
	TLS     TLSConfig      `toml:"tls"`
	Clients []ClientEntry  `toml:"client"`
	// MaxConnectionAge is how long a connection lives before the client has to
	// make a new one, which spreads clients over replicas that were added later;
	// zero: [DefaultMaxConnectionAge]. Watches survive it: clients attach again.
	MaxConnectionAge config.Duration `toml:"max_connection_age"`
	// MaxConnectionAgeGrace is how long calls under way on a connection that is
	// past its age may go on before they are cut off: longer than a Provision
	// takes. Zero: [DefaultMaxConnectionAgeGrace].
	MaxConnectionAgeGrace config.Duration `toml:"max_connection_age_grace"`
}

// Limits of connections that the configuration doesn't set.
const (
	DefaultMaxConnectionAge      = 30 * time.Minute
	DefaultMaxConnectionAgeGrace = 5 * time.Minute
	// minConnectionAge leaves a connection some time for calls.
	minConnectionAge = 100 * time.Millisecond
)

// ClientConfig is how to reach a server.
type ClientConfig struct {
	// Target as gRPC resolves it: "dns:///name:port", "unix:/path", "host:port";
	// or several of the last kind, "a:7443,b:7443", for replicas.
	Target string `toml:"target"`
	// ServerName that the server's certificate must have; empty: the target's
	// host.
	ServerName string `toml:"server_name"`
	// Insecure allows plaintext TCP to a loopback address. A unix socket is
	// always plaintext.
	Insecure bool `toml:"insecure"`
}

// UnixPath returns the path of a unix address, "" if it isn't one.
func UnixPath(address string) string {
	rest, ok := strings.CutPrefix(address, "unix:")
	if !ok {
		return ""
	}
	return "/" + strings.TrimLeft(rest, "/")
}

// Validate checks that the files are named and can be loaded. key is the
// configuration's name of the table, for messages.
func (t TLSConfig) Validate(key string) error {
	var errs []error
	for _, f := range []struct {
		name string
		path config.Path
	}{{"cert_file", t.CertFile}, {"key_file", t.KeyFile}, {"ca_file", t.CAFile}} {
		if f.path == "" {
			errs = append(errs, fmt.Errorf("%s.%s: missing", key, f.name))
		} else if _, err := os.Stat(string(f.path)); err != nil {
			errs = append(errs, fmt.Errorf("%s.%s: %w", key, f.name, err))
		}
	}
	if len(errs) == 0 {
		if _, err := loadFiles(t); err != nil {
			errs = append(errs, fmt.Errorf("%s.%w", key, err))
		}
	}
	return errors.Join(errs...)
}

// Validate reports everything that is wrong with the configuration, each
// problem with its key.
func (c ServerConfig) Validate() error {
	var errs []error
	needTLS := false
	if len(c.Listen) == 0 {
		errs = append(errs, errors.New("listen: no [[listen]] section; nothing would be served"))
	}
	for i, l := range c.Listen {
		key := fmt.Sprintf("listen[%d]", i)
		switch {
		case l.Address == "":
			errs = append(errs, fmt.Errorf("%s.address: missing", key))
		case UnixPath(l.Address) != "":
			if l.Insecure {
				errs = append(errs, fmt.Errorf("%s.insecure: a unix socket needs no such setting", key))
			}
		default:
			host, _, err := net.SplitHostPort(l.Address)
			switch {
			case err != nil:
				errs = append(errs, fmt.Errorf("%s.address: %w", key, err))
			case !l.Insecure:
				needTLS = true
			case !isLoopback(host):
				errs = append(errs, fmt.Errorf("%s.insecure: plaintext is for loopback addresses only, not %q", key, host))
			}
		}
	}
	if needTLS {
		errs = append(errs, c.TLS.Validate("tls"))
	}
	if age := c.MaxConnectionAge.Duration; age != 0 && age < minConnectionAge {
		errs = append(errs, fmt.Errorf("max_connection_age: %s is too short, want at least %s", age, minConnectionAge))
	}
	if grace := c.MaxConnectionAgeGrace.Duration; grace < 0 {
		errs = append(errs, fmt.Errorf("max_connection_age_grace: %s is negative", grace))
	}
	if len(c.Clients) == 0 {
		errs = append(errs, errors.New("client: no [[client]] section; nobody could call"))
	}
	seen := map[string]bool{}
	for i, client := range c.Clients {
		key := fmt.Sprintf("client[%d]", i)
		switch {
		case client.Identity == "":
			errs = append(errs, fmt.Errorf("%s.identity: missing", key))
		case seen[client.Identity]:
			errs = append(errs, fmt.Errorf("%s.identity: %q is listed twice", key, client.Identity))
		}
		seen[client.Identity] = true
		if _, err := backend.ParseRole(client.Role); err != nil {
			errs = append(errs, fmt.Errorf("%s.role: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

// Validate reports what is wrong with the way to a server.
func (c ClientConfig) Validate(key string) error {
	if c.Target == "" {
		return fmt.Errorf("%s.target: missing", key)
	}
	if all := endpoints(c.Target); len(all) > 0 {
		for _, endpoint := range all {
			host, port, err := net.SplitHostPort(endpoint)
			switch {
			case err != nil:
				return fmt.Errorf("%s.target: %w", key, err)
			case host == "" || port == "":
				return fmt.Errorf("%s.target: %q: want host:port", key, endpoint)
			case c.Insecure && !isLoopback(host):
				return fmt.Errorf("%s.insecure: plaintext is for loopback addresses only, not %q", key, host)
			}
		}
		return nil
	}
	if c.Insecure && UnixPath(c.Target) == "" {
		_, endpoint, found := strings.Cut(c.Target, ":///")
		if !found {
			endpoint = c.Target
		}
		host, _, err := net.SplitHostPort(endpoint)
		if err != nil {
			return fmt.Errorf("%s.target: %w", key, err)
		}
		if !isLoopback(host) {
			return fmt.Errorf("%s.insecure: plaintext is for loopback addresses only, not %q", key, host)
		}
	}
	return nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}
