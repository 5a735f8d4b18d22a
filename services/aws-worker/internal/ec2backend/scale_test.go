package ec2backend

import (
	"crypto/sha256"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
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
func (s *suiteSite) sameAgain(t *testing.T, b backend.Backend, grants []backend.Grant, made []backend.Provisioned) {
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
	if n := len(s.cloud.Cloud.History()); n != len(grants) {
		t.Errorf("%d launches for %d grants", n, len(grants))
	}
}

// A worker that lost everything but its ledger, and one whose ledger is a copy
// from before, go on with what runs.
func TestLongHundredInstancesAreAdopted(t *testing.T) {
	t.Parallel()
	const n = 100
	s, b := openBridge(t, func(c *Config) {
		c.MaxConcurrentInstances = n
		c.PollInterval.Duration, c.BootTimeout.Duration, c.UndoTimeout.Duration = 100*time.Millisecond, 2*time.Minute, time.Minute
	})
	grants, made := s.provisionMany(t, b, n)
	s.kill()
	s.stop(t)

	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	s.sameAgain(t, b, grants, made)
	s.stop(t)

	s.ledger = ledgertest.Open(t) // from before the first grant
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	if c, err := b.Capabilities(t.Context()); err != nil {
		t.Error(err)
	} else if c.Regions[0].MaxInstances != n {
		t.Errorf("capabilities %+v", c.Regions)
	}
	s.sameAgain(t, b, grants, made)
	var wg sync.WaitGroup
	for _, g := range grants {
		wg.Go(func() { terminate(t, b, g.ID) })
	}
	wg.Wait()
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

	t.Logf("create: %d mutating calls, %d reads in %s", create.mutating, create.reads, created.Sub(began).Round(time.Second))
	t.Logf("watch: %d reads in a minute: %.2f per grant and minute", watch.reads, float64(watch.reads)/n)
	t.Logf("end: %d mutating calls, %d reads in %s", end.mutating, end.reads, time.Since(ending).Round(time.Second))
	// The shared group is made with two calls more.
	if create.mutating > n+2 || watch.mutating != 0 || end.mutating > n {
		t.Errorf("mutating calls: %d to create, %d to watch, %d to end %d grants", create.mutating, watch.mutating, end.mutating, n)
	}
	perMinute := func(reads int, d time.Duration) float64 { return float64(reads) / n / max(1, d.Minutes()) }
	for what, rate := range map[string]float64{
		"create": perMinute(create.reads, created.Sub(began)), "watch": perMinute(watch.reads, time.Minute), "end": perMinute(end.shared, time.Since(ending)),
	} {
		if rate >= 1 {
			t.Errorf("%s: %.2f reads per grant and minute", what, rate)
		}
	}
	// A machine that stands still between a call's turn and the call takes up the
	// headroom of the buckets, which then costs one refusal.
	if throttled := create.throttled + watch.throttled + end.throttled; throttled > n/100 {
		t.Errorf("%d calls were throttled", throttled)
	}
}

// calls counts requests.
type calls struct {
	mutating, reads, throttled int
	// shared are the reads but for the one of CloudWatch that each grant's end
	// has.
	shared int
}

func count(all []ec2sim.Request) (out calls) {
	for _, r := range all {
		switch {
		case r.Answer == "RequestLimitExceeded":
			out.throttled++
		case r.DryRun:
		case r.Mutates:
			out.mutating++
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
