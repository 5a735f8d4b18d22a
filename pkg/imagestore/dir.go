package imagestore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// dirStore is a directory. It is opened for each image, because the operator
// may mount or replace it while we run.
type dirStore struct {
	dir string
	max int64
}

// Close does nothing.
func (s *dirStore) Close() error { return nil }

// Open implements [Store].
func (s *dirStore) Open(ctx context.Context, image Image) (io.ReadCloser, int64, error) {
	path, err := image.Path("file://" + filepath.ToSlash(s.dir))
	if err != nil {
		return nil, 0, err
	}
	most, err := limit(s.max, image)
	if err != nil {
		return nil, 0, err
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	// A root does not follow symbolic links out of the directory either.
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer func() { _ = root.Close() }() // Nothing was written; open files stay open.
	// Look before opening: opening a pipe would block.
	info, err := root.Stat(filepath.FromSlash(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%w: %s", ErrNotFound, path)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%w: %s: not a regular file", ErrNotFound, path)
	}
	if info.Size() > most {
		return nil, 0, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrTooLarge, info.Size(), most)
	}
	f, err := root.Open(filepath.FromSlash(path))
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return readCloser{NewVerifyingReader(&contextReader{ctx: ctx, r: f}, image.Digest, most), f}, info.Size(), nil
}

// contextReader fails once its context ends.
type contextReader struct {
	ctx context.Context //nolint:containedctx // It belongs to one call of Open.
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return n, err
}
