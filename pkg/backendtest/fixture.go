package backendtest

import (
	"context"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
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
	// Only, if not empty, are the groups of cases to run ("crash", "faults"):
	// the part of a name before the slash. It is for a run that takes more
	// time, beside one that has all cases.
	Only []string
	// Sweep bounds the cases that do something at every call. The zero value
	// takes all calls.
	Sweep Sweep
}

// Sweep says which of the calls that a clean run recorded are swept: which of
// them the worker is killed at, or which fail. What is left out is counted and
// told.
type Sweep struct {
	// Sample is how many runs each case makes, chosen at random from all calls
	// and all that may go wrong at each; 0 means all.
	Sample int
	// Seed makes a random choice again; 0 means another one each time. Failures
	// tell it.
	Seed uint64
	// MutatingOnly leaves out the calls that only read.
	MutatingOnly bool
	// Parallel is how many fixtures a sweep uses at the same time, for
	// backends whose fixtures don't share hosts; 0 means 1.
	Parallel int
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

	// Reconnects is how long the backend may take to be of use again after a lost
	// answer, which costs it its connection to the provider: until then calls may
	// be told so. 0 means that it loses none.
	Reconnects time.Duration

	// Patience is how long to wait for what should happen at once; 0 means
	// 2 min.
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

	// Record writes down the calls that the worker makes for a grant to its
	// provider and to its ledger, from now on until stop, which returns them in
	// the order in which they began. The zero id means all calls, those that
	// are for no grant in particular, such as listings, among them. It comes
	// with Inject.
	//
	// A call that doesn't tell for whom it is counts for every grant that it
	// may be for: a fixture whose worker looks around in the background does
	// best to have it look seldom.
	Record func(id backend.GrantID) (stop func() []Call)
	// Inject makes a call fail, or the worker die at it. Optional.
	Inject func(f Fault) Injection
	// Faults returns which faults can hit a call, and as what reasons
	// Provision may tell each of them when it stays. nil means [DefaultFaults].
	// Crashes are always possible.
	Faults func(c Call) map[FaultKind][]backenderr.Reason
	// CreatePoint is the provider call that creates. It comes with Inject.
	CreatePoint string
	// ReadPoint is the provider call that reads what exists. It comes with
	// Inject.
	ReadPoint string

	// Reopen stops the backend without ending its grants and opens it again, as
	// a restart of the process does: same provider, same ledger. After Kill, and
	// after a crash fault, the old one is dead already. An error says that the
	// new one didn't come up, as when a fault hits what it does at first; the
	// next Reopen is another try then. Optional.
	Reopen func(t testing.TB) (backend.Backend, error)

	// Kill makes the worker dead at once, as kill -9 does: it does nothing any
	// more, to the provider or to its ledger, and answers nobody. What it had
	// sent may still have its effect. Reopen then starts another. Optional.
	Kill func()
	// OrphanAge is how long after its beginning the worker by itself undoes an
	// attempt that was cut off and that nobody asks for any more. Optional: the
	// cases that need it wait so long, so it should be short.
	OrphanAge time.Duration
	// Plant puts something at the provider behind the worker's back, which its
	// ledger knows nothing of. Optional.
	Plant func(ctx context.Context, p Planted) error
	// Uproot removes what Plant put there.
	Uproot func(ctx context.Context, p Planted) error

	// CloseGrant closes a grant in the worker's ledger behind its back, as another
	// process of the same bridge does: a replica that was asked to Terminate, or
	// the janitor. Optional.
	CloseGrant func(ctx context.Context, id backend.GrantID) error

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

// Side is whom the worker calls.
type Side string

// The sides.
const (
	SideProvider Side = "provider"
	SideLedger   Side = "ledger"
)

// Call is one call that the worker made.
type Call struct {
	Side Side
	// Point names what is called: "create", "ledger.PutClaim". It is the same
	// in every run.
	Point string
	// Mutates says that the call changes something, or would if there were
	// something to change.
	Mutates bool
	// Varies says that time or chance decide how often the call is made, as a
	// poll is. Sweeps take its first two, and another run may make fewer.
	Varies bool
}

// Fault is something that goes wrong with a call.
type Fault struct {
	// Side is whose call it hits; empty means the provider's.
	Side Side
	// Point is the call that it hits.
	Point string
	// Nth is which of the calls it hits first, from 1, counted from Inject on;
	// 0 means 1. Those calls count that Record would write down for GrantID.
	Nth  int
	Kind FaultKind
	// Always means that it hits all calls from the Nth on until it is released;
	// else it hits one.
	Always bool
	// GrantID, if set, lets calls pass that are for other grants or, where a
	// call tells for whom it is, for none in particular.
	GrantID backend.GrantID
}

// Planted is something that a worker without its ledger might have left.
type Planted struct {
	GrantID backend.GrantID
	// Bridge is whose it is; empty means the fixture's own.
	Bridge string
	// ValidTo is the deadline that it carries. The platform doesn't enforce it.
	ValidTo time.Time
}

// Injection is a fault that is waiting or at work. Its methods may be called by
// several goroutines.
type Injection interface {
	// Reached is closed once the fault has hit. With a crash the worker is dead
	// by then: before the call had its effect, or after.
	Reached() <-chan struct{}
	// Release ends the fault: what hangs goes on, and nothing is hit any more. A
	// crash that has begun is over when it returns, so that Reached is closed by
	// then or never will be. It may be called again, and must be called in the end.
	Release()
}

// DefaultFaults is [Fixture.Faults] of a provider whose every call may be
// refused in every way, and of a ledger that may be out of reach.
func DefaultFaults(createPoint string) func(Call) map[FaultKind][]backenderr.Reason {
	return func(c Call) map[FaultKind][]backenderr.Reason {
		if c.Side == SideLedger {
			unavailable := []backenderr.Reason{backenderr.LedgerUnavailable}
			return map[FaultKind][]backenderr.Reason{
				FaultUnavailable: unavailable, FaultLostAnswer: unavailable,
				FaultSlow: {backenderr.DeadlineExceeded, backenderr.LedgerUnavailable},
			}
		}
		unavailable := []backenderr.Reason{backenderr.ProviderUnavailable, backenderr.BootTimeout}
		faults := map[FaultKind][]backenderr.Reason{
			FaultDenied:          {backenderr.ProviderDenied},
			FaultUnauthenticated: {backenderr.ProviderUnauthenticated},
			FaultThrottled:       unavailable,
			FaultUnavailable:     unavailable,
			FaultLostAnswer:      unavailable,
			FaultSlow:            {backenderr.DeadlineExceeded, backenderr.BootTimeout},
		}
		if c.Point == createPoint {
			faults[FaultCapacity] = []backenderr.Reason{backenderr.CapacityExhausted}
			faults[FaultQuota] = []backenderr.Reason{backenderr.QuotaExceeded}
		}
		return faults
	}
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
	needOrphanAge need = "OrphanAge"
	needPlant     need = "Plant"
	needClose     need = "CloseGrant"
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
		return f.Inject != nil && f.Record != nil && f.CreatePoint != "" && f.ReadPoint != ""
	case needReopen:
		return f.Reopen != nil
	case needKill:
		return f.Kill != nil && f.Runs != nil && f.Reopen != nil
	case needOrphanAge:
		return f.OrphanAge > 0
	case needPlant:
		return f.Plant != nil && f.Uproot != nil
	case needLogin:
		return f.Login != nil
	case needClose:
		return f.CloseGrant != nil
	}
	return false
}
