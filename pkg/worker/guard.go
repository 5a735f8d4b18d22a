package worker

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// guarded is a driver whose panics are errors. The runtime calls a driver in
// goroutines of its own, where a panic would end the process, and with it the
// watching of all other grants: and again after each restart, if it is one grant
// that brings it about. What the runtime does about an error is right for a
// panic, too: it watches again, goes on ending, counts what was made as unknown.
type guarded struct {
	Driver
	log *slog.Logger
}

// guardedDivided is a guarded [Divided].
type guardedDivided struct {
	guarded
	divided Divided
}

var _ Divided = guardedDivided{}

// guardedReplicated is a guarded [Replicated].
type guardedReplicated struct {
	guarded
	replicated Replicated
}

var _ Replicated = guardedReplicated{}

// guard returns a driver whose panics are errors, divided or replicated if d is.
func guard(d Driver, log *slog.Logger) Driver {
	switch d := d.(type) {
	case Divided:
		return guardedDivided{guarded{d, log}, d}
	case Replicated:
		return guardedReplicated{guarded{d, log}, d}
	}
	return guarded{d, log}
}

// caught, when deferred, makes an error of a panic. What it says goes to the log,
// for it may hold anything.
func (g guarded) caught(ctx context.Context, method string, id backend.GrantID, err *error) { //nolint:gocritic // It sets what the function that defers it returns.
	p := recover()
	if p == nil {
		return
	}
	log := g.log
	if id != (backend.GrantID{}) {
		log = log.With("grant_id", id.String())
	}
	log.ErrorContext(ctx, "Panic in driver", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	*err = backenderr.New(backenderr.Internal, "the driver's %s panicked; the worker's log has more", method).WithCreated(backenderr.CreatedUnknown)
}

// Capabilities implements [Driver].
func (g guarded) Capabilities(ctx context.Context) (_ backend.Capabilities, err error) {
	defer g.caught(ctx, "Capabilities", backend.GrantID{}, &err)
	return g.Driver.Capabilities(ctx)
}

// CanSatisfy implements [Driver].
func (g guarded) CanSatisfy(ctx context.Context, grant backend.Grant) (_ backend.Satisfaction, err error) {
	defer g.caught(ctx, "CanSatisfy", grant.ID, &err)
	return g.Driver.CanSatisfy(ctx, grant)
}

// Provision implements [Driver].
func (g guarded) Provision(ctx context.Context, order Order) (_ Ready, err error) {
	defer g.caught(ctx, "Provision", order.Grant.ID, &err)
	return g.Driver.Provision(ctx, order)
}

// Watch implements [Driver].
func (g guarded) Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (_ backend.Exit, err error) {
	defer g.caught(ctx, "Watch", id, &err)
	return g.Driver.Watch(ctx, id, usage)
}

// Terminate implements [Driver].
func (g guarded) Terminate(ctx context.Context, id backend.GrantID) (_ *backend.ComputeLog, err error) {
	defer g.caught(ctx, "Terminate", id, &err)
	return g.Driver.Terminate(ctx, id)
}

// List implements [Driver].
func (g guarded) List(ctx context.Context) (_ backend.Listing, err error) {
	defer g.caught(ctx, "List", backend.GrantID{}, &err)
	return g.Driver.List(ctx)
}

// Elsewhere implements [Divided].
func (g guardedDivided) Elsewhere(ctx context.Context, id backend.GrantID) (err error) {
	defer g.caught(ctx, "Elsewhere", id, &err)
	return g.divided.Elsewhere(ctx, id)
}

// Serving implements [Divided].
func (g guardedDivided) Serving() error { return g.divided.Serving() }

// ProvisionTimeout implements [Replicated].
func (g guardedReplicated) ProvisionTimeout() time.Duration { return g.replicated.ProvisionTimeout() }
