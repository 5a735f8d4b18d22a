// Package config loads a process's configuration from one TOML file, strictly:
// what the program does not know is an error, never ignored, because a
// mistyped limit that silently does not apply is worse than a refused start.
//
// Every problem names the file and the key, with line and column where the text
// has them, and all problems are reported at once. Keys are matched exactly,
// and come from the toml tags of the target's fields.
//
// A target type may have two methods. SetDefaults, on the pointer, runs before
// the file is read, so that a zero that is written in the file stays zero.
// Validate runs after and reports with [Problems].
//
// Secrets are never in the file: it names files that hold them, see
// [SecretFile]. Relative paths are relative to the configuration file, see
// [Path].
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"

	"github.com/pelletier/go-toml/v2"
)

// maxFileBytes keeps a mistaken path from being read whole.
const maxFileBytes = 4 << 20

// Defaulter is implemented by targets that have defaults.
type Defaulter interface {
	// SetDefaults fills in what the file may leave out.
	SetDefaults()
}

// Validator is implemented by targets that check themselves.
type Validator interface {
	// Validate returns every problem found, each naming its key, best made
	// with [Problems].
	Validate() error
}

// Load reads the file at path into a T.
func Load[T any](path string) (T, error) {
	var zero T
	f, err := os.Open(path)
	if err != nil {
		return zero, fmt.Errorf("configuration: %w", err)
	}
	defer func() { _ = f.Close() }() // Nothing was written.
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return zero, fmt.Errorf("configuration: %w", err)
	}
	if len(data) > maxFileBytes {
		return zero, fmt.Errorf("configuration: %s: longer than %d bytes", path, maxFileBytes)
	}
	return Parse[T](path, data)
}

// Parse reads data into a T as [Load] does with the file at path, which names
// the file in errors and anchors relative paths.
func Parse[T any](path string, data []byte) (T, error) {
	var target, zero T
	if d, ok := any(&target).(Defaulter); ok {
		d.SetDefaults()
	}
	var problems []error
	report := func(err error) { problems = append(problems, fmt.Errorf("%s%w", path, err)) }
	for _, err := range checkKeys(data, reflect.TypeFor[T]()) {
		report(err)
	}
	// Unknown keys are found above, with a better message; here the option only
	// makes sure that nothing which is not a known key gets through.
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&target)
	var placed *toml.DecodeError
	if err != nil && (errors.As(err, &placed) || len(problems) == 0) {
		report(decodeError(err))
	}
	if len(problems) > 0 {
		return zero, errors.Join(problems...)
	}
	dir := filepath.Dir(path)
	for _, err := range resolve(reflect.ValueOf(&target).Elem(), "", dir) {
		report(fmt.Errorf(": %w", err))
	}
	if v, ok := any(&target).(Validator); ok {
		for _, err := range flatten(v.Validate()) {
			report(fmt.Errorf(": %w", err))
		}
	}
	if len(problems) > 0 {
		return zero, errors.Join(problems...)
	}
	return target, nil
}

// decodeError gives the library's error the form of ours.
func decodeError(err error) error {
	var decode *toml.DecodeError
	if !errors.As(err, &decode) {
		return fmt.Errorf(": %w", err)
	}
	line, column := decode.Position()
	text := bytes.TrimPrefix([]byte(decode.Error()), []byte("toml: "))
	if key := decode.Key(); len(key) > 0 {
		return fmt.Errorf(":%d:%d: %s: %s", line, column, dotted(key), text)
	}
	return fmt.Errorf(":%d:%d: %s", line, column, text)
}

// flatten returns the parts of a joined error, or the error itself.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}
