package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/labvm"
	"github.com/compute-bridge/compute-bridge/test/internal/awssite"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// awsWorker is the name of the AWS worker and its backend.
const awsWorker = "aws"

// awsBridge is a bridge whose worker runs grants on a simulated EC2, the instances
// of which are machines that boot Debian with its own cloud-init.
type awsBridge struct {
	*bridge
	cloud *awssite.Cloud
}

// newAWSBridge starts a router, an AWS worker and a cloud. When the test ends,
// nothing may be left in the cloud, and no secret may be in a log or on a console.
func newAWSBridge(t *testing.T) *awsBridge {
	t.Helper()
	b := newSite(t)
	b.programs("aws-worker")
	cloud, err := awssite.Open(t.Context(), b.Site, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	a := &awsBridge{bridge: b, cloud: cloud}
	t.Cleanup(func() {
		if err := cloud.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if b.image, err = b.AddImage(t.Context(), ociimage.Shell); err != nil {
		t.Fatal(err)
	}
	b.ok("", "certs", "issue", "certs", awsWorker, "--role", "reader", "--ip", b.IP)
	w := cloud.Worker(awsWorker, 0)
	b.workers = append(b.workers, w)
	b.write(cloud.CredentialsFile(w), cloud.Credentials())
	b.write(w.ConfigFile(), cloud.Config(w, "e2e",
		site.Client{Identity: site.Identity("router"), Role: "reader", Router: true},
		site.Client{Identity: site.Identity(operator), Role: "operator"},
		site.Client{Identity: "unix:0", Role: "operator"},
	))
	b.write(b.RouterConfigFile(), b.routerConfig())
	t.Cleanup(a.checkEnd)
	b.startWorker(w)
	b.startRouter()
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	return a
}

// checkEnd ends the bridge and looks at what it leaves in the cloud.
func (a *awsBridge) checkEnd() {
	a.t.Helper()
	consoles := a.consoles()
	a.bridge.checkEnd()
	for id, console := range consoles {
		if bytes.Contains(console, []byte("PRIVATE KEY")) || bytes.Contains(console, []byte("b3BlbnNzaC1rZXktdjE")) {
			a.t.Errorf("a private key is on the console of %s", id)
		}
		if a.t.Failed() {
			a.t.Logf("the console of %s:\n%s", id, console)
		}
	}
	for _, left := range a.left() {
		a.t.Errorf("left in the cloud: %s", left)
	}
}

// consoles returns what the instances' consoles show.
func (a *awsBridge) consoles() map[string][]byte {
	consoles := map[string][]byte{}
	for _, i := range a.cloud.History() {
		if m := a.cloud.Machine(i.ID); m != nil {
			consoles[i.ID] = m.Console()
		}
	}
	return consoles
}

// left lists what is left in the cloud. Security groups are shared, and stay.
func (a *awsBridge) left() []string {
	var left []string
	for _, i := range a.cloud.Instances() {
		if i.State != ec2sim.StateTerminated {
			left = append(left, fmt.Sprintf("instance %s, %s", i.ID, i.State))
		}
	}
	for _, v := range a.cloud.Volumes() {
		left = append(left, "volume "+v.ID)
	}
	for _, n := range a.cloud.NetworkInterfaces() {
		left = append(left, "network interface "+n.ID)
	}
	return left
}

// instance returns the only instance that a grant ever had.
func (a *awsBridge) instance(id string) ec2sim.Instance {
	a.t.Helper()
	all := slices.DeleteFunc(a.cloud.History(), func(i ec2sim.Instance) bool { return i.Tags[ec2tags.Grant] != id })
	if len(all) != 1 {
		a.t.Fatalf("the grant has had %d instances", len(all))
	}
	return all[0]
}

// The main job on EC2: a grant through the router becomes a machine whose stock
// Debian turns itself into the grant's instance, and when it ends nothing is left.
func TestAGrantBecomesAnInstanceOfEC2(t *testing.T) {
	t.Parallel()
	a := newAWSBridge(t)
	card := a.ok(market, "card")
	for _, want := range []string{awsWorker, awssite.Region, "vm", "guest"} {
		if !strings.Contains(card, want) {
			t.Errorf("the card lacks %q:\n%s", want, card)
		}
	}
	p := a.provision(own("--env", "GREETING=hello $HOME 'world'", "--port", "8080/tcp")...)
	i := a.instance(p.Instance.id())
	if p.Instance.InstanceID != i.ID || p.Receipt.Host != i.Addr.String() || p.Receipt.Port != 22 || i.State != ec2sim.StateRunning {
		t.Errorf("the receipt says %+v, the cloud %+v", p.Receipt, i)
	}
	a.says(a.run(a.ssh(p, "requester", nil, `echo "$GREETING"; test -e /etc/debian_version || echo in the image; exit 7`)), 7,
		`(?s)hello \$HOME 'world'.*in the image`)
	cmd := a.ssh(p, "requester", []string{"-tt"})
	cmd.Stdin = strings.NewReader("test -t 0 && echo terminal-$((6*7))\nexit 3\n")
	a.says(a.run(cmd), 3, "terminal-42")
	a.says(a.run(a.cmd(market, "bridgectl", "ssh", p.Instance.id(), "-i", "requester", "--", "exit 9")), 9, "")
	a.copyBothWays(p)
	a.forward(p)
	// No other host key, no other login key.
	a.sshKey("other")
	a.says(a.run(a.ssh(p, "other", nil, "true")), 255, "Permission denied")
	forged := p
	forged.Receipt.HostKey, _, _ = strings.Cut(a.read("other.pub"), "\n")
	a.says(a.run(a.ssh(forged, "requester", nil, "true")), 255, "(?i)host key")

	watch := a.start("watch", p.Instance.id(), "-o", "json")
	a.terminate(p)
	if code := watch.wait(); code != 0 || !strings.Contains(watch.output(), "END_REASON_TERMINATED") {
		t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
	a.says(a.run(a.ssh(p, "requester", []string{"-o", "ConnectTimeout=5"}, "true")), 255, "")
	log := a.finalLog(p)
	if log.Log.Exit.Reason != "END_REASON_TERMINATED" || len(log.Log.Usage) == 0 {
		t.Errorf("log: %+v", log.Log)
	}
	for what, usage := range log.Log.Usage {
		if strings.Contains(usage.Source, "GUEST") {
			t.Errorf("%s is the guest's own word", what)
		}
	}
	a.refused(market, 8, []string{"GRANT_ENDED"}, "provision", "--again", p.Instance.id())
}

// What the instance finds out is what the requester is told, with the end of its
// console. What the worker sees before that launches none.
func TestLongAnInstanceThatCannotRunItsImageSaysWhy(t *testing.T) {
	t.Parallel()
	a := newAWSBridge(t)
	for _, tc := range []struct {
		name, digest string
		content      string // what is at the digest's place; "" for nothing
		vanishes     bool   // between the worker's look and the launch
		want         string
		message      string // the guest's own; "" for no instance
	}{
		{"another digest", strings.Repeat("2", 64), "something else", false, "IMAGE_HASH_MISMATCH", "the image has sha256 "},
		{"a missing image", strings.Repeat("1", 64), "", false, "IMAGE_UNAVAILABLE", ""},
		{"a vanishing image", strings.Repeat("3", 64), "soon gone", true, "IMAGE_UNAVAILABLE", "the store answers 404 Not Found"},
	} {
		file := a.Path("images", "sha256", tc.digest)
		if tc.content != "" {
			a.write(file, tc.content)
		}
		if tc.vanishes {
			a.cloud.Intercept(func(r ec2sim.Request) ec2sim.Intervention {
				if r.Action != "RunInstances" || r.DryRun {
					return ec2sim.Intervention{}
				}
				return ec2sim.Intervention{Before: func(context.Context) error { return os.RemoveAll(file) }}
			})
		}
		before := len(a.cloud.History())
		args := append([]string{"provision", "--image-digest", "sha256:" + tc.digest, "--cpu", "500m", "--ram", "128Mi", "--disk", "1Gi"}, own()...)
		r := a.bridgectl(market, args...)
		a.cloud.Intercept(nil)
		if r.code == 0 || !strings.Contains(r.stderr, tc.want) || !strings.Contains(r.stderr, tc.message) {
			t.Errorf("%s: want %s and %q, got %s", tc.name, tc.want, tc.message, r.all())
		}
		launches := 0
		if tc.message != "" {
			launches = 1
		}
		launched := a.cloud.History()[before:]
		if len(launched) != launches {
			t.Errorf("%s: %d instances were launched, want %d", tc.name, len(launched), launches)
		}
		for _, i := range launched {
			a.tellsConsole(r, i.ID)
		}
		// The answer says that nothing is left, so it is gone by then.
		if err := nothing(a.left()); err != nil {
			t.Errorf("%s: left in the cloud: %v", tc.name, err)
		}
	}
}

// tellsConsole fails the test unless a failure was told with lines of an instance's
// console.
func (a *awsBridge) tellsConsole(r result, instance string) {
	a.t.Helper()
	m := a.cloud.Machine(instance)
	if m == nil {
		a.t.Fatalf("instance %s has no machine", instance)
	}
	_, block, _ := strings.Cut(r.stderr, "console:\n")
	told := 0
	for line := range strings.Lines(block) {
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "|")
		if !ok {
			break
		}
		if !bytes.Contains(m.Console(), []byte(strings.TrimSpace(line))) {
			a.t.Errorf("%s never had this on its console: %q", instance, line)
		}
		told++
	}
	if told < 3 {
		a.t.Errorf("%d lines of the console of %s are told: %s", told, instance, r.all())
	}
	if !strings.Contains(block, guestapi.VerdictPrefix) {
		a.t.Errorf("what is told of the console of %s lacks what the guest said: %s", instance, r.all())
	}
}

// nothing is an error if there is something.
func nothing(left []string) error {
	if len(left) > 0 {
		return errors.New(strings.Join(left, ", "))
	}
	return nil
}

// A reboot is none of the grant's ends, and a workload that ends by itself ends the
// instance: its exit code comes by the console.
func TestLongAnInstanceOutlivesAReboot(t *testing.T) {
	t.Parallel()
	a := newAWSBridge(t)
	p := a.provision(own()...)
	a.says(a.run(a.ssh(p, "requester", nil, "echo kept >/tmp/kept; sync")), 0, "")
	i := a.instance(p.Instance.id())
	if err := a.cloud.Machine(i.ID).Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.soon("the workload is back", func() error {
		r := a.run(a.ssh(p, "requester", []string{"-o", "ConnectTimeout=5"}, "cat /tmp/kept"))
		if r.code != 0 || r.stdout != "kept\n" {
			return errors.New(r.all())
		}
		return nil
	})
	if got := a.list(market); len(got) != 1 || got[0].State != "INSTANCE_STATE_READY" {
		t.Errorf("listed: %+v", got)
	}
	watch := a.start("watch", p.Instance.id(), "-o", "json")
	// The image's command is the guest's child.
	m, ok := a.cloud.Machine(i.ID).(*labvm.Machine)
	if !ok {
		t.Fatal("the instance has no machine")
	}
	out, err := m.Host().Exec(t.Context(), "sh", "-c", `main=$(systemctl show -P MainPID compute-bridge-workload.service) && kill -TERM "$(pgrep -x sh -P "$main,$(pgrep -d, -P "$main")")"`)
	if err != nil {
		t.Fatalf("end the workload: %v\n%s", err, out)
	}
	if code := watch.wait(); !strings.Contains(watch.output(), "END_REASON_WORKLOAD_EXITED") {
		t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
	if log := a.finalLog(p); log.Log.Exit.Reason != "END_REASON_WORKLOAD_EXITED" {
		t.Errorf("log: %+v", log.Log)
	}
	a.soon("the instance is gone", func() error { return nothing(a.left()) })
}

// With router and worker killed, the instance ends at its deadline all the same.
func TestLongTheDeadlineHoldsWithoutABridge(t *testing.T) {
	t.Parallel()
	a := newAWSBridge(t)
	p := a.provision("--for", "45s", "--ssh-key", "requester.pub")
	a.says(a.run(a.ssh(p, "requester", nil, "echo logged in")), 0, "logged in")
	for _, process := range append(a.all(), a.router) {
		if err := process.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), p.Receipt.ValidTo.Add(time.Minute))
	defer cancel()
	if err := poll(ctx, patience, func() error { return nothing(a.left()) }); err != nil {
		t.Errorf("a minute after the deadline: %v", err)
	}
	if ended := a.instance(p.Instance.id()).Terminated; ended.Before(p.Receipt.ValidTo) {
		t.Errorf("it ended at %v, before its deadline %v", ended, p.Receipt.ValidTo)
	}
	// The books are closed when somebody is there again.
	a.startWorker(a.workers[0])
	a.startRouter()
	a.waitForHealth("BACKEND_HEALTH_SERVING")
	if log := a.finalLog(p); log.Log.Exit.Reason != "END_REASON_DEADLINE" {
		t.Errorf("log: %+v", log.Log)
	}
}
