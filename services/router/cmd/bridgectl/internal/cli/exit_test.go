package cli

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// TestEveryReasonHasItsExitCode lists them for the reader; a reason that is new
// in the contract fails here until somebody decides.
func TestEveryReasonHasItsExitCode(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	for n := range len(bridgev1.ErrorReason_name) {
		name := bridgev1.ErrorReason(n).String()[len("ERROR_REASON_"):]
		if name == "UNSPECIFIED" {
			continue
		}
		fmt.Fprintf(&b, "%d %s\n", exitOf(backenderr.Reason(name)), name)
	}
	golden(t, "exit-codes", b.Bytes())
}

func TestErrorsAreTold(t *testing.T) {
	t.Parallel()
	id := backend.GrantID{0xab, 0xcd}
	for name, err := range map[string]error{
		"invalid": rpc(backenderr.Invalid(backenderr.GrantInvalid,
			backenderr.Violation{Field: "grant.shape.ram_mib", Description: "must be at least 1"},
			backenderr.Violation{Field: "grant.ports\x1b[2J", Description: "must not name a port twice"})),
		"full":      rpc(backenderr.New(backenderr.WorkerFull, "every slot is taken").WithRetryAfter(90*time.Second).WithMetadata(backenderr.MetaBackend, "metal")),
		"unknown":   &remote{err: backenderr.New(backenderr.ProviderUnavailable, "host h1 does not answer").WithCreated(backenderr.CreatedUnknown), provisioning: &id},
		"console":   &remote{err: backenderr.New(backenderr.WorkloadFailed, "exit status 1").WithConsole("a\r\nb\x1b]0;t\x07\n").WithCreated(backenderr.CreatedNone), provisioning: &id},
		"transport": rpc(status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`)),
		"local":     usage(errors.New("--cpu is missing")),
		"several":   usage(errors.Join(errors.New("--cpu is missing"), errors.New("--ram is missing"))),
		"status":    exitStatusError(3),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var b bytes.Buffer
			fmt.Fprintf(&b, "exit code %d\n--- plain\n", code(err))
			printError(&b, term.Painter{}, err)
			fmt.Fprintln(&b, "--- colour")
			printError(&b, term.Painter{On: true}, err)
			fmt.Fprintln(&b, "--- json")
			printJSONError(&b, err)
			golden(t, "error-"+name, b.Bytes())
		})
	}
}

func TestLocalErrorsHaveTheirExitCode(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{usage(errors.New("x")), 2},
		{fmt.Errorf("wrapped: %w", fail(ExitNotFound, "x")), 7},
		{context.Canceled, 130},
		{context.DeadlineExceeded, 5},
		{exitStatusError(42), 42},
		{rpc(context.DeadlineExceeded), 5},
		{rpc(status.Error(codes.Unavailable, `connection error: desc = "transport: authentication handshake failed: tls: x"`)), 6},
		{rpc(status.Error(codes.Unavailable, `connection error: desc = "transport: authentication handshake failed: write: connection reset by peer"`)), 5},
		{rpc(status.Error(codes.PermissionDenied, "a proxy says no")), 1},
	} {
		if got := code(c.err); got != c.want {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.want)
		}
	}
}

func TestOnlyWhatTimeMayHealIsSentAgain(t *testing.T) {
	t.Parallel()
	for _, r := range []backenderr.Reason{backenderr.ProviderUnavailable, backenderr.LedgerUnavailable, backenderr.BackendUnreachable, backenderr.OperationInProgress} {
		if !ambiguous(backenderr.New(r, "x")) {
			t.Errorf("%s is not sent again", r)
		}
	}
	for _, r := range []backenderr.Reason{
		backenderr.GrantInvalid, backenderr.GrantConflict, backenderr.GrantEnded, backenderr.CapacityExhausted, backenderr.WorkerFull,
		backenderr.WorkloadFailed, backenderr.CallerDenied, backenderr.Internal, backenderr.InstanceNotFound,
	} {
		if ambiguous(backenderr.New(r, "x")) {
			t.Errorf("%s is sent again", r)
		}
	}
	if ambiguous(backenderr.New(backenderr.BackendUnreachable, "authentication handshake failed: tls: bad certificate")) {
		t.Error("a bad certificate is shown again and again")
	}
}

func TestPrivateKeysStayOutOfJSON(t *testing.T) {
	t.Parallel()
	res := &bridgev1.ProvisionResponse{Receipt: &bridgev1.Receipt{LoginKey: &bridgev1.Receipt_PlaintextKey{
		PlaintextKey: &bridgev1.PlaintextKey{PublicKey: "ssh-ed25519 AAAA", PrivateKey: []byte("SECRET")},
	}}}
	for secrets, want := range map[bool]bool{false: false, true: true} {
		text, err := marshal(res, "  ", secrets)
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(text, []byte("U0VDUkVU")); got != want {
			t.Errorf("secrets %v: %s", secrets, text)
		}
	}
	if len(res.GetReceipt().GetPlaintextKey().GetPrivateKey()) == 0 {
		t.Error("the caller's message was changed")
	}
}
