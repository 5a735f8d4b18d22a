package account

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Ids for new users: the range of every distribution's useradd.
const (
	firstUID = 1000
	lastUID  = 59999
)

// skelMaxBytes bounds one file that is copied from /etc/skel.
const skelMaxBytes = 1 << 20

// Ensure makes sure that the login name exists, with a home directory, and says why it could not: the login then runs
// as root ([Database.Login]). An existing user is left as it is. It is for the start, before anything else runs in
// the container.
func (d *Database) Ensure(name string) error {
	if d.ownUID != 0 {
		return fmt.Errorf("the guest runs as uid %d and can't add users", d.ownUID)
	}
	passwd, err := d.read("/etc/passwd")
	if isMissing(err) {
		return errors.New("the image has no /etc/passwd")
	}
	if err != nil {
		return fmt.Errorf("read users: %w", err)
	}
	users := parsePasswd(passwd)
	if slices.ContainsFunc(users, func(e passwdEntry) bool { return e.name == name }) {
		return nil
	}
	group, err := d.read("/etc/group")
	if err != nil && !isMissing(err) {
		return fmt.Errorf("read groups: %w", err)
	}
	groups := parseGroup(group)
	uid, gid, groupExists, err := d.freeIDs(name, users, groups)
	if err != nil {
		return err
	}

	// The user comes last: half of the work done is then never taken for all of it.
	if !groupExists {
		if err := d.appendLine("/etc/group", group, fmt.Sprintf("%s:x:%d:", name, gid), 0o644); err != nil {
			return err
		}
	}
	password := "*"
	if shadow, err := d.read("/etc/shadow"); err == nil {
		password = "x"
		if !slices.Contains(firstFields(shadow), name) {
			// Locked for passwords; keys are another matter.
			if err := d.appendLine("/etc/shadow", shadow, name+":*:19000:0:99999:7:::", 0o640); err != nil {
				return err
			}
		}
	}
	home := "/home/" + name
	if err := d.makeHome(home, uid, gid); err != nil {
		return err
	}
	shell := "/bin/sh"
	if d.executable("/bin/bash") {
		shell = "/bin/bash"
	}
	line := fmt.Sprintf("%s:%s:%d:%d::%s:%s", name, password, uid, gid, home, shell)
	return d.appendLine("/etc/passwd", passwd, line, 0o644)
}

// freeIDs picks a uid that no user and no group has, and the gid: the same number, or that of a group that already
// has the name.
func (d *Database) freeIDs(name string, users []passwdEntry, groups []groupEntry) (uid, gid uint32, groupExists bool,
	err error,
) {
	taken := make(map[uint32]bool, len(users)+len(groups))
	for _, e := range users {
		taken[e.uid] = true
	}
	for _, g := range groups {
		taken[g.gid] = true
		if g.name == name && d.gids.has(g.gid) && !groupExists {
			gid, groupExists = g.gid, true
		}
	}
	for id := uint32(firstUID); id <= lastUID; id++ {
		if taken[id] || !d.uids.has(id) || !d.gids.has(id) {
			continue
		}
		if !groupExists {
			gid = id
		}
		return id, gid, groupExists, nil
	}
	return 0, 0, false, fmt.Errorf("no free uid from %d to %d", firstUID, lastUID)
}

func firstFields(data []byte) []string {
	var names []string
	for line := range strings.Lines(string(data)) {
		name, _, _ := strings.Cut(line, ":")
		names = append(names, name)
	}
	return names
}

// appendLine adds a line to a file that has the given content, by a new file beside it that takes over mode and owner,
// so that a reader never sees half of it. A missing file is made with mode perm.
func (d *Database) appendLine(name string, content []byte, line string, perm os.FileMode) error {
	// Replace what a symbolic link leads to, not the link.
	target := d.path(name)
	if resolved, err := filepath.EvalSymlinks(target); err == nil {
		target = resolved
	}
	addition := line + "\n"
	if len(content) > 0 && content[len(content)-1] != '\n' {
		addition = "\n" + addition
	}
	err := d.replace(target, append(slices.Clone(content), addition...), perm)
	// The engine may have mounted a file of its own there, which can't be replaced: then add to it.
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EXDEV) {
		err = appendInPlace(target, addition)
	}
	if err != nil {
		return fmt.Errorf("add %s to %s: %w", strings.SplitN(line, ":", 2)[0], name, withoutPath(err))
	}
	return nil
}

func (d *Database) replace(target string, content []byte, perm os.FileMode) (err error) {
	uid, gid := 0, 0
	if info, err := os.Stat(target); err == nil {
		perm = info.Mode().Perm()
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			uid, gid = int(st.Uid), int(st.Gid)
		}
	}
	temp, err := os.CreateTemp(filepath.Dir(target), ".compute-bridge-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = temp.Close()
			_ = os.Remove(temp.Name())
		}
	}()
	if _, err := temp.Write(content); err != nil {
		return err
	}
	if err := temp.Chown(uid, gid); err != nil {
		return err
	}
	if err := temp.Chmod(perm); err != nil {
		return err
	}
	if err := temp.Close(); err != nil {
		return err
	}
	return d.rename(temp.Name(), target)
}

func appendInPlace(target, addition string) error {
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(addition); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

// withoutPath drops the temporary file's name from an error.
func withoutPath(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}

// makeHome makes the home directory and copies the regular files of /etc/skel into it. An existing directory is taken
// as it is.
func (d *Database) makeHome(home string, uid, gid uint32) error {
	target := d.path(home)
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil { // #nosec G301 -- /home is for everyone
		return fmt.Errorf("make %s: %w", filepath.Dir(home), withoutPath(err))
	}
	err := os.Mkdir(target, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", home, withoutPath(err))
	}
	if err := os.Chown(target, int(uid), int(gid)); err != nil {
		return fmt.Errorf("give %s to uid %s: %w", home, strconv.FormatUint(uint64(uid), 10), withoutPath(err))
	}
	// Skeleton files are a convenience: without them the login works as well.
	entries, _ := os.ReadDir(d.path("/etc/skel"))
	for _, entry := range entries {
		if entry.Type().IsRegular() {
			_ = copyFile(filepath.Join(d.path("/etc/skel"), entry.Name()), filepath.Join(target, entry.Name()), uid, gid)
		}
	}
	return nil
}

func copyFile(from, to string, uid, gid uint32) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if info.Size() > skelMaxBytes {
		return nil
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, io.LimitReader(in, skelMaxBytes)); err != nil {
		_ = out.Close()
		return err
	}
	if err := out.Chown(int(uid), int(gid)); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}
