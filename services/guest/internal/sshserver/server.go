// Package sshserver is the SSH server of an instance: shells, commands, file transfer and forwarding, inside the
// workload's container, for the keys of the configuration and nobody else.
//
// What it does like OpenSSH's sshd, on purpose: exit codes and exit signals, environment, login shells, forwarding
// addresses (GatewayPorts clientspecified), and the end of a connection. When a client goes away, a command with a
// terminal gets SIGHUP, and SIGKILL if it is still there after [Options.KillGrace]; a command without one isn't
// signalled: its standard input ends, and it gets SIGPIPE if it goes on writing. Background processes survive either.
//
// What it does otherwise: there are no passwords and no options of keys, and the agent socket and forwarded unix
// sockets are opened by the guest itself, which is root; the same keys may log in as root anyway.
package sshserver

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

// Defaults of [Options]. LoginGraceTime and MaxStartups of sshd are of the same order.
const (
	DefaultHandshakeTimeout = 30 * time.Second
	DefaultMaxHandshakes    = 64
	DefaultKillGrace        = 5 * time.Second
	DefaultStopGrace        = time.Second
)

// flushTime is how long clients have, at the end, to take their last data and hang up by themselves.
const flushTime = 500 * time.Millisecond

// Options are what a server needs. Zero durations and numbers mean the defaults.
type Options struct {
	// HostKey is the only host key.
	HostKey gossh.Signer
	// AuthorizedKeys may log in.
	AuthorizedKeys []gossh.PublicKey
	// User is the login beside root.
	User string
	// Banner is shown before authentication, if not empty.
	Banner string
	// Accounts resolves logins.
	Accounts *account.Database
	// Env is the environment that sessions start from.
	Env []string
	// SFTPCommand is the argument vector of the SFTP server that a session starts as its user.
	SFTPCommand []string
	// Logger gets what an operator must know; nothing is logged per connection.
	Logger *slog.Logger

	// HandshakeTimeout is how long a client may take to authenticate.
	HandshakeTimeout time.Duration
	// MaxHandshakes is how many unauthenticated clients there may be; the oldest gives way to a new one.
	MaxHandshakes int
	// KillGrace is the time between SIGHUP and SIGKILL for a terminal's command whose client has gone.
	KillGrace time.Duration
	// StopGrace is the time between SIGHUP and SIGKILL for all commands when the instance ends.
	StopGrace time.Duration
}

// Server is an SSH server. Make it with [New]; use it once.
type Server struct {
	opts    Options
	ssh     *ssh.Server
	limiter *limiter
	forward *remoteForwards

	// stopping is closed when the instance ends.
	stopping chan struct{}
	// sessions is what Serve waits for.
	sessions *tracker
}

// New returns a server that doesn't listen yet.
func New(opts Options) (*Server, error) {
	switch {
	case opts.HostKey == nil:
		return nil, errors.New("no host key")
	case len(opts.AuthorizedKeys) == 0:
		return nil, errors.New("no authorized keys")
	case opts.Accounts == nil || opts.Logger == nil || len(opts.SFTPCommand) == 0:
		return nil, errors.New("accounts, logger and sftp command are required")
	}
	setDefault(&opts.HandshakeTimeout, DefaultHandshakeTimeout)
	setDefault(&opts.MaxHandshakes, DefaultMaxHandshakes)
	setDefault(&opts.KillGrace, DefaultKillGrace)
	setDefault(&opts.StopGrace, DefaultStopGrace)
	s := &Server{
		opts:     opts,
		limiter:  newLimiter(opts.MaxHandshakes, opts.HandshakeTimeout),
		forward:  newRemoteForwards(),
		sessions: newTracker(),
		stopping: make(chan struct{}),
	}
	s.ssh = &ssh.Server{
		HostSigners:          []ssh.Signer{opts.HostKey},
		Version:              "ComputeBridge",
		PublicKeyHandler:     s.authorized,
		ConnCallback:         s.limiter.admit,
		ServerConfigCallback: s.serverConfig,
		ChannelHandlers: map[string]ssh.ChannelHandler{
			"session":                        s.handleSession,
			"direct-tcpip":                   s.handleDirectTCP,
			"direct-streamlocal@openssh.com": s.handleDirectStreamlocal,
		},
		RequestHandlers: map[string]ssh.RequestHandler{
			"tcpip-forward":        s.forward.handle,
			"cancel-tcpip-forward": s.forward.cancel,
		},
	}
	return s, nil
}

func setDefault[T comparable](value *T, fallback T) {
	var zero T
	if *value == zero {
		*value = fallback
	}
}

// Serve accepts connections on l until ctx is cancelled, which means that the instance ends: sessions are then told
// so, their commands get SIGHUP, after StopGrace SIGKILL, their results are sent, and all connections are closed. It
// returns nil after that, or the reason why accepting failed. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- s.ssh.Serve(l) }()
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	_ = l.Close()
	close(s.stopping)
	s.limiter.close()
	s.sessions.close()

	// A client that doesn't take its data holds up its session only until the connections are closed.
	s.sessions.wait(s.opts.StopGrace + 2*flushTime)
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
	defer cancel()
	_ = s.ssh.Shutdown(flush)
	_ = s.ssh.Close()
	s.limiter.closeAll()
	s.sessions.wait(s.opts.StopGrace + 2*flushTime)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// tracker counts sessions and, once closed, lets no more begin.
type tracker struct {
	idle chan struct{} // closed when closed and at zero

	mu     sync.Mutex
	count  int
	closed bool
}

func newTracker() *tracker { return &tracker{idle: make(chan struct{})} }

func (t *tracker) add() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.count++
	return true
}

func (t *tracker) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count--
	if t.closed && t.count == 0 {
		close(t.idle)
	}
}

func (t *tracker) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.count == 0 {
		close(t.idle)
	}
}

// wait waits until the last session has ended, at most for the time given.
func (t *tracker) wait(limit time.Duration) {
	select {
	case <-t.idle:
	case <-time.After(limit):
	}
}

// authorized says whether key may log in as the context's user.
func (s *Server) authorized(ctx ssh.Context, key ssh.PublicKey) bool {
	if name := ctx.User(); name != s.opts.User && name != account.RootName {
		return false
	}
	for _, allowed := range s.opts.AuthorizedKeys {
		if ssh.KeysEqual(allowed, key) {
			return true
		}
	}
	return false
}

// serverConfig makes the protocol's configuration for one connection. What the library still offers by default for
// old peers (SHA-1, finite-field groups) is left out; every OpenSSH since 6.7 has something of the rest.
func (s *Server) serverConfig(ctx ssh.Context) *gossh.ServerConfig {
	config := &gossh.ServerConfig{
		Config: gossh.Config{
			KeyExchanges: []string{
				gossh.KeyExchangeMLKEM768X25519, gossh.KeyExchangeCurve25519,
				gossh.KeyExchangeECDHP256, gossh.KeyExchangeECDHP384, gossh.KeyExchangeECDHP521,
			},
			Ciphers: gossh.SupportedAlgorithms().Ciphers,
			MACs:    []string{gossh.HMACSHA256ETM, gossh.HMACSHA512ETM, gossh.HMACSHA256, gossh.HMACSHA512},
		},
		PublicKeyAuthAlgorithms: gossh.SupportedAlgorithms().PublicKeyAuths,
		// A successful method is the end of the handshake. Asking whether a key would do isn't one.
		AuthLogCallback: func(_ gossh.ConnMetadata, _ string, err error) {
			if err == nil {
				s.limiter.release(ctx)
			}
		},
	}
	if s.opts.Banner != "" {
		config.BannerCallback = func(gossh.ConnMetadata) string { return s.opts.Banner }
	}
	return config
}
