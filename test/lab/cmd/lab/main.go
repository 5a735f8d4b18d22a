// Command lab starts and stops lab hosts by hand.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

func main() {
	lab.Helper()
	ctx := context.Background()
	l, err := lab.Open(ctx, lab.Options{Name: "cblab", Persistent: true})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		l, err = lab.Load("cblab")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	h, err := l.StartHost(ctx, lab.HostOptions{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(h.Name, h.Addr, h.BootTime)
}
