package worker

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// metrics are the runtime's figures. Labels are closed sets: reasons, never
// ids.
type metrics struct {
	provisions *prometheus.HistogramVec
	liveGrants prometheus.Gauge
	endings    *prometheus.CounterVec
	retries    *prometheus.CounterVec
	sweeps     *prometheus.CounterVec
	leaked     prometheus.Gauge
}

func newMetrics(registry prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		provisions: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "computebridge_provision_seconds",
			Help:    "Time of Provision calls, by reason of failure (OK for none).",
			Buckets: []float64{.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600},
		}, []string{"reason"}),
		liveGrants: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "computebridge_live_grants", Help: "Grants that this process works on or watches.",
		}),
		endings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "computebridge_grants_ended_total", Help: "Grants that ended, by reason.",
		}, []string{"reason"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "computebridge_insisted_total", Help: "Tries that failed of what must succeed some day.",
		}, []string{"what"}),
		sweeps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "computebridge_swept_total", Help: "Resources that a sweep tried to delete.",
		}, []string{"deleted"}),
		leaked: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "computebridge_leak_suspects", Help: "Resources that should not exist, as of the last sweep.",
		}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.provisions, m.liveGrants, m.endings, m.retries, m.sweeps, m.leaked} {
		errs = append(errs, registry.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) provisioned(reason backenderr.Reason, took time.Duration) {
	if reason == "" {
		reason = "OK"
	}
	m.provisions.WithLabelValues(string(reason)).Observe(took.Seconds())
}

func (m *metrics) live(by float64) { m.liveGrants.Add(by) }

func (m *metrics) ended(reason backend.EndReason) {
	m.endings.WithLabelValues(reason.String()).Inc()
}

func (m *metrics) retried(what string) { m.retries.WithLabelValues(what).Inc() }

func (m *metrics) swept(deleted bool) {
	label := "false"
	if deleted {
		label = "true"
	}
	m.sweeps.WithLabelValues(label).Inc()
}

func (m *metrics) suspects(n int) { m.leaked.Set(float64(n)) }
