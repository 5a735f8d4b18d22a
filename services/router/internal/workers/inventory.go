package workers

import (
	"bytes"
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// listTimeout is how long a listing waits for one backend before it goes
// without. Workers answer from memory and their ledgers.
const listTimeout = 5 * time.Second

// maxListBytes is how long a backend's list of instances may be. It comes in one
// message, of all that runs at a site, at 300 to 1000 bytes each: gRPC's default
// of 4 MiB would make a backend with some thousands of them look unreachable.
// This is enough for 60 000, and bounds what one backend can make the router
// hold.
const maxListBytes = 64 << 20

// Inventory lists what runs and ran at several backends. Each of them decides
// what the caller, who is passed on, may see.
type Inventory struct {
	workers []*Worker
	log     *slog.Logger
}

// NewInventory returns the inventory of the workers.
func NewInventory(workers []*Worker, log *slog.Logger) *Inventory {
	return &Inventory{workers: workers, log: log}
}

// Instances returns all instances, sorted by grant, with handles and names of
// backends as this router's callers know them.
func (v *Inventory) Instances(ctx context.Context, req *bridgev1.ListInstancesRequest) *bridgev1.ListInstancesResponse {
	answers := ask(ctx, v, func(ctx context.Context, w *Worker) (*bridgev1.ListInstancesResponse, error) {
		return w.inventory.ListInstances(ctx, req, grpc.MaxCallRecvMsgSize(maxListBytes))
	})
	all := &bridgev1.ListInstancesResponse{}
	for i, res := range answers {
		name := v.workers[i].Name()
		if res == nil {
			all.UnreachableBackends = append(all.UnreachableBackends, name)
			continue
		}
		for _, instance := range res.GetInstances() {
			instance.Handle = string(backend.Handle(instance.GetHandle()).Via(name))
			all.Instances = append(all.Instances, instance)
		}
		all.UnreachableBackends = append(all.UnreachableBackends, via(name, res.GetUnreachableBackends())...)
	}
	slices.SortStableFunc(all.GetInstances(), func(a, b *bridgev1.Instance) int { return bytes.Compare(a.GetRequestId(), b.GetRequestId()) })
	return all
}

// defaultLogs is how many logs are listed when the caller doesn't say; see
// inventory.proto.
const defaultLogs = 100

// ComputeLogs returns compute logs, oldest first.
func (v *Inventory) ComputeLogs(ctx context.Context, req *bridgev1.ListComputeLogsRequest) *bridgev1.ListComputeLogsResponse {
	answers := ask(ctx, v, func(ctx context.Context, w *Worker) (*bridgev1.ListComputeLogsResponse, error) {
		return w.inventory.ListComputeLogs(ctx, req)
	})
	all := &bridgev1.ListComputeLogsResponse{}
	for i, res := range answers {
		name := v.workers[i].Name()
		if res == nil {
			all.UnreachableBackends = append(all.UnreachableBackends, name)
			continue
		}
		all.ComputeLogs = append(all.ComputeLogs, res.GetComputeLogs()...)
		all.UnreachableBackends = append(all.UnreachableBackends, via(name, res.GetUnreachableBackends())...)
	}
	slices.SortStableFunc(all.GetComputeLogs(), func(a, b *bridgev1.SignedComputeLog) int { return cmp.Compare(age(a), age(b)) })
	limit := int(req.GetLimit())
	if limit == 0 {
		limit = defaultLogs
	}
	all.ComputeLogs = all.GetComputeLogs()[:min(limit, len(all.GetComputeLogs()))]
	return all
}

// age is when what a log tells of ended, or began if it hasn't ended.
func age(l *bridgev1.SignedComputeLog) int64 {
	at := l.GetLog().GetEndedAt()
	if at == nil {
		at = l.GetLog().GetStartedAt()
	}
	return at.AsTime().UnixNano()
}

func via(name string, nested []string) []string {
	names := make([]string, len(nested))
	for i, n := range nested {
		names[i] = name + "/" + n
	}
	return names
}

// ask puts a question to all workers at once and returns the answers in order;
// a nil one didn't come.
func ask[T proto.Message](ctx context.Context, v *Inventory, question func(context.Context, *Worker) (T, error)) []T {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	answers := make([]T, len(v.workers))
	var wg sync.WaitGroup
	for i, w := range v.workers {
		wg.Go(func() {
			answer, err := question(ctx, w)
			if err != nil {
				v.log.WarnContext(ctx, "Backend is missing from a listing", "backend", w.Name(), "error", err)
				return
			}
			answers[i] = answer
		})
	}
	wg.Wait()
	return answers
}
