package server

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// backendMetrics tells, at each reading, how the backends are.
type backendMetrics struct {
	fleet    *fleet.Fleet
	taking   *prometheus.Desc
	degraded *prometheus.Desc
	lastSeen *prometheus.Desc
}

func newBackendMetrics(f *fleet.Fleet) *backendMetrics {
	label := []string{"backend"}
	return &backendMetrics{
		fleet:    f,
		taking:   prometheus.NewDesc("computebridge_backend_takes_grants", "1 while the backend answers and doesn't drain.", label, nil),
		degraded: prometheus.NewDesc("computebridge_backend_degraded", "1 while the backend has warnings for an operator.", label, nil),
		lastSeen: prometheus.NewDesc("computebridge_backend_last_seen_timestamp_seconds", "When the backend last answered; absent if never.", label, nil),
	}
}

// Describe implements [prometheus.Collector].
func (m *backendMetrics) Describe(descriptions chan<- *prometheus.Desc) {
	descriptions <- m.taking
	descriptions <- m.degraded
	descriptions <- m.lastSeen
}

// Collect implements [prometheus.Collector].
func (m *backendMetrics) Collect(metrics chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, backend string, value float64) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, backend)
	}
	flag := func(is bool) float64 {
		if is {
			return 1
		}
		return 0
	}
	for _, s := range m.fleet.Status() {
		gauge(m.taking, s.Name, flag(s.Health == fleet.Serving || s.Health == fleet.Degraded))
		gauge(m.degraded, s.Name, flag(s.Health == fleet.Degraded))
		if !s.LastSeen.IsZero() {
			gauge(m.lastSeen, s.Name, float64(s.LastSeen.UnixMilli())/1000)
		}
	}
}
