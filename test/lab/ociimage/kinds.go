package ociimage

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"lukechampine.com/blake3"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

// Kind names one of the images that tests run.
type Kind string

// The kinds. Each image is named localhost/<kind>:latest.
const (
	// Shell is busybox: sh, the usual tools, an interactive shell as command,
	// which ends when its standard input does.
	Shell Kind = "shell"
	// Distroless is one static program and nothing else: no shell, no passwd.
	// It serves until SIGTERM.
	Distroless Kind = "distroless"
	// Exit3 exits at once with code 3.
	Exit3 Kind = "exit3"
	// Stubborn ignores SIGTERM.
	Stubborn Kind = "ignore-sigterm"
	// Configured is Shell with user, environment, working directory, entrypoint
	// and command. It prints them and waits.
	Configured Kind = "configured"
	// Big is Shell with that many more megabytes of noise ([Options.SizeMiB]).
	Big Kind = "big"
	// NotOCI is a tar archive that is no OCI image.
	NotOCI Kind = "not-oci"
	// Corrupt is an OCI layout in which one byte of the layer is wrong.
	Corrupt Kind = "corrupt"
)

// Kinds lists all kinds.
func Kinds() []Kind {
	return []Kind{Shell, Distroless, Exit3, Stubborn, Configured, Big, NotOCI, Corrupt}
}

// Options says what an image is made of.
type Options struct {
	// RootFS is the lab hosts' root file system ([lab.RootFS]), whose busybox
	// the images with a shell hold.
	RootFS string
	// SizeMiB is the noise in an image of kind Big, 200 when zero.
	SizeMiB int
}

// Archive is an image archive on disk.
type Archive struct {
	Path   string
	Size   int64
	SHA256 string // hex
	BLAKE3 string // hex, 256 bits
}

// Reference is the image's name after `podman load`.
func (k Kind) Reference() string { return "localhost/" + string(k) + ":latest" }

//go:embed testdata/tiny/main.go
var tinySource []byte

// applets are the names under which busybox is found in the images.
const applets = `ash awk base64 basename cat chmod chown cmp cp cut date dd df dirname du echo egrep env expr false find
grep gunzip gzip head hexdump hostname id ifconfig ip kill killall ln ls md5sum mkdir mktemp more mount mv nc nslookup
od pgrep pidof ping pkill printenv printf ps pwd readlink realpath rm rmdir route sed seq sh sha256sum sleep sort stat
stty sync tail tar tee telnet test time timeout top touch tr traceroute true tty umount uname uniq uptime usleep vi wc
wget which whoami xargs yes`

// Write writes an image of a kind as an archive.
func Write(ctx context.Context, w io.Writer, kind Kind, opts Options) error {
	switch kind {
	case NotOCI:
		return writeNotOCI(w)
	case Corrupt:
		image, err := build(ctx, Distroless, opts)
		if err != nil {
			return err
		}
		return image.WriteArchive(&corrupter{w: w, at: 1 << 20})
	default:
		image, err := build(ctx, kind, opts)
		if err != nil {
			return err
		}
		return image.WriteArchive(w)
	}
}

// WriteFile writes an image of a kind to a file and returns its digests.
func WriteFile(ctx context.Context, path string, kind Kind, opts Options) (Archive, error) {
	file, err := os.Create(path)
	if err != nil {
		return Archive{}, err
	}
	sha, blake := sha256.New(), hash.Hash(blake3.New(32, nil))
	size := &counter{}
	err = Write(ctx, io.MultiWriter(file, sha, blake, size), kind, opts)
	if err := errors.Join(err, file.Close()); err != nil {
		return Archive{}, fmt.Errorf("write image %s: %w", kind, errors.Join(err, os.Remove(path)))
	}
	return Archive{path, size.n, hex.EncodeToString(sha.Sum(nil)), hex.EncodeToString(blake.Sum(nil))}, nil
}

// Make writes an image of a kind into the test's temporary directory.
func Make(t testing.TB, kind Kind) Archive {
	t.Helper()
	root, err := lab.RootFS(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := WriteFile(t.Context(), filepath.Join(t.TempDir(), string(kind)+".tar"), kind, Options{RootFS: root})
	if err != nil {
		t.Fatal(err)
	}
	return archive
}

// build collects an image's files and configuration.
func build(ctx context.Context, kind Kind, opts Options) (Image, error) {
	image := Image{Name: kind.Reference()}
	switch kind {
	case Shell, Configured, Big:
		files, err := shellFiles(opts.RootFS)
		if err != nil {
			return Image{}, err
		}
		image.Files = files
		image.Config = Config{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"}}
	case Distroless, Exit3, Stubborn:
		tiny, err := compileTiny(ctx)
		if err != nil {
			return Image{}, err
		}
		image.Files = []File{{Path: "tiny", Mode: 0o755, Content: tiny}}
		image.Config = Config{Entrypoint: []string{"/tiny"}, Cmd: []string{"serve"}}
	default:
		return Image{}, fmt.Errorf("no image of kind %q: there are %v", kind, Kinds())
	}
	switch kind {
	case Exit3:
		image.Config.Cmd = []string{"exit", "3"}
	case Stubborn:
		image.Config.Cmd = []string{"stubborn"}
	case Big:
		size := opts.SizeMiB
		if size == 0 {
			size = 200
		}
		image.Files = append(image.Files, File{Path: "noise", Mode: 0o644, Random: int64(size) << 20})
	case Configured:
		image.Config.User = "app:staff"
		image.Config.WorkingDir = "/srv/work"
		image.Config.Env = append(image.Config.Env, "FROM_IMAGE=of the image", "OVERRIDDEN=by the image")
		image.Config.Entrypoint = []string{"/bin/sh", "-c", `echo "user=$(id -un) group=$(id -gn) dir=$(pwd) env=$FROM_IMAGE args=$*"; exec sleep 100000`, "entry"}
		image.Config.Cmd = []string{"from", "cmd"}
		image.Config.ExposedPorts = map[string]struct{}{"8080/tcp": {}}
		image.Config.StopSignal = "SIGKILL"
		image.Config.Labels = map[string]string{"org.opencontainers.image.title": "configured"}
		image.Files = append(image.Files,
			File{Path: "srv/", Mode: 0o755}, File{Path: "srv/work/", Mode: 0o755, UID: 1234, GID: 50})
	default: // nothing more
	}
	return image, nil
}

// shellFiles is a small system around busybox.
func shellFiles(root string) ([]File, error) {
	busybox, err := os.ReadFile(filepath.Join(root, "usr/bin/busybox"))
	if err != nil {
		return nil, fmt.Errorf("the lab's busybox: %w", err)
	}
	files := []File{
		{Path: "bin/", Mode: 0o755},
		{Path: "bin/busybox", Mode: 0o755, Content: busybox},
		{Path: "dev/", Mode: 0o755},
		{Path: "etc/", Mode: 0o755},
		{Path: "etc/group", Mode: 0o644, Content: []byte("root:x:0:\nstaff:x:50:\napp:x:1234:\nnogroup:x:65534:\n")},
		{Path: "etc/passwd", Mode: 0o644, Content: []byte("root:x:0:0:root:/root:/bin/sh\n" +
			"app:x:1234:1234:app:/srv/work:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n")},
		{Path: "home/", Mode: 0o755},
		{Path: "proc/", Mode: 0o755},
		{Path: "root/", Mode: 0o700},
		{Path: "run/", Mode: 0o755},
		{Path: "sys/", Mode: 0o755},
		{Path: "tmp/", Mode: 0o1777},
		{Path: "usr/", Mode: 0o755},
		{Path: "usr/bin/", Mode: 0o755},
		{Path: "usr/bin/env", Mode: 0o777, Link: "../../bin/busybox"},
		{Path: "var/", Mode: 0o755},
	}
	for name := range strings.FieldsSeq(applets) {
		files = append(files, File{Path: "bin/" + name, Mode: 0o777, Link: "busybox"})
	}
	return files, nil
}

// compileTiny compiles the distroless images' program, the same bytes for the
// same Go.
func compileTiny(ctx context.Context) ([]byte, error) {
	dir, err := os.MkdirTemp("", "cblab-tiny-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	if err := os.WriteFile(filepath.Join(dir, "main.go"), tinySource, 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "tiny")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, "main.go")
	cmd.Dir = dir
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "GOFLAGS=") }),
		"CGO_ENABLED=0", "GOWORK=off", "GOOS=linux")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile the distroless image's program: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

// writeNotOCI writes a tar archive without a layout in it.
func writeNotOCI(w io.Writer) error {
	text := []byte("This is an archive, and it is no image.\n")
	archive := tar.NewWriter(w)
	if err := archive.WriteHeader(header("README", tar.TypeReg, 0o644, int64(len(text)))); err != nil {
		return err
	}
	if _, err := archive.Write(text); err != nil {
		return err
	}
	return archive.Close()
}

// corrupter changes the byte at an offset of what passes through it.
type corrupter struct {
	w  io.Writer
	at int64
	n  int64
}

// Write implements [io.Writer].
func (c *corrupter) Write(p []byte) (int, error) {
	if i := c.at - c.n; i >= 0 && i < int64(len(p)) {
		p = slices.Clone(p)
		p[i] ^= 0xff
	}
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
