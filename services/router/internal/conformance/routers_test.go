package conformance_test

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// moody is a driver that refuses, now and then, what it could do.
type moody struct {
	worker.Driver
	refuse func() bool
}

func (m moody) Provision(ctx context.Context, o worker.Order) (worker.Ready, error) {
	if m.refuse() {
		return worker.Ready{}, backenderr.New(backenderr.CapacityExhausted, "no room just now").WithCreated(backenderr.CreatedNone)
	}
	return m.Driver.Provision(ctx, o)
}

// station is a worker process that restarts.
type station struct {
	name     string
	provider *backendfake.Provider
	ledger   *ledger.Ledger
	secret   redact.Secret
	refuse   func() bool
	now      atomic.Pointer[worker.Runtime]
	driver   *backendfake.Driver
}

func (s *station) start(t *testing.T) {
	t.Helper()
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		// Their instances are at one provider, which counts them, under names that
		// differ.
		BridgeID: s.name, Backend: s.name, Ledger: s.ledger, Secret: s.secret, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Error(err)
		return
	}
	s.driver = backendfake.Open(s.provider, runtime.Env(), backendfake.DriverOptions{BootTimeout: 10 * time.Second})
	if err := runtime.Start(context.WithoutCancel(t.Context()), moody{s.driver, s.refuse}); err != nil {
		t.Error(err)
		return
	}
	s.now.Store(runtime)
}

func (s *station) stop() {
	if runtime := s.now.Swap(nil); runtime != nil {
		s.driver.Kill()
		runtime.Close()
	}
}

// wire is the way from one router to a station: calls and answers are delayed,
// lost and, when the caller has gone, still arrive.
type wire struct {
	*station
	calls  *sync.WaitGroup
	random func() float64
}

func (w wire) Name(context.Context) (string, error) { return w.name, nil }

func (w wire) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	return reach(w, func(r *worker.Runtime) (backend.Capabilities, error) { return r.Capabilities(ctx) })
}

func (w wire) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	return reach(w, func(r *worker.Runtime) (backend.Satisfaction, error) { return r.CanSatisfy(ctx, g) })
}

func (w wire) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	return reach(w, func(r *worker.Runtime) (backend.Termination, error) { return r.Terminate(ctx, h) })
}

func (w wire) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	_, err := reach(w, func(r *worker.Runtime) (struct{}, error) { return struct{}{}, r.WatchUntilExit(ctx, h, emit) })
	return err
}

func (w wire) Provision(ctx context.Context, g backend.Grant, e backend.Envelope) (backend.Provisioned, error) {
	type answer struct {
		p   backend.Provisioned
		err error
	}
	lateBy, lost := time.Duration(0), w.random() < 0.1
	if w.random() < 0.3 {
		lateBy = time.Duration(w.random() * float64(15*time.Millisecond))
	}
	answers := make(chan answer, 1)
	w.calls.Go(func() {
		<-time.After(lateBy)
		p, err := reach(w, func(r *worker.Runtime) (backend.Provisioned, error) {
			return r.Provision(context.WithoutCancel(ctx), g, e)
		})
		answers <- answer{p, err}
	})
	if lost {
		<-time.After(time.Duration(w.random() * float64(5*time.Millisecond)))
		return backend.Provisioned{}, errors.New("connection reset")
	}
	a := <-answers
	return a.p, a.err
}

func reach[T any](w wire, call func(*worker.Runtime) (T, error)) (T, error) {
	runtime := w.now.Load()
	if runtime == nil {
		var zero T
		return zero, backenderr.New(backenderr.BackendUnreachable, "connection refused")
	}
	return call(runtime)
}

// Two routers with one ledger over two workers, none of which can be relied on:
// whatever happens, a grant has no second instance, not for a moment.
func TestTwoRoutersOverTwoWorkersNeverMakeASecondInstance(t *testing.T) {
	const (
		grants   = 40
		callers  = 3 // of each grant and router
		restarts = 6
	)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var mu sync.Mutex
	source := rand.New(rand.NewPCG(seed, 1))
	random := func() float64 {
		mu.Lock()
		defer mu.Unlock()
		return source.Float64()
	}
	store := func(name string) *ledger.Ledger {
		path := filepath.Join(t.TempDir(), name)
		if err := ledgertest.Create(path); err != nil {
			t.Fatal(err)
		}
		l, err := ledger.Open(t.Context(), ledger.Config{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
		return l
	}
	provider := backendfake.NewProvider(backendfake.Options{
		BootTime: time.Millisecond, DeleteTime: time.Millisecond,
		Hosts: []backendfake.Host{{Name: "host", Region: "here", Capacity: siteShape.Times(2 * grants)}},
	})
	t.Cleanup(provider.Close)
	secret := make([]byte, 32)
	for i := range secret {
		secret[i] = byte(source.Uint32())
	}
	var stations []*station
	for _, name := range []string{"north", "south"} {
		s := &station{
			name: name, provider: provider, ledger: store(name), secret: redact.New(secret),
			refuse: func() bool { return random() < 0.4 },
		}
		s.start(t)
		t.Cleanup(s.stop)
		stations = append(stations, s)
	}
	shared := store("routers")
	var underWay sync.WaitGroup
	var routers []*fleet.Fleet
	for range 2 {
		c := fleet.Config{Name: "bridge", Claims: claims.New(shared), Log: slog.New(slog.DiscardHandler)}
		for _, s := range stations {
			c.Members = append(c.Members, fleet.Member{
				Name: s.name, Backend: wire{s, &underWay, random}, AnswerTimeout: 10 * time.Second,
				Observe: func() fleet.Observation { return fleet.Observation{LastSeen: time.Now()} },
			})
		}
		router, err := fleet.New(c)
		if err != nil {
			t.Fatal(err)
		}
		routers = append(routers, router)
	}

	line := backendtest.NewLogin(t)
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient})
	grantOf := func(n int) (backend.Grant, backend.Envelope) {
		g := backend.Grant{
			Image: siteImage, Shape: siteShape, MinIsolation: backend.IsolationContainer, PostHash: [32]byte{2}, ValidTo: time.Now().Add(time.Hour).Truncate(time.Hour).Add(time.Hour),
		}
		binary.BigEndian.PutUint64(g.ID[:], uint64(n)+1)
		return g, backend.Envelope{SSHPublicKey: line, PostHash: g.PostHash}
	}
	var served, refused, unclear atomic.Int64
	var calls sync.WaitGroup
	for n := range grants {
		for i := range 2 * callers {
			calls.Go(func() {
				g, e := grantOf(n)
				for range 4 { // As a client that was told to try again.
					_, err := routers[i%2].Provision(ctx, g, e)
					switch {
					case err == nil:
						served.Add(1)
						return
					case backenderr.CreatedOf(err) == backenderr.CreatedNone:
						refused.Add(1)
					default:
						unclear.Add(1)
					}
				}
			})
		}
	}
	for range restarts {
		<-time.After(time.Duration(random() * float64(60*time.Millisecond)))
		s := stations[int(random()*2)]
		s.stop()
		s.start(t)
	}
	calls.Wait()
	underWay.Wait()

	instances, most := 0, 0
	for n := range grants {
		g, _ := grantOf(n)
		h := provider.History(g.ID)
		if h.AtOnce > 1 {
			t.Errorf("grant %d: %d instances at once, %d made", n, h.AtOnce, h.Created)
		}
		instances += h.Created
		most = max(most, h.AtOnce)
	}
	if served.Load() == 0 || refused.Load()+unclear.Load() == 0 {
		t.Errorf("%d calls were served, %d refused, %d unclear: nothing was tried", served.Load(), refused.Load(), unclear.Load())
	}
	t.Logf("%d grants, %d instances made, at most %d of one at once; %d calls served, %d refused, %d unclear",
		grants, instances, most, served.Load(), refused.Load(), unclear.Load())
	// And what is ended leaves nothing.
	for n := range grants {
		g, _ := grantOf(n)
		calls.Go(func() {
			for try := 0; ; try++ {
				term, err := routers[0].Terminate(ctx, backend.HandleFor(g.ID))
				if err == nil && term.State == backend.StateTerminated {
					return
				}
				if try == 200 || (err != nil && !backenderr.Retryable(err)) {
					t.Errorf("end grant %d: %v", n, err)
					return
				}
			}
		})
	}
	calls.Wait()
	for n := range grants {
		g, _ := grantOf(n)
		if left := provider.Running(g.ID); left != 0 {
			t.Errorf("grant %d: %d instances are left", n, left)
		}
	}
}
