package e2e

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func newHost(t *testing.T, maxInstances int) site.Host {
	t.Helper()
	return site.Host{Host: lab.NewHost(t, lab.HostOptions{}), MaxInstances: maxInstances}
}

// A worker that is stopped leaves tenants running, and the next one knows them.
func TestAStoppedWorkerLeavesTenantsToTheNext(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	p := b.provision(own()...)
	watch := b.start("watch", p.Instance.id())
	b.soon("the watch has begun", func() error { return hasText(watch.output(), "ready") })
	shell := b.startCmd(b.ssh(p, "requester", nil, "while echo alive; do sleep 1; done"))
	b.soon("the shell runs", func() error { return hasText(shell.output(), "alive") })

	w := b.workers[0]
	if code, err := b.processes[w.Name].Stop(t.Context()); code != 0 || err != nil {
		t.Fatalf("exit code %d after SIGTERM, %v", code, err)
	}
	b.waitForHealth("BACKEND_HEALTH_UNREACHABLE")
	before := strings.Count(shell.output(), "alive")
	b.soon("the shell goes on", func() error {
		if strings.Count(shell.output(), "alive") < before+2 {
			return errors.New("it doesn't")
		}
		return nil
	})
	shell.kill()
	b.startWorker(w)
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	got := b.list(market)
	if len(got) != 1 || got[0].InstanceID != p.Instance.InstanceID || got[0].State != "INSTANCE_STATE_READY" || got[0].Attempt != 1 {
		t.Errorf("adopted: %+v", got)
	}
	var again provisioned
	b.json(&again, market, "provision", "--again", p.Instance.id())
	if again.Receipt.HostKey != p.Receipt.HostKey || again.Receipt.Port != p.Receipt.Port {
		t.Errorf("another receipt: %+v, before %+v", again.Receipt, p.Receipt)
	}
	b.says(b.run(b.ssh(p, "requester", nil, "echo still here")), 0, "still here")
	b.terminate(p)
	// The router attached to the next worker, and the watch goes on.
	if code := watch.wait(); code != 0 || !strings.Contains(watch.output(), "terminated") {
		t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
}

// hasText is an error unless a text is there.
func hasText(text, want string) error {
	if !strings.Contains(text, want) {
		return fmt.Errorf("no %q in:\n%s", want, text)
	}
	return nil
}

// lateLimit is how long after its deadline an instance may go on.
const lateLimit = 15 * time.Second

// A deadline that passes while the worker is dead ends the instance, and the
// next worker closes the books.
func TestADeadlineWhileTheWorkerIsDead(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	p := b.provision("--for", "20s", "--ssh-key", "requester.pub")
	w := b.workers[0]
	if err := b.processes[w.Name].Kill(); err != nil {
		t.Fatal(err)
	}
	b.waitForHealth("BACKEND_HEALTH_UNREACHABLE")
	if card := b.ok(market, "card"); !strings.Contains(card, "stale") {
		t.Errorf("the card isn't stale:\n%s", card)
	}
	b.says(b.run(b.ssh(p, "requester", nil, "echo still here")), 0, "still here")
	b.refused(market, 5, []string{"BACKEND_UNREACHABLE"}, b.grantArgs(own("--timeout", "2s")...)...)
	b.soon("the host has ended it by itself", func() error {
		left, err := b.hosts[0].Leftovers(t.Context(), "image ", "file ")
		if err == nil && len(left) > 0 {
			err = errors.New(strings.Join(left, "\n"))
		}
		return err
	})
	if late := time.Since(p.Receipt.ValidTo); late < 0 || late > lateLimit {
		t.Errorf("it ended %s after its deadline", late)
	}
	b.startWorker(w)
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	log := b.finalLog(p).Log
	if log.Exit.Reason != "END_REASON_DEADLINE" || log.Usage["cpu_core_milliseconds"].Source != "USAGE_SOURCE_HOST_MEASURED" {
		t.Errorf("log: %+v", log)
	}
	if late := log.EndedAt.Sub(p.Receipt.ValidTo); late < -time.Second || late > lateLimit {
		t.Errorf("the log says that it ended %s after its deadline", late)
	}
	b.refused(market, 8, []string{"GRANT_ENDED"}, "provision", "--again", p.Instance.id())
}

// A router holds no instance: it can die at any moment.
func TestARouterDiesWhileAGrantIsMadeAndWatched(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	big, err := b.AddImage(t.Context(), ociimage.Big)
	if err != nil {
		t.Fatal(err)
	}
	b.image = big
	worker := b.processes[b.workers[0].Name]
	making := b.start(b.grantArgs(own("-o", "json", "--timeout", "5m")...)...)
	b.soon("the worker is at it", func() error { return hasText(worker.LogTail(), "Provisioning") })
	if err := b.router.Kill(); err != nil {
		t.Fatal(err)
	}
	b.startRouter()
	if code := making.wait(); code != 0 {
		t.Fatalf("provision: exit code %d:\n%s", code, making.output())
	}
	list := b.list(market)
	if len(list) != 1 || list[0].State != "INSTANCE_STATE_READY" {
		t.Fatalf("listed: %+v", list)
	}
	units, err := b.hosts[0].Exec(t.Context(), "systemctl", "list-units", "--plain", "--no-legend", "cb-e2e-*.service")
	if err != nil || strings.Count(units, ".service ") != 1 {
		t.Errorf("units of the grant on the host: %v\n%s", err, units)
	}

	watch := b.start("watch", list[0].id())
	b.soon("the watch has begun", func() error { return hasText(watch.output(), "ready") })
	if err := b.router.Kill(); err != nil {
		t.Fatal(err)
	}
	b.soon("the watch has noticed", func() error { return hasText(watch.output(), "taking it up again") })
	b.startRouter()
	b.ok(market, "terminate", list[0].id())
	if code := watch.wait(); code != 0 || !strings.Contains(watch.output(), "terminated") {
		t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
}

// An interrupted provision takes the grant back.
func TestAnInterruptedProvisionLeavesNothing(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	big, err := b.AddImage(t.Context(), ociimage.Big)
	if err != nil {
		t.Fatal(err)
	}
	b.image = big
	worker := b.processes[b.workers[0].Name]
	making := b.start(b.grantArgs(own()...)...)
	b.soon("the worker is at it", func() error { return hasText(worker.LogTail(), "Provisioning") })
	if err := making.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := making.wait(); code != 130 {
		t.Errorf("exit code %d:\n%s", code, making.output())
	}
	b.soon("nothing is listed", func() error {
		if got := b.list(market); len(got) != 0 {
			return fmt.Errorf("listed: %+v", got)
		}
		return nil
	})
}
