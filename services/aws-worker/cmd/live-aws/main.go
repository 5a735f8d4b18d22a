// Command live-aws runs a checklist against AWS itself, with the driver of the
// worker in this process, and removes all that it made. It costs money and
// therefore wants to be told twice; docs/aws.md says what it does.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // the second signal ends the clean-up, too
	}()
	code := run(ctx, os.Args[1:], os.Stdout, patient)
	stop()
	os.Exit(code)
}

// settings are what the caller wants.
type settings struct {
	configFile string
	image      backend.Digest
	clean, pay bool
	timing     timing
}

// timing is how long things may take on AWS.
type timing struct {
	// life is that of instances that are ended here, should everything here die;
	// the last one is to end by itself after short.
	life, short time.Duration
	// run bounds the checks, cleanUp what comes after them.
	run, cleanUp time.Duration
	// poll is the time between two looks at AWS.
	poll time.Duration
	// late is how long after its deadline an instance may still run.
	late time.Duration
}

var patient = timing{ //nolint:gochecknoglobals // a constant that Go can't declare
	life: 15 * time.Minute, short: 5 * time.Minute, run: 20 * time.Minute, cleanUp: 10 * time.Minute, poll: 5 * time.Second, late: time.Minute,
}

// run does it all and returns the exit code.
func run(ctx context.Context, args []string, out io.Writer, t timing) int {
	s := settings{timing: t}
	flags := flag.NewFlagSet("live-aws", flag.ContinueOnError)
	flags.SetOutput(out)
	image := ""
	flags.StringVar(&s.configFile, "config", "", "the worker's configuration")
	flags.StringVar(&image, "image", "", "an OCI archive in its image store, as sha256:HEX")
	flags.BoolVar(&s.clean, "clean", false, "only remove what an earlier run left")
	flags.BoolVar(&s.pay, "i-will-pay", false, "make instances, which costs money")
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	usage := func(format string, a ...any) int {
		fmt.Fprintf(out, "live-aws: "+format+"\n", a...)
		return exitUsage
	}
	switch {
	case flags.NArg() > 0:
		return usage("no arguments but flags: %q", flags.Arg(0))
	case s.configFile == "":
		return usage("-config is missing: make live-aws CONFIG=aws-worker.toml")
	case image == "" && !s.clean:
		return usage("-image is missing: make live-aws IMAGE=sha256:HEX, an OCI archive in the configuration's image store")
	}
	if image != "" {
		digest, err := backend.ParseDigest(image)
		if err != nil {
			return usage("-image: %v", err)
		}
		s.image = digest
	}
	c, err := config.Load[worker.Config[ec2backend.Config]](s.configFile)
	if err != nil {
		return usage("%v", err)
	}
	return check(ctx, s, c, out)
}

// check goes through the list.
func check(ctx context.Context, s settings, c worker.Config[ec2backend.Config], out io.Writer) int {
	dir, err := os.MkdirTemp("", "live-aws-")
	if err != nil {
		fmt.Fprintf(out, "live-aws: %v\n", err)
		return exitFailed
	}
	defer func() { _ = os.RemoveAll(dir) }()
	l := &list{out: out}
	p := &site{settings: s, bridgeID: c.BridgeID, config: narrowed(c.Backend), dir: dir}
	if err := p.connect(ctx); err != nil {
		fmt.Fprintf(out, "live-aws: %v\n", err)
		return exitFailed
	}
	defer p.disconnect()
	if err := p.open(ctx); err != nil {
		l.done("identity, clock and permissions", err)
		return exitFailed
	}
	defer p.close()
	if s.clean {
		l.done("nothing is left", p.cleanUp(ctx))
		return l.code()
	}
	l.done("identity, clock and permissions", nil)
	code, ready := p.agree(ctx, out)
	if !ready {
		return code
	}
	bounded, cancel := context.WithTimeout(ctx, s.timing.run)
	defer cancel()
	p.checks(bounded, l)
	if ctx.Err() != nil {
		fmt.Fprintln(out, "Interrupted. Cleaning up; a second signal would leave instances behind, until make live-aws CLEAN=1 or their deadline.")
	}
	l.done("nothing is left", p.cleanUp(context.WithoutCancel(ctx)))
	return l.code()
}

// list is the checklist as it is printed.
type list struct {
	out    io.Writer
	failed int
}

// done prints a line.
func (l *list) done(name string, err error) {
	if err == nil {
		fmt.Fprintf(l.out, "PASS  %s\n", name)
		return
	}
	l.failed++
	fmt.Fprintf(l.out, "FAIL  %s: %v\n", name, err)
}

// skipped prints a line that couldn't be checked, which is no success.
func (l *list) skipped(name string) {
	l.failed++
	fmt.Fprintf(l.out, "----  %s: not reached\n", name)
}

func (l *list) code() int {
	if l.failed > 0 {
		fmt.Fprintf(l.out, "%d of the checks failed.\n", l.failed)
		return exitFailed
	}
	fmt.Fprintln(l.out, "All passed.")
	return exitOK
}
