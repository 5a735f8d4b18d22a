package backendgrpc

import (
	"maps"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Conversions between the wire and package backend. Enumerations have the same
// numbers on both sides. Messages that validation would refuse convert without
// panic; a byte string of the wrong length becomes a zero array.

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func fromTimestamp(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func array32(b []byte) (a [32]byte) {
	if len(b) == len(a) {
		copy(a[:], b)
	}
	return a
}

func nonEmpty(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return append([]byte(nil), b...)
}

// port16 is 0, which no port has, for a number that is none.
func port16(n uint32) uint16 {
	if n > math.MaxUint16 {
		return 0
	}
	return uint16(n)
}

// GrantToProto converts a grant.
func GrantToProto(g backend.Grant) *bridgev1.Grant {
	p := &bridgev1.Grant{
		RequestId:       g.ID[:],
		ProviderId:      nonEmpty(g.ProviderID),
		PostHash:        g.PostHash[:],
		Image:           &bridgev1.Image{Digest: &bridgev1.Digest{Algorithm: bridgev1.DigestAlgorithm(g.Image.Digest.Algorithm), Value: g.Image.Digest.Sum[:]}, Kind: bridgev1.ImageKind(g.Image.Kind)},
		Shape:           shapeToProto(g.Shape),
		MinIsolation:    bridgev1.IsolationLevel(g.MinIsolation),
		Region:          string(g.Region),
		ValidTo:         timestamp(g.ValidTo),
		AlmanacSequence: g.AlmanacSequence,
	}
	if g.Network.Mode != 0 || len(g.Network.AllowedPrefixes) > 0 {
		p.NetworkPolicy = &bridgev1.NetworkPolicy{Mode: bridgev1.NetworkPolicyMode(g.Network.Mode), AllowedPrefixes: append([]string(nil), g.Network.AllowedPrefixes...)}
	}
	for _, port := range g.Ports {
		p.Ports = append(p.Ports, portToProto(port))
	}
	if len(g.Environment) > 0 {
		p.Environment = maps.Clone(g.Environment)
	}
	return p
}

// GrantFromProto converts a grant. An absent network policy is NetworkOpen.
func GrantFromProto(p *bridgev1.Grant) backend.Grant {
	g := backend.Grant{
		ID:         array32(p.GetRequestId()),
		ProviderID: nonEmpty(p.GetProviderId()),
		PostHash:   array32(p.GetPostHash()),
		Image: backend.Image{
			Digest: backend.Digest{Algorithm: backend.DigestAlgorithm(p.GetImage().GetDigest().GetAlgorithm()), Sum: array32(p.GetImage().GetDigest().GetValue())},
			Kind:   backend.ImageKind(p.GetImage().GetKind()),
		},
		Shape:           shapeFromProto(p.GetShape()),
		MinIsolation:    backend.Isolation(p.GetMinIsolation()),
		Region:          backend.Region(p.GetRegion()),
		Network:         backend.NetworkPolicy{Mode: backend.NetworkMode(p.GetNetworkPolicy().GetMode()), AllowedPrefixes: append([]string(nil), p.GetNetworkPolicy().GetAllowedPrefixes()...)},
		ValidTo:         fromTimestamp(p.GetValidTo()),
		AlmanacSequence: p.GetAlmanacSequence(),
	}
	if g.Network.Mode == 0 {
		g.Network.Mode = backend.NetworkOpen
	}
	for _, port := range p.GetPorts() {
		g.Ports = append(g.Ports, portFromProto(port))
	}
	if len(p.GetEnvironment()) > 0 {
		g.Environment = maps.Clone(p.GetEnvironment())
	}
	return g
}

// EnvelopeToProto converts an envelope.
func EnvelopeToProto(e backend.Envelope) *bridgev1.Envelope {
	return &bridgev1.Envelope{
		PeerId:          nonEmpty(e.PeerID),
		X25519PublicKey: nonEmpty(e.X25519PublicKey),
		SshPublicKey:    e.SSHPublicKey,
		PostHash:        e.PostHash[:],
		ImagePointer:    e.ImagePointer,
		RegionHint:      string(e.RegionHint),
		Nonce:           nonEmpty(e.Nonce),
	}
}

// EnvelopeFromProto converts an envelope.
func EnvelopeFromProto(p *bridgev1.Envelope) backend.Envelope {
	return backend.Envelope{
		PeerID:          nonEmpty(p.GetPeerId()),
		X25519PublicKey: nonEmpty(p.GetX25519PublicKey()),
		SSHPublicKey:    p.GetSshPublicKey(),
		PostHash:        array32(p.GetPostHash()),
		ImagePointer:    p.GetImagePointer(),
		RegionHint:      backend.Region(p.GetRegionHint()),
		Nonce:           nonEmpty(p.GetNonce()),
	}
}

func shapeToProto(s backend.Shape) *bridgev1.Shape {
	return &bridgev1.Shape{CpuMillicores: int64(s.CPU), RamMib: int64(s.RAM), StorageGib: int64(s.Storage)}
}

func shapeFromProto(p *bridgev1.Shape) backend.Shape {
	return backend.Shape{CPU: backend.Millicores(p.GetCpuMillicores()), RAM: backend.MiB(p.GetRamMib()), Storage: backend.GiB(p.GetStorageGib())}
}

func resourcesToProto(s backend.Shape) *bridgev1.Resources {
	return &bridgev1.Resources{CpuMillicores: int64(s.CPU), RamMib: int64(s.RAM), StorageGib: int64(s.Storage)}
}

func resourcesFromProto(p *bridgev1.Resources) backend.Shape {
	return backend.Shape{CPU: backend.Millicores(p.GetCpuMillicores()), RAM: backend.MiB(p.GetRamMib()), Storage: backend.GiB(p.GetStorageGib())}
}

func portToProto(p backend.Port) *bridgev1.Port {
	return &bridgev1.Port{Number: uint32(p.Number), Protocol: bridgev1.Protocol(p.Protocol)}
}

func portFromProto(p *bridgev1.Port) backend.Port {
	return backend.Port{Number: port16(p.GetNumber()), Protocol: backend.Protocol(p.GetProtocol())}
}

// InstanceToProto converts an instance.
func InstanceToProto(i backend.Instance) *bridgev1.Instance {
	p := &bridgev1.Instance{
		Handle:              string(i.Handle),
		RequestId:           i.GrantID[:],
		Backend:             i.Backend,
		InstanceId:          string(i.ID),
		Region:              string(i.Region),
		Isolation:           bridgev1.IsolationLevel(i.Isolation),
		State:               bridgev1.InstanceState(i.State),
		EndReason:           bridgev1.EndReason(i.EndReason),
		Shape:               shapeToProto(i.Shape),
		Attempt:             i.Attempt,
		StartedAt:           timestamp(i.StartedAt),
		ValidTo:             timestamp(i.ValidTo),
		DeadlineEnforcement: bridgev1.DeadlineEnforcement(i.Enforcement),
		Owner:               i.Owner,
		Progress:            i.Progress,
	}
	for _, port := range i.Ports {
		p.Ports = append(p.Ports, &bridgev1.PublishedPort{Port: portToProto(port.Port), PublicHost: port.PublicHost, PublicPort: uint32(port.PublicPort)})
	}
	return p
}

// InstanceFromProto converts an instance.
func InstanceFromProto(p *bridgev1.Instance) backend.Instance {
	i := backend.Instance{
		Handle:      backend.Handle(p.GetHandle()),
		GrantID:     array32(p.GetRequestId()),
		Backend:     p.GetBackend(),
		ID:          backend.InstanceID(p.GetInstanceId()),
		Region:      backend.Region(p.GetRegion()),
		Isolation:   backend.Isolation(p.GetIsolation()),
		State:       backend.State(p.GetState()),
		EndReason:   backend.EndReason(p.GetEndReason()),
		Shape:       shapeFromProto(p.GetShape()),
		Attempt:     p.GetAttempt(),
		StartedAt:   fromTimestamp(p.GetStartedAt()),
		ValidTo:     fromTimestamp(p.GetValidTo()),
		Enforcement: backend.DeadlineEnforcement(p.GetDeadlineEnforcement()),
		Owner:       p.GetOwner(),
		Progress:    p.GetProgress(),
	}
	for _, port := range p.GetPorts() {
		i.Ports = append(i.Ports, backend.PublishedPort{Port: portFromProto(port.GetPort()), PublicHost: port.GetPublicHost(), PublicPort: port16(port.GetPublicPort())})
	}
	return i
}

// ReceiptToProto converts a receipt. This is where a plaintext key, if the
// operator allows one, leaves its secret type.
func ReceiptToProto(r backend.Receipt) *bridgev1.Receipt {
	p := &bridgev1.Receipt{
		InstanceHost: r.Host,
		InstancePort: uint32(r.Port),
		User:         r.User,
		HostKey:      r.HostKey,
		GrantId:      r.GrantID[:],
		ValidTo:      timestamp(r.ValidTo),
	}
	switch {
	case r.SealedKey != nil:
		p.LoginKey = &bridgev1.Receipt_SealedKey{SealedKey: &bridgev1.SealedKey{PublicKey: r.SealedKey.PublicKey, Sealed: nonEmpty(r.SealedKey.Sealed)}}
	case r.PlaintextKey != nil:
		p.LoginKey = &bridgev1.Receipt_PlaintextKey{PlaintextKey: &bridgev1.PlaintextKey{PublicKey: r.PlaintextKey.PublicKey, PrivateKey: nonEmpty(r.PlaintextKey.PrivateKey.Expose())}}
	default:
		p.LoginKey = &bridgev1.Receipt_RequesterKey{RequesterKey: &bridgev1.RequesterKey{Fingerprint: r.RequesterKey}}
	}
	if r.Evidence != nil {
		p.Evidence = &bridgev1.Evidence{
			Quote: nonEmpty(r.Evidence.Quote), EventLog: nonEmpty(r.Evidence.EventLog),
			ConfigDocument: nonEmpty(r.Evidence.ConfigDocument), Collateral: nonEmpty(r.Evidence.Collateral),
		}
	}
	return p
}

// ReceiptFromProto converts a receipt.
func ReceiptFromProto(p *bridgev1.Receipt) backend.Receipt {
	r := backend.Receipt{
		Host:    p.GetInstanceHost(),
		Port:    port16(p.GetInstancePort()),
		User:    p.GetUser(),
		HostKey: p.GetHostKey(),
		GrantID: array32(p.GetGrantId()),
		ValidTo: fromTimestamp(p.GetValidTo()),
	}
	switch key := p.GetLoginKey().(type) {
	case *bridgev1.Receipt_RequesterKey:
		r.RequesterKey = key.RequesterKey.GetFingerprint()
	case *bridgev1.Receipt_SealedKey:
		r.SealedKey = &backend.SealedKey{PublicKey: key.SealedKey.GetPublicKey(), Sealed: nonEmpty(key.SealedKey.GetSealed())}
	case *bridgev1.Receipt_PlaintextKey:
		r.PlaintextKey = &backend.PlaintextKey{PublicKey: key.PlaintextKey.GetPublicKey(), PrivateKey: redact.New(key.PlaintextKey.GetPrivateKey())}
	}
	if e := p.GetEvidence(); e != nil {
		r.Evidence = &backend.Evidence{Quote: nonEmpty(e.GetQuote()), EventLog: nonEmpty(e.GetEventLog()), ConfigDocument: nonEmpty(e.GetConfigDocument()), Collateral: nonEmpty(e.GetCollateral())}
	}
	return r
}

// ProvisionedToProto converts a ready instance with its receipt.
func ProvisionedToProto(p backend.Provisioned) *bridgev1.ProvisionResponse {
	return &bridgev1.ProvisionResponse{Instance: InstanceToProto(p.Instance), Receipt: ReceiptToProto(p.Receipt)}
}

// ProvisionedFromProto converts a ready instance with its receipt.
func ProvisionedFromProto(p *bridgev1.ProvisionResponse) backend.Provisioned {
	return backend.Provisioned{Instance: InstanceFromProto(p.GetInstance()), Receipt: ReceiptFromProto(p.GetReceipt())}
}

// CapabilitiesToProto converts capabilities.
func CapabilitiesToProto(c backend.Capabilities) *bridgev1.CapabilitySet {
	p := &bridgev1.CapabilitySet{
		Backend:    c.Backend,
		ObservedAt: timestamp(c.ObservedAt),
		Stale:      c.Stale,
		Draining:   c.Draining,
		Warnings:   append([]string(nil), c.Warnings...),
	}
	for _, k := range c.LogKeys {
		p.LogKeys = append(p.LogKeys, &bridgev1.LogKey{Id: k.ID, PublicKey: nonEmpty(k.PublicKey)})
	}
	for _, r := range c.Regions {
		region := &bridgev1.RegionCapabilities{
			Region:              string(r.Region),
			DeadlineEnforcement: bridgev1.DeadlineEnforcement(r.Enforcement),
			Total:               resourcesToProto(r.Total),
			Free:                resourcesToProto(r.Free),
			LargestSingle:       resourcesToProto(r.LargestSingle),
			LargestFree:         resourcesToProto(r.LargestFree),
			ActiveInstances:     r.ActiveInstances,
			MaxInstances:        r.MaxInstances,
			StorageEnforced:     r.StorageEnforced,
		}
		for _, i := range r.Isolation {
			region.IsolationLevels = append(region.IsolationLevels, bridgev1.IsolationLevel(i))
		}
		for _, m := range r.NetworkModes {
			region.NetworkPolicies = append(region.NetworkPolicies, bridgev1.NetworkPolicyMode(m))
		}
		p.Regions = append(p.Regions, region)
	}
	return p
}

// CapabilitiesFromProto converts capabilities.
func CapabilitiesFromProto(p *bridgev1.CapabilitySet) backend.Capabilities {
	c := backend.Capabilities{
		Backend:    p.GetBackend(),
		ObservedAt: fromTimestamp(p.GetObservedAt()),
		Stale:      p.GetStale(),
		Draining:   p.GetDraining(),
		Warnings:   append([]string(nil), p.GetWarnings()...),
	}
	for _, k := range p.GetLogKeys() {
		c.LogKeys = append(c.LogKeys, backend.LogKey{ID: k.GetId(), PublicKey: nonEmpty(k.GetPublicKey())})
	}
	for _, r := range p.GetRegions() {
		region := backend.RegionCapabilities{
			Region:          backend.Region(r.GetRegion()),
			Enforcement:     backend.DeadlineEnforcement(r.GetDeadlineEnforcement()),
			Total:           resourcesFromProto(r.GetTotal()),
			Free:            resourcesFromProto(r.GetFree()),
			LargestSingle:   resourcesFromProto(r.GetLargestSingle()),
			LargestFree:     resourcesFromProto(r.GetLargestFree()),
			ActiveInstances: r.GetActiveInstances(),
			MaxInstances:    r.GetMaxInstances(),
			StorageEnforced: r.GetStorageEnforced(),
		}
		for _, i := range r.GetIsolationLevels() {
			region.Isolation = append(region.Isolation, backend.Isolation(i))
		}
		for _, m := range r.GetNetworkPolicies() {
			region.NetworkModes = append(region.NetworkModes, backend.NetworkMode(m))
		}
		c.Regions = append(c.Regions, region)
	}
	return c
}

func measurementToProto(m *backend.Measurement) *bridgev1.Measurement {
	if m == nil {
		return nil
	}
	return &bridgev1.Measurement{Value: m.Value, Source: bridgev1.UsageSource(m.Source), CoveredFrom: timestamp(m.From), CoveredTo: timestamp(m.To)}
}

func measurementFromProto(p *bridgev1.Measurement) *backend.Measurement {
	if p == nil {
		return nil
	}
	return &backend.Measurement{Value: p.GetValue(), Source: backend.UsageSource(p.GetSource()), From: fromTimestamp(p.GetCoveredFrom()), To: fromTimestamp(p.GetCoveredTo())}
}

func usageToProto(u backend.Usage) *bridgev1.Usage {
	return &bridgev1.Usage{
		CpuCoreMilliseconds:          measurementToProto(u.CPU),
		CpuAllocatedMillicoreSeconds: measurementToProto(u.CPUAllocated),
		RamAllocatedMibSeconds:       measurementToProto(u.RAMAllocated),
		RamPeakBytes:                 measurementToProto(u.RAMPeak),
		StorageAllocatedGibSeconds:   measurementToProto(u.StorageAllocated),
		NetworkReceivedBytes:         measurementToProto(u.NetworkReceived),
		NetworkSentBytes:             measurementToProto(u.NetworkSent),
		DiskReadBytes:                measurementToProto(u.DiskRead),
		DiskWrittenBytes:             measurementToProto(u.DiskWritten),
	}
}

func usageFromProto(p *bridgev1.Usage) backend.Usage {
	return backend.Usage{
		CPU:              measurementFromProto(p.GetCpuCoreMilliseconds()),
		CPUAllocated:     measurementFromProto(p.GetCpuAllocatedMillicoreSeconds()),
		RAMAllocated:     measurementFromProto(p.GetRamAllocatedMibSeconds()),
		RAMPeak:          measurementFromProto(p.GetRamPeakBytes()),
		StorageAllocated: measurementFromProto(p.GetStorageAllocatedGibSeconds()),
		NetworkReceived:  measurementFromProto(p.GetNetworkReceivedBytes()),
		NetworkSent:      measurementFromProto(p.GetNetworkSentBytes()),
		DiskRead:         measurementFromProto(p.GetDiskReadBytes()),
		DiskWritten:      measurementFromProto(p.GetDiskWrittenBytes()),
	}
}

// LogToProto converts a compute log.
func LogToProto(l backend.ComputeLog) *bridgev1.ComputeLog {
	p := &bridgev1.ComputeLog{
		RequestId:  l.GrantID[:],
		ProviderId: nonEmpty(l.ProviderID),
		Backend:    l.Backend,
		InstanceId: string(l.InstanceID),
		Region:     string(l.Region),
		Attempt:    l.Attempt,
		Shape:      shapeToProto(l.Shape),
		StartedAt:  timestamp(l.StartedAt),
		EndedAt:    timestamp(l.EndedAt),
		ValidTo:    timestamp(l.ValidTo),
		Exit:       &bridgev1.Exit{Reason: bridgev1.EndReason(l.Exit.Reason), Signal: l.Exit.Signal, Message: l.Exit.Message},
		Usage:      usageToProto(l.Usage),
		Final:      l.Final,
		Sequence:   l.Sequence,
		Partial:    l.Partial,
	}
	if l.Exit.Code != nil {
		code := *l.Exit.Code
		p.Exit.Code = &code
	}
	return p
}

// LogFromProto converts a compute log.
func LogFromProto(p *bridgev1.ComputeLog) backend.ComputeLog {
	l := backend.ComputeLog{
		GrantID:    array32(p.GetRequestId()),
		ProviderID: nonEmpty(p.GetProviderId()),
		Backend:    p.GetBackend(),
		InstanceID: backend.InstanceID(p.GetInstanceId()),
		Region:     backend.Region(p.GetRegion()),
		Attempt:    p.GetAttempt(),
		Shape:      shapeFromProto(p.GetShape()),
		StartedAt:  fromTimestamp(p.GetStartedAt()),
		EndedAt:    fromTimestamp(p.GetEndedAt()),
		ValidTo:    fromTimestamp(p.GetValidTo()),
		Exit:       backend.Exit{Reason: backend.EndReason(p.GetExit().GetReason()), Signal: p.GetExit().GetSignal(), Message: p.GetExit().GetMessage()},
		Usage:      usageFromProto(p.GetUsage()),
		Final:      p.GetFinal(),
		Sequence:   p.GetSequence(),
		Partial:    p.GetPartial(),
	}
	if exit := p.GetExit(); exit != nil && exit.Code != nil {
		code := exit.GetCode()
		l.Exit.Code = &code
	}
	return l
}

// SignedLogToProto converts a signed compute log, nil to nil.
func SignedLogToProto(l *backend.SignedLog) *bridgev1.SignedComputeLog {
	if l == nil {
		return nil
	}
	return &bridgev1.SignedComputeLog{Log: LogToProto(l.Log), Body: nonEmpty(l.Body), KeyId: l.KeyID, Signature: nonEmpty(l.Signature)}
}

// SignedLogFromProto converts a signed compute log, nil to nil.
func SignedLogFromProto(p *bridgev1.SignedComputeLog) *backend.SignedLog {
	if p == nil {
		return nil
	}
	return &backend.SignedLog{Log: LogFromProto(p.GetLog()), Body: nonEmpty(p.GetBody()), KeyID: p.GetKeyId(), Signature: nonEmpty(p.GetSignature())}
}

// EventToProto converts an event.
func EventToProto(e backend.Event) *bridgev1.WatchUntilExitResponse {
	p := &bridgev1.WatchUntilExitResponse{At: timestamp(e.At)}
	switch {
	case e.Instance != nil:
		p.Event = &bridgev1.WatchUntilExitResponse_Instance{Instance: InstanceToProto(*e.Instance)}
	case e.Usage != nil:
		p.Event = &bridgev1.WatchUntilExitResponse_Usage{Usage: SignedLogToProto(e.Usage)}
	case e.Log != nil:
		p.Event = &bridgev1.WatchUntilExitResponse_ComputeLog{ComputeLog: SignedLogToProto(e.Log)}
	case e.Heartbeat:
		p.Event = &bridgev1.WatchUntilExitResponse_Heartbeat{Heartbeat: &bridgev1.Heartbeat{}}
	}
	return p
}

// EventFromProto converts an event.
func EventFromProto(p *bridgev1.WatchUntilExitResponse) backend.Event {
	e := backend.Event{At: fromTimestamp(p.GetAt())}
	switch event := p.GetEvent().(type) {
	case *bridgev1.WatchUntilExitResponse_Instance:
		i := InstanceFromProto(event.Instance)
		e.Instance = &i
	case *bridgev1.WatchUntilExitResponse_Usage:
		e.Usage = SignedLogFromProto(event.Usage)
	case *bridgev1.WatchUntilExitResponse_Heartbeat:
		e.Heartbeat = true
	case *bridgev1.WatchUntilExitResponse_ComputeLog:
		e.Log = SignedLogFromProto(event.ComputeLog)
	}
	return e
}
