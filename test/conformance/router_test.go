package conformance

import (
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
)

// TestLongARouterBeforeAWorkerHonoursTheContract holds the built router, with
// the built worker behind it, to the Backend contract: whoever calls can't tell
// them from a worker. What dies are both processes at once. What a router adds to
// the other groups, it shows in its own conformance tests, before fakes.
func TestLongARouterBeforeAWorkerHonoursTheContract(t *testing.T) {
	g := newGround(t)
	skip := exceptedOnHosts()
	skip["capabilities/count what exists"] = "a router tells what it last heard of its workers, which may be as old as its poll_interval"
	backendtest.Run(t, backendtest.Harness{
		Open: func(t testing.TB) *backendtest.Fixture {
			t.Helper()
			b := newBridge(t, g)
			b.routeTo(t, b.worker.Addr())
			return b.fixture(t)
		},
		Only:       []string{"identity", "watch", "terminate", "ownership"},
		Sweep:      backendtest.Sweep{Sample: 3},
		Skip:       skip,
		DirectOnly: true,
	})
}
