package term_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

func FuzzCleanTextCannotSteerATerminal(f *testing.F) {
	f.Add("plain ä 日本")
	f.Add("a\x1b]0;title\x07b\r\n\x9b31m\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range term.Clean(s) {
			if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u202e' {
				t.Fatalf("%q is left in %q", r, term.Clean(s))
			}
		}
		for _, line := range term.CleanLines(s) {
			if line != term.Clean(line) {
				t.Fatalf("%q is not clean", line)
			}
		}
	})
}

func TestTableAlignsWhatIsSeen(t *testing.T) {
	t.Parallel()
	var table term.Table
	table.Head("A", "NUMBER", "C")
	table.Row(term.S(term.Good, "é"), term.R("1"), term.T("x"))
	table.Row(term.T("long"), term.R("1000000"), term.T(""))
	for _, on := range []bool{false, true} {
		var b bytes.Buffer
		if err := table.Write(&b, term.Painter{On: on}, ""); err != nil {
			t.Fatal(err)
		}
		plain := b.String()
		for _, code := range []string{"0", "1", "2", "32"} {
			plain = strings.ReplaceAll(plain, "\x1b["+code+"m", "")
		}
		want := "A      NUMBER  C\né           1  x\nlong  1000000  -\n"
		if plain != want {
			t.Errorf("colour %v:\n%s\nwant:\n%s", on, plain, want)
		}
	}
}

func TestLiveWithoutTerminalWritesEachNewTextOnce(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	live := term.NewLive(&b, term.Painter{})
	live.Show(term.Busy, "sent", "0s")
	live.Show(term.Busy, "sent", "1s")
	live.Show(term.Busy, "provisioning: image 1 %\x1b[2J", "2s")
	live.Line("kept")
	live.Clear()
	want := "sent  0s\nprovisioning: image 1 %\uFFFD[2J  2s\nkept\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
