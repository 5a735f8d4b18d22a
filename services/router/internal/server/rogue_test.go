package server_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// rogue is a worker process that misbehaves on demand. It takes the grants of
// its regions, and remembers what it made across its restarts.
type rogue struct {
	name, address string
	files         grpcx.TLSConfig

	mu      sync.Mutex
	regions []backend.Region
	hang    map[string]bool // methods that never answer
	die     func()          // instead of an answer to Provision, after its effect
	fail    error           // of Provision, after its effect
	endFail error           // of Terminate
	made    map[backend.GrantID]int
	ended   map[backend.GrantID]bool
	calls   []string
}

func (s *site) rogue(t *testing.T, name string, regions ...backend.Region) *rogue {
	t.Helper()
	return &rogue{
		name: name, address: freeAddress(t), files: s.ca.identity(t, name, "spiffe://test/"+name), regions: regions,
		hang: map[string]bool{}, made: map[backend.GrantID]int{}, ended: map[backend.GrantID]bool{},
	}
}

func (r *rogue) start(t *testing.T) (stop func()) {
	t.Helper()
	server, err := grpcx.NewServer(grpcx.ServerConfig{
		Listen: []grpcx.ListenConfig{{Address: r.address}}, TLS: r.files,
		Clients: []grpcx.ClientEntry{{Identity: routerIdentity, Role: "reader", Router: true}},
	}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	bridgev1.RegisterBackendServiceServer(server, backendgrpc.NewServer(r))
	return process(t, func(ctx context.Context) error { return server.Run(ctx, 0) })
}

func (r *rogue) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

func (r *rogue) did(method string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		if c == method {
			n++
		}
	}
	return n
}

// begin notes a call and hangs if it is told to.
func (r *rogue) begin(ctx context.Context, method string) error {
	r.mu.Lock()
	r.calls = append(r.calls, method)
	hang := r.hang[method] || r.hang["*"]
	r.mu.Unlock()
	if hang {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (r *rogue) Name(ctx context.Context) (string, error) { return r.name, r.begin(ctx, "Name") }

func (r *rogue) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	err := r.begin(ctx, "Capabilities")
	r.mu.Lock()
	defer r.mu.Unlock()
	c := backend.Capabilities{Backend: r.name, ObservedAt: time.Now()}
	for _, region := range r.regions {
		c.Regions = append(c.Regions, backend.RegionCapabilities{Region: region, Total: shape, Free: shape})
	}
	return c, err
}

func (r *rogue) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	err := r.begin(ctx, "CanSatisfy")
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Contains(r.regions, g.Region) && r.made[g.ID] == 0 {
		return backend.Satisfaction{Reason: "not here"}, err
	}
	return backend.Satisfaction{Satisfiable: true}, err
}

func (r *rogue) Provision(ctx context.Context, g backend.Grant, _ backend.Envelope) (backend.Provisioned, error) {
	if err := r.begin(ctx, "Provision"); err != nil {
		return backend.Provisioned{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended[g.ID] {
		return backend.Provisioned{}, backenderr.New(backenderr.GrantEnded, "ended here")
	}
	if r.made[g.ID] == 0 {
		r.made[g.ID]++
	}
	if r.die != nil {
		r.die()
		<-ctx.Done()
		return backend.Provisioned{}, ctx.Err()
	}
	if r.fail != nil {
		return backend.Provisioned{}, r.fail
	}
	return backend.Provisioned{
		Instance: backend.Instance{Handle: backend.HandleFor(g.ID), GrantID: g.ID, Backend: r.name, State: backend.StateReady},
		Receipt:  backend.Receipt{Host: "rogue", Port: 22, User: "u", GrantID: g.ID, HostKey: "ssh-ed25519 AAAA", ValidTo: g.ValidTo},
	}, nil
}

func (r *rogue) WatchUntilExit(ctx context.Context, _ backend.Handle, _ func(backend.Event) error) error {
	return r.begin(ctx, "WatchUntilExit")
}

func (r *rogue) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	if err := r.begin(ctx, "Terminate"); err != nil {
		return backend.Termination{}, err
	}
	id, err := handle.GrantID()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		err = r.endFail
	}
	if err != nil {
		return backend.Termination{}, err
	}
	r.ended[id] = true
	return backend.Termination{State: backend.StateTerminated}, nil
}

// frontier is a router over a rogue, which has the region "far" and is asked
// first, and a worker that is well and takes grants of any region but that.
type frontier struct {
	rogue  *rogue
	well   *machine
	stop   func() // of the rogue
	alice  backend.Backend
	fleet  bridgev1.FleetServiceClient
	market backend.Region // of the one that is well
}

// The router waits as long as patience for what it asks a worker: a test in which
// none hangs can afford to wait for one that is slow.
func newFrontier(t *testing.T, patience time.Duration) *frontier {
	t.Helper()
	s := newSite(t)
	f := &frontier{rogue: s.rogue(t, "rogue", "far"), well: s.machine(t, "well", 30), market: "well"}
	f.stop = f.rogue.start(t)
	f.well.start(t)
	r := s.routerOver(t, "router", target{"rogue", f.rogue.address}, target{"well", f.well.address})
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, r.path, bytes.ReplaceAll(text, []byte(`_timeout = "1m"`), fmt.Appendf(nil, "_timeout = %q", patience)))
	c, _ := r.start(t)
	conn := s.dial(t, c, "alice")
	f.alice, f.fleet = backendgrpc.NewClient(conn), bridgev1.NewFleetServiceClient(conn)
	return f
}

// grant returns a grant for a region, "" for any.
func (f *frontier) grant(t *testing.T, region backend.Region) (backend.Grant, backend.Envelope) {
	t.Helper()
	g, e := newGrant(t)
	g.Region = region
	return g, e
}

// status is what the router tells of the rogue.
func (f *frontier) status(t *testing.T) *bridgev1.BackendStatus {
	t.Helper()
	res, err := f.fleet.ListBackends(t.Context(), &bridgev1.ListBackendsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return res.GetBackends()[0]
}

func (f *frontier) wantHandle(t *testing.T, p backend.Provisioned, err error, id backend.GrantID, name string) {
	t.Helper()
	if err != nil || p.Instance.Handle != backend.HandleFor(id).Via(name) {
		t.Fatalf("handle %q, want it at %s; %v", p.Instance.Handle, name, err)
	}
}

// wantHeld checks that the grant, whose Provision failed with err, was not given
// to the other worker and may exist.
func (f *frontier) wantHeld(t *testing.T, id backend.GrantID, err error) {
	t.Helper()
	if err == nil || backenderr.CreatedOf(err) != backenderr.CreatedUnknown ||
		!backenderr.Is(err, backenderr.DeadlineExceeded, backenderr.BackendUnreachable, backenderr.Unknown, backenderr.ProviderUnavailable) {
		t.Errorf("error is %v, %s, created=%s", err, backenderr.ReasonOf(err), backenderr.CreatedOf(err))
	}
	if n := f.well.provider.History(id); n.Created != 0 {
		t.Errorf("the other worker made the grant, too: %+v", n)
	}
}

// within ends a call that would hang.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestAHungWorkerKeepsItsGrants(t *testing.T) {
	t.Parallel()
	f := newFrontier(t, 5*time.Second)
	held, envelope := f.grant(t, "far")
	p, err := f.alice.Provision(t.Context(), held, envelope)
	f.wantHandle(t, p, err, held.ID, "rogue")

	f.rogue.set(func() { f.rogue.hang["*"] = true })
	// At once, when nobody knows yet: no call has a limit but the router's own.
	anywhere, _ := f.grant(t, "")
	q, err := f.alice.Provision(within(t, 5*time.Minute), anywhere, envelope)
	f.wantHandle(t, q, err, anywhere.ID, "well")
	eventually(t, "it is seen to hang", func() bool {
		return f.status(t).GetHealth() == bridgev1.BackendHealth_BACKEND_HEALTH_UNREACHABLE
	})
	if c := f.status(t).GetCapabilities(); !c.GetStale() || len(c.GetRegions()) != 1 || c.GetRegions()[0].GetTotal().GetCpuMillicores() != int64(shape.CPU) {
		t.Errorf("its capabilities are %v", c)
	}
	card, err := f.fleet.GetProviderCard(t.Context(), &bridgev1.GetProviderCardRequest{})
	if regions := card.GetCard().GetCapabilities().GetRegions(); err != nil || len(regions) != 2 || regions[0].GetRegion() != "far" || regions[0].GetFree().GetCpuMillicores() != 0 {
		t.Errorf("the card's regions are %v, %v", regions, err)
	}
	// Now it isn't even asked.
	asked := f.rogue.did("CanSatisfy")
	next, _ := f.grant(t, "")
	q, err = f.alice.Provision(within(t, 5*time.Minute), next, envelope)
	f.wantHandle(t, q, err, next.ID, "well")
	if n := f.rogue.did("CanSatisfy"); n != asked {
		t.Errorf("a worker that hangs was asked %d times for a new grant", n-asked)
	}
	// What it has stays its own.
	_, err = f.alice.Provision(within(t, time.Second), held, envelope)
	f.wantHeld(t, held.ID, err)

	f.rogue.set(func() { clear(f.rogue.hang) })
	again, err := f.alice.Provision(t.Context(), held, envelope)
	f.wantHandle(t, again, err, held.ID, "rogue")
	if again.Receipt.HostKey != p.Receipt.HostKey || f.rogue.made[held.ID] != 1 {
		t.Errorf("another receipt, %+v, or instance", again.Receipt)
	}
}

func TestAHungProvisionIsKept(t *testing.T) {
	t.Parallel()
	f := newFrontier(t, time.Minute)
	f.rogue.set(func() { f.rogue.hang["Provision"], f.rogue.regions = true, []backend.Region{"far", "well"} })
	grant, envelope := f.grant(t, f.market) // Both could.
	for tries := 0; f.rogue.did("Provision") < 2; tries++ {
		if tries == 100 {
			t.Fatal("the retry went to nobody")
		}
		_, err := f.alice.Provision(within(t, 700*time.Millisecond), grant, envelope)
		f.wantHeld(t, grant.ID, err)
	}
	// It answers everything else, so it is no backend in trouble.
	if s := f.status(t); s.GetHealth() != bridgev1.BackendHealth_BACKEND_HEALTH_SERVING {
		t.Errorf("its status is %v", s)
	}
	f.rogue.set(func() { clear(f.rogue.hang) })
	p, err := f.alice.Provision(t.Context(), grant, envelope)
	f.wantHandle(t, p, err, grant.ID, "rogue")
}

func TestAWorkerComesBackAsAnother(t *testing.T) {
	t.Parallel()
	f := newFrontier(t, time.Minute)
	old, envelope := f.grant(t, "far")
	if _, err := f.alice.Provision(t.Context(), old, envelope); err != nil {
		t.Fatal(err)
	}
	f.rogue.set(func() {
		f.rogue.regions = []backend.Region{"far", "well"}
		f.rogue.die = sync.OnceFunc(func() { go f.stop() })
	})
	grant, _ := f.grant(t, f.market)
	_, err := f.alice.Provision(t.Context(), grant, envelope)
	f.wantHeld(t, grant.ID, err)
	if f.rogue.made[grant.ID] != 1 {
		t.Fatalf("it made %d before it died", f.rogue.made[grant.ID])
	}
	f.stop()
	_, err = f.alice.Provision(t.Context(), grant, envelope)
	wantReason(t, "while it is dead", err, backenderr.BackendUnreachable)
	f.wantHeld(t, grant.ID, err)

	// It comes back elsewhere in the world, and still has the grant.
	f.rogue.set(func() { f.rogue.die, f.rogue.regions = nil, []backend.Region{"moon", "mars"} })
	f.rogue.start(t)
	eventually(t, "the card tells of the new regions, and of the old one no more", func() bool {
		card, err := f.fleet.GetProviderCard(t.Context(), &bridgev1.GetProviderCardRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, r := range card.GetCard().GetCapabilities().GetRegions() {
			names = append(names, r.GetRegion())
		}
		return slices.Equal(names, []string{"mars", "moon", "well"})
	})
	p, err := f.alice.Provision(t.Context(), old, envelope)
	f.wantHandle(t, p, err, old.ID, "rogue")
	// The unclear one had begun to leave; it goes on once its end is confirmed.
	p, err = f.alice.Provision(t.Context(), grant, envelope)
	f.wantHandle(t, p, err, grant.ID, "well")
	if !f.rogue.ended[grant.ID] || f.rogue.ended[old.ID] || f.rogue.made[old.ID] != 1 {
		t.Error("it moved before its end was confirmed, or another one was ended")
	}
}

func TestAnUnclearGrantIsEndedFirst(t *testing.T) {
	t.Parallel()
	f := newFrontier(t, time.Minute)
	f.rogue.set(func() {
		f.rogue.regions = []backend.Region{"far", "well"}
		f.rogue.fail = backenderr.New(backenderr.ProviderUnavailable, "lost the answer")
		f.rogue.endFail = backenderr.New(backenderr.ProviderUnavailable, "can't see")
	})
	grant, envelope := f.grant(t, f.market)
	for range 2 {
		_, err := f.alice.Provision(t.Context(), grant, envelope)
		f.wantHeld(t, grant.ID, err)
		if f.rogue.did("Terminate") == 0 {
			t.Error("nobody tried to end it")
		}
	}
	f.rogue.set(func() { f.rogue.endFail = nil })
	p, err := f.alice.Provision(t.Context(), grant, envelope)
	f.wantHandle(t, p, err, grant.ID, "well")
	if !f.rogue.ended[grant.ID] || f.well.provider.Running(grant.ID) != 1 {
		t.Error("it moved before its end was confirmed")
	}
}
