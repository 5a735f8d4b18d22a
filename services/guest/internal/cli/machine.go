package cli

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/execpath"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/machine"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/reaper"
)

// notifyVariable is where systemd wants to hear that a service is ready, sd_notify(3).
const notifyVariable = "NOTIFY_SOCKET"

// runMachine runs one of the commands of a virtual machine's units.
func runMachine(ctx context.Context, args []string, std Streams, logger *slog.Logger) int {
	if len(args) == 0 {
		_, _ = fmt.Fprintf(std.Stderr, "guest machine: prepare, run, ready or end?\n\n%s", usage)
		return exitUsage
	}
	flags := flag.NewFlagSet("machine "+args[0], flag.ContinueOnError)
	if code, ok := parse(flags, args[1:], std, 0); !ok {
		return code
	}
	this := machine.New(machine.SystemDirs(), logger)
	var err error
	switch args[0] {
	case "prepare":
		err = this.Prepare(ctx)
	case "run":
		if os.Getpid() == 1 {
			return runAsInit(logger)
		}
		return runInMachine(ctx, tellSystemd, std, logger)
	case serveInMachine:
		return runInMachine(ctx, tellInit, std, logger)
	case "ready":
		err = this.Ready()
	case "end":
		err = this.End(ctx, machine.Result{
			Result: os.Getenv("SERVICE_RESULT"), Code: os.Getenv("EXIT_CODE"), Status: os.Getenv("EXIT_STATUS"),
		})
	default:
		_, _ = fmt.Fprintf(std.Stderr, "guest: unknown command %q\n\n%s", "machine "+args[0], usage)
		return exitUsage
	}
	if err != nil {
		logger.Error("The machine failed", "doing", args[0], "reason", err)
		return exitFailed
	}
	return exitOK
}

// serveInMachine is the command that runAsInit runs. It isn't for people.
const serveInMachine = "serve"

// readyDescriptor is where serveInMachine says that SSH is open.
const readyDescriptor = 3

// runAsInit is the workload's unit where systemd (257) gives it processes of its own: there the guest is PID 1, and
// reaps what the workload leaves behind, as in a container. systemd listens to PID 1 only (NotifyAccess=main), so this
// process passes on that SSH is open.
func runAsInit(logger *slog.Logger) int {
	defer ignoreBrokenPipes()()
	ready, tell, err := os.Pipe()
	if err != nil {
		logger.Error("The guest cannot start", "error", err)
		return guestapi.ExitGuestFailed
	}
	go func() {
		if n, _ := ready.Read(make([]byte, 1)); n > 0 {
			tellSystemd(logger)
		}
	}()
	code, err := reaper.Run(self, []string{"guest", "machine", serveInMachine}, tell)
	if err != nil {
		logger.Error("The guest cannot start", "error", err)
		return guestapi.ExitGuestFailed
	}
	return code
}

// tellSystemd says that SSH is open.
func tellSystemd(logger *slog.Logger) {
	if _, err := daemon.SdNotify(true, daemon.SdNotifyReady); err != nil {
		logger.Warn("The system could not be told that SSH is open", "reason", err)
	}
}

// tellInit says it to runAsInit.
func tellInit(logger *slog.Logger) {
	pipe := os.NewFile(readyDescriptor, "ready")
	if _, err := pipe.Write([]byte{1}); err != nil {
		logger.Warn("The system could not be told that SSH is open", "reason", err)
	}
	_ = pipe.Close()
}

// runInMachine is the workload's unit, or what runs below runAsInit. Without that, systemd reaps orphans. What systemd
// has put into the environment stays here; the workload gets what a container engine gives.
func runInMachine(ctx context.Context, tell func(*slog.Logger), std Streams, logger *slog.Logger) int {
	// Nothing that is started here inherits it.
	syscall.CloseOnExec(readyDescriptor)
	environ := []string{"PATH=" + execpath.DefaultPath, "HOME=" + account.Open("/").Login(account.RootName).Home}
	if hostname, err := os.Hostname(); err == nil {
		environ = append(environ, "HOSTNAME="+hostname)
	}
	socket := os.Getenv(notifyVariable)
	os.Clearenv()
	if socket != "" {
		if err := os.Setenv(notifyVariable, socket); err != nil {
			logger.Error("The guest cannot start", "error", err)
			return guestapi.ExitGuestFailed
		}
	}
	return serve(ctx, guestapi.ContainerConfigPath, environ, func() { tell(logger) }, std, logger)
}
