package workers

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// scripted answers each call with the next of its script.
type scripted struct {
	backend.Backend

	script []func(emit func(backend.Event) error) error
	calls  int
}

func (s *scripted) next(emit func(backend.Event) error) error {
	f := s.script[min(s.calls, len(s.script)-1)]
	s.calls++
	return f(emit)
}

func (s *scripted) Provision(context.Context, backend.Grant, backend.Envelope) (backend.Provisioned, error) {
	return backend.Provisioned{}, s.next(nil)
}

func (s *scripted) Terminate(context.Context, backend.Handle) (backend.Termination, error) {
	return backend.Termination{}, s.next(nil)
}

func (s *scripted) WatchUntilExit(_ context.Context, _ backend.Handle, emit func(backend.Event) error) error {
	return s.next(emit)
}

func fails(reason backenderr.Reason, states ...backend.State) func(func(backend.Event) error) error {
	return func(emit func(backend.Event) error) error {
		for _, state := range states {
			if err := emit(backend.Event{Instance: &backend.Instance{State: state}}); err != nil {
				return err
			}
		}
		if reason == "" {
			return nil
		}
		return backenderr.New(reason, "scripted")
	}
}

type script = []func(func(backend.Event) error) error

func TestTheOtherReplicaIsAskedForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := fails(backenderr.OtherReplica)
		s := &scripted{script: script{other, other, other, fails("")}}
		r := &replicated{Backend: s, log: slog.New(slog.DiscardHandler)}
		if _, err := r.Provision(t.Context(), backend.Grant{}, backend.Envelope{}); err != nil || s.calls != 4 {
			t.Errorf("Provision: %v after %d calls", err, s.calls)
		}
		s.calls = 0
		if _, err := r.Terminate(t.Context(), ""); err != nil || s.calls != 4 {
			t.Errorf("Terminate: %v after %d calls", err, s.calls)
		}
		// Not for ever, and nothing else is repeated here.
		s.script, s.calls = script{other}, 0
		began := time.Now()
		if _, err := r.Provision(t.Context(), backend.Grant{}, backend.Envelope{}); !backenderr.Is(err, backenderr.OtherReplica) {
			t.Error(err)
		}
		if took := time.Since(began); took > replicaPatience || took < replicaPatience/2 {
			t.Errorf("asked for %s", took)
		}
		s.script, s.calls = script{fails(backenderr.Unknown), fails("")}, 0
		if _, err := r.Provision(t.Context(), backend.Grant{}, backend.Envelope{}); !backenderr.Is(err, backenderr.Unknown) || s.calls != 1 {
			t.Errorf("%v after %d calls", err, s.calls)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s.script, s.calls, began = script{other}, 0, time.Now()
		if _, err := r.Provision(ctx, backend.Grant{}, backend.Envelope{}); err == nil || time.Since(began) > time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

func TestABrokenWatchGoesOnElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{script: script{
			fails(backenderr.OtherReplica),
			fails(backenderr.BackendUnreachable, backend.StateReady),
			fails(backenderr.OtherReplica),
			fails(backenderr.ProviderUnavailable, backend.StateReady),
			fails("", backend.StateReady, backend.StateTerminating, backend.StateTerminated),
		}}
		r := &replicated{Backend: s, log: slog.New(slog.DiscardHandler)}
		var states []backend.State
		err := r.WatchUntilExit(t.Context(), "", func(e backend.Event) error {
			states = append(states, e.Instance.State)
			return nil
		})
		if diff := cmp.Diff([]backend.State{backend.StateReady, backend.StateTerminating, backend.StateTerminated}, states); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
		// A backend that was never reached is said at once.
		s.script, s.calls = script{fails(backenderr.BackendUnreachable)}, 0
		began := time.Now()
		if err := r.WatchUntilExit(t.Context(), "", func(backend.Event) error { return nil }); !backenderr.Is(err, backenderr.BackendUnreachable) || time.Since(began) > 0 {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		// One whose connection ends before the first event is asked again while it
		// can be reached.
		ended := func(func(backend.Event) error) error {
			return backenderr.From(status.Error(codes.Unavailable, "received prior goaway"))
		}
		s.script, s.calls = script{ended, ended, fails("", backend.StateReady)}, 0
		down := true
		r.down = func() bool { return down }
		if err := r.WatchUntilExit(t.Context(), "", func(backend.Event) error { return nil }); !backenderr.Is(err, backenderr.BackendUnreachable) || s.calls != 1 {
			t.Errorf("%v after %d calls", err, s.calls)
		}
		s.calls, down = 0, false
		if err := r.WatchUntilExit(t.Context(), "", func(backend.Event) error { return nil }); err != nil || s.calls != 3 {
			t.Errorf("%v after %d calls", err, s.calls)
		}
		began = time.Now()
		// One that doesn't come back is said some day.
		s.script, s.calls = script{fails(backenderr.BackendUnreachable, backend.StateReady), fails(backenderr.BackendUnreachable)}, 0
		if err := r.WatchUntilExit(t.Context(), "", func(backend.Event) error { return nil }); !backenderr.Is(err, backenderr.BackendUnreachable) ||
			time.Since(began) > replicaPatience {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}
