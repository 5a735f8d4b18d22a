package sshconn

import (
	"errors"
	"fmt"
	"strings"
)

// Quote renders an argument vector as one line that a POSIX shell splits back
// into exactly these arguments. SSH has no argument vectors: sshd hands the
// line to the login shell of the remote user, which must be a POSIX one (sh,
// bash, dash, zsh, ksh, busybox).
//
// Arguments with a NUL byte can't be passed to any program and are an error, as
// is an empty vector.
func Quote(args []string) (string, error) {
	if len(args) == 0 {
		return "", errors.New("quote: no command")
	}
	var line strings.Builder
	for i, arg := range args {
		if strings.IndexByte(arg, 0) >= 0 {
			return "", fmt.Errorf("quote: argument %d has a NUL byte", i)
		}
		if i > 0 {
			line.WriteByte(' ')
		}
		// The first word is quoted even if it's plain when it could be a shell
		// keyword, an alias or an assignment; quoting prevents all three.
		if i > 0 && plain(arg) {
			line.WriteString(arg)
			continue
		}
		line.WriteByte('\'')
		line.WriteString(strings.ReplaceAll(arg, "'", `'\''`))
		line.WriteByte('\'')
	}
	return line.String(), nil
}

// plain reports whether no POSIX shell gives any byte of s a meaning.
func plain(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("-_./:,+@%", c) >= 0:
		default:
			return false
		}
	}
	return true
}
