package hostbackend

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

// netavarkTable is where podman's network program keeps its rules. podman 5.4
// leaves those of a container that ended within its first moments; they would
// send a later grant's port to an old address.
const netavarkTable = "inet netavark"

// staleRules returns the nft commands that take what netavark has of a grant's
// network out of its table, none if there is nothing.
func (h *host) staleRules(ctx context.Context, w workload) (string, error) {
	result, err := h.conn.Run(ctx, sshconn.Command{
		Args: []string{"env", "LC_ALL=C", firewall.DefaultBinary, "--json", "--handle", "list", "table", "inet", "netavark"}, Timeout: commandTimeout,
	})
	if err != nil {
		return "", err
	}
	if err := result.Err("nft"); err != nil {
		if strings.Contains(string(result.Stderr), "No such file or directory") {
			return "", nil // there is no such table: nothing of netavark's
		}
		return "", backenderr.Wrap(backenderr.HostUnfit, err, "host %s: list the rules of netavark", h.config.Name)
	}
	script, err := netavarkRemoval(result.Stdout, w)
	if err != nil {
		return "", backenderr.Wrap(backenderr.HostUnfit, err, "host %s: rules of netavark", h.config.Name)
	}
	return script, nil
}

// netavarkRemoval reads `nft --json --handle list table` and renders the removal
// of all that names the grant's subnet or interface. Nobody else has either as
// long as the grant holds its slot.
func netavarkRemoval(table []byte, w workload) (string, error) {
	var list struct {
		Nftables []struct {
			Chain *struct {
				Name string `json:"name"`
			} `json:"chain"`
			Rule *struct {
				Chain  string          `json:"chain"`
				Handle uint64          `json:"handle"`
				Expr   json.RawMessage `json:"expr"`
			} `json:"rule"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(table, &list); err != nil {
		return "", err
	}
	// Chains are named "nv_<network>_10_213_0_0_nm29", and "…_dnat".
	address := w.subnet.Addr().String()
	tag := fmt.Sprintf("_%s_nm%d", strings.ReplaceAll(address, ".", "_"), w.subnet.Bits())
	var rules, chains []string
	for _, e := range list.Nftables {
		switch {
		case e.Rule != nil:
			var expr bytes.Buffer
			if err := json.Compact(&expr, e.Rule.Expr); err != nil {
				return "", err
			}
			text := expr.String()
			if strings.Contains(e.Rule.Chain, tag) || strings.Contains(text, tag) || strings.Contains(text, `"addr":"`+address+`"`) ||
				strings.Contains(text, `"`+w.names.networkInterface()+`"`) {
				rules = append(rules, fmt.Sprintf("delete rule %s %s handle %d", netavarkTable, e.Rule.Chain, e.Rule.Handle))
			}
		case e.Chain != nil && strings.Contains(e.Chain.Name, tag):
			chains = append(chains, fmt.Sprintf("delete chain %s %s", netavarkTable, e.Chain.Name))
		}
	}
	return strings.Join(append(rules, chains...), "; "), nil
}
