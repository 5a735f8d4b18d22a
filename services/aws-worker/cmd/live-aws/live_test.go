package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testBridge = "live"
	testRegion = "eu-central-1"
	// testSpeed is how many times faster than the real one the cloud is.
	testSpeed = 100
)

// hurried fits the cloud's speed.
var hurried = timing{
	life: time.Minute, short: 5 * time.Second, run: 20 * time.Minute, cleanUp: time.Minute, poll: 20 * time.Millisecond, late: 20 * time.Second,
}

// output is written by the run and read by the test.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// bench is a simulated AWS with an operator's configuration.
type bench struct {
	cloud  *ec2fixture.Site
	config string
	out    output
}

// newBench writes the configuration; more goes into its [backend] section.
func newBench(t *testing.T, more string) *bench {
	t.Helper()
	b := &bench{cloud: ec2fixture.Open(t, ec2fixture.Options{BridgeID: testBridge, Backend: backendName, Region: testRegion, Speed: testSpeed})}
	dir := t.TempDir()
	files := map[string]string{
		"credentials": fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", b.cloud.AccessKey, b.cloud.SecretKey),
		"worker.toml": fmt.Sprintf(`bridge_id = %q
name = "aws"
secret_file = "worker.secret"
[ledger]
path = "ledger.db"
[[listen]]
address = "unix:%s/worker.sock"
[[client]]
identity = "unix:0"
role = "operator"
[backend]
credentials_file = "credentials"
endpoint = %q
instance_families = ["t3"]
boot_timeout = "20s"
poll_interval = "50ms"
visibility_delay = "300ms"
metrics_timeout = "2s"
%s
[[backend.region]]
name = %q
[backend.region.image]
ssm_parameter = %q
[backend.guest.amd64]
file = %q
url = %q
[backend.image_store]
base = %q
`, testBridge, dir, b.cloud.Endpoint, more, testRegion, b.cloud.ImageParameter, b.cloud.GuestFile, b.cloud.GuestURL, b.cloud.StoreBase),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.config = filepath.Join(dir, "worker.toml")
	return b
}

func (b *bench) run(t *testing.T, ctx context.Context, flags ...string) int { //nolint:revive // the test goes first here as everywhere
	t.Helper()
	code := run(ctx, append([]string{"-config", b.config}, flags...), &b.out, hurried)
	t.Logf("live-aws %s: exit code %d\n%s", strings.Join(flags, " "), code, &b.out)
	return code
}

func (b *bench) image() string { return "-image=" + b.cloud.Image.Digest.String() }

// lines counts those that begin with a word.
func (b *bench) lines(word string) int {
	n := 0
	for line := range strings.Lines(b.out.String()) {
		if strings.HasPrefix(line, word+"  ") {
			n++
		}
	}
	return n
}

func (b *bench) launches() int {
	n := 0
	for _, r := range b.cloud.Cloud.Requests() {
		if r.Action == "RunInstances" && !r.DryRun {
			n++
		}
	}
	return n
}

// platform has a schedule end instances.
const platform = "deadline = \"platform\"\nschedule_role = \"arn:aws:iam::123456789012:role/schedules\"\n"

func TestTheListPassesAndLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		more string
		want int
	}{
		"guest": {"", 10},
		// Here the disk is as large as the image wants it.
		"platform": {platform + "extra_disk_gib = 1\n", 11},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, c.more)
			if code := b.run(t, t.Context(), b.image(), "-i-will-pay"); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if pass := b.lines("PASS"); pass != c.want {
				t.Errorf("%d lines passed, want %d", pass, c.want)
			}
			if n := b.launches(); n != instances || !strings.Contains(b.out.String(), fmt.Sprintf("%d instances", n)) {
				t.Errorf("%d instances were made, want %d, and announced", n, instances)
			}
			b.cloud.CheckNothingIsLeft(t)
		})
	}
}

// What AWS shows is compared with what was asked for: where the two differ, the
// list has to say so.
func TestTheListFindsWhatIsNotAsItShouldBe(t *testing.T) {
	t.Parallel()
	b := newBench(t, platform)
	c, err := config.Load[worker.Config[ec2backend.Config]](b.config)
	if err != nil {
		t.Fatal(err)
	}
	p := &site{settings: settings{image: b.cloud.Image.Digest, timing: hurried}, bridgeID: c.BridgeID, config: narrowed(c.Backend), dir: t.TempDir()}
	ctx := operator(t.Context())
	if err := p.connect(ctx); err != nil {
		t.Fatal(err)
	}
	defer p.disconnect()
	if err := p.open(ctx); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	f := &first{}
	for _, step := range []func(context.Context, *first) error{p.provision, p.tags, p.parts, p.schedule} {
		if err := step(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(*site, *first)
		look   func(*site, context.Context, *first) error
		want   string
	}{
		"a disk that is too large": {func(p *site, _ *first) { p.config.ExtraDiskGiB-- }, (*site).parts, "has 9 GiB, want 8"},
		"a disk that is too small": {func(p *site, _ *first) { p.config.ExtraDiskGiB++ }, (*site).parts, "has 9 GiB, want 10"},
		"another deadline": {
			func(_ *site, f *first) { f.grant.ValidTo = f.grant.ValidTo.Add(time.Second) }, (*site).schedule, "the expression is",
		},
		"another instance": {func(_ *site, f *first) { f.made.Instance.ID = "i-0" }, (*site).schedule, "whom it ends is"},
		"another role":     {func(p *site, _ *first) { p.config.ScheduleRole += "2" }, (*site).schedule, "the role is"},
		"a failure that needs no boot": {
			func(p *site, _ *first) { p.settings.image.Sum[0]++ }, (*site).failedBoot, "want IMAGE_HASH_MISMATCH, got",
		},
	} {
		other, of := *p, *f
		c.change(&other, &of)
		if err := c.look(&other, ctx, &of); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want %q, got %v", name, c.want, err)
		}
	}
	if err := p.cleanUp(ctx); err != nil {
		t.Error(err)
	}
	b.cloud.CheckNothingIsLeft(t)
}

func TestNothingIsMadeUnlessToldTwice(t *testing.T) {
	t.Parallel()
	b := newBench(t, "")
	if code := b.run(t, t.Context(), b.image()); code != exitUsage {
		t.Errorf("exit code %d", code)
	}
	if !strings.Contains(b.out.String(), "USD 0.0") {
		t.Error("no estimate was printed")
	}
	for _, r := range b.cloud.Cloud.Requests() {
		if r.Mutates && !r.DryRun {
			t.Errorf("%s was called", r.Action)
		}
	}
}

func TestARunThatWouldCostMoreIsRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t, "")
	var dear strings.Builder
	for _, size := range []string{"nano", "micro", "small", "medium", "large", "xlarge", "2xlarge"} {
		fmt.Fprintf(&dear, "[[backend.price]]\ntype = \"t3.%s\"\nusd_per_hour = 1.0\n", size)
	}
	text, err := os.ReadFile(b.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.config, append(text, dear.String()...), 0o600); err != nil {
		t.Fatal(err)
	}
	if code := b.run(t, t.Context(), b.image(), "-i-will-pay"); code != exitUsage || !strings.Contains(b.out.String(), "more than USD 0.10") {
		t.Errorf("exit code %d", code)
	}
	if n := b.launches(); n > 0 {
		t.Errorf("%d instances were made", n)
	}
}

func TestAFailureIsTidiedUp(t *testing.T) {
	t.Parallel()
	b := newBench(t, "")
	b.cloud.Machines.FailNext("it can't boot")
	if code := b.run(t, t.Context(), b.image(), "-i-will-pay"); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	if fail, skipped := b.lines("FAIL"), b.lines("----"); fail != 1 || skipped != 5 {
		t.Errorf("%d lines failed and %d were not reached, want 1 and 5", fail, skipped)
	}
	b.cloud.CheckNothingIsLeft(t)
}

func TestAnInterruptedRunIsTidiedUp(t *testing.T) {
	t.Parallel()
	b := newBench(t, "")
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	// In the midst of the boot of the first instance.
	b.cloud.Machines.Hang(true)
	go func() {
		for b.launches() == 0 && sleep(ctx, time.Millisecond) == nil {
		}
		interrupt()
	}()
	if code := b.run(t, ctx, b.image(), "-i-will-pay"); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	if n := b.launches(); n != 1 {
		t.Errorf("%d instances were made", n)
	}
	b.cloud.CheckNothingIsLeft(t)
}

func TestCleanRemovesWhatAKilledRunLeft(t *testing.T) {
	t.Parallel()
	b := newBench(t, "")
	plant := func(backend string, grant byte) string {
		t.Helper()
		id, err := b.cloud.Cloud.Plant(testRegion, map[string]string{
			tagBridge: testBridge, tagBackend: backend, tagGrant: strings.Repeat(fmt.Sprintf("%02x", grant), 32), tagAttempt: "1",
			tagValidTo: time.Now().Add(time.Hour).UTC().Format(time.RFC3339), tagShape: "500/512/1",
		})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	left, workers := plant(backendName, 1), plant("aws", 2)
	// A run that finds it doesn't go on.
	if code := b.run(t, t.Context(), b.image(), "-i-will-pay"); code != exitUsage || !strings.Contains(b.out.String(), "CLEAN=1") {
		t.Errorf("exit code %d", code)
	}
	if code := b.run(t, t.Context(), "-clean"); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	for _, i := range b.cloud.Cloud.Instances() {
		switch {
		case i.ID == left && i.State != ec2sim.StateTerminated:
			t.Errorf("what was left is %s", i.State)
		case i.ID == workers && i.State != ec2sim.StateRunning:
			t.Errorf("an instance of the bridge's worker is %s", i.State)
		}
	}
	if err := b.cloud.Cloud.Vanish(workers); err != nil {
		t.Fatal(err)
	}
}

func TestFlagsAreChecked(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"nothing":        {},
		"no image":       {"-config", "x.toml"},
		"no such digest": {"-config", "x.toml", "-image", "sha256:12"},
		"no such file":   {"-config", "/nonexistent/x.toml", "-clean"},
		"an argument":    {"-config", "x.toml", "-clean", "please"},
		"no such flag":   {"-force"},
	} {
		var out output
		if code := run(t.Context(), args, &out, hurried); code != exitUsage || out.String() == "" {
			t.Errorf("%s: exit code %d, output %q", name, code, out.String())
		}
	}
}
