package hostbackend

import (
	"errors"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
)

// Most errors come classified from the packages that speak to the host. Here
// are those of the image store and of systemd's answers.

// imageErrors is what the image store may say, and what it means for a grant.
var imageErrors = []struct {
	err    error
	reason backenderr.Reason
}{
	{imagestore.ErrNotFound, backenderr.ImageUnavailable},
	{imagestore.ErrUnavailable, backenderr.ImageUnavailable},
	{imagestore.ErrHashMismatch, backenderr.ImageHashMismatch},
	{imagestore.ErrTooLarge, backenderr.ImageInvalid},
	{imagestore.ErrInvalidPointer, backenderr.GrantInvalid},
}

// imageError classifies an error of the image store.
func imageError(err error) error {
	for _, known := range imageErrors {
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

// jobFailed tells a unit that failed from a host that couldn't be asked.
func jobFailed(err error) (*systemd.JobError, bool) {
	return errors.AsType[*systemd.JobError](err)
}
