package sshserver

import (
	"container/list"
	"net"
	"sync"
	"time"

	"github.com/gliderlabs/ssh"
)

// limiter bounds number and time of connections that haven't authenticated, so that scanners can neither exhaust
// memory nor lock the tenant out. When it is full, the oldest gives way: a real client needs a fraction of a second.
type limiter struct {
	max     int
	timeout time.Duration

	mu      sync.Mutex
	closed  bool
	pending *list.List // of *handshake, oldest first
	// open are all connections, authenticated or not. The library keeps such a set too, but a connection enters it only
	// some time after it has authenticated, and so could slip through between the two at the end.
	open map[*handshake]struct{}
}

// handshake is a connection that the limiter watches. It stays in the connection's context.
type handshake struct {
	net.Conn

	limiter *limiter
	timer   *time.Timer
	element *list.Element // nil when no longer watched; guarded by limiter.mu
}

type handshakeKey struct{}

func newLimiter(limit int, timeout time.Duration) *limiter {
	return &limiter{max: limit, timeout: timeout, pending: list.New(), open: map[*handshake]struct{}{}}
}

// admit implements ssh.ConnCallback.
func (l *limiter) admit(ctx ssh.Context, conn net.Conn) net.Conn {
	h := &handshake{Conn: conn, limiter: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	if l.pending.Len() >= l.max {
		if oldest, ok := l.pending.Front().Value.(*handshake); ok {
			l.forgetLocked(oldest)
			_ = oldest.Conn.Close()
		}
	}
	h.element = l.pending.PushBack(h)
	l.open[h] = struct{}{}
	h.timer = time.AfterFunc(l.timeout, func() {
		if l.forget(h) {
			_ = conn.Close()
		}
	})
	ctx.SetValue(handshakeKey{}, h)
	return h
}

// release ends the watch over the context's connection, which has authenticated.
func (l *limiter) release(ctx ssh.Context) {
	if h, ok := ctx.Value(handshakeKey{}).(*handshake); ok {
		l.forget(h)
	}
}

// forget says whether h was still watched.
func (l *limiter) forget(h *handshake) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.forgetLocked(h)
}

func (l *limiter) forgetLocked(h *handshake) bool {
	if h.element == nil {
		return false
	}
	l.pending.Remove(h.element)
	h.element = nil
	h.timer.Stop()
	return true
}

// close ends all handshakes, also future ones.
func (l *limiter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for l.pending.Len() > 0 {
		h, ok := l.pending.Front().Value.(*handshake)
		if !ok {
			return
		}
		l.forgetLocked(h)
		_ = h.Conn.Close()
	}
}

// closeAll closes the authenticated connections too. It is for after close.
func (l *limiter) closeAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for h := range l.open {
		_ = h.Conn.Close()
	}
}

// Close implements net.Conn.
func (h *handshake) Close() error {
	h.limiter.mu.Lock()
	h.limiter.forgetLocked(h)
	delete(h.limiter.open, h)
	h.limiter.mu.Unlock()
	return h.Conn.Close()
}
