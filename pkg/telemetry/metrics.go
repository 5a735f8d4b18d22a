package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// NewRegistry returns a Prometheus registry with the metrics of the process, of
// the Go runtime and of the build.
func NewRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewBuildInfoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// MetricsServer serves a registry over HTTP at /metrics.
type MetricsServer struct {
	server *http.Server
	listen net.Listener
	done   chan struct{}
}

// ServeMetrics begins to serve on the listener, which it owns from then on, and
// returns at once. A failure while it serves is logged.
func ServeMetrics(listen net.Listener, registry *prometheus.Registry, log *slog.Logger) *MetricsServer {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		Registry: registry,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError),
	}))
	s := &MetricsServer{
		server: &http.Server{
			Handler:           mux,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       10 * time.Second,
			WriteTimeout:      30 * time.Second,
			IdleTimeout:       2 * time.Minute,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		},
		listen: listen,
		done:   make(chan struct{}),
	}
	go func() {
		defer close(s.done)
		if err := s.server.Serve(listen); !errors.Is(err, http.ErrServerClosed) {
			log.Error("Stopped serving metrics", slog.String(KeyAddress, listen.Addr().String()), slog.Any(KeyError, err))
		}
	}()
	return s
}

// Addr returns the address that it serves on.
func (s *MetricsServer) Addr() net.Addr { return s.listen.Addr() }

// Shutdown stops accepting, waits for requests under way until ctx ends, and
// then cuts them off. Nothing of the server runs after it has returned.
func (s *MetricsServer) Shutdown(ctx context.Context) error {
	err := s.server.Shutdown(ctx)
	if err != nil {
		err = fmt.Errorf("stop serving metrics: %w", errors.Join(err, s.server.Close()))
	}
	<-s.done
	return err
}
