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
