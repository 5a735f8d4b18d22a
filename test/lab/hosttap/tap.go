package hosttap

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

// dialTimeout bounds the connecting to a host.
const dialTimeout = 15 * time.Second

// Options is how a tap is reached.
type Options struct {
	// Address is the loopback address to listen at; default 127.0.0.1.
	Address string
	// Port is sshd's place; default 22, for the tap has an address of its own.
	// -1 means any.
	Port int
	// FirstPort and LastPort are forwarded, too, if set.
	FirstPort, LastPort int
}

// Tap is the stand-in for one host's sshd.
type Tap struct {
	group     *Group
	host      *lab.Host
	user      ssh.Signer
	hostKey   ssh.Signer
	ssh       net.Listener
	listeners []net.Listener

	routines sync.WaitGroup
	mu       sync.Mutex
	plain    map[net.Conn]struct{} // of forwarded ports
	closed   bool
}

// Open starts a tap in front of a host. It is closed with the test.
func (g *Group) Open(t testing.TB, h *lab.Host, o Options) *Tap {
	t.Helper()
	tap, err := g.open(t.Context(), h, o)
	if err != nil {
		t.Fatalf("tap of host %s: %v", h.Name, err)
	}
	t.Cleanup(tap.Close)
	return tap
}

func (g *Group) open(ctx context.Context, h *lab.Host, o Options) (*Tap, error) {
	if o.Address == "" {
		o.Address = "127.0.0.1"
	}
	switch o.Port {
	case 0:
		o.Port = 22
	case -1:
		o.Port = 0
	}
	pem, err := os.ReadFile(h.UserKeyFile)
	if err != nil {
		return nil, err
	}
	user, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return nil, err
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	hostKey, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return nil, err
	}
	t := &Tap{group: g, host: h, user: user, hostKey: hostKey, plain: map[net.Conn]struct{}{}}
	if t.ssh, err = t.listen(ctx, o.Address, o.Port); err != nil {
		return nil, err
	}
	t.routines.Go(func() { t.accept(t.ssh, t.serve) })
	for port := o.FirstPort; port > 0 && port <= o.LastPort; port++ {
		l, err := t.listen(ctx, o.Address, port)
		if err != nil {
			t.Close()
			return nil, err
		}
		target := net.JoinHostPort(h.Addr.String(), strconv.Itoa(port))
		t.routines.Go(func() { t.accept(l, func(conn net.Conn) { t.relay(conn, target) }) })
	}
	return t, nil
}

func (t *Tap) listen(ctx context.Context, address string, port int) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(port)))
	if err == nil {
		t.listeners = append(t.listeners, l)
	}
	return l, err
}

// Addr is host:port of what stands in for sshd.
func (t *Tap) Addr() string { return t.ssh.Addr().String() }

// HostKeyLine is the tap's host key in authorized_keys format.
func (t *Tap) HostKeyLine() string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(t.hostKey.PublicKey())))
}

// Close ends the tap and all its connections, and waits for that.
func (t *Tap) Close() {
	for _, l := range t.listeners {
		_ = l.Close()
	}
	t.mu.Lock()
	t.closed = true
	for conn := range t.plain {
		_ = conn.Close()
	}
	t.mu.Unlock()
	for _, l := range t.group.current() {
		if l.tap == t {
			l.close()
		}
	}
	t.routines.Wait()
}

func (t *Tap) accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return // closed
		}
		t.routines.Go(func() {
			defer conn.Close()
			if !t.track(conn) {
				return
			}
			defer t.untrack(conn)
			serve(conn)
		})
	}
}

func (t *Tap) track(conn net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.plain[conn] = struct{}{}
	return true
}

func (t *Tap) untrack(conn net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.plain, conn)
}

// relay forwards a connection as it is.
func (t *Tap) relay(down net.Conn, target string) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	up, err := (&net.Dialer{}).DialContext(ctx, "tcp", target)
	if err != nil {
		return
	}
	defer up.Close()
	if !t.track(up) {
		return
	}
	defer t.untrack(up)
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{up, down}, {down, up}} {
		wg.Go(func() {
			if _, err := io.Copy(way[0], way[1]); err != nil {
				_ = up.Close()
				_ = down.Close()
				return
			}
			if tcp, ok := way[0].(*net.TCPConn); ok {
				_ = tcp.CloseWrite()
			}
		})
	}
	wg.Wait()
}

// link is one connection of the worker, and the one to the host for it.
type link struct {
	tap      *Tap
	down, up ssh.Conn
	tcp      []net.Conn
	dead     atomic.Bool
	done     chan struct{}
	close    func()
	channels sync.WaitGroup
}

// errDead says that nothing may be forwarded any more.
var errDead = errors.New("the connection is dead")

// gate blocks while nothing is forwarded. An error means that nothing will be.
func (l *link) gate() error {
	for {
		if l.dead.Load() {
			return errDead
		}
		thawed := l.tap.group.frozen()
		if thawed == nil {
			return nil
		}
		select {
		case <-thawed:
		case <-l.done:
			return errDead
		}
	}
}

// serve is a connection of the worker. The host's login comes first: where it
// isn't let in, the worker isn't either.
func (t *Tap) serve(down net.Conn) {
	l := &link{tap: t, tcp: []net.Conn{down}, done: make(chan struct{})}
	var mu sync.Mutex
	l.close = sync.OnceFunc(func() {
		l.dead.Store(true)
		close(l.done)
		mu.Lock()
		defer mu.Unlock()
		for _, conn := range l.tcp {
			_ = conn.Close()
		}
	})
	defer l.close()
	if !t.group.add(l) {
		return
	}
	defer t.group.remove(l)
	if l.gate() != nil {
		return
	}
	// The handshakes know no context: closing the sockets ends them.
	limit := time.AfterFunc(dialTimeout, l.close)
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	tcp, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(t.host.Addr.String(), strconv.Itoa(t.host.SSHPort)))
	if err != nil {
		return
	}
	mu.Lock()
	l.tcp = append(l.tcp, tcp)
	mu.Unlock()
	if l.dead.Load() {
		_ = tcp.Close()
		return
	}
	upChannels, upRequests, err := l.logIn(tcp)
	if err != nil {
		return
	}
	downChannels, downRequests, err := l.letIn(down)
	if err != nil || !limit.Stop() {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { l.requests(downRequests, l.up) })
	wg.Go(func() { l.requests(upRequests, l.down) })
	wg.Go(func() { l.accept(downChannels, l.up, true) })
	wg.Go(func() { l.accept(upChannels, l.down, false) })
	wg.Go(func() { _ = l.up.Wait(); l.close() })
	wg.Go(func() { _ = l.down.Wait(); l.close() })
	wg.Wait()
	l.channels.Wait()
}

func (l *link) logIn(tcp net.Conn) (<-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	conn, channels, requests, err := ssh.NewClientConn(tcp, l.tap.host.Addr.String(), &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(l.tap.user)},
		HostKeyCallback: ssh.FixedHostKey(l.tap.host.HostKey), HostKeyAlgorithms: []string{l.tap.host.HostKey.Type()},
	})
	l.up = conn
	return channels, requests, err
}

func (l *link) letIn(tcp net.Conn) (<-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	want := l.tap.user.PublicKey().Marshal()
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if meta.User() != "root" || !bytes.Equal(key.Marshal(), want) {
				return nil, fmt.Errorf("user %s may not log in", meta.User())
			}
			return &ssh.Permissions{}, nil
		},
		ServerVersion: string(l.up.ServerVersion()),
	}
	config.AddHostKey(l.tap.hostKey)
	conn, channels, requests, err := ssh.NewServerConn(tcp, config)
	if err != nil {
		return nil, nil, err
	}
	l.down = conn
	return channels, requests, nil
}

// requests forwards what one side asks of the other's connection.
func (l *link) requests(in <-chan *ssh.Request, to ssh.Conn) {
	for r := range in {
		if l.gate() != nil {
			continue
		}
		ok, payload, err := to.SendRequest(r.Type, r.WantReply, r.Payload)
		if err == nil && r.WantReply && l.gate() == nil {
			_ = r.Reply(ok, payload)
		}
	}
}

// accept forwards channels that one side opens; those of the worker are
// understood, too.
func (l *link) accept(in <-chan ssh.NewChannel, to ssh.Conn, worker bool) {
	for opened := range in {
		l.channels.Go(func() { l.forward(opened, to, worker) })
	}
}

func (l *link) forward(opened ssh.NewChannel, to ssh.Conn, worker bool) {
	if l.gate() != nil {
		return
	}
	up, upRequests, err := to.OpenChannel(opened.ChannelType(), opened.ExtraData())
	if l.gate() != nil {
		return
	}
	if err != nil {
		var refusal *ssh.OpenChannelError
		if !errors.As(err, &refusal) {
			refusal = &ssh.OpenChannelError{Reason: ssh.ConnectionFailed, Message: err.Error()}
		}
		_ = opened.Reject(refusal.Reason, refusal.Message)
		return
	}
	down, downRequests, err := opened.Accept()
	if err != nil {
		_ = up.Close()
		go ssh.DiscardRequests(upRequests)
		return
	}
	c := &channel{link: l, down: down, up: up, pending: map[uint32]*Injection{}, begun: make(chan struct{}), stderr: make(chan struct{})}
	if worker && opened.ChannelType() == "direct-streamlocal@openssh.com" {
		c.understand(socketProtocol(opened.ExtraData()))
	}
	session := worker && opened.ChannelType() == "session"
	if !session {
		c.start()
	}
	c.run(downRequests, upRequests, session)
}

// socketProtocol returns what is spoken on a unix socket that a channel is to be
// connected to.
func socketProtocol(extra []byte) protocol {
	var target struct {
		Path     string
		Reserved string
		Port     uint32
	}
	if ssh.Unmarshal(extra, &target) != nil {
		return nil
	}
	switch {
	case strings.HasSuffix(target.Path, "/system_bus_socket"):
		return newDBus()
	case strings.HasSuffix(target.Path, "/podman.sock"):
		return newHTTP()
	}
	return nil
}
