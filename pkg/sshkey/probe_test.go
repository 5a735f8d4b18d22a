package sshkey_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
)

// serveSSH serves handshakes until the test ends, open to everyone if noAuth.
func serveSSH(t *testing.T, noAuth bool) (endpoint string, key sshkey.PublicKey) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{NoClientAuth: noAuth}
	if !noAuth {
		config.PublicKeyCallback = func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, context.Canceled }
	}
	config.AddHostKey(signer)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if server, _, _, err := ssh.NewServerConn(conn, config); err == nil {
				_ = server.Wait()
			}
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = listener.Close()
		<-done
	})
	key, err = sshkey.ParsePublicKey(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	if err != nil {
		t.Fatal(err)
	}
	return listener.Addr().String(), key
}

func TestProbeAcceptsOnlyTheExpectedHostKey(t *testing.T) {
	t.Parallel()
	endpoint, key := serveSSH(t, false)
	if err := sshkey.Probe(t.Context(), endpoint, "compute", key); err != nil {
		t.Errorf("the right key: %v", err)
	}
	_, other := serveSSH(t, false)
	if err := sshkey.Probe(t.Context(), endpoint, "compute", other); err == nil {
		t.Error("another key was accepted")
	}
}

func TestProbeRefusesAServerThatIsOpenToAll(t *testing.T) {
	t.Parallel()
	endpoint, key := serveSSH(t, true)
	err := sshkey.Probe(t.Context(), endpoint, "compute", key)
	if err == nil || !strings.Contains(err.Error(), "without a key") {
		t.Errorf("got %v", err)
	}
}

func TestProbeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // accepts, says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	_, key := serveSSH(t, false)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := sshkey.Probe(ctx, listener.Addr().String(), "compute", key); err == nil {
		t.Error("a silent server passed")
	}
}
