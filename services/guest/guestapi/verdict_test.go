package guestapi_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func verdict() guestapi.Verdict {
	return guestapi.Verdict{
		Grant: strings.Repeat("ab", 32), Attempt: 2, Phase: guestapi.PhaseFailed,
		Reason: guestapi.ReasonImageUnavailable, Message: "the store answers \"404\"\n\x1b[31m é 🙂",
	}
}

func TestVerdictIsFoundOnAConsole(t *testing.T) {
	want := verdict()
	code := int32(137)
	exited := guestapi.Verdict{
		Grant: want.Grant, Attempt: 2, Phase: guestapi.PhaseExited, Code: &code, Signal: "KILL", Message: "killed",
	}
	other := want
	other.Attempt = 1
	stranger := want
	stranger.Grant = strings.Repeat("cd", 32)
	for name, tc := range map[string]struct {
		console string
		want    *guestapi.Verdict
	}{
		"alone":              {want.Line(), &want},
		"in the middle":      {"Booting\r\n" + want.Line() + "\r\nPower down\r\n", &want},
		"after a time stamp": {"[   12.345678] guest[812]: " + want.Line() + "\n", &want},
		"after a prompt":     {"ip-10-0-0-1 login: " + want.Line() + "\r\n", &want},
		"the last":           {want.Line() + "\n" + exited.Line() + "\n", &exited},
		"of this attempt":    {want.Line() + "\n" + other.Line() + "\n", &want},
		"of this grant":      {want.Line() + "\n" + stranger.Line() + "\n", &want},
		"last one is cut":    {want.Line() + "\n" + exited.Line()[:80] + "\n", &want},
		"followed by text":   {want.Line() + "[  99.1] reboot: Power down\n", &want},
		"cut in front":       {want.Line()[30:], nil},
		"none":               {"Debian GNU/Linux 13 ip-10-0-0-1 ttyS0\n", nil},
		"of another only":    {other.Line(), nil},
		"unknown phase":      {strings.Replace(want.Line(), `"failed"`, `"maybe"`, 1), nil},
		"empty":              {"", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := guestapi.FindVerdict([]byte(tc.console), want.Grant, 2)
			if ok != (tc.want != nil) {
				t.Fatalf("found: %v", ok)
			}
			if tc.want == nil {
				return
			}
			if diff := cmp.Diff(*tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestVerdictIsOneShortLineOfASCII(t *testing.T) {
	v := verdict()
	v.Message = strings.Repeat("é\n\xff", 1000)
	line := v.Line()
	if strings.Trim(line, " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~") != "" {
		t.Errorf("not printable: %q", line)
	}
	if len(line) > 4096 {
		// A terminal's line discipline takes no more at once.
		t.Errorf("%d bytes", len(line))
	}
	got, ok := guestapi.FindVerdict([]byte(line), v.Grant, v.Attempt)
	if !ok || !strings.HasPrefix(got.Message, "é\n?é\n") || !strings.HasSuffix(got.Message, "...") {
		t.Errorf("found %v: %q", ok, got.Message)
	}
}

func FuzzFindVerdict(f *testing.F) {
	f.Add([]byte(verdict().Line()+"\r\n"), "boom")
	f.Add([]byte("[ 1.0] "+guestapi.VerdictPrefix+"{}\n"), "")
	f.Add([]byte(guestapi.VerdictPrefix+guestapi.VerdictPrefix), guestapi.VerdictPrefix)
	f.Fuzz(func(t *testing.T, console []byte, message string) {
		want := verdict()
		if got, ok := guestapi.FindVerdict(console, want.Grant, want.Attempt); ok {
			if got.Grant != want.Grant || got.Attempt != want.Attempt {
				t.Fatalf("found another's: %+v", got)
			}
		}
		// Whatever came before and whatever a message says, the last verdict is found.
		want.Message = strings.ToValidUTF8(message, "?")
		got, ok := guestapi.FindVerdict(append(console, "\n"+want.Line()+"\n"...), want.Grant, want.Attempt)
		if !ok {
			t.Fatal("not found")
		}
		if len(want.Message) <= guestapi.MaxVerdictMessageBytes && got.Message != want.Message {
			t.Fatalf("got %q, want %q", got.Message, want.Message)
		}
	})
}
