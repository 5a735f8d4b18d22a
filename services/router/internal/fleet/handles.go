package fleet

import (
	"context"
	"fmt"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// WatchUntilExit implements [backend.Backend]: at the member that the handle
// names, or, without a name, that has the claim.
func (f *Fleet) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	if err := checkHops(ctx); err != nil {
		return err
	}
	id, err := grantOf(handle)
	if err != nil {
		return err
	}
	name, rest, ok := handle.Split()
	if !ok {
		claim, err := f.claims.Get(ctx, id)
		if err != nil {
			return ledgerError(err)
		}
		name, rest = claim.Backend, handle
	}
	m, ok := f.byName[name]
	if !ok {
		return noSuchBackend(handle)
	}
	var emitted error
	err = m.Backend.WatchUntilExit(ctx, rest, func(e backend.Event) error {
		if e.Instance != nil {
			instance := *e.Instance
			instance.Handle = instance.Handle.Via(m.Name)
			e.Instance = &instance
		}
		emitted = emit(e)
		return emitted
	})
	switch {
	case err == nil:
		return nil
	case emitted != nil:
		return emitted
	}
	return m.fails(err)
}

// Terminate implements [backend.Backend]: at the member that the handle names,
// and at the one that has the claim if that is another. Without a name or a
// claim nobody knows, and it is ended everywhere.
func (f *Fleet) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	if err := checkHops(ctx); err != nil {
		return backend.Termination{}, err
	}
	id, err := grantOf(handle)
	if err != nil {
		return backend.Termination{}, err
	}
	name, rest, named := handle.Split()
	if named && f.byName[name] == nil {
		return backend.Termination{}, noSuchBackend(handle)
	}
	// First the closure, so that no Provision of ours starts it again. A ledger
	// that can't be reached keeps nothing from ending: the worker closes the
	// grant, too, and checks the owner, too.
	claim, ledgerErr := f.claims.Get(ctx, id)
	if ledgerErr == nil && claim.Backend != "" && !mine(ctx, claim) {
		return backend.Termination{}, backenderr.New(backenderr.CallerDenied, "the grant belongs to another client").WithCreated(backenderr.CreatedNone)
	}
	if ledgerErr == nil {
		ledgerErr = f.claims.Close(ctx, id, backend.CallerFrom(ctx).Identity)
	}
	if ledgerErr != nil {
		f.log.WarnContext(ctx, "Could not record the end of a grant, ending it all the same", "grant_id", id.String(), "error", ledgerErr)
	}
	var result backend.Termination
	for _, m := range f.members {
		at := backend.HandleFor(id)
		switch {
		case named && m.Name == name:
			at = rest
		case m.Name == claim.Backend:
		case named || claim.Backend != "":
			continue
		}
		t, err := m.Backend.Terminate(ctx, at)
		if err != nil {
			return backend.Termination{}, m.fails(err)
		}
		if t.State == backend.StateTerminated {
			f.freed(m)
		}
		// Terminated only when all are.
		if result.State == 0 || t.State == backend.StateTerminating {
			result.State = t.State
		}
		if t.Log != nil {
			result.Log = t.Log
		}
	}
	if claim.Backend != "" && f.byName[claim.Backend] == nil {
		return backend.Termination{}, notConfigured(claim)
	}
	return result, nil
}

// grantOf returns the grant that a well-formed handle names.
func grantOf(handle backend.Handle) (backend.GrantID, error) {
	id, err := handle.GrantID()
	name, rest, routed := handle.Split()
	for ; err == nil && routed; name, rest, routed = rest.Split() {
		if !backend.ValidName(name) {
			err = fmt.Errorf("%q is not the name of a backend", name)
		}
	}
	if err != nil {
		return backend.GrantID{}, backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{Field: "handle", Description: err.Error()})
	}
	return id, nil
}

func noSuchBackend(h backend.Handle) error {
	return backenderr.New(backenderr.InstanceNotFound, "the handle %q names no backend of this router", h).WithCreated(backenderr.CreatedNone)
}
