package account

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// database is a database over a root file system with the given files, as it looks to uid 0 whatever the test's is.
func database(t *testing.T, files map[string]string) *Database {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if strings.Contains(name, "bin/") || strings.Contains(name, "busybox/") {
			mode = 0o755
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	return &Database{root: root, rename: os.Rename}
}

func (d *Database) content(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(d.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test gives files to other users and must run as root")
	}
}

func TestLogin(t *testing.T) {
	d := database(t, map[string]string{
		"etc/passwd": "# comment\n+nis::::::\nbroken:x:12\n  root:x:0:0::/root:/bin/bash\r\ncompute:x:1000:100::/home/c:/bin/zsh\n" +
			"bad:x:4294967295:0::/:\nworse:x:-1:0::/:\n",
		"etc/group": "video:x:44:a, compute ,b\nbroken\naudio:x:29:compute\nagain:x:44:compute\nown:x:100:compute\n",
	})
	for name, want := range map[string]Account{
		"compute": {Name: "compute", UID: 1000, GID: 100, Groups: []uint32{100, 44, 29}, Home: "/home/c", Shell: "/bin/zsh"},
		"root":    {Name: "root", Groups: []uint32{0}, Home: "/root", Shell: "/bin/bash"},
		"missing": {Name: "root", Groups: []uint32{0}, Home: "/root", Shell: "/bin/bash"},
		"bad":     {Name: "root", Groups: []uint32{0}, Home: "/root", Shell: "/bin/bash"},
	} {
		if diff := cmp.Diff(want, d.Login(name)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	d.ownUID, d.ownGID = 1000, 7
	want := Account{Name: "compute", UID: 1000, GID: 7, Groups: []uint32{100, 44, 29}, Home: "/home/c", Shell: "/bin/zsh"}
	if diff := cmp.Diff(want, d.Login("root")); diff != "" {
		t.Errorf("guest without privilege (-want +got):\n%s", diff)
	}
	d.ownUID = 4711
	if got := d.Login("root"); got.UID != 4711 || got.Home != "/" {
		t.Errorf("unknown own uid: %+v", got)
	}
}

func TestLoginWithoutUserDatabase(t *testing.T) {
	d := database(t, nil)
	if diff := cmp.Diff(Account{Name: "root", Groups: []uint32{0}, Home: "/"}, d.Login("compute")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := os.Mkdir(d.path("root"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got := d.Login("compute").Home; got != "/root" {
		t.Errorf("home is %s", got)
	}
}

func TestResolveFollowsContainerEngines(t *testing.T) {
	d := database(t, map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/srv:/bin/sh\n77:x:5:5::/n:/bin/sh\n",
		"etc/group":  "app:x:1001:\nvideo:x:44:app\n",
	})
	for runAs, want := range map[string]Account{
		"app":       {Name: "app", UID: 1000, GID: 1001, Groups: []uint32{1001, 44}, Home: "/srv", Shell: "/bin/sh"},
		"1000":      {Name: "app", UID: 1000, GID: 1001, Groups: []uint32{1001, 44}, Home: "/srv", Shell: "/bin/sh"},
		"app:video": {Name: "app", UID: 1000, GID: 44, Groups: []uint32{44}, Home: "/srv", Shell: "/bin/sh"},
		"1000:9":    {Name: "app", UID: 1000, GID: 9, Groups: []uint32{9}, Home: "/srv", Shell: "/bin/sh"},
		"4711":      {Name: "4711", UID: 4711, Groups: []uint32{0}, Home: "/"},
		"4711:8":    {Name: "4711", UID: 4711, GID: 8, Groups: []uint32{8}, Home: "/"},
		"77":        {Name: "77", UID: 5, GID: 5, Groups: []uint32{5}, Home: "/n", Shell: "/bin/sh"},
	} {
		got, err := d.Resolve(runAs)
		if err != nil {
			t.Errorf("%s: %v", runAs, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", runAs, diff)
		}
	}
	for _, runAs := range []string{"ghost", "app:ghost", "-1", "4294967295", "app:-1"} {
		if got, err := d.Resolve(runAs); err == nil {
			t.Errorf("%s: %+v", runAs, got)
		}
	}
	d.uids = idMap{{0, 1000}}
	if _, err := d.Resolve("app"); err == nil || !strings.Contains(err.Error(), "can't use") {
		t.Errorf("id outside of the user namespace: %v", err)
	}
}

func TestShell(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string
		shell string
		want  Shell
	}{
		"own":             {map[string]string{"usr/bin/zsh": "", "bin/bash": ""}, "/usr/bin/zsh", Shell{"/usr/bin/zsh", "zsh"}},
		"own missing":     {map[string]string{"bin/bash": "", "bin/sh": ""}, "/usr/bin/zsh", Shell{"/bin/bash", "bash"}},
		"not executable":  {map[string]string{"etc/zsh": "", "bin/sh": ""}, "/etc/zsh", Shell{"/bin/sh", "sh"}},
		"nologin":         {map[string]string{"sbin/nologin": "", "usr/bin/sh": ""}, "/sbin/nologin", Shell{"/usr/bin/sh", "sh"}},
		"false":           {map[string]string{"bin/false": "", "bin/busybox": ""}, "/bin/false", Shell{"/bin/busybox", "sh"}},
		"relative":        {map[string]string{"bin/x": "", "busybox/sh": ""}, "bin/x", Shell{"/busybox/sh", "sh"}},
		"none":            {map[string]string{"bin/ls": ""}, "/bin/sh", Shell{}},
		"directory of it": {map[string]string{"bin/sh/x": ""}, "/bin/sh", Shell{}},
	} {
		d := database(t, tc.files)
		got, err := d.Shell(Account{Shell: tc.shell})
		if (tc.want == Shell{}) != errors.Is(err, ErrNoShell) {
			t.Errorf("%s: %v", name, err)
		}
		if tc.want.Path != "" {
			tc.want.Path = d.path(tc.want.Path)
		}
		if got != tc.want {
			t.Errorf("%s: got %v, want %v", name, got, tc.want)
		}
	}
}

func TestEnsureAddsTheUserOnce(t *testing.T) {
	needRoot(t)
	d := database(t, map[string]string{
		"etc/passwd":      "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/:/bin/sh", // no newline at its end
		"etc/group":       "root:x:0:\nusers:x:1001:\n",
		"etc/shadow":      "root:*:1::::::\n",
		"etc/skel/.rc":    "skeleton\n",
		"etc/skel/d/file": "not copied\n",
	})
	if err := os.Chmod(d.path("/etc/shadow"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(d.path("/etc/shadow"), 0, 42); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Ensure("compute"); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"/etc/passwd":           "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\ncompute:x:1002:1002::/home/compute:/bin/sh\n",
		"/etc/group":            "root:x:0:\nusers:x:1001:\ncompute:x:1002:\n",
		"/etc/shadow":           "root:*:1::::::\ncompute:*:19000:0:99999:7:::\n",
		"/home/compute/.rc":     "skeleton\n",
		"/etc/skel/d/file":      "not copied\n",
		"/home/compute/../../x": "",
	} {
		if strings.HasSuffix(name, "/x") {
			continue
		}
		if got := d.content(t, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	info, err := os.Stat(d.path("/etc/shadow"))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || info.Mode().Perm() != 0o640 || st.Gid != 42 {
		t.Errorf("shadow has mode %v, gid %d", info.Mode(), st.Gid)
	}
	entries, err := os.ReadDir(d.path("/etc"))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 4 {
		t.Errorf("files left in /etc: %v", entries)
	}
	home, err := os.Stat(d.path("/home/compute"))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := home.Sys().(*syscall.Stat_t); !ok || home.Mode().Perm() != 0o700 || st.Uid != 1002 || st.Gid != 1002 {
		t.Errorf("home: %v, %d:%d", home.Mode(), st.Uid, st.Gid)
	}
	if d.HomeDir(d.Login("compute")) != d.path("/home/compute") {
		t.Error("the home directory is not found")
	}
}

func TestEnsureUsesWhatIsThere(t *testing.T) {
	needRoot(t)
	// A group of that name, no shadow, a passwd that is a link, and only some ids in this user namespace.
	d := database(t, map[string]string{
		"store/passwd": "root:x:0:0::/root:/bin/sh\n",
		"etc/group":    "compute:x:500:\n",
		"bin/bash":     "",
	})
	d.uids, d.gids = idMap{{0, 600}, {2000, 10}}, idMap{{0, 600}, {2005, 10}}
	if err := os.Symlink("../store/passwd", d.path("/etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if err := d.Ensure("compute"); err != nil {
		t.Fatal(err)
	}
	want := "root:x:0:0::/root:/bin/sh\ncompute:*:2005:500::/home/compute:/bin/bash\n"
	if got := d.content(t, "/store/passwd"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if info, err := os.Lstat(d.path("/etc/passwd")); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v, %v", info, err)
	}
}

func TestEnsureAppendsWhereItCannotReplace(t *testing.T) {
	needRoot(t)
	d := database(t, map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh", "etc/group": ""})
	d.rename = func(string, string) error { return &os.LinkError{Op: "rename", Err: syscall.EBUSY} }
	if err := d.Ensure("compute"); err != nil {
		t.Fatal(err)
	}
	if got := d.content(t, "/etc/passwd"); !strings.HasSuffix(got, "/bin/sh\ncompute:*:1000:1000::/home/compute:/bin/sh\n") {
		t.Errorf("got %q", got)
	}
}

func TestEnsureSaysWhyNot(t *testing.T) {
	d := database(t, nil)
	if err := d.Ensure("compute"); err == nil || err.Error() != "the image has no /etc/passwd" {
		t.Errorf("no passwd: %v", err)
	}
	d = database(t, map[string]string{"etc/passwd": "", "etc/group": ""})
	d.rename = func(string, string) error { return &os.LinkError{Op: "rename", Err: syscall.EROFS} }
	if err := d.Ensure("compute"); err == nil || !strings.Contains(err.Error(), "read-only file system") {
		t.Errorf("read-only: %v", err)
	}
	d.uids = idMap{{0, 100}}
	if err := d.Ensure("compute"); err == nil || !strings.Contains(err.Error(), "no free uid") {
		t.Errorf("no ids: %v", err)
	}
	d.ownUID = 5
	if err := d.Ensure("compute"); err == nil || !strings.Contains(err.Error(), "uid 5") {
		t.Errorf("no privilege: %v", err)
	}
	huge := database(t, map[string]string{"etc/passwd": strings.Repeat("#\n", maxFileBytes)})
	if err := huge.Ensure("compute"); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("huge: %v", err)
	}
}

func TestIDMap(t *testing.T) {
	for text, want := range map[string]map[uint32]bool{
		"         0          0 4294967295\n": {0: true, 1000: true, 4294967294: true},
		"0 1000 1\n1 100000 65536\n":         {0: true, 1: true, 65536: true, 65537: false},
		"":                                   {1: true},
		"garbage\n":                          {1: true},
	} {
		m := parseIDMap([]byte(text))
		for id, mapped := range want {
			if m.has(id) != mapped {
				t.Errorf("%q: id %d mapped = %v", text, id, !mapped)
			}
		}
	}
}

func FuzzPasswd(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/bash\n# c\n+::::::\nx:y\n"))
	f.Add([]byte("a:x:4294967295:0::/:\nb:x:99999999999:0::/:\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, e := range parsePasswd(data) {
			if strings.ContainsAny(e.name+e.home+e.shell, ":\n\x00") || e.name == "" || e.uid == 1<<32-1 || e.gid == 1<<32-1 {
				t.Errorf("entry %+v", e)
			}
		}
		for _, g := range parseGroup(data) {
			for _, member := range g.members {
				if strings.ContainsAny(member, ",:\n\x00") || member == "" {
					t.Errorf("member %q", member)
				}
			}
		}
		parseIDMap(data).has(0)
	})
}
