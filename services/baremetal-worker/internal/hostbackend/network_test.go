package hostbackend

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// endpoint is something that an instance may or may not reach.
type endpoint struct {
	name, host string
	port       uint16
}

// reachable tries all endpoints at once from inside an instance, each for 2 s,
// and returns the names of those that answer.
func reachable(t *testing.T, p backend.Provisioned, key login, all ...endpoint) []string {
	t.Helper()
	var script strings.Builder
	for i, e := range all {
		fmt.Fprintf(&script, "(nc -w 2 %s %d </dev/null 2>/dev/null | grep -qE 'REACHED|SSH-' && echo %d) & ", e.host, e.port, i)
	}
	out, err := run(t, p, key, script.String()+"wait")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var names []string
	for line := range strings.FieldsSeq(out) {
		i, err := strconv.Atoi(line)
		if err != nil {
			t.Fatalf("output %q", out)
		}
		names = append(names, all[i].name)
	}
	slices.Sort(names)
	return names
}

// serve starts a server in an instance: what connects gets the text.
func serve(t *testing.T, p backend.Provisioned, key login, port backend.Port, text string) {
	t.Helper()
	if port.Protocol == backend.TCP {
		command := fmt.Sprintf("nc -ll -p %d -e echo %s >/dev/null 2>&1 </dev/null &", port.Number, text)
		if out, err := run(t, p, key, command); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	program, err := udpEcho()
	if err != nil {
		t.Fatal(err)
	}
	command := fmt.Sprintf("cat >/tmp/udpecho && chmod +x /tmp/udpecho && { /tmp/udpecho %d %s >/dev/null 2>&1 </dev/null & }", port.Number, text)
	if out, err := runWith(t, p, key, command, program); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// listenHere answers every connection to the tests' own side of the lab.
func listenHere(t *testing.T, addr string) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "REACHED\n")
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	address, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("a TCP listener at %T", l.Addr())
	}
	return address.AddrPort().Port()
}

func TestPublishedPortsAreReachableAndNoOthers(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}, {Number: 5353, Protocol: backend.UDP}}
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	if len(p.Instance.Ports) != 2 {
		t.Fatalf("published %+v", p.Instance.Ports)
	}
	serve(t, p, key, g.Ports[0], "over-tcp")
	serve(t, p, key, g.Ports[1], "over-udp")
	serve(t, p, key, backend.Port{Number: 9090, Protocol: backend.TCP}, "never")

	for _, published := range p.Instance.Ports {
		address := net.JoinHostPort(published.PublicHost, strconv.Itoa(int(published.PublicPort)))
		soon(t, func() error {
			conn, err := net.DialTimeout(published.Port.Protocol.String(), address, time.Second)
			if err != nil {
				return err
			}
			defer conn.Close()
			if published.Port.Protocol == backend.UDP {
				if _, err := conn.Write([]byte("?\n")); err != nil {
					return err
				}
			}
			if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
				return err
			}
			text := make([]byte, 64)
			n, err := conn.Read(text)
			if want := "over-" + published.Port.Protocol.String() + "\n"; err == nil && string(text[:n]) != want {
				err = fmt.Errorf("read %q, want %q", text[:n], want)
			}
			return err
		})
	}
	for _, port := range []int{9090, 8080, 40000 + 3, 61022} {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(h.Addr.String(), strconv.Itoa(port)), time.Second)
		if err == nil {
			_ = conn.Close()
			t.Errorf("port %d of the host answers", port)
		}
	}
}

func TestGrantsReachNeitherEachOtherNorTheHost(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	var all []backend.Provisioned
	for range 2 {
		g, e := grant(image, key)
		g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}}
		p := s.provision(t, g, e)
		defer s.terminate(t, p)
		serve(t, p, key, g.Ports[0], "REACHED")
		all = append(all, p)
	}
	a, b := all[0], all[1]
	addressOf := func(p backend.Provisioned) string {
		t.Helper()
		out, err := run(t, p, key, "hostname -i")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(out)[0]
	}
	gatewayOf := func(p backend.Provisioned) string {
		t.Helper()
		out, err := run(t, p, key, "ip route | awk '/^default/ {print $3}'")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	outside := endpoint{"beyond the host", h.Lab().Addr().String(), listenHere(t, h.Lab().Addr().String())}
	published := b.Instance.Ports[0].PublicPort
	// It does answer, where it may.
	soon(t, func() error {
		if got := reachable(t, b, key, endpoint{"own", addressOf(b), 8080}); len(got) != 1 {
			return errors.New("the other grant's server doesn't answer itself")
		}
		return nil
	})
	got := reachable(t, a, key, outside,
		endpoint{"the other's address", addressOf(b), 8080},
		endpoint{"the other's SSH", addressOf(b), 61022},
		endpoint{"the other's published port at the host's address", h.Addr.String(), published},
		endpoint{"the other's published port at the gateway", gatewayOf(a), published},
		endpoint{"the other's published port at its gateway", gatewayOf(b), published},
		endpoint{"the other's SSH port at the host's address", h.Addr.String(), b.Receipt.Port},
		endpoint{"the host's sshd", h.Addr.String(), 22},
		endpoint{"the host's sshd at the gateway", gatewayOf(a), 22},
		endpoint{"the host's sshd at the other's gateway", gatewayOf(b), 22},
	)
	if diff := cmp.Diff([]string{outside.name}, got); diff != "" {
		t.Errorf("what a grant reaches (-want +got):\n%s", diff)
	}
}

func TestAllowlistIsKept(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	other := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	here := h.Lab().Addr().String()
	port := listenHere(t, here)
	image := s.image(ociimage.Shell)
	endpoints := []endpoint{{"here", here, port}, {"other", other.Addr.String(), 22}, {"own host", h.Addr.String(), 22}}
	for _, tt := range []struct {
		name    string
		allowed []string
		want    []string
	}{
		{"one address", []string{here + "/32"}, []string{"here"}},
		{"overlapping networks and IPv6", []string{"10.77.0.0/16", here + "/32", "2001:db8::/32"}, []string{"here", "other"}},
		{"somewhere else", []string{"192.0.2.0/24"}, nil},
		{"nothing", nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, e := grant(image, key)
			g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: tt.allowed}
			p := s.provision(t, g, e)
			defer s.terminate(t, p)
			if diff := cmp.Diff(tt.want, reachable(t, p, key, endpoints...)); diff != "" {
				t.Errorf("what the grant reaches (-want +got):\n%s", diff)
			}
		})
	}
}
