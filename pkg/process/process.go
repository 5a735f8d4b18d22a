// Package process is the command line that the bridge's serving processes
// share: configuration file, check, health, version, signals, logs, traces.
package process

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"go.opentelemetry.io/otel"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
)

// Exit codes of every process.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// flushTimeout is how long the last spans may take to be sent.
const flushTimeout = 5 * time.Second

// Program is a process whose configuration file is a C.
type Program[C any] struct {
	// Name of the process. Its configuration is, by default,
	// /etc/compute-bridge/NAME.toml.
	Name string
	// Serves returns what it listens on, for the health check.
	Serves func(C) grpcx.ServerConfig
	// LogLevel returns the configured level.
	LogLevel func(C) string
	// Run serves until ctx ends.
	Run func(ctx context.Context, c C, log *slog.Logger) error
	// Commands are what the program does beside serving.
	Commands []Command[C]
}

// Command is something that a program does once with its configuration and then
// ends: `NAME COMMAND [flags]`. Every command has the flag -config.
type Command[C any] struct {
	// Name is the first argument.
	Name string
	// Summary says in a line what it does.
	Summary string
	// Prepare adds the command's flags and returns what runs it, once they are
	// parsed. That returns the exit code; with an error, which is printed, a
	// code of 0 counts as 1.
	Prepare func(flags *flag.FlagSet) func(ctx context.Context, c C, log *slog.Logger, stdout io.Writer) (int, error)
}

// UsageError is an error of a command that was called wrongly: exit code 2.
type UsageError string

// Error implements error.
func (e UsageError) Error() string { return string(e) }

// Main runs the program with the process's own arguments and exits. The first
// SIGINT or SIGTERM stops it in order, a second one at once.
func (p Program[C]) Main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) //nolint:forbidigo // It is all that main calls.
	context.AfterFunc(ctx, stop)
	os.Exit(p.Execute(ctx, os.Args[1:], os.Stdout, os.Stderr)) //nolint:forbidigo // As above; nothing is deferred here.
}

// Execute is the command line. It returns the exit code: 0 done, 1 failed, 2
// called wrongly.
func (p Program[C]) Execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	for _, c := range p.Commands {
		if len(args) > 0 && args[0] == c.Name {
			return p.execute(ctx, c, args[1:], stdout, stderr)
		}
	}
	flags := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		_, _ = fmt.Fprintf(stderr, "Usage of %s:\n", p.Name)
		flags.PrintDefaults()
		for _, c := range p.Commands {
			_, _ = fmt.Fprintf(stderr, "  %s\n\t%s; see %s %s -h\n", c.Name, c.Summary, p.Name, c.Name)
		}
	}
	path := flags.String("config", p.defaultConfig(), "`file` with the configuration")
	check := flags.Bool("check-config", false, "check the configuration with the files it names, and exit")
	version := flags.Bool("version", false, "print the version and exit")
	healthy := flags.Bool("healthcheck", false, "ask the process that runs with this configuration whether it serves, and exit")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		_, _ = fmt.Fprintf(stderr, "%s: unexpected argument %q\n", p.Name, flags.Arg(0))
		return exitUsage
	}
	if *version {
		_, _ = fmt.Fprintf(stdout, "%s %s\n", p.Name, Version())
		return exitOK
	}
	c, err := config.Load[C](*path)
	switch {
	case err != nil:
	case *check:
		_, _ = fmt.Fprintf(stdout, "%s: the configuration is valid\n", *path)
	case *healthy:
		err = grpcx.CheckHealth(ctx, p.Serves(c))
	default:
		err = p.serve(ctx, c, stderr)
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n", p.Name, err)
		return exitFailed
	}
	return exitOK
}

// execute runs one command.
func (p Program[C]) execute(ctx context.Context, command Command[C], args []string, stdout, stderr io.Writer) int {
	name := p.Name + " " + command.Name
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("config", p.defaultConfig(), "`file` with the configuration")
	run := command.Prepare(flags)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		_, _ = fmt.Fprintf(stderr, "%s: unexpected argument %q\n", name, flags.Arg(0))
		return exitUsage
	}
	code, err := func() (int, error) {
		c, err := config.Load[C](*path)
		if err != nil {
			return exitFailed, err
		}
		log, err := telemetry.NewLogger(stderr, telemetry.LogConfig{Level: p.LogLevel(c)})
		if err != nil {
			return exitFailed, fmt.Errorf("log_%w", err)
		}
		return run(ctx, c, log, stdout)
	}()
	if err == nil {
		return code
	}
	_, _ = fmt.Fprintf(stderr, "%s: %v\n", name, err)
	if _, wrong := errors.AsType[UsageError](err); wrong {
		return exitUsage
	}
	return max(code, exitFailed)
}

func (p Program[C]) defaultConfig() string { return "/etc/compute-bridge/" + p.Name + ".toml" }

func (p Program[C]) serve(ctx context.Context, c C, stderr io.Writer) (failure error) {
	log, err := telemetry.NewLogger(stderr, telemetry.LogConfig{Level: p.LogLevel(c)})
	if err != nil {
		return fmt.Errorf("log_%w", err)
	}
	tracing, err := telemetry.NewTracing(ctx, p.Name, Version())
	if err != nil {
		return err
	}
	// The one place where the libraries' global tracer is set: the process's
	// own start.
	otel.SetTracerProvider(tracing.Provider)
	otel.SetTextMapPropagator(tracing.Propagator)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		failure = errors.Join(failure, tracing.Shutdown(ctx))
	}()
	return p.Run(ctx, c, log)
}

// Version says what this binary was built from.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown build)"
	}
	revision := "unknown revision"
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return fmt.Sprintf("%s, %s, %s", info.Main.Version, revision, info.GoVersion)
}
