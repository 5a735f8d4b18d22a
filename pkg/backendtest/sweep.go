package backendtest

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// faults says which faults can hit a call, and as what they are told.
func (e *env) faults(c Call) map[FaultKind][]backenderr.Reason {
	if e.f.Faults != nil {
		return e.f.Faults(c)
	}
	return DefaultFaults(e.f.CreatePoint)(c)
}

// provisionPoints returns the provider calls of a new grant's Provision, each
// once and in order, as far as the harness wants them swept.
func (e *env) provisionPoints() []string {
	e.Helper()
	g, envelope := e.grant()
	stop := e.f.Record(g.ID)
	p := e.provision(g, envelope)
	points := e.points(stop())
	e.terminate(p.Instance.Handle)
	return points
}

// endPoints returns the provider calls of a ready grant's Terminate, each once
// and in order. Without all of them nothing can be ended.
func (e *env) endPoints() []string {
	e.Helper()
	g, _, p := e.ready()
	stop := e.f.Record(g.ID)
	e.terminate(p.Instance.Handle)
	return pointsOf(stop())
}

func pointsOf(calls []Call) []string {
	var points []string
	for _, c := range calls {
		if c.Side == SideProvider && !c.Varies && !slices.Contains(points, c.Point) {
			points = append(points, c.Point)
		}
	}
	return points
}

func (e *env) points(calls []Call) []string {
	e.Helper()
	points := pointsOf(calls)
	if len(points) == 0 {
		e.Fatalf("a clean run made no call to the provider: %v", calls)
	}
	return sample(points, e.h.Sweep, e.random())
}

// random returns the generator of the sweep's choices.
func (e *env) random() *rand.Rand {
	seed := e.h.Sweep.Seed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano()) //nolint:gosec // Any bits do.
	}
	if e.h.Sweep.Sample > 0 {
		e.Logf("the sample's seed is %d", seed)
	}
	return rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // It makes no secret.
}

// sample chooses as many as the sweep wants, and keeps their order.
func sample[T any](all []T, s Sweep, r *rand.Rand) []T {
	if s.Sample == 0 || s.Sample >= len(all) {
		return all
	}
	chosen := r.Perm(len(all))[:s.Sample]
	slices.Sort(chosen)
	out := make([]T, len(chosen))
	for i, n := range chosen {
		out[i] = all[n]
	}
	return out
}

