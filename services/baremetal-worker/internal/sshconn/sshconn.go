// Package sshconn holds one SSH connection to each bare-metal host and keeps
// it: everything that the worker does on a host goes through it, as forwarded
// unix sockets, SFTP, or, where neither will do, as commands.
//
// A host is trusted only by the keys that are pinned in the configuration;
// there is no trust on first use. A lost connection fails everything that is in
// flight at once, and is dialled again for ever. Where sshd allows too few
// sessions on a connection, spare ones beside it carry the rest; they end with
// it.
package sshconn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Defaults of [Config]. The reasons are in the comments of its fields.
const (
	defaultDialTimeout    = 15 * time.Second
	defaultKeepaliveIdle  = 30 * time.Second
	defaultKeepaliveLimit = 15 * time.Second
	defaultDeadAfter      = 25 * time.Second
	defaultBackoffMin     = 500 * time.Millisecond
	defaultBackoffMax     = 30 * time.Second
	defaultRefusedBackoff = 2 * time.Minute
	defaultCommandTimeout = 2 * time.Minute
	defaultMaxSessions    = 4
	defaultSpareIdle      = 2 * time.Minute
)

// Config is how a host is reached.
type Config struct {
	// Name names the host in errors and logs.
	Name string
	// Address is host:port of its sshd.
	Address string
	// User is the login name. The worker needs root's rights on the host.
	User string
	// Key is what the worker logs in with.
	Key ssh.Signer
	// HostKeys are the keys that the host may show, at least one.
	HostKeys []ssh.PublicKey

	// DialTimeout bounds TCP connect and handshake together. Default 15 s.
	DialTimeout time.Duration
	// KeepaliveIdle is after how long without a byte from the host it is asked
	// for one. The kernel notices a dead peer by itself (TCP keepalive); this
	// one also notices a hung sshd. Default 30 s.
	KeepaliveIdle time.Duration
	// KeepaliveLimit is how long the answer may take. Default 15 s.
	KeepaliveLimit time.Duration
	// DeadAfter is TCP_USER_TIMEOUT: how long sent data may stay unacknowledged
	// before the kernel gives the connection up. Default 25 s.
	DeadAfter time.Duration
	// BackoffMin and BackoffMax bound the pause between dials, which doubles
	// and is jittered. A connection that holds for longer than the next pause
	// would be starts it over. Default 0.5 s and 30 s.
	BackoffMin, BackoffMax time.Duration
	// RefusedBackoff is the pause after a wrong host key or a refused login.
	// OpenSSH from 9.8 on locks a source out that keeps failing, so it is
	// long. Default 2 min.
	RefusedBackoff time.Duration
	// CommandTimeout bounds commands that set no limit of their own. Default
	// 2 min.
	CommandTimeout time.Duration
	// MaxSessions is how many commands run at a time. sshd allows ten sessions
	// on a connection and frees them late, so the default is 4.
	MaxSessions int
	// SpareIdle is how long a spare connection, opened because sshd had no
	// session left on the others, is kept without one. Default 2 min.
	SpareIdle time.Duration
	// Admit, if set, is told the process id of the sshd that serves a spare
	// connection, before anything else is done over it. An error closes it. It
	// is for who must be able to end on the host all that this connection does.
	Admit func(ctx context.Context, sshd int) error
	// First is a program that runs as the first session of every connection, on
	// the main one, for as long as that lives; none if empty. See [Conn.First].
	// With one, a connection is closed to everything else until [Conn.Allow].
	First []string
	// Dial opens the TCP connection; the default is a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Name == "":
		return c, errors.New("host has no name")
	case c.Address == "":
		return c, fmt.Errorf("host %s: no address", c.Name)
	case c.User == "":
		return c, fmt.Errorf("host %s: no user", c.Name)
	case c.Key == nil:
		return c, fmt.Errorf("host %s: no key to log in with", c.Name)
	case len(c.HostKeys) == 0:
		return c, fmt.Errorf("host %s: no host key is pinned", c.Name)
	}
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		return c, fmt.Errorf("host %s: address %q: %w", c.Name, c.Address, err)
	}
	set := func(d *time.Duration, value time.Duration) {
		if *d <= 0 {
			*d = value
		}
	}
	set(&c.DialTimeout, defaultDialTimeout)
	set(&c.KeepaliveIdle, defaultKeepaliveIdle)
	set(&c.KeepaliveLimit, defaultKeepaliveLimit)
	set(&c.DeadAfter, defaultDeadAfter)
	set(&c.BackoffMin, defaultBackoffMin)
	set(&c.BackoffMax, defaultBackoffMax)
	set(&c.RefusedBackoff, defaultRefusedBackoff)
	set(&c.CommandTimeout, defaultCommandTimeout)
	set(&c.SpareIdle, defaultSpareIdle)
	if c.MaxSessions <= 0 {
		c.MaxSessions = defaultMaxSessions
	}
	if c.Dial == nil {
		dialer := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
		deadAfter := c.DeadAfter
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			setUserTimeout(conn, deadAfter)
			return conn, nil
		}
	}
	return c, nil
}

// setUserTimeout is an improvement that the connection works without, so a
// kernel that refuses it is no error.
func setUserTimeout(conn net.Conn, d time.Duration) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}

// State is what is known about the connection.
type State struct {
	// Connected is whether there is a connection now.
	Connected bool
	// Closed is whether the connection may not be used yet, see [Conn.Allow].
	Closed bool
	// Generation counts the connections made so far; it changes whenever
	// everything that was open on the old one is gone.
	Generation uint64
	// Since is when Connected last changed.
	Since time.Time
	// LastError is why there is no connection, or why the one before ended.
	LastError error
	// ServerVersion is what sshd calls itself.
	ServerVersion string
	// Spares is how many connections there are beside the main one, because
	// sshd allows few sessions on each. [Conn.Changed] doesn't tell changes of it.
	Spares int
}

// Conn is a host's connection. All methods may be called at any time by any
// goroutine. Calls made while there is no connection fail at once; [Conn.Wait]
// waits for one.
type Conn struct {
	cfg    Config
	log    *slog.Logger
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	state   State
	link    *link
	changed chan struct{} // closed and replaced whenever state changes
	made    uint64        // connections so far
	closed  bool
}

// link is one SSH connection of the many that a Conn has over time, with the
// spare ones that it needs.
type link struct {
	*wire

	generation uint64
	done       chan struct{} // closed once the connection is lost

	dialling    chan struct{} // held by who dials a spare
	sparesMu    sync.Mutex    // protects spares, notBefore and all that wires count
	spares      []*wire
	notBefore   time.Time // of the next try to dial a spare
	spareErr    error     // why the last try failed
	sparesGroup sync.WaitGroup

	sessions chan struct{} // slots for commands
	long     chan struct{} // slots for commands that take long
	streams  chan struct{} // slots for commands that stand in for forwarded sockets

	sftpMu sync.Mutex
	sftp   *sftp.Client

	// first is the stream of the program that runs first, nil if there is none.
	first  *firstStream
	closed bool // until allowed; protected by the Conn's mu
	atOnce bool // to be dialled again without a pause; protected by the Conn's mu

	// noForward has the paths of unix sockets that sshd refuses to forward.
	noForward sync.Map
}

// Open starts to keep a connection to a host, until ctx ends or Close is
// called. It returns at once; an error is a mistake in the configuration.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Conn, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &Conn{
		cfg:     cfg,
		log:     log.With("host", cfg.Name),
		cancel:  cancel,
		done:    make(chan struct{}),
		state:   State{Since: time.Now()},
		changed: make(chan struct{}),
	}
	go c.manage(ctx)
	return c, nil
}

// Name returns the host's name.
func (c *Conn) Name() string { return c.cfg.Name }

// Close ends the connection and all that uses it, and waits for that.
func (c *Conn) Close() error {
	c.cancel()
	<-c.done
	return nil
}

// State returns what is known now.
func (c *Conn) State() State {
	state, _ := c.Changed()
	return state
}

// Connected reports whether there is a connection.
func (c *Conn) Connected() bool { return c.State().Connected }

// LastError returns why there is no connection, or why the one before ended.
func (c *Conn) LastError() error { return c.State().LastError }

// Changed returns the state and a channel that is closed when it is no longer
// true. Loop over it to follow the connection without missing its last state.
func (c *Conn) Changed() (State, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := c.state
	if c.link != nil {
		state.Spares = c.link.countSpares()
	}
	return state, c.changed
}

// Wait blocks until there is a connection. It gives up when ctx ends, after
// Close, and when the host shows a wrong key or refuses the login (HOST_UNFIT),
// which waiting won't cure; the connection keeps being tried all the same.
func (c *Conn) Wait(ctx context.Context) error {
	for {
		c.mu.Lock()
		state, changed, closed := c.state, c.changed, c.closed
		c.mu.Unlock()
		switch {
		case state.Connected:
			return nil
		case closed:
			return c.classify(ErrClosed, "connect")
		case refused(state.LastError):
			return c.classify(state.LastError, "connect")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if state.LastError != nil {
				return backenderr.Wrap(backenderr.ProviderUnavailable, errors.Join(state.LastError, ctx.Err()), "host %s: connect", c.cfg.Name)
			}
			return c.classify(ctx.Err(), "connect")
		}
	}
}

// current returns the connection, or why there is none that ctx may use.
func (c *Conn) current(ctx context.Context) (*link, error) {
	return c.usable(isUngated(ctx), func(generation uint64) bool { return isBound(ctx, generation) })
}

// usable returns the connection if it is of a generation that suits, and open to
// everything or asked for by who needs no such leave.
func (c *Conn) usable(ungated bool, suits func(generation uint64) bool) (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.link != nil && c.link.closed && !ungated:
		return nil, backenderr.New(backenderr.ProviderUnavailable, "host %s: the connection may not be used", c.cfg.Name)
	case c.link != nil && !suits(c.link.generation):
		return nil, backenderr.New(backenderr.ProviderUnavailable, "host %s: connection lost, and made again meanwhile", c.cfg.Name)
	case c.link != nil:
		return c.link, nil
	case c.closed:
		return nil, c.classify(ErrClosed, "use connection")
	case c.state.LastError != nil:
		return nil, c.classify(c.state.LastError, "no connection")
	}
	return nil, backenderr.New(backenderr.ProviderUnavailable, "host %s: no connection yet", c.cfg.Name)
}

// setState changes the state and wakes who waits for that.
func (c *Conn) setState(change func(*State)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.state.Connected
	change(&c.state)
	if c.state.Connected != was {
		c.state.Since = time.Now()
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// manage dials, watches and dials again, one at a time.
func (c *Conn) manage(ctx context.Context) {
	defer close(c.done)
	defer func() {
		c.mu.Lock()
		c.closed = true
		c.mu.Unlock()
		c.setState(func(s *State) { s.Connected = false; s.LastError = ErrClosed })
	}()
	pause := c.cfg.BackoffMin
	for {
		began := time.Now()
		l, err := c.dial(ctx)
		if ctx.Err() != nil {
			if l != nil {
				_ = l.client.Close()
			}
			return
		}
		if err == nil {
			c.log.InfoContext(ctx, "Connected to host", "generation", l.generation, "server", string(l.client.ServerVersion()),
				"duration_ms", time.Since(began).Milliseconds())
			connected := time.Now()
			err = c.hold(ctx, l)
			if ctx.Err() != nil {
				return
			}
			if l.atOnce {
				c.log.InfoContext(ctx, "Connecting to host again", "generation", l.generation)
				continue
			}
			c.log.WarnContext(ctx, "Lost connection to host", "error", err, "generation", l.generation)
			pause = c.cfg.pauseAfter(pause, time.Since(connected))
		} else {
			c.log.WarnContext(ctx, "Cannot connect to host", "error", err, "address", c.cfg.Address)
			c.setState(func(s *State) { s.LastError = err })
		}
		wait := pause
		if refused(err) {
			wait = c.cfg.RefusedBackoff
		} else {
			pause = min(2*pause, c.cfg.BackoffMax)
		}
		// Half of the pause is random, so that the connections of a fleet don't
		// come back in step.
		wait = wait/2 + rand.N(wait/2+1) //nolint:gosec // No secret: it spreads load.
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// pauseAfter returns the pause after a connection that held for a while, where the
// one before it would be due. Hosts that come and go are away for no longer than
// they were there.
func (c *Config) pauseAfter(due, held time.Duration) time.Duration {
	if held > due {
		return c.BackoffMin
	}
	return due
}

// dial makes the connection, or says why not.
func (c *Conn) dial(ctx context.Context) (*link, error) {
	w, err := c.dialWire(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.made++
	generation := c.made
	c.mu.Unlock()
	l := &link{
		wire:       w,
		generation: generation,
		done:       make(chan struct{}),
		dialling:   make(chan struct{}, 1),
		sessions:   make(chan struct{}, c.cfg.MaxSessions),
		long:       make(chan struct{}, max(1, c.cfg.MaxSessions/2)),
		streams:    make(chan struct{}, maxStreams),
	}
	if len(c.cfg.First) == 0 {
		return l, nil
	}
	l.closed = true
	if err := c.startFirst(ctx, l); err != nil {
		_ = w.transport.Close()
		return nil, err
	}
	return l, nil
}

// dialWire makes one SSH connection.
func (c *Conn) dialWire(ctx context.Context) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.DialTimeout)
	defer cancel()
	tcp, err := c.cfg.Dial(ctx, "tcp", c.cfg.Address)
	if err != nil {
		return nil, err
	}
	transport := &activityConn{Conn: tcp}
	transport.lastRead.Store(time.Now().UnixNano())

	var mismatch *HostKeyMismatchError
	config := &ssh.ClientConfig{
		Config: ssh.Config{Ciphers: []string{
			// The fastest first; where it's missing, authenticated ones only.
			ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305, ssh.CipherAES128CTR, ssh.CipherAES256CTR,
		}},
		User:              c.cfg.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(c.cfg.Key)},
		HostKeyAlgorithms: algorithms(c.cfg.HostKeys),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			shown := key.Marshal()
			if slices.ContainsFunc(c.cfg.HostKeys, func(pinned ssh.PublicKey) bool { return slices.Equal(pinned.Marshal(), shown) }) {
				return nil
			}
			mismatch = &HostKeyMismatchError{Host: c.cfg.Name, Got: ssh.FingerprintSHA256(key), Want: fingerprints(c.cfg.HostKeys)}
			return mismatch
		},
		ClientVersion: "SSH-2.0-compute-bridge",
	}

	// The handshake knows no context: closing the socket ends it.
	stop := context.AfterFunc(ctx, func() { _ = tcp.Close() })
	conn, channels, requests, err := ssh.NewClientConn(transport, c.cfg.Address, config)
	if !stop() && err == nil {
		_ = conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		_ = tcp.Close()
		if ctx.Err() != nil && mismatch == nil {
			return nil, fmt.Errorf("handshake: %w", ctx.Err())
		}
		return nil, c.dialError(err, mismatch, transport.greeting())
	}
	w := &wire{client: &ssh.Client{Conn: conn}, transport: transport}
	transport.client.Store(w.client)
	// One goroutine refuses what a host may ask of us, which is nothing;
	// ssh.NewClient would start three.
	go refuseAll(channels, requests)
	return w, nil
}

// refuseAll answers the host's own requests until the connection ends.
func refuseAll(channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	for channels != nil || requests != nil {
		select {
		case ch, ok := <-channels:
			if !ok {
				channels = nil
				continue
			}
			_ = ch.Reject(ssh.Prohibited, "no channels are accepted here")
		case req, ok := <-requests:
			if !ok {
				requests = nil
				continue
			}
			if req.WantReply {
				_ = req.Reply(false, nil)
			}
		}
	}
}

// algorithms lists the signature algorithms of the pinned keys, so that the
// host shows one of these and not another that it also has.
func algorithms(keys []ssh.PublicKey) []string {
	var out []string
	for _, key := range keys {
		add := []string{key.Type()}
		if key.Type() == ssh.KeyAlgoRSA {
			add = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
		}
		for _, a := range add {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// hold publishes a connection, keeps it alive and returns why it ended.
func (c *Conn) hold(ctx context.Context, l *link) error {
	c.mu.Lock()
	c.link = l
	c.mu.Unlock()
	c.setState(func(s *State) {
		s.Connected, s.Closed, s.Generation, s.ServerVersion = true, l.closed, l.generation, string(l.client.ServerVersion())
	})

	lost := make(chan error, 1)
	go func() { lost <- l.client.Wait() }()
	err := c.keepAlive(ctx, l.wire, lost)

	_ = l.transport.Close() // Not client.Close: that says goodbye first, which a dead peer never reads.
	close(l.done)
	l.closeSpares()
	c.mu.Lock()
	c.link = nil
	c.mu.Unlock()
	c.setState(func(s *State) { s.Connected = false; s.LastError = err })
	l.closeSFTP()
	return err
}

// keepAlive returns when the connection has ended or must.
func (c *Conn) keepAlive(ctx context.Context, w *wire, lost <-chan error) error {
	timer := time.NewTimer(untilTick(time.Now(), c.cfg.KeepaliveIdle))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ErrClosed
		case err := <-lost:
			if err == nil {
				err = errors.New("sshd closed the connection")
			}
			return fmt.Errorf("connection lost: %w", err)
		case <-timer.C:
		}
		if idle := time.Since(time.Unix(0, w.transport.lastRead.Load())); idle >= c.cfg.KeepaliveIdle/2 {
			if err := c.ping(ctx, w); err != nil {
				return err
			}
		}
		timer.Reset(untilTick(time.Now(), c.cfg.KeepaliveIdle))
	}
}

// untilTick aligns the keepalives of all connections of a process: waking once
// for a hundred of them costs a sixth of waking a hundred times.
func untilTick(now time.Time, period time.Duration) time.Duration {
	return now.Truncate(period).Add(period).Sub(now)
}

// ping asks the host for a sign of life.
func (c *Conn) ping(ctx context.Context, w *wire) error {
	answer := make(chan error, 1)
	go func() {
		_, _, err := w.client.SendRequest("keepalive@openssh.com", true, nil)
		answer <- err
	}()
	limit := time.NewTimer(c.cfg.KeepaliveLimit)
	defer limit.Stop()
	select {
	case err := <-answer:
		if err != nil {
			return fmt.Errorf("connection lost: %w", err)
		}
		return nil
	case <-limit.C:
		return fmt.Errorf("connection lost: no answer to a keepalive within %s", c.cfg.KeepaliveLimit)
	case <-ctx.Done():
		return ErrClosed
	}
}

// Ping measures one round trip to sshd.
func (c *Conn) Ping(ctx context.Context) (time.Duration, error) {
	l, err := c.current(ctx)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := c.ping(ctx, l.wire); err != nil {
		return 0, c.classify(err, "ping")
	}
	return time.Since(began), nil
}

// greetingBytes is how much of what the server says first is kept, to tell
// what a server that doesn't speak SSH to us says instead.
const greetingBytes = 128

// activityConn remembers when something was last read, and what came first. It
// also ends in an order in which package ssh leaves nobody waiting, see lose.
type activityConn struct {
	net.Conn
	lastRead atomic.Int64
	lost     atomic.Bool
	client   atomic.Pointer[ssh.Client]

	mu    sync.Mutex
	first []byte
}

// Read reads from the socket.
func (a *activityConn) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	if n > 0 {
		a.lastRead.Store(time.Now().UnixNano())
		if len(a.first) < greetingBytes {
			a.mu.Lock()
			a.first = append(a.first, p[:min(n, greetingBytes-len(a.first))]...)
			a.mu.Unlock()
		}
	}
	if err != nil {
		a.lose()
	}
	return n, err
}

// Write writes to the socket.
func (a *activityConn) Write(p []byte) (int, error) {
	if a.lost.Load() {
		return 0, net.ErrClosed
	}
	return a.Conn.Write(p)
}

// lose fails a write before package ssh learns that reading has failed. It takes
// the first write that fails for a success; if that one opens a channel after
// the loss has been told to all channels, its caller would wait for ever.
func (a *activityConn) lose() {
	if a.lost.Swap(true) {
		return
	}
	_ = a.Conn.Close() // ends a write that hangs
	if client := a.client.Load(); client != nil {
		_, _, _ = client.SendRequest("lost", false, nil) // it fails
	}
}

func (a *activityConn) greeting() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.first)
}
