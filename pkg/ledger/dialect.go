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
// the placeholders, which are SQLite's.
type dialect interface {
	// open connects and returns a handle for writes and one for reads.
	open(ctx context.Context) (write, read *sql.DB, err error)
	// migrations holds the schema's files, NNNN_name.sql.
	migrations() fs.FS
	// isConstraint reports whether err says that a constraint or trigger
	// refused a write.
	isConstraint(err error) bool
	// timeout bounds every call; zero means that only the caller does.
	timeout() time.Duration
	// begin begins a write transaction.
	begin(ctx context.Context, db *sql.DB) (*sql.Tx, error)
	// lock keeps other write transactions for a grant waiting until the end of
	// tx, and lockSchema other migrations.
	lock(ctx context.Context, tx *sql.Tx, id RequestID) error
	lockSchema(ctx context.Context, tx *sql.Tx) error
	// made reports whether the store has tables.
	made(ctx context.Context, q querier) (bool, error)
	// check reports whether tx could write.
	check(ctx context.Context, tx *sql.Tx) error
}

// dialectFor returns the dialect that cfg names.
func dialectFor(cfg Config) (dialect, error) {
	switch cfg.Driver {
	case "", DriverSQLite:
		if cfg.Path == "" {
			return nil, errors.New("ledger: path: empty")
		}
		return sqliteDialect{path: cfg.Path, busyTimeout: cfg.BusyTimeout, existing: cfg.Existing}, nil
	case DriverPostgres:
		d, err := newPostgresDialect(cfg.DSN, cfg.Password, cfg.BusyTimeout)
		if err != nil {
			return nil, fmt.Errorf("ledger: dsn: %w", err)
		}
		return d, nil
	default:
		return nil, fmt.Errorf("ledger: driver: unknown value %q, want %q or %q", cfg.Driver, DriverSQLite, DriverPostgres)
	}
}

//go:embed migrations/sqlite/*.sql
var sqliteMigrations embed.FS

// sqliteDialect stores everything in one file.
type sqliteDialect struct {
	path        string
	busyTimeout time.Duration
	existing    bool
}

// sqliteReaders is how many reads run side by side. They are short and come
// from memory; more would only hold more page caches.
const sqliteReaders = 4

// sqliteBusyWait is how long SQLite itself waits for another process's write:
// longer than one takes, so that most waits end in the middle of it.
const sqliteBusyWait = 20 * time.Millisecond

func (d sqliteDialect) migrations() fs.FS {
	sub, err := fs.Sub(sqliteMigrations, "migrations/sqlite")
	if err != nil {
		panic(err) // The path is a constant next to the embed directive.
	}
	return sub
}

// timeout is none: a write waits for those before it in this process for as
// long as its caller does, and for another process's no longer than the busy
// timeout.
func (d sqliteDialect) timeout() time.Duration { return 0 }

// Write transactions run one after the other anyway.
func (d sqliteDialect) lock(context.Context, *sql.Tx, RequestID) error { return nil }

func (d sqliteDialect) lockSchema(context.Context, *sql.Tx) error { return nil }

func (d sqliteDialect) made(ctx context.Context, q querier) (made bool, err error) {
	err = q.QueryRowContext(ctx, `SELECT COUNT(*) > 0 FROM sqlite_schema WHERE name = 'schema_migrations'`).Scan(&made)
	return made, err
}

// To have begun is to be able to write.
func (d sqliteDialect) check(context.Context, *sql.Tx) error { return nil }

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
	return d.whileBusy(ctx, func() error { return db.PingContext(ctx) })
}

// begin takes the write lock.
func (d sqliteDialect) begin(ctx context.Context, db *sql.DB) (tx *sql.Tx, err error) {
	err = d.whileBusy(ctx, func() error {
		tx, err = db.BeginTx(ctx, nil)
		return err
	})
	return tx, err
}

// whileBusy repeats do for the busy timeout while another process has the lock.
// SQLite's own wait would not end with the context.
func (d sqliteDialect) whileBusy(ctx context.Context, do func() error) error {
	deadline := time.NewTimer(d.busyTimeout)
	defer deadline.Stop()
	again := time.NewTicker(sqliteBusyWait)
	defer again.Stop()
	for {
		err := do()
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
	flags := os.O_RDWR | os.O_CREATE
	if d.existing {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(d.path, flags, 0o600)
	if d.existing && errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", d.path, ErrNotFound)
	}
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
	// A reader waits only while the file is recovered; writers wait by
	// themselves, see whileBusy.
	wait := d.busyTimeout
	if !readOnly {
		wait = min(wait, sqliteBusyWait)
	}
	q.Add("_pragma", "busy_timeout("+strconv.FormatInt(wait.Milliseconds(), 10)+")")
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
