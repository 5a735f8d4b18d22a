package guestapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// SpoolVersion is the only version of [Spool] that this package reads and writes.
const SpoolVersion = 1

// MaxSpoolBytes bounds an encoded spool.
const MaxSpoolBytes = 64 << 10

// Spool is the record of one ended grant that `guest spool` leaves on the host for the worker. What could not be
// measured is nil (null in JSON), never zero.
type Spool struct {
	// Version is [SpoolVersion].
	Version int `json:"version"`
	// Unit is the systemd unit that ended.
	Unit string `json:"unit"`
	// BootID is the host's boot id, from /proc/sys/kernel/random/boot_id.
	BootID *string `json:"boot_id"`
	// InvocationID is systemd's id of this run of the unit.
	InvocationID *string `json:"invocation_id"`
	// StartedAt is when the unit's main process was started, by systemd's account.
	StartedAt *time.Time `json:"started_at"`
	// StoppedAt is when the unit's main process ended, by systemd's account.
	StoppedAt *time.Time `json:"stopped_at"`
	// RecordedAt is when this record was made.
	RecordedAt time.Time `json:"recorded_at"`
	// Result is systemd's $SERVICE_RESULT: "success", "exit-code", "signal", "timeout", "oom-kill", ...
	Result *string `json:"service_result"`
	// ExitCode is systemd's $EXIT_CODE: "exited", "killed" or "dumped".
	ExitCode *string `json:"exit_code"`
	// ExitStatus is systemd's $EXIT_STATUS: a number, or the name of a signal.
	ExitStatus *string `json:"exit_status"`
	// Usage is what the host measured.
	Usage SpoolUsage `json:"usage"`
	// Problems says, in words, why fields are nil. For logs, not for programs.
	Problems []string `json:"problems"`
}

// SpoolUsage is what the host's kernel counted for one grant, each field nil where the host does not count it.
type SpoolUsage struct {
	// CPUUsageUsec is CPU time in microseconds, user and system, from the unit's cgroup.
	CPUUsageUsec *uint64 `json:"cpu_usage_usec"`
	// MemoryPeakBytes is the highest memory use of the unit's cgroup.
	MemoryPeakBytes *uint64 `json:"memory_peak_bytes"`
	// IOReadBytes and IOWriteBytes are block device traffic of the unit's cgroup, summed over devices.
	IOReadBytes  *uint64 `json:"io_read_bytes"`
	IOWriteBytes *uint64 `json:"io_write_bytes"`
	// NetworkReceivedBytes is what arrived at the instance, NetworkSentBytes what it sent, IP headers included.
	NetworkReceivedBytes *uint64 `json:"network_received_bytes"`
	NetworkSentBytes     *uint64 `json:"network_sent_bytes"`
}

// EncodeSpool returns the bytes of a spool file.
func EncodeSpool(s Spool) ([]byte, error) {
	if s.Problems == nil {
		s.Problems = []string{}
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode spool: %w", err)
	}
	return append(data, '\n'), nil
}

// DecodeSpool reads one spool. It refuses unknown fields, other versions, trailing data and more than [MaxSpoolBytes].
func DecodeSpool(r io.Reader) (Spool, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSpoolBytes+1))
	if err != nil {
		return Spool{}, fmt.Errorf("read spool: %w", err)
	}
	if len(data) > MaxSpoolBytes {
		return Spool{}, fmt.Errorf("spool has more than %d bytes", MaxSpoolBytes)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var s Spool
	if err := dec.Decode(&s); err != nil {
		return Spool{}, fmt.Errorf("decode spool: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Spool{}, errors.New("spool has data after its end")
	}
	if s.Version != SpoolVersion {
		return Spool{}, fmt.Errorf("spool version %d is not supported; this is version %d", s.Version, SpoolVersion)
	}
	return s, nil
}

// Digest is what `guest digest` prints on standard output, as one line of JSON.
type Digest struct {
	// Algorithm is "sha256" or "blake3" (256 bits).
	Algorithm string `json:"algorithm"`
	// Hex is the digest in lower-case hex, 64 characters.
	Hex string `json:"hex"`
	// Size is the number of bytes that were hashed.
	Size int64 `json:"size"`
}
