package ledger_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

func database(dsn string) string {
	_, rest, _ := strings.Cut(strings.TrimPrefix(dsn, "postgres://"), "/")
	name, _, _ := strings.Cut(rest, "?")
	return name
}

func put(ctx context.Context, l *ledger.Ledger, n int) error {
	_, _, err := l.PutClaim(ctx, aClaim(n))
	return err
}

func TestPostgresWantsThePassword(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{}) // roles are a server's
	server.Exec(t, "postgres", "CREATE ROLE locked LOGIN PASSWORD 'open sesame'")
	dsn := server.Database(t)
	server.Exec(t, database(dsn), "ALTER SCHEMA public OWNER TO locked")
	config := ledger.Config{Driver: ledger.DriverPostgres, DSN: strings.Replace(dsn, "bridge@", "locked@", 1)}
	for password, want := range map[string]error{"open sesame": nil, "open barley": ledger.ErrUnavailable, "": ledger.ErrUnavailable} {
		config.Password = redact.New([]byte(password))
		l, err := ledger.Open(t.Context(), config)
		if want != nil {
			wantErr(t, err, want)
			if password != "" && strings.Contains(err.Error(), password) {
				t.Errorf("the error shows the password: %v", err)
			}
			continue
		}
		must(t, err)
		must(t, put(t.Context(), l, 1))
		must(t, l.Close())
	}
}

func TestPostgresIsVerified(t *testing.T) {
	t.Parallel()
	server := pgtest.Shared(t)
	tap := pgtest.NewTap(t, server) // which doesn't speak TLS
	dsn := server.Database(t)
	verified := strings.Replace(dsn, "sslmode=disable", "sslrootcert="+server.CAFile, 1)
	for name, c := range map[string]struct {
		dsn, want string
	}{
		"by its certificate":      {verified, ""},
		"unknown authority":       {strings.Replace(dsn, "?sslmode=disable", "", 1), "certificate"},
		"plain text is no answer": {tap.DSN(verified), "TLS"},
	} {
		l, err := ledger.Open(t.Context(), ledger.Config{Driver: ledger.DriverPostgres, DSN: c.dsn})
		if c.want == "" {
			must(t, err)
			must(t, l.Close())
			continue
		}
		wantErr(t, err, ledger.ErrUnavailable)
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", name, err, c.want)
		}
	}
}

// Whatever the defaults are, a commit waits for the disk, and a transaction sees
// what others have committed.
func TestPostgresDefaultsDontWeakenCommits(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{"off": "on", "local": "on", "remote_write": "on", "on": "on", "remote_apply": "remote_apply"} {
		s := postgresStore(t)
		pgtest.Shared(t).Exec(t, "postgres", fmt.Sprintf(
			"ALTER DATABASE %[1]s SET synchronous_commit = %[2]s; ALTER DATABASE %[1]s SET default_transaction_isolation = serializable",
			database(s.config.DSN), given))
		l := s.open(t)
		must(t, put(t.Context(), l, 1))
		var got string
		must(t, ledger.Update(t.Context(), l, id(1), func(ctx context.Context, tx *sql.Tx) error {
			return tx.QueryRowContext(ctx, "SHOW synchronous_commit").Scan(&got)
		}))
		if got != want {
			t.Errorf("synchronous_commit = %s becomes %s, want %s", given, got, want)
		}
	}
}

func TestPostgresIsUsedAgainAfterARestart(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{})
	s := store{ledger.Config{Driver: ledger.DriverPostgres, DSN: server.Database(t)}}
	l := s.open(t)
	next := 0
	// All connections of both pools are in use.
	busy := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 30 {
			next++
			n := next
			wg.Go(func() {
				if err := put(t.Context(), l, n); err != nil {
					t.Error(err)
				}
				if _, err := l.Claim(t.Context(), id(n)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	for name, end := range map[string]func(testing.TB){"stopped": server.Stop, "killed": server.Kill} {
		busy()
		end(t)
		next++
		wantErr(t, put(t.Context(), l, next), ledger.ErrUnavailable)
		_, err := l.Claim(t.Context(), id(1))
		wantErr(t, err, ledger.ErrUnavailable)
		wantErr(t, l.Check(t.Context()), ledger.ErrUnavailable)
		server.Start(t)
		must(t, l.Check(t.Context()))
		busy() // Nobody notices.

		// Nor when nobody called in the meantime.
		end(t)
		server.Start(t)
		busy()
		for n := 1; n <= next; n++ {
			if _, err := l.Claim(t.Context(), id(n)); err != nil && !errors.Is(err, ledger.ErrNotFound) {
				t.Errorf("%s: claim %d: %v", name, n, err)
			}
		}
	}
}

func TestAPostgresThatCantBeWrittenIsUnavailable(t *testing.T) {
	t.Parallel()
	s := postgresStore(t)
	l := s.open(t)
	must(t, l.Check(t.Context()))
	readOnly := func(on string) {
		pgtest.Shared(t).Exec(t, "postgres", fmt.Sprintf("ALTER DATABASE %[1]s SET default_transaction_read_only = %[2]s;"+
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '%[1]s'", database(s.config.DSN), on))
	}
	readOnly("on")
	wantErr(t, l.Check(t.Context()), ledger.ErrUnavailable)
	wantErr(t, put(t.Context(), l, 1), ledger.ErrUnavailable)
	readOnly("off")
	must(t, l.Check(t.Context()))
	must(t, put(t.Context(), l, 1))
}

// Callers without a deadline don't wait for ever for a server that says nothing.
func TestASilentPostgresIsUnavailable(t *testing.T) {
	t.Parallel()
	server := pgtest.Shared(t)
	tap := pgtest.NewTap(t, server)
	// No call may take longer than a second.
	config := ledger.Config{Driver: ledger.DriverPostgres, DSN: tap.DSN(server.Database(t)), BusyTimeout: 500 * time.Millisecond}
	var l *ledger.Ledger
	eventually(t, func() (err error) { l, err = ledger.Open(t.Context(), config); return err })
	defer func() { must(t, l.Close()) }()
	eventually(t, func() error { return put(t.Context(), l, 1) })
	calls := map[string]func(context.Context) error{
		"write":   func(ctx context.Context) error { return put(ctx, l, 2) },
		"read":    func(ctx context.Context) error { _, err := l.Claim(ctx, id(1)); return err },
		"listing": func(ctx context.Context) error { _, err := l.Finals(ctx, ledger.Position{}, 1); return err },
		"check":   l.Check,
		"open": func(ctx context.Context) error {
			_, err := ledger.Open(ctx, config)
			return err
		},
	}
	tap.Blackhole(true)
	for name, call := range calls {
		for range 2 { // on an open connection, and on a new one
			err := call(t.Context())
			wantErr(t, err, ledger.ErrUnavailable)
			if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v looks like the caller's own deadline", name, err)
			}
		}
	}
	tap.Blackhole(false)
	eventually(t, func() error { return put(t.Context(), l, 2) })
}

// eventually waits out a busy machine, on which half a second is not much.
func eventually(t *testing.T, do func() error) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		err := do()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestAGrantThatSomebodyHoldsIsUnavailableAlone(t *testing.T) {
	t.Parallel()
	s := postgresStore(t)
	s.config.BusyTimeout = time.Second
	l := s.open(t)
	conn, err := s.raw(t).Conn(t.Context())
	must(t, err)
	defer func() { _ = conn.Close() }()
	_, err = conn.ExecContext(t.Context(), "BEGIN")
	must(t, err)
	grant := id(1)
	_, err = conn.ExecContext(t.Context(), "SELECT ledger_lock($1)", grant[:])
	must(t, err)
	wantErr(t, put(t.Context(), l, 1), ledger.ErrUnavailable)
	eventually(t, func() error { return put(t.Context(), l, 2) })
	_, err = conn.ExecContext(t.Context(), "ROLLBACK")
	must(t, err)
	eventually(t, func() error { return put(t.Context(), l, 1) })
}

// A stranger's transaction, which knows nothing of locks, can't slip a closure
// in between the look and the begin of an attempt.
func TestAStrangersClosureIsSeen(t *testing.T) {
	t.Parallel()
	s := postgresStore(t)
	s.config.BusyTimeout = time.Minute
	l := s.open(t)
	db := s.raw(t)
	conn, err := db.Conn(t.Context())
	must(t, err)
	defer func() { _ = conn.Close() }()
	_, err = conn.ExecContext(t.Context(), "BEGIN")
	must(t, err)
	grant := id(1)
	_, err = conn.ExecContext(t.Context(), "INSERT INTO closures VALUES ($1, 'r', 'b', 1)", grant[:])
	must(t, err)
	begun := make(chan error, 1)
	go func() {
		_, _, err := l.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
		begun <- err
	}()
	for waiting := 0; waiting == 0; {
		select {
		case err := <-begun:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		must(t, db.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "+
			"AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&waiting))
	}
	_, err = conn.ExecContext(t.Context(), "COMMIT")
	must(t, err)
	wantErr(t, <-begun, ledger.ErrClosed)
}

// Bridges may share a database, each in a schema of its own, and the laws hold
// for somebody who looks at the tables from another schema.
func TestSchemasAreStoresOfTheirOwn(t *testing.T) {
	t.Parallel()
	s := postgresStore(t)
	pgtest.Shared(t).Exec(t, database(s.config.DSN), "CREATE SCHEMA a; CREATE SCHEMA b")
	in := func(schema string) *ledger.Ledger {
		return store{ledger.Config{Driver: ledger.DriverPostgres, DSN: s.config.DSN + "&search_path=" + schema}}.open(t)
	}
	a, b := in("a"), in("b")
	_, _, err := a.CloseGrant(t.Context(), ledger.Closure{RequestID: id(1)})
	must(t, err)
	_, _, err = b.BeginAttempt(t.Context(), id(1), hash("c"), render("p"))
	must(t, err)
	insert := fmt.Sprintf("INSERT INTO a.intents VALUES (%[1]s, 1, %[1]s, '', '', 'open', 1, NULL)", s.bytes(id(1).String()))
	if _, err := s.raw(t).ExecContext(t.Context(), "SET search_path = a, b"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.raw(t).ExecContext(t.Context(), insert); err == nil || !strings.Contains(err.Error(), "the grant is closed") {
		t.Errorf("from another schema: %v", err)
	}
}

func TestTextThatPostgresCantHoldIsAConflict(t *testing.T) {
	t.Parallel()
	l := postgresStore(t).open(t)
	for _, text := range []string{"a\x00b", "\xff"} {
		c := aClaim(1)
		c.Owner = text
		_, _, err := l.PutClaim(t.Context(), c)
		wantErr(t, err, ledger.ErrConflict)
	}
	must(t, put(t.Context(), l, 1))
}
