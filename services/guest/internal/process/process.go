// Package process runs child processes as leaders of sessions of their own and signals them, and their groups, without
// ever hitting a process that only inherited a number.
package process

import (
	"errors"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Process is a started child. Its methods are safe for concurrent use.
type Process struct {
	pid  int
	done chan struct{}

	mu     sync.Mutex
	reaped bool
	status syscall.WaitStatus
}

// Start starts cmd in a new session, and so in a new process group, and waits for it in the background. The caller
// must not call cmd.Wait, and cmd's standard streams must be files or nil: anything else would need copying that
// nobody waits for.
func Start(cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{pid: cmd.Process.Pid, done: make(chan struct{})}
	go p.wait(cmd)
	return p, nil
}

func (p *Process) wait(cmd *exec.Cmd) {
	defer close(p.done)
	// Leave the zombie in place first: as long as it is there, its number is nobody else's.
	for {
		err := unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	// The error is only another form of the state.
	_ = cmd.Wait()
	if cmd.ProcessState != nil {
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok {
			p.status = status
		}
	}
}

// PID is the child's process id, valid until Done.
func (p *Process) PID() int { return p.pid }

// Done is closed when the child has ended and has been reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends sig to the child alone. After its end it does nothing and returns [os.ErrProcessDone].
func (p *Process) Signal(sig syscall.Signal) error { return p.kill(p.pid, sig) }

// SignalGroup sends sig to the child's process group. After the child's end it does nothing and returns
// [os.ErrProcessDone].
func (p *Process) SignalGroup(sig syscall.Signal) error { return p.kill(-p.pid, sig) }

func (p *Process) kill(target int, sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	return syscall.Kill(target, sig)
}

// Status is how the child ended. It is valid once Done is closed.
func (p *Process) Status() syscall.WaitStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

// ExitCode is status as a shell shows it: the exit code, or [guestapi.ExitSignalBase] plus the signal.
func ExitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return guestapi.ExitSignalBase + int(status.Signal())
	}
	return status.ExitStatus()
}
