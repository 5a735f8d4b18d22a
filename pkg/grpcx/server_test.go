package grpcx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what should happen soon.
const patience = 3 * time.Minute

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// service answers Name with who calls.
type service struct {
	bridgev1.UnimplementedBackendServiceServer
	terminate func(context.Context) error
	watch     func(grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error
}

func (*service) Name(ctx context.Context, _ *bridgev1.NameRequest) (*bridgev1.NameResponse, error) {
	c := backend.CallerFrom(ctx)
	return &bridgev1.NameResponse{Name: c.Identity + " as " + c.Role.String()}, nil
}

func (*service) Capabilities(context.Context, *bridgev1.CapabilitiesRequest) (*bridgev1.CapabilitiesResponse, error) {
	panic("the secret of this process")
}

func (*service) CanSatisfy(context.Context, *bridgev1.CanSatisfyRequest) (*bridgev1.CanSatisfyResponse, error) {
	return nil, errors.New("not classified")
}

func (s *service) Terminate(ctx context.Context, _ *bridgev1.TerminateRequest) (*bridgev1.TerminateResponse, error) {
	return &bridgev1.TerminateResponse{}, s.terminate(ctx)
}

func (s *service) WatchUntilExit(_ *bridgev1.WatchUntilExitRequest, stream grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
	return s.watch(stream)
}

// running is a server under test.
type running struct {
	*Server
	service  *service
	log      *lines
	registry *prometheus.Registry
	stop     context.CancelFunc
	done     chan error
}

func serve(t *testing.T, c ServerConfig) *running {
	t.Helper()
	r := &running{service: &service{}, log: &lines{}, registry: prometheus.NewRegistry(), done: make(chan error, 1)}
	var err error
	if r.Server, err = NewServer(c, slog.New(slog.NewJSONHandler(r.log, nil)), r.registry); err != nil {
		t.Fatal(err)
	}
	bridgev1.RegisterBackendServiceServer(r, r.service)
	ctx, stop := context.WithCancel(t.Context())
	r.stop = stop
	go func() {
		r.done <- r.Run(ctx, time.Second)
		close(r.done)
	}()
	t.Cleanup(func() {
		stop()
		for err := range r.done {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return r
}

func (r *running) dial(t *testing.T, c ClientConfig, files TLSConfig) *grpc.ClientConn {
	t.Helper()
	if c.Target == "" {
		c.Target = r.Addrs()[0].String()
	}
	conn, err := Dial(c, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// insecurely serves everybody on loopback as a role, and returns a connection.
func insecurely(t *testing.T, role string) (*running, *grpc.ClientConn) {
	t.Helper()
	r := serve(t, ServerConfig{
		Listen:  []ListenConfig{{Address: "127.0.0.1:0", Insecure: true}},
		Clients: []ClientEntry{{Identity: InsecureIdentity, Role: role}},
	})
	return r, r.dial(t, ClientConfig{Insecure: true}, TLSConfig{})
}

// name asks who the caller is.
func name(t *testing.T, conn *grpc.ClientConn) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	res, err := bridgev1.NewBackendServiceClient(conn).Name(ctx, &bridgev1.NameRequest{})
	return res.GetName(), err
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !holds(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("it still doesn't hold that %s", what)
		}
	}
}

func TestIdentityIsThatOfTheCertificate(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	r := serve(t, ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}},
		TLS:    ca.issue(t, leaf{uri: "spiffe://x/server"}),
		Clients: []ClientEntry{
			{Identity: "spiffe://x/alice", Role: "client"}, {Identity: "bob.example", Role: "reader"}, {Identity: "carol", Role: "operator"},
		},
	})
	for want, l := range map[string]leaf{
		"spiffe://x/alice as client": {uri: "spiffe://x/alice", dns: "bob.example", cn: "carol"},
		"bob.example as reader":      {dns: "bob.example", cn: "carol"},
		"carol as operator":          {cn: "carol"},
	} {
		if got, err := name(t, r.dial(t, ClientConfig{}, ca.issue(t, l))); err != nil || got != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	for what, l := range map[string]leaf{"unlisted": {uri: "spiffe://x/eve", cn: "carol"}, "nameless": {}, "second name": {dns: "eve.example"}} {
		conn := r.dial(t, ClientConfig{}, ca.issue(t, l))
		if _, err := name(t, conn); status.Code(err) != codes.Unauthenticated || !backenderr.Is(err, backenderr.CallerUnauthenticated) {
			t.Errorf("%s: %v", what, err)
		}
		if res, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil || res.GetStatus() != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("%s asks for health: %v, %v", what, res, err)
		}
	}
}

func TestHandshakeIsRefused(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	r := serve(t, ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}}, TLS: ca.issue(t, leaf{dns: "server.example"}),
		Clients: []ClientEntry{{Identity: "alice", Role: "client"}},
	})
	good := ca.issue(t, leaf{cn: "alice"})
	foreign := other.issue(t, leaf{cn: "alice"})
	foreign.CAFile = good.CAFile
	blind := ca.issue(t, leaf{cn: "alice"})
	blind.CAFile = other.issue(t, leaf{}).CAFile
	if _, err := name(t, r.dial(t, ClientConfig{}, good)); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		client ClientConfig
		files  TLSConfig
	}{
		"a certificate of another CA": {ClientConfig{}, foreign},
		"an expired certificate":      {ClientConfig{}, ca.issue(t, leaf{cn: "alice", expired: true})},
		"a client with another CA":    {ClientConfig{}, blind},
		"another server name":         {ClientConfig{ServerName: "other.example"}, good},
		"plaintext":                   {ClientConfig{Insecure: true}, TLSConfig{}},
	} {
		if got, err := name(t, r.dial(t, c.client, c.files)); !backenderr.Is(err, backenderr.BackendUnreachable) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
	if _, err := name(t, r.dial(t, ClientConfig{ServerName: "server.example"}, good)); err != nil {
		t.Errorf("the right server name: %v", err)
	}
	// No certificate at all.
	conn, err := grpc.NewClient(r.Addrs()[0].String(), grpc.WithTransportCredentials(withoutCertificate(t, ca)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := name(t, conn); !backenderr.Is(err, backenderr.BackendUnreachable) {
		t.Errorf("without a certificate: %v", err)
	}
}

func TestCertificatesReloadWithoutARestart(t *testing.T) {
	t.Parallel()
	before, after := newAuthority(t), newAuthority(t)
	serverFiles, clientFiles := before.issue(t, leaf{cn: "server"}), before.issue(t, leaf{cn: "alice"})
	c := ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}}, TLS: serverFiles,
		Clients: []ClientEntry{{Identity: "alice", Role: "client"}, {Identity: "bob", Role: "reader"}},
	}
	r := serve(t, c)
	conn := r.dial(t, ClientConfig{}, clientFiles)
	if _, err := name(t, conn); err != nil {
		t.Fatal(err)
	}
	// Half of the new files: the old ones stay in use.
	if err := os.WriteFile(string(serverFiles.CertFile), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := name(t, r.dial(t, ClientConfig{}, before.issue(t, leaf{cn: "bob"}))); err != nil {
		t.Errorf("with half-written files: %v", err)
	}
	after.write(t, serverFiles, leaf{cn: "server"})
	bob := after.issue(t, leaf{cn: "bob"})
	eventually(t, "the server uses its new certificate", func() bool {
		conn, err := Dial(ClientConfig{Target: r.Addrs()[0].String()}, bob)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		got, err := name(t, conn)
		return err == nil && got == "bob as reader"
	})
	// The old connection lives on, and connects again with new files of its own.
	if got, err := name(t, conn); err != nil || got != "alice as client" {
		t.Errorf("the old connection: %q, %v", got, err)
	}
	c.Listen[0].Address = r.Addrs()[0].String()
	after.write(t, clientFiles, leaf{cn: "alice"})
	r.stop()
	for err := range r.done {
		if err != nil {
			t.Error(err)
		}
	}
	serve(t, c)
	eventually(t, "the client uses its new certificate", func() bool {
		got, err := name(t, conn)
		return err == nil && got == "alice as client"
	})
}

func TestUnixSocketTellsWhoCalls(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	// What a killed process leaves behind.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}
	self := fmt.Sprintf("unix:%d", os.Getuid())
	c := ServerConfig{Listen: []ListenConfig{{Address: "unix:" + path}}, Clients: []ClientEntry{{Identity: self, Role: "operator"}}}
	r := serve(t, c)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", info.Mode(), err)
	}
	if got, err := name(t, r.dial(t, ClientConfig{Target: "unix:" + path}, TLSConfig{})); err != nil || got != self+" as operator" {
		t.Errorf("got %q, %v", got, err)
	}
	// A served one isn't taken away.
	if _, err := NewServer(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second server: %v", err)
	}
	if _, err := name(t, r.dial(t, ClientConfig{Target: "unix://" + path}, TLSConfig{})); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// Nor is a file.
	file := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Listen[0].Address = "unix:" + file
	if _, err := NewServer(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("instead of a file: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("a file was deleted for a socket")
	}
}

func TestPortThatIsTakenIsAnErrorOfTheStart(t *testing.T) {
	t.Parallel()
	r, _ := insecurely(t, "reader")
	c := ServerConfig{Listen: []ListenConfig{{Address: "127.0.0.1:0", Insecure: true}, {Address: r.Addrs()[0].String(), Insecure: true}}}
	if _, err := NewServer(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err == nil || !strings.Contains(err.Error(), "listen[1].address") {
		t.Errorf("got %v", err)
	}
}

// details fails unless err is a status with our ErrorInfo.
func details(t *testing.T, what string, err error, reason backenderr.Reason) {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == backenderr.Domain && info.GetReason() == string(reason) {
			return
		}
	}
	t.Errorf("%s: no ErrorInfo with %s: %v", what, reason, err)
}

func TestEveryErrorHasErrorInfo(t *testing.T) {
	t.Parallel()
	r, conn := insecurely(t, "client")
	r.service.watch = func(grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
		panic("the secret of this process")
	}
	r.service.terminate = func(context.Context) error { return context.Canceled }
	client := bridgev1.NewBackendServiceClient(conn)
	ctx := t.Context()
	handle := strings.Repeat("a", 64)

	_, err := client.CanSatisfy(ctx, &bridgev1.CanSatisfyRequest{Grant: nil})
	details(t, "malformed", err, backenderr.GrantInvalid)
	_, err = client.Provision(ctx, &bridgev1.ProvisionRequest{Grant: &bridgev1.Grant{Region: "X"}})
	details(t, "malformed", err, backenderr.GrantInvalid)
	fields := map[string]bool{}
	for _, v := range backenderr.From(err).Violations {
		fields[v.Field] = true
	}
	for _, want := range []string{"grant.request_id", "grant.post_hash", "grant.image", "grant.shape", "grant.min_isolation", "grant.region", "grant.valid_to", "envelope"} {
		if !fields[want] {
			t.Errorf("%s isn't named: %v", want, fields)
		}
	}
	_, err = client.Terminate(ctx, &bridgev1.TerminateRequest{Handle: "../x"})
	details(t, "bad handle", err, backenderr.RequestInvalid)
	if v := backenderr.From(err).Violations; len(v) != 1 || v[0].Field != "handle" {
		t.Errorf("bad handle: %+v", v)
	}
	_, err = client.Terminate(ctx, &bridgev1.TerminateRequest{Handle: handle})
	details(t, "cancelled in the backend", err, backenderr.Cancelled)
	recv := func(handle string) error {
		stream, err := client.WatchUntilExit(ctx, &bridgev1.WatchUntilExitRequest{Handle: handle})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	details(t, "bad handle in a stream", recv(""), backenderr.RequestInvalid)
	_, err = bridgev1.NewOperatorServiceClient(conn).Sweep(ctx, &bridgev1.SweepRequest{})
	if !backenderr.Is(err, backenderr.Unimplemented, backenderr.CallerDenied) {
		t.Errorf("a service that isn't registered: %v", err)
	}
	_, err = bridgev1.NewFleetServiceClient(conn).ListBackends(ctx, &bridgev1.ListBackendsRequest{})
	details(t, "a service that isn't registered", err, backenderr.Unimplemented)
	err = conn.Invoke(ctx, "/no.such.Service/Method", &bridgev1.NameRequest{}, &bridgev1.NameResponse{})
	details(t, "unknown service", err, backenderr.Unimplemented)
	_, err = client.CanSatisfy(ctx, &bridgev1.CanSatisfyRequest{Grant: nil, RegionHint: "X"})
	details(t, "two violations", err, backenderr.GrantInvalid)

	// Panics say nothing to the caller and all to the log, once.
	_, unary := client.Capabilities(ctx, &bridgev1.CapabilitiesRequest{})
	stream := recv(handle)
	for what, err := range map[string]error{"unary": unary, "stream": stream} {
		details(t, "panic in "+what, err, backenderr.Internal)
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("a panic's text leaves the process: %v", err)
		}
	}
	eventually(t, "two panics are logged once each", func() bool { return r.log.count(`"panic":"the secret of this process"`) == 2 })
	if _, err := name(t, conn); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	// Health is gRPC's own protocol, with its own codes.
	_, err = healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: "no.such"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("health of an unknown service: %v", err)
	}
}

func TestCallsAreCounted(t *testing.T) {
	t.Parallel()
	r, conn := insecurely(t, "reader")
	if _, err := name(t, conn); err != nil {
		t.Fatal(err)
	}
	families, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, f := range families {
		found[f.GetName()] = true
	}
	for _, want := range []string{"grpc_server_handled_total", "grpc_server_handling_seconds"} {
		if !found[want] {
			t.Errorf("no %s", want)
		}
	}
}

func TestStopDrainsThenCuts(t *testing.T) {
	t.Parallel()
	r, conn := insecurely(t, "client")
	entered, release := make(chan struct{}, 2), make(chan struct{})
	r.service.terminate = func(context.Context) error {
		entered <- struct{}{}
		<-release
		return nil
	}
	cut := make(chan struct{})
	r.service.watch = func(stream grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
		entered <- struct{}{}
		<-stream.Context().Done()
		close(cut)
		return stream.Context().Err()
	}
	client := bridgev1.NewBackendServiceClient(conn)
	handle := strings.Repeat("a", 64)
	finished := make(chan error, 1)
	go func() {
		_, err := client.Terminate(t.Context(), &bridgev1.TerminateRequest{Handle: handle})
		finished <- err
	}()
	stream, err := client.WatchUntilExit(t.Context(), &bridgev1.WatchUntilExitRequest{Handle: handle})
	if err != nil {
		t.Fatal(err)
	}
	<-entered
	<-entered
	watching, err := healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := watching.Recv(); err != nil || res.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v, %v", res, err)
	}
	r.stop()
	if res, err := watching.Recv(); err != nil || res.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health while it stops: %v, %v", res, err)
	}
	close(release)
	if err := <-finished; err != nil {
		t.Errorf("a call under way was not let finish: %v", err)
	}
	<-cut
	if _, err := stream.Recv(); err == nil {
		t.Error("a stream outlived its server")
	}
	for err := range r.done {
		if err != nil {
			t.Error(err)
		}
	}
	if _, err := name(t, conn); !backenderr.Is(err, backenderr.BackendUnreachable) {
		t.Errorf("after the end: %v", err)
	}
}

func TestProcessAsksItsOwnHealth(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	c := ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}}, TLS: ca.issue(t, leaf{dns: "server.example"}),
		Clients: []ClientEntry{{Identity: "alice", Role: "client"}},
	}
	r := serve(t, c)
	c.Listen[0].Address = r.Addrs()[0].String()
	if err := CheckHealth(t.Context(), c); err != nil {
		t.Errorf("with TLS: %v", err)
	}
	r.SetServing(false)
	if err := CheckHealth(t.Context(), c); err == nil || !strings.Contains(err.Error(), "NOT_SERVING") {
		t.Errorf("not serving: %v", err)
	}
	_, port, err := net.SplitHostPort(c.Listen[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{":" + port, "0.0.0.0:" + port} {
		if got, err := localTarget(address); err != nil || got != "localhost:"+port {
			t.Errorf("%s is asked at %s, %v", address, got, err)
		}
	}
	plain, _ := insecurely(t, "reader")
	if err := CheckHealth(t.Context(), ServerConfig{Listen: []ListenConfig{{Address: plain.Addrs()[0].String(), Insecure: true}}}); err != nil {
		t.Errorf("plaintext: %v", err)
	}
}
