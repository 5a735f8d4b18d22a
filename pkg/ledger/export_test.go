package ledger

import (
	"context"
	"database/sql"
	"io/fs"
)

// Migrate brings the schema of an open ledger up to other files.
func Migrate(ctx context.Context, l *Ledger, files fs.FS) error { return migrate(ctx, l, files) }

// Migrations are the files of a ledger's dialect.
func Migrations(l *Ledger) fs.FS { return l.dialect.migrations() }

// ReadMigrations checks files.
func ReadMigrations(files fs.FS) error {
	_, err := readMigrations(files)
	return err
}

// Update is a write transaction.
func Update(ctx context.Context, l *Ledger, id RequestID, fn func(context.Context, *sql.Tx) error) error {
	return l.update(ctx, id, fn)
}

// WriteExec runs a statement on the connection that writes.
func WriteExec(ctx context.Context, l *Ledger, statement string) error {
	_, err := l.write.ExecContext(ctx, statement)
	return err
}
