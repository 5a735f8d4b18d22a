package systemd_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

func connect(t testing.TB, h *lab.Host) (*systemd.Client, *sshconn.Conn) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	conn, err := sshconn.Open(t.Context(), sshconn.Config{
		Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root",
		Key: h.Lab().UserKey(), HostKeys: []ssh.PublicKey{h.HostKey},
		BackoffMin: 50 * time.Millisecond, BackoffMax: 500 * time.Millisecond,
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := systemd.Open(t.Context(), conn, log)
	t.Cleanup(func() { _ = client.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := client.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return client, conn
}

func program(args ...string) []systemd.Exec { return []systemd.Exec{{Args: args}} }

// sleeper is a unit that runs until it's stopped.
func sleeper(name string) systemd.Unit {
	return systemd.Unit{Name: name, Type: "exec", ExecStart: program("/bin/sleep", "600"), TimeoutStop: 5 * time.Second}
}

// next returns the first status that is as wanted.
func next(t testing.TB, watch <-chan systemd.UnitStatus, what string, want func(systemd.UnitStatus) bool) systemd.UnitStatus {
	t.Helper()
	timeout := time.After(3 * time.Minute)
	var last systemd.UnitStatus
	for {
		select {
		case s, ok := <-watch:
			if !ok {
				t.Fatalf("the watch ended before: %s; the last status was %+v", what, last)
			}
			if last = s; want(s) {
				return s
			}
		case <-timeout:
			t.Fatalf("never: %s; the last status was %+v", what, last)
		}
	}
}

func isGone(s systemd.UnitStatus) bool { return !s.Found() }
func isRunning(s systemd.UnitStatus) bool {
	return s.ActiveState == "active" && s.SubState == "running"
}

func TestUnits(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{})
	client, _ := connect(t, host)
	sh := func(script string) string {
		t.Helper()
		out, err := host.Exec(t.Context(), "sh", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}

	t.Run("Version", func(t *testing.T) {
		if v, err := client.Version(t.Context()); err != nil || !strings.HasPrefix(v, "257") {
			t.Errorf("%q, %v", v, err)
		}
		if has, err := client.HasOwner(t.Context(), "org.freedesktop.systemd1"); !has || err != nil {
			t.Errorf("%v, %v", has, err)
		}
		if has, err := client.HasOwner(t.Context(), "org.fedoraproject.FirewallD1"); has || err != nil {
			t.Errorf("%v, %v", has, err)
		}
	})

	t.Run("AUnitIsStartedSeenAndStopped", func(t *testing.T) {
		const name = "t-life.service"
		if s, err := client.Status(t.Context(), name); err != nil || s.Found() || s.Running() {
			t.Errorf("before: %+v, %v", s, err)
		}
		watch := client.Watch(t.Context(), name)
		next(t, watch, "not there", isGone)
		unit := sleeper(name)
		unit.CPUMillicores, unit.MemoryMax, unit.TasksMax, unit.Description = 1500, 64<<20, 50, "life of a unit"
		if err := client.StartTransient(t.Context(), unit); err != nil {
			t.Fatal(err)
		}
		running := next(t, watch, "running", isRunning)
		if running.MainPID == 0 || running.ActiveEnter.IsZero() || len(running.InvocationID) != 32 || running.LoadState != "loaded" {
			t.Errorf("%+v", running)
		}
		s, err := client.Status(t.Context(), name)
		if err != nil || !isRunning(s) || s.CPUUsageNSec == nil || s.MainPID != running.MainPID {
			t.Errorf("%+v, %v", s, err)
		}
		if got := sh("systemctl show -p CPUQuotaPerSecUSec,MemoryMax,TasksMax,KillMode,CollectMode " + name + " | sort"); got != "CPUQuotaPerSecUSec=1.500000s\nCollectMode=inactive-or-failed\nKillMode=mixed\nMemoryMax=67108864\nTasksMax=50" {
			t.Errorf("%s", got)
		}
		list, err := client.List(t.Context(), "t-*.service")
		if err != nil || len(list) != 1 || list[0].Name != name || list[0].ActiveState != "active" || list[0].Description != "life of a unit" {
			t.Errorf("%+v, %v", list, err)
		}
		if err := client.StartTransient(t.Context(), unit); !errors.Is(err, systemd.ErrUnitExists) {
			t.Errorf("a second start: %v", err)
		}
		for range 2 {
			if err := client.Stop(t.Context(), name); err != nil {
				t.Error(err)
			}
		}
		next(t, watch, "gone", isGone)
		if s, err := client.Status(t.Context(), name); err != nil || s.Found() {
			t.Errorf("after: %+v, %v", s, err)
		}
		// The same name is free again, and the watch sees that too.
		if err := client.StartTransient(t.Context(), unit); err != nil {
			t.Fatal(err)
		}
		again := next(t, watch, "running again", isRunning)
		if again.InvocationID == running.InvocationID {
			t.Error("the same invocation")
		}
		if err := client.Kill(t.Context(), name, 9); err != nil {
			t.Error(err)
		}
		next(t, watch, "killed and collected", isGone)
		if err := errors.Join(client.Kill(t.Context(), name, 9), client.ResetFailed(t.Context(), name)); err != nil {
			t.Errorf("of a unit that isn't there: %v", err)
		}
	})

	t.Run("TheEndOfACollectedUnitIsSeen", func(t *testing.T) {
		for _, c := range []struct {
			script, result string
			code, status   int32
			limit          time.Duration
		}{
			{"sleep 0.2; exit 0", "success", 1, 0, 0},
			{"sleep 0.2; exit 7", "exit-code", 1, 7, 0},
			{"sleep 0.2; kill -9 $$", "signal", 2, 9, 0},
			{"exec sleep 60", "timeout", 2, 15, 300 * time.Millisecond},
		} {
			name := "t-end-" + c.result + ".service"
			watch := client.Watch(t.Context(), name)
			next(t, watch, "not there", isGone)
			err := client.StartTransient(t.Context(), systemd.Unit{Name: name, Type: "exec", RuntimeMax: c.limit, ExecStart: program("/bin/sh", "-c", c.script)})
			if err != nil {
				t.Fatal(err)
			}
			end := next(t, watch, "ended and gone", func(s systemd.UnitStatus) bool { return isGone(s) && s.Result != "" && s.InvocationID != "" })
			if end.Running() || end.Result != c.result || end.ExecMainCode != c.code || end.ExecMainStatus != c.status || end.ActiveEnter.IsZero() || end.ActiveExit.IsZero() {
				t.Errorf("%s: the end is %+v", c.script, end)
			}
			if s, err := client.Status(t.Context(), name); err != nil || s.Found() {
				t.Errorf("%s: %+v, %v", c.script, s, err)
			}
		}
	})

	t.Run("AFailedStartSaysWhy", func(t *testing.T) {
		err := client.StartTransient(t.Context(), systemd.Unit{
			Name: "t-pre.service", Type: "exec", ExecStartPre: program("/bin/false"), ExecStart: program("/bin/sleep", "60"),
		})
		var job *systemd.JobError
		if !errors.As(err, &job) || job.Result != "failed" || job.Status.Result != "exit-code" {
			t.Errorf("error is %v", err)
		}
		err = client.StartTransient(t.Context(), systemd.Unit{Name: "t-none.service", Type: "exec", ExecStart: program("/no/such/program")})
		if !errors.As(err, &job) {
			t.Errorf("error is %v", err)
		}
		err = client.StartTransient(t.Context(), systemd.Unit{Name: "t-notify.service", TimeoutStart: 300 * time.Millisecond, ExecStart: program("/bin/sleep", "60")})
		if !errors.As(err, &job) || job.Status.Result != "timeout" {
			t.Errorf("a service that never notifies: %v", err)
		}
		if err := client.StartTransient(t.Context(), systemd.Unit{Name: "bad name.service"}); backenderr.ReasonOf(err) != backenderr.Internal {
			t.Errorf("error is %v", err)
		}
		if err := client.Start(t.Context(), "no-such.service"); backenderr.ReasonOf(err) != backenderr.HostUnfit {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("AnEndedGrantCannotStartAgain", func(t *testing.T) {
		sh("mkdir -p /var/lib/t && touch /var/lib/t/ended && rm -f /var/lib/t/ran")
		unit := sleeper("t-condition.service")
		unit.ExecStartPre = program("/bin/touch", "/var/lib/t/ran")
		unit.ConditionPathExists = []string{"/var/lib/t", "!/var/lib/t/ended"}
		if err := client.StartTransient(t.Context(), unit); !errors.Is(err, systemd.ErrConditionFailed) {
			t.Errorf("error is %v", err)
		}
		if got := sh("ls /var/lib/t"); got != "ended" {
			t.Errorf("there is %s", got)
		}
		sh("rm /var/lib/t/ended")
		if err := client.StartTransient(t.Context(), unit); err != nil {
			t.Error(err)
		}
		if err := client.Stop(t.Context(), unit.Name); err != nil {
			t.Error(err)
		}
	})

	t.Run("ArgumentsStayWhatTheyAre", func(t *testing.T) {
		args := []string{"$HOME", "${HOME}", "$$", "%i", "%n", "%%", "a b", "'", `"`, `\x41`, "", "é", "$(id)", "; id", "\n", "\t", "-x", "--", "#", "\\", "=", "\x01"}
		write := func(file string) []systemd.Exec {
			return []systemd.Exec{{Args: append([]string{"/bin/sh", "-c", `f=$1; shift; printf '%s\0' "$@" >"$f"`, "sh", file}, args...)}}
		}
		unit := sleeper("t-args.service")
		unit.ExecStartPre, unit.ExecStopPost = write("/run/t-pre"), write("/run/t-post")
		if err := client.StartTransient(t.Context(), unit); err != nil {
			t.Fatal(err)
		}
		// Systemd reads the unit back from a file that it wrote.
		sh("systemctl daemon-reload")
		if err := client.Stop(t.Context(), unit.Name); err != nil {
			t.Fatal(err)
		}
		want := strings.Join(args, "\x00") + "\x00"
		for _, file := range []string{"/run/t-pre", "/run/t-post"} {
			got, err := host.Exec(t.Context(), "cat", file)
			if err != nil || got != want {
				t.Errorf("%s has %q, want %q (%v)", file, got, want, err)
			}
		}
	})

	t.Run("IgnoredFailuresDoNotStopTheRest", func(t *testing.T) {
		unit := sleeper("t-ignore.service")
		unit.ExecStopPost = []systemd.Exec{
			{Args: []string{"/bin/false"}, IgnoreFailure: true},
			{Args: []string{"/bin/touch", "/run/t-ignored"}, IgnoreFailure: true},
		}
		if err := errors.Join(client.StartTransient(t.Context(), unit), client.Stop(t.Context(), unit.Name)); err != nil {
			t.Fatal(err)
		}
		sh("test -e /run/t-ignored")
	})

	t.Run("ManyUnitsAtOnceAreAllSeen", func(t *testing.T) {
		const many = 40
		var group sync.WaitGroup
		for i := range many {
			group.Go(func() {
				name := fmt.Sprintf("t-many-%d.service", i)
				watch := client.Watch(t.Context(), name)
				err := client.StartTransient(t.Context(), systemd.Unit{Name: name, Type: "exec", ExecStart: program("/bin/sleep", "600")})
				if err != nil {
					t.Error(err)
					return
				}
				next(t, watch, "running", isRunning)
				if err := client.Stop(t.Context(), name); err != nil {
					t.Error(err)
				}
				next(t, watch, "gone", isGone)
			})
		}
		group.Wait()
	})

	t.Run("ManyWatchersShareASubscription", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		watches := make([]<-chan systemd.UnitStatus, 2000)
		for i := range watches {
			watches[i] = client.Watch(ctx, "t-shared.service")
		}
		if err := client.StartTransient(t.Context(), sleeper("t-shared.service")); err != nil {
			t.Fatal(err)
		}
		for _, w := range watches {
			next(t, w, "running", isRunning)
		}
		if err := client.Stop(t.Context(), "t-shared.service"); err != nil {
			t.Fatal(err)
		}
		cancel()
		for _, w := range watches {
			for range w { // Until it's closed.
			}
		}
	})

	t.Run("EnableAndStartPodmansSocket", func(t *testing.T) {
		for range 2 {
			if err := errors.Join(client.Enable(t.Context(), "podman.socket"), client.Start(t.Context(), "podman.socket")); err != nil {
				t.Fatal(err)
			}
		}
		if got := sh("systemctl is-enabled podman.socket; systemctl is-active podman.socket"); got != "enabled\nactive" {
			t.Errorf("%s", got)
		}
	})
}

func TestALostConnection(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{})
	client, conn := connect(t, host)
	stays, ends := client.Watch(t.Context(), "t-stays.service"), client.Watch(t.Context(), "t-ends.service")
	for _, name := range []string{"t-stays.service", "t-ends.service"} {
		if err := client.StartTransient(t.Context(), sleeper(name)); err != nil {
			t.Fatal(err)
		}
	}
	before := next(t, stays, "running", isRunning)
	next(t, ends, "running", isRunning)

	// A start that is under way.
	starting := make(chan error, 1)
	go func() {
		starting <- client.StartTransient(t.Context(), systemd.Unit{Name: "t-slow.service", TimeoutStart: time.Minute, ExecStart: program("/bin/sleep", "600")})
	}()
	next(t, client.Watch(t.Context(), "t-slow.service"), "activating", func(s systemd.UnitStatus) bool { return s.ActiveState == "activating" })

	generation := conn.State().Generation
	if err := host.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Exec(t.Context(), "systemctl", "stop", "t-ends.service"); err != nil {
		t.Fatal(err)
	}
	if err := host.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := host.ResetConnections(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-starting; backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
		t.Errorf("the start: %v", err)
	}
	next(t, ends, "gone", isGone)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := client.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if conn.State().Generation == generation {
		t.Error("the connection is still the old one")
	}
	if after := next(t, stays, "still running", isRunning); after.InvocationID != before.InvocationID {
		t.Errorf("another invocation: %+v", after)
	}

	// After a reboot a transient unit is no more.
	if err := host.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	next(t, stays, "gone with the reboot", isGone)
}

func TestTheBusComesBackAlone(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{})
	client, conn := connect(t, host)
	watch := client.Watch(t.Context(), "t.service")
	next(t, watch, "not there", isGone)
	generation := conn.State().Generation
	if _, err := host.Exec(t.Context(), "systemctl", "restart", "dbus.service", "dbus.socket"); err != nil {
		t.Fatal(err)
	}
	next(t, watch, "read anew", isGone)
	if err := client.StartTransient(t.Context(), sleeper("t.service")); err != nil {
		t.Fatal(err)
	}
	next(t, watch, "running", isRunning)
	if conn.State().Generation != generation {
		t.Error("the SSH connection was replaced")
	}
}

func TestTheBusIsReachedWithoutForwarding(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"AllowStreamLocalForwarding no"}})
	client, _ := connect(t, host)
	watch := client.Watch(t.Context(), "t.service")
	if err := client.StartTransient(t.Context(), sleeper("t.service")); err != nil {
		t.Fatal(err)
	}
	next(t, watch, "running", isRunning)
	if err := client.Stop(t.Context(), "t.service"); err != nil {
		t.Fatal(err)
	}
	next(t, watch, "gone", isGone)
}

func BenchmarkSystemd(b *testing.B) {
	host := lab.NewHost(b, lab.HostOptions{})
	client, _ := connect(b, host)
	if err := client.StartTransient(b.Context(), sleeper("t.service")); err != nil {
		b.Fatal(err)
	}
	b.Run("Status", func(b *testing.B) {
		for b.Loop() {
			if _, err := client.Status(b.Context(), "t.service"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Version", func(b *testing.B) {
		for b.Loop() {
			if _, err := client.Version(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("StartStop", func(b *testing.B) {
		for b.Loop() {
			if err := errors.Join(client.StartTransient(b.Context(), sleeper("t-bench.service")), client.Stop(b.Context(), "t-bench.service")); err != nil {
				b.Fatal(err)
			}
		}
	})
}
