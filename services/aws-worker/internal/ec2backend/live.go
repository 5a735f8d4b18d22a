package ec2backend

import (
	"context"
	"math"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// SDKConfig returns how the worker calls a region's APIs, for who looks at AWS
// beside it, without its limits, its metrics and its table of errors.
func SDKConfig(ctx context.Context, c Config, region string) (aws.Config, error) {
	loaded, err := awsconfig.LoadDefaultConfig(ctx, loadOptions(c)...)
	if err != nil {
		return aws.Config{}, backenderr.Wrap(backenderr.ProviderUnauthenticated, err, "load the AWS configuration")
	}
	loaded.Region = region
	if c.Endpoint != "" {
		loaded.BaseEndpoint = aws.String(c.Endpoint)
	}
	return loaded, nil
}

// Quote returns the type that a grant of this shape would get in a region, the
// root disk that goes with it, and the type's price, as far as one is known. It
// reads the catalogue and changes nothing.
func (b *Backend) Quote(ctx context.Context, region backend.Region, shape backend.Shape) (Quote, error) {
	offers, err := b.catalogue.offers(ctx, region, shape, nil)
	if err != nil {
		return Quote{}, err
	}
	if len(offers) == 0 {
		return Quote{}, backenderr.New(backenderr.GrantNotSatisfiable, "region %s offers nothing for %s", region, shape)
	}
	cheapest := offers[0]
	image, err := b.images.resolve(ctx, region, cheapest.Architecture)
	if err != nil {
		return Quote{}, err
	}
	return Quote{
		Type: cheapest.Type, Zone: cheapest.Zone, USDPerHour: cheapest.USDPerHour, Priced: !math.IsInf(cheapest.USDPerHour, 1),
		DiskGiB: max(int64(shape.Storage)+b.config.ExtraDiskGiB, image.MinDiskGiB),
	}, nil
}

// Quote is what a grant would get.
type Quote struct {
	Type, Zone string
	USDPerHour float64 // on demand
	// Priced says that the price is known.
	Priced  bool
	DiskGiB int64
}
