package ec2backend

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestAConfigurationWithoutAFault(t *testing.T) {
	t.Parallel()
	if err := validConfig(t, "").Validate(); err != nil {
		t.Errorf("refused: %v", err)
	}
}

func TestEveryFaultIsNamedByItsKey(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(*Config)
		key   string // empty: no fault
	}{
		"no region":             {func(c *Config) { c.Regions = nil }, "backend.region"},
		"a region twice":        {func(c *Config) { c.Regions = append(c.Regions, c.Regions[0]) }, "backend.region[1].name"},
		"a region's name":       {func(c *Config) { c.Regions[0].Name = "Frankfurt" }, "backend.region[0].name"},
		"another region's":      {func(c *Config) { c.Regions[0].Zones = []string{"us-east-1a"} }, "backend.region[0].zones[0]"},
		"zones":                 {func(c *Config) { c.Regions[0].Zones = []string{"eu-central-1b", "eu-central-1a"} }, ""},
		"a subnet":              {func(c *Config) { c.Regions[0].Subnets = []string{"net-1"} }, "backend.region[0].subnets[0]"},
		"a VPC":                 {func(c *Config) { c.Regions[0].VPC = "default" }, "backend.region[0].vpc"},
		"egress with host bits": {func(c *Config) { c.Regions[0].AllowlistEgress = []string{"10.0.0.1/8"} }, "backend.region[0].allowlist_egress[0]"},
		"egress":                {func(c *Config) { c.Regions[0].AllowlistEgress = []string{"10.0.0.0/8", "fd00::/8", "pl-6ea54007"} }, ""},
		"an architecture":       {func(c *Config) { c.Regions[0].Architectures = []string{"x86_64"} }, "backend.region[0].architectures[0]"},
		"no image":              {func(c *Config) { c.Regions[0].Image = ImageConfig{} }, "backend.region[0].image"},
		"two images":            {func(c *Config) { c.Regions[0].Image.SSMParameter = "/a" }, "backend.region[0].image"},
		"an image's id":         {func(c *Config) { c.Regions[0].Image.ID = "debian" }, "backend.region[0].image.id"},
		"a name of anyone's":    {func(c *Config) { c.Regions[0].Image = ImageConfig{Name: "debian-*"} }, "backend.region[0].image.owner"},
		"an owner of nothing":   {func(c *Config) { c.Regions[0].Image = ImageConfig{Owner: "amazon"} }, "backend.region[0].image.name"},
		"owner and name":        {func(c *Config) { c.Regions[0].Image = ImageConfig{Owner: "136693071363", Name: "debian-13-*"} }, ""},
		"a parameter":           {func(c *Config) { c.Regions[0].Image = ImageConfig{SSMParameter: "debian"} }, "backend.region[0].image.ssm_parameter"},
		"no parameter for arm64": {func(c *Config) {
			c.Regions[0].Image = ImageConfig{SSMParameter: "/a"}
			c.Regions[0].Architectures, c.Guest.ARM64 = []string{"amd64", "arm64"}, c.Guest.AMD64
		}, "backend.region[0].image.ssm_parameter_arm64"},
		"one id for both": {func(c *Config) {
			c.Regions[0].Architectures, c.Guest.ARM64 = []string{"amd64", "arm64"}, c.Guest.AMD64
		}, "backend.region[0].image.id"},
		"no family":        {func(c *Config) { c.InstanceFamilies = nil }, "backend.instance_families"},
		"all families":     {func(c *Config) { c.InstanceFamilies = []string{"*"} }, "backend.instance_families[0]"},
		"a type":           {func(c *Config) { c.InstanceFamilies = []string{"t3.micro"} }, "backend.instance_families[0]"},
		"no instances":     {func(c *Config) { c.MaxConcurrentInstances = 0 }, "backend.max_concurrent_instances"},
		"a market":         {func(c *Config) { c.Market = "black" }, "backend.market"},
		"a deadline":       {func(c *Config) { c.Deadline = "never" }, "backend.deadline"},
		"no role":          {func(c *Config) { c.Deadline = deadlinePlatform }, "backend.schedule_role"},
		"a role of no use": {func(c *Config) { c.ScheduleRole = "arn:aws:iam::123456789012:role/x" }, "backend.schedule_role"},
		"a platform deadline": {func(c *Config) {
			c.Deadline, c.ScheduleRole = deadlinePlatform, "arn:aws:iam::123456789012:role/compute/bridge"
		}, ""},
		"a group":                  {func(c *Config) { c.ScheduleGroup = "a b" }, "backend.schedule_group"},
		"no credentials":           {func(c *Config) { c.CredentialsFile = "/nonexistent" }, "backend.credentials_file"},
		"a plain endpoint":         {func(c *Config) { c.Endpoint = "http://10.0.0.1:80" }, "backend.endpoint"},
		"an endpoint":              {func(c *Config) { c.Endpoint = "https://ec2.example" }, ""},
		"an endpoint here":         {func(c *Config) { c.Endpoint = "http://127.0.0.1:4599" }, ""},
		"an endpoint's user":       {func(c *Config) { c.Endpoint = "https://a:b@ec2.example" }, "backend.endpoint"},
		"no time":                  {func(c *Config) { c.BootTimeout.Duration = 0 }, "backend.boot_timeout"},
		"no memory":                {func(c *Config) { c.StockOutMemory.Duration = 0 }, "backend.stock_out_memory"},
		"a volume":                 {func(c *Config) { c.VolumeType = "io2" }, "backend.volume_type"},
		"a volume of 1 TiB only":   {func(c *Config) { c.VolumeType = "standard" }, "backend.volume_type"},
		"no room":                  {func(c *Config) { c.ExtraDiskGiB = 0 }, "backend.extra_disk_gib"},
		"no room for a grant":      {func(c *Config) { c.ExtraDiskGiB = maxVolumeGiB }, "backend.extra_disk_gib"},
		"no guest":                 {func(c *Config) { c.Guest.AMD64 = GuestBinary{} }, "backend.guest.amd64"},
		"a guest without a digest": {func(c *Config) { c.Guest.AMD64.SHA256 = "" }, "backend.guest.amd64.file"},
		"a guest with two":         {func(c *Config) { c.Guest.AMD64.File = "/guest" }, "backend.guest.amd64.file"},
		"a guest's digest":         {func(c *Config) { c.Guest.AMD64.SHA256 = "ABC" }, "backend.guest.amd64.sha256"},
		"a guest without a place":  {func(c *Config) { c.Guest.AMD64.URL = "" }, "backend.guest.amd64.url"},
		"a guest in the clear":     {func(c *Config) { c.Guest.AMD64.URL = "http://store.example/guest" }, "backend.guest.amd64.url"},
		"a guest in the clear, allowed": {func(c *Config) {
			c.Guest.AMD64.URL, c.Guest.Insecure = "http://store.example/guest", true
		}, ""},
		"a guest in a bucket":     {func(c *Config) { c.Guest.AMD64.URL = "s3://bucket/guest" }, ""},
		"a bucket as a guest":     {func(c *Config) { c.Guest.AMD64.URL = "s3://bucket" }, "backend.guest.amd64.url"},
		"no store":                {func(c *Config) { c.ImageStore.Base = "" }, "backend.image_store.base"},
		"a store on this machine": {func(c *Config) { c.ImageStore.Base = "/var/lib/images" }, "backend.image_store.base"},
		"a store in the clear":    {func(c *Config) { c.ImageStore.Base = "http://store.example" }, "backend.image_store"},
		"a bucket's name":         {func(c *Config) { c.ImageStore.Base = "s3://A_B" }, "backend.image_store.base"},
		"a store in a bucket":     {func(c *Config) { c.ImageStore.Base = "s3://bucket/a/b" }, ""},
		"a lifetime":              {func(c *Config) { c.ImageStore.URLLifetime.Duration = 8 * 24 * time.Hour }, "backend.image_store.url_lifetime"},
		"no image is so small":    {func(c *Config) { c.ImageStore.MaxMiB = 0 }, "backend.image_store.max_mib"},
		"a price's type":          {func(c *Config) { c.Prices = []PriceConfig{{Type: "m7i", USDPerHour: 1}} }, "backend.price[0].type"},
		"no price":                {func(c *Config) { c.Prices = []PriceConfig{{Type: "m7i.large"}} }, "backend.price[0].usd_per_hour"},
		"a price's day":           {func(c *Config) { c.Prices = []PriceConfig{{Type: "m7i.large", USDPerHour: 1, AsOf: "June"}} }, "backend.price[0].as_of"},
		"no number":               {func(c *Config) { c.Prices = []PriceConfig{{Type: "m7i.large", USDPerHour: math.NaN()}} }, "backend.price[0].usd_per_hour"},
		"a limit's action":        {func(c *Config) { c.APILimits = []APILimitConfig{{Action: "run", Burst: 1, PerSecond: 1}} }, "backend.api_limit[0].action"},
		"no calls":                {func(c *Config) { c.APILimits = []APILimitConfig{{Action: "RunInstances", PerSecond: 1}} }, "backend.api_limit[0].burst"},
		"no more calls":           {func(c *Config) { c.APILimits = []APILimitConfig{{Action: "RunInstances", Burst: 1}} }, "backend.api_limit[0].per_second"},
	} {
		c := validConfig(t, "")
		test.spoil(&c)
		err := c.Validate()
		switch {
		case test.key == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case test.key != "" && (err == nil || !strings.HasPrefix(err.Error(), test.key+": ") || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: %v; want %s alone", name, err, test.key)
		}
	}
}

func FuzzAddressesOfBuckets(f *testing.F) {
	for _, seed := range []string{"s3://bucket/a/b", "s3://bucket", "s3://", "s3://a..b/../c", "https://bucket/a", "s3://bucket//"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		bucket, path, ok := cutBucket(text)
		if !ok {
			return
		}
		if !bucketName.MatchString(bucket) || strings.HasPrefix(path, "/") || strings.HasSuffix(path, "/") {
			t.Errorf("%q: bucket %q, path %q", text, bucket, path)
		}
		if !strings.HasPrefix(text, "s3://"+bucket) || !strings.Contains(text, path) {
			t.Errorf("%q isn't made of %q and %q", text, bucket, path)
		}
	})
}

func FuzzAddressesOfServers(f *testing.F) {
	for _, seed := range []string{"https://a.example/b", "http://127.0.0.1:1", "http://localhost", "http://10.0.0.1", "https://u:p@h", "https://", "ftp://h", "https://h?x"} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, text string, insecure bool) {
		if checkURL(text, insecure) != nil {
			return
		}
		if !strings.HasPrefix(strings.ToLower(text), "http") {
			t.Errorf("%q is accepted", text)
		}
		if !insecure && checkURL(text, true) != nil {
			t.Errorf("%q is accepted only where more should be refused", text)
		}
	})
}
