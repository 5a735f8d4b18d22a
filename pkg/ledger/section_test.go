package ledger_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// file is a configuration with a ledger and nothing else.
type file struct {
	Ledger ledger.Section `toml:"ledger"`
}

func (f file) Validate() error { return f.Ledger.Validate("ledger") }

func parse(t *testing.T, text string) (file, error) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "pw"), []byte("hunter2\n"), 0o600))
	return config.Parse[file](filepath.Join(dir, "x.toml"), []byte("[ledger]\n"+text))
}

func TestSectionsSayWhereTheLedgerIs(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`path = "a.db"`, "driver = \"sqlite\"\npath = \"a.db\""} {
		f, err := parse(t, text)
		must(t, err)
		c := f.Ledger.Config()
		if !filepath.IsAbs(c.Path) || c.DSN != "" || !c.Password.IsZero() {
			t.Errorf("%s: %+v", text, c)
		}
	}
	for _, dsn := range []string{
		"postgres://bridge@db.example/x", "postgresql://bridge@a:1,b:2/x?sslmode=verify-ca&target_session_attrs=primary",
		"postgres://bridge@127.0.0.1:5432/x?sslmode=disable&search_path=y",
		"postgres:///x?host=/run/postgresql&user=bridge",
	} {
		f, err := parse(t, fmt.Sprintf("driver = \"postgres\"\ndsn = %q\npassword_file = \"pw\"", dsn))
		if err != nil {
			t.Error(err)
			continue
		}
		c := f.Ledger.Config()
		if c.Driver != ledger.DriverPostgres || c.DSN != dsn || string(c.Password.Expose()) != "hunter2" {
			t.Errorf("%s: %+v", dsn, c)
		}
		if text := fmt.Sprintf("%v %+v %#v", f, c, c); strings.Contains(text, "hunter2") {
			t.Errorf("the password is printed: %s", text)
		}
	}
}

func TestSectionsAreChecked(t *testing.T) {
	t.Parallel()
	const secret = "hunter2"
	dsn := func(s string) string { return fmt.Sprintf("driver = \"postgres\"\ndsn = %q", s) }
	for _, c := range []struct{ text, want string }{
		{"", "ledger.path: missing"},
		{`driver = "oracle"`, `ledger.driver: "oracle": want "sqlite" or "postgres"`},
		{`driver = "postgres"`, "ledger.dsn: missing"},
		{"path = \"a\"\ndsn = \"postgres://h/x\"", `ledger.dsn: is for driver "postgres"`},
		{"path = \"a\"\npassword_file = \"pw\"", `ledger.password_file: is for driver "postgres"`},
		{dsn("postgres://h/x") + "\npath = \"a\"", `ledger.path: is for driver "sqlite"`},
		{dsn("postgres://h/x") + "\npassword_file = \"absent\"", "ledger.password_file: "},
		{dsn("postgres://bridge:hunter2@h/x"), "ledger.dsn: holds a password"},
		{dsn("postgres://bridge@h/x?password=hunter2"), "ledger.dsn: holds a password"},
		{dsn("postgres://bridge@h/x?sslmode=verify-full&sslpassword=hunter2"), "ledger.dsn: holds a password"},
		{dsn("postgres://bridge:hunter2@h:port/x"), "ledger.dsn: want postgres://"},
		{dsn("postgres://bridge:hun%ter2@h/x?hunter2"), "ledger.dsn: want postgres://"},
		{dsn("host=h password=hunter2"), "ledger.dsn: want postgres://"},
		{dsn("mysql://bridge:hunter2@h/x"), "ledger.dsn: want postgres://"},
		{dsn("postgres://bridge@h/x?sslmode=require"), "sslmode=require: want verify-full"},
		{dsn("postgres://bridge@h/x?sslmode=prefer"), "sslmode=prefer: want verify-full"},
		{dsn("postgres://bridge@h/x?synchronous_commit=off"), "ledger.dsn: want postgres://"},
		{dsn("postgres://bridge@h/x?sslrootcert=/absent.pem"), "/absent.pem"},
	} {
		_, err := parse(t, c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s:\n%v\nwant %q in it and no password", c.text, err, c.want)
		}
	}
}
