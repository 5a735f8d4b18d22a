// Command demo shows the main job of the bridge for real, on this machine alone:
// it starts a lab host, a bare-metal worker and a router with mutual TLS, sends
// a grant, logs in to the container as the requester, ends it, and shows what it
// used; then it kills the worker while a second grant runs and shows that the
// deadline ends the grant all the same.
//
// With -aws it shows the same with an AWS worker on a simulated EC2, an instance of
// which is a machine that boots Debian with its own cloud-init.
//
// Every command is shown as one would type it, with its real output, and what is
// expected of it is checked. Exit codes: 0 all went as it should; 1 something
// did not, or something of the demo is left on this machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/test/internal/awssite"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// cleanLimit bounds the clean-up.
const cleanLimit = time.Minute

func main() {
	lab.Helper()
	keep := flag.Bool("keep", false, "after the first grant, leave everything running until Ctrl-C, and print the commands to try")
	aws := flag.Bool("aws", false, "with the AWS worker, on a simulated EC2 whose instances boot")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	code := run(ctx, *aws, *keep)
	stop()
	os.Exit(code)
}

// run shows everything and cleans up.
func run(ctx context.Context, aws, keep bool) int {
	start := time.Now()
	out := newScreen(os.Stdout)
	parts, worker := (*demo).show, "baremetal-worker"
	if aws {
		parts, worker = (*demo).showAWS, "aws-worker"
	}
	bin, err := programs(worker)
	if err != nil {
		out.fail(err)
		return 1
	}
	d := &demo{screen: out, bin: bin}
	err = parts(d, ctx, keep)
	switch {
	case ctx.Err() != nil:
		out.text("\nInterrupted.")
	case err != nil:
		out.fail(err)
		d.logs()
	}
	cleanErr := d.clean()
	if cleanErr != nil {
		out.fail(cleanErr)
	}
	out.text("\nThe demo took %.1f s.", time.Since(start).Seconds())
	if err != nil || cleanErr != nil {
		return 1
	}
	return 0
}

// programs returns the directory of the built programs, beside this one.
func programs(worker string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(self)
	for _, name := range []string{"router", worker, "bridgectl", "guest", "lab"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("the bridge's programs should be beside this one: run make build: %w", err)
		}
	}
	return dir, nil
}

// demo is one run.
type demo struct {
	*screen
	bin       string
	lab       *lab.Lab
	site      *site.Site
	host      *lab.Host
	cloud     *awssite.Cloud // with -aws, in place of a host
	worker    *site.Worker
	processes []*site.Process
}

// clean ends everything and looks whether it is gone. An interrupt doesn't
// shorten it.
func (d *demo) clean() error {
	if d.lab == nil {
		return nil
	}
	d.step("Clean up")
	ctx, cancel := context.WithTimeout(context.Background(), cleanLimit)
	defer cancel()
	var errs []error
	for _, p := range slices.Backward(d.processes) {
		if code, err := p.Stop(ctx); err != nil {
			errs = append(errs, err, p.Kill())
		} else if code > 0 {
			errs = append(errs, fmt.Errorf("%s ended with exit code %d:\n%s", p.Name, code, p.LogTail()))
		}
	}
	if d.cloud != nil {
		errs = append(errs, d.cloud.Close(ctx))
	}
	errs = append(errs, d.lab.Close(ctx))
	left, err := lab.Remains(d.lab.Name())
	errs = append(errs, err)
	running, err := processesOf(d.lab.Name())
	errs = append(errs, err)
	for _, line := range append(left, running...) {
		errs = append(errs, errors.New("left on this machine: "+line))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.good("nothing of the demo is left on this machine: no process, namespace, mount, disk or directory")
	return nil
}

// processesOf lists the processes that were started in a lab's network.
func processesOf(lab string) ([]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // It has ended.
		}
		if strings.Contains("\x00"+string(text), "\x00CBLAB_LAB="+lab+"\x00") {
			found = append(found, "process "+filepath.Base(filepath.Dir(file)))
		}
	}
	return found, nil
}

// logs shows the ends of the processes' logs, after a failure.
func (d *demo) logs() {
	for _, p := range d.processes {
		d.text("\nThe end of %s:", p.LogFile)
		d.output().Write([]byte(p.LogTail() + "\n")) //nolint:errcheck // A screen.
	}
}
