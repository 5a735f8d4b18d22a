package workers_test

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

// Sweep implements OperatorService.
func (r *remote) Sweep(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error) {
	return r.sweep(ctx, req)
}

func TestSweepAsksOneBackendOrAll(t *testing.T) {
	t.Parallel()
	id := func(n byte) []byte { return append([]byte{n}, make([]byte, 31)...) }
	type asked struct {
		backend string
		dryRun  bool
		role    backend.Role
	}
	calls := make(chan asked, 10)
	backends := map[string]*bridgev1.SweepResponse{
		"metal": {Resources: []*bridgev1.SweptResource{{RequestId: id(2)}, {RequestId: id(1)}}, Blind: []string{"host2"}},
		// A router: its backends have names.
		"site": {
			Resources: []*bridgev1.SweptResource{{RequestId: id(3), Backend: "aws"}}, Blind: []string{"aws/eu"},
			Failures: []*bridgev1.SweepFailure{{Backend: "gcp", Error: "gone"}},
		},
		"broken": nil,
	}
	var all []*workers.Worker
	for _, name := range []string{"metal", "site", "broken"} {
		r, answer := newRemote(t), backends[name]
		r.sweep = func(ctx context.Context, req *bridgev1.SweepRequest) (*bridgev1.SweepResponse, error) {
			calls <- asked{name + ":" + req.GetBackend(), req.GetDryRun(), backend.CallerFrom(ctx).Role}
			switch {
			case answer == nil:
				return nil, backendgrpc.StatusError(backenderr.New(backenderr.LedgerUnavailable, "the ledger is away"))
			case req.GetBackend() == "nobody":
				return nil, backendgrpc.StatusError(backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{Field: "backend", Description: "no backend"}))
			}
			return proto.CloneOf(answer), nil
		}
		r.start(t)
		all = append(all, dial(t, r.fast(name)))
	}
	v := workers.NewInventory(all, slog.New(slog.DiscardHandler))
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "root", Role: backend.RoleOperator})
	sweep := func(name string, dryRun bool) (*bridgev1.SweepResponse, []asked, error) {
		res, err := v.Sweep(ctx, &bridgev1.SweepRequest{Backend: name, DryRun: dryRun})
		var seen []asked
		for len(calls) > 0 {
			seen = append(seen, <-calls)
		}
		slices.SortFunc(seen, func(a, b asked) int { return strings.Compare(a.backend, b.backend) })
		return res, seen, err
	}
	check := func(res *bridgev1.SweepResponse, want *bridgev1.SweepResponse) {
		t.Helper()
		for _, f := range res.GetFailures() {
			if f.GetError() != "gone" && f.GetError() != "" {
				f.Error = "some error"
			}
		}
		if diff := cmp.Diff(want, res, protocmp.Transform()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}

	res, seen, err := sweep("", true)
	if err != nil {
		t.Fatal(err)
	}
	if want := []asked{{"broken:", true, backend.RoleOperator}, {"metal:", true, backend.RoleOperator}, {"site:", true, backend.RoleOperator}}; !slices.Equal(seen, want) {
		t.Errorf("asked %v", seen)
	}
	check(res, &bridgev1.SweepResponse{
		Resources: []*bridgev1.SweptResource{{RequestId: id(1), Backend: "metal"}, {RequestId: id(2), Backend: "metal"}, {RequestId: id(3), Backend: "site/aws"}},
		Blind:     []string{"metal/host2", "site/aws/eu"},
		Failures:  []*bridgev1.SweepFailure{{Backend: "site/gcp", Error: "gone"}, {Backend: "broken", Error: "some error"}},
	})

	res, seen, err = sweep("site/aws", false)
	if err != nil || !slices.Equal(seen, []asked{{"site:aws", false, backend.RoleOperator}}) {
		t.Fatalf("asked %v, %v", seen, err)
	}
	if len(res.GetResources()) != 1 || len(res.GetFailures()) != 1 {
		t.Errorf("got %v", res)
	}
	for _, name := range []string{"nobody", "site/nobody"} {
		if _, _, err := sweep(name, false); !backenderr.Is(err, backenderr.RequestInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if res, _, err := sweep("broken", false); err != nil || len(res.GetFailures()) != 1 {
		t.Errorf("a backend that fails: %v, %v", res, err)
	}
}
