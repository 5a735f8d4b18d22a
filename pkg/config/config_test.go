package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/config"
)

type common struct {
	LogLevel string `toml:"log_level"`
}

type host struct {
	Address string            `toml:"address"`
	Port    uint16            `toml:"port"`
	Key     config.Path       `toml:"key_file"`
	Token   config.SecretFile `toml:"token_file"`
	Labels  map[string]string `toml:"labels"`
}

type file struct {
	common
	Listen string                 `toml:"listen"`
	Grace  config.Duration        `toml:"grace"`
	TLS    *tls                   `toml:"tls"`
	Hosts  []host                 `toml:"host"`
	Pools  map[string]tls         `toml:"pool"`
	Paths  []config.Path          `toml:"paths"`
	Named  map[string]config.Path `toml:"named"`
	Hidden string                 `toml:"-"`
}

type tls struct {
	Cert config.Path `toml:"cert_file"`
}

func (f *file) SetDefaults() { f.Grace = config.Duration{Duration: time.Minute}; f.Listen = ":1" }

func (f *file) Validate() error {
	var p config.Problems
	for i, h := range f.Hosts {
		if h.Address == "" {
			p.Add(config.Key("host", i, "address"), "empty")
		}
		if h.Port == 0 {
			p.Add(config.Key("host", i, "port"), "want 1 to 65535, got %d", h.Port)
		}
	}
	return p.Err()
}

func TestGoodFileIsReadWithDefaultsAndAnchoredPaths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "x.toml")
	for name, content := range map[string]string{
		"token": "hunter2\n",
		"x.toml": `
log_level = "debug"
listen = ""
paths = ["a", "/b", ""]
named = { k = "d/../e" }
tls.cert_file = "cert.pem"
[[host]]
address = "a"
port = 22
key_file = "keys/k"
token_file = "token"
labels = { anything = "goes", "even.this" = "" }
[[host]]
address = "b"
port = 65535
[pool.first]
cert_file = "p"
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := config.Load[file](path)
	if err != nil {
		t.Fatal(err)
	}
	in := func(p string) config.Path { return config.Path(filepath.Join(dir, p)) }
	if got.LogLevel != "debug" || got.Listen != "" || got.Grace.Duration != time.Minute || got.TLS.Cert != in("cert.pem") ||
		got.Hosts[0].Key != in("keys/k") || got.Pools["first"].Cert != in("p") || got.Named["k"] != in("e") ||
		got.Hosts[0].Labels["even.this"] != "" || len(got.Hosts) != 2 {
		t.Errorf("read as %+v", got)
	}
	if diff := cmp.Diff([]config.Path{in("a"), "/b", ""}, got.Paths); diff != "" {
		t.Error(diff)
	}
	if token := got.Hosts[0].Token; string(token.Secret().Expose()) != "hunter2" || token.Path() != string(in("token")) {
		t.Errorf("token from %q is wrong", token.Path())
	}
	if !got.Hosts[1].Token.Secret().IsZero() {
		t.Error("a token that is not set is not empty")
	}
}

func TestEveryProblemNamesItsPlace(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text string
		want []string
	}{
		"typo":                 {"listn = 1", []string{`x.toml:1:1: listn: unknown key; did you mean "listen"?`}},
		"case":                 {"Listen = \":1\"", []string{`x.toml:1:1: Listen: unknown key; did you mean "listen"?`}},
		"typo in a table":      {"\n[tls]\n  cert_fil = 'x'", []string{`x.toml:3:3: tls.cert_fil: unknown key; did you mean "cert_file"?`}},
		"typo in a header":     {"[[hosts]]\naddress = 'a'", []string{`x.toml:1:3: hosts: unknown key; did you mean "host"?`}},
		"typo in inline table": {"host = [{address='a', port=1, prot=2}]", []string{`host.prot: unknown key; did you mean "port"?`}},
		"typo in a dotted key": {"tls.crt_file = 'x'", []string{`x.toml:1:5: tls.crt_file: unknown key; did you mean "cert_file"?`}},
		"typo below a map":     {"[pool.first]\ncert = 'x'", []string{`x.toml:2:1: pool.first.cert: unknown key`}},
		"far from any":         {"tls.zzz = 1", []string{"tls.zzz: unknown key; known here: cert_file"}},
		"ignored field":        {"Hidden = 'x'", []string{"Hidden: unknown key"}},
		"several":              {"a1 = 1\nb2 = 2\nlisten = 3", []string{":1:1: a1: ", ":2:1: b2: ", "x.toml:3:10: listen: "}},
		"wrong type":           {"listen = 5", []string{"x.toml:1:10: listen: "}},
		"wrong type nested":    {"[[host]]\naddress = 'a'\nport = 'x'", []string{"x.toml:3:8: host.port: "}},
		"table for a value":    {"[listen]\nx = 1", []string{"x.toml:1:"}},
		"value for a table":    {"tls = 1", []string{"x.toml:1:7: tls: "}},
		"too large":            {"[[host]]\naddress = 'a'\nport = 65536", []string{"x.toml:3:8: host.port: "}},
		"negative":             {"[[host]]\naddress = 'a'\nport = -1", []string{"x.toml:3:8: host.port: "}},
		"duplicate key":        {"listen = 'a'\nlisten = 'b'", []string{"x.toml:2:1: ", "listen", "already"}},
		"duplicate table":      {"[tls]\n[tls]", []string{"x.toml:2:", "tls", "already"}},
		"syntax":               {"listen = ", []string{"x.toml:1:"}},
		"bad duration":         {"grace = '5'", []string{`x.toml:1:9: grace: "5" is not a duration, want a number with a unit`}},
		"number as a duration": {"grace = 30", []string{"x.toml:1:9: grace: "}},
		"negative duration":    {"grace = '-5s'", []string{`grace: duration "-5s" is negative`}},
		"validation": {"[[host]]\n[[host]]\naddress='a'", []string{
			"x.toml: host[0].address: empty", "x.toml: host[0].port: want 1 to 65535, got 0", "x.toml: host[1].port: ",
		}},
		"absent secret": {"[[host]]\naddress='a'\nport=1\ntoken_file='absent'", []string{"x.toml: host[0].token_file: ", "no such file"}},
		"empty secret":  {"[[host]]\naddress='a'\nport=1\ntoken_file=''", []string{"x.toml:4:12: host.token_file: empty path"}},
	} {
		_, err := config.Parse[file]("x.toml", []byte(tc.text))
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: want %q in:\n%v", name, want, err)
			}
		}
		for line := range strings.Lines(err.Error()) {
			if !strings.HasPrefix(line, "x.toml:") {
				t.Errorf("%s: a line without the file: %s", name, line)
			}
		}
	}
}

func TestSecretFilesMustBePrivate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := []byte("[[host]]\naddress='a'\nport=1\ntoken_file='s'\n")
	for name, tc := range map[string]struct {
		content string
		mode    os.FileMode
		want    string
	}{
		"group": {"x", 0o640, "0640"}, "others": {"x", 0o604, "0604"}, "empty": {"\n", 0o600, "empty"},
		"huge": {strings.Repeat("x", 64<<10+1), 0o600, "longer than"}, "good": {"hunter2\r\n", 0o400, ""},
	} {
		secret := filepath.Join(dir, "s")
		_ = os.Remove(secret)
		if err := os.WriteFile(secret, []byte(tc.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(secret, tc.mode); err != nil {
			t.Fatal(err)
		}
		got, err := config.Parse[file](filepath.Join(dir, "x.toml"), text)
		switch {
		case tc.want == "" && (err != nil || string(got.Hosts[0].Token.Secret().Expose()) != "hunter2"):
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestLoadErrorsNameTheFile(t *testing.T) {
	t.Parallel()
	absent := filepath.Join(t.TempDir(), "absent.toml")
	if _, err := config.Load[file](absent); err == nil || !strings.Contains(err.Error(), absent) {
		t.Errorf("absent: %v", err)
	}
	huge := filepath.Join(t.TempDir(), "huge.toml")
	if err := os.WriteFile(huge, make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load[file](huge); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("huge: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("listen = 'a'\n[tls]\ncert_file='x'\n[[host]]\nport=1\naddress='a'\n")
	f.Add("host = [{labels={a='b'}, x={y=[{}]}}]")
	f.Add("[a.b]\nc.d=1")
	f.Fuzz(func(t *testing.T, text string) {
		_, err := config.Parse[file]("x.toml", []byte(text))
		if err != nil && !strings.HasPrefix(err.Error(), "x.toml:") {
			t.Errorf("an error without the file: %v", err)
		}
	})
}
