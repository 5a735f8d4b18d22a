package systemd

import (
	"context"
	"errors"
	"maps"
	"slices"

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// unitPath returns the object of a unit.
func unitPath(name string) dbus.ObjectPath {
	return dbus.ObjectPath(unitNamespace + "/" + sdbus.PathBusEscape(name))
}

// jobWaiter waits for the end of a job of one unit.
type jobWaiter struct {
	bus     *bus
	results map[dbus.ObjectPath]string // jobs of the unit that ended since the wait began
	props   map[string]dbus.Variant    // of the unit, as far as signals told them
	wake    chan struct{}              // capacity 1
	lost    bool
}

func (w *jobWaiter) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// lose wakes a waiter whose bus connection isn't the current one any more.
func (w *jobWaiter) lose(now *bus) {
	if w.bus != now {
		w.lost = true
		w.notify()
	}
}

// job calls something that queues a job for a unit, and waits for the job.
func (c *Client) job(ctx context.Context, name, verb string, call func(context.Context, *bus) (*dbus.Call, error)) error {
	b, err := c.current()
	if err != nil {
		return err
	}
	doing := verb + " " + name
	// Before the call: the job may be over before its answer is read.
	w := &jobWaiter{bus: b, results: map[dbus.ObjectPath]string{}, wake: make(chan struct{}, 1)}
	c.mu.Lock()
	if c.bus != b {
		w.lost = true
		w.notify()
	}
	c.jobs[name] = append(c.jobs[name], w)
	c.mu.Unlock()
	defer c.forget(name, w)

	reply, err := call(ctx, b)
	if err != nil {
		if errorName(err) == errUnitExists {
			return errors.Join(ErrUnitExists, c.classify(err, doing))
		}
		return c.classify(err, doing)
	}
	var job dbus.ObjectPath
	if err := reply.Store(&job); err != nil {
		return c.classify(err, doing)
	}
	for {
		c.mu.Lock()
		result, over := w.results[job]
		lost, props := w.lost, w.props
		c.mu.Unlock()
		unmet := value[uint64](props, "ConditionTimestamp") > 0 && !value[bool](props, "ConditionResult")
		switch {
		case over && result == "done" && unmet && verb == "start":
			return ErrConditionFailed
		case over && result == "done":
			return nil
		case over:
			// Not asked for: the unit may be collected already.
			return &JobError{Unit: name, Result: result, Status: statusOf(name, props)}
		case lost:
			return backenderr.New(backenderr.ProviderUnavailable, "host %s: systemd: %s: connection lost before the job ended", c.conn.Name(), doing)
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return c.classify(ctx.Err(), doing)
		}
	}
}

func (c *Client) forget(name string, w *jobWaiter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := slices.DeleteFunc(c.jobs[name], func(other *jobWaiter) bool { return other == w })
	if len(left) == 0 {
		delete(c.jobs, name)
		return
	}
	c.jobs[name] = left
}

// watch is what is known about one watched unit, shared by all who watch it.
type watch struct {
	name        string
	subscribers map[*subscriber]struct{}

	known bool
	props map[string]dbus.Variant
	// since is when props were read; earlier signals are in them already.
	since dbus.Sequence
	// early are signals that came before the first reading did.
	early []unitSignal
}

// subscriber is one Watch call.
type subscriber struct {
	ch chan UnitStatus // capacity 1: the latest status
}

// unitSignal is a change that systemd told of.
type unitSignal struct {
	sequence dbus.Sequence
	changed  map[string]dbus.Variant // nil: the unit is gone
}

// restart forgets what an old connection told.
func (w *watch) restart() { w.known, w.props, w.since, w.early = false, nil, 0, nil }

// Watch sends a unit's status, at once and then whenever it changes, until ctx
// ends, which closes the channel. A slow reader gets the latest status, not
// each. A unit that isn't there, or is gone, is a status too. While the host
// can't be reached nothing is sent; once it can again, the status is.
func (c *Client) Watch(ctx context.Context, name string) <-chan UnitStatus {
	s := &subscriber{ch: make(chan UnitStatus, 1)}
	path := unitPath(name)
	c.mu.Lock()
	w := c.watches[path]
	if w == nil {
		w = &watch{name: name, subscribers: map[*subscriber]struct{}{}}
		c.watches[path] = w
		if c.bus != nil {
			go c.refresh(c.bus, path, w)
		}
	}
	w.subscribers[s] = struct{}{}
	if w.known {
		s.ch <- statusOf(name, w.props)
	}
	c.mu.Unlock()
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(w.subscribers, s)
		if len(w.subscribers) == 0 && c.watches[path] == w {
			delete(c.watches, path)
		}
		close(s.ch)
	})
	return s.ch
}

// publish sends the status to all who watch. The caller holds the lock.
func (w *watch) publish() {
	status := statusOf(w.name, w.props)
	for s := range w.subscribers {
		select {
		case <-s.ch: // Outdated.
		default:
		}
		s.ch <- status
	}
}

// refresh reads a unit's state anew. Failing that, the connection is about to
// end, and the next one reads it.
func (c *Client) refresh(b *bus, path dbus.ObjectPath, w *watch) {
	select {
	case c.fetch <- struct{}{}:
		defer func() { <-c.fetch }()
	case <-b.done:
		return
	}
	props, sequence, err := b.properties(b.conn.Context(), w.name)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bus != b || c.watches[path] != w {
		return
	}
	if err != nil {
		c.log.Warn("Cannot read a unit's state", "unit", w.name, "error", err)
		_ = b.conn.Close()
		return
	}
	w.known, w.props, w.since = true, props, sequence
	for _, s := range w.early {
		w.apply(s)
	}
	w.early = nil
	w.publish()
}

// apply takes a signal into account, unless it's older than what is known.
func (w *watch) apply(s unitSignal) bool {
	if s.sequence <= w.since {
		return false
	}
	var relevant bool
	w.props, relevant = merge(w.props, s.changed)
	return relevant
}

// merge returns properties with changes, or after the removal of the unit, and
// whether that makes a difference. How a unit ended stays known when it's
// removed: with CollectMode, systemd tells both in one breath.
func merge(old, changed map[string]dbus.Variant) (map[string]dbus.Variant, bool) {
	props := maps.Clone(old)
	if props == nil {
		props = map[string]dbus.Variant{}
	}
	if changed == nil {
		props["LoadState"] = dbus.MakeVariant(notFound)
		if state := value[string](props, "ActiveState"); state != "failed" && state != "" {
			props["ActiveState"], props["SubState"] = dbus.MakeVariant("inactive"), dbus.MakeVariant("dead")
		}
		return props, true
	}
	relevant := false
	for _, key := range statusKeys() {
		if v, ok := changed[key]; ok {
			props[key] = v
			relevant = true
		}
	}
	if _, ok := changed["ActiveState"]; ok && value[string](props, "LoadState") != "loaded" {
		// It is there. Systemd doesn't say "loaded", but this.
		props["LoadState"] = dbus.MakeVariant("loaded")
	}
	return props, relevant
}

// dispatch handles signals until the connection ends.
func (c *Client) dispatch(b *bus, signals <-chan *dbus.Signal) {
	for {
		select {
		case <-b.done:
			return
		case s, ok := <-signals:
			if !ok {
				return
			}
			c.handle(s)
		}
	}
}

func (c *Client) handle(s *dbus.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s.Name {
	case managerIface + ".JobRemoved":
		var id uint32
		var job dbus.ObjectPath
		var unit, result string
		if dbus.Store(s.Body, &id, &job, &unit, &result) != nil {
			return
		}
		for _, w := range c.jobs[unit] {
			w.results[job] = result
			w.notify()
		}
	case managerIface + ".UnitRemoved":
		var name string
		var path dbus.ObjectPath
		if dbus.Store(s.Body, &name, &path) == nil {
			c.signalled(path, unitSignal{sequence: s.Sequence})
		}
	case propsIface + ".PropertiesChanged":
		var iface string
		var changed map[string]dbus.Variant
		var invalidated []string
		if dbus.Store(s.Body, &iface, &changed, &invalidated) != nil {
			return
		}
		for unit, waiters := range c.jobs {
			if unitPath(unit) == s.Path {
				for _, w := range waiters {
					w.props, _ = merge(w.props, changed)
				}
			}
		}
		c.signalled(s.Path, unitSignal{sequence: s.Sequence, changed: changed})
	}
}

// signalled passes a signal on to who watches the unit. The caller holds the
// lock.
func (c *Client) signalled(path dbus.ObjectPath, s unitSignal) {
	w := c.watches[path]
	switch {
	case w == nil:
	case !w.known:
		w.early = append(w.early, s)
	case w.apply(s):
		w.publish()
	}
}
