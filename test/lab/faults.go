package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// downLimit bounds the end of a host whose context has no deadline of its own.
const downLimit = 3 * time.Minute

// Kill ends the host at once, as a power cut does. Its disk stays: Reboot
// starts it again.
func (h *Host) Kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, downLimit)
	defer cancel()
	tree, err := openCgroupTree()
	if err != nil {
		return err
	}
	defer tree.close() //nolint:errcheck // nothing was written to it
	// PID 1 takes all others of its namespace along, and programs that entered
	// it are then reaped by those who started them.
	if h.Running() {
		if err := unix.Kill(h.record.Init.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %s: %w", h.Name, err)
		}
	}
	if err := h.gone(ctx); err != nil {
		return err
	}
	if err := tree.remove(ctx, h.lab.name, h.Name); err != nil {
		return fmt.Errorf("kill %s: %w", h.Name, err)
	}
	return nil
}

// gone waits for the end of the host's PID 1 and takes its network away.
func (h *Host) gone(ctx context.Context) error {
	if err := h.record.Init.wait(ctx); err != nil {
		return fmt.Errorf("wait for the end of %s: %w", h.Name, err)
	}
	if err := removeHostNetwork(ctx, h.lab.name, h.netns(), h.record.Index); err != nil {
		return err
	}
	return waitLoopsFree(ctx, h.record.Order.Disk)
}

// Shutdown stops the host as `systemctl poweroff` does and waits until it is
// down.
func (h *Host) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, downLimit)
	defer cancel()
	// The answer may be lost with the host.
	if _, err := h.Exec(ctx, "systemctl", "--no-block", "poweroff"); err != nil && h.Running() {
		return err
	}
	if err := h.gone(ctx); err != nil {
		return err
	}
	return h.Kill(ctx) // its cgroups
}

// Reboot kills the host and boots it again on the same disk, with the same
// address and the same keys. What lived in memory is gone: /run, /tmp,
// transient units, firewall rules, connections. The new boot isn't cut off.
func (h *Host) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if err := h.Kill(ctx); err != nil {
		return err
	}
	if err := h.boot(ctx); err != nil {
		return fmt.Errorf("reboot %s: %w\n%s", h.Name, err, h.console(context.WithoutCancel(ctx)))
	}
	return nil
}

// Destroy ends the host and removes all of it. Idempotent.
func (h *Host) Destroy(ctx context.Context) error {
	if err := h.Kill(ctx); err != nil {
		return err
	}
	if err := removeAll(ctx, filepath.Dir(h.record.Order.Disk)); err != nil {
		return err
	}
	return removeAll(ctx, h.dir())
}

// removeAll removes a directory, again if a file came into it meanwhile: what the
// host's last process had begun to write may show only now.
func removeAll(ctx context.Context, dir string) error {
	for tries := 0; ; tries++ {
		err := os.RemoveAll(dir)
		if !errors.Is(err, unix.ENOTEMPTY) || tries == 50 {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// CutOff drops all packets from and to the host, without a word to either side:
// connections stay open and silent. New connections hang too.
func (h *Host) CutOff(ctx context.Context) error { return h.setPort(ctx, true) }

// Restore ends CutOff. Connections that both sides still hold go on.
func (h *Host) Restore(ctx context.Context) error { return h.setPort(ctx, false) }

// setPort blocks or opens the host's port of the lab's bridge.
func (h *Host) setPort(ctx context.Context, cut bool) error {
	state := "forwarding"
	if cut {
		state = "disabled"
	}
	if err := run(ctx, "", "bridge", "-n", h.lab.name, "link", "set", "dev", vethName(h.record.Index), "state", state); err != nil {
		return err
	}
	h.record.CutOff = cut
	return h.save()
}

// ResetConnections resets every TCP connection between the host's sshd and the
// lab: the lab's side sees "connection reset by peer".
func (h *Host) ResetConnections(ctx context.Context) error {
	return run(ctx, "", "ss", "-N", h.netns(), "-K", "-t", "state", "established", "dst", labAddr().String())
}

// SetLatency delays every packet to the host by d, and every packet from it. It
// takes netem, which not every kernel has: the error then is
// [errors.ErrUnsupported]. Zero ends it.
func (h *Host) SetLatency(ctx context.Context, d time.Duration) error {
	for _, end := range [][2]string{{h.lab.name, vethName(h.record.Index)}, {h.netns(), "eth0"}} {
		args := []string{"-n", end[0], "qdisc", "replace", "dev", end[1], "root", "netem", "delay", fmt.Sprintf("%dus", d.Microseconds())}
		if d == 0 {
			args = []string{"-n", end[0], "qdisc", "del", "dev", end[1], "root"}
		}
		err := run(ctx, "", "tc", args...)
		switch {
		case err == nil:
		case d == 0 && strings.Contains(err.Error(), "handle of zero"): // there was none
		case strings.Contains(err.Error(), "qdisc kind is unknown"):
			return fmt.Errorf("this kernel has no netem: %w", errors.Join(errors.ErrUnsupported, err))
		default:
			return err
		}
	}
	return nil
}

// fillFile takes the space that FillDisk takes.
const fillFile = "/var/.lab-fill"

// FillDisk fills the host's disk to the last block: writes fail with ENOSPC.
func (h *Host) FillDisk(ctx context.Context) error {
	// fallocate takes nearly all at once; cat takes the rest until it fails, and
	// again what others, who meet a full disk, give back: journald its oldest file.
	_, err := h.Exec(ctx, "sh", "-c", `
		free() { df --output=avail -B1 /var | tail -n 1; }
		free=$(free)
		while [ "$free" -gt 1048576 ]; do
			fallocate -l "$free" "$1" 2>/dev/null && break
			free=$((free - free / 64))
		done
		for n in 1 2 3 4 5 6 7 8 9; do
			cat /dev/zero 2>/dev/null >"$1.$n"
			sync -f /var
			[ "$(free)" -ge 65536 ] || exit 0
		done
		echo "$(free) bytes are still free" >&2
		exit 1`, "sh", fillFile)
	if err != nil {
		return fmt.Errorf("fill the disk: %w", err)
	}
	return nil
}

// FreeDisk ends FillDisk.
func (h *Host) FreeDisk(ctx context.Context) error {
	_, err := h.Exec(ctx, "sh", "-c", `rm -f "$1" "$1".*`, "sh", fillFile)
	return err
}

// SetClockSkew sets the clock that the host's programs see d ahead (or behind,
// when negative) of the machine's. Zero ends it.
//
// The kernel has one wall clock for all its namespaces, so this is libfaketime
// in /etc/ld.so.preload: it deceives every dynamically linked C program that
// starts from now on (date, sshd, systemd-timedated behind D-Bus), restarts
// sshd, and deceives neither static binaries nor Go programs nor the kernel's
// own time stamps of files.
func (h *Host) SetClockSkew(ctx context.Context, d time.Duration) error {
	_, err := h.Exec(ctx, "sh", "-ec", `
		if [ "$1" = +0 ]; then
			rm -f /etc/ld.so.preload /etc/faketimerc
		else
			echo "$1" >/etc/faketimerc
			ls /usr/lib/*/faketime/libfaketime.so.1 >/etc/ld.so.preload
		fi
		systemctl stop systemd-timedated.service 2>/dev/null || true
		systemctl restart ssh.service`, "sh", fmt.Sprintf("%+d", int64(d/time.Second)))
	if err != nil {
		return fmt.Errorf("skew the clock of %s: %w", h.Name, err)
	}
	return h.waitSSH(ctx)
}
