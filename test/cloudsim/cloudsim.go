// Package cloudsim is what the simulators of the clouds share: the machines
// behind their instances. A simulator speaks one cloud's wire protocol and keeps
// its state; what an instance runs on is a [Machine] of whichever kind the test
// wants, a real one that boots (package labvm) or a quick one that plays the
// guest in process (package quickvm).
package cloudsim

import (
	"context"
	"net/netip"
)

// Boot is what a cloud gives to a machine that it starts.
type Boot struct {
	// ID is the cloud's own name for the instance ("i-0123456789abcdef0").
	ID string
	// Image is the cloud's name for the disk image. The factory knows what it
	// stands for.
	Image string
	// Architecture is "x86_64" or "arm64".
	Architecture string
	// UserData is what the metadata service answers with, as the guest reads it.
	UserData []byte
	// Metadata is the rest of what the metadata service knows, by its path below
	// /latest/meta-data/ ("placement/region").
	Metadata map[string]string
	// DiskGiB is the size of the root disk.
	DiskGiB int64
}

// Machines starts machines. It is safe for concurrent use.
type Machines interface {
	// Start starts a machine and returns at once, while it still boots. The
	// context is for the start only.
	Start(ctx context.Context, boot Boot) (Machine, error)
}

// Machine is a machine that was started. Its methods are safe for concurrent
// use.
type Machine interface {
	// Addr is where it is reached from outside and by what address it knows
	// itself: the simulators' instances have one address.
	Addr() netip.Addr
	// Off is closed once the machine is powered off, by itself or by Stop.
	Off() <-chan struct{}
	// Console returns what its serial console has shown so far.
	Console() []byte
	// Reboot restarts it with the same disk.
	Reboot(ctx context.Context) error
	// Stop powers it off, if it still runs, and removes all that is left of it.
	// It may be called again.
	Stop(ctx context.Context) error
}
