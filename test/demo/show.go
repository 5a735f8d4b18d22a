package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

const (
	bridgeID = "demo"
	// market is who calls the router; operator is who runs the bridge.
	market, operator = "market", "operator"
	// secondGrant is the length of the second grant. Making its instance takes
	// some of it.
	secondGrant = 12 * time.Second
	// grace is how long after its deadline an instance may still be seen ending:
	// the worker's stop_grace, and some.
	grace = 10 * time.Second
)

// show is the demo from the start to the end of the second grant.
func (d *demo) show(ctx context.Context, keep bool) error {
	for _, part := range []func(context.Context) error{d.startHost, d.startBridge, d.addImage} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	grant, err := d.firstGrant(ctx)
	if err != nil {
		return err
	}
	if keep {
		d.suggest(grant)
		<-ctx.Done()
		return nil
	}
	if err := d.end(ctx, grant); err != nil {
		return err
	}
	return d.deadline(ctx)
}

// startHost starts the lab host.
func (d *demo) startHost(ctx context.Context) error {
	d.step("A host")
	d.text("A Debian machine with systemd, sshd and podman, in namespaces of its own.")
	err := d.openLab(ctx)
	if err != nil {
		return err
	}
	if d.host, err = d.lab.StartHost(ctx, lab.HostOptions{}); err != nil {
		return err
	}
	if err := d.run(ctx, "lab", "-lab", d.lab.Name(), "status"); err != nil {
		return err
	}
	d.good("%s booted in %.1f s", d.host.Name, d.host.BootTime.Seconds())
	return nil
}

// openLab makes the lab's network, and the site in it.
func (d *demo) openLab(ctx context.Context) error {
	l, err := lab.Open(ctx, lab.Options{Log: d.output()})
	if err != nil {
		return err
	}
	d.lab = l
	// The lab's directory goes with the lab, even if nobody is left to clean up.
	d.site = &site.Site{Lab: d.lab, Bin: d.bin, Dir: d.lab.Dir() + "/demo", IP: "127.0.0.1"}
	return os.Mkdir(d.site.Dir, 0o700)
}

// startBridge makes certificates and configurations and starts router and
// worker.
func (d *demo) startBridge(ctx context.Context) error {
	d.step("The bridge: a bare-metal worker and a router, with mutual TLS")
	d.worker = d.site.Worker("baremetal", 0, site.Host{Host: d.host})
	if err := d.makeIdentities(ctx); err != nil {
		return err
	}
	if err := d.worker.WriteConfig(d.worker.Config(bridgeID, workerClients()...)); err != nil {
		return err
	}
	card, err := d.startProcesses(ctx)
	if err != nil {
		return err
	}
	return d.expect(card, "the card offers the host's region", bridgeID, "baremetal", "lab")
}

// workerClients are who may call the worker.
func workerClients() []site.Client {
	return []site.Client{
		{Identity: site.Identity("router"), Role: "reader", Router: true},
		{Identity: site.Identity(operator), Role: "operator"},
		{Identity: "unix:0", Role: "operator"},
	}
}

// makeIdentities shows the environment and makes certificates for all who take
// part.
func (d *demo) makeIdentities(ctx context.Context) error {
	var b strings.Builder
	fmt.Fprintf(&b, "cd %s\n", d.site.Dir)
	for _, line := range d.site.Environment(market) {
		name, value, _ := strings.Cut(line, "=")
		if name == "PATH" {
			value = d.bin + ":$PATH"
		}
		fmt.Fprintf(&b, "export %s=%s\n", name, value)
	}
	environment := b.String()
	if err := os.WriteFile(d.site.Path("env"), []byte(environment), 0o600); err != nil {
		return err
	}
	d.text("All that follows happens in the lab's network, with this environment:")
	d.command(d.bin + "/lab -lab " + d.lab.Name() + " shell")
	d.command(". " + d.site.Path("env"))
	_, _ = io.WriteString(d.output(), environment)

	for _, args := range d.site.CertCommands(
		[2]string{"router", "router"}, [2]string{d.worker.Name, "reader"}, [2]string{market, "client"}, [2]string{operator, "operator"},
	) {
		// The first two say all; the rest says it again.
		w := d.output()
		if args[1] == "issue" && args[3] != "router" {
			w = io.Discard
		}
		if _, err := d.execute(ctx, w, "bridgectl", args...); err != nil {
			return err
		}
	}
	return nil
}

// startProcesses starts worker and router, and returns the card that they offer.
func (d *demo) startProcesses(ctx context.Context) (string, error) {
	if err := d.site.WriteRouterConfig(d.site.RouterConfig(bridgeID, []site.Client{
		{Identity: site.Identity(market), Role: "client"}, {Identity: site.Identity(operator), Role: "operator"}, {Identity: "unix:0", Role: "operator"},
	}, d.worker)); err != nil {
		return "", err
	}
	if err := d.startWorker(ctx); err != nil {
		return "", err
	}
	if err := d.startRouter(ctx); err != nil {
		return "", err
	}
	if err := d.waitForBackend(ctx, "BACKEND_HEALTH_SERVING"); err != nil {
		return "", err
	}
	return d.outputOf(ctx, "bridgectl", "card")
}

// startRouter starts the router's process.
func (d *demo) startRouter(ctx context.Context) error {
	d.command("router -config router/router.toml &")
	start := time.Now()
	router, err := d.site.StartRouter(ctx)
	if err != nil {
		return err
	}
	d.processes = append(d.processes, router)
	d.good("the router serves after %.1f s, process %d", time.Since(start).Seconds(), router.PID())
	return nil
}

// startWorker starts the worker's process.
func (d *demo) startWorker(ctx context.Context) error {
	d.command(cmp.Or(d.worker.Program, "baremetal-worker") + " -config " + d.worker.Name + "/worker.toml &")
	start := time.Now()
	p, err := d.site.StartWorker(ctx, d.worker)
	if err != nil {
		return err
	}
	d.processes = append([]*site.Process{p}, d.processes...)
	d.good("the worker serves after %.1f s, process %d", time.Since(start).Seconds(), p.PID())
	return nil
}

// addImage puts the image into the store and makes the requester's key.
func (d *demo) addImage(ctx context.Context) error {
	d.step("An image and a requester")
	d.text("An OCI image goes into the operator's image store, under the SHA-256 of its archive.")
	if err := d.run(ctx, "mkdir", "-p", "images/sha256"); err != nil {
		return err
	}
	if err := d.run(ctx, "lab", "image", string(ociimage.Shell), "-o", "image.tar"); err != nil {
		return err
	}
	if err := d.run(ctx, "sh", "-c", `mv image.tar "images/sha256/$(sha256sum image.tar | cut -d' ' -f1)" && ls -s --human images/sha256`); err != nil {
		return err
	}
	d.text("\nThe requester's own key; the bridge sees its public half only.")
	return d.run(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "requester", "-f", "requester")
}

// provision sends a grant through the router and returns its id.
func (d *demo) provision(ctx context.Context, args ...string) (string, error) {
	images, err := os.ReadDir(d.site.Path("images", "sha256"))
	if err != nil || len(images) == 0 {
		return "", errors.Join(errors.New("no image in the store"), err)
	}
	args = append([]string{"provision", "--image-digest", "sha256:" + images[0].Name(), "--cpu", "500m", "--ram", "256Mi", "--disk", "1Gi", "--ssh-key", "requester.pub"}, args...)
	start := time.Now()
	out, err := d.outputOf(ctx, "bridgectl", args...)
	if err != nil {
		return "", err
	}
	id := regexp.MustCompile(`(?m)^\s*grant\s+([0-9a-f]{64})\s*$`).FindStringSubmatch(out)
	if id == nil {
		return "", errors.New("the receipt shows no grant id")
	}
	d.good("SSH answers %.1f s after the grant was sent", time.Since(start).Seconds())
	return id[1][:12], nil
}

// logIn runs a command in a grant's container with the stock client.
func (d *demo) logIn(ctx context.Context, grant, command string) (string, error) {
	if err := d.run(ctx, "sh", "-c", "bridgectl ssh-config "+grant+" > ssh_config"); err != nil {
		return "", err
	}
	config, err := os.ReadFile(d.site.Path("ssh_config"))
	if err != nil {
		return "", err
	}
	alias, _, _ := strings.Cut(strings.TrimPrefix(string(config), "Host "), "\n")
	return d.outputOf(ctx, "ssh", "-F", "ssh_config", alias, command)
}

// firstGrant makes an instance, logs in and lists it.
func (d *demo) firstGrant(ctx context.Context) (string, error) {
	d.step("A grant becomes a container to log in to")
	grant, err := d.provision(ctx, "--env", "GREETING=hello", "--for", "1h")
	if err != nil {
		return "", err
	}
	d.text("\nThe requester logs in with OpenSSH, which believes the receipt's host key and no other.")
	out, err := d.logIn(ctx, grant, `id; uname -sn; echo "$GREETING from a container"; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; ps`)
	if err != nil {
		return "", err
	}
	if err := d.expect(out, "the command ran in the container", "uid=", "hello from a container"); err != nil {
		return "", err
	}
	out, err = d.outputOf(ctx, "bridgectl", "list")
	if err != nil {
		return "", err
	}
	if err := d.expect(out, "the instance is listed", grant, "ready"); err != nil {
		return "", err
	}
	return grant, nil
}

// end ends a grant and shows what it used.
func (d *demo) end(ctx context.Context, grant string) error {
	d.step("The grant ends: usage and compute log")
	if err := d.run(ctx, "bridgectl", "terminate", grant); err != nil {
		return err
	}
	out, err := d.outputOf(ctx, "bridgectl", "logs", grant, "--verify")
	if err != nil {
		return err
	}
	if err := d.expect(out, "the compute log is final and its signature is good", "good", "CPU used", "terminated"); err != nil {
		return err
	}
	return d.nothingLeft(ctx)
}

// nothingLeft asks the host.
func (d *demo) nothingLeft(ctx context.Context) error {
	left, err := d.host.Leftovers(ctx, "image ")
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left on %s:\n\t%s", d.host.Name, strings.Join(left, "\n\t"))
	}
	d.good("nothing of the grant is left on %s: no unit, container, network, mount, firewall element, file or process; only the image is cached", d.host.Name)
	return nil
}

// deadline kills the worker while a grant runs.
func (d *demo) deadline(ctx context.Context) error {
	d.step("A deadline passes while the worker is dead")
	grant, err := d.provision(ctx, "--for", secondGrant.String())
	if err != nil {
		return err
	}
	deadline, err := d.validTo(ctx, grant)
	if err != nil {
		return err
	}
	worker := d.processes[0]
	if err := d.run(ctx, "kill", "-9", fmt.Sprint(worker.PID())); err != nil {
		return err
	}
	if _, err := worker.Wait(ctx); err != nil {
		return err
	}
	d.processes = d.processes[1:]
	if err := d.waitForBackend(ctx, "BACKEND_HEALTH_UNREACHABLE"); err != nil {
		return err
	}
	out, err := d.outputOf(ctx, "bridgectl", "backends")
	if err != nil {
		return err
	}
	if err := d.expect(out, "the router knows that the worker is gone", "unreachable"); err != nil {
		return err
	}
	if time.Until(deadline) > time.Second {
		if out, err = d.logIn(ctx, grant, "echo still here"); err != nil {
			return err
		}
		if err := d.expect(out, "the tenant doesn't notice", "still here"); err != nil {
			return err
		}
	}
	d.text("\nWaiting for the deadline, %s: %.0f s from now. No process of the bridge looks after the grant.",
		deadline.UTC().Format("15:04:05 MST"), time.Until(deadline).Seconds())
	if err := d.waitForEnd(ctx, deadline); err != nil {
		return err
	}
	d.text("\nWhat runs on the host by itself, looked at from outside:")
	for _, look := range []struct {
		text    string
		command []string
	}{
		{"units", []string{"systemctl", "list-units", "--all", "cb-*"}},
		{"containers", []string{"podman", "ps", "--all"}},
		{"networks", []string{"podman", "network", "ls"}},
		{"firewall", []string{"sh", "-c", "nft list ruleset | grep -c elements || true"}},
	} {
		if err := d.run(ctx, "lab", append([]string{"-lab", d.lab.Name(), "exec", d.host.Name, "--"}, look.command...)...); err != nil {
			return fmt.Errorf("%s: %w", look.text, err)
		}
	}
	left, err := d.host.Leftovers(ctx, "image ", "file ")
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left on %s after the deadline:\n\t%s", d.host.Name, strings.Join(left, "\n\t"))
	}
	d.good("nothing runs: no unit, container, network, mount, firewall element or process; the grant's directory keeps its figures for the worker")

	d.step("The worker comes back and closes the books")
	if err := d.startWorker(ctx); err != nil {
		return err
	}
	if err := d.waitForBackend(ctx, "BACKEND_HEALTH_SERVING"); err != nil {
		return err
	}
	if err := d.waitForLog(ctx, grant); err != nil {
		return err
	}
	if out, err = d.outputOf(ctx, "bridgectl", "logs", grant, "--verify"); err != nil {
		return err
	}
	if err := d.expect(out, "the compute log says how it ended and what it used", "deadline", "good", "CPU used"); err != nil {
		return err
	}
	if err := d.run(ctx, "bridgectl", "logs", "--verify"); err != nil {
		return err
	}
	return d.nothingLeft(ctx)
}

// suggest prints what to try while everything runs.
func (d *demo) suggest(grant string) {
	d.step("Left running for you, until Ctrl-C")
	d.text("In another terminal:\n")
	for _, line := range []string{
		d.bin + "/lab -lab " + d.lab.Name() + " shell",
		". " + d.site.Path("env"),
		"bridgectl card",
		"bridgectl list",
		"bridgectl watch " + grant,
		"bridgectl ssh " + grant,
		"bridgectl scp " + grant + " env :/tmp/",
		"bridgectl provision --image-digest sha256:$(ls images/sha256) --cpu 500m --ram 256Mi --disk 1Gi --for 1h --seal",
		"bridgectl terminate " + grant,
		"bridgectl logs --verify",
		"tail -f router.log " + d.worker.Name + ".log",
		"ssh -F ssh_config grant-" + grant,
	} {
		_, _ = fmt.Fprintln(d.output(), d.paint("1", line))
	}
	d.text("\nWith grpcurl (make tools builds it, into .bin):\n")
	flags := "-cacert certs/ca.pem -cert certs/market/cert.pem -key certs/market/key.pem"
	for _, line := range []string{
		"grpcurl " + flags + " " + d.site.RouterAddr() + " list",
		"grpcurl " + flags + " " + d.site.RouterAddr() + " computebridge.v1.BackendService/Capabilities",
		"grpcurl " + flags + " " + d.site.RouterAddr() + " computebridge.v1.InventoryService/ListInstances",
		"grpcurl -plaintext -unix $PWD/router/router.sock computebridge.v1.FleetService/ListBackends",
		"grpcurl -plaintext -unix $PWD/" + d.worker.Name + "/worker.sock computebridge.v1.InventoryService/ListComputeLogs",
	} {
		_, _ = fmt.Fprintln(d.output(), d.paint("1", line))
	}
}

// --- Helpers ---------------------------------------------------------------

// run shows and runs a command; it fails if the command does.
func (d *demo) run(ctx context.Context, program string, args ...string) error {
	_, err := d.execute(ctx, d.output(), program, args...)
	return err
}

// outputOf is run, and returns what was printed.
func (d *demo) outputOf(ctx context.Context, program string, args ...string) (string, error) {
	return d.execute(ctx, d.output(), program, args...)
}

// execute shows a command and runs it as the market, with its output to w too.
func (d *demo) execute(ctx context.Context, w io.Writer, program string, args ...string) (string, error) {
	line := quote(append([]string{program}, args...))
	if program == "sh" && len(args) == 2 && args[0] == "-c" {
		line = args[1]
	}
	d.command(line)
	captured := &lockedWriter{w: w}
	cmd := d.prepare(ctx, market, program, args...)
	cmd.Stdout, cmd.Stderr = captured, captured
	if err := cmd.Run(); err != nil {
		return captured.text.String(), fmt.Errorf("%s: %w", line, err)
	}
	return captured.text.String(), nil
}

// prepare returns a command that an interrupt ends in order.
func (d *demo) prepare(ctx context.Context, identity, program string, args ...string) *exec.Cmd {
	cmd := d.site.Command(ctx, identity, program, args...)
	// Ctrl-C reaches us alone, so that the command gets one signal, not two.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// lockedWriter keeps what it passes on. Output and error go through one.
type lockedWriter struct {
	mu   sync.Mutex // protects the fields below
	w    io.Writer
	text strings.Builder
}

// Write implements io.Writer.
func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	return l.w.Write(p)
}

// expect checks that an output has all these texts.
func (d *demo) expect(output, what string, texts ...string) error {
	for _, text := range texts {
		if !strings.Contains(output, text) {
			return fmt.Errorf("expected that %s, but the output above lacks %q", what, text)
		}
	}
	d.good("%s", what)
	return nil
}

// query asks for JSON, not shown.
func (d *demo) query(ctx context.Context, into any, args ...string) error {
	out, err := d.prepare(ctx, operator, "bridgectl", append(args, "-o", "json")...).Output()
	if err != nil {
		return fmt.Errorf("bridgectl %s: %w", strings.Join(args, " "), err)
	}
	return json.Unmarshal(out, into)
}

// validTo returns a grant's deadline.
func (d *demo) validTo(ctx context.Context, grant string) (time.Time, error) {
	var list struct {
		Instances []struct {
			Handle  string    `json:"handle"`
			ValidTo time.Time `json:"valid_to"`
		} `json:"instances"`
	}
	if err := d.query(ctx, &list, "list"); err != nil {
		return time.Time{}, err
	}
	for _, i := range list.Instances {
		if strings.Contains(i.Handle, "/"+grant) {
			return i.ValidTo, nil
		}
	}
	return time.Time{}, fmt.Errorf("grant %s isn't listed", grant)
}

// waitForBackend waits until the router says so of the worker.
func (d *demo) waitForBackend(ctx context.Context, health string) error {
	return d.wait(ctx, 20*time.Second, "the router to see "+health, func() (bool, error) {
		var list struct {
			Backends []struct {
				Health string `json:"health"`
			} `json:"backends"`
		}
		err := d.query(ctx, &list, "backends")
		return err == nil && len(list.Backends) == 1 && list.Backends[0].Health == health, err
	})
}

// waitForLog waits until a grant's final compute log is there.
func (d *demo) waitForLog(ctx context.Context, grant string) error {
	return d.wait(ctx, 20*time.Second, "the final compute log", func() (bool, error) {
		var list struct {
			ComputeLogs []struct {
				Log struct {
					Final bool `json:"final"`
				} `json:"log"`
			} `json:"compute_logs"`
		}
		if err := d.query(ctx, &list, "logs", grant); err != nil {
			return false, nil //nolint:nilerr // There is none yet.
		}
		return len(list.ComputeLogs) == 1 && list.ComputeLogs[0].Log.Final, nil
	})
}

// waitForEnd waits until the host runs nothing of a grant any more.
func (d *demo) waitForEnd(ctx context.Context, deadline time.Time) error {
	return d.wait(ctx, time.Until(deadline)+grace, "the grant to end by itself", func() (bool, error) {
		left, err := d.host.Leftovers(ctx, "image ", "file ")
		return err == nil && len(left) == 0, err
	})
}

// wait polls until done says yes.
func (d *demo) wait(ctx context.Context, limit time.Duration, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited in vain for %s", what), err)
		}
	}
}
