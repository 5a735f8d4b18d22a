package firewall

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Names of firewalld's D-Bus interface.
const (
	firewalldName  = "org.fedoraproject.FirewallD1"
	firewalldPath  = "/org/fedoraproject/FirewallD1"
	firewalldZones = "org.fedoraproject.FirewallD1.zone"
)

// busctl is systemd's own D-Bus client.
const busctl = "/usr/bin/busctl"

// Bus is a host's system bus; *systemd.Client is one.
type Bus interface {
	// HasOwner reports whether a service is on the bus.
	HasOwner(ctx context.Context, name string) (bool, error)
	// Call calls a method and stores its results.
	Call(ctx context.Context, dest, path, method string, args []any, ret ...any) error
}

// Firewalld is the host's firewalld, where it has one. Its zones drop what they
// don't know, whatever our own table lets through, so a grant's ports must be
// open there too.
type Firewalld struct {
	bus Bus
}

// NewFirewalld returns the firewalld on a host's bus.
func NewFirewalld(bus Bus) *Firewalld { return &Firewalld{bus: bus} }

// Active reports whether firewalld runs on the host.
func (f *Firewalld) Active(ctx context.Context) (bool, error) {
	return f.bus.HasOwner(ctx, firewalldName)
}

// AddPort opens a port until the timeout, in a zone, or in the default zone for
// "". One that is open is fine, and keeps its end.
func (f *Firewalld) AddPort(ctx context.Context, zone string, port Port, timeout time.Duration) error {
	seconds, err := checkFirewalld(zone, port, timeout)
	if err != nil {
		return err
	}
	var used string
	err = f.bus.Call(ctx, firewalldName, firewalldPath, firewalldZones+".addPort",
		[]any{zone, strconv.Itoa(int(port.Number)), port.Protocol, seconds}, &used)
	return ignoreText(err, "ALREADY_ENABLED")
}

// RemovePort closes a port. One that isn't open is fine.
func (f *Firewalld) RemovePort(ctx context.Context, zone string, port Port) error {
	if _, err := checkFirewalld(zone, port, time.Second); err != nil {
		return err
	}
	var used string
	err := f.bus.Call(ctx, firewalldName, firewalldPath, firewalldZones+".removePort",
		[]any{zone, strconv.Itoa(int(port.Number)), port.Protocol}, &used)
	return ignoreText(err, "NOT_ENABLED")
}

// ignoreText drops an error that firewalld tells by the beginning of its text,
// all its errors having one name.
func ignoreText(err error, word string) error {
	if err != nil && strings.Contains(err.Error(), word) {
		return nil
	}
	return err
}

// zoneRegexp is firewalld's rule for names of zones.
var zoneRegexp = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_/-]{0,16}$`)

func checkFirewalld(zone string, port Port, timeout time.Duration) (int32, error) {
	if zone != "" && !zoneRegexp.MatchString(zone) {
		return 0, fmt.Errorf("zone %q is not of the form %s", zone, zoneRegexp)
	}
	if timeout < time.Second || timeout > maxTimeout {
		return 0, fmt.Errorf("timeout %s is not between 1 s and %s", timeout, maxTimeout)
	}
	return int32((timeout + time.Second - 1) / time.Second), port.check()
}

// FirewalldAddArgs renders AddPort as a command for a unit. It fails for a port
// that is open already: remove it first.
func FirewalldAddArgs(zone string, port Port, timeout time.Duration) ([]string, error) {
	seconds, err := checkFirewalld(zone, port, timeout)
	return []string{
		busctl, "call", firewalldName, firewalldPath, firewalldZones, "addPort", "sssi",
		zone, strconv.Itoa(int(port.Number)), port.Protocol, strconv.Itoa(int(seconds)),
	}, err
}

// FirewalldRemoveArgs renders RemovePort as a command for a unit. It fails for
// a port that isn't open: let the unit ignore that.
func FirewalldRemoveArgs(zone string, port Port) ([]string, error) {
	_, err := checkFirewalld(zone, port, time.Second)
	return []string{
		busctl, "call", firewalldName, firewalldPath, firewalldZones, "removePort", "sss",
		zone, strconv.Itoa(int(port.Number)), port.Protocol,
	}, errors.Join(err)
}
