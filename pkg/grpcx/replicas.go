package grpcx

import (
	"fmt"
	"net"
	"strings"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/health" // the client's side of health checks
	"google.golang.org/grpc/resolver"
)

// Replicas returns the options for a target behind which several replicas may
// be: calls go to them in turn, and only to those that say by gRPC health that
// they serve the service. A server without gRPC health counts as serving.
func Replicas(service string) grpc.DialOption {
	return grpc.WithDefaultServiceConfig(fmt.Sprintf(
		`{"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":%q}}`, service))
}

// listScheme is for targets that list endpoints, "a:7443,b:7443".
const listScheme = "replicas"

// endpoints returns the endpoints of a target that lists several, nil for every
// other target.
func endpoints(target string) []string {
	if !strings.Contains(target, ",") {
		return nil
	}
	return strings.Split(target, ",")
}

// listed makes a target that lists endpoints one that gRPC understands.
func listed(target string) (string, []grpc.DialOption) {
	all := endpoints(target)
	if len(all) == 0 {
		return target, nil
	}
	return listScheme + ":///" + target, []grpc.DialOption{grpc.WithResolvers(list(all))}
}

// list is a resolver of endpoints that are known.
type list []string

// Scheme implements resolver.Builder.
func (l list) Scheme() string { return listScheme }

// Build implements resolver.Builder. Each server has to show a certificate for
// its own name.
func (l list) Build(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, endpoint := range l {
		host, _, err := net.SplitHostPort(endpoint)
		if err != nil {
			return nil, err
		}
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: endpoint, ServerName: host}}})
	}
	_ = cc.UpdateState(state) // a balancer's word on addresses that it can't reach; it goes on trying
	return l, nil
}

// OverrideAuthority implements resolver.AuthorityOverrider.
func (l list) OverrideAuthority(resolver.Target) string { return l[0] }

// ResolveNow implements resolver.Resolver.
func (l list) ResolveNow(resolver.ResolveNowOptions) {}

// Close implements resolver.Resolver.
func (l list) Close() {}
