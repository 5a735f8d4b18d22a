package guestapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// ConfigVersion is the only version of [Config] that this package reads and writes.
const ConfigVersion = 1

// Defaults for the fields of [Config] whose zero value means "not set".
const (
	// DefaultListenPort is high, so that it needs no privilege and hardly ever meets a port of the workload's own.
	DefaultListenPort = 61022
	// DefaultUser is the login that receipts name.
	DefaultUser = "compute"
	// DefaultStopGraceSeconds is how long a workload has between SIGTERM and SIGKILL.
	DefaultStopGraceSeconds = 10
)

// Limits of a configuration. They are far above real use and bound what a hostile image or request can make of it.
const (
	// MaxConfigBytes bounds the encoded configuration.
	MaxConfigBytes = 1 << 20
	// MaxAuthorizedKeys bounds the number of login keys.
	MaxAuthorizedKeys = 64
	// MaxAuthorizedKeyBytes bounds one login key line. An RSA key of 16384 bits needs 2.8 kB.
	MaxAuthorizedKeyBytes = 8 << 10
	// MaxHostKeyBytes bounds the host key.
	MaxHostKeyBytes = 16 << 10
	// MaxStringBytes bounds one argument or one environment entry: Linux refuses longer ones (MAX_ARG_STRLEN, 32 pages).
	MaxStringBytes = 128<<10 - 1
	// MaxCommandArgs bounds the number of the command's arguments.
	MaxCommandArgs = 4096
	// MaxEnvironment bounds the number of environment variables.
	MaxEnvironment = 1024
	// MaxBannerBytes bounds the banner.
	MaxBannerBytes = 4 << 10
	// MaxStopGraceSeconds bounds the time between SIGTERM and SIGKILL.
	MaxStopGraceSeconds = 3600
)

// Config is everything that the guest is told about its instance. It is written by the worker with [Encode] and read
// by the guest with [Decode]; both validate. Marshalling it directly, or printing it, shows neither the host key nor
// values of the environment.
type Config struct {
	// Version must be [ConfigVersion].
	Version int
	// HostKey is the only host key that the SSH server uses. Required.
	HostKey HostKey
	// AuthorizedKeys are the login keys for both [Config.User] and root, each one line in authorized_keys form without
	// options. At least one.
	AuthorizedKeys []string
	// ListenPort is the TCP port of the SSH server, on all addresses of the container. 0 means [DefaultListenPort].
	ListenPort uint16
	// User is the login beside root. It is made in the container if the image lacks it. "" means [DefaultUser].
	User string
	// Command is the workload: the image's ENTRYPOINT and CMD joined, or the grant's override. Its end is the
	// instance's end. Empty means that the image has none: the guest stays until it is stopped.
	Command []string
	// Environment is laid over the guest's own environment, for the workload and for SSH sessions. Names have no '=',
	// NUL or control characters, values no NUL.
	Environment map[string]string
	// WorkingDir is the workload's directory, absolute, made if missing. "" means "/".
	WorkingDir string
	// RunAs is the image's USER: a uid or user name, optionally with ":" and a gid or group name. "" means the guest's
	// own user, which is root.
	RunAs string
	// StopGraceSeconds is the time between SIGTERM and SIGKILL for the workload. 0 means [DefaultStopGraceSeconds].
	StopGraceSeconds uint32
	// Banner is shown to every client before authentication. Optional.
	Banner string
}

// wireConfig is the JSON form of Config.
type wireConfig struct {
	Version          int               `json:"version"`
	HostKeyPEM       string            `json:"host_key_pem"`
	AuthorizedKeys   []string          `json:"authorized_keys"`
	ListenPort       uint16            `json:"listen_port"`
	User             string            `json:"user"`
	Command          []string          `json:"command"`
	Environment      map[string]string `json:"environment"`
	WorkingDir       string            `json:"working_dir"`
	RunAs            string            `json:"run_as"`
	StopGraceSeconds uint32            `json:"stop_grace_seconds"`
	Banner           string            `json:"banner,omitempty"`
}

func (c Config) wire() wireConfig {
	return wireConfig{
		Version:          c.Version,
		HostKeyPEM:       c.HostKey.Reveal(),
		AuthorizedKeys:   c.AuthorizedKeys,
		ListenPort:       c.ListenPort,
		User:             c.User,
		Command:          c.Command,
		Environment:      c.Environment,
		WorkingDir:       c.WorkingDir,
		RunAs:            c.RunAs,
		StopGraceSeconds: c.StopGraceSeconds,
		Banner:           c.Banner,
	}
}

// config is the Config of what was read, with the defaults filled in.
func (w wireConfig) config() Config {
	return Config{
		Version:          w.Version,
		HostKey:          NewHostKey(w.HostKeyPEM),
		AuthorizedKeys:   w.AuthorizedKeys,
		ListenPort:       w.ListenPort,
		User:             w.User,
		Command:          w.Command,
		Environment:      w.Environment,
		WorkingDir:       w.WorkingDir,
		RunAs:            w.RunAs,
		StopGraceSeconds: w.StopGraceSeconds,
		Banner:           w.Banner,
	}.withDefaults()
}

// Encode validates c, fills in the defaults and returns the bytes of the guest's configuration file. Equal
// configurations give equal bytes. The result holds the host key: write it with mode 0600.
func Encode(c Config) ([]byte, error) {
	c = c.withDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(c.wire()); err != nil {
		return nil, fmt.Errorf("encode configuration: %w", err)
	}
	if buf.Len() > MaxConfigBytes {
		return nil, fmt.Errorf("configuration has %d bytes; at most %d are allowed", buf.Len(), MaxConfigBytes)
	}
	return buf.Bytes(), nil
}

// Decode reads one configuration. It refuses unknown fields, other versions, trailing data, more than
// [MaxConfigBytes] and whatever [Config.Validate] refuses; errors name the field and never quote a value. Defaults are
// filled in.
func Decode(r io.Reader) (Config, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxConfigBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > MaxConfigBytes {
		return Config{}, fmt.Errorf("configuration has more than %d bytes", MaxConfigBytes)
	}
	// encoding/json would silently replace invalid sequences, and so change a value.
	if !utf8.Valid(data) {
		return Config{}, errors.New("configuration is not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var w wireConfig
	if err := dec.Decode(&w); err != nil {
		return Config{}, describeJSONError(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("configuration has data after its end")
	}
	c := w.config()
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// describeJSONError keeps encoding/json's position and field, and drops the values that it would quote.
func describeJSONError(err error) error {
	var typeErr *json.UnmarshalTypeError
	var syntaxErr *json.SyntaxError
	switch {
	case errors.As(err, &typeErr):
		field := typeErr.Field
		if field == "" {
			field = "configuration"
		}
		return fmt.Errorf("%s: expected %s at byte %d", field, typeErr.Type, typeErr.Offset)
	case errors.As(err, &syntaxErr):
		return fmt.Errorf("configuration is not valid JSON at byte %d", syntaxErr.Offset)
	case errors.Is(err, io.EOF):
		return errors.New("configuration is empty")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("configuration ends in the middle")
	default:
		// What is left is an unknown field, whose name is in the text.
		return fmt.Errorf("configuration: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
}

func (c Config) withDefaults() Config {
	if c.ListenPort == 0 {
		c.ListenPort = DefaultListenPort
	}
	if c.User == "" {
		c.User = DefaultUser
	}
	if c.StopGraceSeconds == 0 {
		c.StopGraceSeconds = DefaultStopGraceSeconds
	}
	return c
}

// StopGrace is [Config.StopGraceSeconds] as a duration, with the default filled in.
func (c Config) StopGrace() time.Duration {
	return time.Duration(c.withDefaults().StopGraceSeconds) * time.Second
}

// Validate reports the first field that the guest would refuse, by its JSON name. The error never holds a value of
// the environment or of the host key. Whether keys parse is checked in form only here; the guest parses them.
func (c Config) Validate() error {
	c = c.withDefaults()
	if c.Version != ConfigVersion {
		return fmt.Errorf("version: %d is not supported; this is version %d", c.Version, ConfigVersion)
	}
	checks := []struct {
		field string
		err   error
	}{
		{"host_key_pem", validateHostKey(c.HostKey.Reveal())},
		{"authorized_keys", validateAuthorizedKeys(c.AuthorizedKeys)},
		{"user", validateUserName(c.User)},
		{"command", validateCommand(c.Command)},
		{"environment", validateEnvironment(c.Environment)},
		{"working_dir", validateWorkingDir(c.WorkingDir)},
		{"run_as", validateRunAs(c.RunAs)},
		{"banner", validateBanner(c.Banner)},
	}
	for _, check := range checks {
		if check.err != nil {
			return fmt.Errorf("%s: %w", check.field, check.err)
		}
	}
	if c.StopGraceSeconds > MaxStopGraceSeconds {
		return fmt.Errorf("stop_grace_seconds: %d is more than %d", c.StopGraceSeconds, MaxStopGraceSeconds)
	}
	return nil
}

func validateHostKey(text string) error {
	switch {
	case text == "":
		return errors.New("is required")
	case len(text) > MaxHostKeyBytes:
		return fmt.Errorf("has more than %d bytes", MaxHostKeyBytes)
	}
	block, rest := pem.Decode([]byte(text))
	switch {
	case block == nil:
		return errors.New("is not PEM")
	case !strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return errors.New("is not a private key")
	case len(bytes.TrimSpace(rest)) != 0:
		return errors.New("has data after the key")
	}
	return nil
}

func validateAuthorizedKeys(keys []string) error {
	if len(keys) == 0 {
		return errors.New("at least one key is required")
	}
	if len(keys) > MaxAuthorizedKeys {
		return fmt.Errorf("%d keys; at most %d are allowed", len(keys), MaxAuthorizedKeys)
	}
	for i, key := range keys {
		if err := validateAuthorizedKey(key); err != nil {
			return fmt.Errorf("key %d: %w", i, err)
		}
	}
	return nil
}

func validateAuthorizedKey(key string) error {
	if len(key) > MaxAuthorizedKeyBytes {
		return fmt.Errorf("has more than %d bytes", MaxAuthorizedKeyBytes)
	}
	if hasControl(strings.TrimSuffix(key, "\n")) {
		return errors.New("has a control character; it must be one line")
	}
	fields := strings.Fields(key)
	if len(fields) < 2 {
		return errors.New("is not of the form 'type base64 comment'")
	}
	blob, err := base64.StdEncoding.DecodeString(fields[1])
	if err != nil {
		return errors.New("its second field is not base64")
	}
	// The blob begins with the type again, as an SSH string: that also tells options from a type.
	if want := fields[0]; len(blob) < 4+len(want) || string(blob[4:4+len(want)]) != want {
		return errors.New("type and data don't agree (options are not allowed)")
	}
	return nil
}

// validateUserName follows useradd's rule, so that the name can stand in any passwd file.
func validateUserName(name string) error {
	if len(name) > 32 {
		return errors.New("has more than 32 characters")
	}
	for i, r := range name {
		letter := r >= 'a' && r <= 'z' || r == '_'
		digit := r >= '0' && r <= '9' || r == '-'
		if !letter && (i == 0 || !digit) {
			return errors.New("must match [a-z_][a-z0-9_-]*")
		}
	}
	return nil
}

func validateCommand(command []string) error {
	if len(command) > MaxCommandArgs {
		return fmt.Errorf("%d arguments; at most %d are allowed", len(command), MaxCommandArgs)
	}
	for i, arg := range command {
		switch {
		case i == 0 && arg == "":
			return errors.New("argument 0 is empty")
		case len(arg) > MaxStringBytes:
			return fmt.Errorf("argument %d has more than %d bytes", i, MaxStringBytes)
		case !utf8.ValidString(arg):
			return fmt.Errorf("argument %d is not valid UTF-8", i)
		case strings.ContainsRune(arg, 0):
			return fmt.Errorf("argument %d has a NUL byte", i)
		}
	}
	return nil
}

func validateEnvironment(env map[string]string) error {
	if len(env) > MaxEnvironment {
		return fmt.Errorf("%d variables; at most %d are allowed", len(env), MaxEnvironment)
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		value := env[name]
		switch {
		case name == "":
			return errors.New("a name is empty")
		case !utf8.ValidString(name):
			return fmt.Errorf("name %q is not valid UTF-8", name)
		case strings.Contains(name, "="):
			return fmt.Errorf("name %q has '='", name)
		case hasControl(name):
			return fmt.Errorf("name %q has a control character", name)
		case len(name)+1+len(value) > MaxStringBytes:
			return fmt.Errorf("variable %q has more than %d bytes", name, MaxStringBytes)
		case !utf8.ValidString(value):
			return fmt.Errorf("value of %q is not valid UTF-8", name)
		case strings.ContainsRune(value, 0):
			return fmt.Errorf("value of %q has a NUL byte", name)
		}
	}
	return nil
}

func validateWorkingDir(dir string) error {
	switch {
	case dir == "":
		return nil
	case len(dir) > 4095:
		return errors.New("has more than 4095 bytes")
	case !utf8.ValidString(dir):
		return errors.New("is not valid UTF-8")
	case strings.ContainsRune(dir, 0):
		return errors.New("has a NUL byte")
	case !path.IsAbs(dir):
		return errors.New("is not absolute")
	}
	return nil
}

func validateRunAs(runAs string) error {
	if runAs == "" {
		return nil
	}
	if len(runAs) > 128 {
		return errors.New("has more than 128 bytes")
	}
	if !utf8.ValidString(runAs) || hasControl(runAs) || strings.ContainsAny(runAs, " /") {
		return errors.New("has a character that no user or group name has")
	}
	user, group, found := strings.Cut(runAs, ":")
	if user == "" || found && group == "" || strings.Contains(group, ":") {
		return errors.New("is not of the form 'user' or 'user:group'")
	}
	return nil
}

func validateBanner(banner string) error {
	switch {
	case len(banner) > MaxBannerBytes:
		return fmt.Errorf("has more than %d bytes", MaxBannerBytes)
	case !utf8.ValidString(banner):
		return errors.New("is not valid UTF-8")
	}
	for _, r := range banner {
		if r != '\n' && r != '\t' && (r < ' ' || r == 0x7f) {
			return errors.New("has a control character")
		}
	}
	return nil
}

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// summary is what may be shown of a configuration.
func (c Config) summary() string {
	return fmt.Sprintf("guest configuration version %d: port %d, user %q, %d keys, %d arguments, %d variables",
		c.Version, c.ListenPort, c.User, len(c.AuthorizedKeys), len(c.Command), len(c.Environment))
}

// Format implements [fmt.Formatter] with a summary that has no secret, for every verb.
func (c Config) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.summary()) }

// String implements [fmt.Stringer] with a summary that has no secret.
func (c Config) String() string { return c.summary() }

// LogValue implements [slog.LogValuer] with a summary that has no secret.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.summary()) }

// MarshalJSON implements [json.Marshaler] for logs: it hides the host key and every value of the environment, so its
// result is no configuration file. Use [Encode] for that.
func (c Config) MarshalJSON() ([]byte, error) {
	w := c.wire()
	w.HostKeyPEM = redacted
	w.Environment = make(map[string]string, len(c.Environment))
	for name := range c.Environment {
		w.Environment[name] = redacted
	}
	return json.Marshal(w)
}
