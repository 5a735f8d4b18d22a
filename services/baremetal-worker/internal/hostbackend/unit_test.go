package hostbackend

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// someWorkload is a workload with everything in it.
func someWorkload(t *testing.T) workload {
	t.Helper()
	var id backend.GrantID
	for i := range id {
		id[i] = byte(i)
	}
	d, err := newDirs("test")
	if err != nil {
		t.Fatal(err)
	}
	return workload{
		names: names{bridge: "test", grant: id, attempt: 2},
		params: params{
			Host: "host1", Region: "lab", Image: "sha256:" + strings.Repeat("ab", 32), Shape: backend.Shape{CPU: 1500, RAM: 512, Storage: 3},
			SSHPort: 40000, Ports: []portParams{{40001, 8080, "tcp"}, {40002, 53, "udp"}}, Slot: 7,
		},
		dir: d.grant(id), runRoot: runDir + "/test/" + id.String(), guest: d.guest.String() + "/" + strings.Repeat("cd", 32),
		images: "/var/lib/containers/storage", transient: true, imageID: strings.Repeat("ef", 32),
		subnet: netip.MustParsePrefix("10.213.0.56/29"), uidBase: 1 << 20,
		table:          firewall.Table{Bridge: "test", FirstPort: 40000, LastPort: 40999, InterfacePrefix: interfacePrefix},
		firewallScript: d.base.String() + "/firewall.nft",
		grant: backend.Grant{ID: id, Network: backend.NetworkPolicy{
			Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"192.0.2.0/24", "2001:db8::/32"},
		}},
		stopGrace: 10 * time.Second, lifetime: time.Hour,
	}
}

func TestUnitIsRenderedAsEver(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*workload){
		"unit.json":            func(*workload) {},
		"unit_old_podman.json": func(w *workload) { w.transient = false },
		"unit_firewalld.json":  func(w *workload) { w.firewalld, w.zone = true, "public" },
	} {
		t.Run(name, func(t *testing.T) {
			w := someWorkload(t)
			change(&w)
			unit, err := w.unit()
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(unit, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, append(got, '\n'))
		})
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; rewrite with -update):\n%s", file, diff)
	}
}

// A phase of the stop that hangs is killed after TimeoutStop; all together must
// be over within the minute that the contract allows.
func TestStopFitsTheGraceOfTheContract(t *testing.T) {
	t.Parallel()
	w := someWorkload(t)
	w.stopGrace = maxStopGrace
	unit, err := w.unit()
	if err != nil {
		t.Fatal(err)
	}
	if unit.TimeoutStop < w.stopGrace || unit.TimeoutStop > time.Minute {
		t.Errorf("each phase may take %s", unit.TimeoutStop)
	}
	// What cleans up has its time, too, however short the grace.
	w.stopGrace = time.Second
	if brief, err := w.unit(); err != nil || brief.TimeoutStop < minStopTimeout {
		t.Errorf("with a short grace each phase may take %s, %v", brief.TimeoutStop, err)
	}
	if unit.RuntimeMax != w.lifetime {
		t.Errorf("runs for %s, not %s", unit.RuntimeMax, w.lifetime)
	}
}

func TestRecordsComeBackAsWritten(t *testing.T) {
	t.Parallel()
	w := someWorkload(t)
	want := record{
		GrantID: w.names.grant, params: w.params, Attempt: 2, BootID: "b", ValidTo: time.Date(2030, 1, 2, 3, 4, 5, 6000, time.UTC), CreatedAt: time.Unix(1, 0).UTC(),
	}
	data, err := marshalRecord(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := unmarshalRecord(data)
	if err != nil {
		t.Fatal(err)
	}
	want.Version, want.ID = 1, want.GrantID.String()
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(record{}, params{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if !got.complete() || (record{}).complete() {
		t.Error("can't tell a record that was read from one that wasn't")
	}
	for _, bad := range []string{"", "{}", `{"version":2}`, `{"version":1,"grant_id":"../x"}`, strings.Replace(string(data), `"version": 1`, `"version": 9`, 1)} {
		if r, err := unmarshalRecord([]byte(bad)); err == nil {
			t.Errorf("%q was read as %+v", bad, r)
		}
	}
}

func TestUnitNamesAreReadBack(t *testing.T) {
	t.Parallel()
	w := someWorkload(t)
	if got, ok := parseUnit(w.names.unit()); !ok || got != w.names {
		t.Errorf("%s was read as %+v, %t", w.names.unit(), got, ok)
	}
	// A bridge id may look like the rest of a name.
	tricky := names{bridge: "a-" + strings.Repeat("0", 20) + "-1", grant: w.names.grant, attempt: 4294967295}
	if got, ok := parseUnit(tricky.unit()); !ok || got != tricky {
		t.Errorf("%s was read as %+v, %t", tricky.unit(), got, ok)
	}
	for _, bad := range []string{
		"", "cb-test.service", "cb-test-" + w.names.grant.String() + ".service", w.names.stem(), w.names.unit() + "\n",
		strings.Replace(w.names.unit(), "-2.service", "-4294967296.service", 1), strings.Replace(w.names.unit(), "cb-test", "cb-Test", 1),
	} {
		if n, ok := parseUnit(bad); ok {
			t.Errorf("%q was read as %+v", bad, n)
		}
	}
	if n := w.names.networkInterface(); len(n) > 15 || !strings.HasPrefix(n, interfacePrefix) {
		t.Errorf("interface %q", n)
	}
}

func FuzzUnmarshalRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"grant_id":"` + strings.Repeat("00", 32) + `","ports":[{"host_port":1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := unmarshalRecord(data)
		if err != nil {
			return
		}
		again, err := marshalRecord(r)
		if err != nil {
			return // a time that JSON cannot hold
		}
		back, err := unmarshalRecord(again)
		if err != nil || back.GrantID != r.GrantID {
			t.Fatalf("%s came back as %s (%v)", r.GrantID, back.GrantID, err)
		}
		_ = r.reservation(r.GrantID)
		_ = r.published("host")
	})
}

func FuzzParseUnit(f *testing.F) {
	f.Add("cb-test-" + strings.Repeat("0f", 32) + "-1.service")
	f.Fuzz(func(t *testing.T, name string) {
		n, ok := parseUnit(name)
		if ok && n.unit() != name && !strings.Contains(name, "-0") {
			t.Errorf("%q was read as %q", name, n.unit())
		}
	})
}

func TestSystemdsWordsForAnEnd(t *testing.T) {
	t.Parallel()
	code := func(n int32) *int32 { return &n }
	for _, tt := range []struct {
		result, code, status string
		want                 backend.Exit
	}{
		{"success", "exited", "0", backend.Exit{Reason: backend.EndWorkloadExited, Code: code(0)}},
		{"exit-code", "exited", "3", backend.Exit{Reason: backend.EndWorkloadExited, Code: code(3)}},
		{"exit-code", "exited", "many", backend.Exit{Reason: backend.EndWorkloadExited}},
		{"exit-code", "exited", "4294967296", backend.Exit{Reason: backend.EndWorkloadExited}},
		{"signal", "killed", "KILL", backend.Exit{Reason: backend.EndWorkloadExited, Signal: "KILL"}},
		{"core-dump", "dumped", "SEGV", backend.Exit{Reason: backend.EndWorkloadExited, Signal: "SEGV"}},
		{"timeout", "killed", "TERM", backend.Exit{Reason: backend.EndDeadline, Signal: "TERM"}},
		{"timeout", "exited", "143", backend.Exit{Reason: backend.EndDeadline, Code: code(143), Signal: "TERM"}},
		{"exit-code", "exited", "137", backend.Exit{Reason: backend.EndWorkloadExited, Code: code(137), Signal: "KILL"}},
		{"exit-code", "exited", "255", backend.Exit{Reason: backend.EndWorkloadExited, Code: code(255)}},
		{"oom-kill", "killed", "KILL", backend.Exit{Reason: backend.EndOutOfMemory, Signal: "KILL"}},
		{"", "", "", backend.Exit{Reason: backend.EndWorkloadExited}},
	} {
		if diff := cmp.Diff(tt.want, exitOf(tt.result, tt.code, tt.status)); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", tt, diff)
		}
	}
}

func TestUsageIsTakenFromTheSpool(t *testing.T) {
	t.Parallel()
	number := func(n uint64) *uint64 { return &n }
	word := func(s string) *string { return &s }
	start, stop := time.Unix(1000, 0), time.Unix(1010, 0)
	spool := guestapi.Spool{RecordedAt: time.Unix(1011, 0), StartedAt: &start, StoppedAt: &stop, Result: word("exit-code"), ExitCode: word("exited"), ExitStatus: word("3")}
	spool.Usage.CPUUsageUsec, spool.Usage.NetworkReceivedBytes = number(2_500_999), number(1<<64-1)

	log := backend.ComputeLog{ValidTo: stop}
	readSpool(&log, spool, false)
	if log.Exit.Reason != backend.EndWorkloadExited || log.Exit.Code == nil || *log.Exit.Code != 3 {
		t.Errorf("exit %+v", log.Exit)
	}
	if log.Usage.CPU.Value != 2500 || log.Usage.CPU.Source != backend.UsageHostMeasured || log.Usage.CPU.From != start || log.Usage.CPU.To != stop {
		t.Errorf("CPU %+v", log.Usage.CPU)
	}
	if log.Usage.NetworkReceived.Value != 1<<63-1 {
		t.Errorf("received %+v", log.Usage.NetworkReceived)
	}
	if log.Usage.RAMPeak != nil || log.Usage.DiskRead != nil {
		t.Error("what isn't known is zero")
	}
	if log.Partial {
		t.Error("partial, though CPU and network are there")
	}
	readSpool(&log, spool, true)
	if log.Exit.Reason != 0 {
		t.Errorf("the worker stopped it, and the log says %s", log.Exit.Reason)
	}
	spool.Result = word("timeout")
	readSpool(&log, spool, true)
	if log.Exit.Reason != backend.EndDeadline {
		t.Errorf("the deadline passed, and the log says %s", log.Exit.Reason)
	}
	// A stop that took too long, well before the deadline.
	log.ValidTo = stop.Add(maxClockSkew + time.Second)
	readSpool(&log, spool, true)
	if log.Exit.Reason != 0 {
		t.Errorf("the worker stopped it, which took long, and the log says %s", log.Exit.Reason)
	}
	readSpool(&log, spool, false)
	if log.Exit.Reason != backend.EndWorkloadExited {
		t.Errorf("something stopped it, which took long, and the log says %s", log.Exit.Reason)
	}
	readSpool(&log, guestapi.Spool{RecordedAt: stop}, false)
	if !log.Partial || log.EndedAt != stop {
		t.Errorf("of a spool with nothing: %+v", log)
	}
}

func TestConsoleIsShownWithoutStamps(t *testing.T) {
	t.Parallel()
	for log, want := range map[string]string{
		"":      "",
		"plain": "plain",
		"2026-11-21T22:00:00.000000000+00:00 stdout F hello world\n": "hello world\n",
		"2026-11-21T22:00:00.000000000+00:00 stderr P part":          "part",
		"2026-11-21T22:00:00.000000000+00:00 stdout F \nnext line\n": "\nnext line\n",
		"cut off line\n2026 stdout F a b  c\n":                       "cut off line\na b  c\n",
		"one two three four\n":                                       "one two three four\n",
	} {
		if got := consoleText(log); got != want {
			t.Errorf("%q: got %q, want %q", log, got, want)
		}
	}
}
