package ociimage_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// readArchive returns an archive's files.
func readArchive(t *testing.T, path string) map[string][]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	files := map[string][]byte{}
	for archive := tar.NewReader(file); ; {
		head, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		files[head.Name] = text
	}
}

// wrongBlobs lists the blobs whose name isn't their hash.
func wrongBlobs(files map[string][]byte) []string {
	var wrong []string
	for name, text := range files {
		digest, isBlob := strings.CutPrefix(name, "blobs/sha256/")
		if sum := sha256.Sum256(text); isBlob && hex.EncodeToString(sum[:]) != digest {
			wrong = append(wrong, name)
		}
	}
	return wrong
}

// descriptor is what the tests read of an OCI descriptor.
type descriptor struct {
	Digest string `json:"digest"`
	Size   int    `json:"size"`
}

// follow reads the JSON blob that a descriptor points to.
func follow(t *testing.T, files map[string][]byte, d descriptor, value any) {
	t.Helper()
	text, ok := files["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
	if !ok || len(text) != d.Size {
		t.Fatalf("blob %s: %d bytes, want %d", d.Digest, len(text), d.Size)
	}
	if err := json.Unmarshal(text, value); err != nil {
		t.Fatal(err)
	}
}

func TestArchivesAreWholeOCILayouts(t *testing.T) {
	t.Parallel()
	for _, kind := range []ociimage.Kind{ociimage.Shell, ociimage.Distroless, ociimage.Exit3, ociimage.Stubborn, ociimage.Configured} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			archive := ociimage.Make(t, kind)
			if again := ociimage.Make(t, kind); again.SHA256 != archive.SHA256 || again.BLAKE3 != archive.BLAKE3 || again.Size != archive.Size {
				t.Errorf("made twice: %+v and %+v", archive, again)
			}
			files := readArchive(t, archive.Path)
			if wrong := wrongBlobs(files); len(wrong) > 0 {
				t.Errorf("wrong blobs: %q", wrong)
			}
			var index struct{ Manifests []descriptor }
			if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
				t.Fatalf("index: %v, %+v", err, index)
			}
			var manifest struct {
				Config descriptor
				Layers []descriptor
			}
			follow(t, files, index.Manifests[0], &manifest)
			var config struct{ Rootfs struct{ DiffIDs []string } }
			follow(t, files, manifest.Config, &config)
			if len(manifest.Layers) != 1 || files["blobs/sha256/"+strings.TrimPrefix(manifest.Layers[0].Digest, "sha256:")] == nil {
				t.Errorf("layers: %+v", manifest.Layers)
			}
		})
	}
}

func TestConfiguredImageSaysSoInItsConfig(t *testing.T) {
	t.Parallel()
	files := readArchive(t, ociimage.Make(t, ociimage.Configured).Path)
	var got ociimage.Config
	for name, text := range files {
		var config struct{ Config *ociimage.Config }
		if strings.HasPrefix(name, "blobs/") && bytes.HasPrefix(text, []byte("{")) &&
			json.Unmarshal(text, &config) == nil && config.Config != nil && config.Config.User != "" {
			got = *config.Config
		}
	}
	got.Entrypoint = nil // a script
	want := ociimage.Config{
		User:         "app:staff",
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
		Env:          []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM_IMAGE=of the image", "OVERRIDDEN=by the image"},
		Cmd:          []string{"from", "cmd"},
		WorkingDir:   "/srv/work",
		Labels:       map[string]string{"org.opencontainers.image.title": "configured"},
		StopSignal:   "SIGKILL",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
}

func TestBrokenKindsAreBroken(t *testing.T) {
	t.Parallel()
	if wrong := wrongBlobs(readArchive(t, ociimage.Make(t, ociimage.Corrupt).Path)); len(wrong) != 1 {
		t.Errorf("wrong blobs of a corrupt image: %q", wrong)
	}
	if _, ok := readArchive(t, ociimage.Make(t, ociimage.NotOCI).Path)["oci-layout"]; ok {
		t.Error("the archive that is no image has a layout")
	}
}

func TestBigIsAsBigAsAsked(t *testing.T) {
	t.Parallel()
	archive := ociimage.Make(t, ociimage.Big)
	if extra := archive.Size - ociimage.Make(t, ociimage.Shell).Size; extra < 200<<20 || extra > 201<<20 {
		t.Errorf("%d bytes more than the shell image", extra)
	}
}

func TestUnknownKindIsRefusedAndLeavesNoFile(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/image.tar"
	if _, err := ociimage.WriteFile(t.Context(), path, "nope", ociimage.Options{}); err == nil || !strings.Contains(err.Error(), "distroless") {
		t.Errorf("error %v, want one that lists the kinds", err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("file: %v", err)
	}
}
