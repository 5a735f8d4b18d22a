package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupParent is the lab's group at the root of the machine's cgroup v2
// hierarchy. All that the lab makes there is below it.
const cgroupParent = "compute-bridge-lab"

// cgroupTree is the machine's cgroup v2 hierarchy, reached by a mount that is
// attached nowhere: no mount namespace shows it, and it ends with the descriptor.
type cgroupTree struct {
	fd int
}

// openCgroupTree opens the cgroup v2 hierarchy. Close it after use.
func openCgroupTree() (*cgroupTree, error) {
	fsfd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open cgroup2: %w", err)
	}
	defer unix.Close(fsfd) //nolint:errcheck // nothing was written to it
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, fmt.Errorf("configure cgroup2: %w", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	return &cgroupTree{fd: fd}, nil
}

// path of a group, valid in this process while the tree is open.
func (t *cgroupTree) path(group ...string) string {
	return filepath.Join(append([]string{fmt.Sprintf("/proc/self/fd/%d", t.fd), cgroupParent}, group...)...)
}

// close gives the descriptor back.
func (t *cgroupTree) close() error { return unix.Close(t.fd) }

// make makes a group and those above it, and passes the controllers that the
// machine offers in v2 down to it. (On a machine that holds its controllers in
// v1 there are none, and that is no error.)
func (t *cgroupTree) make(group ...string) error {
	if err := os.MkdirAll(t.path(group...), 0o755); err != nil {
		return fmt.Errorf("make a cgroup: %w", err)
	}
	parents := []string{filepath.Dir(t.path())}
	for i := range group {
		parents = append(parents, t.path(group[:i]...))
	}
	for _, parent := range parents {
		names, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("read a cgroup's controllers: %w", err)
		}
		for name := range strings.FieldsSeq(string(names)) {
			// A controller may be refused (threaded groups, real-time tasks):
			// the host then lacks it, as a machine without it would.
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+name), 0o644)
		}
	}
	return nil
}

// remove kills whatever is left in a group and removes it with all below it.
// A group that doesn't exist is no error.
func (t *cgroupTree) remove(ctx context.Context, group ...string) error {
	dir := t.path(group...)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill a cgroup: %w", err)
	}
	err := poll(ctx, 5*time.Millisecond, func() (bool, error) {
		err := removeGroups(dir)
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", filepath.Join(group...), err)
	}
	return nil
}

// removeGroups removes dir's groups depth first. cgroupfs allows no RemoveAll:
// its files can't be unlinked.
func removeGroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeGroups(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
