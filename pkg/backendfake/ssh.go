package backendfake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// User is the login name of every instance.
const User = "compute"

// loopback is where everything is reached.
const loopback = "127.0.0.1"

// sshServer is the SSH server of one instance. It knows two commands: "echo
// WORDS" prints the words, "exit N" has exit status N.
type sshServer struct {
	listener net.Listener
	config   *ssh.ServerConfig
	running  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

func startSSH(r request) (*sshServer, error) {
	hostKey, err := ssh.ParsePrivateKey(r.hostKey.Expose())
	if err != nil {
		return nil, errors.New("the host key is no private key") // The cause may hold parts of the key.
	}
	login, _, _, _, err := ssh.ParseAuthorizedKey([]byte(r.loginKey))
	if err != nil {
		return nil, fmt.Errorf("login key: %w", err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if meta.User() != User || !bytes.Equal(key.Marshal(), login.Marshal()) {
			return nil, errors.New("not the login key")
		}
		return &ssh.Permissions{}, nil
	}}
	config.AddHostKey(hostKey)
	listener, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	s := &sshServer{listener: listener, config: config, conns: map[net.Conn]struct{}{}}
	s.running.Go(s.accept)
	return s, nil
}

func (s *sshServer) port() uint16 {
	address, _ := s.listener.Addr().(*net.TCPAddr)
	return address.AddrPort().Port()
}

func (s *sshServer) close() {
	_ = s.listener.Close()
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
}

func (s *sshServer) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			_ = conn.Close()
			return
		}
		s.conns[conn] = struct{}{}
		s.running.Go(func() { s.serve(conn) })
		s.mu.Unlock()
	}
}

func (s *sshServer) serve(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	_, channels, requests, err := ssh.NewServerConn(conn, s.config)
	if err != nil {
		return
	}
	var sessions sync.WaitGroup
	defer sessions.Wait()
	sessions.Go(func() { ssh.DiscardRequests(requests) })
	for c := range channels {
		if c.ChannelType() != "session" {
			_ = c.Reject(ssh.UnknownChannelType, "sessions only")
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		sessions.Go(func() { session(channel, requests) })
	}
}

func session(channel ssh.Channel, requests <-chan *ssh.Request) {
	defer func() { _ = channel.Close() }()
	for r := range requests {
		if r.Type != "exec" {
			_ = r.Reply(false, nil)
			continue
		}
		var exec struct{ Command string }
		if err := ssh.Unmarshal(r.Payload, &exec); err != nil {
			_ = r.Reply(false, nil)
			continue
		}
		_ = r.Reply(true, nil)
		status := uint32(0)
		word, rest, _ := strings.Cut(exec.Command, " ")
		switch n, err := strconv.ParseUint(rest, 10, 8); {
		case word == "echo":
			_, _ = fmt.Fprintln(channel, rest)
		case word == "exit" && err == nil:
			status = uint32(n)
		default:
			_, _ = fmt.Fprintln(channel.Stderr(), "command not found")
			status = 127
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
		return
	}
}

// errSeen ends a probe's handshake once the host key is known to be right.
var errSeen = errors.New("host key seen")

// probe checks that SSH answers with the host key.
func probe(ctx context.Context, port uint16, hostKey string) error {
	want, _, _, _, err := ssh.ParseAuthorizedKey([]byte(hostKey))
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "read the host key")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(loopback, strconv.Itoa(int(port))))
	if err != nil {
		return backenderr.Wrap(backenderr.BootTimeout, err, "connect to the instance")
	}
	defer func() { _ = conn.Close() }()
	_, _, _, err = ssh.NewClientConn(conn, "", &ssh.ClientConfig{
		User: User, HostKeyAlgorithms: []string{want.Type()},
		HostKeyCallback: func(_ string, _ net.Addr, got ssh.PublicKey) error {
			if !bytes.Equal(got.Marshal(), want.Marshal()) {
				return errors.New("another host key than expected")
			}
			return errSeen
		},
	})
	if !errors.Is(err, errSeen) {
		return backenderr.Wrap(backenderr.BootTimeout, err, "SSH of the instance")
	}
	return nil
}
