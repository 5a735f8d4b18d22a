package sshserver

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"
)

// dialTimeout bounds connecting to a forwarding's target.
const dialTimeout = 15 * time.Second

// deliverTimeout bounds how long a target may take to accept what a client had sent before it closed the channel.
const deliverTimeout = 30 * time.Second

// maxForwards is how many ports one connection may have forwarded to its client.
const maxForwards = 64

// duplex is what both ends of a forwarding have in common.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// pipe copies both ways until both directions have ended. The end of one is passed on as such (half-close), since
// there are protocols that answer after it. An error, or the client closing the channel, ends both; what the client
// has sent before is still delivered.
func pipe(ch gossh.Channel, requests <-chan *gossh.Request, conn duplex) {
	defer ch.Close()
	defer conn.Close()
	inbound, outbound := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(inbound)
		oneWay(conn, ch)
	}()
	go func() {
		defer close(outbound)
		oneWay(ch, conn)
	}()
	go func() {
		<-inbound
		<-outbound
		_ = ch.Close()
	}()
	// Requests end with the channel, whoever closes it.
	gossh.DiscardRequests(requests)
	select {
	case <-inbound:
	case <-time.After(deliverTimeout):
	}
	_ = conn.Close()
	<-inbound
	<-outbound
}

// oneWay copies from one to the other and passes on the end. After an error it closes both.
func oneWay(to, from duplex) {
	if _, err := io.Copy(to, from); err != nil {
		_ = to.Close()
		_ = from.Close()
		return
	}
	_ = to.CloseWrite()
}

// handleDirectTCP implements ssh.ChannelHandler for local forwarding (ssh -L, -W, -D).
func (s *Server) handleDirectTCP(_ *ssh.Server, _ *gossh.ServerConn, newChannel gossh.NewChannel, ctx ssh.Context) {
	var target struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	if gossh.Unmarshal(newChannel.ExtraData(), &target) != nil || target.Port > 65535 {
		_ = newChannel.Reject(gossh.ConnectionFailed, "malformed forwarding request")
		return
	}
	address := net.JoinHostPort(target.Host, strconv.FormatUint(uint64(target.Port), 10))
	s.direct(ctx, newChannel, "tcp", address)
}

// handleDirectStreamlocal implements ssh.ChannelHandler for local forwarding to unix sockets.
func (s *Server) handleDirectStreamlocal(_ *ssh.Server, _ *gossh.ServerConn, newChannel gossh.NewChannel,
	ctx ssh.Context,
) {
	var target struct {
		Path      string
		Reserved0 string
		Reserved1 uint32
	}
	if gossh.Unmarshal(newChannel.ExtraData(), &target) != nil || target.Path == "" {
		_ = newChannel.Reject(gossh.ConnectionFailed, "malformed forwarding request")
		return
	}
	s.direct(ctx, newChannel, "unix", target.Path)
}

func (s *Server) direct(ctx context.Context, newChannel gossh.NewChannel, network, address string) {
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		_ = newChannel.Reject(gossh.ConnectionFailed, err.Error())
		return
	}
	target, ok := conn.(duplex)
	if !ok {
		_ = conn.Close()
		_ = newChannel.Reject(gossh.ConnectionFailed, "unsupported network")
		return
	}
	ch, requests, err := newChannel.Accept()
	if err != nil {
		_ = conn.Close()
		return
	}
	pipe(ch, requests, target)
}

// remoteForwards are the listeners that clients asked for (ssh -R). Each ends with its connection.
type remoteForwards struct {
	mu        sync.Mutex
	listeners map[forwardKey]net.Listener
	count     map[ssh.Context]int
}

// forwardKey is how a client names a forwarding when it cancels it.
type forwardKey struct {
	ctx  ssh.Context
	host string
	port uint32
}

// forwardRequest is the payload of tcpip-forward and cancel-tcpip-forward.
type forwardRequest struct {
	Host string
	Port uint32
}

func newRemoteForwards() *remoteForwards {
	return &remoteForwards{listeners: map[forwardKey]net.Listener{}, count: map[ssh.Context]int{}}
}

// listenAddress follows RFC 4254, section 7.1, and sshd's GatewayPorts clientspecified. A client that names no address
// (ssh -R 8080:...) sends "localhost".
func listenAddress(host string, port uint32) (network, address string) {
	service := strconv.FormatUint(uint64(port), 10)
	switch host {
	case "", "*":
		return "tcp", net.JoinHostPort("", service)
	case "0.0.0.0":
		return "tcp4", net.JoinHostPort(host, service)
	case "::":
		return "tcp6", net.JoinHostPort(host, service)
	case "localhost":
		return "tcp4", net.JoinHostPort("127.0.0.1", service)
	default:
		return "tcp", net.JoinHostPort(host, service)
	}
}

// handle implements ssh.RequestHandler for tcpip-forward.
func (r *remoteForwards) handle(ctx ssh.Context, _ *ssh.Server, req *gossh.Request) (bool, []byte) {
	var want forwardRequest
	if gossh.Unmarshal(req.Payload, &want) != nil || want.Port > 65535 || strings.ContainsRune(want.Host, 0) {
		return false, []byte{}
	}
	conn, ok := ctx.Value(ssh.ContextKeyConn).(*gossh.ServerConn)
	if !ok {
		return false, []byte{}
	}
	if !r.reserve(ctx) {
		return false, []byte{}
	}
	network, address := listenAddress(want.Host, want.Port)
	var config net.ListenConfig
	listener, err := config.Listen(ctx, network, address)
	if err != nil {
		r.unreserve(ctx)
		return false, []byte{}
	}
	port := want.Port
	if tcp, ok := listener.Addr().(*net.TCPAddr); ok {
		port = uint32(tcp.Port) // #nosec G115 -- a port
	}
	key := forwardKey{ctx, want.Host, port}
	r.mu.Lock()
	r.listeners[key] = listener
	r.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	go func() {
		defer stop()
		accept(ctx, listener, conn, want.Host, port)
		r.remove(key)
	}()
	if want.Port != 0 {
		return true, []byte{}
	}
	return true, gossh.Marshal(struct{ Port uint32 }{port})
}

// cancel implements ssh.RequestHandler for cancel-tcpip-forward.
func (r *remoteForwards) cancel(ctx ssh.Context, _ *ssh.Server, req *gossh.Request) (bool, []byte) {
	var want forwardRequest
	if gossh.Unmarshal(req.Payload, &want) != nil {
		return false, []byte{}
	}
	r.mu.Lock()
	listener, ok := r.listeners[forwardKey{ctx, want.Host, want.Port}]
	r.mu.Unlock()
	if ok {
		_ = listener.Close()
	}
	return ok, []byte{}
}

func (r *remoteForwards) reserve(ctx ssh.Context) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count[ctx] >= maxForwards {
		return false
	}
	r.count[ctx]++
	return true
}

func (r *remoteForwards) unreserve(ctx ssh.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count[ctx]--
	if r.count[ctx] <= 0 {
		delete(r.count, ctx)
	}
}

func (r *remoteForwards) remove(key forwardKey) {
	r.mu.Lock()
	delete(r.listeners, key)
	r.mu.Unlock()
	r.unreserve(key.ctx)
}

// accept hands connections to the client until the listener is closed, which the end of ctx does.
func accept(ctx context.Context, listener net.Listener, conn *gossh.ServerConn, host string, port uint32) {
	defer listener.Close()
	for {
		incoming, err := listener.Accept()
		if err != nil {
			var netErr net.Error
			if errors.As(err, &netErr) && !errors.Is(err, net.ErrClosed) {
				// Out of descriptors, or the peer has gone: the listener itself is fine.
				select {
				case <-ctx.Done():
				case <-time.After(10 * time.Millisecond):
				}
				continue
			}
			return
		}
		go func() {
			source, ok := incoming.(duplex)
			origin, isTCP := incoming.RemoteAddr().(*net.TCPAddr)
			if !ok || !isTCP {
				_ = incoming.Close()
				return
			}
			payload := struct {
				Host       string
				Port       uint32
				OriginHost string
				OriginPort uint32
			}{host, port, origin.IP.String(), uint32(origin.Port)} // #nosec G115 -- a port
			ch, requests, err := conn.OpenChannel("forwarded-tcpip", gossh.Marshal(payload))
			if err != nil {
				_ = incoming.Close()
				return
			}
			pipe(ch, requests, source)
		}()
	}
}
