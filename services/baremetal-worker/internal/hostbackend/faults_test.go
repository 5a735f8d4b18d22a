package hostbackend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostlease"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// impatient gives a silent host up within seconds, where an operator's worker
// takes a minute.
func impatient(c *Config) {
	c.connection = func(c *sshconn.Config) {
		c.DialTimeout, c.KeepaliveIdle, c.KeepaliveLimit, c.DeadAfter = 5*time.Second, time.Second, 4*time.Second, 5*time.Second
		c.BackoffMin, c.BackoffMax, c.RefusedBackoff = 50*time.Millisecond, 500*time.Millisecond, 2*time.Second
	}
	c.LeaseTTL.Duration = 5 * time.Second
	c.undoLimit = 10 * time.Second
}

// fault is something that happens to a host.
type fault struct {
	name string
	// strike makes it happen; mend, which may be nil, ends it once the worker has
	// answered.
	strike, mend func(context.Context, *lab.Host) error
}

// pause is how long a short fault lasts: longer than what is under way takes.
const pause = time.Second

var connectionFaults = []fault{
	{"reset", func(ctx context.Context, h *lab.Host) error { return h.ResetConnections(ctx) }, nil},
	{"silent for a moment", func(ctx context.Context, h *lab.Host) error {
		if err := h.CutOff(ctx); err != nil {
			return err
		}
		time.AfterFunc(pause, func() { _ = h.Restore(ctx) })
		return nil
	}, func(ctx context.Context, h *lab.Host) error { return h.Restore(ctx) }},
	{
		"silent until given up", func(ctx context.Context, h *lab.Host) error { return h.CutOff(ctx) },
		func(ctx context.Context, h *lab.Host) error { return h.Restore(ctx) },
	},
	{"sshd restarted", func(ctx context.Context, h *lab.Host) error {
		_, err := h.Exec(ctx, "systemctl", "restart", "ssh.service")
		return err
	}, nil},
	{"sshd and its sessions killed", func(ctx context.Context, h *lab.Host) error {
		_, err := h.Exec(ctx, "sh", "-c", "systemctl restart ssh.service; pkill -9 -f '^sshd-session'; true")
		return err
	}, nil},
	{"rebooted", func(ctx context.Context, h *lab.Host) error { return h.Reboot(ctx) }, nil},
}

// Whatever happens to the connection or the host, and whenever in a Provision:
// the answer is the instance, or an error that says what exists; a retry gets
// the one instance; and an end leaves nothing.
func TestLongFaultsInEveryPhaseOfProvision(t *testing.T) {
	t.Parallel()
	for _, f := range connectionFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			h := lab.NewHost(t, lab.HostOptions{})
			s := newSite(t, impatient, h)
			key := newLogin(t)
			image := s.image(ociimage.Shell)
			for n, phase := range append(phases, phaseUnit) {
				t.Run(phase, func(t *testing.T) {
					soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
					forgetImages(t, s)
					g, e := grant(image, key)
					strike := func(context.Context) {
						if err := f.strike(t.Context(), h); err != nil {
							t.Error(err)
						}
					}
					if phase == phaseUnit {
						strike = s.whileUnitStarts(g.ID, strike)
						s.at(g.ID, phaseStarting, strike)
					} else {
						s.at(g.ID, phase, strike)
					}
					ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
					defer cancel()
					p, err := s.runtime.Provision(caller(ctx), g, e)
					if phase != phaseUnit && !s.wasReached(g.ID, phase) {
						t.Fatalf("it never got there: %v", err)
					}
					if f.mend != nil {
						if err := f.mend(t.Context(), h); err != nil {
							t.Fatal(err)
						}
					}
					if err != nil {
						t.Logf("created %s: %v", backenderr.CreatedOf(err), err)
						checkFailedByFault(t, s, phase, err)
					}
					// Every other time the grant is given up instead of tried again.
					if err != nil && n%2 == 1 {
						end, err := s.runtime.Terminate(caller(ctx), backend.HandleFor(g.ID))
						if err != nil || end.State != backend.StateTerminated {
							t.Errorf("terminate: %+v, %v", end, err)
						}
						return
					}
					if err != nil {
						soon(t, func() error { p, err = s.runtime.Provision(caller(ctx), g, e); return err })
					}
					if n := containers(t, h); n != 1 {
						t.Errorf("%d containers", n)
					}
					soon(t, func() error { _, err := run(t, p, key, "true"); return err })
					s.terminate(t, p)
				})
			}
		})
	}
}

// phaseUnit is between the call that starts the unit and its answer.
const phaseUnit = "unit starting"

// whileUnitStarts has something happen once the unit is there, while the driver
// waits to hear of it.
func (s *site) whileUnitStarts(id backend.GrantID, then func(context.Context)) func(context.Context) {
	return func(ctx context.Context) {
		go func() {
			unit := names{bridge: s.driver.env.BridgeID, grant: id, attempt: 1}.unit()
			// One program that waits, not one after the other: a start takes less
			// than a second.
			_, err := s.hosts[0].Exec(ctx, "sh", "-c", `until [ -e "/run/systemd/transient/$1" ]; do sleep 0.01; done`, "sh", unit)
			if err == nil {
				then(ctx)
			}
		}()
	}
}

// checkFailedByFault checks the answer to a Provision that a fault of the host
// has failed, and what it says is there.
func checkFailedByFault(t *testing.T, s *site, phase string, err error) {
	t.Helper()
	if !backenderr.Is(err, backenderr.ProviderUnavailable) {
		t.Errorf("got %v", err)
	}
	switch created := backenderr.CreatedOf(err); created {
	case backenderr.CreatedNone:
		soon(t, func() error { return s.nothingLeft(t.Context()) })
	case backenderr.CreatedUnknown:
		switch phase {
		case phaseBegin, "sending image", "verifying image", "unpacking image":
			t.Errorf("nothing of the grant had been sent, and the answer says created = %s: %v", created, err)
		}
	default:
		t.Errorf("created is %q: %v", created, err)
	}
}

// nothingLeft fails while something of a grant is on a host.
func (s *site) nothingLeft(ctx context.Context) error {
	for _, h := range s.hosts {
		// What is half sent goes when the worker is back.
		left, err := h.Leftovers(ctx, "image ")
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("left behind on %s:\n\t%s", h.Name, strings.Join(left, "\n\t"))
		}
	}
	return nil
}

// Whatever happens to the connection, a watch goes on, and ends with the
// workload's own end, wherever in the fault that falls.
func TestFaultsDuringWatch(t *testing.T) {
	t.Parallel()
	for _, f := range connectionFaults {
		if f.name == "rebooted" {
			continue // has a test of its own
		}
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			h := lab.NewHost(t, lab.HostOptions{})
			s := newSite(t, impatient, h)
			key := newLogin(t)
			g, e := grant(s.image(ociimage.Shell), key)
			p := s.provision(t, g, e)
			events := make(chan backend.Event, 1000)
			watched := make(chan error, 1)
			ctx, cancel := context.WithTimeout(t.Context(), 2*callTimeout)
			defer cancel()
			go func() {
				watched <- s.runtime.WatchUntilExit(caller(ctx), p.Instance.Handle, func(e backend.Event) error { events <- e; return nil })
			}()
			faulty := func() {
				t.Helper()
				generation := s.driver.hosts[0].conn.State().Generation
				if err := f.strike(t.Context(), h); err != nil {
					t.Fatal(err)
				}
				if strings.Contains(f.name, "given up") {
					soon(t, func() error {
						if s.driver.hosts[0].conn.Connected() {
							return fmt.Errorf("still connected, generation %d", generation)
						}
						return nil
					})
				}
			}
			mend := func() {
				t.Helper()
				if f.mend != nil {
					if err := f.mend(t.Context(), h); err != nil {
						t.Fatal(err)
					}
				}
				soon(t, func() error { _, err := s.driver.hosts[0].ready(); return err })
			}
			faulty()
			mend()
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
			// The workload ends in the middle of it.
			faulty()
			if _, err := h.Exec(t.Context(), "sh", "-c", `pkill -9 -x sh --uid "$1"`, "sh", fmt.Sprint(s.config.FirstUID)); err != nil {
				t.Fatal(err)
			}
			mend()
			if err := <-watched; err != nil {
				t.Fatal(err)
			}
			var last backend.Event
			for len(events) > 0 {
				last = <-events
			}
			if last.Log == nil || last.Log.Log.Exit.Reason != backend.EndWorkloadExited || last.Log.Log.Exit.Signal != "KILL" {
				t.Fatalf("the last event is %+v", last)
			}
			checkUsage(t, last.Log.Log)
		})
	}
}

// Terminate during a Provision ends it, wherever it is; and one before it keeps
// it from beginning.
func TestTerminateInEveryPhaseOfProvision(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	for _, phase := range append(phases, phaseUnit) {
		t.Run(phase, func(t *testing.T) {
			forgetImages(t, s)
			g, e := grant(image, key)
			ended := make(chan error, 1)
			terminate := func(ctx context.Context) {
				go func() {
					end, err := s.runtime.Terminate(caller(t.Context()), backend.HandleFor(g.ID))
					if err == nil && end.State != backend.StateTerminated {
						err = fmt.Errorf("state %s", end.State)
					}
					ended <- err
				}()
				<-ctx.Done() // the driver goes on once it is told to end
			}
			if phase == phaseUnit {
				s.at(g.ID, phaseStarting, s.whileUnitStarts(g.ID, terminate))
			} else {
				s.at(g.ID, phase, terminate)
			}
			p, err := s.runtime.Provision(caller(t.Context()), g, e)
			if phase != phaseUnit || err != nil {
				if !backenderr.Is(err, backenderr.GrantEnded) {
					t.Errorf("got %+v, %v", p, err)
				}
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if err := s.nothingLeft(t.Context()); err != nil {
				t.Error(err)
			}
			_, err = s.runtime.Provision(caller(t.Context()), g, e)
			refused(t, err, backenderr.GrantEnded)
		})
	}
	t.Run("before", func(t *testing.T) {
		g, e := grant(image, key)
		for range 2 {
			end, err := s.runtime.Terminate(caller(t.Context()), backend.HandleFor(g.ID))
			if err != nil || end.State != backend.StateTerminated {
				t.Fatalf("terminate: %+v, %v", end, err)
			}
			_, err = s.runtime.Provision(caller(t.Context()), g, e)
			refused(t, err, backenderr.GrantEnded)
		}
	})
}

// A client that goes takes its half-made instance along, wherever that is, and
// may come back.
func TestLongClientGoneInEveryPhaseOfProvision(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	for _, phase := range append(phases, phaseUnit) {
		t.Run(phase, func(t *testing.T) {
			forgetImages(t, s)
			g, e := grant(image, key)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			leave := func(ctx context.Context) { cancel(); <-ctx.Done() }
			if phase == phaseUnit {
				s.at(g.ID, phaseStarting, s.whileUnitStarts(g.ID, leave))
			} else {
				s.at(g.ID, phase, leave)
			}
			_, err := s.runtime.Provision(caller(ctx), g, e)
			if phase != phaseUnit || err != nil {
				if !backenderr.Is(err, backenderr.Cancelled) {
					t.Fatalf("got %v", err)
				}
				soon(t, func() error { return errors.Join(s.allFree(t.Context()), s.nothingLeft(t.Context())) })
			}
			p := s.provision(t, g, e)
			if _, err := run(t, p, key, "true"); err != nil {
				t.Error(err)
			}
			s.terminate(t, p)
		})
	}
}

// A connection that is lost while its host is being brought into use gives way to
// the next one, which is.
func TestAConnectionLostWhileSystemdIsAwaited(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, impatient, h)
	host := s.driver.hosts[0]
	// lost ends the connection, and waits for the next one to have the lease.
	lost := func() {
		t.Helper()
		before := host.conn.State().Generation
		must(t, h.ResetConnections(t.Context()))
		soon(t, func() error {
			host.leaseMu.Lock()
			lease, generation := host.lease, host.leased
			host.leaseMu.Unlock()
			if status, _ := lease.Observe(); generation <= before || status.State != hostlease.Held {
				return fmt.Errorf("lease of generation %d: %+v; before it was %d", generation, status, before)
			}
			return nil
		})
	}
	onHost(t, h, "mv /run/dbus/system_bus_socket /run/dbus/away")
	lost()
	lost()
	onHost(t, h, "mv /run/dbus/away /run/dbus/system_bus_socket")
	soon(t, func() error { _, err := host.usable(); return err })
}
