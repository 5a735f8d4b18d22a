// Package ec2sim is a simulator of the AWS services that the AWS worker uses:
// EC2, and what it takes of STS, SSM, CloudWatch and EventBridge Scheduler. It
// speaks their wire protocols to the unchanged SDKs over HTTP, on one endpoint for
// all services and regions, and keeps state: what is launched runs on a machine
// that the test chooses, costs quota, isn't found at first, ends when it ends and
// takes its volumes and interfaces along.
//
// It is honest. An action, parameter, filter or value that it doesn't know is an
// error in the service's own words, never ignored; requests are throttled by the
// documented buckets; and what a test wants to go wrong goes wrong where the test
// says ([Cloud.Intercept]).
package ec2sim

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// Account is the account that everything belongs to.
const Account = "123456789012"

// Credentials that a cloud knows when its options name none.
const (
	AccessKeyID     = "AKIATESTCOMPUTEBRIDG"
	SecretAccessKey = "simulated/secret/for/tests/only+0000000000"
)

// Times of the service, as measured by those who use it; [Options.Speed] divides
// them.
const (
	// visibleAfter is how long what was launched may not be found yet
	// (https://docs.aws.amazon.com/ec2/latest/devguide/eventual-consistency.html).
	visibleAfter = time.Second
	// pendingFor is from the launch to running.
	pendingFor = 5 * time.Second
	// shuttingDownFor is from the end of the machine to terminated.
	shuttingDownFor = 30 * time.Second
	// volumesAfter is how long after that the volumes still show.
	volumesAfter = 2 * time.Second
	// terminatedFor is how long a terminated instance still shows.
	terminatedFor     = time.Hour
	terminatedAtLeast = time.Minute
)

// Options are how a cloud is made. The zero value but for Machines is a cloud
// with two regions and no delays.
type Options struct {
	// Machines start what instances run on. It is required.
	Machines cloudsim.Machines
	// Regions are [DefaultRegions] if there are none.
	Regions []Region
	// Speed divides the delays of the service: 1 is its own pace, 100 a hundredth
	// of it, 0 no delays at all. Buckets and what a schedule waits for aren't
	// scaled.
	Speed float64
	// NoBuckets switches the throttling off.
	NoBuckets bool
	// HiddenAtLeast is how long a new instance isn't found at least, whatever the
	// Speed.
	HiddenAtLeast time.Duration
	// GroupVisible is how long a new security group may not be found yet, before
	// Speed divides it. The service's groups can take a while, but mostly don't.
	GroupVisible time.Duration
	// DualStack gives the VPCs a block of IPv6 addresses, which the service's
	// default ones have only when somebody added it.
	DualStack bool
	// Credentials are secrets by access key; those above if there are none.
	// Signatures aren't checked, what they cover is.
	Credentials map[string]string
	// Now tells the service's time, which clients may disagree with; nil for
	// time.Now.
	Now func() time.Time
	// Log is for what tests can't see otherwise; nil for none.
	Log *slog.Logger
}

// Cloud is a simulated cloud, an [http.Handler]. Its methods are safe for
// concurrent use.
type Cloud struct {
	options Options
	clock   cloudsim.Clock
	log     *slog.Logger
	// services by their names in signatures.
	services map[string]*service

	// life ends with Close; every machine's goroutine is one of living.
	life   context.Context //nolint:containedctx // of all goroutines until Close
	end    context.CancelFunc
	living sync.WaitGroup

	serving sync.Mutex
	server  *http.Server
	url     string

	mu        sync.Mutex
	closed    bool
	serial    int64
	regions   map[string]*region
	buckets   map[string]*cloudsim.Bucket
	denied    map[string]bool
	history   []*instance
	requests  []*Request
	intercept func(Request) Intervention
}

// region is the state of one region.
type region struct {
	Region
	vpc        string
	ipv6       string // the VPC's block, or empty
	subnets    []subnet
	instances  map[string]*instance
	volumes    map[string]*volume
	interfaces map[string]*netInterface
	groups     map[string]*group
	schedules  map[string]*schedule
	tokens     map[string]*launched
	stockOuts  []*place
	failures   []*launchFailure
	samples    map[string][]sample
}

// subnet is a zone's default subnet.
type subnet struct {
	id, zone, cidr string
}

// New makes a cloud. It doesn't listen yet; Close ends it.
func New(options Options) *Cloud {
	if len(options.Regions) == 0 {
		options.Regions = DefaultRegions()
	}
	if len(options.Credentials) == 0 {
		options.Credentials = map[string]string{AccessKeyID: SecretAccessKey}
	}
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cloud{
		options: options,
		clock:   cloudsim.Clock{Speed: options.Speed, Skewed: options.Now},
		log:     options.Log,
		regions: map[string]*region{},
		buckets: map[string]*cloudsim.Bucket{},
		denied:  map[string]bool{},
	}
	c.services = map[string]*service{}
	for _, s := range []*service{c.ec2(), c.sts(), c.ssm(), c.metrics(), c.scheduler()} {
		c.services[s.name] = s
	}
	c.life, c.end = context.WithCancel(context.Background())
	for _, given := range options.Regions {
		c.regions[given.Name] = c.newRegion(given)
	}
	return c
}

func (c *Cloud) newRegion(given Region) *region {
	r := &region{
		Region:     given,
		vpc:        "vpc-" + digest(given.Name),
		instances:  map[string]*instance{},
		volumes:    map[string]*volume{},
		interfaces: map[string]*netInterface{},
		groups:     map[string]*group{},
		schedules:  map[string]*schedule{},
		tokens:     map[string]*launched{},
		samples:    map[string][]sample{},
	}
	for i, zone := range given.Zones {
		// The default VPC's addresses, 172.31.0.0/16 in twenties.
		r.subnets = append(r.subnets, subnet{id: "subnet-" + digest(zone.Name), zone: zone.Name, cidr: defaultCIDR(i)})
	}
	if c.options.DualStack {
		r.ipv6 = "2001:db8:" + digest(given.Name)[:4] + ":100::/56"
	}
	r.addDefaultGroup(c.nextSerial())
	return r
}

// Listen serves the cloud on an address, of which port 0 means any, and returns
// its URL.
func (c *Cloud) Listen(address string) (string, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return "", err
	}
	server := &http.Server{
		Handler: c, ReadHeaderTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelWarn),
	}
	c.serving.Lock()
	defer c.serving.Unlock()
	if c.server != nil {
		listener.Close()
		return "", errors.New("the cloud listens already")
	}
	c.server, c.url = server, "http://"+listener.Addr().String()
	c.living.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			c.log.Error("Serving ended", "error", err)
		}
	})
	return c.url, nil
}

// Start is Listen on loopback, for a test, at whose end the cloud is closed.
func (c *Cloud) Start(t testing.TB) string {
	t.Helper()
	url, err := c.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatalf("listening: %v", err)
	}
	t.Cleanup(c.Close)
	return url
}

// URL is where it listens, or empty.
func (c *Cloud) URL() string {
	c.serving.Lock()
	defer c.serving.Unlock()
	return c.url
}

// Close stops the server and every machine, and waits until all have ended. It
// may be called again.
func (c *Cloud) Close() {
	c.serving.Lock()
	server := c.server
	c.serving.Unlock()
	if server != nil {
		// It closes the listener, whose error says nothing to anybody.
		_ = server.Close()
	}
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.end()
	c.living.Wait()
}

// background runs something until it ends, or the cloud does. It says no once the
// cloud is closed. The caller holds mu.
func (c *Cloud) background(run func()) bool {
	if c.closed {
		return false
	}
	c.living.Go(run)
	return true
}

// nextSerial numbers everything in the order in which it was made. The caller
// holds mu, or nobody else has the cloud yet.
func (c *Cloud) nextSerial() int64 {
	c.serial++
	return c.serial
}

// inOrder returns what a map holds in the order in which it was made.
func inOrder[T interface{ order() int64 }](all map[string]T) []T {
	return slices.SortedFunc(maps.Values(all), func(a, b T) int { return int(a.order() - b.order()) })
}
