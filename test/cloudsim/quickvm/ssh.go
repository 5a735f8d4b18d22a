package quickvm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// root is who may log in beside the configured user.
const root = "root"

// sshServer is the SSH server of one life of a machine. Its commands run in
// process: "echo WORDS" prints the words, with the environment's values for
// $NAME; "env" prints the environment; "cat" copies standard input; "exit N" has
// exit status N.
type sshServer struct {
	listener    net.Listener
	config      *ssh.ServerConfig
	environment map[string]string
	running     sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

// newSSHServer returns a server that doesn't listen yet.
func newSSHServer(c guestapi.Config) (*sshServer, error) {
	hostKey, err := ssh.ParsePrivateKey([]byte(c.HostKey.Reveal()))
	if err != nil {
		return nil, errors.New("the host key is no private key") // The cause may hold parts of the key.
	}
	var logins []ssh.PublicKey
	for _, line := range c.AuthorizedKeys {
		login, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			return nil, fmt.Errorf("login key: %w", err)
		}
		logins = append(logins, login)
	}
	s := &sshServer{environment: maps.Clone(c.Environment), conns: map[net.Conn]struct{}{}}
	s.config = &ssh.ServerConfig{PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		known := slices.ContainsFunc(logins, func(l ssh.PublicKey) bool { return bytes.Equal(key.Marshal(), l.Marshal()) })
		if !known || meta.User() != c.User && meta.User() != root {
			return nil, errors.New("not a login key")
		}
		return &ssh.Permissions{}, nil
	}}
	s.config.AddHostKey(hostKey)
	return s, nil
}

// serve takes connections until close.
func (s *sshServer) serve(listener net.Listener) {
	s.listener = listener
	s.running.Go(s.accept)
}

// close ends all connections and waits until nothing of the server runs.
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
		s.running.Go(func() { s.handle(conn) })
		s.mu.Unlock()
	}
}

func (s *sshServer) handle(conn net.Conn) {
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
		sessions.Go(func() { s.session(channel, requests) })
	}
}

func (s *sshServer) session(channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close()
	for r := range requests {
		var exec struct{ Command string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &exec) != nil {
			_ = r.Reply(false, nil)
			continue
		}
		_ = r.Reply(true, nil)
		status := s.exec(channel, exec.Command)
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
		return
	}
}

// notFound is a shell's exit status for a command that there is not.
const notFound = 127

func (s *sshServer) exec(channel ssh.Channel, command string) (status uint32) {
	word, rest, _ := strings.Cut(command, " ")
	switch word {
	case "echo":
		fmt.Fprintln(channel, os.Expand(rest, func(name string) string { return s.environment[name] }))
	case "env":
		for _, name := range slices.Sorted(maps.Keys(s.environment)) {
			fmt.Fprintf(channel, "%s=%s\n", name, s.environment[name])
		}
	case "cat":
		if _, err := io.Copy(channel, channel); err != nil {
			return 1
		}
	case "exit":
		n, err := strconv.ParseUint(rest, 10, 8)
		if err != nil {
			return 2
		}
		return uint32(n)
	default:
		fmt.Fprintln(channel.Stderr(), "command not found")
		return notFound
	}
	return 0
}
