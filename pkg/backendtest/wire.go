package backendtest

import (
	"context"
	"net"
	"strconv"
	"sync"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpc "google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Metadata keys by which the suite says who calls; a certificate does it
// elsewhere.
const (
	identityKey = "backendtest-identity"
	roleKey     = "backendtest-role"
)

// wire is a backend that is served over gRPC in memory.
type wire struct {
	client backend.Backend
	close  func()
	// cut is what the client sees of the server's death.
	cut func()
}

// newValidator returns the validator of requests. Learning the rules takes longer
// than most cases.
//
//nolint:gochecknoglobals // They are learnt once for all cases of a process.
var newValidator = sync.OnceValues(func() (protovalidate.Validator, error) { return protovalidate.New() })

// serve puts gRPC between the suite and b. Errors are looked at as they cross.
func serve(e *env, b backend.Backend) *wire {
	e.Helper()
	validator, err := newValidator()
	if err != nil {
		e.Fatalf("protovalidate: %v", err)
	}
	listener := bufconn.Listen(1 << 20)
	server := rpc.NewServer(
		// Errors are looked at in handlers, which must not outlive the case.
		rpc.WaitForHandlers(true),
		rpc.ChainUnaryInterceptor(
			func(ctx context.Context, req any, info *rpc.UnaryServerInfo, next rpc.UnaryHandler) (any, error) {
				res, err := next(callerOf(ctx), req)
				e.checkStatus(info.FullMethod, err)
				return res, err
			},
			grpcx.ValidateUnary(validator),
		),
		rpc.ChainStreamInterceptor(func(srv any, stream rpc.ServerStream, info *rpc.StreamServerInfo, next rpc.StreamHandler) error {
			err := next(srv, callerStream{stream, callerOf(stream.Context())})
			if stream.Context().Err() == nil { // or it reaches nobody
				e.checkStatus(info.FullMethod, err)
			}
			return err
		}),
	)
	bridgev1.RegisterBackendServiceServer(server, backendgrpc.NewServer(b))
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); err != nil {
			e.Errorf("serve: %v", err)
		}
	})
	conn, err := rpc.NewClient("passthrough:///backendtest",
		rpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		rpc.WithTransportCredentials(insecure.NewCredentials()),
		rpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, res any, cc *rpc.ClientConn, invoke rpc.UnaryInvoker, opts ...rpc.CallOption) error {
			return invoke(withCaller(ctx), method, req, res, cc, opts...)
		}),
		rpc.WithStreamInterceptor(func(ctx context.Context, desc *rpc.StreamDesc, cc *rpc.ClientConn, method string, open rpc.Streamer, opts ...rpc.CallOption) (rpc.ClientStream, error) {
			return open(withCaller(ctx), desc, cc, method, opts...)
		}),
	)
	if err != nil {
		e.Fatalf("dial: %v", err)
	}
	w := &wire{client: backendgrpc.NewClient(conn), cut: server.Stop}
	w.close = sync.OnceFunc(func() {
		if err := conn.Close(); err != nil {
			e.Errorf("close the connection: %v", err)
		}
		server.Stop()
		serving.Wait()
	})
	e.Cleanup(w.close)
	return w
}

// callerStream is a stream whose context knows the caller.
type callerStream struct {
	rpc.ServerStream
	ctx context.Context //nolint:containedctx // It is how a stream carries one.
}

func (s callerStream) Context() context.Context { return s.ctx }

func withCaller(ctx context.Context) context.Context {
	c := backend.CallerFrom(ctx)
	return metadata.AppendToOutgoingContext(ctx, identityKey, c.Identity, roleKey, strconv.Itoa(int(c.Role)))
}

func callerOf(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	identity, role := md.Get(identityKey), md.Get(roleKey)
	if len(identity) != 1 || len(role) != 1 {
		return ctx
	}
	n, err := strconv.Atoi(role[0])
	if err != nil {
		return ctx
	}
	return backend.WithCaller(ctx, backend.Caller{Identity: identity[0], Role: backend.Role(n)})
}

// checkStatus checks an error as it goes onto the wire.
func (e *env) checkStatus(method string, err error) {
	if err == nil || e.isCut() {
		return
	}
	st := status.Convert(err)
	for _, detail := range st.Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != backenderr.Domain {
			continue
		}
		reason := backenderr.Reason(info.GetReason())
		if reason.Proto() == bridgev1.ErrorReason_ERROR_REASON_UNKNOWN {
			e.Errorf("%s: the error's reason is %q: %v", method, reason, st.Message())
		}
		if st.Code() != reason.Code() {
			e.Errorf("%s: reason %s came with code %s, want %s", method, reason, st.Code(), reason.Code())
		}
		if created := info.GetMetadata()["created"]; created != string(backenderr.CreatedNone) && created != string(backenderr.CreatedUnknown) {
			e.Errorf("%s: the error says created=%q", method, created)
		}
		return
	}
	e.Errorf("%s: the error has no ErrorInfo of domain %s: %v", method, backenderr.Domain, st)
}
