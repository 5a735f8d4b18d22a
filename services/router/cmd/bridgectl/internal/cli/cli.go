// Package cli is bridgectl's commands. They read flags, call the contract's
// services and hand the answers to package show; nothing here knows how things
// look, and nothing there knows where they come from.
package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/spec"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/state"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

// Env is the process around the commands.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time
}

// defaultTarget is where a router listens for its own machine.
const defaultTarget = "unix:/run/compute-bridge/router.sock"

// quick is how long a call that only reads may take.
const quick = 30 * time.Second

// app is one run of the program.
type app struct {
	Env
	target, cert, key, ca, serverName, identity string
	insecure, verbose                           bool
	timeout                                     string
	output, color                               string

	changed func(flag string) bool
	conn    *grpc.ClientConn
}

// Run runs a command line and returns the exit code. When ctx ends, what goes
// on is ended in order.
func Run(ctx context.Context, env Env, args []string) int {
	a := &app{Env: env}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	err := root.ExecuteContext(ctx)
	if a.conn != nil {
		_ = a.conn.Close() // Nothing is under way.
	}
	if err == nil {
		return ExitOK
	}
	// What cobra finds wrong by itself, it tells by words only.
	if text := err.Error(); strings.HasPrefix(text, "unknown command") || strings.HasPrefix(text, "invalid argument") {
		err = usage(err)
	}
	if a.output == "json" {
		printJSONError(env.Stderr, err)
	} else {
		printError(env.Stderr, a.painter(env.Stderr), err)
	}
	return code(err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "bridgectl",
		Short: "Request compute from a bridge, and look after one",
		Long: `bridgectl speaks to a router or a worker of a compute bridge.

A GRANT is written as its id, the beginning of its id (4 hex digits or more), or
its handle. What is needed to log in is kept below $XDG_STATE_HOME/bridgectl.

Environment: BRIDGECTL_TARGET, BRIDGECTL_IDENTITY, BRIDGECTL_CERT,
BRIDGECTL_KEY, BRIDGECTL_CA and BRIDGECTL_SERVER_NAME stand in for the flags;
BRIDGECTL_COMPLETION_TIMEOUT is how long a shell's completion waits for the
target (1s unless set); NO_COLOR turns colours off.

` + exitHelp,
		SilenceUsage: true, SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.changed = func(flag string) bool {
				f := cmd.Flags().Lookup(flag)
				return f != nil && f.Changed
			}
			switch {
			case a.output != "table" && a.output != "json":
				format := a.output
				a.output = "table"
				return usage(fmt.Errorf("--output %q: want table or json", format))
			case a.color != "auto" && a.color != "always" && a.color != "never":
				return usage(fmt.Errorf("--color %q: want auto, always or never", a.color))
			}
			_, err := a.limit(0)
			return err
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&a.target, "target", "", "where the router or worker listens: unix:/path, host:port or dns:///name:port (default "+defaultTarget+")")
	f.StringVar(&a.identity, "identity", "", "directory with cert.pem, key.pem and ca.pem")
	f.StringVar(&a.cert, "cert", "", "own certificate, PEM file")
	f.StringVar(&a.key, "key", "", "its private key, PEM file")
	f.StringVar(&a.ca, "ca", "", "authorities to believe, PEM file")
	f.StringVar(&a.serverName, "server-name", "", "name that the server's certificate must have (default: the target's host)")
	f.BoolVar(&a.insecure, "insecure", false, "no TLS; loopback addresses only")
	f.StringVar(&a.timeout, "timeout", "", "how long the command may take, such as 90s (default: depends on the command)")
	f.StringVarP(&a.output, "output", "o", "table", "table, or json: the answer in Protobuf's JSON mapping")
	f.StringVar(&a.color, "color", "auto", "auto, always or never")
	f.BoolVarP(&a.verbose, "verbose", "v", false, "say more about what is done")
	a.completeFlag(root, "output", words("table", "json"))
	a.completeFlag(root, "color", words("auto", "always", "never"))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w; see %s --help", err, cmd.CommandPath()))
	})
	root.AddCommand(
		a.cardCommand(), a.backendsCommand(),
		a.provisionCommand(), a.listCommand(), a.watchCommand(), a.terminateCommand(), a.logsCommand(), a.usageCommand(),
		a.sshCommand(), a.scpCommand(), a.sftpCommand(), a.sshConfigCommand(),
		a.drainCommand(true), a.drainCommand(false), a.sweepCommand(),
		a.certsCommand(), a.versionCommand(),
	)
	return root
}

// exactly is cobra.ExactArgs with an error that counts as wrong use.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		if len(names) == 0 {
			return usage(fmt.Errorf("%s takes no arguments", cmd.CommandPath()))
		}
		return usage(fmt.Errorf("%s wants %s; see %s --help", cmd.CommandPath(), strings.Join(names, " "), cmd.CommandPath()))
	}
}

// painter returns the painter for one of the outputs.
func (a *app) painter(w io.Writer) term.Painter {
	switch a.color {
	case "always":
		return term.Painter{On: true}
	case "auto":
		return term.Painter{On: term.IsTerminal(w) && a.Getenv("NO_COLOR") == "" && a.Getenv("TERM") != "dumb"}
	}
	return term.Painter{}
}

func (a *app) show() show.Output {
	return show.Output{W: a.Stdout, Painter: a.painter(a.Stdout), Now: a.Now()}
}

func (a *app) json() bool { return a.output == "json" }

// note writes a line for people beside the output.
func (a *app) note(style term.Style, format string, args ...any) {
	fmt.Fprintln(a.Stderr, a.painter(a.Stderr).Paint(style, term.Clean(fmt.Sprintf(format, args...))))
}

func (a *app) debug(format string, args ...any) {
	if a.verbose {
		a.note(term.Faint, format, args...)
	}
}

// marshal returns a message in Protobuf's JSON mapping with the contract's own
// field names, without the mapping's random spaces. Private keys are left out.
func marshal(m proto.Message, indent string, secrets bool) ([]byte, error) {
	if res, ok := m.(*bridgev1.ProvisionResponse); ok && !secrets && res.GetReceipt().GetPlaintextKey() != nil {
		clone, _ := proto.Clone(res).(*bridgev1.ProvisionResponse)
		clone.GetReceipt().GetPlaintextKey().PrivateKey = nil
		m = clone
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if indent == "" {
		err = json.Compact(&b, text)
	} else {
		err = json.Indent(&b, text, "", indent)
	}
	b.WriteByte('\n')
	return b.Bytes(), err
}

// print writes a message: as JSON, or by the function.
func (a *app) print(m proto.Message, human func(show.Output) error) error {
	if !a.json() {
		return human(a.show())
	}
	text, err := marshal(m, "  ", false)
	if err != nil {
		return err
	}
	_, err = a.Stdout.Write(text)
	return err
}

// limit returns how long the command may take.
func (a *app) limit(byDefault time.Duration) (time.Duration, error) {
	if a.timeout == "" {
		return byDefault, nil
	}
	d, err := spec.Span(a.timeout)
	if err != nil {
		return 0, usage(fmt.Errorf("--timeout %w", err))
	}
	return d, nil
}

// within returns a context that ends when the command may take no longer; 0 is
// no limit.
func (a *app) within(ctx context.Context, byDefault time.Duration) (context.Context, context.CancelFunc, error) {
	d, err := a.limit(byDefault)
	if err != nil {
		return nil, nil, err
	}
	if d == 0 {
		ctx, cancel := context.WithCancel(ctx)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	return ctx, cancel, nil
}

// setting is a flag, or the environment variable that stands in for it.
func (a *app) setting(flag, value string) string {
	if a.changed(flag) {
		return value
	}
	return a.Getenv("BRIDGECTL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_")))
}

func (a *app) where() string {
	if t := a.setting("target", a.target); t != "" {
		return t
	}
	return defaultTarget
}

// dial returns the connection to the target.
func (a *app) dial() (*grpc.ClientConn, error) {
	if a.conn != nil {
		return a.conn, nil
	}
	c := grpcx.ClientConfig{Target: a.where(), ServerName: a.setting("server-name", a.serverName), Insecure: a.insecure}
	var t grpcx.TLSConfig
	if dir := a.setting("identity", a.identity); dir != "" {
		t = grpcx.TLSConfig{
			CertFile: config.Path(filepath.Join(dir, "cert.pem")), KeyFile: config.Path(filepath.Join(dir, "key.pem")),
			CAFile: config.Path(filepath.Join(dir, "ca.pem")),
		}
	}
	// Single files win over the directory, and flags over the environment.
	for _, f := range []struct {
		flag, value string
		file        *config.Path
	}{{"cert", a.cert, &t.CertFile}, {"key", a.key, &t.KeyFile}, {"ca", a.ca, &t.CAFile}} {
		if v := a.setting(f.flag, f.value); v != "" && (a.changed(f.flag) || !a.changed("identity")) {
			*f.file = config.Path(v)
		}
	}
	if err := c.Validate("client"); err != nil {
		return nil, usage(errors.New(strings.NewReplacer("client.target", "--target", "client.insecure", "--insecure").Replace(err.Error())))
	}
	if !c.Insecure && grpcx.UnixPath(c.Target) == "" {
		if t == (grpcx.TLSConfig{}) {
			return nil, usage(fmt.Errorf("%s needs mutual TLS: give --identity DIR (see bridgectl certs), or --cert, --key and --ca", c.Target))
		}
		if err := t.Validate("tls"); err != nil {
			return nil, usage(errors.New(strings.NewReplacer("tls.cert_file", "--cert", "tls.key_file", "--key", "tls.ca_file", "--ca").Replace(err.Error())))
		}
	}
	a.debug("Calling %s", c.Target)
	conn, err := grpcx.Dial(c, t)
	if err != nil {
		return nil, usage(err)
	}
	a.conn = conn
	return conn, nil
}

// store returns where grants are kept.
func (a *app) store() (state.Store, error) { return state.Default(a.Getenv) }

// idPrefix is how many hex digits name a grant at least.
const idPrefix = 4

// resolve finds the grant that an argument names: a handle, an id, or the
// beginning of one, among what is stored here and what the target knows.
func (a *app) resolve(ctx context.Context, arg string) (string, backend.GrantID, error) {
	if id, err := backend.Handle(arg).GrantID(); err == nil && strings.Contains(arg, "/") {
		return arg, id, nil
	}
	arg = strings.ToLower(arg)
	if strings.Trim(arg, "0123456789abcdef") != "" || len(arg) < idPrefix || len(arg) > 64 {
		return "", backend.GrantID{}, usage(fmt.Errorf("%q: want a grant's id, at least the first %d hex digits of it, or its handle", arg, idPrefix))
	}
	found := map[backend.GrantID]string{}
	store, storeErr := a.store()
	if storeErr == nil {
		ids, err := store.IDs()
		if err != nil {
			return "", backend.GrantID{}, err
		}
		for _, id := range ids {
			if strings.HasPrefix(id.String(), arg) {
				if g, err := store.Load(id); err == nil {
					found[id] = g.Handle()
				}
			}
		}
	}
	full, fullErr := backend.ParseGrantID(arg)
	if fullErr == nil && found[full] != "" {
		return found[full], full, nil
	}
	// As many digits as a list shows are enough to go by what is stored.
	if len(found) == 1 && len(arg) >= show.ShortID {
		for id, handle := range found {
			return handle, id, nil
		}
	}
	if err := a.ask(ctx, arg, found); err != nil && len(found) == 0 {
		return "", backend.GrantID{}, err
	}
	switch {
	case len(found) == 1:
		for id, handle := range found {
			return handle, id, nil
		}
	case len(found) > 1:
		var ids []string
		for id := range found {
			ids = append(ids, id.String())
		}
		return "", backend.GrantID{}, usage(fmt.Errorf("%q is the beginning of %d grants: %s", arg, len(ids), strings.Join(sorted(ids), ", ")))
	case fullErr == nil:
		return string(backend.HandleFor(full)), full, nil // The target may know more than it lists.
	}
	return "", backend.GrantID{}, fail(ExitNotFound, "no grant begins with %s, neither here nor at %s", arg, a.where())
}

// ask adds the grants that the target lists.
func (a *app) ask(ctx context.Context, prefix string, found map[backend.GrantID]string) error {
	conn, err := a.dial()
	if err != nil {
		return err
	}
	inventory := bridgev1.NewInventoryServiceClient(conn)
	instances, err := inventory.ListInstances(ctx, &bridgev1.ListInstancesRequest{})
	if err != nil {
		return rpc(err)
	}
	for _, i := range instances.GetInstances() {
		a.found(found, prefix, i.GetRequestId(), i.GetHandle())
	}
	if len(found) > 0 {
		return nil
	}
	logs, err := inventory.ListComputeLogs(ctx, &bridgev1.ListComputeLogsRequest{Limit: 1000})
	if err != nil {
		return rpc(err)
	}
	for _, l := range logs.GetComputeLogs() {
		a.found(found, prefix, l.GetLog().GetRequestId(), "")
	}
	return nil
}

func (a *app) found(found map[backend.GrantID]string, prefix string, requestID []byte, handle string) {
	if len(requestID) != len(backend.GrantID{}) {
		return
	}
	id := backend.GrantID(requestID)
	if !strings.HasPrefix(id.String(), prefix) || found[id] != "" {
		return
	}
	if handle == "" {
		handle = string(backend.HandleFor(id))
	}
	found[id] = handle
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			version, revision := "unknown", ""
			if info, ok := debug.ReadBuildInfo(); ok {
				version = info.Main.Version
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						revision = s.Value
					}
				}
			}
			if a.json() {
				text, err := json.Marshal(map[string]string{"version": version, "revision": revision, "go": runtime.Version(), "contract": "computebridge.v1"})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(a.Stdout, string(text))
				return err
			}
			return term.Fields(a.Stdout, a.painter(a.Stdout), "",
				[2]string{"bridgectl", version}, [2]string{"revision", revision}, [2]string{"contract", "computebridge.v1"},
				[2]string{"built with", runtime.Version() + " for " + runtime.GOOS + "/" + runtime.GOARCH})
		},
	}
}

// readFile reads a file that a flag names, "-" is the standard input.
func (a *app) readFile(path string) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(a.Stdin)
	}
	return os.ReadFile(path)
}
