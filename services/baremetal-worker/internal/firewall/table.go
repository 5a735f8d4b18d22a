package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// DefaultBinary is where distributions have nft.
const DefaultBinary = "/usr/sbin/nft"

// DefaultDenied are destinations that no grant may reach by default: link-local
// addresses, where clouds keep their instances' credentials.
func DefaultDenied() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}
}

// Table is what is to be enforced on a host.
type Table struct {
	// Bridge is the bridge's id. Each bridge has a table of its own.
	Bridge string
	// FirstPort and LastPort are the range that grants' ports are taken from.
	FirstPort, LastPort uint16
	// InterfacePrefix begins the names of grants' bridges.
	InterfacePrefix string
	// Denied are the destinations that grants must not begin to talk to.
	Denied []netip.Prefix
}

var (
	bridgeRegexp = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)
	prefixRegexp = regexp.MustCompile(`^[a-z][a-z0-9]{0,4}$`)
	ifaceRegexp  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_-]{0,14}$`)
)

// Name returns the table's name.
func (t Table) Name() string { return "compute_bridge_" + strings.ReplaceAll(t.Bridge, "-", "_") }

func (t Table) check() error {
	var errs []error
	if !bridgeRegexp.MatchString(t.Bridge) {
		errs = append(errs, fmt.Errorf("bridge id %q is not of the form %s", t.Bridge, bridgeRegexp))
	}
	if !prefixRegexp.MatchString(t.InterfacePrefix) {
		errs = append(errs, fmt.Errorf("interface prefix %q is not of the form %s", t.InterfacePrefix, prefixRegexp))
	}
	if t.FirstPort == 0 || t.LastPort < t.FirstPort {
		errs = append(errs, fmt.Errorf("port range %d-%d is empty", t.FirstPort, t.LastPort))
	}
	for _, p := range t.Denied {
		if !p.IsValid() {
			errs = append(errs, errors.New("a denied destination is no prefix"))
		}
	}
	return errors.Join(errs...)
}

// Script renders the table for `nft -f`. It can be applied again at any time:
// the rules are replaced in one transaction, and what is in the sets stays.
//
//   - A port of the range is closed unless it's in open_tcp or open_udp, whose
//     elements end by themselves.
//   - Grants reach neither each other nor the host, nor a denied destination.
//   - A grant that isn't in open_egress reaches only what allow4 and allow6 name.
//   - tx counts what a grant sends, rx what it receives, by its bridge.
func (t Table) Script() (string, error) {
	if err := t.check(); err != nil {
		return "", err
	}
	name := "inet " + t.Name()
	grants := `"` + t.InterfacePrefix + `*"`
	ports := fmt.Sprintf("%d-%d", t.FirstPort, t.LastPort)
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }

	line("add table %s", name)
	for _, set := range []string{
		"open_tcp { type inet_service; flags timeout; }",
		"open_udp { type inet_service; flags timeout; }",
		"rx { type ifname; counter; }",
		"tx { type ifname; counter; }",
		"open_egress { type ifname; }",
		"allow4 { type ifname . ipv4_addr; flags interval; }",
		"allow6 { type ifname . ipv6_addr; flags interval; }",
	} {
		line("add set %s %s", name, set)
	}
	for _, chain := range []string{
		// Before podman's own translation of published ports (dstnat, -100),
		// after connections are known (conntrack, -200).
		"published { type filter hook prerouting priority -150; policy accept; }",
		"passing { type filter hook forward priority 0; policy accept; }",
		"local { type filter hook input priority 0; policy accept; }",
	} {
		line("add chain %s %s", name, chain)
	}
	for _, chain := range []string{"published", "passing", "local"} {
		line("flush chain %s %s", name, chain)
	}

	// Only the direction that a connection was opened in: the host's own
	// connections may have a local port of the range, and get answers on it.
	for _, protocol := range []string{"tcp", "udp"} {
		line(`add rule %s published iifname != "lo" fib daddr type local ct direction original %s dport %s %s dport != @open_%s drop`,
			name, protocol, ports, protocol, protocol)
	}

	// What answers a connection that came in may go anywhere.
	const begins = "ct state new,invalid,untracked"
	line("add rule %s passing iifname %s oifname %s drop", name, grants, grants)
	four, six := split(t.Denied)
	if len(four) > 0 {
		line("add rule %s passing iifname %s %s ip daddr { %s } drop", name, grants, begins, joinPrefixes(four))
	}
	if len(six) > 0 {
		line("add rule %s passing iifname %s %s ip6 daddr { %s } drop", name, grants, begins, joinPrefixes(six))
	}
	// Empty sets let nothing out: whoever flushes the table takes rights away,
	// and gives none.
	line("add rule %s passing iifname %s iifname != @open_egress %s iifname . ip daddr != @allow4 drop", name, grants, begins)
	line("add rule %s passing iifname %s iifname != @open_egress %s iifname . ip6 daddr != @allow6 drop", name, grants, begins)
	line("add rule %s passing iifname @tx continue", name)
	line("add rule %s passing oifname @rx continue", name)

	line("add rule %s local iifname %s ct state established,related accept", name, grants)
	// Without these there is no IPv6 at all.
	line("add rule %s local iifname %s icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept", name, grants)
	line("add rule %s local iifname %s drop", name, grants)
	return s.String(), nil
}

// split sorts prefixes by family and drops those within others: nft refuses
// intervals that overlap.
func split(prefixes []netip.Prefix) (four, six []netip.Prefix) {
	sorted := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		sorted = append(sorted, p.Masked())
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if a.Bits() != b.Bits() {
			return a.Bits() - b.Bits()
		}
		return a.Addr().Compare(b.Addr())
	})
	var kept []netip.Prefix
	for _, p := range sorted {
		if !slices.ContainsFunc(kept, func(k netip.Prefix) bool { return k.Overlaps(p) }) {
			kept = append(kept, p)
		}
	}
	for _, p := range kept {
		if p.Addr().Is4() {
			four = append(four, p)
		} else {
			six = append(six, p)
		}
	}
	return four, six
}

func joinPrefixes(prefixes []netip.Prefix) string {
	text := make([]string, len(prefixes))
	for i, p := range prefixes {
		text[i] = p.String()
	}
	return strings.Join(text, ", ")
}

// Port is a port of the host.
type Port struct {
	Number uint16
	// Protocol is "tcp" or "udp".
	Protocol string
}

func (p Port) check() error {
	if p.Number == 0 || (p.Protocol != "tcp" && p.Protocol != "udp") {
		return fmt.Errorf("%d/%q is no port", p.Number, p.Protocol)
	}
	return nil
}

// Grant is what a grant has in the table.
type Grant struct {
	// Interface is the name of its bridge.
	Interface string
	// Ports are open from outside.
	Ports []Port
	// Restricted limits where it may connect to, to Allow.
	Restricted bool
	Allow      []netip.Prefix
}

// maxTimeout is far beyond any grant, and well within what nft takes.
const maxTimeout = 10 * 365 * 24 * time.Hour

func (g Grant) check(t Table) error {
	errs := []error{t.check()}
	if !ifaceRegexp.MatchString(g.Interface) || !strings.HasPrefix(g.Interface, t.InterfacePrefix) {
		errs = append(errs, fmt.Errorf("interface %q is not of the form %s*", g.Interface, t.InterfacePrefix))
	}
	for _, p := range g.Ports {
		errs = append(errs, p.check())
		if p.Number < t.FirstPort || p.Number > t.LastPort {
			errs = append(errs, fmt.Errorf("port %d is outside of %d-%d", p.Number, t.FirstPort, t.LastPort))
		}
	}
	for _, p := range g.Allow {
		if !p.IsValid() {
			errs = append(errs, errors.New("an allowed destination is no prefix"))
		}
	}
	return errors.Join(errs...)
}

// elements lists the grant's elements as "set { element }"; with is put behind
// that of a port.
func (g Grant) elements(with string) []string {
	var out []string
	for _, p := range g.Ports {
		out = append(out, fmt.Sprintf("open_%s { %d%s }", p.Protocol, p.Number, with))
	}
	for _, set := range []string{"rx", "tx"} {
		out = append(out, fmt.Sprintf("%s { %q }", set, g.Interface))
	}
	if !g.Restricted {
		return append(out, fmt.Sprintf("open_egress { %q }", g.Interface))
	}
	four, six := split(g.Allow)
	for _, p := range four {
		out = append(out, fmt.Sprintf("allow4 { %q . %s }", g.Interface, p))
	}
	for _, p := range six {
		out = append(out, fmt.Sprintf("allow6 { %q . %s }", g.Interface, p))
	}
	return out
}

// OpenArgs renders the command that opens a grant's ports for a time, starts
// its counters at zero and puts its restrictions in force: one transaction,
// which can be repeated.
func OpenArgs(t Table, g Grant, timeout time.Duration) ([]string, error) {
	if timeout < time.Second || timeout > maxTimeout {
		return nil, fmt.Errorf("timeout %s is not between 1 s and %s", timeout, maxTimeout)
	}
	if err := g.check(t); err != nil {
		return nil, err
	}
	// An element that is there already would keep its old end.
	script := g.removal(t)
	seconds := (timeout + time.Second - 1) / time.Second
	for _, e := range g.elements(fmt.Sprintf(" timeout %ds", seconds)) {
		script = append(script, fmt.Sprintf("add element inet %s %s", t.Name(), e))
	}
	return []string{DefaultBinary, strings.Join(script, "; ")}, nil
}

// CloseArgs renders the command that takes all of a grant out of the table: one
// transaction, which succeeds whatever of it is there.
func CloseArgs(t Table, g Grant) ([]string, error) {
	if err := g.check(t); err != nil {
		return nil, err
	}
	return []string{DefaultBinary, strings.Join(g.removal(t), "; ")}, nil
}

// removal deletes elements that may be missing: nft before 1.0.7 has no
// "destroy", so each is added first. It takes the right to open egress away from
// a restricted grant, too, which may have had it before.
func (g Grant) removal(t Table) []string {
	var script []string
	plain, timed := g.elements(""), g.elements(" timeout 1s")
	if g.Restricted {
		egress := fmt.Sprintf("open_egress { %q }", g.Interface)
		plain, timed = append(plain, egress), append(timed, egress)
	}
	for i, e := range timed {
		script = append(script, fmt.Sprintf("add element inet %s %s", t.Name(), e), fmt.Sprintf("delete element inet %s %s", t.Name(), plain[i]))
	}
	return script
}

// EnsureArgs renders the command that applies a script that is in a file on the
// host, for units that must not start without the table.
func EnsureArgs(file string) ([]string, error) {
	if !path.IsAbs(file) || strings.ContainsAny(file, "\x00\n") {
		return nil, fmt.Errorf("file %q is not an absolute path", file)
	}
	return []string{DefaultBinary, "--file", file}, nil
}
