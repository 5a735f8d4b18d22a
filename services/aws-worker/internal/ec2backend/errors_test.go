package ec2backend

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	cwtypes "github.com/aws/aws-sdk-go-v2/service/cloudwatch/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	smithy "github.com/aws/smithy-go"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/boto3"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// refusing is a simulated cloud whose every service refuses with what the function
// was told last.
func refusing(t *testing.T) (clients *regionClients, url string, next func(ec2sim.Error)) {
	t.Helper()
	cloud, c := simulated(t, ec2sim.Options{})
	var now atomic.Pointer[ec2sim.Error]
	cloud.Intercept(func(ec2sim.Request) ec2sim.Intervention { return ec2sim.Intervention{Refuse: now.Load()} })
	return openClients(t, c).order[0], c.Endpoint, func(e ec2sim.Error) { now.Store(&e) }
}

// answer is how the service that documents a row says it.
func (v vendorError) answer() (service string, e ec2sim.Error) {
	e = ec2sim.Error{Status: http.StatusBadRequest, Code: v.code, Message: "in AWS's words"}
	// The statuses that the services use; the code decides.
	switch {
	case v.effect == unclear && v.reason == backenderr.ProviderUnavailable, v.code == "InsufficientInstanceCapacity":
		e.Status = http.StatusInternalServerError
	case v.code == "RequestLimitExceeded":
		e.Status = http.StatusServiceUnavailable
	}
	switch v.page {
	case pageSSM, pageSSMCommon:
		return "ssm", e
	case pageScheduler:
		return "scheduler", e
	case pageSTS:
		return "sts", e
	case pageMetrics:
		return "cloudwatch", e
	default:
		return "ec2", e
	}
}

// Each row goes over the wire and through the SDK, in the protocol of the
// service that documents it.
func TestEveryVendorErrorHasItsReason(t *testing.T) {
	t.Parallel()
	r, _, next := refusing(t)
	calls := map[string]func() error{
		"ec2": func() error {
			_, err := r.ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1), ClientToken: aws.String("t")})
			return err
		},
		"sts": func() error {
			_, err := r.sts.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
			return err
		},
		"ssm": func() error {
			_, err := r.ssm.GetParameter(t.Context(), &ssm.GetParameterInput{Name: aws.String("/x")})
			return err
		},
		"scheduler": func() error {
			_, err := r.scheduler.GetSchedule(t.Context(), &scheduler.GetScheduleInput{Name: aws.String("x")})
			return err
		},
		"cloudwatch": func() error {
			now := time.Now()
			_, err := r.metrics.GetMetricData(t.Context(), &cloudwatch.GetMetricDataInput{
				StartTime: aws.Time(now.Add(-time.Hour)), EndTime: aws.Time(now), MetricDataQueries: []cwtypes.MetricDataQuery{{Id: aws.String("m0")}},
			})
			return err
		},
	}
	for _, row := range vendorErrors {
		service, answer := row.answer()
		next(answer)
		err := calls[service]()
		got := classify(err, "create")
		if got == nil || got.Reason != row.reason || got.RetryAfter != row.retry {
			t.Errorf("%s: %v, retry after %v; want %s, %s", row.code, backenderr.ReasonOf(got), got, row.reason, row.retry)
			continue
		}
		if codeOf(got) != row.code {
			t.Errorf("%s: the classified error has the code %q", row.code, codeOf(got))
		}
		if refused(err) == (row.effect == unclear) || refused(got) != refused(err) {
			t.Errorf("%s: refused: %t, and %t when classified", row.code, refused(err), refused(got))
		}
		if !strings.HasPrefix(got.Error(), "create: "+row.code+": in AWS's words") {
			t.Errorf("%s: says %q", row.code, got)
		}
	}
}

// What the simulated cloud refuses with, another official client reads as the same
// code, status and message.
func TestBoto3ReadsEveryVendorError(t *testing.T) {
	t.Parallel()
	_, url, next := refusing(t)
	check := boto3.Command(t.Context(), "testdata/boto3_errors.py", url, ec2sim.AccessKeyID, ec2sim.SecretAccessKey)
	var complaints strings.Builder
	check.Stderr = &complaints
	ask, err := check.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := check.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := check.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(output)
	for _, row := range vendorErrors {
		service, answer := row.answer()
		next(answer)
		if _, err := fmt.Fprintln(ask, service); err != nil || !lines.Scan() {
			t.Errorf("%s: boto3 says nothing: %v", row.code, errors.Join(err, lines.Err()))
			break
		}
		if want := fmt.Sprintf("%d %s %s", answer.Status, answer.Code, answer.Message); lines.Text() != want {
			t.Errorf("%s: boto3 reads %q, want %q", service, lines.Text(), want)
		}
	}
	if err := errors.Join(ask.Close(), check.Wait()); err != nil {
		t.Errorf("%v\n%s", err, &complaints)
	}
}

// What the rows must be like, whatever they say.
func TestTheTableOfErrorsIsSound(t *testing.T) {
	t.Parallel()
	for name, table := range map[string][]vendorError{"codes": vendorErrors, "state reasons": stateReasons} {
		seen := map[string]bool{}
		for _, row := range table {
			if seen[row.code] {
				t.Errorf("%s: %s is there twice", name, row.code)
			}
			seen[row.code] = true
			if !strings.HasPrefix(row.page, "https://docs.aws.amazon.com/") {
				t.Errorf("%s: %s has no page of AWS's", name, row.code)
			}
			if row.effect == capacity && row.reason != backenderr.CapacityExhausted {
				t.Errorf("%s: %s is a stock-out with the reason %s", name, row.code, row.reason)
			}
			patience := slices.Contains([]backenderr.Reason{backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.ProviderUnavailable}, row.reason)
			if patience != (row.retry > 0) {
				t.Errorf("%s: %s with %s says to try again after %s", name, row.code, row.reason, row.retry)
			}
		}
	}
}

func TestWhatTheTableDoesntHave(t *testing.T) {
	t.Parallel()
	r, _, next := refusing(t)
	for _, test := range []struct {
		name    string
		answer  ec2sim.Error
		reason  backenderr.Reason
		refused bool
	}{
		{"a new refusal", ec2sim.Error{Status: 400, Code: "InvalidMoonPhase", Message: "not today"}, backenderr.Unknown, true},
		{"a new fault", ec2sim.Error{Status: 500, Code: "MoonFell", Message: "sorry"}, backenderr.ProviderUnavailable, false},
		{"a proxy's fault", ec2sim.Error{Status: 502, Code: "", Message: ""}, backenderr.ProviderUnavailable, false},
	} {
		next(test.answer)
		_, err := r.ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)})
		if got := classify(err, "create"); got == nil || got.Reason != test.reason || refused(err) != test.refused {
			t.Errorf("%s: %v, refused: %t; want %s, %t", test.name, got, refused(err), test.reason, test.refused)
		}
	}
	if got := classify(errors.New("a disk is full"), "write"); got.Reason != backenderr.Unknown || refused(got) {
		t.Errorf("a stranger: %v, refused: %t", got, refused(got))
	}
	if classify(nil, "nothing") != nil || refused(nil) {
		t.Error("no error is an error")
	}
}

// An error of a shared read goes to many, each of whom says more of it.
func TestOwnErrorsStayWhatTheyAre(t *testing.T) {
	t.Parallel()
	own := backenderr.New(backenderr.WorkerFull, "no room").WithRetryAfter(time.Second).WithMetadata("k", "v")
	got := classify(fmt.Errorf("around: %w", own), "create")
	if got.Reason != own.Reason || got.Error() != own.Error() || got.RetryAfter != time.Second || got.Metadata["k"] != "v" {
		t.Errorf("classified as %v", got)
	}
	_ = got.WithCreated(backenderr.CreatedUnknown).WithMetadata("k", "mine")
	if own.Created == backenderr.CreatedUnknown || own.Metadata["k"] != "v" {
		t.Errorf("what one says of it all others say, too: %+v", own)
	}
}

func TestAnAnswerThatCantBeReadIsUnclear(t *testing.T) {
	t.Parallel()
	r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<RunInstancesResponse><reserv") })
	_, err := r.ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)})
	if got := classify(err, "create"); got == nil || got.Reason != backenderr.ProviderUnavailable || refused(err) {
		t.Errorf("%v, refused: %t", got, refused(err))
	}
}

func TestEveryStateReasonHasItsReason(t *testing.T) {
	t.Parallel()
	for _, row := range stateReasons {
		// EC2's messages begin with the code, mostly.
		for _, message := range []string{row.code + ": in EC2's words", "in EC2's words"} {
			got := stateReasonError(row.code, message)
			if got.Reason != row.reason || got.RetryAfter != row.retry || got.Error() != "EC2 ended the instance: "+row.code+": in EC2's words" {
				t.Errorf("%s: %s after %s, %q", row.code, got.Reason, got.RetryAfter, got)
			}
		}
	}
	if got := stateReasonError("Server.MoonFell", "sorry"); got.Reason != backenderr.Unknown {
		t.Errorf("a new one: %v", got)
	}
	for _, own := range []string{"", codeOwnShutdown} {
		if got := stateReasonError(own, "it shut itself down"); got != nil {
			t.Errorf("%q: %v; its console says more", own, got)
		}
	}
}

func TestWhatIsntThereIsToldByItsCode(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]bool{
		"InvalidInstanceID.NotFound": true, "InvalidVolume.NotFound": true, "ResourceNotFoundException": true,
		"UnauthorizedOperation": false, "InvalidParameterValue": false,
	} {
		if got := notFound(&smithy.GenericAPIError{Code: code}); got != want {
			t.Errorf("%s: %t", code, got)
		}
	}
	if notFound(nil) {
		t.Error("no error is a missing resource")
	}
}
