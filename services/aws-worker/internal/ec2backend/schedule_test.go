package ec2backend

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// withSchedules has a configuration end instances by schedules.
func withSchedules(c *Config) {
	c.Deadline, c.ScheduleRole = deadlinePlatform, "arn:aws:iam::123456789012:role/schedules"
}

// scheduleHits counts which calls to Scheduler something went wrong at, by call.
type scheduleHits struct {
	mu              sync.Mutex // protects what follows
	crashes, faults map[string]int
}

// ofScheduler tells the calls that a deadline by schedule adds.
func ofScheduler(c backendtest.Call) bool { return strings.HasPrefix(c.Point, "scheduler.") }

// sweeps has a fixture's sweeps take what TestLongConformance leaves out. Crashes
// are at all calls to the provider: those to the ledger are between them, so that
// a death there leaves schedules as a death here does. Faults are at the calls to
// Scheduler.
func (h *scheduleHits) sweeps(f *backendtest.Fixture) {
	record, faults, inject := f.Record, f.Faults, f.Inject
	f.Record = func(id backend.GrantID) func() []backendtest.Call {
		stop := record(id)
		return func() []backendtest.Call {
			return slices.DeleteFunc(stop(), func(c backendtest.Call) bool { return c.Side != backendtest.SideProvider })
		}
	}
	f.Faults = func(c backendtest.Call) map[backendtest.FaultKind][]backenderr.Reason {
		if !ofScheduler(c) {
			return nil
		}
		return faults(c)
	}
	f.Inject = func(fault backendtest.Fault) backendtest.Injection {
		return &counted{inject(fault), func() { h.count(fault) }, sync.Once{}}
	}
}

// counted is an injection whose hit counts.
type counted struct {
	backendtest.Injection
	count func()
	once  sync.Once
}

// Release implements backendtest.Injection.
func (c *counted) Release() {
	select {
	case <-c.Reached():
		c.once.Do(c.count)
	default:
	}
	c.Injection.Release()
}

func (h *scheduleHits) count(f backendtest.Fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if f.Kind == backendtest.FaultCrashBefore || f.Kind == backendtest.FaultCrashAfter {
		h.crashes[f.Point]++
	} else {
		h.faults[f.Point]++
	}
}

// TestLongConformanceWithSchedules holds to the contract a worker whose deadlines
// are schedules: each is one thing more that is made, that a death may come
// before or after, and that has to go with its instance.
func TestLongConformanceWithSchedules(t *testing.T) {
	hits := &scheduleHits{crashes: map[string]int{}, faults: map[string]int{}}
	const elsewhere = "schedules change nothing in it: TestLongConformance"
	for _, part := range []struct {
		name      string
		harness   backendtest.Harness
		orphanAge time.Duration
		wrap      func(*backendtest.Fixture)
	}{
		{"whole", backendtest.Harness{
			Only: []string{"provision", "watch", "terminate"}, Sweep: backendtest.Sweep{Sample: 3},
			Skip: map[string]string{"terminate/a grant never seen while the provider hangs": elsewhere},
		}, 0, func(*backendtest.Fixture) {}},
		{"crash", backendtest.Harness{
			Only: []string{"crash"}, Sweep: backendtest.Sweep{MutatingOnly: true, Parallel: suiteParallel},
			Skip: map[string]string{
				"crash/during Provision with a sealed key, which is then retried": elsewhere,
				"crash/during a restart": "each run of the faults at a restart begins with a death as a schedule is deleted",
			},
		}, 0, hits.sweeps},
		{"faults", backendtest.Harness{
			Only: []string{"faults"}, Sweep: backendtest.Sweep{Sample: 8, Parallel: suiteParallel},
		}, 0, hits.sweeps},
		{"orphans", backendtest.Harness{
			Only: []string{"orphans"}, Sweep: backendtest.Sweep{MutatingOnly: true, Parallel: suiteParallel},
			Skip: map[string]string{"orphans/only what is over, and the bridge's own, is swept": elsewhere},
		}, suiteOrphanAge, hits.sweeps},
	} {
		t.Run(part.name, func(t *testing.T) {
			part.harness.DirectOnly = true
			conformAs(t, part.harness, part.orphanAge, withSchedules, part.wrap)
		})
	}
	for _, point := range []string{"scheduler.CreateSchedule", "scheduler.DeleteSchedule"} {
		if !t.Failed() && (hits.crashes[point] == 0 || hits.faults[point] == 0) {
			t.Errorf("%d crashes and %d faults hit %s", hits.crashes[point], hits.faults[point], point)
		}
	}
}

// A process may die between its two calls. Who adopts its instance has yet to
// schedule the end of it.
func TestAnAdoptedInstanceGetsItsSchedule(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, withSchedules)
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action != "CreateSchedule" {
			return ec2sim.Intervention{}
		}
		return ec2sim.Intervention{Before: func(context.Context) error {
			s.kill()
			return context.Canceled
		}}
	})
	g, e := s.grant()
	s.dies(t, b, g, e)
	s.cloud.Cloud.Intercept(nil)
	if n := len(s.cloud.Cloud.Schedules()); n != 0 || len(s.living(g.ID)) != 1 {
		t.Fatalf("%d schedules, and %+v", n, s.living(g.ID))
	}
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	p, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	all := s.cloud.Cloud.Schedules()
	if len(all) != 1 || !strings.Contains(all[0].Input, string(p.Instance.ID)) || all[0].At.Before(g.ValidTo) || s.history(g.ID) != 1 {
		t.Errorf("schedules %+v for instance %s until %s, of %d", all, p.Instance.ID, g.ValidTo, s.history(g.ID))
	}
	terminate(t, b, g.ID)
}

// What a process had sent as it died may have its effect after its grant has
// ended. Nothing but the list of schedules shows that.
func TestAScheduleThatComesAfterTheEndIsSwept(t *testing.T) {
	t.Parallel()
	s := openSuiteSite(t, time.Second)
	withSchedules(&s.config)
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	var first atomic.Bool
	late := make(chan struct{})
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action != "CreateSchedule" || !first.CompareAndSwap(false, true) {
			return ec2sim.Intervention{}
		}
		return ec2sim.Intervention{Before: func(context.Context) error {
			s.kill()
			<-late
			return nil
		}}
	})
	g, e := s.grant()
	s.dies(t, b, g, e)
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	terminate(t, b, g.ID)
	close(late)
	waitFor(t, "the end of the schedule", func() bool {
		// Of those before it that found nothing the answer is an error.
		return slices.ContainsFunc(s.cloud.Cloud.Requests(), func(r ec2sim.Request) bool { return r.Action == "DeleteSchedule" && r.Answer == "" })
	})
}

// A role that Scheduler can't assume is the operator's to mend: another grant
// would fare no better.
func TestAScheduleThatCantBeMadeIsTheWorkersFault(t *testing.T) {
	t.Parallel()
	const role = "arn:aws:iam::123456789012:role/not-for-schedules"
	s, b := openBridge(t, func(c *Config) { c.Deadline, c.ScheduleRole = deadlinePlatform, role })
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if r.Action == "CreateSchedule" {
			return ec2sim.Intervention{Refuse: &ec2sim.Error{
				Status: 400, Code: codeScheduleInvalid, Message: "The execution role you provide must allow AWS EventBridge Scheduler to assume the role.",
			}}
		}
		return ec2sim.Intervention{}
	})
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	s.cloud.Cloud.Intercept(nil)
	if !backenderr.Is(err, backenderr.HostUnfit) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Fatalf("%v, created %s", err, backenderr.CreatedOf(err))
	}
	for _, want := range []string{role, "to assume the role"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't say %q", err, want)
		}
	}
}

func TestSchedulesCallEC2InTheirRolesPartition(t *testing.T) {
	t.Parallel()
	for role, want := range map[string]string{
		"arn:aws:iam::123456789012:role/x":        ec2sim.TerminateTarget,
		"arn:aws-cn:iam::123456789012:role/x":     "arn:aws-cn:scheduler:::aws-sdk:ec2:terminateInstances",
		"arn:aws-us-gov:iam::123456789012:role/x": "arn:aws-us-gov:scheduler:::aws-sdk:ec2:terminateInstances",
	} {
		if got := terminateTarget(role); got != want {
			t.Errorf("%s: %s, want %s", role, got, want)
		}
	}
}
