package ec2backend

import (
	"strconv"
	"strings"
)

// familyPrice is the price per hour, in US dollars, of a family's size large in
// a region. The other sizes of a family cost in proportion.
type familyPrice struct {
	family, region string
	large          float64
}

// pricesAsOf is when the built-in prices were the prices.
const pricesAsOf = "2025-06"

// familyPrices are the built-in ones: on-demand, Linux, shared tenancy, without
// taxes, of https://aws.amazon.com/ec2/pricing/on-demand/ as known at pricesAsOf.
// In eu-central-1 those of m7g, c7i, c7g and r7i are computed from the generation
// before, and may be some per cent off. They only decide which of several types is tried first, on the spot market,
// too; [[backend.price]] in the configuration comes before them. A region that isn't here takes those of
// us-east-1: prices differ between regions by much the same factor for all
// families, so the order is right though the figures aren't.
var familyPrices = []familyPrice{
	{"t3", "us-east-1", 0.0832},
	{"t3a", "us-east-1", 0.0752},
	{"t4g", "us-east-1", 0.0672},
	{"m6i", "us-east-1", 0.0960},
	{"m7i", "us-east-1", 0.1008},
	{"m7g", "us-east-1", 0.0816},
	{"c7i", "us-east-1", 0.08925},
	{"c7g", "us-east-1", 0.0725},
	{"r7i", "us-east-1", 0.1323},
	{"t3", "eu-central-1", 0.0960},
	{"t3a", "eu-central-1", 0.0864},
	{"t4g", "eu-central-1", 0.0768},
	{"m6i", "eu-central-1", 0.1150},
	{"m7i", "eu-central-1", 0.12075},
	{"m7g", "eu-central-1", 0.0978},
	{"c7i", "eu-central-1", 0.10185},
	{"c7g", "eu-central-1", 0.0827},
	{"r7i", "eu-central-1", 0.1596},
}

// fallbackRegion is where the prices come from of a region without any.
const fallbackRegion = "us-east-1"

// smallSizes are the sizes up to large, as parts of it.
var smallSizes = map[string]float64{"nano": 1.0 / 16, "micro": 1.0 / 8, "small": 1.0 / 4, "medium": 1.0 / 2, "large": 1}

// sizeFactor is how many times as much as large a size costs; false if the size
// isn't one of the regular ones.
func sizeFactor(size string) (float64, bool) {
	if factor, ok := smallSizes[size]; ok {
		return factor, true
	}
	number, ok := strings.CutSuffix(size, "xlarge")
	if !ok {
		return 0, false
	}
	if number == "" {
		return 2, true
	}
	n, err := strconv.ParseUint(number, 10, 8)
	if err != nil || n == 0 || number[0] == '0' {
		return 0, false
	}
	return 2 * float64(n), true
}

// prices are the operator's, and the built-in ones after them.
type prices struct{ own []PriceConfig }

func newPrices(own []PriceConfig) prices { return prices{own: own} }

// of returns a type's price per hour in a region; false if it isn't known.
func (p prices) of(instanceType, region string) (float64, bool) {
	for _, wanted := range []string{region, ""} {
		for _, price := range p.own {
			if price.Type == instanceType && price.Region == wanted {
				return price.USDPerHour, true
			}
		}
	}
	family, size, _ := strings.Cut(instanceType, ".")
	factor, ok := sizeFactor(size)
	if !ok {
		return 0, false
	}
	for _, wanted := range []string{region, fallbackRegion} {
		for _, f := range familyPrices {
			if f.family == family && f.region == wanted {
				return factor * f.large, true
			}
		}
	}
	return 0, false
}

// oldestPrice is the first day that the operator's prices name, "" if none does.
func oldestPrice(own []PriceConfig) string {
	oldest := ""
	for _, p := range own {
		if p.AsOf != "" && (oldest == "" || p.AsOf < oldest) {
			oldest = p.AsOf
		}
	}
	return oldest
}
