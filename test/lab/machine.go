package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// MachineOptions says what machine to start with [Lab.StartMachine].
type MachineOptions struct {
	// Name of the machine in its lab. "host1", "host2" … when empty.
	Name string
	// RootFS is its lower layer, of [CloudRootFS].
	RootFS string
	// Files are written before each boot: path → text.
	Files map[string]string
	// Sys are files that its /sys has beside the kernel's: path below /sys → text.
	Sys map[string]string
	// Loopback are addresses of its loopback interface, beside the usual ones.
	Loopback []netip.Addr
	// Console is the path of a terminal that is its /dev/console, or empty.
	Console string
	// DiskMiB is the size of its disk, 8192 when zero.
	DiskMiB int
	// Connected is called in each boot, once the machine's network is there and
	// before its first process, or is nil.
	Connected func(ctx context.Context, machine *Host) error
}

// machineRecord is what a host's record holds of a machine.
type machineRecord struct {
	Loopback []netip.Addr `json:"loopback"`
}

// StartMachine adds a machine to the lab that boots as a cloud's instances do: its
// network interface is plugged in but has no address, no key opens it, and what it
// becomes is for its cloud-init to find out. It returns at once, while it boots.
// Of the methods of a Host, those that log in don't work on it, and a Reboot
// doesn't wait either.
func (l *Lab) StartMachine(ctx context.Context, opts MachineOptions) (*Host, error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if opts.RootFS == "" {
		return nil, errors.New("start lab machine: no root file system")
	}
	host, err := l.addHost(ctx, opts.RootFS, HostOptions{
		Name: opts.Name, Files: opts.Files, DiskMiB: opts.DiskMiB, machine: &opts,
	})
	if err != nil {
		return nil, fmt.Errorf("start lab machine: %w", err)
	}
	if err := host.boot(ctx); err != nil {
		err = fmt.Errorf("start lab machine %s: %w\n%s", host.Name, err, host.console(context.WithoutCancel(ctx)))
		return nil, errors.Join(err, host.Destroy(context.WithoutCancel(ctx)))
	}
	return host, nil
}

// machineOrder decides all that a machine boots with.
func (l *Lab) machineOrder(root string, opts HostOptions) (bootOrder, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return bootOrder{}, err
	}
	order := l.emptyOrder(root, opts.Name)
	order.Console, order.Sys = opts.machine.Console, opts.machine.Sys
	order.Files = map[string]string{
		"etc/hosts":      "127.0.0.1 localhost\n::1 localhost\n",
		"etc/machine-id": hex.EncodeToString(id) + "\n",
	}
	maps.Copy(order.Files, opts.Files)
	return order, nil
}

// connect makes a machine's network: the cable, without an address at its end.
func (h *Host) connect(ctx context.Context) error {
	if err := plugHost(ctx, h.lab.name, h.netns(), h.record.Index); err != nil {
		return err
	}
	lines := []string{"link set lo up"}
	for _, addr := range h.record.Machine.Loopback {
		lines = append(lines, fmt.Sprintf("address add %s dev lo", netip.PrefixFrom(addr, addr.BitLen())))
	}
	if err := run(ctx, strings.Join(lines, "\n"), "ip", "-n", h.netns(), "-batch", "-"); err != nil {
		return err
	}
	if h.connected == nil {
		return nil
	}
	return h.connected(ctx, h)
}

// MAC is the address of the host's network interface.
func (h *Host) MAC() net.HardwareAddr {
	mac, err := net.ParseMAC(hostMAC(h.record.Index))
	if err != nil {
		panic(err) // it is ours
	}
	return mac
}

// Prefix is the network of every lab.
func (l *Lab) Prefix() netip.Prefix { return labPrefix() }

// Inside calls f on a thread that is in the lab's network. Sockets that f opens
// stay there. f must not start goroutines that open more.
func (l *Lab) Inside(f func() error) error { return inNetns(l.name, f) }

// Inside calls f on a thread that is in the host's network, as [Lab.Inside] does. A
// socket that isn't closed keeps that network from ending.
func (h *Host) Inside(f func() error) error { return inNetns(h.netns(), f) }

// Ending is how a host's systemd ended.
type Ending string

// The endings.
const (
	// PoweredOff by itself.
	PoweredOff Ending = "powered off"
	// Rebooting by itself: another boot is due.
	Rebooting Ending = "rebooting"
	// Killed, by whoever.
	Killed Ending = "killed"
)

// WaitEnd waits until the host's systemd has ended, and says how. That can be told
// only until somebody reaps it, as Kill and Destroy do.
func (h *Host) WaitEnd(ctx context.Context) (Ending, error) {
	first := h.record.Init
	if err := poll(ctx, 20*time.Millisecond, func() (bool, error) { return !first.alive(), nil }); err != nil {
		return "", err
	}
	// It stays a zombie, whose last field is its status, until Kill reaps it.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", first.PID))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Killed, nil
	}
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(text))
	status, err := strconv.ParseUint(fields[len(fields)-1], 10, 32)
	if err != nil {
		return "", fmt.Errorf("/proc/%d/stat: %w", first.PID, err)
	}
	// See pid_namespaces(7): a reboot(2) in there kills its first process.
	switch ended := unix.WaitStatus(status); {
	case ended.Signaled() && ended.Signal() == unix.SIGHUP:
		return Rebooting, nil
	case ended.Signaled() && ended.Signal() == unix.SIGINT, ended.Exited():
		return PoweredOff, nil
	default:
		return Killed, nil
	}
}

// CtrlAltDel has the host reboot in order, as that key does. It doesn't wait.
func (h *Host) CtrlAltDel() error {
	// See systemd(1), signals.
	if err := unix.Kill(h.record.Init.PID, unix.SIGINT); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("reboot %s: %w", h.Name, err)
	}
	return nil
}
