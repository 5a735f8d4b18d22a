package worker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

func TestOnlyOwnerAndOperatorsTouchAGrant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e, p := s.ready()
		for name, caller := range map[string]backend.Caller{
			"another client": bob,
			"a reader":       {Identity: "alice", Role: backend.RoleReader},
			"nobody":         {},
		} {
			ctx := as(t, caller)
			_, err := s.Terminate(ctx, p.Instance.Handle)
			wantReason(t, err, backenderr.CallerDenied, backenderr.CreatedNone)
			err = s.WatchUntilExit(ctx, p.Instance.Handle, func(backend.Event) error { return nil })
			wantReason(t, err, backenderr.CallerDenied, backenderr.CreatedNone)
			_, err = s.Provision(ctx, g, e)
			if !backenderr.Is(err, backenderr.GrantConflict) {
				t.Errorf("%s gets the receipt: %v", name, err)
			}
		}
		if s.driver.count("terminate") != 0 {
			t.Error("it was torn down")
		}
		if n := len(s.Instances(as(t, bob))); n != 0 {
			t.Errorf("bob sees %d instances", n)
		}
		if log, err := s.ComputeLog(as(t, bob), g.ID); log != nil || err != nil {
			t.Errorf("bob reads %v, %v", log, err)
		}
		for _, c := range []struct {
			caller backend.Caller
			owner  string
		}{{alice, ""}, {root, "alice"}, {backend.Caller{Identity: "r", Role: backend.RoleReader}, ""}} {
			if got := s.Instances(as(t, c.caller)); len(got) != 1 || got[0].Owner != c.owner {
				t.Errorf("%s sees %+v", c.caller.Identity, got)
			}
		}
		if p, err := s.Provision(as(t, root), g, e); err != nil || p.Instance.Owner != "alice" {
			t.Errorf("an operator sees %+v, %v", p.Instance, err)
		}
		if got, err := s.Terminate(as(t, root), p.Instance.Handle); err != nil || got.State != backend.StateTerminated {
			t.Errorf("an operator's Terminate: %+v, %v", got, err)
		}
		for caller, want := range map[backend.Caller]int{alice: 1, root: 1, bob: 0} {
			if got, err := s.ComputeLogs(as(t, caller), time.Time{}, 10); err != nil || len(got) != want {
				t.Errorf("%s reads %d logs, %v; want %d", caller.Identity, len(got), err, want)
			}
		}
	})
}

func TestComputeLogsOfAClientAreFoundBeyondOnePage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		for n := range byte(9) {
			caller := bob
			if n%4 == 0 {
				caller = alice
			}
			g, e := grantFor(t, n+1)
			if _, err := s.Provision(as(t, caller), g, e); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Terminate(as(t, caller), backend.HandleFor(g.ID)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second) //nolint:forbidigo // time in a bubble
		}
		got, err := s.ComputeLogs(as(t, alice), time.Time{}, 2)
		if err != nil || len(got) != 2 || got[0].Log.GrantID != (backend.GrantID{1}) || got[1].Log.GrantID != (backend.GrantID{5}) {
			t.Errorf("got %d logs, %v", len(got), err)
		}
		service := &inventoryServer{runtime: s.Runtime}
		res, err := service.ListComputeLogs(as(t, root), &bridgev1.ListComputeLogsRequest{})
		if err != nil || len(res.GetComputeLogs()) != 9 {
			t.Errorf("without a time: %d logs, %v", len(res.GetComputeLogs()), err)
		}
		id := backend.GrantID{5}
		res, err = service.ListComputeLogs(as(t, alice), &bridgev1.ListComputeLogsRequest{RequestId: id[:]})
		if err != nil || len(res.GetComputeLogs()) != 1 {
			t.Errorf("one grant: %v, %v", res, err)
		}
	})
}

func TestDrainingTakesNothingNew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e, before := s.ready()
		s.SetDraining(true)
		if c, err := s.Capabilities(t.Context()); err != nil || !c.Draining {
			t.Errorf("capabilities: %+v, %v", c, err)
		}
		other, otherEnvelope := grantFor(t, 2)
		_, err := s.Provision(as(t, alice), other, otherEnvelope)
		wantReason(t, err, backenderr.WorkerFull, backenderr.CreatedNone)
		if backenderr.From(err).RetryAfter <= 0 {
			t.Error("without a time to retry")
		}
		if again, err := s.Provision(as(t, alice), g, e); err != nil || again.Instance.ID != before.Instance.ID {
			t.Errorf("what it holds: %v", err)
		}
		s.SetDraining(false)
		if _, err := s.Provision(as(t, alice), other, otherEnvelope); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

func TestRefusalsBeforeAnythingIsSent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		for name, c := range map[string]struct {
			prepare func(*backend.Grant, *backend.Envelope)
			reason  backenderr.Reason
		}{
			"malformed":       {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU = -1 }, backenderr.GrantInvalid},
			"too long":        {func(g *backend.Grant, _ *backend.Envelope) { g.ValidTo = time.Now().Add(32 * 24 * time.Hour) }, backenderr.GrantInvalid},
			"other images":    {func(_ *backend.Grant, e *backend.Envelope) { e.PostHash[0]++ }, backenderr.ImageMismatch},
			"not satisfiable": {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU = 4_000_000 }, backenderr.GrantNotSatisfiable},
			"driver fails":    {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU = 2_000_000 }, backenderr.ProviderUnavailable},
		} {
			script(s.driver, &s.driver.satisfies, func(g backend.Grant) (backend.Satisfaction, error) {
				switch {
				case g.Shape.CPU > 3_000_000:
					return backend.Satisfaction{Reason: "too big"}, nil
				case g.Shape.CPU > 1_500_000:
					return backend.Satisfaction{}, backenderr.New(backenderr.ProviderUnavailable, "no")
				}
				return backend.Satisfaction{Satisfiable: true}, nil
			})
			bad, badEnvelope := g, e
			c.prepare(&bad, &badEnvelope)
			_, err := s.Provision(as(t, alice), bad, badEnvelope)
			if !backenderr.Is(err, c.reason) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
				t.Errorf("%s: %v", name, err)
			}
		}
		if s.driver.count("provision") != 0 || len(s.Instances(as(t, root))) != 0 {
			t.Error("something was begun")
		}
		// A refusal leaves no trace: the grant can be sent again, mended.
		if _, err := s.Provision(as(t, alice), g, e); err != nil {
			t.Error(err)
		}
		changed := g
		changed.Shape.RAM++
		_, err := s.Provision(as(t, alice), changed, e)
		wantReason(t, err, backenderr.GrantConflict, backenderr.CreatedNone)
		if yes, err := s.CanSatisfy(t.Context(), g); err != nil || !yes.Satisfiable {
			t.Errorf("a grant that it holds: %+v, %v", yes, err)
		}
		if _, err := s.CanSatisfy(t.Context(), backend.Grant{}); !backenderr.Is(err, backenderr.GrantInvalid) {
			t.Errorf("an empty grant: %v", err)
		}
	})
}

// What one call for a grant finds out before it has claimed it says nothing about
// another call that has claimed it meanwhile.
func TestARefusalThatIsOvertakenByAClaimIsUnclear(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		asked, goOn := make(chan struct{}), make(chan struct{})
		first := true // of the two calls; the second begins when this one waits
		script(s.driver, &s.driver.satisfies, func(backend.Grant) (backend.Satisfaction, error) {
			if !first {
				return backend.Satisfaction{Satisfiable: true}, nil
			}
			first = false
			close(asked)
			<-goOn
			return backend.Satisfaction{}, backenderr.New(backenderr.ProviderUnavailable, "no answer")
		})
		overtaken := s.begin(as(t, alice), g, e)
		<-asked
		made, err := s.Provision(as(t, alice), g, e)
		if err != nil {
			t.Fatal(err)
		}
		close(goOn)
		wantReason(t, (<-overtaken).err, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)
		if again, err := s.Provision(as(t, alice), g, e); err != nil || again.Instance.ID != made.Instance.ID {
			t.Errorf("the instance afterwards: %+v, %v", again.Instance, err)
		}
	})
}

func TestHandlesOfOthersAreRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		for _, h := range []backend.Handle{"", "x", backend.HandleFor(backend.GrantID{1}).Via("site"), "../" + backend.HandleFor(backend.GrantID{1})} {
			_, err := s.Terminate(as(t, root), h)
			wantReason(t, err, backenderr.RequestInvalid, backenderr.CreatedNone)
			err = s.WatchUntilExit(as(t, root), h, func(backend.Event) error { return nil })
			wantReason(t, err, backenderr.RequestInvalid, backenderr.CreatedNone)
		}
		err := s.WatchUntilExit(as(t, root), backend.HandleFor(backend.GrantID{1}), func(backend.Event) error { return nil })
		wantReason(t, err, backenderr.InstanceNotFound, backenderr.CreatedNone)
	})
}

func TestGrantNeverSeenIsClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		script(s.driver, &s.driver.terminate, func(context.Context, backend.GrantID) (*backend.ComputeLog, error) {
			return nil, backenderr.New(backenderr.ProviderUnavailable, "blind")
		})
		_, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID))
		wantReason(t, err, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)
		script(s.driver, &s.driver.terminate, func(ctx context.Context, _ backend.GrantID) (*backend.ComputeLog, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		ctx, cancel := context.WithTimeout(as(t, alice), time.Minute)
		defer cancel()
		if got, err := s.Terminate(ctx, backend.HandleFor(g.ID)); err != nil || got.State != backend.StateTerminating {
			t.Errorf("near the deadline: %+v, %v", got, err)
		}
		script(s.driver, &s.driver.terminate, nil)
		if got, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID)); err != nil || got.State != backend.StateTerminated || got.Log != nil {
			t.Errorf("Terminate: %+v, %v", got, err)
		}
		_, err = s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedNone)
	})
}

func TestWatchersGetEveryStateAndShareNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			o.Progress("sending image 40 %")
			time.Sleep(time.Minute) //nolint:forbidigo // time in a bubble
			return s.driver.make(ctx, o)
		})
		// A state that lasts no time may be passed over.
		script(s.driver, &s.driver.terminate, func(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
			time.Sleep(time.Minute) //nolint:forbidigo // time in a bubble
			return nil, s.driver.gone(ctx, id)
		})
		g, e := grantFor(t, 1)
		call := s.begin(as(t, alice), g, e)
		synctest.Wait()
		type seen struct {
			State    backend.State
			Progress string
		}
		var states [2][]seen
		var logs [2]*backend.SignedLog
		var beats int
		done := make(chan error, 2)
		for i := range states {
			go func() {
				done <- s.WatchUntilExit(as(t, alice), backend.HandleFor(g.ID), func(e backend.Event) error {
					switch {
					case e.Instance != nil:
						if e.Instance.Owner != "" {
							t.Error("a client sees an owner")
						}
						states[i] = append(states[i], seen{e.Instance.State, e.Instance.Progress})
						e.Instance.Shape.CPU = 0
						if len(e.Instance.Ports) > 0 {
							if e.Instance.Ports[0].PublicPort != 1 {
								t.Error("watchers share the ports")
							}
							e.Instance.Ports[0].PublicPort = 99
						}
					case e.Heartbeat && i == 0:
						beats++
					case e.Log != nil:
						logs[i] = e.Log
						e.Log.Body[0]++
					}
					return nil
				})
			}()
		}
		if o := <-call; o.err != nil {
			t.Fatal(o.err)
		}
		time.Sleep(10 * time.Minute) //nolint:forbidigo // time in a bubble
		if _, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID)); err != nil {
			t.Fatal(err)
		}
		for range states {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		want := []seen{{backend.StateProvisioning, "sending image 40 %"}, {backend.StateReady, ""}, {backend.StateTerminating, ""}, {backend.StateTerminated, ""}}
		for i := range states {
			if diff := cmp.Diff(want, states[i]); diff != "" {
				t.Errorf("watcher %d (-want +got):\n%s", i, diff)
			}
		}
		if logs[0] == nil || logs[0] == logs[1] || !cmp.Equal(logs[0], logs[1]) {
			t.Error("watchers share the log, or it differs")
		}
		if beats < 20 {
			t.Errorf("%d heartbeats in 10 minutes", beats)
		}
		// After the end: state and log.
		var after []backend.Event
		if err := s.WatchUntilExit(as(t, alice), backend.HandleFor(g.ID), func(e backend.Event) error {
			after = append(after, e)
			return nil
		}); err != nil || len(after) != 2 || after[0].Instance.State != backend.StateTerminated || after[1].Log == nil {
			t.Errorf("after the end: %+v, %v", after, err)
		}
		if s.driver.count("terminate") != 1 {
			t.Error("a watch tore down")
		}
	})
}

func TestWatchEndsWithItsCallerAndItsEmit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		_, _, p := s.ready()
		stop := errors.New("enough")
		if err := s.WatchUntilExit(as(t, alice), p.Instance.Handle, func(backend.Event) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(as(t, alice))
		time.AfterFunc(time.Minute, cancel)
		began := time.Now()
		err := s.WatchUntilExit(ctx, p.Instance.Handle, func(backend.Event) error { return nil })
		if !errors.Is(err, context.Canceled) || time.Since(began) != time.Minute {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		if s.driver.count("terminate") != 0 {
			t.Error("a watcher that goes ends the grant")
		}
	})
}
