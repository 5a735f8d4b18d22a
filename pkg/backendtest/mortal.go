package backendtest

import (
	"context"
	"errors"
	"sync"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// mortal is what stands for the connection to a worker in process: once the
// worker is dead, its callers hear nothing more of it.
type mortal struct {
	backend.Backend
	once sync.Once
	died chan struct{}
}

func newMortal(b backend.Backend) *mortal { return &mortal{Backend: b, died: make(chan struct{})} }

// cut cuts the connection.
func (m *mortal) cut() { m.once.Do(func() { close(m.died) }) }

func (m *mortal) dead() bool {
	select {
	case <-m.died:
		return true
	default:
		return false
	}
}

var errCut = errors.New("the connection was cut")

func unreachable() error {
	return backenderr.Wrap(backenderr.BackendUnreachable, errCut, "call the worker")
}

// ask makes a call unless, or until, the worker is dead.
func ask[T any](ctx context.Context, m *mortal, call func(ctx context.Context) (T, error)) (T, error) {
	var zero T
	if m.dead() {
		return zero, unreachable()
	}
	type answer struct {
		value T
		err   error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // The dead know no callers.
	answers := make(chan answer, 1)
	go func() {
		value, err := call(ctx)
		answers <- answer{value, err}
	}()
	select {
	case a := <-answers:
		if m.dead() {
			return zero, unreachable()
		}
		return a.value, a.err
	case <-m.died:
		return zero, unreachable()
	}
}

func (m *mortal) Provision(ctx context.Context, g backend.Grant, v backend.Envelope) (backend.Provisioned, error) {
	return ask(ctx, m, func(ctx context.Context) (backend.Provisioned, error) { return m.Backend.Provision(ctx, g, v) })
}

func (m *mortal) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	_, err := ask(ctx, m, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.Backend.WatchUntilExit(ctx, h, func(event backend.Event) error {
			if m.dead() {
				return errCut
			}
			return emit(event)
		})
	})
	return err
}

func (m *mortal) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	return ask(ctx, m, func(ctx context.Context) (backend.Termination, error) { return m.Backend.Terminate(ctx, h) })
}
