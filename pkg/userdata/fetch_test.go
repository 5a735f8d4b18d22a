package userdata_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/userdata"
)

// host is a machine's file system after cloud-init has written the files.
type host struct {
	dir   string
	guest string // the binary's path
	off   string // exists after a power-off
}

// newHost writes the files of the user-data below a directory.
func newHost(t *testing.T, s userdata.Spec) host {
	t.Helper()
	dir := t.TempDir()
	_, files := read(t, render(t, s))
	for name, content := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h := host{dir: dir, guest: filepath.Join(dir, userdata.GuestPath(s.GuestSHA256)), off: filepath.Join(dir, "off")}
	for name, content := range map[string]string{
		"dev/console":   "",
		"bin/systemctl": "#!/bin/sh\n[ \"$*\" = '--no-block poweroff' ] && touch " + h.off + "\n",
	} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// run runs the program and returns its output and the console's.
func (h host) run(t *testing.T, args ...string) (output, console string, err error) {
	t.Helper()
	program := filepath.Join(h.dir, "usr/local/lib/compute-bridge/compute-bridge-fetch.py")
	cmd := exec.CommandContext(t.Context(), "python3", append([]string{program}, args...)...)
	cmd.Env = []string{
		"COMPUTE_BRIDGE_ROOT=" + h.dir, "COMPUTE_BRIDGE_PATIENCE=1",
		"PATH=" + filepath.Join(h.dir, "bin") + ":" + os.Getenv("PATH"),
	}
	out, err := cmd.CombinedOutput()
	text, readErr := os.ReadFile(filepath.Join(h.dir, "dev/console"))
	if readErr != nil {
		t.Fatal(readErr)
	}
	if strings.Contains(string(out)+string(text), "hunter2") {
		t.Errorf("a secret is shown: %s%s", out, text)
	}
	return string(out), string(text), err
}

// said is the verdict on a console, as guestapi.Verdict has it.
func said(t *testing.T, console string) map[string]any {
	t.Helper()
	_, line, ok := strings.Cut(console, "compute-bridge-verdict: ")
	if !ok {
		return nil
	}
	line, _, _ = strings.Cut(line, "\r\n")
	var v map[string]any
	if err := json.Unmarshal([]byte(line), &v); err != nil {
		t.Fatalf("%v in %q", err, line)
	}
	return v
}

func TestGuestIsFetchedByItsDigest(t *testing.T) {
	binary := []byte("#!/bin/sh\n")
	sum := sha256.Sum256(binary)
	for name, tc := range map[string]struct {
		answer  func(n int64, w http.ResponseWriter)
		want    string // of the verdict, empty if it is fetched
		fetches int64
	}{
		"at once": {func(_ int64, w http.ResponseWriter) { _, _ = w.Write(binary) }, "", 1},
		"after a failure": {func(n int64, w http.ResponseWriter) {
			if n == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			_, _ = w.Write(binary)
		}, "", 2},
		"cut at first": {func(n int64, w http.ResponseWriter) {
			if n == 1 {
				_, _ = w.Write(binary[:3])
				return
			}
			_, _ = w.Write(binary)
		}, "", 2},
		"missing": {
			func(_ int64, w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
			"the guest binary can't be fetched: answer 404", 1,
		},
		"another": {
			func(_ int64, w http.ResponseWriter) { _, _ = w.Write([]byte("x")) },
			"the guest binary can't be fetched: another digest", 2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var fetched atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				tc.answer(fetched.Add(1), w)
			}))
			defer server.Close()
			s := spec()
			s.GuestURL, s.GuestSHA256 = server.URL+"/guest?signature=hunter2", hex.EncodeToString(sum[:])
			h := newHost(t, s)
			output, console, err := h.run(t)
			if n := fetched.Load(); n != tc.fetches {
				t.Errorf("%d fetches, want %d: %s", n, tc.fetches, output)
			}
			if tc.want == "" {
				data, readErr := os.ReadFile(h.guest)
				if err != nil || readErr != nil || string(data) != string(binary) || console != "" {
					t.Fatalf("%v, %v, console %q: %s", err, readErr, console, output)
				}
				if info, err := os.Stat(h.guest); err != nil || info.Mode() != 0o755 {
					t.Errorf("%v, %v", info, err)
				}
				// A reboot, or a prebaked image.
				server.Close()
				if output, _, err := h.run(t); err != nil {
					t.Errorf("fetched again: %v: %s", err, output)
				}
				return
			}
			v := said(t, console)
			if err == nil || v["message"] != tc.want || v["reason"] != "HOST_UNFIT" || v["phase"] != "failed" ||
				v["grant"] != strings.Repeat("cd", 32) || v["attempt"] != 2.0 {
				t.Errorf("got %v, verdict %v: %s", err, v, output)
			}
			if _, err := os.Stat(h.guest); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("there is a guest: %v", err)
			}
		})
	}
}

func TestFailedMachineEnds(t *testing.T) {
	for name, powerOff := range map[string]bool{"powers off": true, "stays": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := spec()
			s.PowerOffAtEnd = powerOff
			h := newHost(t, s)
			output, console, err := h.run(t, "failed")
			if v := said(t, console); err != nil || v["reason"] != "HOST_UNFIT" {
				t.Errorf("%v, verdict %v: %s", err, v, output)
			}
			if _, err := os.Stat(h.off); powerOff != (err == nil) {
				t.Errorf("power-off: %v", err)
			}
			if _, err := os.Stat(filepath.Join(h.dir, "var/lib/compute-bridge/ended")); err != nil {
				t.Errorf("the workload would start after a reboot: %v", err)
			}
			// A verdict that was given stays the last.
			if _, again, err := h.run(t, "failed"); err != nil || strings.Count(again, "verdict") != 1 {
				t.Errorf("%v, console %q", err, again)
			}
		})
	}
}
