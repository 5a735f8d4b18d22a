package sshconn_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"log/slog"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

// config reaches a lab host.
func config(h *lab.Host) sshconn.Config {
	return sshconn.Config{
		Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root",
		Key: h.Lab().UserKey(), HostKeys: []ssh.PublicKey{h.HostKey},
		BackoffMin: 50 * time.Millisecond, BackoffMax: 500 * time.Millisecond,
	}
}

func open(t testing.TB, cfg sshconn.Config) *sshconn.Conn {
	t.Helper()
	conn, err := sshconn.Open(t.Context(), cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// connect returns a connection that is up.
func connect(t testing.TB, cfg sshconn.Config) *sshconn.Conn {
	t.Helper()
	conn := open(t, cfg)
	wait(t, conn)
	return conn
}

func wait(t testing.TB, conn *sshconn.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := conn.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

// waitState waits until the connection's state is as wanted.
func waitState(t testing.TB, conn *sshconn.Conn, what string, want func(sshconn.State) bool) sshconn.State {
	t.Helper()
	timeout := time.After(3 * time.Minute)
	for {
		state, changed := conn.Changed()
		if want(state) {
			return state
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("never %s; the state is %+v", what, state)
		}
	}
}

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
