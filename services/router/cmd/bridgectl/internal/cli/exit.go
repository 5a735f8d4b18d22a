package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

// The exit codes. They are for scripts, and don't change.
const (
	ExitOK          = 0
	ExitOther       = 1
	ExitUsage       = 2
	ExitInvalid     = 3
	ExitFull        = 4
	ExitUnavailable = 5
	ExitDenied      = 6
	ExitNotFound    = 7
	ExitConflict    = 8
	ExitWorkload    = 9
	ExitInterrupted = 130
)

// exitHelp documents the exit codes.
const exitHelp = `Exit codes:
  0    done
  1    another error
  2    wrong use of the command line
  3    the request is invalid, or nothing here can ever satisfy it
  4    no room, quota or slot at the moment: try again later
  5    unavailable, unreachable or timed out: try again
  6    not authenticated, or not allowed
  7    not found
  8    the grant's id is taken by another grant, or the grant has ended
  9    the image or the workload failed
  130  interrupted
  ssh, scp and sftp exit with the status of OpenSSH's client: that of the
  remote command, or 255 if the connection failed.
`

// exitOf returns the exit code for each reason.
func exitOf(reason backenderr.Reason) int {
	switch reason {
	case backenderr.GrantInvalid, backenderr.ImageMismatch, backenderr.RequestInvalid, backenderr.HopLimitExceeded,
		backenderr.GrantNotSatisfiable:
		return ExitInvalid
	case backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.WorkerFull:
		return ExitFull
	case backenderr.ProviderUnavailable, backenderr.LedgerUnavailable, backenderr.BackendUnreachable, backenderr.OtherReplica,
		backenderr.OperationInProgress, backenderr.DeadlineExceeded:
		return ExitUnavailable
	case backenderr.CallerUnauthenticated, backenderr.CallerDenied, backenderr.ProviderDenied, backenderr.ProviderUnauthenticated:
		return ExitDenied
	case backenderr.InstanceNotFound:
		return ExitNotFound
	case backenderr.GrantConflict, backenderr.GrantEnded:
		return ExitConflict
	case backenderr.ImageUnavailable, backenderr.ImageHashMismatch, backenderr.ImageInvalid, backenderr.AttestationFailed,
		backenderr.BootTimeout, backenderr.WorkloadFailed:
		return ExitWorkload
	case backenderr.Unknown, backenderr.ClockSkew, backenderr.HostUnfit, backenderr.Cancelled, backenderr.Internal, backenderr.Unimplemented:
		return ExitOther
	}
	return ExitOther
}

// coded is an error of ours with its exit code.
type coded struct {
	code int
	err  error
}

func (e *coded) Error() string { return e.err.Error() }
func (e *coded) Unwrap() error { return e.err }

func fail(code int, format string, args ...any) error {
	return &coded{code: code, err: fmt.Errorf(format, args...)}
}

func usage(err error) error {
	if err == nil {
		return nil
	}
	return &coded{code: ExitUsage, err: err}
}

// exitStatusError is the status of a program that was run; nothing is printed.
type exitStatusError int

func (e exitStatusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// remote is what a server, or the way to it, answered.
type remote struct {
	err *backenderr.Error
	// provisioning is the grant whose instance may exist, if it was Provision
	// that failed.
	provisioning *backend.GrantID
}

func (e *remote) Error() string { return string(e.err.Reason) + ": " + message(e.err) }
func (e *remote) Unwrap() error { return e.err }

// rpc marks the error of a call.
func rpc(err error) error {
	if err == nil {
		return nil
	}
	return &remote{err: backenderr.From(err)}
}

func reason(err error) backenderr.Reason { return backenderr.From(err).Reason }

// tlsFailure reports whether the way to the server fails for a reason that time
// doesn't heal. gRPC tells it by words only. A handshake that was cut short (the
// server just ended, say) is no such failure.
func tlsFailure(err error) bool {
	text := err.Error()
	return backenderr.Is(err, backenderr.BackendUnreachable) &&
		(strings.Contains(text, "tls: ") || strings.Contains(text, "x509: "))
}

// ambiguous reports whether the very same request should be sent again: it may
// not have arrived, or its answer was lost, or the bridge asks for patience.
func ambiguous(err error) bool {
	return !tlsFailure(err) && backenderr.Is(err, backenderr.ProviderUnavailable, backenderr.LedgerUnavailable,
		backenderr.BackendUnreachable, backenderr.OperationInProgress)
}

// message is what an error says, without gRPC's own wrapping.
func message(err *backenderr.Error) string {
	text := err.Error()
	if status := backenderr.Status(err); status != nil && status.Code() != codes.OK && status.Message() != "" {
		text = status.Message()
	}
	if _, inner, found := strings.Cut(text, "connection error: desc = "); found {
		text = strings.Trim(inner, `"`)
	}
	for _, noise := range []string{"transport: Error while dialing: ", "transport: "} {
		text = strings.TrimPrefix(text, noise)
	}
	return text
}

// code returns the exit code of an error.
func code(err error) int {
	var status exitStatusError
	var own *coded
	var far *remote
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &own):
		return own.code
	case errors.As(err, &far):
		if tlsFailure(far.err) {
			return ExitDenied
		}
		return exitOf(far.err.Reason)
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		return ExitUnavailable
	}
	return ExitOther
}

// printError writes an error for people.
func printError(w io.Writer, p term.Painter, err error) {
	if _, ok := errors.AsType[exitStatusError](err); ok {
		return
	}
	head := p.Paint(term.Bad, "error:")
	var far *remote
	if !errors.As(err, &far) {
		// Several problems of one file come joined, one a line.
		texts := term.CleanLines(err.Error())
		if len(texts) == 1 {
			fmt.Fprintf(w, "%s %s\n", head, texts[0])
			return
		}
		fmt.Fprintf(w, "%s\n", head)
		for _, text := range texts {
			fmt.Fprintf(w, "  %s\n", text)
		}
		return
	}
	e := far.err
	text := message(e)
	if len(e.Violations) > 0 && strings.Contains(text, e.Violations[0].Description) {
		text = "the request is wrong in " + count(len(e.Violations), "field") // They follow.
	}
	fmt.Fprintf(w, "%s %s: %s\n", head, p.Paint(term.Bold, term.Clean(string(e.Reason))), term.Clean(text))
	for _, v := range e.Violations {
		fmt.Fprintf(w, "  %s: %s\n", p.Paint(term.Accent, term.Clean(v.Field)), term.Clean(v.Description))
	}
	names := make([]string, 0, len(e.Metadata))
	for name := range e.Metadata {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		switch name {
		case backenderr.MetaConsole, "created": // Below.
		default:
			fmt.Fprintf(w, "  %s %s\n", p.Paint(term.Faint, term.Clean(name)+":"), term.Clean(e.Metadata[name]))
		}
	}
	if console := e.Metadata[backenderr.MetaConsole]; console != "" {
		fmt.Fprintf(w, "  %s\n", p.Paint(term.Faint, "console:"))
		for _, line := range term.CleanLines(console) {
			fmt.Fprintf(w, "  %s %s\n", p.Paint(term.Faint, "|"), line)
		}
	}
	if e.RetryAfter > 0 {
		fmt.Fprintf(w, "  %s %s\n", p.Paint(term.Faint, "try again in"), show.Span(e.RetryAfter))
	}
	if far.provisioning != nil && e.Created != backenderr.CreatedNone {
		fmt.Fprintf(w, "%s something of this grant may exist (created=unknown). Send it again (bridgectl provision --again %s) or end it for good (bridgectl terminate %s).\n",
			p.Paint(term.Busy, "warning:"), show.ID(far.provisioning[:]), show.ID(far.provisioning[:]))
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// jsonError is an error for scripts.
type jsonError struct {
	Reason            string            `json:"reason,omitempty"`
	Message           string            `json:"message"`
	Violations        []jsonViolation   `json:"violations,omitempty"`
	Metadata          map[string]string `json:"metadata,omitempty"`
	Created           string            `json:"created,omitempty"`
	RetryAfterSeconds float64           `json:"retry_after_seconds,omitempty"`
	ExitCode          int               `json:"exit_code"`
}

type jsonViolation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

// printJSONError writes an error as {"error": {…}} in one line.
func printJSONError(w io.Writer, err error) {
	if _, ok := errors.AsType[exitStatusError](err); ok {
		return
	}
	out := jsonError{Message: err.Error(), ExitCode: code(err)}
	if far, ok := errors.AsType[*remote](err); ok {
		e := far.err
		out.Reason, out.Message, out.Metadata, out.RetryAfterSeconds = string(e.Reason), message(e), e.Metadata, e.RetryAfter.Seconds()
		for _, v := range e.Violations {
			out.Violations = append(out.Violations, jsonViolation(v))
		}
		if far.provisioning != nil {
			out.Created = string(backenderr.CreatedOf(e))
		}
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if encoder.Encode(map[string]jsonError{"error": out}) == nil { // Strings and numbers always encode.
		_, _ = w.Write(b.Bytes())
	}
}
