package ec2backend

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

// openBridge starts a worker on a cloud of its own, with a changed configuration.
func openBridge(t *testing.T, change func(*Config), options ...func(*ec2fixture.Options)) (*suiteSite, backend.Backend) {
	t.Helper()
	s := openSuiteSite(t, 0, options...)
	if change != nil {
		change(&s.config)
	}
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}
	return s, b
}

// asRequester makes calls those of the client whose the grants are.
func asRequester(ctx context.Context) context.Context {
	return backend.WithCaller(ctx, backend.Caller{Identity: "requester", Role: backend.RoleClient})
}

// grant returns a new grant that the site's worker takes.
func (s *suiteSite) grant() (backend.Grant, backend.Envelope) {
	g, e := backendtest.NewGrant(s.cloud.Image, suiteShape, s.login)
	g.MinIsolation = backend.IsolationVM
	return g, e
}

// provision makes the instance of a new grant.
func (s *suiteSite) provision(t *testing.T, b backend.Backend) (backend.Grant, backend.Provisioned) {
	t.Helper()
	g, e := s.grant()
	p, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	return g, p
}

func terminate(t *testing.T, b backend.Backend, id backend.GrantID) {
	t.Helper()
	ctx, cancel := context.WithTimeout(asRequester(t.Context()), suitePatience)
	defer cancel()
	out, err := b.Terminate(ctx, backend.HandleFor(id))
	if err != nil || out.State != backend.StateTerminated {
		t.Fatalf("terminate: %v, %v", out.State, err)
	}
}

// ends waits for a grant's final log.
func ends(t *testing.T, b backend.Backend, id backend.GrantID) backend.ComputeLog {
	t.Helper()
	ctx, cancel := context.WithTimeout(asRequester(t.Context()), suitePatience)
	defer cancel()
	var final *backend.SignedLog
	err := b.WatchUntilExit(ctx, backend.HandleFor(id), func(e backend.Event) error {
		if e.Log != nil {
			final = e.Log
		}
		return nil
	})
	if err != nil || final == nil {
		t.Fatalf("watch ended with %v and log %v", err, final)
	}
	return final.Log
}

// waitFor waits until something holds.
func waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), suitePatience)
	defer cancel()
	for !holds() {
		if sleep(ctx, 5*time.Millisecond) != nil {
			t.Fatalf("%s doesn't come", what)
		}
	}
}

// launches are the create calls that were not dry runs.
func (s *suiteSite) launches() []ec2sim.Request {
	return slices.DeleteFunc(s.cloud.Cloud.Requests(), func(r ec2sim.Request) bool { return r.Action != "RunInstances" || r.DryRun })
}

func TestOneCallSaysAllOfAnInstance(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	g, p := s.provision(t, b)
	calls := s.launches()
	if len(calls) != 1 {
		t.Fatalf("%d create calls", len(calls))
	}
	for key, want := range map[string]string{
		"MinCount": "1", "MaxCount": "1", "InstanceInitiatedShutdownBehavior": "terminate",
		"MetadataOptions.HttpTokens": "required", "MetadataOptions.HttpPutResponseHopLimit": "1",
		"BlockDeviceMapping.1.Ebs.Encrypted": "true", "BlockDeviceMapping.1.Ebs.DeleteOnTermination": "true",
		"NetworkInterface.1.DeleteOnTermination": "true", "KeyName": "",
		"BlockDeviceMapping.1.Ebs.VolumeSize": strconv.FormatInt(int64(suiteShape.Storage)+s.config.ExtraDiskGiB, 10),
	} {
		if got := calls[0].Params.Get(key); got != want {
			t.Errorf("%s = %q, want %q", key, got, want)
		}
	}
	if token := calls[0].Params.Get("ClientToken"); len(token) != 64 {
		t.Errorf("client token %q", token)
	}
	var tagged []map[string]string
	for _, i := range s.cloud.Cloud.Instances() {
		tagged = append(tagged, i.Tags)
	}
	for _, v := range s.cloud.Cloud.Volumes() {
		tagged = append(tagged, v.Tags)
	}
	for _, n := range s.cloud.Cloud.NetworkInterfaces() {
		tagged = append(tagged, n.Tags)
	}
	if len(tagged) != 3 {
		t.Errorf("an instance has %d resources", len(tagged))
	}
	for _, tags := range tagged {
		for key, want := range map[string]string{
			ec2tags.Bridge: "test", ec2tags.Backend: "aws", ec2tags.Grant: g.ID.String(), ec2tags.Attempt: "1",
			ec2tags.ValidTo: g.ValidTo.Format(time.RFC3339),
		} {
			if tags[key] != want {
				t.Errorf("tag %s = %q, want %q", key, tags[key], want)
			}
		}
	}
	if p.Instance.Isolation != backend.IsolationVM || p.Receipt.Port != 22 || p.Receipt.User != "compute" {
		t.Errorf("receipt %+v of %+v", p.Receipt, p.Instance)
	}
	terminate(t, b, g.ID)
}

func TestStockOutsAreGoneAround(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.StockOutMemory.Duration = time.Minute })
	cloud := s.cloud.Cloud
	restockA := cloud.StockOut(suiteRegion, suiteRegion+"a", "")
	defer restockA()
	g, _ := s.provision(t, b)
	zone := func(id backend.GrantID) string {
		for _, i := range cloud.Instances() {
			if i.Tags[ec2tags.Grant] == id.String() && i.State != ec2sim.StateTerminated {
				return i.Zone
			}
		}
		return "none"
	}
	if z := zone(g.ID); z != suiteRegion+"b" {
		t.Errorf("with zone a out of stock the instance is in %s", z)
	}
	asked := len(s.launches())
	next, _ := s.provision(t, b)
	if n := len(s.launches()) - asked; n != 1 {
		t.Errorf("a zone that was just out of stock is asked again: %d calls", n)
	}
	terminate(t, b, g.ID)
	terminate(t, b, next.ID)
}

func TestStockOutOfEverythingIsCapacityExhausted(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	defer s.cloud.Cloud.StockOut(suiteRegion, "", "")()
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	if !backenderr.Is(err, backenderr.CapacityExhausted) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("got %v, created %s", err, backenderr.CreatedOf(err))
	}
}

// Capacity may turn out to be missing only after EC2 has taken the call.
func TestStockOutAfterTheLaunchIsGoneAround(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.StockOutMemory.Duration = time.Minute })
	defer s.cloud.Cloud.StockOutAfterLaunch(suiteRegion, suiteRegion+"a", "")()
	g, p := s.provision(t, b)
	if p.Instance.Attempt < 2 {
		t.Errorf("attempt %d succeeded in a zone without capacity", p.Instance.Attempt)
	}
	if h := s.cloud.Cloud.History(); len(h) != int(p.Instance.Attempt) {
		t.Errorf("%d launches for attempt %d", len(h), p.Instance.Attempt)
	}
	terminate(t, b, g.ID)
}

func TestSpotInstanceThatIsTakenBackIsInterrupted(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.Market = marketSpot })
	g, p := s.provision(t, b)
	if i := s.cloud.Cloud.Instances(); len(i) != 1 || !i[0].Spot {
		t.Fatalf("no spot instance: %+v", i)
	}
	if err := s.cloud.Cloud.Interrupt(string(p.Instance.ID)); err != nil {
		t.Fatal(err)
	}
	if log := ends(t, b, g.ID); log.Exit.Reason != backend.EndInterrupted || log.Exit.Message == "" {
		t.Errorf("exit %+v", log.Exit)
	}
}

func TestRegionOutsideTheAllowlistIsRefusedByName(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	g, e := s.grant()
	g.Region = "ap-south-1"
	_, err := b.Provision(asRequester(t.Context()), g, e)
	if !backenderr.Is(err, backenderr.GrantNotSatisfiable) || !strings.Contains(err.Error(), "ap-south-1") || !strings.Contains(err.Error(), suiteRegion) {
		t.Errorf("got %v", err)
	}
	if n := len(s.launches()); n != 0 {
		t.Errorf("%d create calls", n)
	}
}

func TestGrantsAtOnceShareOneGroup(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	var wg sync.WaitGroup
	ids := make([]backend.GrantID, suiteRoom)
	for n := range ids {
		wg.Go(func() {
			g, e := s.grant()
			g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}, {Number: 53, Protocol: backend.UDP}}
			ids[n] = g.ID
			if _, err := b.Provision(asRequester(t.Context()), g, e); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var own []ec2sim.SecurityGroup
	for _, g := range s.cloud.Cloud.SecurityGroups() {
		if g.Tags[ec2tags.Bridge] == "test" {
			own = append(own, g)
		}
	}
	if len(own) != 1 || len(own[0].Ingress) != 6 { // three ports, over IPv4 and IPv6
		t.Errorf("groups: %+v", own)
	}
	for _, id := range ids {
		terminate(t, b, id)
	}
}

func TestAllowlistIsClosedBeforeAnythingRunsInIt(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.Regions[0].AllowlistEgress = []string{"198.51.100.0/24"} })
	g, e := s.grant()
	g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"203.0.113.0/24"}}
	if _, err := b.Provision(asRequester(t.Context()), g, e); err != nil {
		t.Fatal(err)
	}
	var peers []string
	for _, group := range s.cloud.Cloud.SecurityGroups() {
		if group.Tags[ec2tags.Bridge] == "test" {
			for _, r := range group.Egress {
				peers = append(peers, r.Peer)
			}
		}
	}
	slices.Sort(peers)
	if !slices.Equal(peers, []string{"198.51.100.0/24", "203.0.113.0/24"}) {
		t.Errorf("lets out to %v", peers)
	}
	order := map[string]int{}
	for n, r := range s.cloud.Cloud.Requests() {
		if !r.DryRun {
			order[r.Action] = n
		}
	}
	if order["RevokeSecurityGroupEgress"] > order["RunInstances"] || order["AuthorizeSecurityGroupEgress"] > order["RunInstances"] {
		t.Errorf("the group was closed after the launch: %v", order)
	}
	terminate(t, b, g.ID)
}

func TestBootThatFailsShowsTheConsole(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, nil)
	s.cloud.Machines.FailNext("the disk is on fire")
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	failure := backenderr.From(err)
	if failure.Reason != backenderr.WorkloadFailed || !strings.Contains(failure.Metadata[backenderr.MetaConsole], "on fire") ||
		!strings.Contains(err.Error(), "exit status 127") {
		t.Errorf("got %v with %q", err, failure.Metadata)
	}
	if backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Error("clean-up is not confirmed")
	}
}

func TestInstanceThatNeverAnswersIsBootTimeout(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.BootTimeout.Duration = 300 * time.Millisecond })
	s.cloud.Machines.Hang(true)
	g, e := s.grant()
	_, err := b.Provision(asRequester(t.Context()), g, e)
	failure := backenderr.From(err)
	if failure.Reason != backenderr.BootTimeout || failure.Created != backenderr.CreatedNone || failure.Metadata[backenderr.MetaConsole] == "" {
		t.Errorf("got %v, created %s, with %q", err, failure.Created, failure.Metadata)
	}
}

func TestScheduleEndsTheInstanceOfADeadBridge(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) {
		c.Deadline, c.ScheduleRole, c.ScheduleGroup = deadlinePlatform, "arn:aws:iam::123456789012:role/compute-bridge-schedule", "default"
	})
	g, e := s.grant()
	g.ValidTo = time.Now().Add(6 * time.Second).Truncate(time.Microsecond).UTC()
	p, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	if p.Instance.Enforcement != backend.EnforcedByPlatform {
		t.Errorf("deadline enforced by %s", p.Instance.Enforcement)
	}
	if n := len(s.cloud.Cloud.Schedules()); n != 1 {
		t.Fatalf("%d schedules", n)
	}
	s.kill()
	s.stop(t)
	s.cloud.Machines.IgnoreDeadlines() // the guest's own timer is not what is tried here
	waitFor(t, "the end by the schedule", func() bool {
		all := s.cloud.Cloud.Instances()
		return len(all) == 1 && all[0].State == ec2sim.StateTerminated && len(s.cloud.Cloud.Schedules()) == 0
	})
	if early := g.ValidTo.Add(-time.Second); time.Now().Before(early) {
		t.Error("it ended before its deadline")
	}
	// The next worker finds out how it was.
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	if log := ends(t, b, g.ID); log.Exit.Reason != backend.EndDeadline {
		t.Errorf("exit %+v", log.Exit)
	}
}

func TestInstanceThatTheLedgerForgotIsAdopted(t *testing.T) {
	t.Parallel()
	s, b := openBridge(t, func(c *Config) { c.StockOutMemory.Duration = time.Minute })
	restock := s.cloud.Cloud.StockOut(suiteRegion, suiteRegion+"a", "") // so that its attempt is not the first
	g, e := s.grant()
	before, err := b.Provision(asRequester(t.Context()), g, e)
	restock()
	if err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	s.ledger = ledgertest.Open(t) // yesterday's, from before the grant
	if b, err = s.start(t); err != nil {
		t.Fatal(err)
	}
	other := g
	other.Environment = map[string]string{"NAME": "other"}
	if _, err := s.driver.Provision(t.Context(), orderOf(other, s.login)); !backenderr.Is(err, backenderr.GrantConflict) {
		t.Errorf("with other content: %v", err)
	}
	after, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	if after.Instance.ID != before.Instance.ID || after.Receipt.HostKey != before.Receipt.HostKey || after.Instance.Attempt != before.Instance.Attempt {
		t.Errorf("got %+v, had %+v", after, before)
	}
	terminate(t, b, g.ID)
}
