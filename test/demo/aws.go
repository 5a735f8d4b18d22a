package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/internal/awssite"
)

const (
	// awsGrant is the length of the grant that nobody watches. Its instance boots
	// meanwhile.
	awsGrant = 40 * time.Second
	// awsGrace is how long after its deadline an instance may still be seen.
	awsGrace = time.Minute
)

// showAWS is the demo of the AWS worker.
func (d *demo) showAWS(ctx context.Context, keep bool) error {
	for _, part := range []func(context.Context) error{d.startCloud, d.startAWSBridge, d.addImage} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	grant, err := d.firstInstance(ctx)
	if err != nil {
		return err
	}
	if keep {
		d.suggest(grant)
		<-ctx.Done()
		return nil
	}
	if err := d.endInstance(ctx, grant); err != nil {
		return err
	}
	return d.awsDeadline(ctx)
}

// startCloud starts the simulator.
func (d *demo) startCloud(ctx context.Context) error {
	d.step("A cloud")
	d.text("A simulator of EC2, to which the worker's own AWS SDK speaks over HTTP. Its delays are a tenth\n" +
		"of the real ones. Its instances are machines in namespaces of their own, which boot Debian's\n" +
		"systemd and Debian's cloud-init; that finds its user-data at 169.254.169.254, as on EC2.")
	if err := d.openLab(ctx); err != nil {
		return err
	}
	var err error
	if d.cloud, err = awssite.Open(ctx, d.site, d.output()); err != nil {
		return err
	}
	d.good("the cloud answers at %s", d.cloud.Endpoint)
	return nil
}

// startAWSBridge makes certificates and configurations and starts router and
// worker.
func (d *demo) startAWSBridge(ctx context.Context) error {
	d.step("The bridge: an AWS worker and a router, with mutual TLS")
	d.worker = d.cloud.Worker("aws", 0)
	if err := d.makeIdentities(ctx); err != nil {
		return err
	}
	if err := d.worker.WriteConfig(d.cloud.Config(d.worker, bridgeID, workerClients()...)); err != nil {
		return err
	}
	if err := os.WriteFile(d.cloud.CredentialsFile(d.worker), []byte(d.cloud.Credentials()), 0o600); err != nil {
		return err
	}
	if err := d.run(ctx, "sed", "-n", `/^\[backend\]/,$p`, d.worker.Name+"/worker.toml"); err != nil {
		return err
	}
	card, err := d.startProcesses(ctx)
	if err != nil {
		return err
	}
	return d.expect(card, "the card offers the cloud's region", bridgeID, "aws", awssite.Region)
}

// firstInstance makes an instance, logs in and lists it.
func (d *demo) firstInstance(ctx context.Context) (string, error) {
	d.step("A grant becomes an instance of EC2 to log in to")
	grant, err := d.provision(ctx, "--env", "GREETING=hello", "--for", "1h")
	if err != nil {
		return "", err
	}
	d.text("\nWhat the cloud has:")
	d.showCloud()
	d.text("\nThe requester logs in with OpenSSH, which believes the receipt's host key and no other.")
	out, err := d.logIn(ctx, grant, `id; uname -sn; echo "$GREETING from an instance"; ps`)
	if err != nil {
		return "", err
	}
	if err := d.expect(out, "the command ran in the grant's image", "uid=", "hello from an instance"); err != nil {
		return "", err
	}
	out, err = d.outputOf(ctx, "bridgectl", "list")
	if err != nil {
		return "", err
	}
	if err := d.expect(out, "the instance is listed", grant, "ready"); err != nil {
		return "", err
	}
	d.text("\nThe end of the instance's console, which GetConsoleOutput gives the worker if a boot fails:")
	// The guest says so a moment after its SSH has opened.
	var console []byte
	err = d.wait(ctx, awsGrace, "the guest's verdict", func() (bool, error) {
		console = d.lastConsole()
		return bytes.Contains(console, []byte(`"phase":"ready"`)), nil
	})
	if err != nil {
		return "", err
	}
	if _, err := d.output().Write(console); err != nil {
		return "", err
	}
	d.good("the guest says that the workload runs")
	return grant, nil
}

// showCloud shows the cloud's instances.
func (d *demo) showCloud() {
	table := tabwriter.NewWriter(d.output(), 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "INSTANCE\tTYPE\tZONE\tSTATE\tADDRESS\tNAME")
	for _, i := range d.cloud.Instances() {
		addr := "-"
		if i.Addr.IsValid() {
			addr = i.Addr.String()
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", i.ID, i.Type, i.Zone, i.State, addr, i.Tags["Name"])
	}
	_ = table.Flush() // a screen
}

// lastConsole returns the last lines of the running instance's console.
func (d *demo) lastConsole() []byte {
	for _, i := range d.cloud.Instances() {
		m := d.cloud.Machine(i.ID)
		if i.State != ec2sim.StateRunning || m == nil {
			continue
		}
		lines := bytes.Split(bytes.TrimSpace(bytes.ReplaceAll(m.Console(), []byte("\r"), nil)), []byte("\n"))
		return append(bytes.Join(lines[max(0, len(lines)-8):], []byte("\n")), '\n')
	}
	return nil
}

// endInstance ends a grant and shows what it used.
func (d *demo) endInstance(ctx context.Context, grant string) error {
	d.step("The grant ends: usage and compute log")
	if err := d.run(ctx, "bridgectl", "terminate", grant); err != nil {
		return err
	}
	if err := d.waitForLog(ctx, grant); err != nil {
		return err
	}
	out, err := d.outputOf(ctx, "bridgectl", "logs", grant, "--verify")
	if err != nil {
		return err
	}
	if err := d.expect(out, "the compute log is final and its signature is good", "good", "terminated"); err != nil {
		return err
	}
	return d.nothingInCloud()
}

// nothingInCloud looks at what costs money.
func (d *demo) nothingInCloud() error {
	d.text("\nWhat the cloud has:")
	d.showCloud()
	if left := d.leftInCloud(); len(left) > 0 {
		return errors.New("left in the cloud:\n\t" + strings.Join(left, "\n\t"))
	}
	d.good("the instance is terminated; its volume and its network interface are gone")
	return nil
}

// leftInCloud lists what still costs money.
func (d *demo) leftInCloud() []string {
	var left []string
	for _, i := range d.cloud.Instances() {
		if i.State != ec2sim.StateTerminated {
			left = append(left, fmt.Sprintf("instance %s, %s", i.ID, i.State))
		}
	}
	for _, v := range d.cloud.Volumes() {
		left = append(left, "volume "+v.ID)
	}
	for _, n := range d.cloud.NetworkInterfaces() {
		left = append(left, "network interface "+n.ID)
	}
	return left
}

// awsDeadline kills the whole bridge while a grant runs.
func (d *demo) awsDeadline(ctx context.Context) error {
	d.step("A deadline passes while the whole bridge is dead")
	grant, err := d.provision(ctx, "--for", awsGrant.String())
	if err != nil {
		return err
	}
	deadline, err := d.validTo(ctx, grant)
	if err != nil {
		return err
	}
	for _, p := range d.processes {
		if err := d.run(ctx, "kill", "-9", fmt.Sprint(p.PID())); err != nil {
			return err
		}
		if _, err := p.Wait(ctx); err != nil {
			return err
		}
	}
	d.processes = nil
	out, err := d.logIn(ctx, grant, "echo still here")
	if err != nil {
		return err
	}
	if err := d.expect(out, "the tenant doesn't notice", "still here"); err != nil {
		return err
	}
	d.text("\nWaiting for the deadline, %s: %.0f s from now. The instance's own timer powers it off, which terminates it.",
		deadline.UTC().Format("15:04:05 MST"), time.Until(deadline).Seconds())
	err = d.wait(ctx, time.Until(deadline)+awsGrace, "the instance to end by itself", func() (bool, error) {
		return len(d.leftInCloud()) == 0, nil
	})
	if err != nil {
		return err
	}
	if err := d.nothingInCloud(); err != nil {
		return err
	}

	d.step("The bridge comes back and closes the books")
	if err := d.startWorker(ctx); err != nil {
		return err
	}
	if err := d.startRouter(ctx); err != nil {
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
	if err := d.expect(out, "the compute log says how it ended and what it used", "deadline", "good", "CPU"); err != nil {
		return err
	}
	return d.run(ctx, "bridgectl", "logs", "--verify")
}
