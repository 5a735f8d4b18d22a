package backendtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// NewLogin returns the public key of a new requester, whose private key nobody
// has: what is sent in envelopes.
func NewLogin(t testing.TB) string {
	t.Helper()
	line, _ := newKeyPair(t)
	return line
}

// NewGrant returns a new grant of an hour, and its envelope with the requester's
// key. It has NAME=value in its environment, for [LogIn].
func NewGrant(image backend.Image, shape backend.Shape, login string) (backend.Grant, backend.Envelope) {
	g := backend.Grant{
		Image: image, PostHash: image.Digest.Sum, Shape: shape, MinIsolation: backend.IsolationContainer,
		Network:     backend.NetworkPolicy{Mode: backend.NetworkOpen},
		Environment: map[string]string{"NAME": "value"}, AlmanacSequence: 3,
		ValidTo: time.Now().Add(time.Hour).Truncate(time.Microsecond).UTC(),
	}
	_, _ = rand.Read(g.ID[:]) // Never fails.
	return g, backend.Envelope{PostHash: g.PostHash, SSHPublicKey: login}
}

// LogIn logs in as a requester does and runs a command in a workload that has
// NAME=value in its environment. It is what fixtures have for Login.
func LogIn(ctx context.Context, r backend.Receipt, key redact.Secret) error {
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(r.HostKey))
	if err != nil {
		return fmt.Errorf("host key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(key.Expose())
	if err != nil {
		return errors.New("the login key is no private key") // The cause may hold parts of the key.
	}
	address := net.JoinHostPort(r.Host, strconv.Itoa(int(r.Port)))
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	c, channels, requests, err := ssh.NewClientConn(conn, address, &ssh.ClientConfig{
		User: r.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey),
		HostKeyAlgorithms: []string{hostKey.Type()},
	})
	if err != nil {
		return err
	}
	client := ssh.NewClient(c, channels, requests)
	defer func() { _ = client.Close() }()
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	out, err := session.Output("echo $NAME")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(out)); got != "value" {
		return fmt.Errorf("the workload's environment has NAME=%q", got)
	}
	return nil
}
