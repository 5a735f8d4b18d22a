package server

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"github.com/compute-bridge/compute-bridge/pkg/config"
)

// Exit codes of the router.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// Main is the router's command line. It returns the exit code.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("router", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("config", "/etc/compute-bridge/router.toml", "`file` with the configuration")
	check := flags.Bool("check-config", false, "check the configuration with the files it names, and exit")
	version := flags.Bool("version", false, "print the version and exit")
	healthy := flags.Bool("healthcheck", false, "ask the router that runs with this configuration whether it serves, and exit")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "unexpected argument %q\n", flags.Arg(0))
		return exitUsage
	}
	if *version {
		fmt.Fprintln(stdout, buildVersion())
		return exitOK
	}
	c, err := config.Load[Config](*path)
	switch {
	case err != nil:
	case *check:
		fmt.Fprintf(stdout, "%s: the configuration is valid\n", *path)
	case *healthy:
		err = CheckHealth(ctx, c)
	default:
		var log *slog.Logger
		if log, err = c.Logger(stderr); err == nil {
			err = Run(ctx, c, log, nil)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "router: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// buildVersion says what this binary was built from.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "router (unknown build)"
	}
	revision := "unknown revision"
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return fmt.Sprintf("router %s, %s, %s", info.Main.Version, revision, info.GoVersion)
}
