package guestapi_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// hostKeyPEM makes the same key at every call; it is nobody's.
func hostKeyPEM(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// authorizedKey is a line in the right form; the key in it is all zeros.
func authorizedKey() string {
	blob := "\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20" + strings.Repeat("\x00", 32)
	return "ssh-ed25519 " + base64.StdEncoding.EncodeToString([]byte(blob)) + " tenant@example.org"
}

func fullConfig(t *testing.T) guestapi.Config {
	t.Helper()
	return guestapi.Config{
		Version:          guestapi.ConfigVersion,
		HostKey:          guestapi.NewHostKey(hostKeyPEM(t)),
		AuthorizedKeys:   []string{authorizedKey()},
		ListenPort:       61022,
		User:             "compute",
		Command:          []string{"/bin/sh", "-c", "echo \"$HOME\" %i <&> ../ é"},
		Environment:      map[string]string{"B": "two\nlines", "A": "", "PASSWORD": "hunter2"},
		WorkingDir:       "/srv/app",
		RunAs:            "app:1000",
		StopGraceSeconds: 20,
		Banner:           "Welcome.\n",
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; rewrite with -update):\n%s", name, diff)
	}
}

func TestConfigHasTheAgreedForm(t *testing.T) {
	config := fullConfig(t)
	data, err := guestapi.Encode(config)
	if err != nil {
		t.Fatal(err)
	}
	back, err := guestapi.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(config, back); diff != "" {
		t.Errorf("round trip (-want +got):\n%s", diff)
	}
	// No private key belongs in the repository, not even one of zeros.
	const shown = "-----BEGIN PRIVATE KEY-----\\nMADE BY THE TEST\\n-----END PRIVATE KEY-----\\n"
	key, err := json.Marshal(config.HostKey.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	data = bytes.ReplaceAll(data, key, []byte(`"`+strings.ReplaceAll(shown, "PRIVATE KEY", "HOST KEY")+`"`))
	golden(t, "config.json", data)
}

func TestDefaultsAreFilledIn(t *testing.T) {
	data, err := guestapi.Encode(guestapi.Config{
		Version: 1, HostKey: guestapi.NewHostKey(hostKeyPEM(t)), AuthorizedKeys: []string{authorizedKey()},
	})
	if err != nil {
		t.Fatal(err)
	}
	config, err := guestapi.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if config.ListenPort != guestapi.DefaultListenPort || config.User != guestapi.DefaultUser ||
		config.StopGrace() != guestapi.DefaultStopGraceSeconds*time.Second {
		t.Errorf("got %v", config)
	}
}

func TestEveryFieldIsChecked(t *testing.T) {
	type change func(*guestapi.Config)
	key := func(k string) change { return func(c *guestapi.Config) { c.AuthorizedKeys = []string{k} } }
	env := func(name, value string) change {
		return func(c *guestapi.Config) { c.Environment = map[string]string{name: value} }
	}
	runAs := func(r string) change { return func(c *guestapi.Config) { c.RunAs = r } }
	hostKey := func(k string) change { return func(c *guestapi.Config) { c.HostKey = guestapi.NewHostKey(k) } }
	for want, changes := range map[string][]change{
		"version: 0 is not supported":        {func(c *guestapi.Config) { c.Version = 0 }},
		"host_key_pem: is required":          {hostKey(""), func(c *guestapi.Config) { c.HostKey = guestapi.HostKey{} }},
		"host_key_pem: is not PEM":           {hostKey("secret"), hostKey("[redacted]")},
		"host_key_pem: is not a private key": {hostKey("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")},
		"host_key_pem: has data after the key": {
			hostKey(hostKeyPEM(t) + "x"),
		},
		"host_key_pem: has more than":                    {hostKey(strings.Repeat("x", guestapi.MaxHostKeyBytes+1))},
		"authorized_keys: at least one":                  {func(c *guestapi.Config) { c.AuthorizedKeys = nil }},
		"authorized_keys: 65 keys":                       {func(c *guestapi.Config) { c.AuthorizedKeys = make([]string, 65) }},
		"authorized_keys: key 0: is not of the form":     {key(""), key("ssh-ed25519")},
		"authorized_keys: key 0: its second field":       {key("ssh-ed25519 ***")},
		"authorized_keys: key 0: type and data":          {key("ssh-rsa " + strings.Fields(authorizedKey())[1]), key("ssh-ed25519 AAAA")},
		"authorized_keys: key 0: has a control":          {key(authorizedKey() + "\n" + authorizedKey())},
		"authorized_keys: key 0: has more than":          {key(strings.Repeat("x", guestapi.MaxAuthorizedKeyBytes+1))},
		"user: must match":                               {func(c *guestapi.Config) { c.User = "Root" }, func(c *guestapi.Config) { c.User = "a:b" }, func(c *guestapi.Config) { c.User = "1a" }, func(c *guestapi.Config) { c.User = "../x" }},
		"user: has more than":                            {func(c *guestapi.Config) { c.User = strings.Repeat("a", 33) }},
		"command: argument 0 is empty":                   {func(c *guestapi.Config) { c.Command = []string{""} }},
		"command: argument 1 has a NUL":                  {func(c *guestapi.Config) { c.Command = []string{"a", "\x00"} }},
		"command: argument 0 is not valid UTF-8":         {func(c *guestapi.Config) { c.Command = []string{"\xff"} }},
		"command: argument 0 has more than":              {func(c *guestapi.Config) { c.Command = []string{strings.Repeat("x", guestapi.MaxStringBytes+1)} }},
		"command: 4097 arguments":                        {func(c *guestapi.Config) { c.Command = make([]string, 4097) }},
		"environment: a name is empty":                   {env("", "x")},
		`environment: name "A=B" has '='`:                {env("A=B", "x")},
		"environment: name \"A\\nB\" has a control":      {env("A\nB", "x")},
		"environment: name \"A\\x00\" has a control":     {env("A\x00", "x")},
		`environment: name "\xff" is not valid`:          {env("\xff", "x")},
		`environment: value of "A" has a NUL`:            {env("A", "s3cret\x00")},
		`environment: value of "A" is not valid`:         {env("A", "s3cret\xff")},
		`environment: variable "A" has more than`:        {env("A", strings.Repeat("s3cret", 30000))},
		"working_dir: is not absolute":                   {func(c *guestapi.Config) { c.WorkingDir = "srv" }},
		"working_dir: has a NUL":                         {func(c *guestapi.Config) { c.WorkingDir = "/\x00" }},
		"run_as: is not of the form":                     {runAs(":"), runAs("a:"), runAs(":b"), runAs("a:b:c")},
		"run_as: has a character":                        {runAs("a b"), runAs("a\n"), runAs("a/b")},
		"banner: has a control":                          {func(c *guestapi.Config) { c.Banner = "\x1b[2J" }},
		"banner: has more than":                          {func(c *guestapi.Config) { c.Banner = strings.Repeat("x", guestapi.MaxBannerBytes+1) }},
		"stop_grace_seconds: 3601 is more than 3600":     {func(c *guestapi.Config) { c.StopGraceSeconds = 3601 }},
		"working_dir: is not valid UTF-8":                {func(c *guestapi.Config) { c.WorkingDir = "/\xff" }},
		"banner: is not valid UTF-8":                     {func(c *guestapi.Config) { c.Banner = "\xff" }},
		"working_dir: has more than 4095 bytes":          {func(c *guestapi.Config) { c.WorkingDir = "/" + strings.Repeat("x", 4095) }},
		"run_as: has more than 128 bytes":                {runAs(strings.Repeat("x", 129))},
		"environment: 1025 variables; at most 1024 are ": {func(c *guestapi.Config) { c.Environment = manyVariables(1025) }},
		"configuration has ":                             {func(c *guestapi.Config) { c.Command = largeCommand() }},
	} {
		for i, change := range changes {
			config := fullConfig(t)
			change(&config)
			_, err := guestapi.Encode(config)
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s, change %d: got %v", want, i, err)
			} else if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a value: %v", err)
			}
		}
	}
}

func manyVariables(n int) map[string]string {
	env := make(map[string]string, n)
	for i := range n {
		env[fmt.Sprintf("V%d", i)] = ""
	}
	return env
}

func largeCommand() []string {
	command := make([]string, 10)
	for i := range command {
		command[i] = strings.Repeat("x", guestapi.MaxStringBytes)
	}
	return command
}

func TestDecodeIsStrict(t *testing.T) {
	good, err := guestapi.Encode(fullConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	for input, want := range map[string]string{
		"":                                   "configuration is empty",
		"{":                                  "configuration ends in the middle",
		"{]":                                 "configuration is not valid JSON at byte 2",
		"[]":                                 "configuration: expected",
		`{"listen_port":70000}`:              "listen_port: expected uint16",
		`{"environment":{"A":{"s3cret":1}}}`: "environment: expected string",
		`{"version":"s3cret"}`:               "version: expected int",
		`{"lissten_port":1}`:                 `configuration: unknown field "lissten_port"`,
		string(good) + "{}":                  "configuration has data after its end",
		"{\"user\":\"\xff\"}":                "configuration is not valid UTF-8",
		strings.Repeat(" ", guestapi.MaxConfigBytes+1): "configuration has more than",
	} {
		_, err := guestapi.Decode(strings.NewReader(input))
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%.40q: got %v, want %s", input, err, want)
		}
	}
}

// printAll prints values in every way that logs and errors are known to use.
func printAll(t *testing.T, values ...any) string {
	t.Helper()
	var shown bytes.Buffer
	for _, value := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			fmt.Fprintf(&shown, verb+"\n", value)
		}
		for _, handler := range []slog.Handler{slog.NewTextHandler(&shown, nil), slog.NewJSONHandler(&shown, nil)} {
			slog.New(handler).Info("Shown", "value", value, "slice", []any{value})
		}
		shown.Write(must(t, value))
	}
	return strings.ToLower(shown.String())
}

func TestSecretsCannotBePrinted(t *testing.T) {
	config := fullConfig(t)
	block, _ := pem.Decode([]byte(hostKeyPEM(t)))
	keyForms := map[string]string{
		"PEM":        "begin private",
		"base64":     strings.ToLower(strings.Fields(hostKeyPEM(t))[3]),
		"DER in hex": hex.EncodeToString(block.Bytes[:8]),
		"PEM in hex": fmt.Sprintf("%x", "BEGIN PRIVATE"),
	}
	public := struct {
		Config  guestapi.Config
		Pointer *guestapi.Config
		Key     guestapi.HostKey
	}{config, &config, config.HostKey}
	shown := printAll(t, config, &config, config.HostKey, &config.HostKey, map[string]any{"k": config}, public)
	shown += strings.ToLower(config.HostKey.String() + config.String())
	for name, secret := range keyForms {
		if strings.Contains(shown, secret) {
			t.Errorf("the host key is shown as %s", name)
		}
	}
	if strings.Contains(shown, "hunter2") {
		t.Error("a value of the environment is shown")
	}
	if !strings.Contains(shown, "[redacted]") || !strings.Contains(shown, "port 61022") {
		t.Error("what should be shown is not")
	}

	// fmt doesn't ask the methods of unexported fields; the host key keeps silent all the same.
	shown = printAll(t, struct {
		config guestapi.Config
		key    guestapi.HostKey
	}{config, config.HostKey})
	for name, secret := range keyForms {
		if strings.Contains(shown, secret) {
			t.Errorf("in unexported fields, the host key is shown as %s", name)
		}
	}

	_, err := guestapi.Decode(bytes.NewReader(must(t, config)))
	if err == nil || !strings.HasPrefix(err.Error(), "host_key_pem") {
		t.Errorf("marshalling without Encode gives a configuration: %v", err)
	}
}

func must(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSpoolHasTheAgreedForm(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 123456000, time.UTC)
	spool := guestapi.Spool{
		Version: guestapi.SpoolVersion, Unit: "cb-lab-01-1.service", BootID: new("boot"), StartedAt: &at, RecordedAt: at,
		Result: new("success"), ExitCode: new("exited"), ExitStatus: new("0"),
		Usage:    guestapi.SpoolUsage{CPUUsageUsec: new(uint64(1)), NetworkSentBytes: new(uint64(0))},
		Problems: []string{"peak memory: no such file"},
	}
	data, err := guestapi.EncodeSpool(spool)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "spool.json", data)
	back, err := guestapi.DecodeSpool(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(spool, back); diff != "" {
		t.Errorf("round trip (-want +got):\n%s", diff)
	}
	for input, want := range map[string]string{
		"":                    "decode spool",
		`{"version":2}`:       "spool version 2",
		`{"version":1,"x":1}`: "decode spool",
		string(data) + "x":    "spool has data",
		strings.Repeat(" ", guestapi.MaxSpoolBytes+1): "spool has more",
	} {
		if _, err := guestapi.DecodeSpool(strings.NewReader(input)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.30q: %v", input, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"authorized_keys":["ssh-ed25519 AAAA"],"environment":{"A":"b"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		config, err := guestapi.Decode(bytes.NewReader(data))
		if err != nil {
			return
		}
		again, err := guestapi.Encode(config)
		if err != nil {
			t.Fatalf("decoded and can't be encoded: %v", err)
		}
		back, err := guestapi.Decode(bytes.NewReader(again))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(must(t, config), must(t, back)); diff != "" {
			t.Error(diff)
		}
	})
}

func FuzzValidate(f *testing.F) {
	f.Add("compute", "sh", "A", "b", "/", "root:root", "banner", authorizedKey())
	f.Fuzz(func(t *testing.T, user, arg, name, value, dir, runAs, banner, key string) {
		config := guestapi.Config{
			Version: 1, HostKey: guestapi.NewHostKey(hostKeyPEM(t)), AuthorizedKeys: []string{key}, User: user,
			Command: []string{arg}, Environment: map[string]string{name: value}, WorkingDir: dir, RunAs: runAs, Banner: banner,
		}
		data, err := guestapi.Encode(config)
		if err != nil {
			return
		}
		if strings.ContainsAny(name, "=\x00\n") || strings.Contains(value, "\x00") {
			t.Errorf("accepted %q=%q", name, value)
		}
		back, err := guestapi.Decode(bytes.NewReader(data))
		if err != nil {
			t.Fatalf("what Encode wrote is refused: %v", err)
		}
		if back.Command[0] != arg || back.Environment[name] != value || back.WorkingDir != dir || back.RunAs != runAs {
			t.Errorf("changed: %v", back)
		}
	})
}
