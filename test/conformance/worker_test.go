package conformance

import (
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
)

// TestTheWorkerHonoursTheContract holds the built worker to what the Backend
// contract says of ending, and of whose a grant is.
func TestTheWorkerHonoursTheContract(t *testing.T) {
	runOnWorkers(t, newGrounds(t, 1, nil), backendtest.Harness{
		Only: []string{"identity", "terminate", "ownership"}, Sweep: backendtest.Sweep{Sample: 3},
	})
}

// TestLongTheWorkerHonoursTheContract holds it to the rest of it, in which
// nothing goes wrong but what the case itself breaks.
func TestLongTheWorkerHonoursTheContract(t *testing.T) {
	runOnWorkers(t, newGrounds(t, 1, nil), backendtest.Harness{
		Only: []string{"capabilities", "satisfy", "provision", "watch", "errors"}, Sweep: backendtest.Sweep{Sample: 3},
	})
}

// runOnWorkers runs the suite on the built worker, as many of them at a time as
// there are grounds.
func runOnWorkers(t *testing.T, free chan *ground, h backendtest.Harness) {
	t.Helper()
	h.Open = func(t testing.TB) *backendtest.Fixture {
		t.Helper()
		return newBridge(t, take(t, free)).fixture(t)
	}
	h.DirectOnly = true
	if h.Skip == nil {
		h.Skip = exceptedOnHosts()
	}
	backendtest.Run(t, h)
}

// exceptedOnHosts names the cases that can't apply.
func exceptedOnHosts() map[string]string {
	return map[string]string{
		"watch/an instance that the provider took back is INTERRUPTED": "the operator's own hosts take nothing back",
		"orphans/only what is over, and the bridge's own, is swept":    "test/e2e plants things on hosts and has this worker sweep them",
		"errors/every refusal has its reason and leaves nothing":       "a host has no account whose quota or rights could end",
		"errors/clean-up that isn't confirmed is unknown":              "the steps of a host's clean-up make up for each other: one that fails keeps nothing",
		"errors/no secret of the grant is told":                        "a host has no account whose rights could end",
	}
}
