// Command router serves the union of several backends as one backend: it gives
// each grant to the first backend, in the operator's order, that satisfies it.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/compute-bridge/compute-bridge/services/router/internal/server"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(server.Main(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
