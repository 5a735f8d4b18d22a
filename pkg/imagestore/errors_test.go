package imagestore_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
)

func TestEveryErrorHasItsReason(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want backenderr.Reason
	}{
		{imagestore.ErrNotFound, backenderr.ImageUnavailable},
		{imagestore.ErrUnavailable, backenderr.ImageUnavailable},
		{imagestore.ErrHashMismatch, backenderr.ImageHashMismatch},
		{imagestore.ErrTooLarge, backenderr.ImageInvalid},
		{imagestore.ErrInvalidPointer, backenderr.GrantInvalid},
		{context.Canceled, backenderr.Cancelled},
		{errors.New("something else"), backenderr.Unknown},
	} {
		wrapped := fmt.Errorf("read sha256/ab: %w", c.err)
		if got := imagestore.Classify(wrapped); got.Reason != c.want {
			t.Errorf("%v: %s, want %s", wrapped, got.Reason, c.want)
		}
	}
}
