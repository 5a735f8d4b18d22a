package backend

import (
	"context"
	"strconv"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// A fence is the number under which a router calls Provision; see "Fences"
// in backend.proto. It travels in the context, beside the caller.

type fenceKey struct{}

// WithFence returns a context for a Provision under a fence, 0 for none.
func WithFence(ctx context.Context, fence uint64) context.Context {
	return context.WithValue(ctx, fenceKey{}, fence)
}

// FenceFrom returns the fence of a Provision, 0 if it has none.
func FenceFrom(ctx context.Context) uint64 {
	fence, _ := ctx.Value(fenceKey{}).(uint64)
	return fence
}

// MaxFence bounds fences: ledgers hold 63 bits, and there must be room above
// whatever was refused.
const MaxFence = 1 << 62

// WithRefusedFence notes in an error up to which fence the grant's calls are
// refused.
func WithRefusedFence(err *backenderr.Error, fence uint64) *backenderr.Error {
	return err.WithMetadata(backenderr.MetaRefusedFence, strconv.FormatUint(fence, 10))
}

// RefusedFence returns up to which fence the sender of err refuses the grant's
// calls, 0 if it doesn't say.
func RefusedFence(err error) uint64 {
	if err == nil {
		return 0
	}
	fence, parseErr := strconv.ParseUint(backenderr.From(err).Metadata[backenderr.MetaRefusedFence], 10, 64)
	if parseErr != nil || fence > MaxFence {
		return 0
	}
	return fence
}

// WithoutRefusedFence returns err without such a note: it was another's, about
// fences of its own caller.
func WithoutRefusedFence(err *backenderr.Error) *backenderr.Error {
	if err.Metadata[backenderr.MetaRefusedFence] == "" {
		return err
	}
	err = err.Clone()
	delete(err.Metadata, backenderr.MetaRefusedFence)
	return err
}
