package conformance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// grpcTap is on the wire between the router and its worker. It passes every call
// on as it is, and knows of each its method and its grant, so that chosen ones
// can be made to fail.
type grpcTap struct {
	// calls is where the router's calls pass.
	calls  *ledgertest.Points
	worker *grpc.ClientConn
}

// newGRPCTap listens on an address with the worker's certificate, and passes
// calls on to the worker with the router's.
func newGRPCTap(t testing.TB, addr, to, certs string) *grpcTap {
	t.Helper()
	tap := &grpcTap{calls: new(ledgertest.Points)}
	ca, err := os.ReadFile(path.Join(certs, "router", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	creds := func(name string) credentials.TransportCredentials {
		cert, err := tls.LoadX509KeyPair(path.Join(certs, name, "cert.pem"), path.Join(certs, name, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
			RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		})
	}
	tap.worker, err = grpc.NewClient("passthrough:///"+to, grpc.WithTransportCredentials(creds("router")), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(untouched{})))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(creds(workerName)), grpc.ForceServerCodecV2(untouched{}), grpc.UnknownServiceHandler(tap.pass))
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
		if err := tap.worker.Close(); err != nil {
			t.Errorf("close the connection to the worker: %v", err)
		}
	})
	return tap
}

// untouched is a codec that leaves messages as they are, *[]byte.
type untouched struct{}

func (untouched) Name() string { return "proto" }

func (untouched) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, status.Errorf(codes.Internal, "a %T passes the tap", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
}

func (untouched) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return status.Errorf(codes.Internal, "a %T passes the tap", v)
	}
	*b = data.Materialize()
	return nil
}

// Points of the worker's calls.
const (
	pointProvision = "worker.Provision"
	pointTerminate = "worker.Terminate"
)

// callOf names a call. Its grant is none if it is about the worker itself.
func callOf(method string, request []byte) ledgertest.Call {
	c := ledgertest.Call{Point: "worker." + path.Base(method)}
	var provision bridgev1.ProvisionRequest
	var canSatisfy bridgev1.CanSatisfyRequest
	var watch bridgev1.WatchUntilExitRequest
	var terminate bridgev1.TerminateRequest
	handle := ""
	switch method {
	case bridgev1.BackendService_Provision_FullMethodName:
		c.Mutates = true
		if proto.Unmarshal(request, &provision) == nil {
			copy(c.RequestID[:], provision.GetGrant().GetRequestId())
		}
	case bridgev1.BackendService_CanSatisfy_FullMethodName:
		if proto.Unmarshal(request, &canSatisfy) == nil {
			copy(c.RequestID[:], canSatisfy.GetGrant().GetRequestId())
		}
	case bridgev1.BackendService_WatchUntilExit_FullMethodName:
		if proto.Unmarshal(request, &watch) == nil {
			handle = watch.GetHandle()
		}
	case bridgev1.BackendService_Terminate_FullMethodName:
		c.Mutates = true
		if proto.Unmarshal(request, &terminate) == nil {
			handle = terminate.GetHandle()
		}
	}
	if id, err := backend.Handle(handle).GrantID(); err == nil {
		c.RequestID = ledger.RequestID(id)
	}
	return c
}

// errLost is what a lost connection looks like.
var errLost = status.Error(codes.Unavailable, "the tap lost the connection")

// pass passes one call on. All methods have one request.
func (t *grpcTap) pass(_ any, from grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(from)
	var request []byte
	if err := from.RecvMsg(&request); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(from.Context())
	defer cancel()
	hit := t.calls.Reach(callOf(method, request))
	var kind ledgertest.Kind
	if hit != nil {
		kind = hit.Fault().Kind
	}
	send := from.SendMsg
	switch kind {
	case ledgertest.Refuse:
		return errLost
	case ledgertest.Slow:
		select {
		case <-hit.Released():
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	case ledgertest.CrashBefore:
		if hit.Crash() {
			return errLost
		}
	case ledgertest.LoseAnswer, ledgertest.CrashAfter:
		send = func(any) error { return errLost }
	}
	err := t.forward(ctx, method, request, send)
	switch kind {
	case ledgertest.CrashAfter:
		hit.Crash() // or it was released: then only the answer is lost
		return errLost
	case ledgertest.LoseAnswer:
		return errLost
	default:
		return err
	}
}

// forward passes a request on, and its answers back.
func (t *grpcTap) forward(ctx context.Context, method string, request []byte, send func(any) error) error {
	md, _ := metadata.FromIncomingContext(ctx)
	to, err := t.worker.NewStream(metadata.NewOutgoingContext(ctx, md), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	// What Send couldn't do, Recv says why.
	if err := to.SendMsg(&request); err == nil {
		_ = to.CloseSend()
	}
	for {
		var answer []byte
		err := to.RecvMsg(&answer)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = send(&answer)
		}
		if err != nil {
			return err
		}
	}
}
