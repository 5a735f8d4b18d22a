package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"sort"
	"strconv"
	"strings"
	"time"
)

// migration is one numbered step of the schema.
type migration struct {
	version int
	name    string
	sql     string
}

// readMigrations returns the steps in files named NNNN_name.sql, which must be
// numbered from 1 without gaps.
func readMigrations(files fs.FS) ([]migration, error) {
	names, err := fs.Glob(files, "*.sql")
	if err != nil {
		return nil, err
	}
	sort.Strings(names)
	var steps []migration
	for i, name := range names {
		number, _, ok := strings.Cut(name, "_")
		version, err := strconv.Atoi(number)
		if !ok || err != nil || version != i+1 {
			return nil, fmt.Errorf("migration %s: want number %04d", name, i+1)
		}
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		steps = append(steps, migration{version: version, name: name, sql: string(text)})
	}
	if len(steps) == 0 {
		return nil, errors.New("no migrations")
	}
	return steps, nil
}

// migrate applies the steps that the store lacks, each in a transaction of its
// own. Processes that start at the same time take turns, and each looks again
// at the version once it has the write lock.
func migrate(ctx context.Context, l *Ledger, files fs.FS) error {
	steps, err := readMigrations(files)
	if err != nil {
		return err
	}
	err = l.migration(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS schema_migrations (
			version BIGINT NOT NULL PRIMARY KEY, name TEXT NOT NULL, applied_at BIGINT NOT NULL)`)
		return err
	})
	if err != nil {
		return fmt.Errorf("create the table of migrations: %w", err)
	}
	for done := false; !done; {
		err := l.migration(ctx, func(tx *sql.Tx) error {
			var version int
			err := tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(version), 0) FROM schema_migrations`).Scan(&version)
			if err != nil {
				return err
			}
			if version > len(steps) {
				return callerError{fmt.Errorf("the store has schema version %d, this binary knows up to %d: use a newer binary",
					version, len(steps))}
			}
			if done = version == len(steps); done {
				return nil
			}
			step := steps[version]
			if _, err := tx.ExecContext(ctx, step.sql); err != nil {
				return fmt.Errorf("migration %s: %w", step.name, err)
			}
			_, err = tx.ExecContext(ctx, `INSERT INTO schema_migrations (version, name, applied_at) VALUES (?, ?, ?)`,
				step.version, step.name, micros(time.Now()))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *Ledger) migration(ctx context.Context, fn func(*sql.Tx) error) error {
	return l.wrap(ctx, l.transact(ctx, func(tx *sql.Tx) error {
		if err := l.dialect.lockSchema(ctx, tx); err != nil {
			return err
		}
		return fn(tx)
	}))
}
