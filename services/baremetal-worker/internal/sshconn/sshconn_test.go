package sshconn_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestConfigNeedsAPinnedHostKey(t *testing.T) {
	good := sshconn.Config{Name: "h", Address: "192.0.2.1:22", User: "root", Key: newKey(t), HostKeys: []ssh.PublicKey{newKey(t).PublicKey()}}
	for name, broken := range map[string]func(*sshconn.Config){
		"no name":     func(c *sshconn.Config) { c.Name = "" },
		"no address":  func(c *sshconn.Config) { c.Address = "" },
		"no port":     func(c *sshconn.Config) { c.Address = "192.0.2.1" },
		"no user":     func(c *sshconn.Config) { c.User = "" },
		"no key":      func(c *sshconn.Config) { c.Key = nil },
		"no host key": func(c *sshconn.Config) { c.HostKeys = nil },
	} {
		cfg := good
		broken(&cfg)
		if _, err := sshconn.Open(t.Context(), cfg, discard()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestHost shares one host among the tests that leave it as it was.
func TestHost(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, config(host))

	t.Run("RunPassesArgumentsAsTheyAre", func(t *testing.T) {
		args := []string{"$(id)", "a b", "'", "", "\n", "%i", "$HOME", ";", "é\xff", "*"}
		got, err := conn.Run(t.Context(), sshconn.Command{Args: append([]string{"printf", `%s\0`}, args...)})
		if err != nil {
			t.Fatal(err)
		}
		if want := strings.Join(args, "\x00") + "\x00"; string(got.Stdout) != want {
			t.Errorf("printf got %q, want %q", got.Stdout, want)
		}
	})

	t.Run("RunReportsHowItEnded", func(t *testing.T) {
		for _, c := range []struct {
			script string
			code   int
			signal string
		}{{"exit 0", 0, ""}, {"exit 7", 7, ""}, {"kill -TERM $$", 143, "TERM"}, {"kill -KILL $$", 137, "KILL"}} {
			got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sh", "-c", "echo out; echo err >&2; " + c.script}})
			if err != nil {
				t.Fatal(err)
			}
			if got.ExitCode != c.code || got.Signal != c.signal || string(got.Stdout) != "out\n" || string(got.Stderr) != "err\n" {
				t.Errorf("%s: got %+v", c.script, got)
			}
			if (got.Err("sh") == nil) != (c.code == 0) {
				t.Errorf("%s: Err is %v", c.script, got.Err("sh"))
			}
		}
		got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"no-such-program"}})
		if err != nil || got.ExitCode != 127 {
			t.Errorf("no-such-program: %+v, %v", got, err)
		}
	})

	t.Run("RunFeedsInputAndBoundsOutput", func(t *testing.T) {
		data := make([]byte, 3<<20)
		_, _ = rand.Read(data)
		got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(data), MaxOutput: 4 << 20})
		if err != nil || !bytes.Equal(got.Stdout, data) || got.Truncated {
			t.Errorf("cat: %d bytes, truncated %v, error %v", len(got.Stdout), got.Truncated, err)
		}
		got, err = conn.Run(t.Context(), sshconn.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(data), MaxOutput: 1000})
		if err != nil || len(got.Stdout) != 1000 || !got.Truncated || got.ExitCode != 0 {
			t.Errorf("cat: %d bytes, truncated %v, error %v", len(got.Stdout), got.Truncated, err)
		}
		// A program that doesn't read its input.
		if got, err = conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}, Stdin: bytes.NewReader(data)}); got.ExitCode != 0 {
			t.Errorf("true: %+v, %v", got, err)
		}
	})

	t.Run("RunSaysWhenItsInputFails", func(t *testing.T) {
		broken := errors.New("the source broke")
		_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"cat"}, Stdin: io.MultiReader(strings.NewReader("x"), failing{broken})})
		if !errors.Is(err, broken) {
			t.Errorf("error is %v, want %v", err, broken)
		}
	})

	t.Run("RunKillsWhatIsCancelled", func(t *testing.T) {
		marker := fmt.Sprintf("3%d", time.Now().UnixNano()%1e6+1e6)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := conn.Run(ctx, sshconn.Command{Args: []string{"sh", "-c", "sleep " + marker + "; true"}})
			done <- err
		}()
		pgrep := func() bool {
			got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"pgrep", "-f", "^sleep " + marker}})
			if err != nil {
				t.Fatal(err)
			}
			return got.ExitCode == 0
		}
		eventually(t, "the program runs", pgrep)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || backenderr.ReasonOf(err) != backenderr.Cancelled {
			t.Errorf("error is %v", err)
		}
		eventually(t, "the program is gone", func() bool { return !pgrep() })
		_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sleep", "60"}, Timeout: 200 * time.Millisecond})
		if backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
			t.Errorf("after its time limit the error is %v", err)
		}
	})

	t.Run("ManyCommandsAtOnceStayBelowMaxSessions", func(t *testing.T) {
		if _, err := conn.SFTP(t.Context()); err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for range 64 {
			group.Go(func() {
				if got, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil || got.ExitCode != 0 {
					t.Errorf("%+v, %v", got, err)
				}
			})
		}
		group.Wait()
	})

	t.Run("DialUnixSpeaksHTTPToPodman", func(t *testing.T) {
		if _, err := host.Exec(t.Context(), "systemctl", "start", "podman.socket"); err != nil {
			t.Fatal(err)
		}
		if got := ping(t, conn); got != "OK" {
			t.Errorf("podman says %q", got)
		}
	})

	t.Run("DialUnixSaysWhenNobodyListens", func(t *testing.T) {
		_, err := conn.DialUnix(t.Context(), "/run/no-such.sock")
		if backenderr.ReasonOf(err) != backenderr.ProviderUnavailable || !strings.Contains(err.Error(), "/run/no-such.sock") {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("SFTPIsSharedAndReopened", func(t *testing.T) {
		first, err := conn.SFTP(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second, err := conn.SFTP(t.Context())
		if err != nil || first != second {
			t.Fatalf("another client, error %v", err)
		}
		if _, err := host.Exec(t.Context(), "pkill", "sftp-server"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "SFTP is open again", func() bool {
			client, err := conn.SFTP(t.Context())
			if err != nil {
				return false
			}
			_, err = client.Stat("/etc")
			return client != first && err == nil
		})
	})

	t.Run("ClockAgreesWithTheSameMachines", func(t *testing.T) {
		clock, err := conn.Clock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if clock.Offset.Abs() > clock.Uncertainty {
			t.Errorf("the same clock is off by %s, more than %s", clock.Offset, clock.Uncertainty)
		}
	})

	t.Run("AWrongHostKeyIsRefused", func(t *testing.T) {
		cfg := config(host)
		other := newKey(t).PublicKey()
		cfg.HostKeys = []ssh.PublicKey{other}
		wrong := open(t, cfg)
		err := wrong.Wait(t.Context())
		var mismatch *sshconn.HostKeyMismatchError
		if !errors.As(err, &mismatch) || backenderr.ReasonOf(err) != backenderr.HostUnfit {
			t.Fatalf("error is %v", err)
		}
		if mismatch.Got != ssh.FingerprintSHA256(host.HostKey) || !slices.Equal(mismatch.Want, []string{ssh.FingerprintSHA256(other)}) {
			t.Errorf("mismatch is %+v", mismatch)
		}
		if _, err := wrong.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); backenderr.ReasonOf(err) != backenderr.HostUnfit {
			t.Errorf("Run: %v", err)
		}
	})

	t.Run("AKeyOfAnotherTypeThanPinnedIsRefused", func(t *testing.T) {
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		other, err := ssh.NewPublicKey(private.Public())
		if err != nil {
			t.Fatal(err)
		}
		cfg := config(host)
		cfg.HostKeys = []ssh.PublicKey{other}
		err = open(t, cfg).Wait(t.Context())
		var mismatch *sshconn.HostKeyMismatchError
		if !errors.As(err, &mismatch) || mismatch.Got != "" || backenderr.ReasonOf(err) != backenderr.HostUnfit {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("OneOfSeveralPinnedKeysIsEnough", func(t *testing.T) {
		cfg := config(host)
		cfg.HostKeys = append([]ssh.PublicKey{newKey(t).PublicKey()}, cfg.HostKeys...)
		connect(t, cfg)
	})
}

func TestARefusedLoginIsSaidAndNotRepeatedQuickly(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"PerSourcePenalties authfail:30s min:1s"}})
	cfg := config(host)
	cfg.Key = newKey(t)
	conn := open(t, cfg)
	err := conn.Wait(t.Context())
	var auth *sshconn.AuthError
	if !errors.As(err, &auth) || auth.Penalised || backenderr.ReasonOf(err) != backenderr.HostUnfit {
		t.Fatalf("error is %v", err)
	}
	if auth.Fingerprint != ssh.FingerprintSHA256(cfg.Key.PublicKey()) {
		t.Errorf("error names key %s", auth.Fingerprint)
	}
	// sshd counts a failure a little after it, and then doesn't even listen.
	eventually(t, "sshd penalises the address, and the error says so", func() bool {
		other, err := sshconn.Open(t.Context(), config(host), discard())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = other.Close() }()
		err = other.Wait(t.Context())
		return errors.As(err, &auth) && auth.Penalised
	})
}

func TestALostConnectionFailsEverythingAndComesBack(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, config(host))
	if _, err := host.Exec(t.Context(), "systemctl", "start", "podman.socket"); err != nil {
		t.Fatal(err)
	}
	client, err := conn.SFTP(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	socket, err := conn.DialUnix(t.Context(), sshconn.PodmanSocket)
	if err != nil {
		t.Fatal(err)
	}
	running, read := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sleep", "600"}})
		running <- err
	}()
	go func() {
		_, err := socket.Read(make([]byte, 1))
		read <- err
	}()
	eventually(t, "the command runs", func() bool {
		_, err := host.Exec(t.Context(), "pgrep", "-x", "sleep")
		return err == nil
	})
	generation := conn.State().Generation
	if err := host.ResetConnections(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-running; backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
		t.Errorf("Run: %v", err)
	}
	if err := <-read; err == nil {
		t.Error("a read from a lost socket succeeded")
	}
	if _, err := client.Stat("/"); err == nil {
		t.Error("a lost SFTP client works")
	}
	state := waitState(t, conn, "connected again", func(s sshconn.State) bool { return s.Connected && s.Generation > generation })
	if state.LastError == nil {
		t.Error("nothing says why the connection was lost")
	}
	if got := ping(t, conn); got != "OK" {
		t.Errorf("podman says %q", got)
	}

	// A host that is silent, then gone, then back.
	if err := host.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := conn.Run(ctx, sshconn.Command{Args: []string{"true"}}); backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
		t.Errorf("cut off: %v", err)
	}
	if err := host.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	generation = conn.State().Generation
	if err := host.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitState(t, conn, "connected after a reboot", func(s sshconn.State) bool { return s.Connected && s.Generation > generation })
	if _, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil {
		t.Error(err)
	}
}

// Connections that hold for longer than the pause between dials don't make it
// longer: by doubling, the pauses of this test would be 20 minutes in all.
func TestAHostThatComesAndGoesIsDialledAtOnce(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	cfg := config(host)
	cfg.BackoffMax = time.Hour
	conn := connect(t, cfg)
	for range 15 {
		state := conn.State()
		held := time.NewTimer(4 * cfg.BackoffMin)
		<-held.C
		if err := host.ResetConnections(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitState(t, conn, "connected again", func(s sshconn.State) bool { return s.Connected && s.Generation > state.Generation })
	}
}

func TestASilentHostIsGivenUp(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	cfg := config(host)
	cfg.KeepaliveIdle, cfg.KeepaliveLimit, cfg.DialTimeout = 300*time.Millisecond, 300*time.Millisecond, 500*time.Millisecond
	conn := connect(t, cfg)
	if err := host.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := waitState(t, conn, "given up", func(s sshconn.State) bool { return !s.Connected })
	if !strings.Contains(state.LastError.Error(), "keepalive") {
		t.Errorf("the reason is %v", state.LastError)
	}
	_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}})
	if backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
		t.Errorf("Run: %v", err)
	}
	if err := host.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitState(t, conn, "back", func(s sshconn.State) bool { return s.Connected })
}

func TestSocketsAreReachedWithoutForwarding(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"AllowStreamLocalForwarding no"}})
	if _, err := host.Exec(t.Context(), "systemctl", "start", "podman.socket"); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, config(host))
	for range 3 {
		if got := ping(t, conn); got != "OK" {
			t.Fatalf("podman says %q", got)
		}
	}
	if _, err := conn.DialUnix(t.Context(), "/run/systemd/private"); err == nil {
		t.Error("a socket without a bridge program is reached")
	}
}

func TestCloseEndsEverything(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, config(host))
	running := make(chan error, 1)
	go func() {
		_, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"sleep", "600"}})
		running <- err
	}()
	eventually(t, "the command runs", func() bool {
		_, err := host.Exec(t.Context(), "pgrep", "-x", "sleep")
		return err == nil
	})
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-running; err == nil {
		t.Error("a command outlived the connection")
	}
	if err := conn.Wait(t.Context()); !errors.Is(err, sshconn.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
}

// ping asks podman for a sign of life through a socket of its own.
func ping(t *testing.T, conn *sshconn.Conn) string {
	t.Helper()
	socket, err := conn.DialUnix(t.Context(), sshconn.PodmanSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	if _, err := io.WriteString(socket, "GET /_ping HTTP/1.1\r\nHost: podman\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	reply, err := http.ReadResponse(bufio.NewReader(socket), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reply.Body.Close() }()
	body, err := io.ReadAll(reply.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// failing is a reader that fails.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// eventually polls until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func BenchmarkConnection(b *testing.B) {
	host := lab.NewHost(b, lab.HostOptions{})
	b.Run("connect", func(b *testing.B) {
		for b.Loop() {
			conn, err := sshconn.Open(b.Context(), config(host), discard())
			if err != nil {
				b.Fatal(err)
			}
			wait(b, conn)
			_ = conn.Close()
		}
	})
	conn := connect(b, config(host))
	b.Run("ping", func(b *testing.B) {
		for b.Loop() {
			if _, err := conn.Ping(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("run", func(b *testing.B) {
		for b.Loop() {
			if _, err := conn.Run(b.Context(), sshconn.Command{Args: []string{"true"}}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestTheFirstProgramHasASessionOfEveryConnection(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 1"}})
	cfg := config(host)
	cfg.First = []string{"sh", "-c", `echo "it's $1" >&2; exec cat`, "sh", "first"}
	conn := connect(t, cfg)
	for range 2 {
		wait(t, conn)
		state := conn.State()
		stream, err := conn.First(state.Generation)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(stream, "hello\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(stream).ReadString('\n'); err != nil || line != "hello\n" {
			t.Errorf("%q, %v", line, err)
		}
		for deadline := time.Now().Add(3 * time.Minute); stream.Why() != "it's first"; <-time.After(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("standard error is %q", stream.Why())
			}
		}
		// Until it is allowed, it takes nothing else.
		run := func(ctx context.Context) error {
			_, err := conn.Run(ctx, sshconn.Command{Args: []string{"true"}})
			return err
		}
		if err := run(t.Context()); !backenderr.Is(err, backenderr.ProviderUnavailable) || !state.Closed {
			t.Errorf("used before it was allowed: %v", err)
		}
		if err := run(sshconn.Ungated(t.Context())); err != nil {
			t.Errorf("a look: %v", err)
		}
		conn.Allow(state.Generation + 1)
		if err := run(t.Context()); err == nil {
			t.Error("allowed by the word for another")
		}
		conn.Allow(state.Generation)
		if conn.State().Closed {
			t.Error("still closed")
		}
		if err := run(sshconn.Bind(t.Context(), state.Generation+1)); !backenderr.Is(err, backenderr.ProviderUnavailable) {
			t.Errorf("used by what is bound to another: %v", err)
		}
		if err := run(sshconn.Bind(t.Context(), state.Generation)); err != nil {
			t.Errorf("used by what is bound to it: %v", err)
		}
		// The first program doesn't keep others from their sessions.
		if result, err := conn.Run(t.Context(), sshconn.Command{Args: []string{"true"}}); err != nil || result.ExitCode != 0 {
			t.Errorf("%+v, %v", result, err)
		}
		conn.Cut(state.Generation+1, true) // another one
		if _, err := conn.First(state.Generation + 1); err == nil {
			t.Error("a connection that isn't there has a first program")
		}
		conn.Cut(state.Generation, true)
		waitState(t, conn, "another", func(s sshconn.State) bool { return s.Connected && s.Generation > state.Generation })
		if _, err := io.ReadAll(stream); err != nil && !errors.Is(err, io.EOF) {
			t.Logf("the old stream ended: %v", err)
		}
	}
}
