package show

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

// Output is where and how things are shown.
type Output struct {
	W io.Writer
	// Painter adds colour.
	term.Painter
	// Now is what times are relative to.
	Now time.Time
	// Wide shows more columns.
	Wide bool
}

func (o Output) printf(format string, args ...any) { fmt.Fprintf(o.W, format, args...) }

// warning writes a line that an operator should read.
func (o Output) warning(text string) {
	o.printf("%s %s\n", o.Paint(term.Busy, "warning:"), term.Clean(text))
}

// Unreachable says which backends are missing from a list.
func (o Output) Unreachable(names []string) {
	if len(names) > 0 {
		o.warning("no answer from " + strings.Join(names, ", ") + "; what they hold is missing here")
	}
}

// Card shows a provider card.
func (o Output) Card(card *bridgev1.ProviderCard) error {
	caps := card.GetCapabilities()
	tdx := "no"
	if card.GetTdx() {
		tdx = o.Paint(term.Good, "yes")
	}
	observed := Time(caps.GetObservedAt())
	if caps.GetStale() {
		observed += " " + o.Paint(term.Busy, "(stale)")
	}
	keys := make([]string, 0, len(caps.GetLogKeys()))
	for _, k := range caps.GetLogKeys() {
		keys = append(keys, term.Clean(k.GetId()))
	}
	if err := term.Fields(o.W, o.Painter, "",
		[2]string{"bridge", o.Paint(term.Bold, term.Clean(card.GetBridgeId()))},
		[2]string{"backends", term.Clean(strings.Join(card.GetBackends(), " → "))},
		[2]string{"digest", fullID(card.GetBackendSetDigest())},
		[2]string{"tdx", tdx},
		[2]string{"observed", observed},
		[2]string{"log keys", strings.Join(keys, " ")},
	); err != nil {
		return err
	}
	o.printf("\n")
	if err := o.regions(caps.GetRegions()); err != nil {
		return err
	}
	for _, w := range caps.GetWarnings() {
		o.warning(w)
	}
	return nil
}

// sizes is what columns of resources hold.
const sizes = "(CPU / RAM / DISK)"

func (o Output) regions(regions []*bridgev1.RegionCapabilities) error {
	if len(regions) == 0 {
		o.printf("No regions on offer.\n")
		return nil
	}
	var t term.Table
	titles := []string{"REGION", "ISOLATION", "TOTAL " + sizes, "FREE", "LARGEST", "LARGEST NOW", "INSTANCES", "END BY"}
	if o.Wide {
		titles = append(titles, "NETWORK", "DISK LIMIT")
	}
	t.Head(titles...)
	for _, r := range regions {
		cells := []term.Cell{
			term.S(term.Accent, r.GetRegion()), term.T(isolations(r.GetIsolationLevels())),
			term.T(Resources(r.GetTotal())), term.T(Resources(r.GetFree())),
			term.T(Resources(r.GetLargestSingle())), term.T(Resources(r.GetLargestFree())),
			term.R(fmt.Sprintf("%d of %d", r.GetActiveInstances(), r.GetMaxInstances())),
			term.T(enforcement(r.GetDeadlineEnforcement())),
		}
		if o.Wide {
			limit := "accounted"
			if r.GetStorageEnforced() {
				limit = "enforced"
			}
			cells = append(cells, term.T(policies(r.GetNetworkPolicies())), term.T(limit))
		}
		t.Row(cells...)
	}
	return t.Write(o.W, o.Painter, "")
}

// Backends shows a router's backends in order.
func (o Output) Backends(backends []*bridgev1.BackendStatus) error {
	if len(backends) == 0 {
		o.printf("No backends.\n")
		return nil
	}
	var t term.Table
	t.Head("#", "BACKEND", "HEALTH", "REGIONS", "FREE "+sizes, "TOTAL", "LARGEST NOW", "INSTANCES", "LAST SEEN", "LAST ERROR")
	for i, b := range backends {
		style := term.Plain
		switch b.GetHealth() {
		case bridgev1.BackendHealth_BACKEND_HEALTH_SERVING:
			style = term.Good
		case bridgev1.BackendHealth_BACKEND_HEALTH_DEGRADED, bridgev1.BackendHealth_BACKEND_HEALTH_DRAINING:
			style = term.Busy
		case bridgev1.BackendHealth_BACKEND_HEALTH_UNREACHABLE:
			style = term.Bad
		case bridgev1.BackendHealth_BACKEND_HEALTH_UNSPECIFIED:
		}
		var total, free, largest bridgev1.Resources
		var active, most int64
		var regions []string
		for _, r := range b.GetCapabilities().GetRegions() {
			add(&total, r.GetTotal())
			add(&free, r.GetFree())
			if r.GetLargestFree().GetCpuMillicores() >= largest.GetCpuMillicores() && r.GetLargestFree() != nil {
				largest = bridgev1.Resources{
					CpuMillicores: r.GetLargestFree().GetCpuMillicores(), RamMib: r.GetLargestFree().GetRamMib(), StorageGib: r.GetLargestFree().GetStorageGib(),
				}
			}
			active, most = saturate(active, r.GetActiveInstances()), saturate(most, r.GetMaxInstances())
			regions = append(regions, r.GetRegion())
		}
		cells := []term.Cell{term.R(strconv.Itoa(i + 1)), term.S(term.Accent, b.GetName()), term.S(style, word(b.GetHealth().String(), "BACKEND_HEALTH_")), term.T(strings.Join(regions, ","))}
		if b.GetCapabilities() == nil {
			cells = append(cells, term.T(""), term.T(""), term.T(""), term.R(""))
		} else {
			cells = append(cells, term.T(Resources(&free)), term.T(Resources(&total)), term.T(Resources(&largest)), term.R(fmt.Sprintf("%d of %d", active, most)))
		}
		lastSeen := ago(b.GetLastSeen(), o.Now)
		if lastSeen == "" {
			lastSeen = "never"
		}
		t.Row(append(cells, term.T(lastSeen), term.S(term.Bad, b.GetLastError()))...)
	}
	if err := t.Write(o.W, o.Painter, ""); err != nil {
		return err
	}
	for _, b := range backends {
		for _, w := range b.GetCapabilities().GetWarnings() {
			o.warning(b.GetName() + ": " + w)
		}
	}
	return nil
}

func add(sum, r *bridgev1.Resources) {
	sum.CpuMillicores = saturate(sum.GetCpuMillicores(), r.GetCpuMillicores())
	sum.RamMib = saturate(sum.GetRamMib(), r.GetRamMib())
	sum.StorageGib = saturate(sum.GetStorageGib(), r.GetStorageGib())
}

// saturate adds without wrapping.
func saturate(a, b int64) int64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return 1<<63 - 1
}

// Instances shows a list of instances.
func (o Output) Instances(list []*bridgev1.Instance) error {
	if len(list) == 0 {
		o.printf("No instances.\n")
		return nil
	}
	var t term.Table
	titles := []string{"GRANT", "STATE", "BACKEND", "REGION", "ISOLATION", "SIZE " + sizes, "RUNS FOR", "LEFT", "PORTS"}
	if o.Wide {
		titles = append(titles, "INSTANCE", "ATTEMPT", "END BY", "OWNER", "VIA")
	}
	t.Head(titles...)
	for _, i := range list {
		id := ID(i.GetRequestId())
		if o.Wide {
			id = fullID(i.GetRequestId())
		}
		state := State(i.GetState())
		switch {
		case i.GetProgress() != "" && StateStyle(i.GetState()) == term.Busy:
			state += ": " + i.GetProgress()
		case endReason(i.GetEndReason()) != "" && endReason(i.GetEndReason()) != state:
			state += " (" + endReason(i.GetEndReason()) + ")"
		}
		runs := ""
		if i.GetStartedAt() != nil {
			runs = Span(o.Now.Sub(i.GetStartedAt().AsTime()))
		}
		cells := []term.Cell{
			term.S(term.Accent, id), term.S(StateStyle(i.GetState()), state), term.T(i.GetBackend()), term.T(i.GetRegion()),
			term.T(isolation(i.GetIsolation())), term.T(Shape(i.GetShape())), term.R(runs), term.R(left(i.GetValidTo(), o.Now)), term.T(ports(i.GetPorts())),
		}
		if o.Wide {
			cells = append(cells, term.T(i.GetInstanceId()), term.R(strconv.FormatUint(uint64(i.GetAttempt()), 10)),
				term.T(enforcement(i.GetDeadlineEnforcement())), term.T(i.GetOwner()),
				// The rest of a handle is the grant's id.
				term.T(strings.TrimSuffix(strings.TrimSuffix(i.GetHandle(), fullID(i.GetRequestId())), "/")))
		}
		t.Row(cells...)
	}
	return t.Write(o.W, o.Painter, "")
}

// Provisioned shows a ready instance and how to log in.
func (o Output) Provisioned(res *bridgev1.ProvisionResponse) error {
	i, r := res.GetInstance(), res.GetReceipt()
	key := ""
	switch k := r.GetLoginKey().(type) {
	case *bridgev1.Receipt_RequesterKey:
		key = "your own, " + term.Clean(k.RequesterKey.GetFingerprint())
	case *bridgev1.Receipt_SealedKey:
		key = "made for this grant, sealed to this machine"
	case *bridgev1.Receipt_PlaintextKey:
		key = o.Paint(term.Busy, "made by the bridge and sent in clear; not stored")
	}
	where := []string{i.GetBackend()}
	for _, part := range []string{i.GetRegion(), isolation(i.GetIsolation())} {
		if part != "" {
			where = append(where, part)
		}
	}
	evidence := ""
	if r.GetEvidence() != nil {
		evidence = fmt.Sprintf("TDX quote, %d bytes", len(r.GetEvidence().GetQuote()))
	}
	o.printf("%s\n", o.Paint(term.Good, "Ready."))
	if err := term.Fields(o.W, o.Painter, "  ",
		[2]string{"grant", o.Paint(term.Accent, fullID(i.GetRequestId()))},
		[2]string{"where", term.Clean(strings.Join(where, ", "))},
		[2]string{"size", Shape(i.GetShape()) + "  " + o.Paint(term.Faint, sizes)},
		[2]string{"until", Time(i.GetValidTo()) + "  " + o.Paint(term.Faint, "("+left(i.GetValidTo(), o.Now)+" left, ended by the "+enforcement(i.GetDeadlineEnforcement())+")")},
		[2]string{"ssh", term.Clean(fmt.Sprintf("%s@%s port %d", r.GetUser(), r.GetInstanceHost(), r.GetInstancePort()))},
		[2]string{"login key", key},
		[2]string{"host key", term.Clean(r.GetHostKey())},
		[2]string{"ports", term.Clean(ports(i.GetPorts()))},
		[2]string{"evidence", evidence},
		[2]string{"handle", term.Clean(i.GetHandle())},
	); err != nil {
		return err
	}
	o.printf("\nLog in:  %s\nEnd it:  %s\n", o.Paint(term.Bold, "bridgectl ssh "+ID(i.GetRequestId())), o.Paint(term.Bold, "bridgectl terminate "+ID(i.GetRequestId())))
	return nil
}

// Event shows one event of a watch in a line, except for the last, whose
// compute log is for [Output.Log]. It reports whether it wrote anything.
func (o Output) Event(e *bridgev1.WatchUntilExitResponse) bool {
	var text string
	switch event := e.GetEvent().(type) {
	case *bridgev1.WatchUntilExitResponse_Instance:
		i := event.Instance
		text = o.Paint(StateStyle(i.GetState()), State(i.GetState()))
		var notes []string
		if r := endReason(i.GetEndReason()); r != "" && r != State(i.GetState()) {
			notes = append(notes, r)
		}
		if i.GetProgress() != "" {
			notes = append(notes, term.Clean(i.GetProgress()))
		}
		if i.GetState() == bridgev1.InstanceState_INSTANCE_STATE_READY {
			notes = append(notes, "ends "+Time(i.GetValidTo())+", "+left(i.GetValidTo(), o.Now)+" left")
		}
		if len(notes) > 0 {
			text += "  " + o.Paint(term.Faint, strings.Join(notes, "; "))
		}
	case *bridgev1.WatchUntilExitResponse_Usage:
		text = "usage" + "  " + o.Paint(term.Faint, brief(event.Usage.GetLog().GetUsage()))
	case *bridgev1.WatchUntilExitResponse_ComputeLog:
		text = "ended" + "  " + o.Paint(term.Faint, outcome(event.ComputeLog.GetLog().GetExit()))
	default:
		return false
	}
	o.printf("%s  %s\n", o.Paint(term.Faint, Time(e.GetAt())), text)
	return true
}

func outcome(x *bridgev1.Exit) string {
	parts := []string{}
	if r := endReason(x.GetReason()); r != "" {
		parts = append(parts, r)
	}
	if x != nil && x.Code != nil {
		parts = append(parts, fmt.Sprintf("exit status %d", x.GetCode()))
	}
	if x.GetSignal() != "" {
		parts = append(parts, "signal "+term.Clean(x.GetSignal()))
	}
	if x.GetMessage() != "" {
		parts = append(parts, term.Clean(x.GetMessage()))
	}
	return strings.Join(parts, ", ")
}

// Swept shows what a sweep found, and where it could not look.
func (o Output) Swept(res *bridgev1.SweepResponse, dryRun bool) error {
	switch unseen := len(res.GetBlind()) + len(res.GetFailures()); {
	case len(res.GetResources()) > 0:
		if err := o.sweptTable(res.GetResources(), dryRun); err != nil {
			return err
		}
	case unseen == 0:
		o.printf("Nothing that should not exist.\n")
	default:
		o.printf("Nothing that should not exist, where one can see.\n")
	}
	for _, part := range res.GetBlind() {
		o.printf("%s %s\n", o.Paint(term.Bad, "Not seen, and nothing done there:"), term.Clean(part))
	}
	for _, f := range res.GetFailures() {
		o.printf("%s %s: %s\n", o.Paint(term.Bad, "Did not sweep:"), term.Clean(f.GetBackend()), term.Clean(f.GetError()))
	}
	return nil
}

func (o Output) sweptTable(found []*bridgev1.SweptResource, dryRun bool) error {
	var t term.Table
	t.Head("GRANT", "ATTEMPT", "WHERE", "INSTANCE", "AGE", "DEADLINE", "RESULT", "WHY")
	for _, r := range found {
		result := term.S(term.Good, "deleted")
		switch {
		case r.GetError() != "":
			result = term.S(term.Bad, "failed: "+r.GetError())
		case dryRun:
			result = term.S(term.Busy, "would be deleted")
		case !r.GetDeleted():
			result = term.S(term.Busy, "not yet: looked at again by the next sweep")
		}
		age, deadline := "", ""
		if r.GetCreatedAt() != nil {
			age = Span(o.Now.Sub(r.GetCreatedAt().AsTime()))
		}
		if r.GetValidTo() != nil {
			deadline = r.GetValidTo().AsTime().Format(time.RFC3339)
		}
		where := strings.Trim(r.GetBackend()+" "+r.GetPlacement(), " ")
		t.Row(term.S(term.Accent, ID(r.GetRequestId())), term.R(strconv.FormatUint(uint64(r.GetAttempt()), 10)), term.T(where), term.T(r.GetInstanceId()),
			term.R(age), term.T(deadline), result, term.T(r.GetWhy()))
	}
	return t.Write(o.W, o.Painter, "")
}
