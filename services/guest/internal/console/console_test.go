package console

import (
	"bytes"
	"errors"
	"log/slog"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func TestRecordsAreLinesForPeople(t *testing.T) {
	for want, log := range map[string]func(*slog.Logger){
		"Plain":                             func(l *slog.Logger) { l.Info("Plain") },
		"warning: Some a=1 b=\"two words\"": func(l *slog.Logger) { l.Warn("Some", "a", 1, "b", "two words") },
		`error: Bad error="first\nsecond"`:  func(l *slog.Logger) { l.Error("Bad", "error", errors.New("first\nsecond")) },
		`"Forged\nline" k=""`:               func(l *slog.Logger) { l.Info("Forged\nline", "k", "") },
		"Grouped a=1 g.b=2 g.h.c=3":         func(l *slog.Logger) { l.With("a", 1).WithGroup("g").Info("Grouped", "b", 2, slog.Group("h", "c", 3)) },
		"Hidden key=[redacted]":             func(l *slog.Logger) { l.Info("Hidden", "key", guestapi.NewHostKey("pem")) },
		`Quoted k="a=\"b\"" e="\x1b[31m"`:   func(l *slog.Logger) { l.Info("Quoted", "k", `a="b"`, "e", "\x1b[31m") },
		"Attached in.a=1":                   func(l *slog.Logger) { l.WithGroup("in").With("a", 1).Info("Attached") },
		"Empty":                             func(l *slog.Logger) { l.WithGroup("").Info("Empty", slog.Attr{}) },
	} {
		var buf bytes.Buffer
		log(New(&buf))
		if got := buf.String(); got != guestapi.LogPrefix+want+"\n" {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	var buf bytes.Buffer
	New(&buf).Debug("Not shown")
	if buf.Len() != 0 {
		t.Errorf("debug shows %q", buf.String())
	}
}
