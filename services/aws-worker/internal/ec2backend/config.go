package ec2backend

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
)

// Config is the [backend] section of the worker's configuration.
type Config struct {
	// Regions are the regions where grants may run, and no others.
	Regions []RegionConfig `toml:"region"`
	// InstanceFamilies are those whose types may be used ("m7i"), in no order:
	// the cheapest type that fits is taken.
	InstanceFamilies []string `toml:"instance_families"`
	// MaxConcurrentInstances is how many instances the bridge may have at once
	// in each region.
	MaxConcurrentInstances int64 `toml:"max_concurrent_instances"`
	// Market is "on-demand" or "spot".
	Market string `toml:"market"`
	// Deadline says who ends an instance when no process of the bridge lives:
	// "guest", its own timer, or "platform", a one-time schedule of EventBridge
	// Scheduler beside it, which costs one more call.
	Deadline string `toml:"deadline"`
	// ScheduleRole is the role that schedules act in, with Deadline "platform".
	ScheduleRole string `toml:"schedule_role"`
	// ScheduleGroup is the group that schedules are made in.
	ScheduleGroup string `toml:"schedule_group"`
	// CredentialsFile is a shared credentials file, of which Profile is used.
	// Empty: the SDK's standard chain (environment, ~/.aws, the role of the
	// machine or container that the worker runs on).
	CredentialsFile config.Path `toml:"credentials_file"`
	// Profile of the shared files; empty: the default one.
	Profile string `toml:"profile"`
	// Endpoint serves all APIs in place of AWS's own endpoints.
	Endpoint string `toml:"endpoint"`
	// LenientBoot starts although the checks at the start fail: what can't be
	// used then joins when it can.
	LenientBoot bool `toml:"lenient_boot"`

	Guest      GuestConfig      `toml:"guest"`
	ImageStore ImageStoreConfig `toml:"image_store"`

	// BootTimeout is how long an instance may take from its launch until SSH
	// answers.
	BootTimeout config.Duration `toml:"boot_timeout"`
	// UndoTimeout bounds the undoing of a Provision that failed.
	UndoTimeout config.Duration `toml:"undo_timeout"`
	// PollInterval is how often the state of all instances of a region is read
	// while something is expected to change.
	PollInterval config.Duration `toml:"poll_interval"`
	// UsageInterval is how often a watch reports usage so far, which is what
	// follows from the time; CloudWatch is asked at the end only.
	UsageInterval config.Duration `toml:"usage_interval"`
	// VisibilityDelay is how long what was made may not be found yet: EC2's
	// answers are eventually consistent.
	VisibilityDelay config.Duration `toml:"visibility_delay"`
	// MetricsTimeout bounds the reading of usage.
	MetricsTimeout config.Duration `toml:"metrics_timeout"`
	// StockOutMemory is how long a type in a zone that had no capacity is not
	// tried again.
	StockOutMemory config.Duration `toml:"stock_out_memory"`

	// VolumeType is that of root volumes.
	VolumeType string `toml:"volume_type"`
	// KMSKey encrypts root volumes; empty: the account's default key for EBS.
	KMSKey string `toml:"kms_key"`
	// ExtraDiskGiB is what the operating system and the unpacked image need
	// beyond the grant's storage.
	ExtraDiskGiB int64 `toml:"extra_disk_gib"`

	// APILimits replace the documented limits of AWS's APIs, to which the worker
	// keeps by itself: for an account that has higher ones, or that shares them.
	APILimits []APILimitConfig `toml:"api_limit"`

	// Prices come before the prices that the worker has built in.
	Prices []PriceConfig `toml:"price"`

	// For tests, which wait for repeated calls.
	retryBackoff time.Duration // 0: the SDK's
}

// RegionConfig is a region.
type RegionConfig struct {
	// Name is AWS's ("eu-central-1"), and the region label of grants.
	Name string `toml:"name"`
	// Zones are tried in this order; empty: all that there are subnets in.
	Zones []string `toml:"zones"`
	// Subnets, one per zone; empty: the default ones of VPC.
	Subnets []string `toml:"subnets"`
	// VPC is where instances are; empty: that of Subnets, or the default VPC.
	VPC string `toml:"vpc"`
	// Image is what instances boot.
	Image ImageConfig `toml:"image"`
	// PublicAddress gives instances a public address; receipts then name it.
	// Without one they name the private address. Default: true.
	PublicAddress *bool `toml:"public_address"`
	// AllowlistEgress are the networks, or the ids of prefix lists, that an
	// instance of a grant with a list of allowed destinations reaches besides: it
	// has to fetch the guest and its image. Without them such grants are refused.
	AllowlistEgress []string `toml:"allowlist_egress"`
	// Architectures that may be used, "amd64" and "arm64". Default: amd64 alone,
	// which is what most grants' images are made for.
	Architectures []string `toml:"architectures"`
}

// ImageConfig names a disk image in one of three ways.
type ImageConfig struct {
	// SSMParameter is a public parameter that holds the id for amd64.
	SSMParameter string `toml:"ssm_parameter"`
	// SSMParameterARM64 is the same for arm64.
	SSMParameterARM64 string `toml:"ssm_parameter_arm64"`
	// Owner and Name: the newest image of this account ("136693071363", or an
	// alias such as "amazon") whose name matches the pattern.
	Owner string `toml:"owner"`
	Name  string `toml:"name"`
	// ID is one image.
	ID string `toml:"id"`
}

// GuestConfig says where instances get the guest binary.
type GuestConfig struct {
	AMD64 GuestBinary `toml:"amd64"`
	ARM64 GuestBinary `toml:"arm64"`
	// Insecure allows http:// to other machines than this one. The digest still
	// protects the binary.
	Insecure bool `toml:"insecure"`
}

// GuestBinary is the guest for one architecture.
type GuestBinary struct {
	// File is a local copy, from which the digest is taken when a worker starts.
	// A janitor, which starts nothing, needs none.
	File config.Path `toml:"file"`
	// SHA256 is the digest in place of File, as 64 hex digits.
	SHA256 string `toml:"sha256"`
	// URL is where instances fetch it: https://, or s3://bucket/key, for which
	// they get a pre-signed address.
	URL string `toml:"url"`
}

// ImageStoreConfig says where instances get grants' images.
type ImageStoreConfig struct {
	// Base is an https:// URL, or s3://bucket/prefix, for which instances get
	// pre-signed addresses.
	Base string `toml:"base"`
	// Region is the bucket's, also of guests in buckets. Default: the first
	// region.
	Region string `toml:"region"`
	// Insecure allows http:// to other machines than this one.
	Insecure bool `toml:"insecure"`
	// MaxMiB bounds an image.
	MaxMiB int64 `toml:"max_mib"`
	// URLLifetime is how long a pre-signed address works.
	URLLifetime config.Duration `toml:"url_lifetime"`
}

// PriceConfig is a price that the operator knows better.
type PriceConfig struct {
	// Type is an instance type ("m7i.large").
	Type string `toml:"type"`
	// Region; empty: all.
	Region     string  `toml:"region"`
	USDPerHour float64 `toml:"usd_per_hour"`
	// AsOf is the day on which it was the price ("2025-06-30"); empty: nobody knows.
	AsOf string `toml:"as_of"`
}

// APILimitConfig is how often the worker may call an action, in each region.
type APILimitConfig struct {
	// Action is the API's name ("RunInstances"), or "*" for all that have no
	// section of their own.
	Action string `toml:"action"`
	// Burst is how many calls may be made at once.
	Burst int64 `toml:"burst"`
	// PerSecond is how many more may be made each second.
	PerSecond float64 `toml:"per_second"`
}

// Values of Config.Market and Config.Deadline; the other is deadlinePlatform.
const (
	marketOnDemand = "on-demand"
	marketSpot     = "spot"
	deadlineGuest  = "guest"
)

// Architectures, as images for containers name them.
const (
	archAMD64 = "amd64"
	archARM64 = "arm64"
)

// Defaults and bounds of [Config].
const (
	defaultMaxInstances    = 20
	defaultScheduleGroup   = "default" // there in every account
	defaultBootTimeout     = 10 * time.Minute
	defaultUndoTimeout     = 5 * time.Minute
	defaultPollInterval    = 5 * time.Second
	defaultUsageInterval   = time.Minute
	defaultVisibilityDelay = time.Minute
	defaultMetricsTimeout  = 10 * time.Second
	defaultStockOutMemory  = 3 * time.Minute
	defaultVolumeType      = "gp3"
	defaultExtraDiskGiB    = 8
	defaultMaxImageMiB     = 64 << 10
	defaultURLLifetime     = time.Hour
	maxRate                = 1_000_000 // as good as no limit
	minURLLifetime         = time.Minute
	// maxURLLifetime is the longest that Signature Version 4 allows.
	// https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html
	maxURLLifetime = 7 * 24 * time.Hour
	// maxVolumeGiB is the largest that every volume type here can be.
	// https://docs.aws.amazon.com/ebs/latest/userguide/volume_constraints.html
	maxVolumeGiB = 16 << 10
)

// volumeTypes are those that can be a root volume, need no further parameter and
// can be of any size up to maxVolumeGiB: "standard" ends at 1 TiB.
// https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volume-types.html
var volumeTypes = []string{"gp2", "gp3"}

var (
	familyName   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	typeName     = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}\.[a-z0-9-]{1,31}$`)
	actionName   = regexp.MustCompile(`^[A-Z][A-Za-z0-9]{1,63}$`)
	zoneName     = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
	subnetID     = regexp.MustCompile(`^subnet-[0-9a-f]{8,17}$`)
	vpcID        = regexp.MustCompile(`^vpc-[0-9a-f]{8,17}$`)
	prefixList   = regexp.MustCompile(`^pl-[0-9a-f]{8,17}$`)
	imageID      = regexp.MustCompile(`^ami-[0-9a-f]{8,17}$`)
	imageOwner   = regexp.MustCompile(`^(\d{12}|self|amazon|aws-marketplace)$`)
	roleARN      = regexp.MustCompile(`^arn:[a-z-]+:iam::\d{12}:role/[\w+=,.@/-]{1,576}$`)
	groupName    = regexp.MustCompile(`^[0-9A-Za-z_.-]{1,64}$`)
	sha256Digits = regexp.MustCompile(`^[0-9a-f]{64}$`)
	bucketName   = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
)

// SetDefaults implements config.Defaulter.
func (c *Config) SetDefaults() {
	c.MaxConcurrentInstances = defaultMaxInstances
	c.Market = marketOnDemand
	c.Deadline = deadlineGuest
	c.ScheduleGroup = defaultScheduleGroup
	c.BootTimeout.Duration = defaultBootTimeout
	c.UndoTimeout.Duration = defaultUndoTimeout
	c.PollInterval.Duration = defaultPollInterval
	c.UsageInterval.Duration = defaultUsageInterval
	c.VisibilityDelay.Duration = defaultVisibilityDelay
	c.MetricsTimeout.Duration = defaultMetricsTimeout
	c.StockOutMemory.Duration = defaultStockOutMemory
	c.VolumeType = defaultVolumeType
	c.ExtraDiskGiB = defaultExtraDiskGiB
	c.ImageStore.MaxMiB = defaultMaxImageMiB
	c.ImageStore.URLLifetime.Duration = defaultURLLifetime
}

// setDefaults fills in what a region's section left out.
func (r *RegionConfig) setDefaults() {
	if r.PublicAddress == nil {
		r.PublicAddress = new(true)
	}
	if len(r.Architectures) == 0 {
		r.Architectures = []string{archAMD64}
	}
}

// public says whether instances get public addresses.
func (r RegionConfig) public() bool { return r.PublicAddress == nil || *r.PublicAddress }

// Validate implements config.Validator.
func (c Config) Validate() error {
	var p config.Problems
	if len(c.Regions) == 0 {
		p.Add("backend.region", "no [[backend.region]] section: there is no region to run grants in")
	}
	seen := map[string]bool{}
	architectures := map[string]bool{}
	for i, r := range c.Regions {
		r.setDefaults()
		r.validate(&p, i)
		if seen[r.Name] {
			p.Add(config.Key("backend", "region", i, "name"), "%q is there twice", r.Name)
		}
		seen[r.Name] = true
		for _, a := range r.Architectures {
			architectures[a] = true
		}
	}
	if len(c.InstanceFamilies) == 0 {
		p.Add("backend.instance_families", "missing: name the families whose types may be used, such as [\"t3\", \"m7i\"]")
	}
	for i, f := range c.InstanceFamilies {
		if !familyName.MatchString(f) {
			p.Add(config.Key("backend", "instance_families", i), "%q is no family such as \"m7i\"", f)
		}
	}
	if c.MaxConcurrentInstances < 1 {
		p.Add("backend.max_concurrent_instances", "is %d; must be positive", c.MaxConcurrentInstances)
	}
	oneOf(&p, "backend.market", c.Market, marketOnDemand, marketSpot)
	oneOf(&p, "backend.deadline", c.Deadline, deadlineGuest, deadlinePlatform)
	oneOf(&p, "backend.volume_type", c.VolumeType, volumeTypes...)
	switch {
	case c.Deadline == deadlinePlatform && !roleARN.MatchString(c.ScheduleRole):
		p.Add("backend.schedule_role", "%q: deadline = \"platform\" needs the ARN of a role that may terminate instances", c.ScheduleRole)
	case c.Deadline != deadlinePlatform && c.ScheduleRole != "":
		p.Add("backend.schedule_role", "has no use without deadline = \"platform\"")
	}
	if c.ImageStore.URLLifetime.Duration < c.BootTimeout.Duration {
		p.Add("backend.image_store.url_lifetime", "%s is shorter than boot_timeout, in which instances fetch their images", c.ImageStore.URLLifetime.Duration)
	}
	if !groupName.MatchString(c.ScheduleGroup) {
		p.Add("backend.schedule_group", "%q: want [0-9A-Za-z_.-], at most 64 bytes", c.ScheduleGroup)
	}
	if c.CredentialsFile != "" {
		if _, err := os.Stat(string(c.CredentialsFile)); err != nil {
			p.Add("backend.credentials_file", "%v", err)
		}
	}
	if c.Endpoint != "" {
		if err := checkURL(c.Endpoint, false); err != nil {
			p.Add("backend.endpoint", "%v", err)
		}
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"boot_timeout", c.BootTimeout.Duration},
		{"undo_timeout", c.UndoTimeout.Duration},
		{"poll_interval", c.PollInterval.Duration},
		{"usage_interval", c.UsageInterval.Duration},
		{"visibility_delay", c.VisibilityDelay.Duration},
		{"metrics_timeout", c.MetricsTimeout.Duration},
		{"stock_out_memory", c.StockOutMemory.Duration},
	} {
		if d.value <= 0 {
			p.Add("backend."+d.key, "%s; must be positive", d.value)
		}
	}
	if c.ExtraDiskGiB < 1 || c.ExtraDiskGiB >= maxVolumeGiB {
		p.Add("backend.extra_disk_gib", "%d is not between 1 and %d", c.ExtraDiskGiB, maxVolumeGiB-1)
	}
	c.Guest.validate(&p, architectures)
	c.ImageStore.validate(&p)
	for i, limit := range c.APILimits {
		if limit.Action != anyAction && !actionName.MatchString(limit.Action) {
			p.Add(config.Key("backend", "api_limit", i, "action"), "%q: want an action such as \"RunInstances\", or \"*\"", limit.Action)
		}
		if limit.Burst < 1 || limit.Burst > maxRate {
			p.Add(config.Key("backend", "api_limit", i, "burst"), "%d is not between 1 and %d", limit.Burst, maxRate)
		}
		if !(limit.PerSecond > 0 && limit.PerSecond <= maxRate) {
			p.Add(config.Key("backend", "api_limit", i, "per_second"), "%v is not above 0 and at most %d", limit.PerSecond, maxRate)
		}
	}
	for i, price := range c.Prices {
		if !typeName.MatchString(price.Type) {
			p.Add(config.Key("backend", "price", i, "type"), "%q is no instance type such as \"m7i.large\"", price.Type)
		}
		if price.Region != "" && !backend.ValidRegion(price.Region) {
			p.Add(config.Key("backend", "price", i, "region"), "%q: want [a-z0-9-], at most 64 bytes", price.Region)
		}
		// Written so that not-a-number, which TOML has, is refused, too.
		if !(price.USDPerHour > 0 && price.USDPerHour < 1e6) {
			p.Add(config.Key("backend", "price", i, "usd_per_hour"), "is %v; must be positive", price.USDPerHour)
		}
		if _, err := time.Parse(time.DateOnly, price.AsOf); price.AsOf != "" && err != nil {
			p.Add(config.Key("backend", "price", i, "as_of"), "%q is no day such as \"2025-06-30\"", price.AsOf)
		}
	}
	return p.Err()
}

func oneOf(p *config.Problems, key, value string, known ...string) {
	if !slices.Contains(known, value) {
		p.Add(key, "%q: want %s", value, strings.Join(known, " or "))
	}
}

func (r RegionConfig) validate(p *config.Problems, i int) {
	add := func(key, format string, args ...any) { p.Add(config.Key("backend", "region", i, key), format, args...) }
	if !backend.ValidRegion(r.Name) {
		add("name", "%q: want [a-z0-9-], at most 64 bytes", r.Name)
	}
	for j, zone := range r.Zones {
		if !zoneName.MatchString(zone) || !strings.HasPrefix(zone, r.Name) {
			p.Add(config.Key("backend", "region", i, "zones", j), "%q is no zone of %s", zone, r.Name)
		}
	}
	for j, id := range r.Subnets {
		if !subnetID.MatchString(id) {
			p.Add(config.Key("backend", "region", i, "subnets", j), "%q is no id of a subnet", id)
		}
	}
	if r.VPC != "" && !vpcID.MatchString(r.VPC) {
		add("vpc", "%q is no id of a VPC", r.VPC)
	}
	for j, prefix := range r.AllowlistEgress {
		if q, err := netip.ParsePrefix(prefix); (err != nil || q != q.Masked()) && !prefixList.MatchString(prefix) {
			p.Add(config.Key("backend", "region", i, "allowlist_egress", j), "%q is no network such as \"10.0.0.0/8\" and no id of a prefix list", prefix)
		}
	}
	for j, a := range r.Architectures {
		oneOf(p, config.Key("backend", "region", i, "architectures", j), a, archAMD64, archARM64)
	}
	r.validateImage(p, i)
}

func (r RegionConfig) validateImage(p *config.Problems, i int) {
	add := func(key, format string, args ...any) {
		p.Add(config.Key("backend", "region", i, "image", key), format, args...)
	}
	m := r.Image
	kinds := 0
	if m.SSMParameter != "" || m.SSMParameterARM64 != "" {
		kinds++
		for _, k := range []struct{ arch, key, value string }{{archAMD64, "ssm_parameter", m.SSMParameter}, {archARM64, "ssm_parameter_arm64", m.SSMParameterARM64}} {
			switch used := slices.Contains(r.Architectures, k.arch); {
			case used && k.value == "":
				add(k.key, "missing: architectures has %s", k.arch)
			case k.value != "" && !strings.HasPrefix(k.value, "/"):
				add(k.key, "%q: want the name of a parameter, which begins with /", k.value)
			}
		}
	}
	if m.Owner != "" || m.Name != "" {
		kinds++
		if !imageOwner.MatchString(m.Owner) {
			add("owner", "%q: want an account of 12 digits, \"self\", \"amazon\" or \"aws-marketplace\": a name alone could be anyone's", m.Owner)
		}
		if m.Name == "" {
			add("name", "missing: owner alone names no image")
		}
	}
	if m.ID != "" {
		kinds++
		if !imageID.MatchString(m.ID) {
			add("id", "%q is no id of an image", m.ID)
		}
		if len(r.Architectures) > 1 {
			add("id", "one image has one architecture, and architectures has %d", len(r.Architectures))
		}
	}
	if kinds != 1 {
		p.Add(config.Key("backend", "region", i, "image"), "want one of ssm_parameter, owner with name, or id")
	}
}

func (g GuestConfig) validate(p *config.Problems, architectures map[string]bool) {
	for _, b := range []struct {
		arch   string
		binary GuestBinary
	}{{archAMD64, g.AMD64}, {archARM64, g.ARM64}} {
		key := func(name string) string { return config.Key("backend", "guest", b.arch, name) }
		if b.binary == (GuestBinary{}) {
			if architectures[b.arch] {
				p.Add(config.Key("backend", "guest", b.arch), "missing: a region uses %s", b.arch)
			}
			continue
		}
		switch {
		case (b.binary.File == "") == (b.binary.SHA256 == ""):
			p.Add(key("file"), "want either file or sha256")
		case b.binary.SHA256 != "" && !sha256Digits.MatchString(b.binary.SHA256):
			p.Add(key("sha256"), "%q: want 64 lower-case hex digits", b.binary.SHA256)
		}
		if b.binary.URL == "" {
			p.Add(key("url"), "missing: where instances fetch the guest")
			continue
		}
		if _, path, ok := cutBucket(b.binary.URL); ok {
			if path == "" {
				p.Add(key("url"), "%q: want s3://bucket/key", b.binary.URL)
			}
		} else if err := checkURL(b.binary.URL, g.Insecure); err != nil {
			p.Add(key("url"), "%v", err)
		}
	}
}

func (s ImageStoreConfig) validate(p *config.Problems) {
	if s.MaxMiB < 1 {
		p.Add("backend.image_store.max_mib", "is %d; must be positive", s.MaxMiB)
	}
	if d := s.URLLifetime.Duration; d < minURLLifetime || d > maxURLLifetime {
		p.Add("backend.image_store.url_lifetime", "%s is not between %s and %s", d, minURLLifetime, maxURLLifetime)
	}
	if s.Region != "" && !backend.ValidRegion(s.Region) {
		p.Add("backend.image_store.region", "%q: want [a-z0-9-], at most 64 bytes", s.Region)
	}
	_, _, bucket := cutBucket(s.Base)
	switch {
	case s.Base == "":
		p.Add("backend.image_store.base", "missing: an https:// URL or s3://bucket/prefix")
	case bucket:
	case !strings.HasPrefix(s.Base, "http"):
		p.Add("backend.image_store.base", "%q: want an https:// URL or s3://bucket/prefix: instances can't read this machine's files", s.Base)
	default:
		if _, err := imagestore.New(imagestore.Config{Base: s.Base, Insecure: s.Insecure}); err != nil {
			p.Add("backend.image_store", "%v", err)
		}
	}
}

// checkURL accepts https://host[:port][/path], and http:// to this machine or if
// it is allowed.
func checkURL(text string, insecure bool) error {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return err
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "":
		return fmt.Errorf("%s has user information, a query or a fragment", u.Redacted())
	case u.Host == "":
		return fmt.Errorf("%q: no host", text)
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http":
		return fmt.Errorf("%q: want https://", text)
	case insecure:
		return nil
	}
	if ip := net.ParseIP(u.Hostname()); u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%q: plain http is for loopback addresses only", text)
	}
	return nil
}

// cutBucket takes s3://bucket/path apart; ok is false if it isn't of that form.
func cutBucket(text string) (bucket, path string, ok bool) {
	rest, ok := strings.CutPrefix(text, "s3://")
	if !ok {
		return "", "", false
	}
	bucket, path, _ = strings.Cut(rest, "/")
	return bucket, strings.Trim(path, "/"), bucketName.MatchString(bucket)
}

// readFile is for what the configuration names.
func readFile(path config.Path) ([]byte, error) {
	data, err := os.ReadFile(string(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: no such file", path)
	}
	return data, err
}
