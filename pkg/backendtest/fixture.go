package backendtest

import (
	"context"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// Harness is how a backend takes part.
type Harness struct {
	// Open returns a fresh fixture. What it starts it stops by t.Cleanup; it
	// must not outlive t.
	Open func(t testing.TB) *Fixture
	// Skip maps the name of a case to the reason why it can't apply. An empty
	// reason, or a name that isn't a case's, fails.
	Skip map[string]string
	// DirectOnly leaves out the runs over gRPC, for a backend that is slow and
	// whose runtime goes over gRPC elsewhere, or that is behind gRPC already.
	DirectOnly bool
}

// Fixture is a backend on a fresh provider, with handles on both. Fields that
// are said to be optional may be left out if the cases that need them are
// excepted in [Harness.Skip].
type Fixture struct {
	// Backend is what is held to the contract. It must take the caller from
	// backend.CallerFrom: the suite plays several clients and an operator.
	Backend backend.Backend

	// Satisfiable returns a new grant that the idle backend must accept, with
	// an envelope that has an SSH key of the requester's. Each call returns
	// another id.
	Satisfiable func() (backend.Grant, backend.Envelope)
	// Unsatisfiable returns a new, well-formed grant that it must refuse.
	Unsatisfiable func() (backend.Grant, backend.Envelope)
	// Capacity is how many satisfiable grants fit at once, at least 2.
	Capacity int
	// ShortestLife is the shortest time until a deadline that the backend
	// accepts and that, on an idle machine, leaves time to provision.
	ShortestLife time.Duration

	// Patience is how long to wait for what should happen at once; 0 means
	// 20 s.
	Patience time.Duration

	// Leftovers returns everything that the provider holds for the bridge, of
	// running instances too, as the provider itself tells it.
	Leftovers func(ctx context.Context) ([]Leftover, error)
	// History returns what the provider ever made for a grant. Optional.
	History func(id backend.GrantID) History
	// Mutations counts the calls that have changed something at the provider.
	// Optional.
	Mutations func() int

	// Exit makes the workload of a ready grant end by itself. Optional.
	Exit func(id backend.GrantID, status ExitStatus) error
	// Vanish removes a ready grant's instance behind the backend's back.
	// Optional.
	Vanish func(id backend.GrantID) error

	// Interrupt has the provider take a ready grant's instance back. Optional.
	Interrupt func(id backend.GrantID) error
	// FailBoot makes the next instance's workload print console and end before
	// it is ready. Optional.
	FailBoot func(console string)
	// UsageInterval is how often a watch reports usage so far. Optional.
	UsageInterval time.Duration

	// Measures says that the provider measures what an instance uses, so that
	// the final log of a grant that nothing disturbed isn't partial.
	Measures bool

	// Inject makes the provider fail. Optional.
	Inject func(f Fault) Injection
	// ProvisionPoints are the provider calls that Provision makes for a new
	// grant, in order; CreatePoint is the one of them that creates. They come
	// with Inject.
	ProvisionPoints []string
	CreatePoint     string
	// DeletePoints are the provider calls without which nothing can be deleted.
	// They come with Inject.
	DeletePoints []string
	// ReadPoint is the provider call that reads what exists. It comes with
	// Inject.
	ReadPoint string

	// Reopen stops the backend without ending its grants and opens it again, as
	// a restart of the process does: same provider, same ledger. After a crash
	// fault the old one counts as dead. Optional.
	Reopen func(t testing.TB) backend.Backend

	// Kill makes the worker dead at once, as kill -9 does: it does nothing any
	// more, to the provider or to its ledger. Reopen then starts another.
	// Optional.
	Kill func()
	// Runs tells whether an instance of a grant runs, as the provider itself
	// knows. It comes with Kill.
	Runs func(id backend.GrantID) bool

	// Login logs in as a receipt says, with the login key in OpenSSH's format,
	// and runs a command. Optional.
	Login func(ctx context.Context, receipt backend.Receipt, key redact.Secret) error

	// Logs returns what the backend has logged so far. Optional; it is searched
	// for secrets where it is given.
	Logs func() []byte

	// Handle returns the handle of a grant that was never provisioned; nil
	// means backend.HandleFor.
	Handle func(id backend.GrantID) backend.Handle
}

// Leftover is a thing that a provider holds.
type Leftover struct {
	GrantID backend.GrantID
	Name    string
}

// History is what a provider ever made for a grant.
type History struct {
	// Created counts instances.
	Created int
	// AtOnce is how many existed at the same time, at most.
	AtOnce int
}

// ExitStatus is how a workload ends by itself.
type ExitStatus struct {
	// Code is its exit status, used when Signal is empty.
	Code int32
	// Signal ended it ("KILL").
	Signal string
}

// FaultKind is a kind of fault.
type FaultKind string

// The kinds of fault.
const (
	// FaultCapacity: the provider has no room. For CreatePoint.
	FaultCapacity FaultKind = "capacity"
	// FaultQuota: a limit of the account. For CreatePoint.
	FaultQuota FaultKind = "quota"
	// FaultDenied: the credentials lack a right.
	FaultDenied FaultKind = "denied"
	// FaultUnauthenticated: the credentials are refused.
	FaultUnauthenticated FaultKind = "unauthenticated"
	// FaultThrottled: too many calls.
	FaultThrottled FaultKind = "throttled"
	// FaultUnavailable: a server error without effect.
	FaultUnavailable FaultKind = "unavailable"
	// FaultSlow: the call hangs until the fault is released, and then goes on.
	FaultSlow FaultKind = "slow"
	// FaultLostAnswer: the call has its effect, and its answer is lost.
	FaultLostAnswer FaultKind = "lost answer"
	// FaultCrashBefore: the worker dies before the call has its effect.
	FaultCrashBefore FaultKind = "crash before"
	// FaultCrashAfter: the worker dies after the call had its effect.
	FaultCrashAfter FaultKind = "crash after"
)

// Fault is something that goes wrong at the provider.
type Fault struct {
	// Point is the provider call that it hits.
	Point string
	Kind  FaultKind
	// Always means until it is released; else it hits one call.
	Always bool
	// GrantID, if set, lets calls for other grants pass.
	GrantID backend.GrantID
}

// Injection is a fault that is waiting or at work.
type Injection interface {
	// Reached is closed once the fault has hit.
	Reached() <-chan struct{}
	// Release ends the fault.
	Release()
}

// need is an optional part of a fixture.
type need string

const (
	needHistory   need = "History"
	needMutations need = "Mutations"
	needExit      need = "Exit"
	needVanish    need = "Vanish"
	needInterrupt need = "Interrupt"
	needFailBoot  need = "FailBoot"
	needUsage     need = "UsageInterval"
	needInject    need = "Inject"
	needReopen    need = "Reopen"
	needKill      need = "Kill"
	needLogin     need = "Login"
)

func (f *Fixture) has(n need) bool {
	switch n {
	case needHistory:
		return f.History != nil
	case needMutations:
		return f.Mutations != nil
	case needExit:
		return f.Exit != nil
	case needVanish:
		return f.Vanish != nil
	case needInterrupt:
		return f.Interrupt != nil
	case needFailBoot:
		return f.FailBoot != nil
	case needUsage:
		return f.UsageInterval > 0
	case needInject:
		return f.Inject != nil && len(f.ProvisionPoints) > 0 && f.CreatePoint != "" && len(f.DeletePoints) > 0 && f.ReadPoint != ""
	case needReopen:
		return f.Reopen != nil
	case needKill:
		return f.Kill != nil && f.Runs != nil && f.Reopen != nil
	case needLogin:
		return f.Login != nil
	}
	return false
}
