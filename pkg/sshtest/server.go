// Package sshtest is an SSH server in the test's own process, for fakes and
// simulators whose instances people log in to.
package sshtest

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

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// Config says who a server is and who may log in.
type Config struct {
	// HostKey is the private key, in OpenSSH's format.
	HostKey redact.Secret
	// AuthorizedKeys are lines as in authorized_keys, Users the names with which
	// they log in.
	AuthorizedKeys, Users []string
	// Environment is that of all commands.
	Environment map[string]string
}

// Server runs a few commands in process: "echo WORDS" prints the words, with the
// environment's values for $NAME; "env" prints the environment; "cat" copies
// standard input; "exit N" has exit status N. All others aren't found.
type Server struct {
	config      *ssh.ServerConfig
	environment map[string]string
	listener    net.Listener
	running     sync.WaitGroup

	mu     sync.Mutex // protects what follows
	closed bool
	conns  map[net.Conn]struct{}
}

// New returns a server that doesn't listen yet. Its errors don't contain keys.
func New(c Config) (*Server, error) {
	hostKey, err := ssh.ParsePrivateKey(c.HostKey.Expose())
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
	users := slices.Clone(c.Users)
	s := &Server{environment: maps.Clone(c.Environment), conns: map[net.Conn]struct{}{}}
	s.config = &ssh.ServerConfig{PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		known := slices.ContainsFunc(logins, func(l ssh.PublicKey) bool { return bytes.Equal(key.Marshal(), l.Marshal()) })
		if !known || !slices.Contains(users, meta.User()) {
			return nil, errors.New("not a login key")
		}
		return &ssh.Permissions{}, nil
	}}
	s.config.AddHostKey(hostKey)
	return s, nil
}

// Serve takes connections, which it does until [Server.Close]. It returns at
// once. The listener is the server's from then on.
func (s *Server) Serve(listener net.Listener) {
	s.listener = listener
	s.running.Go(s.accept)
}

// Close ends all connections of a server that serves, and waits until nothing of
// it runs.
func (s *Server) Close() {
	_ = s.listener.Close()
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
}

func (s *Server) accept() {
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

func (s *Server) handle(conn net.Conn) {
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

func (s *Server) session(channel ssh.Channel, requests <-chan *ssh.Request) {
	defer func() { _ = channel.Close() }()
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

func (s *Server) exec(channel ssh.Channel, command string) (status uint32) {
	word, rest, _ := strings.Cut(command, " ")
	switch word {
	case "echo":
		_, _ = fmt.Fprintln(channel, os.Expand(rest, func(name string) string { return s.environment[name] }))
	case "env":
		for _, name := range slices.Sorted(maps.Keys(s.environment)) {
			_, _ = fmt.Fprintf(channel, "%s=%s\n", name, s.environment[name])
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
		_, _ = fmt.Fprintln(channel.Stderr(), "command not found")
		return notFound
	}
	return 0
}
