package ec2fixture

import (
	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
)

// record writes down the calls to the cloud and to the ledger, if that is
// watched.
func (s *Site) record(id backend.GrantID) (stop func() []backendtest.Call) {
	all := id == backend.GrantID{}
	var ids []ledger.RequestID
	if !all {
		ids = append(ids, ledger.RequestID(id))
	}
	requests := s.points.record(id)
	stored := s.ledger().Record(ids...)
	return func() []backendtest.Call {
		calls := requests()
		for n := range calls {
			calls[n].Varies = calls[n].Varies || all
		}
		for _, c := range stored() {
			varies := all || c.RequestID == ledger.RequestID{}
			calls = append(calls, backendtest.Call{Side: backendtest.SideLedger, Point: c.Point, Mutates: c.Mutates, Varies: varies})
		}
		return calls
	}
}

// ledger returns where the calls to the ledger pass, which may be nowhere.
func (s *Site) ledger() *ledgertest.Points {
	if s.options.Ledger == nil {
		return new(ledgertest.Points)
	}
	return s.options.Ledger
}

// inject has a call fail.
func (s *Site) inject(f backendtest.Fault) backendtest.Injection {
	if f.Side != backendtest.SideLedger {
		return s.points.inject(f)
	}
	return s.ledger().Inject(ledgertest.Fault{
		Point: f.Point, Nth: f.Nth, Kind: ledgertest.Kind(f.Kind), Always: f.Always, RequestID: ledger.RequestID(f.GrantID), Crash: s.options.Kill,
	})
}
