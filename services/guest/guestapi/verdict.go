package guestapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"
)

// VerdictPrefix begins a [Verdict] on the console.
const VerdictPrefix = "compute-bridge-verdict: "

// MaxVerdictMessageBytes bounds a verdict's message: clouds keep the last 64 KiB of a console.
const MaxVerdictMessageBytes = 512

// Phases of a [Verdict].
const (
	// PhaseReady says that the workload runs and SSH is open.
	PhaseReady = "ready"
	// PhaseFailed says that the workload could not be started.
	PhaseFailed = "failed"
	// PhaseExited says that the workload ended, or was ended, after it had run.
	PhaseExited = "exited"
)

// Reasons of a failed [Verdict]: names of the bridge's error reasons. [ReasonOutOfMemory] is none of them.
const (
	// ReasonImageUnavailable says that the image is not there, or can't be fetched.
	ReasonImageUnavailable = "IMAGE_UNAVAILABLE"
	// ReasonImageHashMismatch says that what was fetched has another digest.
	ReasonImageHashMismatch = "IMAGE_HASH_MISMATCH"
	// ReasonImageInvalid says that the image is no OCI archive that can run here.
	ReasonImageInvalid = "IMAGE_INVALID"
	// ReasonWorkloadFailed says that the image's command is missing or can't be executed.
	ReasonWorkloadFailed = "WORKLOAD_FAILED"
	// ReasonHostUnfit says that the machine is to blame: a full disk, a unit that could not be started.
	ReasonHostUnfit = "HOST_UNFIT"
	// ReasonOutOfMemory says that the OOM killer ended the workload after it had run: the name of an end, not an error.
	ReasonOutOfMemory = "OUT_OF_MEMORY"
)

// Verdict is a line that the guest of a virtual machine prints to the machine's console, for the bridge to read. It is
// information, never proof: whoever is root in the machine can print one, about itself.
type Verdict struct {
	// Grant is the grant's id, 64 lower-case hexadecimal digits.
	Grant string `json:"grant"`
	// Attempt is the attempt of the grant.
	Attempt uint32 `json:"attempt"`
	// Phase is [PhaseReady], [PhaseFailed] or [PhaseExited].
	Phase string `json:"phase"`
	// Reason is why it failed. In [PhaseExited] it is [ReasonOutOfMemory] or empty, in [PhaseReady] empty.
	Reason string `json:"reason,omitempty"`
	// Code is the workload's exit code, nil where there is none.
	Code *int32 `json:"code,omitempty"`
	// Signal is the name of the signal that ended the workload ("KILL"), if one did.
	Signal string `json:"signal,omitempty"`
	// Message is for people: one sentence without secrets.
	Message string `json:"message,omitempty"`
}

// Line returns the verdict as one line of printable ASCII, without its end. A long message is cut.
func (v Verdict) Line() string {
	v.Message = strings.ToValidUTF8(v.Message, "?")
	if len(v.Message) > MaxVerdictMessageBytes {
		cut := MaxVerdictMessageBytes
		for !utf8.RuneStart(v.Message[cut]) {
			cut--
		}
		v.Message = v.Message[:cut] + "..."
	}
	data, err := json.Marshal(v)
	if err != nil {
		// A struct of strings and numbers can't fail.
		return VerdictPrefix + "{}"
	}
	var line strings.Builder
	line.WriteString(VerdictPrefix)
	for _, r := range string(data) {
		switch {
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&line, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		case r >= 0x7f:
			fmt.Fprintf(&line, `\u%04x`, r)
		default:
			line.WriteRune(r)
		}
	}
	return line.String()
}

// FindVerdict returns the last verdict about this attempt of the grant on a console, whatever stands before it on its
// line (a kernel's time stamp, a login prompt) or after it, and whatever ends the lines.
func FindVerdict(console []byte, grant string, attempt uint32) (Verdict, bool) {
	for before := console; ; {
		at := bytes.LastIndex(before, []byte(VerdictPrefix))
		if at < 0 {
			return Verdict{}, false
		}
		before = console[:at]
		line := console[at+len(VerdictPrefix):]
		if end := bytes.IndexAny(line, "\r\n"); end >= 0 {
			line = line[:end]
		}
		var v Verdict
		if err := json.NewDecoder(bytes.NewReader(line)).Decode(&v); err != nil {
			continue
		}
		if v.Grant == grant && v.Attempt == attempt && v.known() {
			return v, true
		}
	}
}

func (v Verdict) known() bool {
	return v.Phase == PhaseReady || v.Phase == PhaseFailed || v.Phase == PhaseExited
}
