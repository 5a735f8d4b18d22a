package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// sweepReport is what `baremetal-worker sweep -output json` prints.
type sweepReport struct {
	Findings []struct {
		Grant  string   `json:"grant"`
		Where  []string `json:"where"`
		Why    string   `json:"why"`
		Action string   `json:"action"`
		Result string   `json:"result"`
		Error  string   `json:"error"`
	} `json:"findings"`
	Blind    []string `json:"blind"`
	ExitCode int      `json:"exit_code"`
}

// actions are what was found, as "action result" by grant.
func (r sweepReport) actions() map[string]string {
	all := map[string]string{}
	for _, f := range r.Findings {
		all[f.Grant] = f.Action + " " + f.Result
	}
	return all
}

// sweep runs the worker's janitor to its end.
func (b *bridge) sweep(code int, args ...string) sweepReport {
	b.t.Helper()
	args = append([]string{"sweep", "--once", "-config", b.workers[0].ConfigFile(), "-pause", "500ms", "-output", "json"}, args...)
	r := b.run(b.cmd(market, "baremetal-worker", args...))
	if r.code != code {
		b.t.Fatalf("sweep %v: want exit code %d, got %s", args, code, r.all())
	}
	var report sweepReport
	if r.stdout != "" {
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.ExitCode != code {
			b.t.Fatalf("%v in %s", err, r.all())
		}
	}
	return report
}

// sweeping makes worker configurations patient for seconds only.
func (b *bridge) sweeping() {
	b.t.Helper()
	w := b.workers[0]
	text := strings.Replace(b.workerConfig(w), "[sweep]\n", "[sweep]\ngrace = \"3s\"\n", 1)
	b.write(w.ConfigFile(), text)
}

// holdings is all that the first host has of bridges: files, units, containers,
// firewall. Numbers that a running grant counts are left out.
func (b *bridge) holdings() string {
	b.t.Helper()
	text, err := b.hosts[0].Exec(b.t.Context(), "sh", "-c", `
		find /var/lib/compute-bridge /run/compute-bridge -not -path '*/disk/*' -not -path '*/podman/*' -printf '%p %y %s %T@\n' | grep -v '/lease \|console.log\|disk.img\|\.lock ' | sort
		systemctl list-units --all --plain --no-legend 'cb-*' | sort
		systemctl is-active podman.socket
		nft --stateless list ruleset | sed -E 's/expires [^ ,}]+//g; s/counter packets [0-9]+ bytes [0-9]+//g'
		ip -o link | grep -o 'cbg[0-9a-f]*' | sort`)
	if err != nil {
		b.t.Fatal(err)
	}
	return text
}

// of says whether the first host has a unit or a directory of a grant.
func (b *bridge) of(bridge, id string) (unit, dir bool) {
	b.t.Helper()
	text, err := b.hosts[0].Exec(b.t.Context(), "sh", "-c", `systemctl list-units --all --plain --no-legend "cb-$1-$2-*" | grep -q . && echo unit; test -e "/var/lib/compute-bridge/$1/grants/$2" && echo dir; true`, "sh", bridge, id)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.Contains(text, "unit"), strings.Contains(text, "dir")
}

// With every process of the bridge dead, the janitor collects every kind of
// orphan and writes what has ended; what lives, what is another bridge's, and
// everything while it is blind, stays as it is.
func TestTheJanitorWithEverythingDead(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	w, h := b.workers[0], b.hosts[0]
	if err := b.processes[w.Name].Kill(); err != nil {
		t.Fatal(err)
	}
	b.sweeping()
	b.startWorker(w)
	b.waitForHealth("BACKEND_HEALTH_SERVING")

	live := b.provision(own()...)
	shell := b.image
	configured, err := b.AddImage(t.Context(), ociimage.Configured)
	if err != nil {
		t.Fatal(err)
	}
	b.image = configured
	exits := b.provision(own()...)
	b.image = shell
	closed := b.provision(own()...)
	expires := b.provision("--for", "45s", "--ssh-key", "requester.pub")

	// Of another bridge, whose name begins with ours: as far past its deadline as
	// anything can be.
	foreign := strings.Repeat("ab", 32)
	unit := "cb-e2e-2-" + foreign + "-1.service"
	if _, err := h.Exec(t.Context(), "sh", "-c", `dir=/var/lib/compute-bridge/e2e-2/grants/$1
		mkdir -p "$dir" && sed "s/$2/$1/g" /var/lib/compute-bridge/e2e/grants/$2/grant.json | sed 's/"valid_to": "20[0-9]*/"valid_to": "2001/' >"$dir/grant.json"
		grep -q '"valid_to": "2001' "$dir/grant.json" && systemd-run --quiet --collect --unit="$3" sleep 900`, "sh", foreign, live.Instance.id(), unit); err != nil {
		t.Fatal(err)
	}

	// Half made: the worker dies while it is at it.
	big, err := b.AddImage(t.Context(), ociimage.Big)
	if err != nil {
		t.Fatal(err)
	}
	b.image = big
	half := strings.Repeat("cd", 32)
	making := b.start(b.grantArgs(own("--request-id", half, "--timeout", "5m")...)...)
	// The image comes first, and takes long on a machine with much to do.
	err = poll(t.Context(), 3*patience, func() error {
		if _, dir := b.of("e2e", half); !dir {
			return errors.New("nothing")
		}
		return nil
	})
	if err != nil {
		t.Fatalf("the host has %v of it:\n%s", err, making.output())
	}
	if err := errors.Join(b.processes[w.Name].Kill(), b.router.Kill()); err != nil {
		t.Fatal(err)
	}
	// On a machine with so much to do that the worker saw the deadline pass, it
	// has ended that grant itself.
	expired := !time.Now().Before(expires.Receipt.ValidTo)
	making.kill()
	b.image = shell

	// Closed: the worker died when it had written that and nothing else.
	store, err := ledger.Open(t.Context(), ledger.Config{Path: b.Path(w.Name, "ledger.db")})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = store.CloseGrant(t.Context(), ledger.Closure{RequestID: ledger.RequestID(closed.Instance.RequestID), Reason: backend.EndTerminated.String()})
	if err := errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}

	// And one ends by itself with nobody there.
	root := exits // Only root of the container may: the workload has a user of its own.
	root.Receipt.User = "root"
	b.run(b.ssh(root, "requester", nil, "killall sleep")) // The end that it brings may cut the session off.
	b.soon("it has ended", func() error {
		if unit, _ := b.of("e2e", exits.Instance.id()); unit {
			return errors.New("it runs")
		}
		return nil
	})
	err = poll(t.Context(), 3*patience, func() error {
		if late := time.Since(expires.Receipt.ValidTo); late < 4*time.Second {
			return fmt.Errorf("%s to go", 4*time.Second-late)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	// Dry, until the youngest is old enough; then nothing has changed.
	want := map[string]string{
		exits.Instance.id(): "finish", expires.Instance.id(): "end", closed.Instance.id(): "end", half: "undo",
	}
	if expired {
		delete(want, expires.Instance.id())
	}
	b.soon("what expired has ended", func() error {
		if unit, _ := b.of("e2e", expires.Instance.id()); unit {
			return errors.New("its unit is still there")
		}
		return nil
	})
	before := b.holdings()
	b.soon("all of it counts as orphaned", func() error {
		got := b.sweep(0, "-dry-run").actions()
		for id, action := range want {
			if got[id] != action+" would_be_done" {
				return fmt.Errorf("found %v", got)
			}
		}
		return nil
	})
	if after := b.holdings(); after != before {
		t.Errorf("a dry run changed something:\n%s\nbefore:\n%s", after, before)
	}

	// Blind: nothing at all.
	blind := func(what string, prepare, undo func() error, code int) {
		t.Helper()
		if err := prepare(); err != nil {
			t.Fatal(err)
		}
		report := b.sweep(code)
		if err := undo(); err != nil {
			t.Fatal(err)
		}
		for id, action := range report.actions() {
			if !strings.HasSuffix(action, " blind") {
				t.Errorf("%s: %s: %s", what, id, action)
			}
		}
		if after := b.holdings(); after != before {
			t.Errorf("%s: it changed something:\n%s\nbefore:\n%s", what, after, before)
		}
	}
	config := b.read(w.Name, "worker.toml")
	b.write(w.ConfigFile(), strings.Replace(config, "[backend]\n", "[backend]\nconnect_timeout = \"3s\"\n", 1))
	blind("the host is cut off", func() error { return h.CutOff(t.Context()) }, func() error { return h.Restore(t.Context()) }, 3)
	b.write(w.ConfigFile(), config)
	blind("the host's clock is off", func() error { return h.SetClockSkew(t.Context(), time.Hour) }, func() error { return h.SetClockSkew(t.Context(), 0) }, 3)
	file := b.Path(w.Name, "ledger.db")
	blind("the ledger is missing", func() error { return os.Rename(file, file+".away") }, func() error { return os.Rename(file+".away", file) }, 3)

	// In earnest.
	report := b.sweep(0)
	got := report.actions()
	for id, action := range want {
		if got[id] != action+" done" {
			t.Errorf("grant %s: %q, want %s done", id, got[id], action)
		}
		if unit, dir := b.of("e2e", id); unit || dir {
			t.Errorf("grant %s: unit %t, directory %t", id, unit, dir)
		}
	}
	if _, found := got[live.Instance.id()]; found || len(got) != len(want) {
		t.Errorf("found %v, want %v", got, want)
	}
	b.says(b.run(b.ssh(live, "requester", nil, "echo still here")), 0, "still here")
	if unit, dir := b.of("e2e-2", foreign); !unit || !dir {
		t.Errorf("of the other bridge: unit %t, directory %t", unit, dir)
	}
	if again := b.sweep(0); len(again.Findings) > 0 {
		t.Errorf("the next run finds %v", again.actions())
	}

	// The next worker has the logs, and knows that nothing is left to do.
	b.startWorker(w)
	b.startRouter()
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	for p, reason := range map[*provisioned]string{
		&exits: "END_REASON_WORKLOAD_EXITED", &expires: "END_REASON_DEADLINE", &closed: "END_REASON_TERMINATED",
	} {
		log := b.finalLog(*p).Log
		if log.Exit.Reason != reason || log.Usage["cpu_core_milliseconds"].Source != "USAGE_SOURCE_HOST_MEASURED" {
			t.Errorf("grant %s ended by %s, want %s: %+v", p.Instance.id(), log.Exit.Reason, reason, log)
		}
	}
	b.refused(market, 8, []string{"GRANT_ENDED"}, "provision", "--again", exits.Instance.id())
	b.ok(market, "terminate", half)
	b.terminate(live)
	if _, err := h.Exec(t.Context(), "sh", "-c", `systemctl stop "$1" && rm -r /var/lib/compute-bridge/e2e-2`, "sh", unit); err != nil {
		t.Fatal(err)
	}
}

// Beside a worker that lives, over and over, the janitor neither touches what
// runs nor what is being made.
func TestTheJanitorBesideALiveWorker(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	w := b.workers[0]
	live := b.provision(own()...)
	big, err := b.AddImage(t.Context(), ociimage.Big)
	if err != nil {
		t.Fatal(err)
	}
	b.image = big
	// The last of the worker's lines that says so: older ones leave the tail.
	provisioning := func() (last string) {
		for line := range strings.Lines(b.processes[w.Name].LogTail()) {
			if strings.Contains(line, `"Provisioning"`) {
				last = line
			}
		}
		return last
	}
	made := make([]provisioned, 3)
	for i := range made {
		before := provisioning()
		making := b.start(b.grantArgs(own("-o", "json", "--timeout", "5m")...)...)
		b.soon("the worker is at it", func() error {
			if last := provisioning(); last == "" || last == before {
				return errors.New("not yet")
			}
			return nil
		})
		for over := false; !over; {
			select {
			case err := <-making.done:
				making.done <- err
				over = true
			default:
				b.sweepBeside()
			}
		}
		if code := making.wait(); code != 0 {
			t.Fatalf("provision: exit code %d:\n%s", code, making.output())
		}
		text := making.output()
		if err := json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &made[i]); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
	}
	b.says(b.run(b.ssh(live, "requester", nil, "echo still here")), 0, "still here")
	for _, p := range append(slices.Clone(made), live) {
		if p.Instance.Attempt != 1 {
			t.Errorf("grant %s is at attempt %d", p.Instance.id(), p.Instance.Attempt)
		}
		watch := b.start("terminate", p.Instance.id())
		b.sweepBeside()
		if code := watch.wait(); code != 0 {
			t.Errorf("terminate: exit code %d:\n%s", code, watch.output())
		}
		if log := b.finalLog(p).Log; log.Exit.Reason != "END_REASON_TERMINATED" || log.Usage["cpu_core_milliseconds"].Source != "USAGE_SOURCE_HOST_MEASURED" {
			t.Errorf("log: %+v", log)
		}
	}
}

// sweepBeside is a run of the janitor that must find nothing to do: a host that
// a worker holds may count as one that it may not touch.
func (b *bridge) sweepBeside() {
	b.t.Helper()
	r := b.run(b.cmd(market, "baremetal-worker", "sweep", "-once", "-config", b.workers[0].ConfigFile(), "-pause", "100ms", "-output", "json"))
	var report sweepReport
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || (r.code != 0 && r.code != 3) {
		b.t.Fatalf("%v: %s", err, r.all())
	}
	if len(report.Findings) > 0 {
		b.t.Fatalf("it found %+v", report.Findings)
	}
}

// While the ledger can't be read, wherever that begins, the janitor doesn't know
// what lives: it does nothing, and says so by its exit code and in words.
func TestTheJanitorWithoutItsPostgreSQL(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{})
	tap := pgtest.NewTap(t, server)
	b := newSite(t, site.Host{Host: lab.NewHost(t, lab.HostOptions{})})
	w, direct := b.workers[0], server.Database(t)
	w.Ledger = fmt.Sprintf("driver = \"postgres\"\ndsn = %q\n", tap.DSN(direct))
	b.sweeping()
	var err error
	if b.image, err = b.AddImage(t.Context(), ociimage.Shell); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.checkEnd)
	b.startWorker(w)
	b.startRouter()
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	live, closed := b.provision(own()...), b.provision(own()...)
	if err := errors.Join(b.processes[w.Name].Kill(), b.router.Kill()); err != nil {
		t.Fatal(err)
	}
	store, err := ledger.Open(t.Context(), ledger.Config{Driver: ledger.DriverPostgres, DSN: direct})
	if err != nil {
		t.Fatal(err)
	}
	err = ledgertest.CloseGrant(t.Context(), store, ledger.RequestID(closed.Instance.RequestID), backend.EndTerminated.String())
	if err := errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{closed.Instance.id(): "end would_be_done"}
	b.soon("it counts as orphaned", func() error {
		if got := b.sweep(0, "-dry-run").actions(); !maps.Equal(got, want) {
			return fmt.Errorf("found %v", got)
		}
		return nil
	})
	before := b.holdings()
	// Each look reads as much of the ledger as the other, a dry run no less.
	const reads = "ledger.SELECT closures"
	calls := tap.Record()
	b.sweep(0, "-dry-run")
	all := slices.DeleteFunc(calls(), func(c ledgertest.Call) bool { return c.Point != reads })
	if len(all) < 2 || len(all)%2 != 0 {
		t.Fatalf("two looks read closures %d times", len(all))
	}

	for _, c := range []struct {
		what string
		// fault lasts until mend.
		fault func() (mend func())
		says  string
	}{
		{"the server is stopped", func() func() {
			server.Stop(t)
			return func() { server.Start(t) }
		}, "open ledger: ledger unavailable"},
		{"the server is silent", func() func() {
			tap.Blackhole(true)
			return func() { tap.Blackhole(false) }
		}, "timeout"},
		{"the server goes away between the two looks", func() func() {
			return tap.Inject(ledgertest.Fault{Point: reads, Nth: len(all)/2 + 1, Kind: ledgertest.Refuse, Always: true}).Release
		}, "read closure: ledger unavailable"},
	} {
		mend := c.fault()
		r := b.run(b.cmd(market, "baremetal-worker", "sweep", "-once", "-config", w.ConfigFile(), "-pause", "100ms", "-output", "json"))
		mend()
		if r.code != 3 || r.stdout != "" || !strings.Contains(r.stderr, "nothing is touched while blind") || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%s: want exit code 3, no report, and %q as the reason, got %s", c.what, c.says, r.all())
		}
		if after := b.holdings(); after != before {
			t.Errorf("%s: it changed something:\n%s\nbefore:\n%s", c.what, after, before)
		}
	}

	// It was the ledger that kept it from its work.
	if got := b.sweep(0).actions(); len(got) != 1 || got[closed.Instance.id()] != "end done" {
		t.Errorf("with the ledger there again: %v", got)
	}
	b.says(b.run(b.ssh(live, "requester", nil, "echo still here")), 0, "still here")
	b.startWorker(w)
	b.startRouter()
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	b.terminate(live)
}
