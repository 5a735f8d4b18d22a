package cli

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/spec"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

func sorted(texts []string) []string {
	slices.Sort(texts)
	return texts
}

func (a *app) cardCommand() *cobra.Command {
	var wide bool
	cmd := &cobra.Command{
		Use: "card", Short: "Show what a bridge offers: its provider card", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewFleetServiceClient(conn).GetProviderCard(ctx, &bridgev1.GetProviderCardRequest{})
			if err != nil {
				return rpc(err)
			}
			return a.print(res, func(o show.Output) error {
				o.Wide = wide
				return o.Card(res.GetCard())
			})
		},
	}
	cmd.Flags().BoolVar(&wide, "wide", false, "show more columns")
	return cmd
}

func (a *app) backendsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "backends", Short: "Show a router's backends in order, with their health", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewFleetServiceClient(conn).ListBackends(ctx, &bridgev1.ListBackendsRequest{})
			if err != nil {
				return rpc(err)
			}
			return a.print(res, func(o show.Output) error { return o.Backends(res.GetBackends()) })
		},
	}
}

func (a *app) listCommand() *cobra.Command {
	var wide bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the instances that exist or are being made", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewInventoryServiceClient(conn).ListInstances(ctx, &bridgev1.ListInstancesRequest{})
			if err != nil {
				return rpc(err)
			}
			return a.print(res, func(o show.Output) error {
				o.Wide = wide
				if err := o.Instances(res.GetInstances()); err != nil {
					return err
				}
				o.W = a.Stderr
				o.Unreachable(res.GetUnreachableBackends())
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&wide, "wide", false, "show whole ids and more columns")
	return cmd
}

// since reads a time, or a length of time before now.
func (a *app) since(s string) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return timestamppb.New(t), nil
	}
	d, err := spec.Span(s)
	if err != nil {
		return nil, usage(fmt.Errorf("--since %q: want a time such as 2030-01-31T12:00:00Z or how long ago, such as 2d", s))
	}
	return timestamppb.New(a.Now().Add(-d)), nil
}

func (a *app) logsCommand() *cobra.Command {
	var verify, wide bool
	var since string
	var limit int32
	cmd := &cobra.Command{
		Use: "logs [GRANT]", Short: "Show compute logs: what ran, how it ended, what it used",
		Long: `Show compute logs: one in full with GRANT, else one a line, oldest first.

With --verify, signatures are checked against the keys in the target's
capabilities; the exit code is 1 if any is not good. What is shown is what was
signed.`,
		Args: cobra.MatchAll(func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(fmt.Errorf("%s takes one GRANT at most", cmd.CommandPath()))
			}
			return nil
		}),
		ValidArgsFunction: a.grants,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			if limit < 0 || limit > 1000 {
				return usage(fmt.Errorf("--limit %d: want 1 to 1000", limit))
			}
			req := &bridgev1.ListComputeLogsRequest{Limit: limit}
			if req.Since, err = a.since(since); err != nil {
				return err
			}
			if len(args) == 1 {
				_, id, err := a.resolve(ctx, args[0])
				if err != nil {
					return err
				}
				req.RequestId = id[:]
			}
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewInventoryServiceClient(conn).ListComputeLogs(ctx, req)
			if err != nil {
				return rpc(err)
			}
			var keys []*bridgev1.LogKey
			if verify {
				caps, err := bridgev1.NewBackendServiceClient(conn).Capabilities(ctx, &bridgev1.CapabilitiesRequest{})
				if err != nil {
					return rpc(err)
				}
				keys = caps.GetCapabilities().GetLogKeys()
			}
			var logs []show.CheckedLog
			bad := 0
			for _, l := range res.GetComputeLogs() {
				checked, err := check(l, verify, keys)
				if err != nil {
					return err
				}
				if verify && checked.Signature != show.SignatureGood {
					bad++
				}
				logs = append(logs, checked)
			}
			if len(args) == 1 && len(logs) == 0 {
				return fail(ExitNotFound, "no compute log of %s: it has not ended, or was never known here", args[0])
			}
			err = a.print(res, func(o show.Output) error {
				o.Wide = wide
				defer func() {
					o.W = a.Stderr
					o.Unreachable(res.GetUnreachableBackends())
				}()
				if len(args) == 0 {
					return o.Logs(logs)
				}
				for _, l := range logs {
					if err := o.Log(l); err != nil {
						return err
					}
				}
				return nil
			})
			switch {
			case err != nil:
				return err
			case bad > 0:
				return fail(ExitOther, "%d of %s can't be trusted: the signature is not good", bad, count(len(logs), "compute log"))
			case verify && a.json():
				a.note(term.Good, "All %d signatures are good.", len(logs))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "check signatures; exit with 1 if one is not good")
	cmd.Flags().BoolVar(&wide, "wide", false, "show whole ids")
	cmd.Flags().StringVar(&since, "since", "", "only logs written since: a time (RFC 3339), or how long ago (2d)")
	cmd.Flags().Int32Var(&limit, "limit", 0, "at most so many (default 100, at most 1000)")
	return cmd
}

// check returns what was signed, and whether it was signed well. The decoded
// copy beside it is a convenience that nothing protects.
func check(l *bridgev1.SignedComputeLog, verify bool, keys []*bridgev1.LogKey) (show.CheckedLog, error) {
	out := show.CheckedLog{Log: l.GetLog(), KeyID: l.GetKeyId()}
	if len(l.GetBody()) > 0 {
		out.Log = &bridgev1.ComputeLog{}
		if err := proto.Unmarshal(l.GetBody(), out.Log); err != nil {
			return out, fail(ExitOther, "compute log of %x: what was signed is no compute log", l.GetLog().GetRequestId())
		}
	}
	if !verify {
		return out, nil
	}
	out.Signature = show.SignatureUnknownKey
	for _, k := range keys {
		if k.GetId() != l.GetKeyId() {
			continue
		}
		out.Signature = show.SignatureBad
		if receipt.VerifyLog(k.GetPublicKey(), l.GetBody(), l.GetSignature()) == nil && proto.Equal(out.Log, l.GetLog()) {
			out.Signature = show.SignatureGood
			break
		}
	}
	return out, nil
}

func (a *app) usageCommand() *cobra.Command {
	return &cobra.Command{
		Use: "usage GRANT", Short: "Show what a grant used, so far or in the end", Args: exactly("GRANT"), ValidArgsFunction: a.grants,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			_, id, err := a.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewInventoryServiceClient(conn).ListComputeLogs(ctx, &bridgev1.ListComputeLogsRequest{RequestId: id[:]})
			if err != nil {
				return rpc(err)
			}
			logs := res.GetComputeLogs()
			if len(logs) == 0 {
				return fail(ExitNotFound, "no figures of %s yet", args[0])
			}
			last := logs[len(logs)-1]
			return a.print(last, func(o show.Output) error {
				checked, err := check(last, false, nil)
				if err != nil {
					return err
				}
				return o.Log(checked)
			})
		},
	}
}

// wait waits, unless ctx ends first.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Pauses between tries of the same call, doubled from the first to the last.
const (
	firstPause = 500 * time.Millisecond
	lastPause  = 10 * time.Second
)

// pause returns how long to wait after a failure.
func pause(try int, err error) time.Duration {
	if after := backenderr.From(err).RetryAfter; after > 0 {
		return min(after, time.Minute)
	}
	return min(firstPause<<min(try, 5), lastPause)
}

func (a *app) watchCommand() *cobra.Command {
	return &cobra.Command{
		Use: "watch GRANT", Short: "Watch a grant until it ends, and show what it used",
		Long: `Watch a grant until it ends, and show what it used. A watch that breaks is taken
up again. With -o json, each event is a line of its own.

Interrupting the watch changes nothing for the grant.`,
		Args: exactly("GRANT"), ValidArgsFunction: a.grants,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel, err := a.within(cmd.Context(), 0)
			if err != nil {
				return err
			}
			defer cancel()
			handle, id, err := a.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			conn, err := a.dial()
			if err != nil {
				return err
			}
			w := &watcher{app: a, service: bridgev1.NewBackendServiceClient(conn), handle: handle}
			for try := 0; ; try++ {
				seen := w.events
				final, err := w.once(ctx)
				if err == nil {
					a.forgetKey(id)
					if a.json() {
						return nil
					}
					checked, err := check(final, false, nil)
					if err != nil {
						return err
					}
					fmt.Fprintln(a.Stdout)
					return a.show().Log(checked)
				}
				switch {
				case ctx.Err() != nil:
					return interrupted(ctx, "the grant goes on")
				case !ambiguous(err) && !backenderr.Is(err, backenderr.Unknown, backenderr.DeadlineExceeded, backenderr.Cancelled):
					return rpc(err)
				}
				if w.events > seen {
					try = 0 // It had worked again.
				}
				if text := message(backenderr.From(err)); text != w.broke {
					w.broke = text
					a.note(term.Faint, "The watch broke (%s); taking it up again.", text)
				}
				if wait(ctx, pause(try, err)) != nil {
					return interrupted(ctx, "the grant goes on")
				}
			}
		},
	}
}

// interrupted is the error of a command whose context has ended.
func interrupted(ctx context.Context, consequence string) error {
	if context.Cause(ctx) == context.DeadlineExceeded { //nolint:errorlint // The cause is the very value.
		return fail(ExitUnavailable, "timed out; %s", consequence)
	}
	return fail(ExitInterrupted, "interrupted; %s", consequence)
}

type watcher struct {
	*app
	service bridgev1.BackendServiceClient
	handle  string
	events  int
	last    *bridgev1.Instance
	usage   []byte // signed body of the last report of usage
	broke   string
}

// once watches until the end, whose log it returns, or until the stream breaks.
func (w *watcher) once(ctx context.Context) (*bridgev1.SignedComputeLog, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := w.service.WatchUntilExit(ctx, &bridgev1.WatchUntilExitRequest{Handle: w.handle})
	if err != nil {
		return nil, backenderr.From(err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			if e := backenderr.From(err); err.Error() != "EOF" {
				return nil, e
			}
			return nil, backenderr.New(backenderr.BackendUnreachable, "it ended without a compute log")
		}
		w.events++
		w.broke = ""
		if i := event.GetInstance(); i != nil {
			if w.last != nil && proto.Equal(w.last, i) {
				continue // The present state again, after taking the watch up.
			}
			w.last = i
		}
		if u := event.GetUsage(); u != nil {
			if w.usage != nil && bytes.Equal(w.usage, u.GetBody()) {
				continue // The last report again, for the same reason.
			}
			w.usage = u.GetBody()
		}
		if w.json() {
			text, err := marshal(event, "", false)
			if err != nil {
				return nil, err
			}
			if _, err := w.Stdout.Write(text); err != nil {
				return nil, fail(ExitOther, "%w", err)
			}
		} else {
			w.show().Event(event)
		}
		if log := event.GetComputeLog(); log != nil {
			return log, nil
		}
	}
}

func (a *app) drainCommand(drain bool) *cobra.Command {
	use, short := "drain", "Let a worker take no new grants; what runs goes on"
	if !drain {
		use, short = "resume", "Let a worker take new grants again"
	}
	return &cobra.Command{
		Use: use, Short: short, Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel, err := a.within(cmd.Context(), quick)
			if err != nil {
				return err
			}
			defer cancel()
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewOperatorServiceClient(conn).SetDraining(ctx, &bridgev1.SetDrainingRequest{Draining: drain})
			if err != nil {
				return rpc(a.onlyWorkers(err))
			}
			return a.print(res, func(o show.Output) error {
				if res.GetDraining() {
					fmt.Fprintln(o.W, o.Paint(term.Busy, "Draining:"), "no new grants; what runs goes on. Not kept across a restart.")
				} else {
					fmt.Fprintln(o.W, o.Paint(term.Good, "Taking new grants."))
				}
				return nil
			})
		},
	}
}

// onlyWorkers says what is amiss when a router is asked for a worker's service.
func (a *app) onlyWorkers(err error) error {
	if backenderr.Is(backenderr.From(err), backenderr.Unimplemented) {
		return backenderr.New(backenderr.Unimplemented, "%s is no worker: only a worker can be drained; give its address as --target", a.where())
	}
	return err
}

func (a *app) sweepCommand() *cobra.Command {
	var dryRun bool
	var name string
	cmd := &cobra.Command{
		Use: "sweep", Short: "Delete what backends hold and should not",
		Long: `Delete what backends hold and should not: of grants that are closed or past their
deadline, or half made with nobody at work on it. Workers do so by themselves all
the time; this is for looking, and for not waiting. The target is a router, which
asks all its backends or the one that --backend names, or a worker.

What a look finds is deleted when the next look, of this command or the worker's
own, finds it again. Nothing is deleted where the worker can't see: that is exit
code 5. Exit code 1 says that something could not be deleted.`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel, err := a.within(cmd.Context(), 5*time.Minute)
			if err != nil {
				return err
			}
			defer cancel()
			conn, err := a.dial()
			if err != nil {
				return err
			}
			res, err := bridgev1.NewOperatorServiceClient(conn).Sweep(ctx, &bridgev1.SweepRequest{DryRun: dryRun, Backend: name})
			if err != nil {
				return rpc(err)
			}
			if err := a.print(res, func(o show.Output) error { return o.Swept(res, dryRun) }); err != nil {
				return err
			}
			for _, r := range res.GetResources() {
				if r.GetError() != "" {
					return fail(ExitOther, "something could not be deleted")
				}
			}
			if len(res.GetBlind())+len(res.GetFailures()) > 0 {
				return fail(ExitUnavailable, "not everything could be seen; nothing was done there")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "delete nothing, only report")
	cmd.Flags().StringVar(&name, "backend", "", "only this backend of the router, site/metal for one behind another router (default: all)")
	a.completeFlag(cmd, "backend", backends)
	return cmd
}
