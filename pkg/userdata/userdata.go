// Package userdata renders what a cloud's stock image turns itself into a grant's
// instance with: cloud-init's user-data. Nothing is installed from a package.
//
// The text masks the image's own SSH server before that can start, arms the
// deadline, and writes three small files and the units below files/. The first
// unit fetches the guest binary by its digest, with the Python that cloud-init
// itself needs, and has it fetch, check and unpack the image; the second runs the
// image's command, by that guest, in a root directory of its own. A reboot starts
// both again without cloud-init, and without fetching what is there.
//
// An image that already holds the guest binary at [GuestPath] saves that download,
// and nothing else is needed to prebake one.
//
// It works with cloud-init 22.4 and systemd 249 or newer: Debian 12 and 13, Ubuntu
// 22.04 and 24.04. No value of a grant stands in the text as itself: values are in
// JSON files, and these are base64.
package userdata

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"path"
	"strings"
	"text/template"
	"time"
)

// MaxBytes is the size of the smallest of the clouds' limits, EC2's: 16 KiB before
// the API's own base64.
const MaxBytes = 16 << 10

// maxTextBytes bounds what Open unpacks: many times what fits compressed.
const maxTextBytes = 8 << 20

// Paths on the machine.
const (
	// MachinePath is the file with [Spec.Machine], mode 0600.
	MachinePath = "/etc/compute-bridge/machine.json"
	// fetchPath is the file that says where the guest is fetched from, mode 0600:
	// its URL may be pre-signed.
	fetchPath = "/etc/compute-bridge/fetch.json"
	// programDir is where programs are.
	programDir = "/usr/local/lib/compute-bridge"
	// unitDir is where systemd looks for an administrator's units.
	unitDir = "/etc/systemd/system"
)

// GuestPath is where a machine keeps the guest binary of that digest, and where a
// prebaked image has it.
func GuestPath(sha256 string) string { return programDir + "/guest-" + sha256 }

// Spec is what differs between machines. Printing it shows none of it but the
// deadline and the guest's digest.
type Spec struct {
	// GuestURL is where the guest binary is fetched from, http or https.
	GuestURL string
	// GuestSHA256 is its digest, 64 lower-case hexadecimal digits.
	GuestSHA256 string
	// Machine is the machine's file, as guestapi.EncodeMachine returns it.
	Machine []byte
	// Deadline is when the machine powers itself off, in whole seconds; the same as
	// in Machine.
	Deadline time.Time
	// PowerOffAtEnd powers the machine off when its workload has ended or could not
	// be started; without, it stays up, with SSH shut. The same as in Machine.
	PowerOffAtEnd bool
}

// Format implements [fmt.Formatter] with a summary that has no secret.
func (s Spec) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.summary()) }

// String implements [fmt.Stringer] with a summary that has no secret.
func (s Spec) String() string { return s.summary() }

// LogValue implements [slog.LogValuer] with a summary that has no secret.
func (s Spec) LogValue() slog.Value { return slog.StringValue(s.summary()) }

// MarshalJSON implements [json.Marshaler] for logs, with a summary that has no
// secret.
func (s Spec) MarshalJSON() ([]byte, error) { return json.Marshal(s.summary()) }

func (s Spec) summary() string {
	return fmt.Sprintf("user-data with guest %s, until %s", s.GuestSHA256, s.Deadline.UTC().Format(time.RFC3339))
}

//go:embed files
var files embed.FS

// file is one that cloud-init writes.
type file struct {
	Path, Mode, Content string
}

// Render returns the user-data, compressed. Equal specs give equal bytes. It is an
// error if they are more than [MaxBytes]; the message says by how much.
func Render(s Spec) ([]byte, error) {
	text, err := render(s)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	// The header has neither a name nor a time, so that the bytes stay the same.
	w, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		return nil, fmt.Errorf("compress user-data: %w", err)
	}
	if _, err := w.Write(text); err != nil {
		return nil, fmt.Errorf("compress user-data: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("compress user-data: %w", err)
	}
	if over := buf.Len() - MaxBytes; over > 0 {
		return nil, fmt.Errorf("user-data has %d bytes compressed, %d more than the %d that fit; the grant's environment "+
			"and keys are what can be shorter", buf.Len(), over, MaxBytes)
	}
	return buf.Bytes(), nil
}

// Open returns the text of rendered user-data. It is for tests and simulators.
func Open(data []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("open user-data: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxTextBytes+1))
	if err != nil {
		return nil, fmt.Errorf("open user-data: %w", err)
	}
	if len(text) > maxTextBytes {
		return nil, fmt.Errorf("open user-data: more than %d bytes", maxTextBytes)
	}
	return text, nil
}

func render(s Spec) ([]byte, error) {
	if err := s.validate(); err != nil {
		return nil, err
	}
	fetch, err := json.Marshal(fetchFile{
		URL: s.GuestURL, SHA256: s.GuestSHA256, Path: GuestPath(s.GuestSHA256), PowerOff: s.PowerOffAtEnd,
	})
	if err != nil {
		return nil, fmt.Errorf("render user-data: %w", err)
	}
	values := struct {
		Guest, Deadline string
		PowerOff        bool
		Units, Files    []file
	}{
		Guest: GuestPath(s.GuestSHA256),
		// systemd.time(7).
		Deadline: s.Deadline.UTC().Format("2006-01-02 15:04:05") + " UTC",
		PowerOff: s.PowerOffAtEnd,
	}
	all, err := template.New("").Delims("[[", "]]").Option("missingkey=error").
		Funcs(template.FuncMap{"base64": func(text string) string {
			return base64.StdEncoding.EncodeToString([]byte(text))
		}}).ParseFS(files, "files/*")
	if err != nil {
		return nil, fmt.Errorf("render user-data: %w", err)
	}
	execute := func(name string) (string, error) {
		var text strings.Builder
		err := all.ExecuteTemplate(&text, name, values)
		return text.String(), err
	}
	// The data is written by cloud-init as bytes and never looked at by it.
	values.Files = []file{
		{MachinePath, "0600", string(s.Machine)},
		{fetchPath, "0600", string(fetch)},
	}
	names, err := fs.Glob(files, "files/compute-bridge*")
	if err != nil {
		return nil, fmt.Errorf("render user-data: %w", err)
	}
	for _, name := range names {
		name = path.Base(name)
		if name == "compute-bridge-ended.service" && !s.PowerOffAtEnd {
			continue
		}
		content, err := execute(name)
		if err != nil {
			return nil, fmt.Errorf("render user-data: %w", err)
		}
		switch {
		case strings.HasPrefix(name, "compute-bridge-deadline."):
			values.Units = append(values.Units, file{unitDir + "/" + name, "0644", content})
		case path.Ext(name) == ".py":
			values.Files = append(values.Files, file{programDir + "/" + name, "0755", content})
		default:
			values.Files = append(values.Files, file{unitDir + "/" + name, "0644", content})
		}
	}
	text, err := execute("cloud-config.yaml")
	if err != nil {
		return nil, fmt.Errorf("render user-data: %w", err)
	}
	return []byte(text), nil
}

// fetchFile is the JSON that the fetching program reads.
type fetchFile struct {
	URL      string `json:"url"`
	SHA256   string `json:"sha256"`
	Path     string `json:"path"`
	PowerOff bool   `json:"power_off"`
}

// validate refuses what would make user-data that can't work. Errors quote nothing.
func (s Spec) validate() error {
	address, err := url.Parse(s.GuestURL)
	digest, hexErr := hex.DecodeString(s.GuestSHA256)
	switch {
	case err != nil || address.Scheme != "http" && address.Scheme != "https" || address.Host == "" ||
		strings.ContainsFunc(s.GuestURL, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return errors.New("user-data: the guest's URL is not one of http or https")
	case hexErr != nil || len(digest) != sha256.Size || strings.ToLower(s.GuestSHA256) != s.GuestSHA256:
		return errors.New("user-data: the guest's digest is not 64 lower-case hexadecimal digits")
	case !json.Valid(s.Machine):
		return errors.New("user-data: the machine's file is not JSON")
	case s.Deadline.IsZero() || s.Deadline.Nanosecond() != 0:
		return errors.New("user-data: the deadline is not a time in whole seconds")
	case s.Deadline.UTC().Year() < 1970 || s.Deadline.UTC().Year() > 2199:
		// Those of systemd's calendar: it refuses a timer with others, and nothing would end the machine.
		return errors.New("user-data: the deadline is not in the years 1970 to 2199")
	}
	return nil
}
