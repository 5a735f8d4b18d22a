package ec2fixture

import (
	"context"
	"errors"
	"net/http"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// The calls that the suite must know by name.
const (
	createPoint = "ec2.RunInstances"
	readPoint   = "ec2.DescribeInstances"
	// consolePoint is only about what is told of an end.
	consolePoint = "ec2.GetConsoleOutput"
)

// refusals are what EC2 answers when a fault refuses a request.
// https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
var refusals = map[backendtest.FaultKind]ec2sim.Error{
	backendtest.FaultCapacity:        {Status: http.StatusInternalServerError, Code: "InsufficientInstanceCapacity", Message: "injected: no room"},
	backendtest.FaultQuota:           {Status: http.StatusBadRequest, Code: "VcpuLimitExceeded", Message: "injected: a limit"},
	backendtest.FaultDenied:          {Status: http.StatusForbidden, Code: "UnauthorizedOperation", Message: "injected: denied"},
	backendtest.FaultUnauthenticated: {Status: http.StatusUnauthorized, Code: "AuthFailure", Message: "injected: not authenticated"},
	backendtest.FaultThrottled:       {Status: http.StatusServiceUnavailable, Code: "RequestLimitExceeded", Message: "injected: too many requests"},
	backendtest.FaultUnavailable:     {Status: http.StatusServiceUnavailable, Code: "Unavailable", Message: "injected: unavailable"},
}

// otherRefusals are the same of the services with a protocol of their own.
var otherRefusals = map[backendtest.FaultKind]ec2sim.Error{
	backendtest.FaultDenied:          {Status: http.StatusBadRequest, Code: "AccessDeniedException", Message: "injected: denied"},
	backendtest.FaultUnauthenticated: {Status: http.StatusBadRequest, Code: "UnrecognizedClientException", Message: "injected: not authenticated"},
	backendtest.FaultThrottled:       {Status: http.StatusBadRequest, Code: "ThrottlingException", Message: "injected: too many requests"},
	backendtest.FaultUnavailable:     {Status: http.StatusServiceUnavailable, Code: "ServiceUnavailable", Message: "injected: unavailable"},
}

// errCut ends a request without an answer.
var errCut = errors.New("the connection is cut")

// intercept looks at each request to the cloud, and does what a fault orders.
func (s *Site) intercept(r ec2sim.Request) ec2sim.Intervention {
	if s.refuses.Load() {
		return ec2sim.Intervention{Before: func(context.Context) error { return errCut }}
	}
	c := call{Call: backendtest.Call{Side: backendtest.SideProvider, Point: r.Service + "." + r.Action, Mutates: r.Mutates && !r.DryRun}}
	for _, text := range r.Grants {
		if id, err := backend.ParseGrantID(text); err == nil {
			c.grants = append(c.grants, id)
		}
	}
	// Whatever only reads is a poll, or made once an hour.
	c.Varies = !c.Mutates || len(c.grants) == 0
	i := s.points.reach(c)
	if i == nil {
		return ec2sim.Intervention{}
	}
	switch i.fault.Kind {
	case backendtest.FaultSlow:
		return ec2sim.Intervention{Before: func(ctx context.Context) error {
			i.Strike(nil)
			select {
			case <-i.Released():
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}
	case backendtest.FaultLostAnswer:
		return ec2sim.Intervention{After: func() (lost bool) { return i.Strike(nil) }}
	case backendtest.FaultCrashBefore:
		return ec2sim.Intervention{Before: func(context.Context) error {
			if i.Strike(s.options.Kill) {
				return errCut
			}
			return nil
		}}
	case backendtest.FaultCrashAfter:
		return ec2sim.Intervention{After: func() (lost bool) { return i.Strike(s.options.Kill) }}
	case backendtest.FaultCapacity, backendtest.FaultQuota, backendtest.FaultDenied, backendtest.FaultUnauthenticated,
		backendtest.FaultThrottled, backendtest.FaultUnavailable:
	}
	if !i.Strike(nil) {
		return ec2sim.Intervention{}
	}
	table := refusals
	if r.Service != "ec2" {
		table = otherRefusals
	}
	refusal := table[i.fault.Kind]
	return ec2sim.Intervention{Refuse: &refusal}
}

// faultsOf says what may go wrong with a call, and as what Provision may tell it.
func faultsOf(c backendtest.Call) map[backendtest.FaultKind][]backenderr.Reason {
	faults := backendtest.DefaultFaults(createPoint)(c)
	if c.Side == backendtest.SideProvider && c.Point == consolePoint {
		// A worker that may not read consoles doesn't hear how a workload ended, and
		// lets it end.
		delete(faults, backendtest.FaultDenied)
		delete(faults, backendtest.FaultUnauthenticated)
	}
	return faults
}
