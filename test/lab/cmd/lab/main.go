// Command lab starts and stops lab hosts by hand: real Debian hosts with systemd
// as PID 1, in network namespaces of their own on this machine.
//
// All commands work on the lab "cblab", or on the one that -lab names. Exit
// codes: 0 done; 1 failed; 2 called wrongly; `exec`, `ssh` and `shell` pass on
// the code of what they ran.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func main() {
	lab.Helper()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command is one subcommand.
type command struct {
	name, args, short, long string
	// setup registers flags and returns what runs after they are parsed.
	setup func(flags *flag.FlagSet) func(ctx context.Context, c *call) error
}

// call is what a subcommand gets.
type call struct {
	lab            string
	args           []string
	stdout, stderr io.Writer
}

// usageError is a call that the usage text answers.
type usageError string

// Error implements error.
func (e usageError) Error() string { return string(e) }

// commands lists the subcommands in the order of the help text.
func commands() []command {
	return []command{
		{
			"up", "[-n N] [-no-podman] [-sshd LINE]…", "start hosts",
			"Starts hosts until the lab has N, and prints the table of `lab status`.\nThe first call on a machine builds the hosts' root file system: a minute or two.", up,
		},
		{"down", "", "destroy the lab with all its hosts", "Removes hosts, disks, namespaces and keys. A lab that isn't there is no error.", down},
		{"status", "", "show the hosts", "Prints name, address, SSH port, host key fingerprint and state of each host.", status},
		{"exec", "HOST -- PROGRAM [ARG]…", "run a program on a host", "Runs it as root by entering the host's namespaces: works without network and sshd.", execute},
		{"ssh", "[HOST [COMMAND]…]", "log in to a host with OpenSSH", "Runs ssh in the lab's network, with the lab's key and the host key pinned.\nWithout HOST: the first one.", sshTo},
		{"shell", "[PROGRAM [ARG]…]", "a shell in the lab's network", "Runs $SHELL, or a program, on this machine but in the lab's network namespace,\nwhere the hosts' addresses can be reached.", shell},
		{"cut", "HOST", "cut a host off, silently", "Drops its packets both ways; connections stay half-open.", onHost((*lab.Host).CutOff)},
		{"restore", "HOST", "end cut", "Lets packets through again.", onHost((*lab.Host).Restore)},
		{"reset", "HOST", "reset a host's TCP connections", "The lab's side sees \"connection reset by peer\".", onHost((*lab.Host).ResetConnections)},
		{"reboot", "HOST", "reboot a host, hard", "Kills it and boots it again on the same disk.", onHost((*lab.Host).Reboot)},
		{"fill", "HOST", "fill a host's disk", "Writes then fail with ENOSPC, until `lab free`.", onHost((*lab.Host).FillDisk)},
		{"free", "HOST", "end fill", "Frees the disk again.", onHost((*lab.Host).FreeDisk)},
		{"destroy", "HOST", "destroy one host", "Ends it and removes its disk.", onHost((*lab.Host).Destroy)},
		{"leftovers", "HOST", "list what a bridge left on a host", "Exit code 1 when there is something.", leftovers},
		{"image", "KIND -o FILE [-size MIB]", "write a test image", imageHelp(), image},
		{"config", "", "print the hosts as TOML", "Prints [[host]] tables for the bare-metal worker's configuration.", config},
		{"sweep", "", "destroy labs whose test run died", "Test runs do this themselves before they start.", sweep},
	}
}

// run dispatches and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	global := flag.NewFlagSet("lab", flag.ContinueOnError)
	global.SetOutput(io.Discard)
	name := global.String("lab", lab.ByHand, "")
	err := global.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp) || (err == nil && global.Arg(0) == "help"):
		usage(stdout)
		return 0
	case err != nil:
		fmt.Fprintln(stderr, "lab:", err)
		return 2
	case global.NArg() == 0:
		usage(stderr)
		return 2
	}
	for _, cmd := range commands() {
		if cmd.name != global.Arg(0) {
			continue
		}
		return runCommand(ctx, cmd, &call{lab: *name, args: global.Args()[1:], stdout: stdout, stderr: stderr})
	}
	fmt.Fprintf(stderr, "lab: no command %q: see lab -h\n", global.Arg(0))
	return 2
}

// runCommand parses a command's own flags and runs it.
func runCommand(ctx context.Context, cmd command, c *call) int {
	flags := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	do := cmd.setup(flags)
	help := func(w io.Writer) {
		fmt.Fprintf(w, "usage: lab %s %s\n\n%s\n", cmd.name, cmd.args, cmd.long)
		flags.SetOutput(w)
		flags.PrintDefaults()
	}
	rest, err := parseMixed(flags, c.args)
	if errors.Is(err, flag.ErrHelp) {
		help(c.stdout)
		return 0
	}
	if err != nil {
		fmt.Fprintf(c.stderr, "lab %s: %v\n", cmd.name, err)
		return 2
	}
	c.args = rest
	err = do(ctx, c)
	var exit *exec.ExitError
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(c.stderr, "lab %s: %v\n", cmd.name, err)
		help(c.stderr)
		return 2
	case errors.As(err, &exit) && (cmd.name == "exec" || cmd.name == "ssh" || cmd.name == "shell"):
		return exit.ExitCode()
	default:
		fmt.Fprintf(c.stderr, "lab %s: %v\n", cmd.name, err)
		return 1
	}
}

// parseMixed parses flags before and after the first positional argument, so
// that `lab image shell -o FILE` works; arguments after it stay untouched for
// exec, ssh and shell, which have no flags.
func parseMixed(flags *flag.FlagSet, args []string) ([]string, error) {
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	rest := flags.Args()
	hasFlags := false
	flags.VisitAll(func(*flag.Flag) { hasFlags = true })
	if len(rest) < 2 || !hasFlags {
		return rest, nil
	}
	if err := flags.Parse(rest[1:]); err != nil {
		return nil, err
	}
	return append(rest[:1:1], flags.Args()...), nil
}

// usage prints the overview.
func usage(w io.Writer) {
	fmt.Fprint(w, "lab starts real Debian hosts in namespaces on this machine, for tests and by hand.\n\n"+
		"usage: lab [-lab NAME] COMMAND …      (the lab is "+lab.ByHand+" when not named)\n\n")
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, cmd := range commands() {
		fmt.Fprintf(table, "  %s %s\t%s\n", cmd.name, cmd.args, cmd.short)
	}
	_ = table.Flush() // w's errors have nowhere to go
	fmt.Fprint(w, "\n`lab COMMAND -h` tells more. $CBLAB_CACHE moves root file system and disks from "+lab.CacheDir()+".\n")
}

// lines collects a flag that may be given several times.
type lines []string

// String implements [flag.Value].
func (l *lines) String() string { return strings.Join(*l, "; ") }

// Set implements [flag.Value].
func (l *lines) Set(line string) error {
	*l = append(*l, line)
	return nil
}

func up(flags *flag.FlagSet) func(context.Context, *call) error {
	n := flags.Int("n", 1, "number of hosts that the lab shall have")
	noPodman := flags.Bool("no-podman", false, "start the new hosts without podman")
	var sshd lines
	flags.Var(&sshd, "sshd", "line of sshd_config for the new hosts; may be given several times")
	return func(ctx context.Context, c *call) error {
		if len(c.args) > 0 || *n < 1 {
			return usageError("it takes a positive -n and no arguments")
		}
		l, err := lab.Open(ctx, lab.Options{Name: c.lab, Persistent: true, Log: c.stderr})
		if errors.Is(err, fs.ErrExist) {
			l, err = lab.Load(c.lab)
		}
		if err != nil {
			return err
		}
		hosts, err := l.Hosts()
		if err != nil {
			return err
		}
		start := time.Now()
		group, starting := errgroup.WithContext(ctx)
		for range *n - len(hosts) {
			group.Go(func() error {
				_, err := l.StartHost(starting, lab.HostOptions{NoPodman: *noPodman, SSHDConfig: sshd})
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		if more := *n - len(hosts); more > 0 {
			fmt.Fprintf(c.stderr, "lab: %d started in %.1f s; reach them with `lab shell` or `lab ssh`, end them with `lab down`\n",
				more, time.Since(start).Seconds())
		}
		return printHosts(ctx, l, c.stdout)
	}
}

func down(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		l, err := lab.Load(c.lab)
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(c.stderr, "lab: there is no lab %s\n", c.lab)
			return nil
		}
		if err != nil {
			return err
		}
		return l.Close(ctx)
	}
}

func status(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		l, err := lab.Load(c.lab)
		if err != nil {
			return err
		}
		return printHosts(ctx, l, c.stdout)
	}
}

// printHosts prints the table of a lab's hosts.
func printHosts(ctx context.Context, l *lab.Lab, w io.Writer) error {
	hosts, err := l.Hosts()
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "HOST\tADDRESS\tSSH\tHOST KEY\tSTATE")
	for _, h := range hosts {
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\t%s\n", h.Name, h.Addr, h.SSHPort, fingerprint(h), state(ctx, h))
	}
	return table.Flush()
}

// fingerprint of a host's key. Machines make theirs themselves.
func fingerprint(h *lab.Host) string {
	if h.HostKey == nil {
		return "-"
	}
	return ssh.FingerprintSHA256(h.HostKey)
}

// state describes a host in a word or two.
func state(ctx context.Context, h *lab.Host) string {
	switch {
	case !h.Running():
		return "down"
	case h.IsCutOff():
		return "cut off"
	}
	// systemctl exits with 1 unless it says "running"; what it says is enough.
	out, err := h.Exec(ctx, "systemctl", "is-system-running")
	if out = strings.TrimSpace(out); out == "" {
		return fmt.Sprintf("unknown: %v", err)
	}
	return out
}

// hostArg loads the host that the first argument names.
func (c *call) hostArg() (*lab.Host, error) {
	if len(c.args) == 0 {
		return nil, usageError("it takes a host's name")
	}
	l, err := lab.Load(c.lab)
	if err != nil {
		return nil, err
	}
	return l.Host(c.args[0])
}

// onHost makes a command of a method without arguments.
func onHost(method func(*lab.Host, context.Context) error) func(*flag.FlagSet) func(context.Context, *call) error {
	return func(*flag.FlagSet) func(context.Context, *call) error {
		return func(ctx context.Context, c *call) error {
			if len(c.args) > 1 {
				return usageError("it takes one host")
			}
			h, err := c.hostArg()
			if err != nil {
				return err
			}
			return method(h, ctx)
		}
	}
}

func execute(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		h, err := c.hostArg()
		if err != nil {
			return err
		}
		argv := c.args[1:]
		if len(argv) > 0 && argv[0] == "--" {
			argv = argv[1:]
		}
		if len(argv) == 0 {
			return usageError("it takes a program")
		}
		return h.Run(context.WithoutCancel(ctx), os.Stdin, c.stdout, c.stderr, argv...)
	}
}

func sshTo(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		if len(c.args) == 0 {
			l, err := lab.Load(c.lab)
			if err != nil {
				return err
			}
			hosts, err := l.Hosts()
			if err != nil {
				return err
			}
			if len(hosts) == 0 {
				return fmt.Errorf("lab %s has no hosts: start some with `lab up`", c.lab)
			}
			c.args = []string{hosts[0].Name}
		}
		h, err := c.hostArg()
		if err != nil {
			return err
		}
		known, err := os.CreateTemp("", "cblab-known-hosts-")
		if err != nil {
			return err
		}
		defer os.Remove(known.Name()) //nolint:errcheck // a temporary file
		_, err = fmt.Fprintf(known, "%s %s\n", h.Addr, h.HostKeyLine())
		if err := errors.Join(err, known.Close()); err != nil {
			return err
		}
		args := []string{
			"-F", "none", "-i", h.UserKeyFile, "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
			"-o", "UserKnownHostsFile=" + known.Name(), "root@" + h.Addr.String(),
		}
		return attached(h.Lab().Command(context.WithoutCancel(ctx), "ssh", append(args, c.args[1:]...)...), c)
	}
}

func shell(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		l, err := lab.Load(c.lab)
		if err != nil {
			return err
		}
		argv := c.args
		if len(argv) > 0 && argv[0] == "--" {
			argv = argv[1:]
		}
		if len(argv) == 0 {
			argv = []string{"/bin/sh"}
			if sh := os.Getenv("SHELL"); sh != "" {
				argv[0] = sh
			}
			fmt.Fprintf(c.stderr, "lab: a shell in the network of lab %s; leave it with exit\n", l.Name())
		}
		return attached(l.Command(context.WithoutCancel(ctx), argv[0], argv[1:]...), c)
	}
}

// attached runs a command with the caller's own streams. An interrupt is the
// command's to handle: it gets it from the terminal, as we do.
func attached(cmd *exec.Cmd, c *call) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, c.stdout, c.stderr
	return cmd.Run()
}

func leftovers(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		h, err := c.hostArg()
		if err != nil {
			return err
		}
		left, err := h.Leftovers(ctx)
		if err != nil {
			return err
		}
		for _, line := range left {
			fmt.Fprintln(c.stdout, line)
		}
		if len(left) > 0 {
			return fmt.Errorf("%d things left on %s", len(left), h.Name)
		}
		return nil
	}
}

// imageHelp lists the kinds of test images.
func imageHelp() string {
	return `Writes an OCI archive, the same bytes every time, and prints its digests. Kinds:

  shell           busybox: a shell and the usual tools
  distroless      one static program, no shell; serves until SIGTERM
  exit3           exits at once with code 3
  ignore-sigterm  doesn't stop when asked
  configured      with USER, ENV, WORKDIR, ENTRYPOINT and CMD
  big             with -size MiB of noise
  not-oci         a tar archive that is no image
  corrupt         an image with one wrong byte
`
}

func image(flags *flag.FlagSet) func(context.Context, *call) error {
	out := flags.String("o", "", "`file` to write (required)")
	size := flags.Int("size", 200, "megabytes of noise in an image of kind big")
	return func(ctx context.Context, c *call) error {
		if len(c.args) != 1 || *out == "" {
			return usageError("it takes one kind and -o FILE")
		}
		root, err := lab.RootFS(ctx, c.stderr)
		if err != nil {
			return err
		}
		archive, err := ociimage.WriteFile(ctx, *out, ociimage.Kind(c.args[0]), ociimage.Options{RootFS: root, SizeMiB: *size})
		if err != nil {
			return err
		}
		fmt.Fprintf(c.stdout, "file    %s\nsize    %d\nsha256  %s\nblake3  %s\n", archive.Path, archive.Size, archive.SHA256, archive.BLAKE3)
		return nil
	}
}

func config(*flag.FlagSet) func(context.Context, *call) error {
	return func(_ context.Context, c *call) error {
		l, err := lab.Load(c.lab)
		if err != nil {
			return err
		}
		hosts, err := l.Hosts()
		if err != nil {
			return err
		}
		for _, h := range hosts {
			fmt.Fprintf(c.stdout, "[[host]]\nname = %q\naddress = %q\nport = %d\nuser = \"root\"\nhost_key = %q\nuser_key_file = %q\n\n",
				h.Name, h.Addr, h.SSHPort, h.HostKeyLine(), h.UserKeyFile)
		}
		return nil
	}
}

func sweep(*flag.FlagSet) func(context.Context, *call) error {
	return func(ctx context.Context, _ *call) error { return lab.Sweep(ctx) }
}
