package hostfixture

import (
	"fmt"
	"sync"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/hosttap"
)

// The range of ports that a tap forwards, for the worker's configuration: few,
// for each has a listener.
const (
	firstPort = 40000
	lastPort  = 40019
	// Ports is what a host's section says.
	Ports = "40000-40019"
)

// createPoint is the call that creates an instance, readPoint stands for all
// that reads what the hosts hold.
const (
	createPoint = "systemd.StartTransientUnit"
	readPoint   = "hosts"
)

// Wires are where the worker's calls pass.
type Wires struct {
	// Hosts are the taps in front of the hosts.
	Hosts *hosttap.Group
	// Ledger is where the calls to the ledger pass. Optional.
	Ledger *ledgertest.Points
	// kill makes the worker dead.
	kill func()
}

// NewWires returns wires without taps. kill makes the worker dead at once and
// doesn't wait for what is under way; it may be called several times. ledger is
// optional.
func NewWires(points *ledgertest.Points, kill func()) *Wires {
	return &Wires{Hosts: hosttap.NewGroup(kill), Ledger: points, kill: kill}
}

// Open starts a tap in front of each host, each at an address of its own: the
// lab's network namespace has all of 127.0.0.0/8. The taps end with the test.
func (w *Wires) Open(t testing.TB, hosts ...*lab.Host) []*hosttap.Tap {
	t.Helper()
	var taps []*hosttap.Tap
	for _, h := range hosts {
		a := h.Addr.As4() // 10.77.x.y
		taps = append(taps, w.Hosts.Open(t, h, hosttap.Options{
			Address: fmt.Sprintf("127.1.%d.%d", a[2], a[3]), FirstPort: firstPort, LastPort: lastPort,
		}))
	}
	return taps
}

// Fill has a fixture's faults come by the wires, in place of the site's own. A
// fault that cuts the worker off is over when the worker can use its hosts again.
func (w *Wires) Fill(t testing.TB, s *Site, f *backendtest.Fixture) {
	t.Helper()
	f.CreatePoint, f.ReadPoint = createPoint, readPoint
	f.Record, f.Faults = w.record, faultsOf
	f.Inject = func(fault backendtest.Fault) backendtest.Injection {
		i := w.inject(fault)
		end := sync.OnceFunc(func() {
			i.Release()
			if fault.Kind == backendtest.FaultLostAnswer || fault.Point == readPoint {
				s.waitForHosts(t)
			}
		})
		t.Cleanup(end)
		return &injection{reached: i.Reached(), release: end}
	}
}

// polls are the calls whose number depends on how fast something is, or that
// are made in the background, too.
var polls = map[string]bool{
	"systemd.GetUnit": true, "properties.GetAll": true,
	"sftp.open grant.json": true, "sftp.read grant.json": true, "sftp.close grant.json": true,
}

func (w *Wires) record(id backend.GrantID) (stop func() []backendtest.Call) {
	all := id == backend.GrantID{}
	text := ""
	var ids []ledger.RequestID
	if !all {
		text, ids = id.String(), []ledger.RequestID{ledger.RequestID(id)}
	}
	hosts := w.Hosts.Record(text)
	points := w.Ledger
	if points == nil {
		points = new(ledgertest.Points)
	}
	stored := points.Record(ids...)
	return func() []backendtest.Call {
		var calls []backendtest.Call
		for _, c := range hosts() {
			varies := polls[c.Point] || all || len(c.Mentions) == 0
			calls = append(calls, backendtest.Call{Side: backendtest.SideProvider, Point: c.Point, Mutates: c.Mutates, Varies: varies})
		}
		for _, c := range stored() {
			varies := all || c.RequestID == ledger.RequestID{}
			calls = append(calls, backendtest.Call{Side: backendtest.SideLedger, Point: c.Point, Mutates: c.Mutates, Varies: varies})
		}
		return calls
	}
}

func (w *Wires) inject(f backendtest.Fault) backendtest.Injection {
	grant := ""
	if f.GrantID != (backend.GrantID{}) {
		grant = f.GrantID.String()
	}
	switch {
	case f.Side == backendtest.SideLedger:
		return w.Ledger.Inject(ledgertest.Fault{
			Point: f.Point, Nth: f.Nth, Kind: ledgertest.Kind(f.Kind), Always: f.Always, RequestID: ledger.RequestID(f.GrantID), Crash: w.kill,
		})
	case f.Point == readPoint && f.Kind == backendtest.FaultSlow:
		return now(w.Hosts.Freeze())
	case f.Point == readPoint:
		w.Hosts.Refuse(true)
		return now(func() { w.Hosts.Refuse(false) })
	}
	return w.Hosts.Inject(hosttap.Fault{Point: f.Point, Nth: f.Nth, Kind: hosttap.Kind(f.Kind), Always: f.Always, Grant: grant})
}

// now is a fault that is at work at once.
func now(end func()) *injection {
	reached := make(chan struct{})
	close(reached)
	return &injection{reached: reached, release: sync.OnceFunc(end)}
}

// faultsOf says what may go wrong with a call. A host that lets the worker in
// has no account whose quota or rights could end, so what it refuses is a fault
// of the host: HOST_UNFIT where it says so, PROVIDER_UNAVAILABLE where it
// doesn't say.
func faultsOf(c backendtest.Call) map[backendtest.FaultKind][]backenderr.Reason {
	if c.Side == backendtest.SideLedger {
		return backendtest.DefaultFaults("")(c)
	}
	host := []backenderr.Reason{backenderr.HostUnfit, backenderr.ProviderUnavailable, backenderr.BootTimeout}
	away := []backenderr.Reason{backenderr.ProviderUnavailable, backenderr.BootTimeout}
	// Provision waits for a host that it has begun on as long as its caller does,
	// be it that the host is slow, or that each answer is the connection's last.
	slow := append([]backenderr.Reason{backenderr.DeadlineExceeded}, away...)
	return map[backendtest.FaultKind][]backenderr.Reason{
		backendtest.FaultCapacity:    host,
		backendtest.FaultDenied:      host,
		backendtest.FaultThrottled:   host,
		backendtest.FaultUnavailable: host,
		backendtest.FaultLostAnswer:  slow,
		backendtest.FaultSlow:        slow,
	}
}
