package cli

import (
	"context"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// The limit is asked of the context, not of a clock: what it bounds takes its own
// time on a busy machine.
func TestCompletionWaitsNoLongerThanItIsTold(t *testing.T) {
	t.Parallel()
	for told, want := range map[string]time.Duration{
		"": time.Second, "5m": 5 * time.Minute, "soon": time.Second, "0s": time.Second, "-1s": time.Second,
	} {
		a := &app{Env: Env{Getenv: func(name string) string {
			if name != "BRIDGECTL_COMPLETION_TIMEOUT" {
				t.Errorf("asked for %s", name)
			}
			return told
		}}}
		began := time.Now()
		var end time.Time
		look := a.complete(func(ctx context.Context, _ *app) []string {
			end, _ = ctx.Deadline()
			return []string{"metal", "other"}
		})
		if got, _ := look(&cobra.Command{}, nil, "m"); len(got) != 1 || got[0] != "metal" {
			t.Errorf("%q: completed by %q", told, got)
		}
		if end.Before(began.Add(want)) || end.After(time.Now().Add(want)) {
			t.Errorf("%q: it ends %s after it began, want %s", told, end.Sub(began), want)
		}
	}
}
