package guestapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"
)

// MachineVersion is the only version of [Machine] that this package reads and writes.
const MachineVersion = 1

// Limits of a machine's file.
const (
	// MaxMachineBytes bounds the encoded form. What a cloud takes as user-data is far less.
	MaxMachineBytes = 2 << 20
	// MaxURLBytes bounds a URL. Pre-signed ones, with a session's token, have some 2 kB.
	MaxURLBytes = 8 << 10
)

// AtEnd says what a machine does when its workload has ended or could not be started.
type AtEnd string

// What a machine may do at its end.
const (
	// AtEndPowerOff powers the machine off, where that ends its cost: EC2 terminates it.
	AtEndPowerOff AtEnd = "poweroff"
	// AtEndStay leaves it up with SSH shut, where a stopped machine costs as much as a running one.
	AtEndStay AtEnd = "stay"
)

// MachineImage says where the image is and what it must be.
type MachineImage struct {
	// URL is where the OCI archive is fetched from, http or https. It may be pre-signed, and is a secret then.
	URL string
	// Digest is that of the archive: "sha256:" or "blake3:" and 64 lower-case hexadecimal digits.
	Digest string
	// MaxBytes is the largest archive that is accepted.
	MaxBytes int64
}

// Machine is everything that the guest of a virtual machine is told. It is written by the worker with [EncodeMachine]
// and read by the guest with [DecodeMachine]; both validate. Marshalling it directly, or printing it, shows neither
// the host key, nor values of the environment, nor the image's URL.
type Machine struct {
	// Guest is the configuration of the guest without Command, WorkingDir and RunAs, which the image says. Its
	// Environment is laid over the image's.
	Guest Config
	// GrantID is the grant's id, 64 lower-case hexadecimal digits.
	GrantID string
	// Attempt is the attempt of the grant, from 1.
	Attempt uint32
	// Deadline is when the machine powers itself off, in whole seconds.
	Deadline time.Time
	// Image is what runs.
	Image MachineImage
	// AtEnd is what the machine does at its end.
	AtEnd AtEnd
}

// wireImage and wireMachine are the JSON forms.
type (
	wireImage struct {
		URL      string `json:"url"`
		Digest   string `json:"digest"`
		MaxBytes int64  `json:"max_bytes"`
	}
	wireMachine struct {
		Version  int        `json:"version"`
		GrantID  string     `json:"grant_id"`
		Attempt  uint32     `json:"attempt"`
		Deadline string     `json:"deadline"`
		AtEnd    AtEnd      `json:"at_end"`
		Image    wireImage  `json:"image"`
		Guest    wireConfig `json:"guest"`
	}
)

func (m Machine) wire() wireMachine {
	return wireMachine{
		Version:  MachineVersion,
		GrantID:  m.GrantID,
		Attempt:  m.Attempt,
		Deadline: m.Deadline.UTC().Format(time.RFC3339),
		AtEnd:    m.AtEnd,
		Image:    wireImage(m.Image),
		Guest:    m.Guest.wire(),
	}
}

// EncodeMachine validates m, fills in the defaults and returns the bytes of the machine's file. Equal machines give
// equal bytes. The result holds the host key: write it with mode 0600.
func EncodeMachine(m Machine) ([]byte, error) {
	m.Guest = m.Guest.withDefaults()
	if err := m.Validate(); err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m.wire()); err != nil {
		return nil, fmt.Errorf("encode machine: %w", err)
	}
	if buf.Len() > MaxMachineBytes {
		return nil, fmt.Errorf("machine has %d bytes; at most %d are allowed", buf.Len(), MaxMachineBytes)
	}
	return buf.Bytes(), nil
}

// DecodeMachine reads one machine's file. It is as strict as [Decode].
func DecodeMachine(r io.Reader) (Machine, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxMachineBytes+1))
	if err != nil {
		return Machine{}, fmt.Errorf("read machine: %w", err)
	}
	if len(data) > MaxMachineBytes {
		return Machine{}, fmt.Errorf("machine has more than %d bytes", MaxMachineBytes)
	}
	if !utf8.Valid(data) {
		return Machine{}, errors.New("machine is not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var w wireMachine
	if err := dec.Decode(&w); err != nil {
		return Machine{}, fmt.Errorf("machine: %w", describeJSONError(err))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Machine{}, errors.New("machine has data after its end")
	}
	if w.Version != MachineVersion {
		return Machine{}, fmt.Errorf("version: %d is not supported; this is version %d", w.Version, MachineVersion)
	}
	deadline, err := time.Parse(time.RFC3339, w.Deadline)
	if err != nil {
		return Machine{}, errors.New("deadline: is not a time of RFC 3339")
	}
	m := Machine{
		Guest:    w.Guest.config(),
		GrantID:  w.GrantID,
		Attempt:  w.Attempt,
		Deadline: deadline.UTC(),
		Image:    MachineImage(w.Image),
		AtEnd:    w.AtEnd,
	}
	if err := m.Validate(); err != nil {
		return Machine{}, err
	}
	return m, nil
}

// Validate reports the first field that the guest would refuse, by its JSON name, and never quotes a secret.
func (m Machine) Validate() error {
	checks := []struct {
		field string
		err   error
	}{
		{"grant_id", validateHex(m.GrantID)},
		{"attempt", validateAttempt(m.Attempt)},
		{"deadline", validateDeadline(m.Deadline)},
		{"at_end", validateAtEnd(m.AtEnd)},
		{"image.url", validateURL(m.Image.URL)},
		{"image.digest", validateDigest(m.Image.Digest)},
		{"image.max_bytes", validateMaxBytes(m.Image.MaxBytes)},
		{"guest", m.Guest.Validate()},
		{"guest", validateOfImage(m.Guest)},
	}
	for _, check := range checks {
		if check.err != nil {
			return fmt.Errorf("%s: %w", check.field, check.err)
		}
	}
	return nil
}

// validateHex checks 32 bytes in lower-case hex.
func validateHex(text string) error {
	if len(text) != 64 || strings.Trim(text, "0123456789abcdef") != "" {
		return errors.New("is not 64 lower-case hexadecimal digits")
	}
	return nil
}

func validateAttempt(attempt uint32) error {
	if attempt == 0 {
		return errors.New("begins at 1")
	}
	return nil
}

func validateDeadline(deadline time.Time) error {
	switch {
	case deadline.IsZero():
		return errors.New("is required")
	case deadline.Nanosecond() != 0:
		return errors.New("has a fraction of a second")
	case deadline.UTC().Year() < 1970 || deadline.UTC().Year() > 2199:
		// systemd's calendar has no others, so that no timer could end the machine.
		return errors.New("is not in the years 1970 to 2199")
	}
	return nil
}

func validateAtEnd(atEnd AtEnd) error {
	if atEnd != AtEndPowerOff && atEnd != AtEndStay {
		return fmt.Errorf("must be %q or %q", AtEndPowerOff, AtEndStay)
	}
	return nil
}

func validateURL(text string) error {
	if len(text) > MaxURLBytes {
		return fmt.Errorf("has more than %d bytes", MaxURLBytes)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return errors.New("has a character that no URL has")
	}
	parsed, err := url.Parse(text)
	if err != nil {
		return errors.New("is not a URL") // The error would quote it.
	}
	switch {
	case parsed.Scheme != "http" && parsed.Scheme != "https":
		return errors.New("is neither http nor https")
	case parsed.Hostname() == "":
		return errors.New("has no host")
	case parsed.User != nil:
		return errors.New("has credentials before its host")
	case parsed.Fragment != "":
		return errors.New("has a fragment")
	}
	return nil
}

func validateDigest(text string) error {
	algorithm, digits, _ := strings.Cut(text, ":")
	if algorithm != "sha256" && algorithm != "blake3" {
		return errors.New("has neither sha256 nor blake3 before a colon")
	}
	return validateHex(digits)
}

func validateMaxBytes(limit int64) error {
	if limit <= 0 {
		return errors.New("must be positive")
	}
	return nil
}

// validateOfImage refuses what the image says.
func validateOfImage(c Config) error {
	switch {
	case len(c.Command) > 0:
		return errors.New("command: comes from the image")
	case c.WorkingDir != "":
		return errors.New("working_dir: comes from the image")
	case c.RunAs != "":
		return errors.New("run_as: comes from the image")
	}
	return nil
}

// summary is what may be shown of a machine.
func (m Machine) summary() string {
	return fmt.Sprintf("machine of grant %s, attempt %d, until %s, image %s; %s",
		m.GrantID, m.Attempt, m.Deadline.UTC().Format(time.RFC3339), m.Image.Digest, m.Guest.summary())
}

// Format implements [fmt.Formatter] with a summary that has no secret, for every verb.
func (m Machine) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, m.summary()) }

// String implements [fmt.Stringer] with a summary that has no secret.
func (m Machine) String() string { return m.summary() }

// LogValue implements [slog.LogValuer] with a summary that has no secret.
func (m Machine) LogValue() slog.Value { return slog.StringValue(m.summary()) }

// MarshalJSON implements [json.Marshaler] for logs: it hides what is secret, so its result is no machine's file. Use
// [EncodeMachine] for that.
func (m Machine) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		GrantID  string       `json:"grant_id"`
		Attempt  uint32       `json:"attempt"`
		Deadline time.Time    `json:"deadline"`
		AtEnd    AtEnd        `json:"at_end"`
		Image    MachineImage `json:"image"`
		Guest    Config       `json:"guest"`
	}{m.GrantID, m.Attempt, m.Deadline, m.AtEnd, m.Image, m.Guest})
}

// summary is what may be shown of an image: not the URL, which may carry a signature.
func (i MachineImage) summary() string { return fmt.Sprintf("image %s", i.Digest) }

// Format implements [fmt.Formatter] without the URL, for every verb.
func (i MachineImage) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, i.summary()) }

// String implements [fmt.Stringer] without the URL.
func (i MachineImage) String() string { return i.summary() }

// LogValue implements [slog.LogValuer] without the URL.
func (i MachineImage) LogValue() slog.Value { return slog.StringValue(i.summary()) }

// MarshalJSON implements [json.Marshaler] for logs, without the URL.
func (i MachineImage) MarshalJSON() ([]byte, error) {
	return json.Marshal(wireImage{URL: redacted, Digest: i.Digest, MaxBytes: i.MaxBytes})
}
