package systemd

import (
	"context"
	"errors"
	"fmt"

	"github.com/godbus/dbus/v5"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// ErrUnitExists says that a unit of this name is loaded: running, or failed and
// not yet collected.
var ErrUnitExists = errors.New("unit exists already")

// ErrConditionFailed says that the conditions of a unit didn't hold, so that
// nothing of it was started.
var ErrConditionFailed = errors.New("the unit's conditions do not hold")

// JobError says that systemd couldn't start or stop a unit.
type JobError struct {
	// Unit is the unit's name.
	Unit string
	// Result is the job's: "failed", "timeout", "canceled", "dependency", ….
	Result string
	// Status is the unit's state after that, as far as it could be read.
	Status UnitStatus
}

// Error says what is known.
func (e *JobError) Error() string {
	if e.Status.Result == "" || e.Status.Result == "success" {
		return fmt.Sprintf("unit %s: job %s", e.Unit, e.Result)
	}
	return fmt.Sprintf("unit %s: job %s, result %s, main process ended with code %d status %d", e.Unit, e.Result, e.Status.Result, e.Status.ExecMainCode, e.Status.ExecMainStatus)
}

// Names of D-Bus errors.
const (
	errNoSuchUnit    = "org.freedesktop.systemd1.NoSuchUnit"
	errUnitExists    = "org.freedesktop.systemd1.UnitExists"
	errUnknownObject = "org.freedesktop.DBus.Error.UnknownObject"
)

// errorName returns the name of a D-Bus error, or "".
func errorName(err error) string {
	if e, ok := errors.AsType[dbus.Error](err); ok {
		return e.Name
	}
	if p, ok := errors.AsType[*dbus.Error](err); ok {
		return p.Name
	}
	return ""
}

// classify gives an error its reason.
func (c *Client) classify(err error, doing string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*backenderr.Error](err); ok {
		return err
	}
	host := c.conn.Name()
	switch errorName(err) {
	case "":
	case "org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Timeout", "org.freedesktop.DBus.Error.TimedOut",
		"org.freedesktop.DBus.Error.Disconnected", "org.freedesktop.DBus.Error.NameHasNoOwner", "org.freedesktop.DBus.Error.LimitsExceeded":
		return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: systemd: %s", host, doing)
	default:
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: systemd: %s", host, doing)
	}
	if errors.Is(err, context.Canceled) {
		return backenderr.Wrap(backenderr.Cancelled, err, "host %s: systemd: %s", host, doing)
	}
	return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: systemd: %s", host, doing)
}
