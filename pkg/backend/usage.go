package backend

import (
	"fmt"
	"time"
)

// UsageSource says where a figure comes from.
type UsageSource int32

// The sources, with the numbers of the wire.
const (
	UsageAllocated          UsageSource = 1
	UsageHostMeasured       UsageSource = 2
	UsageHypervisorMeasured UsageSource = 3
	UsageProviderMonitoring UsageSource = 4
)

// String returns the source for people.
func (s UsageSource) String() string {
	switch s {
	case UsageAllocated:
		return "allocated"
	case UsageHostMeasured:
		return "host"
	case UsageHypervisorMeasured:
		return "hypervisor"
	case UsageProviderMonitoring:
		return "monitoring"
	}
	return fmt.Sprintf("source(%d)", int32(s))
}

// Measurement is a figure with its provenance and the time that it covers.
type Measurement struct {
	Value    int64
	Source   UsageSource
	From, To time.Time
}

// Usage is what a grant consumed. A nil field is unknown, never zero.
type Usage struct {
	// CPU is CPU time consumed, in milliseconds of one core.
	CPU *Measurement
	// CPUAllocated is reserved CPU times wall-clock, in millicore-seconds.
	CPUAllocated *Measurement
	// RAMAllocated is reserved memory times wall-clock, in MiB-seconds.
	RAMAllocated *Measurement
	// RAMPeak is the largest memory use, in bytes.
	RAMPeak *Measurement
	// StorageAllocated is reserved disk times wall-clock, in GiB-seconds.
	StorageAllocated *Measurement
	// NetworkReceived and NetworkSent are bytes, as the instance sees them.
	NetworkReceived, NetworkSent *Measurement
	// DiskRead and DiskWritten are bytes.
	DiskRead, DiskWritten *Measurement
}

// Allocated sets the three figures that follow from reservation and time.
func (u *Usage) Allocated(shape Shape, from, to time.Time) {
	seconds := max(0, int64(to.Sub(from)/time.Second))
	measure := func(amount int64) *Measurement {
		return &Measurement{Value: mulSat(amount, seconds), Source: UsageAllocated, From: from, To: to}
	}
	u.CPUAllocated = measure(int64(shape.CPU))
	u.RAMAllocated = measure(int64(shape.RAM))
	u.StorageAllocated = measure(int64(shape.Storage))
}

// ComputeLog is the record of a grant: what ran, how it ended, what it used.
type ComputeLog struct {
	GrantID    GrantID
	ProviderID []byte
	Backend    string
	InstanceID InstanceID
	Region     Region
	Attempt    uint32
	Shape      Shape
	StartedAt  time.Time
	EndedAt    time.Time
	ValidTo    time.Time
	Exit       Exit
	Usage      Usage
	// Final is false when a later log of the same grant replaces this one.
	Final bool
	// Sequence is 1 in interim logs, of which the one whose figures reach further
	// replaces the other, and more in the final one.
	Sequence uint32
	// Partial says that figures are missing or cover less than the instance's
	// life.
	Partial bool
}

// SignedLog is a compute log with its worker's signature. A driver returns it
// unsigned, with Log alone; the worker's runtime signs.
type SignedLog struct {
	// Log is Body decoded.
	Log ComputeLog
	// Body is the serialised log, exactly as signed.
	Body      []byte
	KeyID     string
	Signature []byte
}
