package ec2backend

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/userdata"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

const (
	// maxOver bounds how many attempts that ended in the meantime one call goes
	// around.
	maxOver = 12
	// retryOthers is when to ask for the offers that a call had no time for.
	retryOthers = time.Second
	// Pauses between tries of the handshake.
	minReadyPause = 50 * time.Millisecond
	maxReadyPause = time.Second
	// consoleTimeout bounds the reading of a console that explains a failure.
	consoleTimeout = 20 * time.Second
)

// Codes of EC2's about client tokens
// (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html).
const (
	codeGroupIDGone     = "InvalidSecurityGroupID.NotFound"
	codeTokenMismatch   = "IdempotentParameterMismatch" // #nosec G101 -- an error code
	codeTokenTerminated = "IdempotentInstanceTerminated"
)

// params are what an attempt was begun with, as the journal keeps them: with the
// order and the host key they give the same create call again, byte for byte.
type params struct {
	Zone         string
	Subnet       string
	VPC          string
	Type         string
	Architecture string
	Image        string
	RootDevice   string
	DiskGiB      int32
	Group        string
	Shape        backend.Shape
	ValidTo      time.Time
	Content      string
	GuestURL     string
	GuestSHA256  string
	MachineImage artifact
	Spot         bool
	Public       bool
	VolumeType   string
	KMSKey       string
	// Adopted says that the instance was found without a record of it: there is
	// no create call to repeat.
	Adopted bool
}

// artifact is a guestapi.MachineImage of which all is kept: that one hides its
// address from whoever marshals it.
type artifact struct {
	URL, Digest string
	MaxBytes    int64
}

// attempt is one that may go on.
type attempt struct {
	identity

	// recorded is what the journal has of it.
	recorded worker.Attempt
	region   *region
	params   params
	// fresh says that nothing was sent for it before.
	fresh bool
	// found is its instance, if EC2 has shown one.
	found *instance
}

// errOver says that an attempt had ended, and that this is on record now: the
// next one may begin.
var errOver = errors.New("the attempt is over")

// Provision implements worker.Driver.
func (b *Backend) Provision(ctx context.Context, order worker.Order) (worker.Ready, error) {
	var last error
	tried := map[place]bool{}
	enough := time.Now().Add(b.config.BootTimeout.Duration)
	for over := 0; over < maxOver; {
		a, err := b.begin(ctx, order, tried)
		var ready worker.Ready
		switch {
		case err == nil:
			ready, err = b.makeReady(ctx, order, a)
		case a != nil && (ctx.Err() != nil || errors.Is(err, errOver) || backenderr.Is(err, backenderr.GrantEnded)):
			// It is there, and is not to be gone on with.
		default:
			if last != nil && backenderr.CreatedOf(err) == backenderr.CreatedNone && backenderr.Is(err, backenderr.CapacityExhausted) {
				return worker.Ready{}, last // which says what EC2 said
			}
			return worker.Ready{}, err
		}
		if err == nil {
			return ready, nil
		}
		failure := b.giveUp(ctx, a, err)
		switch {
		case ctx.Err() != nil || backenderr.CreatedOf(failure) != backenderr.CreatedNone:
			return worker.Ready{}, failure
		case errors.Is(err, errOver):
			over++
		case backenderr.Is(failure, backenderr.CapacityExhausted):
			tried[place{a.region.name, a.params.Zone, a.params.Type}] = true
			b.catalogue.unavailable(a.region.name, a.params.Zone, a.params.Type)
			b.log.InfoContext(ctx, "Out of stock", "grant_id", a.grant.String(), "zone", a.params.Zone, "type", a.params.Type)
			last = failure
			if time.Now().After(enough) {
				return worker.Ready{}, backenderr.From(last).Clone().WithRetryAfter(retryOthers)
			}
		default:
			return worker.Ready{}, failure
		}
	}
	return worker.Ready{}, backenderr.New(backenderr.ProviderUnavailable, "%d attempts ended one after the other", maxOver).WithCreated(backenderr.CreatedNone)
}

// none states that nothing exists.
func none(err error) error { return backenderr.From(err).Clone().WithCreated(backenderr.CreatedNone) }

// begin returns the grant's open attempt, or a new one, at the first place that
// wasn't tried. With an error it returns the open attempt if there is one.
func (b *Backend) begin(ctx context.Context, order worker.Order, tried map[place]bool) (*attempt, error) {
	attempts, err := b.env.Journal.Attempts(ctx, order.Grant.ID)
	if err != nil {
		return nil, err
	}
	next := uint32(1)
	for _, a := range attempts {
		if !a.Gone {
			return b.resume(ctx, a)
		}
		next = a.Number + 1
	}
	// The ledger knows of nothing that exists. EC2 may, if the ledger is an older
	// copy.
	found, r, blind, err := b.findUnrecorded(ctx, order)
	if err != nil {
		return nil, err
	}
	if found != nil {
		return b.record(ctx, order, r, *found, next)
	}
	var reasons []error
	for _, r := range b.candidates(order.Grant) {
		if err := blind[r.name]; err != nil {
			reasons = append(reasons, err) // nobody would see what is made there
			continue
		}
		a, err := b.beginIn(ctx, order, r, next, tried)
		if err == nil {
			return a, nil
		}
		switch {
		case a != nil:
			return a, err // another process has begun it
		case ctx.Err() != nil || !passes(err):
			return nil, none(err)
		}
		reasons = append(reasons, err)
	}
	if len(reasons) == 0 {
		return nil, backenderr.New(backenderr.GrantNotSatisfiable, "%s", b.outside(order.Grant.Region)).WithCreated(backenderr.CreatedNone)
	}
	return nil, none(worst(reasons))
}

// passes says that another region may do what this one can't.
func passes(err error) bool {
	return backenderr.Is(err, backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.WorkerFull, backenderr.GrantNotSatisfiable,
		backenderr.ProviderUnavailable)
}

// worst picks what to say of regions that all refuse: what may pass by itself
// goes before what never will.
func worst(reasons []error) error {
	for _, err := range reasons {
		if !backenderr.Is(err, backenderr.GrantNotSatisfiable) {
			return err
		}
	}
	return reasons[0]
}

// resume returns an attempt that was begun before, perhaps by another process;
// with an error, too, if EC2 can't be asked for it.
func (b *Backend) resume(ctx context.Context, recorded worker.Attempt) (*attempt, error) {
	a := &attempt{identity: identity{recorded.GrantID, recorded.Number}, recorded: recorded}
	if err := json.Unmarshal(recorded.Params, &a.params); err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "read the parameters of attempt %d of grant %s", a.attempt, a.grant)
	}
	a.region = b.byName[backend.Region(recorded.Placement)]
	if a.region == nil {
		return nil, backenderr.New(backenderr.ProviderUnavailable, "attempt %d is in region %s, which is no longer in the configuration",
			a.attempt, recorded.Placement)
	}
	b.hold(a.identity, a.region.name)
	if !recorded.New {
		if recorded.Ending {
			return a, errOver // whose end is to be finished
		}
		// From now on no other replica undoes it.
		resumed, err := b.env.Journal.Resume(ctx, a.grant, a.attempt)
		switch {
		case backenderr.Is(err, backenderr.OperationInProgress):
			return a, errOver
		case err != nil:
			return a, err
		}
		a.recorded = resumed
	}
	all, err := a.region.instances.now(ctx)
	if err != nil {
		return a, classify(err, "look for the instance")
	}
	if i, ok := all.value.of(a.identity); ok {
		a.found = &i
		return a, nil
	}
	for _, i := range all.value[a.grant] {
		if i.attempt > a.attempt && !i.over() {
			return a, errOver // the ledger is an older copy: a later one is to be adopted
		}
	}
	// The addresses that it would be sent with must still work when it has booted.
	if works := b.config.ImageStore.URLLifetime.Duration - b.config.BootTimeout.Duration; !recorded.New && time.Since(recorded.BeganAt) > works {
		return a, errOver
	}
	return a, nil
}

// findUnrecorded looks for an instance of the grant that the ledger doesn't know
// of. Of a region that can't be read, which it returns with the reason, it counts
// what was last seen there: whatever was made since then is on record. Before a
// region was ever read there may be one.
func (b *Backend) findUnrecorded(ctx context.Context, order worker.Order) (*instance, *region, map[backend.Region]error, error) {
	blind := map[backend.Region]error{}
	for _, r := range b.candidates(order.Grant) {
		all, err := r.instances.now(ctx)
		seen := all.value
		if err != nil {
			seen = r.instances.peek()
			failure := classify(err, "look for what exists of the grant in "+string(r.name))
			switch {
			case seen == nil:
				return nil, nil, nil, failure.WithCreated(backenderr.CreatedUnknown)
			case ctx.Err() != nil:
				return nil, nil, nil, failure.WithCreated(backenderr.CreatedNone)
			}
			blind[r.name] = failure
		}
		for _, i := range seen[order.Grant.ID] {
			if !i.over() {
				return &i, r, nil, nil
			}
		}
	}
	return nil, nil, blind, nil
}

// record takes an instance that the ledger doesn't know of into it, under the
// number that the instance has: its host key is derived from that.
func (b *Backend) record(ctx context.Context, order worker.Order, r *region, found instance, next uint32) (*attempt, error) {
	if found.content != contentOf(order) {
		return nil, backenderr.New(backenderr.GrantConflict, "instance %s runs for this grant with other content", found.id)
	}
	if found.attempt < next {
		return nil, backenderr.New(backenderr.ProviderUnavailable, "instance %s is of attempt %d, which is on record as gone; it is to be swept first",
			found.id, found.attempt).WithRetryAfter(retryFull)
	}
	p := params{Zone: found.zone, Type: found.kind, Shape: order.Grant.Shape, ValidTo: order.Grant.ValidTo, Content: found.content, Adopted: true}
	rendered, err := json.Marshal(p)
	if err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "render the parameters")
	}
	for {
		a, err := b.env.Journal.Begin(ctx, order.Grant.ID, string(r.name), rendered)
		switch {
		case err != nil:
			return nil, err
		case a.Number >= found.attempt:
			b.log.InfoContext(ctx, "Adopting an instance that the ledger doesn't know of", "grant_id", order.Grant.ID.String(), "instance_id", found.id)
			return b.resume(ctx, a)
		}
		if !a.New {
			return b.resume(ctx, a) // another replica has begun it
		}
		// Attempts before it are gone, as the ledger that was lost had it.
		if err := b.env.Journal.Gone(ctx, order.Grant.ID, a.Number); err != nil {
			return nil, err
		}
	}
}

// beginIn begins a new attempt in a region. When it fails without returning an
// attempt, nothing exists.
func (b *Backend) beginIn(ctx context.Context, order worker.Order, r *region, number uint32, tried map[place]bool) (*attempt, error) {
	id := identity{order.Grant.ID, number}
	if b.reserve(id, r.name) != nil {
		// Another replica may have ended what took the room.
		if _, err := b.takeStock(ctx); err != nil {
			return nil, err
		}
		if err := b.reserve(id, r.name); err != nil {
			return nil, err
		}
	}
	p, err := b.plan(ctx, order, r, tried)
	if err != nil {
		b.release(id)
		return nil, err
	}
	rendered, err := json.Marshal(p)
	if err != nil {
		b.release(id)
		return nil, backenderr.Wrap(backenderr.Internal, err, "render the parameters")
	}
	begun, err := b.env.Journal.Begin(ctx, order.Grant.ID, string(r.name), rendered)
	if err != nil {
		// Whatever the journal holds now, nothing was sent.
		b.release(id)
		return nil, err
	}
	if !begun.New || begun.Number != number {
		b.release(id)
	}
	if !begun.New {
		return b.resume(ctx, begun)
	}
	id = identity{begun.GrantID, begun.Number}
	b.hold(id, r.name)
	a := &attempt{identity: id, recorded: begun, region: r, params: p, fresh: true}
	open, err := b.takeStock(ctx)
	if err == nil && b.crowded(open, id, r.name) {
		err = full(r.name)
	}
	if err != nil {
		failure := b.giveUp(ctx, a, err)
		if backenderr.CreatedOf(failure) == backenderr.CreatedNone {
			return nil, failure
		}
		return a, failure // another replica may be at it
	}
	return a, nil
}

// plan settles everything about an attempt before it is on record.
func (b *Backend) plan(ctx context.Context, order worker.Order, r *region, tried map[place]bool) (params, error) {
	grant, rc := order.Grant, r.clients.config
	if why := b.unfit(grant, r); why != "" {
		return params{}, backenderr.New(backenderr.GrantNotSatisfiable, "%s", why)
	}
	offers, err := b.catalogue.offers(ctx, r.name, grant.Shape, tried)
	if err != nil {
		return params{}, err
	}
	if len(offers) == 0 {
		return params{}, backenderr.New(backenderr.GrantNotSatisfiable, "region %s offers nothing for %s", r.name, grant.Shape)
	}
	offer := offers[0]
	image, err := b.images.resolve(ctx, r.name, offer.Architecture)
	if err != nil {
		return params{}, err
	}
	guestURL, guestSum, err := b.store.guest(ctx, offer.Architecture)
	if err != nil {
		return params{}, err
	}
	fetched, err := b.store.image(ctx, order)
	if err != nil {
		return params{}, err
	}
	group, err := b.group(ctx, r, offer.VPC, rulesOf(grant, rc))
	if err != nil {
		return params{}, err
	}
	disk := max(int64(grant.Shape.Storage)+b.config.ExtraDiskGiB, image.MinDiskGiB)
	if disk < 0 || disk > math.MaxInt32 {
		return params{}, backenderr.New(backenderr.GrantNotSatisfiable, "no volume has %d GiB", disk)
	}
	return params{
		Zone: offer.Zone, Subnet: offer.Subnet, VPC: offer.VPC, Type: offer.Type, Architecture: offer.Architecture,
		Image: image.ID, RootDevice: image.RootDevice, DiskGiB: int32(disk), Group: group,
		Shape: grant.Shape, ValidTo: grant.ValidTo, Content: contentOf(order),
		GuestURL: guestURL, GuestSHA256: guestSum, MachineImage: artifact(fetched),
		Spot: b.config.Market == marketSpot, Public: rc.public(), VolumeType: b.config.VolumeType, KMSKey: b.config.KMSKey,
	}, nil
}

// token is the attempt's client token, at most 64 ASCII characters.
func (b *Backend) token(id identity) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "compute-bridge ec2 %s %s %s %d", b.env.BridgeID, b.env.Backend, id.grant, id.attempt))
	return hex.EncodeToString(sum[:])
}

// giveUp leaves nothing of an attempt that failed, and says in the error whether
// that is confirmed.
func (b *Backend) giveUp(ctx context.Context, a *attempt, cause error) error {
	failure := classify(cause, "provision")
	if errors.Is(cause, errOver) {
		failure = backenderr.New(backenderr.ProviderUnavailable, "the attempt had ended").WithRetryAfter(time.Second)
	}
	if ctx.Err() != nil && !backenderr.Is(failure, backenderr.GrantEnded) {
		failure = classify(ctx.Err(), "provision")
	}
	cleanUp, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.config.UndoTimeout.Duration)
	defer cancel()
	if backenderr.Is(failure, backenderr.GrantEnded) {
		a.fresh = false // another replica may have sent it, and asks nobody any more
	}
	err := b.end(cleanUp, a)
	for backenderr.Is(err, backenderr.ProviderUnavailable, backenderr.LedgerUnavailable) && sleep(cleanUp, b.config.PollInterval.Duration) == nil {
		err = b.end(cleanUp, a)
	}
	if backenderr.Is(err, backenderr.OtherReplica) {
		// Another replica is at the attempt, for a caller who still waits.
		return backenderr.From(err).Clone().WithCreated(backenderr.CreatedUnknown)
	}
	if err != nil {
		b.log.WarnContext(ctx, "Clean-up of a failed attempt is not confirmed", "grant_id", a.grant.String(), "attempt", a.attempt, "error", err.Error())
		return failure.WithCreated(backenderr.CreatedUnknown).WithMetadata(backenderr.MetaLeaked, b.instanceName(a.identity))
	}
	return failure.WithCreated(backenderr.CreatedNone)
}

// end says that an attempt is undone, and undoes it.
func (b *Backend) end(ctx context.Context, a *attempt) error {
	if err := b.env.Journal.End(ctx, a.recorded); err != nil {
		return err
	}
	return b.undo(ctx, a.region, a.identity, a.fresh)
}

// makeReady makes the attempt's instance, or adopts it, and waits until SSH
// answers.
func (b *Backend) makeReady(ctx context.Context, order worker.Order, a *attempt) (worker.Ready, error) {
	progress := order.Progress
	if progress == nil {
		progress = func(string) {}
	}
	private, public, err := b.env.HostKey(a.grant, a.attempt)
	if err != nil {
		return worker.Ready{}, backenderr.Wrap(backenderr.Internal, err, "derive the host key")
	}
	var i instance
	switch {
	case a.found != nil && a.found.over():
		return worker.Ready{}, errOver
	case a.found != nil:
		i = *a.found
	case a.params.Adopted:
		return worker.Ready{}, errOver // it ended before it was on record
	default:
		progress("creating the instance")
		data, err := userDataOf(a.identity, a.params, private, order.LoginKey, order.Grant.Environment)
		if err != nil {
			return worker.Ready{}, err
		}
		if i, err = b.create(ctx, a, data); err != nil {
			return worker.Ready{}, err
		}
	}
	if b.platformDeadline() {
		if err := b.env.Journal.Check(ctx, a.grant); err != nil {
			return worker.Ready{}, err
		}
		if err := b.arm(ctx, a.region, a.identity, i.id, a.params.ValidTo); err != nil {
			return worker.Ready{}, err
		}
	}
	progress("waiting for SSH")
	if i, err = b.awaitReady(ctx, a, public, progress); err != nil {
		return worker.Ready{}, err
	}
	if err := b.env.Journal.Check(ctx, a.grant); err != nil {
		return worker.Ready{}, err
	}
	host := i.address(a.region.clients.config).String()
	ready := worker.Ready{
		Instance: backend.Instance{
			GrantID: a.grant, ID: backend.InstanceID(i.id), Region: a.region.name, Isolation: backend.IsolationVM, Shape: a.params.Shape,
			Attempt: a.attempt, StartedAt: i.launched.UTC(), ValidTo: a.params.ValidTo.UTC(), Enforcement: b.enforcement(),
		},
		Host: host, Port: sshPort, User: guestapi.DefaultUser, HostKey: public, ResumedAt: a.recorded.ResumedAt,
	}
	for _, port := range order.Grant.Ports {
		ready.Instance.Ports = append(ready.Instance.Ports, backend.PublishedPort{Port: port, PublicHost: host, PublicPort: port.Number})
	}
	return ready, nil
}

// userDataOf renders the user-data of an attempt. What is too large for EC2 may be
// small enough for other backends.
func userDataOf(id identity, p params, hostKey redact.Secret, login string, environment map[string]string) ([]byte, error) {
	machine := guestapi.Machine{
		Guest: guestapi.Config{
			Version: guestapi.ConfigVersion, HostKey: guestapi.NewHostKey(string(hostKey.Expose())), AuthorizedKeys: []string{login},
			ListenPort: sshPort, Environment: environment,
		},
		GrantID: id.grant.String(), Attempt: id.attempt, Deadline: wholeSeconds(p.ValidTo),
		Image: guestapi.MachineImage(p.MachineImage), AtEnd: guestapi.AtEndPowerOff,
	}
	document, err := guestapi.EncodeMachine(machine)
	if err != nil {
		return nil, backenderr.Wrap(backenderr.GrantInvalid, err, "the instance's configuration")
	}
	data, err := userdata.Render(userdata.Spec{
		GuestURL: p.GuestURL, GuestSHA256: p.GuestSHA256, Machine: document, Deadline: machine.Deadline, PowerOffAtEnd: true,
	})
	if err != nil {
		return nil, backenderr.New(backenderr.GrantNotSatisfiable, "grant.environment: %v", err)
	}
	return data, nil
}

// signedBytes is as long as pre-signed addresses of S3 get, with the token of a
// role's credentials.
const signedBytes = 2 << 10

// tryUserData renders user-data like that of a grant, to see that it fits: with a
// usual login key, and with addresses that compress as badly as signatures do.
func (b *Backend) tryUserData(grant backend.Grant) error {
	key, err := sshkey.GenerateLoginKey()
	if err != nil {
		return err
	}
	address := func(base string) string {
		if _, _, signed := cutBucket(base); !signed {
			return base
		}
		random := make([]byte, base64.RawURLEncoding.DecodedLen(signedBytes))
		_, _ = rand.Read(random) // Never fails.
		return "https://example.invalid/?" + base64.RawURLEncoding.EncodeToString(random)
	}
	var guest string // the longest there is
	for _, source := range b.store.guests {
		if of := address(source.url); len(of) > len(guest) {
			guest = of
		}
	}
	p := params{
		ValidTo: grant.ValidTo, GuestURL: guest, GuestSHA256: hex.EncodeToString(grant.ID[:]),
		MachineImage: artifact{URL: address(b.store.base), Digest: grant.Image.Digest.String(), MaxBytes: b.store.maximum},
	}
	_, err = userDataOf(identity{grant.ID, 1}, p, key.Private, key.Public.String(), grant.Environment)
	return err
}

// wholeSeconds returns the first whole second that is not before a deadline:
// neither timers of systemd's nor schedules have finer ones, and no instance may
// end early.
func wholeSeconds(at time.Time) time.Time {
	out := at.UTC().Truncate(time.Second)
	if out.Before(at) {
		out = out.Add(time.Second)
	}
	return out
}

// create sends the attempt's create call: the very same one each time.
func (b *Backend) create(ctx context.Context, a *attempt, data []byte) (instance, error) {
	if err := b.env.Journal.Check(ctx, a.grant); err != nil {
		return instance{}, err
	}
	first := a.fresh
	a.fresh = false
	b.sending(a.identity)
	answer, err := a.region.clients.ec2.RunInstances(ctx, b.runInput(a, data))
	b.sending(a.identity) // what EC2 doesn't show yet may be as young as its answer
	switch code := codeOf(err); {
	case code == codeTokenTerminated:
		return instance{}, errOver
	case code == codeTokenMismatch:
		// What was made under this token had other parameters: another version of
		// this program sent them. It is the attempt's all the same.
		return b.findMade(ctx, a)
	case code == codeGroupGone || code == codeGroupIDGone:
		b.groups.forget()
		if first && refused(err) {
			b.forgetSent(a.identity)
		}
		return instance{}, errOver // the next attempt makes it again
	case strings.HasPrefix(code, "InvalidAMIID."):
		b.images.forget(a.region.name) // it was replaced, perhaps
		return instance{}, classify(err, "create the instance")
	case err != nil:
		if first && refused(err) {
			// EC2's own word that there is nothing. Of an earlier send it says nothing:
			// a call is throttled, or denied, before its token is looked at.
			b.forgetSent(a.identity)
		}
		return instance{}, classify(err, "create the instance")
	case len(answer.Instances) != 1:
		return instance{}, backenderr.New(backenderr.Unknown, "RunInstances answered with %d instances", len(answer.Instances))
	}
	made, ok := instanceOf(answer.Instances[0])
	if !ok {
		// Its own tags are not always in the answer.
		made = instance{labels: labels{identity: a.identity}, id: aws.ToString(answer.Instances[0].InstanceId)}
	}
	b.log.InfoContext(ctx, "Created instance", "grant_id", a.grant.String(), "attempt", a.attempt, "instance_id", made.id, "zone", a.params.Zone, "type", a.params.Type)
	return made, nil
}

// findMade waits until EC2 shows the attempt's instance.
func (b *Backend) findMade(ctx context.Context, a *attempt) (instance, error) {
	settled := b.settled(a.identity)
	for {
		all, err := a.region.instances.now(ctx)
		if err != nil {
			return instance{}, classify(err, "look for the instance")
		}
		if i, ok := all.value.of(a.identity); ok {
			if i.over() {
				return instance{}, errOver
			}
			return i, nil
		}
		if all.asked.After(settled) {
			return instance{}, errOver
		}
	}
}

func (b *Backend) runInput(a *attempt, data []byte) *ec2.RunInstancesInput {
	p, tags := a.params, b.tags(a.identity, a.params)
	volume := &types.EbsBlockDevice{
		DeleteOnTermination: aws.Bool(true), Encrypted: aws.Bool(true), VolumeSize: aws.Int32(p.DiskGiB), VolumeType: types.VolumeType(p.VolumeType),
	}
	if p.KMSKey != "" {
		volume.KmsKeyId = aws.String(p.KMSKey)
	}
	in := &ec2.RunInstancesInput{
		ImageId: aws.String(p.Image), InstanceType: types.InstanceType(p.Type), MinCount: aws.Int32(1), MaxCount: aws.Int32(1),
		ClientToken: aws.String(b.token(a.identity)), UserData: aws.String(base64.StdEncoding.EncodeToString(data)),
		BlockDeviceMappings: []types.BlockDeviceMapping{{DeviceName: aws.String(p.RootDevice), Ebs: volume}},
		NetworkInterfaces: []types.InstanceNetworkInterfaceSpecification{{
			DeviceIndex: aws.Int32(0), SubnetId: aws.String(p.Subnet), Groups: []string{p.Group}, DeleteOnTermination: aws.Bool(true),
			AssociatePublicIpAddress: aws.Bool(p.Public),
		}},
		// The workload must not reach the metadata service, whose user-data has the
		// host key: no version 1, and one hop only.
		MetadataOptions: &types.InstanceMetadataOptionsRequest{
			HttpEndpoint: types.InstanceMetadataEndpointStateEnabled, HttpTokens: types.HttpTokensStateRequired, HttpPutResponseHopLimit: aws.Int32(1),
		},
		InstanceInitiatedShutdownBehavior: types.ShutdownBehaviorTerminate,
	}
	for _, kind := range []types.ResourceType{types.ResourceTypeInstance, types.ResourceTypeVolume, types.ResourceTypeNetworkInterface} {
		in.TagSpecifications = append(in.TagSpecifications, types.TagSpecification{ResourceType: kind, Tags: tags})
	}
	if p.Spot {
		in.InstanceMarketOptions = &types.InstanceMarketOptionsRequest{
			MarketType: types.MarketTypeSpot,
			SpotOptions: &types.SpotMarketOptions{
				SpotInstanceType: types.SpotInstanceTypeOneTime, InstanceInterruptionBehavior: types.InstanceInterruptionBehaviorTerminate,
			},
		}
	}
	return in
}

// address is where requesters reach the instance, invalid until it has one.
func (i instance) address(rc RegionConfig) netip.Addr {
	if rc.public() {
		return i.public
	}
	return i.private
}

// awaitReady waits until the instance runs and its SSH answers with the host key.
func (b *Backend) awaitReady(ctx context.Context, a *attempt, hostKey string, progress func(string)) (instance, error) {
	want, err := sshkey.ParsePublicKey(hostKey)
	if err != nil {
		return instance{}, backenderr.Wrap(backenderr.Internal, err, "host key")
	}
	waiting, cancel := context.WithTimeout(ctx, b.config.BootTimeout.Duration)
	defer cancel()
	settled := b.settled(a.identity)
	var (
		seen    time.Time
		problem error // of the last try
	)
	for {
		all, err := a.region.instances.next(waiting, seen, b.config.PollInterval.Duration)
		i, found := all.value.of(a.identity)
		if !all.asked.IsZero() {
			seen = all.asked
		}
		switch {
		case waiting.Err() != nil:
		case backenderr.Is(err, backenderr.ProviderUnavailable, backenderr.Unknown):
			problem = err
			if err := sleep(waiting, b.config.PollInterval.Duration/freshGap); err != nil {
				break
			}
			continue
		case err != nil:
			return instance{}, classify(err, "wait for the instance")
		case !found && all.asked.After(settled):
			return instance{}, backenderr.New(backenderr.ProviderUnavailable, "the instance vanished while it was made").WithRetryAfter(time.Second)
		case !found:
			continue
		case i.over():
			return instance{}, b.bootFailed(ctx, a, i)
		case i.state == types.InstanceStateNameRunning && i.address(a.region.clients.config).IsValid():
			problem = b.answers(waiting, a, i, want)
			if problem == nil {
				return i, nil
			}
			progress("waiting for SSH: the instance boots")
			continue
		default:
			progress("waiting for SSH: the instance is " + string(i.state))
			continue
		}
		if ctx.Err() != nil {
			return instance{}, classify(ctx.Err(), "wait for the instance")
		}
		return instance{}, b.bootTimeout(ctx, a, problem)
	}
}

// answers tries SSH until it answers or it is time to look again whether the
// instance still lives.
func (b *Backend) answers(ctx context.Context, a *attempt, i instance, want sshkey.PublicKey) error {
	endpoint := net.JoinHostPort(i.address(a.region.clients.config).String(), strconv.Itoa(sshPort))
	pause := minReadyPause
	for until := time.Now().Add(b.config.PollInterval.Duration); ; {
		err := sshkey.Probe(ctx, endpoint, guestapi.DefaultUser, want)
		if err == nil || time.Now().Add(pause).After(until) || sleep(ctx, pause) != nil {
			return err
		}
		pause = min(2*pause, maxReadyPause)
	}
}

// bootFailed says why an instance ended before it was ready.
func (b *Backend) bootFailed(ctx context.Context, a *attempt, i instance) error {
	if err := stateReasonError(i.reasonCode, i.reason); err != nil {
		return err
	}
	// EC2 may show the console of a moment ago, when the guest was ready.
	over := func(text []byte) (guestapi.Verdict, bool) {
		v, ok := guestapi.FindVerdict(text, a.grant.String(), a.attempt)
		return v, ok && v.Phase != guestapi.PhaseReady
	}
	console := b.console(ctx, a.region, i.id, func(text []byte) bool { _, ok := over(text); return ok })
	verdict, ok := over(console)
	if !ok {
		return backenderr.New(backenderr.WorkloadFailed, "instance %s ended before it was ready: %s", i.id, orUnknown(i.reason)).WithConsole(string(console))
	}
	reason := backenderr.WorkloadFailed
	if slices.Contains(verdictReasons, backenderr.Reason(verdict.Reason)) {
		reason = backenderr.Reason(verdict.Reason)
	}
	if backenderr.Reason(verdict.Reason) == backenderr.HostUnfit {
		b.log.WarnContext(ctx, "A guest says that its machine is unfit", "grant_id", a.grant.String(), "instance_id", i.id, "message", verdict.Message)
	}
	message := verdict.Message
	switch {
	case message != "":
	case verdict.Signal != "":
		message = "the workload ended before it was ready, by signal " + verdict.Signal
	case verdict.Code != nil:
		message = fmt.Sprintf("the workload ended before it was ready, with exit code %d", *verdict.Code)
	default:
		message = "the workload ended before it was ready"
	}
	// What follows is the machine's shutdown, and would be all that is left of a
	// console whose end is kept.
	if end := bytes.LastIndex(console, []byte(guestapi.VerdictPrefix)); end >= 0 {
		if rest := bytes.IndexAny(console[end:], "\r\n"); rest >= 0 {
			console = console[:end+rest]
		}
	}
	return backenderr.New(reason, "instance %s: %s", i.id, message).WithConsole(string(console))
}

// verdictReasons are what a guest may say of itself. It is the tenant's machine:
// nothing that would send the grant elsewhere, or blame the account. Whatever else
// it says, such as that the machine is unfit, is in the message.
var verdictReasons = []backenderr.Reason{
	backenderr.ImageUnavailable, backenderr.ImageHashMismatch, backenderr.ImageInvalid, backenderr.WorkloadFailed,
}

func orUnknown(reason string) string {
	if reason == "" {
		return "EC2 gives no reason"
	}
	return reason
}

func (b *Backend) bootTimeout(ctx context.Context, a *attempt, last error) error {
	text := fmt.Sprintf("SSH did not answer within %s", b.config.BootTimeout.Duration)
	failure := backenderr.New(backenderr.BootTimeout, "%s", text)
	if last != nil {
		failure = backenderr.Wrap(backenderr.BootTimeout, last, "%s", text)
	}
	all, err := a.region.instances.now(ctx)
	if err != nil {
		return failure
	}
	if i, ok := all.value.of(a.identity); ok {
		failure = failure.WithConsole(string(b.console(ctx, a.region, i.id, func([]byte) bool { return false })))
	}
	return failure
}

// console returns an instance's console, what can be had of it. EC2 posts it
// some time after the end; it is read again until enough of it is there, for as
// long as that may take, and longer when EC2 doesn't answer.
func (b *Backend) console(ctx context.Context, r *region, instanceID string, enough func([]byte) bool) []byte {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), consoleTimeout)
	defer cancel()
	posted := time.Now().Add(min(consoleTimeout, 6*b.config.PollInterval.Duration))
	var text []byte
	for {
		answer, err := r.clients.ec2.GetConsoleOutput(ctx, &ec2.GetConsoleOutputInput{InstanceId: aws.String(instanceID), Latest: aws.Bool(true)})
		if err != nil && refused(err) || err == nil && aws.ToString(answer.Output) == "" {
			// Types before Nitro, and instances that have ended, have only what was
			// posted by itself.
			answer, err = r.clients.ec2.GetConsoleOutput(ctx, &ec2.GetConsoleOutputInput{InstanceId: aws.String(instanceID)})
		}
		if err == nil {
			if decoded, err := base64.StdEncoding.DecodeString(aws.ToString(answer.Output)); err == nil {
				text = decoded
			}
		}
		answered := err == nil || notFound(err) ||
			backenderr.Is(classify(err, "read the console"), backenderr.ProviderDenied, backenderr.ProviderUnauthenticated)
		if enough(text) || answered && time.Now().After(posted) || sleep(ctx, b.config.PollInterval.Duration/freshGap) != nil {
			return text
		}
	}
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
