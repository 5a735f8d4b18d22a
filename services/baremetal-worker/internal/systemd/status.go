package systemd

import (
	"encoding/hex"
	"time"

	"github.com/godbus/dbus/v5"
)

// UnitStatus is what systemd says about a unit.
type UnitStatus struct {
	// Name is the unit's.
	Name string
	// LoadState is "not-found" for a unit that isn't there: never started, or
	// ended and collected. Who watched it end still gets here how it ended.
	LoadState string
	// ActiveState is "active", "activating", "deactivating", "inactive",
	// "failed", ….
	ActiveState string
	// SubState is more exactly that.
	SubState string
	// Result is "success", "timeout", "exit-code", "signal", "oom-kill",
	// "exec-condition", ….
	Result string
	// ExecMainCode and ExecMainStatus are how the main process ended: the
	// CLD_ code of waitid (1 exited, 2 killed, 3 dumped), and the exit code or
	// signal.
	ExecMainCode   int32
	ExecMainStatus int32
	// ConditionResult is whether the start's conditions held.
	ConditionResult bool
	// MainPID is the main process's, 0 if there is none.
	MainPID uint32
	// InvocationID is another one for each start, in hex.
	InvocationID string
	// ActiveEnter and ActiveExit are when it became active and stopped being
	// so, by the host's clock; zero if it never did.
	ActiveEnter, ActiveExit time.Time
	// StateChange is when ActiveState last changed.
	StateChange time.Time

	// CPUUsageNSec, MemoryPeak, MemoryCurrent, IOReadBytes and IOWriteBytes are
	// nil where the host doesn't account for them. They are as of the moment
	// of a Status call; Watch doesn't follow them.
	CPUUsageNSec              *uint64
	MemoryPeak, MemoryCurrent *uint64
	IOReadBytes, IOWriteBytes *uint64
}

// Found reports whether systemd knows the unit.
func (s UnitStatus) Found() bool { return s.LoadState != "" && s.LoadState != notFound }

// Running reports whether the unit runs or is about to.
func (s UnitStatus) Running() bool {
	switch s.ActiveState {
	case "active", "activating", "reloading", "refreshing", "deactivating":
		return true
	}
	return false
}

const notFound = "not-found"

// missing is the status of a unit that isn't there.
func missing(name string) UnitStatus {
	return UnitStatus{Name: name, LoadState: notFound, ActiveState: "inactive", SubState: "dead"}
}

// statusKeys are the properties that statusOf reads.
func statusKeys() []string {
	return []string{
		"LoadState", "ActiveState", "SubState", "Result", "ExecMainCode", "ExecMainStatus", "ConditionResult", "ConditionTimestamp", "MainPID", "InvocationID",
		"ActiveEnterTimestamp", "ActiveExitTimestamp", "StateChangeTimestamp", "CPUUsageNSec", "MemoryPeak", "MemoryCurrent", "IOReadBytes", "IOWriteBytes",
	}
}

// statusOf reads properties; those of another type than expected count as
// absent.
func statusOf(name string, props map[string]dbus.Variant) UnitStatus {
	s := UnitStatus{
		Name:            name,
		LoadState:       value[string](props, "LoadState"),
		ActiveState:     value[string](props, "ActiveState"),
		SubState:        value[string](props, "SubState"),
		Result:          value[string](props, "Result"),
		ExecMainCode:    value[int32](props, "ExecMainCode"),
		ExecMainStatus:  value[int32](props, "ExecMainStatus"),
		ConditionResult: value[bool](props, "ConditionResult"),
		MainPID:         value[uint32](props, "MainPID"),
		InvocationID:    hex.EncodeToString(value[[]byte](props, "InvocationID")),
		ActiveEnter:     timestamp(props, "ActiveEnterTimestamp"),
		ActiveExit:      timestamp(props, "ActiveExitTimestamp"),
		StateChange:     timestamp(props, "StateChangeTimestamp"),
		CPUUsageNSec:    counter(props, "CPUUsageNSec"),
		MemoryPeak:      counter(props, "MemoryPeak"),
		MemoryCurrent:   counter(props, "MemoryCurrent"),
		IOReadBytes:     counter(props, "IOReadBytes"),
		IOWriteBytes:    counter(props, "IOWriteBytes"),
	}
	if s.LoadState == notFound && s.ActiveState == "" {
		return missing(name)
	}
	return s
}

func value[T any](props map[string]dbus.Variant, key string) T {
	v, _ := props[key].Value().(T)
	return v
}

// timestamp reads microseconds since 1970; 0 is "never".
func timestamp(props map[string]dbus.Variant, key string) time.Time {
	us := value[uint64](props, key)
	if us == 0 || us > 1<<62 {
		return time.Time{}
	}
	return time.UnixMicro(int64(us))
}

// counter reads a counter; systemd says 2^64-1 for one that it doesn't have.
func counter(props map[string]dbus.Variant, key string) *uint64 {
	v, ok := props[key].Value().(uint64)
	if !ok || v == ^uint64(0) {
		return nil
	}
	return &v
}
