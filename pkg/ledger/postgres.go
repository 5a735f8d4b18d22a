package ledger

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

//go:embed migrations/postgres/*.sql
var postgresMigrations embed.FS

// postgresDialect stores everything in one schema of a PostgreSQL database, 14
// or newer, which any number of processes may share.
type postgresDialect struct {
	config pgx.ConnConfig
	// waiting bounds the waits for a connection and for another transaction.
	waiting time.Duration
	// texts are statements with the database's placeholders, by ours.
	texts *sync.Map
}

// How many connections a process has at most. Writes are short; those of one
// grant wait for each other with their connection in hand, which must not keep
// reads from going on.
const (
	postgresWriters = 8
	postgresReaders = 4
)

const (
	// postgresIdle is when a connection that nobody uses is given back.
	postgresIdle = 5 * time.Minute
	// postgresLife is when a connection is replaced, so that a change in DNS
	// or behind a balancer is followed.
	postgresLife = 30 * time.Minute
)

// schemaLock is the advisory lock that migrations hold. The number is arbitrary
// ("cbledger"); those of grants are hashes.
const schemaLock = 0x63626c6564676572

// dsnSettings are what an address may say beside user, host, port and database.
var dsnSettings = []string{
	"sslmode", "sslrootcert", "sslcert", "sslkey", "target_session_attrs", "connect_timeout", "application_name", "search_path",
}

// errDSN says what an address looks like. The text of the address is in no
// error, in case it holds a password after all.
var errDSN = errors.New("want postgres://user@host:port/database, with no other settings than " + strings.Join(dsnSettings, ", "))

// parseDSN reads the address of a PostgreSQL database.
func parseDSN(dsn string) (*pgx.ConnConfig, error) {
	base, query, _ := strings.Cut(dsn, "?")
	if !strings.HasPrefix(base, "postgres://") && !strings.HasPrefix(base, "postgresql://") {
		return nil, errDSN
	}
	settings, err := url.ParseQuery(query)
	if err != nil {
		return nil, errDSN
	}
	// The library's default falls back to plain text in silence, and its
	// "require" believes every server.
	switch mode := settings.Get("sslmode"); mode {
	case "":
		settings.Set("sslmode", "verify-full")
	case "verify-full", "verify-ca", "disable":
	default:
		return nil, fmt.Errorf("sslmode=%s: want verify-full (the default), verify-ca, or disable for a server on this machine or a private network", mode)
	}
	full := base + "?" + settings.Encode()
	parse := func(more ...string) (*pgx.ConnConfig, error) {
		var options pgx.ParseConfigOptions
		options.ConnStringAllowedKeys = slices.Concat([]string{"user", "host", "port", "database"}, dsnSettings, more)
		return pgx.ParseConfigWithOptions(full, options)
	}
	config, err := parse()
	if err == nil {
		// From the environment or a file in somebody's home.
		config.Password = ""
		return config, nil
	}
	if _, err := parse("password", "sslpassword"); err == nil {
		return nil, errors.New("holds a password: put it into a file of its own (password_file)")
	}
	if file, ok := errors.AsType[*fs.PathError](err); ok {
		return nil, fmt.Errorf("%s: %w", file.Path, file.Err) // a certificate's
	}
	return nil, errDSN
}

func newPostgresDialect(dsn string, password redact.Secret, waiting time.Duration) (dialect, error) {
	config, err := parseDSN(dsn)
	if err != nil {
		return nil, err
	}
	config.Password = string(password.Expose())
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = waiting
	}
	if config.ValidateConnect == nil {
		// A standby can't be written.
		config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	milliseconds := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	if config.RuntimeParams["application_name"] == "" {
		config.RuntimeParams["application_name"] = "compute-bridge"
	}
	config.RuntimeParams["lock_timeout"] = milliseconds(waiting)
	config.RuntimeParams["statement_timeout"] = milliseconds(2 * waiting)
	// A process that hangs in the middle of a transaction, or whose connection is
	// dead and doesn't say so, keeps others out of its grant for less than they
	// wait.
	config.RuntimeParams["idle_in_transaction_session_timeout"] = milliseconds(waiting * 4 / 5)
	config.RuntimeParams["client_connection_check_interval"] = milliseconds(time.Second)
	return postgresDialect{config: *config, waiting: waiting, texts: &sync.Map{}}, nil
}

func (d postgresDialect) open(ctx context.Context) (write, read *sql.DB, err error) {
	write, read = d.pool(postgresWriters), d.pool(postgresReaders)
	if err := write.PingContext(ctx); err != nil {
		// Ping says only that the connection is bad.
		conn, why := write.Conn(ctx)
		if why == nil {
			why = conn.Close()
		}
		if why != nil {
			err = why
		}
		return nil, nil, errors.Join(err, write.Close(), read.Close())
	}
	return write, read, nil
}

func (d postgresDialect) pool(size int) *sql.DB {
	db := sql.OpenDB(connector{Connector: stdlib.GetConnector(d.config), rewrite: d.text, broken: postgresBroken})
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	db.SetConnMaxIdleTime(postgresIdle)
	db.SetConnMaxLifetime(postgresLife)
	return db
}

// postgresBroken reports whether a connection is lost.
func postgresBroken(c driver.Conn) bool {
	conn, ok := c.(*stdlib.Conn)
	return ok && conn.Conn().IsClosed()
}

func (d postgresDialect) migrations() fs.FS {
	sub, err := fs.Sub(postgresMigrations, "migrations/postgres")
	if err != nil {
		panic(err) // The path is a constant next to the embed directive.
	}
	return sub
}

// timeout is longer than what the server takes to give up on a lock.
func (d postgresDialect) timeout() time.Duration { return 2 * d.waiting }

func (d postgresDialect) begin(ctx context.Context, db *sql.DB) (*sql.Tx, error) {
	return db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted}) // whatever the default is
}

// lock serialises the transactions of one grant with a lock of their own,
// rather than with SERIALIZABLE, whose false conflicts would have to be retried
// and which protects only from others that use it too. In READ COMMITTED every
// statement after the lock sees what its last holder committed. The function is
// in the migrations; the tables' triggers call it too.
func (d postgresDialect) lock(ctx context.Context, tx *sql.Tx, id RequestID) error {
	_, err := tx.ExecContext(ctx, `SELECT ledger_lock(?)`, id[:])
	return err
}

func (d postgresDialect) lockSchema(ctx context.Context, tx *sql.Tx) error {
	// A migration may take long, and so may waiting for another process's.
	_, err := tx.ExecContext(ctx, `SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '0', true),
		pg_advisory_xact_lock(?::BIGINT)`, int64(schemaLock))
	return err
}

func (d postgresDialect) made(ctx context.Context, q querier) (made bool, err error) {
	err = q.QueryRowContext(ctx, `SELECT to_regclass('schema_migrations') IS NOT NULL`).Scan(&made)
	return made, err
}

func (d postgresDialect) check(ctx context.Context, tx *sql.Tx) error {
	var readOnly bool
	err := tx.QueryRowContext(ctx, `SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::BOOLEAN`).Scan(&readOnly)
	if err == nil && readOnly {
		return fmt.Errorf("%w: the database can't be written", ErrUnavailable)
	}
	return err
}

// isConstraint looks at the error's class: 23 is for constraints, and for our
// triggers; 22 is for values that the columns can't hold, such as text that
// isn't UTF-8.
func (d postgresDialect) isConstraint(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (strings.HasPrefix(e.Code, "23") || strings.HasPrefix(e.Code, "22"))
}

// text writes placeholders as $1, $2, ... No statement has a question mark
// anywhere else.
func (d postgresDialect) text(query string) string {
	known, _ := d.texts.Load(query)
	if text, ok := known.(string); ok {
		return text
	}
	var b strings.Builder
	n := 0
	for part := range strings.SplitSeq(query, "?") {
		if n > 0 {
			fmt.Fprintf(&b, "$%d", n)
		}
		b.WriteString(part)
		n++
	}
	d.texts.Store(query, b.String())
	return b.String()
}
