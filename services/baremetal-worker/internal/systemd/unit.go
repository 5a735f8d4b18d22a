package systemd

import (
	"errors"
	"fmt"
	"math"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/godbus/dbus/v5"
)

// Exec is a program of a unit. Its arguments reach the program as they are:
// neither variables ($HOME) nor specifiers (%i) in them are expanded.
type Exec struct {
	// Args are the absolute path of the program and its arguments.
	Args []string
	// IgnoreFailure lets the unit go on as if the program had succeeded.
	IgnoreFailure bool
}

// Unit is a transient service: everything that systemd needs to start a
// workload, limit it, account for it, end it in time and clean up after it.
// Zero values leave systemd's own default, where nothing else is said.
type Unit struct {
	// Name ends in ".service".
	Name string
	// Description is for people.
	Description string
	// Type is systemd's; default "notify".
	Type string
	// Slice is the slice it runs in.
	Slice string
	// SyslogIdentifier marks its lines in the journal.
	SyslogIdentifier string
	// Delegate lets the workload make cgroups below the unit's own.
	Delegate bool

	// RuntimeMax is how long it may run. Systemd stops it then, with the result
	// "timeout".
	RuntimeMax time.Duration
	// TimeoutStart bounds the start. TimeoutStop bounds each of the stop's
	// phases: ExecStop, the end of the main process, ExecStopPost.
	TimeoutStart, TimeoutStop time.Duration

	// CPUMillicores limits CPU time.
	CPUMillicores uint64
	// MemoryMax limits memory in bytes; MemorySwapMax swap on top of it, unless
	// nil.
	MemoryMax     uint64
	MemorySwapMax *uint64
	// TasksMax limits processes and threads.
	TasksMax uint64

	// ConditionPathExists are paths that must exist for a start to happen; with
	// a leading "!", that must not.
	ConditionPathExists []string

	// ExecStartPre runs before ExecStart, ExecStop to stop it, ExecStopPost
	// after its end however it ended.
	ExecStartPre, ExecStart, ExecStop, ExecStopPost []Exec
}

// MaxNameBytes is systemd's limit for the name of a unit.
const MaxNameBytes = 255

// CheckName says what is wrong with the name of a service.
func CheckName(name string) error {
	stem, ok := strings.CutSuffix(name, ".service")
	switch {
	case !ok:
		return fmt.Errorf("unit name %q does not end in .service", name)
	case stem == "" || len(name) > MaxNameBytes:
		return fmt.Errorf("unit name %q is empty or too long", name)
	}
	for i := range len(stem) {
		switch c := stem[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			// "@" would make it an instance of a template.
			return fmt.Errorf("unit name %q has a character other than letters, digits, '-', '_', '.'", name)
		}
	}
	return nil
}

// property is a(sv) of StartTransientUnit.
type property struct {
	Name  string
	Value dbus.Variant
}

// execCommand is (sasas): path, arguments, flags.
type execCommand struct {
	Path  string
	Args  []string
	Flags []string
}

// condition is (sbbs): type, trigger, negate, parameter.
type condition struct {
	Type    string
	Trigger bool
	Negate  bool
	Param   string
}

// properties renders the unit. The order is fixed.
func (u Unit) properties() ([]property, error) {
	if err := CheckName(u.Name); err != nil {
		return nil, err
	}
	if len(u.ExecStart) != 1 {
		return nil, errors.New("a unit needs exactly one ExecStart")
	}
	var out []property
	add := func(name string, value any) { out = append(out, property{name, dbus.MakeVariant(value)}) }
	text := func(name, value string) error {
		if value == "" {
			return nil
		}
		if err := checkText(value); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		add(name, value)
		return nil
	}
	duration := func(name string, d time.Duration) {
		if d > 0 {
			// Systemd takes 0 for "infinite": less than its unit is one unit.
			add(name, uint64(max(1, d.Microseconds())))
		}
	}

	typ := u.Type
	if typ == "" {
		typ = "notify"
	}
	if err := errors.Join(text("Description", u.Description), text("Type", typ), text("Slice", u.Slice), text("SyslogIdentifier", u.SyslogIdentifier)); err != nil {
		return nil, err
	}
	if typ == "notify" {
		// podman's conmon notifies, which is no main process.
		add("NotifyAccess", "all")
	}
	add("Delegate", u.Delegate)
	add("KillMode", "mixed")
	add("CollectMode", "inactive-or-failed")
	duration("RuntimeMaxUSec", u.RuntimeMax)
	duration("TimeoutStartUSec", u.TimeoutStart)
	duration("TimeoutStopUSec", u.TimeoutStop)
	for _, a := range []string{"CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"} {
		add(a, true)
	}
	if u.CPUMillicores > 0 {
		if u.CPUMillicores > math.MaxUint64/1000 {
			return nil, fmt.Errorf("CPU limit of %d millicores is absurd", u.CPUMillicores)
		}
		add("CPUQuotaPerSecUSec", u.CPUMillicores*1000)
	}
	if u.MemoryMax > 0 {
		add("MemoryMax", u.MemoryMax)
	}
	if u.MemorySwapMax != nil {
		add("MemorySwapMax", *u.MemorySwapMax)
	}
	if u.TasksMax > 0 {
		add("TasksMax", u.TasksMax)
	}
	if len(u.ConditionPathExists) > 0 {
		var conditions []condition
		for _, p := range u.ConditionPathExists {
			file, negate := strings.CutPrefix(p, "!")
			if err := checkText(file); err != nil || !path.IsAbs(file) {
				return nil, fmt.Errorf("condition on %q: not an absolute path", p)
			}
			conditions = append(conditions, condition{Type: "ConditionPathExists", Negate: negate, Param: file})
		}
		add("Conditions", conditions)
	}
	for _, e := range []struct {
		name  string
		execs []Exec
	}{{"ExecStartPreEx", u.ExecStartPre}, {"ExecStartEx", u.ExecStart}, {"ExecStopEx", u.ExecStop}, {"ExecStopPostEx", u.ExecStopPost}} {
		commands, err := execCommands(e.execs)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
		if len(commands) > 0 {
			add(e.name, commands)
		}
	}
	return out, nil
}

func execCommands(execs []Exec) ([]execCommand, error) {
	var out []execCommand
	for _, e := range execs {
		if len(e.Args) == 0 || !path.IsAbs(e.Args[0]) {
			return nil, fmt.Errorf("program of %q is not an absolute path", e.Args)
		}
		for _, a := range e.Args {
			// D-Bus knows only text.
			if strings.IndexByte(a, 0) >= 0 || !utf8.ValidString(a) {
				return nil, fmt.Errorf("argument %q has a NUL byte or is not UTF-8", a)
			}
		}
		flags := []string{"no-env-expand"}
		if e.IgnoreFailure {
			flags = append(flags, "ignore-failure")
		}
		out = append(out, execCommand{Path: e.Args[0], Args: e.Args, Flags: flags})
	}
	return out, nil
}

// checkText refuses what would not survive in the unit file that systemd keeps
// of a transient unit.
func checkText(s string) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("%q is not UTF-8", s)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f {
			return fmt.Errorf("%q has a control character", s)
		}
	}
	return nil
}
