package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The main job: a grant through the router becomes a container that OpenSSH's
// clients log in to, and when it ends everything is gone and the usage is known.
func TestAGrantFromProvisionToComputeLog(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	card := b.ok(market, "card")
	for _, want := range []string{"e2e", "metal1", "lab", "container", "platform"} {
		if !strings.Contains(card, want) {
			t.Errorf("the card lacks %q:\n%s", want, card)
		}
	}
	p := b.provision(own("--env", "GREETING=hello world", "--port", "8080/tcp")...)
	if p.Receipt.Requester == nil || p.Receipt.Sealed != nil {
		t.Errorf("the receipt isn't for the requester's own key: %+v", p.Receipt)
	}
	if got := b.list(market); len(got) != 1 || got[0].id() != p.Instance.id() || got[0].Backend != "metal1" {
		t.Errorf("listed: %+v", got)
	}
	if got := b.list(bob); len(got) != 0 {
		t.Errorf("another client sees %+v", got)
	}
	watch := b.start("watch", p.Instance.id(), "-o", "json")

	t.Run("a command, its environment and its exit code", func(t *testing.T) {
		b := b.in(t)
		b.says(b.run(b.ssh(p, "requester", nil, `echo "$GREETING"; echo oops >&2; exit 7`)), 7, `(?s)hello world.*oops`)
		b.says(b.run(b.ssh(p, "requester", nil, "kill -9 $$")), 255, "")
	})
	t.Run("a shell on a terminal", func(t *testing.T) {
		b := b.in(t)
		cmd := b.ssh(p, "requester", []string{"-tt"})
		cmd.Stdin = strings.NewReader("test -t 0 && echo terminal-$((6*7))\nexit 3\n")
		b.says(b.run(cmd), 3, "terminal-42")
	})
	t.Run("bridgectl ssh passes options and exit code on", func(t *testing.T) {
		b := b.in(t)
		b.says(b.run(b.cmd(market, "bridgectl", "ssh", p.Instance.id(), "-i", "requester", "--", "exit 9")), 9, "")
		b.says(b.run(b.cmd(market, "bridgectl", "ssh", p.Instance.id()[:8], "id")), 0, "uid=")
	})
	t.Run("scp both ways", func(t *testing.T) {
		b := b.in(t)
		b.copyBothWays(p)
	})
	t.Run("a forwarded port", func(t *testing.T) {
		b := b.in(t)
		b.forward(p)
	})
	t.Run("a published port", func(t *testing.T) {
		b := b.in(t)
		if len(p.Instance.Ports) != 1 || p.Instance.Ports[0].Port.Number != 8080 {
			t.Fatalf("published: %+v", p.Instance.Ports)
		}
		port := p.Instance.Ports[0]
		server := b.startCmd(b.ssh(p, "requester", nil, "while echo from the port | nc -l -p 8080; do :; done"))
		b.soon("the published port answers", func() error {
			return answers(t.Context(), fmt.Sprintf("%s:%d", port.PublicHost, port.PublicPort), "from the port")
		})
		server.kill()
	})
	t.Run("no other host key, no other login key", func(t *testing.T) {
		b := b.in(t)
		b.sshKey("other")
		b.says(b.run(b.ssh(p, "other", nil, "true")), 255, "Permission denied")
		forged := p
		public, _, _ := strings.Cut(b.read("other.pub"), "\n")
		forged.Receipt.HostKey = public
		b.says(b.run(b.ssh(forged, "requester", nil, "true")), 255, "(?i)host key")
	})

	b.refused(bob, 6, []string{"CALLER_DENIED"}, "terminate", p.Instance.Handle)
	b.refused(bob, 6, []string{"CALLER_DENIED"}, "watch", p.Instance.Handle)
	b.terminate(p)
	if code := watch.wait(); code != 0 || !strings.Contains(watch.output(), "END_REASON_TERMINATED") {
		t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
	b.says(b.run(b.ssh(p, "requester", []string{"-o", "ConnectTimeout=5"}, "true")), 255, "")
	log := b.finalLog(p)
	if log.Log.Exit.Reason != "END_REASON_TERMINATED" || log.Log.Usage["cpu_core_milliseconds"].Source != "USAGE_SOURCE_HOST_MEASURED" ||
		log.Log.Usage["network_received_bytes"].Value == "0" {
		t.Errorf("log: %+v", log.Log)
	}
	// A grant never runs twice.
	b.refused(market, 8, []string{"GRANT_ENDED"}, "provision", "--again", p.Instance.id())
	b.ok(market, "terminate", p.Instance.id())
	if got := b.list(market); len(got) != 0 {
		t.Errorf("still listed: %+v", got)
	}
}

// in returns the bridge for a subtest.
func (b *bridge) in(t *testing.T) *bridge {
	t.Helper()
	sub := *b
	sub.t = t
	return &sub
}

// copyBothWays sends a file with scp, and gets it back.
func (b *bridge) copyBothWays(p provisioned) {
	b.t.Helper()
	noise := make([]byte, 3<<20)
	_, _ = rand.Read(noise)
	b.write(b.Path("noise"), string(noise))
	there := "scp://" + p.Receipt.User + "@" + net.JoinHostPort(p.Receipt.Host, strconv.Itoa(p.Receipt.Port)) + "//tmp/noise"
	for _, way := range [][2]string{{"noise", there}, {there, "back"}} {
		b.says(b.run(b.cmd(market, "scp", append(b.sshOptions(p, "requester"), way[0], way[1])...)), 0, "")
	}
	if b.read("back") != string(noise) {
		b.t.Error("what came back is not what was sent")
	}
	b.says(b.run(b.cmd(market, "bridgectl", "scp", p.Instance.id(), ":/tmp/noise", "back-by-bridgectl")), 0, "")
	if b.read("back-by-bridgectl") != string(noise) {
		b.t.Error("what came back by bridgectl is not what was sent")
	}
}

// forward reaches a server in the container through ssh -L.
func (b *bridge) forward(p provisioned) {
	b.t.Helper()
	local := b.IP + ":7001"
	tunnel := b.startCmd(b.ssh(p, "requester", []string{"-o", "ExitOnForwardFailure=yes", "-L", local + ":127.0.0.1:9001"},
		"while echo through the tunnel | nc -l -p 9001; do :; done"))
	b.soon("the tunnel answers", func() error { return answers(b.t.Context(), local, "through the tunnel") })
	tunnel.kill()
}

// answers reads what a server sends.
func answers(ctx context.Context, address, want string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		return fmt.Errorf("%s sent %q: %w", address, got[:n], errors.Join(errors.New("not what was expected"), err))
	}
	return nil
}

// Without a key of its own, a requester gets one that is sealed to it and never
// is on a disk.
func TestASealedLoginKey(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	p := b.provision("--for", "1h", "--seal")
	if p.Receipt.Sealed == nil || p.Receipt.Requester != nil {
		t.Fatalf("receipt: %+v", p.Receipt)
	}
	b.says(b.run(b.cmd(market, "bridgectl", "ssh", p.Instance.id(), "echo unsealed")), 0, "^unsealed\n$")
	// Elsewhere the receipt alone opens nothing.
	elsewhere := b.cmd(market, "bridgectl", "ssh", p.Instance.id(), "true")
	elsewhere.Env = append(elsewhere.Env, "XDG_STATE_HOME="+t.TempDir())
	b.says(b.run(elsewhere), 7, "")
	b.says(b.run(b.ssh(p, "requester", nil, "true")), 255, "Permission denied")

	state := os.DirFS(b.Path("state"))
	err := fs.WalkDir(state, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(state, path)
		if strings.Contains(string(text), "OPENSSH PRIVATE KEY") {
			t.Errorf("%s holds the login key", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	b.terminate(p)
}

// The first worker in the operator's order gets a grant while it has room; then
// the next one.
func TestAFullWorkerIsPassedOver(t *testing.T) {
	t.Parallel()
	b := newBridge(t, newHost(t, 1), newHost(t, 1))
	first, second := b.provision(own()...), b.provision(own()...)
	if first.Instance.Backend != "metal1" || second.Instance.Backend != "metal2" {
		t.Errorf("they run at %s and %s", first.Instance.Backend, second.Instance.Backend)
	}
	b.refused(market, 4, []string{"metal1", "metal2"}, b.grantArgs(own("--timeout", "20s")...)...)
	if got := b.list(market); len(got) != 2 {
		t.Errorf("listed: %+v", got)
	}
	b.says(b.run(b.ssh(second, "requester", nil, "hostname")), 0, second.Instance.id()[:12])
	b.terminate(first)
	third := b.provision(own()...)
	if third.Instance.Backend != "metal1" {
		t.Errorf("the third runs at %s though metal1 has room again", third.Instance.Backend)
	}
	b.terminate(second)
	b.terminate(third)
}
