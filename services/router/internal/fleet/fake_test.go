package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// world counts what exists of each grant over all backends.
type world struct {
	mu      sync.Mutex
	running map[backend.GrantID]int
	atOnce  map[backend.GrantID]int
}

func newWorld() *world {
	return &world{running: map[backend.GrantID]int{}, atOnce: map[backend.GrantID]int{}}
}

func (w *world) add(id backend.GrantID, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running[id] += n
	w.atOnce[id] = max(w.atOnce[id], w.running[id])
}

// outcome is how one Provision goes.
type outcome struct {
	err error
	// made leaves an instance behind, whatever err says.
	made bool
	// wait, if set, holds the call until it is closed.
	wait <-chan struct{}
}

// fake is a backend that holds state and fails as it is told.
type fake struct {
	name  string
	world *world

	mu       sync.Mutex
	calls    []string
	no       string // why CanSatisfy says no
	satisfy  func(ctx context.Context) (backend.Satisfaction, error)
	script   []outcome
	always   *outcome
	endErr   error
	ending   int // how often Terminate answers TERMINATING
	held     map[backend.GrantID]bool
	refused  map[backend.GrantID]uint64 // fences, as a worker records them
	ended    map[backend.GrantID]bool
	observed fleet.Observation
	callers  []backend.Caller
	fences   []uint64 // of the calls of Provision
	forgets  bool     // what it has refused
	event    []backend.Event
	watchErr error
}

func newFake(w *world, name string) *fake {
	return &fake{
		name: name, world: w, held: map[backend.GrantID]bool{}, refused: map[backend.GrantID]uint64{}, ended: map[backend.GrantID]bool{},
		observed: fleet.Observation{
			LastSeen: time.Unix(1, 0),
			Capabilities: backend.Capabilities{Backend: name, Regions: []backend.RegionCapabilities{{
				Region: "here", Isolation: []backend.Isolation{backend.IsolationContainer}, Enforcement: backend.EnforcedByPlatform,
				Total: backend.Shape{CPU: 4000}, Free: backend.Shape{CPU: 2000}, LargestSingle: backend.Shape{CPU: 1000}, LargestFree: backend.Shape{CPU: 1000},
			}}},
		},
	}
}

func (f *fake) note(ctx context.Context, call string) {
	f.calls = append(f.calls, call)
	f.callers = append(f.callers, backend.CallerFrom(ctx))
}

func (f *fake) did(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if c == call {
			n++
		}
	}
	return n
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) Name(context.Context) (string, error) { return f.name, nil }

func (f *fake) Capabilities(context.Context) (backend.Capabilities, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.observed.Capabilities, nil
}

func (f *fake) CanSatisfy(ctx context.Context, _ backend.Grant) (backend.Satisfaction, error) {
	f.mu.Lock()
	f.note(ctx, "CanSatisfy")
	satisfy, no := f.satisfy, f.no
	f.mu.Unlock()
	if satisfy != nil {
		return satisfy(ctx)
	}
	return backend.Satisfaction{Satisfiable: no == "", Reason: no}, nil
}

func (f *fake) Provision(ctx context.Context, grant backend.Grant, _ backend.Envelope) (backend.Provisioned, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note(ctx, "Provision")
	fence := backend.FenceFrom(ctx)
	f.fences = append(f.fences, fence)
	if fence != 0 && fence <= f.refused[grant.ID] && !f.forgets {
		return backend.Provisioned{}, f.refuse(grant.ID, fence, backenderr.New(backenderr.OperationInProgress, "too late").WithCreated(backenderr.CreatedNone))
	}
	var o outcome
	switch {
	case len(f.script) > 0:
		o, f.script = f.script[0], f.script[1:]
	case f.always != nil:
		o = *f.always
	}
	if o.wait != nil {
		f.mu.Unlock()
		select {
		case <-o.wait:
		case <-ctx.Done():
			o = outcome{err: ctx.Err()}
		}
		f.mu.Lock()
	}
	if f.ended[grant.ID] {
		return backend.Provisioned{}, f.refuse(grant.ID, fence, backenderr.New(backenderr.GrantEnded, "ended here").WithCreated(backenderr.CreatedNone))
	}
	if (o.err == nil || o.made) && !f.held[grant.ID] {
		f.held[grant.ID] = true
		f.world.add(grant.ID, 1)
	}
	if o.err != nil {
		return backend.Provisioned{}, f.refuse(grant.ID, fence, o.err)
	}
	return backend.Provisioned{Instance: backend.Instance{
		Handle: backend.HandleFor(grant.ID), GrantID: grant.ID, Backend: f.name, State: backend.StateReady,
	}, Receipt: backend.Receipt{Host: f.name, GrantID: grant.ID}}, nil
}

// refuse records a refusal, as a backend must before it says that nothing
// exists, unless it is one of those at the door, where nothing can be recorded.
func (f *fake) refuse(id backend.GrantID, fence uint64, err error) error {
	door := backenderr.Is(err, backenderr.CallerUnauthenticated, backenderr.CallerDenied, backenderr.HopLimitExceeded,
		backenderr.RequestInvalid, backenderr.Unimplemented)
	if fence == 0 || door || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		return err
	}
	f.refused[id] = max(f.refused[id], fence)
	return backend.WithRefusedFence(backenderr.From(err).Clone(), f.refused[id])
}

func (f *fake) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	f.mu.Lock()
	f.note(ctx, "Watch "+string(handle))
	events, err := slices.Clone(f.event), f.watchErr
	f.mu.Unlock()
	for _, e := range events {
		if err := emit(e); err != nil {
			return err
		}
	}
	return err
}

func (f *fake) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note(ctx, "Terminate "+string(handle))
	id, err := handle.GrantID()
	if err != nil {
		return backend.Termination{}, err
	}
	if f.endErr != nil {
		return backend.Termination{}, f.endErr
	}
	f.ended[id] = true
	if f.ending > 0 {
		f.ending--
		return backend.Termination{State: backend.StateTerminating}, nil
	}
	t := backend.Termination{State: backend.StateTerminated}
	if held, ran := f.held[id]; ran {
		t.Log = &backend.SignedLog{KeyID: f.name}
		if held {
			f.held[id] = false
			f.world.add(id, -1)
		}
	}
	return t, nil
}

// answerTimeout is longer than a busy machine takes for a fake's answer. Where one
// hangs, a test has time of its own.
const answerTimeout = time.Minute

func (f *fake) member() fleet.Member {
	return fleet.Member{Name: f.name, Backend: f, AnswerTimeout: answerTimeout, Observe: func() fleet.Observation {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.observed
	}}
}

// memory is a claim store in memory.
type memory struct {
	mu      sync.Mutex
	claims  map[backend.GrantID]fleet.Claim
	closed  map[backend.GrantID]bool
	refused map[backend.GrantID]uint64
	fail    error
	// beforeMove, if set, runs before each Move, without the lock.
	beforeMove func()
}

func newMemory() *memory {
	return &memory{claims: map[backend.GrantID]fleet.Claim{}, closed: map[backend.GrantID]bool{}, refused: map[backend.GrantID]uint64{}}
}

func (m *memory) read(id backend.GrantID) fleet.Claim {
	c := m.claims[id]
	c.GrantID, c.Closed = id, m.closed[id]
	return c
}

func (m *memory) Get(_ context.Context, id backend.GrantID) (fleet.Claim, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.read(id), m.fail
}

// late says whether a call was refused before. The lock is held.
func (m *memory) late(id backend.GrantID, fence uint64) error {
	if fence != 0 && fence <= m.refused[id] {
		return &fleet.RefusedError{Fence: m.refused[id]}
	}
	return m.fail
}

func (m *memory) Put(_ context.Context, c fleet.Claim, fence uint64) (fleet.Claim, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.late(c.GrantID, fence); err != nil {
		return fleet.Claim{}, false, err
	}
	if m.claims[c.GrantID].Backend != "" {
		return m.read(c.GrantID), false, nil
	}
	c.Generation = 1
	m.claims[c.GrantID] = c
	return m.read(c.GrantID), true, nil
}

func (m *memory) Leave(_ context.Context, was fleet.Claim) (fleet.Claim, error) {
	c, _, err := m.change(was, 0, func(c *fleet.Claim) { c.Leaving = true })
	return c, err
}

func (m *memory) Move(_ context.Context, was fleet.Claim, to string, above, fence uint64) (fleet.Claim, bool, error) {
	if m.beforeMove != nil {
		m.beforeMove()
	}
	return m.change(was, fence, func(c *fleet.Claim) {
		c.Backend, c.Leaving, c.Generation = to, false, max(c.Generation, above)+1
	})
}

// steal moves the grant, wherever it is, as another router might.
func (m *memory) steal(t *testing.T, id backend.GrantID, to string) {
	t.Helper()
	was, err := m.Get(t.Context(), id)
	if err != nil {
		t.Error(err)
	}
	_, moved, err := m.change(was, 0, func(c *fleet.Claim) { c.Backend, c.Leaving, c.Generation = to, false, c.Generation+1 })
	if err != nil || !moved {
		t.Errorf("the claim %+v did not move: %v", was, err)
	}
}

// change changes a claim if it is as it was, unless its grant is closed.
func (m *memory) change(was fleet.Claim, fence uint64, change func(*fleet.Claim)) (fleet.Claim, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.late(was.GrantID, fence); err != nil {
		return fleet.Claim{}, false, err
	}
	c := m.claims[was.GrantID]
	as := c.Backend == was.Backend && c.Generation == was.Generation && c.Leaving == was.Leaving
	if as && c.Backend != "" && !m.closed[was.GrantID] {
		change(&c)
		m.claims[was.GrantID] = c
		return m.read(was.GrantID), true, nil
	}
	return m.read(was.GrantID), false, nil
}

func (m *memory) Refuse(_ context.Context, at fleet.Claim, fence uint64) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.claims[at.GrantID]; c.Backend != at.Backend || c.Generation != at.Generation || c.Leaving != at.Leaving {
		return 0, fmt.Errorf("the claim is %+v, not %+v", c, at)
	}
	if m.fail == nil {
		m.refused[at.GrantID] = max(m.refused[at.GrantID], fence)
	}
	return m.refused[at.GrantID], m.fail
}

func (m *memory) Close(_ context.Context, id backend.GrantID, _ string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		m.closed[id] = true
	}
	return m.fail
}

func (m *memory) backend(id backend.GrantID) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.claims[id].Backend
}

// bridge is a fleet over fakes with what they share.
type bridge struct {
	*fleet.Fleet
	world  *world
	claims *memory
	fakes  []*fake
}

// newBridge makes a fleet over fakes with the names.
func newBridge(t *testing.T, names ...string) *bridge {
	t.Helper()
	b := &bridge{world: newWorld(), claims: newMemory()}
	for _, name := range names {
		b.fakes = append(b.fakes, newFake(b.world, name))
	}
	b.Fleet = b.router(t, false)
	return b
}

// router makes one more fleet over the same fakes and claims.
func (b *bridge) router(t *testing.T, strict bool) *fleet.Fleet {
	t.Helper()
	c := fleet.Config{Name: "bridge", Claims: b.claims, StrictFirstMatch: strict, Log: slog.New(slog.DiscardHandler)}
	for _, f := range b.fakes {
		c.Members = append(c.Members, f.member())
	}
	made, err := fleet.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// over makes one more fleet over the same fakes and claims, some of which it
// reaches in another way.
func (b *bridge) over(t *testing.T, ways map[string]backend.Backend) *fleet.Fleet {
	t.Helper()
	c := fleet.Config{Name: "bridge", Claims: b.claims, Log: slog.New(slog.DiscardHandler)}
	for _, f := range b.fakes {
		m := f.member()
		if way := ways[f.name]; way != nil {
			m.Backend = way
		}
		c.Members = append(c.Members, m)
	}
	made, err := fleet.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func grantOf(n byte) (backend.Grant, backend.Envelope) {
	g := backend.Grant{
		ID: idOf(n), PostHash: [32]byte{7}, Shape: backend.Shape{CPU: 1000, RAM: 512, Storage: 1},
		MinIsolation: backend.IsolationContainer, ValidTo: time.Unix(4_000_000_000, 0),
		Image: backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{8}}, Kind: backend.ImageOCIArchive},
	}
	return g, backend.Envelope{PostHash: [32]byte{7}, SSHPublicKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA"}
}

func idOf(n byte) backend.GrantID { return backend.GrantID{0xff, n} }

// as returns a context of a client.
func as(ctx context.Context, identity string) context.Context {
	return backend.WithCaller(ctx, backend.Caller{Identity: identity, Role: backend.RoleClient})
}

func fails(reason backenderr.Reason, created backenderr.Created) outcome {
	return outcome{err: backenderr.New(reason, "scripted").WithCreated(created)}
}

// transport is an error that isn't the bridge's.
var errTransport = errors.New("connection reset by peer")

func wantReason(t *testing.T, err error, reason backenderr.Reason, created backenderr.Created) {
	t.Helper()
	if got := backenderr.ReasonOf(err); got != reason {
		t.Fatalf("error %v has reason %q, want %q", err, got, reason)
	}
	if got := backenderr.CreatedOf(err); got != created {
		t.Fatalf("error %v says created=%s, want %s", err, got, created)
	}
}

func wantOn(t *testing.T, p backend.Provisioned, err error, name string) {
	t.Helper()
	if err != nil {
		t.Fatalf("Provision: %v", err)
	}
	want := backend.Handle(fmt.Sprintf("%s/%s", name, p.Instance.GrantID))
	if p.Instance.Handle != want {
		t.Fatalf("handle is %q, want %q", p.Instance.Handle, want)
	}
}
