package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// The lab's network is the same in every lab: each is in namespaces of its own.
const (
	netnsDir   = "/run/netns"
	bridgeName = "br0"
	bridgeMAC  = "02:77:ff:ff:ff:fe"
)

// labPrefix is the network of every lab; the lab's own address is its first.
func labPrefix() netip.Prefix { return netip.MustParsePrefix("10.77.0.0/16") }

// labAddr is the address of the lab's bridge, where the tests are.
func labAddr() netip.Addr { return netip.MustParseAddr("10.77.0.1") }

// hostAddr is the address of the host with this index, from 10.77.1.1 on.
func hostAddr(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, byte(1 + index/254), byte(1 + index%254)})
}

// hostMAC is fixed too, so that neighbour entries can be.
func hostMAC(index int) string {
	return fmt.Sprintf("02:77:00:00:%02x:%02x", index>>8&0xff, index&0xff)
}

// vethName is the lab's end of a host's cable.
func vethName(index int) string { return fmt.Sprintf("host%d", index) }

// netnsPath is where iproute2 keeps the named network namespace.
func netnsPath(name string) string { return filepath.Join(netnsDir, name) }

// run runs a program of the machine. The error holds the command and what it
// printed on standard error.
func run(ctx context.Context, stdin, program string, args ...string) error {
	path, err := need(program)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// addLabNetwork makes the lab's namespace and its bridge.
func addLabNetwork(ctx context.Context, lab string) error {
	if err := run(ctx, "", "ip", "netns", "add", lab); err != nil {
		return err
	}
	return run(ctx, strings.Join([]string{
		"link set lo up",
		"link add " + bridgeName + " address " + bridgeMAC + " type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
		fmt.Sprintf("address add %s/%d dev %s", labAddr(), labPrefix().Bits(), bridgeName),
		"link set " + bridgeName + " up",
	}, "\n"), "ip", "-n", lab, "-batch", "-")
}

// addHostNetwork makes a host's namespace and its cable to the lab's bridge.
// The neighbour entries are permanent, so that a host that is cut off is silent
// ("half-open") and not unreachable, as it would be behind a router.
func addHostNetwork(ctx context.Context, lab, netns string, index int) error {
	if err := plugHost(ctx, lab, netns, index); err != nil {
		return err
	}
	return run(ctx, strings.Join([]string{
		"link set lo up",
		fmt.Sprintf("address add %s/%d dev eth0", hostAddr(index), labPrefix().Bits()),
		"link set eth0 up",
		fmt.Sprintf("neigh replace %s lladdr %s dev eth0 nud permanent", labAddr(), bridgeMAC),
		fmt.Sprintf("route add default via %s", labAddr()),
	}, "\n"), "ip", "-n", netns, "-batch", "-")
}

// plugHost makes a host's namespace and the cable, with nothing set up at the
// host's end.
func plugHost(ctx context.Context, lab, netns string, index int) error {
	if err := run(ctx, "", "ip", "netns", "add", netns); err != nil {
		return err
	}
	return run(ctx, strings.Join([]string{
		fmt.Sprintf("link add %s type veth peer name eth0 address %s netns %s", vethName(index), hostMAC(index), netns),
		fmt.Sprintf("link set %s master %s up", vethName(index), bridgeName),
		fmt.Sprintf("neigh replace %s lladdr %s dev %s nud permanent", hostAddr(index), hostMAC(index), bridgeName),
	}, "\n"), "ip", "-n", lab, "-batch", "-")
}

// removeHostNetwork takes a host's cable and namespace away. What is gone
// already is no error.
func removeHostNetwork(ctx context.Context, lab, netns string, index int) error {
	if exists(netnsPath(lab)) {
		// The namespace's end would remove the cable too, but some time later,
		// and a reboot makes a new one with the same name.
		if err := run(ctx, "", "ip", "-n", lab, "link", "del", vethName(index)); err != nil &&
			!strings.Contains(err.Error(), "Cannot find device") {
			return err
		}
	}
	return removeNetns(ctx, netns)
}

// removeNetns removes a named network namespace if it exists.
func removeNetns(ctx context.Context, name string) error {
	if !exists(netnsPath(name)) {
		return nil
	}
	return run(ctx, "", "ip", "netns", "del", name)
}

// inNetns calls f on a thread that is in the named network namespace. Sockets
// that f opens stay there. f must not start goroutines that open more.
func inNetns(name string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is of no use to others and ends here.
		runtime.LockOSThread()
		ns, err := os.Open(netnsPath(name))
		if err != nil {
			result <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("enter network namespace %s: %w", name, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// exists tells whether a path is there.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
