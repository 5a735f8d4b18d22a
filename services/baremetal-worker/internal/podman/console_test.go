package podman_test

import (
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
)

func TestConsoleText(t *testing.T) {
	log := "F the end of a line whose beginning is missing\n" +
		"2026-11-21T23:19:03.694361874+00:00 stdout F one two\n" +
		"2026-11-21T23:19:03.694361874+00:00 stderr P thr\n" +
		"2026-11-21T23:19:03.694361874+00:00 stderr F ee\n" +
		"2026-11-21T23:19:03.694361874+00:00 stdout F \n" +
		"2026-11-21T23:19:03.694361874+00:00 stdout P no newline"
	if got, want := podman.ConsoleText([]byte(log)), "one two\nthree\n\nno newline"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzConsoleText(f *testing.F) {
	f.Add("a stdout F b\n")
	f.Fuzz(func(t *testing.T, log string) {
		if got := podman.ConsoleText([]byte(log)); len(got) > len(log) || strings.Count(got, "\n") > strings.Count(log, "\n") {
			t.Errorf("%q became %q", log, got)
		}
	})
}
