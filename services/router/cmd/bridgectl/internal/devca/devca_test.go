package devca_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/devca"
)

const day = 24 * time.Hour

func issue(t *testing.T, dir, name string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	uri, err := devca.Issue(dir, devca.Identity{Name: name, DNS: []string{"router.example"}, IPs: []net.IP{net.IPv4(192, 0, 2, 1)}}, day, false)
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://test.internal/" + name; uri != want {
		t.Errorf("identity %q, want %q", uri, want)
	}
	at := func(file string) string { return filepath.Join(dir, name, file) }
	pair, err := tls.LoadX509KeyPair(at(devca.CertFile), at(devca.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	text, err := os.ReadFile(at(devca.CAFile))
	if err != nil || !pool.AppendCertsFromPEM(text) {
		t.Fatal(err)
	}
	return pair, pool
}

func TestIdentitiesServeAndCall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := devca.Init(dir, "test.internal", 2*day, false); err != nil {
		t.Fatal(err)
	}
	server, pool := issue(t, dir, "router")
	client, _ := issue(t, dir, "alice")
	for _, name := range []string{"router", "localhost", "router.example", "127.0.0.1", "192.0.2.1"} {
		a, b := net.Pipe()
		far := tls.Server(a, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{server}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
		near := tls.Client(b, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{client}, RootCAs: pool, ServerName: name})
		done := make(chan error, 1)
		go func() { done <- far.HandshakeContext(t.Context()) }()
		if err := near.HandshakeContext(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := far.ConnectionState().PeerCertificates[0].URIs[0].String(); got != "spiffe://test.internal/alice" {
			t.Errorf("the server sees %q", got)
		}
		_, _ = a.Close(), b.Close()
	}
	for path, mode := range map[string]os.FileMode{
		devca.CAKeyFile: 0o600, devca.CAFile: 0o644, "alice/" + devca.KeyFile: 0o600, "alice/" + devca.CertFile: 0o644,
	} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, want %v (%v)", path, info.Mode(), mode, err)
		}
	}
}

func TestNothingIsOverwrittenWithoutForce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := devca.Issue(dir, devca.Identity{Name: "a"}, day, false); err == nil {
		t.Error("issued without an authority")
	}
	if err := devca.Init(dir, "test.internal", day, false); err != nil {
		t.Fatal(err)
	}
	if err := devca.Init(dir, "test.internal", day, false); !errors.Is(err, devca.ErrExists) {
		t.Error(err)
	}
	issue(t, dir, "a")
	if _, err := devca.Issue(dir, devca.Identity{Name: "a"}, day, false); !errors.Is(err, devca.ErrExists) {
		t.Error(err)
	}
	if _, err := devca.Issue(dir, devca.Identity{Name: "a"}, day, true); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"", "..", "a/b", "A", "-a", "a b", "ä", "a.b"} {
		if _, err := devca.Issue(dir, devca.Identity{Name: name}, day, false); !errors.Is(err, devca.ErrName) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	for _, domain := range []string{"", "A", "a/b", "a b", "-a"} {
		if err := devca.Init(t.TempDir(), domain, day, false); !errors.Is(err, devca.ErrName) {
			t.Errorf("trust domain %q: %v", domain, err)
		}
	}
	// The key of another authority signs nothing.
	other := t.TempDir()
	if err := devca.Init(other, "test.internal", day, false); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(other, devca.CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, devca.CAKeyFile), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := devca.Issue(dir, devca.Identity{Name: "b"}, day, false); err == nil {
		t.Error("signed with a key that is not the authority's")
	}
}
