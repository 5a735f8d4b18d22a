package sshconn

import (
	"testing"
	"time"
)

func TestPauseStartsOverAfterAConnectionThatHeld(t *testing.T) {
	t.Parallel()
	c := Config{BackoffMin: time.Second, BackoffMax: time.Minute}
	for _, tt := range []struct{ due, held, want time.Duration }{
		{time.Second, 0, time.Second},
		{8 * time.Second, 0, 8 * time.Second},
		{8 * time.Second, 8 * time.Second, 8 * time.Second},
		{8 * time.Second, 9 * time.Second, time.Second},
		{time.Minute, 50 * time.Second, time.Minute},
		{time.Minute, time.Hour, time.Second},
	} {
		if got := c.pauseAfter(tt.due, tt.held); got != tt.want {
			t.Errorf("%s due, after %s: %s, want %s", tt.due, tt.held, got, tt.want)
		}
	}
}
