package config

import (
	"errors"
	"fmt"
	"strings"
)

// Problems collects what Validate finds. The zero value is ready to use.
type Problems struct{ all []error }

// Add records a problem of a key, such as Add(Key("host", 2, "address"),
// "empty").
func (p *Problems) Add(key, format string, args ...any) {
	p.all = append(p.all, fmt.Errorf("%s: %w", key, fmt.Errorf(format, args...)))
}

// Join adds problems that another check found, if any.
func (p *Problems) Join(err error) {
	if err != nil {
		p.all = append(p.all, err)
	}
}

// Err returns all problems joined, or nil.
func (p *Problems) Err() error { return errors.Join(p.all...) }

// Key writes the path of a key: strings are names, integers are indices that
// count from 0, so that Key("host", 2, "address") is host[2].address.
func Key(parts ...any) string {
	var b strings.Builder
	for _, part := range parts {
		switch p := part.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", p)
		default:
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			fmt.Fprint(&b, p)
		}
	}
	return b.String()
}
