package hostbackend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestLimitsAreSetAndDiskIsEnforced(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{DiskMiB: 6144})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	g.Shape = backend.Shape{CPU: 1500, RAM: 300, Storage: 1}
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	out, err := h.Exec(t.Context(), "systemctl", "show", "--property=CPUQuotaPerSecUSec,MemoryMax,MemorySwapMax,TasksMax,CPUAccounting,MemoryAccounting", unitOf(s, g.ID, 1))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CPUQuotaPerSecUSec=1.500000s", "MemoryMax=314572800", "MemorySwapMax=0", "TasksMax=8192", "CPUAccounting=yes", "MemoryAccounting=yes"} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	out, _ = run(t, p, key, "dd if=/dev/zero of=/tmp/full bs=1M count=1500 2>&1; wc -c </tmp/full")
	if !strings.Contains(out, "No space left on device") {
		t.Errorf("no end of the disk: %s", out)
	}
	var size int64
	lines := strings.Fields(out)
	if _, err := fmt.Sscan(lines[len(lines)-1], &size); err != nil || size < 900<<20 || size > 1<<30 {
		t.Errorf("%d bytes fit into 1 GiB (%v)", size, err)
	}
}

func TestHostWithoutDiskSpaceIsUnfit(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	if err := h.FillDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	g, e := grant(image, key)
	_, err := s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.HostUnfit, h.Name)
	t.Log(err)
	if err := h.FreeDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.terminate(t, s.provision(t, g, e))
}

func TestDeadlineEndsAnInstance(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	t.Run("with a watcher", func(t *testing.T) {
		g, _, p := s.provisionBriefly(t, image, key)
		log := ended(t, s, p, backend.EndDeadline, -1)
		checkUsage(t, log)
		if late := log.EndedAt.Sub(g.ValidTo); late > lateLimit || late < -2*time.Second {
			t.Errorf("ended %s after its deadline", late)
		}
	})
	t.Run("without a watcher", func(t *testing.T) {
		_, _, p := s.provisionBriefly(t, image, key)
		soon(t, func() error { return s.allFree(t.Context()) })
		checkUsage(t, ended(t, s, p, backend.EndDeadline, -1))
	})
	t.Run("without a worker", func(t *testing.T) {
		g, _, p := s.provisionBriefly(t, image, key)
		s.stop()
		soon(t, func() error {
			// All but the directory, which has the usage.
			left, err := h.Leftovers(t.Context(), "image ", "grant ", "directory ", "file ")
			if err != nil || time.Now().Before(g.ValidTo) {
				return errors.Join(err, errors.New("not yet"))
			}
			for _, line := range left {
				if !strings.Contains(line, "/grants/") {
					return fmt.Errorf("still there: %v", left)
				}
			}
			return nil
		})
		t.Logf("gone %s after the deadline", time.Since(g.ValidTo))
		s.start()
		log := ended(t, s, p, backend.EndDeadline, -1)
		checkUsage(t, log)
		if late := log.EndedAt.Sub(g.ValidTo); late > lateLimit || late < -2*time.Second {
			t.Errorf("ended %s after its deadline", late)
		}
	})
}

// checkUsage checks what must be known of an instance that ran to its end.
func checkUsage(t *testing.T, log backend.ComputeLog) {
	t.Helper()
	u := log.Usage
	// Whole seconds count, so that what ended at once has none.
	allocated := int64(log.Shape.CPU) * int64(log.EndedAt.Sub(log.StartedAt)/time.Second)
	if log.Partial || u.CPU == nil || u.CPU.Value <= 0 || u.CPU.Source != backend.UsageHostMeasured || u.NetworkReceived == nil || u.NetworkReceived.Value <= 0 ||
		u.NetworkSent == nil || u.CPUAllocated == nil || u.CPUAllocated.Value != allocated {
		t.Errorf("usage of %+v is not complete: CPU %+v, received %+v, sent %+v, allocated %+v", log, u.CPU, u.NetworkReceived, u.NetworkSent, u.CPUAllocated)
	}
}

func TestRestartedWorkerAdoptsWhatRuns(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	before := s.provision(t, g, e)
	s.stop()
	s.start()
	c, err := s.runtime.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r := c.Regions[0]; r.ActiveInstances != 1 || r.Free != r.Total.Sub(g.Shape) {
		t.Errorf("capacity after the restart: %+v", r)
	}
	after := s.provision(t, g, e)
	if after.Instance.ID != before.Instance.ID || after.Receipt.HostKey != before.Receipt.HostKey || after.Receipt.Port != before.Receipt.Port {
		t.Errorf("other answer after the restart:\n%+v\n%+v", before, after)
	}
	// Its ports and addresses are taken.
	g2, e2 := grant(g.Image, key)
	second := s.provision(t, g2, e2)
	for _, p := range []backend.Provisioned{after, second} {
		if out, err := run(t, p, key, "hostname"); err != nil || !strings.Contains(out, p.Instance.GrantID.String()[:12]) {
			t.Errorf("%v: %s", err, out)
		}
	}
	s.terminate(t, second)
	watched := make(chan backend.ComputeLog, 1)
	go func() { watched <- ended(t, s, after, backend.EndTerminated, -1) }()
	checkUsage(t, s.terminate(t, after))
	<-watched
}

// A process that dies in Provision leaves an attempt; whatever of it is on the
// host, there is never a second container.
func TestAttemptOfADeadWorkerIsTakenUp(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	for _, at := range []string{"sending image", "starting", "waiting for SSH"} {
		t.Run("retried after "+at, func(t *testing.T) {
			forgetImages(t, s)
			g, e := grant(image, key)
			dead := make(chan struct{})
			stage(t, s, g.ID, at, func() { s.stop(); close(dead) })
			_, err := s.runtime.Provision(caller(t.Context()), g, e)
			<-dead
			s.start()
			if err != nil && backenderr.CreatedOf(err) == backenderr.CreatedNone {
				t.Errorf("says that nothing was created: %v", err)
			}
			// Another grant gets neither its ports nor its addresses.
			g2, e2 := grant(image, key)
			other := s.provision(t, g2, e2)
			p := s.provision(t, g, e)
			if p.Receipt.Port == other.Receipt.Port {
				t.Errorf("both have port %d", p.Receipt.Port)
			}
			if n := containers(t, h); n != 2 {
				t.Errorf("%d containers for two grants", n)
			}
			s.terminate(t, other)
			s.terminate(t, p)
		})
		t.Run("abandoned after "+at, func(t *testing.T) {
			forgetImages(t, s)
			g, e := grant(image, key)
			dead := make(chan struct{})
			stage(t, s, g.ID, at, func() { s.stop(); close(dead) })
			_, err := s.runtime.Provision(caller(t.Context()), g, e)
			<-dead
			s.start()
			if err == nil { // was ready before it died
				s.terminate(t, s.provision(t, g, e))
				return
			}
			soon(t, func() error { return s.allFree(t.Context()) })
			if left, err := h.Leftovers(t.Context(), "image "); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v (%v)", left, err)
			}
		})
	}
}

// forgetImages has images sent and unpacked anew.
func forgetImages(t *testing.T, s *site) {
	t.Helper()
	d := s.driver.dirs
	if _, err := s.hosts[0].Exec(t.Context(), "find", d.cache.String(), d.index.String(), "-type", "f", "-delete"); err != nil {
		t.Fatal(err)
	}
}

// An intent of which nothing was ever sent holds its place until it is undone.
func TestIntentAloneIsUndone(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	missing := g
	missing.Image.Digest.Sum[0]++ // claims the grant, and goes no further
	_, err := s.runtime.Provision(caller(t.Context()), missing, e)
	refused(t, err, backenderr.ImageUnavailable)
	body, err := json.Marshal(params{Host: h.Name, Region: "lab", Image: g.Image.Digest.String(), Shape: g.Shape, SSHPort: 40000})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.driver.env.Journal.Begin(t.Context(), g.ID, h.Name, body); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	if r, ok := s.driver.inventory.Get(g.ID); !ok || r.Ports[0] != 40000 {
		t.Errorf("reservation %+v, %t", r, ok)
	}
	soon(t, func() error { return s.allFree(t.Context()) })
	var attempts []worker.Attempt
	if attempts, err = s.driver.env.Journal.Attempts(t.Context(), g.ID); err != nil || !attempts[len(attempts)-1].Gone {
		t.Errorf("attempts %+v, %v", attempts, err)
	}
}

func TestRebootEndsGrantsAndIsReconciled(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	g.Ports = []backend.Port{{Number: 80, Protocol: backend.TCP}}
	g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"192.0.2.0/24"}}
	p := s.provision(t, g, e)
	if err := h.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	log := ended(t, s, p, backend.EndHostRebooted, -1)
	if !log.Partial || log.Usage.CPU != nil {
		t.Errorf("usage of a host that was rebooted: %+v", log)
	}
	soon(t, func() error { return s.allFree(t.Context()) })
	if left, err := h.Leftovers(t.Context(), "image "); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
	_, err := s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.GrantEnded)
	g, e = grant(g.Image, key)
	s.terminate(t, s.provision(t, g, e))
}

// While a host can't be seen, nothing that may run there is recorded as gone, and
// nobody is told that it has ended.
func TestNothingIsGoneFromAHostThatCanNotBeSeen(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	g, e := grant(s.image(ociimage.Shell), newLogin(t))
	p := s.provision(t, g, e)
	if err := h.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		end, err := s.runtime.Terminate(caller(ctx), p.Instance.Handle)
		cancel()
		if err == nil && end.State == backend.StateTerminated {
			t.Errorf("it is said to have ended: %+v", end)
		}
	}
	attempts, err := s.driver.env.Journal.Attempts(t.Context(), g.ID)
	if err != nil || len(attempts) != 1 || attempts[0].Gone {
		t.Errorf("attempts are %+v, %v", attempts, err)
	}
	if err := h.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.terminate(t, p)
	if attempts, err = s.driver.env.Journal.Attempts(t.Context(), g.ID); err != nil || len(attempts) != 1 || !attempts[0].Gone {
		t.Errorf("at the end, attempts are %+v, %v", attempts, err)
	}
}

func TestLostConnectionIsNoEnd(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	events := make(chan backend.Event, 100)
	watched := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	go func() {
		watched <- s.runtime.WatchUntilExit(caller(ctx), p.Instance.Handle, func(e backend.Event) error { events <- e; return nil })
	}()
	for range 3 {
		if err := h.ResetConnections(t.Context()); err != nil {
			t.Fatal(err)
		}
		soon(t, func() error { _, err := s.driver.hosts[0].ready(); return err })
	}
	if err := h.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Exec(t.Context(), "sleep", "2"); err != nil {
		t.Fatal(err)
	}
	if err := h.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error { _, err := run(t, p, key, "true"); return err })
	select {
	case err := <-watched:
		t.Fatalf("the watch ended: %v", err)
	default:
	}
	for len(events) > 0 {
		if ev := <-events; ev.Log != nil || (ev.Instance != nil && ev.Instance.State != backend.StateReady) {
			t.Errorf("event %+v", ev)
		}
	}
	checkUsage(t, s.terminate(t, p))
	if err := <-watched; err != nil {
		t.Error(err)
	}
}
