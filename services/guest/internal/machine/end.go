package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// WorkloadUnit is the unit that runs the workload.
const WorkloadUnit = "compute-bridge-workload.service"

const (
	// tailLines and tailBytes are how much of the workload's output the console shows: errors carry some 2 KiB of a
	// console, and a console is slow and keeps its last 64 KiB, so that long lines would push out what came before.
	tailLines = 15
	tailBytes = 4 << 10
	// commandTimeout bounds all questions to systemd together, and each way to power off. There are two of these, so that
	// all fit into the unit's TimeoutStopSec, 25 s.
	commandTimeout = 8 * time.Second
	// lastUnitStatus and firstUnitStatus are the exit codes that systemd itself uses, systemd.exec(5).
	firstUnitStatus = 200
	lastUnitStatus  = 245
)

// system is what the machine's systemd can be asked.
type system interface {
	// Stopping says that the system goes down or reboots.
	Stopping(ctx context.Context) bool
	// Tail returns the last lines of the unit's output.
	Tail(ctx context.Context, unit string, lines int) ([]byte, error)
	// OOMKilled says that the OOM killer has taken a process of the unit that this process belongs to.
	OOMKilled() bool
	// PowerOff begins to power off. It bounds its own time.
	PowerOff(ctx context.Context) error
}

// systemd is the system of a real machine.
type systemd struct{}

// Stopping implements system.
func (systemd) Stopping(ctx context.Context) bool {
	// It exits with 1 in every state but "running".
	out, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output()
	return strings.TrimSpace(string(out)) == "stopping"
}

// Tail implements system.
func (systemd) Tail(ctx context.Context, unit string, lines int) ([]byte, error) {
	// What the unit wrote last may not have been read yet. Without that, there is less to show.
	_ = exec.CommandContext(ctx, "journalctl", "--sync").Run()
	// #nosec G204 -- a constant and a number of this package
	return exec.CommandContext(ctx, "journalctl", "--no-pager", "--output=cat", "--boot", "--unit="+unit,
		"--lines="+strconv.Itoa(lines), "_TRANSPORT=stdout").Output()
}

// PowerOff implements system.
func (systemd) PowerOff(ctx context.Context) error {
	run := func(args ...string) error {
		ctx, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		return exec.CommandContext(ctx, "systemctl", args...).Run() // #nosec G204 -- constants, see below
	}
	if run("--no-block", "poweroff") == nil {
		return nil
	}
	return run("--force", "--force", "poweroff")
}

// OOMKilled implements system. What it can't read it doesn't claim.
func (systemd) OOMKilled() bool {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(groups)) {
		if group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			events, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", group, "memory.events"))
			return err == nil && oomKills(events) > 0
		}
	}
	return false
}

// oomKills is how many processes of a control group the OOM killer has taken: of cgroups(7)'s memory.events. It counts
// those for whom the whole machine was short, too.
func oomKills(events []byte) uint64 {
	for line := range strings.Lines(string(events)) {
		if text, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
			return n
		}
	}
	return 0
}

// Result is how systemd says that a unit ended: $SERVICE_RESULT, $EXIT_CODE and $EXIT_STATUS, systemd.exec(5).
type Result struct {
	Result, Code, Status string
}

// Ready tells the console that the workload runs and SSH is open.
func (m *Machine) Ready() error {
	config, err := m.config()
	if err != nil {
		return err
	}
	if err := m.mark(m.dirs.Run, readyFile); err != nil {
		return err
	}
	return m.print(guestapi.Verdict{Grant: config.GrantID, Attempt: config.Attempt, Phase: guestapi.PhaseReady}.Line())
}

// End tells the console how the workload ended, and powers the machine off if that is to be. When the machine goes down
// or reboots it does nothing: the workload is then to run again, or the deadline has come.
func (m *Machine) End(ctx context.Context, result Result) error {
	asking, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if m.system.Stopping(asking) {
		return nil
	}
	config, err := m.config()
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(m.dirs.Run, readyFile))
	ready := err == nil
	tail, tailErr := m.system.Tail(asking, WorkloadUnit, tailLines)
	if tailErr != nil {
		m.logger.Warn("The workload's output can't be read", "reason", tailErr)
	}
	verdict := judge(result, ready, m.system.OOMKilled(), tail)
	verdict.Grant, verdict.Attempt = config.GrantID, config.Attempt

	// Whatever else fails, the workload must not run twice, nor the machine for nothing.
	err = m.mark(m.dirs.State, endedFile)
	if shown := lastBytes(tail, tailBytes); len(shown) > 0 {
		err = errors.Join(err, m.print(strings.TrimSuffix(string(shown), "\n")))
	}
	err = errors.Join(err, m.say(verdict))
	if config.AtEnd == guestapi.AtEndPowerOff {
		err = errors.Join(err, m.system.PowerOff(ctx))
	}
	return err
}

// lastBytes is the end of a text, from the beginning of a line if there is one.
func lastBytes(text []byte, limit int) []byte {
	if len(text) <= limit {
		return text
	}
	cut := text[len(text)-limit:]
	if text[len(text)-limit-1] == '\n' {
		return cut
	}
	if _, whole, ok := bytes.Cut(cut, []byte("\n")); ok && len(whole) > 0 {
		return whole
	}
	return cut
}

// judge makes a verdict of how the unit ended. oomKilled says that the OOM killer has taken a process of it.
func judge(result Result, ready, oomKilled bool, tail []byte) guestapi.Verdict {
	verdict := guestapi.Verdict{Phase: guestapi.PhaseExited}
	number := -1
	switch result.Code {
	case "exited":
		if n, err := strconv.ParseUint(result.Status, 10, 8); err == nil {
			number = int(n)
			code := int32(number)
			verdict.Code = &code
			// The guest tells a signal so, as shells do.
			if name, ok := strings.CutPrefix(unix.SignalName(unix.Signal(number-guestapi.ExitSignalBase)), "SIG"); ok {
				verdict.Signal = name
			}
		}
	case "killed", "dumped":
		verdict.Signal = strings.TrimPrefix(result.Status, "SIG")
	}
	// systemd itself gives this result for a unit with another OOMPolicy than ours ("continue"): with ours it says only
	// which signal it was. A process that was killed otherwise, after another of the unit's was taken for want of
	// memory, can't be told from it; nothing is billed by a verdict.
	outOfMemory := result.Result == "oom-kill" || oomKilled && verdict.Signal == "KILL"
	if outOfMemory {
		verdict.Message = "the machine ran out of memory"
	}
	if ready {
		if outOfMemory {
			verdict.Reason = guestapi.ReasonOutOfMemory
		}
		return verdict
	}
	verdict.Phase = guestapi.PhaseFailed
	verdict.Reason = guestapi.ReasonWorkloadFailed
	switch {
	case outOfMemory:
	case number == guestapi.ExitInvalidConfig || number == guestapi.ExitGuestFailed:
		verdict.Reason = guestapi.ReasonHostUnfit
		verdict.Message = "the guest could not run"
	case number >= firstUnitStatus && number <= lastUnitStatus:
		verdict.Reason = guestapi.ReasonHostUnfit
		verdict.Message = fmt.Sprintf("the workload's unit could not be started (status %d, see systemd.exec)", number)
	case number >= 0:
		verdict.Message = fmt.Sprintf("the workload ended with exit code %d before SSH was open", number)
	case result.Code == "":
		verdict.Reason = guestapi.ReasonHostUnfit
		verdict.Message = fmt.Sprintf("the workload's unit could not be started (%s)", result.Result)
	default:
		verdict.Message = "the workload was killed before SSH was open"
	}
	if said := lastError(tail); said != "" {
		verdict.Message = said
	}
	return verdict
}

// lastError is the last error that the guest itself printed.
func lastError(tail []byte) string {
	said := ""
	for line := range strings.Lines(string(tail)) {
		if text, ok := strings.CutPrefix(line, guestapi.LogPrefix+"error: "); ok {
			said = strings.TrimSpace(text)
		}
	}
	return said
}

// say gives a verdict and remembers that it was given.
func (m *Machine) say(verdict guestapi.Verdict) error {
	return errors.Join(m.mark(m.dirs.Run, verdictFile), m.print(verdict.Line()))
}

// print writes to the console. It begins a new line: nobody knows what was written last.
func (m *Machine) print(text string) error {
	f, err := os.OpenFile(m.dirs.Console, os.O_WRONLY|os.O_APPEND|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("\r\n" + strings.ReplaceAll(text, "\n", "\r\n") + "\r\n")
	return errors.Join(err, f.Close())
}

// mark makes an empty file.
func (m *Machine) mark(dir, name string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}
