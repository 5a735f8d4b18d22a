package worker

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// Driver is what a worker knows about its own kind of place: the verbs of the
// Backend contract at the provider's level. [Runtime] makes a backend.Backend
// of it and does everything else once for all: validation, claims, single
// flight per grant, closures, deadlines, login keys, receipts, watchers,
// compute logs, sweep.
//
// The runtime calls Provision for one grant by one goroutine at a time and
// never at the same time as Terminate for it; everything else is concurrent.
// Errors are *backenderr.Error; others count as Unknown. A panic in one of these
// calls counts as INTERNAL with nothing known of what exists; goroutines of the
// driver's own have to look after themselves.
type Driver interface {
	// Capabilities returns what the provider can do now, from what the driver
	// has observed; it answers at once. The runtime fills in Backend, LogKeys
	// and Draining.
	Capabilities(ctx context.Context) (backend.Capabilities, error)

	// CanSatisfy answers for an idle provider, without writing anything. The
	// grant is valid.
	CanSatisfy(ctx context.Context, grant backend.Grant) (backend.Satisfaction, error)

	// Provision makes the grant's instance and blocks until SSH answers with
	// the expected host key.
	//
	// It must record each attempt by Journal.Begin before it sends anything
	// that creates, send the attempt's stored parameters, adopt what already
	// exists under the attempt's name, and call Journal.Gone only when the
	// attempt is confirmed gone. When it fails, or ctx ends, it cleans up what
	// it made and says by the error's Created whether that is confirmed.
	// Clean-up runs on a context of its own with a time limit.
	Provision(ctx context.Context, order Order) (Ready, error)

	// Watch blocks until the grant's instance no longer runs, and says why. It
	// re-attaches to an instance that an earlier process started. It reports
	// usage so far to usage from time to time, if the provider offers that for
	// little. A lost connection is no end: Watch waits until it can see again.
	// An instance that isn't there at all is INSTANCE_NOT_FOUND.
	Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error)

	// Terminate deletes everything of all attempts of the grant and blocks
	// until the provider confirms, or ctx ends. It is idempotent, and must read
	// the provider before it says that there is nothing.
	//
	// Before it deletes the last place where the provider keeps the usage, it
	// hands what it read to Journal.SaveLog. It returns that log again when it
	// is called once more; nil if the grant never ran.
	Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error)

	// Inventory lists what really exists.
	backend.Inventory

	// Close lets go of connections. Instances keep running.
	Close() error
}

// Divided is a [Driver] of which several replicas run at the same time, each of
// which has a part of the provider: a replica acts only for grants in its part.
// While another replica has what a grant needs, every method that must act fails
// with OTHER_REPLICA, and the runtime leaves the grant alone.
type Divided interface {
	Driver

	// Elsewhere fails with OTHER_REPLICA while another replica has what holds the
	// grant's open attempt, and with LEDGER_UNAVAILABLE if that can't be found
	// out. A grant without an open attempt is anyone's, and one that nobody is
	// known to have is ours.
	Elsewhere(ctx context.Context, id backend.GrantID) error

	// Serving says why this replica has nothing to serve with, because others
	// have it all; nil if it has.
	Serving() error
}

// Replicated is a [Driver] of which several replicas run at the same time, each
// of which can act for every grant. A grant's Provision may come to one while
// another is at the same attempt, for a caller that has gone or comes no more:
// the ledger decides whose it is.
//
//   - An open attempt that Journal.Begin returns, and has not recorded itself, is
//     adopted by Journal.Resume. One that is Ending is not: its end is finished
//     first, as Terminate does it.
//   - Before Provision undoes an attempt, it says so by Journal.End. Where that
//     fails with OTHER_REPLICA another replica is at the attempt, and Provision
//     leaves it as it is and fails with that error.
//   - Terminate of a grant that isn't closed leaves an attempt alone that is open
//     and not Ending, as Journal.Attempts tells it after the provider was looked
//     at. Before the runtime has an attempt undone, it says so by Journal.End
//     itself.
//
// What its replicas ended or made, each replica's runtime follows in the ledger.
type Replicated interface {
	Driver

	// ProvisionTimeout is how long a Provision may be at an attempt, its clean-up
	// included. As long as other replicas live, an attempt that was begun or
	// resumed since is left alone, whoever died.
	ProvisionTimeout() time.Duration
}

// Order is a grant as a driver gets it.
type Order struct {
	// Grant, with its region settled: the grant's own or the envelope's hint.
	Grant backend.Grant
	// ImagePointer is the envelope's, unchecked; package imagestore checks it.
	ImagePointer string
	// LoginKey is the public key that may log in, in authorized_keys format.
	LoginKey string
	// Nonce is the requester's, for TDX evidence.
	Nonce []byte
	// Progress tells people what is being done ("sending image 40 %").
	Progress func(text string)
}

// Ready is a ready instance.
type Ready struct {
	// Instance, without Handle, Backend, Owner and State, which the runtime
	// fills in.
	Instance backend.Instance
	// Host and Port are where SSH answers, for the requester.
	Host string
	Port uint16
	// User is the login name.
	User string
	// HostKey is the instance's host key, in authorized_keys format.
	HostKey string
	// ResumedAt is the attempt's, as Provision knows it: of a [Replicated] driver,
	// for the runtime to take the instance back if nobody waits for it any more.
	ResumedAt time.Time
	// Evidence for a TDX grant.
	Evidence *backend.Evidence
}

// Env is what the runtime gives to a driver.
type Env struct {
	// BridgeID names the bridge; everything that is created carries it.
	BridgeID string
	// Backend is the backend's name.
	Backend string
	// Log is the worker's logger.
	Log *slog.Logger
	// Journal is the driver's part of the ledger.
	Journal Journal
	// HostKey returns the SSH host key of an attempt, the same each time: the
	// private key in OpenSSH PEM, the public one in authorized_keys format.
	HostKey func(id backend.GrantID, attempt uint32) (private redact.Secret, public string, err error)
	// Metrics registers the driver's own metrics.
	Metrics prometheus.Registerer
	// Janitor says that this process only sweeps, perhaps beside workers that
	// live: the driver prepares nothing for grants, Open succeeds with whatever
	// parts of the provider can be seen in time (List names the others), and
	// nothing but Terminate changes anything at the provider. A part whose clock
	// can't be believed, or that another process has for itself, counts as one
	// that can't be seen.
	Janitor bool
	// DryRun says that the janitor only looks: nothing at all may change, and
	// what another process has for itself may be looked at.
	DryRun bool
	// TookOver is for [Divided] drivers: it makes the runtime look at once for
	// grants that this replica has to keep from now on. It doesn't block.
	TookOver func()
}

// Journal is what no provider remembers, kept in the ledger.
type Journal interface {
	// Begin returns the grant's open attempt, with the parameters that were
	// stored when it began, or records a new one with these. It fails with
	// GRANT_ENDED once the grant is closed and with LEDGER_UNAVAILABLE if it
	// can't be recorded; in both cases nothing may be sent.
	Begin(ctx context.Context, id backend.GrantID, placement string, params []byte) (Attempt, error)

	// Resume adopts an open attempt that this call has not begun, and returns it
	// as it is then: whoever else was at it leaves it alone from now on, if it is
	// still there to adopt. It fails with OPERATION_IN_PROGRESS if the attempt is
	// being ended or is gone, and with GRANT_ENDED once the grant is closed. It is
	// for [Replicated] drivers.
	Resume(ctx context.Context, id backend.GrantID, attempt uint32) (Attempt, error)

	// End says that an attempt, as Begin or Resume returned it, is undone from now
	// on: nobody resumes it any more or answers with it. It fails with
	// OTHER_REPLICA if somebody has resumed it since; nothing of it may be touched
	// then. It is idempotent, and doesn't fail for an attempt that is gone or of a
	// grant that is closed. It is for [Replicated] drivers.
	End(ctx context.Context, a Attempt) error

	// Check fails with GRANT_ENDED once the grant is closed. Drivers ask before
	// each further call that creates.
	Check(ctx context.Context, id backend.GrantID) error

	// Gone records that the provider confirmed that nothing of the attempt is
	// left. It is idempotent.
	Gone(ctx context.Context, id backend.GrantID, attempt uint32) error

	// Attempts returns all attempts of a grant in order.
	Attempts(ctx context.Context, id backend.GrantID) ([]Attempt, error)

	// Open returns the attempts of all grants that aren't known to be gone.
	Open(ctx context.Context) ([]Attempt, error)

	// SaveLog keeps what was read about an instance's end until the final
	// compute log is written. A partial account never replaces a full one of
	// the same attempt.
	SaveLog(ctx context.Context, log backend.ComputeLog) error

	// SavedLog returns what SaveLog kept, nil if nothing.
	SavedLog(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error)
}

// Attempt is one try to make a grant's instance.
type Attempt struct {
	GrantID backend.GrantID
	// Number counts from 1.
	Number uint32
	// Placement is the host or region that the driver chose.
	Placement string
	// Params are the driver's own rendered parameters.
	Params []byte
	// BeganAt is when the intent was recorded.
	BeganAt time.Time
	// ResumedAt is when it was resumed last, zero if it never was.
	ResumedAt time.Time
	// Ending is set once somebody has said that it is undone.
	Ending bool
	// Gone is set once the attempt is confirmed gone.
	Gone bool
	// New is set by Begin for the attempt that this very call recorded.
	New bool
}
