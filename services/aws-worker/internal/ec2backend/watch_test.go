package ec2backend

import (
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

func TestEndIsWhenEC2SaysItWas(t *testing.T) {
	t.Parallel()
	launched := time.Date(2026, 11, 22, 9, 0, 0, 500, time.UTC)
	for _, c := range []struct {
		transition string
		want       time.Time // zero: now
	}{
		{"User initiated (2026-11-22 10:11:12 GMT)", time.Date(2026, 11, 22, 10, 11, 13, 0, time.UTC)},
		{"Server.SpotInstanceTermination: Spot instance termination (2026-11-22 09:00:00 GMT)", time.Date(2026, 11, 22, 9, 0, 1, 0, time.UTC)},
		{"User initiated (2026-11-22 08:00:00 GMT)", time.Time{}}, // before its launch
		{"User initiated", time.Time{}},
		{"", time.Time{}},
	} {
		got, known := instance{launched: launched, transition: c.transition}.endedAt()
		if c.want.IsZero() && !known && time.Since(got).Abs() < time.Minute {
			continue
		}
		if !got.Equal(c.want) || !known {
			t.Errorf("%q: %s, want %s", c.transition, got, c.want)
		}
	}
}

func TestEndHasItsReason(t *testing.T) {
	t.Parallel()
	deadline := time.Date(2026, 11, 22, 11, 0, 0, 0, time.UTC)
	early, late := "User initiated (2026-11-22 10:11:12 GMT)", "User initiated (2026-11-22 11:00:00 GMT)"
	for _, c := range []struct {
		code, transition string
		want             backend.EndReason
	}{
		{reasonSpotTaken, early, backend.EndInterrupted},
		{reasonSpotShutdown, late, backend.EndInterrupted},
		{reasonScheduledStop, early, backend.EndInterrupted},
		{reasonPoweredOff, late, backend.EndDeadline},
		{reasonByUser, early, backend.EndVanished},
		{reasonByUser, late, backend.EndDeadline},
		{"Server.InternalError", early, backend.EndVanished},
		{"", early, backend.EndVanished},
	} {
		i := instance{labels: labels{validTo: deadline}, reasonCode: c.code, transition: c.transition, state: types.InstanceStateNameTerminated}
		if got := (&Backend{}).exitOf(t.Context(), nil, i); got.Reason != c.want {
			t.Errorf("%s, %q: %s, want %s", c.code, c.transition, got.Reason, c.want)
		}
	}
}

// Another replica that ends an instance says why before it does, and whoever
// watches here finds only that it is gone.
func TestWhatAnotherReplicaEndedHasNotVanished(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	g, p := s.provision(t, b)
	driver, ok := s.driver.(*Backend)
	if !ok {
		t.Fatalf("driver %T", s.driver)
	}
	vanished, ended := backend.Exit{Reason: backend.EndVanished}, backend.Exit{Reason: backend.EndTerminated}
	id := identity{g.ID, p.Instance.Attempt}
	if got, err := driver.unlessSaved(t.Context(), id, vanished); err != nil || got.Reason != backend.EndVanished {
		t.Errorf("with nothing on record: %+v, %v", got, err)
	}
	if err := driver.env.Journal.SaveLog(t.Context(), backend.ComputeLog{
		GrantID: g.ID, Attempt: id.attempt, InstanceID: p.Instance.ID, Region: p.Instance.Region, Shape: g.Shape,
		StartedAt: p.Instance.StartedAt, EndedAt: time.Now().UTC(), ValidTo: g.ValidTo, Exit: ended,
	}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		attempt uint32
		seen    backend.Exit
		want    backend.EndReason
	}{
		{"ended by another", id.attempt, vanished, backend.EndTerminated},
		{"another attempt", id.attempt + 1, vanished, backend.EndVanished},
		{"an end of its own", id.attempt, backend.Exit{Reason: backend.EndInterrupted}, backend.EndInterrupted},
	} {
		if got, err := driver.unlessSaved(t.Context(), identity{g.ID, c.attempt}, c.seen); err != nil || got.Reason != c.want {
			t.Errorf("%s: %+v, %v; want %s", c.name, got, err, c.want)
		}
	}
	terminate(t, b, g.ID)
}
