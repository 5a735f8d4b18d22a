package grpcx

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// calling returns the context of a call by a peer, with metadata in pairs.
func calling(t *testing.T, identity string, pairs ...string) context.Context {
	t.Helper()
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: peerInfo{identity: identity}})
	return metadata.NewIncomingContext(ctx, metadata.Pairs(pairs...))
}

// methods returns every RPC of the contract.
func methods(t *testing.T) []string {
	t.Helper()
	var all []string
	protoregistry.GlobalFiles.RangeFilesByPackage("computebridge.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				all = append(all, "/"+string(service.FullName())+"/"+string(service.Methods().Get(j).Name()))
			}
		}
		return true
	})
	if len(all) < 12 {
		t.Fatalf("only %d methods found", len(all))
	}
	return all
}

func TestEveryMethodHasItsRoles(t *testing.T) {
	t.Parallel()
	a := newAuthenticator([]ClientEntry{
		{Identity: "reader", Role: "reader"}, {Identity: "client", Role: "client"}, {Identity: "operator", Role: "operator"},
	})
	known := map[string]bool{}
	for _, method := range methods(t) {
		known[method] = true
		if _, ok := methodRoles[method]; !ok {
			t.Errorf("%s: nobody may call it", method)
		}
		for _, role := range []string{"reader", "client", "operator", "unlisted"} {
			allowed := role != "unlisted"
			switch {
			case strings.Contains(method, "OperatorService"):
				allowed = role == "operator"
			case strings.HasSuffix(method, "/Provision"), strings.HasSuffix(method, "/Terminate"), strings.HasSuffix(method, "/WatchUntilExit"):
				allowed = role == "operator" || role == "client"
			}
			ctx, err := a.authenticate(calling(t, role), method)
			want := backenderr.CallerDenied
			if role == "unlisted" {
				want = backenderr.CallerUnauthenticated
			}
			switch {
			case allowed && (err != nil || backend.CallerFrom(ctx).Identity != role || backend.CallerFrom(ctx).Role.String() != role):
				t.Errorf("%s by %s: %+v, %v", method, role, backend.CallerFrom(ctx), err)
			case !allowed && (!backenderr.Is(err, want) || backenderr.CreatedOf(err) != backenderr.CreatedNone):
				t.Errorf("%s by %s: %v, want %s", method, role, err, want)
			}
		}
	}
	for method := range methodRoles {
		if !known[method] && !foreignProtocol(method) {
			t.Errorf("%s isn't in the contract", method)
		}
	}
}

func TestHealthAnswersWithoutAnIdentity(t *testing.T) {
	t.Parallel()
	a := newAuthenticator(nil)
	for method, allowed := range map[string]bool{
		"/grpc.health.v1.Health/Check": true, "/grpc.health.v1.Health/Watch": true, "/grpc.health.v1.Health/List": false,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": false, "/no.such/Method": false,
	} {
		ctx, err := a.authenticate(calling(t, "somebody"), method)
		if (err == nil) != allowed {
			t.Errorf("%s: %v", method, err)
		}
		if err == nil && backend.CallerFrom(ctx) != (backend.Caller{}) {
			t.Errorf("%s: somebody is %+v", method, backend.CallerFrom(ctx))
		}
		if _, err := a.authenticate(t.Context(), method); (err == nil) != allowed {
			t.Errorf("%s without a peer: %v", method, err)
		}
	}
}

func TestRouterSpeaksForItsCaller(t *testing.T) {
	t.Parallel()
	a := newAuthenticator([]ClientEntry{
		{Identity: "router", Role: "operator", Router: true}, {Identity: "client", Role: "client"},
	})
	for name, c := range map[string]struct {
		peer   string
		pairs  []string
		want   backend.Caller
		reason backenderr.Reason
	}{
		"a router in its own name":   {"router", nil, backend.Caller{Identity: "router", Role: backend.RoleOperator}, ""},
		"for a client":               {"router", []string{metaClient, "alice", metaRole, "client", metaHops, "1"}, backend.Caller{Identity: "alice", Role: backend.RoleClient, Hops: 1}, ""},
		"for an operator":            {"router", []string{metaClient, "root", metaRole, "operator", metaHops, "8"}, backend.Caller{Identity: "root", Role: backend.RoleOperator, Hops: 8}, ""},
		"for a reader":               {"router", []string{metaClient, "r", metaRole, "reader", metaHops, "2"}, backend.Caller{Identity: "r", Role: backend.RoleReader, Hops: 2}, backenderr.CallerDenied},
		"not a router":               {"client", []string{metaClient, "root", metaRole, "operator", metaHops, "1"}, backend.Caller{}, backenderr.CallerDenied},
		"not a router, for itself":   {"client", []string{metaClient, "client", metaRole, "client", metaHops, "1"}, backend.Caller{}, backenderr.CallerDenied},
		"not a router, role alone":   {"client", []string{metaRole, "operator", metaHops, "1"}, backend.Caller{Identity: "client", Role: backend.RoleClient}, ""},
		"unlisted":                   {"eve", []string{metaClient, "root", metaRole, "operator", metaHops, "1"}, backend.Caller{}, backenderr.CallerUnauthenticated},
		"too many hops":              {"router", []string{metaClient, "a", metaRole, "client", metaHops, "9"}, backend.Caller{}, backenderr.HopLimitExceeded},
		"no hops":                    {"router", []string{metaClient, "a", metaRole, "client"}, backend.Caller{}, backenderr.RequestInvalid},
		"zero hops":                  {"router", []string{metaClient, "a", metaRole, "client", metaHops, "0"}, backend.Caller{}, backenderr.RequestInvalid},
		"negative hops":              {"router", []string{metaClient, "a", metaRole, "client", metaHops, "-1"}, backend.Caller{}, backenderr.RequestInvalid},
		"hops that overflow":         {"router", []string{metaClient, "a", metaRole, "client", metaHops, "99999999999999999999"}, backend.Caller{}, backenderr.RequestInvalid},
		"no role":                    {"router", []string{metaClient, "a", metaHops, "1"}, backend.Caller{}, backenderr.RequestInvalid},
		"the role of nobody":         {"router", []string{metaClient, "a", metaRole, "none", metaHops, "1"}, backend.Caller{}, backenderr.RequestInvalid},
		"a role that does not exist": {"router", []string{metaClient, "a", metaRole, "root", metaHops, "1"}, backend.Caller{}, backenderr.RequestInvalid},
	} {
		ctx, err := a.authenticate(calling(t, c.peer, c.pairs...), bridgev1.BackendService_Provision_FullMethodName)
		if got := backenderr.ReasonOf(err); got != c.reason {
			t.Errorf("%s: %v, want %q", name, err, c.reason)
			continue
		}
		if err == nil && backend.CallerFrom(ctx) != c.want {
			t.Errorf("%s: caller %+v, want %+v", name, backend.CallerFrom(ctx), c.want)
		}
	}
}

func TestPassCallerAddsAHop(t *testing.T) {
	t.Parallel()
	if _, sent := metadata.FromOutgoingContext(PassCaller(t.Context())); sent {
		t.Error("nobody was passed on")
	}
	a := newAuthenticator([]ClientEntry{{Identity: "router", Role: "client", Router: true}})
	caller := backend.Caller{Identity: "spiffe://x/alice", Role: backend.RoleClient}
	for hop := 1; hop <= backend.MaxHops+1; hop++ {
		out, _ := metadata.FromOutgoingContext(PassCaller(backend.WithCaller(t.Context(), caller)))
		ctx := peer.NewContext(metadata.NewIncomingContext(t.Context(), out), &peer.Peer{AuthInfo: peerInfo{identity: "router"}})
		ctx, err := a.authenticate(ctx, bridgev1.BackendService_Provision_FullMethodName)
		if hop > backend.MaxHops {
			if !backenderr.Is(err, backenderr.HopLimitExceeded) {
				t.Errorf("hop %d: %v", hop, err)
			}
			return
		}
		caller.Hops = hop
		if err != nil || backend.CallerFrom(ctx) != caller {
			t.Fatalf("hop %d: %+v, %v", hop, backend.CallerFrom(ctx), err)
		}
	}
}

// A fence shuts out every call below it: only routers may send one.
func TestFencesAreForRouters(t *testing.T) {
	t.Parallel()
	a := newAuthenticator([]ClientEntry{{Identity: "router", Role: "client", Router: true}, {Identity: "client", Role: "client"}})
	for name, c := range map[string]struct {
		peer, sent string
		want       uint64
		reason     backenderr.Reason
	}{
		"of a router":      {"router", "7", 7, ""},
		"of a client":      {"client", "7", 0, backenderr.CallerDenied},
		"of a stranger":    {"eve", "7", 0, backenderr.CallerUnauthenticated},
		"the highest":      {"router", "4611686018427387904", 1 << 62, ""},
		"above that":       {"router", "4611686018427387905", 0, backenderr.RequestInvalid},
		"zero":             {"router", "0", 0, backenderr.RequestInvalid},
		"negative":         {"router", "-1", 0, backenderr.RequestInvalid},
		"no number at all": {"router", "seven", 0, backenderr.RequestInvalid},
	} {
		ctx, err := a.authenticate(calling(t, c.peer, metaFence, c.sent), bridgev1.BackendService_Provision_FullMethodName)
		if got := backenderr.ReasonOf(err); got != c.reason {
			t.Errorf("%s: %v, want %q", name, err, c.reason)
		}
		if err == nil && backend.FenceFrom(ctx) != c.want {
			t.Errorf("%s: fence %d, want %d", name, backend.FenceFrom(ctx), c.want)
		}
	}
	out, _ := metadata.FromOutgoingContext(PassCaller(backend.WithFence(t.Context(), 9)))
	if got := first(out, metaFence); got != "9" {
		t.Errorf("fence 9 is passed on as %q", got)
	}
}
