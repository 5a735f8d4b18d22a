package sshconn_test

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

// shellSplit lets a real shell split a line, and returns the arguments.
func shellSplit(t *testing.T, line string) []string {
	t.Helper()
	// A function instead of the line's program, which may have any name.
	out, err := exec.CommandContext(t.Context(), "sh", "-c", "exec printf '%s\\0' "+line).Output()
	if err != nil {
		t.Fatalf("sh -c %q: %v", line, err)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
}

func TestQuoteSurvivesTheShell(t *testing.T) {
	for _, args := range [][]string{
		{"true"},
		{"if"},
		{"A=b", "c"},
		{""},
		{"a", "", "b"},
		{"$(id)", "`id`", "$HOME", "${IFS}"},
		{"it's", "'", "''", `\'`, `"`},
		{"a b", "\t", "\n", "\r", " ", "*", "?", "[a-z]", "~", "~root", "!", "!!", "#", "&", "|", ";", "<", ">", "(", ")", "{a,b}"},
		{"%i", "%n", "\\", "\\n", "-n", "--", "-e", "é", "\xff\xfe", "\x01", "=", "a=b", "^", "@", "%1"},
	} {
		line, err := sshconn.Quote(args)
		if err != nil {
			t.Fatalf("Quote(%q): %v", args, err)
		}
		if got := shellSplit(t, line); !slices.Equal(got, args) {
			t.Errorf("Quote(%q) = %q, which the shell splits into %q", args, line, got)
		}
	}
}

func TestQuoteRefusesWhatNoProgramCanGet(t *testing.T) {
	for _, args := range [][]string{nil, {}, {"a\x00b"}, {"a", "\x00"}} {
		if line, err := sshconn.Quote(args); err == nil {
			t.Errorf("Quote(%q) = %q, want an error", args, line)
		}
	}
}

func FuzzQuote(f *testing.F) {
	f.Add("a", "b c", "$(x)")
	f.Add("'", "\\", "\n")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		args := []string{a, b, c}
		line, err := sshconn.Quote(args)
		if err != nil {
			if !bytes.ContainsRune([]byte(a+b+c), 0) {
				t.Fatalf("Quote(%q): %v", args, err)
			}
			return
		}
		if got := shellSplit(t, line); !slices.Equal(got, args) {
			t.Errorf("Quote(%q) = %q, which the shell splits into %q", args, line, got)
		}
	})
}
