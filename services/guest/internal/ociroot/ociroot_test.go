package ociroot_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/ociroot"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// entry is one of a layer.
type entry struct {
	header  tar.Header
	content string
}

func file(name, content string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}, content}
}

func dir(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

func symlink(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func link(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

func with(e entry, change func(*tar.Header)) entry {
	change(&e.header)
	return e
}

// image is an OCI archive to be made. The zero value is a good one with nothing in it.
type image struct {
	layers       [][]entry
	gzip         bool
	architecture string
	os           string
	config       map[string]any
	// platforms are further images beside it: empty ones.
	platforms []string
	// nested puts the image into an index below the index.
	nested bool
	// diffID is what the configuration says of the first layer, if not the truth.
	diffID string
	// without leaves out all of the archive's names that contain it.
	without string
	// extra are further entries of the archive.
	extra []entry
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

func tarOf(t testing.TB, entries []entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.header
		h.Format = tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1700000000, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func (i image) archive(t testing.TB) []byte {
	t.Helper()
	var blobs []entry
	put := func(mediaType string, data []byte) map[string]any {
		blobs = append(blobs, file("blobs/sha256/"+sum(data), string(data)))
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + sum(data), "size": len(data)}
	}
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	manifest := func(architecture, system string, layers [][]entry) map[string]any {
		diffIDs, descriptors := []string{}, []any{}
		for n, layer := range layers {
			data := tarOf(t, layer)
			if diffIDs = append(diffIDs, "sha256:"+sum(data)); n == 0 && i.diffID != "" {
				diffIDs[0] = i.diffID
			}
			mediaType := "application/vnd.oci.image.layer.v1.tar"
			if i.gzip {
				var buf bytes.Buffer
				w := gzip.NewWriter(&buf)
				_, _ = w.Write(data)
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				mediaType, data = mediaType+"+gzip", buf.Bytes()
			}
			descriptors = append(descriptors, put(mediaType, data))
		}
		config := put("application/vnd.oci.image.config.v1+json", encode(map[string]any{
			"architecture": architecture, "os": system, "config": i.config,
			"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
		}))
		return put("application/vnd.oci.image.manifest.v1+json", encode(map[string]any{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
			"config": config, "layers": descriptors,
		}))
	}
	if i.architecture == "" {
		i.architecture = runtime.GOARCH
	}
	if i.os == "" {
		i.os = "linux"
	}
	manifests := []any{manifest(i.architecture, i.os, i.layers)}
	for _, platform := range i.platforms {
		system, architecture, _ := strings.Cut(platform, "/")
		m := manifest(architecture, system, nil)
		m["platform"] = map[string]any{"os": system, "architecture": architecture}
		manifests = append(manifests, m)
	}
	index := encode(map[string]any{"schemaVersion": 2, "manifests": manifests})
	if i.nested {
		index = encode(map[string]any{
			"schemaVersion": 2, "manifests": []any{put("application/vnd.oci.image.index.v1+json", index)},
		})
	}
	entries := append([]entry{
		dir("blobs"), file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), file("index.json", string(index)),
	}, append(blobs, i.extra...)...)
	var kept []entry
	seen := map[string]bool{}
	for _, e := range entries {
		if i.without != "" && strings.Contains(e.header.Name, i.without) || seen[e.header.Name] && len(i.extra) == 0 {
			continue
		}
		seen[e.header.Name] = true
		kept = append(kept, e)
	}
	return tarOf(t, kept)
}

// place is a directory for one unpacking: what is beside the root must not change.
type place struct{ dir, archive, scratch, root string }

func newPlace(t testing.TB, archive []byte) place {
	t.Helper()
	p := place{dir: t.TempDir()}
	p.archive, p.scratch, p.root = filepath.Join(p.dir, "a"), filepath.Join(p.dir, "s"), filepath.Join(p.dir, "r")
	for _, name := range []string{p.scratch, p.root} {
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, data := range map[string][]byte{p.archive: archive, filepath.Join(p.dir, "beside"): []byte("untouched")} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p place) unpack(t testing.TB) (ociroot.Config, error) {
	t.Helper()
	return ociroot.Unpack(t.Context(), p.archive, p.scratch, p.root, runtime.GOARCH)
}

// outside fails the test if anything but the root, the scratch and the archive has changed.
func (p place) outside(t testing.TB) {
	t.Helper()
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "a", "s", "r", "beside":
		default:
			t.Errorf("%s was made beside the root", e.Name())
		}
	}
	info, err := os.Lstat(filepath.Join(p.dir, "beside"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(p.dir, "beside"))
	if err != nil || string(data) != "untouched" || info.Mode() != 0o600 {
		t.Errorf("the file beside the root is %q, %v, %v", data, info.Mode(), err)
	}
}

// tree lists what is below the root: kind, mode, owner, content.
func (p place) tree(t *testing.T) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.Walk(p.root, func(name string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		relative, _ := filepath.Rel(p.root, name)
		if relative == "." {
			return nil
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.New("no stat")
		}
		text := fmt.Sprintf("%v %d:%d", info.Mode(), st.Uid, st.Gid)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name) // #nosec G122 -- nothing else runs there
			if err != nil {
				return err
			}
			text += " " + string(data)
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			text += " -> " + target
		}
		got[relative] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestLayersMakeOneRoot(t *testing.T) {
	for _, compressed := range []bool{false, true} {
		t.Run(fmt.Sprint("gzip ", compressed), func(t *testing.T) {
			i := image{gzip: compressed, layers: [][]entry{
				{
					dir("./"), dir("./etc"), file("./etc/passwd", "root"), file("etc/gone", "x"),
					dir("opaque/below"), file("opaque/old", "x"), file("opaque/below/old", "x"),
					dir("tree"), file("tree/a/b/c", "x"), file("becomes-dir", "x"), dir("becomes-file"), file("becomes-file/x", "x"),
					with(file("bin/su", "#!"), func(h *tar.Header) { h.Mode = 0o4755 }),
					with(file("home/app/f", "mine"), func(h *tar.Header) { h.Uid, h.Gid, h.Mode = 1000, 1001, 0o600 }),
					with(dir("tmp"), func(h *tar.Header) { h.Mode = 0o1777 }),
					link("etc/passwd.hard", "etc/passwd"),
					symlink("lib", "usr/lib"), symlink("abs", "/etc/passwd"),
					with(entry{header: tar.Header{Name: "fifo", Mode: 0o600}}, func(h *tar.Header) { h.Typeflag = tar.TypeFifo }),
				},
				{
					file("etc/.wh.gone", ""), file("opaque/new", "new"), file("opaque/.wh..wh..opq", ""), file(".wh.tree", ""),
					dir("becomes-dir"), file("becomes-dir/y", "y"), file("becomes-file", "now"),
					file("usr/lib/so", "lib"), link("etc/passwd.hard2", "/etc/passwd"), file("lib/through-link", "z"),
				},
			}}
			p := newPlace(t, i.archive(t))
			if _, err := p.unpack(t); err != nil {
				t.Fatal(err)
			}
			p.outside(t)
			want := map[string]string{
				"etc": "drwxr-xr-x 0:0", "etc/passwd": "-rw-r--r-- 0:0 root", "etc/passwd.hard": "-rw-r--r-- 0:0 root",
				"etc/passwd.hard2": "-rw-r--r-- 0:0 root", "opaque": "drwxr-xr-x 0:0", "opaque/new": "-rw-r--r-- 0:0 new",
				"becomes-dir": "drwxr-xr-x 0:0", "becomes-dir/y": "-rw-r--r-- 0:0 y", "becomes-file": "-rw-r--r-- 0:0 now",
				"bin": "drwxr-xr-x 0:0", "bin/su": "urwxr-xr-x 0:0 #!", "home": "drwxr-xr-x 0:0", "home/app": "drwxr-xr-x 0:0",
				"home/app/f": "-rw------- 1000:1001 mine", "tmp": "dtrwxrwxrwx 0:0", "lib": "Lrwxrwxrwx 0:0 -> usr/lib",
				"abs": "Lrwxrwxrwx 0:0 -> /etc/passwd", "fifo": "prw------- 0:0", "usr": "drwxr-xr-x 0:0",
				"usr/lib": "drwxr-xr-x 0:0", "usr/lib/so": "-rw-r--r-- 0:0 lib", "usr/lib/through-link": "-rw-r--r-- 0:0 z",
			}
			if diff := cmp.Diff(want, p.tree(t)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			first, _ := os.Stat(filepath.Join(p.root, "etc/passwd"))
			second, _ := os.Stat(filepath.Join(p.root, "etc/passwd.hard2"))
			if !os.SameFile(first, second) {
				t.Error("a hard link to another layer's file is a copy")
			}
			if _, err := os.Stat(p.archive); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the archive was kept: %v", err)
			}
		})
	}
}

func TestExtendedAttributesAreKept(t *testing.T) {
	// cap_net_bind_service+ep, as setcap writes it.
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	p := newPlace(t, image{layers: [][]entry{{with(file("bin/server", "x"), func(h *tar.Header) {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": capability}
	})}}}.archive(t))
	if _, err := p.unpack(t); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 64)
	n, err := unix.Lgetxattr(filepath.Join(p.root, "bin/server"), "security.capability", got)
	if err != nil || string(got[:n]) != capability {
		t.Errorf("got %x, %v", got[:max(n, 0)], err)
	}
}

func TestImageSaysHowItRuns(t *testing.T) {
	p := newPlace(t, image{config: map[string]any{
		"Entrypoint": []string{"/bin/sh", "-c"}, "Cmd": []string{"sleep 1"}, "Env": []string{"A=b=c", "PATH=/bin"},
		"WorkingDir": "/srv", "User": "app:1000",
	}}.archive(t))
	got, err := p.unpack(t)
	if err != nil {
		t.Fatal(err)
	}
	want := ociroot.Config{
		Command: []string{"/bin/sh", "-c", "sleep 1"}, Environment: []string{"A=b=c", "PATH=/bin"},
		WorkingDir: "/srv", User: "app:1000",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestTheImageOfThisArchitectureIsTaken(t *testing.T) {
	for name, i := range map[string]image{
		"beside others":      {platforms: []string{"linux/s390x", "windows/" + runtime.GOARCH, "unknown/unknown"}},
		"in an index":        {nested: true},
		"in an index beside": {nested: true, platforms: []string{"linux/s390x"}},
	} {
		i.layers = [][]entry{{file("this", "one")}}
		p := newPlace(t, i.archive(t))
		if _, err := p.unpack(t); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := p.tree(t)["this"]; got != "-rw-r--r-- 0:0 one" {
			t.Errorf("%s: got %q", name, got)
		}
	}
}

func TestBadArchivesAreInvalid(t *testing.T) {
	one := [][]entry{{file("f", strings.Repeat("x", 1000))}}
	good := image{layers: one}.archive(t)
	for name, tc := range map[string]struct {
		archive []byte
		want    string
	}{
		"empty":              {nil, "index.json"},
		"not tar":            {[]byte(strings.Repeat("no tar ", 1000)), "read archive"},
		"cut":                {good[:len(good)/2], ""},
		"no index":           {image{layers: one, without: "index.json"}.archive(t), "index.json"},
		"no blobs":           {image{layers: one, without: "sha256"}.archive(t), "the archive lacks sha256:"},
		"architecture":       {image{architecture: "s390x"}.archive(t), "the image is for s390x"},
		"system":             {image{os: "windows"}.archive(t), "the image is for windows"},
		"two images":         {image{platforms: []string{"linux/" + runtime.GOARCH}}.archive(t), "has 2 images"},
		"another layer":      {image{layers: one, diffID: "sha256:" + strings.Repeat("0", 64)}.archive(t), "layer 1 of 1: its content has sha256"},
		"a link out":         {image{layers: [][]entry{{link("x", "../../beside")}}}.archive(t), "layer 1 of 1"},
		"a name out":         {image{layers: [][]entry{{file("../beside", "x")}}}.archive(t), "layer 1 of 1"},
		"a whiteout out":     {image{layers: [][]entry{{file("../.wh.beside", "")}}}.archive(t), "layer 1 of 1"},
		"layer isn't tar":    {image{layers: one, extra: []entry{}}.archive(t)[:512], ""},
		"index isn't JSON":   {tarOf(t, []entry{file("index.json", "no JSON")}), "index"},
		"index is too large": {tarOf(t, []entry{file("index.json", strings.Repeat(" ", 9<<20))}), "index.json has"},
		"docker archive":     {tarOf(t, []entry{file("manifest.json", "[]")}), "index.json"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, tc.archive)
			_, err := p.unpack(t)
			if !errors.Is(err, ociroot.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), p.dir) && strings.Contains(tc.want, "layer") {
				t.Errorf("the error says where the root is: %v", err)
			}
			p.outside(t)
		})
	}
}

func TestLinksDoNotLeadOutOfTheRoot(t *testing.T) {
	for name, entries := range map[string][]entry{
		"relative":  {symlink("d", ".."), file("d/beside", "overwritten")},
		"deep":      {dir("a/b"), symlink("a/b/d", "../../.."), file("a/b/d/beside", "overwritten")},
		"chain":     {symlink("a", "b"), symlink("b", ".."), file("a/beside", "overwritten")},
		"whiteout":  {symlink("d", ".."), file("d/.wh.beside", "")},
		"opaque":    {symlink("d", ".."), file("d/.wh..wh..opq", "")},
		"mode":      {symlink("d", "../beside"), with(file("d", ""), func(h *tar.Header) { h.Mode = 0o777 })},
		"directory": {symlink("d", ".."), dir("d/made")},
		"hard":      {symlink("d", ".."), link("l", "d/beside"), file("l", "overwritten")},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, image{layers: [][]entry{entries}}.archive(t))
			if _, err := p.unpack(t); err != nil && !errors.Is(err, ociroot.ErrInvalid) {
				t.Error(err)
			}
			p.outside(t)
		})
	}
	t.Run("absolute", func(t *testing.T) {
		target := t.TempDir()
		p := newPlace(t, image{layers: [][]entry{{symlink("d", target), file("d/made", "x")}}}.archive(t))
		if _, err := p.unpack(t); err != nil && !errors.Is(err, ociroot.ErrInvalid) {
			t.Error(err)
		}
		if _, err := os.Lstat(filepath.Join(target, "made")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file was made outside: %v", err)
		}
		p.outside(t)
	})
}

func TestFullDiskIsNotTheImagesFault(t *testing.T) {
	p := newPlace(t, image{layers: [][]entry{{file("big", strings.Repeat("x", 2<<20))}}}.archive(t))
	if err := unix.Mount("tmpfs", p.root, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(p.root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	_, err := p.unpack(t)
	if err == nil || errors.Is(err, ociroot.ErrInvalid) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

// FuzzNamesStayInside unpacks layers with any names and link targets: nothing beside the root may change.
func FuzzNamesStayInside(f *testing.F) {
	f.Add("d", "..", "d/beside", byte(2), byte(0))
	f.Add("../beside", "/", ".wh...", byte(0), byte(5))
	f.Add("a/../../beside", "../beside", "./.wh..wh..opq", byte(1), byte(0))
	f.Add("\x00", "//", "d/../..", byte(5), byte(3))
	types := []byte{tar.TypeReg, tar.TypeLink, tar.TypeSymlink, tar.TypeFifo, tar.TypeReg, tar.TypeDir}
	f.Fuzz(func(t *testing.T, first, target, second string, firstType, secondType byte) {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		for _, h := range []tar.Header{
			{Name: first, Linkname: target, Typeflag: types[int(firstType)%len(types)], Mode: 0o777},
			{Name: second, Linkname: first, Typeflag: types[int(secondType)%len(types)], Mode: 0o777},
			{Name: first, Linkname: second, Typeflag: types[int(secondType)%len(types)], Mode: 0o777},
		} {
			if err := w.WriteHeader(&h); err != nil {
				return // no archive has it
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		entries, err := readAll(layer.Bytes())
		if err != nil {
			return
		}
		p := newPlace(t, image{layers: [][]entry{{symlink("up", "..")}, entries}}.archive(t))
		_, _ = p.unpack(t)
		p.outside(t)
	})
}

func readAll(layer []byte) ([]entry, error) {
	var entries []entry
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		h.PAXRecords = nil
		entries = append(entries, entry{header: *h})
	}
}
