package sshconn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

const (
	// lateFree is how long after the end of a session sshd may still count it.
	// A refusal in that time says nothing about how many it allows.
	lateFree = 250 * time.Millisecond
	// forgetLimit is how long a wire that sshd found full is believed to be so,
	// with as many sessions as it had then.
	forgetLimit = time.Minute
	// spareRetry is the pause after a failed try to dial a spare.
	spareRetry = 2 * time.Second
)

// wire is one SSH connection to the host: the main one, or a spare one.
//
// sshd bounds the sessions of each connection (MaxSessions, ten by default, one
// where an operator is strict), while SFTP holds one for good. When the main one
// has none left, spare connections carry what needs more. They end with the main
// one, so that a lost connection still fails everything at once.
type wire struct {
	client    *ssh.Client
	transport *activityConn

	// The fields below are the link's, protected by its sparesMu.
	open      int       // sessions that are open, or being opened
	limit     int       // how many sshd allowed when it last refused one
	limitAt   time.Time // when that was; zero if it never was
	retryAt   time.Time // not to be asked before
	endedAt   time.Time // when a session last ended
	idleSince time.Time // since when none is open
}

// room reports whether a session may be asked for.
func (w *wire) room(now time.Time) bool {
	if now.Before(w.retryAt) {
		return false
	}
	return w.limitAt.IsZero() || now.Sub(w.limitAt) > forgetLimit || w.open < w.limit
}

// session is an SSH session and the wire that it counts on.
type session struct {
	*ssh.Session

	done func()
}

// Close ends the session and gives its place back.
func (s *session) Close() error {
	defer s.done()
	return s.Session.Close()
}

// session opens a session: on the main connection, on a spare one when sshd has
// none free there, or, with as many spares as all slots may need, once one gets
// free.
func (c *Conn) session(ctx context.Context, l *link) (*session, error) {
	began := time.Now()
	var last error
	for {
		w := l.reserve(func(w *wire, now time.Time) bool { return w.room(now) })
		if w != nil {
			s, err := c.sessionOn(ctx, l, w)
			var refusal *ssh.OpenChannelError
			switch {
			case err == nil:
				return s, nil
			case errors.As(err, &refusal), w != l.wire && ctx.Err() == nil && !l.lost():
				last = err // another one
				continue
			}
			return nil, err
		}
		// What sshd counts late is worth a little patience, less than it takes
		// to dial.
		if time.Since(began) > lateFree || !l.freesSoon() {
			if err := c.addSpare(ctx, l); err != nil {
				return nil, err
			}
			if l.reservable() {
				continue
			}
		}
		select {
		case <-time.After(openRetry):
		case <-ctx.Done():
			return nil, fmt.Errorf("sshd opens no session: %w", errors.Join(ctx.Err(), last, l.spareError()))
		case <-l.done:
			return nil, errors.New("connection lost")
		}
	}
}

// sessionOn opens a session on a wire that has been reserved for it.
func (c *Conn) sessionOn(ctx context.Context, l *link, w *wire) (*session, error) {
	s, err := await(ctx, l, w.client.NewSession, func(s *ssh.Session) { _ = s.Close() })
	if err == nil {
		return &session{Session: s, done: sync.OnceFunc(func() { l.unreserve(w, time.Now()) })}, nil
	}
	l.unreserve(w, time.Time{})
	if _, refused := errors.AsType[*ssh.OpenChannelError](err); refused {
		l.refused(w)
	} else if w != l.wire && ctx.Err() == nil {
		// It is broken: who tends it notices.
		_ = w.transport.Close()
		l.dropSpare(w)
	}
	return nil, err
}

// lost reports whether the main connection has ended.
func (l *link) lost() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// reserve takes a place on the first wire that suits: the main one, then the
// spare on which sessions ended longest ago.
func (l *link) reserve(suits func(*wire, time.Time) bool) *wire {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	w := l.suitable(suits)
	if w != nil {
		w.open++
	}
	return w
}

// reservable reports whether there is a wire with room.
func (l *link) reservable() bool {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	return l.suitable(func(w *wire, now time.Time) bool { return w.room(now) }) != nil
}

func (l *link) suitable(suits func(*wire, time.Time) bool) *wire {
	now := time.Now()
	if suits(l.wire, now) {
		return l.wire
	}
	var found *wire
	for _, w := range l.spares {
		if suits(w, now) && (found == nil || w.endedAt.Before(found.endedAt)) {
			found = w
		}
	}
	return found
}

// unreserve gives a place back. ended is when its session ended, zero if it
// never began.
func (l *link) unreserve(w *wire, ended time.Time) {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	w.open--
	if !ended.IsZero() {
		w.endedAt = ended
	}
	if w.open == 0 {
		w.idleSince = time.Now()
	}
}

// refused remembers that sshd opened no further session on a wire.
func (l *link) refused(w *wire) {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	now := time.Now()
	w.retryAt = now.Add(openRetry)
	if now.Sub(w.endedAt) > lateFree {
		w.limit, w.limitAt = w.open, now
	}
}

// freesSoon reports whether a wire waits only for sshd to count a session out
// that has ended.
func (l *link) freesSoon() bool {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	now := time.Now()
	soon := func(w *wire) bool { return now.Sub(w.endedAt) <= lateFree && w.room(w.retryAt) }
	return slices.ContainsFunc(l.spares, soon) || soon(l.wire)
}

func (l *link) countSpares() int {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	return len(l.spares)
}

func (l *link) spareError() error {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	return l.spareErr
}

// maxSpares is enough for every slot at one session each: commands, sockets'
// stand-ins and SFTP.
func (c *Conn) maxSpares() int { return c.cfg.MaxSessions + maxStreams + 1 }

// addSpare dials a spare connection if there may be one more and none is being
// dialled by another. A dial that fails is no error: a session may get free
// meanwhile. A host that opens no session on a new connection either is unfit.
func (c *Conn) addSpare(ctx context.Context, l *link) error {
	select {
	case l.dialling <- struct{}{}:
		defer func() { <-l.dialling }()
	default:
		return nil
	}
	l.sparesMu.Lock()
	enough := len(l.spares) >= c.maxSpares() || time.Now().Before(l.notBefore)
	l.sparesMu.Unlock()
	if enough || l.reservable() {
		return nil
	}
	dial, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-l.done:
			cancel()
		case <-stop:
		}
	}()
	w, err := c.dialWire(dial)
	if err == nil {
		if err = c.admit(dial, l, w); err != nil {
			_ = w.transport.Close()
		}
	}
	var refusal *ssh.OpenChannelError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case l.lost():
		return errors.New("connection lost")
	case errors.As(err, &refusal):
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: sshd opens no session even on a new connection (MaxSessions 0?)", c.cfg.Name)
	case err != nil:
		c.log.WarnContext(ctx, "Cannot open a spare connection to host", "error", err)
		l.sparesMu.Lock()
		defer l.sparesMu.Unlock()
		l.spareErr, l.notBefore = fmt.Errorf("spare connection: %w", err), time.Now().Add(spareRetry)
	}
	return nil
}

// admit makes a new connection a spare one of the link.
func (c *Conn) admit(ctx context.Context, l *link, w *wire) error {
	// The first session shows that there can be one, and what serves it: the
	// shell's parent is the connection's sshd.
	s, err := await(ctx, l, w.client.NewSession, func(s *ssh.Session) { _ = s.Close() })
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	out, err := await(ctx, l, func() ([]byte, error) { return s.Output("echo $PPID") }, func([]byte) {})
	if err != nil {
		return fmt.Errorf("ask for the process of sshd: %w", err)
	}
	sshd, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil || sshd <= 1 {
		return fmt.Errorf("the shell named %q as the process of sshd", out)
	}
	if c.cfg.Admit != nil {
		if err := c.cfg.Admit(ctx, sshd); err != nil {
			return err
		}
	}
	now := time.Now()
	w.endedAt, w.idleSince = now, now
	l.sparesMu.Lock()
	l.spares = append(l.spares, w)
	count := len(l.spares)
	if l.lost() { // and its spares were closed already
		l.spares = l.spares[:count-1]
		l.sparesMu.Unlock()
		return errors.New("connection lost")
	}
	l.spareErr = nil
	l.sparesGroup.Go(func() { c.tend(context.WithoutCancel(ctx), l, w) })
	l.sparesMu.Unlock()
	c.log.InfoContext(ctx, "Opened a spare connection: the host's sshd allows few sessions on each", "generation", l.generation, "spares", count)
	return nil
}

// tend keeps a spare connection alive until it is lost, idle for long, or the
// main one has ended. It outlives the call that needed it.
func (c *Conn) tend(ctx context.Context, l *link, w *wire) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lost := make(chan error, 1)
	go func() { lost <- w.client.Wait() }()
	l.sparesGroup.Go(func() {
		tick := time.NewTicker(max(c.cfg.SpareIdle/4, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-l.done:
				cancel()
				return
			case <-ctx.Done():
				return
			}
			if l.dropIdle(w, c.cfg.SpareIdle) {
				cancel()
				return
			}
		}
	})
	err := c.keepAlive(ctx, w, lost)
	_ = w.transport.Close()
	if l.dropSpare(w) {
		c.log.InfoContext(ctx, "Lost a spare connection to host", "error", err)
	}
}

// dropIdle takes a spare off the list if it has had no session for so long.
func (l *link) dropIdle(w *wire, idle time.Duration) bool {
	l.sparesMu.Lock()
	unused := w.open == 0 && time.Since(w.idleSince) >= idle
	l.sparesMu.Unlock()
	return unused && l.dropSpareIf(w, func() bool { return w.open == 0 })
}

// dropSpare takes a spare off the list and reports whether it was there.
func (l *link) dropSpare(w *wire) bool { return l.dropSpareIf(w, func() bool { return true }) }

func (l *link) dropSpareIf(w *wire, holds func() bool) bool {
	l.sparesMu.Lock()
	defer l.sparesMu.Unlock()
	for i, s := range l.spares {
		if s == w && holds() {
			l.spares = append(l.spares[:i], l.spares[i+1:]...)
			return true
		}
	}
	return false
}

// closeSpares ends all spares after the main connection and waits for that.
func (l *link) closeSpares() {
	l.sparesMu.Lock()
	for _, w := range l.spares {
		_ = w.transport.Close()
	}
	l.spares = nil
	l.sparesMu.Unlock()
	l.sparesGroup.Wait()
}
