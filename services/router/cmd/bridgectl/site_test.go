package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/cli"
	"github.com/compute-bridge/compute-bridge/services/router/internal/server"
)

// asBridgectl makes the test binary be bridgectl: tests run it as a process of
// its own, because it takes signals and hands its files to OpenSSH.
const asBridgectl = "BRIDGECTL_TEST_PROCESS"

func TestMain(m *testing.M) {
	if os.Getenv(asBridgectl) != "" {
		os.Exit(run())
	}
	goleak.VerifyTestMain(m)
}

// site is a router over one worker over a fake provider, each with mTLS and on
// a unix socket, and a home directory to run bridgectl in.
type site struct {
	home, certs            string
	router, worker         string // host:port
	routerSock, workerSock string // unix:/path
	provider               *backendfake.Provider
	change                 func(*server.Config) // of the next router; nil means none
	stopRouter             func()
	startRouter            func()
}

const gib = 1024

func process(t *testing.T, run func(ctx context.Context, ready func()) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done, ready := make(chan error, 1), make(chan struct{})
	go func() { done <- run(ctx, sync.OnceFunc(func() { close(ready) })) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// shortDir is a temporary directory whose path is short enough for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "bctl") //nolint:usetesting // t.TempDir's path is too long for a socket.
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func newSite(t *testing.T, options backendfake.Options, driver backendfake.DriverOptions) *site {
	t.Helper()
	dir := shortDir(t)
	if len(options.Hosts) == 0 {
		options.Hosts = []backendfake.Host{{
			Name: "host1", Region: "eu-north", Capacity: backend.Shape{CPU: 8000, RAM: 16 * gib, Storage: 100}, MaxInstances: 4,
		}}
	}
	options.WithSSH = true
	s := &site{
		home: filepath.Join(dir, "home"), certs: filepath.Join(dir, "certs"), router: freeAddress(t), worker: freeAddress(t),
		routerSock: "unix:" + filepath.Join(dir, "router.sock"), workerSock: "unix:" + filepath.Join(dir, "worker.sock"),
		provider: backendfake.NewProvider(options),
	}
	t.Cleanup(s.provider.Close)
	if err := os.MkdirAll(s.home, 0o700); err != nil {
		t.Fatal(err)
	}
	s.must(t, "certs", "init", s.certs, "--trust-domain", "test.internal")
	for _, name := range []string{"router", "worker", "alice", "mallory"} {
		s.must(t, "certs", "issue", s.certs, name)
	}
	me := grpcx.ClientEntry{Identity: "unix:" + strconv.Itoa(os.Getuid()), Role: "operator"}
	log := slog.New(slog.DiscardHandler)

	process(t, func(ctx context.Context, ready func()) (failure error) {
		store, err := ledger.Open(ctx, ledger.Config{Path: filepath.Join(dir, "worker.db")})
		if err != nil {
			return err
		}
		defer func() { failure = errors.Join(failure, store.Close()) }()
		secret := make([]byte, 32)
		_, _ = rand.Read(secret)
		metrics := prometheus.NewRegistry()
		runtime, err := worker.NewRuntime(worker.RuntimeConfig{
			BridgeID: "test", Backend: "metal", Ledger: store, Secret: redact.New(secret), OrphanAge: time.Millisecond, Log: log, Metrics: metrics,
		})
		if err != nil {
			return err
		}
		if err := runtime.Start(ctx, backendfake.Open(s.provider, runtime.Env(), driver)); err != nil {
			return err
		}
		defer runtime.Close()
		srv, err := grpcx.NewServer(grpcx.ServerConfig{
			Listen: []grpcx.ListenConfig{{Address: s.worker}, {Address: s.workerSock}}, TLS: s.files("worker"),
			Clients: []grpcx.ClientEntry{me, {Identity: "spiffe://test.internal/router", Role: "reader", Router: true}},
		}, log, metrics)
		if err != nil {
			return err
		}
		worker.Register(srv, runtime)
		ready()
		return srv.Run(ctx, time.Second)
	})
	s.startRouter = func() {
		var c server.Config
		c.SetDefaults()
		c.BridgeID = "demo-bridge"
		c.Ledger.Path = config.Path(filepath.Join(dir, "router.db"))
		c.Listen = []grpcx.ListenConfig{{Address: s.router}, {Address: s.routerSock}}
		c.TLS = s.files("router")
		c.Clients = []grpcx.ClientEntry{me, {Identity: "spiffe://test.internal/alice", Role: "client"}}
		c.ShutdownTimeout.Duration = 100 * time.Millisecond
		b := server.BackendConfig{Name: "metal"}
		b.Target = s.worker
		c.Backends = []server.BackendConfig{b}
		if s.change != nil {
			s.change(&c)
		}
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		s.stopRouter = process(t, func(ctx context.Context, ready func()) error {
			return server.Run(ctx, c, log, func([]net.Addr) { ready() })
		})
	}
	s.startRouter()
	return s
}

func (s *site) files(name string) grpcx.TLSConfig {
	at := func(file string) config.Path { return config.Path(filepath.Join(s.certs, name, file)) }
	return grpcx.TLSConfig{CertFile: at("cert.pem"), KeyFile: at("key.pem"), CAFile: at("ca.pem")}
}

// command is bridgectl as a process, for the router's unix socket unless args
// say otherwise.
func (s *site) command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asBridgectl+"=1", "HOME="+s.home, "XDG_STATE_HOME="+filepath.Join(s.home, "state"),
		"TMPDIR="+s.home, "BRIDGECTL_TARGET="+s.routerSock, "SSH_AUTH_SOCK=")
	return cmd
}

// result is what a run of bridgectl left.
type result struct {
	code           int
	stdout, stderr string
}

func (s *site) run(t *testing.T, args ...string) result {
	t.Helper()
	if args[0] != "ssh" {
		return s.call(t, args...)
	}
	cmd := s.command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// call is [site.run] in this process, which is much faster with the race
// detector on.
func (s *site) call(t *testing.T, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	env := map[string]string{"HOME": s.home, "XDG_STATE_HOME": filepath.Join(s.home, "state"), "BRIDGECTL_TARGET": s.routerSock}
	code := cli.Run(t.Context(), cli.Env{
		Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr,
		Getenv: func(name string) string { return env[name] }, Now: time.Now,
	}, args)
	return result{code, stdout.String(), stderr.String()}
}

// must runs what has to work, and returns what it printed.
func (s *site) must(t *testing.T, args ...string) string {
	t.Helper()
	r := s.run(t, args...)
	if r.code != 0 {
		t.Fatalf("bridgectl %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// grant provisions a grant and returns its id.
func (s *site) grant(t *testing.T, args ...string) string {
	t.Helper()
	var res struct {
		Instance struct {
			RequestID []byte `json:"request_id"`
			Handle    string `json:"handle"`
		} `json:"instance"`
	}
	out := s.must(t, append(append([]string{"provision", "-o", "json"}, size...), args...)...)
	if err := json.Unmarshal([]byte(out), &res); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return hex.EncodeToString(res.Instance.RequestID)
}

// digest is one that nobody looks at: the fake provider has no images.
const digest = "sha256:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

// size are the flags of an ordinary grant.
var size = []string{"--image-digest", digest, "--cpu", "500m", "--ram", "512Mi", "--disk", "1Gi", "--for", "1h"}

// eventually fails the test unless the condition holds soon.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}
