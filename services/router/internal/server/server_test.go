package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/api"
	"github.com/compute-bridge/compute-bridge/services/router/internal/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const routerIdentity = "spiffe://test/router"

// site is a test's certificates and processes.
type site struct {
	ca *authority
}

func newSite(t *testing.T) *site {
	t.Helper()
	return &site{ca: newAuthority(t)}
}

// process runs until stop is called, or the test ends.
func process(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// freeAddress returns a loopback address that was free a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// machine is a worker, as a process with mTLS, over a fake provider.
type machine struct {
	name, address string
	provider      *backendfake.Provider
	ledger        string
	secret        redact.Secret
	files         grpcx.TLSConfig
	clients       []grpcx.ClientEntry // beside the router
	age, grace    time.Duration       // of connections; zero: the defaults
	metrics       *prometheus.Registry
}

func (s *site) machine(t *testing.T, name string, grants int64) *machine {
	t.Helper()
	options := backendfake.Options{Hosts: []backendfake.Host{{Name: "host", Region: backend.Region(name), Capacity: shape.Times(grants)}}}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		t.Fatal(err)
	}
	m := &machine{
		name: name, address: freeAddress(t), ledger: filepath.Join(t.TempDir(), name+".db"), secret: redact.New(secret),
		files:    s.ca.identity(t, name, "spiffe://test/"+name),
		provider: backendfake.NewProvider(options),
	}
	t.Cleanup(m.provider.Close)
	return m
}

// start runs the worker process.
func (m *machine) start(t *testing.T) (stop func()) {
	t.Helper()
	ready := make(chan struct{})
	m.metrics = prometheus.NewRegistry()
	metrics := m.metrics
	stop = process(t, func(ctx context.Context) (failure error) {
		store, err := ledger.Open(ctx, ledger.Config{Path: m.ledger})
		if err != nil {
			return err
		}
		defer func() { failure = errors.Join(failure, store.Close()) }()
		log := slog.New(slog.DiscardHandler)
		runtime, err := worker.NewRuntime(worker.RuntimeConfig{
			BridgeID: "test", Backend: m.name, Ledger: store, Secret: m.secret, Log: log, Metrics: metrics,
		})
		if err != nil {
			return err
		}
		if err := runtime.Start(ctx, backendfake.Open(m.provider, runtime.Env(), backendfake.DriverOptions{})); err != nil {
			return err
		}
		defer runtime.Close()
		s, err := grpcx.NewServer(grpcx.ServerConfig{
			Listen: []grpcx.ListenConfig{{Address: m.address}}, TLS: m.files,
			Clients:          append([]grpcx.ClientEntry{{Identity: routerIdentity, Role: "reader", Router: true}}, m.clients...),
			MaxConnectionAge: config.Duration{Duration: m.age}, MaxConnectionAgeGrace: config.Duration{Duration: m.grace},
		}, log, metrics)
		if err != nil {
			return err
		}
		worker.Register(s, runtime)
		close(ready)
		return s.Run(ctx, time.Second)
	})
	<-ready
	return stop
}

// router writes a configuration and runs the router with it.
type router struct {
	path string
}

func (s *site) router(t *testing.T, machines ...*machine) *router {
	t.Helper()
	var backends []target
	for _, m := range machines {
		backends = append(backends, target{m.name, m.address})
	}
	return s.routerOver(t, "router", backends...)
}

// target is a backend of a router.
type target struct{ name, address string }

// routerOver is router with a name, over any backends.
func (s *site) routerOver(t *testing.T, name string, backends ...target) *router {
	t.Helper()
	files := s.ca.identity(t, name, "spiffe://test/"+name)
	text := fmt.Sprintf(`
bridge_id = "test"
shutdown_timeout = "1s"
tls = {cert_file = %q, key_file = %q, ca_file = %q}
metrics_address = %q
ledger.path = "router.db"
listen = [{address = "127.0.0.1:0"}, {address = "unix:%s"}, {address = "127.0.0.1:0", insecure = true}]
client = [
	{identity = "spiffe://test/alice", role = "client"},
	{identity = "spiffe://test/bob", role = "client"},
	{identity = "spiffe://test/operator", role = "operator"},
	{identity = "spiffe://test/reader", role = "reader"},
	{identity = "unix:%d", role = "operator"},
	{identity = "insecure", role = "reader"},
	{identity = "spiffe://test/outer", role = "reader", router = true},
]
`, files.CertFile, files.KeyFile, files.CAFile, freeAddress(t), filepath.Join(t.TempDir(), "router.sock"), os.Getuid())
	for _, m := range backends {
		text += fmt.Sprintf("[[backend]]\nname = %q\ntarget = %q\nserver_name = \"localhost\"\npoll_interval = \"20ms\"\nconnect_timeout = \"100ms\"\ncan_satisfy_timeout = \"1m\"\npoll_timeout = \"1m\"\n", m.name, m.address)
	}
	r := &router{path: filepath.Join(t.TempDir(), "router.toml")}
	write(t, r.path, []byte(text))
	return r
}

// start runs the router and returns the configuration with the addresses that
// it really listens on.
func (r *router) start(t *testing.T) (c server.Config, stop func()) {
	t.Helper()
	c, err := config.Load[server.Config](r.path)
	if err != nil {
		t.Fatal(err)
	}
	addresses := make(chan []net.Addr, 1)
	stop = process(t, func(ctx context.Context) error {
		return server.Run(ctx, c, slog.New(slog.DiscardHandler), func(a []net.Addr) { addresses <- a })
	})
	got := <-addresses
	bound := c
	bound.Listen = nil
	for i, l := range c.Listen {
		if l.Address == "127.0.0.1:0" {
			l.Address = got[i].String()
		}
		bound.Listen = append(bound.Listen, l)
	}
	return bound, stop
}

// dial connects as an identity to the first listener.
func (s *site) dial(t *testing.T, c server.Config, name string) *grpc.ClientConn {
	t.Helper()
	return connect(t, grpcx.ClientConfig{Target: c.Listen[0].Address, ServerName: "localhost"}, s.ca.identity(t, name, "spiffe://test/"+name))
}

func connect(t *testing.T, c grpcx.ClientConfig, files grpcx.TLSConfig) *grpc.ClientConn {
	t.Helper()
	conn, err := grpcx.Dial(c, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

var shape = backend.Shape{CPU: 1000, RAM: 512, Storage: 4}

func newGrant(t *testing.T) (backend.Grant, backend.Envelope) {
	t.Helper()
	g := backend.Grant{
		PostHash: [32]byte{2}, Image: backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{1}}, Kind: backend.ImageOCIArchive},
		Shape: shape, MinIsolation: backend.IsolationContainer, Network: backend.NetworkPolicy{Mode: backend.NetworkOpen},
		ValidTo: time.Now().Add(time.Hour).UTC().Truncate(time.Microsecond),
	}
	if _, err := rand.Read(g.ID[:]); err != nil {
		t.Fatal(err)
	}
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
	return g, backend.Envelope{PostHash: g.PostHash, SSHPublicKey: key}
}

// eventually fails the test unless ok says so soon.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("it never happened: %s", what)
		}
	}
}

func wantReason(t *testing.T, what string, err error, reason backenderr.Reason) {
	t.Helper()
	if got := backenderr.ReasonOf(err); got != reason {
		t.Fatalf("%s: error %v has reason %q, want %q", what, err, got, reason)
	}
}

// The whole life of grants through a real router and real workers' runtimes,
// all over mTLS.
func TestGrantsThroughTheRouter(t *testing.T) {
	s := newSite(t)
	east, west := s.machine(t, "east", 1), s.machine(t, "west", 1)
	stopEast := east.start(t)
	west.start(t)
	r := s.router(t, east, west)
	c, stopRouter := r.start(t)
	alice, bob := backendgrpc.NewClient(s.dial(t, c, "alice")), backendgrpc.NewClient(s.dial(t, c, "bob"))
	ctx := t.Context()

	// The first in order, then, as it is full, the second, then nobody.
	first, envelope := newGrant(t)
	p, err := alice.Provision(ctx, first, envelope)
	if err != nil {
		t.Fatal(err)
	}
	if want := backend.HandleFor(first.ID).Via("east"); p.Instance.Handle != want || p.Receipt.GrantID != first.ID {
		t.Errorf("provisioned %+v, want handle %q", p, want)
	}
	second, _ := newGrant(t)
	q, err := bob.Provision(ctx, second, envelope)
	if err != nil {
		t.Fatal(err)
	}
	if want := backend.HandleFor(second.ID).Via("west"); q.Instance.Handle != want {
		t.Errorf("handle is %q, want %q", q.Instance.Handle, want)
	}
	third, _ := newGrant(t)
	_, err = alice.Provision(ctx, third, envelope)
	wantReason(t, "a third grant", err, backenderr.CapacityExhausted)
	if created := backenderr.CreatedOf(err); created != backenderr.CreatedNone {
		t.Errorf("created=%s after %v", created, err)
	}
	if e := backenderr.From(err); e.RetryAfter == 0 || e.Metadata["reason-east"] == "" || e.Metadata["reason-west"] == "" {
		t.Errorf("the refusal of all has retry after %s and metadata %v", e.RetryAfter, e.Metadata)
	}

	// Whose they are.
	_, err = bob.Provision(ctx, first, envelope)
	wantReason(t, "another's grant", err, backenderr.GrantConflict)
	_, err = bob.Terminate(ctx, p.Instance.Handle)
	wantReason(t, "ending another's grant", err, backenderr.CallerDenied)
	err = bob.WatchUntilExit(ctx, p.Instance.Handle, func(backend.Event) error { return nil })
	wantReason(t, "watching another's grant", err, backenderr.CallerDenied)
	list := func(name string) (handles []string) {
		t.Helper()
		res, err := bridgev1.NewInventoryServiceClient(s.dial(t, c, name)).ListInstances(ctx, &bridgev1.ListInstancesRequest{})
		if err != nil || len(res.GetUnreachableBackends()) > 0 {
			t.Fatalf("list as %s: %v, unreachable %v", name, err, res.GetUnreachableBackends())
		}
		for _, i := range res.GetInstances() {
			handles = append(handles, i.GetHandle())
		}
		return handles
	}
	if diff := cmp.Diff([]string{string(p.Instance.Handle)}, list("alice")); diff != "" {
		t.Errorf("alice's instances (-want +got):\n%s", diff)
	}
	if got := list("operator"); len(got) != 2 {
		t.Errorf("the operator sees %v", got)
	}

	// The router and a worker go and come back; the grant stays where it is.
	stopRouter()
	stopEast()
	c, _ = r.start(t)
	alice = backendgrpc.NewClient(s.dial(t, c, "alice"))
	_, err = alice.Provision(ctx, first, envelope)
	wantReason(t, "the grant of a worker that is away", err, backenderr.BackendUnreachable)
	if created := backenderr.CreatedOf(err); created != backenderr.CreatedUnknown {
		t.Errorf("created=%s after %v", created, err)
	}
	east.start(t)
	// The router dials again more and more seldom, and on a busy machine a call
	// may have waited in vain before it does.
	var again backend.Provisioned
	eventually(t, "the worker that came back is found", func() bool {
		again, err = alice.Provision(ctx, first, envelope)
		return !backenderr.Is(err, backenderr.BackendUnreachable)
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p.Receipt, again.Receipt); diff != "" || again.Instance.Handle != p.Instance.Handle {
		t.Errorf("the same grant has another answer (-before +after):\n%s", diff)
	}

	// The end.
	seen := make(chan backend.Event, 100)
	watched := make(chan error, 1)
	go func() {
		watched <- alice.WatchUntilExit(ctx, p.Instance.Handle, func(e backend.Event) error { seen <- e; return nil })
	}()
	if e := <-seen; e.Instance == nil || e.Instance.Handle != p.Instance.Handle || e.Instance.State != backend.StateReady {
		t.Errorf("a watch begins with %+v", e)
	}
	term, err := alice.Terminate(ctx, p.Instance.Handle)
	if err != nil || term.State != backend.StateTerminated || term.Log == nil {
		t.Fatalf("Terminate answers %+v, %v", term, err)
	}
	if err := <-watched; err != nil {
		t.Errorf("watch: %v", err)
	}
	_, err = alice.Provision(ctx, first, envelope)
	wantReason(t, "an ended grant", err, backenderr.GrantEnded)
	if got := east.provider.Running(first.ID); got != 0 {
		t.Errorf("%d instances are left", got)
	}
	logs, err := bridgev1.NewInventoryServiceClient(s.dial(t, c, "alice")).ListComputeLogs(ctx, &bridgev1.ListComputeLogsRequest{RequestId: first.ID[:]})
	if err != nil || len(logs.GetComputeLogs()) != 1 || !bytes.Equal(logs.GetComputeLogs()[0].GetBody(), term.Log.Body) {
		t.Errorf("compute logs are %v, %v", logs, err)
	}
}

// metrics returns what a router serves to Prometheus.
func metrics(t *testing.T, c server.Config) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+c.MetricsAddress+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestTheRouterTellsWhatItStandsFor(t *testing.T) {
	s := newSite(t)
	east, west := s.machine(t, "east", 4), s.machine(t, "west", 2)
	east.start(t)
	stopWest := west.start(t)
	c, _ := s.router(t, east, west).start(t)
	fleet := bridgev1.NewFleetServiceClient(s.dial(t, c, "reader"))
	card := func() *bridgev1.ProviderCard {
		t.Helper()
		res, err := fleet.GetProviderCard(t.Context(), &bridgev1.GetProviderCardRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return res.GetCard()
	}
	health := func() (all []bridgev1.BackendHealth) {
		t.Helper()
		res, err := fleet.ListBackends(t.Context(), &bridgev1.ListBackendsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range res.GetBackends() {
			if b.GetCapabilities() == nil || b.GetLastSeen() == nil {
				t.Errorf("backend %s is blank", b.GetName())
			}
			all = append(all, b.GetHealth())
		}
		return all
	}
	got := card()
	if got.GetBridgeId() != "test" || got.GetTdx() || len(got.GetCapabilities().GetRegions()) != 2 || len(got.GetCapabilities().GetLogKeys()) != 2 {
		t.Errorf("card is %v", got)
	}
	if diff := cmp.Diff([]string{"east", "west"}, got.GetBackends()); diff != "" {
		t.Errorf("backends (-want +got):\n%s", diff)
	}
	if !bytes.Equal(got.GetBackendSetDigest(), api.Digest([]string{"east", "west"})) || bytes.Equal(got.GetBackendSetDigest(), api.Digest([]string{"west", "east"})) {
		t.Error("the digest is not that of the ordered names")
	}
	serving, gone := bridgev1.BackendHealth_BACKEND_HEALTH_SERVING, bridgev1.BackendHealth_BACKEND_HEALTH_UNREACHABLE
	if diff := cmp.Diff([]bridgev1.BackendHealth{serving, serving}, health()); diff != "" {
		t.Errorf("health (-want +got):\n%s", diff)
	}
	if text := metrics(t, c); !strings.Contains(text, `computebridge_backend_takes_grants{backend="west"} 1`) || !strings.Contains(text, "grpc_server_handled_total") {
		t.Errorf("metrics are:\n%s", text)
	}
	stopWest()
	eventually(t, "the loss is seen", func() bool { return cmp.Equal(health(), []bridgev1.BackendHealth{serving, gone}) })
	if text := metrics(t, c); !strings.Contains(text, `computebridge_backend_takes_grants{backend="west"} 0`) {
		t.Errorf("metrics after the loss are:\n%s", text)
	}
	// What is lost keeps its place in the union, with nothing free.
	total, free := int64(0), int64(0)
	for _, r := range card().GetCapabilities().GetRegions() {
		total, free = total+r.GetTotal().GetCpuMillicores(), free+r.GetFree().GetCpuMillicores()
	}
	if total != 6000 || free != 4000 {
		t.Errorf("in sum %d are declared and %d free, want 6000 and 4000", total, free)
	}
}

func TestListeners(t *testing.T) {
	s := newSite(t)
	east := s.machine(t, "east", 1)
	east.start(t)
	c, stop := s.router(t, east).start(t)
	name := func(conn *grpc.ClientConn) error {
		got, err := backendgrpc.NewClient(conn).Name(t.Context())
		if err == nil && got != "test" {
			t.Errorf("the router's name is %q", got)
		}
		return err
	}
	if err := name(connect(t, grpcx.ClientConfig{Target: c.Listen[1].Address}, grpcx.TLSConfig{})); err != nil {
		t.Errorf("unix socket: %v", err)
	}
	if err := name(connect(t, grpcx.ClientConfig{Target: c.Listen[2].Address, Insecure: true}, grpcx.TLSConfig{})); err != nil {
		t.Errorf("plaintext on loopback: %v", err)
	}
	wantReason(t, "a stranger", name(s.dial(t, c, "mallory")), backenderr.CallerUnauthenticated)
	other := newSite(t)
	if err := name(other.dial(t, c, "alice")); err == nil {
		t.Error("a certificate of another authority was accepted")
	}

	for i := range c.Listen {
		one := c
		one.Listen = c.Listen[i : i+1]
		if err := grpcx.CheckHealth(t.Context(), one.ServerConfig); err != nil {
			t.Errorf("health on %s: %v", c.Listen[i].Address, err)
		}
	}
	stop()
	if err := grpcx.CheckHealth(t.Context(), c.ServerConfig); err == nil {
		t.Error("a router that has stopped is healthy")
	}
}

func TestStartFailsLoudly(t *testing.T) {
	s := newSite(t)
	east := s.machine(t, "east", 1)
	r := s.router(t, east)
	c, err := config.Load[server.Config](r.path)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*server.Config){
		"a port that is taken": func(c *server.Config) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			c.Listen = append(c.Listen[:0:0], grpcx.ListenConfig{Address: l.Addr().String()})
		},
		"a ledger without a directory": func(c *server.Config) { c.Ledger.Path = "/nonexistent/router.db" },
		"metrics nowhere":              func(c *server.Config) { c.MetricsAddress = "192.0.2.1:1" },
	} {
		broken := c
		change(&broken)
		if err := server.Run(t.Context(), broken, slog.New(slog.DiscardHandler), nil); err == nil {
			t.Errorf("%s: it started", what)
		}
	}
}

// A router with no backend that answers starts all the same: backends come and
// go.
func TestTheRouterStartsBeforeItsBackends(t *testing.T) {
	s := newSite(t)
	east := s.machine(t, "east", 1)
	c, _ := s.router(t, east).start(t)
	alice := backendgrpc.NewClient(s.dial(t, c, "alice"))
	grant, envelope := newGrant(t)
	_, err := alice.Provision(t.Context(), grant, envelope)
	wantReason(t, "without any backend", err, backenderr.BackendUnreachable)
	if created := backenderr.CreatedOf(err); created != backenderr.CreatedNone {
		t.Errorf("created=%s, though the grant was given to nobody", created)
	}
	east.start(t)
	eventually(t, "the backend is found", func() bool {
		_, err := alice.Provision(t.Context(), grant, envelope)
		return err == nil
	})
}
