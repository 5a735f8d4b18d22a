package hostbackend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// digestTimeout bounds hashing an image on its host: 64 GiB at 100 MB/s.
const digestTimeout = 12 * time.Minute

// imageCache is the images of one host: archives under their digests in the
// cache directory, and unpacked in podman's store. An archive is hashed on the
// way to the host and again on the host, before every start.
type imageCache struct {
	host *host

	mu     sync.Mutex // protects the fields below
	inUse  map[backend.GrantID]string
	flight map[string]chan struct{} // one at a time per digest; closed when done
	load   chan struct{}            // one podman load at a time, see unpack
}

func newImageCache(h *host) *imageCache {
	return &imageCache{host: h, inUse: map[backend.GrantID]string{}, flight: map[string]chan struct{}{}, load: make(chan struct{}, 1)}
}

// use keeps an image from being evicted as long as a grant runs from it.
func (c *imageCache) use(id backend.GrantID, digest string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inUse[id] = digest
}

func (c *imageCache) release(id backend.GrantID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.inUse, id)
}

// users is how many grants use an image.
func (c *imageCache) users(digest string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, d := range c.inUse {
		if d == digest {
			n++
		}
	}
	return n
}

// lock waits for its turn with a digest.
func (c *imageCache) lock(ctx context.Context, digest string) (unlock func(), err error) {
	for {
		c.mu.Lock()
		busy := c.flight[digest]
		if busy == nil {
			done := make(chan struct{})
			c.flight[digest] = done
			c.mu.Unlock()
			return func() {
				c.mu.Lock()
				delete(c.flight, digest)
				c.mu.Unlock()
				close(done)
			}, nil
		}
		c.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, backenderr.Wrap(backenderr.From(ctx.Err()).Reason, ctx.Err(), "wait for image %s", digest)
		}
	}
}

// ensure has the image on the host, verified and unpacked, and describes it.
func (c *imageCache) ensure(ctx context.Context, f *facts, image backend.Image, pointer string, progress func(string)) (podman.Image, error) {
	digest := image.Digest.String()
	unlock, err := c.lock(ctx, digest)
	if err != nil {
		return podman.Image{}, err
	}
	defer unlock()
	file, err := c.host.backend.dirs.cache.Join(strings.Replace(digest, ":", "-", 1))
	if err != nil {
		return podman.Image{}, err
	}
	repo := c.repository(digest)
	cached, err := c.host.fs.Exists(ctx, file)
	if err != nil {
		return podman.Image{}, err
	}
	if !cached {
		if err := c.fetch(ctx, image.Digest, pointer, file, progress); err != nil {
			return podman.Image{}, err
		}
	}
	progress("verifying image")
	if err := c.verify(ctx, f, image.Digest, file); err != nil {
		if backenderr.Is(err, backenderr.ImageHashMismatch) {
			// Neither the file nor what podman made of it is used again. What
			// other grants run from is left under them: that was made of the
			// file when its hash was right.
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
			defer cancel()
			if c.users(digest) > 1 {
				err = errors.Join(err, c.host.fs.RemoveAll(clean, file))
			} else {
				err = errors.Join(err, c.evict(clean, file, repo))
			}
		}
		return podman.Image{}, err
	}
	now := time.Now()
	if err := c.host.fs.Chtimes(ctx, file, now, now); err != nil {
		return podman.Image{}, err
	}
	found, err := c.host.podman.InspectImage(ctx, repo+":latest")
	if podman.NotFound(err) {
		progress("unpacking image")
		found, err = c.unpack(ctx, file, repo)
	}
	return found, err
}

func (c *imageCache) repository(digest string) string {
	return "localhost/compute-bridge/" + c.host.backend.env.BridgeID + "/" + strings.Replace(digest, ":", "-", 1)
}

// fetch streams the image from the store to the host.
func (c *imageCache) fetch(ctx context.Context, want backend.Digest, pointer, file string, progress func(string)) error {
	h := c.host
	digest := imagestore.Digest{Algorithm: imagestore.Algorithm(want.Algorithm.String()), Sum: want.Sum}
	source, size, err := h.backend.store.Open(ctx, imagestore.Image{Digest: digest, Pointer: pointer})
	if err != nil {
		return imageError(err)
	}
	defer func() { _ = source.Close() }() // read only
	progress("sending image")
	reader := &progressReader{source: source, size: size, tell: progress}
	if _, err := h.fs.Upload(ctx, file, 0o600, reader, func(int64) error { return reader.verdict() }); err != nil {
		if verdict := reader.err; verdict != nil && !errors.Is(verdict, io.EOF) {
			return imageError(verdict)
		}
		return err
	}
	if err := c.trim(ctx); err != nil {
		h.log.WarnContext(ctx, "Trimming the image cache failed", "error", err.Error())
	}
	return nil
}

// progressReader tells how far a transfer is, and remembers how it ended: an
// upload can't tell the end of its input from a failure of it.
type progressReader struct {
	source io.Reader
	size   int64 // -1 if unknown
	tell   func(string)
	done   int64
	told   time.Time
	err    error
}

// Read implements io.Reader.
func (r *progressReader) Read(p []byte) (int, error) {
	n, err := r.source.Read(p)
	r.done += int64(n)
	if err != nil {
		r.err = err
	}
	if now := time.Now(); now.Sub(r.told) > time.Second/2 {
		r.told = now
		if r.size > 0 {
			r.tell(fmt.Sprintf("sending image %d %% of %d MiB", 100*r.done/r.size, r.size>>20))
		} else {
			r.tell(fmt.Sprintf("sending image %d MiB", r.done>>20))
		}
	}
	return n, err
}

func (r *progressReader) verdict() error {
	switch {
	case errors.Is(r.err, io.EOF):
		return nil
	case r.err != nil:
		return r.err
	}
	return io.ErrUnexpectedEOF
}

// verify hashes the archive on the host.
func (c *imageCache) verify(ctx context.Context, f *facts, want backend.Digest, file string) error {
	h := c.host
	result, err := h.conn.Run(ctx, sshconn.Command{Args: []string{f.guest, "digest", "-algorithm", want.Algorithm.String(), file}, Timeout: digestTimeout})
	if err != nil {
		return err
	}
	if err := result.Err("guest digest"); err != nil {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s", h.config.Name)
	}
	var got guestapi.Digest
	if err := json.Unmarshal(result.Stdout, &got); err != nil {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: guest digest", h.config.Name)
	}
	if got.Algorithm+":"+got.Hex != want.String() {
		return backenderr.New(backenderr.ImageHashMismatch, "host %s: the image in its cache has digest %s:%s, not %s; it was removed",
			h.config.Name, got.Algorithm, got.Hex, want)
	}
	return nil
}

// unpack loads the archive into podman's store and gives it the name of its
// digest.
func (c *imageCache) unpack(ctx context.Context, file, repo string) (podman.Image, error) {
	// podman names what it loads as the archive says; two archives may say the
	// same name, so that only one may be between load and tag.
	select {
	case c.load <- struct{}{}:
		defer func() { <-c.load }()
	case <-ctx.Done():
		return podman.Image{}, backenderr.Wrap(backenderr.From(ctx.Err()).Reason, ctx.Err(), "wait to unpack image")
	}
	loaded, err := c.host.podman.LoadImage(ctx, file)
	if err != nil {
		return podman.Image{}, err
	}
	if len(loaded) != 1 {
		return podman.Image{}, backenderr.New(backenderr.ImageInvalid, "the archive has %d images; exactly one is allowed", len(loaded))
	}
	found, err := c.host.podman.InspectImage(ctx, loaded[0])
	if err != nil {
		return podman.Image{}, err
	}
	if err := c.host.podman.TagImage(ctx, found.ID, repo, "latest"); err != nil {
		return podman.Image{}, err
	}
	return found, nil
}

func (c *imageCache) evict(ctx context.Context, file, repo string) error {
	return errors.Join(c.host.podman.RemoveImage(ctx, repo+":latest", true), c.host.fs.RemoveAll(ctx, file))
}

// trim removes the images that were used longest ago until the cache is within
// its budget. What runs is kept.
func (c *imageCache) trim(ctx context.Context) error {
	dir := c.host.backend.dirs.cache
	entries, err := c.host.fs.ReadDir(ctx, dir.String())
	if err != nil {
		return err
	}
	var total int64
	for _, e := range entries {
		total += e.Size()
	}
	slices.SortFunc(entries, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, e := range entries {
		if total <= c.host.config.CacheGiB<<30 {
			return nil
		}
		if strings.HasPrefix(e.Name(), hostfs.TempPrefix) {
			continue
		}
		digest := strings.Replace(e.Name(), "-", ":", 1)
		file, err := dir.Join(e.Name())
		if err != nil || c.users(digest) > 0 {
			continue
		}
		unlock, err := c.lock(ctx, digest)
		if err != nil {
			return err
		}
		err = c.evict(ctx, file, c.repository(digest))
		unlock()
		if err != nil {
			return err
		}
		total -= e.Size()
	}
	return nil
}
