package site

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// startLimit is how long a process may take until it serves; hosts have booted
// by then.
const startLimit = time.Minute

// Process is a process of the bridge. It ends with the process that started it.
type Process struct {
	// Name is its file name's stem.
	Name string
	// LogFile has its standard output and error, of all its starts.
	LogFile string

	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; to be read once done is closed
}

// Start starts one of the site's programs in the lab's network. It is not in the
// caller's process group: an interrupt at the terminal is the caller's to
// handle.
func (s *Site) Start(ctx context.Context, name, program string, args ...string) (*Process, error) {
	p := &Process{Name: name, LogFile: s.Path(name + ".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	// What ends it is Stop or Kill, not the context.
	p.cmd = s.Lab.Command(context.WithoutCancel(ctx), s.Program(program), args...)
	p.cmd.Dir = s.Dir
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The signal comes with the end of the thread, which must not end, or be
		// used and ended by another, before the process does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close() // The process has its own.
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// waitHealthy asks as a container's health check would, until the answer is yes.
func (s *Site) waitHealthy(ctx context.Context, p *Process, program, config string) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := s.Lab.Command(ctx, s.Program(program), "-healthcheck", "-config", config).CombinedOutput()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%w):\n%s", p.Name, p.err, p.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("%s doesn't serve: %w: %s\n%s", p.Name, ctx.Err(), strings.TrimSpace(string(out)), p.LogTail())
		case <-tick.C:
		}
	}
}

// PID is its process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when it has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running tells whether it has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal. One that has ended is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stop ends it with SIGTERM and returns its exit code.
func (p *Process) Stop(ctx context.Context) (int, error) {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	return p.Wait(ctx)
}

// Kill ends it with SIGKILL and waits until it is gone.
func (p *Process) Kill() error {
	err := p.Signal(syscall.SIGKILL)
	<-p.done
	return err
}

// Wait waits until it has ended, and returns its exit code: -1 if a signal ended
// it.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return 0, fmt.Errorf("%s still runs: %w", p.Name, ctx.Err())
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) {
		return 0, p.err
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// LogTail returns the end of its log.
func (p *Process) LogTail() string {
	text, err := os.ReadFile(p.LogFile)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}
