package workers

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Sweep lets one backend, or all of them at once, sweep. A sweep that has to
// tear something down takes its time: the caller's deadline is the limit.
func (v *Inventory) Sweep(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error) {
	name, rest, _ := strings.Cut(req.GetBackend(), "/")
	asked := v.workers
	if name != "" {
		at := slices.IndexFunc(v.workers, func(w *Worker) bool { return w.Name() == name })
		if at < 0 {
			var known []string
			for _, w := range v.workers {
				known = append(known, w.Name())
			}
			return nil, backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{
				Field: "backend", Description: fmt.Sprintf("no backend %q here; there are: %s", name, strings.Join(known, ", ")),
			})
		}
		asked = v.workers[at : at+1]
	}
	answers := make([]*bridgev1.SweepResponse, len(asked))
	failures := make([]error, len(asked))
	var wg sync.WaitGroup
	for i, w := range asked {
		wg.Go(func() {
			inner := proto.CloneOf(req)
			inner.Backend = rest
			answers[i], failures[i] = w.operator.Sweep(ctx, inner, grpc.MaxCallRecvMsgSize(maxListBytes))
		})
	}
	wg.Wait()
	all := &bridgev1.SweepResponse{}
	for i, w := range asked {
		err := failures[i]
		switch {
		case err == nil:
		case rest != "" && backenderr.Is(err, backenderr.RequestInvalid):
			return nil, err // It knows no such name either.
		default:
			v.log.WarnContext(ctx, "Backend did not sweep", "backend", w.Name(), "error", err)
			all.Failures = append(all.Failures, &bridgev1.SweepFailure{Backend: w.Name(), Error: backenderr.From(err).Error()})
			continue
		}
		for _, resource := range answers[i].GetResources() {
			resource.Backend = strings.TrimSuffix(w.Name()+"/"+resource.GetBackend(), "/")
			all.Resources = append(all.Resources, resource)
		}
		all.Blind = append(all.Blind, via(w.Name(), answers[i].GetBlind())...)
		for _, failure := range answers[i].GetFailures() {
			failure.Backend = w.Name() + "/" + failure.GetBackend()
			all.Failures = append(all.Failures, failure)
		}
	}
	slices.SortStableFunc(all.GetResources(), func(a, b *bridgev1.SweptResource) int {
		return cmp.Or(cmp.Compare(a.GetBackend(), b.GetBackend()), slices.Compare(a.GetRequestId(), b.GetRequestId()), cmp.Compare(a.GetAttempt(), b.GetAttempt()))
	})
	return all, nil
}
