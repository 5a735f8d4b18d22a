package backendfake

import (
	"context"
	"errors"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Codes of the provider's errors.
const (
	CodeCapacity        = "InsufficientCapacity"
	CodeQuota           = "QuotaExceeded"
	CodeDenied          = "AccessDenied"
	CodeUnauthenticated = "AuthFailure"
	CodeThrottled       = "Throttled"
	CodeUnavailable     = "ServiceUnavailable"
	CodeNotFound        = "NotFound"
	CodeNameInUse       = "NameInUse"
	CodeMismatch        = "IdempotentParameterMismatch"
	CodeTokenSpent      = "IdempotentInstanceTerminated"
)

// APIError is how the provider's API says no.
type APIError struct {
	// Code is one of the Code constants.
	Code    string
	Message string
}

// Error returns code and message.
func (e *APIError) Error() string { return e.Code + ": " + e.Message }

// errKilled is what every call of a dead process returns. No test asserts on
// it: nobody is left who could.
var errKilled = errors.New("the calling process is dead")

// refusals are the faults that are a plain answer of the provider's.
var refusals = map[Kind]string{
	Capacity:        CodeCapacity,
	Quota:           CodeQuota,
	Denied:          CodeDenied,
	Unauthenticated: CodeUnauthenticated,
	Throttled:       CodeThrottled,
	Unavailable:     CodeUnavailable,
}

func codeOf(err error) string {
	if api, ok := errors.AsType[*APIError](err); ok {
		return api.Code
	}
	return ""
}

// classes says what each of the provider's codes means to the bridge. Those
// that aren't here are the driver's own to handle.
var classes = map[string]struct {
	reason     backenderr.Reason
	retryAfter time.Duration
}{
	CodeCapacity:        {backenderr.CapacityExhausted, 5 * time.Second},
	CodeQuota:           {backenderr.QuotaExceeded, time.Minute},
	CodeDenied:          {backenderr.ProviderDenied, 0},
	CodeUnauthenticated: {backenderr.ProviderUnauthenticated, 0},
	CodeThrottled:       {backenderr.ProviderUnavailable, time.Second},
	CodeUnavailable:     {backenderr.ProviderUnavailable, time.Second},
}

// classify gives a provider's error its place among the bridge's.
func classify(err error, doing string) *backenderr.Error {
	if own, ok := errors.AsType[*backenderr.Error](err); ok {
		return own.Clone()
	}
	if class, ok := classes[codeOf(err)]; ok {
		return backenderr.Wrap(class.reason, err, "%s", doing).WithRetryAfter(class.retryAfter)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return backenderr.Wrap(backenderr.Cancelled, err, "%s", doing)
	case errors.Is(err, context.DeadlineExceeded):
		return backenderr.Wrap(backenderr.DeadlineExceeded, err, "%s", doing)
	case errors.Is(err, errOver):
		return backenderr.Wrap(backenderr.ProviderUnavailable, err, "%s", doing).WithRetryAfter(time.Second)
	case errors.Is(err, errKilled):
		return backenderr.Wrap(backenderr.ProviderUnavailable, err, "%s", doing).WithRetryAfter(time.Second)
	}
	return backenderr.Wrap(backenderr.Unknown, err, "%s", doing)
}
