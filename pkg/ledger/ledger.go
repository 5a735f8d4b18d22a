package ledger

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// RequestID is the market's identity of a grant, the key of every table.
type RequestID [32]byte

// String returns the id as 64 lower-case hexadecimal digits.
func (id RequestID) String() string { return hex.EncodeToString(id[:]) }

// The errors that callers act on; match them with [errors.Is].
var (
	// ErrUnavailable says that the store could not do its work: it is
	// unreachable, locked for longer than the busy timeout, full or damaged.
	ErrUnavailable = errors.New("ledger unavailable")
	// ErrNotFound says that there is no such row.
	ErrNotFound = errors.New("not found in the ledger")
	// ErrClosed says that the grant has a closure or a final log, so that
	// nothing may be begun for it any more.
	ErrClosed = errors.New("grant is closed")
	// ErrConflict says that what is stored differs from what the caller
	// assumed, or that the write would break a table's law.
	ErrConflict = errors.New("conflict with the ledger")
	// ErrStale says that a later interim log, or a final one, is stored.
	ErrStale = errors.New("a later log is stored")
)

// The drivers that [Config.Driver] accepts.
const (
	// DriverSQLite stores everything in one local file.
	DriverSQLite = "sqlite"
	// DriverPostgres stores everything in a PostgreSQL database.
	DriverPostgres = "postgres"
)

// defaultBusyTimeout is longer than any write transaction of ours takes on a
// slow disk, and shorter than what a caller of an RPC waits for.
const defaultBusyTimeout = 5 * time.Second

// Config says where the store is.
type Config struct {
	// Driver is one of the Driver constants; empty means [DriverSQLite].
	Driver string
	// Path is the SQLite file. It is created with mode 0600 when it is absent;
	// its directory must exist. An existing file that group or others may
	// access is refused.
	Path string
	// DSN is the PostgreSQL database, as postgres://user@host:port/database,
	// without a password. TLS with a verified certificate is the default.
	DSN string
	// Password is that of the user in DSN, if the server wants one.
	Password redact.Secret
	// BusyTimeout is how long a write waits for another process's write before
	// it fails with [ErrUnavailable]; zero means 5 s. With PostgreSQL it is also
	// how long connecting may take, and no call takes longer than twice as long.
	BusyTimeout time.Duration
	// Existing refuses a store that is empty, with [ErrNotFound], instead of
	// making it.
	Existing bool
}

// Ledger is an open store. It is safe for concurrent use.
type Ledger struct {
	dialect dialect
	// write has a single connection with SQLite, so that this process's writers
	// queue here, in order and cancellable, and not in the database's lock.
	write *sql.DB
	read  *sql.DB
}

// Open opens the store, creates it when it is absent, and brings its schema up
// to this binary's version. A store with a newer schema is refused. Errors of
// the environment are [ErrUnavailable]; errors of the configuration are not.
func Open(ctx context.Context, cfg Config) (*Ledger, error) {
	if cfg.BusyTimeout == 0 {
		cfg.BusyTimeout = defaultBusyTimeout
	}
	if cfg.BusyTimeout < 0 {
		return nil, fmt.Errorf("ledger: busy timeout %s is negative", cfg.BusyTimeout)
	}
	d, err := dialectFor(cfg)
	if err != nil {
		return nil, err
	}
	l := &Ledger{dialect: d}
	if l.write, l.read, err = d.open(ctx); err != nil {
		return nil, fmt.Errorf("open ledger: %w", l.wrap(ctx, err))
	}
	if cfg.Existing {
		if err := l.made(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("open ledger: %w", err), l.Close())
		}
	}
	if err := migrate(ctx, l, d.migrations()); err != nil {
		return nil, errors.Join(fmt.Errorf("open ledger: %w", err), l.Close())
	}
	return l, nil
}

// made returns [ErrNotFound] if no process has made the store yet.
func (l *Ledger) made(ctx context.Context) error {
	_, err := read(ctx, l, func(ctx context.Context, q querier) (struct{}, error) {
		made, err := l.dialect.made(ctx, q)
		if err == nil && !made {
			err = fmt.Errorf("%w: the store is empty", ErrNotFound)
		}
		return struct{}{}, err
	})
	return err
}

// Close releases the store. Calls that are under way finish first; later ones
// fail with [ErrUnavailable].
func (l *Ledger) Close() error {
	// Readers first: the last connection to close checkpoints the write-ahead
	// log, and only a connection that may write can.
	return errors.Join(l.read.Close(), l.write.Close())
}

// Check reports whether the store can be read and locked for writing now, for
// readiness probes. It writes nothing.
func (l *Ledger) Check(ctx context.Context) error {
	limited, cancel := l.limit(ctx)
	defer cancel()
	err := l.transact(limited, func(tx *sql.Tx) error {
		if err := l.dialect.check(limited, tx); err != nil {
			return err
		}
		var n int64
		return tx.QueryRowContext(limited, `SELECT COUNT(*) FROM schema_migrations`).Scan(&n)
	})
	if err = l.wrap(ctx, err); err != nil {
		return fmt.Errorf("check ledger: %w", err)
	}
	return nil
}

// limit bounds a call that its caller doesn't bound: a connection that says
// nothing any more must not hold anybody for ever.
func (l *Ledger) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	if d := l.dialect.timeout(); d > 0 {
		return context.WithTimeout(ctx, d)
	}
	return ctx, func() {}
}

// update runs fn in one write transaction for a grant and commits it when fn
// returns nil. All writes but those of the schema go through here. Write
// transactions of one grant run one after the other, over all processes: fn may
// read, decide and write without a race. fn gets a context that may end earlier.
func (l *Ledger) update(ctx context.Context, id RequestID, fn func(context.Context, *sql.Tx) error) error {
	limited, cancel := l.limit(ctx)
	defer cancel()
	return l.wrap(ctx, l.transact(limited, func(tx *sql.Tx) error {
		if err := l.dialect.lock(limited, tx, id); err != nil {
			return err
		}
		return fn(limited, tx)
	}))
}

func (l *Ledger) transact(ctx context.Context, fn func(*sql.Tx) error) error {
	tx, err := l.dialect.begin(ctx, l.write)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		// A rollback can only fail when the transaction is over already.
		_ = tx.Rollback()
		return err
	}
	return tx.Commit()
}

// read runs fn outside of a transaction.
func read[T any](ctx context.Context, l *Ledger, fn func(context.Context, querier) (T, error)) (T, error) {
	limited, cancel := l.limit(ctx)
	defer cancel()
	value, err := fn(limited, l.read)
	return value, l.wrap(ctx, err)
}

// wrap gives an error that came from the database its place among the errors
// of this package, and leaves those of this package and of callbacks alone.
func (l *Ledger) wrap(ctx context.Context, err error) error {
	var own callerError
	var fenced FencedError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &own):
		return own.err
	case errors.As(err, &fenced):
		return err
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrNotFound), errors.Is(err, ErrClosed),
		errors.Is(err, ErrConflict), errors.Is(err, ErrStale):
		return err
	case errors.Is(err, sql.ErrNoRows):
		return ErrNotFound
	case errors.Is(ctx.Err(), context.Canceled):
		// The driver reports an interrupted statement in its own words.
		return fmt.Errorf("%w: %v", context.Canceled, err) //nolint:errorlint // Only one cause may match.
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w: %w", ErrUnavailable, ctx.Err(), err)
	case l.dialect.isConstraint(err):
		return fmt.Errorf("%w: %w", ErrConflict, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		// Not the caller's deadline but one of ours.
		return fmt.Errorf("%w: %v", ErrUnavailable, err) //nolint:errorlint // It must not match.
	default:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
}

// callerError carries an error of a caller's callback through a transaction,
// unclassified.
type callerError struct{ err error }

func (e callerError) Error() string { return e.err.Error() }

// scanner is the common part of [sql.Row] and [sql.Rows].
type scanner interface{ Scan(dest ...any) error }

// micros is how a time is stored.
func micros(t time.Time) int64 { return t.UnixMicro() }

// orNow returns t, or the present when t is zero.
func orNow(t time.Time) time.Time {
	if t.IsZero() {
		return time.Now()
	}
	return t
}

// timeOf is the reverse of micros.
func timeOf(us int64) time.Time { return time.UnixMicro(us).UTC() }

// blob returns b, or an empty slice for nil, which SQL would store as NULL.
func blob(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// scan32 scans a 32-byte column into an array.
type scan32 struct{ dst *[32]byte }

// Scan implements [sql.Scanner].
func (s scan32) Scan(src any) error {
	b, ok := src.([]byte)
	if !ok || len(b) != len(s.dst) {
		return fmt.Errorf("%w: a stored id or hash is not 32 bytes", ErrUnavailable)
	}
	copy(s.dst[:], b)
	return nil
}

// changed reports whether a statement touched a row.
func changed(res sql.Result, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n > 0, err
}
