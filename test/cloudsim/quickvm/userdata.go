package quickvm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
	"github.com/compute-bridge/compute-bridge/pkg/userdata"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// The files of the user-data that say what a machine is to do.
const (
	machineFile = userdata.MachinePath
	guestFile   = "/etc/compute-bridge/fetch.json"
)

// cloudConfig is the part of a #cloud-config that counts here.
type cloudConfig struct {
	WriteFiles []struct {
		Path        string `yaml:"path"`
		Content     string `yaml:"content"`
		Encoding    string `yaml:"encoding"`
		Permissions string `yaml:"permissions"`
	} `yaml:"write_files"`
}

// instructions are what a machine reads in its user-data.
type instructions struct {
	machine guestapi.Machine
	guest   guestSource
}

// guestSource is where the guest binary is.
type guestSource struct {
	URL    string `json:"url"`
	SHA256 string `json:"sha256"`
}

// cloudConfigMark begins user-data of the kind that is read here.
const cloudConfigMark = "#cloud-config\n"

// readUserData reads user-data as cloud-init does.
func readUserData(data []byte) (instructions, error) {
	var told instructions
	text, err := userdata.Open(data)
	if err != nil {
		return told, err
	}
	if !bytes.HasPrefix(text, []byte(cloudConfigMark)) {
		return told, errors.New("the user-data is no #cloud-config")
	}
	var config cloudConfig
	if err := yaml.Unmarshal(text, &config); err != nil {
		return told, fmt.Errorf("the user-data is no YAML: %w", err)
	}
	files := map[string][]byte{}
	for _, f := range config.WriteFiles {
		if files[f.Path], err = decodeFile(f.Content, f.Encoding); err != nil {
			return told, fmt.Errorf("write %s: %w", f.Path, err)
		}
		if f.Path == machineFile && f.Permissions != "0600" {
			return told, fmt.Errorf("%s has secrets and the mode %s", f.Path, f.Permissions)
		}
	}
	if told.machine, err = guestapi.DecodeMachine(bytes.NewReader(files[machineFile])); err != nil {
		return told, fmt.Errorf("%s: %w", machineFile, err)
	}
	if err := json.Unmarshal(files[guestFile], &told.guest); err != nil {
		return told, fmt.Errorf("%s: %w", guestFile, err)
	}
	return told, nil
}

// decodeFile undoes an encoding of write_files.
func decodeFile(content, encoding string) ([]byte, error) {
	data := []byte(content)
	switch encoding {
	case "", "text/plain":
		return data, nil
	case "b64", "base64":
		return base64.StdEncoding.DecodeString(content)
	case "gz+b64", "gzip+b64", "gz+base64", "gzip+base64":
		zipped, err := base64.StdEncoding.DecodeString(content)
		if err != nil {
			return nil, err
		}
		r, err := gzip.NewReader(bytes.NewReader(zipped))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	}
	return nil, fmt.Errorf("unknown encoding %q", encoding)
}

// maxGuestBytes bounds the guest binary, which has some 10 MiB.
const maxGuestBytes = 64 << 20

// prepare fetches what the machine needs. What is on its disk already isn't
// fetched again.
func (m *Machine) prepare(ctx context.Context, told instructions) error {
	if m.image {
		return nil
	}
	// A guest that can't be had can't say so in its own words: the unit fails.
	if _, err := m.fetch(ctx, told.guest.URL, "sha256:"+told.guest.SHA256, maxGuestBytes); err != nil {
		return &failureError{guestapi.ReasonHostUnfit, "the guest: " + err.Error()}
	}
	image, err := m.fetch(ctx, told.machine.Image.URL, told.machine.Image.Digest, told.machine.Image.MaxBytes)
	switch {
	case errors.Is(err, imagestore.ErrHashMismatch):
		return &failureError{guestapi.ReasonImageHashMismatch, err.Error()}
	case err != nil:
		return &failureError{guestapi.ReasonImageUnavailable, err.Error()}
	}
	if err := checkArchive(image); err != nil {
		return &failureError{guestapi.ReasonImageInvalid, err.Error()}
	}
	m.image = true
	return nil
}

// fetch reads what has a digest. Errors don't show the query of the URL, which
// may be signed.
func (m *Machine) fetch(ctx context.Context, url, digest string, most int64) ([]byte, error) {
	want, err := imagestore.ParseDigest(digest)
	if err != nil {
		return nil, err
	}
	name, _, _ := strings.Cut(url, "?")
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("%s is no URL", name)
	}
	response, err := m.factory.options.HTTP.Do(request)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: no answer", name)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch %s: %s", name, response.Status)
	}
	data, err := io.ReadAll(imagestore.NewVerifyingReader(response.Body, want, most))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", name, err)
	}
	return data, nil
}

// ociLayout is the file that makes a tar archive an OCI one.
const ociLayout = "oci-layout"

// checkArchive refuses what is no OCI archive.
func checkArchive(data []byte) error {
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return errors.New("the archive has no " + ociLayout)
		}
		if err != nil {
			return errors.New("the image is no tar archive")
		}
		if strings.TrimPrefix(header.Name, "./") == ociLayout {
			return nil
		}
	}
}
