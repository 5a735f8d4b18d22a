package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostbackend"
)

// The example is the reference of the configuration: it must load as it is,
// with the files that it names beside it.
func TestExampleIsValid(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("baremetal-worker.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, data []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	login, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	certificate, key := selfSigned(t)
	write("worker.toml", example)
	write("ssh/id_ed25519", login.Private.Expose())
	write("guest", []byte("a guest"))
	write("tls/cert.pem", certificate)
	write("tls/key.pem", key)
	write("tls/ca.pem", certificate)

	c, err := config.Load[worker.Config[hostbackend.Config]](filepath.Join(dir, "worker.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if c.BridgeID != "example" || len(c.Listen) != 2 || len(c.Clients) != 2 || len(c.Backend.Hosts) != 1 || c.Backend.Hosts[0].Name != "rack1-a" {
		t.Errorf("loaded %+v", c)
	}
}

func selfSigned(t *testing.T) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "worker"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}
