package ec2backend

import (
	"context"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

type catalogue struct{}
type offer struct {
	Zone, Subnet, VPC, Type string
	Architecture            string
	CPU                     backend.Millicores
	RAM                     backend.MiB
	USDPerHour              float64
}

func newCatalogue(c Config, clients *clients) *catalogue { panic("soon") }
func (c *catalogue) offers(ctx context.Context, region backend.Region, shape backend.Shape) ([]offer, error) {
	panic("soon")
}
func (c *catalogue) unavailable(region backend.Region, zone, instanceType string)   { panic("soon") }
func (c *catalogue) fits(region backend.Region, shape backend.Shape) (bool, string) { panic("soon") }
func (c *catalogue) largest(region backend.Region) (backend.Shape, bool)            { panic("soon") }
func (c *catalogue) refresh(ctx context.Context, region backend.Region) error       { panic("soon") }
