package ec2backend

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// orderOf is what the runtime makes of a grant for the driver.
func orderOf(g backend.Grant, login string) worker.Order {
	return worker.Order{Grant: g, LoginKey: login}
}

// provisionMany makes n instances at once.
func (s *suiteSite) provisionMany(t *testing.T, b backend.Backend, n int) (grants []backend.Grant, made []backend.Provisioned) {
	t.Helper()
	grants, made = make([]backend.Grant, n), make([]backend.Provisioned, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			g, e := s.grant()
			grants[i] = g
			var err error
			if made[i], err = b.Provision(asRequester(t.Context()), g, e); err != nil {
				t.Errorf("grant %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return grants, made
}

// sameAgain provisions all grants again and holds the answers against the first.
// launches is how many there were of whatever grant.
func (s *suiteSite) sameAgain(t *testing.T, b backend.Backend, grants []backend.Grant, made []backend.Provisioned, launches int) {
	t.Helper()
	var wg sync.WaitGroup
	for i, g := range grants {
		wg.Go(func() {
			_, e := s.grant()
			got, err := b.Provision(asRequester(t.Context()), g, e)
			if err != nil || got.Instance.ID != made[i].Instance.ID || got.Receipt.HostKey != made[i].Receipt.HostKey {
				t.Errorf("grant %d: %+v, %v; was %+v", i, got.Instance, err, made[i].Instance)
			}
		})
	}
	wg.Wait()
	if n := len(s.cloud.Cloud.History()); n != launches {
		t.Errorf("%d launches, want %d", n, launches)
	}
}

// terminateMany ends grants at once.
func terminateMany(t *testing.T, b backend.Backend, grants []backend.Grant) {
	t.Helper()
	var wg sync.WaitGroup
	for _, g := range grants {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(asRequester(t.Context()), suitePatience)
			defer cancel()
			if out, err := b.Terminate(ctx, backend.HandleFor(g.ID)); err != nil || out.State != backend.StateTerminated {
				t.Errorf("terminate: %v, %v", out.State, err)
			}
		})
	}
	wg.Wait()
}

// ledgerAt opens the ledger in a file.
func ledgerAt(t *testing.T, path string) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(context.WithoutCancel(t.Context()), ledger.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// backUp copies a ledger that is in use, as sqlite3's .backup does.
func backUp(t *testing.T, from, to string) {
	t.Helper()
	db, err := sql.Open("sqlite", from) // Package ledger has the driver.
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(), "VACUUM INTO ?", to)
	if err := errors.Join(err, db.Close(), os.Chmod(to, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// asked is how often a call was made since the requests were last forgotten.
func (s *suiteSite) asked(action string) (n int) {
	for _, r := range s.cloud.Cloud.Requests() {
		if r.Action == action && !r.DryRun {
			n++
		}
	}
	return n
}

// sweptOnce has a janitor look and act, in a process of its own.
func (s *suiteSite) sweptOnce(t *testing.T) worker.SweepReport {
	t.Helper()
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "aws", Ledger: s.ledger, Secret: s.secret, Metrics: prometheus.NewRegistry(), Janitor: true,
		OrphanAge: s.orphanAge, Log: slog.New(slog.NewJSONHandler(&s.logs, nil)).With("janitor", true),
	})
	if err != nil {
		t.Fatal(err)
	}
	driver, err := Open(t.Context(), s.config, runtime.Env())
	if err != nil {
		t.Fatal(err)
	}
	report, err := runtime.SweepOnce(t.Context(), driver, worker.SweepOptions{Pause: s.orphanAge})
	if err := errors.Join(err, driver.Close()); err != nil {
		t.Fatal(err)
	}
	return report
}

// A worker that lost everything but its ledger, one whose ledger is a copy from
// halfway, and one with none of it, go on with what runs: nothing is made twice,
// and nothing that runs is taken for a leftover.
func TestLongHundredInstancesAreAdopted(t *testing.T) {
	t.Parallel()
	const (
		n     = 100
		half  = n / 2 // are in the copy
		ended = 10    // of those have ended since
		runs  = n - ended
	)
	s := openSuiteSite(t, 0)
	s.config.MaxConcurrentInstances = n
	s.config.PollInterval.Duration, s.config.BootTimeout.Duration, s.config.UndoTimeout.Duration = 100*time.Millisecond, 2*time.Minute, time.Minute
	path, copied := filepath.Join(t.TempDir(), "ledger.db"), filepath.Join(t.TempDir(), "copy.db")
	s.ledger = ledgerAt(t, path)
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	grants, made := s.provisionMany(t, b, half)
	backUp(t, path, copied)
	over := grants[:ended]
	terminateMany(t, b, over)
	more, moreMade := s.provisionMany(t, b, half)
	grants, made = append(grants[ended:], more...), append(made[ended:], moreMade...)
	s.kill()
	s.stop(t)

	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	s.sameAgain(t, b, grants, made, n)
	s.stop(t)

	s.cloud.Cloud.ForgetRequests()
	s.ledger, s.orphanAge = ledgerAt(t, copied), time.Second // and a sweep each quarter of it
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	// What has ended since, the copy has as ready. It ends again, now for a reason
	// that nobody can tell any more, and never runs again.
	for _, g := range over {
		if log := ends(t, b, g.ID); log.Exit.Reason != backend.EndVanished {
			t.Errorf("exit %+v", log.Exit)
		}
		_, e := s.grant()
		if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.GrantEnded) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
			t.Errorf("grant that has ended since: %v", err)
		}
	}
	// Each sweep reads this once, and nothing else does now.
	before := s.asked("DescribeNetworkInterfaces")
	waitFor(t, "some sweeps", func() bool { return s.asked("DescribeNetworkInterfaces") >= before+6 })
	if report := s.sweptOnce(t); len(report.Findings) > 0 || len(report.Blind) > 0 || report.Looked < runs {
		t.Errorf("the janitor finds %+v", report)
	}
	if calls := s.asked("TerminateInstances"); calls > 0 || s.alive() != runs {
		t.Errorf("%d calls to end something; %d instances live", calls, s.alive())
	}
	s.hasRoomFor(t, b, n-runs)
	// The room is there, and no more than that.
	others, _ := s.provisionMany(t, b, n-runs)
	s.hasRoomFor(t, b, 0)
	g, e := s.grant()
	if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.WorkerFull) {
		t.Errorf("one more than fits: %v", err)
	}
	// What runs has its room already.
	s.sameAgain(t, b, grants, made, n+len(others))
	terminateMany(t, b, others)
	s.hasRoomFor(t, b, n-runs)
	s.stop(t)

	s.ledger = ledgertest.Open(t) // from before the first grant
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	s.hasRoomFor(t, b, n-runs)
	s.sameAgain(t, b, grants, made, n+len(others))
	terminateMany(t, b, grants)
}

// alive is how many instances aren't terminated.
func (s *suiteSite) alive() (n int) {
	for _, i := range s.cloud.Cloud.Instances() {
		if i.State != ec2sim.StateTerminated {
			n++
		}
	}
	return n
}

// hasRoomFor waits until a worker says that it has room for so many instances:
// what it has seen of EC2 may be older than what it did.
func (s *suiteSite) hasRoomFor(t *testing.T, b backend.Backend, free int64) {
	t.Helper()
	limit := s.config.MaxConcurrentInstances
	var last backend.RegionCapabilities
	defer func() {
		if t.Failed() {
			t.Logf("capabilities %+v", last)
		}
	}()
	waitFor(t, fmt.Sprintf("room for %d of %d", free, limit), func() bool {
		c, err := b.Capabilities(t.Context())
		if err != nil || len(c.Regions) != 1 {
			t.Fatalf("capabilities %+v, %v", c, err)
		}
		last = c.Regions[0]
		return last.ActiveInstances == limit-free && last.MaxInstances == limit &&
			last.Free == last.LargestSingle.Times(free) && last.Total == last.LargestSingle.Times(limit)
	})
}

// Two hundred grants at once need one mutating call each to be made and one to
// end, and less than one read per grant and minute: none of them waits for a
// read of its own. The documented buckets of the simulator are on.
func TestLongTwoHundredGrantsAtOnceStayWithinTheBudgets(t *testing.T) {
	t.Parallel()
	const n = 200
	s, b := openBridge(t, func(c *Config) {
		c.MaxConcurrentInstances = n
		// The real intervals: it is they that the reads follow from.
		c.PollInterval.Duration, c.VisibilityDelay.Duration = 5*time.Second, time.Second
		c.BootTimeout.Duration, c.UndoTimeout.Duration = 10*time.Minute, 5*time.Minute
		c.APILimits = nil
	}, func(o *ec2fixture.Options) { o.Buckets = true })
	s.cloud.Cloud.ForgetRequests()
	began := time.Now()
	grants, _ := s.provisionMany(t, b, n)
	created := time.Now()
	create := count(s.cloud.Cloud.Requests())
	s.cloud.Cloud.ForgetRequests()

	if err := sleep(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	watch := count(s.cloud.Cloud.Requests())
	s.cloud.Cloud.ForgetRequests()

	ending := time.Now()
	var wg sync.WaitGroup
	for _, g := range grants {
		wg.Go(func() { terminate(t, b, g.ID) })
	}
	wg.Wait()
	end := count(s.cloud.Cloud.Requests())

	t.Logf("create: %v, %d reads in %s", create.mutating, create.reads, created.Sub(began).Round(time.Second))
	t.Logf("watch: %d reads in a minute: %.2f per grant and minute", watch.reads, float64(watch.reads)/n)
	t.Logf("end: %v, %d reads in %s", end.mutating, end.reads, time.Since(ending).Round(time.Second))
	// One each, and two for the group that all share.
	if create.mutating["RunInstances"] != n || create.changes() > n+2 || watch.changes() != 0 ||
		end.mutating["TerminateInstances"] != n || end.changes() != n {
		t.Errorf("mutating calls: %v to create, %v to watch, %v to end %d grants", create.mutating, watch.mutating, end.mutating, n)
	}
	perMinute := func(reads int, d time.Duration) float64 { return float64(reads) / n / max(1, d.Minutes()) }
	for what, rate := range map[string]float64{
		"create": perMinute(create.reads, created.Sub(began)), "watch": perMinute(watch.reads, time.Minute), "end, but for the one of CloudWatch": perMinute(end.shared, time.Since(ending)),
		"all of a life": perMinute(create.reads+watch.reads+end.reads, time.Since(began)),
	} {
		if rate >= 1 {
			t.Errorf("%s: %.2f reads per grant and minute", what, rate)
		}
	}
	if throttled := create.throttled + watch.throttled + end.throttled; throttled > 0 {
		t.Errorf("%d calls were throttled", throttled)
	}
}

// calls counts requests.
type calls struct {
	mutating         map[string]int // by action
	reads, throttled int
	// shared are the reads but for the one of CloudWatch that each grant's end
	// has.
	shared int
}

// changes are all mutating calls.
func (c calls) changes() (n int) {
	for _, of := range c.mutating {
		n += of
	}
	return n
}

func count(all []ec2sim.Request) (out calls) {
	out.mutating = map[string]int{}
	for _, r := range all {
		switch {
		case r.Answer == "RequestLimitExceeded":
			out.throttled++
		case r.DryRun:
		case r.Mutates:
			out.mutating[r.Action]++
		default:
			out.reads++
			if r.Action != "GetMetricData" {
				out.shared++
			}
		}
	}
	return out
}

// The content of a grant decides whether what runs for its id is the same.
func TestContentTellsGrantsApart(t *testing.T) {
	t.Parallel()
	base := backend.Grant{Environment: map[string]string{"A": "1", "B": "2"}, Shape: suiteShape, ValidTo: time.Unix(1_800_000_000, 0)}
	first := contentOf(orderOf(base, "key"))
	for range 10 {
		if contentOf(orderOf(base, "key")) != first {
			t.Fatal("it isn't the same each time")
		}
	}
	for name, change := range map[string]func(*backend.Grant){
		"shape":       func(g *backend.Grant) { g.Shape.RAM++ },
		"environment": func(g *backend.Grant) { g.Environment = map[string]string{"A": "1", "B": "3"} },
		"image":       func(g *backend.Grant) { g.Image.Digest.Sum = sha256.Sum256(nil) },
		"deadline":    func(g *backend.Grant) { g.ValidTo = g.ValidTo.Add(time.Second) },
		"ports":       func(g *backend.Grant) { g.Ports = []backend.Port{{Number: 1, Protocol: backend.TCP}} },
		"policy":      func(g *backend.Grant) { g.Network.AllowedPrefixes = []string{"0.0.0.0/0"} },
	} {
		g := base
		change(&g)
		if contentOf(orderOf(g, "key")) == first {
			t.Errorf("another %s makes no other content", name)
		}
	}
	if contentOf(orderOf(base, "another")) == first {
		t.Error("another login key makes no other content")
	}
}
