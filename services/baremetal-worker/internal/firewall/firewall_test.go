package firewall_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

func connect(t testing.TB, h *lab.Host) *sshconn.Conn {
	t.Helper()
	conn, err := sshconn.Open(t.Context(), sshconn.Config{
		Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root",
		Key: h.Lab().UserKey(), HostKeys: []ssh.PublicKey{h.HostKey},
	}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	return conn
}

// metadata plays the part of a cloud's metadata service.
var metadata = netip.MustParsePrefix("203.0.113.0/24")

func table() firewall.Table {
	return firewall.Table{Bridge: "demo", FirstPort: 40000, LastPort: 40999, InterfacePrefix: "cb", Denied: append(firewall.DefaultDenied(), metadata)}
}

func open(t testing.TB, conn *sshconn.Conn) *firewall.Firewall {
	t.Helper()
	wall, err := firewall.New(conn, table())
	if err != nil {
		t.Fatal(err)
	}
	return wall
}

func tcp(number uint16) firewall.Port { return firewall.Port{Number: number, Protocol: "tcp"} }

func TestTable(t *testing.T) {
	wall := open(t, connect(t, lab.NewHost(t, lab.HostOptions{})))
	grant := firewall.Grant{
		Interface: "cb0123456789", Ports: []firewall.Port{tcp(40000), {Number: 40001, Protocol: "udp"}}, Restricted: true,
		Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("192.0.2.0/30")},
	}
	other := firewall.Grant{Interface: "cb9876543210", Ports: []firewall.Port{tcp(40002)}}

	if _, err := wall.Read(t.Context()); !errors.Is(err, firewall.ErrNoTable) {
		t.Errorf("without a table: %v", err)
	}
	if err := wall.Open(t.Context(), grant, time.Hour); !errors.Is(err, firewall.ErrNoTable) {
		t.Errorf("without a table: %v", err)
	}
	for range 2 {
		if err := wall.Ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if state, err := wall.Read(t.Context()); err != nil || len(state.Interfaces())+len(state.Ports) != 0 {
		t.Errorf("%+v, %v", state, err)
	}
	for _, timeout := range []time.Duration{time.Minute, time.Hour} { // The second one counts.
		if err := wall.Open(t.Context(), grant, timeout); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(wall.Open(t.Context(), other, time.Hour), wall.Ensure(t.Context())); err != nil {
		t.Fatal(err)
	}
	state, err := wall.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(state.Ports) != 3 || state.Ports[tcp(40000)] < 59*time.Minute || state.Ports[tcp(40000)] > time.Hour {
		t.Errorf("ports %v", state.Ports)
	}
	if len(state.Counters) != 2 || len(state.OpenEgress) != 1 || len(state.Allow["cb0123456789"]) != 2 || len(state.Interfaces()) != 2 {
		t.Errorf("%+v", state)
	}
	for range 2 {
		if err := wall.Close(t.Context(), grant); err != nil {
			t.Fatal(err)
		}
	}
	if state, err = wall.Read(t.Context()); err != nil || len(state.Ports) != 1 || len(state.Counters) != 1 || len(state.OpenEgress) != 1 || len(state.Allow) != 0 {
		t.Errorf("%+v, %v", state, err)
	}
	for range 2 {
		if err := wall.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := wall.Read(t.Context()); !errors.Is(err, firewall.ErrNoTable) {
		t.Errorf("after removal: %v", err)
	}
}

// guest is a container of a grant, which echoes what it gets on port 80.
type guest struct {
	grant firewall.Grant
	port  uint16
	addr  string
}

// start runs a container on a network of its own, without podman's isolation:
// what keeps it apart is only the table.
func start(t *testing.T, host *lab.Host, number int) guest {
	t.Helper()
	name, iface, port := fmt.Sprintf("g%d", number), fmt.Sprintf("cb%010d", number), uint16(40000+number)
	out, err := host.Exec(t.Context(), "sh", "-ec", `
		podman network create --disable-dns --interface-name "$2" "$1" >&2
		podman run -d --pids-limit=0 --network "$1" --publish "$3:80" --name "$1" localhost/shell \
			sh -c 'while :; do nc -l -p 80 -e cat; done' >&2
		podman inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$1"`, "sh", name, iface, strconv.Itoa(int(port)))
	if err != nil {
		t.Fatal(err)
	}
	return guest{firewall.Grant{Interface: iface, Ports: []firewall.Port{tcp(port)}}, port, strings.TrimSpace(out)}
}

// reaches reports whether a container gets an echo from an address.
func reaches(t *testing.T, host *lab.Host, number int, addr string, port uint16) bool {
	t.Helper()
	out, err := host.Exec(t.Context(), "podman", "exec", fmt.Sprintf("g%d", number), "sh", "-c", `echo hello | nc -w 1 "$1" "$2"`, "sh", addr, strconv.Itoa(int(port)))
	return err == nil && strings.Contains(out, "hello")
}

// echo sends bytes to an address and reports whether they come back.
func echo(t *testing.T, addr string, size int) bool {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = conn.Write(make([]byte, size)) }()
	_, err = io.ReadFull(conn, make([]byte, size))
	return err == nil
}

func TestTraffic(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{})
	conn := connect(t, host)
	files := hostfs.New(conn)
	archive := ociimage.Make(t, ociimage.Shell)
	image, err := os.Open(archive.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = image.Close() }()
	if _, err := files.Upload(t.Context(), "/var/lib/image", 0o600, image, nil); err != nil {
		t.Fatal(err)
	}
	loaded, err := podman.New(conn).LoadImage(t.Context(), podman.Engine{}, "/var/lib/image")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := host.Exec(t.Context(), "podman", "tag", loaded.ID, "localhost/shell"); err != nil {
		t.Fatal(err)
	}
	one, two := start(t, host, 1), start(t, host, 2)
	at := func(g guest) string { return net.JoinHostPort(host.Addr.String(), strconv.Itoa(int(g.port))) }

	// An outside service, on the lab's end of the network, at three addresses:
	// a plain one, one that is denied and one that only some may reach.
	labAddr := host.Lab().Addr().String()
	if out, err := host.Lab().Command(t.Context(), "ip", "address", "add", "203.0.113.1/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := host.Lab().Command(t.Context(), "ip", "address", "add", "198.51.100.1/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := host.Exec(t.Context(), "ip", "route", "replace", "default", "via", labAddr); err != nil {
		t.Fatal(err)
	}
	var listen net.ListenConfig
	service, err := listen.Listen(t.Context(), "tcp4", "0.0.0.0:7")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	defer func() { _ = service.Close(); <-done }()
	go func() {
		defer close(done)
		for {
			c, err := service.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()

	// Without the table all of this is possible, or the test would prove nothing.
	for what, ok := range map[string]bool{
		"outside to 1":     echo(t, at(one), 10),
		"1 to 2":           reaches(t, host, 1, two.addr, 80),
		"1 to 2's port":    reaches(t, host, 1, host.Addr.String(), two.port),
		"1 to the outside": reaches(t, host, 1, labAddr, 7),
		"1 to metadata":    reaches(t, host, 1, "203.0.113.1", 7),
	} {
		if !ok {
			t.Fatalf("without the table: no way from %s", what)
		}
	}
	hostSSH := func(number int, addr string) bool {
		out, _ := host.Exec(t.Context(), "podman", "exec", fmt.Sprintf("g%d", number), "sh", "-c", `nc -w 1 "$1" 22 </dev/null`, "sh", addr)
		return strings.Contains(out, "SSH-2.0")
	}
	gateway, err := host.Exec(t.Context(), "podman", "network", "inspect", "--format", "{{(index .Subnets 0).Gateway}}", "g1")
	if err != nil {
		t.Fatal(err)
	}
	gateway = strings.TrimSpace(gateway)
	if !hostSSH(1, host.Addr.String()) || !hostSSH(1, gateway) {
		t.Fatal("without the table: no way from 1 to the host")
	}

	wall := open(t, conn)
	if err := wall.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Run("PortsAreClosedUntilOpened", func(t *testing.T) {
		if echo(t, at(one), 10) {
			t.Error("a port that nobody opened is open")
		}
		if err := wall.Open(t.Context(), one.grant, time.Hour); err != nil {
			t.Fatal(err)
		}
		if !echo(t, at(one), 10) {
			t.Error("an opened port is closed")
		}
		if echo(t, at(two), 10) {
			t.Error("another grant's port is open too")
		}
	})
	t.Run("GrantsReachNeitherEachOtherNorTheHost", func(t *testing.T) {
		if err := wall.Open(t.Context(), two.grant, time.Hour); err != nil {
			t.Fatal(err)
		}
		for what, open := range map[string]bool{
			"1 to 2":                    reaches(t, host, 1, two.addr, 80),
			"2 to 1":                    reaches(t, host, 2, one.addr, 80),
			"1 to 2's port":             reaches(t, host, 1, host.Addr.String(), two.port),
			"1 to 2's port by gateway":  reaches(t, host, 1, gateway, two.port),
			"1 to the host":             hostSSH(1, host.Addr.String()),
			"1 to its gateway":          hostSSH(1, gateway),
			"1 to a denied destination": reaches(t, host, 1, "203.0.113.1", 7),
		} {
			if open {
				t.Errorf("there is a way from %s", what)
			}
		}
		if !reaches(t, host, 1, labAddr, 7) {
			t.Error("1 doesn't reach the outside")
		}
	})
	t.Run("ARestrictedGrantReachesOnlyWhatItMay", func(t *testing.T) {
		restricted := one.grant
		restricted.Restricted, restricted.Allow = true, []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		if err := wall.Open(t.Context(), restricted, time.Hour); err != nil {
			t.Fatal(err)
		}
		if !reaches(t, host, 1, "198.51.100.1", 7) {
			t.Error("1 doesn't reach what it may")
		}
		if reaches(t, host, 1, labAddr, 7) {
			t.Error("1 reaches what it may not")
		}
		if !reaches(t, host, 2, labAddr, 7) {
			t.Error("another grant is restricted too")
		}
		if !echo(t, at(one), 10) {
			t.Error("1 isn't reached from outside")
		}
		if err := errors.Join(wall.Close(t.Context(), restricted), wall.Open(t.Context(), one.grant, time.Hour)); err != nil {
			t.Fatal(err)
		}
		if !reaches(t, host, 1, labAddr, 7) {
			t.Error("the restriction outlives the grant")
		}
	})
	t.Run("TrafficIsCountedPerGrant", func(t *testing.T) {
		before, err := wall.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		const size = 1 << 20
		if !echo(t, at(one), size) {
			t.Fatal("no echo")
		}
		after, err := wall.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		a, b := after.Counters[one.grant.Interface], before.Counters[one.grant.Interface]
		for what, bytes := range map[string]uint64{"received": a.RxBytes - b.RxBytes, "sent": a.TxBytes - b.TxBytes} {
			if bytes < size || bytes > size+size/5 {
				t.Errorf("%s: %d bytes for %d", what, bytes, size)
			}
		}
		if after.Counters[two.grant.Interface] != before.Counters[two.grant.Interface] {
			t.Error("another grant's counters moved")
		}
	})
	t.Run("AHoleClosesByItselfAndCutsWhatIsOpen", func(t *testing.T) {
		if err := wall.Open(t.Context(), one.grant, 8*time.Second); err != nil {
			t.Fatal(err)
		}
		through, err := net.DialTimeout("tcp", at(one), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = through.Close() }()
		if err := conn.Close(); err != nil { // Nobody is there to close it.
			t.Fatal(err)
		}
		exchange := func() error {
			if err := through.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := through.Write([]byte("x")); err != nil {
				return err
			}
			_, err := through.Read(make([]byte, 1))
			return err
		}
		if err := exchange(); err != nil {
			t.Fatalf("while the hole is open: %v", err)
		}
		for deadline := time.Now().Add(15 * time.Second); ; <-time.After(50 * time.Millisecond) {
			set, err := host.Exec(t.Context(), "nft", "list", "set", "inet", "compute_bridge_demo", "open_tcp")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(set, strconv.Itoa(int(one.port))) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the hole doesn't close: %s", set)
			}
		}
		if exchange() == nil {
			t.Error("a connection goes on after the hole's end")
		}
		var timeout net.Error
		if c, err := net.DialTimeout("tcp", at(one), time.Second); err == nil {
			_ = c.Close()
			t.Error("the port is still open")
		} else if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("the port is closed by something else: %v", err)
		}
		if !echo(t, at(two), 10) {
			t.Error("another grant's port is closed too")
		}
	})
}
