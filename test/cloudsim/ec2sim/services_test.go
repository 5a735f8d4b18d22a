package ec2sim_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	metrics "github.com/aws/aws-sdk-go-v2/service/cloudwatch/types"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	schedules "github.com/aws/aws-sdk-go-v2/service/scheduler/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

func TestTheCallerIsTheAccounts(t *testing.T) {
	s := open(t, ec2sim.Options{})
	who, err := sts.NewFromConfig(s.aws).GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
	if err != nil || *who.Account != ec2sim.Account || *who.Arn != ec2sim.Caller {
		t.Errorf("the caller is %v, %v", who, err)
	}
}

// schedule is a one-shot that terminates an instance.
func schedule(name, instance string, at time.Time, changes ...func(*scheduler.CreateScheduleInput)) *scheduler.CreateScheduleInput {
	input := &scheduler.CreateScheduleInput{
		Name: &name, ScheduleExpression: aws.String("at(" + at.UTC().Format("2006-01-02T15:04:05") + ")"),
		FlexibleTimeWindow: &schedules.FlexibleTimeWindow{Mode: schedules.FlexibleTimeWindowModeOff},
		Target: &schedules.Target{
			Arn: aws.String(ec2sim.TerminateTarget), RoleArn: aws.String("arn:aws:iam::" + ec2sim.Account + ":role/scheduler"),
			Input: aws.String(fmt.Sprintf(`{"InstanceIds":[%q]}`, instance)),
		},
		ActionAfterCompletion: schedules.ActionAfterCompletionDelete,
	}
	for _, change := range changes {
		change(input)
	}
	return input
}

func TestAScheduleTerminatesItsInstance(t *testing.T) {
	s := open(t, ec2sim.Options{})
	client := scheduler.NewFromConfig(s.aws)
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	_, err := client.CreateSchedule(t.Context(), schedule("cb-1", id, time.Now().Add(2*time.Second)))
	wantCode(t, err, "")
	got, err := client.GetSchedule(t.Context(), &scheduler.GetScheduleInput{Name: aws.String("cb-1")})
	if err != nil || *got.Target.Arn != ec2sim.TerminateTarget || got.ActionAfterCompletion != schedules.ActionAfterCompletionDelete {
		t.Errorf("it is %+v, %v", got, err)
	}
	all := s.Schedules()
	if len(all) != 1 || time.Until(all[0].At) > 2*time.Second || !all[0].DeleteAfter {
		t.Errorf("there is %+v", all)
	}
	s.until(t, id, ec2sim.StateTerminated)
	if time.Now().Before(all[0].At) {
		t.Error("the instance ended before it was due")
	}
	eventually(t, "the schedule is gone", func() bool { return len(s.Schedules()) == 0 })
	for _, r := range s.Requests() {
		if r.Service == "scheduler" && (len(r.Grants) != 1 || r.Grants[0] != grant) {
			t.Errorf("%s is for %v", r.Action, r.Grants)
		}
	}
}

func TestSchedulesAreRefused(t *testing.T) {
	s := open(t, ec2sim.Options{})
	client := scheduler.NewFromConfig(s.aws)
	later := time.Now().Add(time.Hour)
	_, err := client.CreateSchedule(t.Context(), schedule("taken", "i-00000000000000000", later))
	wantCode(t, err, "")
	for _, c := range []struct {
		name, code string
		input      *scheduler.CreateScheduleInput
	}{
		{"the same name", "ConflictException", schedule("taken", "i-00000000000000000", later)},
		{"no such group", "ResourceNotFoundException", schedule("a", "i-1", later, func(i *scheduler.CreateScheduleInput) { i.GroupName = aws.String("g") })},
		{"no name", "ValidationException", schedule("a b", "i-1", later)},
		{"no time", "ValidationException", schedule("a", "i-1", later, func(i *scheduler.CreateScheduleInput) { i.ScheduleExpression = aws.String("at(noon)") })},
		{"no role", "ValidationException", schedule("a", "i-1", later, func(i *scheduler.CreateScheduleInput) { i.Target.RoleArn = aws.String("me") })},
		{"no target", "ValidationException", schedule("a", "i-1", later, func(i *scheduler.CreateScheduleInput) { i.Target.Arn = aws.String("arn:aws:sqs:q") })},
		{"no input", "ValidationException", schedule("a", "i-1", later, func(i *scheduler.CreateScheduleInput) { i.Target.Input = aws.String(`{"Ids":[]}`) })},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := client.CreateSchedule(t.Context(), c.input)
			wantCode(t, err, c.code)
		})
	}
	list, err := client.ListSchedules(t.Context(), &scheduler.ListSchedulesInput{NamePrefix: aws.String("ta"), MaxResults: aws.Int32(1)})
	if err != nil || len(list.Schedules) != 1 || *list.Schedules[0].Name != "taken" {
		t.Errorf("listed %v, %v", list, err)
	}
	remove := func() error {
		_, err := client.DeleteSchedule(t.Context(), &scheduler.DeleteScheduleInput{Name: aws.String("taken"), GroupName: aws.String("default")})
		return err
	}
	wantCode(t, remove(), "")
	wantCode(t, remove(), "ResourceNotFoundException")
	_, err = client.GetSchedule(t.Context(), &scheduler.GetScheduleInput{Name: aws.String("taken")})
	wantCode(t, err, "ResourceNotFoundException")
}

// metricsOf asks for an instance's sum of a metric by the minute.
func metricsOf(instance, metric string, from time.Time) *cloudwatch.GetMetricDataInput {
	return &cloudwatch.GetMetricDataInput{
		StartTime: &from, EndTime: aws.Time(time.Now().Add(time.Hour)), ScanBy: metrics.ScanByTimestampAscending,
		MetricDataQueries: []metrics.MetricDataQuery{{Id: aws.String("m0"), MetricStat: &metrics.MetricStat{
			Metric: &metrics.Metric{
				Namespace: aws.String("AWS/EC2"), MetricName: &metric,
				Dimensions: []metrics.Dimension{{Name: aws.String("InstanceId"), Value: &instance}},
			},
			Period: aws.Int32(60), Stat: aws.String("Sum"),
		}}},
	}
}

func TestFiguresComeLate(t *testing.T) {
	s := open(t, ec2sim.Options{Speed: 3000})
	client := cloudwatch.NewFromConfig(s.aws)
	id := s.launch(t, order("one"))
	s.until(t, id, ec2sim.StateRunning)
	var sum float64
	eventually(t, "figures come", func() bool {
		answer, err := client.GetMetricData(t.Context(), metricsOf(id, "NetworkOut", time.Now().Add(-time.Hour)))
		if err != nil {
			t.Fatal(err)
		}
		for _, value := range answer.MetricDataResults[0].Values {
			sum += value
		}
		return sum > 0
	})
	if at := s.Instances()[0].Launched; time.Since(at) < 100*time.Millisecond {
		t.Error("the first figure came before its time had passed")
	}
	answer, err := client.GetMetricData(t.Context(), metricsOf(id, "NoSuchMetric", time.Now().Add(-time.Hour)))
	if err != nil || len(answer.MetricDataResults) != 1 || len(answer.MetricDataResults[0].Values) != 0 ||
		answer.MetricDataResults[0].StatusCode != metrics.StatusCodeComplete {
		t.Errorf("an unknown metric is %+v, %v", answer, err)
	}
}

func TestRecordedFiguresAreAddedUpByPeriod(t *testing.T) {
	s := open(t, ec2sim.Options{})
	client := cloudwatch.NewFromConfig(s.aws)
	id := s.launch(t, order("one"))
	start := time.Now().Truncate(time.Minute).Add(-10 * time.Minute)
	for second, value := range []float64{1, 2, 4} {
		s.Record(id, "EBSReadBytes", start.Add(time.Duration(second*45)*time.Second), value)
	}
	input := metricsOf(id, "EBSReadBytes", start)
	answer, err := client.GetMetricData(t.Context(), input)
	if err != nil {
		t.Fatal(err)
	}
	r := answer.MetricDataResults[0]
	if fmt.Sprint(r.Values) != "[3 4]" || !r.Timestamps[0].Equal(start) || *r.Id != "m0" || *r.Label != "EBSReadBytes" {
		t.Errorf("the sums are %v at %v", r.Values, r.Timestamps)
	}
	input.MaxDatapoints = aws.Int32(1)
	pages := cloudwatch.NewGetMetricDataPaginator(client, input)
	var values []float64
	for pages.HasMorePages() {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, page.MetricDataResults[0].Values...)
	}
	if fmt.Sprint(values) != "[3 4]" {
		t.Errorf("the sums by page are %v", values)
	}
	input = metricsOf(id, "EBSReadBytes", start)
	input.EndTime = &start
	_, err = client.GetMetricData(t.Context(), input)
	wantCode(t, err, "ValidationError")
	input = metricsOf(id, "EBSReadBytes", start)
	input.NextToken = aws.String("?")
	_, err = client.GetMetricData(t.Context(), input)
	wantCode(t, err, "InvalidNextToken")
}
