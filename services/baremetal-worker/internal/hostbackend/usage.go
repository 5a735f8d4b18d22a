package hostbackend

import (
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
)

// usageSoFar returns what systemd accounts for a running unit. Network counters
// are read at the end only.
func usageSoFar(s systemd.UnitStatus) backend.Usage {
	now := time.Now()
	measured := func(v *uint64, divide uint64) *backend.Measurement {
		if v == nil {
			return nil
		}
		return &backend.Measurement{Value: saturate(*v / divide), Source: backend.UsageHostMeasured, From: s.ActiveEnter, To: now}
	}
	return backend.Usage{
		CPU:         measured(s.CPUUsageNSec, 1_000_000),
		RAMPeak:     measured(s.MemoryPeak, 1),
		DiskRead:    measured(s.IOReadBytes, 1),
		DiskWritten: measured(s.IOWriteBytes, 1),
	}
}
