package worker

import (
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// Config is a worker's configuration file. D is the driver's own part.
type Config[D any] struct {
	// BridgeID is the operator's name for the bridge. Everything that is
	// created carries it, and nothing without it is ever touched.
	BridgeID string `toml:"bridge_id"`
	// Name of the backend.
	Name string `toml:"name"`
	// SecretFile holds the worker secret: host keys and the key that signs
	// compute logs follow from it. It is made if it doesn't exist. Replicas
	// share it.
	SecretFile config.Path `toml:"secret_file"`
	// MaxDuration is the longest time until a grant's deadline.
	MaxDuration config.Duration `toml:"max_duration"`
	// AllowPlaintextReceipts hands out private keys in clear to grants that
	// bring no key. For development.
	AllowPlaintextReceipts bool `toml:"allow_plaintext_receipts"`
	// ShutdownTimeout is how long calls under way get when the process stops.
	// Instances keep running.
	ShutdownTimeout config.Duration `toml:"shutdown_timeout"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`
	// MetricsAddress serves /metrics over HTTP; empty: nowhere.
	MetricsAddress string `toml:"metrics_address"`

	// Ledger is where claims, attempts and compute logs are kept. Replicas share
	// it.
	Ledger ledger.Section `toml:"ledger"`
	Sweep  SweepConfig    `toml:"sweep"`

	grpcx.ServerConfig

	// Backend is the driver's part.
	Backend D `toml:"backend"`
}

// SweepConfig says when what should not exist is deleted.
type SweepConfig struct {
	// Interval between sweeps.
	Interval config.Duration `toml:"interval"`
	// OrphanAge is how old an attempt that nobody works on must be.
	OrphanAge config.Duration `toml:"orphan_age"`
	// Grace is how long past its deadline an instance may be seen.
	Grace config.Duration `toml:"grace"`
}

// SetDefaults implements config.Defaulter.
func (c *Config[D]) SetDefaults() {
	c.MaxDuration.Duration = 31 * 24 * time.Hour
	c.ShutdownTimeout.Duration = 10 * time.Second
	c.LogLevel = "info"
	c.Sweep = SweepConfig{
		Interval: config.Duration{Duration: 30 * time.Second}, OrphanAge: config.Duration{Duration: 2 * time.Minute},
		Grace: config.Duration{Duration: time.Minute},
	}
	if d, ok := any(&c.Backend).(config.Defaulter); ok {
		d.SetDefaults()
	}
}

// Validate implements config.Validator.
func (c Config[D]) Validate() error {
	var p config.Problems
	if !backend.ValidName(c.BridgeID) {
		p.Add("bridge_id", "%q: want [a-z][a-z0-9-]*, at most 32 bytes", c.BridgeID)
	}
	if !backend.ValidName(c.Name) {
		p.Add("name", "%q: want [a-z][a-z0-9-]*, at most 32 bytes", c.Name)
	}
	if c.SecretFile == "" {
		p.Add("secret_file", "missing")
	}
	p.Join(c.Ledger.Validate("ledger"))
	if c.Sweep.Interval.Duration <= 0 {
		p.Add("sweep.interval", "must be positive")
	}
	p.Join(c.ServerConfig.Validate())
	if v, ok := any(c.Backend).(config.Validator); ok {
		p.Join(v.Validate())
	}
	return p.Err()
}
