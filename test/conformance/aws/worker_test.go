package aws

import (
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// TestTheWorkerHonoursTheContract holds the built worker to what the Backend
// contract says of ending, and of whose a grant is.
func TestTheWorkerHonoursTheContract(t *testing.T) {
	run(t, newGround(t, nil), backendtest.Harness{
		Only: []string{"identity", "terminate", "ownership"}, Sweep: backendtest.Sweep{Sample: 3},
	})
}

// TestTheWorkerIsKilledAtItsCalls kills the built worker with SIGKILL before or
// after some of the calls that it makes to the cloud, starts it again, and asks
// for the same.
func TestTheWorkerIsKilledAtItsCalls(t *testing.T) {
	skip := map[string]string{}
	for _, name := range []string{
		"during Provision with a sealed key, which is then retried", "during Provision, and then Terminate",
		"while a cancelled Provision is retried", "while a cancelled Provision is undone, which is then retried",
		"during a watch until the workload's end", "during a watch until the deadline",
		"during Terminate, which nobody retries", "during Terminate of what is being made", "during a restart",
	} {
		skip["crash/"+name] = "TestLong… has it; this is the short form"
	}
	run(t, newGround(t, nil), backendtest.Harness{Only: []string{"crash"}, Skip: skip, Sweep: backendtest.Sweep{Sample: 2}})
}

// TestLongTheAWSWorkerHonoursTheContract holds it to the rest of it, in which nothing
// goes wrong but what the case itself breaks.
func TestLongTheAWSWorkerHonoursTheContract(t *testing.T) {
	run(t, newGround(t, nil), backendtest.Harness{
		Only: []string{"capabilities", "satisfy", "provision", "watch", "errors"}, Sweep: backendtest.Sweep{Sample: 3},
		Skip: map[string]string{
			"provision/a closure by another process is seen before anything is made": "calls to a ledger that is a file can't be held; the test in process does",
		},
	})
}

// TestLongTheAWSWorkerIsKilledAtAnyTime kills it at some calls of all that it does, to
// the cloud and to its ledger.
func TestLongTheAWSWorkerIsKilledAtAnyTime(t *testing.T) {
	run(t, newGround(t, pgtest.Start(t, pgtest.Options{})), backendtest.Harness{
		Only: []string{"crash"}, Sweep: backendtest.Sweep{Sample: 6, Parallel: 2},
	})
}

// TestLongTheAWSWorkerUndoesOrphans kills it while it makes what nobody asks for
// afterwards.
func TestLongTheAWSWorkerUndoesOrphans(t *testing.T) {
	g := newGround(t, nil)
	g.orphanAge = 3 * time.Second
	run(t, g, backendtest.Harness{Only: []string{"orphans"}, Sweep: backendtest.Sweep{Sample: 4, Parallel: 2}})
}

// TestLongTheAWSWorkersCallsFail has some calls to the cloud and to the ledger fail.
func TestLongTheAWSWorkersCallsFail(t *testing.T) {
	run(t, newGround(t, pgtest.Start(t, pgtest.Options{})), backendtest.Harness{
		Only: []string{"faults"}, Sweep: backendtest.Sweep{Sample: 5, Parallel: 2},
	})
}

// run runs the suite on built workers, each on a cloud of its own.
func run(t *testing.T, g *ground, h backendtest.Harness) {
	t.Helper()
	h.Open = func(t testing.TB) *backendtest.Fixture {
		t.Helper()
		return g.newBridge(t).fixture(t)
	}
	h.DirectOnly = true
	if h.Skip == nil {
		h.Skip = map[string]string{}
	}
	if g.orphanAge == 0 {
		h.Skip["orphans/only what is over, and the bridge's own, is swept"] = "TestLongTheAWSWorkerUndoesOrphans has it"
	}
	backendtest.Run(t, h)
}
