package sshconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// First returns the stream of the program of [Config.First] on the connection of
// a generation: what is written to it the program reads, and the other way
// round. It is one stream, for one user. It ends with the program, which
// [Stream.Why] then explains, and with the connection.
func (c *Conn) First(generation uint64) (Stream, error) {
	l, err := c.usable(true, func(have uint64) bool { return have == generation })
	if err != nil {
		return nil, err
	}
	if l.first == nil {
		return nil, backenderr.New(backenderr.ProviderUnavailable, "host %s: connection lost", c.cfg.Name)
	}
	return l.first, nil
}

// Stream is the input and output of a program on the host.
type Stream interface {
	io.ReadWriteCloser
	// Why returns what the program has written to its standard error.
	Why() string
}

// Cut ends the connection of a generation, if that is still the one there is.
// Everything in flight on it fails, and another is dialled: after the usual
// pause, or at once.
func (c *Conn) Cut(generation uint64, atOnce bool) {
	c.mu.Lock()
	l := c.link
	if l != nil && l.generation == generation {
		l.atOnce = atOnce
	} else {
		l = nil
	}
	c.mu.Unlock()
	if l != nil {
		_ = l.transport.Close()
	}
}

// Allow opens the connection of a generation to everything, if that is still
// the one there is. Without [Config.First] it always is open.
func (c *Conn) Allow(generation uint64) {
	c.mu.Lock()
	open := c.link != nil && c.link.generation == generation && c.link.closed
	if open {
		c.link.closed = false
	}
	c.mu.Unlock()
	if open {
		c.setState(func(s *State) { s.Closed = false })
	}
}

type (
	ungatedKey struct{}
	boundKey   struct{}
)

// Ungated returns a context for what may use a connection that isn't allowed
// yet: to look, and to send what the first program needs.
func Ungated(ctx context.Context) context.Context { return context.WithValue(ctx, ungatedKey{}, true) }

func isUngated(ctx context.Context) bool { return ctx.Value(ungatedKey{}) != nil }

// Bind returns a context for what must not go on over another connection than
// that of a generation. Then it fails instead.
func Bind(ctx context.Context, generation uint64) context.Context {
	return context.WithValue(ctx, boundKey{}, generation)
}

func isBound(ctx context.Context, generation uint64) bool {
	bound, ok := ctx.Value(boundKey{}).(uint64)
	return !ok || bound == generation
}

type firstStream struct {
	io.Reader
	io.WriteCloser

	session *ssh.Session
	stderr  *lockedText
	done    func()
}

// Why implements [Stream].
func (f *firstStream) Why() string { return f.stderr.String() }

// Close ends the program. (Closing its input alone must not meet a Write: they
// race in package ssh.)
func (f *firstStream) Close() error {
	err := f.session.Close()
	f.done()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// startFirst runs the first program on a connection that nobody else knows yet.
func (c *Conn) startFirst(ctx context.Context, l *link) error {
	line, err := Quote(c.cfg.First)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.DialTimeout)
	defer cancel()
	l.reserve(func(w *wire, _ time.Time) bool { return w == l.wire })
	session, err := await(ctx, l, l.client.NewSession, func(s *ssh.Session) { _ = s.Close() })
	if err != nil {
		return fmt.Errorf("first session: %w", err)
	}
	f := &firstStream{session: session, stderr: &lockedText{}, done: sync.OnceFunc(func() { l.unreserve(l.wire, time.Now()) })}
	session.Stderr = f.stderr
	if f.WriteCloser, err = session.StdinPipe(); err == nil {
		if f.Reader, err = session.StdoutPipe(); err == nil {
			_, err = await(ctx, l, func() (struct{}, error) { return struct{}{}, session.Start(line) }, func(struct{}) {})
		}
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", c.cfg.First[0], err)
	}
	l.first = f
	return nil
}

// maxWhy bounds what is kept of a program's complaints, in bytes.
const maxWhy = 1024

// lockedText keeps the first bytes that are written to it, while others read.
type lockedText struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write keeps what fits and claims to have kept all.
func (t *lockedText) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text.Write(p[:min(len(p), max(0, maxWhy-t.text.Len()))])
	return len(p), nil
}

// String returns what was kept.
func (t *lockedText) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(t.text.String(), "?"))
}
