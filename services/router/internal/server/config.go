package server

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

// Config is the router's configuration file; README.md is its reference.
type Config struct {
	// BridgeID names the bridge; it is the router's name as a backend.
	BridgeID string `toml:"bridge_id"`
	// FallThrough tries the next backend after a clean refusal.
	FallThrough bool `toml:"fall_through"`
	// ShutdownTimeout is how long calls under way get to finish at the end.
	ShutdownTimeout config.Duration `toml:"shutdown_timeout"`
	grpcx.ServerConfig
	// Ledger holds the claims.
	Ledger LedgerConfig `toml:"ledger"`
	// Backends in the operator's order of preference.
	Backends []BackendConfig `toml:"backend"`
}

// LedgerConfig says where the claims are.
type LedgerConfig struct {
	// Driver is "sqlite".
	Driver string `toml:"driver"`
	// Path is the SQLite file.
	Path config.Path `toml:"path"`
}

// BackendConfig is one backend.
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
	defaultShutdownTimeout   = 30 * time.Second
)

// SetDefaults implements [config.Defaulter].
func (c *Config) SetDefaults() {
	c.FallThrough = true
	c.ShutdownTimeout = config.Duration{Duration: defaultShutdownTimeout}
}

// Load reads the configuration file at path and checks it, with the files that
// it names. The error has all problems, each with its key.
func Load(path string) (Config, error) {
	c, err := config.Load[Config](path)
	if err != nil {
		return Config{}, err
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("configuration: %s: %w", path, err)
	}
	return c, nil
}

// backendName is the contract's form of a name.
var backendName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`) //nolint:gochecknoglobals // A constant.

func (c *Config) check() error {
	var p config.Problems
	if !backendName.MatchString(c.BridgeID) {
		p.Add("bridge_id", "%q is not a name: want [a-z][a-z0-9-]*, at most 32 characters", c.BridgeID)
	}
	if c.Ledger.Path == "" {
		p.Add("ledger.path", "missing: the file that remembers which backend has which grant")
	}
	problems := []error{p.Err(), c.ServerConfig.Validate()}
	if len(c.Backends) == 0 {
		problems = append(problems, errors.New("backend: no [[backend]] section; the router needs at least one"))
	}
	names := map[string]int{}
	servesTLS, dialsTLS := false, false
	for _, l := range c.Listen {
		servesTLS = servesTLS || (l.Address != "" && !l.Insecure && grpcx.UnixPath(l.Address) == "")
	}
	for i := range c.Backends {
		b, key := &c.Backends[i], config.Key("backend", i)
		b.setDefaults()
		problems = append(problems, b.Validate(key))
		if !backendName.MatchString(b.Name) {
			problems = append(problems, fmt.Errorf("%s.name: %q is not a name: want [a-z][a-z0-9-]*, at most 32 characters", key, b.Name))
		} else if first, taken := names[b.Name]; taken {
			problems = append(problems, fmt.Errorf("%s.name: %q is the name of backend[%d] already", key, b.Name, first))
		} else {
			names[b.Name] = i
		}
		dialsTLS = dialsTLS || (b.Target != "" && !b.Insecure && grpcx.UnixPath(b.Target) == "")
	}
	if dialsTLS && !servesTLS {
		problems = append(problems, c.TLS.Validate("tls"))
	}
	return errors.Join(problems...)
}

func (b *BackendConfig) setDefaults() {
	for _, d := range []struct {
		field *config.Duration
		value time.Duration
	}{
		{&b.CanSatisfyTimeout, defaultCanSatisfyTimeout},
		{&b.PollInterval, defaultPollInterval},
		{&b.PollTimeout, defaultPollTimeout},
		{&b.ConnectTimeout, defaultConnectTimeout},
	} {
		if d.field.Duration == 0 {
			d.field.Duration = d.value
		}
	}
}

func (b *BackendConfig) worker() workers.Config {
	return workers.Config{
		Name: b.Name, Client: b.ClientConfig,
		PollInterval: b.PollInterval.Duration, PollTimeout: b.PollTimeout.Duration,
		AnswerTimeout: b.CanSatisfyTimeout.Duration, ConnectTimeout: b.ConnectTimeout.Duration,
	}
}
