// Package account knows the users of the container: it reads passwd and group itself, since a static binary has no
// name service, makes the login user where the image lacks it, and finds a shell that works.
package account

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxFileBytes bounds what is read of a user database; real ones have some kilobytes.
const maxFileBytes = 4 << 20

// RootName is the name of the second login.
const RootName = "root"

// Account is an identity that processes run as.
type Account struct {
	// Name is the login name.
	Name string
	// UID and GID are the ids.
	UID, GID uint32
	// Groups are the supplementary groups.
	Groups []uint32
	// Home is the home directory as passwd has it; it need not exist.
	Home string
	// Shell is the login shell as passwd has it; it need not exist.
	Shell string
}

// Database is the user database of a root file system. It is read anew at each call, so that changes made by the
// tenant count. Its methods are safe for concurrent use, except Ensure.
type Database struct {
	root   string
	uids   idMap
	gids   idMap
	ownUID uint32
	ownGID uint32
	rename func(from, to string) error
}

// Open returns the database of the root file system at root, "/" for the container's own.
func Open(root string) *Database {
	// Reading errors leave the maps nil, which maps everything.
	uids, _ := os.ReadFile("/proc/self/uid_map")
	gids, _ := os.ReadFile("/proc/self/gid_map")
	return &Database{
		root:   root,
		uids:   parseIDMap(uids),
		gids:   parseIDMap(gids),
		ownUID: uint32(os.Geteuid()), // #nosec G115 -- Linux ids have 32 bits
		ownGID: uint32(os.Getegid()), // #nosec G115 -- Linux ids have 32 bits
		rename: os.Rename,
	}
}

// path is where a path of the root file system is. Symbolic links in it are followed by the kernel from the process's
// own root, so a root other than "/" must be one without absolute links.
func (d *Database) path(name string) string { return filepath.Join(d.root, name) }

func (d *Database) read(name string) ([]byte, error) {
	f, err := os.Open(d.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxFileBytes)
	}
	return data, nil
}

// users returns the entries of passwd; a missing or unreadable file has none.
func (d *Database) users() []passwdEntry {
	data, err := d.read("/etc/passwd")
	if err != nil {
		return nil
	}
	return parsePasswd(data)
}

// groups returns the entries of group; a missing or unreadable file has none.
func (d *Database) groups() []groupEntry {
	data, err := d.read("/etc/group")
	if err != nil {
		return nil
	}
	return parseGroup(data)
}

func (d *Database) account(e passwdEntry) Account {
	a := Account{Name: e.name, UID: e.uid, GID: e.gid, Home: e.home, Shell: e.shell, Groups: []uint32{e.gid}}
	for _, g := range d.groups() {
		if slices.Contains(g.members, e.name) && !slices.Contains(a.Groups, g.gid) && d.gids.has(g.gid) {
			a.Groups = append(a.Groups, g.gid)
		}
	}
	return a
}

// Login returns the account that a login runs as. A name that the database lacks runs as root, which is the fallback
// for images that no user can be added to; when the guest itself isn't root, everything runs as the guest's own uid.
func (d *Database) Login(name string) Account {
	if d.ownUID != 0 {
		return d.own(name)
	}
	for _, e := range d.users() {
		if e.name == name && d.uids.has(e.uid) && d.gids.has(e.gid) {
			return d.account(e)
		}
	}
	return d.rootAccount()
}

// own is the account of the guest's own uid, for a guest that can't change it.
func (d *Database) own(login string) Account {
	for _, e := range d.users() {
		if e.uid == d.ownUID {
			a := d.account(e)
			a.GID = d.ownGID
			return a
		}
	}
	return Account{Name: login, UID: d.ownUID, GID: d.ownGID, Groups: []uint32{d.ownGID}, Home: "/"}
}

func (d *Database) rootAccount() Account {
	for _, e := range d.users() {
		if e.uid == 0 {
			return d.account(e)
		}
	}
	home := "/root"
	if info, err := os.Stat(d.path(home)); err != nil || !info.IsDir() {
		home = "/"
	}
	return Account{Name: RootName, Groups: []uint32{0}, Home: home}
}

// Resolve returns the account of an image's USER: "user" or "user:group", each a name or a number, with the rules of
// container engines: a number needs no entry; without a group, the user's own group and supplementary groups count;
// with one, only that.
func (d *Database) Resolve(runAs string) (Account, error) {
	if d.ownUID != 0 {
		return d.own(runAs), nil
	}
	userPart, groupPart, hasGroup := strings.Cut(runAs, ":")
	a, err := d.resolveUser(userPart)
	if err != nil {
		return Account{}, err
	}
	if hasGroup {
		gid, err := d.resolveGroup(groupPart)
		if err != nil {
			return Account{}, err
		}
		a.GID, a.Groups = gid, []uint32{gid}
	}
	if !d.uids.has(a.UID) || !d.gids.has(a.GID) {
		return Account{}, fmt.Errorf("user %q has an id that this container can't use", runAs)
	}
	return a, nil
}

func (d *Database) resolveUser(text string) (Account, error) {
	users := d.users()
	// Engines try the name first: a user may be called "1000".
	for _, e := range users {
		if e.name == text {
			return d.account(e), nil
		}
	}
	uid, ok := parseID(text)
	if !ok {
		return Account{}, fmt.Errorf("the image's /etc/passwd has no user %q", text)
	}
	for _, e := range users {
		if e.uid == uid {
			return d.account(e), nil
		}
	}
	return Account{Name: text, UID: uid, Groups: []uint32{0}, Home: "/"}, nil
}

func (d *Database) resolveGroup(text string) (uint32, error) {
	for _, g := range d.groups() {
		if g.name == text {
			return g.gid, nil
		}
	}
	gid, ok := parseID(text)
	if !ok {
		return 0, fmt.Errorf("the image's /etc/group has no group %q", text)
	}
	return gid, nil
}

// Shell is a program that takes `-c COMMAND`, and a login shell's leading dash in its argument 0.
type Shell struct {
	// Path is the program.
	Path string
	// Name is its argument 0, without dash.
	Name string
}

// ErrNoShell says that a root file system has no shell.
var ErrNoShell = errors.New("the image has no shell")

// Shell returns the shell for a: the one of its passwd entry, or else the first of the usual ones that the image has.
// Shells that only refuse (nologin, false) count as missing: they lock accounts, and this login was asked for.
func (d *Database) Shell(a Account) (Shell, error) {
	if base := filepath.Base(a.Shell); filepath.IsAbs(a.Shell) && base != "nologin" && base != "false" &&
		d.executable(a.Shell) {
		return Shell{Path: d.path(a.Shell), Name: base}, nil
	}
	for _, candidate := range []Shell{
		{"/bin/bash", "bash"},
		{"/usr/bin/bash", "bash"},
		{"/bin/sh", "sh"},
		{"/usr/bin/sh", "sh"},
		{"/busybox/sh", "sh"}, // distroless images with the debug tag
		// busybox acts as what its argument 0 says.
		{"/bin/busybox", "sh"},
		{"/usr/bin/busybox", "sh"},
		{"/busybox/busybox", "sh"},
	} {
		if d.executable(candidate.Path) {
			candidate.Path = d.path(candidate.Path)
			return candidate, nil
		}
	}
	return Shell{}, ErrNoShell
}

func (d *Database) executable(name string) bool {
	info, err := os.Stat(d.path(name))
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// HomeDir returns a's home directory if it is a directory, else "/".
func (d *Database) HomeDir(a Account) string {
	if filepath.IsAbs(a.Home) {
		if info, err := os.Stat(d.path(a.Home)); err == nil && info.IsDir() {
			return d.path(a.Home)
		}
	}
	return d.path("/")
}

// isMissing says that err means absence, also of a directory on the way.
func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
