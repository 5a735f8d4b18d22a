package backend

import (
	"fmt"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// State is where a grant is in its life.
type State int32

// The states, with the numbers of the wire.
const (
	StatePending      State = 1
	StateProvisioning State = 2
	StateReady        State = 3
	StateExited       State = 4
	StateExpired      State = 5
	StateTerminating  State = 6
	StateTerminated   State = 7
	StateFailed       State = 8
)

// String returns the state's name in upper case.
func (s State) String() string {
	names := [...]string{1: "PENDING", 2: "PROVISIONING", 3: "READY", 4: "EXITED", 5: "EXPIRED", 6: "TERMINATING", 7: "TERMINATED", 8: "FAILED"}
	if s > 0 && int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("STATE(%d)", int32(s))
}

// EndReason says why an instance ended.
type EndReason int32

// The reasons, with the numbers of the wire.
const (
	EndWorkloadExited  EndReason = 1
	EndDeadline        EndReason = 2
	EndTerminated      EndReason = 3
	EndCancelled       EndReason = 4
	EndHostRebooted    EndReason = 5
	EndVanished        EndReason = 6
	EndInterrupted     EndReason = 7
	EndOutOfMemory     EndReason = 8
	EndProvisionFailed EndReason = 9
)

// String returns the reason's name in upper case.
func (r EndReason) String() string {
	names := [...]string{
		1: "WORKLOAD_EXITED", 2: "DEADLINE", 3: "TERMINATED", 4: "CANCELLED", 5: "HOST_REBOOTED",
		6: "VANISHED", 7: "INTERRUPTED", 8: "OUT_OF_MEMORY", 9: "PROVISION_FAILED",
	}
	if r > 0 && int(r) < len(names) {
		return names[r]
	}
	if r == 0 {
		return ""
	}
	return fmt.Sprintf("END_REASON(%d)", int32(r))
}

// DeadlineEnforcement says who ends an instance when every process of the
// bridge is dead. Larger is stronger.
type DeadlineEnforcement int32

// The kinds of enforcement, with the numbers of the wire.
const (
	EnforcedByJanitor  DeadlineEnforcement = 1
	EnforcedByGuest    DeadlineEnforcement = 2
	EnforcedByPlatform DeadlineEnforcement = 3
)

// String returns "janitor", "guest" or "platform".
func (e DeadlineEnforcement) String() string {
	switch e {
	case EnforcedByJanitor:
		return "janitor"
	case EnforcedByGuest:
		return "guest"
	case EnforcedByPlatform:
		return "platform"
	}
	return fmt.Sprintf("enforcement(%d)", int32(e))
}

// Instance is what runs for a grant.
type Instance struct {
	Handle      Handle
	GrantID     GrantID
	Backend     string
	ID          InstanceID
	Region      Region
	Isolation   Isolation
	State       State
	EndReason   EndReason
	Shape       Shape
	Attempt     uint32
	StartedAt   time.Time
	ValidTo     time.Time
	Ports       []PublishedPort
	Enforcement DeadlineEnforcement
	// Owner is the client identity that provisioned it.
	Owner string
	// Progress says what is being done, for people.
	Progress string
}

// PublishedPort is a port of the workload and where it is reached.
type PublishedPort struct {
	Port       Port
	PublicHost string
	PublicPort uint16
}

// Receipt is what a requester needs to log in. Exactly one of RequesterKey,
// SealedKey and PlaintextKey is set.
type Receipt struct {
	Host string
	Port uint16
	User string
	// RequesterKey is the fingerprint of the requester's own key.
	RequesterKey string
	SealedKey    *SealedKey
	PlaintextKey *PlaintextKey
	// HostKey is the only host key that a client may accept, in authorized_keys
	// format.
	HostKey  string
	GrantID  GrantID
	ValidTo  time.Time
	Evidence *Evidence
}

// SealedKey is a login key sealed to the requester; see the proto.
type SealedKey struct {
	PublicKey string
	Sealed    []byte
}

// PlaintextKey is an unprotected login key. It never appears in a log: it has
// no printable form.
type PlaintextKey struct {
	PublicKey  string
	PrivateKey redact.Secret
}

// Evidence is what a TDX guest says of itself.
type Evidence struct {
	Quote          []byte
	EventLog       []byte
	ConfigDocument []byte
	Collateral     []byte
}

// Exit says how an instance ended.
type Exit struct {
	Reason EndReason
	// Code is the exit status of the image's command, nil if unknown.
	Code    *int32
	Signal  string
	Message string
}
