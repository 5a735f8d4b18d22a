package grpcx

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// healthTimeout is below the 3 s that a container's HEALTHCHECK allows.
const healthTimeout = 2 * time.Second

// CheckHealth asks the process that serves with this configuration, by its
// first listener, whether it takes calls. It shows the process's own
// certificate, which need not be among the clients: health answers to whoever
// has one.
func CheckHealth(ctx context.Context, c ServerConfig) (failure error) {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	listener := c.Listen[0]
	client := ClientConfig{Target: listener.Address, Insecure: listener.Insecure}
	if UnixPath(listener.Address) == "" {
		var err error
		if client.Target, err = localTarget(listener.Address); err != nil {
			return err
		}
		if !listener.Insecure {
			if client.ServerName, err = ownName(c.TLS); err != nil {
				return err
			}
		}
	}
	conn, err := Dial(client, c.TLS)
	if err != nil {
		return err
	}
	defer func() { failure = errors.Join(failure, conn.Close()) }()
	res, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("ask %s: %w", listener.Address, err)
	}
	if res.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		return fmt.Errorf("%s answers %s", listener.Address, res.GetStatus())
	}
	return nil
}

// localTarget returns where a listener that may be on all addresses is reached
// from its own machine.
func localTarget(address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("listen[0].address: %w", err)
	}
	if ip, err := netip.ParseAddr(host); host == "" || (err == nil && ip.IsUnspecified()) {
		host = "localhost"
	}
	return net.JoinHostPort(host, port), nil
}

// ownName returns a name that the process's own certificate is valid for.
func ownName(files TLSConfig) (string, error) {
	own, err := tls.LoadX509KeyPair(string(files.CertFile), string(files.KeyFile))
	if err != nil {
		return "", fmt.Errorf("tls: %w", err)
	}
	switch {
	case len(own.Leaf.DNSNames) > 0:
		return own.Leaf.DNSNames[0], nil
	case len(own.Leaf.IPAddresses) > 0:
		return own.Leaf.IPAddresses[0].String(), nil
	}
	return "", errors.New("tls.cert_file: the certificate has neither a DNS name nor an address; no client could check it")
}
