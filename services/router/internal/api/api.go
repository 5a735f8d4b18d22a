// Package api is the router's gRPC surface: the Backend contract over the
// fleet, what the router stands for, and the lists of what runs and ran.
package api

import (
	"context"
	"crypto/sha256"
	"encoding/binary"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// Inventory lists what runs and ran, for the caller in the context.
type Inventory interface {
	// Instances lists instances.
	Instances(ctx context.Context, req *bridgev1.ListInstancesRequest) *bridgev1.ListInstancesResponse
	// ComputeLogs lists compute logs.
	ComputeLogs(ctx context.Context, req *bridgev1.ListComputeLogsRequest) *bridgev1.ListComputeLogsResponse
}

// Sweeper lets backends sweep, for the operator in the context.
type Sweeper interface {
	// Sweep lets one backend or all of them sweep.
	Sweep(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error)
}

// Workers are the router's backends, beside their contract.
type Workers interface {
	Inventory
	Sweeper
}

// Register registers the router's services.
func Register(server grpc.ServiceRegistrar, bridgeID string, f *fleet.Fleet, workers Workers) {
	bridgev1.RegisterBackendServiceServer(server, backendgrpc.NewServer(f))
	bridgev1.RegisterFleetServiceServer(server, &fleetServer{bridgeID: bridgeID, fleet: f})
	bridgev1.RegisterInventoryServiceServer(server, &inventoryServer{inventory: workers})
	bridgev1.RegisterOperatorServiceServer(server, &operatorServer{sweeper: workers})
}

type fleetServer struct {
	bridgev1.UnimplementedFleetServiceServer
	bridgeID string
	fleet    *fleet.Fleet
}

// ListBackends implements FleetService.
func (s *fleetServer) ListBackends(context.Context, *bridgev1.ListBackendsRequest) (*bridgev1.ListBackendsResponse, error) {
	res := &bridgev1.ListBackendsResponse{}
	for _, status := range s.fleet.Status() {
		p := &bridgev1.BackendStatus{Name: status.Name, Health: health(status.Health), LastError: status.LastError}
		if !status.LastSeen.IsZero() {
			p.LastSeen = timestamppb.New(status.LastSeen)
			p.Capabilities = backendgrpc.CapabilitiesToProto(status.Capabilities)
		}
		res.Backends = append(res.Backends, p)
	}
	return res, nil
}

func health(h fleet.Health) bridgev1.BackendHealth {
	switch h {
	case fleet.Serving:
		return bridgev1.BackendHealth_BACKEND_HEALTH_SERVING
	case fleet.Degraded:
		return bridgev1.BackendHealth_BACKEND_HEALTH_DEGRADED
	case fleet.Draining:
		return bridgev1.BackendHealth_BACKEND_HEALTH_DRAINING
	case fleet.Unreachable:
		return bridgev1.BackendHealth_BACKEND_HEALTH_UNREACHABLE
	}
	return bridgev1.BackendHealth_BACKEND_HEALTH_UNSPECIFIED
}

// GetProviderCard implements FleetService.
func (s *fleetServer) GetProviderCard(ctx context.Context, _ *bridgev1.GetProviderCardRequest) (*bridgev1.GetProviderCardResponse, error) {
	capabilities, err := s.fleet.Capabilities(ctx)
	if err != nil {
		return nil, backendgrpc.StatusError(err)
	}
	names := s.fleet.Backends()
	return &bridgev1.GetProviderCardResponse{Card: &bridgev1.ProviderCard{
		BridgeId: s.bridgeID, Capabilities: backendgrpc.CapabilitiesToProto(capabilities), Tdx: capabilities.TDX(),
		Backends: names, BackendSetDigest: Digest(names),
	}}, nil
}

// digestDomain separates the digest of a backend set from all other hashes.
const digestDomain = "computebridge/v1 backend set\x00"

// Digest returns the digest of an ordered set of backend names, the measured
// identity of a bridge; fleet.proto defines it.
func Digest(names []string) []byte {
	text := []byte(digestDomain)
	for _, n := range names {
		text = binary.AppendUvarint(text, uint64(len(n)))
		text = append(text, n...)
	}
	sum := sha256.Sum256(text)
	return sum[:]
}

type inventoryServer struct {
	bridgev1.UnimplementedInventoryServiceServer
	inventory Inventory
}

// ListInstances implements InventoryService.
func (s *inventoryServer) ListInstances(ctx context.Context, req *bridgev1.ListInstancesRequest) (*bridgev1.ListInstancesResponse, error) {
	return s.inventory.Instances(ctx, req), nil
}

// ListComputeLogs implements InventoryService.
func (s *inventoryServer) ListComputeLogs(ctx context.Context, req *bridgev1.ListComputeLogsRequest) (*bridgev1.ListComputeLogsResponse, error) {
	return s.inventory.ComputeLogs(ctx, req), nil
}

type operatorServer struct {
	bridgev1.UnimplementedOperatorServiceServer
	sweeper Sweeper
}

// Sweep implements OperatorService.
func (s *operatorServer) Sweep(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error) {
	res, err := s.sweeper.Sweep(ctx, req)
	if err != nil {
		return nil, backendgrpc.StatusError(err)
	}
	return res, nil
}
