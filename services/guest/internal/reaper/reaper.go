// Package reaper is the guest as PID 1: a parent that starts one child, the real guest, forwards signals to it and
// reaps every orphan. It is a process of its own because waiting for any child and os/exec waiting for its own
// children don't go together in one.
package reaper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/process"
)

// Run starts path with argv and the reaper's own environment and standard streams, and returns its exit code in the
// shell's convention once it has ended. Orphans become children of this process even if it isn't PID 1. The child gets
// extra as its descriptors from 3.
//
// It must be the only waiter in the process.
func Run(path string, argv []string, extra ...*os.File) (int, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("become reaper: %w", err)
	}
	// SIGCHLD tells only "look again", so one place is enough; the others must not be lost to a burst of it.
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	forward := make(chan os.Signal, 16)
	signal.Notify(forward, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1,
		syscall.SIGUSR2)
	defer signal.Stop(forward)

	// Where this isn't PID 1, nothing else would end the child if this process were killed. The signal comes at the end
	// of the thread that forked, so that has to live as long as the process does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	files := []uintptr{0, 1, 2}
	for _, f := range extra {
		files = append(files, f.Fd())
	}
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{ //nolint:gosec // To run the caller's program is its purpose; the guest gives it itself.
		Env:   os.Environ(),
		Files: files,
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", path, err)
	}
	for {
		select {
		case <-children:
			if status, ended := reap(pid); ended {
				return process.ExitCode(status), nil
			}
		case sig := <-forward:
			// Nothing else reaps, so pid is still ours, dead or alive.
			if number, ok := sig.(syscall.Signal); ok {
				_ = syscall.Kill(pid, number)
			}
		}
	}
}

// reap collects every child that has ended, and says whether pid is among them.
func reap(pid int) (syscall.WaitStatus, bool) {
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil || got == 0:
			return 0, false
		case got == pid && (status.Exited() || status.Signaled()):
			return status, true
		}
	}
}
