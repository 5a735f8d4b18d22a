package hostbackend

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// onHost runs a script on a host.
func onHost(t *testing.T, h *lab.Host, script string, args ...string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), append([]string{"sh", "-ec", script, "sh"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A disk that gets full in the middle fails the grant, not the host: what was
// half done is gone, and with room again the same grant runs.
func TestLongDiskGetsFullInEveryPhaseOfProvision(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	for _, phase := range phases {
		t.Run(phase, func(t *testing.T) {
			forgetImages(t, s)
			g, e := grant(image, key)
			s.at(g.ID, phase, func(context.Context) {
				if err := h.FillDisk(t.Context()); err != nil {
					t.Error(err)
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
			defer cancel()
			p, err := s.runtime.Provision(caller(ctx), g, e)
			if !s.wasReached(g.ID, phase) {
				t.Fatalf("it never got there: %v", err)
			}
			if err := h.FreeDisk(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err != nil {
				refused(t, err, backenderr.HostUnfit, h.Name)
				if err := s.nothingLeft(t.Context()); err != nil {
					t.Error(err)
				}
				p = s.provision(t, g, e)
			} else if phase != phaseReady {
				t.Errorf("ready on a full disk")
			}
			if _, err := run(t, p, key, "true"); err != nil {
				t.Error(err)
			}
			s.terminate(t, p)
		})
	}
}

// On a disk that gets full under it an instance goes on as far as it can, and
// ends as it is told to, with what is known of it.
func TestDiskGetsFullUnderAnInstance(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	other, otherEnvelope := grant(g.Image, key)
	if err := h.FillDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, p, key, "echo alive"); err != nil || out != "alive\n" {
		t.Errorf("on a full disk: %q, %v", out, err)
	}
	_, err := s.runtime.Provision(caller(t.Context()), other, otherEnvelope)
	refused(t, err, backenderr.HostUnfit, h.Name)
	log := s.terminate(t, p)
	if log.Exit.Reason != backend.EndTerminated {
		t.Errorf("the log is %+v", log)
	}
	checkUsage(t, log)
	if err := h.FreeDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error { return s.nothingLeft(t.Context()) })
	s.terminate(t, s.provision(t, other, otherEnvelope))
}

// What keeps a unit from starting is the host's fault where the host is to be
// mended, and the grant may go elsewhere.
func TestWhatAHostLacksIsItsOwnFault(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	s.terminate(t, s.provision(t, g, e)) // the image is there
	for _, tt := range []struct{ name, breaks, mends string }{
		{"podman is gone", "mv /usr/bin/podman /usr/bin/podman.away", "mv /usr/bin/podman.away /usr/bin/podman"},
		{
			"mkfs fails", `mv /usr/sbin/mkfs.ext4 /usr/sbin/mkfs.away; printf '#!/bin/sh\necho "mkfs.ext4: no" >&2; exit 1\n' >/usr/sbin/mkfs.ext4; chmod +x /usr/sbin/mkfs.ext4`,
			"mv /usr/sbin/mkfs.away /usr/sbin/mkfs.ext4",
		},
		{"truncate is gone", "mv /usr/bin/truncate /usr/bin/truncate.away", "mv /usr/bin/truncate.away /usr/bin/truncate"},
		{"no loop devices", "mkdir /dev/away; mv /dev/loop* /dev/away", "mv /dev/away/* /dev; rmdir /dev/away"},
		{"nft is gone", "mv /usr/sbin/nft /usr/sbin/nft.away", "mv /usr/sbin/nft.away /usr/sbin/nft"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, e := grant(g.Image, key)
			onHost(t, h, tt.breaks)
			_, err := s.runtime.Provision(caller(t.Context()), g, e)
			onHost(t, h, tt.mends)
			if !backenderr.Is(err, backenderr.HostUnfit) {
				t.Errorf("got %s: %v", backenderr.ReasonOf(err), err)
			}
			// A clean-up that lacks a program may take another try.
			soon(t, func() error { return errors.Join(s.allFree(t.Context()), s.nothingLeft(t.Context())) })
			p := s.provision(t, g, e)
			if _, err := run(t, p, key, "true"); err != nil {
				t.Error(err)
			}
			s.terminate(t, p)
		})
	}
}

// A host whose podman goes away is unfit when it is looked at next, and what it
// runs is watched and ended all the same.
func TestPodmanGoneAndBack(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, impatient, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	onHost(t, h, "mv /usr/bin/podman /usr/bin/podman.away")
	if err := h.ResetConnections(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error { return s.warns("/usr/bin/podman (package podman)") })
	g2, e2 := grant(g.Image, key)
	_, err := s.runtime.Provision(caller(t.Context()), g2, e2)
	refused(t, err, backenderr.HostUnfit, "podman")
	if _, err := run(t, p, key, "true"); err != nil {
		t.Error(err)
	}
	onHost(t, h, "mv /usr/bin/podman.away /usr/bin/podman")
	if err := h.ResetConnections(t.Context()); err != nil { // sooner than the next look
		t.Fatal(err)
	}
	soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
	checkUsage(t, s.terminate(t, p))
	s.terminate(t, s.provision(t, g2, e2))
}

// warns fails unless the capabilities warn of something.
func (s *site) warns(text string) error {
	c, err := s.runtime.Capabilities(s.t.Context())
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(c.Warnings, func(w string) bool { return strings.Contains(w, text) }) {
		return fmt.Errorf("no warning says %q: %q", text, c.Warnings)
	}
	return nil
}

// A clock up to a minute off is borne, in either direction. One that gets worse
// under a running grant keeps new ones away, not the old one from its end.
func TestClockSkew(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, impatient, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	g, e := grant(image, key)
	p := s.provision(t, g, e)
	for _, tt := range []struct {
		skew time.Duration
		fit  bool
	}{{50 * time.Second, true}, {-50 * time.Second, true}, {75 * time.Second, false}, {-75 * time.Second, false}, {0, true}} {
		t.Run(tt.skew.String(), func(t *testing.T) {
			if err := h.SetClockSkew(t.Context(), tt.skew); err != nil {
				t.Fatal(err)
			}
			generation := s.driver.hosts[0].conn.State().Generation
			if err := h.ResetConnections(t.Context()); err != nil {
				t.Fatal(err)
			}
			var found *facts
			soon(t, func() error {
				var problem error
				found, problem = s.driver.hosts[0].known()
				switch {
				case found == nil || found.generation <= generation:
					return errors.New("not looked at yet")
				case (problem == nil) != tt.fit:
					return fmt.Errorf("problem is %w", cmpOr(problem, errors.New("none")))
				}
				return nil
			})
			g2, e2 := grant(image, key)
			if tt.fit {
				s.terminate(t, s.provision(t, g2, e2))
			} else {
				if err := s.warns("its clock is "); err != nil {
					t.Error(err)
				}
				_, err := s.runtime.Provision(caller(t.Context()), g2, e2)
				refused(t, err, backenderr.HostUnfit, "clock", h.Name)
			}
			if _, err := run(t, p, key, "true"); err != nil {
				t.Error(err)
			}
		})
	}
	s.terminate(t, p)
}

// A host that becomes unfit while its connection lasts is found out without a
// grant, busy or not, and so is that it is fit again.
func TestAHostThatBecomesUnfitWhileItIsConnected(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, func(c *Config) { c.recheckInterval = 500 * time.Millisecond }, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	host := s.driver.hosts[0]
	generation := host.conn.State().Generation
	script := func(text string) func() { return func() { onHost(t, h, text) } }
	skewed := func(d time.Duration) func() {
		return func() { must(t, h.SetClockSkew(t.Context(), d)) }
	}
	var p backend.Provisioned
	for _, tt := range []struct {
		name, says   string
		reason       backenderr.Reason
		breaks, mend func()
		then         func()
	}{
		{"idle, its clock", "its clock is 1m30s off", backenderr.ClockSkew, skewed(90 * time.Second), skewed(0), func() {
			g, e := grant(image, key)
			p = s.provision(t, g, e)
		}},
		{
			"busy, its clock", "its clock is -1m30s off", backenderr.ClockSkew, skewed(-90 * time.Second), skewed(0),
			func() {},
		},
		{
			"busy, a program", "nft (package nftables)", backenderr.HostUnfit,
			script("mv /usr/sbin/nft /usr/sbin/nft.away"), script("mv /usr/sbin/nft.away /usr/sbin/nft"), func() {},
		},
		{
			"busy, its disk", "MiB free", backenderr.HostUnfit,
			func() { must(t, h.FillDisk(t.Context())) }, func() { must(t, h.FreeDisk(t.Context())) }, func() {},
		},
	} {
		tt.breaks()
		soon(t, func() error { return s.warns(tt.says) })
		if found, problem := host.known(); found == nil || !backenderr.Is(problem, tt.reason) {
			t.Errorf("%s: seen %t, problem %v", tt.name, found != nil, problem)
		}
		g, e := grant(image, key)
		_, err := s.runtime.Provision(caller(t.Context()), g, e)
		refused(t, err, backenderr.HostUnfit, h.Name)
		if p.Instance.ID != "" {
			if _, err := run(t, p, key, "true"); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
		tt.mend()
		soon(t, func() error { _, err := host.usable(); return err })
		if now := host.conn.State().Generation; now != generation {
			t.Fatalf("%s: the connection is another one", tt.name)
		}
		tt.then()
	}
	checkUsage(t, s.terminate(t, p))
}

func cmpOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// Ports of the range that something else on the host has are left out. Nobody is
// refused as long as there are others.
func TestPortsThatSomethingElseHasAreAvoided(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, func(c *Config) { c.Hosts[0].Ports = "40000-40004" }, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	take := func(unit string, args ...string) {
		onHost(t, h, `unit=$1; shift; systemd-run --quiet --collect --unit="$unit" systemd-socket-activate "$@" /usr/bin/cat`, append([]string{unit}, args...)...)
	}
	take("web", "--listen=0.0.0.0:40000")
	take("dns", "--datagram", "--listen=127.0.0.1:40002")
	soon(t, func() error {
		if out := onHost(t, h, "ss -Hltun sport ge 40000"); strings.Count(out, "\n") != 2 {
			return fmt.Errorf("listening: %s", out)
		}
		return nil
	})
	g, e := grant(image, key)
	g.Ports = []backend.Port{{Number: 53, Protocol: backend.UDP}}
	p := s.provision(t, g, e)
	if got := []uint16{p.Receipt.Port, p.Instance.Ports[0].PublicPort}; !slices.Equal(got, []uint16{40001, 40003}) {
		t.Errorf("ports are %d", got)
	}
	if _, err := run(t, p, key, "true"); err != nil {
		t.Error(err)
	}
	if err := s.warns("40000"); err != nil {
		t.Error(err)
	}
	// What is left isn't enough for another one.
	g2, e2 := grant(image, key)
	g2.Ports = []backend.Port{{Number: 53, Protocol: backend.UDP}, {Number: 54, Protocol: backend.UDP}}
	_, err := s.runtime.Provision(caller(t.Context()), g2, e2)
	refused(t, err, backenderr.CapacityExhausted, h.Name)
	s.terminate(t, p)
	if err := s.nothingLeft(t.Context()); err != nil {
		t.Error(err)
	}
	onHost(t, h, "systemctl stop web dns")
}

func TestSocketTablesAreRead(t *testing.T) {
	t.Parallel()
	ports := map[uint16]bool{}
	readSockets(`  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:9C41 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 00000000000000000000000000000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 3 2
`, ports)
	if len(ports) != 2 || !ports[40000] || !ports[53] {
		t.Errorf("read %v", ports)
	}
}

// However few sessions sshd allows, a host is as good as any: several grants at
// once, watched, with one of them ending.
func TestHostsWithOneSessionPerConnection(t *testing.T) {
	t.Parallel()
	for _, lines := range [][]string{{"MaxSessions 1"}, {"MaxSessions 1", "DisableForwarding yes"}} {
		t.Run(strings.Join(lines, ", "), func(t *testing.T) {
			t.Parallel()
			h := lab.NewHost(t, lab.HostOptions{SSHDConfig: lines})
			s := newSite(t, nil, h)
			key := newLogin(t)
			image := s.image(ociimage.Shell)
			var group sync.WaitGroup
			made := make([]backend.Provisioned, 4)
			for n := range made {
				g, e := grant(image, key)
				group.Go(func() {
					var err error
					if made[n], err = s.runtime.Provision(caller(t.Context()), g, e); err != nil {
						t.Errorf("grant %d: %v", n, err)
					}
				})
			}
			group.Wait()
			if t.Failed() {
				return
			}
			for _, p := range made {
				if _, err := run(t, p, key, "true"); err != nil {
					t.Error(err)
				}
			}
			// The connection is lost, its spares with it, and all is taken up again.
			if err := h.ResetConnections(t.Context()); err != nil {
				t.Fatal(err)
			}
			soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
			for _, p := range made {
				checkUsage(t, s.terminate(t, p))
			}
		})
	}
}

// A worker whose key a host refuses says so, and keeps so quiet that the host
// goes on serving others that come from the same address; once the key is let
// in, it goes on by itself.
func TestAHostThatRefusesTheKey(t *testing.T) {
	t.Parallel()
	// All times are a tenth of what they are in earnest, where sshd penalises a
	// failure with 5 s and shuts out whom it has given 15 s, and the worker waits
	// for one to two minutes.
	h := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"PerSourcePenalties authfail:1s min:2s", "LogLevel VERBOSE"}})
	s := newSite(t, func(c *Config) {
		c.connection = func(c *sshconn.Config) { c.RefusedBackoff, c.BackoffMin = 8*time.Second, 100*time.Millisecond }
	}, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	// Its key is replaced by another's, on the host alone.
	other := newLogin(t)
	onHost(t, h, `cp -a /root/.ssh/authorized_keys /root/.ssh/away; printf '%s\n' "$1" >/root/.ssh/authorized_keys`, other.line)
	if err := h.ResetConnections(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error { return s.warns("refuses user root with key") })
	g2, e2 := grant(g.Image, key)
	_, err := s.runtime.Provision(caller(t.Context()), g2, e2)
	refused(t, err, backenderr.HostUnfit, "refuses user root", ssh.FingerprintSHA256(h.Lab().UserKey().PublicKey()))
	// Another one comes and goes all the time, and is never shut out.
	failures := func() int {
		return strings.Count(onHost(t, h, "journalctl --unit=ssh --output=cat --no-pager"), "Connection closed by authenticating user root")
	}
	for failures() < 3 {
		client, err := ssh.Dial("tcp", h.Addr.String()+":"+strconv.Itoa(h.SSHPort), &ssh.ClientConfig{
			User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(other.signer)}, HostKeyCallback: ssh.FixedHostKey(h.HostKey), Timeout: time.Minute,
		})
		if err != nil {
			t.Fatalf("another one is shut out: %v", err)
		}
		_ = client.Close()
	}
	onHost(t, h, "mv /root/.ssh/away /root/.ssh/authorized_keys")
	soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
	s.terminate(t, s.provision(t, g2, e2))
	checkUsage(t, s.terminate(t, p))
}

// The end of a grant is the host's own doing: whatever state the worker is in,
// and whatever the workload thinks of it.
func TestDeadlinesHold(t *testing.T) {
	t.Parallel()
	for _, image := range []ociimage.Kind{ociimage.Shell, ociimage.Stubborn} {
		for _, tt := range []struct {
			name        string
			leave, back func(*testing.T, *site)
		}{
			{"with a worker", func(*testing.T, *site) {}, func(*testing.T, *site) {}},
			{"with the worker dead", func(_ *testing.T, s *site) { s.stop() }, func(_ *testing.T, s *site) { s.start() }},
			{
				"with the network cut",
				func(t *testing.T, s *site) {
					t.Helper()
					must(t, s.hosts[0].CutOff(t.Context()))
				},
				func(t *testing.T, s *site) {
					t.Helper()
					must(t, s.hosts[0].Restore(t.Context()))
				},
			},
			{
				"on a full disk",
				func(t *testing.T, s *site) {
					t.Helper()
					must(t, s.hosts[0].FillDisk(t.Context()))
				},
				func(t *testing.T, s *site) {
					t.Helper()
					must(t, s.hosts[0].FreeDisk(t.Context()))
				},
			},
		} {
			t.Run(string(image)+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				h := lab.NewHost(t, lab.HostOptions{})
				s := newSite(t, impatient, h)
				key := newLogin(t)
				g, e, p := s.provisionBriefly(t, s.image(image), key)
				tt.leave(t, s)
				ctx, cancel := context.WithDeadline(t.Context(), g.ValidTo.Add(lateLimit))
				defer cancel()
				err := poll(ctx, func() error {
					// All but the directory, which has the usage.
					left, err := h.Leftovers(ctx, "image ", "file "+stateDir)
					if err == nil && len(left) > 0 {
						err = fmt.Errorf("still there:\n\t%s", strings.Join(left, "\n\t"))
					}
					return err
				})
				if err != nil {
					t.Errorf("%s after its deadline: %v", lateLimit, err)
				}
				t.Logf("gone %s after its deadline", time.Since(g.ValidTo))
				if time.Now().Before(g.ValidTo) {
					t.Error("it ended before its deadline")
				}
				tt.back(t, s)
				soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
				log := ended(t, s, p, backend.EndDeadline, -1)
				checkUsage(t, log)
				if late := log.EndedAt.Sub(g.ValidTo); late > lateLimit || late < -2*time.Second {
					t.Errorf("ended %s after its deadline", late)
				}
				_, err = s.runtime.Provision(caller(t.Context()), g, e)
				refused(t, err, backenderr.GrantEnded)
			})
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A host that is rebooted while no worker looks ends its grants, and the worker
// that comes puts everything in order.
func TestRebootWhileTheWorkerIsDead(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	var made []backend.Provisioned
	for range 3 {
		g, e := grant(image, key)
		g.Ports = []backend.Port{{Number: 80, Protocol: backend.TCP}}
		made = append(made, s.provision(t, g, e))
	}
	s.stop()
	must(t, h.Reboot(t.Context()))
	s.start()
	for _, p := range made {
		log := ended(t, s, p, backend.EndHostRebooted, -1)
		if !log.Partial || log.Usage.CPU != nil || log.Usage.CPUAllocated == nil || log.Usage.CPUAllocated.Value <= 0 {
			t.Errorf("usage on a host that was rebooted: %+v", log)
		}
	}
	soon(t, func() error { return errors.Join(s.allFree(t.Context()), s.nothingLeft(t.Context())) })
	// Its places, ports and addresses are good for others.
	g, e := grant(image, key)
	g.Ports = []backend.Port{{Number: 80, Protocol: backend.TCP}}
	p := s.provision(t, g, e)
	if p.Receipt.Port != made[0].Receipt.Port {
		t.Errorf("port %d, before the reboot the first had %d", p.Receipt.Port, made[0].Receipt.Port)
	}
	if _, err := run(t, p, key, "true"); err != nil {
		t.Error(err)
	}
	s.terminate(t, p)
}

// A thousand calls for one grant are one grant.
func TestAThousandCallsForOneGrant(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	answers := make([]backend.Provisioned, 1000)
	var wg sync.WaitGroup
	for n := range answers {
		wg.Go(func() {
			var err error
			if answers[n], err = s.runtime.Provision(caller(t.Context()), g, e); err != nil {
				t.Errorf("call %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	for n, a := range answers {
		if a.Instance.ID != answers[0].Instance.ID || a.Instance.Attempt != 1 || a.Receipt != answers[0].Receipt {
			t.Fatalf("answer %d differs:\n%+v\n%+v", n, answers[0], a)
		}
	}
	if n := containers(t, h); n != 1 {
		t.Errorf("%d containers", n)
	}
	s.terminate(t, answers[0])
}

// A thousand grants for a host that fits ten are ten instances and 990 clean
// refusals, and nothing grows.
func TestAThousandGrantsForAHostThatFitsTen(t *testing.T) {
	t.Parallel()
	const room, calls = 10, 1000
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, func(c *Config) { c.Hosts[0].CPUMillicores = room * 500 }, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	// The image is sent once, before the crowd.
	g, e := grant(image, key)
	s.terminate(t, s.provision(t, g, e))
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)

	var wg sync.WaitGroup
	var mu sync.Mutex
	var ran []backend.Provisioned
	var refusals int
	ctx, cancel := context.WithTimeout(t.Context(), 4*callTimeout)
	defer cancel()
	for range calls {
		g, e := grant(image, key)
		wg.Go(func() {
			p, err := s.runtime.Provision(caller(ctx), g, e)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				ran = append(ran, p)
				return
			}
			var own *backenderr.Error
			if !backenderr.Is(err, backenderr.CapacityExhausted) || backenderr.CreatedOf(err) != backenderr.CreatedNone || !errors.As(err, &own) || own.RetryAfter <= 0 {
				t.Errorf("got %v", err)
			}
			refusals++
		})
	}
	wg.Wait()
	if len(ran) != room || refusals != calls-room {
		t.Errorf("%d run and %d are refused; there is room for %d", len(ran), refusals, room)
	}
	if n := containers(t, h); n != room {
		t.Errorf("%d containers", n)
	}
	ports := map[uint16]bool{}
	for _, p := range ran {
		ports[p.Receipt.Port] = true
		if _, err := run(t, p, key, "true"); err != nil {
			t.Error(err)
		}
	}
	if len(ports) != len(ran) {
		t.Errorf("%d ports for %d grants", len(ports), len(ran))
	}
	// Those that were refused have left nothing in the worker.
	if n := len(s.runtime.Instances(caller(t.Context()))); n != room {
		t.Errorf("the worker knows %d instances", n)
	}
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	// Other tests run beside this one.
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 256<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	for _, p := range ran {
		wg.Go(func() { s.terminate(t, p) })
	}
	wg.Wait()
}
