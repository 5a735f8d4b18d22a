package grpcx

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/compute-bridge/compute-bridge/pkg/config"
)

// reloadEvery is how often, at most, certificate files are looked at: a new
// certificate is used within that time, and a storm of handshakes costs no
// storm of reads.
const reloadEvery = time.Second

// files is one loaded set of TLS files.
type files struct {
	certificate tls.Certificate
	authorities *x509.CertPool
}

func loadFiles(c TLSConfig) (*files, error) {
	certificate, err := tls.LoadX509KeyPair(string(c.CertFile), string(c.KeyFile))
	if err != nil {
		return nil, fmt.Errorf("cert_file %s, key_file %s: %w", c.CertFile, c.KeyFile, err)
	}
	text, err := os.ReadFile(string(c.CAFile))
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	pool, err := authorities(text)
	if err != nil {
		return nil, fmt.Errorf("ca_file %s: %w", c.CAFile, err)
	}
	return &files{certificate: certificate, authorities: pool}, nil
}

// authorities reads all certificates of a PEM file. Unlike
// [x509.CertPool.AppendCertsFromPEM] it takes no part of them for the whole: an
// authority that is missing because the file is being written would cost its
// clients their connections.
func authorities(text []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	found := 0
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		pool.AddCert(cert)
		found++
	}
	switch {
	case bytes.Contains(text, []byte("-----BEGIN")):
		return nil, errors.New("it ends in the middle of a certificate")
	case found == 0:
		return nil, errors.New("no PEM certificate in it")
	}
	return pool, nil
}

// reloader holds the TLS files and loads them again when they change. While
// new files can't be loaded (half written, say), the old ones stay in use.
type reloader struct {
	config TLSConfig
	log    *slog.Logger

	mu      sync.Mutex // protects the fields below
	current *files
	stamp   string // of current
	failed  string // the stamp of what couldn't be loaded, "" if all could
	looked  time.Time
}

func newReloader(c TLSConfig, log *slog.Logger) (*reloader, error) {
	// The stamp first: what changes while it is loaded is loaded again.
	r := &reloader{config: c, log: log, stamp: c.stamp(), looked: time.Now()}
	var err error
	if r.current, err = loadFiles(c); err != nil {
		return nil, err
	}
	return r, nil
}

// stamp changes when a file does.
func (t TLSConfig) stamp() string {
	var stamp strings.Builder
	for _, f := range []config.Path{t.CertFile, t.KeyFile, t.CAFile} {
		if info, err := os.Stat(string(f)); err == nil {
			fmt.Fprintf(&stamp, "%d %d;", info.ModTime().UnixNano(), info.Size())
		}
	}
	return stamp.String()
}

func (r *reloader) files() *files {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.looked) < reloadEvery {
		return r.current
	}
	r.looked = time.Now()
	stamp := r.config.stamp()
	if stamp == r.stamp || stamp == r.failed {
		return r.current
	}
	loaded, err := loadFiles(r.config)
	if err != nil {
		r.failed = stamp
		r.log.Warn("Could not load changed TLS files, the old ones stay in use", "error", err)
		return r.current
	}
	r.current, r.stamp, r.failed = loaded, stamp, ""
	r.log.Info("Loaded changed TLS files", "cert_file", string(r.config.CertFile), "not_after", loaded.certificate.Leaf.NotAfter)
	return r.current
}

// peerInfo is the AuthInfo of connections without TLS.
type peerInfo struct {
	credentials.CommonAuthInfo
	identity string
}

// AuthType implements credentials.AuthInfo.
func (peerInfo) AuthType() string { return "computebridge-local" }

// insecureConn marks connections of a listener with insecure = true.
type insecureConn struct{ net.Conn }

type insecureListener struct{ net.Listener }

func (l insecureListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return insecureConn{conn}, nil
}

// serverCredentials decides per connection: a unix socket tells its peer's
// user id, a marked connection is plaintext, all else is mutual TLS.
type serverCredentials struct {
	tls *reloader // nil if no listener uses TLS
}

var _ credentials.TransportCredentials = (*serverCredentials)(nil)

// ServerHandshake implements credentials.TransportCredentials.
func (c *serverCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	switch conn := conn.(type) {
	case *net.UnixConn:
		uid, err := peerUID(conn)
		if err != nil {
			return nil, nil, err
		}
		return conn, peerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, "unix:" + strconv.FormatUint(uint64(uid), 10)}, nil
	case insecureConn:
		return conn, peerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, InsecureIdentity}, nil
	}
	if c.tls == nil {
		return nil, nil, errors.New("no TLS is configured for this listener")
	}
	f := c.tls.files()
	return credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{f.certificate},
		ClientCAs:    f.authorities,
		ClientAuth:   tls.RequireAndVerifyClientCert,
	}).ServerHandshake(conn)
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials can't dial")
}

// Info implements credentials.TransportCredentials.
func (c *serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "computebridge"}
}

// Clone implements credentials.TransportCredentials.
func (c *serverCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (c *serverCredentials) OverrideServerName(string) error {
	return errors.New("server credentials have no server name")
}

func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("peer credentials of unix socket: %w", credErr)
	}
	return cred.Uid, nil
}

// clientCredentials shows the present certificate at each handshake.
type clientCredentials struct {
	tls        *reloader
	serverName string
}

var _ credentials.TransportCredentials = (*clientCredentials)(nil)

// ClientHandshake implements credentials.TransportCredentials.
func (c *clientCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	f := c.tls.files()
	return credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{f.certificate},
		RootCAs:      f.authorities,
		ServerName:   c.serverName,
	}).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *clientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client credentials can't serve")
}

// Info implements credentials.TransportCredentials.
func (c *clientCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls", ServerName: c.serverName} //nolint:staticcheck // the channel's authority follows from it
}

// Clone implements credentials.TransportCredentials.
func (c *clientCredentials) Clone() credentials.TransportCredentials {
	clone := *c
	return &clone
}

// OverrideServerName implements credentials.TransportCredentials.
func (c *clientCredentials) OverrideServerName(name string) error {
	c.serverName = name
	return nil
}

func credentialsFor(c ClientConfig, t TLSConfig, log *slog.Logger) (credentials.TransportCredentials, error) {
	if c.Insecure || UnixPath(c.Target) != "" {
		return insecure.NewCredentials(), nil
	}
	r, err := newReloader(t, log)
	if err != nil {
		return nil, err
	}
	return &clientCredentials{tls: r, serverName: c.ServerName}, nil
}

// certificateIdentity returns the identity that a verified certificate shows.
func certificateIdentity(cert *x509.Certificate) string {
	switch {
	case len(cert.URIs) > 0:
		return cert.URIs[0].String()
	case len(cert.DNSNames) > 0:
		return cert.DNSNames[0]
	}
	return cert.Subject.CommonName
}
