// Package hostspool records, on the host and as part of a unit's end, what a grant has used and how it ended. It runs
// without any bridge process alive, so that usage survives them; the worker collects the record later.
package hostspool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// commandTimeout bounds asking systemd and nft, which together must stay within the unit's stop timeout.
const commandTimeout = 10 * time.Second

// unitName and interfaceName bound what a unit and an interface of ours may be called.
var (
	unitName      = regexp.MustCompile(`^[A-Za-z0-9:_.@-]{1,250}\.service$`)
	interfaceName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,15}$`)
)

// Request names what to record.
type Request struct {
	// Dir is the grant's directory; it must exist.
	Dir string
	// Unit is the grant's unit, in whose cgroup this process runs.
	Unit string
	// Interface is the grant's network interface on the host, "" if it has none.
	Interface string
	// Table is the nftables table (family inet) with the counters, "" if there is none.
	Table string
}

// Host is where facts come from: the real one is [System].
type Host struct {
	// ReadFile reads a file of /proc, /sys or the cgroup hierarchy.
	ReadFile func(name string) ([]byte, error)
	// Command runs a program and returns its standard output.
	Command func(ctx context.Context, name string, args ...string) ([]byte, error)
	// LookupEnv reads this process's environment.
	LookupEnv func(name string) (string, bool)
	// Now is the wall clock.
	Now func() time.Time
	// Monotonic is CLOCK_MONOTONIC, in which systemd gives its times.
	Monotonic func() (time.Duration, error)
}

// System is the host that this process runs on.
func System() Host {
	return Host{
		ReadFile: os.ReadFile,
		Command:  runCommand,
		LookupEnv: func(name string) (string, bool) {
			value, ok := os.LookupEnv(name)
			return value, ok && value != ""
		},
		Now: time.Now,
		Monotonic: func() (time.Duration, error) {
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
				return 0, err
			}
			return time.Duration(ts.Nano()), nil
		},
	}
}

// runCommand finds programs in the system's own directories only.
func runCommand(ctx context.Context, name string, args ...string) ([]byte, error) {
	program := ""
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		candidate := filepath.Join(dir, name)
		if info, err := os.Stat(candidate); err == nil && info.Mode().IsRegular() {
			program = candidate
			break
		}
	}
	if program == "" {
		return nil, fmt.Errorf("%s is not installed", name)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...) // #nosec G204 -- names are constants, arguments checked
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, firstLine(stderr.String()))
	}
	return out, nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// Record sets the ended mark, collects what the host knows and writes the spool. What can't be known stays nil, with
// the reason in Problems: an incomplete record is worth more than none. An error means that no record was written.
func Record(ctx context.Context, host Host, req Request) error {
	if err := req.validate(); err != nil {
		return err
	}
	// First of all, and independent of the rest: an ended grant must not start again.
	if err := markEnded(req.Dir); err != nil {
		return err
	}
	data, err := guestapi.EncodeSpool(collect(ctx, host, req))
	if err != nil {
		return err
	}
	// Late, so that nothing else takes the room meanwhile.
	if err := os.Remove(filepath.Join(req.Dir, guestapi.ReserveFileName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("make room for the spool: %w", err)
	}
	return writeFile(req.Dir, guestapi.SpoolFileName, data)
}

func (r Request) validate() error {
	switch {
	case r.Dir == "":
		return errors.New("no directory given")
	case !unitName.MatchString(r.Unit):
		return fmt.Errorf("%q is no name of a service unit", r.Unit)
	case r.Interface != "" && !interfaceName.MatchString(r.Interface):
		return fmt.Errorf("%q is no name of an interface", r.Interface)
	case r.Table != "" && !tableName.MatchString(r.Table):
		return fmt.Errorf("%q is no name of a table", r.Table)
	}
	return nil
}

// collector gathers a spool and the reasons for what it lacks.
type collector struct {
	host  Host
	spool guestapi.Spool
}

func (c *collector) problem(what string, err error) {
	c.spool.Problems = append(c.spool.Problems, what+": "+err.Error())
}

func collect(ctx context.Context, host Host, req Request) guestapi.Spool {
	c := &collector{host: host, spool: guestapi.Spool{
		Version: guestapi.SpoolVersion,
		Unit:    req.Unit,
	}}
	// Counters first: the later they are read, the more the clean-up itself has been counted.
	c.collectCgroup(req.Unit)
	c.collectNetwork(ctx, req)
	c.collectTimes(ctx, req.Unit)
	if data, err := host.ReadFile("/proc/sys/kernel/random/boot_id"); err != nil {
		c.problem("boot id", err)
	} else {
		c.spool.BootID = new(strings.TrimSpace(string(data)))
	}
	// systemd.exec(5), "Environment Variables Set or Propagated by the Service Manager".
	variable := func(name string) *string {
		value, ok := host.LookupEnv(name)
		if !ok {
			return nil
		}
		return &value
	}
	c.spool.Result = variable("SERVICE_RESULT")
	c.spool.ExitCode = variable("EXIT_CODE")
	c.spool.ExitStatus = variable("EXIT_STATUS")
	c.spool.InvocationID = variable("INVOCATION_ID")
	c.spool.RecordedAt = host.Now().UTC().Truncate(time.Microsecond)
	return c.spool
}

func (c *collector) collectCgroup(unit string) {
	membership, err := c.host.ReadFile("/proc/self/cgroup")
	if err != nil {
		c.problem("cgroup", err)
		return
	}
	cgroup, err := unitCgroup(membership, unit)
	if err != nil {
		c.problem("cgroup", err)
		return
	}
	mounts, err := c.host.ReadFile("/proc/self/mountinfo")
	if err != nil {
		c.problem("cgroup", err)
		return
	}
	mountPoint, root, err := cgroupMount(mounts)
	if err != nil {
		c.problem("cgroup", err)
		return
	}
	// The mount may show a part of the hierarchy only.
	if root != "/" {
		cgroup = strings.TrimPrefix(cgroup, root)
	}
	dir := path.Join(mountPoint, cgroup)

	if data, err := c.host.ReadFile(path.Join(dir, "cpu.stat")); err != nil {
		c.problem("cpu time", err)
	} else if usec, err := statValue(data, "usage_usec"); err != nil {
		c.problem("cpu time", err)
	} else {
		c.spool.Usage.CPUUsageUsec = &usec
	}
	if data, err := c.host.ReadFile(path.Join(dir, "memory.peak")); err != nil {
		c.problem("peak memory", err)
	} else if peak, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err != nil {
		c.problem("peak memory", err)
	} else {
		c.spool.Usage.MemoryPeakBytes = &peak
	}
	if data, err := c.host.ReadFile(path.Join(dir, "io.stat")); err != nil {
		c.problem("block io", err)
	} else if read, write, err := ioTotals(data); err != nil {
		c.problem("block io", err)
	} else {
		c.spool.Usage.IOReadBytes, c.spool.Usage.IOWriteBytes = &read, &write
	}
}

func (c *collector) collectNetwork(ctx context.Context, req Request) {
	if req.Interface == "" || req.Table == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	data, err := c.host.Command(ctx, "nft", "-j", "list", "table", "inet", req.Table)
	if err != nil {
		c.problem("network", err)
		return
	}
	counter := func(set string) *uint64 {
		n, err := setCounter(data, set, req.Interface)
		if err != nil {
			c.problem("network", err)
			return nil
		}
		return &n
	}
	c.spool.Usage.NetworkReceivedBytes = counter(guestapi.CounterSetReceived)
	c.spool.Usage.NetworkSentBytes = counter(guestapi.CounterSetSent)
}

// collectTimes asks systemd, whose monotonic times are the only ones that every version prints as numbers.
func (c *collector) collectTimes(ctx context.Context, unit string) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	const startedAt, stoppedAt = "ExecMainStartTimestampMonotonic", "ExecMainExitTimestampMonotonic"
	data, err := c.host.Command(ctx, "systemctl", "show", "--property="+startedAt, "--property="+stoppedAt, "--", unit)
	if err != nil {
		c.problem("times", err)
		return
	}
	monotonic, err := c.host.Monotonic()
	if err != nil {
		c.problem("times", err)
		return
	}
	booted := c.host.Now().Add(-monotonic)
	properties := parseProperties(data)
	at := func(property string) *time.Time {
		usec, err := strconv.ParseInt(properties[property], 10, 64)
		// 0 means that it has not happened; the upper bound keeps the product below within its type.
		if err != nil || usec <= 0 || usec > 1<<53 {
			c.problem("times", fmt.Errorf("systemd has no %s", property))
			return nil
		}
		return new(booted.Add(time.Duration(usec) * time.Microsecond).UTC().Truncate(time.Microsecond))
	}
	c.spool.StartedAt = at(startedAt)
	c.spool.StoppedAt = at(stoppedAt)
}

// parseProperties reads the output of systemctl show.
func parseProperties(data []byte) map[string]string {
	properties := map[string]string{}
	for line := range bytes.Lines(data) {
		if name, value, ok := strings.Cut(strings.TrimRight(string(line), "\r\n"), "="); ok {
			properties[name] = value
		}
	}
	return properties
}

// markEnded makes the mark and sees that it is on the disk.
func markEnded(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, guestapi.EndedFileName), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("set the ended mark: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close(), syncDir(dir)); err != nil {
		return fmt.Errorf("set the ended mark: %w", err)
	}
	return nil
}

// writeFile replaces a file so that a crash leaves the old one or the new one.
func writeFile(dir, name string, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", name, err)
		}
	}()
	temp, err := os.CreateTemp(dir, ".tmp-"+name+"-*") // made with mode 0600
	if err != nil {
		return err
	}
	_, err = temp.Write(data)
	err = errors.Join(err, temp.Sync(), temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		_ = os.Remove(temp.Name())
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
