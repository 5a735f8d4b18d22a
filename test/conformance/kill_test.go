package conformance

import (
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// TestTheWorkerIsKilledAtItsCalls kills the built worker with SIGKILL before or
// after some of the calls that it makes to its hosts and to its ledger, starts it
// again, and asks for the same.
func TestTheWorkerIsKilledAtItsCalls(t *testing.T) {
	runOnWorkers(t, killGrounds(t, 1), backendtest.Harness{
		Only: []string{"crash"}, Skip: inLongTests(), Sweep: backendtest.Sweep{Sample: 2},
	})
}

// TestLongTheWorkerIsKilledAtEveryCall does so before and after every call of
// Provision and of Terminate.
func TestLongTheWorkerIsKilledAtEveryCall(t *testing.T) {
	runOnWorkers(t, killGrounds(t, 2), backendtest.Harness{
		Only: []string{"crash"}, Skip: inLongTests(), Sweep: backendtest.Sweep{MutatingOnly: true, Parallel: 2},
	})
}

// TestLongTheWorkerIsKilledAtAnyTime does so at some calls of everything else
// that it does.
func TestLongTheWorkerIsKilledAtAnyTime(t *testing.T) {
	runOnWorkers(t, killGrounds(t, 2), backendtest.Harness{
		Only: []string{"crash"}, Sweep: backendtest.Sweep{Sample: 5, Parallel: 2},
		Skip: map[string]string{
			"crash/during Provision, which is then retried": everyCall,
			"crash/during Terminate, which is then retried": everyCall,
		},
	})
}

// TestLongTheWorkerUndoesOrphans kills it while it makes what nobody asks for
// afterwards.
func TestLongTheWorkerUndoesOrphans(t *testing.T) {
	free := killGrounds(t, 2)
	for range cap(free) {
		g := <-free
		g.orphanAge = 3 * time.Second
		free <- g
	}
	runOnWorkers(t, free, backendtest.Harness{Only: []string{"orphans"}, Sweep: backendtest.Sweep{Sample: 5, Parallel: 2}})
}

// TestLongTheWorkersCallsFail has some calls to the hosts and to the ledger fail.
func TestLongTheWorkersCallsFail(t *testing.T) {
	runOnWorkers(t, killGrounds(t, 2), backendtest.Harness{Only: []string{"faults"}, Sweep: backendtest.Sweep{Sample: 5, Parallel: 2}})
}

// TestLongARouterIsKilledAtEveryCall kills the built router, and nothing else,
// before and after all the calls to its worker and to its ledger, starts it again,
// and asks for the same.
func TestLongARouterIsKilledAtEveryCall(t *testing.T) {
	sweepRouter(t, backendtest.Harness{Only: []string{"crash"}, Sweep: backendtest.Sweep{Parallel: 2}})
}

// TestLongARoutersCallsFail has its calls fail.
func TestLongARoutersCallsFail(t *testing.T) {
	sweepRouter(t, backendtest.Harness{Only: []string{"faults"}, Sweep: backendtest.Sweep{Sample: 5, Parallel: 2}})
}

const everyCall = "it is swept at every call elsewhere"

// inLongTests names the cases that are left to the longer tests.
func inLongTests() map[string]string {
	skip := map[string]string{}
	for _, name := range []string{
		"during Provision with a sealed key, which is then retried", "during Provision, and then Terminate",
		"while a cancelled Provision is retried", "while a cancelled Provision is undone, which is then retried",
		"during a watch until the workload's end",
		"during a watch until the deadline", "during Terminate, which nobody retries", "during Terminate of what is being made",
		"during a restart",
	} {
		skip["crash/"+name] = "TestLong… has it; this is the short form"
	}
	return skip
}

// killGrounds returns grounds whose ledgers are in PostgreSQL, where calls to
// them can be seen.
func killGrounds(t *testing.T, n int) chan *ground {
	t.Helper()
	return newGrounds(t, n, pgtest.Start(t, pgtest.Options{}))
}

// sweepRouter runs the suite on the built router, with the built worker behind
// it, as many at a time as there are grounds. What dies and whose calls fail is
// the router.
func sweepRouter(t *testing.T, h backendtest.Harness) {
	t.Helper()
	free := killGrounds(t, max(1, h.Sweep.Parallel))
	h.Open = func(t testing.TB) *backendtest.Fixture {
		t.Helper()
		b := newBridge(t, take(t, free))
		host, port, err := net.SplitHostPort(b.worker.Addr())
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(port)
		if err != nil {
			t.Fatal(err)
		}
		addr := net.JoinHostPort(host, strconv.Itoa(n+tapOffset))
		tap := newGRPCTap(t, addr, b.worker.Addr(), b.Path("certs"))
		claims := b.routeTo(t, addr)
		f := b.fixture(t)
		b.dies(t, f, "router")
		at := points{{backendtest.SideProvider, tap.calls}, {backendtest.SideLedger, claims}}
		f.Record = at.record
		f.Inject = func(fault backendtest.Fault) backendtest.Injection { return at.inject(fault, f.Kill) }
		f.CreatePoint, f.ReadPoint = pointProvision, pointTerminate
		f.Faults = faultsOfRouter
		return f
	}
	h.DirectOnly = true
	if h.Skip == nil {
		h.Skip = map[string]string{}
	}
	h.Skip["crash/during a restart"] = "a router has nothing to take up: it doesn't remember whom it was asked to end"
	h.Skip["faults/at each call of a restart"] = h.Skip["crash/during a restart"]
	backendtest.Run(t, h)
}

// faultsOfRouter says what may go wrong with a router's call: a worker refuses by
// errors of its own, which are the worker's tests' matter.
func faultsOfRouter(c backendtest.Call) map[backendtest.FaultKind][]backenderr.Reason {
	if c.Side == backendtest.SideLedger {
		return backendtest.DefaultFaults("")(c)
	}
	away := []backenderr.Reason{backenderr.BackendUnreachable, backenderr.GrantNotSatisfiable}
	return map[backendtest.FaultKind][]backenderr.Reason{
		backendtest.FaultUnavailable: away,
		backendtest.FaultLostAnswer:  away,
		backendtest.FaultSlow:        append([]backenderr.Reason{backenderr.DeadlineExceeded}, away...),
	}
}

// tapOffset is how far the tap's port is from the worker's own.
const tapOffset = 100

// points are where a process's calls pass.
type points []struct {
	side  backendtest.Side
	calls *ledgertest.Points
}

// record implements Fixture.Record.
func (p points) record(id backend.GrantID) (stop func() []backendtest.Call) {
	var ids []ledger.RequestID
	if id != (backend.GrantID{}) {
		ids = append(ids, ledger.RequestID(id))
	}
	var stops []func() []ledgertest.Call
	for _, at := range p {
		stops = append(stops, at.calls.Record(ids...))
	}
	return func() []backendtest.Call {
		var all []backendtest.Call
		for i, stop := range stops {
			for _, c := range stop() {
				// What is for no grant is asked whenever the process likes to.
				varies := len(ids) == 0 || c.RequestID == ledger.RequestID{}
				all = append(all, backendtest.Call{Side: p[i].side, Point: c.Point, Mutates: c.Mutates, Varies: varies})
			}
		}
		return all
	}
}

// inject implements Fixture.Inject.
func (p points) inject(f backendtest.Fault, kill func()) backendtest.Injection {
	if f.Side == "" {
		f.Side = backendtest.SideProvider
	}
	for _, at := range p {
		if at.side != f.Side {
			continue
		}
		return at.calls.Inject(ledgertest.Fault{
			Point: f.Point, RequestID: ledger.RequestID(f.GrantID), Nth: f.Nth, Kind: ledgertest.Kind(f.Kind), Always: f.Always, Crash: kill,
		})
	}
	panic("no such side: " + f.Side)
}
