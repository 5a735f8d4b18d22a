// Package cli is the guest's command line.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/console"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/filedigest"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/hostlease"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/hostspool"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/instance"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/reaper"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/sftpserver"
)

// Exit codes of the helpers.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// self is this very program, also where its path can't be reached by the user that is to run it.
const self = "/proc/self/exe"

const usage = `guest is what runs inside every instance of a compute bridge.

In the container:
  guest init -config FILE         run as PID 1: start 'guest serve', reap orphans, forward signals
  guest serve -config FILE        run the workload and the SSH server
  guest sftp-server               serve SFTP on standard input and output (internal)

In a virtual machine that is one grant's instance, see pkg/userdata:
  guest machine prepare           fetch, check and unpack the image, and furnish its root directory
  guest machine run               as the workload's unit, inside the root directory: like serve
  guest machine ready             print on the console that SSH is open; for ExecStartPost
  guest machine end               print on the console how the workload ended, and power off if that is to be;
                                  for ExecStopPost

On the host:
  guest digest -algorithm sha256|blake3 FILE
                                  print algorithm, hex digest and size as JSON
  guest spool -dir DIR -unit NAME [-ifname IF -table TABLE]
                                  record an ended grant's usage; for ExecStopPost
  guest lease -file FILE -holder NAME [-wait [-after 0s]] [-ttl 5s]
                                  hold a lock for as long as the worker at the other end of this SSH session gives
                                  signs of life on standard input, then end its connection

  guest version                   print the version
`

// Streams are the process's own.
type Streams struct {
	Stdin, Stdout, Stderr *os.File
}

// Run runs one subcommand and returns the process's exit code.
func Run(ctx context.Context, args []string, std Streams) int {
	if len(args) == 0 {
		_, _ = io.WriteString(std.Stderr, usage)
		return exitUsage
	}
	logger := console.New(std.Stderr)
	switch args[0] {
	case "init":
		return runInit(args[1:], std, logger)
	case "serve":
		return runServe(ctx, args[1:], std, logger)
	case "sftp-server":
		if err := sftpserver.Serve(std.Stdin, std.Stdout); err != nil {
			logger.Error("SFTP failed", "error", err)
			return exitFailed
		}
		return exitOK
	case "digest":
		return runDigest(args[1:], std, logger)
	case "spool":
		return runSpool(ctx, args[1:], std, logger)
	case "lease":
		return runLease(ctx, args[1:], std, logger)
	case "machine":
		return runMachine(ctx, args[1:], std, logger)
	case "version":
		_, _ = fmt.Fprintln(std.Stdout, version())
		return exitOK
	case "help", "-h", "-help", "--help":
		_, _ = io.WriteString(std.Stdout, usage)
		return exitOK
	default:
		_, _ = fmt.Fprintf(std.Stderr, "guest: unknown command %q\n\n%s", args[0], usage)
		return exitUsage
	}
}

// parse parses flags and checks the number of arguments; it has printed what is wrong if it returns an exit code.
func parse(flags *flag.FlagSet, args []string, std Streams, operands int) (int, bool) {
	flags.SetOutput(std.Stderr)
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK, false
		}
		return exitUsage, false
	}
	if flags.NArg() != operands {
		_, _ = fmt.Fprintf(std.Stderr, "guest %s: %d arguments given, %d expected\n", flags.Name(), flags.NArg(), operands)
		return exitUsage, false
	}
	return exitOK, true
}

func runInit(args []string, std Streams, logger *slog.Logger) int {
	flags := flag.NewFlagSet("init", flag.ContinueOnError)
	config := flags.String("config", guestapi.ContainerConfigPath, "configuration `file`")
	if code, ok := parse(flags, args, std, 0); !ok {
		return code
	}
	defer ignoreBrokenPipes()()
	code, err := reaper.Run(self, []string{"guest", "serve", "-config", *config})
	if err != nil {
		logger.Error("The guest cannot start", "error", err)
		return guestapi.ExitGuestFailed
	}
	return code
}

func runServe(ctx context.Context, args []string, std Streams, logger *slog.Logger) int {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	path := flags.String("config", guestapi.ContainerConfigPath, "configuration `file`")
	if code, ok := parse(flags, args, std, 0); !ok {
		return code
	}
	return serve(ctx, *path, os.Environ(), nil, std, logger)
}

// serve is package instance in this process.
func serve(ctx context.Context, path string, environ []string, ready func(), std Streams, logger *slog.Logger) int {
	defer ignoreBrokenPipes()()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1,
		syscall.SIGUSR2)
	defer signal.Stop(signals)
	config, err := readConfig(path)
	if err != nil {
		logger.Error("The configuration is refused", "error", err)
		return guestapi.ExitInvalidConfig
	}
	syscall.Umask(0o022)
	return instance.Run(ctx, instance.Params{
		Config:      config,
		Environ:     environ,
		Signals:     signals,
		Accounts:    account.Open("/"),
		SFTPCommand: []string{self, "sftp-server"},
		Stdout:      std.Stdout,
		Stderr:      std.Stderr,
		Ready:       ready,
		Logger:      logger,
	})
}

// ignoreBrokenPipes keeps a console that nobody reads any more from ending the instance. The signal is caught, not
// ignored: children would inherit that.
func ignoreBrokenPipes() (stop func()) {
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE)
	return func() { signal.Stop(pipes) }
}

func readConfig(path string) (guestapi.Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return guestapi.Config{}, err
	}
	defer f.Close()
	return guestapi.Decode(f)
}

func runDigest(args []string, std Streams, logger *slog.Logger) int {
	flags := flag.NewFlagSet("digest", flag.ContinueOnError)
	algorithm := flags.String("algorithm", filedigest.SHA256, "sha256 or blake3")
	if code, ok := parse(flags, args, std, 1); !ok {
		return code
	}
	digest, err := filedigest.File(*algorithm, flags.Arg(0))
	if err != nil {
		logger.Error("The file cannot be hashed", "error", err)
		return exitFailed
	}
	if err := json.NewEncoder(std.Stdout).Encode(digest); err != nil {
		logger.Error("The digest cannot be printed", "error", err)
		return exitFailed
	}
	return exitOK
}

func runSpool(ctx context.Context, args []string, std Streams, logger *slog.Logger) int {
	flags := flag.NewFlagSet("spool", flag.ContinueOnError)
	var req hostspool.Request
	flags.StringVar(&req.Dir, "dir", "", "the grant's `directory`")
	flags.StringVar(&req.Unit, "unit", "", "`name` of the grant's unit")
	flags.StringVar(&req.Interface, "ifname", "", "`name` of the grant's network interface")
	flags.StringVar(&req.Table, "table", "", "`name` of the nftables table (family inet) with the counters")
	if code, ok := parse(flags, args, std, 0); !ok {
		return code
	}
	if err := hostspool.Record(ctx, hostspool.System(), req); err != nil {
		logger.Error("The grant's end cannot be recorded", "error", err)
		return exitFailed
	}
	return exitOK
}

func runLease(ctx context.Context, args []string, std Streams, logger *slog.Logger) int {
	flags := flag.NewFlagSet("lease", flag.ContinueOnError)
	var req hostlease.Request
	flags.StringVar(&req.File, "file", "", "`file` to lock")
	flags.StringVar(&req.Holder, "holder", "", "`name` of the worker, for people")
	flags.BoolVar(&req.Wait, "wait", false, "wait for another holder to go")
	flags.DurationVar(&req.After, "after", 0, "with -wait, how long to leave it to others first")
	flags.DurationVar(&req.TTL, "ttl", guestapi.DefaultLeaseTTL, "how long the worker may be silent")
	if code, ok := parse(flags, args, std, 0); !ok {
		return code
	}
	if req.File == "" || req.TTL <= 0 {
		_, _ = fmt.Fprintln(std.Stderr, "guest lease: -file and a positive -ttl are needed")
		return exitUsage
	}
	// Nobody may read any more what it says; it must not die of that before it has ended the connection.
	defer ignoreBrokenPipes()()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	code, err := hostlease.Run(ctx, req, std.Stdin, std.Stdout, logger)
	if err != nil {
		logger.Error("The lease cannot be taken", "error", err)
		return exitFailed
	}
	return code
}

// version tells what was built, from what, as far as the toolchain recorded it.
func version() string {
	var text strings.Builder
	text.WriteString("guest")
	if info, ok := debug.ReadBuildInfo(); ok {
		text.WriteString(" " + info.Main.Version)
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				text.WriteString(" " + setting.Value)
			}
		}
	}
	return fmt.Sprintf("%s %s %s/%s", text.String(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
