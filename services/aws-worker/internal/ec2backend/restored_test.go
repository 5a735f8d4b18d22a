package ec2backend

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

// living are the instances of a grant that aren't terminated.
func (s *suiteSite) living(id backend.GrantID) (out []ec2sim.Instance) {
	for _, i := range s.cloud.Cloud.Instances() {
		if i.Tags[ec2tags.Grant] == id.String() && i.State != ec2sim.StateTerminated {
			out = append(out, i)
		}
	}
	return out
}

// A ledger from the middle of a Provision: it has the first attempt open, which
// found no capacity in truth, and knows nothing of the second, which runs.
func TestLaterAttemptThatTheLedgerForgotIsAdopted(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.StockOutMemory.Duration = time.Minute })
	g, e := s.grant()
	s.diesUnsent(t, b, g, e)
	backup := s.ledger

	s.ledger = ledgertest.Open(t)
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	restock := s.cloud.Cloud.StockOut(suiteRegion, suiteRegion+"a", "")
	before, err := b.Provision(asRequester(t.Context()), g, e)
	restock()
	if err != nil || before.Instance.Attempt < 2 {
		t.Fatalf("%+v, %v", before.Instance, err)
	}
	s.stop(t)

	s.ledger = backup
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	after, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	if after.Instance.ID != before.Instance.ID || len(s.living(g.ID)) != 1 {
		t.Errorf("got %s, had %s; living: %+v", after.Instance.ID, before.Instance.ID, s.living(g.ID))
	}
	terminate(t, b, g.ID)
}

// dies makes a call during which the worker is killed.
func (s *suiteSite) dies(t *testing.T, b backend.Backend, g backend.Grant, e backend.Envelope) {
	t.Helper()
	ctx, cancel := context.WithCancel(asRequester(t.Context()))
	over := make(chan struct{})
	go func() {
		defer close(over)
		_, _ = b.Provision(ctx, g, e) // there is nobody who could answer
	}()
	waitFor(t, "the worker's end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.dead
	})
	cancel()
	s.stop(t)
	<-over
}

// diesUnsent makes a call during which the worker is killed before it has sent its
// create call.
func (s *suiteSite) diesUnsent(t *testing.T, b backend.Backend, g backend.Grant, e backend.Envelope) {
	t.Helper()
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action != "RunInstances" || r.DryRun {
			return ec2sim.Intervention{}
		}
		return ec2sim.Intervention{Before: func(context.Context) error {
			s.kill()
			return context.Canceled
		}}
	})
	s.dies(t, b, g, e)
	s.cloud.Cloud.Intercept(nil)
}

// A process died right after it had sent its create call, whose instance EC2
// doesn't show yet. The next sends it again and is refused: that says nothing of
// the first.
func TestRefusedRepeatProvesNothing(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.VisibilityDelay.Duration = 6 * time.Second },
		func(o *ec2fixture.Options) { o.HiddenAtLeast = 5 * time.Second })
	cloud := s.cloud.Cloud
	g, e := s.grant()
	var first atomic.Bool
	cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		switch {
		case r.Action != "RunInstances" || r.DryRun:
		case first.CompareAndSwap(false, true):
			return ec2sim.Intervention{After: func() (lost bool) {
				s.kill()
				return true
			}}
		default:
			return ec2sim.Intervention{Refuse: &ec2sim.Error{Code: "UnauthorizedOperation", Message: "not now", Status: 403}}
		}
		return ec2sim.Intervention{}
	})
	s.dies(t, b, g, e)
	if s.history(g.ID) != 1 {
		t.Fatalf("%d launches", s.history(g.ID))
	}
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Provision(asRequester(t.Context()), g, e)
	if err == nil {
		t.Fatal("a call that was refused succeeded")
	}
	if created := backenderr.CreatedOf(err); created == backenderr.CreatedNone && len(s.living(g.ID)) > 0 {
		t.Errorf("%v says created=%s, and there is %+v", err, created, s.living(g.ID))
	}
	cloud.Intercept(nil)
	terminate(t, b, g.ID)
}

// EC2 lists an instance and says for a moment, when told to end it, that there
// is none.
func TestInstanceThatTerminateDoesNotFindIsToldAgain(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	g, _ := s.provision(t, b)
	var refused atomic.Int64
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action == "TerminateInstances" && refused.Add(1) <= 2 {
			return ec2sim.Intervention{Refuse: &ec2sim.Error{Code: "InvalidInstanceID.NotFound", Message: "no such instance", Status: 400}}
		}
		return ec2sim.Intervention{}
	})
	terminate(t, b, g.ID)
	if refused.Load() < 3 {
		t.Errorf("told %d times", refused.Load())
	}
}

// max_concurrent_instances is the operator's limit, however many replicas there
// are, and a place is free again whoever ended what had it.
func TestReplicasShareTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 2
	s, first := openBridge(t, func(c *Config) { c.MaxConcurrentInstances = limit })
	second := s.replica(t)
	for round := range 3 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var made []backend.GrantID
		for n := range 3 * limit {
			b := []backend.Backend{first, second}[n%2]
			wg.Go(func() {
				g, e := s.grant()
				switch _, err := b.Provision(asRequester(t.Context()), g, e); {
				case err == nil:
					mu.Lock()
					defer mu.Unlock()
					made = append(made, g.ID)
				case !backenderr.Is(err, backenderr.WorkerFull):
					t.Errorf("round %d: %v", round, err)
				case backenderr.CreatedOf(err) != backenderr.CreatedNone:
					t.Errorf("round %d: created=%s", round, backenderr.CreatedOf(err))
				}
			})
		}
		wg.Wait()
		if len(made) == 0 || len(made) > limit {
			t.Errorf("round %d: %d instances, the limit is %d", round, len(made), limit)
		}
		for _, id := range made {
			terminate(t, second, id) // whoever made it
		}
		g, e := s.grant()
		if _, err := first.Provision(asRequester(t.Context()), g, e); err != nil {
			t.Errorf("round %d: with all ended: %v", round, err)
		}
		terminate(t, second, g.ID)
	}
}

// A janitor whose clock is off believes that live grants are over.
func TestJanitorWithAWrongClockEndsNobody(t *testing.T) {
	t.Parallel()
	var behind atomic.Int64 // how far the cloud's clock is behind this machine's
	s, b := openBridge(t, nil, func(o *ec2fixture.Options) {
		o.Now = func() time.Time { return time.Now().Add(-time.Duration(behind.Load())) }
	})
	g, e := s.grant()
	g.ValidTo = time.Now().Add(5 * time.Second).Truncate(time.Microsecond).UTC()
	s.cloud.Machines.IgnoreDeadlines()
	if _, err := b.Provision(asRequester(t.Context()), g, e); err != nil {
		t.Fatal(err)
	}
	s.kill()
	s.stop(t)
	s.cloud.Refuse(false)
	behind.Store(int64(maxSkew + 30*time.Second)) // with which calls still succeed
	waitFor(t, "the deadline by this machine's clock", func() bool { return time.Now().After(g.ValidTo.Add(time.Second)) })

	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "aws", Ledger: s.ledger, Secret: s.secret, Metrics: prometheus.NewRegistry(), Janitor: true,
		Grace: time.Millisecond, Log: slog.New(slog.NewJSONHandler(&s.logs, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	driver, err := Open(t.Context(), s.config, runtime.Env())
	if err != nil {
		t.Fatal(err)
	}
	listing, err := driver.List(t.Context())
	if !backenderr.Is(err, backenderr.ClockSkew) {
		t.Errorf("the janitor sees %+v, %v", listing, err)
	}
	if err := driver.Close(); err != nil {
		t.Error(err)
	}
	if n := len(s.living(g.ID)); n != 1 {
		t.Errorf("%d instances live", n)
	}
	behind.Store(0)
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	ends(t, b, g.ID)
}

// An attempt that was begun and not sent has addresses that expire: one that comes
// back too late for a boot makes way for another.
func TestAnAttemptWhoseAddressesExpireIsNotSent(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		lifetime time.Duration
		attempt  uint32
	}{
		{"in time", time.Hour, 1},
		{"too late", 5 * time.Second, 2}, // as long as the boot
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s, b := openBridge(t, func(c *Config) { c.ImageStore.URLLifetime.Duration = test.lifetime })
			g, e := s.grant()
			s.diesUnsent(t, b, g, e)
			b, err := s.start(t)
			if err != nil {
				t.Fatal(err)
			}
			p, err := b.Provision(asRequester(t.Context()), g, e)
			if err != nil || p.Instance.Attempt != test.attempt || s.history(g.ID) != 1 {
				t.Errorf("attempt %d of %d, %v; want %d of 1", p.Instance.Attempt, s.history(g.ID), err, test.attempt)
			}
			terminate(t, b, g.ID)
		})
	}
}
