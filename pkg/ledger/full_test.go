package ledger_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

const (
	// fullDiskSize is that of the disks that these tests fill.
	fullDiskSize = 24 << 20
	ballastSize  = 4 << 20
	recordSize   = 48 << 10
)

// incompressible is a record that takes as much room on disk as it is long.
func incompressible(n int) []byte {
	var b []byte
	for block := sha256.Sum256(fmt.Append(nil, n)); len(b) < recordSize; block = sha256.Sum256(block[:]) {
		b = append(b, block[:]...)
	}
	return b
}

// fullDisk fills the disk under a ledger, looks whether nothing is half written,
// and goes on when room gives some back.
func fullDisk(ctx context.Context, l *ledger.Ledger, room func() error) error {
	put := func(n int) (bool, error) {
		c := aClaim(n)
		c.Record = incompressible(n)
		_, created, err := l.PutClaim(ctx, c)
		return created, err
	}
	full := 0
	for ; ; full++ {
		if _, err := put(full); err != nil {
			if !errors.Is(err, ledger.ErrUnavailable) {
				return fmt.Errorf("put %d: %w, want it unavailable", full, err)
			}
			break
		}
		if full*recordSize > 2*fullDiskSize {
			return errors.New("the disk is never full")
		}
	}
	if full < 10 {
		return fmt.Errorf("full after %d records", full)
	}
	whole := func() error {
		for n := range full {
			c, err := l.Claim(ctx, id(n))
			if err != nil || string(c.Record) != string(incompressible(n)) {
				return fmt.Errorf("claim %d: %w, %d bytes", n, err, len(c.Record))
			}
		}
		return nil
	}
	// Again and again: each try leaves nothing behind, and reading goes on.
	for range 3 {
		if _, err := l.Claim(ctx, id(full)); !errors.Is(err, ledger.ErrNotFound) {
			return fmt.Errorf("a claim that was not stored: %w", err)
		}
		if err := whole(); err != nil {
			return fmt.Errorf("while the disk is full: %w", err)
		}
		if _, err := put(full); err == nil {
			return errors.New("there is room again")
		}
	}
	if err := room(); err != nil {
		return err
	}
	for n := full; n < full+20; n++ {
		if created, err := put(n); err != nil || !created {
			return fmt.Errorf("with room again, claim %d: created %v, %w", n, created, err)
		}
	}
	full += 20
	return whole()
}

// ballast takes up room until it is called.
func ballast(dir string) (room func() error, err error) {
	path := filepath.Join(dir, "ballast")
	if err := os.WriteFile(path, make([]byte, ballastSize), 0o600); err != nil {
		return nil, err
	}
	return func() error { return os.Remove(path) }, nil
}

func TestAFullDiskIsUnavailableAndRecoversPostgres(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{SmallDisk: fullDiskSize})
	s := store{ledger.Config{Driver: ledger.DriverPostgres, DSN: server.SmallDatabase(t)}}
	l := s.open(t)
	// What a new database has in memory only would need room as soon as other
	// pages need the memory.
	server.Exec(t, "postgres", "CHECKPOINT")
	room, err := ballast(server.SmallDiskRoot())
	must(t, err)
	must(t, fullDisk(t.Context(), l, room))
}

// The disk of the SQLite file is in a mount namespace of another process.
func TestAFullDiskIsUnavailableAndRecoversSQLite(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("only root can mount a small disk")
	}
	dir := t.TempDir()
	s := store{ledger.Config{Driver: ledger.DriverSQLite, Path: filepath.Join(dir, "ledger.db")}}
	test := s.child(t, "full", "")
	cmd := exec.CommandContext(t.Context(), "sh", "-ec", `mount -t tmpfs -o size="$1",mode=0700 ledger "$2"; exec "$3"`,
		"sh", fmt.Sprint(fullDiskSize), dir, test.Path)
	cmd.Env = test.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// fillUp is the other process.
func fillUp(config ledger.Config) error {
	ctx := context.Background()
	l, err := ledger.Open(ctx, config)
	if err != nil {
		return err
	}
	room, err := ballast(filepath.Dir(config.Path))
	if err != nil {
		return err
	}
	if err := errors.Join(fullDisk(ctx, l, room), l.Close()); err != nil {
		return err
	}
	// A process that starts while the disk is full.
	if _, err := ballast(filepath.Dir(config.Path)); err != nil && !strings.Contains(err.Error(), "no space") {
		return err
	}
	l, err = ledger.Open(ctx, config)
	if err != nil {
		return fmt.Errorf("open with little room: %w", err)
	}
	if _, err := l.Claim(ctx, id(1)); err != nil {
		return fmt.Errorf("with little room: %w", err)
	}
	return l.Close()
}
