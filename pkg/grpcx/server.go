package grpcx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"buf.build/go/protovalidate"
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

const (
	// maxRequestBytes bounds a request: a grant with the largest legal
	// environment is below 128 KiB.
	maxRequestBytes = 256 << 10
	// keepaliveTime is how long a connection may be silent before it is pinged;
	// dead peers are found within keepaliveTime + keepaliveTimeout.
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	// minClientPing is the fastest ping that a client may send; gRPC's default
	// of 5 min would answer our own clients with GOAWAY.
	minClientPing = 10 * time.Second
)

// Server is a gRPC server with the bridge's interceptors, health and
// reflection. Register services on it, then call Serve.
type Server struct {
	*grpc.Server

	health    *health.Server
	judged    sync.Map // services whose health somebody has told
	listeners []net.Listener
	log       *slog.Logger
}

// NewServer listens as configured, so that a port that is taken is an error of
// the start, and returns the server. c must be valid.
func NewServer(c ServerConfig, log *slog.Logger, metrics prometheus.Registerer) (*Server, error) {
	validator, err := protovalidate.New()
	if err != nil {
		return nil, fmt.Errorf("set up validation: %w", err)
	}
	creds := &serverCredentials{}
	var listeners []net.Listener
	closeAll := func() {
		for _, l := range listeners {
			_ = l.Close() // the error that is being returned matters more
		}
	}
	for i, lc := range c.Listen {
		if UnixPath(lc.Address) == "" && !lc.Insecure && creds.tls == nil {
			if creds.tls, err = newReloader(c.TLS, log); err != nil {
				closeAll()
				return nil, fmt.Errorf("tls.%w", err)
			}
		}
		l, err := listen(lc)
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("listen[%d].address: %w", i, err)
		}
		listeners = append(listeners, l)
	}

	serverMetrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram())
	if err := metrics.Register(serverMetrics); err != nil {
		closeAll()
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	auth := newAuthenticator(c.Clients)
	// Questions that routers and probes ask every few seconds would drown the
	// rest.
	quiet := selector.MatchFunc(func(_ context.Context, call interceptors.CallMeta) bool {
		switch call.FullMethod() {
		case bridgev1.BackendService_Name_FullMethodName, bridgev1.BackendService_Capabilities_FullMethodName,
			bridgev1.FleetService_GetProviderCard_FullMethodName:
			return false
		}
		return !strings.HasPrefix(call.FullMethod(), "/grpc.health.v1.") && !strings.HasPrefix(call.FullMethod(), "/grpc.reflection.")
	})
	logOptions := []logging.Option{logging.WithLogOnEvents(logging.FinishCall), logging.WithLevels(logLevel)}
	recoverer := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		log.ErrorContext(ctx, "Panic in handler", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		return backenderr.New(backenderr.Internal, "internal error")
	})

	s := grpc.NewServer(
		grpc.Creds(creds),
		grpc.StatsHandler(otelgrpc.NewServerHandler()),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout,
			MaxConnectionAge:      cmp.Or(c.MaxConnectionAge.Duration, DefaultMaxConnectionAge),
			MaxConnectionAgeGrace: cmp.Or(c.MaxConnectionAgeGrace.Duration, DefaultMaxConnectionAgeGrace),
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minClientPing, PermitWithoutStream: true}),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(stream)
			return backenderr.New(backenderr.Unimplemented, "this process does not serve %s", method).WithCreated(backenderr.CreatedNone)
		}),
		grpc.ChainUnaryInterceptor(
			serverMetrics.UnaryServerInterceptor(),
			selector.UnaryServerInterceptor(logging.UnaryServerInterceptor(slogLogger(log), logOptions...), quiet),
			unaryErrors,
			unaryAuth(auth),
			ValidateUnary(validator),
			recovery.UnaryServerInterceptor(recoverer),
		),
		grpc.ChainStreamInterceptor(
			serverMetrics.StreamServerInterceptor(),
			selector.StreamServerInterceptor(logging.StreamServerInterceptor(slogLogger(log), logOptions...), quiet),
			streamErrors,
			streamAuth(auth),
			validateStream(validator),
			recovery.StreamServerInterceptor(recoverer),
		),
	)
	server := &Server{Server: s, health: health.NewServer(), listeners: listeners, log: log}
	healthv1.RegisterHealthServer(s, server.health)
	reflection.Register(s)
	return server, nil
}

// SetServing tells health checks whether the process takes calls.
func (s *Server) SetServing(serving bool) {
	s.setService("", serving)
	for service := range s.GetServiceInfo() {
		if _, judged := s.judged.Load(service); !judged {
			s.setService(service, serving)
		}
	}
}

// SetServiceServing tells health checks of one service whether it takes calls
// here. A client that knows several servers asks the others then. Services that
// nobody speaks for are healthy while the process serves.
func (s *Server) SetServiceServing(service string, serving bool) {
	s.judged.Store(service, true)
	s.setService(service, serving)
}

func (s *Server) setService(service string, serving bool) {
	state := healthv1.HealthCheckResponse_NOT_SERVING
	if serving {
		state = healthv1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(service, state)
}

// Addrs returns the addresses that are listened on, in the configuration's
// order.
func (s *Server) Addrs() []net.Addr {
	addrs := make([]net.Addr, len(s.listeners))
	for i, l := range s.listeners {
		addrs[i] = l.Addr()
	}
	return addrs
}

// Run serves until ctx ends, then stops: health first says no, calls under way
// get drain time to finish, what is left is cut off. Instances aren't touched.
func (s *Server) Run(ctx context.Context, drain time.Duration) error {
	failed := make(chan error, len(s.listeners))
	for _, l := range s.listeners {
		s.log.InfoContext(ctx, "Listening", "address", l.Addr().String(), "network", l.Addr().Network())
		go func() { failed <- s.Serve(l) }()
	}
	s.SetServing(true)
	var err error
	running := len(s.listeners)
	select {
	case <-ctx.Done():
	case err = <-failed:
		running--
	}
	s.health.Shutdown()
	stopped := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(stopped)
	}()
	timer := time.NewTimer(drain)
	defer timer.Stop()
	select {
	case <-stopped:
	case <-timer.C:
		s.Stop()
		<-stopped
	}
	for range running {
		if serveErr := <-failed; err == nil && serveErr != nil && !errors.Is(serveErr, grpc.ErrServerStopped) {
			err = serveErr
		}
	}
	return err
}

func listen(c ListenConfig) (net.Listener, error) {
	if path := UnixPath(c.Address); path != "" {
		// A socket that a killed process left behind; one that somebody serves
		// is not taken away.
		if conn, err := net.Dial("unix", path); err == nil { //nolint:noctx // a local socket answers at once
			_ = conn.Close()
			return nil, fmt.Errorf("listen on %s: another process serves this socket", c.Address)
		}
		if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("listen on %s: there is a file that is no socket", c.Address)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			_ = l.Close()
			return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
		}
		return l, nil
	}
	l, err := net.Listen("tcp", c.Address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
	}
	if c.Insecure {
		l = insecureListener{l}
	}
	return l, nil
}

func slogLogger(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(ctx context.Context, level logging.Level, _ string, fields ...any) {
		log.Log(ctx, slog.Level(level), "Finished call", fields...)
	})
}

// unaryErrors is the last stop before the wire: every error leaves as a status
// with ErrorInfo, whoever made it.
func unaryErrors(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	res, err := handler(ctx, req)
	if foreignProtocol(info.FullMethod) {
		return res, err
	}
	return res, backenderr.Status(err).Err()
}

// foreignProtocol reports whether a method is of gRPC's own services, health
// and reflection, whose clients know their codes.
func foreignProtocol(method string) bool { return strings.HasPrefix(method, "/grpc.") }

func streamErrors(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if foreignProtocol(info.FullMethod) {
		return handler(srv, stream)
	}
	return backenderr.Status(handler(srv, stream)).Err()
}

func unaryAuth(a *authenticator) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		ctx, err := a.authenticate(ctx, info.FullMethod)
		if err != nil {
			return nil, err
		}
		return handler(ctx, req)
	}
}

// serverStream is a stream with another context, or a check on what arrives.
type serverStream struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // grpc.ServerStream hands its context out by method
	check func(proto.Message) error
}

// Context implements grpc.ServerStream.
func (s *serverStream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s *serverStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if msg, ok := m.(proto.Message); ok && s.check != nil {
		return s.check(msg)
	}
	return nil
}

func streamAuth(a *authenticator) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, err := a.authenticate(stream.Context(), info.FullMethod)
		if err != nil {
			return err
		}
		return handler(srv, &serverStream{ServerStream: stream, ctx: ctx})
	}
}

// ValidateUnary refuses requests that break the rules in the proto files, as
// GRANT_INVALID for grant and envelope and REQUEST_INVALID for the rest, with
// every violation.
func ValidateUnary(v protovalidate.Validator) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if msg, ok := req.(proto.Message); ok {
			if err := validate(v, msg); err != nil {
				return nil, err
			}
		}
		return handler(ctx, req)
	}
}

func validateStream(v protovalidate.Validator) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return handler(srv, &serverStream{ServerStream: stream, ctx: stream.Context(), check: func(m proto.Message) error { return validate(v, m) }})
	}
}

func validate(v protovalidate.Validator, msg proto.Message) error {
	err := v.Validate(msg)
	if err == nil {
		return nil
	}
	var invalid *protovalidate.ValidationError
	if !errors.As(err, &invalid) {
		return backenderr.Wrap(backenderr.Internal, err, "validate request").WithCreated(backenderr.CreatedNone)
	}
	reason := backenderr.RequestInvalid
	violations := make([]backenderr.Violation, len(invalid.Violations))
	for i, violation := range invalid.Violations {
		field := protovalidate.FieldPathString(violation.Proto.GetField())
		if strings.HasPrefix(field, "grant") || strings.HasPrefix(field, "envelope") {
			reason = backenderr.GrantInvalid
		}
		violations[i] = backenderr.Violation{Field: field, Description: violation.Proto.GetMessage()}
	}
	return backenderr.Invalid(reason, violations...)
}
