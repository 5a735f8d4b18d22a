// Package ociimage makes the OCI images that tests run, from nothing but Go and
// the busybox of the lab hosts' root file system: no registry, no container
// engine. The archives are what `podman load` and `skopeo copy oci-archive:`
// read, and the same image has the same bytes every time.
package ociimage

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Config is what an image says about running it. The names are those of the OCI
// image specification.
type Config struct {
	User         string              `json:"User,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	Labels       map[string]string   `json:"Labels,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
}

// File is a file of an image's only layer.
type File struct {
	// Path without a leading slash. Directories end in one.
	Path string
	// Mode holds the permission bits, set-user-ID and sticky included.
	Mode int64
	// UID and GID own the file.
	UID, GID int
	// Link is the target of a symbolic link, or empty.
	Link string
	// Content of a regular file.
	Content []byte
	// Random appends as many incompressible bytes, the same every time.
	Random int64
}

// Image is an image with one layer.
type Image struct {
	// Name is the reference that the archive's index gives it, such as
	// "localhost/shell:latest".
	Name   string
	Files  []File
	Config Config
}

const (
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// descriptor points to a blob of the layout.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// platform an image runs on.
type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// WriteArchive writes the image as a tar of an OCI layout. It makes the layer
// twice, once for its hash, and holds no more than one file in memory.
func (i Image) WriteArchive(w io.Writer) error {
	hash := sha256.New()
	size := &counter{}
	if err := i.writeLayer(io.MultiWriter(hash, size)); err != nil {
		return err
	}
	layer := descriptor{MediaType: mediaLayer, Digest: "sha256:" + hex.EncodeToString(hash.Sum(nil)), Size: size.n}
	config, err := json.Marshal(map[string]any{
		"created": epoch().Format(time.RFC3339), "architecture": runtime.GOARCH, "os": "linux",
		"config": i.Config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaManifest,
		"config": describe(mediaConfig, config), "layers": []descriptor{layer},
	})
	if err != nil {
		return err
	}
	top := describe(mediaManifest, manifest)
	top.Platform = &platform{runtime.GOARCH, "linux"}
	if i.Name != "" {
		top.Annotations = map[string]string{"org.opencontainers.image.ref.name": i.Name}
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaIndex, "manifests": []descriptor{top},
	})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	for _, file := range []struct {
		name string
		text []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{"index.json", index},
		{blobPath(top.Digest), manifest},
		{blobPath(describe(mediaConfig, config).Digest), config},
	} {
		if err := archive.WriteHeader(header(file.name, tar.TypeReg, 0o644, int64(len(file.text)))); err != nil {
			return err
		}
		if _, err := archive.Write(file.text); err != nil {
			return err
		}
	}
	if err := archive.WriteHeader(header(blobPath(layer.Digest), tar.TypeReg, 0o644, layer.Size)); err != nil {
		return err
	}
	if err := i.writeLayer(archive); err != nil {
		return err
	}
	return archive.Close()
}

// writeLayer writes the layer's tar, sorted by path.
func (i Image) writeLayer(w io.Writer) error {
	files := slices.Clone(i.Files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	layer := tar.NewWriter(w)
	for _, file := range files {
		kind := byte(tar.TypeReg)
		switch {
		case file.Link != "":
			kind = tar.TypeSymlink
		case strings.HasSuffix(file.Path, "/"):
			kind = tar.TypeDir
		}
		head := header(file.Path, kind, file.Mode, int64(len(file.Content))+file.Random)
		head.Linkname, head.Uid, head.Gid = file.Link, file.UID, file.GID
		if err := layer.WriteHeader(head); err != nil {
			return fmt.Errorf("%s: %w", file.Path, err)
		}
		if _, err := layer.Write(file.Content); err != nil {
			return fmt.Errorf("%s: %w", file.Path, err)
		}
		if file.Random > 0 {
			noise := rand.NewChaCha8(sha256.Sum256([]byte(file.Path)))
			if _, err := io.CopyN(layer, noise, file.Random); err != nil {
				return fmt.Errorf("%s: %w", file.Path, err)
			}
		}
	}
	return layer.Close()
}

// header of a tar entry that doesn't depend on when or where it is written.
func header(name string, kind byte, mode, size int64) *tar.Header {
	if kind != tar.TypeReg {
		size = 0
	}
	return &tar.Header{Name: name, Typeflag: kind, Mode: mode, Size: size, ModTime: epoch(), Format: tar.FormatPAX}
}

// epoch is when all images were made.
func epoch() time.Time { return time.Unix(0, 0).UTC() }

// describe returns the descriptor of a blob.
func describe(mediaType string, blob []byte) descriptor {
	sum := sha256.Sum256(blob)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(blob))}
}

// blobPath is where a layout keeps a blob.
func blobPath(digest string) string {
	return path.Join("blobs", strings.Replace(digest, ":", "/", 1))
}

// counter counts what is written to it.
type counter struct{ n int64 }

// Write implements [io.Writer].
func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
