package worker

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

// Two processes may end one grant, a worker and the janitor. The one that comes
// late finds less on the host, and must not replace what the other has saved.
func TestASavedLogGivesWayOnlyToOneThatSaysMore(t *testing.T) {
	t.Parallel()
	id := backend.GrantID{1}
	full := backend.ComputeLog{GrantID: id, Attempt: 1, InstanceID: "full", StartedAt: time.Unix(1000, 0).UTC()}
	partial := full
	partial.InstanceID, partial.Partial = "partial", true
	again := full
	again.InstanceID = "full again"
	next := partial
	next.InstanceID, next.Attempt = "partial of the next attempt", 2
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		s.attempt(id)
		other := *s.journal // of another process
		for _, c := range []struct {
			by   *journal
			save backend.ComputeLog
			want backend.ComputeLog
		}{
			{s.journal, partial, partial},
			{&other, full, full},
			{s.journal, partial, full},
			{s.journal, again, again},
			{&other, next, next},
			{s.journal, full, next},
		} {
			<-time.After(time.Second)
			if err := c.by.SaveLog(t.Context(), c.save); err != nil {
				t.Fatalf("save %q: %v", c.save.InstanceID, err)
			}
			got, err := s.journal.SavedLog(t.Context(), id)
			if err != nil || got == nil || got.InstanceID != c.want.InstanceID || got.Partial != c.want.Partial {
				t.Errorf("after saving %q: %+v, %v; want %q", c.save.InstanceID, got, err, c.want.InstanceID)
			}
		}
	})
}
