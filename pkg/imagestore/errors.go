package imagestore

import (
	"errors"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// reasons is what a store may say, and what it means for a grant.
var reasons = []struct {
	err    error
	reason backenderr.Reason
}{
	{ErrNotFound, backenderr.ImageUnavailable},
	{ErrUnavailable, backenderr.ImageUnavailable},
	{ErrHashMismatch, backenderr.ImageHashMismatch},
	{ErrTooLarge, backenderr.ImageInvalid},
	{ErrInvalidPointer, backenderr.GrantInvalid},
}

// Classify gives an error of this package its reason, for a Provision; others
// keep theirs. What it says of Created is the caller's to add.
func Classify(err error) *backenderr.Error {
	for _, known := range reasons {
		if !errors.Is(err, known.err) {
			continue
		}
		if known.reason == backenderr.GrantInvalid {
			return backenderr.Invalid(known.reason, backenderr.Violation{Field: "envelope.image_pointer", Description: err.Error()})
		}
		return backenderr.Wrap(known.reason, err, "image store")
	}
	return backenderr.Wrap(backenderr.From(err).Reason, err, "image store")
}
