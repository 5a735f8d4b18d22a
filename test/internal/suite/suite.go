// Package suite is what the conformance tests of built programs share: those whom
// the suite plays, each with a certificate, the waiting for processes, and the look
// at what they left.
package suite

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
)

// nobody is an identity that no configuration lists.
const nobody = "backendtest-nobody"

// Identities are those whom the suite plays, with what their certificates are
// for.
func Identities() [][2]string {
	return [][2]string{
		{"backendtest-owner", "client"},
		{"backendtest-stranger", "client"},
		{operator, "operator"},
		{nobody, "client"},
	}
}

const operator = "backendtest-operator"

// Clients are those of them whom a configuration lists.
func Clients() []site.Client {
	return []site.Client{
		{Identity: site.Identity("backendtest-owner"), Role: "client"},
		{Identity: site.Identity("backendtest-stranger"), Role: "client"},
		{Identity: site.Identity(operator), Role: "operator"},
	}
}

// Callers are the ways to a bridge, by the identity that each has a certificate
// of. Whom the context names is who calls.
type Callers map[string]backend.Backend

var _ backend.Backend = Callers(nil)

// Dial connects to an address as everyone whom the suite plays. It appends the
// connections to conns, for the caller to close.
func Dial(s *site.Site, addr string, conns *[]*grpc.ClientConn) (Callers, error) {
	all := Callers{}
	for _, identity := range Identities() {
		dir := s.Path("certs", identity[0])
		conn, err := grpcx.Dial(grpcx.ClientConfig{Target: "passthrough:///" + addr}, grpcx.TLSConfig{
			CertFile: config.Path(filepath.Join(dir, "cert.pem")), KeyFile: config.Path(filepath.Join(dir, "key.pem")), CAFile: config.Path(filepath.Join(dir, "ca.pem")),
		}, grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, MaxDelay: 100 * time.Millisecond, Multiplier: 2},
			// Zero would leave a handshake no longer than the pause before it.
			MinConnectTimeout: 10 * time.Second,
		}))
		if err != nil {
			return nil, err
		}
		*conns = append(*conns, conn)
		all[identity[0]] = backendgrpc.NewClient(conn)
	}
	return all, nil
}

func (c Callers) by(ctx context.Context) backend.Backend {
	if b, ok := c[backend.CallerFrom(ctx).Identity]; ok {
		return b
	}
	return c[nobody]
}

// Name implements backend.Backend.
func (c Callers) Name(ctx context.Context) (string, error) { return c.by(ctx).Name(ctx) }

// Capabilities implements backend.Backend.
func (c Callers) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	return c.by(ctx).Capabilities(ctx)
}

// CanSatisfy implements backend.Backend.
func (c Callers) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	return c.by(ctx).CanSatisfy(ctx, g)
}

// Provision implements backend.Backend.
func (c Callers) Provision(ctx context.Context, g backend.Grant, e backend.Envelope) (backend.Provisioned, error) {
	return c.by(ctx).Provision(ctx, g, e)
}

// WatchUntilExit implements backend.Backend.
func (c Callers) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	return c.by(ctx).WatchUntilExit(ctx, h, emit)
}

// Terminate implements backend.Backend.
func (c Callers) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	return c.by(ctx).Terminate(ctx, h)
}

// CheckFiles compares the files below dir with those that a site has by design,
// by their names from there. Whatever else there is was left
// behind.
func CheckFiles(t testing.TB, dir string, known ...string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, path) // below it
		if err == nil && !d.IsDir() && !slices.Contains(known, name) {
			t.Errorf("the processes left the file %s", name)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Serve starts a process and waits until it takes calls, which programs do last.
// The process is returned with an error, too, if it was started.
func Serve(ctx context.Context, s *site.Site, name, program, file, addr string) (*site.Process, error) {
	p, err := s.Start(ctx, name, program, "-config", file)
	if err != nil {
		return nil, err
	}
	return p, Soon(ctx, func() error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			return conn.Close()
		}
		if !p.Running() {
			return &EndedError{p}
		}
		return err
	})
}

// EndedError says that a process ended instead of serving. Waiting doesn't help.
type EndedError struct{ *site.Process }

// Error implements error.
func (e *EndedError) Error() string { return e.Name + " ended:\n" + e.LogTail() }

// Soon repeats a look until it succeeds, can't any more, or ctx ends.
func Soon(ctx context.Context, look func() error) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := look()
		if _, ended := errors.AsType[*EndedError](err); ended || err == nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// AllIsWell is an error unless a backend says so of itself, which one of which a
// process has ended never will.
func AllIsWell(ctx context.Context, of backend.Backend, processes []*site.Process) error {
	c, err := of.Capabilities(backend.WithCaller(ctx, backend.Caller{Identity: operator, Role: backend.RoleOperator}))
	if err == nil && (len(c.Warnings) > 0 || c.Stale || len(c.Regions) == 0) {
		err = fmt.Errorf("not all is well: %+v", c)
	}
	for _, p := range processes {
		if err != nil && !p.Running() {
			return &EndedError{p}
		}
	}
	return err
}
