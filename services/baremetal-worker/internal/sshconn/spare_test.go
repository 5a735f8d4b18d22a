package sshconn_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// connections counts the SSH connections that a host's sshd serves.
func connections(t *testing.T, host *lab.Host) int {
	t.Helper()
	out, err := host.Exec(t.Context(), "ss", "-Htn", "state", "established", "sport", "=", "22")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "\n")
}

// However few sessions sshd allows, everything works at once: files, commands,
// sockets, with forwarding or without.
func TestOneSessionPerConnectionIsEnough(t *testing.T) {
	t.Parallel()
	for _, lines := range [][]string{{"MaxSessions 1"}, {"MaxSessions 2"}, {"MaxSessions 1", "DisableForwarding yes"}} {
		t.Run(strings.Join(lines, ", "), func(t *testing.T) {
			t.Parallel()
			host := lab.NewHost(t, lab.HostOptions{SSHDConfig: lines})
			if _, err := host.Exec(t.Context(), "systemctl", "start", "podman.socket"); err != nil {
				t.Fatal(err)
			}
			cfg := config(host)
			cfg.SpareIdle = 500 * time.Millisecond
			conn := connect(t, cfg)
			files, err := conn.SFTP(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			socket, err := conn.DialUnix(t.Context(), sshconn.PodmanSocket)
			if err != nil {
				t.Fatal(err)
			}
			data := bytes.Repeat([]byte("0123456789abcdef"), 16<<10)
			var group sync.WaitGroup
			for n := range 16 {
				group.Go(func() {
					got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(data)})
					if err != nil || !bytes.Equal(got.Stdout, data) {
						t.Errorf("command %d: %d bytes, %v", n, len(got.Stdout), err)
					}
					if _, err := files.Stat("/etc"); err != nil {
						t.Errorf("files beside command %d: %v", n, err)
					}
				})
			}
			group.Wait()
			if got := ping(t, conn); got != "OK" {
				t.Errorf("podman says %q", got)
			}
			// Four commands and SFTP, and the sockets' programs where they are needed.
			if spares := conn.State().Spares; spares < 1 || spares > 9 {
				t.Errorf("%d spare connections", spares)
			}
			_ = socket.Close()
			eventually(t, "spares that nobody needs are closed", func() bool { return conn.State().Spares <= 1 && connections(t, host) <= 2 })
			if got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil || got.ExitCode != 0 {
				t.Errorf("a command afterwards: %+v, %v", got, err)
			}

			// All ends with the connection.
			if err := conn.Close(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "sshd serves nobody", func() bool { return connections(t, host) == 0 })
		})
	}
}

func TestSparesAreOpenedOnlyWhereTheyAreNeeded(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, config(host))
	if _, err := conn.SFTP(t.Context()); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 8 {
				if got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil || got.ExitCode != 0 {
					t.Errorf("%+v, %v", got, err)
				}
			}
		})
	}
	group.Wait()
	if n := conn.State().Spares; n != 0 {
		t.Errorf("%d spare connections to a host that allows ten sessions", n)
	}
}

func TestALostConnectionTakesItsSparesAlong(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 1"}})
	cfg := config(host)
	conn := connect(t, cfg)
	// The first session is on the main connection.
	got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sh", "-c", "echo $PPID"}})
	if err != nil {
		t.Fatal(err)
	}
	main := strings.TrimSpace(string(got.Stdout))
	running := make(chan error, 3)
	for range cap(running) {
		go func() {
			_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sleep", "600"}})
			running <- err
		}()
	}
	eventually(t, "all commands run", func() bool {
		out, _ := host.Exec(t.Context(), "pgrep", "-x", "sleep")
		return strings.Count(out, "\n") == cap(running)
	})
	generation := conn.State().Generation
	if _, err := host.Exec(t.Context(), "kill", "-9", main); err != nil {
		t.Fatal(err)
	}
	for range cap(running) {
		if err := <-running; backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
			t.Errorf("Run: %v", err)
		}
	}
	waitState(t, conn, "connected again", func(s sshconn.State) bool { return s.Connected && s.Generation > generation })
	if n := conn.State().Spares; n != 0 {
		t.Errorf("%d spares of the lost connection", n)
	}
	eventually(t, "the spares are closed on the host, too", func() bool { return connections(t, host) == 1 })
}

// A spare that breaks takes only its own sessions along.
func TestABrokenSpareIsReplaced(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 1"}})
	cfg := config(host)
	admitted := make(chan int, 10)
	cfg.Admit = func(_ context.Context, sshd int) error { admitted <- sshd; return nil }
	conn := connect(t, cfg)
	if _, err := conn.SFTP(t.Context()); err != nil {
		t.Fatal(err)
	}
	running := make(chan error, 1)
	go func() {
		_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sleep", "600"}})
		running <- err
	}()
	sshd := <-admitted
	eventually(t, "the command runs on it", func() bool {
		out, err := host.Exec(t.Context(), "pgrep", "-x", "sleep", "--parent", fmt.Sprint(sshd))
		return err == nil && out != ""
	})
	generation := conn.State().Generation
	if _, err := host.Exec(t.Context(), "kill", "-9", fmt.Sprint(sshd)); err != nil {
		t.Fatal(err)
	}
	if err := <-running; backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
		t.Errorf("Run: %v", err)
	}
	if got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil || got.ExitCode != 0 {
		t.Errorf("the next command: %+v, %v", got, err)
	}
	if another := <-admitted; another == sshd {
		t.Errorf("the same process %d again", another)
	}
	if s := conn.State(); s.Generation != generation || s.Spares != 1 {
		t.Errorf("state %+v", s)
	}
}

func TestASpareThatIsNotAdmittedIsNotUsed(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 1"}})
	cfg := config(host)
	denied := errors.New("not this one")
	cfg.Admit = func(context.Context, int) error { return denied }
	conn := connect(t, cfg)
	if _, err := conn.SFTP(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}, Timeout: time.Second})
	if backenderr.ReasonOf(err) != backenderr.ProviderUnavailable || !errors.Is(err, denied) {
		t.Errorf("error is %v", err)
	}
	if n := connections(t, host); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func TestAHostThatOpensNoSessionIsUnfit(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 0"}})
	conn := connect(t, config(host))
	_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}})
	if backenderr.ReasonOf(err) != backenderr.HostUnfit || !strings.Contains(err.Error(), "MaxSessions") {
		t.Errorf("error is %v", err)
	}
	if n := connections(t, host); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// Commands that take minutes leave room for those that take milliseconds.
func TestShortCommandsFindASlotWhileLongOnesRun(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, config(host))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var group sync.WaitGroup
	for range 6 {
		group.Go(func() {
			_, err := conn.Run(ctx, sshconn.Command{Args: []string{"sleep", "600"}, Timeout: time.Hour, Long: true})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("a long command ended with %v", err)
			}
		})
	}
	sleeps := func() int {
		out, _ := host.Exec(t.Context(), "pgrep", "-x", "sleep")
		return strings.Count(out, "\n")
	}
	eventually(t, "two long commands run", func() bool { return sleeps() == 2 })
	for range 8 {
		if got, err := conn.Run(ctx, sshconn.Command{Args: []string{"true"}, Timeout: 20 * time.Second}); err != nil || got.ExitCode != 0 {
			t.Fatalf("a short command: %+v, %v", got, err)
		}
	}
	if n := sleeps(); n != 2 {
		t.Errorf("%d long commands run at once; half of four slots are theirs", n)
	}
	cancel()
	group.Wait()
}
