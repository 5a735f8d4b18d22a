package backendgrpc

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

type client struct {
	service bridgev1.BackendServiceClient
}

var _ backend.Backend = (*client)(nil)

// NewClient returns the backend at the other end of a connection. The caller
// keeps the connection and closes it.
func NewClient(cc grpc.ClientConnInterface) backend.Backend {
	return &client{service: bridgev1.NewBackendServiceClient(cc)}
}

func (c *client) Name(ctx context.Context) (string, error) {
	res, err := c.service.Name(ctx, &bridgev1.NameRequest{})
	if err != nil {
		return "", clientError(ctx, err)
	}
	return res.GetName(), nil
}

func (c *client) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	res, err := c.service.Capabilities(ctx, &bridgev1.CapabilitiesRequest{})
	if err != nil {
		return backend.Capabilities{}, clientError(ctx, err)
	}
	return CapabilitiesFromProto(res.GetCapabilities()), nil
}

func (c *client) CanSatisfy(ctx context.Context, grant backend.Grant) (backend.Satisfaction, error) {
	res, err := c.service.CanSatisfy(ctx, &bridgev1.CanSatisfyRequest{Grant: GrantToProto(grant)})
	if err != nil {
		return backend.Satisfaction{}, clientError(ctx, err)
	}
	return backend.Satisfaction{Satisfiable: res.GetSatisfiable(), Reason: res.GetReason()}, nil
}

func (c *client) Provision(ctx context.Context, grant backend.Grant, envelope backend.Envelope) (backend.Provisioned, error) {
	res, err := c.service.Provision(ctx, &bridgev1.ProvisionRequest{Grant: GrantToProto(grant), Envelope: EnvelopeToProto(envelope)})
	if err != nil {
		return backend.Provisioned{}, clientError(ctx, err)
	}
	if res.GetInstance().GetHandle() == "" || res.GetReceipt() == nil {
		return backend.Provisioned{}, backenderr.New(backenderr.Unknown, "backend answered Provision without instance or receipt")
	}
	p := ProvisionedFromProto(res)
	if wrong := wrongAnswer(grant.ID, p); wrong != "" {
		return backend.Provisioned{}, backenderr.New(backenderr.Unknown, "backend answered Provision with %s", wrong)
	}
	return p, nil
}

func (c *client) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.service.WatchUntilExit(ctx, &bridgev1.WatchUntilExitRequest{Handle: string(handle)})
	if err != nil {
		return clientError(ctx, err)
	}
	for {
		res, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return backenderr.New(backenderr.BackendUnreachable, "watch ended without a compute log")
		}
		if err != nil {
			return clientError(ctx, err)
		}
		if wrong := wrongEvent(handle, res); wrong != "" {
			return backenderr.New(backenderr.Unknown, "backend told a watch of %s", wrong)
		}
		event := EventFromProto(res)
		if err := emit(event); err != nil {
			return err
		}
		if event.Log != nil {
			return nil
		}
	}
}

func (c *client) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	res, err := c.service.Terminate(ctx, &bridgev1.TerminateRequest{Handle: string(handle)})
	if err != nil {
		return backend.Termination{}, clientError(ctx, err)
	}
	state := backend.State(res.GetState())
	if state != backend.StateTerminating && state != backend.StateTerminated {
		return backend.Termination{}, backenderr.New(backenderr.Unknown, "backend answered Terminate with state %v", res.GetState())
	}
	if wrong := wrongLog(handle, res.GetComputeLog()); wrong != "" {
		return backend.Termination{}, backenderr.New(backenderr.Unknown, "backend answered Terminate with %s", wrong)
	}
	return backend.Termination{State: state, Log: SignedLogFromProto(res.GetComputeLog())}, nil
}

// clientError makes an *Error of what gRPC returned. When the caller's own
// context has ended, errors.Is finds that, too.
func clientError(ctx context.Context, err error) error {
	e := backenderr.From(err)
	if ctxErr := ctx.Err(); ctxErr != nil && backenderr.Is(e, backenderr.Cancelled, backenderr.DeadlineExceeded) {
		return backenderr.Wrap(e.Reason, errors.Join(err, ctxErr), "").WithCreated(e.Created)
	}
	return e
}
