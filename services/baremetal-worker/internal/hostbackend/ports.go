package hostbackend

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// addressInUse is how podman ends its complaint about a port that it can't
// publish: the text of EADDRINUSE.
const addressInUse = "address already in use"

// foreignPortsError says that something else on the host has ports which were
// to be a grant's.
type foreignPortsError struct{ ports []uint16 }

// Error names the ports.
func (e *foreignPortsError) Error() string {
	return "something else on the host has port " + strings.Trim(strings.ReplaceAll(fmt.Sprint(e.ports), " ", ", "), "[]")
}

// maxSocketsBytes bounds a table of sockets: 150 bytes for each of a hundred
// thousand.
const maxSocketsBytes = 16 << 20

// foreignPorts returns which of a grant's ports are bound on the host, while its
// unit doesn't run.
func (h *host) foreignPorts(ctx context.Context, w workload) ([]uint16, error) {
	bound := map[string]map[uint16]bool{"tcp": {}, "udp": {}}
	for protocol, ports := range bound {
		for _, table := range []string{protocol, protocol + "6"} {
			data, err := h.fs.ReadFile(ctx, "/proc/net/"+table, maxSocketsBytes)
			if isMissing(err) {
				continue // a host without IPv6
			}
			if err != nil {
				return nil, err
			}
			readSockets(string(data), ports)
		}
	}
	var foreign []uint16
	for _, p := range w.publish() {
		if bound[p.Protocol][p.HostPort] && !slices.Contains(foreign, p.HostPort) {
			foreign = append(foreign, p.HostPort)
		}
	}
	return foreign, nil
}

// readSockets reads the local ports of a table in /proc/net (proc(5)) that are
// bound for anybody to reach, not ends of connections: sockets without a peer.
func readSockets(table string, ports map[uint16]bool) {
	for line := range strings.Lines(table) {
		// "  0: 0100007F:9C40 00000000:0000 0A …": local, remote, state.
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasSuffix(fields[2], ":0000") {
			continue
		}
		_, hex, ok := strings.Cut(fields[1], ":")
		if port, err := strconv.ParseUint(hex, 16, 16); ok && err == nil {
			ports[uint16(port)] = true
		}
	}
}
