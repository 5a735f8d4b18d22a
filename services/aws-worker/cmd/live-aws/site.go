package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

const (
	// backendName keeps what is made here apart from the bridge's own workers:
	// each looks for its own name only.
	backendName = "live-check"
	// The documented tags (docs/aws.md), looked at from outside.
	tagBridge  = "compute-bridge:bridge"
	tagBackend = "compute-bridge:backend"
	tagGrant   = "compute-bridge:grant"
	tagAttempt = "compute-bridge:attempt"
	tagValidTo = "compute-bridge:valid-to"
	tagShape   = "compute-bridge:shape"
	// deadlinePlatform is the configuration's value for schedules.
	deadlinePlatform = "platform"
	// instances that a run makes, and how many of them at once.
	instances    = 3
	maxInstances = 2
	secretBytes  = 32
)

// shape of all grants: the smallest that says something.
var shape = backend.Shape{CPU: 500, RAM: 512, Storage: 1} //nolint:gochecknoglobals // a constant that Go can't declare

// narrowed is the operator's configuration with the first region alone, and no
// more instances than are needed.
func narrowed(c ec2backend.Config) ec2backend.Config {
	c.Regions = c.Regions[:1]
	c.MaxConcurrentInstances = maxInstances
	c.LenientBoot = false
	return c
}

// site is a bridge of one worker in this process, and a view on AWS beside it.
type site struct {
	settings settings
	bridgeID string
	config   ec2backend.Config
	dir      string

	ec2       *ec2.Client
	scheduler *scheduler.Client
	ledger    *ledger.Ledger
	secret    redact.Secret
	log       *os.File

	runtime *worker.Runtime // nil while the bridge is dead
	driver  worker.Driver
	grants  []backend.GrantID // all that were begun
}

// connect makes what outlives the bridge. It calls nothing.
func (p *site) connect(ctx context.Context) error {
	loaded, err := ec2backend.SDKConfig(ctx, p.config, p.config.Regions[0].Name)
	if err != nil {
		return err
	}
	p.ec2, p.scheduler = ec2.NewFromConfig(loaded), scheduler.NewFromConfig(loaded)
	secret := make([]byte, secretBytes)
	_, _ = rand.Read(secret) // never fails
	p.secret = redact.New(secret)
	if p.log, err = os.Create(filepath.Join(p.dir, "log")); err != nil {
		return err
	}
	p.ledger, err = ledger.Open(ctx, ledger.Config{Path: filepath.Join(p.dir, "ledger.db")})
	return err
}

func (p *site) disconnect() {
	if p.ledger != nil {
		_ = p.ledger.Close() // it is deleted next
	}
	_ = p.log.Close()
}

// open starts the bridge, or starts it again with what it left.
func (p *site) open(ctx context.Context) error {
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: p.bridgeID, Backend: backendName, Ledger: p.ledger, Secret: p.secret,
		Log: slog.New(slog.NewJSONHandler(p.log, nil)), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		return err
	}
	driver, err := ec2backend.Open(ctx, p.config, runtime.Env())
	if err != nil {
		return err
	}
	if err := runtime.Start(context.WithoutCancel(ctx), driver); err != nil {
		return errors.Join(err, driver.Close())
	}
	p.runtime, p.driver = runtime, driver
	return nil
}

// close leaves no process of the bridge. Instances go on.
func (p *site) close() {
	if p.runtime == nil {
		return
	}
	p.runtime.Close()
	_ = p.driver.Close() // it only lets go of connections
	p.runtime, p.driver = nil, nil
}

// agree says what it will cost and whether to go on.
func (p *site) agree(ctx context.Context, out io.Writer) (code int, ready bool) {
	quoter, ok := p.driver.(*ec2backend.Backend)
	if !ok {
		fmt.Fprintf(out, "live-aws: the driver is a %T\n", p.driver)
		return exitFailed, false
	}
	left, err := p.driver.List(ctx)
	switch {
	case err != nil:
		fmt.Fprintf(out, "live-aws: %v\n", err)
		return exitFailed, false
	case len(left.Resources) > 0:
		fmt.Fprintf(out, "An earlier run left %d grants' resources. Remove them first: make live-aws CLEAN=1\n", len(left.Resources))
		return exitUsage, false
	}
	region := p.config.Regions[0].Name
	quote, err := quoter.Quote(ctx, backend.Region(region), shape)
	if err != nil {
		fmt.Fprintf(out, "live-aws: %v\n", err)
		return exitFailed, false
	}
	total := estimate(quote, p.settings.timing.run)
	fmt.Fprintf(out, "This makes %d instances of type %s in %s, zone %s, each with %d GiB of disk and a public address, at most %d\n"+
		"at once, for at most %s. Estimate: USD %.3f, at USD %.4f for an hour of an instance on demand.\n",
		instances, quote.Type, region, quote.Zone, quote.DiskGiB, maxInstances, p.settings.timing.run, total, quote.USDPerHour)
	switch {
	case !quote.Priced:
		fmt.Fprintf(out, "The price of %s is not known. Give it in a [[backend.price]] section.\n", quote.Type)
		return exitUsage, false
	case total > maxUSD:
		fmt.Fprintf(out, "That is more than USD %.2f: allow a smaller family in instance_families.\n", maxUSD)
		return exitUsage, false
	case !p.settings.pay:
		fmt.Fprintln(out, "Nothing was made. To do it: make live-aws … LIVE_AWS_I_WILL_PAY=1")
		return exitUsage, false
	}
	return exitOK, true
}

// maxUSD is what a run may cost.
const maxUSD = 0.10

// estimate is what a run costs at most, with prices of 2025 for what the
// worker has no table of. The worker makes no more than maxInstances at once, so
// that as many for the whole run are more than what there is.
func estimate(q ec2backend.Quote, run time.Duration) float64 {
	const (
		addressPerHour   = 0.005  // https://aws.amazon.com/vpc/pricing/
		diskPerGiBMonth  = 0.10   // gp3, with room for dearer regions: https://aws.amazon.com/ebs/pricing/
		hoursPerMonth    = 730.0  //
		callsOfAnything  = 0.0005 // 50 figures of CloudWatch: https://aws.amazon.com/cloudwatch/pricing/
		trafficAndSundry = 0.005
	)
	hours := run.Hours()
	each := hours * (q.USDPerHour + addressPerHour + float64(q.DiskGiB)*diskPerGiBMonth/hoursPerMonth)
	return maxInstances*each + callsOfAnything + trafficAndSundry
}

// operator may do everything.
func operator(ctx context.Context) context.Context {
	return backend.WithCaller(ctx, backend.Caller{Identity: "live-aws", Role: backend.RoleOperator})
}

// grant is one that ends after a time.
func (p *site) grant(life time.Duration, loginKey string) (backend.Grant, backend.Envelope) {
	g := backend.Grant{
		Image: backend.Image{Digest: p.settings.image, Kind: backend.ImageOCIArchive}, PostHash: p.settings.image.Sum,
		Shape: shape, MinIsolation: backend.IsolationVM, Region: backend.Region(p.config.Regions[0].Name),
		Network:     backend.NetworkPolicy{Mode: backend.NetworkOpen},
		Environment: map[string]string{"LIVE_AWS": "1"},
		ValidTo:     time.Now().Add(life).UTC().Truncate(time.Second),
	}
	_, _ = rand.Read(g.ID[:]) // never fails
	p.grants = append(p.grants, g.ID)
	return g, backend.Envelope{PostHash: g.PostHash, SSHPublicKey: loginKey}
}

// found is what AWS has of this program's, read without the worker.
type found struct {
	instances  []types.Instance // that aren't terminated
	volumes    []types.Volume
	interfaces []types.NetworkInterface
	schedules  []string
}

func (f found) String() string {
	var names []string
	for _, i := range f.instances {
		names = append(names, fmt.Sprintf("instance %s (%s)", aws.ToString(i.InstanceId), i.State.Name))
	}
	for _, v := range f.volumes {
		names = append(names, fmt.Sprintf("volume %s (%s)", aws.ToString(v.VolumeId), v.State))
	}
	for _, n := range f.interfaces {
		names = append(names, fmt.Sprintf("network interface %s (%s)", aws.ToString(n.NetworkInterfaceId), n.Status))
	}
	for _, s := range f.schedules {
		names = append(names, "schedule "+s)
	}
	return strings.Join(names, ", ")
}

// look reads what there is of a grant, or of all if it is nil.
func (p *site) look(ctx context.Context, grant *backend.GrantID) (found, error) {
	filters := []types.Filter{
		{Name: aws.String("tag:" + tagBridge), Values: []string{p.bridgeID}},
		{Name: aws.String("tag:" + tagBackend), Values: []string{backendName}},
	}
	if grant != nil {
		filters = append(filters, types.Filter{Name: aws.String("tag:" + tagGrant), Values: []string{grant.String()}})
	}
	var out found
	instances := ec2.NewDescribeInstancesPaginator(p.ec2, &ec2.DescribeInstancesInput{Filters: filters})
	for instances.HasMorePages() {
		page, err := instances.NextPage(ctx)
		if err != nil {
			return found{}, err
		}
		for _, r := range page.Reservations {
			for _, i := range r.Instances {
				if i.State != nil && i.State.Name != types.InstanceStateNameTerminated {
					out.instances = append(out.instances, i)
				}
			}
		}
	}
	volumes := ec2.NewDescribeVolumesPaginator(p.ec2, &ec2.DescribeVolumesInput{Filters: filters})
	for volumes.HasMorePages() {
		page, err := volumes.NextPage(ctx)
		if err != nil {
			return found{}, err
		}
		out.volumes = append(out.volumes, page.Volumes...)
	}
	interfaces := ec2.NewDescribeNetworkInterfacesPaginator(p.ec2, &ec2.DescribeNetworkInterfacesInput{Filters: filters})
	for interfaces.HasMorePages() {
		page, err := interfaces.NextPage(ctx)
		if err != nil {
			return found{}, err
		}
		out.interfaces = append(out.interfaces, page.NetworkInterfaces...)
	}
	if p.config.Deadline != deadlinePlatform {
		return out, nil
	}
	schedules := scheduler.NewListSchedulesPaginator(p.scheduler, &scheduler.ListSchedulesInput{GroupName: aws.String(p.config.ScheduleGroup), NamePrefix: aws.String("cb")})
	for schedules.HasMorePages() {
		page, err := schedules.NextPage(ctx)
		if err != nil {
			return found{}, err
		}
		for _, s := range page.Schedules {
			if name := aws.ToString(s.Name); p.names(name, grant) {
				out.schedules = append(out.schedules, name)
			}
		}
	}
	return out, nil
}

// names says whether a schedule's name has the grant in it, or one of this run's.
func (p *site) names(schedule string, grant *backend.GrantID) bool {
	wanted := p.grants
	if grant != nil {
		wanted = []backend.GrantID{*grant}
	}
	return slices.ContainsFunc(wanted, func(id backend.GrantID) bool {
		return strings.Contains(schedule, base64.RawURLEncoding.EncodeToString(id[:])+".")
	})
}

// cleanUp removes all of this program's until AWS shows nothing more.
func (p *site) cleanUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(operator(ctx), p.settings.timing.cleanUp)
	defer cancel()
	if p.runtime == nil {
		if err := p.open(ctx); err != nil {
			return err
		}
	}
	ids := slices.Clone(p.grants)
	for {
		// What isn't this run's is an earlier one's.
		listing, err := p.driver.List(ctx)
		if err == nil {
			for _, r := range listing.Resources {
				if !slices.Contains(ids, r.GrantID) {
					ids = append(ids, r.GrantID)
				}
			}
			err = p.terminateAll(ctx, ids)
		}
		var left found
		if err == nil {
			left, err = p.look(ctx, nil)
		}
		if err == nil && left.String() == "" {
			return nil
		}
		if sleep(ctx, p.settings.timing.poll) != nil {
			return errors.Join(fmt.Errorf("left after %s: %s", p.settings.timing.cleanUp, left), err)
		}
	}
}

func (p *site) terminateAll(ctx context.Context, ids []backend.GrantID) error {
	var all []error
	for _, id := range ids {
		end, err := p.runtime.Terminate(ctx, backend.HandleFor(id))
		if err == nil && end.State != backend.StateTerminated {
			err = fmt.Errorf("grant %s is still %s", id, end.State)
		}
		all = append(all, err)
	}
	return errors.Join(all...)
}

// sleep waits, unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
