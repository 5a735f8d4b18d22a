package fleet_test

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// hop calls a fleet as its outer router does: with one hop more.
type hop struct{ backend.Backend }

func further(ctx context.Context) context.Context {
	c := backend.CallerFrom(ctx)
	c.Hops++
	return backend.WithCaller(ctx, c)
}

func (h hop) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	return h.Backend.CanSatisfy(further(ctx), g)
}

func (h hop) Provision(ctx context.Context, g backend.Grant, e backend.Envelope) (backend.Provisioned, error) {
	return h.Backend.Provision(further(ctx), g, e)
}

func (h hop) WatchUntilExit(ctx context.Context, handle backend.Handle, emit func(backend.Event) error) error {
	return h.Backend.WatchUntilExit(further(ctx), handle, emit)
}

func (h hop) Terminate(ctx context.Context, handle backend.Handle) (backend.Termination, error) {
	return h.Backend.Terminate(further(ctx), handle)
}

// over makes a fleet, with claims of its own, over other fleets.
func over(t *testing.T, names []string, inner ...*fleet.Fleet) *fleet.Fleet {
	t.Helper()
	c := fleet.Config{Name: "outer", Claims: newMemory(), Log: slog.New(slog.DiscardHandler)}
	for i, f := range inner {
		c.Members = append(c.Members, fleet.Member{Name: names[i], Backend: hop{f}, AnswerTimeout: answerTimeout, Observe: func() fleet.Observation {
			capabilities, err := f.Capabilities(t.Context())
			if err != nil {
				t.Error(err)
			}
			return fleet.Observation{Capabilities: capabilities, Backends: f.Backends(), LastSeen: time.Unix(1, 0)}
		}})
	}
	f, err := fleet.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestRoutersNest(t *testing.T) {
	north, south := newBridge(t, "a", "b"), newBridge(t, "a")
	middle := over(t, []string{"north", "south"}, north.Fleet, south.Fleet)
	top := over(t, []string{"land"}, middle)
	for _, f := range north.fakes {
		f.no = "not in the north"
	}
	grant, envelope := grantOf(1)
	ctx := as(t.Context(), "alice")
	p, err := top.Provision(ctx, grant, envelope)
	if err != nil {
		t.Fatal(err)
	}
	want := backend.Handle("land/south/a/" + grant.ID.String())
	if p.Instance.Handle != want {
		t.Fatalf("handle is %q, want %q", p.Instance.Handle, want)
	}
	if diff := cmp.Diff([]string{"land/north/a", "land/north/b", "land/south/a"}, top.Backends()); diff != "" {
		t.Errorf("backends (-want +got):\n%s", diff)
	}
	c, err := top.Capabilities(ctx)
	if err != nil || len(c.Regions) != 1 || c.Regions[0].Total.CPU != 3*4000 {
		t.Errorf("union of three backends is %+v, %v", c, err)
	}
	south.fakes[0].event = []backend.Event{{Instance: &backend.Instance{Handle: backend.HandleFor(grant.ID)}}}
	err = top.WatchUntilExit(ctx, want, func(e backend.Event) error {
		if e.Instance.Handle != want {
			t.Errorf("watch saw handle %q", e.Instance.Handle)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	last := south.fakes[0].callers[len(south.fakes[0].callers)-1]
	if last.Identity != "alice" || last.Hops != 2 {
		t.Errorf("the worker was called by %+v", last)
	}
	term, err := top.Terminate(ctx, want)
	if err != nil || term.State != backend.StateTerminated || south.world.running[grant.ID] != 0 {
		t.Errorf("Terminate answers %+v, %v", term, err)
	}
}

// A worker that several routers lead to has its capacity once.
func TestAWorkerIsCountedOnceWhateverLeadsToIt(t *testing.T) {
	declares := func(cpu backend.Millicores, keys ...string) fleet.Observation {
		c := backend.Capabilities{Regions: []backend.RegionCapabilities{{Region: "lab", Total: backend.Shape{CPU: cpu}, Free: backend.Shape{CPU: cpu}}}}
		for _, id := range keys {
			c.LogKeys = append(c.LogKeys, backend.LogKey{ID: id})
		}
		return fleet.Observation{Capabilities: c, LastSeen: time.Unix(1, 0)}
	}
	silent := declares(1000, "w1")
	silent.LastError = "connection lost"
	for name, c := range map[string]struct {
		members     []fleet.Observation
		total, free backend.Millicores
		warnings    int
	}{
		"two workers":                      {[]fleet.Observation{declares(1000, "w1"), declares(2000, "w2")}, 3000, 3000, 0},
		"who shows no key may be anybody":  {[]fleet.Observation{declares(1000), declares(2000)}, 3000, 3000, 0},
		"a worker, and a router before it": {[]fleet.Observation{declares(1000, "w1"), declares(1000, "w1")}, 1000, 1000, 1},
		"the way that answers counts":      {[]fleet.Observation{silent, declares(1000, "w1")}, 1000, 1000, 2},
		"a part can't be taken apart":      {[]fleet.Observation{declares(1000, "w1"), declares(3000, "w1", "w2")}, 4000, 4000, 1},
		"three ways to the same two":       {[]fleet.Observation{declares(3000, "w1", "w2"), declares(1000, "w1"), declares(2000, "w2")}, 3000, 3000, 2},
	} {
		t.Run(name, func(t *testing.T) {
			config := fleet.Config{Name: "top", Claims: newMemory(), Log: slog.New(slog.DiscardHandler)}
			for i, seen := range c.members {
				config.Members = append(config.Members, fleet.Member{Name: string(rune('a' + i)), Observe: func() fleet.Observation { return seen }})
			}
			f, err := fleet.New(config)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Capabilities(t.Context())
			if err != nil || len(got.Regions) != 1 || got.Regions[0].Total.CPU != c.total || got.Regions[0].Free.CPU != c.free || len(got.Warnings) != c.warnings {
				t.Errorf("got %+v, %v; want a total of %d, %d free and %d warnings", got, err, c.total, c.free, c.warnings)
			}
		})
	}
}

func TestALoopOfRoutersEndsAtTheHopLimit(t *testing.T) {
	inner := newBridge(t, "a")
	for _, hops := range []int{backend.MaxHops - 1, backend.MaxHops} {
		ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient, Hops: hops})
		grant, envelope := grantOf(1)
		_, err := inner.Provision(ctx, grant, envelope)
		if hops < backend.MaxHops {
			if err != nil {
				t.Errorf("%d hops: %v", hops, err)
			}
			continue
		}
		handle := backend.HandleFor(grant.ID).Via("a")
		_, satisfyErr := inner.CanSatisfy(ctx, grant)
		_, terminateErr := inner.Terminate(ctx, handle)
		for _, err := range []error{err, satisfyErr, terminateErr, inner.WatchUntilExit(ctx, handle, nil)} {
			wantReason(t, err, backenderr.HopLimitExceeded, backenderr.CreatedNone)
		}
	}
	// A real loop: each router is the other's only member.
	var loop hop
	f := func(name string, next *hop) *fleet.Fleet {
		made, err := fleet.New(fleet.Config{Name: name, Claims: newMemory(), Log: slog.New(slog.DiscardHandler), Members: []fleet.Member{{
			Name: "other", Backend: next, AnswerTimeout: answerTimeout, Observe: func() fleet.Observation { return fleet.Observation{} },
		}}})
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	one := f("one", &loop)
	loop.Backend = f("two", &hop{one})
	grant, envelope := grantOf(2)
	_, err := one.Provision(as(t.Context(), "alice"), grant, envelope)
	wantReason(t, err, backenderr.HopLimitExceeded, backenderr.CreatedNone)
}

// An inner router that kept no claims would give the retry of a call, whose
// answer was lost, to its second worker as soon as the first does not answer.
func TestAnInnerRouterKeepsAGrantWhoseAnswerWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := newBridge(t, "a", "b")
		top := over(t, []string{"site"}, site.Fleet)
		lost := outcome{err: errTransport, made: true}
		site.fakes[0].always, site.fakes[0].endErr = &lost, errTransport
		grant, envelope := grantOf(1)
		_, err := top.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
		site.fakes[0].set(func() { site.fakes[0].observed.LastError = "no answer" })
		_, err = top.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
		if got := site.world.atOnce[grant.ID]; got != 1 || site.fakes[1].did("Provision") != 0 {
			t.Errorf("%d instances at once, %d calls at the second worker", got, site.fakes[1].did("Provision"))
		}
	})
}

// The top router must end an unclear attempt at a site without knowing which
// of the site's workers had it.
func TestAnUnclearAttemptAtASiteIsEndedBeforeAnotherSiteGetsTheGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		north, south := newBridge(t, "a", "b"), newBridge(t, "a")
		top := over(t, []string{"north", "south"}, north.Fleet, south.Fleet)
		north.fakes[0].no = "not here"
		lost := outcome{err: errTransport, made: true}
		north.fakes[1].always = &lost
		grant, envelope := grantOf(1)
		p, err := top.Provision(t.Context(), grant, envelope)
		if err != nil {
			t.Fatal(err)
		}
		if want := backend.Handle("south/a/" + grant.ID.String()); p.Instance.Handle != want {
			t.Errorf("handle is %q, want %q", p.Instance.Handle, want)
		}
		if north.world.running[grant.ID] != 0 || south.world.running[grant.ID] != 1 {
			t.Errorf("%d run in the north, %d in the south", north.world.running[grant.ID], south.world.running[grant.ID])
		}
	})
}
