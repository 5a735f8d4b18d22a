package worker

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// What the driver read goes before what the keeper believes; what nobody knows
// stays unknown.
func TestFinalLogIsMergedOfWhatIsKnown(t *testing.T) {
	t.Parallel()
	code := int32(3)
	shape := backend.Shape{CPU: 1000, RAM: 512, Storage: 2}
	synctest.Test(t, func(t *testing.T) {
		started, ended := time.Now().Add(-100*time.Second), time.Now().Add(-10*time.Second)
		measured := &backend.Measurement{Value: 42, Source: backend.UsageHostMeasured, From: started, To: ended}
		seconds := func(to time.Time, n int64) backend.Usage {
			var u backend.Usage
			u.Allocated(shape, started, to)
			if u.CPUAllocated.Value != int64(shape.CPU)*n {
				t.Fatalf("test: %d", u.CPUAllocated.Value)
			}
			return u
		}
		withCPU := func(u backend.Usage) backend.Usage {
			u.CPU = measured
			return u
		}
		ready := &backend.Provisioned{Instance: backend.Instance{ID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started}}
		for name, c := range map[string]struct {
			ready  *backend.Provisioned
			last   *backend.ComputeLog
			exit   backend.Exit
			reason backend.EndReason
			want   backend.ComputeLog
		}{
			"never ran": {
				reason: backend.EndCancelled,
				want: backend.ComputeLog{
					Shape: shape, EndedAt: time.Now(), Exit: backend.Exit{Reason: backend.EndCancelled},
				},
			},
			"ran, and the driver read nothing": {
				ready: ready, reason: backend.EndVanished, exit: backend.Exit{Reason: backend.EndVanished, Message: "no trace"},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: time.Now(), Partial: true,
					Exit: backend.Exit{Reason: backend.EndVanished, Message: "no trace"}, Usage: seconds(time.Now(), 100),
				},
			},
			"the driver read everything": {
				ready: ready, reason: backend.EndWorkloadExited, exit: backend.Exit{Reason: backend.EndWorkloadExited},
				last: &backend.ComputeLog{
					InstanceID: "i-2", Region: "s", Attempt: 2, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndOutOfMemory, Code: &code}, Usage: backend.Usage{CPU: measured},
				},
				want: backend.ComputeLog{
					InstanceID: "i-2", Region: "s", Attempt: 2, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndOutOfMemory, Code: &code}, Usage: withCPU(seconds(ended, 90)),
				},
			},
			"the driver knows figures, the watch the exit": {
				ready: ready, reason: backend.EndWorkloadExited, exit: backend.Exit{Reason: backend.EndWorkloadExited, Code: &code, Message: "exited"},
				last: &backend.ComputeLog{InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended, Usage: backend.Usage{CPU: measured}, Partial: true},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended, Partial: true,
					Exit: backend.Exit{Reason: backend.EndWorkloadExited, Code: &code, Message: "exited"}, Usage: withCPU(seconds(ended, 90)),
				},
			},
			"both know why, the watch alone the code": {
				ready: ready, reason: backend.EndWorkloadExited, exit: backend.Exit{Reason: backend.EndWorkloadExited, Code: &code, Message: "exited"},
				last: &backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndWorkloadExited, Message: "shut down"},
				},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndWorkloadExited, Code: &code, Message: "exited"}, Usage: seconds(ended, 90),
				},
			},
			"the driver knows code and message, but not why": {
				ready: ready, reason: backend.EndTerminated,
				last: &backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Code: &code, Message: "killed"},
				},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndTerminated, Code: &code, Message: "killed"}, Usage: seconds(ended, 90),
				},
			},
			"the driver knows usage only": {
				ready: ready, reason: backend.EndDeadline, last: &backend.ComputeLog{Usage: backend.Usage{CPU: measured}, EndedAt: ended},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndDeadline}, Usage: withCPU(seconds(ended, 90)),
				},
			},
			"after a restart the driver alone knows": {
				reason: backend.EndDeadline,
				last:   &backend.ComputeLog{InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended},
				want: backend.ComputeLog{
					InstanceID: "i-1", Region: "r", Attempt: 1, Shape: shape, StartedAt: started, EndedAt: ended,
					Exit: backend.Exit{Reason: backend.EndDeadline}, Usage: seconds(ended, 90),
				},
			},
		} {
			s := quiet(t)
			s.attempt(backend.GrantID{1})
			claim, err := s.config.Ledger.Claim(t.Context(), ledger.RequestID{1})
			if err != nil {
				t.Fatal(err)
			}
			k := newKeeper(s.Runtime, claim, c.ready, phaseEnd, 0)
			signed, err := k.writeFinal(t.Context(), c.last, c.exit, c.reason)
			if err != nil {
				t.Fatal(err)
			}
			c.want.GrantID, c.want.Backend, c.want.ValidTo = backend.GrantID{1}, "metal", k.claim.ValidTo
			c.want.Final, c.want.Sequence = true, 2
			c.want.ProviderID = signed.Log.ProviderID
			if len(c.want.ProviderID) != 32 {
				t.Errorf("%s: the provider is missing", name)
			}
			if diff := cmp.Diff(c.want, signed.Log, cmpopts.EquateApproxTime(0)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			// Whoever writes second gets what was written first.
			again, err := k.writeFinal(t.Context(), nil, backend.Exit{}, backend.EndTerminated)
			if err != nil || !cmp.Equal(signed, again, cmpopts.EquateApproxTime(0)) {
				t.Errorf("%s: another final log: %v\n%s", name, err, cmp.Diff(signed, again))
			}
		}
	})
}

func TestClosuresKeepTheirReason(t *testing.T) {
	t.Parallel()
	for reason := backend.EndWorkloadExited; reason <= backend.EndProvisionFailed; reason++ {
		if got := closureReason(ledger.Closure{Reason: reason.String()}); got != reason {
			t.Errorf("%s is read as %s", reason, got)
		}
	}
	if got := closureReason(ledger.Closure{Reason: "of another kind"}); got != backend.EndTerminated {
		t.Errorf("an unknown reason is read as %s", got)
	}
}
