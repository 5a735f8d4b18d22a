package hostspool

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const unit = "cb-lab-0123-1.service"

// nftOutput has the form of nft 1.0.6's and 1.1.3's; the numbers are the test's.
const nftOutput = `{"nftables": [{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "inet", "name": "cb_lab", "handle": 1}},
{"set": {"family": "inet", "name": "ports", "table": "cb_lab", "type": "inet_service", "handle": 2, "elem": [22, {"range": [80, 90]}, {"elem": {"val": 443, "timeout": 60}}]}},
{"set": {"family": "inet", "name": "rx", "table": "cb_lab", "type": "ifname", "handle": 3, "elem": ["cbbare", {"elem": {"val": "cbother", "counter": {"packets": 1, "bytes": 2}}}, {"elem": {"val": "cb0123456789", "counter": {"packets": 10, "bytes": 18446744073709551615}}}]}},
{"set": {"family": "inet", "name": "tx", "table": "cb_lab", "type": "ifname", "handle": 4, "elem": [{"elem": {"val": "cb0123456789", "counter": {"packets": 3, "bytes": 4321}}}]}},
{"rule": {"family": "inet", "table": "cb_lab", "chain": "forward", "handle": 6, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "@rx"}}]}}]}`

// fakeHost is a host on which everything can be known.
func fakeHost() (Host, map[string]string, map[string]string) {
	files := map[string]string{
		"/proc/self/cgroup":                                    "12:cpu:/whatever\n0::/system.slice/" + unit + "/.control\n",
		"/proc/self/mountinfo":                                 "22 1 0:20 / /proc rw shared:1 - proc proc rw\n30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
		"/proc/sys/kernel/random/boot_id":                      "0c3f6f2e-8c0e-4a39-9ac5-0b1d7e6e7f10\n",
		"/sys/fs/cgroup/system.slice/" + unit + "/cpu.stat":    "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\n",
		"/sys/fs/cgroup/system.slice/" + unit + "/memory.peak": "268435456\n",
		"/sys/fs/cgroup/system.slice/" + unit + "/io.stat":     "8:0 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n253:0 rbytes=5 wbytes=7\n7:0 \n",
	}
	commands := map[string]string{
		"nft -j list table inet cb_lab": nftOutput,
		"systemctl show --property=ExecMainStartTimestampMonotonic --property=ExecMainExitTimestampMonotonic -- " + unit: "ExecMainExitTimestampMonotonic=3600000000\nExecMainStartTimestampMonotonic=60000000\n",
	}
	environment := map[string]string{
		"SERVICE_RESULT": "timeout", "EXIT_CODE": "killed", "EXIT_STATUS": "TERM", "INVOCATION_ID": "0123456789abcdef0123456789abcdef",
	}
	return Host{
		ReadFile: func(name string) ([]byte, error) {
			content, ok := files[name]
			if !ok {
				return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
			}
			return []byte(content), nil
		},
		Command: func(_ context.Context, name string, args ...string) ([]byte, error) {
			out, ok := commands[strings.Join(append([]string{name}, args...), " ")]
			if !ok {
				return nil, errors.New(name + " is not installed")
			}
			return []byte(out), nil
		},
		LookupEnv: func(name string) (string, bool) {
			value, ok := environment[name]
			return value, ok
		},
		Now:       func() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC) },
		Monotonic: func() (time.Duration, error) { return time.Hour + time.Second, nil },
	}, files, commands
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; rewrite with -update):\n%s", name, diff)
	}
}

func TestRecordWritesAllThatIsKnown(t *testing.T) {
	host, _, _ := fakeHost()
	dir := t.TempDir()
	req := Request{Dir: dir, Unit: unit, Interface: "cb0123456789", Table: "cb_lab"}
	// The room that was kept for it is given up.
	if err := os.WriteFile(filepath.Join(dir, guestapi.ReserveFileName), make([]byte, guestapi.MaxSpoolBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second end overwrites the record
		if err := Record(t.Context(), host, req); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, guestapi.SpoolFileName))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "spool.json", data)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", entry.Name(), info.Mode())
		}
		names = append(names, entry.Name())
	}
	if diff := cmp.Diff([]string{"ended", "spool.json"}, names); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRecordLeavesTheUnknownAbsent(t *testing.T) {
	host, files, commands := fakeHost()
	clear(files)
	clear(commands)
	host.LookupEnv = func(string) (string, bool) { return "", false }
	dir := t.TempDir()
	if err := Record(t.Context(), host, Request{Dir: dir, Unit: unit, Interface: "cb0", Table: "t"}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, guestapi.SpoolFileName))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "spool_unknown.json", data)
}

func TestRecordKeepsWhatIsKnownBesideWhatIsNot(t *testing.T) {
	host, files, commands := fakeHost()
	base := "/sys/fs/cgroup/system.slice/" + unit
	delete(files, base+"/memory.peak") // a host without the memory controller
	delete(files, base+"/io.stat")
	for command := range commands {
		if strings.HasPrefix(command, "systemctl") {
			commands[command] = "ExecMainStartTimestampMonotonic=60000000\nExecMainExitTimestampMonotonic=0\n"
		}
	}
	spool := collect(t.Context(), host, Request{Unit: unit, Interface: "cbbare", Table: "cb_lab"})
	if spool.Usage.CPUUsageUsec == nil || *spool.Usage.CPUUsageUsec != 1234567 {
		t.Error("cpu time is lost")
	}
	if spool.StartedAt == nil || spool.StoppedAt != nil {
		t.Errorf("times: %v, %v", spool.StartedAt, spool.StoppedAt)
	}
	if u := spool.Usage; u.MemoryPeakBytes != nil || u.IOReadBytes != nil || u.NetworkReceivedBytes != nil || u.NetworkSentBytes != nil {
		t.Errorf("invented numbers: %+v", u)
	}
	if len(spool.Problems) != 5 {
		t.Errorf("problems: %q", spool.Problems)
	}
}

func TestEndedMarkIsSetEvenIfNothingElseCanBe(t *testing.T) {
	host, _, _ := fakeHost()
	dir := t.TempDir()
	// A directory in the spool's place can't be replaced.
	if err := os.MkdirAll(filepath.Join(dir, guestapi.SpoolFileName, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Record(t.Context(), host, Request{Dir: dir, Unit: unit}); err == nil {
		t.Error("no error")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 || entries[0].Name() != guestapi.EndedFileName {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := Record(t.Context(), host, Request{Dir: filepath.Join(dir, "missing"), Unit: unit}); err == nil {
		t.Error("a missing directory was made")
	}
}

func TestRecordRefusesNamesThatAreNone(t *testing.T) {
	host, _, _ := fakeHost()
	host.Command = func(context.Context, string, ...string) ([]byte, error) {
		t.Error("a command was run")
		return nil, errors.New("refused")
	}
	dir := t.TempDir()
	for _, req := range []Request{
		{Unit: unit},
		{Dir: dir},
		{Dir: dir, Unit: "../x.service"},
		{Dir: dir, Unit: "a.socket"},
		{Dir: dir, Unit: unit, Interface: "a b"},
		{Dir: dir, Unit: unit, Interface: "far-too-long-for-linux"},
		{Dir: dir, Unit: unit, Interface: "a", Table: "t; flush ruleset"},
		{Dir: dir, Unit: unit, Interface: "a", Table: "$x"},
	} {
		if err := Record(t.Context(), host, req); err == nil {
			t.Errorf("%+v was accepted", req)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestUnitCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/" + unit + "\n":                        "/system.slice/" + unit,
		"0::/system.slice/" + unit + "/container/sub":            "/system.slice/" + unit,
		"0::/../" + unit + "/x\n":                                "/../" + unit,
		"1:name=systemd:/system.slice/" + unit + "\n0::/" + unit: "/" + unit,
		"0::/system.slice/other.service\n":                       "",
		"1:name=systemd:/system.slice/" + unit + "\n":            "",
		"": "",
	} {
		got, err := unitCgroup([]byte(text), unit)
		if text == "0::/../"+unit+"/x\n" {
			want = "/" + unit
		}
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

func TestIOTotalsSaturate(t *testing.T) {
	read, write, err := ioTotals([]byte("8:0 rbytes=18446744073709551615 wbytes=1\n8:1 rbytes=9 wbytes=2\n"))
	if read != 1<<64-1 || write != 3 || err != nil {
		t.Errorf("%d, %d, %v", read, write, err)
	}
	if _, _, err := ioTotals([]byte("8:0 rbytes=-1\n")); err == nil {
		t.Error("a negative number was accepted")
	}
}

// TestSetCounterReadsRealOutput feeds real traffic through real sets, in a network namespace of its own.
func TestSetCounterReadsRealOutput(t *testing.T) {
	for _, program := range []string{"nft", "unshare", "ip", "bash"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%s is needed (Debian packages nftables, util-linux, iproute2, bash): %v", program, err)
		}
	}
	script := fmt.Sprintf(`set -e
ip link set lo up
nft -f - <<'END'
table inet cb_lab {
	set %[1]s { type ifname; counter; elements = { "lo", "cbother" } }
	set %[2]s { type ifname; flags dynamic; }
	set other { type inet_service; flags interval, timeout; elements = { 22, 80-90 timeout 60s } }
	chain in { type filter hook input priority 0; iifname @%[1]s accept; }
	chain out { type filter hook output priority 0; oifname "lo" update @%[2]s { oifname counter } accept; }
}
END
printf x >/dev/udp/127.0.0.1/9
nft -j list table inet cb_lab`, guestapi.CounterSetReceived, guestapi.CounterSetSent)
	out, err := exec.CommandContext(t.Context(), "unshare", "--net", "bash", "-c", script).Output()
	if err != nil {
		if exitErr, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%v: %s", err, exitErr.Stderr)
		}
		t.Fatal(err)
	}
	// A datagram of 29 bytes with its headers, and the ICMP answer, that nobody listens, of 57.
	for _, set := range []string{guestapi.CounterSetReceived, guestapi.CounterSetSent} {
		if n, err := setCounter(out, set, "lo"); n != 86 || err != nil {
			t.Errorf("%s: %d, %v in %s", set, n, err, out)
		}
	}
	if n, err := setCounter(out, guestapi.CounterSetReceived, "cbother"); n != 0 || err != nil {
		t.Errorf("quiet interface: %d, %v", n, err)
	}
	if _, err := setCounter(out, guestapi.CounterSetReceived, "cbmissing"); !errors.Is(err, errNoElement) {
		t.Errorf("missing interface: %v", err)
	}
}

func TestSystemReadsThisMachine(t *testing.T) {
	host := System()
	monotonic, err := host.Monotonic()
	if err != nil || monotonic <= 0 {
		t.Errorf("monotonic clock: %v, %v", monotonic, err)
	}
	if out, err := host.Command(t.Context(), "cat", "/dev/null"); err != nil || len(out) != 0 {
		t.Errorf("command: %q, %v", out, err)
	}
	if _, err := host.Command(t.Context(), "ls", "/no/such"); err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("failing command: %v", err)
	}
	if _, err := host.Command(t.Context(), "no-such-program"); err == nil || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("missing command: %v", err)
	}
}

func FuzzSetCounter(f *testing.F) {
	f.Add([]byte(nftOutput))
	f.Add([]byte(`{"nftables":[{"set":{"name":"rx","elem":[{"elem":{"val":{"concat":["a",1]},"counter":null}},null,7]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if n, err := setCounter(data, guestapi.CounterSetReceived, "cb0123456789"); err != nil && n != 0 {
			t.Errorf("%d with %v", n, err)
		}
	})
}

func FuzzHostFiles(f *testing.F) {
	f.Add([]byte("0::/system.slice/" + unit + "/.control\n"))
	f.Add([]byte("30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"))
	f.Add([]byte("8:0 rbytes=1 wbytes=2\nusage_usec 5\nA=b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if path, err := unitCgroup(data, unit); err == nil && (!strings.HasSuffix(path, unit) || strings.Contains(path, "/../")) {
			t.Errorf("cgroup %q", path)
		}
		_, _, _ = cgroupMount(data)
		_, _ = statValue(data, "usage_usec")
		_, _, _ = ioTotals(data)
		_ = parseProperties(data)
	})
}
