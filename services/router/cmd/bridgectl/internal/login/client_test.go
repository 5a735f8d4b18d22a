package login_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/login"
)

// serve runs an SSH server with a shell, SFTP and forwarding on loopback until
// the test ends, and returns where it is.
func serve(t *testing.T, loginKey sshkey.PublicKey) login.Destination {
	t.Helper()
	host := key(t)
	signer, err := host.Signer()
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(meta ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if meta.User() != "compute" || !bytes.Equal(k.Marshal(), loginKey.Wire()) {
			return nil, errors.New("not the login key")
		}
		return &ssh.Permissions{}, nil
	}}
	config.AddHostKey(signer)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { session(conn, config, &running) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		running.Wait()
	})
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("no TCP")
	}
	dest, err := login.FromReceipt(&bridgev1.Receipt{
		InstanceHost: "127.0.0.1", InstancePort: uint32(address.AddrPort().Port()), User: "compute", HostKey: host.Public.String(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return dest
}

func session(conn net.Conn, config *ssh.ServerConfig, running *sync.WaitGroup) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	running.Go(func() { ssh.DiscardRequests(requests) })
	for c := range channels {
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		if c.ChannelType() == "direct-tcpip" {
			// What is forwarded is answered here.
			running.Go(func() {
				ssh.DiscardRequests(requests)
			})
			running.Go(func() {
				_, _ = fmt.Fprint(channel, "forwarded")
				_ = channel.Close()
			})
			continue
		}
		running.Go(func() { command(channel, requests) })
	}
}

func command(channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close()
	for r := range requests {
		var payload struct{ Text string }
		_ = ssh.Unmarshal(r.Payload, &payload)
		status := 0
		switch {
		case r.Type == "subsystem" && payload.Text == "sftp":
			_ = r.Reply(true, nil)
			server, err := sftp.NewServer(channel)
			if err != nil {
				return
			}
			_ = server.Serve()
		case r.Type == "exec":
			_ = r.Reply(true, nil)
			cmd := exec.Command("sh", "-c", payload.Text)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = channel, channel, channel.Stderr()
			if err := cmd.Run(); err != nil {
				status = cmd.ProcessState.ExitCode()
			}
		default:
			_ = r.Reply(r.Type == "pty-req" || r.Type == "env", nil)
			continue
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(status)}))
		return
	}
}

// client runs one of OpenSSH's clients and returns its status and output.
func client(t *testing.T, name string, args []string, input string) (int, string) {
	t.Helper()
	in, err := os.CreateTemp(t.TempDir(), "in")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := io.WriteString(in, input); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	status, err := login.Run(t.Context(), name, args, login.Stdio{In: in, Out: out, Err: out})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return status, string(text)
}

// TestStockClientsWork sends commands, files and connections through OpenSSH's
// own clients, with a key that exists in memory only.
func TestStockClientsWork(t *testing.T) {
	t.Parallel()
	pair := key(t)
	dest := serve(t, pair.Public)
	s, err := login.Open(dest, login.Key{Private: pair.Private, Public: pair.Public.String()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if status, out := client(t, "ssh", s.SSH([]string{"cat; echo $((6*7)); exit 42"}), "stdin "); status != 42 || out != "stdin 42\n" {
		t.Errorf("ssh: %d %q", status, out)
	}
	dir := t.TempDir()
	local, remote, back := filepath.Join(dir, "local"), filepath.Join(dir, "remote with space"), filepath.Join(dir, "back")
	content := strings.Repeat("content\x00", 100_000)
	if err := os.WriteFile(local, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, out := client(t, "scp", s.SCP([]string{local, ":" + remote}), ""); status != 0 {
		t.Errorf("scp to: %d %q", status, out)
	}
	if status, out := client(t, "scp", s.SCP([]string{":" + remote, back}), ""); status != 0 {
		t.Errorf("scp from: %d %q", status, out)
	}
	if text, err := os.ReadFile(back); err != nil || string(text) != content {
		t.Errorf("%d bytes came back, %v", len(text), err)
	}
	if status, out := client(t, "sftp", s.SFTP([]string{"-b", "-"}), "ls "+dir+"\n"); status != 0 || !strings.Contains(out, "local") {
		t.Errorf("sftp: %d %q", status, out)
	}
	if status, out := client(t, "ssh", s.SSH([]string{"-W", "service:80"}), ""); status != 0 || out != "forwarded" {
		t.Errorf("forwarding: %d %q", status, out)
	}
	if _, err := login.Run(t.Context(), "no-such-client-"+strconv.Itoa(os.Getpid()), nil, login.Stdio{}); err == nil {
		t.Error("a client that is not there was run")
	}
}
