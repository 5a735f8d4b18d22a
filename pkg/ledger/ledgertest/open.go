package ledgertest

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// empty is the file of a ledger that was just made. Making one takes long under
// the race detector, copying it doesn't.
//
//nolint:gochecknoglobals // It is made once for all tests of a process.
var empty = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "ledgertest-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "ledger.db")
	l, err := ledger.Open(context.Background(), ledger.Config{Path: path}) //nolint:forbidigo // For all tests, so under the context of none.
	if err != nil {
		return nil, err
	}
	if err := l.Close(); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
})

// Create makes the file of an empty SQLite ledger at path.
func Create(path string) error {
	file, err := empty()
	if err != nil {
		return err
	}
	return os.WriteFile(path, file, 0o600)
}

// Open returns an empty SQLite ledger in a directory of the test's, which is
// closed at the end.
func Open(t testing.TB) *ledger.Ledger {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger.db")
	var l *ledger.Ledger
	err := Create(path)
	if err == nil {
		l, err = ledger.Open(context.WithoutCancel(t.Context()), ledger.Config{Path: path})
	}
	if err != nil {
		t.Fatalf("open an empty ledger: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the ledger: %v", err)
		}
	})
	return l
}

// CloseGrant closes a grant as another process of the same bridge does: a replica
// that was asked to end it, or the janitor. reason is that of the end.
func CloseGrant(ctx context.Context, l *ledger.Ledger, id ledger.RequestID, reason string) error {
	_, _, err := l.CloseGrant(ctx, ledger.Closure{RequestID: id, Reason: reason, By: "another process"})
	return err
}
