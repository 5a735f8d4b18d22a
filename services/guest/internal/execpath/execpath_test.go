package execpath

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestLook(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, mode := range map[string]os.FileMode{"a/tool": 0o755, "b/tool": 0o755, "a/plain": 0o644, "b/plain": 0o755, "a/only": 0o644} {
		if err := os.MkdirAll(filepath.Dir(at(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name, path, want string
		err              error
	}{
		{"tool", at("a") + ":" + at("b"), at("a/tool"), nil},
		{"tool", at("b") + ":" + at("a"), at("b/tool"), nil},
		{"tool", "/no/such:a", at("a/tool"), nil},
		{"plain", at("a") + ":" + at("b"), at("b/plain"), nil},
		{"only", at("a") + ":" + at("b"), "", fs.ErrPermission},
		{"nothing", at("a") + ":" + at("b"), "", fs.ErrNotExist},
		{"tool", "", "", fs.ErrNotExist},
		{"", at("a"), "", fs.ErrNotExist},
		{"a/tool", "", at("a/tool"), nil},
		{"./b/tool", at("a"), at("b/tool"), nil},
		{at("a/tool"), "", at("a/tool"), nil},
		{at("a/plain"), "", "", fs.ErrPermission},
		{at("a"), "", "", fs.ErrPermission},
		{at("c"), "", "", fs.ErrNotExist},
		{at("a/tool/x"), "", "", fs.ErrNotExist},
	} {
		got, err := Look(tc.name, tc.path, dir)
		if got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("Look(%q, %q): %q, %v; want %q, %v", tc.name, tc.path, got, err, tc.want, tc.err)
		}
	}
	// As in a shell, an empty element is the current directory.
	if got, err := Look("tool", ":/no/such", at("a")); got != at("a/tool") {
		t.Errorf("empty element: %q, %v", got, err)
	}
}

func TestExitCodeAndReason(t *testing.T) {
	for _, tc := range []struct {
		err    error
		code   int
		reason string
	}{
		{fs.ErrNotExist, 127, "no such file or directory"},
		{fs.ErrPermission, 126, "not an executable file"},
		{&os.PathError{Op: "fork/exec", Path: "/x", Err: syscall.ENOENT}, 127, "interpreter or dynamic loader"},
		{&os.PathError{Op: "fork/exec", Path: "/x", Err: syscall.ENOEXEC}, 126, "exec format error"},
		{&os.PathError{Op: "fork/exec", Path: "/x", Err: syscall.EACCES}, 126, "permission denied"},
		{&os.PathError{Op: "fork/exec", Path: "/x", Err: syscall.E2BIG}, 126, "argument list too long"},
		{errors.New("other"), 126, "other"},
	} {
		if code := ExitCode(tc.err); code != tc.code {
			t.Errorf("%v: code %d, want %d", tc.err, code, tc.code)
		}
		if reason := Reason(tc.err); !strings.Contains(reason, tc.reason) {
			t.Errorf("%v: reason %q, want %q", tc.err, reason, tc.reason)
		}
	}
}
