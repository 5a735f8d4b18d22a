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
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/process"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
	"github.com/compute-bridge/compute-bridge/services/router/internal/api"
	"github.com/compute-bridge/compute-bridge/services/router/internal/claims"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
	"github.com/compute-bridge/compute-bridge/services/router/internal/workers"
)

// metricsTimeout is how long a reading of the metrics may keep the end waiting.
const metricsTimeout = 2 * time.Second

// Program is the router's command line.
func Program() process.Program[Config] {
	return process.Program[Config]{
		Name:     "router",
		Serves:   func(c Config) grpcx.ServerConfig { return c.ServerConfig },
		LogLevel: func(c Config) string { return c.LogLevel },
		Run: func(ctx context.Context, c Config, log *slog.Logger) error {
			return Run(ctx, c, log, nil)
		},
	}
}

// Run serves until ctx ends. listening, if not nil, is called with the
// addresses once calls are taken. c is valid.
//
// What runs at the backends is not touched by the end of the router.
func Run(ctx context.Context, c Config, log *slog.Logger, listening func([]net.Addr)) (failure error) {
	// Deferred calls run in reverse: the server stops first, then the watches,
	// the connections, the ledger and, last of all, the metrics.
	metrics := telemetry.NewRegistry()
	if c.MetricsAddress != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.MetricsAddress)
		if err != nil {
			return fmt.Errorf("metrics_address: %w", err)
		}
		exporter := telemetry.ServeMetrics(l, metrics, log)
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), metricsTimeout)
			defer cancel()
			failure = errors.Join(failure, exporter.Shutdown(ctx))
		}()
	}
	store, err := ledger.Open(ctx, c.Ledger.Config())
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	defer func() { failure = errors.Join(failure, store.Close()) }()

	var backends []*workers.Worker
	defer func() {
		for _, w := range backends {
			failure = errors.Join(failure, w.Close())
		}
	}()
	var members []fleet.Member
	var names []string
	for i := range c.Backends {
		w, err := workers.Dial(c.Backends[i].worker(), c.TLS, log)
		if err != nil {
			return err
		}
		backends, members, names = append(backends, w), append(members, w.Member()), append(names, w.Name())
	}

	router, err := fleet.New(fleet.Config{
		Name: c.BridgeID, Members: members, Claims: claims.New(store), StrictFirstMatch: !c.FallThrough, Log: log,
	})
	if err != nil {
		return err
	}
	if err := metrics.Register(newBackendMetrics(router)); err != nil {
		return fmt.Errorf("register metrics: %w", err)
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

	log.InfoContext(ctx, "Started router", "bridge_id", c.BridgeID, "backends", names, "fall_through", c.FallThrough, "version", process.Version())
	if listening != nil {
		listening(server.Addrs())
	}
	err = server.Run(ctx, c.ShutdownTimeout.Duration)
	log.InfoContext(ctx, "Stopped router")
	return err
}
