package backend

import (
	"context"
	"fmt"
)

// Role is what a caller may do.
type Role int

// The roles.
const (
	// RoleNone may do nothing.
	RoleNone Role = iota
	// RoleReader may see capabilities, instances and compute logs of all.
	RoleReader
	// RoleClient may provision, and watch and terminate its own grants.
	RoleClient
	// RoleOperator may do everything, to every grant.
	RoleOperator
)

// String returns the role as configurations write it.
func (r Role) String() string {
	switch r {
	case RoleReader:
		return "reader"
	case RoleClient:
		return "client"
	case RoleOperator:
		return "operator"
	case RoleNone:
	}
	return "none"
}

// ParseRole reads a role as configurations write it.
func ParseRole(s string) (Role, error) {
	for _, r := range []Role{RoleReader, RoleClient, RoleOperator} {
		if s == r.String() {
			return r, nil
		}
	}
	return RoleNone, fmt.Errorf("unknown role %q; want reader, client or operator", s)
}

// Caller is who calls, as the server's authentication found out.
type Caller struct {
	// Identity is the client's own, also when a router passed the call on.
	Identity string
	Role     Role
	// Hops is how many routers the call has passed.
	Hops int
}

// Owns reports whether the caller may see the receipt of, watch and terminate
// a grant of owner.
func (c Caller) Owns(owner string) bool {
	return c.Role == RoleOperator || (c.Role == RoleClient && c.Identity == owner)
}

// SeesAll reports whether the caller may list grants of others.
func (c Caller) SeesAll() bool { return c.Role == RoleOperator || c.Role == RoleReader }

type callerKey struct{}

// WithCaller returns a context that carries who calls.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns who calls, the zero Caller (which may do nothing) if
// nobody said.
func CallerFrom(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}
