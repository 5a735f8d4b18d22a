package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
)

// completionTimeout names the environment variable for how long somebody who
// pressed a key waits for the target, as time.ParseDuration reads it. What the
// target can't say in time isn't offered, and nothing is said of that.
const (
	completionTimeout        = "BRIDGECTL_COMPLETION_TIMEOUT"
	defaultCompletionTimeout = time.Second
)

// completion offers what begins with what was typed.
type completion func(ctx context.Context, a *app) []string

// complete makes a shell's completion of something that is looked up, perhaps at
// the target, as flags and environment say. It never prints and never fails.
func (a *app) complete(look completion) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		a.changed = func(flag string) bool {
			f := cmd.Flags().Lookup(flag)
			return f != nil && f.Changed
		}
		a.verbose = false
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background() //nolint:forbidigo // cobra may have none.
		}
		limit, err := time.ParseDuration(a.Getenv(completionTimeout))
		if err != nil || limit <= 0 {
			limit = defaultCompletionTimeout
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		offered := []string{}
		for _, name := range look(ctx, a) {
			if strings.HasPrefix(name, typed) {
				offered = append(offered, name)
			}
		}
		return offered, cobra.ShellCompDirectiveNoFileComp
	}
}

// grants completes a grant: by its id, or by its handle once that is begun.
func (a *app) grants(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.complete(func(ctx context.Context, a *app) []string {
		handles := map[backend.GrantID]string{}
		if store, err := a.store(); err == nil {
			ids, _ := store.IDs() // Without them there are those of the target.
			for _, id := range ids {
				handles[id] = ""
				if g, err := store.Load(id); err == nil {
					handles[id] = g.Handle()
				}
			}
		}
		if conn, err := a.dial(); err == nil {
			res, err := bridgev1.NewInventoryServiceClient(conn).ListInstances(ctx, &bridgev1.ListInstancesRequest{})
			if err == nil {
				for _, i := range res.GetInstances() {
					if len(i.GetRequestId()) == len(backend.GrantID{}) {
						handles[backend.GrantID(i.GetRequestId())] = i.GetHandle()
					}
				}
			}
		}
		var names []string
		for id, handle := range handles {
			switch short := show.ID(id[:]); {
			case len(typed) <= len(short) && strings.HasPrefix(short, typed):
				names = append(names, short)
			default:
				names = append(names, id.String(), handle)
			}
		}
		return slices.Compact(sorted(names)) // A worker's handle is the id.
	})(cmd, args, typed)
}

// backends looks up the names of the target's backends, nested ones as
// "site/metal".
func backends(ctx context.Context, a *app) []string {
	conn, err := a.dial()
	if err != nil {
		return nil
	}
	res, err := bridgev1.NewFleetServiceClient(conn).GetProviderCard(ctx, &bridgev1.GetProviderCardRequest{})
	if err != nil {
		return nil
	}
	offered := map[string]bool{}
	for _, name := range res.GetCard().GetBackends() {
		// A site as a whole is a backend, too.
		for at := range name {
			if name[at] == '/' {
				offered[name[:at]] = true
			}
		}
		offered[name] = true
	}
	return keys(offered)
}

// regions looks up where the target has compute.
func regions(ctx context.Context, a *app) []string {
	conn, err := a.dial()
	if err != nil {
		return nil
	}
	res, err := bridgev1.NewBackendServiceClient(conn).Capabilities(ctx, &bridgev1.CapabilitiesRequest{})
	if err != nil {
		return nil
	}
	offered := map[string]bool{}
	for _, r := range res.GetCapabilities().GetRegions() {
		offered[r.GetRegion()] = true
	}
	return keys(offered)
}

func keys(set map[string]bool) []string {
	var all []string
	for name := range set {
		all = append(all, name)
	}
	return sorted(all)
}

// words completes one of a few.
func words(all ...string) completion {
	return func(context.Context, *app) []string { return all }
}

// completeFlag completes a flag of a command.
func (a *app) completeFlag(cmd *cobra.Command, flag string, look completion) {
	if err := cmd.RegisterFlagCompletionFunc(flag, a.complete(look)); err != nil {
		panic(err) // There is no such flag: a mistake in this program.
	}
}
