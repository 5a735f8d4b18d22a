// Package execpath finds programs the way a shell does, in an environment that isn't the guest's own, and gives the
// shell's exit codes for programs that can't be run.
package execpath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// DefaultPath is PATH where an image sets none: the one that container engines use.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Look finds name in the directories of pathList, or takes it as a path if it has a slash; relative paths are below
// dir. The error wraps [fs.ErrNotExist] if there is nothing of that name, or [fs.ErrPermission] if there is only
// something that can't be executed.
func Look(name, pathList, dir string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("empty command: %w", fs.ErrNotExist)
	}
	if strings.Contains(name, "/") {
		candidate := name
		if !filepath.IsAbs(candidate) {
			candidate = filepath.Join(dir, candidate)
		}
		if err := check(candidate); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		return candidate, nil
	}
	var denied error
	for _, element := range filepath.SplitList(pathList) {
		// An empty element means the current directory, as in every shell.
		if !filepath.IsAbs(element) {
			element = filepath.Join(dir, element)
		}
		candidate := filepath.Join(element, name)
		err := check(candidate)
		if err == nil {
			return candidate, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			denied = err
		}
	}
	if denied != nil {
		return "", fmt.Errorf("%s: %w", name, denied)
	}
	return "", fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

// check wraps only the two errors that Look promises, without the path: callers name it.
func check(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fs.ErrPermission
	case err != nil:
		return fs.ErrNotExist
	case info.IsDir():
		return fmt.Errorf("is a directory: %w", fs.ErrPermission)
	case info.Mode().Perm()&0o111 == 0:
		return fs.ErrPermission
	}
	return nil
}

// ExitCode is the shell's exit code for a program that could not be started: [guestapi.ExitNotFound] if something is
// missing, else [guestapi.ExitNotExecutable].
func ExitCode(err error) int {
	if errors.Is(err, fs.ErrNotExist) {
		return guestapi.ExitNotFound
	}
	return guestapi.ExitNotExecutable
}

// Reason is the part of err that a person needs, without the names of system calls, and with what usually is behind
// the two errors that mislead: a missing interpreter or loader, and a program for another processor.
func Reason(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		switch errno {
		case syscall.ENOENT:
			return "the file exists, but its interpreter or dynamic loader does not"
		case syscall.ENOEXEC:
			return "not an executable for this machine (exec format error)"
		default:
			return errno.Error()
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "no such file or directory"
	case errors.Is(err, fs.ErrPermission):
		return "not an executable file"
	default:
		return err.Error()
	}
}
