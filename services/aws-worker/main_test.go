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
	"reflect"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

// The example is the reference of the configuration: it must load as it is,
// with the files that it names beside it.
func TestExampleIsValid(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("aws-worker.example.toml")
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
	certificate, key := selfSigned(t)
	write("worker.toml", example)
	write("guest", []byte("a guest"))
	write("tls/cert.pem", certificate)
	write("tls/key.pem", key)
	write("tls/ca.pem", certificate)

	c, err := config.Load[worker.Config[ec2backend.Config]](filepath.Join(dir, "worker.toml"))
	if err != nil {
		t.Fatal(err)
	}
	b := c.Backend
	if c.BridgeID != "example" || len(c.Listen) != 2 || len(c.Clients) != 2 || len(b.Regions) != 1 || b.Regions[0].Name != "eu-central-1" ||
		b.Guest.AMD64.URL == "" || len(b.Prices) != 1 {
		t.Errorf("loaded %+v", c)
	}
}

// What is written in the example without a comment sign is what the worker does
// without it: people read defaults there.
func TestExampleShowsTheDefaults(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("aws-worker.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	var part struct {
		Backend ec2backend.Config `toml:"backend"`
	}
	if err := toml.Unmarshal(example, &part); err != nil {
		t.Fatal(err)
	}
	got := part.Backend
	var want ec2backend.Config
	want.SetDefaults()
	// What has no default, or is the site's.
	want.InstanceFamilies, want.Regions, want.Guest, want.Prices = got.InstanceFamilies, got.Regions, got.Guest, got.Prices
	want.ImageStore.Base, want.ImageStore.Region = got.ImageStore.Base, got.ImageStore.Region
	want.ScheduleGroup = got.ScheduleGroup // shown in a comment
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the example says\n%+v\nthe defaults are\n%+v", got, want)
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
