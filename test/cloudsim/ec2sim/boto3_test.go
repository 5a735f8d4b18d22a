package ec2sim_test

import (
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/boto3"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

func TestBoto3Agrees(t *testing.T) {
	// Fast, but for the moment in which an instance isn't found.
	s := open(t, ec2sim.Options{Speed: 3000, HiddenAtLeast: 200 * time.Millisecond, NoBuckets: true})
	throttled := open(t, ec2sim.Options{})
	denying := open(t, ec2sim.Options{})
	denying.Deny("ec2:DescribeVpcs", "sts:GetCallerIdentity", "ssm:GetParameter", "scheduler:ListSchedules", "monitoring:GetMetricData")
	ahead := open(t, ec2sim.Options{Now: func() time.Time { return time.Now().Add(time.Hour) }})
	defer s.StockOut("us-east-1", "us-east-1b", "m7i.large")()
	defer s.StockOutAfterLaunch("us-east-1", "", "c7i.large")()
	s.SetQuota("us-east-1", ec2sim.Quotas{OnDemand: 8, Spot: 2})
	s.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		switch {
		case r.Region == "us-east-1" && r.Action == "DeleteVolume":
			return ec2sim.Intervention{Refuse: ec2sim.Unauthorized()}
		case r.Region == "us-east-1" && r.Action == "DescribeVpcs":
			return ec2sim.Intervention{Refuse: ec2sim.InternalError()}
		default:
			return ec2sim.Intervention{}
		}
	})
	check := boto3.Command(t.Context(), "testdata/boto3_check.py", s.url, throttled.url, denying.url, ahead.url, ec2sim.AccessKeyID, ec2sim.SecretAccessKey)
	output, err := check.CombinedOutput()
	if err != nil {
		t.Fatalf("boto3 does not agree (%v):\n%s", err, output)
	}
	served := map[string]bool{}
	for _, r := range s.Requests() {
		if r.Answer == "" {
			served[r.Service+":"+r.Action] = true
		}
	}
	for _, action := range s.Actions() {
		if !served[action] {
			t.Errorf("%s was never answered: the check lacks it", action)
		}
	}
}
