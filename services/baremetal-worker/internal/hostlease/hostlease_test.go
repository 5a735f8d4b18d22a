package hostlease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

const (
	guestPath = "/root/guest"
	leaseFile = "/run/compute-bridge/test/lease"
	// ttl is short, so that the tests are; long enough for a loaded machine.
	ttl = 2 * time.Second
	// patience bounds what must happen some day.
	patience = 3 * time.Minute
)

// newHost returns a host with the guest binary.
func newHost(t *testing.T) *lab.Host {
	t.Helper()
	h := lab.NewHost(t, lab.HostOptions{NoPodman: true})
	file := filepath.Join(t.TempDir(), "guest")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", file, ".")
	cmd.Dir, cmd.Env = "../../../guest", append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Run(t.Context(), bytes.NewReader(data), io.Discard, os.Stderr, "sh", "-c", "cat > "+guestPath+" && chmod 755 "+guestPath); err != nil {
		t.Fatal(err)
	}
	return h
}

// client is a worker's connection to the host.
type client struct {
	t    *testing.T
	host *lab.Host
	ssh  *ssh.Client
	sshd int
	lost chan struct{}
}

func connect(t *testing.T, h *lab.Host) *client {
	t.Helper()
	conn, err := h.DialSSH(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, host: h, ssh: conn, lost: make(chan struct{})}
	go func() {
		_ = conn.Wait()
		close(c.lost)
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-c.lost
	})
	if c.sshd, err = strconv.Atoi(strings.TrimSpace(c.run("echo $PPID"))); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *client) run(command string) string {
	c.t.Helper()
	s, err := c.ssh.NewSession()
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	out, err := s.Output(command)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(out)
}

// start runs a command that isn't waited for.
func (c *client) start(command string) (io.ReadWriteCloser, *ssh.Session) {
	c.t.Helper()
	s, err := c.ssh.NewSession()
	if err != nil {
		c.t.Fatal(err)
	}
	in, errIn := s.StdinPipe()
	out, errOut := s.StdoutPipe()
	if err := errors.Join(errIn, errOut, s.Start(command)); err != nil {
		c.t.Fatal(err)
	}
	return &stream{out, in, s}, s
}

type stream struct {
	io.Reader
	io.Writer
	session *ssh.Session
}

func (s *stream) Close() error { return s.session.Close() }

func (c *client) lease(name string) *Lease {
	c.t.Helper()
	cfg := Config{Guest: guestPath, File: leaseFile, Name: name, TTL: ttl}
	conn, _ := c.start("'" + strings.Join(cfg.Args(), "' '") + "'")
	l := Start(cfg, conn)
	c.t.Cleanup(l.Close)
	return l
}

// await waits for a state and returns its status.
func await(t *testing.T, l *Lease, want State) Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		status, changed := l.Observe()
		if status.State == want {
			return status
		}
		if status.State == Lost {
			t.Fatalf("lease is lost: %v", status.Err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("lease is %d, want %d", status.State, want)
		}
	}
}

// awaitGone waits until no process on the host has the word in its command line.
func awaitGone(t *testing.T, h *lab.Host, word string) {
	t.Helper()
	eventually(t, func() error {
		if out, err := h.Exec(t.Context(), "pgrep", "-af", word); err == nil {
			return fmt.Errorf("still there: %s", out)
		}
		return nil
	})
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
}

func (c *client) awaitLost() {
	c.t.Helper()
	select {
	case <-c.lost:
	case <-time.After(patience):
		c.t.Fatal("the connection was not ended")
	}
}

func TestLease(t *testing.T) {
	h := newHost(t)

	t.Run("OneHoldsItAndTheNextWaits", func(t *testing.T) {
		a, b := connect(t, h), connect(t, h)
		first := a.lease("worker a\n(sly)")
		await(t, first, Held)
		second := b.lease("worker b")
		if got := await(t, second, Waiting).Holder; got.Name != "worker a (sly)" || time.Since(got.Since).Abs() > time.Hour {
			t.Errorf("holder is %+v", got)
		}
		busy, session := b.start(guestPath + " lease -file " + leaseFile + " -holder c")
		line, _ := io.ReadAll(busy)
		var exit *ssh.ExitError
		if err := session.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != guestapi.ExitLeaseBusy || !strings.HasPrefix(string(line), "busy ") ||
			!strings.Contains(string(line), "worker a (sly)") {
			t.Errorf("one that doesn't wait: %v, %q", err, line)
		}
		// A waiting one that goes takes nobody with it.
		c := connect(t, h)
		third := c.lease("worker c")
		await(t, third, Waiting)
		third.Close()
		c.awaitLost()
		await(t, first, Held)

		began := time.Now()
		first.Close()
		await(t, second, Held)
		t.Logf("taken over after %s", time.Since(began).Round(time.Millisecond))
		a.awaitLost()
		// Who held it last says so.
		if out, err := h.Exec(t.Context(), "cat", leaseFile); err != nil || !strings.HasSuffix(out, " worker b\n") {
			t.Errorf("%q, %v", out, err)
		}
	})

	t.Run("WhoEndsTakesEverythingAlong", func(t *testing.T) {
		a, spare, bystander := connect(t, h), connect(t, h), connect(t, h)
		lease := a.lease("a")
		await(t, lease, Held)
		if err := lease.Join(t.Context(), spare.sshd); err != nil {
			t.Fatal(err)
		}
		a.start("sleep 1001; sleep 1001")
		a.start("setsid -f sh -c 'sleep 1001; touch /root/late' </dev/null >/dev/null 2>&1; cat")
		spare.start("sleep 1001; sleep 1001")
		bystander.start("sleep 1002")
		eventually(t, func() error {
			if out, _ := h.Exec(t.Context(), "pgrep", "-xc", "sleep"); strings.TrimSpace(out) != "4" {
				return fmt.Errorf("%s sleep", out)
			}
			return nil
		})
		lease.Close()
		a.awaitLost()
		spare.awaitLost()
		awaitGone(t, h, "sleep 1001")
		if _, err := h.Exec(t.Context(), "pgrep", "-f", "sleep 1002"); err != nil {
			t.Error("another connection's command has ended, too")
		}
		bystander.run("true")
	})

	t.Run("TheNextGetsItOnlyWhenThatIsGone", func(t *testing.T) {
		a, b := connect(t, h), connect(t, h)
		await(t, a.lease("a"), Held)
		second := b.lease("b")
		await(t, second, Waiting)
		a.start("sleep 1003; sleep 1003")
		eventually(t, func() error { _, err := h.Exec(t.Context(), "pgrep", "-f", "sleep 1003"); return err })
		// The very moment that b has it, nothing of a is left.
		if _, err := h.Exec(t.Context(), "kill", "-9", strconv.Itoa(a.sshd)); err != nil {
			t.Fatal(err)
		}
		await(t, second, Held)
		if out, err := h.Exec(t.Context(), "pgrep", "-af", "sleep 1003"); err == nil {
			t.Errorf("left by the one before: %s", out)
		}
	})

	t.Run("AStandbyLeavesItToOthersFirst", func(t *testing.T) {
		a, b := connect(t, h), connect(t, h)
		cfg := Config{Guest: guestPath, File: leaseFile, Name: "standby", TTL: ttl, After: ttl}
		conn, _ := a.start("'" + strings.Join(cfg.Args(), "' '") + "'")
		standby := Start(cfg, conn)
		t.Cleanup(standby.Close)
		first := b.lease("b")
		await(t, first, Held)
		await(t, standby, Waiting)
		first.Close()
		await(t, standby, Held)
	})

	t.Run("ASilentWorkerIsCutOff", func(t *testing.T) {
		a, b := connect(t, h), connect(t, h)
		conn, _ := a.start(guestPath + " lease -file " + leaseFile + " -holder silent -ttl " + ttl.String())
		if line := make([]byte, 5); true {
			if _, err := io.ReadFull(conn, line); err != nil || string(line) != "held\n" {
				t.Fatalf("%q, %v", line, err)
			}
		}
		second := b.lease("b")
		began := time.Now()
		await(t, second, Waiting)
		await(t, second, Held)
		t.Logf("taken over after %s of silence", time.Since(began).Round(time.Millisecond))
		a.awaitLost()
		connect(t, h) // sshd itself lives
	})

	t.Run("AStoppedWorkerIsCutOff", func(t *testing.T) {
		worker := startWorker(t, h)
		b := connect(t, h)
		second := b.lease("b")
		await(t, second, Waiting)
		if err := worker.Process.Signal(stopSignal); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		await(t, second, Held)
		t.Logf("taken over %s after SIGSTOP", time.Since(began).Round(time.Millisecond))
		if err := worker.Process.Signal(continueSignal); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-worker.ended:
			if err == nil {
				t.Error("the stopped worker's session ended well")
			}
		case <-time.After(patience):
			t.Error("the stopped worker's session lives on")
		}
	})

	// While a host stands still it hears nothing, which is no fault of the worker's.
	t.Run("AHostThatStoodStillKeepsTheLease", func(t *testing.T) {
		worker := startWorker(t, h)
		pid, err := h.Exec(t.Context(), "pgrep", "-nx", "guest")
		if err != nil {
			t.Fatal(err)
		}
		pid = strings.TrimSpace(pid)
		for range 3 {
			if _, err := h.Exec(t.Context(), "kill", "-STOP", pid); err != nil {
				t.Fatal(err)
			}
			<-time.After(ttl + ttl/2)
			if _, err := h.Exec(t.Context(), "kill", "-CONT", pid); err != nil {
				t.Fatal(err)
			}
			<-time.After(ttl / 2)
		}
		select {
		case err := <-worker.ended:
			t.Errorf("the lease has ended: %v", err)
		default:
		}
		if out, err := h.Exec(t.Context(), "flock", "-n", leaseFile, "true"); err == nil {
			t.Errorf("the lock is free: %s", out)
		}
	})

	t.Run("AHalfOpenConnectionIsEnded", func(t *testing.T) {
		a := connect(t, h)
		lease := a.lease("cut off")
		await(t, lease, Held)
		if err := h.CutOff(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		// The worker gives it up by itself, and so does the host.
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		for {
			status, changed := lease.Observe()
			if status.State == Lost {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				t.Fatal("the worker still believes in its lease")
			}
		}
		if _, err := h.Exec(ctx, "flock", leaseFile, "true"); err != nil {
			t.Errorf("the lock is still held: %v", err)
		}
		t.Logf("let go %s after the cut", time.Since(began).Round(time.Millisecond))
		if _, err := h.Exec(ctx, "test", "-e", "/proc/"+strconv.Itoa(a.sshd)+"/cwd"); err == nil {
			t.Error("the connection's sshd lives")
		}
		if err := h.Restore(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = a.ssh.Close()
	})

	t.Run("OnlyAConnectionsSshdIsEverTaken", func(t *testing.T) {
		a := connect(t, h)
		lease := a.lease("a")
		await(t, lease, Held)
		listener, err := h.Exec(t.Context(), "systemctl", "show", "--property=MainPID", "--value", "ssh.service")
		if err != nil {
			t.Fatal(err)
		}
		self := strings.TrimSpace(a.run("echo $$"))
		for _, pid := range []string{strings.TrimSpace(listener), "1", "0", "-1", "2", self} {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := lease.Join(t.Context(), n); err == nil {
				t.Errorf("process %d was taken for the sshd of a connection", n)
			}
		}
		lease.Close()
		a.awaitLost()
		connect(t, h)
		// Without an sshd there is nothing that could be held to it.
		if out, err := h.Exec(t.Context(), guestPath, "lease", "-file", leaseFile, "-holder", "x"); err == nil {
			t.Errorf("a lease without a connection: %q", out)
		}
	})

	t.Run("ARemovedFileLocksNobodyOut", func(t *testing.T) {
		a, b := connect(t, h), connect(t, h)
		first := a.lease("a")
		await(t, first, Held)
		second := b.lease("b")
		await(t, second, Waiting)
		if _, err := h.Exec(t.Context(), "rm", leaseFile); err != nil {
			t.Fatal(err)
		}
		first.Close()
		await(t, second, Held)
		if _, err := h.Exec(t.Context(), "flock", "-n", leaseFile, "true"); err == nil {
			t.Error("the file that is there now is not locked")
		}
	})
}

// workerProcess is a worker that can be stopped: an ssh that is fed signs of life.
type workerProcess struct {
	*exec.Cmd
	ended chan error
}

// startWorker starts one that holds the host's lease.
func startWorker(t *testing.T, h *lab.Host) *workerProcess {
	t.Helper()
	lines, feed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	known := filepath.Join(t.TempDir(), "known_hosts")
	if err := os.WriteFile(known, []byte(h.Addr.String()+" "+h.HostKeyLine()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := &workerProcess{ended: make(chan error, 1), Cmd: exec.Command("ssh",
		"-i", h.UserKeyFile, "-o", "UserKnownHostsFile="+known, "-o", "IdentitiesOnly=yes", "-p", strconv.Itoa(h.SSHPort),
		"root@"+h.Addr.String(), guestPath+" lease -file "+leaseFile+" -holder stopped -ttl "+ttl.String())}
	w.Stdin, w.Stdout, w.Stderr = lines, io.Discard, os.Stderr
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	_ = lines.Close()
	beating, stop := context.WithCancel(t.Context())
	var routines sync.WaitGroup
	routines.Go(func() {
		for beating.Err() == nil {
			if _, err := feed.WriteString("beat\n"); err != nil {
				return
			}
			select {
			case <-time.After(ttl / 5):
			case <-beating.Done():
			}
		}
	})
	routines.Go(func() { w.ended <- w.Wait() })
	t.Cleanup(func() {
		stop()
		_ = feed.Close()
		_ = w.Process.Kill() // it may have ended
		routines.Wait()
	})
	eventually(t, func() error {
		out, err := h.Exec(t.Context(), "cat", leaseFile)
		if err == nil && !strings.Contains(out, "stopped") {
			err = errors.New(out)
		}
		return err
	})
	return w
}
