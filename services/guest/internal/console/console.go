// Package console is the guest's logger: an slog handler that writes one line a person can read per record. These
// lines share the container's standard error with the workload and are what an operator sees when an instance fails,
// so they begin with [guestapi.LogPrefix] and aren't JSON.
package console

import (
	"context"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// New returns a logger that writes records of level Info and above to w, one Write per record. It is safe for
// concurrent use.
func New(w io.Writer) *slog.Logger {
	return slog.New(&handler{mu: &sync.Mutex{}, w: w})
}

// handler implements slog.Handler. Groups become dotted prefixes.
type handler struct {
	mu     *sync.Mutex
	w      io.Writer
	attrs  string
	prefix string
}

// Enabled implements slog.Handler.
func (h *handler) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

// Handle implements slog.Handler.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(guestapi.LogPrefix)
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		b.WriteString("warning: ")
	}
	b.WriteString(oneLine(r.Message))
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		appendAttr(&b, h.prefix, a)
		return true
	})
	b.WriteByte('\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.w, b.String())
	return err
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	b.WriteString(h.attrs)
	for _, a := range attrs {
		appendAttr(&b, h.prefix, a)
	}
	next := *h
	next.attrs = b.String()
	return &next
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	next := *h
	next.prefix += name + "."
	return &next
}

func appendAttr(b *strings.Builder, prefix string, a slog.Attr) {
	value := a.Value.Resolve()
	if value.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, member := range value.Group() {
			appendAttr(b, prefix, member)
		}
		return
	}
	if a.Key == "" {
		return
	}
	b.WriteByte(' ')
	b.WriteString(prefix)
	b.WriteString(a.Key)
	b.WriteByte('=')
	text := value.String()
	if text == "" || strings.ContainsFunc(text, needsQuote) {
		text = strconv.Quote(text)
	}
	b.WriteString(text)
}

func needsQuote(r rune) bool {
	return r <= ' ' || r == '"' || r == '=' || r == 0x7f || !strconv.IsPrint(r)
}

// oneLine keeps a message on its line, whatever is in it.
func oneLine(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return s
	}
	return strconv.Quote(s)
}
