package workers_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// remote is a backend in a server of its own, on a unix socket.
type remote struct {
	bridgev1.UnimplementedInventoryServiceServer
	bridgev1.UnimplementedFleetServiceServer
	bridgev1.UnimplementedOperatorServiceServer
	socket string
	// sweep answers Sweep, if it is set.
	sweep func(context.Context, *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error)
	// nested are the backends behind it, if it plays a router.
	nested []string

	mu        sync.Mutex
	regions   []backend.RegionCapabilities
	hang      chan struct{} // Capabilities waits for it
	polls     int
	caller    backend.Caller
	instances []*bridgev1.Instance
	logs      []*bridgev1.SignedComputeLog
	missing   []string
	server    *grpcx.Server
}

func newRemote(t *testing.T) *remote {
	t.Helper()
	return &remote{socket: filepath.Join(t.TempDir(), "s"), regions: []backend.RegionCapabilities{{Region: "here"}}}
}

// start serves until stop is called, or the test ends.
func (r *remote) start(t *testing.T) (stop func()) {
	t.Helper()
	server, err := grpcx.NewServer(grpcx.ServerConfig{
		Listen:  []grpcx.ListenConfig{{Address: "unix:" + r.socket}},
		Clients: []grpcx.ClientEntry{{Identity: fmt.Sprintf("unix:%d", os.Getuid()), Role: "reader", Router: true}},
	}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	bridgev1.RegisterBackendServiceServer(server, backendgrpc.NewServer(r))
	bridgev1.RegisterInventoryServiceServer(server, r)
	if r.sweep != nil {
		bridgev1.RegisterOperatorServiceServer(server, r)
	}
	if r.nested != nil {
		bridgev1.RegisterFleetServiceServer(server, r)
	}
	r.mu.Lock()
	r.server = server
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, 0) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (r *remote) Name(context.Context) (string, error) { return "remote", nil }

func (r *remote) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	r.mu.Lock()
	r.polls++
	hang, regions := r.hang, r.regions
	r.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return backend.Capabilities{}, ctx.Err()
		}
	}
	return backend.Capabilities{Backend: "remote", Regions: regions}, nil
}

func (r *remote) CanSatisfy(context.Context, backend.Grant) (backend.Satisfaction, error) {
	return backend.Satisfaction{Satisfiable: true}, nil
}

func (r *remote) Provision(ctx context.Context, g backend.Grant, _ backend.Envelope) (backend.Provisioned, error) {
	r.mu.Lock()
	r.caller = backend.CallerFrom(ctx)
	r.mu.Unlock()
	return backend.Provisioned{
		Instance: backend.Instance{Handle: backend.HandleFor(g.ID), GrantID: g.ID, State: backend.StateReady},
		Receipt:  backend.Receipt{GrantID: g.ID, HostKey: "ssh-ed25519 AAAA"},
	}, nil
}

func (r *remote) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	r.mu.Lock()
	r.caller = backend.CallerFrom(ctx)
	r.mu.Unlock()
	id, err := handle.GrantID()
	if err != nil {
		return err
	}
	log := backend.ComputeLog{GrantID: id}
	body, err := proto.Marshal(backendgrpc.LogToProto(log))
	if err != nil {
		return err
	}
	return emit(backend.Event{Log: &backend.SignedLog{Log: log, Body: body, KeyID: "k"}})
}

func (r *remote) Terminate(context.Context, backend.Handle) (backend.Termination, error) {
	return backend.Termination{State: backend.StateTerminated}, nil
}

func (r *remote) GetProviderCard(context.Context, *bridgev1.GetProviderCardRequest) (*bridgev1.GetProviderCardResponse, error) {
	return &bridgev1.GetProviderCardResponse{Card: &bridgev1.ProviderCard{Backends: r.nested}}, nil
}

func (r *remote) ListInstances(ctx context.Context, _ *bridgev1.ListInstancesRequest) (*bridgev1.ListInstancesResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.caller = backend.CallerFrom(ctx)
	return &bridgev1.ListInstancesResponse{Instances: r.instances, UnreachableBackends: r.missing}, nil
}

func (r *remote) ListComputeLogs(context.Context, *bridgev1.ListComputeLogsRequest) (*bridgev1.ListComputeLogsResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &bridgev1.ListComputeLogsResponse{ComputeLogs: r.logs, UnreachableBackends: r.missing}, nil
}

func (r *remote) lastCaller() backend.Caller {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.caller
}

// fast is a configuration whose limits suit a test.
func (r *remote) fast(name string) workers.Config {
	return workers.Config{
		Name: name, Client: grpcx.ClientConfig{Target: "unix:" + r.socket},
		PollInterval: 20 * time.Millisecond, PollTimeout: time.Minute, AnswerTimeout: time.Minute, ConnectTimeout: time.Minute,
	}
}

func dial(t *testing.T, c workers.Config) *workers.Worker {
	t.Helper()
	w, err := workers.Dial(c, grpcx.TLSConfig{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// watch watches over w until the test ends and returns what is closed after the
// first reading.
func watch(t *testing.T, w *workers.Worker) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ready, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		w.Watch(ctx, sync.OnceFunc(func() { close(ready) }))
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return ready
}

// eventually fails the test unless ok says so soon.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("it never happened: %s", what)
		}
	}
}

func TestALostBackendKeepsItsLastKnownValueAndComesBack(t *testing.T) {
	r := newRemote(t)
	stop := r.start(t)
	w := dial(t, r.fast("a"))
	if o := w.Observe(); o.LastError == "" || !o.LastSeen.IsZero() {
		t.Errorf("before it was ever asked: %+v", o)
	}
	<-watch(t, w)
	o := w.Observe()
	if o.LastError != "" || o.LastSeen.IsZero() || len(o.Capabilities.Regions) != 1 {
		t.Fatalf("while it answers: %+v", o)
	}
	stop()
	eventually(t, "the loss is seen", func() bool { return w.Observe().LastError != "" })
	lost := w.Observe()
	if lost.LastSeen.Before(o.LastSeen) || len(lost.Capabilities.Regions) != 1 {
		t.Errorf("after the loss: %+v", lost)
	}
	r.regions = append(r.regions, backend.RegionCapabilities{Region: "there"})
	r.start(t)
	eventually(t, "it comes back with another capability set", func() bool {
		o := w.Observe()
		return o.LastError == "" && len(o.Capabilities.Regions) == 2 && o.LastSeen.After(lost.LastSeen)
	})
}

// Nothing but the connection tells of it here: the next poll is far away.
func TestABackendThatComesBackAsAnotherIsReadAtOnce(t *testing.T) {
	r := newRemote(t)
	stop := r.start(t)
	c := r.fast("a")
	c.PollInterval = time.Hour
	w := dial(t, c)
	<-watch(t, w)
	if got := w.Observe().Capabilities.Regions; len(got) != 1 || got[0].Region != "here" {
		t.Fatalf("regions at first: %+v", got)
	}
	stop()
	eventually(t, "the loss is seen", func() bool { return w.Observe().LastError != "" })
	r.mu.Lock()
	r.regions = []backend.RegionCapabilities{{Region: "there", Total: backend.Shape{CPU: 8000}}, {Region: "yonder"}}
	r.mu.Unlock()
	r.start(t)
	eventually(t, "it is read again", func() bool {
		o := w.Observe()
		return o.LastError == "" && len(o.Capabilities.Regions) == 2 && o.Capabilities.Regions[0].Total.CPU == 8000
	})
}

func TestAHungBackendDelaysNoOther(t *testing.T) {
	hung, well := newRemote(t), newRemote(t)
	hung.hang = make(chan struct{})
	hung.start(t)
	well.start(t)
	ready := watch(t, dial(t, hung.fast("hung")))
	w := dial(t, well.fast("well"))
	<-watch(t, w)
	seen := w.Observe().LastSeen
	eventually(t, "the other is read again and again", func() bool { return w.Observe().LastSeen.Sub(seen) > 100*time.Millisecond })
	select {
	case <-ready:
		t.Error("the hung backend was read")
	default:
	}
	close(hung.hang)
	<-ready
}

func TestAReadingHasATimeLimit(t *testing.T) {
	r := newRemote(t)
	r.hang = make(chan struct{})
	defer close(r.hang)
	r.start(t)
	c := r.fast("a")
	c.PollTimeout = 30 * time.Millisecond
	w := dial(t, c)
	<-watch(t, w)
	if o := w.Observe(); o.LastError == "" {
		t.Errorf("a reading that timed out: %+v", o)
	}
}

func TestHealthIsFollowedBetweenPolls(t *testing.T) {
	r := newRemote(t)
	r.start(t)
	c := r.fast("a")
	c.PollInterval = time.Hour
	w := dial(t, c)
	<-watch(t, w)
	r.server.SetServing(false)
	eventually(t, "it is seen not to serve", func() bool { return w.Observe().LastError != "" })
	r.server.SetServing(true)
	eventually(t, "it is seen to serve", func() bool { return w.Observe().LastError == "" })
}

func TestACallForAGrantWaitsForTheConnection(t *testing.T) {
	r := newRemote(t)
	w := dial(t, r.fast("a"))
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient})
	result := make(chan error, 1)
	go func() {
		_, err := w.Member().Backend.Terminate(ctx, backend.HandleFor(backend.GrantID{1}))
		result <- err
	}()
	r.start(t)
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestACallForAGrantWaitsNoLongerThanItsLimit(t *testing.T) {
	r := newRemote(t)
	c := r.fast("a")
	c.ConnectTimeout = 30 * time.Millisecond
	w := dial(t, c)
	_, err := w.Member().Backend.Terminate(t.Context(), backend.HandleFor(backend.GrantID{1}))
	if !backenderr.Is(err, backenderr.BackendUnreachable) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown {
		t.Errorf("error is %v", err)
	}
}

func TestTheCallerIsPassedOn(t *testing.T) {
	r := newRemote(t)
	r.start(t)
	w := dial(t, r.fast("a"))
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient, Hops: 1})
	want := backend.Caller{Identity: "alice", Role: backend.RoleClient, Hops: 2}
	g := backend.Grant{
		ID: backend.GrantID{1}, PostHash: [32]byte{1}, Shape: backend.Shape{CPU: 1, RAM: 1, Storage: 1}, ValidTo: time.Unix(2_000_000_000, 0),
		MinIsolation: backend.IsolationContainer,
		Image:        backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256}, Kind: backend.ImageOCIArchive},
	}
	if _, err := w.Member().Backend.Provision(ctx, g, backend.Envelope{PostHash: [32]byte{1}}); err != nil {
		t.Fatal(err)
	}
	if got := r.lastCaller(); got != want {
		t.Errorf("Provision came from %+v, want %+v", got, want)
	}
	ctx = backend.WithCaller(t.Context(), backend.Caller{Identity: "root", Role: backend.RoleOperator})
	want = backend.Caller{Identity: "root", Role: backend.RoleOperator, Hops: 1}
	if err := w.Member().Backend.WatchUntilExit(ctx, backend.HandleFor(g.ID), func(backend.Event) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := r.lastCaller(); got != want {
		t.Errorf("WatchUntilExit came from %+v, want %+v", got, want)
	}
}

func TestARouterTellsItsBackends(t *testing.T) {
	r := newRemote(t)
	r.nested = []string{"a", "site/b"}
	r.start(t)
	w := dial(t, r.fast("land"))
	<-watch(t, w)
	if diff := cmp.Diff(r.nested, w.Observe().Backends); diff != "" {
		t.Errorf("nested backends (-want +got):\n%s", diff)
	}
}

func TestListsOfAllBackends(t *testing.T) {
	instance := func(n byte, handle string) *bridgev1.Instance {
		return &bridgev1.Instance{RequestId: []byte{n}, Handle: handle}
	}
	log := func(key string, ended int64) *bridgev1.SignedComputeLog {
		return &bridgev1.SignedComputeLog{KeyId: key, Log: &bridgev1.ComputeLog{EndedAt: &timestamppb.Timestamp{Seconds: ended}}}
	}
	running := &bridgev1.SignedComputeLog{KeyId: "running", Log: &bridgev1.ComputeLog{StartedAt: &timestamppb.Timestamp{Seconds: 2}}}
	a, b, gone := newRemote(t), newRemote(t), newRemote(t)
	a.instances, a.logs = []*bridgev1.Instance{instance(1, "11"), instance(3, "33")}, []*bridgev1.SignedComputeLog{log("a1", 1), log("a3", 3)}
	b.instances, b.logs, b.missing = []*bridgev1.Instance{instance(2, "x/22")}, []*bridgev1.SignedComputeLog{running, log("b4", 4)}, []string{"y"}
	a.start(t)
	b.start(t)
	inventory := workers.NewInventory([]*workers.Worker{dial(t, a.fast("a")), dial(t, b.fast("b")), dial(t, gone.fast("gone"))}, slog.New(slog.DiscardHandler))
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient})

	instances := inventory.Instances(ctx, &bridgev1.ListInstancesRequest{})
	want := &bridgev1.ListInstancesResponse{
		Instances:           []*bridgev1.Instance{instance(1, "a/11"), instance(2, "b/x/22"), instance(3, "a/33")},
		UnreachableBackends: []string{"b/y", "gone"},
	}
	if diff := cmp.Diff(want, instances, protocmp.Transform()); diff != "" {
		t.Errorf("instances (-want +got):\n%s", diff)
	}
	if got := a.lastCaller().Identity; got != "alice" {
		t.Errorf("the backend was asked in the name of %q", got)
	}
	for limit, keys := range map[int32][]string{0: {"a1", "running", "a3", "b4"}, 2: {"a1", "running"}} {
		logs := inventory.ComputeLogs(ctx, &bridgev1.ListComputeLogsRequest{Limit: limit})
		var got []string
		for _, l := range logs.GetComputeLogs() {
			got = append(got, l.GetKeyId())
		}
		if diff := cmp.Diff(keys, got); diff != "" {
			t.Errorf("logs with limit %d (-want +got):\n%s", limit, diff)
		}
		if diff := cmp.Diff(want.GetUnreachableBackends(), logs.GetUnreachableBackends()); diff != "" {
			t.Errorf("backends that did not answer (-want +got):\n%s", diff)
		}
	}
}

// A list of all instances of a large site is longer than the 4 MiB that gRPC
// clients take by default.
func TestALongListIsNoUnreachableBackend(t *testing.T) {
	const instances = 20_000
	r := newRemote(t)
	for n := range instances {
		id := make([]byte, 32)
		binary.BigEndian.PutUint32(id, uint32(n))
		r.instances = append(r.instances, &bridgev1.Instance{RequestId: id, Handle: hex.EncodeToString(id), Progress: strings.Repeat("p", 200)})
	}
	if size := proto.Size(&bridgev1.ListInstancesResponse{Instances: r.instances}); size <= 4<<20 {
		t.Fatalf("the list is too short for this test: %d bytes", size)
	}
	r.start(t)
	inventory := workers.NewInventory([]*workers.Worker{dial(t, r.fast("a"))}, slog.New(slog.DiscardHandler))
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "root", Role: backend.RoleOperator})
	res := inventory.Instances(ctx, &bridgev1.ListInstancesRequest{})
	if len(res.GetInstances()) != instances || len(res.GetUnreachableBackends()) != 0 {
		t.Errorf("%d instances, unreachable: %q", len(res.GetInstances()), res.GetUnreachableBackends())
	}
}
