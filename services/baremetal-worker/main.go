// Command baremetal-worker serves the Backend contract for the operator's own
// machines.
package main

import (
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostbackend"
)

func main() { worker.Main("baremetal-worker", hostbackend.Open) }
