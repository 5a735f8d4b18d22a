package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

// The tests need lab.Main for its helper process only: they open a lab of their
// own, as the command does.
func TestMain(m *testing.M) { lab.Main(m) }

// testLab is the lab that the tests bring up and down. Not cblab: somebody may
// be using it.
const testLab = "cblab-cli-test"

// cli runs a command on the test's lab.
func cli(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = run(t.Context(), append([]string{"-lab", testLab}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// must runs a command that must succeed.
func must(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := cli(t, args...)
	if code != 0 {
		t.Fatalf("lab %s: code %d: %s", strings.Join(args, " "), code, errs)
	}
	return out
}

func TestLabByHand(t *testing.T) {
	must(t, "down") // of a run that was killed
	t.Cleanup(func() {
		if l, err := lab.Load(testLab); err == nil {
			t.Error("the lab outlived `lab down`")
			_ = l.Close(t.Context())
		}
	})
	table := strings.Split(strings.TrimSpace(must(t, "up", "-n", "2", "-sshd", "MaxSessions 3")), "\n")
	row := regexp.MustCompile(`^host\d +10\.77\.1\.\d +22 +SHA256:\S{43} +running$`)
	if len(table) != 3 || !strings.HasPrefix(table[0], "HOST ") || !row.MatchString(table[1]) || !row.MatchString(table[2]) {
		t.Errorf("table:\n%s", strings.Join(table, "\n"))
	}
	for _, line := range table {
		if strings.Index(line, "22 ") != strings.Index(table[1], "22 ") && line != table[0] {
			t.Errorf("not aligned:\n%s", strings.Join(table, "\n"))
		}
	}
	must(t, "up", "-n", "2") // is up

	if got := must(t, "exec", "host1", "--", "hostname"); got != "host1\n" {
		t.Errorf("exec: %q", got)
	}
	if code, _, _ := cli(t, "exec", "host1", "--", "sh", "-c", "exit 7"); code != 7 {
		t.Errorf("exec passed on %d, want 7", code)
	}
	if got := must(t, "ssh", "host2", "hostname; sshd -T | grep -i maxsessions"); got != "host2\nmaxsessions 3\n" {
		t.Errorf("ssh: %q", got)
	}
	if code, _, _ := cli(t, "ssh", "host2", "exit 9"); code != 9 {
		t.Errorf("ssh passed on %d, want 9", code)
	}
	if got := must(t, "shell", "ip", "-br", "-4", "address", "show", "br0"); !strings.Contains(got, "10.77.0.1/16") {
		t.Errorf("shell: %q", got)
	}
	if got := must(t, "config"); strings.Count(got, "[[host]]") != 2 || !strings.Contains(got, "address = \"10.77.1.2\"\nport = 22\n") {
		t.Errorf("config:\n%s", got)
	}
	must(t, "cut", "host2")
	if got := must(t, "status"); !strings.Contains(got, "cut off") {
		t.Errorf("status of a host that is cut off:\n%s", got)
	}
	must(t, "restore", "host2")
	must(t, "exec", "host2", "mkdir", "-p", lab.BridgeDir+"/b/grants/1")
	if code, out, _ := cli(t, "leftovers", "host2"); code != 1 || !strings.Contains(out, "grants/1") {
		t.Errorf("leftovers: code %d, %q", code, out)
	}
	must(t, "leftovers", "host1")
	must(t, "destroy", "host2")
	if code, _, errs := cli(t, "status"); code != 0 || strings.Contains(errs, "host2") {
		t.Errorf("status: %d, %s", code, errs)
	}
	must(t, "down")
	must(t, "down") // idempotent
}

func TestImageCommandPrintsDigests(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "image.tar")
	got := must(t, "image", "exit3", "-o", path)
	if !regexp.MustCompile(`sha256  [0-9a-f]{64}\nblake3  [0-9a-f]{64}\n`).MatchString(got) {
		t.Errorf("printed %q", got)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestWrongCallsAreAnswered(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "usage: lab"},
		{[]string{"nope"}, 2, `no command "nope"`},
		{[]string{"up", "-n", "0"}, 2, "positive -n"},
		{[]string{"up", "-n", "many"}, 2, "invalid value"},
		{[]string{"image", "shell"}, 2, "-o FILE"},
		{[]string{"exec"}, 2, "a host's name"},
		{[]string{"-lab", "cblab-nobody", "status"}, 1, "there is no lab cblab-nobody"},
		{[]string{"-lab", "../etc", "status"}, 1, "bad name"},
	} {
		var out, errs strings.Builder
		code := run(t.Context(), tc.args, &out, &errs)
		if code != tc.code || !strings.Contains(errs.String(), tc.want) {
			t.Errorf("lab %q: code %d, %q; want %d and %q", tc.args, code, errs.String(), tc.code, tc.want)
		}
	}
	for _, args := range [][]string{{"-h"}, {"help"}, {"up", "-h"}, {"image", "--help"}} {
		var out, errs strings.Builder
		if code := run(t.Context(), args, &out, &errs); code != 0 || !strings.Contains(out.String(), "usage: lab") {
			t.Errorf("lab %q: code %d, %q, %q", args, code, out.String(), errs.String())
		}
	}
}
