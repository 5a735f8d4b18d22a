package server

import (
	"cmp"
	"io"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

// Config is the router's configuration file; README.md is its reference.
type Config struct {
	// BridgeID names the bridge; it is the router's name as a backend.
	BridgeID string `toml:"bridge_id"`
	// FallThrough tries the next backend after a clean refusal.
	FallThrough bool `toml:"fall_through"`
	// ShutdownTimeout is how long calls under way get when the process stops.
	ShutdownTimeout config.Duration `toml:"shutdown_timeout"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`
	// MetricsAddress serves /metrics over HTTP; empty: nowhere.
	MetricsAddress string `toml:"metrics_address"`

	// Ledger holds the claims. Replicas share it.
	Ledger ledger.Section `toml:"ledger"`

	grpcx.ServerConfig

	// Backends in the operator's order of preference.
	Backends []BackendConfig `toml:"backend"`
}

// BackendConfig is one backend. Limits that are zero have their defaults.
type BackendConfig struct {
	// Name is the first part of the handles of what runs there.
	Name string `toml:"name"`
	grpcx.ClientConfig
	// CanSatisfyTimeout is how long it may think about a new grant.
	CanSatisfyTimeout config.Duration `toml:"can_satisfy_timeout"`
	// PollInterval is how often its capabilities are read.
	PollInterval config.Duration `toml:"poll_interval"`
	// PollTimeout is how long one reading may take.
	PollTimeout config.Duration `toml:"poll_timeout"`
	// ConnectTimeout is how long a call for a grant that it has waits for a
	// lost connection.
	ConnectTimeout config.Duration `toml:"connect_timeout"`
}

// Defaults of a backend's limits.
const (
	defaultCanSatisfyTimeout = 2 * time.Second
	defaultPollInterval      = 5 * time.Second
	defaultPollTimeout       = 3 * time.Second
	defaultConnectTimeout    = 5 * time.Second
)

// SetDefaults implements [config.Defaulter].
func (c *Config) SetDefaults() {
	c.FallThrough = true
	c.ShutdownTimeout.Duration = 10 * time.Second
	c.LogLevel = "info"
}

// Validate implements [config.Validator].
func (c Config) Validate() error {
	var p config.Problems
	if !backend.ValidName(c.BridgeID) {
		p.Add("bridge_id", "%q: want [a-z][a-z0-9-]*, at most 32 bytes", c.BridgeID)
	}
	if _, err := telemetry.NewLogger(io.Discard, telemetry.LogConfig{Level: c.LogLevel}); err != nil {
		p.Add("log_level", "%q: want debug, info, warn or error", c.LogLevel)
	}
	p.Join(c.Ledger.Validate("ledger"))
	p.Join(c.ServerConfig.Validate())
	if len(c.Backends) == 0 {
		p.Add("backend", "no [[backend]] section; the router needs at least one")
	}
	first := map[string]int{}
	servesTLS, dialsTLS := false, false
	for _, l := range c.Listen {
		servesTLS = servesTLS || (l.Address != "" && !l.Insecure && grpcx.UnixPath(l.Address) == "")
	}
	for i, b := range c.Backends {
		key := config.Key("backend", i)
		p.Join(b.ClientConfig.Validate(key))
		switch other, taken := first[b.Name]; {
		case !backend.ValidName(b.Name):
			p.Add(config.Key(key, "name"), "%q: want [a-z][a-z0-9-]*, at most 32 bytes", b.Name)
		case taken:
			p.Add(config.Key(key, "name"), "%q is the name of backend[%d] already", b.Name, other)
		default:
			first[b.Name] = i
		}
		dialsTLS = dialsTLS || (b.Target != "" && !b.Insecure && grpcx.UnixPath(b.Target) == "")
	}
	// A listener that needs the files has them checked above.
	if dialsTLS && !servesTLS {
		p.Join(c.TLS.Validate("tls"))
	}
	return p.Err()
}

func (b BackendConfig) worker() workers.Config {
	return workers.Config{
		Name: b.Name, Client: b.ClientConfig,
		AnswerTimeout:  cmp.Or(b.CanSatisfyTimeout.Duration, defaultCanSatisfyTimeout),
		PollInterval:   cmp.Or(b.PollInterval.Duration, defaultPollInterval),
		PollTimeout:    cmp.Or(b.PollTimeout.Duration, defaultPollTimeout),
		ConnectTimeout: cmp.Or(b.ConnectTimeout.Duration, defaultConnectTimeout),
	}
}
