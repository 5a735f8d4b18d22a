package systemd

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func TestUnitProperties(t *testing.T) {
	swap := uint64(0)
	unit := Unit{
		Name: "cb-demo-00ff-1.service", Description: "compute bridge demo: grant 00ff %i $HOME", Slice: "compute-bridge.slice", SyslogIdentifier: "cb-demo",
		Delegate: true, RuntimeMax: 90 * time.Minute, TimeoutStart: 2 * time.Minute, TimeoutStop: 12500 * time.Millisecond,
		CPUMillicores: 1500, MemoryMax: 512 << 20, MemorySwapMax: &swap, TasksMax: 4096,
		ConditionPathExists: []string{"/var/lib/compute-bridge/demo/grants/00ff", "!/var/lib/compute-bridge/demo/grants/00ff/ended"},
		ExecStartPre:        []Exec{{Args: []string{"/usr/sbin/nft", "add element inet t s { 1 }"}}},
		ExecStart:           []Exec{{Args: []string{"/usr/bin/podman", "run", "--env=A=$(id) %n ${B}", "--", "x"}}},
		ExecStop:            []Exec{{Args: []string{"/usr/bin/podman", "stop"}, IgnoreFailure: true}},
		ExecStopPost:        []Exec{{Args: []string{"/bin/a"}, IgnoreFailure: true}, {Args: []string{"/bin/b", ""}}},
	}
	var s strings.Builder
	for name, u := range map[string]Unit{"full": unit} {
		props, err := u.properties()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&s, "# %s\n", name)
		for _, p := range props {
			fmt.Fprintf(&s, "%s %s %s\n", p.Name, p.Value.Signature(), p.Value)
		}
	}
	golden(t, "unit.golden", s.String())

	props, err := Unit{Name: "a.service", Type: "exec", ExecStart: []Exec{{Args: []string{"/bin/true"}}}}.properties()
	if err != nil {
		t.Fatal(err)
	}
	s.Reset()
	for _, p := range props {
		fmt.Fprintf(&s, "%s %s %s\n", p.Name, p.Value.Signature(), p.Value)
	}
	golden(t, "unit-minimal.golden", s.String())
}

func TestUnitPropertiesRefuse(t *testing.T) {
	good := Unit{Name: "a.service", ExecStart: []Exec{{Args: []string{"/bin/true"}}}}
	for name, change := range map[string]func(*Unit){
		"no name":                   func(u *Unit) { u.Name = "" },
		"not a service":             func(u *Unit) { u.Name = "a.socket" },
		"slash in name":             func(u *Unit) { u.Name = "a/b.service" },
		"specifier in name":         func(u *Unit) { u.Name = "a%i.service" },
		"template":                  func(u *Unit) { u.Name = "a@b.service" },
		"too long":                  func(u *Unit) { u.Name = strings.Repeat("a", 250) + ".service" },
		"newline in description":    func(u *Unit) { u.Description = "a\nExecStart=/bin/evil" },
		"no ExecStart":              func(u *Unit) { u.ExecStart = nil },
		"two ExecStart":             func(u *Unit) { u.ExecStart = append(u.ExecStart, u.ExecStart...) },
		"relative program":          func(u *Unit) { u.ExecStopPost = []Exec{{Args: []string{"podman"}}} },
		"no program":                func(u *Unit) { u.ExecStopPost = []Exec{{}} },
		"NUL in argument":           func(u *Unit) { u.ExecStart[0].Args = []string{"/bin/true", "a\x00b"} },
		"argument is not text":      func(u *Unit) { u.ExecStart[0].Args = []string{"/bin/true", "\xff"} },
		"relative condition":        func(u *Unit) { u.ConditionPathExists = []string{"a"} },
		"newline in condition":      func(u *Unit) { u.ConditionPathExists = []string{"/a\nb"} },
		"condition is only negated": func(u *Unit) { u.ConditionPathExists = []string{"!"} },
		"absurd CPU":                func(u *Unit) { u.CPUMillicores = ^uint64(0) },
	} {
		unit := good
		unit.ExecStart = []Exec{{Args: []string{"/bin/true"}}}
		change(&unit)
		if _, err := unit.properties(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzStatusOfTakesAnyProperties(f *testing.F) {
	f.Add("ActiveState", "active", uint64(7))
	f.Fuzz(func(t *testing.T, key, text string, number uint64) {
		for _, k := range append(statusKeys(), key) {
			for _, v := range []any{text, number, int32(number), []byte(text), number%2 == 0} {
				s := statusOf("x", map[string]dbus.Variant{k: dbus.MakeVariant(v)})
				if s.Name != "x" || (k == "CPUUsageNSec" && number == ^uint64(0) && s.CPUUsageNSec != nil) {
					t.Fatalf("%s=%v: %+v", k, v, s)
				}
			}
		}
	})
}
