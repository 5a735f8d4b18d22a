package grpcx

import (
	"fmt"
	"log/slog"
	"slices"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
)

// maxResponseBytes is for lists: about 100,000 instances. gRPC's default of
// 4 MiB would make a well-filled worker look unreachable.
const maxResponseBytes = 64 << 20

// Dial returns a connection to a server. It connects in the background and
// again whenever the connection is lost; calls fail at once while there is
// none, unless they wait for ready. The caller closes it.
//
// Nothing is retried: Provision's outcome would be in doubt. Whoever calls
// decides by the error.
func Dial(c ClientConfig, t TLSConfig, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	return DialLogging(slog.New(slog.DiscardHandler), c, t, options...)
}

// DialLogging is [Dial] for a process that lives on: it logs when changed TLS
// files are used, and when they can't be.
func DialLogging(log *slog.Logger, c ClientConfig, t TLSConfig, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	creds, err := credentialsFor(c, t, log)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", c.Target, err)
	}
	target, resolvers := listed(c.Target)
	conn, err := grpc.NewClient(target, slices.Concat([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithStatsHandler(otelgrpc.NewClientHandler()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithIdleTimeout(0), // a channel that sleeps would miss health changes
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponseBytes)),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
	}, resolvers, options)...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", c.Target, err)
	}
	return conn, nil
}
