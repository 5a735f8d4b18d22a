package ledger_test

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// store is an empty place of one dialect, that handles and processes share.
type store struct {
	config ledger.Config
}

func sqliteStore(t testing.TB) store {
	t.Helper()
	return store{ledger.Config{Driver: ledger.DriverSQLite, Path: filepath.Join(t.TempDir(), "ledger.db")}}
}

func postgresStore(t testing.TB) store {
	t.Helper()
	return store{ledger.Config{Driver: ledger.DriverPostgres, DSN: pgtest.Shared(t).Database(t)}}
}

// both runs a test on both dialects.
func both(t *testing.T, test func(*testing.T, store)) {
	t.Helper()
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, sqliteStore(t))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, postgresStore(t))
	})
}

func (s store) postgres() bool { return s.config.Driver == ledger.DriverPostgres }

// open returns another handle, until the end of the test.
func (s store) open(t testing.TB) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(context.WithoutCancel(t.Context()), s.config)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

// raw opens the store as another program would.
func (s store) raw(t testing.TB) *sql.DB {
	t.Helper()
	if s.postgres() {
		return pgtest.Open(t, s.config.DSN)
	}
	return raw(t, s.config.Path)
}

// bytes writes a value, in hexadecimal, in the words of the dialect.
func (s store) bytes(hex string) string {
	if s.postgres() {
		return `'\x` + hex + `'::BYTEA`
	}
	return "x'" + hex + "'"
}

// lock keeps every write waiting until unlock.
func (s store) lock(t *testing.T) (unlock func()) {
	t.Helper()
	conn, err := s.raw(t).Conn(t.Context())
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	begin := "BEGIN IMMEDIATE"
	if s.postgres() {
		begin = "BEGIN; LOCK claims IN EXCLUSIVE MODE" // readers pass
	}
	_, err = conn.ExecContext(t.Context(), begin)
	must(t, err)
	return func() {
		t.Helper()
		_, err := conn.ExecContext(t.Context(), "ROLLBACK")
		must(t, err)
	}
}

// refusedByLaw reports whether err is how the database refuses what breaks a
// law.
func (s store) refusedByLaw(err error) bool {
	if s.postgres() {
		return strings.Contains(err.Error(), "(SQLSTATE 23")
	}
	return strings.Contains(err.Error(), "constraint failed")
}

func (s store) String() string {
	return fmt.Sprintf("%s %s%s", s.config.Driver, s.config.Path, s.config.DSN)
}
