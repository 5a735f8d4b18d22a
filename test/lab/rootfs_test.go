package lab

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// fakeMachine gives the test a cache of its own and a PATH with a mmdebstrap
// that runs a script instead. The script gets the new root's path as $root.
func fakeMachine(t *testing.T, script string) (cache string) {
	t.Helper()
	cache, bin := t.TempDir(), t.TempDir()
	t.Setenv(cacheEnv, cache)
	t.Setenv("PATH", bin)
	for _, program := range []string{"sh", "mkdir", "apt-config", "sleep"} {
		path, err := exec.LookPath(filepath.Join("/usr/bin", program))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, program)); err != nil {
			t.Fatal(err)
		}
	}
	if script != "" {
		text := "#!/bin/sh -e\nfor last; do root=$previous; previous=$last; done\n" + script
		if err := os.WriteFile(filepath.Join(bin, "mmdebstrap"), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return cache
}

func TestRootFSIsBuiltOnceForAllWhoAsk(t *testing.T) {
	cache := fakeMachine(t, `mkdir -p "$root/etc/ssh" "$root/etc/systemd/system" "$root/var"; echo call >>"$CBLAB_CACHE/calls"
		echo secret >"$root/etc/ssh/ssh_host_ed25519_key"; sleep 0.3`)
	var group sync.WaitGroup
	roots := make([]string, 4)
	for i := range roots {
		group.Go(func() {
			var err error
			if roots[i], err = RootFS(t.Context(), io.Discard); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for _, root := range roots {
		if root != roots[0] {
			t.Errorf("roots %q", roots)
		}
	}
	if calls, err := os.ReadFile(filepath.Join(cache, "calls")); err != nil || string(calls) != "call\n" {
		t.Errorf("mmdebstrap was called %q, %v", calls, err)
	}
	if exists(filepath.Join(roots[0], "etc/ssh/ssh_host_ed25519_key")) {
		t.Error("the root file system has a host key that all hosts would share")
	}
	if link, err := os.Readlink(filepath.Join(roots[0], "etc/systemd/system/systemd-sysctl.service")); link != "/dev/null" {
		t.Errorf("systemd-sysctl isn't masked: %q, %v", link, err)
	}
}

func TestFailedBuildSaysWhyAndLeavesNothing(t *testing.T) {
	cache := fakeMachine(t, `mkdir -p "$root"; echo "E: no such suite" >&2; exit 3`)
	if _, err := RootFS(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "E: no such suite") {
		t.Errorf("error %v, want mmdebstrap's own words", err)
	}
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".lock") {
			t.Errorf("left: %s", entry.Name())
		}
	}
}

func TestBuildIsAnnouncedBeforeItStarts(t *testing.T) {
	fakeMachine(t, `exit 3`)
	var log strings.Builder
	if _, err := RootFS(t.Context(), &log); err == nil {
		t.Error("no error")
	}
	if !strings.Contains(log.String(), "building the lab hosts' root file system") || !strings.Contains(log.String(), "minutes") {
		t.Errorf("announced: %q", log.String())
	}
}

func TestMissingProgramNamesItsPackage(t *testing.T) {
	fakeMachine(t, "")
	_, err := RootFS(t.Context(), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "apt-get install mmdebstrap") {
		t.Errorf("error %v, want the package's name", err)
	}
}

func TestNamesThatCannotBeAreRefused(t *testing.T) {
	for _, name := range []string{"", "-a", "A", "a/b", "..", "a b", strings.Repeat("a", 41)} {
		if _, err := Load(name); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
