package grpcx

import (
	"context"
	"slices"
	"strconv"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Metadata keys by which a router passes its caller on; see backend.proto.
const (
	metaClient = "computebridge-client"
	metaRole   = "computebridge-role"
	metaHops   = "computebridge-hops"
	metaFence  = "computebridge-fence"
)

// methodRoles says which roles may call what. A method that isn't here may be
// called by nobody. Whether a client owns the grant it names is the backend's
// to check.
var methodRoles = map[string][]backend.Role{
	bridgev1.BackendService_Name_FullMethodName:                      {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.BackendService_Capabilities_FullMethodName:              {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.BackendService_CanSatisfy_FullMethodName:                {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.BackendService_Provision_FullMethodName:                 {backend.RoleClient, backend.RoleOperator},
	bridgev1.BackendService_WatchUntilExit_FullMethodName:            {backend.RoleClient, backend.RoleOperator},
	bridgev1.BackendService_Terminate_FullMethodName:                 {backend.RoleClient, backend.RoleOperator},
	bridgev1.InventoryService_ListInstances_FullMethodName:           {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.InventoryService_ListComputeLogs_FullMethodName:         {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.FleetService_ListBackends_FullMethodName:                {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.FleetService_GetProviderCard_FullMethodName:             {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	bridgev1.OperatorService_SetDraining_FullMethodName:              {backend.RoleOperator},
	bridgev1.OperatorService_Sweep_FullMethodName:                    {backend.RoleOperator},
	"/grpc.health.v1.Health/Check":                                   {backend.RoleNone, backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	"/grpc.health.v1.Health/Watch":                                   {backend.RoleNone, backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	"/grpc.health.v1.Health/List":                                    {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {backend.RoleReader, backend.RoleClient, backend.RoleOperator},
}

// authenticator finds out who calls.
type authenticator struct {
	clients map[string]ClientEntry
}

func newAuthenticator(entries []ClientEntry) *authenticator {
	a := &authenticator{clients: make(map[string]ClientEntry, len(entries))}
	for _, e := range entries {
		a.clients[e.Identity] = e
	}
	return a
}

// authenticate returns a context that carries the caller, or the error for the
// wire. It has the form of go-grpc-middleware's auth.AuthFunc but for method.
func (a *authenticator) authenticate(ctx context.Context, method string) (context.Context, error) {
	caller, err := a.caller(ctx)
	if err != nil {
		// Health answers to whoever got through the handshake.
		if roles := methodRoles[method]; len(roles) > 0 && roles[0] == backend.RoleNone {
			return ctx, nil
		}
		return nil, err
	}
	if roles, known := methodRoles[method]; known {
		if slices.Contains(roles, caller.Role) {
			return a.fenced(backend.WithCaller(ctx, caller))
		}
		return nil, backenderr.New(backenderr.CallerDenied, "%s has role %s, which may not call %s", caller.Identity, caller.Role, method).
			WithCreated(backenderr.CreatedNone)
	}
	// Not ours: the unknown-service handler answers.
	return backend.WithCaller(ctx, caller), nil
}

func (a *authenticator) caller(ctx context.Context) (backend.Caller, error) {
	identity, err := peerIdentity(ctx)
	if err != nil {
		return backend.Caller{}, err
	}
	entry, ok := a.clients[identity]
	if !ok {
		return backend.Caller{}, backenderr.New(backenderr.CallerUnauthenticated, "identity %q is not listed in this server's configuration", identity).
			WithCreated(backenderr.CreatedNone)
	}
	role, err := backend.ParseRole(entry.Role)
	if err != nil {
		return backend.Caller{}, backenderr.New(backenderr.Internal, "role of %q: %v", identity, err)
	}
	caller := backend.Caller{Identity: identity, Role: role}
	md, _ := metadata.FromIncomingContext(ctx)
	passed := first(md, metaClient)
	if passed == "" {
		return caller, nil
	}
	if !entry.Router {
		return backend.Caller{}, backenderr.New(backenderr.CallerDenied, "%q is no router here and may not speak for %q", identity, passed).
			WithCreated(backenderr.CreatedNone)
	}
	if caller.Role, err = backend.ParseRole(first(md, metaRole)); err != nil {
		return backend.Caller{}, invalidMetadata(metaRole, err.Error())
	}
	if caller.Hops, err = strconv.Atoi(first(md, metaHops)); err != nil || caller.Hops < 1 {
		return backend.Caller{}, invalidMetadata(metaHops, "must be a positive number")
	}
	if caller.Hops > backend.MaxHops {
		return backend.Caller{}, backenderr.New(backenderr.HopLimitExceeded, "the call has passed %d routers; at most %d are allowed", caller.Hops, backend.MaxHops).
			WithCreated(backenderr.CreatedNone)
	}
	caller.Identity = passed
	return caller, nil
}

// fenced returns a context with the call's fence. Whoever sends one speaks for
// a router: what is refused to a fence is refused to every call below it.
func (a *authenticator) fenced(ctx context.Context) (context.Context, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	sent := first(md, metaFence)
	if sent == "" {
		return ctx, nil
	}
	identity, err := peerIdentity(ctx)
	if err != nil {
		return nil, err
	}
	if !a.clients[identity].Router {
		return nil, backenderr.New(backenderr.CallerDenied, "%q is no router here and has no fences", identity).WithCreated(backenderr.CreatedNone)
	}
	fence, err := strconv.ParseUint(sent, 10, 64)
	if err != nil || fence == 0 || fence > backend.MaxFence {
		return nil, invalidMetadata(metaFence, "must be a positive number below 2^62")
	}
	return backend.WithFence(ctx, fence), nil
}

func invalidMetadata(key, description string) error {
	return backenderr.Invalid(backenderr.RequestInvalid, backenderr.Violation{Field: "metadata " + key, Description: description})
}

func first(md metadata.MD, key string) string {
	if values := md.Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}

func peerIdentity(ctx context.Context) (string, error) {
	p, ok := peer.FromContext(ctx)
	if ok {
		switch info := p.AuthInfo.(type) {
		case credentials.TLSInfo:
			if chains := info.State.VerifiedChains; len(chains) > 0 && len(chains[0]) > 0 {
				return certificateIdentity(chains[0][0]), nil
			}
		case peerInfo:
			return info.identity, nil
		}
	}
	return "", backenderr.New(backenderr.CallerUnauthenticated, "the connection shows no identity").WithCreated(backenderr.CreatedNone)
}

// PassCaller returns a context for calls that a router makes on behalf of its
// own caller: identity, role, one hop more, and the fence if there is one.
func PassCaller(ctx context.Context) context.Context {
	caller := backend.CallerFrom(ctx)
	if fence := backend.FenceFrom(ctx); fence != 0 {
		ctx = metadata.AppendToOutgoingContext(ctx, metaFence, strconv.FormatUint(fence, 10))
	}
	if caller.Identity == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx,
		metaClient, caller.Identity,
		metaRole, caller.Role.String(),
		metaHops, strconv.Itoa(caller.Hops+1))
}
