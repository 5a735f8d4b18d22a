package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/process"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// metricsTimeout is how long a reading of the metrics may keep the end waiting.
const metricsTimeout = 2 * time.Second

// Open opens a driver with its part of the configuration.
type Open[D any] func(ctx context.Context, c D, env Env) (Driver, error)

// Main is a worker's main function. It does not return.
func Main[D any](name string, open Open[D]) {
	process.Program[Config[D]]{
		Name:     name,
		Serves:   func(c Config[D]) grpcx.ServerConfig { return c.ServerConfig },
		LogLevel: func(c Config[D]) string { return c.LogLevel },
		Run: func(ctx context.Context, c Config[D], log *slog.Logger) error {
			return Run(ctx, c, open, log, nil)
		},
		Commands: []process.Command[Config[D]]{SweepCommand(open)},
	}.Main()
}

// Run serves until ctx ends. listening, if not nil, is called with the
// addresses once calls are taken. Instances keep running when it returns.
func Run[D any](ctx context.Context, c Config[D], open Open[D], log *slog.Logger, listening func([]net.Addr)) (failure error) {
	// Deferred calls run in reverse: the server has stopped by then; keepers
	// and sweep stop first, then the driver, the ledger and, last, the metrics.
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
	secret, err := sshkey.CreateSecret(string(c.SecretFile))
	if err != nil {
		return fmt.Errorf("secret_file: %w", err)
	}
	store, err := ledger.Open(ctx, c.Ledger.Config())
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	defer func() { failure = errors.Join(failure, store.Close()) }()

	runtime, err := NewRuntime(RuntimeConfig{
		BridgeID: c.BridgeID, Backend: c.Name, Ledger: store, Secret: secret,
		MaxDuration: c.MaxDuration.Duration, AllowPlaintextReceipts: c.AllowPlaintextReceipts,
		SweepInterval: c.Sweep.Interval.Duration, OrphanAge: c.Sweep.OrphanAge.Duration, Grace: c.Sweep.Grace.Duration,
		Log: log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	driver, err := open(ctx, c.Backend, runtime.Env())
	if err != nil {
		return err
	}
	defer func() { failure = errors.Join(failure, driver.Close()) }()
	if err := runtime.Start(ctx, driver); err != nil {
		return err
	}
	defer runtime.Close()

	server, err := grpcx.NewServer(c.ServerConfig, log, metrics)
	if err != nil {
		return err
	}
	Register(server, runtime)
	runtime.reportServing(func(serving bool) { server.SetServiceServing(bridgev1.BackendService_ServiceDesc.ServiceName, serving) })
	log.InfoContext(ctx, "Started worker", "bridge_id", c.BridgeID, "backend", c.Name, "version", process.Version())
	if listening != nil {
		listening(server.Addrs())
	}
	err = server.Run(ctx, c.ShutdownTimeout.Duration)
	log.InfoContext(ctx, "Stopped worker; instances keep running")
	return err
}
