// Package firewall keeps the grants of a bare-metal host apart: from each
// other, from the host, and from what they may not reach; and it opens exactly
// the ports that grants have, for as long as they have them.
//
// It is one nftables table per bridge. The rules never change; what a grant may
// do are elements of sets, made and removed by commands of the grant's own
// systemd unit, so that nothing depends on the worker being alive.
package firewall

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

// commandTimeout bounds one run of nft.
const commandTimeout = 30 * time.Second

// maxListing bounds the listing of a table, in bytes: some hundred per grant.
const maxListing = 16 << 20

// ErrNoTable says that the host has no table of this bridge: nobody made it
// yet, or the host was rebooted, or someone flushed its whole ruleset.
var ErrNoTable = errors.New("host has no such table")

// Firewall is one bridge's table on one host. Its methods are safe for
// concurrent use.
type Firewall struct {
	conn  *sshconn.Conn
	table Table
}

// New returns the table on the connection's host. An error is a mistake in the
// table.
func New(conn *sshconn.Conn, table Table) (*Firewall, error) {
	if err := table.check(); err != nil {
		return nil, err
	}
	return &Firewall{conn: conn, table: table}, nil
}

// Table returns what is enforced.
func (f *Firewall) Table() Table { return f.table }

// Ensure makes the table, or brings its rules up to date. What is in its sets
// stays.
func (f *Firewall) Ensure(ctx context.Context) error {
	script, err := f.table.Script()
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "host %s", f.conn.Name())
	}
	_, err = f.run(ctx, []string{DefaultBinary, "--file", "-"}, script)
	return err
}

// Close takes all of a grant out of the table, whatever of it is there.
func (f *Firewall) Close(ctx context.Context, g Grant) error {
	args, err := CloseArgs(f.table, g)
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "host %s", f.conn.Name())
	}
	_, err = f.run(ctx, args, "")
	return err
}

// Open puts a grant into the table, for ports until the timeout.
func (f *Firewall) Open(ctx context.Context, g Grant, timeout time.Duration) error {
	args, err := OpenArgs(f.table, g, timeout)
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "host %s", f.conn.Name())
	}
	_, err = f.run(ctx, args, "")
	return err
}

// Remove removes the table with all that is in it. One that isn't there is
// fine.
func (f *Firewall) Remove(ctx context.Context) error {
	name := "inet " + f.table.Name()
	_, err := f.run(ctx, []string{DefaultBinary, "add table " + name + "; delete table " + name}, "")
	return err
}

// Read returns what is in the table's sets now; ErrNoTable if it isn't there.
func (f *Firewall) Read(ctx context.Context) (State, error) {
	out, err := f.run(ctx, []string{DefaultBinary, "--json", "list table inet " + f.table.Name()}, "")
	if err != nil {
		return State{}, err
	}
	state, err := parseState(out)
	if err != nil {
		return State{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s: nft", f.conn.Name())
	}
	return state, nil
}

func (f *Firewall) run(ctx context.Context, args []string, stdin string) ([]byte, error) {
	result, err := f.conn.Run(ctx, sshconn.Command{
		Args: append([]string{"env", "LC_ALL=C"}, args...), Stdin: strings.NewReader(stdin), Timeout: commandTimeout, MaxOutput: maxListing,
	})
	if err != nil {
		return nil, err
	}
	if err := result.Err("nft"); err != nil {
		if strings.Contains(string(result.Stderr), "No such file or directory") {
			err = errors.Join(ErrNoTable, err)
		}
		return nil, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", f.conn.Name())
	}
	if result.Truncated {
		return nil, backenderr.New(backenderr.HostUnfit, "host %s: nft lists more than %d bytes", f.conn.Name(), maxListing)
	}
	return result.Stdout, nil
}

// State is what is in the table's sets.
type State struct {
	// Ports are the open ones and how long they stay so.
	Ports map[Port]time.Duration
	// Counters are those of the grants' bridges.
	Counters map[string]Counter
	// OpenEgress are the bridges that may connect to anything that isn't denied;
	// all others only to what Allow names.
	OpenEgress []string
	Allow      map[string][]netip.Prefix
}

// Counter is what a grant has received and sent, IP headers included.
type Counter struct {
	RxBytes, RxPackets uint64
	TxBytes, TxPackets uint64
}

// Interfaces returns the names of all bridges that are in any set.
func (s State) Interfaces() []string {
	names := slices.Clone(s.OpenEgress)
	for name := range s.Counters {
		names = append(names, name)
	}
	for name := range s.Allow {
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// element is an element of a set: a plain value, or one with things attached.
type element struct {
	value   json.RawMessage
	expires time.Duration
	packets uint64
	bytes   uint64
}

// parseState reads `nft --json list table`.
func parseState(listing []byte) (State, error) {
	var doc struct {
		Nftables []struct {
			Set *struct {
				Name string            `json:"name"`
				Elem []json.RawMessage `json:"elem"`
			} `json:"set"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(listing, &doc); err != nil {
		return State{}, fmt.Errorf("listing: %w", err)
	}
	if doc.Nftables == nil {
		return State{}, errors.New("listing has no \"nftables\"")
	}
	state := State{Ports: map[Port]time.Duration{}, Counters: map[string]Counter{}, Allow: map[string][]netip.Prefix{}}
	for _, object := range doc.Nftables {
		if object.Set == nil {
			continue
		}
		for _, raw := range object.Set.Elem {
			e, err := parseElement(raw)
			if err == nil {
				err = state.add(object.Set.Name, e)
			}
			if err != nil {
				return State{}, fmt.Errorf("set %s: %w", object.Set.Name, err)
			}
		}
	}
	slices.Sort(state.OpenEgress)
	for _, prefixes := range state.Allow {
		slices.SortFunc(prefixes, netip.Prefix.Compare)
	}
	return state, nil
}

func parseElement(raw json.RawMessage) (element, error) {
	var wrapped struct {
		Elem *struct {
			Val     json.RawMessage `json:"val"`
			Expires int64           `json:"expires"`
			Counter struct {
				Packets uint64 `json:"packets"`
				Bytes   uint64 `json:"bytes"`
			} `json:"counter"`
		} `json:"elem"`
	}
	if len(raw) > 0 && raw[0] == '{' {
		if err := json.Unmarshal(raw, &wrapped); err != nil {
			return element{}, err
		}
	}
	if wrapped.Elem == nil {
		return element{value: raw}, nil
	}
	w := wrapped.Elem
	if w.Expires < 0 || w.Expires > int64(maxTimeout/time.Second) {
		return element{}, fmt.Errorf("element ends in %d s", w.Expires)
	}
	return element{value: w.Val, expires: time.Duration(w.Expires) * time.Second, packets: w.Counter.Packets, bytes: w.Counter.Bytes}, nil
}

func (s *State) add(set string, e element) error {
	switch set {
	case "open_tcp", "open_udp":
		number, err := strconv.ParseUint(string(e.value), 10, 16)
		if err != nil {
			return fmt.Errorf("port %s: %w", e.value, err)
		}
		s.Ports[Port{Number: uint16(number), Protocol: strings.TrimPrefix(set, "open_")}] = e.expires
	case "rx", "tx", "open_egress":
		var name string
		if err := json.Unmarshal(e.value, &name); err != nil {
			return fmt.Errorf("interface %s: %w", e.value, err)
		}
		if set == "open_egress" {
			s.OpenEgress = append(s.OpenEgress, name)
			return nil
		}
		c := s.Counters[name]
		if set == "rx" {
			c.RxBytes, c.RxPackets = e.bytes, e.packets
		} else {
			c.TxBytes, c.TxPackets = e.bytes, e.packets
		}
		s.Counters[name] = c
	case "allow4", "allow6":
		var pair struct {
			Concat []json.RawMessage `json:"concat"`
		}
		if err := json.Unmarshal(e.value, &pair); err != nil || len(pair.Concat) != 2 {
			return fmt.Errorf("element %s is no pair", e.value)
		}
		var name string
		if err := json.Unmarshal(pair.Concat[0], &name); err != nil {
			return fmt.Errorf("interface %s: %w", pair.Concat[0], err)
		}
		prefix, err := parsePrefix(pair.Concat[1])
		if err != nil {
			return err
		}
		s.Allow[name] = append(s.Allow[name], prefix)
	}
	return nil // Another set: not ours to understand.
}

// parsePrefix reads "10.0.0.1" or {"prefix": {"addr": "10.0.0.0", "len": 8}}.
func parsePrefix(raw json.RawMessage) (netip.Prefix, error) {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return netip.Prefix{}, err
		}
		return addr.Prefix(addr.BitLen())
	}
	var p struct {
		Prefix struct {
			Addr string `json:"addr"`
			Len  int    `json:"len"`
		} `json:"prefix"`
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return netip.Prefix{}, fmt.Errorf("destination %s: %w", raw, err)
	}
	addr, err := netip.ParseAddr(p.Prefix.Addr)
	if err != nil {
		return netip.Prefix{}, err
	}
	return addr.Prefix(p.Prefix.Len)
}
