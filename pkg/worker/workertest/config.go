// Package workertest has what the tests of the workers' commands share.
package workertest

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
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// LoadConfig loads a configuration that people are shown, from a file as a worker
// does: with a certificate, a guest and the given files, by their names, beside it.
// One that isn't valid ends the test.
func LoadConfig[D any](t testing.TB, text []byte, files map[string][]byte) worker.Config[D] {
	t.Helper()
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
	certificate, key := selfSigned(t)
	write("worker.toml", text)
	write("guest", []byte("a guest"))
	write("tls/cert.pem", certificate)
	write("tls/key.pem", key)
	write("tls/ca.pem", certificate)
	for name, data := range files {
		write(name, data)
	}
	c, err := config.Load[worker.Config[D]](filepath.Join(dir, "worker.toml"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func selfSigned(t testing.TB) (certificate, key []byte) {
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
