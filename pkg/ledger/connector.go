package ledger

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
)

// connector gives a driver's connections what the statements of this package
// expect of them: statements are prepared once per connection, because parsing
// them anew costs SQLite more than running them, and placeholders are written
// as the database wants them.
type connector struct {
	driver.Connector
	// rewrite turns a statement with ? as placeholder into the database's own;
	// nil leaves it.
	rewrite func(string) string
	// prepare keeps prepared statements here; a driver that does so by itself
	// does without.
	prepare bool
	// broken reports whether a driver's connection is lost; nil means never.
	broken func(driver.Conn) bool
}

// fullConn is what the drivers' connections can do.
type fullConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.ConnBeginTx
	driver.ExecerContext
	driver.QueryerContext
	driver.Pinger
	driver.SessionResetter
}

// fullStmt is what the drivers' prepared statements can do.
type fullStmt interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// Connect implements [driver.Connector].
func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	inner, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	full, ok := inner.(fullConn)
	if !ok {
		return nil, errors.Join(errors.New("the driver lacks methods that the ledger needs"), inner.Close())
	}
	conn := &conn{fullConn: full, rewrite: c.rewrite, broken: c.broken}
	if c.prepare {
		conn.prepared = map[string]*prepared{}
	}
	// The interface decides how arguments are converted, so that a connection
	// must have it exactly when the driver's has.
	if checker, ok := inner.(driver.NamedValueChecker); ok {
		return checkingConn{conn, checker}, nil
	}
	return conn, nil
}

// conn is used by one goroutine at a time, as package sql promises.
type conn struct {
	fullConn
	rewrite  func(string) string
	broken   func(driver.Conn) bool
	prepared map[string]*prepared
}

type checkingConn struct {
	*conn
	driver.NamedValueChecker
}

type prepared struct {
	fullStmt
	// busy while its rows are read.
	busy bool
}

// IsValid implements [driver.Validator].
func (c *conn) IsValid() bool {
	v, ok := c.fullConn.(driver.Validator)
	return !ok || v.IsValid()
}

// Close implements [driver.Conn].
func (c *conn) Close() error {
	var failed error
	for _, s := range c.prepared {
		failed = errors.Join(failed, s.Close())
	}
	c.prepared = nil
	return errors.Join(failed, c.fullConn.Close())
}

// lost makes an error on a connection that is broken one that package sql knows:
// it drops the connection, and outside of a transaction tries another one, at
// last a new one. So a server that was restarted is noticed by nobody. It is for
// what has no effect: a begin, a read.
func (c *conn) lost(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || c.broken == nil || !c.broken(c.fullConn) {
		return err
	}
	return fmt.Errorf("%w: %w", driver.ErrBadConn, err)
}

// BeginTx implements [driver.ConnBeginTx].
func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	tx, err := c.fullConn.BeginTx(ctx, opts)
	return tx, c.lost(ctx, err)
}

// statement returns the prepared form of query, or nil if it must be run as it
// is: scripts have no arguments and several statements, and are run once.
func (c *conn) statement(ctx context.Context, query string, args int) (*prepared, error) {
	if c.prepared == nil || args == 0 {
		return nil, nil //nolint:nilnil // none is an answer
	}
	s, ok := c.prepared[query]
	if !ok {
		inner, err := c.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		full, ok := inner.(fullStmt)
		if !ok {
			return nil, errors.Join(errors.New("the driver's statements lack methods that the ledger needs"), inner.Close())
		}
		s = &prepared{fullStmt: full}
		c.prepared[query] = s
	}
	if s.busy {
		return nil, nil //nolint:nilnil // another use of it is being read
	}
	return s, nil
}

func (c *conn) text(query string) string {
	if c.rewrite == nil {
		return query
	}
	return c.rewrite(query)
}

// ExecContext implements [driver.ExecerContext].
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	s, err := c.statement(ctx, query, len(args))
	switch {
	case err != nil:
		return nil, err
	case s != nil:
		return s.ExecContext(ctx, args)
	}
	return c.fullConn.ExecContext(ctx, c.text(query), args)
}

// QueryContext implements [driver.QueryerContext].
func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	s, err := c.statement(ctx, query, len(args))
	switch {
	case err != nil:
		return nil, err
	case s == nil:
		rows, err := c.fullConn.QueryContext(ctx, c.text(query), args)
		return rows, c.lost(ctx, err)
	}
	rows, err := s.QueryContext(ctx, args)
	if err != nil {
		return nil, err
	}
	s.busy = true
	return &preparedRows{Rows: rows, statement: s}, nil
}

// preparedRows are the rows of a prepared statement, which must not run again
// while they are open.
type preparedRows struct {
	driver.Rows
	statement *prepared
}

// Close implements [driver.Rows].
func (r *preparedRows) Close() error {
	r.statement.busy = false
	return r.Rows.Close()
}
