package hostbackend

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// guestBinary is the guest, and udpEcho a server for tests; built once per test
// run and kept in memory, so that nothing outlives the tests.
var (
	guestBinary = sync.OnceValues(func() ([]byte, error) { return build("../../../guest") })
	udpEcho     = sync.OnceValues(func() ([]byte, error) { return build("testdata/udpecho") })
)

func build(source string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "hostbackend-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	file := filepath.Join(dir, "program")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, ".")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, &buildError{out, err}
	}
	return os.ReadFile(file)
}

type buildError struct {
	out []byte
	err error
}

func (e *buildError) Error() string { return "build: " + e.err.Error() + "\n" + string(e.out) }

// site is a bridge's worker, in process, on lab hosts.
type site struct {
	t       testing.TB
	hosts   []*lab.Host
	config  Config
	images  string
	ledger  *ledger.Ledger
	secret  redact.Secret
	runtime *worker.Runtime
	driver  *Backend
	log     *slog.Logger

	mu    sync.Mutex // protects hooks
	hooks map[hookPoint]func(context.Context)
}

// phases are where a Provision may be hit: before anything of it, and at each
// of the driver's own steps.
var phases = []string{phaseBegin, "sending image", "verifying image", "unpacking image", phaseStarting, phaseReady}

const (
	phaseBegin    = "begin"
	phaseStarting = "starting"
	phaseReady    = "waiting for SSH"
)

// hookPoint is a moment of a grant's Provision.
type hookPoint struct {
	grant backend.GrantID
	phase string
}

// at runs a function when the driver gets to a phase of a grant, once, before it
// goes on. The context is the driver's.
func (s *site) at(id backend.GrantID, phase string, hook func(context.Context)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hooks == nil {
		s.hooks = map[hookPoint]func(context.Context){}
	}
	s.hooks[hookPoint{id, phase}] = hook
}

func (s *site) reached(ctx context.Context, id backend.GrantID, phase string) {
	s.mu.Lock()
	hook := s.hooks[hookPoint{id, phase}]
	delete(s.hooks, hookPoint{id, phase})
	s.mu.Unlock()
	if hook != nil {
		hook(ctx)
	}
}

// wasReached reports whether a hook has run.
func (s *site) wasReached(id backend.GrantID, phase string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hooks[hookPoint{id, phase}] == nil
}

// hooked is the driver with the site's hooks.
type hooked struct {
	*Backend
	site *site
}

// Provision implements worker.Driver.
func (d hooked) Provision(ctx context.Context, order worker.Order) (worker.Ready, error) {
	tell := order.Progress
	order.Progress = func(text string) {
		tell(text)
		d.site.reached(ctx, order.Grant.ID, text)
	}
	d.site.reached(ctx, order.Grant.ID, phaseBegin)
	return d.Backend.Provision(ctx, order)
}

// newSite starts a worker on hosts.
func newSite(t testing.TB, change func(*Config), hosts ...*lab.Host) *site {
	t.Helper()
	guest, err := guestBinary()
	if err != nil {
		t.Fatal(err)
	}
	guestFile := filepath.Join(t.TempDir(), "guest")
	if err := os.WriteFile(guestFile, guest, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	s := &site{t: t, hosts: hosts, images: t.TempDir(), secret: redact.New(secret)}
	s.log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s.config.SetDefaults()
	s.config.GuestBinary = config.Path(guestFile)
	s.config.ImageStore.Base = s.images
	s.config.StopGrace.Duration = 2 * time.Second
	s.config.ConnectTimeout.Duration, s.config.ReadyTimeout.Duration = callTimeout, callTimeout
	s.config.LeaseTTL.Duration = 20 * time.Second // for a machine that stands still for a while
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
	t.Cleanup(s.checkNothingIsLeft)
	s.start()
	return s
}

// checkNothingIsLeft ends the site: every test must have ended its grants, so
// that the inventory is free, and the hosts have nothing of the bridge but
// images.
func (s *site) checkNothingIsLeft() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), 6*time.Minute)
	defer cancel()
	if s.runtime != nil {
		patience := 3 * time.Minute
		if s.t.Failed() { // and may have ended early
			patience = time.Second
		}
		free, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if err := poll(free, func() error { return s.allFree(free) }); err != nil {
			s.t.Errorf("capacity at the end of the test: %v", err)
		}
		s.stop()
	}
	for _, h := range s.hosts {
		if !h.Running() {
			continue
		}
		if left, err := h.Leftovers(ctx, "image "); err != nil {
			s.t.Error(err)
		} else if len(left) > 0 {
			s.t.Errorf("left behind on %s:\n\t%s", h.Name, strings.Join(left, "\n\t"))
		}
	}
}

// allFree fails while anything is reserved.
func (s *site) allFree(ctx context.Context) error {
	c, err := s.runtime.Capabilities(ctx)
	if err != nil {
		return err
	}
	for _, r := range c.Regions {
		if r.ActiveInstances != 0 {
			return fmt.Errorf("region %s has %d instances", r.Region, r.ActiveInstances)
		}
		if len(c.Warnings) == 0 && r.Free != r.Total {
			return fmt.Errorf("region %s has %s free of %s", r.Region, r.Free, r.Total)
		}
	}
	return nil
}

// poll repeats a look until it succeeds or ctx ends.
func poll(ctx context.Context, look func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := look()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// soon polls for so long as something that is under way may take.
func soon(t testing.TB, look func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	if err := poll(ctx, look); err != nil {
		t.Fatal(err)
	}
}

// loadKey reads a key the way a configuration file does.
func loadKey(t testing.TB, into *config.SecretFile, file string) {
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

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

func (s *site) start() {
	s.t.Helper()
	if err := s.tryStart(); err != nil {
		s.t.Fatal(err)
	}
}

// tryStart starts the worker, as a new process would.
func (s *site) tryStart() error {
	r, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "baremetal", Ledger: s.ledger, Secret: s.secret, Log: s.log, Metrics: prometheus.NewRegistry(),
		SweepInterval: time.Second, OrphanAge: 5 * time.Second, Grace: 5 * time.Second,
	})
	if err != nil {
		return err
	}
	driver, err := Open(s.t.Context(), s.config, r.Env())
	if err != nil {
		return err
	}
	own, ok := driver.(*Backend)
	if !ok {
		return fmt.Errorf("Open returned a %T", driver)
	}
	if err := r.Start(s.t.Context(), hooked{own, s}); err != nil {
		return err
	}
	s.runtime, s.driver = r, own
	return nil
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

// archive is an image in memory, made once per test run.
type archive struct {
	data           []byte
	sha256, blake3 string
}

var archives struct {
	sync.Mutex
	made map[ociimage.Kind]archive
}

func makeArchive(t testing.TB, kind ociimage.Kind) archive {
	t.Helper()
	archives.Lock()
	defer archives.Unlock()
	if a, ok := archives.made[kind]; ok {
		return a
	}
	made := ociimage.Make(t, kind)
	data, err := os.ReadFile(made.Path)
	if err != nil {
		t.Fatal(err)
	}
	if archives.made == nil {
		archives.made = map[ociimage.Kind]archive{}
	}
	archives.made[kind] = archive{data, made.SHA256, made.BLAKE3}
	return archives.made[kind]
}

// image puts a test image into the store.
func (s *site) image(kind ociimage.Kind) backend.Image {
	s.t.Helper()
	a := makeArchive(s.t, kind)
	return s.store("sha256:"+a.sha256, a.data)
}

// store puts bytes into the store under a digest, their own or not.
func (s *site) store(digest string, data []byte) backend.Image {
	s.t.Helper()
	d, err := backend.ParseDigest(digest)
	if err != nil {
		s.t.Fatal(err)
	}
	file := filepath.Join(s.images, d.Algorithm.String(), hex.EncodeToString(d.Sum[:]))
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
		s.t.Fatal(err)
	}
	return backend.Image{Digest: d, Kind: backend.ImageOCIArchive}
}

// callTimeout is far more than a call takes on a busy machine.
const callTimeout = 5 * time.Minute

// provision makes a grant's instance.
func (s *site) provision(t testing.TB, g backend.Grant, e backend.Envelope) backend.Provisioned {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	p, err := s.runtime.Provision(caller(ctx), g, e)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// lateLimit is how long after its deadline an instance may go on, by the contract.
const lateLimit = time.Minute

// provisionBriefly makes an instance whose deadline comes soon, but not before it
// is ready: on a machine too busy for that it makes another, with a longer life.
func (s *site) provisionBriefly(t *testing.T, image backend.Image, key login) (backend.Grant, backend.Envelope, backend.Provisioned) {
	t.Helper()
	for life := 12 * time.Second; ; life *= 3 {
		g, e := grant(image, key)
		g.ValidTo = time.Now().Add(life).Truncate(time.Microsecond).UTC()
		var err error
		for time.Now().Before(g.ValidTo) {
			var p backend.Provisioned
			if p, err = s.runtime.Provision(caller(t.Context()), g, e); err == nil {
				return g, e, p
			}
			// An impatient worker may have lost its host for a moment.
			if !backenderr.Is(err, backenderr.ProviderUnavailable) && time.Now().Before(g.ValidTo) {
				t.Fatal(err)
			}
			<-time.After(time.Second)
		}
		if life > 3*time.Minute {
			t.Fatal(err)
		}
		t.Logf("not ready within %s: %v", life, err)
	}
}

// terminate ends a grant and returns its final log.
func (s *site) terminate(t testing.TB, p backend.Provisioned) backend.ComputeLog {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	end, err := s.runtime.Terminate(caller(ctx), p.Instance.Handle)
	if err != nil {
		t.Fatal(err)
	}
	if end.State != backend.StateTerminated || end.Log == nil || !end.Log.Log.Final {
		t.Fatalf("terminate: %+v", end)
	}
	return end.Log.Log
}

// refused checks why a call failed, and that nothing was created.
func refused(t testing.TB, err error, want backenderr.Reason, texts ...string) {
	t.Helper()
	if got := backenderr.ReasonOf(err); got != want {
		t.Fatalf("got %s (%v), want %s", got, err, want)
	}
	if created := backenderr.CreatedOf(err); created != backenderr.CreatedNone {
		t.Errorf("created is %s: %v", created, err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error doesn't say %q: %v", text, err)
		}
	}
}

// login is a requester's own key.
type login struct {
	signer  ssh.Signer
	line    string
	private ed25519.PrivateKey
}

func newLogin(t testing.TB) login {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return login{signer: signer, private: private, line: string(bytes.TrimSpace(ssh.MarshalAuthorizedKey(signer.PublicKey())))}
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
func run(t testing.TB, p backend.Provisioned, key login, command string) (string, error) {
	t.Helper()
	return runWith(t, p, key, command, nil)
}

// runWith runs a command with a standard input.
func runWith(t testing.TB, p backend.Provisioned, key login, command string, stdin []byte) (string, error) {
	t.Helper()
	want, _, _, _, err := ssh.ParseAuthorizedKey([]byte(p.Receipt.HostKey))
	if err != nil {
		t.Fatal(err)
	}
	client, err := ssh.Dial("tcp", p.Receipt.Host+":"+strconv.Itoa(int(p.Receipt.Port)), &ssh.ClientConfig{
		User: p.Receipt.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(key.signer)}, HostKeyCallback: ssh.FixedHostKey(want), Timeout: time.Minute,
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = client.Close() }()
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	defer func() { _ = session.Close() }()
	session.Stdin = bytes.NewReader(stdin)
	out, err := session.CombinedOutput(command)
	return string(out), err
}
