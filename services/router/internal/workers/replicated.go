package workers

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

const (
	// replicaPatience is how long a call is taken from replica to replica while
	// each says that another one has what it needs: longer than it takes the
	// hosts to find out that a replica is gone, 5 s, and another one to take over.
	replicaPatience = 8 * time.Second
	// Pauses before the next replica is asked.
	minReplicaPause = 20 * time.Millisecond
	maxReplicaPause = 500 * time.Millisecond
)

// replicated is a backend of which any number of replicas may be behind the
// connection, each of which has some of the hosts.
type replicated struct {
	backend.Backend

	log *slog.Logger
	// down reports whether the backend can't be reached now.
	down func() bool
}

// Provision implements [backend.Backend].
func (r *replicated) Provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope) (p backend.Provisioned, err error) {
	err = r.ask(ctx, func() error {
		p, err = r.Backend.Provision(ctx, grant, envelope)
		return err
	})
	return p, err
}

// Terminate implements [backend.Backend].
func (r *replicated) Terminate(ctx context.Context, handle backend.Handle) (t backend.Termination, err error) {
	err = r.ask(ctx, func() error {
		t, err = r.Backend.Terminate(ctx, handle)
		return err
	})
	return t, err
}

// WatchUntilExit implements [backend.Backend]. A watch that breaks goes on at
// the replica that has the instance now, or at the same one when it is back.
func (r *replicated) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	var last backend.Instance
	var usage []byte
	var emitted error
	attached := false
	var deadline time.Time
	pause := minReplicaPause
	for {
		seen := false
		err := r.Backend.WatchUntilExit(ctx, handle, func(e backend.Event) error {
			seen = true
			// Attached again, it first says what the watcher knows.
			if i := e.Instance; i != nil && attached && i.State == last.State && i.Progress == last.Progress {
				return nil
			} else if i != nil {
				last = *i
			}
			if u := e.Usage; u != nil && attached && len(u.Body) > 0 && bytes.Equal(u.Body, usage) {
				return nil
			} else if u != nil {
				usage = u.Body
			}
			attached = true
			emitted = emit(e)
			return emitted
		})
		// A backend that was never reached is no broken watch. One whose connection
		// ended, of age perhaps, before the first event came, was reached.
		other := backenderr.Is(err, backenderr.OtherReplica)
		broke := backenderr.Is(err, backenderr.BackendUnreachable, backenderr.ProviderUnavailable) && (attached || (cutOff(err) && !r.down()))
		if err == nil || emitted != nil || ctx.Err() != nil || (!other && !broke) {
			return err
		}
		if seen || deadline.IsZero() {
			deadline, pause = time.Now().Add(replicaPatience), minReplicaPause
			r.log.InfoContext(ctx, "Attaching a watch again", "handle", string(handle), "error", err)
		}
		if !wait(ctx, &pause, deadline) {
			return err
		}
	}
}

// cutOff reports whether gRPC itself says that the backend is not available,
// rather than a process with the bridge's words.
func cutOff(err error) bool {
	cause := errors.Unwrap(backenderr.From(err))
	return cause != nil && status.Code(cause) == codes.Unavailable
}

// ask repeats a call while the replica that got it isn't the one that must act.
func (r *replicated) ask(ctx context.Context, call func() error) error {
	deadline := time.Now().Add(replicaPatience)
	pause := minReplicaPause
	for {
		err := call()
		if !backenderr.Is(err, backenderr.OtherReplica) || !wait(ctx, &pause, deadline) {
			return err
		}
	}
}

// wait pauses, longer each time, and reports whether there is time for another
// try.
func wait(ctx context.Context, pause *time.Duration, deadline time.Time) bool {
	if time.Now().Add(*pause).After(deadline) {
		return false
	}
	timer := time.NewTimer(*pause)
	defer timer.Stop()
	*pause = min(2**pause, maxReplicaPause)
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
