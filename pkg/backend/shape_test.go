package backend

import (
	"math"
	"math/big"
	"testing"
)

func TestShapeSumsSaturate(t *testing.T) {
	t.Parallel()
	const top, bottom = math.MaxInt64, math.MinInt64
	for _, c := range []struct{ a, b, sum, difference int64 }{
		{0, 0, 0, 0},
		{1, 2, 3, -1},
		{top, 0, top, top},
		{top, 1, top, top - 1},
		{top, top, top, 0},
		{top, bottom, -1, top},
		{bottom, -1, bottom, bottom + 1},
		{bottom, bottom, bottom, 0},
		{0, bottom, bottom, top},
		{-1, bottom, bottom, top},
		{1, bottom, bottom + 1, top},
		{bottom, 1, bottom + 1, bottom},
		{bottom, top, -1, bottom},
	} {
		a, b := cube(c.a), cube(c.b)
		if got := a.Add(b); got != cube(c.sum) {
			t.Errorf("%d + %d = %v, want %d", c.a, c.b, got, c.sum)
		}
		if got := a.Sub(b); got != cube(c.difference) {
			t.Errorf("%d - %d = %v, want %d", c.a, c.b, got, c.difference)
		}
	}
}

func TestShapeProductsSaturate(t *testing.T) {
	t.Parallel()
	const top, bottom = math.MaxInt64, math.MinInt64
	for _, c := range []struct{ a, n, want int64 }{
		{0, top, 0},
		{top, 0, 0},
		{3, 4, 12},
		{3, -4, -12},
		{top, 1, top},
		{top, 2, top},
		{top, -1, -top},
		{top, -2, bottom},
		{bottom, 1, bottom},
		{bottom, -1, top},
		{bottom, 2, bottom},
		{-1, bottom, top},
		{1 << 32, 1 << 31, top},
		{1 << 31, 1 << 31, 1 << 62},
		{-1 << 32, 1 << 31, bottom},
	} {
		if got := cube(c.a).Times(c.n); got != cube(c.want) {
			t.Errorf("%d * %d = %v, want %d", c.a, c.n, got, c.want)
		}
	}
}

// cube is a shape with one number in each dimension.
func cube(n int64) Shape { return Shape{CPU: Millicores(n), RAM: MiB(n), Storage: GiB(n)} }

// saturated is what a number without bounds becomes in 64 bits.
func saturated(n *big.Int) int64 {
	switch {
	case n.IsInt64():
		return n.Int64()
	case n.Sign() > 0:
		return math.MaxInt64
	}
	return math.MinInt64
}

func FuzzShapeArithmeticEqualsThatWithoutBounds(f *testing.F) {
	for _, n := range []int64{0, 1, -1, math.MaxInt64, math.MinInt64, 1 << 32} {
		f.Add(n, n)
		f.Add(n, int64(-1))
		f.Add(int64(math.MinInt64), n)
	}
	f.Fuzz(func(t *testing.T, a, b int64) {
		x, y := big.NewInt(a), big.NewInt(b)
		if got, want := cube(a).Add(cube(b)), cube(saturated(new(big.Int).Add(x, y))); got != want {
			t.Errorf("%d + %d = %v, want %v", a, b, got, want)
		}
		if got, want := cube(a).Sub(cube(b)), cube(saturated(new(big.Int).Sub(x, y))); got != want {
			t.Errorf("%d - %d = %v, want %v", a, b, got, want)
		}
		if got, want := cube(a).Times(b), cube(saturated(new(big.Int).Mul(x, y))); got != want {
			t.Errorf("%d * %d = %v, want %v", a, b, got, want)
		}
	})
}

func TestShapeFitsOnlyInEveryDimension(t *testing.T) {
	t.Parallel()
	room := Shape{CPU: 2, RAM: 2, Storage: 2}
	for _, c := range []struct {
		shape Shape
		want  bool
	}{
		{room, true},
		{Shape{}, true},
		{Shape{CPU: 3, RAM: 1, Storage: 1}, false},
		{Shape{CPU: 1, RAM: 3, Storage: 1}, false},
		{Shape{CPU: 1, RAM: 1, Storage: 3}, false},
	} {
		if got := c.shape.Fits(room); got != c.want {
			t.Errorf("%v fits into %v: %t, want %t", c.shape, room, got, c.want)
		}
	}
	if got, want := (Shape{CPU: 1, RAM: 5, Storage: 2}).Max(Shape{CPU: 3, RAM: 4, Storage: 2}), (Shape{CPU: 3, RAM: 5, Storage: 2}); got != want {
		t.Errorf("largest of each is %v, want %v", got, want)
	}
}
