package hostbackend

import (
	"errors"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
)

// jobFailed tells a unit that failed from a host that couldn't be asked.
func jobFailed(err error) (*systemd.JobError, bool) {
	return errors.AsType[*systemd.JobError](err)
}
