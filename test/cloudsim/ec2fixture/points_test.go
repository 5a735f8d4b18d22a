package ec2fixture

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var one, two = backend.GrantID{1}, backend.GrantID{2}

func write(point string, grants ...backend.GrantID) call {
	return call{backendtest.Call{Side: backendtest.SideProvider, Point: point, Mutates: true, Varies: len(grants) == 0}, grants}
}

func TestCallsForNobodyInParticularCountForEveryGrant(t *testing.T) {
	var p points
	stopOne, stopAll := p.record(one), p.record(backend.GrantID{})
	for _, c := range []call{write("a", one), write("b", two), write("c"), write("d", two, one), write("a", one)} {
		if p.reach(c) != nil {
			t.Errorf("%s is hit by no fault", c.Point)
		}
	}
	want := []backendtest.Call{write("a", one).Call, write("c").Call, write("d", one).Call, write("a").Call}
	if diff := cmp.Diff(want, stopOne()); diff != "" {
		t.Errorf("recorded for a grant (-want +got), of which the repeated call varies:\n%s", diff)
	}
	if got := len(stopAll()); got != 5 {
		t.Errorf("%d of 5 calls were recorded", got)
	}
	p.reach(write("a", one))
	if got := len(stopOne()); got != 4 {
		t.Errorf("a call after the end was recorded")
	}
}

func TestFaultsHitTheCallsThatTheyName(t *testing.T) {
	var p points
	second := p.inject(backendtest.Fault{Point: "a", Nth: 2, GrantID: one})
	always := p.inject(backendtest.Fault{Point: "b", Always: true})
	for n, step := range []struct {
		call call
		want *injection
	}{
		{write("a", one), nil},
		{write("a", two), nil},
		{write("a", two, one), second},
		{write("a", one), nil},
		{write("b", two), always},
		{write("b"), always},
		{write("c"), nil},
	} {
		if got := p.reach(step.call); got != step.want {
			t.Errorf("call %d, of %s: hit by %v, want %v", n, step.call.Point, got, step.want)
		}
	}
	always.Release()
	always.Release()
	if p.reach(write("b")) != nil {
		t.Error("a fault hits after its end")
	}
}
