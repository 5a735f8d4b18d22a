// Command bridgectl is the command line of the compute bridge, for those who
// run one and for those who request compute from it.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/cli"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The first signal ends what goes on in order; the second ends the process.
	context.AfterFunc(ctx, stop)
	return cli.Run(ctx, cli.Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, Now: time.Now,
	}, os.Args[1:])
}
