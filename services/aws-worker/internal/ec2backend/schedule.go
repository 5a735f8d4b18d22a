package ec2backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/scheduler/types"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// terminateTarget is EventBridge Scheduler's universal target for EC2's
// TerminateInstances, in the partition of the role that calls it
// (https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-targets-universal.html).
func terminateTarget(role string) string {
	_, rest, _ := strings.Cut(role, ":")
	partition, _, _ := strings.Cut(rest, ":")
	return "arn:" + partition + ":scheduler:::aws-sdk:ec2:terminateInstances"
}

// codeScheduleInvalid is Scheduler's answer to a schedule that it can't make
// (pageScheduler).
const codeScheduleInvalid = "ValidationException"

// deadlinePlatform is the value of [Config.Deadline] with which a schedule of
// EventBridge's ends an instance, beside the timer in the guest.
const deadlinePlatform = "platform"

func (b *Backend) platformDeadline() bool { return b.config.Deadline == deadlinePlatform }

// arm makes the schedule that terminates an instance at its deadline and then
// deletes itself. That there is one already is fine: its name is the attempt's.
func (b *Backend) arm(ctx context.Context, r *region, id identity, instanceID string, at time.Time) error {
	input, err := json.Marshal(map[string][]string{"InstanceIds": {instanceID}})
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "render the schedule's input")
	}
	when := wholeSeconds(at).Format("2006-01-02T15:04:05")
	_, err = r.clients.scheduler.CreateSchedule(ctx, &scheduler.CreateScheduleInput{
		Name: aws.String(b.scheduleName(id)), GroupName: aws.String(b.config.ScheduleGroup), ClientToken: aws.String(b.token(id)),
		Description:                aws.String(fmt.Sprintf("Compute bridge %s: the deadline of %s, instance %s", b.env.BridgeID, b.instanceName(id), instanceID)),
		ScheduleExpression:         aws.String("at(" + when + ")"),
		ScheduleExpressionTimezone: aws.String("UTC"),
		FlexibleTimeWindow:         &types.FlexibleTimeWindow{Mode: types.FlexibleTimeWindowModeOff},
		ActionAfterCompletion:      types.ActionAfterCompletionDelete,
		Target:                     &types.Target{Arn: aws.String(terminateTarget(b.config.ScheduleRole)), RoleArn: aws.String(b.config.ScheduleRole), Input: aws.String(string(input))},
	})
	if _, exists := errors.AsType[*types.ConflictException](err); exists || err == nil {
		return nil
	}
	if _, missing := errors.AsType[*types.ResourceNotFoundException](err); missing {
		return backenderr.Wrap(backenderr.HostUnfit, err, "schedule group %q", b.config.ScheduleGroup)
	}
	if codeOf(err) == codeScheduleInvalid {
		// Nothing of the grant's is in it but a time: the role can't be assumed, or
		// is another account's.
		return backenderr.Wrap(backenderr.HostUnfit, classify(err, "schedule the end of the instance"), "schedule role %q", b.config.ScheduleRole)
	}
	return classify(err, "schedule the end of the instance")
}

// disarm deletes an attempt's schedule, if there is one.
func (b *Backend) disarm(ctx context.Context, r *region, id identity) error {
	_, err := r.clients.scheduler.DeleteSchedule(ctx, &scheduler.DeleteScheduleInput{
		Name: aws.String(b.scheduleName(id)), GroupName: aws.String(b.config.ScheduleGroup),
	})
	if _, gone := errors.AsType[*types.ResourceNotFoundException](err); gone || err == nil {
		return nil
	}
	return classify(err, "delete the schedule")
}

// readSchedules lists the attempts that have schedules in a region.
func (b *Backend) readSchedules(ctx context.Context, r *region) ([]identity, error) {
	var out []identity
	pages := scheduler.NewListSchedulesPaginator(r.clients.scheduler, &scheduler.ListSchedulesInput{
		GroupName: aws.String(b.config.ScheduleGroup), NamePrefix: aws.String(b.schedulePrefix()),
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err, "list the schedules in "+string(r.name))
		}
		for _, s := range page.Schedules {
			if id, ok := b.readScheduleName(aws.ToString(s.Name)); ok {
				out = append(out, id)
			}
		}
	}
	return out, nil
}
