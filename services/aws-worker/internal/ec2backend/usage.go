package ec2backend

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

const (
	// metricPeriod is that of EC2's basic monitoring.
	// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/manage-detailed-monitoring.html
	metricPeriod = 5 * time.Minute
	// maxMetrics is how many one GetMetricData call may ask for (pageMetrics).
	maxMetrics = 500
	// maxFigure is above what an instance can do in five minutes: 448 CPUs at 100 %
	// each, or 200 Gbit/s.
	maxFigure = 1 << 50
	// maxTotal fits into a figure of ours.
	maxTotal = 1 << 62
	// maxMetricAge is how long CloudWatch keeps periods of 5 minutes.
	// https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/cloudwatch_concepts.html
	maxMetricAge = 63 * 24 * time.Hour
)

// metric is a figure that CloudWatch has of each instance.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/viewing_metrics_with_cloudwatch.html
type metric struct {
	name, statistic string
	set             func(*backend.Usage, *backend.Measurement)
}

var metrics = []metric{
	{"CPUUtilization", "Average", func(u *backend.Usage, m *backend.Measurement) { u.CPU = m }},
	{"NetworkIn", "Sum", func(u *backend.Usage, m *backend.Measurement) { u.NetworkReceived = m }},
	{"NetworkOut", "Sum", func(u *backend.Usage, m *backend.Measurement) { u.NetworkSent = m }},
	// Of the instance, on Nitro.
	{"EBSReadBytes", "Sum", func(u *backend.Usage, m *backend.Measurement) { u.DiskRead = m }},
	{"EBSWriteBytes", "Sum", func(u *backend.Usage, m *backend.Measurement) { u.DiskWritten = m }},
}

// usageQuery is one instance's question.
type usageQuery struct {
	instanceID string
	// cpus of its type; zero if unknown, and then its CPU time is unknown, too.
	cpus     int64
	from, to time.Time
}

// usage returns what CloudWatch measured of an instance between two times. Each
// figure says which part of it it covers: CloudWatch lags by minutes. What it
// has no figure for is nil.
func (r *regionClients) usage(ctx context.Context, instanceID string, cpus int64, from, to time.Time) (backend.Usage, error) {
	all, err := r.usages(ctx, []usageQuery{{instanceID: instanceID, cpus: cpus, from: from, to: to}})
	if err != nil {
		return backend.Usage{}, err
	}
	return all[0], nil
}

// usages is usage for many instances with as few calls as possible. The answers
// are in the order of the questions.
func (r *regionClients) usages(ctx context.Context, queries []usageQuery) ([]backend.Usage, error) {
	if r.metricsTimeout > 0 {
		bounded, cancel := context.WithTimeout(ctx, r.metricsTimeout)
		defer cancel()
		ctx = bounded
	}
	out := make([]backend.Usage, 0, len(queries))
	for batch := range slices.Chunk(queries, maxMetrics/len(metrics)) {
		points, err := r.points(ctx, batch)
		if err != nil {
			return nil, err
		}
		now := time.Now()
		for i, q := range batch {
			var u backend.Usage
			for j, m := range metrics {
				m.set(&u, measurement(m, q, points[queryID(i, j)], now))
			}
			out = append(out, u)
		}
	}
	return out, nil
}

// queryID names a question within a call: lower case first.
func queryID(instance, metric int) string { return fmt.Sprintf("q%d_%d", instance, metric) }

// points reads the raw figures of up to maxMetrics metrics.
func (r *regionClients) points(ctx context.Context, batch []usageQuery) (map[string]map[time.Time]float64, error) {
	from, to := batch[0].from, batch[0].to
	input := &cloudwatch.GetMetricDataInput{ScanBy: types.ScanByTimestampAscending}
	for i, q := range batch {
		if q.from.Before(from) {
			from = q.from
		}
		if q.to.After(to) {
			to = q.to
		}
		for j, m := range metrics {
			input.MetricDataQueries = append(input.MetricDataQueries, types.MetricDataQuery{
				Id: aws.String(queryID(i, j)),
				MetricStat: &types.MetricStat{
					Metric: &types.Metric{
						Namespace: aws.String("AWS/EC2"), MetricName: aws.String(m.name),
						Dimensions: []types.Dimension{{Name: aws.String("InstanceId"), Value: aws.String(q.instanceID)}},
					},
					Period: aws.Int32(int32(metricPeriod / time.Second)), Stat: aws.String(m.statistic),
				},
			})
		}
	}
	if oldest := to.Add(-maxMetricAge); from.Before(oldest) {
		from = oldest
	}
	// Whole periods: AWS advises it, and answers are the same each time.
	input.StartTime = aws.Time(from.UTC().Truncate(metricPeriod))
	input.EndTime = aws.Time(to.UTC().Add(metricPeriod - 1).Truncate(metricPeriod))
	out := map[string]map[time.Time]float64{}
	pages := cloudwatch.NewGetMetricDataPaginator(r.metrics, input)
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "read usage from CloudWatch in "+r.name)
		}
		for _, result := range page.MetricDataResults {
			id := aws.ToString(result.Id)
			if out[id] == nil {
				out[id] = map[time.Time]float64{}
			}
			for k := range min(len(result.Timestamps), len(result.Values)) {
				out[id][result.Timestamps[k].UTC()] = result.Values[k]
			}
		}
	}
	return out, nil
}

// measurement sums the points of one metric. It covers the time from the first
// point to the first gap: later points would add to the figure, but nobody could
// say what time it is for. A period that isn't over, or of which CloudWatch may
// still get more, counts only if the instance's time ended in it.
func measurement(m metric, q usageQuery, points map[time.Time]float64, now time.Time) *backend.Measurement {
	if m.statistic == "Average" && q.cpus <= 0 {
		return nil
	}
	starts := make([]time.Time, 0, len(points))
	for at := range points {
		starts = append(starts, at)
	}
	slices.SortFunc(starts, time.Time.Compare)
	out := &backend.Measurement{Source: backend.UsageProviderMonitoring}
	var sum float64
	for _, start := range starts {
		end := start.Add(metricPeriod)
		if end.After(now) || !end.After(q.from) || !start.Before(q.to) || !q.from.Before(q.to) {
			continue
		}
		if value := points[start]; !(value >= 0 && value < maxFigure) {
			break // not a figure
		}
		if out.To.IsZero() {
			out.From = later(start, q.from)
		} else if !start.Equal(out.To) {
			break
		}
		covered := earlier(end, q.to).Sub(later(start, q.from))
		if m.statistic == "Average" {
			sum += points[start] / 100 * float64(q.cpus) * float64(covered/time.Millisecond)
		} else {
			sum += points[start]
		}
		out.To = end
	}
	if out.To.IsZero() {
		return nil
	}
	out.To = earlier(out.To, q.to)
	out.From, out.To = out.From.UTC(), out.To.UTC()
	out.Value = int64(min(sum, maxTotal))
	return out
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
