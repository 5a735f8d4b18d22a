package backenderr_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// wireNames are the reasons of the contract, without their prefix.
func wireNames() []string {
	var names []string
	for number, name := range bridgev1.ErrorReason_name {
		if number != 0 {
			names = append(names, strings.TrimPrefix(name, "ERROR_REASON_"))
		}
	}
	return names
}

func TestReasonsAreThoseOfTheContract(t *testing.T) {
	t.Parallel()
	// From the contract to Go: every value has a code of its own choice.
	for _, name := range wireNames() {
		reason := backenderr.Reason(name)
		if got := reason.Proto(); got.String() != "ERROR_REASON_"+name {
			t.Errorf("%s becomes %s", name, got)
		}
		if reason != backenderr.Unknown && reason.Code() == codes.Unknown {
			t.Errorf("%s has no code", name)
		}
		if reason.Code() == codes.OK {
			t.Errorf("%s has code OK", name)
		}
	}
	// From Go to the contract.
	source, err := os.ReadFile("backenderr.go")
	if err != nil {
		t.Fatal(err)
	}
	declared := regexp.MustCompile(`(?m)^\t\w+\s+Reason = "(\w+)"$`).FindAllSubmatch(source, -1)
	if len(declared) != len(wireNames()) {
		t.Errorf("%d reasons in Go, %d in the contract", len(declared), len(wireNames()))
	}
	for _, m := range declared {
		if _, ok := bridgev1.ErrorReason_value["ERROR_REASON_"+string(m[1])]; !ok {
			t.Errorf("%s isn't in the contract", m[1])
		}
	}
	for _, reason := range []backenderr.Reason{"", "UNSPECIFIED", "BOGUS", "grant_ended"} {
		if reason.Code() != codes.Unknown || reason.Proto() != bridgev1.ErrorReason_ERROR_REASON_UNKNOWN {
			t.Errorf("%q isn't unknown", reason)
		}
	}
}

// The contract's comments name each reason's code.
func TestCodesAreThoseOfTheContract(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../../proto/computebridge/v1/error_reason.proto")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, m := range regexp.MustCompile(`((?:  //.*\n)+)  ERROR_REASON_(\w+) =`).FindAllSubmatch(source, -1) {
		reason := backenderr.Reason(m[2])
		if reason == "UNSPECIFIED" {
			continue
		}
		comment := strings.Join(strings.Fields(strings.ReplaceAll(string(m[1]), "//", " ")), " ")
		code := regexp.MustCompile(`Code ([A-Z_]+)`).FindStringSubmatch(comment)
		if code == nil {
			t.Errorf("the contract names no code for %s: %s", reason, comment)
			continue
		}
		found++
		if got := codeName(reason.Code()); got != code[1] {
			t.Errorf("%s has code %s, the contract says %s", reason, got, code[1])
		}
	}
	if found != len(wireNames()) {
		t.Errorf("read %d of %d reasons", found, len(wireNames()))
	}
}

// codeName is a code as google.rpc.Code writes it.
func codeName(c codes.Code) string {
	return strings.ToUpper(regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(strings.Replace(c.String(), "Canceled", "Cancelled", 1), "${1}_${2}"))
}

// wire sends an error over and back.
func wire(err error) *backenderr.Error { return backenderr.From(backenderr.Status(err).Err()) }

// facts are what has to come back.
type facts struct {
	Reason     backenderr.Reason
	Created    backenderr.Created
	RetryAfter time.Duration
	Violations []backenderr.Violation
	Metadata   map[string]string
	Text       string
}

func factsOf(e *backenderr.Error) facts {
	return facts{e.Reason, backenderr.CreatedOf(e), e.RetryAfter, e.Violations, e.Metadata, e.Error()}
}

func TestEverythingComesBackFromTheWire(t *testing.T) {
	t.Parallel()
	cases := []*backenderr.Error{
		backenderr.New(backenderr.CapacityExhausted, "zone %s is full", "a").WithCreated(backenderr.CreatedNone).WithRetryAfter(90*time.Second + time.Nanosecond),
		backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: "grant.shape", Description: "is odd"}, backenderr.Violation{Field: "grant.region"}),
		backenderr.New(backenderr.WorkloadFailed, "exited").WithConsole("panic: no\n").WithMetadata(backenderr.MetaBackend, "metal"),
		backenderr.Wrap(backenderr.ProviderUnavailable, errors.New("connection refused"), "dial host"),
		backenderr.New(backenderr.Internal, ""),
	}
	for _, name := range wireNames() {
		cases = append(cases, backenderr.New(backenderr.Reason(name), "text of %s", name))
	}
	for _, e := range cases {
		st := e.GRPCStatus()
		if st.Code() != e.Reason.Code() || st.Message() != e.Error() {
			t.Errorf("%s: status %s %q", e.Reason, st.Code(), st.Message())
		}
		if diff := cmp.Diff(factsOf(e), factsOf(wire(e))); diff != "" {
			t.Errorf("%s changed on its way:\n%s", e.Reason, diff)
		}
		// And through another process that passes it on.
		if diff := cmp.Diff(factsOf(e), factsOf(wire(wire(e)))); diff != "" {
			t.Errorf("%s changed on its second way:\n%s", e.Reason, diff)
		}
	}
}

func TestWrappersKeepTextAndFacts(t *testing.T) {
	t.Parallel()
	cause := errors.New("disk full")
	own := backenderr.Wrap(backenderr.HostUnfit, cause, "unpack image").WithCreated(backenderr.CreatedNone)
	err := fmt.Errorf("host %d: %w", 3, fmt.Errorf("provision: %w", own))
	if !errors.Is(err, cause) || backenderr.From(err) != own {
		t.Error("the chain is broken")
	}
	const text = "host 3: provision: unpack image: disk full"
	back := wire(err)
	if back.Reason != backenderr.HostUnfit || backenderr.CreatedOf(back) != backenderr.CreatedNone || back.Error() != text {
		t.Errorf("got %s %q", back.Reason, back)
	}
	// Of joined errors the first that is ours counts.
	joined := errors.Join(errors.New("first"), own)
	if got := wire(joined); got.Reason != backenderr.HostUnfit || !strings.Contains(got.Error(), "first") {
		t.Errorf("joined: %s %q", got.Reason, got)
	}
	// A status of ours in a wrapper, too.
	if got := backenderr.From(fmt.Errorf("call: %w", backenderr.Status(own).Err())); got.Reason != backenderr.HostUnfit {
		t.Errorf("a wrapped status: %s", got.Reason)
	}
}

func TestForeignErrors(t *testing.T) {
	t.Parallel()
	foreign := func(code codes.Code, details ...protoadapt.MessageV1) error {
		st, err := status.New(code, "from elsewhere").WithDetails(details...)
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	otherDomain := protoadapt.MessageV1Of(&errdetails.ErrorInfo{Domain: "example.com", Reason: "GRANT_ENDED", Metadata: map[string]string{"created": "none"}})
	newer := protoadapt.MessageV1Of(&errdetails.ErrorInfo{Domain: backenderr.Domain, Reason: "OF_A_LATER_VERSION", Metadata: map[string]string{"created": "none"}})
	for name, c := range map[string]struct {
		err    error
		reason backenderr.Reason
	}{
		"plain":                   {errors.New("no"), backenderr.Unknown},
		"cancelled context":       {fmt.Errorf("x: %w", context.Canceled), backenderr.Cancelled},
		"context past deadline":   {context.DeadlineExceeded, backenderr.DeadlineExceeded},
		"status Unavailable":      {foreign(codes.Unavailable), backenderr.BackendUnreachable},
		"status Canceled":         {foreign(codes.Canceled), backenderr.Cancelled},
		"status Deadline":         {foreign(codes.DeadlineExceeded), backenderr.DeadlineExceeded},
		"status Unimplemented":    {foreign(codes.Unimplemented), backenderr.Unimplemented},
		"status Internal":         {foreign(codes.Internal), backenderr.Unknown},
		"status NotFound":         {foreign(codes.NotFound), backenderr.Unknown},
		"of another domain":       {foreign(codes.FailedPrecondition, otherDomain), backenderr.Unknown},
		"another, Unavailable":    {foreign(codes.Unavailable, otherDomain), backenderr.BackendUnreachable},
		"status of a wrapped":     {fmt.Errorf("x: %w", foreign(codes.Unavailable)), backenderr.BackendUnreachable},
		"reason of a later proto": {foreign(codes.FailedPrecondition, newer), backenderr.Unknown},
	} {
		got := backenderr.From(c.err)
		if got == nil || got.Reason != c.reason {
			t.Errorf("%s is %v, want %s", name, got, c.reason)
			continue
		}
		if backenderr.CreatedOf(c.err) != backenderr.CreatedUnknown && name != "reason of a later proto" {
			t.Errorf("%s says what exists", name)
		}
		if got.Error() == "" {
			t.Errorf("%s lost its text", name)
		}
		// It leaves this process with details of ours.
		if back := wire(c.err); back.Reason != c.reason || back.Error() != c.err.Error() {
			t.Errorf("%s is sent as %s %q", name, back.Reason, back)
		}
	}
	if backenderr.From(nil) != nil || backenderr.ReasonOf(nil) != "" || backenderr.Status(nil).Code() != codes.OK || backenderr.Is(nil, backenderr.Unknown) {
		t.Error("no error is an error")
	}
	var none *backenderr.Error
	if got := backenderr.From(fmt.Errorf("x: %w", none)); got == nil {
		t.Error("a nil *Error in a chain is no error")
	}
}

func TestConsoleTailIsTheEndAndValid(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want string }{
		"short":       {"  a\nb \n", "a\nb"},
		"empty":       {" \n\t", ""},
		"long":        {strings.Repeat("x", 5000) + "END", strings.Repeat("x", backenderr.MaxConsoleTail-3) + "END"},
		"not UTF-8":   {"a\xffb", "a\uFFFDb"},
		"cut in rune": {strings.Repeat("é", 3000) + "x", strings.Repeat("é", (backenderr.MaxConsoleTail-1)/2) + "x"},
	} {
		got := wire(backenderr.New(backenderr.WorkloadFailed, "x").WithConsole(c.in)).Metadata[backenderr.MetaConsole]
		if got != c.want || len(got) > backenderr.MaxConsoleTail {
			t.Errorf("%s: %d bytes %.40q…, want %d", name, len(got), got, len(c.want))
		}
	}
}

func TestCloneIsIndependent(t *testing.T) {
	t.Parallel()
	e := backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: "a"}).WithMetadata("k", "v")
	before := factsOf(e.Clone())
	c := e.Clone().WithMetadata("k", "other").WithMetadata("k2", "v").WithCreated(backenderr.CreatedUnknown).WithRetryAfter(time.Hour)
	c.Violations[0].Field = "b"
	if diff := cmp.Diff(before, factsOf(e)); diff != "" {
		t.Errorf("the original changed:\n%s", diff)
	}
	if c.Error() != e.Error() {
		t.Error("the copy lost its text")
	}
}

// google.rpc.ErrorInfo: metadata keys must match [a-z][a-zA-Z0-9-_]+ and have
// at most 64 characters; reasons [A-Z][A-Z0-9_]+[A-Z0-9], at most 63.
func TestDetailsObeyGooglesRules(t *testing.T) {
	t.Parallel()
	key := regexp.MustCompile(`^[a-z][a-zA-Z0-9_-]{1,63}$`)
	reason := regexp.MustCompile(`^[A-Z][A-Z0-9_]{1,61}[A-Z0-9]$`)
	for _, name := range wireNames() {
		e := backenderr.New(backenderr.Reason(name), "x").WithConsole("c").
			WithMetadata(backenderr.MetaBackend, "metal").WithMetadata(backenderr.MetaLeaked, "unit")
		for _, d := range e.GRPCStatus().Details() {
			info, ok := d.(*errdetails.ErrorInfo)
			if !ok {
				continue
			}
			if !reason.MatchString(info.GetReason()) || info.GetDomain() != "computebridge.v1" {
				t.Errorf("reason %q of %q", info.GetReason(), info.GetDomain())
			}
			if info.GetMetadata()["created"] != "unknown" {
				t.Errorf("%s doesn't say what exists: %v", name, info.GetMetadata())
			}
			for k := range info.GetMetadata() {
				if !key.MatchString(k) {
					t.Errorf("key %q", k)
				}
			}
		}
	}
}

func TestBadTextStillCrosses(t *testing.T) {
	t.Parallel()
	e := backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: "f\xff", Description: "d\xff"}).WithMetadata("k", "v\xff")
	got := wire(e)
	if got.Reason != backenderr.GrantInvalid || backenderr.CreatedOf(got) != backenderr.CreatedNone || len(got.Violations) != 1 {
		t.Errorf("details were lost for bad UTF-8: %+v", factsOf(got))
	}
}

func TestRetryable(t *testing.T) {
	t.Parallel()
	never := []backenderr.Reason{
		backenderr.GrantInvalid, backenderr.ImageMismatch, backenderr.GrantConflict, backenderr.GrantEnded, backenderr.GrantNotSatisfiable,
		backenderr.RequestInvalid, backenderr.CallerDenied, backenderr.CallerUnauthenticated, backenderr.HopLimitExceeded, backenderr.InstanceNotFound,
	}
	for _, reason := range never {
		if backenderr.Retryable(backenderr.New(reason, "x")) {
			t.Errorf("%s may be retried", reason)
		}
	}
	for _, reason := range []backenderr.Reason{backenderr.CapacityExhausted, backenderr.LedgerUnavailable, backenderr.BackendUnreachable, backenderr.Unknown} {
		if !backenderr.Retryable(fmt.Errorf("x: %w", backenderr.New(reason, "x"))) {
			t.Errorf("%s may not be retried", reason)
		}
	}
	if backenderr.Retryable(nil) {
		t.Error("success may be retried")
	}
}

func FuzzErrorCrossesTheWire(f *testing.F) {
	f.Add("GRANT_ENDED", "text", true, int64(5), "grant.shape", "is odd", "k", "v")
	f.Add("", "\xff", false, int64(-1), "", "", "created", "none")
	f.Add("BOGUS", "", true, int64(1)<<62, "\x00", "", "", "")
	f.Fuzz(func(t *testing.T, reason, text string, none bool, retry int64, field, description, key, value string) {
		e := backenderr.Invalid(backenderr.Reason(reason), backenderr.Violation{Field: field, Description: description}).
			WithRetryAfter(time.Duration(retry)).WithMetadata(key, value)
		if !none {
			e = e.WithCreated(backenderr.CreatedUnknown)
		}
		got := wire(fmt.Errorf("%s: %w", text, e))
		if got.Reason != e.Reason && (got.Reason != backenderr.Unknown || e.Reason.Code() != codes.Unknown) {
			t.Errorf("%q became %q", e.Reason, got.Reason)
		}
		if backenderr.CreatedOf(got) != backenderr.CreatedOf(e) {
			t.Errorf("created=%s became %s", e.Created, got.Created)
		}
		if utf8.ValidString(text+field+description+key+value) && key != "created" {
			if retry > 0 && got.RetryAfter != e.RetryAfter {
				t.Errorf("retry %s became %s", e.RetryAfter, got.RetryAfter)
			}
			if diff := cmp.Diff(e.Violations, got.Violations); diff != "" {
				t.Error(diff)
			}
			if got.Metadata[key] != value {
				t.Errorf("metadata %q: %q became %q", key, value, got.Metadata[key])
			}
			if want := text + ": " + e.Error(); got.Error() != want {
				t.Errorf("%q became %q", want, got.Error())
			}
		}
	})
}

func TestNoErrorSaysNothing(t *testing.T) {
	t.Parallel()
	if r, c := backenderr.ReasonOf(nil), backenderr.CreatedOf(nil); r != "" || c != backenderr.CreatedUnknown || backenderr.Is(nil, backenderr.Unknown) {
		t.Errorf("nil has reason %q, created=%s", r, c)
	}
}
