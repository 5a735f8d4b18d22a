// Command guest is the small static binary inside every instance: it runs the workload, and gives SSH into it. See
// `guest help`, and package guestapi for the contract with workers.
package main

import (
	"context"
	"os"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/cli"
)

func main() {
	os.Exit(cli.Run(context.Background(), os.Args[1:], cli.Streams{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}))
}
