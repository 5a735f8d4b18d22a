// Package telemetry sets up what a process tells about itself: structured logs,
// traces and metrics. It sets nothing globally; what it makes is passed on.
package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/term"
)

// The log formats.
const (
	// FormatAuto is text on a terminal and JSON elsewhere.
	FormatAuto = "auto"
	// FormatJSON is one JSON object per line.
	FormatJSON = "json"
	// FormatText is key=value pairs for people.
	FormatText = "text"
)

// LogConfig says what is logged and how.
type LogConfig struct {
	// Level is debug, info, warn or error; empty means info.
	Level string
	// Format is one of the Format constants; empty means [FormatAuto].
	Format string
}

// NewLogger returns a logger that writes to w, which is standard error in a
// process and a buffer in tests. Records logged with a context that carries a
// span have its trace_id and span_id. An error names the key that is wrong.
func NewLogger(w io.Writer, cfg LogConfig) (*slog.Logger, error) {
	var level slog.Level
	switch strings.ToLower(cfg.Level) {
	case "", "info":
	case "debug":
		level = slog.LevelDebug
	case "warn":
		level = slog.LevelWarn
	case "error":
		level = slog.LevelError
	default:
		return nil, fmt.Errorf("level: unknown value %q, want debug, info, warn or error", cfg.Level)
	}
	text := false
	switch cfg.Format {
	case "", FormatAuto:
		f, ok := w.(*os.File)
		text = ok && term.IsTerminal(int(f.Fd()))
	case FormatJSON:
	case FormatText:
		text = true
	default:
		return nil, fmt.Errorf("format: unknown value %q, want %s, %s or %s", cfg.Format, FormatAuto, FormatJSON, FormatText)
	}
	options := &slog.HandlerOptions{Level: level}
	if text {
		return slog.New(traceHandler{slog.NewTextHandler(w, options)}), nil
	}
	return slog.New(traceHandler{slog.NewJSONHandler(w, options)}), nil
}

// traceHandler adds the identities of the context's span to each record.
type traceHandler struct{ slog.Handler }

// Handle implements [slog.Handler].
func (h traceHandler) Handle(ctx context.Context, record slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		record = record.Clone()
		record.AddAttrs(slog.String(KeyTraceID, span.TraceID().String()), slog.String(KeySpanID, span.SpanID().String()))
	}
	return h.Handler.Handle(ctx, record)
}

// WithAttrs implements [slog.Handler].
func (h traceHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return traceHandler{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements [slog.Handler].
func (h traceHandler) WithGroup(name string) slog.Handler {
	return traceHandler{h.Handler.WithGroup(name)}
}
