// Package backend is the Backend contract in Go: the domain types and the
// interface that every place which can run grants implements, whether it is a
// driver in this process, a worker behind gRPC or a router.
//
// The interface mirrors proto/computebridge/v1/backend.proto one to one; the
// header of that file is the specification. The types here are independent of
// the wire format; package backendgrpc converts.
//
// Implementations don't share data with their callers: what is passed in or
// returned may be changed by its receiver.
package backend

import (
	"context"
	"time"
)

// Backend is one kind of place that can run grants.
//
// All methods are safe for concurrent use. Every error is, or wraps, a
// *backenderr.Error; one that isn't counts as unclassified, with the outcome
// unknown.
type Backend interface {
	// Name returns the backend's name, [a-z][a-z0-9-]*, at most 32 bytes. It
	// never changes while the process lives.
	Name(ctx context.Context) (string, error)

	// Capabilities returns what the backend can do now: regions, isolation,
	// declared, free and largest single resources. It makes no change anywhere.
	// A backend that can't see its provider answers with its last knowledge and
	// Stale set.
	Capabilities(ctx context.Context) (Capabilities, error)

	// CanSatisfy answers whether Provision would succeed on an idle provider.
	// It is pure and fast. A backend says yes to a grant that it already holds.
	CanSatisfy(ctx context.Context, grant Grant) (Satisfaction, error)

	// Provision makes the grant's instance and blocks until it is ready.
	//
	// It is idempotent by grant id: the same content again returns the same
	// instance, other content GRANT_CONFLICT, and a grant that has ended
	// GRANT_ENDED. When ctx ends first, the attempt is undone.
	Provision(ctx context.Context, grant Grant, envelope Envelope) (Provisioned, error)

	// WatchUntilExit reports the grant's events to emit, one at a time, and
	// returns after the one that carries the final compute log. The first event
	// is the present state. An error of emit ends the watch and is returned. It
	// may be called by any number of watchers, also after the end.
	WatchUntilExit(ctx context.Context, handle Handle, emit func(Event) error) error

	// Terminate ends the grant for good. It blocks until the provider confirms
	// that nothing is left and then answers StateTerminated, or until ctx nears
	// its deadline and then answers StateTerminating. It is idempotent.
	Terminate(ctx context.Context, handle Handle) (Termination, error)
}

// Inventory is what a worker's runtime needs of a driver beside the contract.
type Inventory interface {
	// List returns what the provider really holds for this bridge, instances
	// that are half made or half deleted included, read from the provider and
	// not from memory. If any part of it can't be read, List fails with
	// PROVIDER_UNAVAILABLE or names the blind part in Listing.Blind; nothing is
	// deleted because it is missing from a blind part.
	List(ctx context.Context) (Listing, error)
}

// Listing is what a provider holds for one bridge.
type Listing struct {
	// Resources, sorted by grant and attempt.
	Resources []Resource
	// Blind names the parts of the provider (hosts, regions) that could not be
	// read.
	Blind []string
}

// Resource is everything that a provider holds for one attempt of one grant.
type Resource struct {
	GrantID GrantID
	Attempt uint32
	// InstanceID is the provider's own name.
	InstanceID InstanceID
	// Placement is the host or region it is in.
	Placement string
	// Running says that the instance itself runs; false for left-over parts.
	Running bool
	// CreatedAt is when the provider says it was made, zero if it doesn't.
	CreatedAt time.Time
	// ValidTo is the deadline that the resource itself carries, zero if none.
	ValidTo time.Time
}

// Satisfaction answers CanSatisfy.
type Satisfaction struct {
	Satisfiable bool
	// Reason says why not, for people.
	Reason string
}

// Provisioned is a ready instance with what its requester needs to log in.
type Provisioned struct {
	Instance Instance
	Receipt  Receipt
}

// Termination says how far Terminate got.
type Termination struct {
	// State is StateTerminating or StateTerminated.
	State State
	// Log is the compute log; final with StateTerminated if the grant ever ran,
	// nil if there is none.
	Log *SignedLog
}

// Event is one thing that happened to a grant. Exactly one of Instance, Usage,
// Heartbeat and Log is set.
type Event struct {
	At time.Time
	// Instance as it is now: the first event, and each change of state.
	Instance *Instance
	// Usage so far.
	Usage *SignedLog
	// Heartbeat says that nothing happened and the watch lives.
	Heartbeat bool
	// Log is the final compute log; the last event.
	Log *SignedLog
}
