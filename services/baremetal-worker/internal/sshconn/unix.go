package sshconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// The sockets of a host that the worker speaks to.
const (
	// SystemBusSocket is D-Bus's.
	SystemBusSocket = "/run/dbus/system_bus_socket"
	// PodmanSocket is that of podman's REST API.
	PodmanSocket = "/run/podman/podman.sock"
)

// maxStreams bounds the commands that stand in for forwarded sockets on one
// connection. With four commands and SFTP they stay below sshd's ten sessions.
const maxStreams = 4

// bridges are the programs that carry a socket's bytes over stdin and stdout,
// for hosts whose sshd refuses to forward unix sockets.
func bridges(path string) []string {
	switch path {
	case SystemBusSocket:
		return []string{"systemd-stdio-bridge"}
	case PodmanSocket:
		return []string{"podman", "system", "dial-stdio"}
	}
	return nil
}

// DialUnix connects to a unix socket on the host. Where sshd refuses to
// forward, D-Bus's and podman's sockets are reached through a program on the
// host that does the same.
//
// The connection ends with the SSH connection. It has no deadlines: close it
// to unblock a read.
func (c *Conn) DialUnix(ctx context.Context, path string) (net.Conn, error) {
	l, err := c.current(ctx)
	if err != nil {
		return nil, err
	}
	bridge := bridges(path)
	if _, refused := l.noForward.Load(path); refused {
		return c.dialBridge(ctx, l, path, bridge)
	}
	conn, err := await(ctx, l, func() (net.Conn, error) { return l.client.Dial("unix", path) }, func(conn net.Conn) { _ = conn.Close() })
	if err == nil {
		return conn, nil
	}
	var refusal *ssh.OpenChannelError
	if bridge == nil || !errors.As(err, &refusal) {
		return nil, c.classify(err, "connect to "+path)
	}
	// sshd says the same for a socket that nobody listens on and for one that
	// it won't forward. A bridge that answers tells them apart.
	conn, bridgeErr := c.dialBridge(ctx, l, path, bridge)
	if bridgeErr != nil {
		return nil, c.classify(err, "connect to "+path)
	}
	if exists, err := c.socketExists(ctx, path); err == nil && exists {
		if _, known := l.noForward.Swap(path, true); !known {
			c.log.InfoContext(ctx, "Host's sshd doesn't forward a unix socket, using a bridge program", "path", path)
		}
		return conn, nil
	}
	_ = conn.Close()
	return nil, c.classify(err, "connect to "+path)
}

// socketExists reports whether there is a socket at path.
func (c *Conn) socketExists(ctx context.Context, path string) (bool, error) {
	result, err := c.Run(ctx, Command{Args: []string{"test", "-S", path}})
	return result.ExitCode == 0, err
}

// dialBridge runs a program whose standard input and output are the socket's.
func (c *Conn) dialBridge(ctx context.Context, l *link, path string, args []string) (net.Conn, error) {
	line, err := Quote(args)
	if err != nil {
		return nil, err
	}
	if err := acquire(ctx, l, l.streams); err != nil {
		return nil, c.classify(err, "connect to "+path)
	}
	release := sync.OnceFunc(func() { <-l.streams })
	session, err := c.session(ctx, l)
	if err != nil {
		release()
		return nil, c.classify(err, "connect to "+path)
	}
	stdin, err := session.StdinPipe()
	if err == nil {
		var stdout io.Reader
		if stdout, err = session.StdoutPipe(); err == nil {
			conn := &streamConn{session: session, in: stdin, out: stdout, path: path, release: release}
			if _, err = await(ctx, l, func() (struct{}, error) { return struct{}{}, session.Start(line) }, func(struct{}) {}); err == nil {
				return conn, nil
			}
		}
	}
	_ = session.Close()
	release()
	return nil, c.classify(err, "connect to "+path)
}

// streamConn is a program's standard input and output as a net.Conn.
type streamConn struct {
	session *session
	in      io.WriteCloser
	out     io.Reader
	path    string
	release func()
}

// Read reads what the program writes.
func (s *streamConn) Read(p []byte) (int, error) { return s.out.Read(p) }

// Write writes what the program reads.
func (s *streamConn) Write(p []byte) (int, error) { return s.in.Write(p) }

// Close ends the program. (Closing its input alone must not meet a Write: they
// race in package ssh.)
func (s *streamConn) Close() error {
	err := s.session.Close()
	s.release()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// LocalAddr returns a nameless address.
func (s *streamConn) LocalAddr() net.Addr { return &net.UnixAddr{Name: "@", Net: "unix"} }

// RemoteAddr returns the socket's path.
func (s *streamConn) RemoteAddr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }

// SetDeadline isn't supported.
func (s *streamConn) SetDeadline(time.Time) error { return errors.New("deadlines are not supported") }

// SetReadDeadline isn't supported.
func (s *streamConn) SetReadDeadline(time.Time) error {
	return errors.New("deadlines are not supported")
}

// SetWriteDeadline isn't supported.
func (s *streamConn) SetWriteDeadline(time.Time) error {
	return errors.New("deadlines are not supported")
}

// SFTP returns the connection's SFTP client, shared by all callers, opening it
// if need be. Don't close it. A call on it fails when the connection is lost;
// the next SFTP opens another.
func (c *Conn) SFTP(ctx context.Context) (*sftp.Client, error) {
	l, err := c.current(ctx)
	if err != nil {
		return nil, err
	}
	client, err := await(ctx, l, func() (*sftp.Client, error) { return c.openSFTP(ctx, l) }, func(*sftp.Client) {})
	if err != nil {
		return nil, c.classify(err, "open SFTP")
	}
	return client, nil
}

// openSFTP opens the one SFTP session of a link.
func (c *Conn) openSFTP(ctx context.Context, l *link) (*sftp.Client, error) {
	l.sftpMu.Lock()
	defer l.sftpMu.Unlock()
	if l.sftp != nil {
		return l.sftp, nil
	}
	session, err := c.session(ctx, l)
	if err != nil {
		return nil, err
	}
	client, err := startSFTP(session.Session)
	if err != nil {
		_ = session.Close()
		return nil, fmt.Errorf("sftp: %w", err)
	}
	l.sftp = client
	go func() {
		// The session may end alone, for example when someone kills the server.
		_ = client.Wait()
		_ = session.Close()
		l.sftpMu.Lock()
		if l.sftp == client {
			l.sftp = nil
		}
		l.sftpMu.Unlock()
	}()
	return client, nil
}

// sftpPacket is the size of write requests. OpenSSH takes up to 256 KiB
// including a header, which any other server need not.
const sftpPacket = 32 << 10

func startSFTP(session *ssh.Session) (*sftp.Client, error) {
	stdin, err := session.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := session.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := session.StderrPipe()
	if err != nil {
		return nil, err
	}
	go func() { _, _ = io.Copy(io.Discard, stderr) }() // Unread, it would fill the channel's window.
	if err := session.RequestSubsystem("sftp"); err != nil {
		return nil, err
	}
	return sftp.NewClientPipe(stdout, stdin, sftp.UseConcurrentWrites(true), sftp.UseConcurrentReads(true), sftp.MaxPacketChecked(sftpPacket))
}

// closeSFTP ends the SFTP client after the connection, so that its goroutines
// end.
func (l *link) closeSFTP() {
	l.sftpMu.Lock()
	client := l.sftp
	l.sftp = nil
	l.sftpMu.Unlock()
	if client != nil {
		_ = client.Close()
	}
}
