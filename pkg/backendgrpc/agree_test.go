package backendgrpc_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

func validRequest(now time.Time) *bridgev1.ProvisionRequest {
	hash := slices.Repeat([]byte{7}, 32)
	return &bridgev1.ProvisionRequest{
		Grant: &bridgev1.Grant{
			RequestId: slices.Repeat([]byte{1}, 32), PostHash: hash,
			Image: &bridgev1.Image{
				Digest: &bridgev1.Digest{Algorithm: bridgev1.DigestAlgorithm_DIGEST_ALGORITHM_SHA256, Value: slices.Repeat([]byte{3}, 32)},
				Kind:   bridgev1.ImageKind_IMAGE_KIND_OCI_ARCHIVE,
			},
			Shape:        &bridgev1.Shape{CpuMillicores: 1000, RamMib: 512, StorageGib: 1},
			MinIsolation: bridgev1.IsolationLevel_ISOLATION_LEVEL_CONTAINER,
			Ports:        []*bridgev1.Port{{Number: 80, Protocol: bridgev1.Protocol_PROTOCOL_TCP}},
			Environment:  map[string]string{"A": "b=c %i $HOME"},
			NetworkPolicy: &bridgev1.NetworkPolicy{
				Mode: bridgev1.NetworkPolicyMode_NETWORK_POLICY_MODE_ALLOWLIST, AllowedPrefixes: []string{"192.0.2.0/24"},
			},
			ValidTo: timestamppb.New(now.Add(time.Hour)),
		},
		Envelope: &bridgev1.Envelope{PostHash: hash},
	}
}

// The rules in the proto files and the checks in package backend refuse the
// same requests, for the same fields, with the same reason: a caller in the
// process and one on the wire hear the same.
func TestRulesOfWireAndDomainAgree(t *testing.T) {
	t.Parallel()
	validator, err := protovalidate.New()
	if err != nil {
		t.Fatal(err)
	}
	interceptor := grpcx.ValidateUnary(validator)
	now := time.Now()
	wire := func(req *bridgev1.ProvisionRequest) error {
		_, err := interceptor(t.Context(), req, &grpc.UnaryServerInfo{}, func(context.Context, any) (any, error) { return struct{}{}, nil })
		return err
	}
	domain := func(req *bridgev1.ProvisionRequest) error {
		return backend.Validate(backendgrpc.GrantFromProto(req.GetGrant()), backendgrpc.EnvelopeFromProto(req.GetEnvelope()), now, 24*time.Hour)
	}
	if req := validRequest(now); wire(req) != nil || domain(req) != nil {
		t.Fatalf("a valid request is refused: %v; %v", wire(req), domain(req))
	}

	type grant = bridgev1.Grant
	type envelope = bridgev1.Envelope
	cases := map[string]struct {
		change func(*grant, *envelope)
		field  string
	}{
		"short id":            {func(g *grant, _ *envelope) { g.RequestId = g.GetRequestId()[1:] }, "grant.request_id"},
		"no id":               {func(g *grant, _ *envelope) { g.RequestId = nil }, "grant.request_id"},
		"short provider":      {func(g *grant, _ *envelope) { g.ProviderId = make([]byte, 31) }, "grant.provider_id"},
		"no image":            {func(g *grant, _ *envelope) { g.Image = nil }, "grant.image"},
		"no digest":           {func(g *grant, _ *envelope) { g.Image.Digest = nil }, "grant.image.digest"},
		"short digest":        {func(g *grant, _ *envelope) { g.Image.Digest.Value = make([]byte, 20) }, "grant.image.digest.value"},
		"no algorithm":        {func(g *grant, _ *envelope) { g.Image.Digest.Algorithm = 0 }, "grant.image.digest.algorithm"},
		"unknown algorithm":   {func(g *grant, _ *envelope) { g.Image.Digest.Algorithm = 9 }, "grant.image.digest.algorithm"},
		"no kind":             {func(g *grant, _ *envelope) { g.Image.Kind = 0 }, "grant.image.kind"},
		"unknown kind":        {func(g *grant, _ *envelope) { g.Image.Kind = 9 }, "grant.image.kind"},
		"no shape":            {func(g *grant, _ *envelope) { g.Shape = nil }, "grant.shape"},
		"no CPU":              {func(g *grant, _ *envelope) { g.Shape.CpuMillicores = 0 }, "grant.shape.cpu_millicores"},
		"negative RAM":        {func(g *grant, _ *envelope) { g.Shape.RamMib = -1 }, "grant.shape.ram_mib"},
		"absurd CPU":          {func(g *grant, _ *envelope) { g.Shape.CpuMillicores = int64(backend.MaxCPU) + 1 }, "grant.shape.cpu_millicores"},
		"absurd RAM":          {func(g *grant, _ *envelope) { g.Shape.RamMib = int64(backend.MaxRAM) + 1 }, "grant.shape.ram_mib"},
		"absurd storage":      {func(g *grant, _ *envelope) { g.Shape.StorageGib = int64(backend.MaxStorage) + 1 }, "grant.shape.storage_gib"},
		"no isolation":        {func(g *grant, _ *envelope) { g.MinIsolation = 0 }, "grant.min_isolation"},
		"unknown isolation":   {func(g *grant, _ *envelope) { g.MinIsolation = 4 }, "grant.min_isolation"},
		"region":              {func(g *grant, _ *envelope) { g.Region = "EU west" }, "grant.region"},
		"region with newline": {func(g *grant, _ *envelope) { g.Region = "eu\n" }, "grant.region"},
		"long region":         {func(g *grant, _ *envelope) { g.Region = strings.Repeat("r", 65) }, "grant.region"},
		"port 0":              {func(g *grant, _ *envelope) { g.Ports[0].Number = 0 }, "grant.ports[0].number"},
		"port 65536":          {func(g *grant, _ *envelope) { g.Ports[0].Number = 65536 }, "grant.ports[0].number"},
		"no protocol":         {func(g *grant, _ *envelope) { g.Ports[0].Protocol = 0 }, "grant.ports[0].protocol"},
		"unknown protocol":    {func(g *grant, _ *envelope) { g.Ports[0].Protocol = 9 }, "grant.ports[0].protocol"},
		"port twice":          {func(g *grant, _ *envelope) { g.Ports = append(g.Ports, g.GetPorts()[0]) }, "grant.ports"},
		"33 ports": {func(g *grant, _ *envelope) {
			for i := range uint32(33) {
				g.Ports = append(g.Ports, &bridgev1.Port{Number: 100 + i, Protocol: bridgev1.Protocol_PROTOCOL_UDP})
			}
		}, "grant.ports"},
		"variable with =":       {func(g *grant, _ *envelope) { g.Environment = map[string]string{"A=B": ""} }, `grant.environment["A=B"]`},
		"variable with newline": {func(g *grant, _ *envelope) { g.Environment = map[string]string{"A\n": ""} }, "grant.environment"},
		"long variable":         {func(g *grant, _ *envelope) { g.Environment = map[string]string{strings.Repeat("A", 129): ""} }, "grant.environment"},
		"value with NUL":        {func(g *grant, _ *envelope) { g.Environment["A"] = "\x00" }, `grant.environment["A"]`},
		"value with newline":    {func(g *grant, _ *envelope) { g.Environment["A"] = "a\n" }, `grant.environment["A"]`},
		"value with return":     {func(g *grant, _ *envelope) { g.Environment["A"] = "a\rb" }, `grant.environment["A"]`},
		"long value":            {func(g *grant, _ *envelope) { g.Environment["A"] = strings.Repeat("v", 8193) }, `grant.environment["A"]`},
		"too many variables": {func(g *grant, _ *envelope) {
			for i := range 129 {
				g.Environment[fmt.Sprint("V", i)] = ""
			}
		}, "grant.environment"},
		"unknown network mode": {func(g *grant, _ *envelope) { g.NetworkPolicy.Mode, g.NetworkPolicy.AllowedPrefixes = 9, nil }, "grant.network_policy.mode"},
		"prefixes for open": {func(g *grant, _ *envelope) {
			g.NetworkPolicy.Mode = bridgev1.NetworkPolicyMode_NETWORK_POLICY_MODE_OPEN
		}, "grant.network_policy"},
		"prefix with host bits": {func(g *grant, _ *envelope) { g.NetworkPolicy.AllowedPrefixes[0] = "192.0.2.1/24" }, "grant.network_policy.allowed_prefixes[0]"},
		"no prefix":             {func(g *grant, _ *envelope) { g.NetworkPolicy.AllowedPrefixes[0] = "any" }, "grant.network_policy.allowed_prefixes[0]"},
		"prefix twice": {func(g *grant, _ *envelope) {
			g.NetworkPolicy.AllowedPrefixes = []string{"192.0.2.0/24", "192.0.2.0/24"}
		}, "grant.network_policy.allowed_prefixes"},
		"no deadline":      {func(g *grant, _ *envelope) { g.ValidTo = nil }, "grant.valid_to"},
		"long peer id":     {func(_ *grant, e *envelope) { e.PeerId = make([]byte, 65) }, "envelope.peer_id"},
		"short x25519 key": {func(_ *grant, e *envelope) { e.X25519PublicKey = make([]byte, 31) }, "envelope.x25519_public_key"},
		"long SSH key":     {func(_ *grant, e *envelope) { e.SshPublicKey = strings.Repeat("k", 8193) }, "envelope.ssh_public_key"},
		"long pointer":     {func(_ *grant, e *envelope) { e.ImagePointer = strings.Repeat("p", 1025) }, "envelope.image_pointer"},
		"hint":             {func(_ *grant, e *envelope) { e.RegionHint = "../eu" }, "envelope.region_hint"},
		"long nonce":       {func(_ *grant, e *envelope) { e.Nonce = make([]byte, 65) }, "envelope.nonce"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for side, check := range map[string]func(*bridgev1.ProvisionRequest) error{"wire": wire, "domain": domain} {
				req := validRequest(now)
				c.change(req.GetGrant(), req.GetEnvelope())
				err := check(req)
				var e *backenderr.Error
				if !errors.As(err, &e) || e.Reason != backenderr.GrantInvalid || e.Created != backenderr.CreatedNone {
					t.Errorf("%s: %v, want GRANT_INVALID that created nothing", side, err)
					continue
				}
				for _, v := range e.Violations {
					if !strings.HasPrefix(v.Field, c.field) || v.Description == "" {
						t.Errorf("%s: violation %+v, want field %s", side, v, c.field)
					}
				}
				if len(e.Violations) == 0 {
					t.Errorf("%s names no field", side)
				}
			}
		})
	}
}
