package hostbackend

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// openssh is what a requester does with a receipt and the stock client.
type openssh struct {
	options []string
	port    string
	target  string
}

// client writes key and known host as files, as a requester would.
func client(t testing.TB, r backend.Receipt, key login) openssh {
	t.Helper()
	dir := t.TempDir()
	block, err := ssh.MarshalPrivateKey(key.private, "")
	if err != nil {
		t.Fatal(err)
	}
	known := fmt.Sprintf("[%s]:%d %s\n", r.Host, r.Port, r.HostKey)
	for name, data := range map[string][]byte{"key": pem.EncodeToMemory(block), "known_hosts": []byte(known)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return openssh{
		port: strconv.Itoa(int(r.Port)), target: r.User + "@" + r.Host,
		options: []string{
			"-F", "none", "-i", filepath.Join(dir, "key"), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes",
			"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + filepath.Join(dir, "known_hosts"),
			"-o", "GlobalKnownHostsFile=none", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10",
		},
	}
}

// ssh runs a command and returns output and exit code.
func (c openssh) ssh(t testing.TB, args ...string) (string, int) {
	t.Helper()
	return c.run(t, "ssh", append(append([]string{"-p", c.port}, c.options...), append([]string{c.target}, args...)...)...)
}

func (c openssh) run(t testing.TB, program string, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return string(out), 0
	case errors.As(err, &exit):
		return string(out), exit.ExitCode()
	}
	t.Fatalf("%s: %v", program, err)
	return "", -1
}

func TestRequesterLogsInWithStockOpenSSH(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil, lab.NewHost(t, lab.HostOptions{}))
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Configured), key)
	g.Environment = map[string]string{"FROM_GRANT": "of the grant", "OVERRIDDEN": "by the grant"}
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	c := client(t, p.Receipt, key)

	for _, tt := range []struct {
		name, command, want string
		code                int
	}{
		{"output", "echo hello", "hello\n", 0},
		{"exit code", "exit 42", "", 42},
		{"standard error", "echo oops >&2; false", "oops\n", 1},
		{"missing command", "no-such-command 2>/dev/null", "", 127},
		{"killed by a signal", "kill -9 $$", "", 255},
		{"user", "id -un", "compute\n", 0},
		{"environment of the image", `echo "$FROM_IMAGE"`, "of the image\n", 0},
		{"environment of the grant", `echo "$FROM_GRANT"`, "of the grant\n", 0},
		{"the grant's goes first", `echo "$OVERRIDDEN"`, "by the grant\n", 0},
		{"host name", "hostname", "cb-" + g.ID.String()[:12] + "\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, code := c.ssh(t, tt.command)
			if code != tt.code || (tt.want != "" && out != tt.want) {
				t.Errorf("got %q, code %d; want %q, code %d", out, code, tt.want, tt.code)
			}
		})
	}
	t.Run("image's own command runs as its user", func(t *testing.T) {
		console, err := s.hosts[0].Exec(t.Context(), "cat", s.driver.dirs.grant(g.ID)+"/"+consoleFile)
		if want := "user=app group=staff dir=/srv/work env=of the image args=from cmd"; err != nil || !strings.Contains(console, want) {
			t.Errorf("console %q (%v) doesn't say %q", console, err, want)
		}
	})
	t.Run("scp both ways", func(t *testing.T) {
		dir := t.TempDir()
		data := bytes.Repeat([]byte("some data\x00\xff"), 100_000)
		if err := os.WriteFile(filepath.Join(dir, "there"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		options := append([]string{"-q", "-P", c.port}, c.options...)
		if out, code := c.run(t, "scp", append(options, filepath.Join(dir, "there"), c.target+":copy")...); code != 0 {
			t.Fatalf("to the instance: code %d\n%s", code, out)
		}
		if out, code := c.run(t, "scp", append(options, c.target+":copy", filepath.Join(dir, "back"))...); code != 0 {
			t.Fatalf("from the instance: code %d\n%s", code, out)
		}
		back, err := os.ReadFile(filepath.Join(dir, "back"))
		if err != nil || !bytes.Equal(back, data) {
			t.Errorf("%d bytes came back of %d (%v)", len(back), len(data), err)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		out, code := c.ssh(t, "-tt", "tty; stty size; exit 5")
		if code != 5 || !strings.Contains(out, "/dev/pts/") {
			t.Errorf("code %d, output %q", code, out)
		}
	})
	t.Run("forwarded port", func(t *testing.T) { testForward(t, c) })
	t.Run("wrong key", func(t *testing.T) {
		if out, code := client(t, p.Receipt, newLogin(t)).ssh(t, "true"); code != 255 || !strings.Contains(out, "Permission denied") {
			t.Errorf("code %d, output %q", code, out)
		}
	})
	t.Run("other host key", func(t *testing.T) {
		r := p.Receipt
		r.HostKey = newLogin(t).line
		if out, code := client(t, r, key).ssh(t, "true"); code != 255 || !strings.Contains(out, "Host key verification failed") {
			t.Errorf("code %d, output %q", code, out)
		}
	})
}

// testForward talks through -L to a server in the container.
func testForward(t *testing.T, c openssh) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	local := l.Addr().String()
	if err := l.Close(); err != nil { // ssh takes the port over
		t.Fatal(err)
	}
	args := append([]string{"-p", c.port, "-o", "ExitOnForwardFailure=yes", "-L", local + ":127.0.0.1:7000"}, c.options...)
	cmd := exec.CommandContext(t.Context(), "ssh", append(args, c.target, "nc -l -p 7000 -e echo through the tunnel")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	soon(t, func() error {
		conn, err := net.Dial("tcp", local)
		if err != nil {
			return err
		}
		defer conn.Close()
		text, err := io.ReadAll(conn)
		if err == nil && string(text) != "through the tunnel\n" {
			err = fmt.Errorf("read %q", text)
		}
		return err
	})
}
