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
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

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
	s.provisioned.Instance.GrantID, s.provisioned.Receipt.GrantID, s.provisioned.Instance.State = grant.ID, grant.ID, backend.StateReady
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
		"":                             func(*backend.Provisioned) {},
		"a handle that names no grant": func(p *backend.Provisioned) { p.Instance.Handle = "site/nothing" },
		"the handle of another grant":  func(p *backend.Provisioned) { p.Instance.Handle = backend.HandleFor(other).Via("site") },
		"a handle whose path leads nowhere": func(p *backend.Provisioned) {
			p.Instance.Handle = backend.HandleFor(id).Via("../etc")
		},
		"leads nowhere": func(p *backend.Provisioned) {
			for range backend.MaxHops {
				p.Instance.Handle = p.Instance.Handle.Via("round")
			}
		},
		"in a state that there is not":  func(p *backend.Provisioned) { p.Instance.State = 99 },
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

// A watch tells of its own grant only, and nothing that is not so; and an end is
// no end with another grant's log.
func TestNewsOfSomethingElseIsRefused(t *testing.T) {
	t.Parallel()
	id, other := backend.GrantID{1}, backend.GrantID{2}
	signed := func(id, inside backend.GrantID) *backend.SignedLog {
		log := backend.ComputeLog{GrantID: inside, Final: true}
		body, err := proto.Marshal(backendgrpc.LogToProto(log))
		if err != nil {
			t.Fatal(err)
		}
		log.GrantID = id
		return &backend.SignedLog{Log: log, Body: body, KeyID: "k", Signature: []byte("s")}
	}
	instance := func(change func(*backend.Instance)) backend.Event {
		i := backend.Instance{Handle: backend.HandleFor(id), GrantID: id, State: backend.StateReady}
		change(&i)
		return backend.Event{Instance: &i}
	}
	unreadable := signed(id, id)
	unreadable.Body = []byte{0xff}
	for _, c := range []struct {
		event backend.Event
		want  string // "": it is right
	}{
		{instance(func(*backend.Instance) {}), ""},
		{backend.Event{Usage: signed(id, id)}, ""},
		{instance(func(i *backend.Instance) { i.GrantID = other }), "the instance of another grant"},
		{instance(func(i *backend.Instance) { i.Handle = backend.HandleFor(other) }), "the handle of another grant"},
		{instance(func(i *backend.Instance) { i.Handle = backend.HandleFor(id).Via("No Name") }), "a handle whose path leads nowhere"},
		{instance(func(i *backend.Instance) { i.State = 77 }), "an instance in a state that there is not"},
		{instance(func(i *backend.Instance) { i.State = 0 }), "an instance in a state that there is not"},
		{backend.Event{Usage: signed(other, other)}, "the compute log of another grant"},
		{backend.Event{Log: signed(other, other)}, "the compute log of another grant"},
		{backend.Event{Log: signed(id, other)}, "a compute log that is signed for another grant"},
		{backend.Event{Log: unreadable}, "a compute log that can't be read"},
	} {
		s := &scripted{watch: func(_ context.Context, emit func(backend.Event) error) error {
			if err := emit(c.event); err != nil {
				return err
			}
			return emit(backend.Event{Log: signed(id, id)})
		}, termination: backend.Termination{State: backend.StateTerminated, Log: c.event.Log}}
		client, _ := serve(t, backendgrpc.NewServer(s))
		passed := 0
		err := client.WatchUntilExit(t.Context(), backend.HandleFor(id).Via("site"), func(backend.Event) error {
			passed++
			return nil
		})
		if c.want == "" {
			if err != nil || passed != 2 {
				t.Errorf("what is right: %d events, %v", passed, err)
			}
			continue
		}
		if !backenderr.Is(err, backenderr.Unknown) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown || !strings.Contains(err.Error(), c.want) || passed != 0 {
			t.Errorf("%s: %d events were passed on, %v", c.want, passed, err)
		}
		if c.event.Log == nil {
			continue
		}
		got, err := client.Terminate(t.Context(), backend.HandleFor(id))
		if !backenderr.Is(err, backenderr.Unknown) || !strings.Contains(err.Error(), c.want) || got.State != 0 {
			t.Errorf("Terminate with %s: %+v, %v", c.want, got, err)
		}
	}
}

// foreign answers with statuses as proxies and strange servers make them.
type foreign struct {
	bridgev1.UnimplementedBackendServiceServer
	err      error
	response *bridgev1.ProvisionResponse
}

func (f *foreign) Provision(context.Context, *bridgev1.ProvisionRequest) (*bridgev1.ProvisionResponse, error) {
	return f.response, f.err
}

func (f *foreign) Terminate(context.Context, *bridgev1.TerminateRequest) (*bridgev1.TerminateResponse, error) {
	return nil, f.err
}

func (f *foreign) WatchUntilExit(_ *bridgev1.WatchUntilExitRequest, stream grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
	if f.response == nil {
		return f.err
	}
	return stream.Send(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_Instance{Instance: f.response.GetInstance()}})
}

// Whatever isn't the bridge's own word leaves open what exists: most of all a
// "created=none" of somebody else.
func TestForeignAnswersLeaveOpenWhatExists(t *testing.T) {
	t.Parallel()
	info := func(domain, reason string) error {
		st, err := status.New(codes.FailedPrecondition, "no room").WithDetails(&errdetails.ErrorInfo{
			Domain: domain, Reason: reason, Metadata: map[string]string{"created": "none"},
		})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	id := backend.GrantID{1}
	for what, c := range map[string]struct {
		f    *foreign
		want backenderr.Reason
	}{
		"no ErrorInfo":                {&foreign{err: status.Error(codes.ResourceExhausted, "x")}, backenderr.Unknown},
		"another domain's ErrorInfo":  {&foreign{err: info("googleapis.com", "CAPACITY_EXHAUSTED")}, backenderr.Unknown},
		"a proxy's 503":               {&foreign{err: status.Error(codes.Unavailable, "upstream connect error")}, backenderr.BackendUnreachable},
		"a code that there is not":    {&foreign{err: status.Error(99, "x")}, backenderr.Unknown},
		"an answer of 5 MiB":          {&foreign{response: &bridgev1.ProvisionResponse{Instance: &bridgev1.Instance{Progress: strings.Repeat("x", 5<<20)}}}, backenderr.Unknown},
		"a name that is not UTF-8":    {&foreign{response: &bridgev1.ProvisionResponse{Instance: &bridgev1.Instance{Progress: "\xff"}}}, backenderr.Unknown},
		"nothing but an empty answer": {&foreign{response: &bridgev1.ProvisionResponse{}}, backenderr.Unknown},
	} {
		client, _ := serve(t, c.f)
		_, provision := client.Provision(t.Context(), backend.Grant{ID: id}, backend.Envelope{})
		watch := client.WatchUntilExit(t.Context(), backend.HandleFor(id), func(e backend.Event) error {
			t.Errorf("%s: passed on %+v", what, e)
			return nil
		})
		errs := map[string]error{"Provision": provision, "WatchUntilExit": watch}
		if c.f.err != nil {
			_, errs["Terminate"] = client.Terminate(t.Context(), backend.HandleFor(id))
		}
		for method, err := range errs {
			if !backenderr.Is(err, c.want) || backenderr.CreatedOf(err) != backenderr.CreatedUnknown || backend.RefusedFence(err) != 0 {
				t.Errorf("%s: %s answers %v, %s, created=%s", what, method, err, backenderr.ReasonOf(err), backenderr.CreatedOf(err))
			}
		}
	}
}
