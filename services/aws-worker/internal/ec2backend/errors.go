package ec2backend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	smithy "github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Pages of AWS's that document error codes.
const (
	pageEC2         = "https://docs.aws.amazon.com/ec2/latest/devguide/errors-overview.html"
	pageRun         = "https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_RunInstances.html"
	pageLaunch      = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/troubleshooting-launch.html"
	pageIdempotency = "https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-idempotency.html"
	pageThrottling  = "https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html"
	pageStateReason = "https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_StateReason.html"
	pageSTS         = "https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html"
	pageSSM         = "https://docs.aws.amazon.com/systems-manager/latest/APIReference/API_GetParameter.html"
	pageSSMCommon   = "https://docs.aws.amazon.com/systems-manager/latest/APIReference/CommonErrors.html"
	pageScheduler   = "https://docs.aws.amazon.com/scheduler/latest/APIReference/API_CreateSchedule.html"
	pageMetrics     = "https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_GetMetricData.html"
)

// When to try again.
const (
	// retryCapacity: AWS advises "a few minutes" (pageLaunch).
	retryCapacity = 3 * time.Minute
	// retryQuota: quotas are freed as instances end.
	retryQuota = time.Minute
	// retryThrottled is what every documented bucket needs to have tokens again.
	retryThrottled = 5 * time.Second
	// retryFailing is for the cloud's own faults.
	retryFailing = 10 * time.Second
)

// effect is what an answer says about a call that creates.
type effect int

const (
	// nothing was done.
	nothing effect = iota
	// capacity: nothing was done for want of room in this zone for this type;
	// another zone or type may have some.
	capacity
	// unclear: something may have been done.
	unclear
)

// vendorError is what one of AWS's error codes means.
type vendorError struct {
	code   string
	reason backenderr.Reason
	retry  time.Duration
	effect effect
	page   string
}

// vendorErrors are the codes that the APIs which the worker calls may answer
// with. A code that isn't here is UNKNOWN.
var vendorErrors = []vendorError{
	// No room.
	{"InsufficientInstanceCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageLaunch},
	{"InsufficientHostCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"InsufficientReservedInstanceCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"InsufficientCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"InsufficientCapacityOnHost", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"ReservationCapacityExceeded", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"UnfulfillableCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"SpotMaxPriceTooLow", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	// A type that the zone doesn't have, whatever the offerings said.
	{"Unsupported", backenderr.CapacityExhausted, retryCapacity, capacity, pageLaunch},
	// The zone's subnet, or the zone's pool of addresses, is used up.
	{"InsufficientFreeAddressesInSubnet", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},
	{"InsufficientAddressCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageEC2},

	// Limits of the account.
	{"InstanceLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageLaunch},
	{"VcpuLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"MaxSpotInstanceCountExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"MaxSpotFleetRequestCountExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"AddressLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"VolumeLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"MaxIOPSLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"NetworkInterfaceLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"SecurityGroupLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"RulesPerSecurityGroupLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"SecurityGroupsPerInstanceLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"SecurityGroupsPerInterfaceLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"ResourceLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageEC2},
	{"ServiceQuotaExceededException", backenderr.QuotaExceeded, retryQuota, nothing, pageScheduler},

	// Too many requests. The request was turned away before anything was done.
	{"RequestLimitExceeded", backenderr.ProviderUnavailable, retryThrottled, nothing, pageThrottling},
	{"Throttling", backenderr.ProviderUnavailable, retryThrottled, nothing, pageSTS},
	{"ThrottlingException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageScheduler},
	{"ThrottledException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageSSMCommon},
	{"RequestThrottled", backenderr.ProviderUnavailable, retryThrottled, nothing, pageSTS},
	{"RequestThrottledException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageSTS},
	{"TooManyRequestsException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageSTS},
	{"EC2ThrottledException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageEC2},
	{"LimitExceeded", backenderr.ProviderUnavailable, retryThrottled, nothing, pageMetrics},
	{"LimitExceededException", backenderr.ProviderUnavailable, retryThrottled, nothing, pageMetrics},

	// No right.
	{"UnauthorizedOperation", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"AccessDenied", backenderr.ProviderDenied, 0, nothing, pageSTS},
	{"AccessDeniedException", backenderr.ProviderDenied, 0, nothing, pageSSMCommon},
	{"NotAuthorized", backenderr.ProviderDenied, 0, nothing, pageSSMCommon},
	{"OperationNotPermitted", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"OptInRequired", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"PendingVerification", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"Blocked", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"RegionDisabledException", backenderr.ProviderDenied, 0, nothing, pageSTS},
	{"InvalidSpotInstanceRequestRole", backenderr.ProviderDenied, 0, nothing, pageEC2},
	{"AuthFailure.ServiceLinkedRoleCreationNotPermitted", backenderr.ProviderDenied, 0, nothing, pageEC2},

	// No identity. With a clock that is off these are CLOCK_SKEW.
	{"AuthFailure", backenderr.ProviderUnauthenticated, 0, nothing, pageEC2},
	{"InvalidClientTokenId", backenderr.ProviderUnauthenticated, 0, nothing, pageSTS},
	{"UnrecognizedClientException", backenderr.ProviderUnauthenticated, 0, nothing, pageSSMCommon},
	{"MissingAuthenticationToken", backenderr.ProviderUnauthenticated, 0, nothing, pageSTS},
	{"MissingAuthenticationTokenException", backenderr.ProviderUnauthenticated, 0, nothing, pageSSMCommon},
	{"SignatureDoesNotMatch", backenderr.ProviderUnauthenticated, 0, nothing, pageSTS},
	{"InvalidSignatureException", backenderr.ProviderUnauthenticated, 0, nothing, pageSSMCommon},
	{"IncompleteSignature", backenderr.ProviderUnauthenticated, 0, nothing, pageSTS},
	{"ExpiredToken", backenderr.ProviderUnauthenticated, 0, nothing, pageSTS},
	{"ExpiredTokenException", backenderr.ProviderUnauthenticated, 0, nothing, pageSSMCommon},

	// The clock.
	{"RequestExpired", backenderr.ClockSkew, 0, nothing, pageEC2},
	{"RequestInTheFuture", backenderr.ClockSkew, 0, nothing, pageEC2},
	{"RequestTimeTooSkewed", backenderr.ClockSkew, 0, nothing, pageEC2},

	// What the configuration names isn't there, or can't be used.
	{"InvalidAMIID.NotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidAMIID.Malformed", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidAMIID.Unavailable", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidAMIName.Malformed", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidSubnetID.NotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidSubnetId.Malformed", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidSubnet", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidVpcID.NotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidVpcId.Malformed", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"VPCIdNotSpecified", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"DefaultVpcDoesNotExist", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"DefaultSubnetDoesNotExist", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"MissingInput", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidInstanceType", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidAvailabilityZone", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidKmsKey.InvalidState", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidParameterValue", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidParameterCombination", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"InvalidBlockDeviceMapping", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"UnsupportedOperation", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"UnsupportedInstanceAttribute", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"OperationNotSupported", backenderr.GrantNotSatisfiable, 0, nothing, pageEC2},
	{"ParameterNotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageSSM},
	{"ParameterVersionNotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageSSM},
	{"InvalidKeyId", backenderr.GrantNotSatisfiable, 0, nothing, pageSSM},
	{"ValidationException", backenderr.GrantNotSatisfiable, 0, nothing, pageScheduler},

	// What was asked for isn't there, or is there already. Callers look at the
	// codes; a reason is needed only for what they don't expect.
	{"InvalidInstanceID.NotFound", backenderr.InstanceNotFound, 0, nothing, pageEC2},
	{"InvalidInstanceID.Malformed", backenderr.InstanceNotFound, 0, nothing, pageEC2},
	{"InvalidVolume.NotFound", backenderr.InstanceNotFound, 0, nothing, pageEC2},
	{"InvalidNetworkInterfaceID.NotFound", backenderr.InstanceNotFound, 0, nothing, pageEC2},
	{"ResourceNotFoundException", backenderr.InstanceNotFound, 0, nothing, pageScheduler},
	{"InvalidGroup.NotFound", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"InvalidSecurityGroupID.NotFound", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"InvalidPermission.NotFound", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"InvalidGroup.Duplicate", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},
	{"InvalidPermission.Duplicate", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},
	{"ConflictException", backenderr.ProviderUnavailable, retryFailing, unclear, pageScheduler},
	{"DependencyViolation", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"VolumeInUse", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"InvalidNetworkInterface.InUse", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"IncorrectState", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"IncorrectInstanceState", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},
	{"ConcurrentTagAccess", backenderr.ProviderUnavailable, retryFailing, nothing, pageEC2},

	// A client token that was used before: something was made with it.
	{"IdempotentParameterMismatch", backenderr.Internal, 0, unclear, pageIdempotency},
	{"IdempotentInstanceTerminated", backenderr.ProviderUnavailable, retryFailing, unclear, pageIdempotency},

	// The cloud's own faults.
	{"InternalError", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},
	{"InternalFailure", backenderr.ProviderUnavailable, retryFailing, unclear, pageSTS},
	{"InternalServerError", backenderr.ProviderUnavailable, retryFailing, unclear, pageSSM},
	{"InternalServerException", backenderr.ProviderUnavailable, retryFailing, unclear, pageScheduler},
	{"InternalServiceFault", backenderr.ProviderUnavailable, retryFailing, unclear, pageMetrics},
	{"InternalServiceError", backenderr.ProviderUnavailable, retryFailing, unclear, pageMetrics},
	{"Unavailable", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},
	{"ServiceUnavailable", backenderr.ProviderUnavailable, retryFailing, unclear, pageSTS},
	{"RequestTimeout", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},
	{"RequestTimeoutException", backenderr.ProviderUnavailable, retryFailing, unclear, pageEC2},

	// What a correct worker never sends.
	{"InvalidAction", backenderr.Internal, 0, nothing, pageEC2},
	{"InvalidParameter", backenderr.Internal, 0, nothing, pageEC2},
	{"InvalidPaginationToken", backenderr.Internal, 0, nothing, pageEC2},
	{"InvalidNextToken", backenderr.Internal, 0, nothing, pageMetrics},
	{"InvalidQueryParameter", backenderr.Internal, 0, nothing, pageSTS},
	{"InvalidFilter", backenderr.Internal, 0, nothing, pageEC2},
	{"InvalidUserData.Malformed", backenderr.Internal, 0, nothing, pageEC2},
	{"InvalidClientToken", backenderr.Internal, 0, nothing, pageEC2},
	{"MalformedQueryString", backenderr.Internal, 0, nothing, pageEC2},
	{"MissingAction", backenderr.Internal, 0, nothing, pageEC2},
	{"MissingParameter", backenderr.Internal, 0, nothing, pageEC2},
	{"UnknownParameter", backenderr.Internal, 0, nothing, pageEC2},
	{"TagLimitExceeded", backenderr.Internal, 0, nothing, pageEC2},
}

// codeOwnShutdown is the state reason of an instance that shut itself down
// (pageStateReason).
const codeOwnShutdown = "Client.InstanceInitiatedShutdown"

// stateReasons are the codes with which EC2 says why an instance stopped that
// was to run. Those not here are UNKNOWN.
var stateReasons = []vendorError{
	{"Server.InsufficientInstanceCapacity", backenderr.CapacityExhausted, retryCapacity, capacity, pageStateReason},
	{"Server.SpotInstanceTermination", backenderr.CapacityExhausted, retryCapacity, capacity, pageStateReason},
	{"Server.SpotInstanceShutdown", backenderr.CapacityExhausted, retryCapacity, capacity, pageStateReason},
	{"Server.InternalError", backenderr.ProviderUnavailable, retryFailing, nothing, pageStateReason},
	{"Server.ScheduledStop", backenderr.ProviderUnavailable, retryFailing, nothing, pageStateReason},
	{"Client.VolumeLimitExceeded", backenderr.QuotaExceeded, retryQuota, nothing, pageStateReason},
	// The key of the encrypted volume may not be used, or is gone (pageLaunch).
	{"Client.InternalError", backenderr.ProviderDenied, 0, nothing, pageStateReason},
	{"Client.InvalidSnapshot.NotFound", backenderr.GrantNotSatisfiable, 0, nothing, pageStateReason},
	{"Client.UserInitiatedShutdown", backenderr.ProviderUnavailable, retryFailing, nothing, pageStateReason},
}

func known(table []vendorError, code string) (vendorError, bool) {
	for _, row := range table {
		if row.code == code {
			return row, true
		}
	}
	return vendorError{}, false
}

// classify makes one of our errors of an error of the SDK's. It returns nil for
// nil. What exists is left open; see [refused]. The error is the caller's own: that
// of a shared read goes to many, who each say something else of their grant.
func classify(err error, doing string) *backenderr.Error {
	if err == nil {
		return nil
	}
	if own, ok := errors.AsType[*backenderr.Error](err); ok {
		return own.Clone()
	}
	cause := &apiError{text: describe(err), err: err}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		row, ok := known(vendorErrors, api.ErrorCode())
		switch {
		case !ok && status(err) >= http.StatusInternalServerError:
			// A proxy, or an API in trouble: there is no code of its own.
			return backenderr.Wrap(backenderr.ProviderUnavailable, cause, "%s", doing).WithRetryAfter(retryFailing)
		case !ok:
			return backenderr.Wrap(backenderr.Unknown, cause, "%s", doing)
		}
		if skew := skewOf(err); row.reason == backenderr.ProviderUnauthenticated && skew.Abs() > refusedSkew {
			return backenderr.Wrap(backenderr.ClockSkew, cause, "%s: this machine's clock is %s off", doing, skew.Round(time.Second))
		}
		return backenderr.Wrap(row.reason, cause, "%s", doing).WithRetryAfter(row.retry)
	}
	if _, ok := errors.AsType[*credentialsError](err); ok {
		return backenderr.Wrap(backenderr.ProviderUnauthenticated, cause, "%s", doing)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return backenderr.Wrap(backenderr.Cancelled, cause, "%s", doing)
	case errors.Is(err, context.DeadlineExceeded):
		return backenderr.Wrap(backenderr.DeadlineExceeded, cause, "%s", doing)
	case isNotSent(err):
		return backenderr.Wrap(backenderr.ProviderUnavailable, cause, "%s", doing).WithRetryAfter(retryThrottled)
	case isTransport(err):
		return backenderr.Wrap(backenderr.ProviderUnavailable, cause, "%s", doing).WithRetryAfter(retryFailing)
	}
	return backenderr.Wrap(backenderr.Unknown, cause, "%s", doing)
}

// codeOf returns AWS's code in an error, empty if there is none.
func codeOf(err error) string {
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		return api.ErrorCode()
	}
	return ""
}

// refused reports whether an error proves that the call did nothing.
func refused(err error) bool {
	if err == nil {
		return false
	}
	if call, ok := errors.AsType[*callError](err); ok && call.earlierUnclear {
		return false
	}
	return refusedAttempt(err)
}

// refusedAttempt is refused for one attempt of a call.
func refusedAttempt(err error) bool {
	if _, ok := errors.AsType[*credentialsError](err); ok || isNotSent(err) {
		return true
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		if row, ok := known(vendorErrors, api.ErrorCode()); ok {
			return row.effect != unclear
		}
		code := status(err)
		return api.ErrorFault() == smithy.FaultClient || code >= http.StatusBadRequest && code < http.StatusInternalServerError
	}
	// A connection that wasn't made carried nothing.
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}

// notFound reports whether what a call names isn't there.
func notFound(err error) bool {
	switch codeOf(err) {
	case "InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed", "InvalidVolume.NotFound", "InvalidNetworkInterfaceID.NotFound",
		"InvalidGroup.NotFound", "InvalidSecurityGroupID.NotFound", "ResourceNotFoundException", "ParameterNotFound":
		return true
	}
	return false
}

// stateReasonError is the error of an instance that EC2 ended by itself; nil if
// the instance shut itself down, or EC2 says nothing: its console says more.
func stateReasonError(code, message string) *backenderr.Error {
	if code == "" || code == codeOwnShutdown {
		return nil
	}
	text := shorten(message)
	if !strings.HasPrefix(text, code) {
		text = code + ": " + text
	}
	row, ok := known(stateReasons, code)
	if !ok {
		return backenderr.New(backenderr.Unknown, "EC2 ended the instance: %s", text)
	}
	return backenderr.New(row.reason, "EC2 ended the instance: %s", text).WithRetryAfter(row.retry)
}

// apiError shows people the part of an SDK's error that says something, and
// keeps the rest for errors.As.
type apiError struct {
	text string
	err  error
}

func (e *apiError) Error() string { return e.text }
func (e *apiError) Unwrap() error { return e.err }

// describe is an error without the SDK's wrappings. The request's id is what
// AWS's support asks for.
func describe(err error) string {
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		if op, ok := errors.AsType[*smithy.OperationError](err); ok {
			return shorten(op.Unwrap().Error())
		}
		return shorten(err.Error())
	}
	text := api.ErrorCode() + ": " + shorten(api.ErrorMessage())
	var with interface{ ServiceRequestID() string }
	if errors.As(err, &with) && with.ServiceRequestID() != "" {
		text += " (request " + with.ServiceRequestID() + ")"
	}
	return text
}

// maxMessageBytes bounds what is taken over of a message of AWS's.
const maxMessageBytes = 1000

// shorten drops the encoded part of a message, of which only the account's own
// administrators can make sense, with a command.
func shorten(message string) string {
	message, _, _ = strings.Cut(message, " Encoded authorization failure message:")
	if len(message) > maxMessageBytes {
		message = strings.ToValidUTF8(message[:maxMessageBytes], "") + "…"
	}
	return strings.TrimSpace(message)
}

func status(err error) int {
	if response, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		return response.HTTPStatusCode()
	}
	return 0
}

// isTransport reports whether an error comes from the way to AWS.
func isTransport(err error) bool {
	if _, ok := errors.AsType[*attemptTimeoutError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		return true // an answer that can't be read
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	_, ok := errors.AsType[*smithy.DeserializationError](err)
	return ok
}

// callError is what is known of a call that failed beside its last attempt.
type callError struct {
	// earlierUnclear: an attempt before the last may have done something.
	earlierUnclear bool
	// skew of this machine's clock, as the last answer showed it.
	skew time.Duration
	err  error
}

func (e *callError) Error() string { return e.err.Error() }
func (e *callError) Unwrap() error { return e.err }

// skewOf returns how far this machine's clock was off when a call failed.
func skewOf(err error) time.Duration {
	if call, ok := errors.AsType[*callError](err); ok {
		return call.skew
	}
	return 0
}

// notSentError is of a call that ended before it was sent.
type notSentError struct{ err error }

func (e *notSentError) Error() string { return fmt.Sprintf("not sent: %v", e.err) }
func (e *notSentError) Unwrap() error { return e.err }

func isNotSent(err error) bool {
	_, ok := errors.AsType[*notSentError](err)
	return ok
}

// attemptTimeoutError is the end of one attempt, and not of its caller's patience.
type attemptTimeoutError struct{ after time.Duration }

func (e *attemptTimeoutError) Error() string { return fmt.Sprintf("no answer within %s", e.after) }

// RetryableError makes the SDK try again.
func (e *attemptTimeoutError) RetryableError() bool { return true }

// credentialsError is of credentials that can't be had.
type credentialsError struct{ err error }

func (e *credentialsError) Error() string { return fmt.Sprintf("no credentials: %v", e.err) }
func (e *credentialsError) Unwrap() error { return e.err }
