package ec2backend

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

const (
	// probeTimeout bounds the look whether an image is there.
	probeTimeout = 15 * time.Second
	// maxRedirects that the look follows, as the guest does.
	maxRedirects = 5
)

// store says where instances fetch the guest and grants' images. No credentials
// go to an instance: for buckets it gets an address that is signed for one
// object and a short time.
type store struct {
	config  Config
	base    string // without a slash at its end
	guests  map[string]guestSource
	sign    *s3.PresignClient
	client  *http.Client
	maximum int64
}

// guestSource is the guest for an architecture.
type guestSource struct{ url, sha256 string }

// newStore reads the guests' digests, but for a janitor, which starts no guest.
func newStore(c Config, clients *clients) (*store, error) {
	region := c.ImageStore.Region
	if region == "" && len(c.Regions) > 0 {
		region = c.Regions[0].Name
	}
	s := &store{
		config: c, base: strings.TrimRight(c.ImageStore.Base, "/"), guests: map[string]guestSource{},
		sign: clients.presigner(region), maximum: c.ImageStore.MaxMiB << 20,
		client: &http.Client{Transport: clients.transport, CheckRedirect: func(_ *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return fmt.Errorf("more than %d redirects", maxRedirects)
			}
			return nil
		}},
	}
	for arch, binary := range map[string]GuestBinary{archAMD64: c.Guest.AMD64, archARM64: c.Guest.ARM64} {
		if binary == (GuestBinary{}) {
			continue
		}
		source := guestSource{url: binary.URL, sha256: binary.SHA256}
		if binary.File != "" && !clients.env.Janitor {
			data, err := readFile(binary.File)
			if err != nil {
				return nil, fmt.Errorf("backend.guest.%s.file: %w", arch, err)
			}
			sum := sha256.Sum256(data)
			source.sha256 = hex.EncodeToString(sum[:])
		}
		s.guests[arch] = source
	}
	return s, nil
}

// guest returns where instances of an architecture fetch the guest, and its
// digest as hex digits.
func (s *store) guest(ctx context.Context, arch string) (address, sum string, err error) {
	source, ok := s.guests[arch]
	if !ok {
		return "", "", backenderr.New(backenderr.GrantNotSatisfiable, "there is no guest for %s (backend.guest.%s)", arch, arch).WithCreated(backenderr.CreatedNone)
	}
	if bucket, key, ok := cutBucket(source.url); ok {
		address, err = s.presign(ctx, bucket, key)
		return address, source.sha256, err
	}
	return source.url, source.sha256, nil
}

// image returns where an instance fetches a grant's image. It has looked that
// there is something: a missing image fails with IMAGE_UNAVAILABLE here, and not
// in an instance that costs money. An address in a bucket works as long as the
// configuration says.
func (s *store) image(ctx context.Context, order worker.Order) (guestapi.MachineImage, error) {
	want := order.Grant.Image.Digest
	digest := imagestore.Digest{Algorithm: imagestore.Algorithm(want.Algorithm.String()), Sum: want.Sum}
	path, err := imagestore.Image{Digest: digest, Pointer: order.ImagePointer}.Path(s.base)
	if err != nil {
		return guestapi.MachineImage{}, imagestore.Classify(err).WithCreated(backenderr.CreatedNone)
	}
	// Segments are of unreserved characters only, so that joining is all.
	address := s.base + "/" + path
	if bucket, prefix, ok := cutBucket(s.base); ok {
		if address, err = s.presign(ctx, bucket, strings.TrimPrefix(prefix+"/"+path, "/")); err != nil {
			return guestapi.MachineImage{}, err
		}
	}
	if err := s.look(ctx, address, path); err != nil {
		return guestapi.MachineImage{}, imagestore.Classify(err).WithCreated(backenderr.CreatedNone)
	}
	return guestapi.MachineImage{URL: address, Digest: digest.String(), MaxBytes: s.maximum}, nil
}

// presign signs an address of a bucket's object for reading.
func (s *store) presign(ctx context.Context, bucket, key string) (string, error) {
	lifetime := s.config.ImageStore.URLLifetime.Duration
	request, err := s.sign.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucket), Key: aws.String(key)}, s3.WithPresignExpires(lifetime))
	if err != nil {
		return "", classify(err, "sign the address of s3://"+bucket+"/"+key).WithCreated(backenderr.CreatedNone)
	}
	return request.URL, nil
}

// look asks for the first byte of what is at an address. Asking for the headers
// alone would need another signature.
func (s *store) look(ctx context.Context, address, path string) error {
	bounded, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(bounded, http.MethodGet, address, http.NoBody)
	if err != nil {
		return fmt.Errorf("%w: %s", imagestore.ErrInvalidPointer, path)
	}
	request.Header.Set("Range", "bytes=0-0")
	response, err := s.client.Do(request)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("%w: %s: %w", imagestore.ErrUnavailable, path, withoutAddress(err))
	}
	defer func() { _ = response.Body.Close() }() // what it says doesn't matter
	switch response.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
	case http.StatusNotFound, http.StatusGone:
		return fmt.Errorf("%w: %s", imagestore.ErrNotFound, path)
	default:
		return fmt.Errorf("%w: %s answers %s for %s", imagestore.ErrUnavailable, request.URL.Host, strings.TrimSpace(response.Status), path)
	}
	if size := sizeOf(response); size > s.maximum {
		return fmt.Errorf("%w: %d bytes, at most %d are allowed", imagestore.ErrTooLarge, size, s.maximum)
	}
	return nil
}

// sizeOf is how large a whole object is, -1 if the answer doesn't say.
func sizeOf(response *http.Response) int64 {
	if response.StatusCode == http.StatusOK {
		return response.ContentLength
	}
	_, total, ok := strings.Cut(response.Header.Get("Content-Range"), "/")
	if size, err := strconv.ParseInt(total, 10, 64); ok && err == nil {
		return size
	}
	return -1
}

// withoutAddress drops the address from an error of the client's: its query may
// be a signature, and the error leaves the process.
func withoutAddress(err error) error {
	if with, ok := errors.AsType[*url.Error](err); ok {
		return with.Err
	}
	return err
}
