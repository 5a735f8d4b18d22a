package server_test

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/services/router/internal/server"
)

// service is the directory of the router.
const service = "../.."

// example copies the example configuration to a directory that has the TLS
// files which it names.
func example(t *testing.T) string {
	t.Helper()
	a := newAuthority(t)
	a.identity(t, "router", "spiffe://example/router")
	dir := t.TempDir()
	if err := os.Symlink(a.dir, filepath.Join(dir, "tls")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(service, "router.example.toml"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "router.toml")
	write(t, path, text)
	return path
}

func TestTheExampleIsValid(t *testing.T) {
	path := example(t)
	c, err := config.Load[server.Config](path)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Backends) != 3 || c.Backends[0].Name != "metal" || !c.FallThrough {
		t.Errorf("configuration is %+v", c)
	}
	if got, want := string(c.Ledger.Path), filepath.Join(filepath.Dir(path), "router.db"); got != want {
		t.Errorf("ledger.path is %q, want %q", got, want)
	}
}

func TestEveryKeyIsInTheExampleAndTheReference(t *testing.T) {
	for _, name := range []string{"router.example.toml", "README.md"} {
		text, err := os.ReadFile(filepath.Join(service, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range keys(reflect.TypeFor[server.Config]()) {
			if !bytes.Contains(text, []byte(key)) {
				t.Errorf("%s does not tell of the key %q", name, key)
			}
		}
	}
}

// keys lists the keys of a configuration and of the tables in it.
func keys(t reflect.Type) []string {
	for t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	var all []string
	if t.Kind() != reflect.Struct {
		return nil
	}
	for f := range t.Fields() {
		if tag := f.Tag.Get("toml"); tag != "" {
			all = append(all, tag)
		}
		if f.IsExported() {
			all = append(all, keys(f.Type)...)
		}
	}
	return all
}

func TestBadConfigurationsTellAllTheirProblems(t *testing.T) {
	good, err := os.ReadFile(example(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what     string
		from, to string
		want     []string
	}{
		{"an unknown key", "fall_through = true", "fall_trough = true", []string{"router.toml:11:1: fall_trough: unknown key; did you mean \"fall_through\"?"}},
		{"an unknown key of a backend", "insecure = true", "insecur = true", []string{"backend.insecur: unknown key; did you mean \"insecure\"?"}},
		{"no backend", string(good[bytes.Index(good, []byte("[[backend]]")):]), "", []string{"backend: no [[backend]] section"}},
		{"two backends of one name", `name = "local"`, `name = "metal"`, []string{`backend[1].name: "metal" is the name of backend[0] already`}},
		{"a bad log level", `log_level = "info"`, `log_level = "loud"`, []string{`log_level: "loud": want debug, info, warn or error`}},
		{"a bad backend name", `name = "local"`, `name = "Local/1"`, []string{`backend[1].name: "Local/1": want [a-z][a-z0-9-]*`}},
		{"no target", `target = "unix:/run/compute-bridge/worker.sock"`, "", []string{"backend[1].target: missing"}},
		{"plaintext to elsewhere", "127.0.0.1:7444", "192.0.2.1:7444", []string{"backend[2].insecure: plaintext is for loopback addresses only"}},
		{"a bad bridge id", `bridge_id = "example"`, `bridge_id = ""`, []string{`bridge_id: "": want [a-z][a-z0-9-]*`}},
		{"no ledger", `path = "router.db"`, "", []string{"ledger.path: missing"}},
		{"a bad duration", `poll_interval = "5s"`, `poll_interval = 5`, []string{"backend.poll_interval: want a string, got 5"}},
		{"missing TLS files", "tls/router.pem", "tls/absent.pem", []string{"tls.cert_file: ", "absent.pem"}},
		{"bad TLS files", "tls/router.pem", "tls/router.key", []string{"tls.cert_file ", ", key_file "}},
		{"several problems", `name = "local"
target = "unix:/run/compute-bridge/worker.sock"`, `name = "metal"`, []string{"backend[1].target: missing", "backend[1].name: "}},
		{"nobody may call", string(good[bytes.Index(good, []byte("[[client]]")):bytes.Index(good, []byte("[ledger]"))]), "", []string{"client: no [[client]] section"}},
		{"nowhere to listen", string(good[bytes.Index(good, []byte("[[listen]]")):bytes.Index(good, []byte("[tls]"))]), "", []string{"listen: no [[listen]] section"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			path := example(t)
			text := strings.Replace(string(good), c.from, c.to, 1)
			if text == string(good) {
				t.Fatalf("the example does not have %q", c.from)
			}
			write(t, path, []byte(text))
			_, err := config.Load[server.Config](path)
			if err == nil {
				t.Fatal("it was accepted")
			}
			for _, want := range append(c.want, path) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q:\n%v", want, err)
				}
			}
		})
	}
}

func TestTLSIsNeededToDialToo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "router.toml")
	write(t, path, []byte(`
bridge_id = "b"
ledger.path = "router.db"
listen = [{address = "unix:/run/router.sock"}]
client = [{identity = "unix:0", role = "operator"}]
backend = [{name = "a", target = "worker:7443"}]
`))
	_, err := config.Load[server.Config](path)
	if err == nil || !strings.Contains(err.Error(), "tls.cert_file: missing") {
		t.Errorf("error is %v", err)
	}
}

func TestCommandLine(t *testing.T) {
	path := example(t)
	for _, c := range []struct {
		args        []string
		code        int
		out, errout string
	}{
		{[]string{"-version"}, 0, "router ", ""},
		{[]string{"-config", path, "-check-config"}, 0, path + ": the configuration is valid\n", ""},
		{[]string{"-config", path + ".absent", "-check-config"}, 1, "", "router.toml.absent: no such file"},
		{[]string{"-config", path + ".absent"}, 1, "", "router: configuration: "},
		{[]string{"-config", path, "-healthcheck"}, 1, "", "router: ask 0.0.0.0:7443"},
		{[]string{"-nonsense"}, 2, "", "-nonsense"},
		{[]string{"serve"}, 2, "", `unexpected argument "serve"`},
		{[]string{"-help"}, 0, "", "-check-config"},
	} {
		var out, errout bytes.Buffer
		if code := server.Program().Execute(t.Context(), c.args, &out, &errout); code != c.code {
			t.Errorf("%v: exit code %d, want %d", c.args, code, c.code)
		}
		if !strings.Contains(out.String(), c.out) || !strings.Contains(errout.String(), c.errout) || (c.out == "") != (out.Len() == 0) {
			t.Errorf("%v printed %q and %q, want %q and %q", c.args, out.String(), errout.String(), c.out, c.errout)
		}
	}
}
