// Package workload runs the image's own command, the process whose life is the instance's life.
package workload

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/environ"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/execpath"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/process"
)

// Spec says what to run and how.
type Spec struct {
	// Command is the argument vector, not empty. Its first element is searched in the PATH of Env.
	Command []string
	// Env is the whole environment.
	Env []string
	// Dir is the working directory, made if missing; "" means "/".
	Dir string
	// Account is whom to run as; nil means as the guest itself.
	Account *account.Account
	// Stdout and Stderr are the workload's own.
	Stdout, Stderr *os.File
}

// Workload is the running command. Its methods are safe for concurrent use.
type Workload struct {
	*process.Process

	stdin *os.File
}

// StartError says that the command could not be started, and with which code the instance ends.
type StartError struct {
	// Code is the exit code: 127 for a missing command, 126 for one that can't be executed.
	Code int
	// Reason is for people.
	Reason string
}

// Error implements error.
func (e *StartError) Error() string { return e.Reason }

// Start starts the command. Its standard input is a pipe that stays open and empty, so that a shell as the image's
// command waits instead of ending at once. Errors are of type *[StartError].
func Start(spec Spec) (*Workload, error) {
	dir := spec.Dir
	if dir == "" {
		dir = "/"
	}
	// Container engines make a missing working directory too.
	if err := os.MkdirAll(dir, 0o755); err != nil { // #nosec G301 -- as engines do; the image's user must enter it
		return nil, startError(126, "can't make the working directory %q: %v", dir, reason(err))
	}
	pathList, ok := environ.Get(spec.Env, "PATH")
	if !ok {
		pathList = execpath.DefaultPath
	}
	program, err := execpath.Look(spec.Command[0], pathList, dir)
	if err != nil {
		return nil, startError(execpath.ExitCode(err), "can't start the workload %s: %s", quote(spec.Command[0]),
			execpath.Reason(err))
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, startError(126, "can't make a pipe: %v", err)
	}
	defer read.Close()
	cmd := &exec.Cmd{
		Path:   program,
		Args:   spec.Command,
		Env:    spec.Env,
		Dir:    dir,
		Stdin:  read,
		Stdout: spec.Stdout,
		Stderr: spec.Stderr,
	}
	if spec.Account != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: process.Credential(*spec.Account)}
	}
	p, err := process.Start(cmd)
	if err != nil {
		_ = write.Close()
		return nil, startError(execpath.ExitCode(err), "can't start the workload %s: %s", quote(spec.Command[0]),
			execpath.Reason(err))
	}
	return &Workload{Process: p, stdin: write}, nil
}

func startError(code int, format string, args ...any) error {
	return &StartError{Code: code, Reason: fmt.Sprintf(format, args...)}
}

func reason(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}

// quote keeps an argument short and on one line.
func quote(arg string) string {
	if len(arg) > 200 {
		arg = arg[:200] + "..."
	}
	return strconv.Quote(arg)
}

// ExitCode is the command's exit code once Done is closed, 128 plus the signal if one killed it.
func (w *Workload) ExitCode() int { return process.ExitCode(w.Status()) }

// Kill ends the command now, with all of its process group, and waits until it is gone, at most for the time given.
func (w *Workload) Kill(wait time.Duration) {
	_ = w.SignalGroup(syscall.SIGKILL)
	select {
	case <-w.Done():
	case <-time.After(wait):
	}
}

// Close closes the command's standard input. It is for after its end.
func (w *Workload) Close() { _ = w.stdin.Close() }
