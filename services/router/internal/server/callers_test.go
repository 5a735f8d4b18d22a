package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Who may do what: every RPC of every service, by every identity, at a worker,
// through a router and through two of them, over TLS.

// who calls.
type who int

const (
	// Refused in the handshake.
	uncertified who = iota // shows no certificate
	expired
	notYetValid
	wrongAuthority
	serverOnly // a certificate that is not for clients
	// Known by name, or not.
	stranger // not listed
	impostor // a client that says it speaks for the owner
	reader
	relay   // a router, in its own name, listed as reader
	other   // a client
	owner   // the client that provisioned
	rotated // the same with a new certificate
	operator
	everybody // how many there are
)

func (w who) String() string {
	return [...]string{
		"no certificate", "expired", "not yet valid", "wrong CA", "server-only certificate", "stranger", "impostor", "reader",
		"router in its own name", "other client", "owner", "owner, rotated", "operator",
	}[w]
}

// level is where the call enters.
type level int

const (
	atWorker level = iota
	atRouter
	atOuter // a router over a router
	levels
)

func (l level) String() string {
	return [...]string{"at the worker", "through a router", "through two routers"}[l]
}

// answer is what a cell of the table expects; "" is success.
type answer = backenderr.Reason

// denied says that a role may not.
const denied = backenderr.CallerDenied

// row says what a method answers to those whom the handshake lets in, from
// reader on: reader and relay, other, owner and rotated, operator.
type row struct {
	reader, other, owner, operator answer
	// open says that whoever passes the handshake may call.
	open bool
	// workers, routers: it is served there; if not, UNIMPLEMENTED to who may.
	workers, routers bool
}

// rows has a row for each method of each service. A method without one may be
// called by nobody, and fails this test.
var rows = map[string]row{
	bridgev1.BackendService_Name_FullMethodName:                       {workers: true, routers: true},
	bridgev1.BackendService_Capabilities_FullMethodName:               {workers: true, routers: true},
	bridgev1.BackendService_CanSatisfy_FullMethodName:                 {workers: true, routers: true},
	bridgev1.BackendService_Provision_FullMethodName:                  {reader: denied, other: backenderr.GrantConflict, workers: true, routers: true},
	bridgev1.BackendService_WatchUntilExit_FullMethodName:             {reader: denied, other: denied, workers: true, routers: true},
	bridgev1.BackendService_Terminate_FullMethodName:                  {reader: denied, other: denied, workers: true, routers: true},
	bridgev1.InventoryService_ListInstances_FullMethodName:            {workers: true, routers: true},
	bridgev1.InventoryService_ListComputeLogs_FullMethodName:          {workers: true, routers: true},
	bridgev1.FleetService_ListBackends_FullMethodName:                 {routers: true},
	bridgev1.FleetService_GetProviderCard_FullMethodName:              {routers: true},
	bridgev1.OperatorService_SetDraining_FullMethodName:               {reader: denied, other: denied, owner: denied, workers: true},
	bridgev1.OperatorService_Sweep_FullMethodName:                     {reader: denied, other: denied, owner: denied, workers: true, routers: true},
	healthv1.Health_Check_FullMethodName:                              {open: true, workers: true, routers: true},
	healthv1.Health_Watch_FullMethodName:                              {open: true, workers: true, routers: true},
	healthv1.Health_List_FullMethodName:                               {workers: true, routers: true},
	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName: {workers: true, routers: true},
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo":  {workers: true, routers: true},
}

// want is the answer of a cell.
func (r row) want(w who, l level) answer {
	switch {
	case w <= serverOnly:
		return backenderr.BackendUnreachable
	case r.open:
		return ""
	case w == stranger:
		return backenderr.CallerUnauthenticated
	case w == impostor:
		return denied
	}
	var a answer
	switch w {
	case reader, relay:
		a = r.reader
	case other:
		a = r.other
	case owner, rotated:
		a = r.owner
	case operator:
		a = r.operator
	default:
		panic("no column for: " + w.String())
	}
	if a == "" && ((l == atWorker && !r.workers) || (l != atWorker && !r.routers)) {
		return backenderr.Unimplemented
	}
	return a
}

// nest is a worker under a router under a router.
type nest struct {
	*site
	addresses [levels]string
	conns     [levels][everybody]*grpc.ClientConn
}

func newNest(t *testing.T) *nest {
	t.Helper()
	n := &nest{site: newSite(t)}
	m := n.machine(t, "deep", 30)
	for identity, role := range map[string]string{"alice": "client", "bob": "client", "reader": "reader", "operator": "operator"} {
		m.clients = append(m.clients, grpcx.ClientEntry{Identity: "spiffe://test/" + identity, Role: role})
	}
	m.clients = append(m.clients, grpcx.ClientEntry{Identity: "spiffe://test/outer", Role: "reader", Router: true})
	m.start(t)
	n.addresses[atWorker] = m.address
	c, _ := n.router(t, m).start(t)
	n.addresses[atRouter] = c.Listen[0].Address
	c, _ = n.routerOver(t, "outer", target{"inner", n.addresses[atRouter]}).start(t)
	n.addresses[atOuter] = c.Listen[0].Address

	another := newAuthority(t)
	wrong := another.identity(t, "alice", "spiffe://test/alice")
	wrong.CAFile = n.ca.identity(t, "alice", "spiffe://test/alice").CAFile // The server is the right one.
	files := [everybody]grpcx.TLSConfig{
		expired: n.ca.identity(t, "expired", "spiffe://test/alice", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		notYetValid: n.ca.identity(t, "early", "spiffe://test/alice", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}),
		wrongAuthority: wrong,
		serverOnly: n.ca.identity(t, "server-only", "spiffe://test/alice", func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
		stranger: n.ca.identity(t, "mallory", "spiffe://test/mallory"),
		impostor: n.ca.identity(t, "bob", "spiffe://test/bob"),
		other:    n.ca.identity(t, "bob", "spiffe://test/bob"),
		reader:   n.ca.identity(t, "reader", "spiffe://test/reader"),
		relay:    n.ca.identity(t, "relay", "spiffe://test/outer"),
		owner:    n.ca.identity(t, "alice", "spiffe://test/alice"),
		rotated:  n.ca.identity(t, "alice-2", "spiffe://test/alice"),
		operator: n.ca.identity(t, "operator", "spiffe://test/operator"),
	}
	pool := x509.NewCertPool()
	pool.AddCert(n.ca.cert)
	for l := range levels {
		for w := range everybody {
			if w != uncertified {
				n.conns[l][w] = connect(t, grpcx.ClientConfig{Target: n.addresses[l], ServerName: "localhost"}, files[w])
				continue
			}
			conn, err := grpc.NewClient(n.addresses[l], grpc.WithTransportCredentials(
				credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "localhost"})))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			n.conns[l][w] = conn
		}
	}
	return n
}

// handle is that of a grant at the worker, as a level names it.
func (n *nest) handle(id backend.GrantID, l level) string {
	h := backend.HandleFor(id)
	if l >= atRouter {
		h = h.Via("deep")
	}
	if l >= atOuter {
		h = h.Via("inner")
	}
	return string(h)
}

// methods returns every method that a server's reflection tells of.
func methods(t *testing.T, conn *grpc.ClientConn) []protoreflect.MethodDescriptor {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
	if err != nil {
		t.Fatal(err)
	}
	res, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var all []protoreflect.MethodDescriptor
	for _, s := range res.GetListServicesResponse().GetService() {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(s.GetName()))
		if err != nil {
			t.Fatalf("service %s: %v", s.GetName(), err)
		}
		service, ok := found.(protoreflect.ServiceDescriptor)
		if !ok {
			t.Fatalf("%s is no service", s.GetName())
		}
		for i := range service.Methods().Len() {
			all = append(all, service.Methods().Get(i))
		}
	}
	return all
}

func fullName(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

// call makes one call and returns how it begins: the first answer of a stream
// is enough.
func call(ctx context.Context, conn *grpc.ClientConn, m protoreflect.MethodDescriptor, req proto.Message) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	res := dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingServer() {
		return conn.Invoke(ctx, fullName(m), req, res)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.IsStreamingClient()}, fullName(m))
	if err != nil {
		return err
	}
	if err := stream.SendMsg(req); err != nil && !errors.Is(err, io.EOF) { // RecvMsg has the error.
		return err
	}
	return stream.RecvMsg(res)
}

func TestEveryMethodByEveryIdentity(t *testing.T) {
	n := newNest(t)
	// The methods of all levels: one that isn't served at a level is asked there,
	// too.
	all := map[string]protoreflect.MethodDescriptor{}
	for l := range levels {
		for _, m := range methods(t, n.conns[l][operator]) {
			all[fullName(m)] = m
		}
	}
	for name := range all {
		if _, ok := rows[name]; !ok {
			t.Errorf("%s has no row: who may call it?", name)
		}
	}
	for name := range rows {
		if all[name] == nil {
			t.Errorf("%s has a row and is served nowhere", name)
		}
	}

	grant, envelope := newGrant(t)
	provision := func(l level, g backend.Grant) error {
		_, err := backendgrpc.NewClient(n.conns[l][owner]).Provision(t.Context(), g, envelope)
		return err
	}
	if err := provision(atOuter, grant); err != nil {
		t.Fatal(err)
	}
	cells := 0
	for name, m := range all {
		r := rows[name]
		for l := range levels {
			for w := range everybody {
				id := grant.ID
				want := r.want(w, l)
				// Who may end a grant does: it gets one of its own.
				if name == bridgev1.BackendService_Terminate_FullMethodName && want == "" {
					g, _ := newGrant(t)
					if err := provision(l, g); err != nil {
						t.Fatalf("%s: a grant to be ended: %v", l, err)
					}
					id = g.ID
				}
				var req proto.Message
				switch name {
				case bridgev1.BackendService_Provision_FullMethodName:
					req = &bridgev1.ProvisionRequest{Grant: backendgrpc.GrantToProto(grant), Envelope: backendgrpc.EnvelopeToProto(envelope)}
				case bridgev1.BackendService_CanSatisfy_FullMethodName:
					req = &bridgev1.CanSatisfyRequest{Grant: backendgrpc.GrantToProto(grant)}
				case bridgev1.BackendService_WatchUntilExit_FullMethodName:
					req = &bridgev1.WatchUntilExitRequest{Handle: n.handle(id, l)}
				case bridgev1.BackendService_Terminate_FullMethodName:
					req = &bridgev1.TerminateRequest{Handle: n.handle(id, l)}
				default:
					message := dynamicpb.NewMessage(m.Input())
					if ask := m.Input().Fields().ByName("list_services"); ask != nil { // Reflection takes no empty question.
						message.Set(ask, protoreflect.ValueOfString("*"))
					}
					req = message
				}
				ctx := t.Context()
				if w == impostor {
					ctx = metadata.AppendToOutgoingContext(ctx, "computebridge-client", "spiffe://test/alice", "computebridge-role", "client", "computebridge-hops", "1")
				}
				err := call(ctx, n.conns[l][w], m, req)
				cells++
				if got := backenderr.ReasonOf(err); got != want {
					t.Errorf("%s by %s %s: %v, want %q", name, w, l, err, want)
				}
				if want != "" && backenderr.Status(err).Code() != want.Code() {
					t.Errorf("%s by %s %s: code %s, want %s", name, w, l, backenderr.Status(err).Code(), want.Code())
				}
			}
		}
	}
	t.Logf("%d calls", cells)
}

// What a list shows depends on who asks, not on the way.
func TestListsShowWhatTheCallerMaySee(t *testing.T) {
	n := newNest(t)
	ctx := t.Context()
	want := map[who][]bool{} // Which of the grants below; of alice, of bob.
	for w, sees := range map[who][2]bool{reader: {true, true}, relay: {true, true}, other: {false, true}, owner: {true, false}, rotated: {true, false}, operator: {true, true}} {
		want[w] = sees[:]
	}
	var ids []backend.GrantID
	for i, w := range []who{owner, other} {
		g, e := newGrant(t)
		ids = append(ids, g.ID)
		if _, err := backendgrpc.NewClient(n.conns[[]level{atOuter, atRouter}[i]][w]).Provision(ctx, g, e); err != nil {
			t.Fatal(err)
		}
	}
	for l := range levels {
		for w, sees := range want {
			res, err := bridgev1.NewInventoryServiceClient(n.conns[l][w]).ListInstances(ctx, &bridgev1.ListInstancesRequest{})
			if err != nil {
				t.Errorf("%s %s: %v", w, l, err)
				continue
			}
			for i, id := range ids {
				at := slices.IndexFunc(res.GetInstances(), func(i *bridgev1.Instance) bool { return i.GetHandle() == n.handle(id, l) })
				if (at >= 0) != sees[i] {
					t.Errorf("%s %s sees grant %d: %t, want %t", w, l, i, at >= 0, sees[i])
				}
				if at >= 0 && (res.GetInstances()[at].GetOwner() != "") != (w == operator) {
					t.Errorf("%s %s is told that grant %d is of %q", w, l, i, res.GetInstances()[at].GetOwner())
				}
			}
		}
	}
}
