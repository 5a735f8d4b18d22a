package hostfs

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Base is a directory that built paths can't leave.
type Base struct {
	dir string
}

// NewBase returns a base. The directory must be an absolute, clean path.
func NewBase(dir string) (Base, error) {
	if !path.IsAbs(dir) || path.Clean(dir) != dir || dir == "/" || strings.ContainsAny(dir, "\x00\n") {
		return Base{}, fmt.Errorf("directory %q is not an absolute, clean path", dir)
	}
	return Base{dir: dir}, nil
}

// String returns the directory.
func (b Base) String() string { return b.dir }

// Join returns the path of a file below the base. Each element must be one plain
// name: not empty, not "." or "..", without slash, control characters or a
// leading "-", and at most 255 bytes.
func (b Base) Join(elements ...string) (string, error) {
	if b.dir == "" {
		return "", errors.New("path without a base")
	}
	for _, e := range elements {
		if err := checkName(e); err != nil {
			return "", err
		}
	}
	return strings.Join(append([]string{b.dir}, elements...), "/"), nil
}

// Base returns the base of a directory below this one.
func (b Base) Base(elements ...string) (Base, error) {
	dir, err := b.Join(elements...)
	return Base{dir: dir}, err
}

// maxName is the limit of Linux's file systems.
const maxName = 255

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q is no file name", name)
	case len(name) > maxName:
		return fmt.Errorf("file name of %d bytes is too long", len(name))
	case name[0] == '-':
		return fmt.Errorf("file name %q begins like an option", name)
	}
	for i := range len(name) {
		if c := name[i]; c == '/' || c < ' ' || c == 0x7f {
			return fmt.Errorf("file name %q has a slash or control character", name)
		}
	}
	return nil
}
