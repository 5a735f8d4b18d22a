package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// closeLimit bounds the clean-up after the tests.
const closeLimit = 5 * time.Minute

// MainOption changes what [Main] does.
type MainOption func(*mainOptions)

// mainOptions collects MainOptions.
type mainOptions struct {
	goroutines bool
	leaks      []goleak.Option
	suites     []string
}

// CheckGoroutines makes Main fail when a goroutine outlives the tests. The
// options are goleak's, for goroutines that may.
func CheckGoroutines(options ...goleak.Option) MainOption {
	return func(o *mainOptions) { o.goroutines, o.leaks = true, options }
}

// CloudMachines makes Main build what [CloudRootFS] returns for these suites. In the
// lab's network, where the tests are, no archive can be reached.
func CloudMachines(suites ...string) MainOption {
	return func(o *mainOptions) { o.suites = append(o.suites, suites...) }
}

// Main is TestMain of a package whose tests need lab hosts:
//
//	func TestMain(m *testing.M) { lab.Main(m) }
//
// It opens a lab, runs the test binary again in the lab's network namespace,
// and destroys the lab when that ends, however it ends. It never returns: the
// exit code is the tests', or 1 when they passed and something of the lab, or a
// process that they started, is left. Several test packages can run at once.
//
// Build flags, -run, -race, coverage and -count work as ever. In the tests
// [Current] is the lab.
func Main(m *testing.M, options ...MainOption) {
	Helper()
	var opts mainOptions
	for _, option := range options {
		option(&opts)
	}
	if os.Getenv(labEnv) != "" {
		os.Exit(runTests(m, opts))
	}
	code, err := superviseTests(opts)
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// runTests is Main inside the lab.
func runTests(m *testing.M, opts mainOptions) int {
	code := m.Run()
	if !opts.goroutines || code != 0 {
		return code
	}
	if err := goleak.Find(opts.leaks...); err != nil {
		fmt.Fprintln(os.Stderr, "lab: the tests left goroutines:", err)
		return 1
	}
	return code
}

// superviseTests opens a lab, runs this program again inside it and cleans up.
func superviseTests(opts mainOptions) (code int, err error) {
	ctx := context.Background()
	for _, suite := range opts.suites {
		if _, err := CloudRootFS(ctx, os.Stderr, suite); err != nil {
			return 1, err
		}
	}
	// Interrupts reach the tests too, which are in our process group; we stay
	// to clean up.
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	defer signal.Stop(interrupts)
	// What the tests start and forget becomes our child, and is found.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("become a subreaper: %w", err)
	}
	lab, err := Open(ctx, Options{})
	if err != nil {
		return 1, err
	}
	code, runErr := lab.runSelf(ctx, interrupts)
	closing, cancel := context.WithTimeout(ctx, closeLimit)
	defer cancel()
	strays, strayErr := lab.endStrays(closing)
	closeErr := lab.Close(closing)
	left, leftErr := Remains(lab.name)
	left = append(strays, left...)
	if err := errors.Join(runErr, strayErr, closeErr, leftErr); err != nil {
		return code, err
	}
	if len(left) > 0 {
		return code, fmt.Errorf("the tests left behind:\n\t%s", strings.Join(left, "\n\t"))
	}
	return code, nil
}

// runSelf runs this program with the same arguments in the lab's network.
func (l *Lab) runSelf(ctx context.Context, signals <-chan os.Signal) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := l.Command(ctx, self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Tests without this process have nobody to clean up: they end with it, and
	// the next run sweeps. The signal comes with the end of the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	done := make(chan struct{})
	defer close(done)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	go func() {
		for {
			select {
			case <-ended:
				// Orphans of the tests are ours; an unreaped one of a host would
				// keep that host from ending.
				reapAllBut(cmd.Process.Pid)
			case s := <-signals:
				// An error means that it ended already.
				_ = cmd.Process.Signal(s)
			case <-done:
				return
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	default:
		return 1, fmt.Errorf("the tests ended: %w", err)
	}
}

// reapAllBut reaps this process's ended children, one aside.
func reapAllBut(keep int) {
	children, err := childrenOf(os.Getpid())
	if err != nil {
		return // the next SIGCHLD tries again
	}
	for _, pid := range children {
		if pid != keep {
			var status unix.WaitStatus
			_, _ = unix.Wait4(pid, &status, unix.WNOHANG, nil) // it runs, or is reaped
		}
	}
}

// endStrays kills the processes that the tests left running, hosts aside, and
// returns what they were.
func (l *Lab) endStrays(ctx context.Context) ([]string, error) {
	hosts, err := l.Hosts()
	if err != nil {
		return nil, err
	}
	var strays []string
	// A killed process's own children become ours in turn.
	err = poll(ctx, 10*time.Millisecond, func() (bool, error) {
		children, err := childrenOf(os.Getpid())
		if err != nil {
			return false, err
		}
		children = slices.DeleteFunc(children, func(pid int) bool {
			return slices.ContainsFunc(hosts, func(h *Host) bool { return h.record.Init.PID == pid })
		})
		for _, pid := range children {
			var status unix.WaitStatus
			if reaped, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); err == nil && reaped == pid {
				continue
			}
			line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err != nil {
				continue // ended since
			}
			stray := fmt.Sprintf("process %d: %s", pid, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")))
			if !slices.Contains(strays, stray) {
				strays = append(strays, stray)
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return false, err
			}
		}
		return len(children) == 0, nil
	})
	return strays, err
}

// childrenOf lists a process's children, those that ended and wait to be reaped
// included.
func childrenOf(parent int) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var children []int
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // ended since
		}
		// "pid (name) state ppid …"; the name may hold anything.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(parent) {
			continue
		}
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		children = append(children, child)
	}
	return children, nil
}

// NewHost starts a host in the current lab and destroys it when the test ends.
// The host's journal is logged when the test failed.
func NewHost(t testing.TB, opts HostOptions) *Host {
	t.Helper()
	lab, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	host, err := lab.StartHost(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("host %s at %s booted in %.2f s", host.Name, host.Addr, host.BootTime.Seconds())
	t.Cleanup(func() {
		// The test's own context has ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), closeLimit)
		defer cancel()
		if t.Failed() && host.Running() {
			if journal, err := host.Journal(ctx); err == nil {
				t.Logf("the end of %s's journal:\n%s", host.Name, lastLines(journal, 80))
			}
		}
		if err := host.Destroy(ctx); err != nil {
			t.Errorf("destroy %s: %v", host.Name, err)
		}
	})
	return host
}
