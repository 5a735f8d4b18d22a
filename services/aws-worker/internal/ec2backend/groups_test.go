package ec2backend

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

func TestEqualRulesShareAGroup(t *testing.T) {
	t.Parallel()
	tcp := func(n uint16) backend.Port { return backend.Port{Number: n, Protocol: backend.TCP} }
	udp := func(n uint16) backend.Port { return backend.Port{Number: n, Protocol: backend.UDP} }
	allow := func(prefixes ...string) backend.NetworkPolicy {
		return backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: prefixes}
	}
	rc := RegionConfig{AllowlistEgress: []string{"198.51.100.0/24", "pl-1"}}
	base := backend.Grant{Ports: []backend.Port{tcp(80), tcp(443)}}
	same := backend.Grant{Ports: []backend.Port{tcp(443), tcp(80)}, Network: backend.NetworkPolicy{Mode: backend.NetworkOpen}}
	if rulesOf(base, rc).key() != rulesOf(same, rc).key() {
		t.Error("the order of ports makes another group")
	}
	others := map[string]backend.Grant{
		"no ports":  {},
		"udp":       {Ports: []backend.Port{udp(80), tcp(443)}},
		"allowlist": {Ports: base.Ports, Network: allow("203.0.113.0/24")},
		"another":   {Ports: base.Ports, Network: allow("203.0.113.0/25")},
	}
	seen := map[string]string{rulesOf(base, rc).key(): "base"}
	for name, g := range others {
		key := rulesOf(g, rc).key()
		if with, dup := seen[key]; dup {
			t.Errorf("%s shares its group with %s", name, with)
		}
		seen[key] = name
	}
}

func TestAllowlistHasWhatEveryInstanceNeedsForItsStart(t *testing.T) {
	t.Parallel()
	g := backend.Grant{Network: backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"203.0.113.0/24", "2001:db8::/32"}}}
	got := rulesOf(g, RegionConfig{AllowlistEgress: []string{"198.51.100.7/32", "pl-0123"}}).egress()
	var v4, v6, lists []string
	for _, r := range got.IpRanges {
		v4 = append(v4, *r.CidrIp)
	}
	for _, r := range got.Ipv6Ranges {
		v6 = append(v6, *r.CidrIpv6)
	}
	for _, r := range got.PrefixListIds {
		lists = append(lists, *r.PrefixListId)
	}
	want := [][]string{{"198.51.100.7/32", "203.0.113.0/24"}, {"2001:db8::/32"}, {"pl-0123"}}
	if diff := cmp.Diff(want, [][]string{v4, v6, lists}); diff != "" {
		t.Error(diff)
	}
}
