package worker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// fenced returns a context of a router's call for alice.
func fenced(t *testing.T, fence uint64) context.Context {
	t.Helper()
	return backend.WithFence(as(t, alice), fence)
}

func full(context.Context, Order) (Ready, error) {
	return Ready{}, backenderr.New(backenderr.CapacityExhausted, "no room").WithCreated(backenderr.CreatedNone)
}

func wantRefused(t *testing.T, err error, reason backenderr.Reason, created backenderr.Created, fence uint64) {
	t.Helper()
	wantReason(t, err, reason, created)
	if got := backend.RefusedFence(err); got != fence {
		t.Fatalf("%v says that fence %d is refused, want %d", err, got, fence)
	}
}

// Every way in which a Provision is refused is one that stands, also for a
// process that starts later.
func TestARefusalStands(t *testing.T) {
	refusals := map[string]struct {
		reason backenderr.Reason
		set    func(*site)
		clear  func(*site)
	}{
		"by the driver": {
			backenderr.CapacityExhausted,
			func(s *site) { script(s.driver, &s.driver.provision, full) },
			func(s *site) { script(s.driver, &s.driver.provision, nil) },
		},
		"not satisfiable": {
			backenderr.GrantNotSatisfiable,
			func(s *site) {
				script(s.driver, &s.driver.satisfies, func(backend.Grant) (backend.Satisfaction, error) { return backend.Satisfaction{Reason: "no"}, nil })
			},
			func(s *site) { script(s.driver, &s.driver.satisfies, nil) },
		},
		"draining": {
			backenderr.WorkerFull,
			func(s *site) { s.SetDraining(true) },
			func(s *site) { s.SetDraining(false) },
		},
	}
	for name, c := range refusals {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := running(t, nil)
				g, e := grantFor(t, 1)
				c.set(s)
				_, err := s.Provision(fenced(t, 3), g, e)
				wantRefused(t, err, c.reason, backenderr.CreatedNone, 3)
				c.clear(s)
				s.stop()
				s.start()
				s.run()
				for _, late := range []uint64{1, 3} {
					_, err = s.Provision(fenced(t, late), g, e)
					wantRefused(t, err, backenderr.OperationInProgress, backenderr.CreatedNone, 3)
				}
				if n := s.driver.count("provision"); n != 0 {
					t.Errorf("the driver was asked %d times for a call that is refused", n)
				}
				if _, err = s.Provision(fenced(t, 4), g, e); err != nil {
					t.Fatalf("a call under a new placement: %v", err)
				}
				// There is an instance now, of a later call: nobody may think there is none.
				_, err = s.Provision(fenced(t, 3), g, e)
				wantRefused(t, err, backenderr.OperationInProgress, backenderr.CreatedUnknown, 3)
			})
		})
	}
}

// Without a fence nothing is recorded and nothing is said of it.
func TestACallWithoutAFenceIsRefusedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		script(s.driver, &s.driver.provision, full)
		_, err := s.Provision(as(t, alice), g, e)
		wantRefused(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone, 0)
		script(s.driver, &s.driver.provision, nil)
		if _, err := s.Provision(as(t, alice), g, e); err != nil {
			t.Fatal(err)
		}
	})
}

// The late call is past the first check, and at the driver, when the other one
// is refused: the attempt does not begin.
func TestACallThatIsOvertakenByARefusalBeginsNoAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		arrived, goOn := make(chan struct{}), make(chan struct{})
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			arrived <- struct{}{}
			<-goOn
			return s.driver.make(ctx, o)
		})
		late := s.begin(fenced(t, 1), g, e)
		<-arrived
		// As another replica on the same ledger refuses.
		if _, err := s.config.Ledger.RefuseAttempts(t.Context(), ledger.RequestID(g.ID), 1); err != nil {
			t.Fatal(err)
		}
		// One that comes under a new placement joins, and is none the worse for it.
		fresh := s.begin(fenced(t, 2), g, e)
		synctest.Wait()
		close(goOn)
		wantRefused(t, (<-late).err, backenderr.OperationInProgress, backenderr.CreatedNone, 1)
		<-arrived
		if o := <-fresh; o.err != nil || o.p.Instance.Attempt != 1 {
			t.Errorf("the later call: attempt %d, %v", o.p.Instance.Attempt, o.err)
		}
	})
}

// While an attempt may still make something, no refusal says that there is
// nothing.
func TestARefusalWithAnOpenAttemptIsUnclear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			if _, err := s.driver.make(ctx, o); err != nil {
				return Ready{}, err
			}
			return full(ctx, o) // And leaves its attempt open.
		})
		_, err := s.Provision(fenced(t, 1), g, e)
		wantRefused(t, err, backenderr.CapacityExhausted, backenderr.CreatedUnknown, 0)
	})
}

func TestARefusalThatCanNotBeRecordedIsUnclear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		var unlock func()
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			unlock = lockLedger(t, s.path)
			return full(ctx, o)
		})
		_, err := s.Provision(fenced(t, 1), g, e)
		wantRefused(t, err, backenderr.CapacityExhausted, backenderr.CreatedUnknown, 0)
		unlock()
		script(s.driver, &s.driver.provision, nil)
		if _, err := s.Provision(fenced(t, 1), g, e); err != nil {
			t.Errorf("the same call again: %v", err)
		}
	})
}

// An attempt may have failed before the caller who began it looks again.
func TestACallerIsToldOfTheAttemptThatItBegan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		script(s.driver, &s.driver.provision, full)
		claim, err := s.claimed(as(t, alice), alice, g, e)
		if err != nil {
			t.Fatal(err)
		}
		k, joined, err := s.provisioner(t.Context(), claim)
		if err != nil {
			t.Fatal(err)
		}
		<-k.done
		_, err = k.join(t.Context(), joined)
		wantReason(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		// Others come after it, to the next attempt.
		if _, err := k.join(t.Context(), false); !errors.Is(err, errLeaving) {
			t.Errorf("who comes after the attempt: %v, want %v", err, errLeaving)
		}
	})
}
