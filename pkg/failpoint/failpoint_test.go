package failpoint_test

import (
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/failpoint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestAReleaseWaitsForAStrikeThatHasBegun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		trigger := failpoint.New()
		began := make(chan struct{})
		go trigger.Strike(func() {
			close(began)
			<-time.After(time.Minute) // as long as a process takes to die
			if closed(trigger.Reached()) {
				t.Error("the fault was said to have hit while its effect was under way")
			}
		})
		<-began
		start := time.Now()
		trigger.Release()
		if took := time.Since(start); took != time.Minute || !closed(trigger.Reached()) {
			t.Errorf("released after %s, and reached is %t: want it to have waited", took, closed(trigger.Reached()))
		}
	})
}

func TestWhatWasReleasedNeverStrikes(t *testing.T) {
	t.Parallel()
	trigger := failpoint.New()
	if closed(trigger.Released()) || trigger.Over() {
		t.Error("released from the start")
	}
	trigger.Release()
	trigger.Release() // again
	if trigger.Strike(func() { t.Error("the fault had its effect") }) {
		t.Error("it struck all the same")
	}
	if closed(trigger.Reached()) || !closed(trigger.Released()) || !trigger.Over() {
		t.Error("a fault that was released in time counts as one that has hit")
	}
}

func TestAFaultMayStrikeAgain(t *testing.T) {
	t.Parallel()
	trigger := failpoint.New()
	struck := 0
	for range 2 {
		if !trigger.Strike(func() { struck++ }) || !closed(trigger.Reached()) {
			t.Error("it didn't strike")
		}
	}
	if struck != 2 || !trigger.Strike(nil) {
		t.Errorf("it had its effect %d times, want 2", struck)
	}
}
