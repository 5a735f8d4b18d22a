// Package ociroot makes a root file system of an OCI archive, for a machine that has no container engine. Reading the
// archive is go-containerregistry's work, applying its layers Docker's: whiteouts, opaque directories, hard links,
// extended attributes, devices, and names that would lead out of the root.
package ociroot

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/moby/go-archive"
)

// Limits of an archive.
const (
	// maxEntries bounds the files of the archive; an image has one per layer and two more.
	maxEntries = 10000
	// maxNesting bounds indexes inside of indexes.
	maxNesting = 4
	// maxDocumentBytes bounds each of the archive's JSON files, which are read as a whole.
	maxDocumentBytes = 8 << 20
)

// ErrInvalid says that the archive is at fault, not the machine.
var ErrInvalid = errors.New("not an OCI archive that can run here")

// Config is what an image says about running it.
type Config struct {
	// Command is ENTRYPOINT and CMD joined.
	Command []string
	// Environment is the image's, "NAME=value".
	Environment []string
	// WorkingDir is absolute, or empty.
	WorkingDir string
	// User is the image's USER.
	User string
}

// Unpack makes the root file system in root, an empty directory, from the OCI archive, using scratch, another empty
// directory, for what it has to keep in between. It needs to be uid 0. The archive is removed as soon as it isn't
// needed any more, so that the disk must hold the image only twice. Of several images the one for this architecture
// (Go's name) is taken. An error that wraps [ErrInvalid] is the archive's fault.
func Unpack(ctx context.Context, file, scratch, root, architecture string) (Config, error) {
	if err := splitArchive(ctx, file, scratch); err != nil {
		return Config{}, invalid(err)
	}
	if err := os.Remove(file); err != nil {
		return Config{}, err
	}
	image, err := open(scratch, architecture)
	if err != nil {
		return Config{}, invalid(err)
	}
	configFile, err := image.ConfigFile()
	if err != nil {
		return Config{}, invalid(fmt.Errorf("read the image's configuration: %w", err))
	}
	// An image that doesn't say is taken at its word: it runs or it doesn't.
	if a := configFile.Architecture; a != "" && a != architecture {
		return Config{}, invalid(fmt.Errorf("the image is for %s, this machine is %s", a, architecture))
	}
	if configFile.OS != "" && configFile.OS != "linux" {
		return Config{}, invalid(fmt.Errorf("the image is for %s", configFile.OS))
	}
	layers, err := image.Layers()
	if err != nil {
		return Config{}, invalid(fmt.Errorf("read the image's layers: %w", err))
	}
	diffIDs := configFile.RootFS.DiffIDs
	if len(diffIDs) != len(layers) {
		return Config{}, invalid(fmt.Errorf("the image has %d layers, its configuration names %d", len(layers), len(diffIDs)))
	}
	for i, layer := range layers {
		if err := apply(ctx, layer, diffIDs[i], root); err != nil {
			if ctx.Err() != nil {
				return Config{}, ctx.Err()
			}
			return Config{}, invalid(fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err))
		}
	}
	c := configFile.Config
	return Config{
		Command:     append(append([]string(nil), c.Entrypoint...), c.Cmd...),
		Environment: c.Env,
		WorkingDir:  c.WorkingDir,
		User:        c.User,
	}, nil
}

// invalid adds ErrInvalid to what the machine isn't to blame for.
func invalid(err error) error {
	for _, machine := range []error{
		syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE,
		context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, machine) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrInvalid, err)
}

// blobName is the name of a blob in a layout.
var blobName = regexp.MustCompile(`^blobs/(sha256|sha512)/[0-9a-f]{64,128}$`)

// splitArchive writes the layout's files to dir. What isn't one of a layout is left out.
func splitArchive(ctx context.Context, file, dir string) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	for _, name := range []string{"blobs", "blobs/sha256", "blobs/sha512"} {
		if err := root.Mkdir(name, 0o700); err != nil {
			return err
		}
	}
	reader := tar.NewReader(in)
	for range maxEntries {
		if err := ctx.Err(); err != nil {
			return err
		}
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		name := path.Clean(header.Name)
		isDocument := name == "oci-layout" || name == "index.json"
		if header.Typeflag != tar.TypeReg || !isDocument && !blobName.MatchString(name) {
			continue
		}
		if isDocument && header.Size > maxDocumentBytes {
			return fmt.Errorf("%s has %d bytes", name, header.Size)
		}
		if err := writeFile(root, name, reader); err != nil {
			return err
		}
	}
	return fmt.Errorf("the archive has more than %d entries", maxEntries)
}

func writeFile(root *os.Root, name string, reader io.Reader) error {
	out, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, reader); err != nil {
		_ = out.Close()
		return fmt.Errorf("write %s: %w", name, err)
	}
	return out.Close()
}

// open finds the layout's one image for the architecture.
func open(dir, architecture string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("read index.json: %w", err)
	}
	images, err := find(dir, index, architecture, maxNesting)
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("the archive has %d images for linux/%s, not one", len(images), architecture)
	}
	return images[0], nil
}

func find(dir string, index v1.ImageIndex, architecture string, nesting int) ([]v1.Image, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	var images []v1.Image
	for _, entry := range manifest.Manifests {
		// Signatures and attestations stand beside images, for no platform or an unknown one.
		if p := entry.Platform; p != nil && (p.OS != "linux" || p.Architecture != architecture) {
			continue
		}
		if err := checkSize(dir, entry.Digest); err != nil {
			return nil, err
		}
		switch {
		case entry.MediaType == types.OCIImageIndex || entry.MediaType == types.DockerManifestList:
			if nesting == 0 {
				return nil, errors.New("indexes are nested too deeply")
			}
			below, err := index.ImageIndex(entry.Digest)
			if err != nil {
				return nil, fmt.Errorf("read index: %w", err)
			}
			more, err := find(dir, below, architecture, nesting-1)
			if err != nil {
				return nil, err
			}
			images = append(images, more...)
		case entry.MediaType.IsImage():
			image, err := index.Image(entry.Digest)
			if err != nil {
				return nil, fmt.Errorf("read manifest: %w", err)
			}
			m, err := image.Manifest()
			if err != nil {
				return nil, fmt.Errorf("read manifest: %w", err)
			}
			if err := checkSize(dir, m.Config.Digest); err != nil {
				return nil, err
			}
			if m.Config.MediaType.IsConfig() {
				images = append(images, image)
			}
		}
	}
	return images, nil
}

// checkSize refuses a document that would be read into memory and is too large for one.
func checkSize(dir string, digest v1.Hash) error {
	name := path.Join("blobs", digest.Algorithm, digest.Hex)
	if !blobName.MatchString(name) {
		return fmt.Errorf("%.100q is no digest", digest.String())
	}
	info, err := os.Lstat(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the archive lacks %s", digest)
	}
	if err != nil {
		return err
	}
	if info.Size() > maxDocumentBytes {
		return fmt.Errorf("%s has %d bytes", digest, info.Size())
	}
	return nil
}

// apply unpacks one layer over the root and checks that it was the one that the image's configuration names.
func apply(ctx context.Context, layer v1.Layer, want v1.Hash, root string) (err error) {
	if want.Algorithm != "sha256" {
		return fmt.Errorf("diff id %.100q", want.String())
	}
	stream, err := layer.Uncompressed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	hash := sha256.New()
	tee := io.TeeReader(stream, hash)
	if _, err := archive.UnpackLayer(root, contextReader{ctx, tee}, &archive.TarOptions{}); err != nil {
		return &applyError{root: root, err: err}
	}
	// The end of a tar archive is before the end of its padding.
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != want.Hex {
		return fmt.Errorf("its content has sha256 %s, the image's configuration says %s", got, want.Hex)
	}
	return nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context //nolint:containedctx // It belongs to one call of apply.
	r   io.Reader
}

// Read implements io.Reader.
func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// applyError leaves out where the root is, which is no help to whoever made the image.
type applyError struct {
	root string
	err  error
}

// Error implements error.
func (e *applyError) Error() string { return strings.ReplaceAll(e.err.Error(), e.root, "") }

// Unwrap gives errors.Is the number of the system's error.
func (e *applyError) Unwrap() error { return e.err }
