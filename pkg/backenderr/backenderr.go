// Package backenderr is the error type of the bridge: a closed set of reasons,
// each with one gRPC code, and what an error says about what exists.
//
// An [*Error] crosses gRPC as a status with a google.rpc.ErrorInfo of domain
// [Domain] (and RetryInfo, BadRequest where they apply) and comes back with
// [From] as an equal *Error. Branch on [ReasonOf] and [CreatedOf], never on
// messages or codes.
package backenderr

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Domain is the ErrorInfo domain of every error of the bridge.
const Domain = "computebridge.v1"

// Keys of ErrorInfo metadata.
const (
	metaCreated = "created"
	// MetaBackend names the backend that failed.
	MetaBackend = "backend"
	// MetaConsole holds the last lines of the instance's console.
	MetaConsole = "console_tail"
	// MetaLeaked names a resource whose clean-up isn't confirmed.
	MetaLeaked = "leaked_resource"
	// MetaRefusedFence says up to which fence a backend refuses the Provision
	// calls of the grant; see backend.RefusedFence.
	MetaRefusedFence = "refused_fence"
)

// MaxConsoleTail is how much of a console an error carries, in bytes: details
// travel in HTTP/2 trailers, which many proxies limit to 8 KiB.
const MaxConsoleTail = 2048

// Reason is why something failed. Its string is the one on the wire.
type Reason string

// The reasons; ErrorReason in error_reason.proto says when each is used.
const (
	Unknown                 Reason = "UNKNOWN"
	GrantInvalid            Reason = "GRANT_INVALID"
	ImageMismatch           Reason = "IMAGE_MISMATCH"
	GrantConflict           Reason = "GRANT_CONFLICT"
	GrantEnded              Reason = "GRANT_ENDED"
	GrantNotSatisfiable     Reason = "GRANT_NOT_SATISFIABLE"
	CapacityExhausted       Reason = "CAPACITY_EXHAUSTED"
	QuotaExceeded           Reason = "QUOTA_EXCEEDED"
	WorkerFull              Reason = "WORKER_FULL"
	ProviderDenied          Reason = "PROVIDER_DENIED"
	ProviderUnauthenticated Reason = "PROVIDER_UNAUTHENTICATED"
	ClockSkew               Reason = "CLOCK_SKEW"
	HostUnfit               Reason = "HOST_UNFIT"
	ProviderUnavailable     Reason = "PROVIDER_UNAVAILABLE"
	LedgerUnavailable       Reason = "LEDGER_UNAVAILABLE"
	BackendUnreachable      Reason = "BACKEND_UNREACHABLE"
	ImageUnavailable        Reason = "IMAGE_UNAVAILABLE"
	ImageHashMismatch       Reason = "IMAGE_HASH_MISMATCH"
	ImageInvalid            Reason = "IMAGE_INVALID"
	AttestationFailed       Reason = "ATTESTATION_FAILED"
	BootTimeout             Reason = "BOOT_TIMEOUT"
	WorkloadFailed          Reason = "WORKLOAD_FAILED"
	OperationInProgress     Reason = "OPERATION_IN_PROGRESS"
	InstanceNotFound        Reason = "INSTANCE_NOT_FOUND"
	RequestInvalid          Reason = "REQUEST_INVALID"
	CallerUnauthenticated   Reason = "CALLER_UNAUTHENTICATED"
	CallerDenied            Reason = "CALLER_DENIED"
	HopLimitExceeded        Reason = "HOP_LIMIT_EXCEEDED"
	Cancelled               Reason = "CANCELLED"
	DeadlineExceeded        Reason = "DEADLINE_EXCEEDED"
	Internal                Reason = "INTERNAL"
	Unimplemented           Reason = "UNIMPLEMENTED"
	OtherReplica            Reason = "OTHER_REPLICA"
)

// reasonCodes gives the one gRPC code of each reason.
var reasonCodes = map[Reason]codes.Code{
	Unknown:                 codes.Unknown,
	GrantInvalid:            codes.InvalidArgument,
	ImageMismatch:           codes.InvalidArgument,
	GrantConflict:           codes.AlreadyExists,
	GrantEnded:              codes.FailedPrecondition,
	GrantNotSatisfiable:     codes.FailedPrecondition,
	CapacityExhausted:       codes.ResourceExhausted,
	QuotaExceeded:           codes.ResourceExhausted,
	WorkerFull:              codes.ResourceExhausted,
	ProviderDenied:          codes.FailedPrecondition,
	ProviderUnauthenticated: codes.FailedPrecondition,
	ClockSkew:               codes.FailedPrecondition,
	HostUnfit:               codes.FailedPrecondition,
	ProviderUnavailable:     codes.Unavailable,
	LedgerUnavailable:       codes.Unavailable,
	BackendUnreachable:      codes.Unavailable,
	ImageUnavailable:        codes.FailedPrecondition,
	ImageHashMismatch:       codes.DataLoss,
	ImageInvalid:            codes.FailedPrecondition,
	AttestationFailed:       codes.FailedPrecondition,
	BootTimeout:             codes.DeadlineExceeded,
	WorkloadFailed:          codes.FailedPrecondition,
	OperationInProgress:     codes.Aborted,
	InstanceNotFound:        codes.NotFound,
	RequestInvalid:          codes.InvalidArgument,
	CallerUnauthenticated:   codes.Unauthenticated,
	CallerDenied:            codes.PermissionDenied,
	HopLimitExceeded:        codes.FailedPrecondition,
	Cancelled:               codes.Canceled,
	DeadlineExceeded:        codes.DeadlineExceeded,
	Internal:                codes.Internal,
	Unimplemented:           codes.Unimplemented,
	OtherReplica:            codes.Unavailable,
}

// Code returns the gRPC code of a reason, codes.Unknown for one that isn't in
// the set.
func (r Reason) Code() codes.Code {
	if c, ok := reasonCodes[r]; ok {
		return c
	}
	return codes.Unknown
}

// Proto returns the reason's value on the wire.
func (r Reason) Proto() bridgev1.ErrorReason {
	if v, ok := bridgev1.ErrorReason_value["ERROR_REASON_"+string(r)]; ok && v != 0 {
		return bridgev1.ErrorReason(v)
	}
	return bridgev1.ErrorReason_ERROR_REASON_UNKNOWN
}

// Created says what a failed Provision left behind.
type Created string

// What may exist after an error.
const (
	// CreatedNone: nothing was ever sent, or clean-up is confirmed.
	CreatedNone Created = "none"
	// CreatedUnknown: something may exist. The zero value means the same.
	CreatedUnknown Created = "unknown"
)

// Violation is a field of the request that is wrong.
type Violation struct {
	// Field is its path, "grant.shape.ram_mib".
	Field string
	// Description says what is wrong with it.
	Description string
}

// Error is a failure with its reason. Build it with [New] or [Wrap] and the
// With methods, which change and return the receiver.
type Error struct {
	Reason     Reason
	Created    Created
	RetryAfter time.Duration
	Violations []Violation
	// Metadata holds more facts for ErrorInfo: backend, zone, console_tail. No
	// secrets.
	Metadata map[string]string

	message string
	cause   error
}

// New returns an error with a message for people: lower case, no secrets.
func New(reason Reason, format string, args ...any) *Error {
	return &Error{Reason: reason, message: fmt.Sprintf(format, args...)}
}

// Wrap returns an error whose cause is kept for errors.Is and errors.As and
// whose text follows the message. The text of cause leaves the process: it
// must be fit for that.
func Wrap(reason Reason, cause error, format string, args ...any) *Error {
	return &Error{Reason: reason, message: fmt.Sprintf(format, args...), cause: cause}
}

// Invalid returns GRANT_INVALID for the violations, none of which has created
// anything.
func Invalid(reason Reason, violations ...Violation) *Error {
	texts := make([]string, len(violations))
	for i, v := range violations {
		texts[i] = v.Field + ": " + v.Description
	}
	return &Error{Reason: reason, Created: CreatedNone, Violations: violations, message: strings.Join(texts, "; ")}
}

// WithCreated sets what exists.
func (e *Error) WithCreated(c Created) *Error { e.Created = c; return e }

// WithRetryAfter sets when the caller may try again.
func (e *Error) WithRetryAfter(d time.Duration) *Error { e.RetryAfter = d; return e }

// WithMetadata adds a fact for ErrorInfo.
func (e *Error) WithMetadata(key, value string) *Error {
	if e.Metadata == nil {
		e.Metadata = map[string]string{}
	}
	e.Metadata[key] = value
	return e
}

// WithConsole adds the end of a console's text.
func (e *Error) WithConsole(text string) *Error {
	text = utf8Text(strings.TrimSpace(text))
	if len(text) > MaxConsoleTail {
		text = strings.ToValidUTF8(text[len(text)-MaxConsoleTail:], "")
	}
	if text == "" {
		return e
	}
	return e.WithMetadata(MetaConsole, text)
}

// Error returns the message and that of the cause.
func (e *Error) Error() string {
	switch {
	case e.cause == nil:
		return e.message
	case e.message == "":
		return e.cause.Error()
	}
	return e.message + ": " + e.cause.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus returns the status that crosses gRPC.
func (e *Error) GRPCStatus() *status.Status { return e.status(e.Error()) }

func (e *Error) status(message string) *status.Status {
	// A string that is not UTF-8 would cost the status all its details.
	metadata := make(map[string]string, len(e.Metadata)+1)
	for key, value := range e.Metadata {
		metadata[utf8Text(key)] = utf8Text(value)
	}
	metadata[metaCreated] = string(e.created())
	details := []protoadapt.MessageV1{protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: utf8Text(string(e.Reason)), Domain: Domain, Metadata: metadata})}
	if e.RetryAfter > 0 {
		details = append(details, protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)}))
	}
	if len(e.Violations) > 0 {
		bad := &errdetails.BadRequest{}
		for _, v := range e.Violations {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: utf8Text(v.Field), Description: utf8Text(v.Description)})
		}
		details = append(details, protoadapt.MessageV1Of(bad))
	}
	st := status.New(e.Reason.Code(), utf8Text(message))
	if with, err := st.WithDetails(details...); err == nil {
		return with
	}
	return st
}

func utf8Text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func (e *Error) created() Created {
	if e != nil && e.Created == CreatedNone {
		return CreatedNone
	}
	return CreatedUnknown
}

// Status returns the status for any error: that of the *Error in its chain
// with the whole chain's text, so that nothing a wrapper added is lost, or an
// unclassified one.
func Status(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	return From(err).status(err.Error())
}

// From returns err as an *Error, never nil for a non-nil err: the one in its
// chain; that of a gRPC status of our domain; Cancelled or DeadlineExceeded for
// a context's end; else Unknown, with what exists unknown. A status from
// elsewhere (transport, a proxy) is BackendUnreachable if its code is
// Unavailable, and Unknown otherwise.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	if own, ok := errors.AsType[*Error](err); ok {
		if own == nil {
			return New(Unknown, "%s", err)
		}
		return own
	}
	if st, ok := statusOf(err); ok {
		return fromStatus(st, err)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Wrap(Cancelled, err, "")
	case errors.Is(err, context.DeadlineExceeded):
		return Wrap(DeadlineExceeded, err, "")
	}
	return Wrap(Unknown, err, "")
}

// statusOf finds a status in err's chain. Unlike status.FromError it leaves
// the message as it was sent.
func statusOf(err error) (*status.Status, bool) {
	var carrier interface{ GRPCStatus() *status.Status }
	if errors.As(err, &carrier) {
		if st := carrier.GRPCStatus(); st != nil {
			return st, true
		}
	}
	return nil, false
}

func fromStatus(st *status.Status, cause error) *Error {
	e := &Error{Reason: Unknown, message: st.Message()}
	ours := false
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != Domain {
				continue
			}
			ours = true
			e.Reason = Reason(d.GetReason())
			if _, known := reasonCodes[e.Reason]; !known {
				e.Reason = Unknown
			}
			e.Metadata = maps.Clone(d.GetMetadata())
			if Created(e.Metadata[metaCreated]) == CreatedNone {
				e.Created = CreatedNone
			}
			delete(e.Metadata, metaCreated)
			if len(e.Metadata) == 0 {
				e.Metadata = nil
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{Field: v.GetField(), Description: v.GetDescription()})
			}
		}
	}
	if ours {
		return e
	}
	e.cause, e.message = cause, ""
	switch st.Code() {
	case codes.Unavailable:
		e.Reason = BackendUnreachable
	case codes.Canceled:
		e.Reason = Cancelled
	case codes.DeadlineExceeded:
		e.Reason = DeadlineExceeded
	case codes.Unimplemented:
		e.Reason = Unimplemented
	}
	return e
}

// ReasonOf returns the reason of err, "" for nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	return From(err).Reason
}

// CreatedOf returns what exists after err; CreatedUnknown unless err says
// otherwise, and for nil.
func CreatedOf(err error) Created { return From(err).created() }

// Is reports whether err has one of the reasons.
func Is(err error, reasons ...Reason) bool {
	return slices.Contains(reasons, ReasonOf(err))
}

// Retryable reports whether the same call, unchanged, may succeed later
// without an operator's or the requester's doing.
func Retryable(err error) bool {
	return Is(err, CapacityExhausted, QuotaExceeded, WorkerFull, ProviderUnavailable, LedgerUnavailable,
		BackendUnreachable, OtherReplica, OperationInProgress, BootTimeout, Cancelled, DeadlineExceeded, Unknown, ImageUnavailable, ImageHashMismatch)
}

// Clone returns a copy that may be changed without changing e.
func (e *Error) Clone() *Error {
	c := *e
	c.Metadata = maps.Clone(e.Metadata)
	c.Violations = append([]Violation(nil), e.Violations...)
	return &c
}
