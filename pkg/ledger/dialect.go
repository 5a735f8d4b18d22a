package ledger

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// dialect is all that differs between database systems. The statements in the
// other files keep to what SQLite and PostgreSQL both understand, except for
// the placeholders, which a second dialect rewrites in its driver's open.
type dialect interface {
	// open connects and returns a handle for writes and one for reads.
	open(ctx context.Context) (write, read *sql.DB, err error)
	// migrations holds the schema's files, NNNN_name.sql.
	migrations() fs.FS
	// isConstraint reports whether err says that a constraint or trigger
	// refused a write.
	isConstraint(err error) bool
}

// dialectFor returns the dialect that cfg names.
func dialectFor(cfg Config) (dialect, error) {
	switch cfg.Driver {
	case "", DriverSQLite:
		if cfg.Path == "" {
			return nil, errors.New("ledger: path: empty")
		}
		return sqliteDialect{path: cfg.Path, busyTimeout: cfg.BusyTimeout}, nil
	default:
		return nil, fmt.Errorf("ledger: driver: unknown value %q, want %q", cfg.Driver, DriverSQLite)
	}
}

//go:embed migrations/sqlite/*.sql
var sqliteMigrations embed.FS

// sqliteDialect stores everything in one file.
type sqliteDialect struct {
	path        string
	busyTimeout time.Duration
}

// sqliteReaders is how many reads run side by side. They are short and come
// from memory; more would only hold more page caches.
const sqliteReaders = 4

func (d sqliteDialect) migrations() fs.FS {
	sub, err := fs.Sub(sqliteMigrations, "migrations/sqlite")
	if err != nil {
		panic(err) // The path is a constant next to the embed directive.
	}
	return sub
}

func (d sqliteDialect) isConstraint(err error) bool {
	var e *sqlite.Error
	// The low byte is the primary code; the rest says which constraint.
	return errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_CONSTRAINT
}

func (d sqliteDialect) isBusy(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && (e.Code()&0xff == sqlite3.SQLITE_BUSY || e.Code()&0xff == sqlite3.SQLITE_LOCKED)
}

func (d sqliteDialect) open(ctx context.Context) (write, read *sql.DB, err error) {
	if err := d.createFile(); err != nil {
		return nil, nil, err
	}
	if write, err = d.pool(false); err != nil {
		return nil, nil, err
	}
	write.SetMaxOpenConns(1)
	if err := d.connect(ctx, write); err != nil {
		return nil, nil, errors.Join(err, write.Close())
	}
	if read, err = d.pool(true); err != nil {
		return nil, nil, errors.Join(err, write.Close())
	}
	read.SetMaxOpenConns(sqliteReaders)
	read.SetMaxIdleConns(sqliteReaders)
	return write, read, nil
}

func (d sqliteDialect) pool(readOnly bool) (*sql.DB, error) {
	c, err := sqlite.NewConnector(d.dsn(readOnly))
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector{Connector: c, prepare: true}), nil
}

// connect makes the first connection, which switches a new file to the
// write-ahead log. SQLite answers BUSY to that switch at once, without the busy
// timeout, when another process is doing the same.
func (d sqliteDialect) connect(ctx context.Context, db *sql.DB) error {
	deadline := time.NewTimer(d.busyTimeout)
	defer deadline.Stop()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := db.PingContext(ctx)
		if err == nil || !d.isBusy(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-deadline.C:
			return err
		case <-again.C:
		}
	}
}

// createFile makes sure that the file exists and is private: it holds grants
// with their environments. SQLite gives its side files the same mode.
func (d sqliteDialect) createFile() error {
	f, err := os.OpenFile(d.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: not a regular file", d.path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s: mode %04o lets others than the owner in, want 0600", d.path, perm)
	}
	return nil
}

// dsn is the driver's address of the file with the settings of a connection.
func (d sqliteDialect) dsn(readOnly bool) string {
	path := d.path
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	q := url.Values{}
	q.Add("_pragma", "busy_timeout("+strconv.FormatInt(d.busyTimeout.Milliseconds(), 10)+")")
	q.Add("_pragma", "journal_mode(WAL)")
	// A commit waits for the disk: an intent must survive a power cut, because
	// the create call that follows it does.
	q.Add("_pragma", "synchronous(FULL)")
	q.Add("_pragma", "foreign_keys(1)")
	if readOnly {
		q.Add("_pragma", "query_only(1)")
	} else {
		// Take the write lock at the begin of a transaction, so that one that
		// reads first never finds itself unable to upgrade.
		q.Set("_txlock", "immediate")
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}
