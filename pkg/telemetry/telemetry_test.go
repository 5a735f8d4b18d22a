package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRecordsAreJSONWithTheirTrace(t *testing.T) {
	t.Parallel()
	var buf bytes.Buffer
	log, err := telemetry.NewLogger(&buf, telemetry.LogConfig{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2},
	}))
	log.With(slog.String(telemetry.KeyGrantID, "g")).InfoContext(ctx, "Provisioned instance",
		slog.Any("secret", redact.New([]byte("hunter2"))))
	var got map[string]any
	if err := json.Unmarshal(buf.Bytes(), &got); err != nil {
		t.Fatalf("%v in %s", err, buf.String())
	}
	if got["grant_id"] != "g" || got["trace_id"] != "01"+strings.Repeat("0", 30) || got["span_id"] != "02"+strings.Repeat("0", 14) {
		t.Errorf("record = %v", got)
	}
	if strings.Contains(buf.String(), "hunter2") {
		t.Error("the record holds a secret")
	}
}

func TestLevelAndFormatComeFromTheConfiguration(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		cfg  telemetry.LogConfig
		want string
	}{
		{telemetry.LogConfig{Format: "text"}, "level=INFO"},
		{telemetry.LogConfig{Format: "text", Level: "DEBUG"}, "level=DEBUG"},
		{telemetry.LogConfig{Format: "json", Level: "warn"}, `"level":"WARN"`},
		{telemetry.LogConfig{Format: "auto", Level: "error"}, `"level":"ERROR"`},
	} {
		var buf bytes.Buffer
		log, err := telemetry.NewLogger(&buf, tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		log.Debug("A")
		log.Info("A")
		log.Warn("A")
		log.Error("A")
		if first, _, _ := strings.Cut(buf.String(), "\n"); !strings.Contains(first, tc.want) {
			t.Errorf("%+v: first record %s, want %s", tc.cfg, first, tc.want)
		}
	}
	for _, cfg := range []telemetry.LogConfig{{Level: "loud"}, {Format: "xml"}} {
		if _, err := telemetry.NewLogger(io.Discard, cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

func TestTracingIsOffWithoutAnEndpoint(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"nothing":  {},
		"disabled": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
		"none":     {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
	} {
		t.Run(name, func(t *testing.T) {
			setenv(t, env)
			tracing, err := telemetry.NewTracing(t.Context(), "svc", "v1")
			if err != nil {
				t.Fatal(err)
			}
			if _, span := tracing.Provider.Tracer("x").Start(t.Context(), "s"); span.IsRecording() {
				t.Error("spans are recorded")
			}
			if err := tracing.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	setenv(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"})
	if _, err := telemetry.NewTracing(t.Context(), "svc", "v1"); err == nil || !strings.Contains(err.Error(), "carrier pigeon") {
		t.Errorf("an unknown protocol: %v", err)
	}
}

// setenv sets exactly these of the variables that matter.
func setenv(t *testing.T, env map[string]string) {
	t.Helper()
	for _, name := range []string{
		"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL",
		"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER",
	} {
		t.Setenv(name, env[name])
	}
}

func TestSpansReachTheEndpointAtShutdown(t *testing.T) {
	got := make(chan string, 10)
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- r.URL.Path + " " + string(body)
	}))
	defer collector.Close()
	setenv(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL})
	tracing, err := telemetry.NewTracing(t.Context(), "test-service", "v1")
	if err != nil {
		t.Fatal(err)
	}
	_, span := tracing.Provider.Tracer("x").Start(t.Context(), "the-span")
	span.End()
	if err := tracing.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if body := <-got; !strings.HasPrefix(body, "/v1/traces ") || !strings.Contains(body, "the-span") || !strings.Contains(body, "test-service") {
		t.Errorf("the collector got %q", body)
	}
	// The exporter uses the default transport, whose connections would look like leaked goroutines.
	(&http.Client{}).CloseIdleConnections()
}

func TestMetricsAreServedUntilShutdown(t *testing.T) {
	t.Parallel()
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	registry := telemetry.NewRegistry()
	entered, release := make(chan struct{}), make(chan struct{})
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "slow", Help: "A gauge that waits to be released."}, func() float64 {
		close(entered)
		<-release
		return 42
	}))
	s := telemetry.ServeMetrics(listen, registry, slog.New(slog.DiscardHandler))
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	body := make(chan string)
	go func() {
		resp, err := client.Get("http://" + s.Addr().String() + "/metrics")
		if err != nil {
			body <- err.Error()
			return
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		body <- string(text)
	}()
	<-entered
	// A request under way is answered, although the server is stopping.
	stopped := make(chan error)
	go func() { stopped <- s.Shutdown(context.WithoutCancel(t.Context())) }()
	close(release)
	text := <-body
	for _, want := range []string{"slow 42", "go_goroutines", "process_", "go_build_info"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing in:\n%.500s", want, text)
		}
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if resp, err := client.Get("http://" + s.Addr().String() + "/metrics"); err == nil {
		_ = resp.Body.Close()
		t.Error("served after the shutdown")
	}
}

func TestShutdownCutsOffWhatHangs(t *testing.T) {
	t.Parallel()
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := telemetry.ServeMetrics(listen, telemetry.NewRegistry(), slog.New(slog.DiscardHandler))
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Never-"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_ = s.Shutdown(ctx) // Either cut off with an error, or never seen.
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadAll(conn); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the connection is open: %v", err)
	}
}
