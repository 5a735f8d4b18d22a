package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// Duration is a length of time that is written as a string with a unit, such as
// "30s" or "1h30m". A bare number or a negative length is refused. It is a
// struct because the decoder would store a bare number in an integer type as
// it is, in nanoseconds.
type Duration struct{ time.Duration }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration, want a number with a unit such as \"30s\"", text)
	}
	if v < 0 {
		return fmt.Errorf("duration %q is negative", text)
	}
	d.Duration = v
	return nil
}

// MarshalText implements [encoding.TextMarshaler].
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Path is a path to a file or directory. A relative one is made relative to the
// configuration file's directory by [Load].
type Path string

// SecretFile names a file that holds a secret, which [Load] reads. The file
// must not be accessible to group or others. One line end at the end of the
// file, which editors add, is not part of the secret.
type SecretFile struct {
	path   string
	secret redact.Secret
}

// maxSecretBytes is far above any key or token.
const maxSecretBytes = 64 << 10

// UnmarshalText implements [encoding.TextUnmarshaler]; it takes the path.
func (s *SecretFile) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		return errors.New("empty path")
	}
	s.path = string(text)
	return nil
}

// Path returns the path of the file, empty when the key is not set.
func (s SecretFile) Path() string { return s.path }

// Secret returns what the file holds, empty when the key is not set.
func (s SecretFile) Secret() redact.Secret { return s.secret }

func (s *SecretFile) load() error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // Nothing was written.
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: not a regular file", s.path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s: mode %04o lets others than the owner in, want 0600", s.path, perm)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxSecretBytes+1))
	defer clear(raw)
	if err != nil {
		return err
	}
	if len(raw) > maxSecretBytes {
		return fmt.Errorf("%s: longer than %d bytes", s.path, maxSecretBytes)
	}
	text := raw
	if n := len(text); n > 0 && text[n-1] == '\n' {
		text = text[:n-1]
		if n := len(text); n > 0 && text[n-1] == '\r' {
			text = text[:n-1]
		}
	}
	if len(text) == 0 {
		return fmt.Errorf("%s: empty", s.path)
	}
	s.secret = redact.New(text)
	return nil
}

func anchored(path, dir string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// resolve anchors the paths below v and reads its secrets.
func resolve(v reflect.Value, key, dir string) []error {
	switch v.Type() {
	case reflect.TypeFor[Path]():
		v.SetString(anchored(v.String(), dir))
		return nil
	case reflect.TypeFor[SecretFile]():
		s, ok := reflect.TypeAssert[*SecretFile](v.Addr())
		if !ok || s.path == "" {
			return nil
		}
		s.path = anchored(s.path, dir)
		if err := s.load(); err != nil {
			return []error{fmt.Errorf("%s: %w", key, err)}
		}
		return nil
	}
	var problems []error
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			return resolve(v.Elem(), key, dir)
		}
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			problems = append(problems, resolve(v.Index(i), fmt.Sprintf("%s[%d]", key, i), dir)...)
		}
	case reflect.Map:
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		for _, k := range keys {
			// A map's elements cannot be changed in place.
			element := reflect.New(v.Type().Elem()).Elem()
			element.Set(v.MapIndex(k))
			problems = append(problems, resolve(element, Key(key, fmt.Sprint(k)), dir)...)
			v.SetMapIndex(k, element)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if !f.IsExported() {
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
			switch {
			case name != "":
				name = Key(key, name)
			case f.Anonymous:
				name = key
			default:
				name = Key(key, f.Name)
			}
			problems = append(problems, resolve(v.Field(i), name, dir)...)
		}
	}
	return problems
}
