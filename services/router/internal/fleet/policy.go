package fleet

import (
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// action is what the fleet does with a Provision that failed.
type action int

const (
	// answer: the error is the grant's own; no other backend would do better.
	answer action = iota
	// next: this backend does not take the grant, another one may.
	next
	// again: the same backend is asked again, with the same grant, and only
	// when it goes on failing another one.
	again
	// attach: the backend is busy with this very grant; asking again joins.
	attach
)

// memory is what the fleet remembers of a failure, for grants to come.
type memory int

const (
	// nothing is remembered.
	nothing memory = iota
	// full: what was asked for is unavailable there for a while.
	full
	// degraded: an operator should look; shown until a Provision succeeds.
	degraded
)

// rule is one row of the error table.
type rule struct {
	then     action
	remember memory
}

// rules is the error table of the router: what it does when Provision fails at
// a backend, by reason. It holds as it stands for created=none. With
// created=unknown nothing is safe but the same backend: rows that say next are
// then treated as again, and before another backend gets the grant, Terminate
// must have confirmed that nothing is left at this one. A claim that another
// call made moves on by a row that says next with created=none, from a backend
// that has looked (see blind), and by nothing else. Without fall-through no
// claim moves; the error is answered.
//
// docs/errors.md shows the same table to operators.
var rules = map[backenderr.Reason]rule{
	// The grant is wrong, or over, wherever it goes.
	backenderr.GrantInvalid:  {answer, nothing},
	backenderr.ImageMismatch: {answer, nothing},
	backenderr.GrantConflict: {answer, nothing},
	backenderr.GrantEnded:    {answer, nothing}, // But see search.gaveUp.

	// Not here; perhaps elsewhere.
	backenderr.GrantNotSatisfiable: {next, nothing},

	// Not here now.
	backenderr.CapacityExhausted: {next, full},
	backenderr.QuotaExceeded:     {next, full},
	backenderr.WorkerFull:        {next, full},

	// Not here until an operator has done something.
	backenderr.ProviderDenied:          {next, degraded},
	backenderr.ProviderUnauthenticated: {next, degraded},
	backenderr.ClockSkew:               {next, degraded},
	backenderr.HostUnfit:               {next, degraded},
	// The worker does not know this router.
	backenderr.CallerUnauthenticated: {next, degraded},

	// Nobody knows; the same backend can find out.
	backenderr.ProviderUnavailable: {again, nothing},
	backenderr.LedgerUnavailable:   {again, nothing},
	backenderr.BackendUnreachable:  {again, nothing},
	backenderr.OtherReplica:        {again, nothing}, // After package workers has asked for a while.
	backenderr.Unknown:             {again, nothing},
	// Of the backend, while the caller's own call lives: a proxy's time limit,
	// or a worker that stops.
	backenderr.Cancelled:        {again, nothing},
	backenderr.DeadlineExceeded: {again, nothing},

	// The image, or what it does, is the same everywhere.
	backenderr.ImageUnavailable:  {answer, nothing},
	backenderr.ImageHashMismatch: {answer, nothing},
	backenderr.ImageInvalid:      {answer, nothing},
	backenderr.AttestationFailed: {answer, nothing},
	backenderr.BootTimeout:       {answer, nothing},
	backenderr.WorkloadFailed:    {answer, nothing},

	backenderr.OperationInProgress: {attach, nothing},

	// Who calls may not; that is the same everywhere, too.
	backenderr.CallerDenied: {answer, nothing},

	// A bug, or a configuration that cannot work: shown, not worked around.
	backenderr.HopLimitExceeded: {answer, nothing},
	backenderr.InstanceNotFound: {answer, nothing},
	backenderr.RequestInvalid:   {answer, nothing},
	backenderr.Internal:         {answer, nothing},
	backenderr.Unimplemented:    {answer, nothing},
}

// ruleFor returns the row of err.
func ruleFor(err error) rule {
	if r, ok := rules[backenderr.ReasonOf(err)]; ok {
		return r
	}
	return rules[backenderr.Unknown]
}

// blind reports whether a backend that fails with err has not looked at the
// grant: it can't see now, or the call was refused at the door. With
// created=none it says that this call made nothing, and nothing about what an
// earlier one made.
func blind(err error) bool {
	return ruleFor(err).then == again || backenderr.Is(err, backenderr.CallerUnauthenticated, backenderr.CallerDenied,
		backenderr.HopLimitExceeded, backenderr.RequestInvalid, backenderr.Unimplemented)
}

const (
	// maxAgain is how often one backend is asked for one Provision. Three times
	// bridge a reconnect or a worker's restart behind a balancer; more would
	// keep the caller from hearing about an outage.
	maxAgain = 3
	// maxAttach is the same while the backend says that it works on the grant:
	// about a minute, after which the caller had better ask again.
	maxAttach = 30
	// firstPause is how long the fleet waits before it asks again; it doubles
	// up to longestPause.
	firstPause   = 200 * time.Millisecond
	longestPause = 2 * time.Second
	// fullFor is how long what a backend could not give counts as unavailable
	// there. Clouds' stock-outs of one type in one zone last minutes; karpenter
	// uses the same three.
	fullFor = 3 * time.Minute
	// unreachableRetry is what callers are told while a backend does not answer:
	// the longest pause of a reconnecting channel.
	unreachableRetry = 5 * time.Second
	// endWithin bounds how long the fleet waits for the confirmation that an
	// unclear attempt is gone.
	endWithin = 2 * time.Minute
)

// attempts returns how often one backend is asked when it fails with err.
func attempts(err error) int {
	switch r := ruleFor(err); {
	case r.then == attach:
		return maxAttach
	case r.then == again, r.then == next && backenderr.CreatedOf(err) == backenderr.CreatedUnknown:
		return maxAgain
	}
	return 1
}

// pause returns how long to wait after the nth failure, at least as long as the
// backend asked for within reason.
func pause(n int, err error) time.Duration {
	d := longestPause
	if n < 5 {
		d = min(firstPause<<(n-1), longestPause)
	}
	return max(d, min(backenderr.From(err).RetryAfter, longestPause))
}
