// Package backendgrpc carries the Backend contract over gRPC: [NewServer]
// serves any backend.Backend, [NewClient] is one. It is the only place, beside
// the services' own API handlers, that knows the generated types.
//
// Errors cross as statuses with ErrorInfo (package backenderr) and come back
// as equal *backenderr.Error values.
package backendgrpc

import (
	"context"

	"google.golang.org/grpc"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

type server struct {
	bridgev1.UnimplementedBackendServiceServer
	backend backend.Backend
}

// NewServer returns the gRPC service of a backend. Requests must have passed
// validation (grpcx.ValidateUnary does it); the backend checks what rules on
// single messages can't.
func NewServer(b backend.Backend) bridgev1.BackendServiceServer { return &server{backend: b} }

func (s *server) Name(ctx context.Context, _ *bridgev1.NameRequest) (*bridgev1.NameResponse, error) {
	name, err := s.backend.Name(ctx)
	if err != nil {
		return nil, StatusError(err)
	}
	return &bridgev1.NameResponse{Name: name}, nil
}

func (s *server) Capabilities(ctx context.Context, _ *bridgev1.CapabilitiesRequest) (*bridgev1.CapabilitiesResponse, error) {
	c, err := s.backend.Capabilities(ctx)
	if err != nil {
		return nil, StatusError(err)
	}
	return &bridgev1.CapabilitiesResponse{Capabilities: CapabilitiesToProto(c)}, nil
}

func (s *server) CanSatisfy(ctx context.Context, req *bridgev1.CanSatisfyRequest) (*bridgev1.CanSatisfyResponse, error) {
	grant := GrantFromProto(req.GetGrant()).WithRegionHint(backend.Region(req.GetRegionHint()))
	answer, err := s.backend.CanSatisfy(ctx, grant)
	if err != nil {
		return nil, StatusError(err)
	}
	return &bridgev1.CanSatisfyResponse{Satisfiable: answer.Satisfiable, Reason: answer.Reason}, nil
}

func (s *server) Provision(ctx context.Context, req *bridgev1.ProvisionRequest) (*bridgev1.ProvisionResponse, error) {
	p, err := s.backend.Provision(ctx, GrantFromProto(req.GetGrant()), EnvelopeFromProto(req.GetEnvelope()))
	if err != nil {
		return nil, StatusError(err)
	}
	return ProvisionedToProto(p), nil
}

func (s *server) WatchUntilExit(req *bridgev1.WatchUntilExitRequest, stream grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
	err := s.backend.WatchUntilExit(stream.Context(), backend.Handle(req.GetHandle()), func(e backend.Event) error {
		return stream.Send(EventToProto(e))
	})
	return StatusError(err)
}

func (s *server) Terminate(ctx context.Context, req *bridgev1.TerminateRequest) (*bridgev1.TerminateResponse, error) {
	t, err := s.backend.Terminate(ctx, backend.Handle(req.GetHandle()))
	if err != nil {
		return nil, StatusError(err)
	}
	return &bridgev1.TerminateResponse{State: bridgev1.InstanceState(t.State), ComputeLog: SignedLogToProto(t.Log)}, nil
}

// StatusError returns err as the gRPC status error that carries its reason, nil
// for nil.
func StatusError(err error) error { return backenderr.Status(err).Err() }
