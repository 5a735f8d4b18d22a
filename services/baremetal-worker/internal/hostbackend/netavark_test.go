package hostbackend

import (
	"strings"
	"testing"
)

func TestNetavarksRulesOfOneGrantAreFound(t *testing.T) {
	t.Parallel()
	w := someWorkload(t) // 10.213.0.56/29
	table := `{"nftables":[{"metainfo":{}},{"table":{"name":"netavark"}},
		{"chain":{"name":"FORWARD"}},{"chain":{"name":"nv_0d3543bf_10_213_0_56_nm29"}},{"chain":{"name":"nv_0d3543bf_10_213_0_56_nm29_dnat"}},
		{"chain":{"name":"nv_11111111_10_213_0_48_nm29"}},
		{"rule":{"chain":"NETAVARK-HOSTPORT-DNAT","handle":7,"expr":[{"jump": {"target": "nv_0d3543bf_10_213_0_56_nm29_dnat"}}]}},
		{"rule":{"chain":"NETAVARK-HOSTPORT-DNAT","handle":8,"expr":[{"jump": {"target": "nv_11111111_10_213_0_48_nm29_dnat"}}]}},
		{"rule":{"chain":"nv_0d3543bf_10_213_0_56_nm29","handle":9,"expr":[{"accept": null}]}},
		{"rule":{"chain":"FORWARD","handle":10,"expr":[{"match":{"right":{"prefix":{"addr": "10.213.0.56", "len": 29}}}}]}},
		{"rule":{"chain":"FORWARD","handle":11,"expr":[{"match":{"right":{"prefix":{"addr": "10.213.0.48", "len": 29}}}}]}},
		{"rule":{"chain":"NETAVARK-ISOLATION-1","handle":12,"expr":[{"match":{"right":"` + w.names.networkInterface() + `"}}]}}]}`
	want := []string{
		"delete rule inet netavark NETAVARK-HOSTPORT-DNAT handle 7", "delete rule inet netavark nv_0d3543bf_10_213_0_56_nm29 handle 9",
		"delete rule inet netavark FORWARD handle 10", "delete rule inet netavark NETAVARK-ISOLATION-1 handle 12",
		"delete chain inet netavark nv_0d3543bf_10_213_0_56_nm29", "delete chain inet netavark nv_0d3543bf_10_213_0_56_nm29_dnat",
	}
	if got, err := netavarkRemoval([]byte(table), w); err != nil || got != strings.Join(want, "; ") {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := netavarkRemoval([]byte(`{"nftables":[]}`), w); err != nil || got != "" {
		t.Errorf("of nothing: %q, %v", got, err)
	}
	if _, err := netavarkRemoval([]byte("Error"), w); err == nil {
		t.Error("read what is no JSON")
	}
}
