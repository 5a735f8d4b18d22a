package hostfs_test

import (
	"path"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
)

func TestNewBaseTakesOnlyAbsoluteCleanPaths(t *testing.T) {
	for _, dir := range []string{"", "/", "a", "a/b", "./a", "/a/", "/a//b", "/a/../b", "/a/.", "/a\n", "/a\x00b"} {
		if _, err := hostfs.NewBase(dir); err == nil {
			t.Errorf("NewBase(%q): no error", dir)
		}
	}
}

func TestJoinRefusesWhatCouldLeaveTheBase(t *testing.T) {
	base, err := hostfs.NewBase("/var/lib/x")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := base.Join("grants", "00ff"); err != nil || got != "/var/lib/x/grants/00ff" {
		t.Errorf("Join = %q, %v", got, err)
	}
	for _, name := range []string{"", ".", "..", "a/b", "/", "/etc", "../x", "-rf", "a\x00", "a\nb", "\x7f", strings.Repeat("a", 256)} {
		if got, err := base.Join("grants", name); err == nil {
			t.Errorf("Join(%q) = %q", name, got)
		}
	}
	if _, err := (hostfs.Base{}).Join("a"); err == nil {
		t.Error("the zero base joins")
	}
}

func FuzzJoinStaysBelowTheBase(f *testing.F) {
	f.Add("a", "..")
	f.Add("../..", "x")
	f.Fuzz(func(t *testing.T, a, b string) {
		base, err := hostfs.NewBase("/base/dir")
		if err != nil {
			t.Fatal(err)
		}
		got, err := base.Join(a, b)
		if err != nil {
			return
		}
		if path.Clean(got) != got || !strings.HasPrefix(got, "/base/dir/") || strings.Count(got, "/") != 4 {
			t.Errorf("Join(%q, %q) = %q", a, b, got)
		}
	})
}
