// Package hostfs reads and writes files on a bare-metal host through its SSH
// connection.
//
// Paths are absolute; build those with foreign parts by [Base]. Errors satisfy
// errors.Is with fs.ErrNotExist and fs.ErrExist where that is what happened; a
// full disk is HOST_UNFIT; a lost connection is PROVIDER_UNAVAILABLE, and the
// file then has either its old or its new content.
package hostfs

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pkg/sftp"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

// callTimeout bounds small operations, uploadTimeout the writing of one big
// file when the caller's context has no earlier end.
const (
	callTimeout   = time.Minute
	uploadTimeout = 6 * time.Hour
)

// TempPrefix begins the names of files that are being written. One that a lost
// connection left behind may be removed when it's old.
const TempPrefix = ".tmp-"

// FS is a host's file system. Its methods are safe for concurrent use.
type FS struct {
	conn *sshconn.Conn
}

// New returns the file system of the connection's host.
func New(conn *sshconn.Conn) *FS { return &FS{conn: conn} }

// do runs SFTP calls, which know no context, and gives their errors a reason.
// A call that is abandoned when ctx ends is finished by the connection.
func do[T any](ctx context.Context, f *FS, doing, name string, call func(*sftp.Client) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var none T
	client, err := f.conn.SFTP(ctx)
	if err != nil {
		return none, err
	}
	type outcome struct {
		value T
		err   error
	}
	out := make(chan outcome, 1)
	go func() {
		value, err := call(client)
		out <- outcome{value, err}
	}()
	select {
	case o := <-out:
		return o.value, f.classify(ctx, o.err, doing, name)
	case <-ctx.Done():
		return none, f.classify(ctx, ctx.Err(), doing, name)
	}
}

// classify gives an error its reason.
func (f *FS) classify(ctx context.Context, err error, doing, name string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*backenderr.Error](err); ok {
		return err
	}
	host := f.conn.Name()
	var status *sftp.StatusError
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrExist):
		return fmt.Errorf("host %s: %s %s: %w", host, doing, name, err)
	case errors.Is(err, fs.ErrPermission):
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: %s %s", host, doing, name)
	case errors.Is(err, context.Canceled):
		return backenderr.Wrap(backenderr.Cancelled, err, "host %s: %s %s", host, doing, name)
	case errors.Is(err, sftp.ErrSSHFxConnectionLost), errors.Is(err, sftp.ErrSSHFxNoConnection), errors.Is(err, io.EOF),
		errors.Is(err, io.ErrClosedPipe), errors.Is(err, context.DeadlineExceeded):
		return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: %s %s", host, doing, name)
	case errors.As(err, &status):
		// sshd says no more than "Failure" about a full disk.
		if free, freeErr := f.freeNow(ctx, path.Dir(name)); freeErr == nil && (free.Bytes < fullBelow || free.Inodes == 0) {
			return f.full(err, doing, name)
		}
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: %s %s", host, doing, name)
	}
	return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: %s %s", host, doing, name)
}

// fullBelow is how little free space counts as none: a write of one block more
// fails.
const fullBelow = 64 << 10

func (f *FS) full(err error, doing, name string) error {
	return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: disk is full: %s %s", f.conn.Name(), doing, name)
}

// tempName returns a name beside name for what will become it.
func tempName(name string) string {
	var random [8]byte
	_, _ = rand.Read(random[:]) // Never fails.
	return path.Join(path.Dir(name), TempPrefix+hex.EncodeToString(random[:]))
}

// WriteFile writes a file atomically: a reader, and a crash, see the old content
// or the new. The directory must exist. Meant for small files; see Upload.
func (f *FS) WriteFile(ctx context.Context, name string, data []byte, mode fs.FileMode) error {
	_, err := do(ctx, f, "write", name, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, writeFile(client, name, data, mode)
	})
	return err
}

func writeFile(client *sftp.Client, name string, data []byte, mode fs.FileMode) (err error) {
	temp := tempName(name)
	file, err := client.OpenFile(temp, openNew)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = client.Remove(temp)
		}
	}()
	// The mode first, so that no secret is ever readable by others.
	if err = file.Chmod(mode.Perm()); err == nil {
		if _, err = file.Write(data); err == nil {
			err = sync(client, file)
		}
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return client.PosixRename(temp, name)
}

// sync makes a file's content survive a crash of the host, where the server
// can.
func sync(client *sftp.Client, file *sftp.File) error {
	if _, ok := client.HasExtension("fsync@openssh.com"); !ok {
		return nil
	}
	return file.Sync()
}

// ErrTooLarge says that a file has more bytes than the caller allows.
var ErrTooLarge = errors.New("file is larger than allowed")

// ReadFile returns a file's content, of at most limit bytes.
func (f *FS) ReadFile(ctx context.Context, name string, limit int64) ([]byte, error) {
	return do(ctx, f, "read", name, func(client *sftp.Client) ([]byte, error) {
		file, err := client.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		// No size first: files of /proc say 0.
		data, err := io.ReadAll(io.LimitReader(readerOnly{file}, limit+1))
		if err != nil {
			return nil, err
		}
		if int64(len(data)) > limit {
			return nil, backenderr.Wrap(backenderr.HostUnfit, ErrTooLarge, "host %s: read %s: more than %d bytes", f.conn.Name(), name, limit)
		}
		return data, nil
	})
}

// readerOnly hides the concurrent WriteTo of sftp.File, which asks for the size.
type readerOnly struct{ io.Reader }

// Tail returns the last bytes of a file, at most limit.
func (f *FS) Tail(ctx context.Context, name string, limit int64) ([]byte, error) {
	return do(ctx, f, "read", name, func(client *sftp.Client) ([]byte, error) {
		file, err := client.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		info, err := file.Stat()
		if err != nil {
			return nil, err
		}
		if _, err := file.Seek(max(0, info.Size()-limit), io.SeekStart); err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(readerOnly{file}, limit))
	})
}

// MkdirAll makes a directory and those above it that are missing, all with
// mode. If the last one exists already its mode is set.
func (f *FS) MkdirAll(ctx context.Context, dir string, mode fs.FileMode) error {
	_, err := do(ctx, f, "make directory", dir, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, mkdirAll(client, path.Clean(dir), mode.Perm(), true)
	})
	return err
}

func mkdirAll(client *sftp.Client, dir string, mode fs.FileMode, last bool) error {
	info, err := client.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case !info.IsDir():
		return &fs.PathError{Op: "mkdir", Path: dir, Err: errNotDir}
	case last && info.Mode().Perm() != mode:
		return client.Chmod(dir, mode)
	default:
		return nil
	}
	if parent := path.Dir(dir); parent != dir {
		if err := mkdirAll(client, parent, mode, false); err != nil {
			return err
		}
	}
	if err := client.Mkdir(dir); err != nil {
		// Another one may have made it since.
		if info, statErr := client.Stat(dir); statErr != nil || !info.IsDir() {
			return err
		}
	}
	return client.Chmod(dir, mode)
}

var errNotDir = errors.New("exists and is no directory")

// RemoveAll removes a file or a whole directory; what isn't there is fine.
// Symbolic links are removed, never followed.
func (f *FS) RemoveAll(ctx context.Context, name string) error {
	if !path.IsAbs(name) || path.Clean(name) == "/" {
		return backenderr.New(backenderr.Internal, "host %s: remove %q: not a path to remove", f.conn.Name(), name)
	}
	_, err := do(ctx, f, "remove", name, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, removeAll(client, path.Clean(name))
	})
	return err
}

func removeAll(client *sftp.Client, name string) error {
	info, err := client.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return ignoreMissing(client.Remove(name))
	}
	entries, err := client.ReadDir(name)
	if err != nil {
		return ignoreMissing(err)
	}
	for _, e := range entries {
		if err := removeAll(client, path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	return ignoreMissing(client.RemoveDirectory(name))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ReadDir lists a directory, without an order.
func (f *FS) ReadDir(ctx context.Context, dir string) ([]fs.FileInfo, error) {
	return do(ctx, f, "list", dir, func(client *sftp.Client) ([]fs.FileInfo, error) { return client.ReadDir(dir) })
}

// Stat describes a file, following symbolic links.
func (f *FS) Stat(ctx context.Context, name string) (fs.FileInfo, error) {
	return do(ctx, f, "look at", name, func(client *sftp.Client) (fs.FileInfo, error) { return client.Stat(name) })
}

// Exists reports whether there is something at a path.
func (f *FS) Exists(ctx context.Context, name string) (bool, error) {
	_, err := f.Stat(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Rename moves a file over another, atomically on one file system.
func (f *FS) Rename(ctx context.Context, from, to string) error {
	_, err := do(ctx, f, "rename", from, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, client.PosixRename(from, to)
	})
	return err
}

// Chown gives a file to a user and group of the host: the one that a
// container's user is mapped to, for example.
func (f *FS) Chown(ctx context.Context, name string, uid, gid uint32) error {
	_, err := do(ctx, f, "change owner of", name, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, client.Chown(name, int(uid), int(gid))
	})
	return err
}

// Chtimes sets when a file was last used and changed.
func (f *FS) Chtimes(ctx context.Context, name string, accessed, modified time.Time) error {
	_, err := do(ctx, f, "set times of", name, func(client *sftp.Client) (struct{}, error) {
		return struct{}{}, client.Chtimes(name, accessed, modified)
	})
	return err
}

// BootID returns what the host's kernel calls this boot; it's another one after
// a reboot, when all transient units are gone.
func (f *FS) BootID(ctx context.Context) (string, error) {
	const file, limit = "/proc/sys/kernel/random/boot_id", 64
	data, err := f.ReadFile(ctx, file, limit)
	return strings.TrimSpace(string(data)), err
}

// Space is what a file system has left for root.
type Space struct {
	// Bytes are free, Total is the file system's size.
	Bytes, Total uint64
	// Inodes are free; 0 with TotalInodes 0 where the file system has none.
	Inodes, TotalInodes uint64
}

// Free returns how much room is left on the file system of dir.
func (f *FS) Free(ctx context.Context, dir string) (Space, error) {
	return do(ctx, f, "measure", dir, func(client *sftp.Client) (Space, error) { return statVFS(client, dir) })
}

// freeNow is Free for classify, which Free itself calls.
func (f *FS) freeNow(ctx context.Context, dir string) (Space, error) {
	client, err := f.conn.SFTP(ctx)
	if err != nil {
		return Space{}, err
	}
	return statVFS(client, dir)
}

func statVFS(client *sftp.Client, dir string) (Space, error) {
	stat, err := client.StatVFS(dir)
	if err != nil {
		return Space{}, err
	}
	inodes := stat.Ffree
	if stat.Files == 0 {
		inodes = 1 // btrfs and others make them as needed: never short of them.
	}
	return Space{Bytes: stat.Frsize * stat.Bavail, Total: stat.Frsize * stat.Blocks, Inodes: inodes, TotalInodes: stat.Files}, nil
}

// Upload writes a big file from a stream and returns its length. The file gets
// its name only when all of it is there and accept, if given, agrees: a caller
// that hashes what passes through src refuses wrong content there.
//
// The bytes go to a command's standard input, which is twice as fast as SFTP.
// It takes one of the connection's few command slots meanwhile.
func (f *FS) Upload(ctx context.Context, name string, mode fs.FileMode, src io.Reader, accept func(length int64) error) (int64, error) {
	temp := tempName(name)
	counter := &counting{src: src}
	n, err := f.upload(ctx, temp, mode, counter)
	if err == nil && accept != nil {
		err = accept(n)
	}
	if err == nil {
		err = f.Rename(ctx, temp, name)
	}
	if err != nil {
		// The context may have ended; what was written is removed all the same,
		// if the host still answers.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		if f.conn.Connected() {
			_ = f.RemoveAll(clean, temp)
		}
		return n, err
	}
	return n, nil
}

func (f *FS) upload(ctx context.Context, temp string, mode fs.FileMode, src *counting) (int64, error) {
	// Made first, so that its mode is right before any byte is in it.
	if _, err := do(ctx, f, "write", temp, func(client *sftp.Client) (struct{}, error) {
		file, err := client.OpenFile(temp, openNew)
		if err != nil {
			return struct{}{}, err
		}
		err = file.Chmod(mode.Perm())
		return struct{}{}, errors.Join(err, file.Close())
	}); err != nil {
		return 0, err
	}
	result, err := f.conn.Run(ctx, sshconn.Command{Args: writeCommand(temp), Stdin: src, Timeout: uploadTimeout, Long: true})
	if err != nil {
		return src.n.Load(), err
	}
	if err := result.Err("write"); err != nil {
		if bytes.Contains(result.Stderr, []byte("No space left")) || bytes.Contains(result.Stderr, []byte("quota exceeded")) {
			return src.n.Load(), f.full(err, "write", temp)
		}
		return src.n.Load(), backenderr.Wrap(backenderr.HostUnfit, err, "host %s: write %s", f.conn.Name(), temp)
	}
	// The program reports how much it got: nothing else proves it. (An end of
	// input after a lost connection looks like any other.)
	got, err := strconv.ParseInt(strings.TrimSpace(string(result.Stdout)), 10, 64)
	if err != nil || got != src.n.Load() {
		return src.n.Load(), backenderr.New(backenderr.ProviderUnavailable, "host %s: write %s: sent %d bytes, host has %q",
			f.conn.Name(), temp, src.n.Load(), strings.TrimSpace(string(result.Stdout)))
	}
	return src.n.Load(), nil
}

// writeCommand writes its input over a file, makes it durable and prints its
// length. The script is constant and the path its argument. Without LC_ALL=C
// the text of an error would be in the host's language.
func writeCommand(name string) []string {
	return []string{"env", "LC_ALL=C", "sh", "-c", `cat > "$1" && sync "$1" && stat -c %s -- "$1"`, "sh", name}
}

// counting counts what is read through it. The reader may still be busy in a
// command that was given up, hence atomically.
type counting struct {
	src io.Reader
	n   atomic.Int64
}

// Read reads from the source.
func (c *counting) Read(p []byte) (int, error) {
	n, err := c.src.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// openNew makes a file that must not exist yet.
const openNew = os.O_WRONLY | os.O_CREATE | os.O_EXCL
