package cloudsim_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

func TestAClockScalesDelaysButNotTheTime(t *testing.T) {
	for _, c := range []struct {
		speed float64
		want  time.Duration
	}{{1, time.Minute}, {100, 600 * time.Millisecond}, {0.5, 2 * time.Minute}, {0, 0}} {
		synctest.Test(t, func(t *testing.T) {
			clock := cloudsim.Clock{Speed: c.speed}
			start := time.Now()
			if !clock.Wait(t.Context(), time.Minute, nil) {
				t.Error("the wait was cut short")
			}
			if got := time.Since(start); got != c.want || clock.Now().Sub(start) != c.want {
				t.Errorf("at speed %v a minute takes %s, want %s", c.speed, got, c.want)
			}
		})
	}
}

func TestAWaitIsCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := cloudsim.Clock{Speed: 1}
		cut := make(chan struct{})
		close(cut)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		if clock.Wait(t.Context(), time.Minute, cut) || clock.Wait(ctx, time.Minute, nil) {
			t.Error("a wait that was cut short says that it was not")
		}
		if time.Since(start) != 0 {
			t.Error("a wait that was cut short took its time")
		}
	})
}

func TestABucketFillsAsItIsSaid(t *testing.T) {
	start := time.Now()
	b := cloudsim.NewBucket(cloudsim.Limit{Burst: 5, PerSecond: 2}, start)
	for _, step := range []struct {
		after time.Duration
		take  float64
		want  bool
	}{
		{0, 5, true},
		{0, 1, false},
		{400 * time.Millisecond, 1, false},
		{500 * time.Millisecond, 1, true},
		// What was refused took nothing, and no more fits in than the burst.
		{time.Hour, 6, false},
		{time.Hour, 5, true},
		{time.Hour, 1, false},
		// A clock that goes back takes nothing away.
		{time.Minute, 1, false},
		{time.Hour + time.Second, 2, true},
	} {
		if got := b.Take(step.take, start.Add(step.after)); got != step.want {
			t.Errorf("taking %v after %s: %t, want %t", step.take, step.after, got, step.want)
		}
	}
}
