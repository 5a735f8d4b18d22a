package ec2backend

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	smithy "github.com/aws/smithy-go"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// refusal is an answer with an error in the words of a service.
type refusal struct {
	status  int
	code    string
	message string
}

// refusing is a cloud whose every service refuses with what the channel of
// refusals says next.
func refusing(t *testing.T) (*regionClients, func(refusal)) {
	t.Helper()
	var now refusal
	r := oneRegion(t, func(w http.ResponseWriter, request *http.Request) {
		_, _ = io.Copy(io.Discard, request.Body)
		switch {
		case request.Header.Get("X-Amz-Target") != "": // SSM's JSON
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(now.status)
			fmt.Fprintf(w, `{"__type":"com.amazonaws.ssm#%s","message":%q}`, now.code, now.message)
		case strings.HasPrefix(request.URL.Path, "/schedules"): // Scheduler's REST
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("X-Amzn-Errortype", now.code)
			w.WriteHeader(now.status)
			fmt.Fprintf(w, `{"Message":%q}`, now.message)
		default:
			refuse(w, now.status, now.code, now.message)
		}
	})
	return r, func(next refusal) { now = next }
}

// Each row goes over the wire and through the SDK, in the protocol of the
// service that documents it.
func TestEveryVendorErrorHasItsReason(t *testing.T) {
	t.Parallel()
	r, next := refusing(t)
	for _, row := range vendorErrors {
		// The statuses that the services use; the code decides.
		status := http.StatusBadRequest
		if row.effect == unclear && row.reason == backenderr.ProviderUnavailable || row.code == "InsufficientInstanceCapacity" {
			status = http.StatusInternalServerError
		}
		if row.code == "RequestLimitExceeded" {
			status = http.StatusServiceUnavailable
		}
		next(refusal{status, row.code, "in AWS's words"})
		var err error
		switch row.page {
		case pageSSM, pageSSMCommon:
			_, err = r.ssm.GetParameter(t.Context(), &ssm.GetParameterInput{Name: aws.String("/x")})
		case pageScheduler:
			_, err = r.scheduler.GetSchedule(t.Context(), &scheduler.GetScheduleInput{Name: aws.String("x")})
		default:
			_, err = r.ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1), ClientToken: aws.String("t")})
		}
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
	r, next := refusing(t)
	for _, test := range []struct {
		name    string
		answer  refusal
		reason  backenderr.Reason
		refused bool
	}{
		{"a new refusal", refusal{400, "InvalidMoonPhase", "not today"}, backenderr.Unknown, true},
		{"a new fault", refusal{500, "MoonFell", "sorry"}, backenderr.ProviderUnavailable, false},
		{"a proxy's fault", refusal{502, "", ""}, backenderr.ProviderUnavailable, false},
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
