package ledger_test

import (
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// withStep is the schema of a ledger with one more step.
func withStep(t *testing.T, l *ledger.Ledger, sql string) fs.FS {
	t.Helper()
	files := fstest.MapFS{}
	base := ledger.Migrations(l)
	names, err := fs.Glob(base, "*.sql")
	must(t, err)
	for _, name := range names {
		text, err := fs.ReadFile(base, name)
		must(t, err)
		files[name] = &fstest.MapFile{Data: text}
	}
	files[fmt.Sprintf("%04d_next.sql", len(names)+1)] = &fstest.MapFile{Data: []byte(sql)}
	return files
}

func version(t *testing.T, s store) (v int) {
	t.Helper()
	must(t, s.raw(t).QueryRowContext(t.Context(), "SELECT MAX(version) FROM schema_migrations").Scan(&v))
	return v
}

func TestMigrationKeepsDataAndRefusesToGoBack(t *testing.T) {
	both(t, testMigrationKeepsDataAndRefusesToGoBack)
}

func testMigrationKeepsDataAndRefusesToGoBack(t *testing.T, s store) {
	l, second := s.open(t), s.open(t)
	before := version(t, s)
	want, _, err := l.PutClaim(t.Context(), aClaim(1))
	must(t, err)

	// A step that fails in the middle leaves nothing behind.
	bad := withStep(t, l, "ALTER TABLE claims ADD COLUMN extra TEXT; CREATE TABLE claims (x TEXT);")
	if err := ledger.Migrate(t.Context(), l, bad); err == nil || !strings.Contains(err.Error(), "_next.sql") {
		t.Fatalf("a broken step = %v, want an error that names it", err)
	}
	if version(t, s) != before {
		t.Fatal("a broken step was recorded")
	}

	// Processes that start at once take turns.
	good := withStep(t, l, "ALTER TABLE claims ADD COLUMN extra TEXT;")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := ledger.Migrate(t.Context(), []*ledger.Ledger{l, second}[i%2], good); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := version(t, s); got != before+1 {
		t.Fatalf("version = %d, want %d", got, before+1)
	}
	for _, l := range []*ledger.Ledger{l, second} {
		got, err := l.Claim(t.Context(), id(1))
		if err != nil || got.Owner != want.Owner || !got.ValidTo.Equal(want.ValidTo) {
			t.Errorf("claim after the migration = %+v, %v", got, err)
		}
	}

	_, err = ledger.Open(t.Context(), s.config)
	if err == nil || errors.Is(err, ledger.ErrUnavailable) || !strings.Contains(err.Error(), "newer binary") {
		t.Errorf("opening a newer schema = %v", err)
	}
}

// What one dialect stores, the other does too.
func TestBothSchemasHaveTheSameStepsAndColumns(t *testing.T) {
	t.Parallel()
	var steps, columns [2][]string
	for i, s := range []store{sqliteStore(t), postgresStore(t)} {
		l := s.open(t)
		names, err := fs.Glob(ledger.Migrations(l), "*.sql")
		must(t, err)
		steps[i] = names
		query := `SELECT t.name || '.' || c.name FROM sqlite_schema t, pragma_table_info(t.name) c WHERE t.type = 'table'`
		if s.postgres() {
			query = `SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public'`
		}
		columns[i] = texts(t, s.raw(t), query)
		slices.Sort(columns[i])
	}
	if diff := cmp.Diff(steps[0], steps[1]); diff != "" {
		t.Errorf("migrations (-sqlite +postgres):\n%s", diff)
	}
	if diff := cmp.Diff(columns[0], columns[1]); diff != "" || len(columns[0]) < 20 {
		t.Errorf("columns (-sqlite +postgres):\n%s", diff)
	}
}

// texts returns what a query for one column finds.
func texts(t *testing.T, db *sql.DB, query string) []string {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), query)
	must(t, err)
	defer rows.Close()
	var found []string
	for rows.Next() {
		var text string
		must(t, rows.Scan(&text))
		found = append(found, text)
	}
	must(t, rows.Err())
	return found
}

func TestAnEmptyStoreIsNotMadeWhereItMustExist(t *testing.T) {
	both(t, testAnEmptyStoreIsNotMadeWhereItMustExist)
}

func testAnEmptyStoreIsNotMadeWhereItMustExist(t *testing.T, s store) {
	existing := s.config
	existing.Existing = true
	for range 2 {
		_, err := ledger.Open(t.Context(), existing)
		wantErr(t, err, ledger.ErrNotFound)
	}
	s.open(t)
	l, err := ledger.Open(t.Context(), existing)
	must(t, err)
	must(t, l.Close())
}

func TestMigrationsAreNumberedWithoutGaps(t *testing.T) {
	t.Parallel()
	file := &fstest.MapFile{Data: []byte("SELECT 1")}
	for _, files := range []fstest.MapFS{
		{},
		{"0002_a.sql": file},
		{"0001_a.sql": file, "0003_b.sql": file},
		{"0001_a.sql": file, "0001_b.sql": file},
		{"first.sql": file},
	} {
		if err := ledger.ReadMigrations(files); err == nil {
			t.Errorf("%v was accepted", files)
		}
	}
}
