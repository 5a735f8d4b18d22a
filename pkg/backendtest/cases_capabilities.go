package backendtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"math"
	"regexp"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
)

func identityCases() []testCase {
	return []testCase{
		{name: "identity/name is well-formed and constant", run: func(e *env) {
			name, err := e.b.Name(e.ctx())
			if err != nil {
				e.Fatalf("Name: %s", describe(err))
			}
			if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`).MatchString(name) {
				e.Errorf("name %q is not [a-z][a-z0-9-]*, at most 32 bytes", name)
			}
			e.ready()
			again, err := e.b.Name(e.ctx())
			if err != nil || again != name {
				e.Errorf("name was %q and then %q (%s)", name, again, describe(err))
			}
		}},
		{name: "identity/name outlives a restart", needs: []need{needReopen}, run: func(e *env) {
			name, err := e.b.Name(e.ctx())
			if err != nil {
				e.Fatalf("Name: %s", describe(err))
			}
			e.reopen()
			if again, err := e.b.Name(e.ctx()); err != nil || again != name {
				e.Errorf("name was %q and after a restart %q (%s)", name, again, describe(err))
			}
		}},
	}
}

func (e *env) capabilities() backend.Capabilities {
	e.Helper()
	c, err := e.b.Capabilities(e.ctx())
	if err != nil {
		e.Fatalf("Capabilities: %s", describe(err))
	}
	return c
}

// sum adds up all regions.
func sum(c backend.Capabilities) (free backend.Shape, active int64) {
	for _, r := range c.Regions {
		free, active = free.Add(r.Free), active+r.ActiveInstances
	}
	return free, active
}

func capabilitiesCases() []testCase {
	return []testCase{
		{name: "capabilities/repeatable and complete", run: func(e *env) {
			a, b := e.capabilities(), e.capabilities()
			if len(a.Regions) == 0 {
				e.Errorf("no region")
			}
			if name, _ := e.b.Name(e.ctx()); a.Backend != name {
				e.Errorf("capabilities are of backend %q, the name is %q", a.Backend, name)
			}
			if a.Stale || a.Draining {
				e.Errorf("an idle backend is stale=%v, draining=%v", a.Stale, a.Draining)
			}
			a.ObservedAt, b.ObservedAt = time.Time{}, time.Time{}
			e.same("two answers", a, b)
		}},
		{name: "capabilities/change nothing", needs: []need{needMutations}, run: func(e *env) {
			before := e.f.Mutations()
			for range 5 {
				e.capabilities()
			}
			if after := e.f.Mutations(); after != before {
				e.Errorf("asking changed the provider %d times", after-before)
			}
		}},
		{name: "capabilities/answers aren't shared", run: func(e *env) {
			a := e.capabilities()
			want := backendgrpc.CapabilitiesFromProto(proto.CloneOf(backendgrpc.CapabilitiesToProto(a)))
			for i := range a.Regions {
				clear(a.Regions[i].Isolation)
				clear(a.Regions[i].NetworkModes)
				a.Regions[i].Region = "spoiled"
			}
			for i := range a.LogKeys {
				clear(a.LogKeys[i].PublicKey)
			}
			got := e.capabilities()
			got.ObservedAt = want.ObservedAt
			e.same("answers before and after one was changed by its receiver", want, got)
		}},
		{name: "capabilities/log keys are Ed25519 and named by their hash", run: func(e *env) {
			c := e.capabilities()
			if len(c.LogKeys) == 0 {
				e.Errorf("no log key")
			}
			for _, k := range c.LogKeys {
				hash := sha256.Sum256(k.PublicKey)
				if want := "ed25519:" + hex.EncodeToString(hash[:16]); len(k.PublicKey) != 32 || k.ID != want {
					e.Errorf("log key of %d bytes has id %q, want 32 bytes and %q", len(k.PublicKey), k.ID, want)
				}
			}
		}},
		{name: "capabilities/count what exists", run: func(e *env) {
			freeBefore, activeBefore := sum(e.capabilities())
			g, _, p := e.ready()
			free, active := sum(e.capabilities())
			if active != activeBefore+1 {
				e.Errorf("with one instance more, active went from %d to %d", activeBefore, active)
			}
			if !free.Fits(freeBefore.Sub(g.Shape)) {
				e.Errorf("with a grant of %s more, free went from %s to %s", g.Shape, freeBefore, free)
			}
			e.terminate(p.Instance.Handle)
			if free, active = sum(e.capabilities()); free != freeBefore || active != activeBefore {
				e.Errorf("after the grant's end free is %s with %d active, before it was %s with %d", free, active, freeBefore, activeBefore)
			}
		}},
		{name: "capabilities/count what exists after a restart", needs: []need{needReopen}, run: func(e *env) {
			e.ready()
			free, active := sum(e.capabilities())
			e.reopen()
			if freeAfter, activeAfter := sum(e.capabilities()); free != freeAfter || active != activeAfter {
				e.Errorf("a restart changed free from %s to %s and active from %d to %d", free, freeAfter, active, activeAfter)
			}
		}},
		{name: "capabilities/outage is stale, not an error", needs: []need{needInject}, run: func(e *env) {
			before := e.capabilities()
			fault := e.f.Inject(Fault{Point: e.f.ReadPoint, Kind: FaultUnavailable, Always: true})
			defer fault.Release()
			if after := e.capabilities(); len(after.Regions) != len(before.Regions) {
				e.Errorf("during an outage %d regions are known, before there were %d", len(after.Regions), len(before.Regions))
			}
		}},
	}
}

func satisfyCases() []testCase {
	ask := func(e *env, g backend.Grant) bool {
		e.Helper()
		s, err := e.b.CanSatisfy(e.ctx(), g)
		if err != nil {
			e.Fatalf("CanSatisfy: %s", describe(err))
		}
		return s.Satisfiable
	}
	return []testCase{
		{name: "satisfy/yes means that Provision succeeds", run: func(e *env) {
			g, envelope := e.grant()
			if !ask(e, g) {
				e.Fatalf("no to a satisfiable grant")
			}
			e.provision(g, envelope)
		}},
		{name: "satisfy/no means that Provision refuses", run: func(e *env) {
			g, envelope := e.f.Unsatisfiable()
			if ask(e, g) {
				e.Errorf("yes to an unsatisfiable grant")
			}
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision", backenderr.GrantNotSatisfiable)
			e.wantNone(err, "Provision")
		}},
		{name: "satisfy/asking reserves nothing", run: func(e *env) {
			before, _ := sum(e.capabilities())
			for range 2*e.f.Capacity + 1 {
				g, _ := e.f.Satisfiable()
				if !ask(e, g) {
					e.Errorf("no to a satisfiable grant")
				}
			}
			if after, _ := sum(e.capabilities()); after != before {
				e.Errorf("asking changed what is free from %s to %s", before, after)
			}
			if left := e.left(); len(left) > 0 {
				e.Errorf("asking made %v", left)
			}
		}},
		{name: "satisfy/asking changes nothing", needs: []need{needMutations}, run: func(e *env) {
			before := e.f.Mutations()
			g, _ := e.f.Satisfiable()
			ask(e, g)
			bad, _ := e.f.Unsatisfiable()
			ask(e, bad)
			if after := e.f.Mutations(); after != before {
				e.Errorf("asking changed the provider %d times", after-before)
			}
		}},
		{name: "satisfy/a full backend says yes", run: func(e *env) {
			for range e.f.Capacity {
				e.ready()
			}
			if g, _ := e.f.Satisfiable(); !ask(e, g) {
				e.Errorf("no, because it is full")
			}
		}},
		{name: "satisfy/a grant that it holds is yes", run: func(e *env) {
			g, _, _ := e.ready()
			if !ask(e, g) {
				e.Errorf("no to a grant that it holds")
			}
		}},
		{name: "satisfy/unknown region, stronger isolation and huge sizes are no", run: func(e *env) {
			offered := backend.Isolation(0)
			for _, r := range e.capabilities().Regions {
				offered = max(offered, slices.Max(r.Isolation))
			}
			for what, change := range map[string]func(*backend.Grant){
				"an unknown region": func(g *backend.Grant) { g.Region = "no-such-region" },
				"a huge CPU":        func(g *backend.Grant) { g.Shape.CPU = 4096000 },
				"a huge memory":     func(g *backend.Grant) { g.Shape.RAM = 67108864 },
				"a huge disk":       func(g *backend.Grant) { g.Shape.Storage = 1048576 },
				"stronger isolation": func(g *backend.Grant) {
					if offered < backend.IsolationTDX {
						g.MinIsolation = offered + 1
						return
					}
					g.Region = "no-such-region"
				},
			} {
				g, envelope := e.f.Satisfiable()
				change(&g)
				if ask(e, g) {
					e.Errorf("yes to %s", what)
				}
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision with "+what, backenderr.GrantNotSatisfiable)
				e.wantNone(err, "Provision with "+what)
			}
		}},
		{name: "satisfy/sizes out of all bounds are no or an error", run: func(e *env) {
			for _, size := range []int64{0, -1, math.MaxInt64, math.MinInt64} {
				for _, change := range []func(*backend.Shape){
					func(s *backend.Shape) { s.CPU = backend.Millicores(size) },
					func(s *backend.Shape) { s.RAM = backend.MiB(size) },
					func(s *backend.Shape) { s.Storage = backend.GiB(size) },
				} {
					g, _ := e.f.Satisfiable()
					change(&g.Shape)
					s, err := e.b.CanSatisfy(e.ctx(), g)
					if err == nil && s.Satisfiable {
						e.Errorf("yes to %s", g.Shape)
					}
					if err != nil {
						e.want(err, "CanSatisfy", backenderr.GrantInvalid)
					}
				}
			}
		}},
		{name: "satisfy/an ended context is no hang", run: func(e *env) {
			ctx, cancel := context.WithCancel(e.ctx())
			cancel()
			g, _ := e.f.Satisfiable()
			if _, err := e.b.CanSatisfy(ctx, g); err != nil {
				e.want(err, "CanSatisfy", backenderr.Cancelled)
			}
			if _, err := e.b.Capabilities(ctx); err != nil {
				e.want(err, "Capabilities", backenderr.Cancelled)
			}
		}},
	}
}
