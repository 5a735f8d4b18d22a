package worker

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// place is a host that two replicas share.
type place struct {
	mu      sync.Mutex
	owner   *replica
	changed chan struct{}
}

// replica is a scripted driver that may act only while it has the place.
type replica struct {
	*scripted

	place *place
	asked func() // called once Elsewhere has made up its mind, if not nil
}

var _ Divided = (*replica)(nil)

// give gives the place to a replica, whose runtime hears of it.
func (p *place) give(to *replica) {
	p.mu.Lock()
	p.owner = to
	close(p.changed)
	p.changed = make(chan struct{})
	p.mu.Unlock()
	to.env.TookOver()
}

func (r *replica) mine() (<-chan struct{}, error) {
	r.place.mu.Lock()
	defer r.place.mu.Unlock()
	if r.place.owner == r {
		return r.place.changed, nil
	}
	return r.place.changed, backenderr.New(backenderr.OtherReplica, "elsewhere").WithRetryAfter(time.Second)
}

func (r *replica) Elsewhere(ctx context.Context, id backend.GrantID) error {
	attempts, err := r.env.Journal.Attempts(ctx, id)
	if err != nil || len(attempts) == 0 || attempts[len(attempts)-1].Gone {
		return err
	}
	_, err = r.mine()
	if r.asked != nil {
		r.asked()
	}
	return err
}

func (r *replica) Serving() error {
	_, err := r.mine()
	return err
}

func (r *replica) Provision(ctx context.Context, o Order) (Ready, error) {
	if _, err := r.mine(); err != nil {
		return Ready{}, err
	}
	return r.scripted.Provision(ctx, o)
}

func (r *replica) Watch(ctx context.Context, _ backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
	r.called("watch")
	for {
		changed, err := r.mine()
		if err != nil {
			return backend.Exit{}, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return backend.Exit{}, ctx.Err()
		}
	}
}

func (r *replica) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	if _, err := r.mine(); err != nil {
		return nil, err
	}
	return r.scripted.Terminate(ctx, id)
}

// pair is two replicas on one ledger, the first of which has the place.
func pair(t *testing.T) (*site, *replica, *site, *replica) {
	t.Helper()
	a := newSite(t, nil)
	b := &site{t: t, path: a.path, config: a.config}
	b.config.Metrics = prometheus.NewRegistry()
	b.start()
	p := &place{changed: make(chan struct{})}
	ra, rb := &replica{scripted: a.driver, place: p}, &replica{scripted: b.driver, place: p}
	p.owner = ra
	for s, d := range map[*site]*replica{a: ra, b: rb} {
		if err := s.Start(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(b.stop)
	return a, ra, b, rb
}

func TestAReplicaLeavesToTheOtherWhatItHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ra, b, rb := pair(t)
		defer a.stop()
		defer b.stop()
		g, e, p := a.ready()
		// The answer is in the ledger; nothing else can be done from here.
		again, err := b.Provision(as(t, alice), g, e)
		if err != nil || again.Receipt.HostKey != p.Receipt.HostKey {
			t.Errorf("%+v, %v", again.Receipt, err)
		}
		synctest.Wait()
		if err := b.WatchUntilExit(as(t, alice), p.Instance.Handle, func(backend.Event) error { return nil }); !backenderr.Is(err, backenderr.OtherReplica) {
			t.Errorf("Watch: %v", err)
		}
		other, envelope := grantFor(t, 2)
		if _, err := b.Provision(as(t, alice), other, envelope); !backenderr.Is(err, backenderr.OtherReplica) {
			t.Errorf("Provision: %v", err)
		}
		time.Sleep(time.Hour / 2) //nolint:forbidigo // time in a bubble: it sweeps, settles
		if n := rb.count("terminate"); n != 0 {
			t.Errorf("%d calls of Terminate", n)
		}
		if ra.count("terminate") != 0 || b.keeper(g.ID) != nil || a.keeper(g.ID) == nil {
			t.Error("the grant isn't kept by the one that has it, and by nobody else")
		}
		for _, s := range []*site{a, b} {
			if all := s.Instances(as(t, alice)); len(all) != 1 || all[0].GrantID != g.ID || all[0].State != backend.StateReady {
				t.Errorf("instances: %+v", all)
			}
			if all := s.Instances(as(t, bob)); len(all) != 0 {
				t.Errorf("bob sees %+v", all)
			}
		}
		if b.Serving() == nil || a.Serving() != nil {
			t.Error("the wrong one serves")
		}
	})
}

func TestATakeoverIsImmediate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ra, b, rb := pair(t)
		defer a.stop()
		defer b.stop()
		g, _, p := a.ready()
		done := make(chan error, 1)
		go func() {
			done <- a.WatchUntilExit(as(t, alice), p.Instance.Handle, func(backend.Event) error { return nil })
		}()
		synctest.Wait()
		began := time.Now()
		ra.place.give(rb)
		synctest.Wait()
		if b.keeper(g.ID) == nil || a.keeper(g.ID) != nil {
			t.Error("the grant isn't kept by the one that has it now, and by nobody else")
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %s", took)
		}
		if err := <-done; !backenderr.Is(err, backenderr.OtherReplica) {
			t.Errorf("the watch at the old one: %v", err)
		}
		end, err := b.Terminate(as(t, alice), p.Instance.Handle)
		if err != nil || end.State != backend.StateTerminated {
			t.Errorf("%+v, %v", end, err)
		}
		if ra.count("terminate") != 0 {
			t.Error("the old one has torn down")
		}
	})
}

// A watch that comes while a place changes hands has nothing yet to attach to,
// which isn't to say that there is no instance.
func TestAWatchDuringATakeoverIsSentElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ra, b, rb := pair(t)
		defer a.stop()
		defer b.stop()
		_, _, p := a.ready()
		synctest.Wait()
		rb.asked = sync.OnceFunc(func() {
			ra.place.mu.Lock()
			defer ra.place.mu.Unlock()
			ra.place.owner = rb // which its runtime hasn't heard of yet
		})
		err := b.WatchUntilExit(as(t, alice), p.Instance.Handle, func(backend.Event) error { return nil })
		wantReason(t, err, backenderr.OtherReplica, backenderr.CreatedUnknown)
		rb.asked = nil
		ra.place.give(ra)
	})
}

func TestAnEndThatTheOtherReplicaWasAskedForComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _, b, rb := pair(t)
		defer a.stop()
		defer b.stop()
		g, _, p := a.ready()
		if _, err := b.Terminate(as(t, alice), p.Instance.Handle); !backenderr.Is(err, backenderr.OtherReplica) ||
			backenderr.CreatedOf(err) != backenderr.CreatedUnknown {
			t.Fatalf("Terminate: %v", err)
		}
		time.Sleep(followInterval + time.Second) //nolint:forbidigo // time in a bubble
		log, err := a.config.Ledger.Log(t.Context(), ledger.RequestID(g.ID))
		if err != nil || rb.count("terminate") != 0 {
			t.Errorf("%+v, %v", log, err)
		}
	})
}

// A replica that can't see the host any more, and doesn't know that another one
// has it, has the last word from the ledger.
func TestAFinalLogOfTheOtherReplicaEndsAWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ra, b, rb := pair(t)
		defer a.stop()
		defer b.stop()
		_, _, p := a.ready()
		var final *backend.SignedLog
		done := make(chan error, 1)
		go func() {
			done <- a.WatchUntilExit(as(t, alice), p.Instance.Handle, func(e backend.Event) error {
				if e.Log != nil {
					final = e.Log
				}
				return nil
			})
		}()
		synctest.Wait()
		ra.place.mu.Lock()
		ra.place.owner = rb // and a isn't told
		ra.place.mu.Unlock()
		if end, err := b.Terminate(as(t, alice), p.Instance.Handle); err != nil || end.State != backend.StateTerminated {
			t.Fatalf("%+v, %v", end, err)
		}
		began := time.Now()
		if err := <-done; err != nil || final == nil || final.Log.Exit.Reason != backend.EndTerminated {
			t.Errorf("%+v, %v", final, err)
		}
		if took := time.Since(began); took > 2*followInterval {
			t.Errorf("it took %s", took)
		}
		if ra.count("terminate") != 0 {
			t.Error("it has torn down what isn't its own")
		}
	})
}
