package show_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

var update = flag.Bool("update", false, "write the golden files")

var now = time.Date(2030, 1, 31, 12, 0, 0, 0, time.UTC)

func at(offset time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(offset)) }

func id(first byte) []byte {
	b := make([]byte, 32)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func resources(cpu, ram, disk int64) *bridgev1.Resources {
	return &bridgev1.Resources{CpuMillicores: cpu, RamMib: ram, StorageGib: disk}
}

// hostile is what a terminal must not get from anyone else.
const hostile = "evil\x1b[2Jtext\r\nmore\u202e"

func capabilities() *bridgev1.CapabilitySet {
	return &bridgev1.CapabilitySet{
		Backend: "metal", ObservedAt: at(-3 * time.Second), Warnings: []string{"host h2: clock is 4 s late " + hostile},
		LogKeys: []*bridgev1.LogKey{{Id: "ed25519:00112233445566778899aabbccddeeff", PublicKey: id(1)}},
		Regions: []*bridgev1.RegionCapabilities{
			{
				Region: "eu-north", IsolationLevels: []bridgev1.IsolationLevel{1, 2, 3}, DeadlineEnforcement: 3,
				Total: resources(64000, 256<<10, 4000), Free: resources(500, 1536, 1), LargestSingle: resources(32000, 128<<10, 2048), LargestFree: resources(500, 1000, 1),
				ActiveInstances: 12, MaxInstances: 200, NetworkPolicies: []bridgev1.NetworkPolicyMode{1, 2}, StorageEnforced: true,
			},
			{
				Region: "us", IsolationLevels: []bridgev1.IsolationLevel{2}, DeadlineEnforcement: 1,
				Total: resources(1<<62, 1<<62, 1<<62), ActiveInstances: 0, MaxInstances: 1 << 40, NetworkPolicies: []bridgev1.NetworkPolicyMode{1},
			},
		},
	}
}

func instance(first byte, state bridgev1.InstanceState) *bridgev1.Instance {
	return &bridgev1.Instance{
		Handle: "site/metal/" + strings.Repeat("ab", 32), RequestId: id(first), Backend: "metal", InstanceId: "cb-x.service", Region: "eu-north",
		Isolation: 1, State: state, Shape: &bridgev1.Shape{CpuMillicores: 1500, RamMib: 2048, StorageGib: 10}, Attempt: 2,
		StartedAt: at(-90 * time.Minute), ValidTo: at(36 * time.Hour), DeadlineEnforcement: 3, Owner: "spiffe://test/alice",
		Ports: []*bridgev1.PublishedPort{
			{Port: &bridgev1.Port{Number: 80, Protocol: 1}, PublicHost: "198.51.100.7", PublicPort: 40001},
			{Port: &bridgev1.Port{Number: 53, Protocol: 2}, PublicHost: "198.51.100.7", PublicPort: 40002},
		},
	}
}

func receipt(r *bridgev1.Receipt) *bridgev1.ProvisionResponse {
	r.InstanceHost, r.InstancePort, r.User, r.HostKey, r.GrantId, r.ValidTo = "198.51.100.7", 40000, "compute", "ssh-ed25519 AAAA", id(1), at(36*time.Hour)
	return &bridgev1.ProvisionResponse{Instance: instance(1, bridgev1.InstanceState_INSTANCE_STATE_READY), Receipt: r}
}

func measured(v int64, source bridgev1.UsageSource, to time.Duration) *bridgev1.Measurement {
	return &bridgev1.Measurement{Value: v, Source: source, CoveredFrom: at(-2 * time.Hour), CoveredTo: at(to)}
}

func log(final bool) *bridgev1.ComputeLog {
	code := int32(3)
	l := &bridgev1.ComputeLog{
		RequestId: id(1), Backend: "metal", InstanceId: "cb-x.service", Region: "eu-north", Attempt: 1, Sequence: 2, Final: final,
		Shape: &bridgev1.Shape{CpuMillicores: 1500, RamMib: 2048, StorageGib: 10}, StartedAt: at(-2 * time.Hour), EndedAt: at(-time.Hour), ValidTo: at(time.Hour),
		Exit: &bridgev1.Exit{Reason: bridgev1.EndReason_END_REASON_WORKLOAD_EXITED, Code: &code, Message: hostile},
		Usage: &bridgev1.Usage{
			CpuCoreMilliseconds:          measured(754_321, bridgev1.UsageSource_USAGE_SOURCE_HOST_MEASURED, -time.Hour),
			CpuAllocatedMillicoreSeconds: measured(1500*3600, bridgev1.UsageSource_USAGE_SOURCE_ALLOCATED, -time.Hour),
			RamAllocatedMibSeconds:       measured(2048*3600, bridgev1.UsageSource_USAGE_SOURCE_ALLOCATED, -time.Hour),
			RamPeakBytes:                 measured(873<<20, bridgev1.UsageSource_USAGE_SOURCE_HYPERVISOR_MEASURED, -90*time.Minute),
			NetworkReceivedBytes:         measured(999, bridgev1.UsageSource_USAGE_SOURCE_PROVIDER_MONITORING, -time.Hour),
			NetworkSentBytes:             &bridgev1.Measurement{Value: 1 << 41, Source: bridgev1.UsageSource_USAGE_SOURCE_HOST_MEASURED},
		},
	}
	if !final {
		l.EndedAt, l.Exit, l.Partial = nil, nil, true
	}
	return l
}

func event(e *bridgev1.WatchUntilExitResponse) func(show.Output) error {
	return func(o show.Output) error {
		e.At = at(0)
		o.Event(e)
		return nil
	}
}

func TestHumanOutput(t *testing.T) {
	t.Parallel()
	ended := instance(3, bridgev1.InstanceState_INSTANCE_STATE_TERMINATING)
	ended.EndReason, ended.Ports = bridgev1.EndReason_END_REASON_DEADLINE, nil
	ended.ValidTo = at(-time.Second)
	making := instance(2, bridgev1.InstanceState_INSTANCE_STATE_PROVISIONING)
	making.Progress, making.StartedAt, making.Ports = "sending image 40 % "+hostile, nil, nil
	failed := instance(4, bridgev1.InstanceState_INSTANCE_STATE_FAILED)
	failed.EndReason, failed.StartedAt, failed.Ports = bridgev1.EndReason_END_REASON_PROVISION_FAILED, nil, nil
	list := []*bridgev1.Instance{instance(1, bridgev1.InstanceState_INSTANCE_STATE_READY), making, ended, failed}
	signed := &bridgev1.SignedComputeLog{Log: log(true)}
	never := &bridgev1.ComputeLog{RequestId: id(9), Backend: "metal", Final: true, Sequence: 1, Exit: &bridgev1.Exit{Reason: bridgev1.EndReason_END_REASON_PROVISION_FAILED}}
	logs := []show.CheckedLog{
		{Log: log(true), KeyID: "k1", Signature: show.SignatureGood},
		{Log: log(false), KeyID: "k1", Signature: show.SignatureBad},
		{Log: never, KeyID: "k2", Signature: show.SignatureUnknownKey},
	}
	card := &bridgev1.ProviderCard{BridgeId: "demo", Capabilities: capabilities(), Tdx: true, Backends: []string{"metal", "site/aws"}, BackendSetDigest: id(7)}
	stale := &bridgev1.ProviderCard{BridgeId: "demo", Capabilities: &bridgev1.CapabilitySet{Stale: true, ObservedAt: at(-time.Hour)}}
	backends := []*bridgev1.BackendStatus{
		{Name: "metal", Health: bridgev1.BackendHealth_BACKEND_HEALTH_SERVING, Capabilities: capabilities(), LastSeen: at(-2 * time.Second)},
		{Name: "aws", Health: bridgev1.BackendHealth_BACKEND_HEALTH_UNREACHABLE, LastError: "dial tcp: connection refused " + hostile},
		{Name: "gcp", Health: bridgev1.BackendHealth_BACKEND_HEALTH_DRAINING, Capabilities: &bridgev1.CapabilitySet{}, LastSeen: at(-25 * time.Hour)},
		{Name: "old", Health: bridgev1.BackendHealth_BACKEND_HEALTH_DEGRADED, Capabilities: &bridgev1.CapabilitySet{}, LastSeen: at(-25 * time.Minute)},
	}
	swept := &bridgev1.SweepResponse{Resources: []*bridgev1.SweptResource{
		{RequestId: id(1), Attempt: 1, InstanceId: "cb-a", Why: "the grant has ended", Deleted: true, CreatedAt: at(-26 * time.Hour)},
		{RequestId: id(2), Attempt: 2, InstanceId: "cb-b", Why: "past its deadline", Error: "host h1 is unreachable", Backend: "site/metal", Placement: "h1", ValidTo: at(-time.Hour)},
		{RequestId: id(3), Attempt: 1, InstanceId: "cb-c", Why: "half-made"},
	}}
	unswept := &bridgev1.SweepResponse{
		Blind: []string{"metal/h2", hostile}, Failures: []*bridgev1.SweepFailure{{Backend: "aws", Error: "no answer " + hostile}},
	}
	for name, write := range map[string]func(show.Output) error{
		"card":       func(o show.Output) error { return o.Card(card) },
		"card-wide":  func(o show.Output) error { o.Wide = true; return o.Card(card) },
		"card-empty": func(o show.Output) error { return o.Card(stale) },
		"backends":   func(o show.Output) error { return o.Backends(backends) },
		"backends-0": func(o show.Output) error { return o.Backends(nil) },
		"list":       func(o show.Output) error { return o.Instances(list) },
		"list-wide":  func(o show.Output) error { o.Wide = true; return o.Instances(list) },
		"list-0":     func(o show.Output) error { o.Unreachable([]string{"aws", hostile}); return o.Instances(nil) },
		"provisioned-own": func(o show.Output) error {
			return o.Provisioned(receipt(&bridgev1.Receipt{LoginKey: &bridgev1.Receipt_RequesterKey{RequesterKey: &bridgev1.RequesterKey{Fingerprint: "SHA256:abc"}}}))
		},
		"provisioned-sealed": func(o show.Output) error {
			return o.Provisioned(receipt(&bridgev1.Receipt{
				LoginKey: &bridgev1.Receipt_SealedKey{SealedKey: &bridgev1.SealedKey{PublicKey: "ssh-ed25519 AAAB", Sealed: []byte{1}}},
				Evidence: &bridgev1.Evidence{Quote: make([]byte, 5000)},
			}))
		},
		"provisioned-plain": func(o show.Output) error {
			return o.Provisioned(receipt(&bridgev1.Receipt{LoginKey: &bridgev1.Receipt_PlaintextKey{PlaintextKey: &bridgev1.PlaintextKey{PrivateKey: []byte("SECRET")}}}))
		},
		"log":         func(o show.Output) error { return o.Log(show.CheckedLog{Log: log(true)}) },
		"log-checked": func(o show.Output) error { return o.Log(logs[0]) },
		"log-interim": func(o show.Output) error { return o.Log(logs[1]) },
		"log-never":   func(o show.Output) error { return o.Log(logs[2]) },
		"logs":        func(o show.Output) error { return o.Logs([]show.CheckedLog{{Log: log(true)}, {Log: never}}) },
		"logs-verify": func(o show.Output) error { return o.Logs(logs) },
		"logs-0":      func(o show.Output) error { return o.Logs(nil) },
		"event-ready": event(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_Instance{Instance: list[0]}}),
		"event-made":  event(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_Instance{Instance: making}}),
		"event-usage": event(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_Usage{Usage: signed}}),
		"event-beat":  event(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_Heartbeat{}}),
		"event-end":   event(&bridgev1.WatchUntilExitResponse{Event: &bridgev1.WatchUntilExitResponse_ComputeLog{ComputeLog: signed}}),
		"sweep":       func(o show.Output) error { return o.Swept(swept, false) },
		"sweep-dry":   func(o show.Output) error { return o.Swept(swept, true) },
		"sweep-0":     func(o show.Output) error { return o.Swept(nil, false) },
		"sweep-blind": func(o show.Output) error { return o.Swept(unswept, false) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for suffix, on := range map[string]bool{"": false, "-colour": true} {
				var b bytes.Buffer
				if err := write(show.Output{W: &b, Painter: term.Painter{On: on}, Now: now}); err != nil {
					t.Fatal(err)
				}
				golden(t, name+suffix, b.Bytes())
				if bytes.Contains(b.Bytes(), []byte("\x1b[2J")) || bytes.Contains(b.Bytes(), []byte("\u202e")) {
					t.Error("text of others steers the terminal")
				}
				if bytes.Contains(b.Bytes(), []byte("SECRET")) {
					t.Error("a private key is shown")
				}
			}
		})
	}
}

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

func TestValuesAreShownAsPeopleReadThem(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ got, want string }{
		{show.CPU(500), "500m"},
		{show.CPU(1), "1m"},
		{show.CPU(2000), "2"},
		{show.CPU(1500), "1.5"},
		{show.CPU(1234), "1.234"},
		{show.CPU(0), "0"},
		{show.MiB(0), "0Mi"},
		{show.MiB(512), "512Mi"},
		{show.MiB(2048), "2Gi"},
		{show.MiB(1536), "1.5Gi"},
		{show.MiB(1 << 20), "1Ti"},
		{show.GiB(100), "100Gi"},
		{show.GiB(1 << 10), "1Ti"},
		{show.Bytes(0), "0 B"},
		{show.Bytes(1023), "1023 B"},
		{show.Bytes(1024), "1 KiB"},
		{show.Bytes(64 << 20), "64 MiB"},
		{show.Bytes(1<<63 - 1), "8 EiB"},
		{show.Span(0), "0s"},
		{show.Span(400 * time.Millisecond), "0.4s"},
		{show.Span(59 * time.Second), "59s"},
		{show.Span(time.Minute), "1m"},
		{show.Span(61 * time.Second), "1m 1s"},
		{show.Span(25 * time.Hour), "1d 1h"},
		{show.Span(-time.Hour), "-1h"},
		{show.Span(24*time.Hour + time.Minute), "1d"},
		{show.Span(59*time.Minute + 59*time.Second + 600*time.Millisecond), "1h"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}
