package ec2backend

import (
	"math"
	"testing"
)

// Prices of single types, by which the table's rule is checked.
func TestBuiltInPrices(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, region string
		want         float64
	}{
		{"t3.nano", "us-east-1", 0.0052},
		{"t3.micro", "us-east-1", 0.0104},
		{"t3.2xlarge", "us-east-1", 0.3328},
		{"t4g.small", "us-east-1", 0.0168},
		{"m7i.large", "us-east-1", 0.1008},
		{"m7i.4xlarge", "us-east-1", 0.8064},
		{"c7i.48xlarge", "us-east-1", 8.568},
		{"r7i.xlarge", "us-east-1", 0.2646},
		{"t3.micro", "eu-central-1", 0.0120},
		{"m6i.xlarge", "eu-central-1", 0.2300},
		// No prices of its own: in the order of us-east-1's.
		{"t3.micro", "eu-north-1", 0.0104},
	} {
		got, ok := newPrices(nil).of(test.name, test.region)
		if !ok || math.Abs(got-test.want) > 1e-9 {
			t.Errorf("%s in %s: %v, %t; want %v", test.name, test.region, got, ok, test.want)
		}
	}
	for _, unknown := range []string{"x2idn.large", "t3.metal", "t3.", "t3", "t3.0xlarge", "t3.02xlarge", "t3.-2xlarge", "m7i.metal-24xl", ""} {
		if got, ok := newPrices(nil).of(unknown, "us-east-1"); ok {
			t.Errorf("%q costs %v", unknown, got)
		}
	}
}

func TestTheOperatorsPricesComeFirst(t *testing.T) {
	t.Parallel()
	p := newPrices([]PriceConfig{
		{Type: "t3.micro", USDPerHour: 5}, {Type: "t3.micro", Region: "us-east-1", USDPerHour: 7}, {Type: "x9.large", Region: "us-east-1", USDPerHour: 1},
	})
	for _, test := range []struct {
		name, region string
		want         float64
		known        bool
	}{
		{"t3.micro", "us-east-1", 7, true},
		{"t3.micro", "eu-central-1", 5, true},
		{"x9.large", "us-east-1", 1, true},
		{"x9.large", "eu-central-1", 0, false},
	} {
		if got, ok := p.of(test.name, test.region); got != test.want || ok != test.known {
			t.Errorf("%s in %s: %v, %t", test.name, test.region, got, ok)
		}
	}
}

func FuzzSizes(f *testing.F) {
	for _, seed := range []string{"nano", "large", "xlarge", "12xlarge", "metal", "999xlarge", "+2xlarge"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, size string) {
		factor, ok := sizeFactor(size)
		if ok != (factor > 0) || factor > 2*255 {
			t.Errorf("%q: %v, %t", size, factor, ok)
		}
	})
}

func TestTheOldestPriceIsTold(t *testing.T) {
	t.Parallel()
	for want, own := range map[string][]PriceConfig{
		"":           {{Type: "m7i.large"}},
		"2025-06-30": {{Type: "m7i.large", AsOf: "2026-01-31"}, {Type: "t3.micro"}, {Type: "t3.large", AsOf: "2025-06-30"}},
	} {
		if got := oldestPrice(own); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
