package worker

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/process"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
)

// Exit codes of `sweep`; 2 is a wrong call.
const (
	sweepClean  = 0
	sweepFailed = 1
	sweepBlind  = 3
)

// errBlind says that nothing could be done because platform or ledger can't be
// read.
var errBlind = errors.New("nothing is touched while blind")

// SweepCommand is a worker's command `sweep`: the janitor, for cron.
func SweepCommand[D any](open Open[D]) process.Command[Config[D]] {
	return process.Command[Config[D]]{
		Name:    "sweep",
		Summary: "delete what should not exist, by itself, with no worker running",
		Prepare: func(flags *flag.FlagSet) func(context.Context, Config[D], *slog.Logger, io.Writer) (int, error) {
			once := flags.Bool("once", false, "look and act once, then exit; workers that serve sweep by themselves")
			dryRun := flags.Bool("dry-run", false, "change nothing, say what would be done")
			output := flags.String("output", "table", "`format`: table or json")
			pause := flags.Duration("pause", defaultPause, "between the two looks that must agree")
			limit := flags.Duration("limit", defaultActLimit, "for ending one grant")
			return func(ctx context.Context, c Config[D], log *slog.Logger, stdout io.Writer) (int, error) {
				switch {
				case !*once && !*dryRun:
					return 0, process.UsageError("want -once or -dry-run")
				case *output != "table" && *output != "json":
					return 0, process.UsageError(fmt.Sprintf("-output %q: want table or json", *output))
				case *pause <= 0 || *limit <= 0:
					return 0, process.UsageError("-pause and -limit must be positive")
				}
				report, err := sweepOnce(ctx, c, open, SweepOptions{DryRun: *dryRun, Pause: *pause, ActLimit: *limit}, log)
				if errors.Is(err, errBlind) {
					return sweepBlind, err
				}
				if err != nil {
					return sweepFailed, err
				}
				show := report.table
				if *output == "json" {
					show = report.json
				}
				return report.exitCode(), show(stdout, time.Now())
			}
		},
	}
}

// sweepOnce opens what a worker with this configuration would, and sweeps.
func sweepOnce[D any](ctx context.Context, c Config[D], open Open[D], o SweepOptions, log *slog.Logger) (report SweepReport, failure error) {
	// What a worker makes when it is missing, a janitor must not: with a new
	// secret its logs would be signed by another key, and with a new ledger it
	// would know of no grant.
	secret, err := sshkey.LoadSecret(string(c.SecretFile))
	if err != nil {
		return SweepReport{}, fmt.Errorf("secret_file: %w", err)
	}
	store, err := openExisting(ctx, c.Ledger)
	if err != nil {
		return SweepReport{}, fmt.Errorf("%w: %w", errBlind, err)
	}
	defer func() { failure = errors.Join(failure, store.Close()) }()
	runtime, err := NewRuntime(RuntimeConfig{
		BridgeID: c.BridgeID, Backend: c.Name, Ledger: store, Secret: secret, Janitor: true, DryRun: o.DryRun,
		OrphanAge: c.Sweep.OrphanAge.Duration, Grace: c.Sweep.Grace.Duration,
		Log: log, Metrics: telemetry.NewRegistry(),
	})
	if err != nil {
		return SweepReport{}, err
	}
	driver, err := open(ctx, c.Backend, runtime.Env())
	if err != nil {
		return SweepReport{}, err
	}
	defer func() { failure = errors.Join(failure, driver.Close()) }()
	report, err = runtime.SweepOnce(ctx, driver, o)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errBlind, err)
	}
	return report, err
}

// openExisting opens a ledger that a worker has made.
func openExisting(ctx context.Context, c ledger.Section) (*ledger.Ledger, error) {
	existing := c.Config()
	existing.Existing = true
	store, err := ledger.Open(ctx, existing)
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, fmt.Errorf("ledger: %w: was it moved? A worker that starts makes a new one, and then what runs stays until its own deadline", err)
	}
	return store, err
}

// exitCode is 0 if nothing is left to do that could be seen, 1 if something is
// not done, 3 if something could not be seen.
func (r SweepReport) exitCode() int {
	code := sweepClean
	if len(r.Blind) > 0 {
		code = sweepBlind
	}
	for _, f := range r.Findings {
		switch f.Result {
		case SweepFailed:
			return sweepFailed
		case SweepBlind:
			code = sweepBlind
		case SweepWould, SweepDone:
		}
	}
	return code
}

// table writes the report for people.
func (r SweepReport) table(w io.Writer, now time.Time) error {
	var b strings.Builder
	if len(r.Findings) == 0 {
		fmt.Fprintf(&b, "Nothing that should not exist, among what there is of %d grants.\n", r.Looked)
	} else {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		_, _ = fmt.Fprintln(t, "GRANT\tWHERE\tAGE\tDEADLINE\tWHY\tACTION\tRESULT")
		for _, f := range r.Findings {
			result := string(f.Result)
			if f.Err != nil {
				result += ": " + strings.Join(strings.Fields(f.Err.Error()), " ")
			}
			age, deadline, where := "-", "-", "-"
			if !f.Since.IsZero() {
				age = now.Sub(f.Since).Round(time.Second).String()
			}
			if !f.ValidTo.IsZero() {
				deadline = f.ValidTo.UTC().Format(time.RFC3339)
			}
			if len(f.Where) > 0 {
				where = strings.Join(f.Where, ",")
			}
			_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", f.GrantID, where, age, deadline, f.Why, f.Action, result)
		}
		_ = t.Flush() // Into memory.
	}
	for _, part := range r.Blind {
		fmt.Fprintf(&b, "Not seen, and nothing done there: %s\n", part)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// The report for scripts. Names and results don't change.
type (
	sweepJSON struct {
		Findings   []findingJSON `json:"findings"`
		Blind      []string      `json:"blind"`
		Looked     int           `json:"grants_looked_at"`
		WorkerSeen *time.Time    `json:"worker_seen,omitempty"`
		ExitCode   int           `json:"exit_code"`
	}
	findingJSON struct {
		Grant     string         `json:"grant"`
		Where     []string       `json:"where"`
		Resources []resourceJSON `json:"resources"`
		Since     *time.Time     `json:"since,omitempty"`
		ValidTo   *time.Time     `json:"valid_to,omitempty"`
		Why       string         `json:"why"`
		Action    SweepAction    `json:"action"`
		Result    string         `json:"result"`
		Error     string         `json:"error,omitempty"`
	}
	resourceJSON struct {
		InstanceID string `json:"instance_id"`
		Attempt    uint32 `json:"attempt"`
		Running    bool   `json:"running"`
	}
)

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// json writes the report for scripts.
func (r SweepReport) json(w io.Writer, _ time.Time) error {
	out := sweepJSON{Findings: []findingJSON{}, Blind: append([]string{}, r.Blind...), Looked: r.Looked, WorkerSeen: known(r.WorkerSeen), ExitCode: r.exitCode()}
	for _, f := range r.Findings {
		p := findingJSON{
			Grant: f.GrantID.String(), Where: append([]string{}, f.Where...), Resources: []resourceJSON{},
			Since: known(f.Since), ValidTo: known(f.ValidTo), Why: f.Why, Action: f.Action,
			Result: strings.ReplaceAll(string(f.Result), " ", "_"),
		}
		for _, resource := range f.Resources {
			p.Resources = append(p.Resources, resourceJSON{string(resource.InstanceID), resource.Attempt, resource.Running})
		}
		if f.Err != nil {
			p.Error = f.Err.Error()
		}
		out.Findings = append(out.Findings, p)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(out)
}
