package ledger

import (
	"github.com/compute-bridge/compute-bridge/pkg/config"
)

// Section is the part of a configuration file that says where the ledger is.
type Section struct {
	// Driver is "sqlite", the default, or "postgres".
	Driver string `toml:"driver"`
	// Path is the SQLite file.
	Path config.Path `toml:"path"`
	// DSN is the PostgreSQL database: postgres://user@host:port/database. It
	// holds no password. TLS is verified unless it says sslmode=disable.
	DSN string `toml:"dsn"`
	// PasswordFile holds the password of DSN's user; without, the server wants
	// none, or a certificate.
	PasswordFile config.SecretFile `toml:"password_file"`
}

// Validate reports every problem, with key as the section's name.
func (s Section) Validate(key string) error {
	var p config.Problems
	at := func(name string) string { return config.Key(key, name) }
	switch s.Driver {
	case "", DriverSQLite:
		if s.Path == "" {
			p.Add(at("path"), "missing: the SQLite file")
		}
		if s.DSN != "" {
			p.Add(at("dsn"), "is for driver %q", DriverPostgres)
		}
		if s.PasswordFile.Path() != "" {
			p.Add(at("password_file"), "is for driver %q", DriverPostgres)
		}
	case DriverPostgres:
		if s.Path != "" {
			p.Add(at("path"), "is for driver %q", DriverSQLite)
		}
		if s.DSN == "" {
			p.Add(at("dsn"), "missing: the PostgreSQL database")
		} else if _, err := parseDSN(s.DSN); err != nil {
			p.Add(at("dsn"), "%w", err)
		}
	default:
		p.Add(at("driver"), "%q: want %q or %q", s.Driver, DriverSQLite, DriverPostgres)
	}
	return p.Err()
}

// Config returns what [Open] takes.
func (s Section) Config() Config {
	return Config{Driver: s.Driver, Path: string(s.Path), DSN: s.DSN, Password: s.PasswordFile.Secret()}
}
