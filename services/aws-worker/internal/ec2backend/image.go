package ec2backend

import (
	"context"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

type images struct{}
type machineImage struct {
	ID, RootDevice, Architecture string
	MinDiskGiB                   int64
}

func newImages(c Config, clients *clients) *images { panic("soon") }
func (i *images) resolve(ctx context.Context, region backend.Region, arch string) (machineImage, error) {
	panic("soon")
}
