// Package environ works on environments in the form of [os.Environ].
package environ

import (
	"maps"
	"slices"
	"strings"
)

// Get returns the value of the last entry with the name, as execve's callee would see it, and whether there is one.
func Get(env []string, name string) (string, bool) {
	for _, entry := range slices.Backward(env) {
		if key, value, ok := strings.Cut(entry, "="); ok && key == name {
			return value, true
		}
	}
	return "", false
}

// Set returns env with exactly one entry for the name. It does not modify env.
func Set(env []string, name, value string) []string {
	return append(Unset(env, name), name+"="+value)
}

// Unset returns env without entries for the names. It does not modify env.
func Unset(env []string, names ...string) []string {
	out := make([]string, 0, len(env)+1)
	for _, entry := range env {
		key, _, _ := strings.Cut(entry, "=")
		if !slices.Contains(names, key) {
			out = append(out, entry)
		}
	}
	return out
}

// Overlay returns env with every variable of over set, in sorted order. It does not modify env.
func Overlay(env []string, over map[string]string) []string {
	names := slices.Sorted(maps.Keys(over))
	out := Unset(env, names...)
	for _, name := range names {
		out = append(out, name+"="+over[name])
	}
	return out
}
