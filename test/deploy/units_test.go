// Package deploy checks what deploy/ ships for operators.
package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	unitDir = "../../deploy/systemd"
	// program is where the units expect the binary of their instance.
	program = "/usr/local/bin/%i"
)

// copyUnits puts the shipped units where systemd-analyze finds them together,
// with a program that exists.
func copyUnits(t *testing.T, change func(name, text string) string) string {
	t.Helper()
	dir := t.TempDir()
	exists := filepath.Join(dir, "program")
	if err := os.WriteFile(exists, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(unitDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(unitDir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.ReplaceAll(change(e.Name(), string(text)), program, exists)
		if err := os.WriteFile(filepath.Join(dir, e.Name()), []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// verify has systemd judge the units of an instance, with the keys' drop-in.
func verify(t *testing.T, dir, instance string) error {
	t.Helper()
	drop, err := os.ReadFile(filepath.Join(dir, "compute-bridge-keys.conf"))
	if err != nil {
		t.Fatal(err)
	}
	units := []string{"compute-bridge@" + instance + ".service", "compute-bridge-sweep@" + instance + ".service"}
	args := []string{"verify", "--man=no", "--recursive-errors=no"}
	for _, u := range units {
		into := filepath.Join(dir, u+".d")
		if err := os.Mkdir(into, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(into, "keys.conf"), drop, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, filepath.Join(dir, u))
	}
	args = append(args, filepath.Join(dir, "compute-bridge-sweep@"+instance+".timer"))
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", args...).CombinedOutput()
	t.Logf("systemd-analyze: %v\n%s", err, out)
	if err == nil && len(out) > 0 {
		t.Errorf("systemd-analyze of %s: %s", instance, out)
	}
	return err
}

func TestSystemdAcceptsTheUnits(t *testing.T) {
	t.Parallel()
	for _, instance := range []string{"aws-worker", "baremetal-worker", "router"} {
		if err := verify(t, copyUnits(t, func(_, text string) string { return text }), instance); err != nil {
			t.Errorf("%s: %v", instance, err)
		}
	}
}

// That it accepts them says something only if it refuses others.
func TestSystemdRefusesAUnitWithAnUnknownKey(t *testing.T) {
	t.Parallel()
	dir := copyUnits(t, func(_, text string) string {
		return strings.Replace(text, "[Service]\n", "[Service]\nRestartAlways=yes\n", 1)
	})
	if verify(t, dir, "aws-worker") == nil {
		t.Error("systemd-analyze accepted a key that there isn't")
	}
}

// The sweep acts as the worker does: on its files, as its user, by its command.
func TestTheSweepSharesTheWorkersFiles(t *testing.T) {
	t.Parallel()
	read := func(name string) map[string]string {
		text, err := os.ReadFile(filepath.Join(unitDir, name))
		if err != nil {
			t.Fatal(err)
		}
		keys := map[string]string{}
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
				keys[key] = value
			}
		}
		return keys
	}
	worker, sweep := read("compute-bridge@.service"), read("compute-bridge-sweep@.service")
	for _, key := range []string{"User", "StateDirectory", "StateDirectoryMode", "UMask"} {
		if worker[key] == "" || worker[key] != sweep[key] {
			t.Errorf("%s is %q in the worker's unit and %q in the sweep's", key, worker[key], sweep[key])
		}
	}
	if want := program + " sweep -once"; sweep["ExecStart"] != want {
		t.Errorf("the sweep runs %q, want %q", sweep["ExecStart"], want)
	}
}
