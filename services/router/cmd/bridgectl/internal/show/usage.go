package show

import (
	"fmt"
	"strings"
	"time"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

// Signature is what a check of a compute log's signature said.
type Signature int

// The outcomes of a check.
const (
	NotChecked Signature = iota
	SignatureGood
	SignatureBad
	SignatureUnknownKey
)

func (s Signature) cell() term.Cell {
	switch s {
	case SignatureGood:
		return term.S(term.Good, "good")
	case SignatureBad:
		return term.S(term.Bad, "BAD")
	case SignatureUnknownKey:
		return term.S(term.Bad, "unknown key")
	case NotChecked:
	}
	return term.T("")
}

// CheckedLog is a compute log with the outcome of its check.
type CheckedLog struct {
	Log       *bridgev1.ComputeLog
	KeyID     string
	Signature Signature
}

// line is one figure of a usage.
type line struct {
	name  string
	m     *bridgev1.Measurement
	human func(int64) string
}

func lines(u *bridgev1.Usage) []line {
	// A short grant's tenths of thousandths of an hour say nothing.
	per := func(unit float64, name string) func(int64) string {
		return func(v int64) string {
			seconds := float64(v) / unit
			if seconds < 360 {
				return number(seconds) + " " + name + "-seconds"
			}
			return number(seconds/3600) + " " + name + "-hours"
		}
	}
	return []line{
		{"CPU used", u.GetCpuCoreMilliseconds(), cpuTime},
		{"CPU reserved", u.GetCpuAllocatedMillicoreSeconds(), per(1000, "core")},
		{"memory reserved", u.GetRamAllocatedMibSeconds(), per(1024, "GiB")},
		{"memory peak", u.GetRamPeakBytes(), Bytes},
		{"disk reserved", u.GetStorageAllocatedGibSeconds(), per(1, "GiB")},
		{"disk read", u.GetDiskReadBytes(), Bytes},
		{"disk written", u.GetDiskWrittenBytes(), Bytes},
		{"network in", u.GetNetworkReceivedBytes(), Bytes},
		{"network out", u.GetNetworkSentBytes(), Bytes},
	}
}

// number has three significant digits below 100, and none after the point
// above.
func number(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func cpuTime(ms int64) string {
	if ms < 1000 {
		return fmt.Sprintf("%d ms", ms)
	}
	if ms < 60_000 {
		return number(float64(ms)/1000) + " s"
	}
	// Longer than a Duration can hold is not Span's to show.
	if longest := int64(1<<63-1) / int64(time.Millisecond); ms > longest {
		return number(float64(ms)/3_600_000) + " core-hours"
	}
	return Span(time.Duration(ms) * time.Millisecond)
}

func source(s bridgev1.UsageSource) string {
	switch s {
	case bridgev1.UsageSource_USAGE_SOURCE_ALLOCATED:
		return "reservation × time"
	case bridgev1.UsageSource_USAGE_SOURCE_HOST_MEASURED:
		return "measured by host"
	case bridgev1.UsageSource_USAGE_SOURCE_HYPERVISOR_MEASURED:
		return "measured by hypervisor"
	case bridgev1.UsageSource_USAGE_SOURCE_PROVIDER_MONITORING:
		return "provider's monitoring"
	case bridgev1.UsageSource_USAGE_SOURCE_UNSPECIFIED:
	}
	return ""
}

// brief is a usage in one line, what is known of it.
func brief(u *bridgev1.Usage) string {
	var parts []string
	for _, l := range lines(u) {
		switch l.name {
		case "CPU used", "memory peak", "network in", "network out":
			if l.m != nil {
				parts = append(parts, l.name+" "+l.human(l.m.GetValue()))
			}
		}
	}
	if len(parts) == 0 {
		return "no figures yet"
	}
	return strings.Join(parts, ", ")
}

// covered says how much of an instance's life a figure covers.
func covered(m *bridgev1.Measurement, log *bridgev1.ComputeLog) term.Cell {
	if m.GetCoveredFrom() == nil || m.GetCoveredTo() == nil {
		return term.T("")
	}
	span := m.GetCoveredTo().AsTime().Sub(m.GetCoveredFrom().AsTime())
	if log.GetStartedAt() != nil && log.GetEndedAt() != nil {
		if life := log.GetEndedAt().AsTime().Sub(log.GetStartedAt().AsTime()); life > 0 {
			share := float64(span) / float64(life)
			// A sample a second early is no gap worth a warning.
			if share >= 0.99 || life-span < 2*time.Second {
				return term.T("all of it")
			}
			return term.S(term.Busy, fmt.Sprintf("%s of %s (%.0f %%)", Span(span), Span(life), 100*share))
		}
	}
	return term.T(Span(span))
}

// Log shows one compute log in full.
func (o Output) Log(c CheckedLog) error {
	log := c.Log
	life := "never started"
	if log.GetStartedAt() != nil {
		end := o.Now
		if log.GetEndedAt() != nil {
			end = log.GetEndedAt().AsTime()
		}
		life = Time(log.GetStartedAt()) + " → "
		if log.GetEndedAt() != nil {
			life += Time(log.GetEndedAt())
		} else {
			life += "now"
		}
		life += "  " + o.Paint(term.Faint, "("+Span(end.Sub(log.GetStartedAt().AsTime()))+")")
	}
	kind := "interim"
	if log.GetFinal() {
		kind = "final"
	}
	if log.GetPartial() {
		kind += ", " + o.Paint(term.Busy, "partial: some figures are missing or cover less than the instance's life")
	}
	where := term.Clean(strings.Join(nonEmpty(log.GetBackend(), log.GetRegion(), log.GetInstanceId()), ", "))
	signature := ""
	if c.Signature != NotChecked {
		cell := c.Signature.cell()
		signature = o.Paint(cell.Style, cell.Text) + "  " + o.Paint(term.Faint, term.Clean(c.KeyID))
	}
	if err := term.Fields(o.W, o.Painter, "",
		[2]string{"grant", o.Paint(term.Accent, fullID(log.GetRequestId()))},
		[2]string{"where", where},
		[2]string{"size", Shape(log.GetShape())},
		[2]string{"ran", life},
		[2]string{"ended by", outcome(log.GetExit())},
		[2]string{"log", fmt.Sprintf("%s  %s", kind, o.Paint(term.Faint, fmt.Sprintf("(sequence %d, attempt %d)", log.GetSequence(), log.GetAttempt())))},
		[2]string{"signature", signature},
	); err != nil {
		return err
	}
	return o.Usage(log)
}

// Usage shows the figures of a compute log.
func (o Output) Usage(log *bridgev1.ComputeLog) error {
	var t term.Table
	t.Head("USAGE", "AMOUNT", "SOURCE", "COVERS")
	for _, l := range lines(log.GetUsage()) {
		if l.m == nil {
			t.Row(term.T(l.name), term.Cell{Text: "unknown", Style: term.Faint, Right: true}, term.T(""), term.T(""))
			continue
		}
		t.Row(term.T(l.name), term.R(l.human(l.m.GetValue())), term.T(source(l.m.GetSource())), covered(l.m, log))
	}
	o.printf("\n")
	return t.Write(o.W, o.Painter, "")
}

// Logs shows compute logs, one a line.
func (o Output) Logs(logs []CheckedLog) error {
	if len(logs) == 0 {
		o.printf("No compute logs.\n")
		return nil
	}
	checked := false
	for _, l := range logs {
		checked = checked || l.Signature != NotChecked
	}
	var t term.Table
	titles := []string{"GRANT", "BACKEND", "ENDED", "RAN FOR", "OUTCOME", "CPU USED", "MEMORY PEAK", "NET IN", "NET OUT", "LOG"}
	if checked {
		titles = append(titles, "SIGNATURE")
	}
	t.Head(titles...)
	for _, c := range logs {
		log := c.Log
		id := ID(log.GetRequestId())
		if o.Wide {
			id = fullID(log.GetRequestId())
		}
		ran := ""
		if log.GetStartedAt() != nil && log.GetEndedAt() != nil {
			ran = Span(log.GetEndedAt().AsTime().Sub(log.GetStartedAt().AsTime()))
		}
		value := func(m *bridgev1.Measurement, human func(int64) string) term.Cell {
			if m == nil {
				return term.R("")
			}
			return term.R(human(m.GetValue()))
		}
		style, kind := term.Plain, "final"
		if !log.GetFinal() {
			kind = "interim"
		}
		if log.GetPartial() {
			style, kind = term.Busy, kind+", partial"
		}
		result := endReason(log.GetExit().GetReason())
		if x := log.GetExit(); x != nil && x.Code != nil {
			result += fmt.Sprintf(" (%d)", x.GetCode())
		}
		cells := []term.Cell{
			term.S(term.Accent, id), term.T(log.GetBackend()), term.T(Time(log.GetEndedAt())), term.R(ran), term.T(result),
			value(log.GetUsage().GetCpuCoreMilliseconds(), cpuTime), value(log.GetUsage().GetRamPeakBytes(), Bytes),
			value(log.GetUsage().GetNetworkReceivedBytes(), Bytes), value(log.GetUsage().GetNetworkSentBytes(), Bytes), term.S(style, kind),
		}
		if checked {
			cells = append(cells, c.Signature.cell())
		}
		t.Row(cells...)
	}
	return t.Write(o.W, o.Painter, "")
}

func nonEmpty(texts ...string) []string {
	var out []string
	for _, t := range texts {
		if t != "" {
			out = append(out, t)
		}
	}
	return out
}
