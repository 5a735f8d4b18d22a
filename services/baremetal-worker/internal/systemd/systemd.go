// Package systemd speaks to the systemd of a bare-metal host: over D-Bus,
// through a unix socket that the host's SSH connection forwards.
//
// A workload is a transient service. Starting one is a single call; what
// becomes of it is pushed by signals, on one subscription per host however many
// units are watched.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

const (
	// callTimeout bounds a D-Bus call; starting a unit is one call and a wait
	// for its job, which only the caller's context bounds.
	callTimeout = 30 * time.Second
	// openTimeout bounds the making of a bus connection.
	openTimeout = 20 * time.Second
	// retryMin and retryMax bound the pause before the bus is tried again while
	// the SSH connection holds.
	retryMin = 250 * time.Millisecond
	retryMax = 15 * time.Second
	// maxFetches bounds the units whose state is read at the same time after a
	// reconnect.
	maxFetches = 8
)

const (
	systemdName   = "org.freedesktop.systemd1"
	managerPath   = dbus.ObjectPath("/org/freedesktop/systemd1")
	managerIface  = "org.freedesktop.systemd1.Manager"
	propsIface    = "org.freedesktop.DBus.Properties"
	busName       = "org.freedesktop.DBus"
	busPath       = dbus.ObjectPath("/org/freedesktop/DBus")
	unitNamespace = "/org/freedesktop/systemd1/unit"
)

// Client is a host's systemd. Its methods are safe for concurrent use. While
// the host can't be reached calls fail at once with PROVIDER_UNAVAILABLE, and
// watches are silent.
type Client struct {
	conn   *sshconn.Conn
	log    *slog.Logger
	cancel context.CancelFunc
	done   chan struct{}
	fetch  chan struct{} // slots

	mu      sync.Mutex
	bus     *bus
	lastErr error
	changed chan struct{} // closed and replaced when bus changes
	watches map[dbus.ObjectPath]*watch
	jobs    map[string][]*jobWaiter // by unit
}

// bus is one connection to the host's system bus.
type bus struct {
	conn *dbus.Conn
	done <-chan struct{}
}

// Open starts to keep a bus connection through conn, until ctx ends or Close is
// called.
func Open(ctx context.Context, conn *sshconn.Conn, log *slog.Logger) *Client {
	ctx, cancel := context.WithCancel(ctx)
	c := &Client{
		conn:    conn,
		log:     log.With("host", conn.Name()),
		cancel:  cancel,
		done:    make(chan struct{}),
		fetch:   make(chan struct{}, maxFetches),
		changed: make(chan struct{}),
		watches: map[dbus.ObjectPath]*watch{},
		jobs:    map[string][]*jobWaiter{},
	}
	go c.manage(ctx)
	return c
}

// Close ends the bus connection. Units keep running.
func (c *Client) Close() error {
	c.cancel()
	<-c.done
	return nil
}

// Wait blocks until there is a bus connection, ctx ends, or the SSH connection
// is refused (see sshconn.Conn.Wait).
func (c *Client) Wait(ctx context.Context) error {
	for {
		c.mu.Lock()
		b, lastErr, changed := c.bus, c.lastErr, c.changed
		c.mu.Unlock()
		if b != nil {
			return nil
		}
		if err := c.conn.Wait(ctx); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-c.done:
			return c.classify(sshconn.ErrClosed, "connect")
		case <-ctx.Done():
			return c.classify(errors.Join(ctx.Err(), lastErr), "connect")
		}
	}
}

// manage keeps a bus connection for as long as there is an SSH connection.
func (c *Client) manage(ctx context.Context) {
	defer close(c.done)
	pause := retryMin
	for ctx.Err() == nil {
		state, changed := c.conn.Changed()
		if !state.Connected || state.Closed {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		b, signals, err := c.open(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			c.setBus(nil, err)
			c.log.WarnContext(ctx, "Cannot reach systemd", "error", err)
			select {
			case <-time.After(pause):
				pause = min(2*pause, retryMax)
			case <-changed:
				pause = retryMin
			case <-ctx.Done():
			}
			continue
		}
		pause = retryMin
		stop := context.AfterFunc(ctx, func() { _ = b.conn.Close() })
		c.setBus(b, nil)
		c.dispatch(b, signals) // Until the bus connection ends.
		stop()
		_ = b.conn.Close()
		c.setBus(nil, errors.New("connection to the system bus lost"))
		c.log.InfoContext(ctx, "Connection to systemd ended")
	}
}

// setBus publishes a bus connection, or its loss.
func (c *Client) setBus(b *bus, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bus, c.lastErr = b, err
	close(c.changed)
	c.changed = make(chan struct{})
	for _, waiters := range c.jobs {
		for _, w := range waiters {
			w.lose(b)
		}
	}
	if b == nil {
		return
	}
	for path, w := range c.watches {
		w.restart()
		go c.refresh(b, path, w)
	}
}

// open makes a bus connection and subscribes to the signals of all units.
func (c *Client) open(ctx context.Context) (*bus, <-chan *dbus.Signal, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	stream, err := c.conn.DialUnix(ctx, sshconn.SystemBusSocket)
	if err != nil {
		return nil, nil, err
	}
	conn, err := dbus.NewConn(stream, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		_ = stream.Close()
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.Close() })
	signals := make(chan *dbus.Signal, 64)
	err = func() error {
		// External is root's own socket; a bridge program has no credentials of
		// ours to pass on and takes anonymous.
		if err := conn.Auth([]dbus.Auth{dbus.AuthExternal("0"), dbus.AuthAnonymous()}); err != nil {
			return fmt.Errorf("authenticate: %w", err)
		}
		if err := conn.Hello(); err != nil {
			return fmt.Errorf("hello: %w", err)
		}
		conn.Signal(signals)
		for _, options := range [][]dbus.MatchOption{
			{dbus.WithMatchSender(systemdName), dbus.WithMatchInterface(managerIface), dbus.WithMatchObjectPath(managerPath)},
			{dbus.WithMatchSender(systemdName), dbus.WithMatchInterface(propsIface), dbus.WithMatchPathNamespace(unitNamespace)},
		} {
			if err := conn.AddMatchSignalContext(ctx, options...); err != nil {
				return fmt.Errorf("add match: %w", err)
			}
		}
		if err := conn.Object(systemdName, managerPath).CallWithContext(ctx, managerIface+".Subscribe", 0).Err; err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
		return nil
	}()
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("system bus: %w", err)
	}
	return &bus{conn: conn, done: conn.Context().Done()}, signals, nil
}

// current returns the bus connection, or why there is none.
func (c *Client) current() (*bus, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bus != nil {
		return c.bus, nil
	}
	if !c.conn.Connected() {
		if err := c.conn.LastError(); err != nil {
			return nil, backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: systemd: no connection", c.conn.Name())
		}
	}
	if c.lastErr != nil {
		return nil, c.classify(c.lastErr, "no connection")
	}
	return nil, backenderr.New(backenderr.ProviderUnavailable, "host %s: systemd: no connection yet", c.conn.Name())
}

// Call calls a method of any object on the host's system bus and stores its
// results in ret, pointers to values of the right types.
func (c *Client) Call(ctx context.Context, dest, path, method string, args []any, ret ...any) error {
	b, err := c.current()
	if err != nil {
		return err
	}
	call, err := b.call(ctx, dest, dbus.ObjectPath(path), method, args...)
	if err != nil {
		return c.classify(err, method)
	}
	if len(ret) == 0 {
		return nil
	}
	return c.classify(call.Store(ret...), method)
}

// call calls and waits; it fails at once when the connection is lost.
func (b *bus) call(ctx context.Context, dest string, path dbus.ObjectPath, method string, args ...any) (*dbus.Call, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	call := b.conn.Object(dest, path).CallWithContext(ctx, method, 0, args...)
	if call.Err != nil {
		select {
		case <-b.done:
			return call, fmt.Errorf("connection to the system bus lost: %w", call.Err)
		default:
		}
		return call, call.Err
	}
	return call, nil
}

func (b *bus) manager(ctx context.Context, method string, args ...any) (*dbus.Call, error) {
	return b.call(ctx, systemdName, managerPath, managerIface+"."+method, args...)
}

// HasOwner reports whether a service is on the bus, "org.fedoraproject.FirewallD1"
// for example.
func (c *Client) HasOwner(ctx context.Context, name string) (bool, error) {
	var has bool
	err := c.Call(ctx, busName, string(busPath), busName+".NameHasOwner", []any{name}, &has)
	return has, err
}

// Version returns systemd's version, "257.9-1~deb13u1".
func (c *Client) Version(ctx context.Context) (string, error) {
	var v dbus.Variant
	if err := c.Call(ctx, systemdName, string(managerPath), propsIface+".Get", []any{managerIface, "Version"}, &v); err != nil {
		return "", err
	}
	version, _ := v.Value().(string)
	return version, nil
}

// StartTransient starts a unit and waits until it runs: for a notifying
// service, until it has said so.
//
// It fails with ErrUnitExists if the name is taken, ErrConditionFailed if the
// unit's conditions don't hold, a *JobError if it failed, and INTERNAL for a
// unit that can't be rendered. When ctx ends, or the connection is lost, the
// unit may be there and start yet.
func (c *Client) StartTransient(ctx context.Context, unit Unit) error {
	props, err := unit.properties()
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "unit %s", unit.Name)
	}
	type auxiliary struct {
		Name  string
		Props []property
	}
	return c.job(ctx, unit.Name, "start", func(ctx context.Context, b *bus) (*dbus.Call, error) {
		return b.manager(ctx, "StartTransientUnit", unit.Name, "fail", props, []auxiliary{})
	})
}

// Start starts a unit that the host has, "podman.socket" for example.
func (c *Client) Start(ctx context.Context, name string) error {
	return c.job(ctx, name, "start", func(ctx context.Context, b *bus) (*dbus.Call, error) {
		return b.manager(ctx, "StartUnit", name, "replace")
	})
}

// Enable makes systemd start units at boot.
func (c *Client) Enable(ctx context.Context, names ...string) error {
	b, err := c.current()
	if err != nil {
		return err
	}
	call, err := b.manager(ctx, "EnableUnitFiles", names, false, false)
	if err != nil {
		return c.classify(err, "enable units")
	}
	var hasInstall bool
	var changes [][]any
	if err := call.Store(&hasInstall, &changes); err != nil {
		return c.classify(err, "enable units")
	}
	if len(changes) == 0 {
		return nil
	}
	_, err = b.manager(ctx, "Reload")
	return c.classify(err, "reload")
}

// Stop stops a unit and waits until it has stopped. One that isn't there is
// fine. When ctx ends the stopping goes on.
func (c *Client) Stop(ctx context.Context, name string) error {
	err := c.job(ctx, name, "stop", func(ctx context.Context, b *bus) (*dbus.Call, error) {
		return b.manager(ctx, "StopUnit", name, "replace")
	})
	if errorName(err) == errNoSuchUnit {
		return nil
	}
	return err
}

// Kill sends a signal to all processes of a unit. One that isn't there, or has
// no processes, is fine.
func (c *Client) Kill(ctx context.Context, name string, signal int32) error {
	b, err := c.current()
	if err != nil {
		return err
	}
	_, err = b.manager(ctx, "KillUnit", name, "all", signal)
	switch errorName(err) {
	case errNoSuchUnit, "org.freedesktop.systemd1.NoSuchProcess":
		return nil
	}
	return c.classify(err, "kill "+name)
}

// ResetFailed lets systemd forget a failed unit. One that isn't there is fine.
func (c *Client) ResetFailed(ctx context.Context, name string) error {
	b, err := c.current()
	if err != nil {
		return err
	}
	_, err = b.manager(ctx, "ResetFailedUnit", name)
	if errorName(err) == errNoSuchUnit {
		return nil
	}
	return c.classify(err, "reset "+name)
}

// Status returns a unit's state. One that isn't there is no error; see
// UnitStatus.Found.
func (c *Client) Status(ctx context.Context, name string) (UnitStatus, error) {
	b, err := c.current()
	if err != nil {
		return UnitStatus{}, err
	}
	props, _, err := b.properties(ctx, name)
	if err != nil {
		return UnitStatus{}, c.classify(err, "look at "+name)
	}
	return statusOf(name, props), nil
}

// properties returns a unit's properties and when, in the order of messages,
// they were true.
func (b *bus) properties(ctx context.Context, name string) (map[string]dbus.Variant, dbus.Sequence, error) {
	gone := map[string]dbus.Variant{"LoadState": dbus.MakeVariant(notFound)}
	// Asking a unit's object for properties would load a unit that isn't there.
	call, err := b.manager(ctx, "GetUnit", name)
	if errorName(err) == errNoSuchUnit {
		return gone, call.ResponseSequence, nil
	}
	if err != nil {
		return nil, 0, err
	}
	var path dbus.ObjectPath
	if err := call.Store(&path); err != nil {
		return nil, 0, err
	}
	call, err = b.call(ctx, systemdName, path, propsIface+".GetAll", "")
	if n := errorName(err); n == errNoSuchUnit || n == errUnknownObject {
		return gone, call.ResponseSequence, nil
	}
	if err != nil {
		return nil, 0, err
	}
	var all map[string]dbus.Variant
	if err := call.Store(&all); err != nil {
		return nil, 0, err
	}
	props := map[string]dbus.Variant{}
	for _, key := range statusKeys() {
		if v, ok := all[key]; ok {
			props[key] = v
		}
	}
	return props, call.ResponseSequence, nil
}

// ListedUnit is a unit as List shows it.
type ListedUnit struct {
	Name        string
	Description string
	LoadState   string
	ActiveState string
	SubState    string
}

// List returns the loaded units whose names match any of the shell patterns.
func (c *Client) List(ctx context.Context, patterns ...string) ([]ListedUnit, error) {
	b, err := c.current()
	if err != nil {
		return nil, err
	}
	call, err := b.manager(ctx, "ListUnitsByPatterns", []string{}, patterns)
	if err != nil {
		return nil, c.classify(err, "list units")
	}
	var rows []struct {
		Name, Description, LoadState, ActiveState, SubState, Followed string
		Path                                                          dbus.ObjectPath
		JobID                                                         uint32
		JobType                                                       string
		JobPath                                                       dbus.ObjectPath
	}
	if err := call.Store(&rows); err != nil {
		return nil, c.classify(err, "list units")
	}
	out := make([]ListedUnit, len(rows))
	for i, r := range rows {
		out[i] = ListedUnit{Name: r.Name, Description: r.Description, LoadState: r.LoadState, ActiveState: r.ActiveState, SubState: r.SubState}
	}
	return out, nil
}
