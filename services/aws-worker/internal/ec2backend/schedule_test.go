package ec2backend

import (
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// A role that Scheduler can't assume is the operator's to mend: another grant
// would fare no better.
func TestAScheduleThatCantBeMadeIsTheWorkersFault(t *testing.T) {
	t.Parallel()
	const role = "arn:aws:iam::123456789012:role/not-for-schedules"
	s, b := openBridge(t, func(c *Config) { c.Deadline, c.ScheduleRole = deadlinePlatform, role })
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action == "CreateSchedule" {
			return ec2sim.Intervention{Refuse: &ec2sim.Error{
				Status: 400, Code: codeScheduleInvalid, Message: "The execution role you provide must allow AWS EventBridge Scheduler to assume the role.",
			}}
		}
		return ec2sim.Intervention{}
	})
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	s.cloud.Cloud.Intercept(nil)
	if !backenderr.Is(err, backenderr.HostUnfit) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Fatalf("%v, created %s", err, backenderr.CreatedOf(err))
	}
	for _, want := range []string{role, "to assume the role"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't say %q", err, want)
		}
	}
}

func TestSchedulesCallEC2InTheirRolesPartition(t *testing.T) {
	t.Parallel()
	for role, want := range map[string]string{
		"arn:aws:iam::123456789012:role/x":        ec2sim.TerminateTarget,
		"arn:aws-cn:iam::123456789012:role/x":     "arn:aws-cn:scheduler:::aws-sdk:ec2:terminateInstances",
		"arn:aws-us-gov:iam::123456789012:role/x": "arn:aws-us-gov:scheduler:::aws-sdk:ec2:terminateInstances",
	} {
		if got := terminateTarget(role); got != want {
			t.Errorf("%s: %s, want %s", role, got, want)
		}
	}
}
