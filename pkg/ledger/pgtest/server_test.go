package pgtest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// childMode turns the test binary into a process that starts a server, prints
// where it is, and waits to be killed.
const childMode = "PGTEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childMode) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	os.Exit(m.Run())
}

// traces are what is left of a server: its files, processes that work in its
// directory, and shared memory.
func traces(t *testing.T, dir, memory string) (left []string) {
	t.Helper()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, dir)
	}
	cwds, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, cwd := range cwds {
		// What was removed is shown with a mark behind its name.
		if to, err := os.Readlink(cwd); err == nil && strings.HasPrefix(to, dir) {
			left = append(left, cwd+" -> "+to)
		}
	}
	segments, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(segments)) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == memory {
			left = append(left, "shared memory "+memory)
		}
	}
	return left
}

// memoryOf returns the id of the server's shared memory.
func memoryOf(t *testing.T, dir string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "data", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(strings.Split(string(text), "\n")[6])
	return f[1]
}

func gone(t *testing.T, dir, memory string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		left := traces(t, dir, memory)
		if len(left) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("still there: %v", left)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func TestAServerLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testing.T, *pgtest.Server){
		"running": func(*testing.T, *pgtest.Server) {},
		"stopped": func(t *testing.T, s *pgtest.Server) { t.Helper(); s.Stop(t) },
		"killed":  func(t *testing.T, s *pgtest.Server) { t.Helper(); s.Kill(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var dir, memory string
			t.Run("server", func(t *testing.T) {
				s := pgtest.Start(t, pgtest.Options{})
				dir, memory = s.SocketDir(), memoryOf(t, s.SocketDir())
				if len(traces(t, dir, memory)) < 3 {
					t.Errorf("a running server isn't seen: %v", traces(t, dir, memory))
				}
				end(t, s)
			})
			gone(t, dir, memory)
		})
	}
}

// A test binary that is killed, or panics, leaves nothing either.
func TestAKilledProcessLeavesNoServer(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run", "^TestChild$", "-test.v")
	cmd.Env = append(os.Environ(), childMode+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir, memory string
	for lines := bufio.NewScanner(out); dir == "" && lines.Scan(); {
		_, _ = fmt.Sscanf(lines.Text(), "server %s %s", &dir, &memory)
	}
	if dir == "" || len(traces(t, dir, memory)) == 0 {
		t.Errorf("no server at %q", dir)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // it was killed
	gone(t, dir, memory)
}

// TestChild is the other process.
func TestChild(t *testing.T) {
	if os.Getenv(childMode) == "" {
		return
	}
	s := pgtest.Shared(t)
	fmt.Printf("\nserver %s %s\n", s.SocketDir(), memoryOf(t, s.SocketDir()))
	<-t.Context().Done()
}

func TestDatabasesAreOfTheTestsThatMadeThem(t *testing.T) {
	s := pgtest.Shared(t)
	count := func(t *testing.T) (n int) {
		t.Helper()
		db := pgtest.Open(t, fmt.Sprintf("postgres://bridge@%s/postgres?sslmode=disable", s.Addr()))
		if err := db.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM pg_database WHERE datname LIKE 'test%'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Run("test", func(t *testing.T) {
		a, b := pgtest.Open(t, s.Database(t)), pgtest.Open(t, s.Database(t))
		if _, err := a.ExecContext(t.Context(), "CREATE TABLE x (y INT)"); err != nil {
			t.Fatal(err)
		}
		if _, err := b.ExecContext(t.Context(), "SELECT y FROM x"); err == nil {
			t.Error("two databases share a table")
		}
		if n := count(t); n < 2 {
			t.Errorf("%d databases", n)
		}
	})
	if n := count(t); n != 0 {
		t.Errorf("%d databases are left", n)
	}
}

func TestAServerKeepsItsDataAndAddress(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.Options{})
	dsn := s.Database(t)
	db := pgtest.Open(t, dsn)
	if _, err := db.ExecContext(t.Context(), "CREATE TABLE x (y INT)"); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func(testing.TB){"stop": s.Stop, "kill": s.Kill} {
		end(t)
		if err := db.PingContext(t.Context()); err == nil {
			t.Errorf("%s: it still answers", name)
		}
		s.Start(t)
		if _, err := db.ExecContext(t.Context(), "SELECT y FROM x"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
