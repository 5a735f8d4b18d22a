// Package server puts the router together: one function from configuration to
// serving.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/services/router/internal/api"
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

// Run serves until ctx ends. listening, if not nil, is called with the
// addresses once calls are taken. c comes from [Load].
//
// What runs at the backends is not touched by the end of the router.
func Run(ctx context.Context, c Config, log *slog.Logger, metrics prometheus.Registerer, listening func([]net.Addr)) (err error) {
	// Deferred calls run in reverse: the server stops first, then the watches,
	// then the connections, then the ledger.
	store, err := ledger.Open(ctx, ledger.Config{Driver: c.Ledger.Driver, Path: string(c.Ledger.Path)})
	if err != nil {
		return fmt.Errorf("ledger.path: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()

	var backends []*workers.Worker
	var members []fleet.Member
	var names []string
	for i := range c.Backends {
		w, err := workers.Dial(c.Backends[i].worker(), c.TLS, log)
		if err != nil {
			return err
		}
		defer w.Close()
		backends, members, names = append(backends, w), append(members, w.Member()), append(names, w.Name())
	}

	router, err := fleet.New(fleet.Config{
		Name: c.BridgeID, Members: members, Claims: claims.New(store), StrictFirstMatch: !c.FallThrough, Log: log,
	})
	if err != nil {
		return err
	}

	server, err := grpcx.NewServer(c.ServerConfig, log, metrics)
	if err != nil {
		return err
	}
	api.Register(server, c.BridgeID, router, workers.NewInventory(backends, log))

	// Every backend is asked once before the first call is taken, which a
	// backend that hangs delays by its poll_timeout.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	var watches, asked sync.WaitGroup
	defer watches.Wait()
	defer stopWatching()
	asked.Add(len(backends))
	for _, w := range backends {
		watches.Go(func() { w.Watch(watching, sync.OnceFunc(asked.Done)) })
	}
	asked.Wait()

	log.InfoContext(ctx, "Started router", "bridge_id", c.BridgeID, "backends", names, "fall_through", c.FallThrough)
	if listening != nil {
		listening(server.Addrs())
	}
	err = server.Run(ctx, c.ShutdownTimeout.Duration)
	log.InfoContext(ctx, "Stopped router")
	return err
}
