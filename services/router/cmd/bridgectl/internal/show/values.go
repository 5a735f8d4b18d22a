// Package show is what bridgectl prints for people: one function for each
// message of the contract. All of them are pure: they write what they are
// given, and take the time from their caller.
package show

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

// ShortID is how many hex digits of a grant id are shown where space is dear:
// enough that no two grants of one bridge share them.
const ShortID = 12

// ID returns the beginning of a grant id, as every command takes it.
func ID(id []byte) string {
	text := hex.EncodeToString(id)
	if len(text) > ShortID {
		return text[:ShortID]
	}
	return text
}

func fullID(id []byte) string { return hex.EncodeToString(id) }

// CPU returns millicores for people: "500m", "2", "1.5".
func CPU(millicores int64) string {
	if millicores%1000 == 0 {
		return strconv.FormatInt(millicores/1000, 10)
	}
	if millicores < 1000 {
		return strconv.FormatInt(millicores, 10) + "m"
	}
	return strings.TrimRight(fmt.Sprintf("%d.%03d", millicores/1000, millicores%1000), "0")
}

// MiB returns an amount of memory: "512Mi", "2Gi", "1.5Ti".
func MiB(n int64) string { return binary(float64(n), []string{"Mi", "Gi", "Ti", "Pi", "Ei"}) }

// GiB returns an amount of disk: "10Gi", "1.5Ti".
func GiB(n int64) string { return binary(float64(n), []string{"Gi", "Ti", "Pi", "Ei"}) }

// Bytes returns a number of bytes: "873 B", "1.2 MiB".
func Bytes(n int64) string {
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	text := binary(float64(n)/1024, []string{"Ki", "Mi", "Gi", "Ti", "Pi", "Ei"})
	return text[:len(text)-2] + " " + text[len(text)-2:] + "B"
}

func binary(v float64, units []string) string {
	unit := 0
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	return trimmed(v) + units[unit]
}

// trimmed returns at most one digit after the point, and none for whole
// numbers or where it would not matter.
func trimmed(v float64) string {
	if v >= 100 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0")
}

// Span returns a length of time in its two largest units: "3d 4h", "2m 5s",
// "0.4s".
func Span(d time.Duration) string {
	if d < 0 {
		return "-" + Span(-d)
	}
	if d < 10*time.Second && d%time.Second != 0 {
		if d < 50*time.Millisecond {
			return "0s"
		}
		return trimmed(d.Seconds()) + "s"
	}
	d = d.Round(time.Second)
	units := []struct {
		size time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}}
	for i, u := range units {
		n := d / u.size
		if n == 0 && u.size > time.Second {
			continue
		}
		text := strconv.FormatInt(int64(n), 10) + u.name
		if i+1 < len(units) {
			if rest := d % u.size / units[i+1].size; rest > 0 {
				text += " " + strconv.FormatInt(int64(rest), 10) + units[i+1].name
			}
		}
		return text
	}
	return "0s"
}

// Time returns a point in time in UTC, to the second.
func Time(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04:05Z")
}

// ago returns how long before now t was.
func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	d := now.Sub(t.AsTime())
	if d < 0 {
		return "in " + Span(-d)
	}
	return Span(d) + " ago"
}

// left returns how long after now t is.
func left(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	d := t.AsTime().Sub(now)
	if d <= 0 {
		return "over"
	}
	return Span(d)
}

// word makes "terminating" of INSTANCE_STATE_TERMINATING.
func word(name, prefix string) string {
	text := strings.TrimPrefix(name, prefix)
	if text == "UNSPECIFIED" {
		return ""
	}
	return strings.ToLower(strings.ReplaceAll(text, "_", " "))
}

// State returns a state in a word.
func State(s bridgev1.InstanceState) string { return word(s.String(), "INSTANCE_STATE_") }

// StateStyle returns how a state looks.
func StateStyle(s bridgev1.InstanceState) term.Style {
	switch s {
	case bridgev1.InstanceState_INSTANCE_STATE_READY:
		return term.Good
	case bridgev1.InstanceState_INSTANCE_STATE_PENDING, bridgev1.InstanceState_INSTANCE_STATE_PROVISIONING,
		bridgev1.InstanceState_INSTANCE_STATE_TERMINATING, bridgev1.InstanceState_INSTANCE_STATE_EXITED,
		bridgev1.InstanceState_INSTANCE_STATE_EXPIRED:
		return term.Busy
	case bridgev1.InstanceState_INSTANCE_STATE_FAILED:
		return term.Bad
	case bridgev1.InstanceState_INSTANCE_STATE_TERMINATED:
		return term.Faint
	case bridgev1.InstanceState_INSTANCE_STATE_UNSPECIFIED:
	}
	return term.Plain
}

func endReason(r bridgev1.EndReason) string { return word(r.String(), "END_REASON_") }

func isolation(l bridgev1.IsolationLevel) string { return word(l.String(), "ISOLATION_LEVEL_") }

func isolations(levels []bridgev1.IsolationLevel) string {
	var words []string
	for _, l := range levels {
		words = append(words, isolation(l))
	}
	return strings.Join(words, ",")
}

func enforcement(e bridgev1.DeadlineEnforcement) string {
	return word(e.String(), "DEADLINE_ENFORCEMENT_")
}

func policies(modes []bridgev1.NetworkPolicyMode) string {
	var words []string
	for _, m := range modes {
		words = append(words, word(m.String(), "NETWORK_POLICY_MODE_"))
	}
	return strings.Join(words, ",")
}

// Resources returns CPU, memory and disk, "4 / 8Gi / 100Gi".
func Resources(r *bridgev1.Resources) string {
	if r == nil {
		return ""
	}
	return CPU(r.GetCpuMillicores()) + " / " + MiB(r.GetRamMib()) + " / " + GiB(r.GetStorageGib())
}

// Shape returns the size of an instance like [Resources].
func Shape(s *bridgev1.Shape) string {
	if s == nil {
		return ""
	}
	return CPU(s.GetCpuMillicores()) + " / " + MiB(s.GetRamMib()) + " / " + GiB(s.GetStorageGib())
}

func ports(list []*bridgev1.PublishedPort) string {
	var texts []string
	for _, p := range list {
		texts = append(texts, fmt.Sprintf("%d/%s→%s:%d", p.GetPort().GetNumber(),
			word(p.GetPort().GetProtocol().String(), "PROTOCOL_"), p.GetPublicHost(), p.GetPublicPort()))
	}
	return strings.Join(texts, " ")
}
