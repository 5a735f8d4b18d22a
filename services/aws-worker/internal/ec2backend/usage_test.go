package ec2backend

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

func TestAFigureSaysWhichTimeItCovers(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	at := func(minutes float64) time.Time { return start.Add(time.Duration(minutes * float64(time.Minute))) }
	average, sum := metrics[0], metrics[1]
	for _, test := range []struct {
		name     string
		metric   metric
		from, to float64         // the instance's time, in minutes
		now      float64         // when it is asked
		points   map[int]float64 // by minute
		want     *backend.Measurement
	}{
		{"whole periods", sum, 0, 10, 60, map[int]float64{0: 100, 5: 200}, &backend.Measurement{Value: 300, From: at(0), To: at(10)}},
		{"begun within one", sum, 2, 10, 60, map[int]float64{0: 100, 5: 200}, &backend.Measurement{Value: 300, From: at(2), To: at(10)}},
		{"ended within one", sum, 0, 7, 60, map[int]float64{0: 100, 5: 200}, &backend.Measurement{Value: 300, From: at(0), To: at(7)}},
		{"not all there yet", sum, 0, 20, 21, map[int]float64{0: 100, 5: 200}, &backend.Measurement{Value: 300, From: at(0), To: at(10)}},
		{"a period that isn't over", sum, 0, 12, 12, map[int]float64{0: 100, 5: 200, 10: 50}, &backend.Measurement{Value: 300, From: at(0), To: at(10)}},
		{"only later ones", sum, 0, 15, 60, map[int]float64{10: 7}, &backend.Measurement{Value: 7, From: at(10), To: at(15)}},
		{"up to a gap", sum, 0, 20, 60, map[int]float64{0: 100, 5: 200, 15: 400}, &backend.Measurement{Value: 300, From: at(0), To: at(10)}},
		{"another's", sum, 10, 20, 60, map[int]float64{0: 100, 5: 200, 20: 400}, nil},
		{"none", sum, 0, 20, 60, nil, nil},
		// Two CPUs at 50 % for 10 minutes, and at 100 % for 5.
		{"CPU time", average, 0, 15, 60, map[int]float64{0: 50, 5: 50, 10: 100}, &backend.Measurement{Value: (600 + 600) * 1000, From: at(0), To: at(15)}},
		{"CPU time of a part", average, 4, 6, 60, map[int]float64{0: 100, 5: 50}, &backend.Measurement{Value: (120 + 60) * 1000, From: at(4), To: at(6)}},
	} {
		points := map[time.Time]float64{}
		for minute, value := range test.points {
			points[at(float64(minute))] = value
		}
		if test.want != nil {
			test.want.Source = backend.UsageProviderMonitoring
		}
		got := measurement(test.metric, usageQuery{cpus: 2, from: at(test.from), to: at(test.to)}, points, at(test.now))
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", test.name, diff)
		}
	}
	if got := measurement(average, usageQuery{from: at(0), to: at(5)}, map[time.Time]float64{at(0): 100}, at(60)); got != nil {
		t.Errorf("CPU time of a type that nobody knows: %+v", got)
	}
}

func FuzzFigures(f *testing.F) {
	f.Add(int64(0), int64(900), int64(3600), int64(300), 50.0, 60.0)
	f.Add(int64(-7), int64(10), int64(20), int64(0), math.NaN(), math.Inf(1))
	f.Add(int64(100), int64(50), int64(20), int64(-300), -1.0, 1e300)
	f.Fuzz(func(t *testing.T, from, to, now, second int64, a, b float64) {
		const most = 1 << 40 // seconds; times beyond are nobody's
		for _, n := range []int64{from, to, now, second} {
			if n < -most || n > most {
				return
			}
		}
		q := usageQuery{cpus: 4, from: time.Unix(from, 0), to: time.Unix(to, 0)}
		points := map[time.Time]float64{time.Unix(0, 0): a, time.Unix(second, 0): b}
		for _, m := range metrics {
			got := measurement(m, q, points, time.Unix(now, 0))
			if got == nil {
				continue
			}
			if got.Value < 0 || got.From.Before(q.from) || got.To.After(q.to) || !got.From.Before(got.To) || got.To.After(time.Unix(now, 0)) {
				t.Errorf("%s from %s to %s: %+v", m.name, q.from, q.to, got)
			}
		}
	})
}

// planted is an instance with figures of its own for a quarter of an hour.
func planted(t *testing.T, cloud *ec2sim.Cloud, start time.Time) string {
	t.Helper()
	id, err := cloud.Plant(testRegion, map[string]string{tagBridge: "test"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		at := start.Add(time.Duration(i) * metricPeriod)
		for _, f := range []struct {
			name  string
			value float64
		}{{"CPUUtilization", 50}, {"NetworkIn", 10}, {"NetworkOut", 20}, {"EBSReadBytes", 30}, {"EBSWriteBytes", 40}} {
			cloud.Record(id, f.name, at, f.value)
		}
	}
	return id
}

func TestUsageIsReadFromCloudWatch(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	start := time.Now().UTC().Add(-time.Hour).Truncate(metricPeriod)
	id := planted(t, cloud, start)
	r := openClients(t, c).order[0]
	got, err := r.usage(t.Context(), id, 2, start, start.Add(3*metricPeriod))
	if err != nil {
		t.Fatal(err)
	}
	measured := func(value int64) *backend.Measurement {
		return &backend.Measurement{Value: value, Source: backend.UsageProviderMonitoring, From: start, To: start.Add(3 * metricPeriod)}
	}
	want := backend.Usage{
		CPU: measured(900_000), NetworkReceived: measured(30), NetworkSent: measured(60), DiskRead: measured(90), DiskWritten: measured(120),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// Of an instance without figures nothing is known; that isn't zero.
	none, err := r.usage(t.Context(), "i-0123456789abcdef0", 2, start, start.Add(3*metricPeriod))
	if err != nil || none != (backend.Usage{}) {
		t.Errorf("%+v, %v", none, err)
	}
}

func TestManyInstancesTakeFewCalls(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	start := time.Now().UTC().Add(-time.Hour).Truncate(metricPeriod)
	last := planted(t, cloud, start)
	var queries []usageQuery
	for i := range 149 {
		queries = append(queries, usageQuery{instanceID: fmt.Sprintf("i-%017x", i), cpus: 2, from: start, to: start.Add(3 * metricPeriod)})
	}
	queries = append(queries, usageQuery{instanceID: last, cpus: 2, from: start, to: start.Add(3 * metricPeriod)})
	cloud.ForgetRequests()
	got, err := openClients(t, c).order[0].usages(t.Context(), queries)
	if err != nil || len(got) != len(queries) {
		t.Fatalf("%d answers, %v", len(got), err)
	}
	if n := len(cloud.Requests()); n != 2 {
		t.Errorf("%d calls for 150 instances, want 2", n)
	}
	if u := got[149]; u.NetworkSent == nil || u.NetworkSent.Value != 60 || got[0] != (backend.Usage{}) {
		t.Errorf("the last: %+v, the first: %+v", u, got[0])
	}
}

func TestNobodyWaitsLongForUsage(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	c.MetricsTimeout.Duration = 50 * time.Millisecond
	hold := make(chan struct{})
	cloud.Intercept(func(ec2sim.Request) ec2sim.Intervention {
		return ec2sim.Intervention{After: func() (lost bool) {
			<-hold
			return false
		}}
	})
	defer close(hold)
	now := time.Now()
	_, err := openClients(t, c).order[0].usage(t.Context(), "i-0123456789abcdef0", 2, now.Add(-time.Hour), now)
	if !backenderr.Is(err, backenderr.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
