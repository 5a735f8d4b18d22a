package spec_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/spec"
)

func TestAmountsAreReadExactlyOrRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		parse func(string) (int64, error)
		text  string
		want  int64 // 0: an error
	}{
		{spec.CPU, "500m", 500},
		{spec.CPU, "2", 2000},
		{spec.CPU, "1.5", 1500},
		{spec.CPU, "0.001", 1},
		{spec.CPU, "4096", 4096000},
		{spec.CPU, "4097", 0},
		{spec.CPU, "0.0005", 0},
		{spec.CPU, "1.5m", 0},
		{spec.CPU, "0", 0},
		{spec.CPU, "0m", 0},
		{spec.CPU, "-1", 0},
		{spec.CPU, "+1", 0},
		{spec.CPU, "1e3", 0},
		{spec.CPU, "1/2", 0},
		{spec.CPU, "1.", 0},
		{spec.CPU, ".5", 0},
		{spec.CPU, "1_000", 0},
		{spec.CPU, "0x10", 0},
		{spec.CPU, "", 0},
		{spec.CPU, "m", 0},
		{spec.CPU, " 1", 0},
		{spec.CPU, strings.Repeat("9", 400), 0},
		{spec.RAM, "512Mi", 512},
		{spec.RAM, "512MiB", 512},
		{spec.RAM, "2Gi", 2048},
		{spec.RAM, "1.5Gi", 1536},
		{spec.RAM, "64Ti", 64 << 20},
		{spec.RAM, "65Ti", 0},
		{spec.RAM, "512", 0},
		{spec.RAM, "512MB", 0},
		{spec.RAM, "512M", 0},
		{spec.RAM, "1Ki", 0},
		{spec.RAM, "0.5Mi", 0},
		{spec.RAM, "Gi", 0},
		{spec.RAM, "1Gi ", 0},
		{spec.Disk, "1Gi", 1},
		{spec.Disk, "2048Mi", 2},
		{spec.Disk, "1Pi", 1 << 20},
		{spec.Disk, "512Mi", 0},
		{spec.Disk, "1.5Gi", 0},
		{spec.Disk, "2Pi", 0},
	} {
		got, err := c.parse(c.text)
		if (err == nil) != (c.want != 0) || got != c.want {
			t.Errorf("%q: got %d, %v; want %d", c.text, got, err, c.want)
		}
	}
}

func TestPortsSpansAndDigests(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]*bridgev1.Port{
		"80": {Number: 80, Protocol: 1}, "80/tcp": {Number: 80, Protocol: 1}, "53/udp": {Number: 53, Protocol: 2}, "65535/udp": {Number: 65535, Protocol: 2},
		"0": nil, "65536/tcp": nil, "80/": nil, "80/sctp": nil, "-1": nil, "+80": nil, "080": nil, "": nil, "80/TCP": nil, "80-90/tcp": nil, "8080:80": nil,
	} {
		got, err := spec.Port(text)
		if (err == nil) != (want != nil) || !proto.Equal(got, want) {
			t.Errorf("port %q: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "1h30m": 90 * time.Minute, "2d": 48 * time.Hour, "1d12h": 36 * time.Hour,
		"": 0, "0s": 0, "0d": 0, "-1h": 0, "1": 0, "d": 0, "1d-1h": 0, "1w": 0, "99999999d": 0, "1d1d": 0, "1.5d": 0, "999999h999999h": 0,
	} {
		got, err := spec.Span(text)
		if (err == nil) != (want != 0) || got != want {
			t.Errorf("span %q: %v, %v", text, got, err)
		}
	}
	if d, err := spec.Digest("sha256:" + strings.Repeat("ab", 32)); err != nil || hex.EncodeToString(d.GetValue()) != strings.Repeat("ab", 32) {
		t.Error(d, err)
	}
	for _, text := range []string{"", "md5:00", "sha256:abc", strings.Repeat("ab", 32), "sha256:" + strings.Repeat("zz", 32)} {
		if _, err := spec.Digest(text); err == nil {
			t.Errorf("digest %q was read", text)
		}
	}
	env, err := spec.EnvFile([]byte("# comment\n\nA=1\r\nB=x=y \n C\n"))
	if err == nil {
		t.Errorf("a line without = was read: %v", env)
	}
	env, err = spec.EnvFile([]byte("# comment\n\nA=1\r\nB=x=y \nEMPTY="))
	if diff := cmp.Diff(map[string]string{"A": "1", "B": "x=y ", "EMPTY": ""}, env); err != nil || diff != "" {
		t.Error(err, diff)
	}
	if _, err := spec.EnvFile([]byte("A=1\nA=2")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Error(err)
	}
}

const full = `
grant:
  request_id: 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
  postHash: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
  image:
    digest: {algorithm: sha256, value: 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f}
    kind: oci-archive
  shape: {cpu_millicores: 500, ramMib: 512, storage_gib: "1"}
  min_isolation: ISOLATION_LEVEL_VM
  region: eu-north
  ports: [{number: 80, protocol: tcp}]
  environment: {A: "1", B: "%i $HOME ../"}
  network_policy: {mode: allowlist, allowed_prefixes: [192.0.2.0/24]}
  valid_to: 2030-01-31T12:00:00Z
  almanac_sequence: 18446744073709551615
envelope:
  ssh_public_key: ssh-ed25519 AAAA
`

func ascending() []byte {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func fullRequest() *bridgev1.ProvisionRequest {
	return &bridgev1.ProvisionRequest{
		Grant: &bridgev1.Grant{
			RequestId: ascending(), PostHash: ascending(),
			Image: &bridgev1.Image{Digest: &bridgev1.Digest{Algorithm: 1, Value: ascending()}, Kind: 1},
			Shape: &bridgev1.Shape{CpuMillicores: 500, RamMib: 512, StorageGib: 1}, MinIsolation: 2, Region: "eu-north",
			Ports: []*bridgev1.Port{{Number: 80, Protocol: 1}}, Environment: map[string]string{"A": "1", "B": "%i $HOME ../"},
			NetworkPolicy: &bridgev1.NetworkPolicy{Mode: 2, AllowedPrefixes: []string{"192.0.2.0/24"}},
			ValidTo:       timestamppb.New(time.Date(2030, 1, 31, 12, 0, 0, 0, time.UTC)), AlmanacSequence: 1<<64 - 1,
		},
		Envelope: &bridgev1.Envelope{SshPublicKey: "ssh-ed25519 AAAA"},
	}
}

func TestFileIsReadInBothForms(t *testing.T) {
	t.Parallel()
	got, err := spec.ParseFile("grant.yaml", []byte(full))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fullRequest(), got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	for _, options := range []protojson.MarshalOptions{{}, {UseProtoNames: true, EmitDefaultValues: true}, {UseEnumNumbers: true, Multiline: true}} {
		text, err := options.Marshal(fullRequest())
		if err != nil {
			t.Fatal(err)
		}
		got, err := spec.ParseFile("grant.json", text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fullRequest(), got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestFileIsRefusedWithLineAndKey(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                 "g.yaml: empty",
		"grant: [":                         "g.yaml: ",
		"7":                                "g.yaml:1: the file: want keys and values",
		"grant:\n  shape:\n    ram: 1":     "g.yaml:3: unknown key grant.shape.ram; did you mean ram_mib?",
		"grunt: {}":                        "g.yaml:1: unknown key grunt; there are envelope, grant",
		"grant:\n  region: a\n  region: b": "stands twice",
		"grant: {request_id: AA==, requestId: AA==}":     "grant.requestId: stands twice",
		"grant: {shape: 3}":                              "grant.shape: want keys and values",
		"grant: {ports: {number: 1}}":                    "grant.ports: want a list",
		"grant: {ports: [{number: 80, protocol: sctp}]}": `grant.ports[0].protocol: unknown value "sctp", want one of tcp, udp`,
		"grant: {ports: [{number: -1}]}":                 `grant.ports[0].number: "-1" is no whole number of 32 bits`,
		"grant: {shape: {ram_mib: 1.5}}":                 `grant.shape.ram_mib: "1.5" is no whole number`,
		"grant: {shape: {ram_mib: 9223372036854775808}}": "no whole number",
		"grant: {shape: {ram_mib: 512Mi}}":               "no whole number",
		"grant: {region: 7}":                             "grant.region: want text; put 7 in quotes",
		"grant: {region: [a]}":                           "grant.region: want a single value",
		"grant: {environment: {PORT: 80}}":               "grant.environment.PORT: want text; put 80 in quotes",
		"grant: {request_id: xyz!}":                      "grant.request_id: want 64 hex digits or base64",
		"grant: {valid_to: tomorrow}":                    `grant.valid_to: "tomorrow" is no time such as`,
		"grant: {valid_to: 2030-01-31}":                  "is no time such as",
		"grant: {valid_to: [1]}":                         "want a time such as",
		"grant: &a {region: b}\nenvelope: *a":            "anchors and aliases are not supported",
		"grant: {<<: {region: b}}":                       "a key must be a plain word",
		"grant: {[a]: b}":                                "",
		"a: 1\n---\nb: 2":                                "more than one document",
		strings.Repeat(" ", 2<<20):                       "longer than",
	} {
		req, err := spec.ParseFile("g.yaml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			if len(text) > 100 {
				text = text[:100]
			}
			t.Errorf("%q: got %v, %v; want %q", text, req, err, want)
		}
	}
	// All problems come at once.
	_, err := spec.ParseFile("g.yaml", []byte("grant:\n  a: 1\n  b: 2\n"))
	if err == nil || !strings.Contains(err.Error(), "g.yaml:2:") || !strings.Contains(err.Error(), "g.yaml:3:") {
		t.Error(err)
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("grant: {ports: [{number: 80}]}"))
	f.Add([]byte("{\"grant\": null}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := spec.ParseFile("g", data)
		if err != nil {
			return
		}
		text, err := protojson.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		again, err := spec.ParseFile("g", text)
		if err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		if !proto.Equal(req, again) {
			t.Fatalf("%v became %v", req, again)
		}
	})
}

func FuzzFlagValues(f *testing.F) {
	for _, s := range []string{"500m", "1.5", "2Gi", "80/tcp", "1d12h", "A=b", "sha256:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := spec.CPU(s); err == nil && (v < 1 || v > 4096000) {
			t.Fatalf("CPU(%q) = %d", s, v)
		}
		if v, err := spec.RAM(s); err == nil && (v < 1 || v > 64<<20) {
			t.Fatalf("RAM(%q) = %d", s, v)
		}
		if v, err := spec.Disk(s); err == nil && (v < 1 || v > 1<<20) {
			t.Fatalf("Disk(%q) = %d", s, v)
		}
		if p, err := spec.Port(s); err == nil && (p.GetNumber() < 1 || p.GetNumber() > 65535 || p.GetProtocol() == 0) {
			t.Fatalf("Port(%q) = %v", s, p)
		}
		if d, err := spec.Span(s); err == nil && d <= 0 {
			t.Fatalf("Span(%q) = %v", s, d)
		}
		if b, err := spec.Bytes32(s); err == nil && !bytes.Equal(b, must(hex.DecodeString(s))) {
			t.Fatalf("Bytes32(%q) = %x", s, b)
		}
		_, _ = spec.EnvFile([]byte(s))
		_, _ = spec.Digest(s)
	})
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
