package backendgrpc_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scripted answers what it is told to.
type scripted struct {
	err         error
	provisioned backend.Provisioned
	caps        backend.Capabilities
	termination backend.Termination
	watch       func(context.Context, func(backend.Event) error) error

	grant    backend.Grant
	envelope backend.Envelope
	handle   backend.Handle
}

func (s *scripted) Name(context.Context) (string, error) { return "metal", s.err }

func (s *scripted) Capabilities(context.Context) (backend.Capabilities, error) { return s.caps, s.err }

func (s *scripted) CanSatisfy(_ context.Context, g backend.Grant) (backend.Satisfaction, error) {
	s.grant = g
	return backend.Satisfaction{Reason: "too big"}, s.err
}

func (s *scripted) Provision(_ context.Context, g backend.Grant, e backend.Envelope) (backend.Provisioned, error) {
	s.grant, s.envelope = g, e
	return s.provisioned, s.err
}

func (s *scripted) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	s.handle = h
	if s.watch == nil {
		return s.err
	}
	return s.watch(ctx, emit)
}

func (s *scripted) Terminate(_ context.Context, h backend.Handle) (backend.Termination, error) {
	s.handle = h
	return s.termination, s.err
}

// serve returns a backend that reaches b over gRPC, and its raw client.
func serve(t *testing.T, service bridgev1.BackendServiceServer) (backend.Backend, bridgev1.BackendServiceClient) {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	bridgev1.RegisterBackendServiceServer(server, service)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return backendgrpc.NewClient(conn), bridgev1.NewBackendServiceClient(conn)
}

func TestCallsCarryEverything(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 5))
	log := filled[backend.SignedLog](r)
	s := &scripted{
		provisioned: filled[backend.Provisioned](r), caps: filled[backend.Capabilities](r),
		termination: backend.Termination{State: backend.StateTerminated, Log: &log},
	}
	s.provisioned.Receipt.RequesterKey, s.provisioned.Receipt.PlaintextKey = "", nil
	client, raw := serve(t, backendgrpc.NewServer(s))
	ctx := t.Context()
	if name, err := client.Name(ctx); err != nil || name != "metal" {
		t.Errorf("Name: %q, %v", name, err)
	}
	caps, err := client.Capabilities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	same(t, s.caps, caps)
	grant, envelope := filled[backend.Grant](r), filled[backend.Envelope](r)
	s.provisioned.Instance.Handle = backend.HandleFor(grant.ID).Via("site")
	s.provisioned.Instance.GrantID, s.provisioned.Receipt.GrantID = grant.ID, grant.ID
	if got, err := client.CanSatisfy(ctx, grant); err != nil || got != (backend.Satisfaction{Reason: "too big"}) {
		t.Errorf("CanSatisfy: %+v, %v", got, err)
	}
	same(t, grant, s.grant)
	p, err := client.Provision(ctx, grant, envelope)
	if err != nil {
		t.Fatal(err)
	}
	same(t, s.provisioned, p)
	same(t, grant, s.grant)
	same(t, envelope, s.envelope)
	got, err := client.Terminate(ctx, "site/x")
	if err != nil || s.handle != "site/x" {
		t.Errorf("Terminate: %v of %s", err, s.handle)
	}
	same(t, s.termination, got)
	// The envelope's hint is the region of a grant without one.
	grant.Region = ""
	if _, err := raw.CanSatisfy(ctx, &bridgev1.CanSatisfyRequest{Grant: backendgrpc.GrantToProto(grant), RegionHint: "west"}); err != nil || s.grant.Region != "west" {
		t.Errorf("with a hint: region %q, %v", s.grant.Region, err)
	}
}

func TestErrorsKeepTheirDetails(t *testing.T) {
	t.Parallel()
	s := &scripted{err: backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: "grant.region", Description: "is odd"}).
		WithRetryAfter(time.Minute).WithMetadata(backenderr.MetaBackend, "metal")}
	client, raw := serve(t, backendgrpc.NewServer(s))
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"Name":           func() error { _, err := client.Name(ctx); return err },
		"Capabilities":   func() error { _, err := client.Capabilities(ctx); return err },
		"CanSatisfy":     func() error { _, err := client.CanSatisfy(ctx, backend.Grant{}); return err },
		"Provision":      func() error { _, err := client.Provision(ctx, backend.Grant{}, backend.Envelope{}); return err },
		"WatchUntilExit": func() error { return client.WatchUntilExit(ctx, "x", func(backend.Event) error { return nil }) },
		"Terminate":      func() error { _, err := client.Terminate(ctx, "x"); return err },
	} {
		var got *backenderr.Error
		if err := call(); !errors.As(err, &got) {
			t.Errorf("%s: %v is no *Error", name, err)
			continue
		}
		want := backenderr.From(s.err)
		if got.Reason != want.Reason || got.Created != want.Created || got.RetryAfter != want.RetryAfter || got.Error() != want.Error() ||
			!cmp.Equal(got.Violations, want.Violations) || !cmp.Equal(got.Metadata, want.Metadata) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	// On the wire it is a status with our ErrorInfo, whatever the backend said.
	s.err = errors.New("not classified")
	_, err := raw.Name(ctx, &bridgev1.NameRequest{})
	if status.Code(err) != codes.Unknown || !backenderr.Is(err, backenderr.Unknown) || len(status.Convert(err).Details()) == 0 {
		t.Errorf("unclassified: %v", err)
	}
}

func TestWatchOverTheWire(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(6, 6))
	instance, log := filled[backend.Instance](r), filled[backend.SignedLog](r)
	events := []backend.Event{{At: time.Unix(1, 0).UTC(), Instance: &instance}, {At: time.Unix(2, 0).UTC(), Heartbeat: true}, {At: time.Unix(3, 0).UTC(), Log: &log}}
	s := &scripted{}
	client, _ := serve(t, backendgrpc.NewServer(s))
	play := func(events ...backend.Event) func(context.Context, func(backend.Event) error) error {
		return func(_ context.Context, emit func(backend.Event) error) error {
			for _, e := range events {
				if err := emit(e); err != nil {
					return err
				}
			}
			return nil
		}
	}
	var got []backend.Event
	collect := func(e backend.Event) error {
		got = append(got, e)
		return nil
	}

	s.watch = play(events...)
	if err := client.WatchUntilExit(t.Context(), "x", collect); err != nil {
		t.Fatal(err)
	}
	same(t, events, got)

	s.watch = play(events[:2]...)
	if err := client.WatchUntilExit(t.Context(), "x", collect); !backenderr.Is(err, backenderr.BackendUnreachable) {
		t.Errorf("a stream without its end: %v", err)
	}

	// An error of emit ends the watch, on both sides.
	enough := errors.New("enough")
	left := make(chan struct{})
	s.watch = func(ctx context.Context, emit func(backend.Event) error) error {
		defer close(left)
		if err := emit(events[0]); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	if err := client.WatchUntilExit(t.Context(), "x", func(backend.Event) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("an error of emit: %v", err)
	}
	<-left

	// A caller that goes.
	left = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	err := client.WatchUntilExit(ctx, "x", func(backend.Event) error {
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || !backenderr.Is(err, backenderr.Cancelled) {
		t.Errorf("a cancelled watch: %v", err)
	}
	<-left
}

// broken answers what no backend may.
type broken struct {
	bridgev1.UnimplementedBackendServiceServer
}

func (broken) Provision(context.Context, *bridgev1.ProvisionRequest) (*bridgev1.ProvisionResponse, error) {
	return &bridgev1.ProvisionResponse{Instance: &bridgev1.Instance{Handle: "x"}}, nil
}

func (broken) Terminate(context.Context, *bridgev1.TerminateRequest) (*bridgev1.TerminateResponse, error) {
	return &bridgev1.TerminateResponse{State: bridgev1.InstanceState_INSTANCE_STATE_READY}, nil
}

func TestAnswersThatMakeNoSense(t *testing.T) {
	t.Parallel()
	client, _ := serve(t, broken{})
	_, err := client.Provision(t.Context(), backend.Grant{}, backend.Envelope{})
	if !backenderr.Is(err, backenderr.Unknown) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown {
		t.Errorf("without a receipt: %v", err)
	}
	if _, err := client.Terminate(t.Context(), "x"); !backenderr.Is(err, backenderr.Unknown) {
		t.Errorf("neither terminating nor terminated: %v", err)
	}
	if _, err := client.Name(t.Context()); !backenderr.Is(err, backenderr.Unimplemented) {
		t.Errorf("not served: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Name(ctx); !errors.Is(err, context.Canceled) || !backenderr.Is(err, backenderr.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	if _, err := client.Name(ctx); !errors.Is(err, context.DeadlineExceeded) || !backenderr.Is(err, backenderr.DeadlineExceeded) {
		t.Errorf("past its deadline: %v", err)
	}
}

// An answer that can't be right is not passed on, and leaves open what exists.
func TestAnswersForSomethingElseAreRefused(t *testing.T) {
	t.Parallel()
	id, other := backend.GrantID{1}, backend.GrantID{2}
	good := func() backend.Provisioned {
		return backend.Provisioned{
			Instance: backend.Instance{Handle: backend.HandleFor(id).Via("site"), GrantID: id, State: backend.StateReady},
			Receipt:  backend.Receipt{GrantID: id, Host: "h", Port: 22, User: "u", HostKey: "ssh-ed25519 AAAA"},
		}
	}
	for name, change := range map[string]func(*backend.Provisioned){
		"":                              func(*backend.Provisioned) {},
		"a handle that names no grant":  func(p *backend.Provisioned) { p.Instance.Handle = "site/nothing" },
		"the handle of another grant":   func(p *backend.Provisioned) { p.Instance.Handle = backend.HandleFor(other).Via("site") },
		"the instance of another grant": func(p *backend.Provisioned) { p.Instance.GrantID = other },
		"the receipt of another grant":  func(p *backend.Provisioned) { p.Receipt.GrantID = other },
		"a receipt without a host key":  func(p *backend.Provisioned) { p.Receipt.HostKey = "" },
		"without instance or receipt":   func(p *backend.Provisioned) { p.Instance.Handle = "" },
	} {
		s := &scripted{provisioned: good()}
		change(&s.provisioned)
		client, _ := serve(t, backendgrpc.NewServer(s))
		p, err := client.Provision(t.Context(), backend.Grant{ID: id}, backend.Envelope{})
		if name == "" {
			if err != nil || p.Instance.Handle != s.provisioned.Instance.Handle {
				t.Errorf("a right answer: %+v, %v", p, err)
			}
			continue
		}
		if !backenderr.Is(err, backenderr.Unknown) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if p.Instance.Handle != "" || p.Receipt.Host != "" {
			t.Errorf("%s was passed on: %+v", name, p)
		}
	}
}
