package firewall

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
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

func testTable() Table {
	return Table{Bridge: "my-bridge", FirstPort: 40000, LastPort: 40999, InterfacePrefix: "cb", Denied: append(DefaultDenied(), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"))}
}

func testGrant() Grant {
	return Grant{
		Interface: "cb0123456789", Ports: []Port{{40000, "tcp"}, {40001, "udp"}}, Restricted: true,
		// The second is in the first; the third is written sloppily; the last is IPv4 after all.
		Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::1/32"), netip.MustParsePrefix("::ffff:198.51.100.0/120")},
	}
}

func TestGolden(t *testing.T) {
	script, err := testTable().Script()
	golden(t, "table.golden", script, err)
	lines := func(args []string) string {
		return strings.ReplaceAll(strings.Join(args, "\n"), "; ", ";\n") + "\n"
	}
	args, err := OpenArgs(testTable(), testGrant(), 90*time.Minute+time.Millisecond)
	golden(t, "open.golden", lines(args), err)
	args, err = CloseArgs(testTable(), testGrant())
	golden(t, "close.golden", lines(args), err)
	args, err = OpenArgs(testTable(), Grant{Interface: "cb0"}, time.Second)
	golden(t, "open-minimal.golden", lines(args), err)
	args, err = EnsureArgs("/var/lib/compute-bridge/my-bridge/firewall.nft")
	golden(t, "ensure.golden", lines(args), err)
	args, err = FirewalldAddArgs("", Port{40000, "tcp"}, time.Hour)
	golden(t, "firewalld-add.golden", lines(args), err)
	args, err = FirewalldRemoveArgs("public", Port{40000, "tcp"})
	golden(t, "firewalld-remove.golden", lines(args), err)
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*Table, *Grant){
		"bridge with nft's syntax":  func(b *Table, _ *Grant) { b.Bridge = "x { }" },
		"bridge with underscore":    func(b *Table, _ *Grant) { b.Bridge = "a_b" }, // would be the same table as "a-b"
		"empty bridge":              func(b *Table, _ *Grant) { b.Bridge = "" },
		"no interface prefix":       func(b *Table, _ *Grant) { b.InterfacePrefix = "" },
		"all interfaces":            func(b *Table, _ *Grant) { b.InterfacePrefix = "*" },
		"no ports":                  func(b *Table, _ *Grant) { b.FirstPort = 0 },
		"ports the wrong way round": func(b *Table, _ *Grant) { b.LastPort = b.FirstPort - 1 },
		"invalid destination":       func(b *Table, _ *Grant) { b.Denied = []netip.Prefix{{}} },
		"another interface":         func(_ *Table, g *Grant) { g.Interface = "eth0" },
		"interface with syntax":     func(_ *Table, g *Grant) { g.Interface = `cb" }; flush ruleset; "` },
		"interface with newline":    func(_ *Table, g *Grant) { g.Interface = "cb0\n" },
		"interface too long":        func(_ *Table, g *Grant) { g.Interface = "cb01234567890123" },
		"wildcard interface":        func(_ *Table, g *Grant) { g.Interface = "cb*" },
		"port outside of the range": func(_ *Table, g *Grant) { g.Ports = []Port{{22, "tcp"}} },
		"protocol":                  func(_ *Table, g *Grant) { g.Ports = []Port{{40000, "tcp }"}} },
		"invalid allowed":           func(_ *Table, g *Grant) { g.Allow = []netip.Prefix{{}} },
	} {
		table, grant := testTable(), testGrant()
		change(&table, &grant)
		_, err := OpenArgs(table, grant, time.Hour)
		_, err2 := CloseArgs(table, grant)
		if err == nil || err2 == nil {
			t.Errorf("%s: %v, %v", name, err, err2)
		}
	}
	for _, timeout := range []time.Duration{-1, 0, time.Millisecond, 1 << 62} {
		if _, err := OpenArgs(testTable(), testGrant(), timeout); err == nil {
			t.Errorf("timeout %s: no error", timeout)
		}
	}
	for _, zone := range []string{"a b", "-x", "--system", "a\n", strings.Repeat("a", 99)} {
		_, err := FirewalldAddArgs(zone, Port{1, "tcp"}, time.Hour)
		_, err2 := FirewalldRemoveArgs(zone, Port{1, "tcp"})
		if err == nil || err2 == nil {
			t.Errorf("zone %q: %v, %v", zone, err, err2)
		}
	}
	if _, err := EnsureArgs("firewall.nft"); err == nil {
		t.Error("a relative file is no error")
	}
}

// FuzzOpenArgs checks that no name brings syntax of its own into a command.
func FuzzOpenArgs(f *testing.F) {
	f.Add("demo", "cb0", uint16(40000), "tcp")
	f.Add("a; flush ruleset", `cb"`, uint16(0), "tcp }")
	f.Fuzz(func(t *testing.T, bridge, iface string, port uint16, protocol string) {
		table, grant := testTable(), Grant{Interface: iface, Ports: []Port{{port, protocol}}}
		table.Bridge = bridge
		args, err := OpenArgs(table, grant, time.Hour)
		if err != nil {
			return
		}
		want, err := OpenArgs(testTable(), Grant{Interface: "cb0", Ports: []Port{{40000, "tcp"}}}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		syntax := func(s string) string {
			return strings.Map(func(r rune) rune {
				if strings.ContainsRune("{};\"'\\$@#*!\n ", r) {
					return r
				}
				return -1
			}, s)
		}
		if got, want := syntax(args[1]), syntax(want[1]); got != want {
			t.Errorf("syntax %q, want %q, in %q", got, want, args[1])
		}
	})
}

const listing = `{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
{"table": {"family": "inet", "name": "t", "handle": 1}},
{"set": {"family": "inet", "name": "open_tcp", "type": "inet_service", "flags": ["timeout"], "elem": [{"elem": {"val": 40000, "timeout": 7200, "expires": 7199}}]}},
{"set": {"family": "inet", "name": "open_udp", "type": "inet_service", "flags": ["timeout"]}},
{"set": {"family": "inet", "name": "rx", "type": "ifname", "elem": [{"elem": {"val": "cb0", "counter": {"packets": 3, "bytes": 400}}}], "stmt": [{"counter": null}]}},
{"set": {"family": "inet", "name": "tx", "type": "ifname", "elem": [{"elem": {"val": "cb0", "counter": {"packets": 5, "bytes": 600}}}, {"elem": {"val": "cb1", "counter": {"packets": 0, "bytes": 0}}}]}},
{"set": {"family": "inet", "name": "open_egress", "type": "ifname", "elem": ["cb1", "cb0"]}},
{"set": {"family": "inet", "name": "allow4", "type": ["ifname", "ipv4_addr"], "flags": ["interval"], "elem": [{"concat": ["cb0", {"prefix": {"addr": "10.1.0.0", "len": 16}}]}, {"concat": ["cb0", "8.8.8.8"]}]}},
{"set": {"family": "inet", "name": "allow6", "type": ["ifname", "ipv6_addr"], "elem": [{"concat": ["cb0", {"prefix": {"addr": "2001:db8::", "len": 32}}]}]}},
{"set": {"family": "inet", "name": "another", "elem": [{"range": [1, 2]}, "x"]}},
{"rule": {"family": "inet", "table": "t", "chain": "c", "expr": [{"drop": null}]}}]}`

func TestParseState(t *testing.T) {
	got, err := parseState([]byte(listing))
	if err != nil {
		t.Fatal(err)
	}
	want := State{
		Ports:      map[Port]time.Duration{{40000, "tcp"}: 7199 * time.Second},
		Counters:   map[string]Counter{"cb0": {RxBytes: 400, RxPackets: 3, TxBytes: 600, TxPackets: 5}, "cb1": {}},
		OpenEgress: []string{"cb0", "cb1"},
		Allow:      map[string][]netip.Prefix{"cb0": {netip.MustParsePrefix("8.8.8.8/32"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8::/32")}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"cb0", "cb1"}, got.Interfaces()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, bad := range []string{
		"", "{}", "[]", `{"nftables": 1}`, `{"nftables": [{"set": {"name": "open_tcp", "elem": ["x"]}}]}`, `{"nftables": [{"set": {"name": "open_tcp", "elem": [70000]}}]}`,
		`{"nftables": [{"set": {"name": "rx", "elem": [1]}}]}`, `{"nftables": [{"set": {"name": "allow4", "elem": ["cb0"]}}]}`,
		`{"nftables": [{"set": {"name": "allow4", "elem": [{"concat": ["cb0", "x"]}]}}]}`, `{"nftables": [{"set": {"name": "open_tcp", "elem": [{"elem": {"val": 1, "expires": -1}}]}}]}`,
	} {
		if got, err := parseState([]byte(bad)); err == nil {
			t.Errorf("%s: no error: %+v", bad, got)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(listing))
	f.Fuzz(func(_ *testing.T, data []byte) {
		state, err := parseState(data)
		if err == nil {
			state.Interfaces()
		}
	})
}
