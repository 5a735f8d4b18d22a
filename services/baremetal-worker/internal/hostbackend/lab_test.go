package hostbackend

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// guestBinary is the guest, built once per test run.
var guestBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "guest-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "guest")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, ".")
	cmd.Dir = "../../../guest"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", &buildError{out, err}
	}
	return file, nil
})

type buildError struct {
	out []byte
	err error
}

func (e *buildError) Error() string { return "build guest: " + e.err.Error() + "\n" + string(e.out) }

// site is a bridge's worker, in process, on lab hosts.
type site struct {
	t       *testing.T
	hosts   []*lab.Host
	config  Config
	images  string
	ledger  *ledger.Ledger
	secret  redact.Secret
	runtime *worker.Runtime
	driver  worker.Driver
	log     *slog.Logger
}

// newSite starts a worker on hosts.
func newSite(t *testing.T, change func(*Config), hosts ...*lab.Host) *site {
	t.Helper()
	guest, err := guestBinary()
	if err != nil {
		t.Fatal(err)
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	s := &site{t: t, hosts: hosts, images: t.TempDir(), secret: redact.New(secret)}
	s.log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s.config.SetDefaults()
	s.config.GuestBinary = config.Path(guest)
	s.config.ImageStore.Base = s.images
	s.config.StopGrace.Duration = 2 * time.Second
	for _, h := range hosts {
		var key config.SecretFile
		loadKey(t, &key, h.UserKeyFile)
		s.config.Hosts = append(s.config.Hosts, HostConfig{
			Name: h.Name, Address: h.Addr.String() + ":" + strconv.Itoa(h.SSHPort), User: "root", KeyFile: key,
			HostKeys: []string{h.HostKeyLine()}, Region: "lab", CPUMillicores: 4000, RAMMiB: 4096, StorageGiB: 40, MaxInstances: 20,
		})
	}
	if change != nil {
		change(&s.config)
	}
	if s.ledger, err = ledger.Open(t.Context(), ledger.Config{Path: filepath.Join(t.TempDir(), "ledger.db")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.ledger.Close() })
	s.start()
	t.Cleanup(s.stop)
	return s
}

// loadKey reads a key the way a configuration file does.
func loadKey(t *testing.T, into *config.SecretFile, file string) {
	t.Helper()
	type keyConfig struct {
		KeyFile config.SecretFile `toml:"key_file"`
	}
	c, err := config.Parse[keyConfig](filepath.Join(t.TempDir(), "x.toml"), []byte("key_file = "+strconv.Quote(file)+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	*into = c.KeyFile
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

func (s *site) start() {
	s.t.Helper()
	r, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "baremetal", Ledger: s.ledger, Secret: s.secret, Log: s.log, Metrics: prometheus.NewRegistry(),
		SweepInterval: time.Second, OrphanAge: 5 * time.Second, Grace: 5 * time.Second,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	driver, err := Open(s.t.Context(), s.config, r.Env())
	if err != nil {
		s.t.Fatal(err)
	}
	if err := r.Start(s.t.Context(), driver); err != nil {
		s.t.Fatal(err)
	}
	s.runtime, s.driver = r, driver
}

func (s *site) stop() {
	if s.runtime == nil {
		return
	}
	s.runtime.Close()
	if err := s.driver.Close(); err != nil {
		s.t.Error(err)
	}
	s.runtime = nil
}

// caller is a context of a client.
func caller(ctx context.Context) context.Context {
	return backend.WithCaller(ctx, backend.Caller{Identity: "client-1", Role: backend.RoleClient})
}

// image puts a test image into the store.
func (s *site) image(kind ociimage.Kind) backend.Image {
	s.t.Helper()
	a := ociimage.Make(s.t, kind)
	d, err := backend.ParseDigest("sha256:" + a.SHA256)
	if err != nil {
		s.t.Fatal(err)
	}
	dir := filepath.Join(s.images, "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	in, err := os.Open(a.Path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(dir, a.SHA256))
	if err != nil {
		s.t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		s.t.Fatal(err)
	}
	return backend.Image{Digest: d, Kind: backend.ImageOCIArchive}
}

// login is a requester's own key.
type login struct {
	signer ssh.Signer
	line   string
}

func newLogin(t *testing.T) login {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return login{signer: signer, line: string(bytes.TrimSpace(ssh.MarshalAuthorizedKey(signer.PublicKey())))}
}

// grant is a small grant for an image.
func grant(image backend.Image, key login) (backend.Grant, backend.Envelope) {
	var id backend.GrantID
	_, _ = rand.Read(id[:])
	g := backend.Grant{
		ID: id, Image: image, PostHash: image.Digest.Sum, Shape: backend.Shape{CPU: 500, RAM: 256, Storage: 1}, MinIsolation: backend.IsolationContainer,
		Network: backend.NetworkPolicy{Mode: backend.NetworkOpen}, ValidTo: time.Now().Add(time.Hour).Truncate(time.Microsecond).UTC(),
	}
	return g, backend.Envelope{PostHash: g.PostHash, SSHPublicKey: key.line}
}

// run runs a command in an instance, with its host key pinned.
func run(t *testing.T, p backend.Provisioned, key login, command string) (string, error) {
	t.Helper()
	want, _, _, _, err := ssh.ParseAuthorizedKey([]byte(p.Receipt.HostKey))
	if err != nil {
		t.Fatal(err)
	}
	client, err := ssh.Dial("tcp", p.Receipt.Host+":"+strconv.Itoa(int(p.Receipt.Port)), &ssh.ClientConfig{
		User: p.Receipt.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(key.signer)}, HostKeyCallback: ssh.FixedHostKey(want), Timeout: 10 * time.Second,
	})
	if err != nil {
		return "", err
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	defer session.Close()
	out, err := session.CombinedOutput(command)
	return string(out), err
}

func shortID(id backend.GrantID) string { return hex.EncodeToString(id[:4]) }
