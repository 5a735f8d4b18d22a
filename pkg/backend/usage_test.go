package backend

import (
	"math"
	"testing"
	"time"
)

func TestAllocatedIsReservationTimesWholeSeconds(t *testing.T) {
	t.Parallel()
	from := time.Unix(1000, 0)
	for name, c := range map[string]struct {
		shape Shape
		to    time.Time
		want  [3]int64
	}{
		"ten seconds":        {Shape{CPU: 500, RAM: 64, Storage: 2}, from.Add(10 * time.Second), [3]int64{5000, 640, 20}},
		"a part is no whole": {Shape{CPU: 500, RAM: 64, Storage: 2}, from.Add(1999 * time.Millisecond), [3]int64{500, 64, 2}},
		"nothing":            {cube(5), from, [3]int64{}},
		"backwards":          {cube(5), from.Add(-time.Hour), [3]int64{}},
		"saturates":          {cube(math.MaxInt64), from.Add(time.Minute), [3]int64{math.MaxInt64, math.MaxInt64, math.MaxInt64}},
	} {
		var u Usage
		u.Allocated(c.shape, from, c.to)
		for i, m := range []*Measurement{u.CPUAllocated, u.RAMAllocated, u.StorageAllocated} {
			if m.Value != c.want[i] || m.Source != UsageAllocated || !m.From.Equal(from) || !m.To.Equal(c.to) {
				t.Errorf("%s: figure %d is %+v, want %d", name, i, m, c.want[i])
			}
		}
		if u.CPU != nil || u.RAMPeak != nil || u.NetworkSent != nil {
			t.Errorf("%s: what isn't known got a figure", name)
		}
	}
}
