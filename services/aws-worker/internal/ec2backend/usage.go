package ec2backend

import (
	"context"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

func (r *regionClients) usage(ctx context.Context, instanceID string, vcpus int64, from, to time.Time) (backend.Usage, error) {
	panic("soon")
}

// usageQuery is one instance's question.
type usageQuery struct {
	InstanceID string
	VCPUs      int64
	From, To   time.Time
}

// usages asks for many instances with as few calls as possible.
func (r *regionClients) usages(ctx context.Context, queries []usageQuery) ([]backend.Usage, error) {
	panic("soon")
}
