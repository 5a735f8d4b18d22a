package ec2backend

import (
	"context"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

type store struct{}

func newStore(c Config, clients *clients) (*store, error) { panic("soon") }
func (s *store) guest(ctx context.Context, arch string) (url, sha256 string, err error) {
	panic("soon")
}
func (s *store) image(ctx context.Context, order worker.Order, until time.Time) (guestapi.MachineImage, error) {
	panic("soon")
}
