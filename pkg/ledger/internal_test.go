package ledger

import (
	"bytes"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"
)

func TestFullDiskIsUnavailableAndRecovers(t *testing.T) {
	t.Parallel()
	l, err := Open(t.Context(), Config{Path: filepath.Join(t.TempDir(), "l.db")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	// SQLite answers FULL at its own page limit by the same path as at ENOSPC.
	if _, err := l.write.ExecContext(t.Context(), "PRAGMA max_page_count = 40"); err != nil {
		t.Fatal(err)
	}
	record := bytes.Repeat([]byte("x"), 32<<10)
	var stored byte
	for {
		_, _, err = l.PutClaim(t.Context(), Claim{RequestID: RequestID{stored}, Record: record})
		if err != nil {
			break
		}
		if stored++; stored == 200 {
			t.Fatal("the limit was never reached")
		}
	}
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "full") {
		t.Fatalf("error = %v, want a full store", err)
	}
	if _, err := l.Claim(t.Context(), RequestID{stored}); !errors.Is(err, ErrNotFound) {
		t.Errorf("half a claim was stored: %v", err)
	}
	if _, err := l.Claim(t.Context(), RequestID{0}); err != nil {
		t.Errorf("reading from a full store: %v", err)
	}
	if _, err := l.write.ExecContext(t.Context(), "PRAGMA max_page_count = 100000"); err != nil {
		t.Fatal(err)
	}
	if _, created, err := l.PutClaim(t.Context(), Claim{RequestID: RequestID{stored}, Record: record}); err != nil || !created {
		t.Errorf("with room again: created %v, %v", created, err)
	}
}

// withStep is the schema with one more step.
func withStep(t *testing.T, sql string) fs.FS {
	t.Helper()
	files := fstest.MapFS{}
	base := sqliteDialect{}.migrations()
	names, err := fs.Glob(base, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(base, name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = &fstest.MapFile{Data: text}
	}
	files["9999_next.sql"] = &fstest.MapFile{Data: []byte(sql)}
	next := strings.Repeat("0", 3) + string(rune('1'+len(names))) + "_next.sql"
	files[next] = files["9999_next.sql"]
	delete(files, "9999_next.sql")
	return files
}

func version(t *testing.T, l *Ledger) (v int) {
	t.Helper()
	if err := l.read.QueryRowContext(t.Context(), "SELECT MAX(version) FROM schema_migrations").Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMigrationKeepsDataAndRefusesToGoBack(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "l.db")
	l, err := Open(t.Context(), Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	before := version(t, l)
	want, _, err := l.PutClaim(t.Context(), Claim{RequestID: RequestID{1}, Owner: "o", ValidTo: time.Unix(9, 0)})
	if err != nil {
		t.Fatal(err)
	}

	// A step that fails in the middle leaves nothing behind.
	bad := withStep(t, "ALTER TABLE claims ADD COLUMN extra TEXT; CREATE TABLE claims (x);")
	if err := migrate(t.Context(), l, bad); err == nil || !strings.Contains(err.Error(), "_next.sql") {
		t.Fatalf("a broken step = %v, want an error that names it", err)
	}
	if version(t, l) != before {
		t.Fatal("a broken step was recorded")
	}

	good := withStep(t, "ALTER TABLE claims ADD COLUMN extra TEXT;")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := migrate(t.Context(), l, good); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := version(t, l); got != before+1 {
		t.Fatalf("version = %d, want %d", got, before+1)
	}
	got, err := l.Claim(t.Context(), RequestID{1})
	if err != nil || got.Owner != want.Owner || !got.ValidTo.Equal(want.ValidTo) {
		t.Errorf("claim after the migration = %+v, %v", got, err)
	}

	_, err = Open(t.Context(), Config{Path: path})
	if err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "newer binary") {
		t.Errorf("opening a newer schema = %v", err)
	}
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
		if _, err := readMigrations(files); err == nil {
			t.Errorf("%v was accepted", files)
		}
	}
}
