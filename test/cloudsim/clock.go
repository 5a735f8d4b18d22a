package cloudsim

import (
	"context"
	"time"
)

// Clock is a simulator's time: it tells the time as everybody does, unless a test
// sets it wrong, and its delays pass Speed times as fast as the cloud's.
type Clock struct {
	// Speed divides every delay: 1 is the cloud's own pace, 100 a hundredth of it,
	// and 0 means no delay at all.
	Speed float64
	// Skewed tells the time; nil is time.Now.
	Skewed func() time.Time
}

// Now tells the time.
func (c Clock) Now() time.Time {
	if c.Skewed != nil {
		return c.Skewed()
	}
	return time.Now()
}

// Scale says how long a delay of the cloud takes here.
func (c Clock) Scale(delay time.Duration) time.Duration {
	if c.Speed <= 0 {
		return 0
	}
	return time.Duration(float64(delay) / c.Speed)
}

// Wait waits for a delay of the cloud, or until cut is closed or the context is
// over, and says whether the whole of it has passed. A nil cut never is.
func (c Clock) Wait(ctx context.Context, delay time.Duration, cut <-chan struct{}) bool {
	return WaitReal(ctx, c.Scale(delay), cut)
}

// WaitReal is Wait with a delay that isn't scaled.
func WaitReal(ctx context.Context, delay time.Duration, cut <-chan struct{}) bool {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-cut:
		return false
	case <-ctx.Done():
		return false
	}
}
