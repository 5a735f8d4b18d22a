package ec2sim

import (
	"fmt"
	"net/http"
)

// Error is an answer that says no, in the words of the service.
type Error struct {
	// Status is the HTTP status.
	Status int
	// Code is what clients tell errors apart by ("InsufficientInstanceCapacity").
	Code    string
	Message string
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// refusal is an answer that faults the client, which most are.
func refusal(code, format string, args ...any) *Error {
	return &Error{Status: http.StatusBadRequest, Code: code, Message: fmt.Sprintf(format, args...)}
}

func invalidValue(format string, args ...any) *Error {
	return refusal("InvalidParameterValue", format, args...)
}

func unknownParameter(name string) *Error {
	return refusal("UnknownParameter", "The parameter %s is not recognized", name)
}

// Refusals that tests hand to [Intervention.Refuse], as the service words them.

// Throttled is what a request gets that comes too soon after others.
func Throttled() *Error {
	return &Error{Status: http.StatusServiceUnavailable, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}
}

// InternalError is what a request gets when the service fails. It says nothing
// about whether the request had an effect.
func InternalError() *Error {
	return &Error{Status: http.StatusInternalServerError, Code: "InternalError", Message: "An internal error has occurred"}
}

// NoCapacity is what RunInstances gets when a zone has none of a type left.
func NoCapacity(instanceType, zone string) *Error {
	// With 500, as the service has it, although no retry is of use.
	return &Error{
		Status: http.StatusInternalServerError, Code: "InsufficientInstanceCapacity",
		Message: fmt.Sprintf("We currently do not have sufficient %s capacity in the Availability Zone you requested (%s). "+
			"Our system will be working on provisioning additional capacity.", instanceType, zone),
	}
}

// Unauthorized is what a caller gets that may not do what it asks for.
func Unauthorized() *Error {
	return &Error{Status: http.StatusForbidden, Code: "UnauthorizedOperation", Message: "You are not authorized to perform this operation."}
}
