package ec2backend

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

const secondRegion = "us-east-1"

// twoRegions allows a second region after the first.
func twoRegions(c *Config) {
	second := c.Regions[0]
	second.Name = secondRegion
	c.Regions = append(c.Regions, second)
}

// blind lets nobody read a region's instances until the returned flag is cleared.
func (s *suiteSite) blind(region string) *atomic.Bool {
	var on atomic.Bool
	on.Store(true)
	s.cloud.Cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
		if on.Load() && r.Region == region && r.Action == "DescribeInstances" {
			return ec2sim.Intervention{Refuse: ec2sim.Unauthorized()}
		}
		return ec2sim.Intervention{}
	})
	return &on
}

func TestAGrantGoesToTheFirstRegionWithRoom(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) {
		twoRegions(c)
		c.MaxConcurrentInstances = 1
		c.StockOutMemory.Duration = time.Minute
	})
	first, p := s.provision(t, b)
	second, q := s.provision(t, b)
	if p.Instance.Region != suiteRegion || q.Instance.Region != secondRegion {
		t.Errorf("in %s and %s", p.Instance.Region, q.Instance.Region)
	}
	g, e := s.grant()
	if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.WorkerFull) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("with both full: %v", err)
	}
	g, e = s.grant()
	g.Region = "nowhere-1"
	if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.GrantNotSatisfiable) {
		t.Errorf("elsewhere: %v", err)
	}
	terminate(t, b, first.ID)
	terminate(t, b, second.ID)
	// What is out of stock in one is made in the other.
	defer s.cloud.Cloud.StockOut(suiteRegion, "", "")()
	third, r := s.provision(t, b)
	if r.Instance.Region != secondRegion {
		t.Errorf("in %s, which is out of stock", r.Instance.Region)
	}
	terminate(t, b, third.ID)
}

// Each offer is asked for once before a grant is refused, however many there are.
func TestAGrantIsRefusedOnlyWhenEveryOfferWas(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) {
		twoRegions(c)
		c.BootTimeout.Duration = time.Minute
		c.StockOutMemory.Duration = time.Minute
	})
	driver, ok := s.driver.(*Backend)
	if !ok {
		t.Fatalf("driver %T", s.driver)
	}
	all := map[place]int{}
	for _, region := range []backend.Region{suiteRegion, secondRegion} {
		offers, err := driver.catalogue.offers(t.Context(), region, suiteShape, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range offers {
			all[place{region, o.Zone, o.Type}]++
		}
	}
	if len(all) < 30 {
		t.Fatalf("only %d offers", len(all))
	}
	defer s.cloud.Cloud.StockOut(suiteRegion, "", "")()
	restock := s.cloud.Cloud.StockOut(secondRegion, "", "")
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	if !backenderr.Is(err, backenderr.CapacityExhausted) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("got %v, created %s", err, backenderr.CreatedOf(err))
	}
	asked := map[place]int{}
	for _, r := range s.launches() {
		asked[place{backend.Region(r.Region), s.zoneOf(r), r.Params.Get("InstanceType")}]++
	}
	if !maps.Equal(asked, all) {
		t.Errorf("asked for %v, want each of %v once", asked, all)
	}
	restock()
}

// A call that has asked for as long as a boot takes leaves the other offers to the
// next one, which is to come at once.
func TestOffersThatACallHasNoTimeForAreLeftToTheNext(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) {
		c.BootTimeout.Duration = time.Nanosecond
		c.StockOutMemory.Duration = time.Minute
	})
	defer s.cloud.Cloud.StockOut(suiteRegion, "", "")()
	g, e := s.grant()
	for n := range 2 {
		_, err := b.Provision(asRequester(t.Context()), g, e)
		failure := backenderr.From(err)
		if failure.Reason != backenderr.CapacityExhausted || failure.Created != backenderr.CreatedNone || failure.RetryAfter != retryOthers {
			t.Errorf("got %v, created %s, retry after %s", err, failure.Created, failure.RetryAfter)
		}
		if asked := len(s.launches()); asked != n+1 {
			t.Errorf("%d calls after %d tries", asked, n+1)
		}
	}
}

// The machine is the tenant's: what it says of itself degrades no backend.
func TestAGuestCantBlameItsMachine(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.Guest.AMD64.URL += "-that-is-not-there" })
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	failure := backenderr.From(err)
	if failure.Reason != backenderr.WorkloadFailed || !strings.Contains(failure.Metadata[backenderr.MetaConsole], `"reason":"HOST_UNFIT"`) {
		t.Errorf("got %v with %q", err, failure.Metadata)
	}
}

// zoneOf is the zone of the subnet that a launch names.
func (s *suiteSite) zoneOf(r ec2sim.Request) string {
	driver, _ := s.driver.(*Backend)
	for _, z := range driver.catalogue.of(backend.Region(r.Region)).zones {
		if z.subnet == r.Params.Get("NetworkInterface.1.SubnetId") {
			return z.name
		}
	}
	return ""
}

func TestARegionThatCantBeReadIsPassedOver(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, twoRegions)
	g, p := s.provision(t, b)
	if p.Instance.Region != suiteRegion {
		t.Fatalf("in %s", p.Instance.Region)
	}
	blind := s.blind(suiteRegion)
	next, q := s.provision(t, b)
	if q.Instance.Region != secondRegion {
		t.Errorf("in %s, which can't be read", q.Instance.Region)
	}
	terminate(t, b, next.ID)
	impatient, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if end, err := b.Terminate(asRequester(impatient), backend.HandleFor(g.ID)); err == nil && end.State == backend.StateTerminated {
		t.Error("what can't be seen is confirmed gone")
	}
	blind.Store(false)
	terminate(t, b, g.ID)
}

// With a ledger that knows nothing, a grant may have an instance in a region that
// was never read.
func TestNothingIsMadeBesideWhatWasNeverRead(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { twoRegions(c); c.LenientBoot = true })
	g, e := s.grant()
	first, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	s.kill()
	s.stop(t)
	s.cloud.Refuse(false)
	s.ledger = ledgertest.Open(t)
	blind := s.blind(suiteRegion)
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Provision(asRequester(t.Context()), g, e); err == nil || backenderr.CreatedOf(err) != backenderr.CreatedUnknown {
		t.Errorf("got %v, created %s", err, backenderr.CreatedOf(err))
	}
	if n := len(s.living(g.ID)); n != 1 {
		t.Errorf("%d instances live", n)
	}
	blind.Store(false)
	again, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil || again.Instance.ID != first.Instance.ID {
		t.Errorf("%+v, %v; want %s", again.Instance, err, first.Instance.ID)
	}
	terminate(t, b, g.ID)
}

// One read that fails is many grants' error, and each says what exists of its own.
func TestGrantsThatFailTogetherSpeakForThemselves(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) {
		c.MaxConcurrentInstances = 6
		c.UndoTimeout.Duration = 200 * time.Millisecond
	})
	s.cloud.Machines.Hang(true)
	var all []backend.Grant
	failures := make([]error, 6)
	var wg sync.WaitGroup
	for n := range failures {
		g, e := s.grant()
		all = append(all, g)
		wg.Go(func() { _, failures[n] = b.Provision(asRequester(t.Context()), g, e) })
	}
	waitFor(t, "all instances", func() bool { return len(s.cloud.Cloud.Instances()) == len(failures) })
	s.cloud.Cloud.Deny("ec2:DescribeInstances")
	wg.Wait()
	for n, err := range failures {
		failure := backenderr.From(err)
		leaked := failure.Metadata[backenderr.MetaLeaked]
		if failure.Reason != backenderr.ProviderDenied || failure.Created != backenderr.CreatedUnknown || !strings.Contains(leaked, all[n].ID.String()[:12]) {
			t.Errorf("grant %s: %v, created %s, %v", all[n].ID, err, failure.Created, failure.Metadata)
		}
	}
	s.cloud.Cloud.Allow("ec2:DescribeInstances")
	s.cloud.Machines.Hang(false)
	for _, g := range all {
		terminate(t, b, g.ID)
	}
}

// Yes means that it can be made.
func TestWhatEC2HasNoRoomForIsNotSatisfiable(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.Regions[0].AllowlistEgress = []string{"198.51.100.0/24"} })
	values := map[string]string{}
	for n := range 3 {
		random := make([]byte, 6000)
		_, _ = rand.Read(random) // never fails
		values["NAME"+strconv.Itoa(n)] = base64.StdEncoding.EncodeToString(random)[:8000]
	}
	for name, change := range map[string]func(*backend.Grant){
		"a large environment": func(g *backend.Grant) { g.Environment = values },
		"many destinations": func(g *backend.Grant) {
			g.Network.Mode = backend.NetworkAllowlist
			for n := range 62 {
				g.Network.AllowedPrefixes = append(g.Network.AllowedPrefixes, fmt.Sprintf("203.0.113.%d/32", n))
			}
		},
	} {
		g, e := s.grant()
		change(&g)
		if got, err := b.CanSatisfy(asRequester(t.Context()), g); err != nil || got.Satisfiable || got.Reason == "" {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.GrantNotSatisfiable) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(s.launches()); n != 0 {
		t.Errorf("%d launches", n)
	}
	// As many ports as a grant may have do fit.
	g, e := s.grant()
	for n := range backend.MaxPorts {
		g.Ports = append(g.Ports, backend.Port{Number: uint16(1000 + n), Protocol: backend.TCP})
	}
	if _, err := b.Provision(asRequester(t.Context()), g, e); err != nil {
		t.Error(err)
	}
	terminate(t, b, g.ID)
}

// What runs takes room, also when the ledger doesn't know of it.
func TestRoomIsKnownFromTheStart(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	g, _ := s.provision(t, b)
	s.kill()
	s.stop(t)
	s.cloud.Refuse(false)
	s.ledger = ledgertest.Open(t)
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r := c.Regions[0]; r.ActiveInstances != 1 || r.Free == r.Total {
		t.Errorf("capabilities %+v", r)
	}
	terminate(t, b, g.ID)
}
