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

// maxIndexBytes bounds the description of an image: its command and environment.
const maxIndexBytes = 1 << 20

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
				err = errors.Join(err, c.evict(clean, digest))
			}
		}
		return podman.Image{}, err
	}
	now := time.Now()
	if err := c.host.fs.Chtimes(ctx, file, now, now); err != nil {
		return podman.Image{}, err
	}
	found, err := c.unpacked(ctx, f, digest)
	if isMissing(err) {
		progress("unpacking image")
		found, err = c.unpack(ctx, f, digest, file)
	}
	return found, err
}

// engine is the bridge's own store of unpacked images. Nothing but this cache
// writes to it: the host's own podman has names in its store that an archive
// could take over.
func (c *imageCache) engine(f *facts) podman.Engine {
	return podman.Engine{Root: f.imageStore, RunRoot: runDir + "/images/" + c.host.backend.env.BridgeID}
}

// indexFile is where the cache remembers which image an archive became: by the
// archive's digest, the image's own id, which is a hash of its content. The
// names in an archive are its maker's words and mean nothing here.
func (c *imageCache) indexFile(digest string) string {
	return c.host.backend.dirs.index.String() + "/" + strings.Replace(digest, ":", "-", 1) + ".json"
}

// unpacked describes the image that the archive was unpacked to. It is missing
// if there is none, or the store has lost it.
func (c *imageCache) unpacked(ctx context.Context, f *facts, digest string) (podman.Image, error) {
	data, err := c.host.fs.ReadFile(ctx, c.indexFile(digest), maxIndexBytes)
	if err != nil {
		return podman.Image{}, err
	}
	var image podman.Image
	if err := json.Unmarshal(data, &image); err != nil || len(image.ID) != 64 {
		return podman.Image{}, fs.ErrNotExist
	}
	_, err = c.host.fs.Stat(ctx, f.imageStore+"/overlay-images/"+image.ID)
	return image, err
}

// fetch streams the image from the store to the host.
func (c *imageCache) fetch(ctx context.Context, want backend.Digest, pointer, file string, progress func(string)) error {
	h := c.host
	digest := imagestore.Digest{Algorithm: imagestore.Algorithm(want.Algorithm.String()), Sum: want.Sum}
	source, size, err := h.backend.store.Open(ctx, imagestore.Image{Digest: digest, Pointer: pointer})
	if err != nil {
		return imagestore.Classify(err)
	}
	defer func() { _ = source.Close() }() // read only
	if err := c.room(ctx, size); err != nil {
		return err
	}
	progress("sending image")
	reader := &progressReader{source: source, size: size, tell: progress}
	if _, err := h.fs.Upload(ctx, file, 0o600, reader, func(int64) error { return reader.verdict() }); err != nil {
		if verdict := reader.err; verdict != nil && !errors.Is(verdict, io.EOF) {
			return imagestore.Classify(verdict)
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
	result, err := h.conn.Run(ctx, sshconn.Command{Args: []string{f.guest, "digest", "-algorithm", want.Algorithm.String(), file}, Timeout: digestTimeout, Long: true})
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

// unpack loads the archive into the bridge's store and remembers what it became.
func (c *imageCache) unpack(ctx context.Context, f *facts, digest, file string) (podman.Image, error) {
	select {
	case c.load <- struct{}{}:
		defer func() { <-c.load }()
	case <-ctx.Done():
		return podman.Image{}, backenderr.Wrap(backenderr.From(ctx.Err()).Reason, ctx.Err(), "wait to unpack image")
	}
	image, err := c.host.podman.LoadImage(ctx, c.engine(f), file)
	if err != nil {
		return podman.Image{}, err
	}
	data, err := json.Marshal(image)
	if err != nil {
		return podman.Image{}, backenderr.Wrap(backenderr.Internal, err, "describe image")
	}
	if err := c.host.fs.WriteFile(ctx, c.indexFile(digest), data, 0o600); err != nil {
		return podman.Image{}, err
	}
	// A small archive may become a large image.
	if err := c.room(ctx, 0); err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
		defer cancel()
		return podman.Image{}, errors.Join(err, c.evict(clean, digest))
	}
	return image, nil
}

// room fails unless the host's disk can take so many bytes and still has what
// the running grants need for their own.
func (c *imageCache) room(ctx context.Context, bytes int64) error {
	for _, dir := range []hostfs.Base{c.host.backend.dirs.base, c.host.backend.dirs.images} {
		space, err := c.host.fs.Free(ctx, dir.String())
		if err != nil {
			return err
		}
		if need := uint64(max(0, bytes)) + minFree; space.Bytes < need {
			return c.host.unfit("%s has %d MiB free where %d MiB are needed for the image", dir, space.Bytes>>20, need>>20)
		}
	}
	return nil
}

// evict removes an archive and what was unpacked of it. The index goes first:
// what it doesn't name is not used again.
func (c *imageCache) evict(ctx context.Context, digest string) error {
	file, err := c.host.backend.dirs.cache.Join(strings.Replace(digest, ":", "-", 1))
	if err != nil {
		return err
	}
	f, err := c.host.ready()
	if err != nil {
		return err
	}
	image, err := c.unpacked(ctx, f, digest)
	if err != nil && !isMissing(err) {
		return err
	}
	if err := c.host.fs.RemoveAll(ctx, c.indexFile(digest)); err != nil {
		return err
	}
	if image.ID != "" {
		shared, err := c.isIndexed(ctx, image.ID)
		if err != nil {
			return err
		}
		if !shared {
			if err := c.host.podman.DropImages(ctx, c.engine(f), image.ID); err != nil {
				return err
			}
		}
	}
	return c.host.fs.RemoveAll(ctx, file)
}

// isIndexed reports whether another archive became the same image: the same
// bytes under another hash function, or another archive of the same content.
func (c *imageCache) isIndexed(ctx context.Context, imageID string) (bool, error) {
	dir := c.host.backend.dirs.index.String()
	entries, err := c.host.fs.ReadDir(ctx, dir)
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		data, err := c.host.fs.ReadFile(ctx, dir+"/"+e.Name(), maxIndexBytes)
		if err != nil && !isMissing(err) {
			return false, err
		}
		var image podman.Image
		if json.Unmarshal(data, &image) == nil && image.ID == imageID {
			return true, nil
		}
	}
	return false, nil
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
		if _, err := backend.ParseDigest(digest); err != nil || c.users(digest) > 0 {
			continue
		}
		unlock, err := c.lock(ctx, digest)
		if err != nil {
			return err
		}
		// Somebody may have taken it while we waited.
		if c.users(digest) == 0 {
			err = c.evict(ctx, digest)
		}
		unlock()
		if err != nil {
			return err
		}
		total -= e.Size()
	}
	return nil
}
