package worker

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// defaultLogs and maxLogs bound ListComputeLogs; see inventory.proto.
const (
	defaultLogs = 100
	maxLogs     = 1000
)

// Register registers the worker's services: backend, inventory and operator.
func Register(server grpc.ServiceRegistrar, r *Runtime) {
	bridgev1.RegisterBackendServiceServer(server, backendgrpc.NewServer(r))
	bridgev1.RegisterInventoryServiceServer(server, &inventoryServer{runtime: r})
	bridgev1.RegisterOperatorServiceServer(server, &operatorServer{runtime: r})
}

type inventoryServer struct {
	bridgev1.UnimplementedInventoryServiceServer
	runtime *Runtime
}

// ListInstances implements InventoryService.
func (s *inventoryServer) ListInstances(ctx context.Context, req *bridgev1.ListInstancesRequest) (*bridgev1.ListInstancesResponse, error) {
	instances := s.runtime.Instances(ctx)
	slices.SortFunc(instances, func(a, b backend.Instance) int { return strings.Compare(a.GrantID.String(), b.GrantID.String()) })
	res := &bridgev1.ListInstancesResponse{}
	for _, i := range instances {
		if want := req.GetRequestId(); len(want) > 0 && !bytes.Equal(want, i.GrantID[:]) {
			continue
		}
		res.Instances = append(res.Instances, backendgrpc.InstanceToProto(i))
	}
	return res, nil
}

// ListComputeLogs implements InventoryService.
func (s *inventoryServer) ListComputeLogs(ctx context.Context, req *bridgev1.ListComputeLogsRequest) (*bridgev1.ListComputeLogsResponse, error) {
	res := &bridgev1.ListComputeLogsResponse{}
	if id := req.GetRequestId(); len(id) > 0 {
		log, err := s.runtime.ComputeLog(ctx, backend.GrantID(id))
		if err != nil {
			return nil, backendgrpc.StatusError(err)
		}
		if log != nil {
			res.ComputeLogs = append(res.ComputeLogs, backendgrpc.SignedLogToProto(log))
		}
		return res, nil
	}
	limit := int(req.GetLimit())
	switch {
	case limit == 0:
		limit = defaultLogs
	case limit > maxLogs:
		limit = maxLogs
	}
	since := req.GetSince().AsTime() // the epoch if absent
	logs, err := s.runtime.ComputeLogs(ctx, since, limit)
	if err != nil {
		return nil, backendgrpc.StatusError(err)
	}
	for _, log := range logs {
		res.ComputeLogs = append(res.ComputeLogs, backendgrpc.SignedLogToProto(&log))
	}
	return res, nil
}

type operatorServer struct {
	bridgev1.UnimplementedOperatorServiceServer
	runtime *Runtime
}

// SetDraining implements OperatorService.
func (s *operatorServer) SetDraining(_ context.Context, req *bridgev1.SetDrainingRequest) (*bridgev1.SetDrainingResponse, error) {
	s.runtime.SetDraining(req.GetDraining())
	return &bridgev1.SetDrainingResponse{Draining: req.GetDraining()}, nil
}

// Sweep implements OperatorService.
func (s *operatorServer) Sweep(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error) {
	if name := req.GetBackend(); name != "" && name != s.runtime.config.Backend {
		return nil, backendgrpc.StatusError(backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{
			Field: "backend", Description: fmt.Sprintf("this is the worker %q; it knows no %q", s.runtime.config.Backend, name),
		}))
	}
	found, blind, err := s.runtime.sweep(ctx, req.GetDryRun())
	if err != nil {
		return nil, backendgrpc.StatusError(err)
	}
	res := &bridgev1.SweepResponse{Blind: blind}
	for _, f := range found {
		p := &bridgev1.SweptResource{
			RequestId: f.Resource.GrantID[:], Attempt: f.Resource.Attempt, InstanceId: string(f.Resource.InstanceID),
			Why: f.Why, Deleted: f.Deleted, Placement: f.Resource.Placement,
		}
		if f.Err != nil {
			p.Error = f.Err.Error()
		}
		if !f.Resource.CreatedAt.IsZero() {
			p.CreatedAt = timestamppb.New(f.Resource.CreatedAt)
		}
		if !f.Resource.ValidTo.IsZero() {
			p.ValidTo = timestamppb.New(f.Resource.ValidTo)
		}
		res.Resources = append(res.Resources, p)
	}
	return res, nil
}
