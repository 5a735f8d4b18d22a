package backendtest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// defaultPatience is how long the suite waits for what should happen at once,
// unless the fixture says otherwise.
const defaultPatience = 2 * time.Minute

// The callers that the suite plays.
var (
	owner    = backend.Caller{Identity: "backendtest-owner", Role: backend.RoleClient}      //nolint:gochecknoglobals // A constant: Go has none of a struct type.
	stranger = backend.Caller{Identity: "backendtest-stranger", Role: backend.RoleClient}   //nolint:gochecknoglobals // As above.
	operator = backend.Caller{Identity: "backendtest-operator", Role: backend.RoleOperator} //nolint:gochecknoglobals // As above.
)

// env is what a case works with.
type env struct {
	testing.TB
	h Harness
	f *Fixture
	m mode
	// b is the backend, over gRPC if the mode says so, with everything that
	// passes checked.
	b        backend.Backend
	patience time.Duration
	// name is the case's, report takes note of what it sweeps.
	name   string
	report *report
	// fatal, if set, ends the goroutine after a failure in place of FailNow.
	fatal func()

	mu      sync.Mutex // protects what follows
	wire    *wire
	life    *mortal
	killed  bool // what is used is, or is about to be, dead
	where   string
	granted []backend.GrantID
	secrets []string
	finals  map[backend.GrantID]backend.SignedLog // the first of each grant that was seen
}

func newEnv(t testing.TB, h Harness, f *Fixture, m mode) *env {
	t.Helper()
	e := &env{TB: t, h: h, f: f, m: m, patience: cmp.Or(f.Patience, defaultPatience)}
	e.use(f.Backend)
	return e
}

// use makes b the backend that the case talks to.
func (e *env) use(b backend.Backend) {
	e.Helper()
	e.mu.Lock()
	before := e.wire
	e.mu.Unlock()
	if before != nil {
		before.close()
	}
	var w *wire
	var life *mortal
	if e.m == grpc {
		w = serve(e, b)
		b = w.client
	} else {
		life = newMortal(b)
		b = life
	}
	e.mu.Lock()
	e.wire, e.life = w, life
	killed := e.killed
	e.mu.Unlock()
	e.b = &checked{Backend: b, e: e}
	if killed {
		e.cut()
	}
}

// cut cuts the connection to a worker that is dead. Whatever is used from now on
// is cut, too, until revive.
func (e *env) cut() {
	e.mu.Lock()
	e.killed = true
	w, life := e.wire, e.life
	e.mu.Unlock()
	if w != nil {
		w.cut()
	}
	if life != nil {
		life.cut()
	}
}

// revive ends what cut began, before another worker is started.
func (e *env) revive() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.killed = false
}

func (e *env) isCut() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.killed
}

// reopen restarts the worker.
func (e *env) reopen() {
	e.Helper()
	e.revive()
	b, err := e.f.Reopen(e.TB)
	if err != nil {
		e.Fatalf("Reopen: %v", err)
	}
	e.use(b)
}

// at says what is being done, for the failures from now on.
func (e *env) at(where string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.where = where
}

func (e *env) placed(format string, args ...any) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.where + fmt.Sprintf(format, args...)
}

// Errorf is that of testing.TB, and says where.
func (e *env) Errorf(format string, args ...any) {
	e.Helper()
	e.TB.Error(e.placed(format, args...))
}

// Fatalf is that of testing.TB, and says where.
func (e *env) Fatalf(format string, args ...any) {
	e.Helper()
	e.TB.Error(e.placed(format, args...))
	e.FailNow()
}

// Fatal is that of testing.TB, and says where.
func (e *env) Fatal(args ...any) {
	e.Helper()
	e.Fatalf("%s", fmt.Sprint(args...))
}

// FailNow is that of testing.TB, also in goroutines of a sweep.
func (e *env) FailNow() {
	e.Helper()
	if e.fatal != nil {
		e.Fail()
		e.fatal()
	}
	e.TB.FailNow()
}

// as returns a context of a caller that ends when patience does.
func (e *env) as(c backend.Caller) context.Context {
	ctx, cancel := context.WithTimeout(backend.WithCaller(e.Context(), c), e.patience)
	e.Cleanup(cancel)
	return ctx
}

// ctx is a context of the usual caller.
func (e *env) ctx() context.Context { return e.as(owner) }

// grant returns a new satisfiable grant.
func (e *env) grant() (backend.Grant, backend.Envelope) {
	g, envelope := e.f.Satisfiable()
	return e.track(g), envelope
}

// track has the grant ended when the case is over.
func (e *env) track(g backend.Grant) backend.Grant {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !slices.Contains(e.granted, g.ID) {
		e.granted = append(e.granted, g.ID)
	}
	return g
}

// secret says what must not be seen in errors and logs.
func (e *env) secret(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.secrets = append(e.secrets, s)
}

func (e *env) leak(text string) (string, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range append([]string{"PRIVATE KEY"}, e.secrets...) {
		if strings.Contains(text, s) {
			return s, true
		}
	}
	return "", false
}

func (e *env) handle(id backend.GrantID) backend.Handle {
	if e.f.Handle != nil {
		return e.f.Handle(id)
	}
	return backend.HandleFor(id)
}

// ready provisions a new grant.
func (e *env) ready() (backend.Grant, backend.Envelope, backend.Provisioned) {
	e.Helper()
	g, envelope := e.grant()
	return g, envelope, e.provision(g, envelope)
}

func (e *env) provision(g backend.Grant, envelope backend.Envelope) backend.Provisioned {
	e.Helper()
	p, err := e.b.Provision(e.ctx(), g, envelope)
	if err != nil {
		e.Fatalf("Provision: %s", describe(err))
	}
	return p
}

func (e *env) terminate(h backend.Handle) *backend.SignedLog {
	e.Helper()
	t, err := e.b.Terminate(e.ctx(), h)
	if err != nil {
		e.Fatalf("Terminate: %s", describe(err))
	}
	if t.State != backend.StateTerminated {
		e.Fatalf("Terminate answered %s, want TERMINATED", t.State)
	}
	return t.Log
}

// want fails unless err has one of the reasons.
func (e *env) want(err error, what string, reasons ...backenderr.Reason) {
	e.Helper()
	if !backenderr.Is(err, reasons...) {
		e.Errorf("%s: got %s, want %v", what, describe(err), reasons)
	}
}

// wantNone fails unless err says that nothing exists.
func (e *env) wantNone(err error, what string) {
	e.Helper()
	if err != nil && backenderr.CreatedOf(err) != backenderr.CreatedNone {
		e.Errorf("%s: the error doesn't say created=none: %s", what, describe(err))
	}
}

func describe(err error) string {
	if err == nil {
		return "no error"
	}
	return fmt.Sprintf("%s (created=%s): %v", backenderr.ReasonOf(err), backenderr.CreatedOf(err), err)
}

// same fails unless both are equal.
func (e *env) same(what string, a, b any) {
	e.Helper()
	if diff := gocmp.Diff(a, b); diff != "" {
		const most = 2000
		if len(diff) > most {
			diff = diff[:most] + "…"
		}
		e.Errorf("%s differ (-first +second):\n%s", what, diff)
	}
}

// eventually waits until something holds.
func (e *env) eventually(what string, holds func() bool) {
	e.Helper()
	deadline := time.Now().Add(e.patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		if time.Now().After(deadline) {
			e.Fatalf("after %s it still doesn't hold that %s", e.patience, what)
		}
		<-tick.C
	}
}

// left returns the names of what the provider holds for a grant, or for all.
func (e *env) left(ids ...backend.GrantID) []string {
	// It is also asked when the case is over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.Context()), e.patience)
	defer cancel()
	all, err := e.f.Leftovers(ctx)
	if err != nil {
		e.Errorf("Leftovers: %v", err)
	}
	var names []string
	for _, l := range all {
		if len(ids) == 0 || slices.Contains(ids, l.GrantID) {
			names = append(names, l.Name)
		}
	}
	return names
}

// outcome is how a Provision ended.
type outcome struct {
	provisioned backend.Provisioned
	err         error
}

// begin provisions in the background.
func (e *env) begin(ctx context.Context, g backend.Grant, envelope backend.Envelope) <-chan outcome {
	done := make(chan outcome, 1)
	b := e.b
	go func() {
		p, err := b.Provision(ctx, g, envelope)
		done <- outcome{p, err}
	}()
	return done
}

// receive waits for one value of a channel.
func receive[T any](e *env, what string, c <-chan T) T {
	e.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(e.patience):
		e.Fatalf("waited %s for %s", e.patience, what)
	}
	panic("unreachable")
}

// watcher is a watch under way.
type watcher struct {
	e      *env
	events chan backend.Event // closed after the end
	done   chan error
}

func (e *env) watch(ctx context.Context, h backend.Handle) *watcher {
	w := &watcher{e: e, events: make(chan backend.Event, 4096), done: make(chan error, 1)}
	b := e.b
	go func() {
		defer close(w.events)
		w.done <- b.WatchUntilExit(ctx, h, func(event backend.Event) error {
			w.events <- event
			return nil
		})
	}()
	return w
}

// state waits for the next state.
func (w *watcher) state() backend.State {
	w.e.Helper()
	for {
		select {
		case event, ok := <-w.events:
			if !ok {
				w.e.Fatalf("the watch ended while a state was awaited: %s", describe(<-w.done))
			}
			if event.Instance != nil {
				return event.Instance.State
			}
		case <-time.After(w.e.patience):
			w.e.Fatalf("waited %s for a state", w.e.patience)
		}
	}
}

// log waits for the end and returns the final log.
func (w *watcher) log() *backend.SignedLog {
	w.e.Helper()
	if err := receive(w.e, "the end of a watch", w.done); err != nil {
		w.e.Fatalf("WatchUntilExit: %s", describe(err))
	}
	var log *backend.SignedLog
	for event := range w.events {
		if event.Log != nil {
			log = event.Log
		}
	}
	if log == nil {
		w.e.Fatalf("the watch ended without a compute log")
	}
	return log
}

// err waits for the end and returns its error.
func (w *watcher) err() error {
	w.e.Helper()
	return receive(w.e, "the end of a watch", w.done)
}

// newKeyPair returns a key pair of a requester.
func newKeyPair(t testing.TB) (line string, private ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))), private
}

// finish ends all grants of the case and looks for what is left.
func (e *env) finish() {
	e.Helper()
	ids := slices.Clone(e.granted)
	for _, id := range ids {
		e.end(id)
	}
	if left := e.left(); len(left) > 0 {
		e.Errorf("every grant has ended and the provider still holds %v", left)
	}
	if e.f.History != nil {
		for _, id := range ids {
			if h := e.f.History(id); h.AtOnce > 1 {
				e.Errorf("grant %s had %d instances at once", id, h.AtOnce)
			}
		}
	}
	if e.f.Logs != nil {
		logs := e.f.Logs()
		for line := range bytes.Lines(logs) {
			if s, found := e.leak(string(line)); found {
				e.Errorf("the log holds a secret (%d characters): %.60s…", len(s), line)
				break
			}
		}
	}
	e.mu.Lock()
	w := e.wire
	e.mu.Unlock()
	if w != nil {
		w.close()
	}
}

// end ends a grant as an operator does, however the case left it.
func (e *env) end(id backend.GrantID) {
	e.Helper()
	deadline := time.Now().Add(e.patience)
	base := backend.WithCaller(context.WithoutCancel(e.Context()), operator) // The case may be over.
	for {
		ctx, cancel := context.WithDeadline(base, deadline)
		t, err := e.b.Terminate(ctx, e.handle(id))
		cancel()
		switch {
		case err == nil && t.State == backend.StateTerminated:
			return
		case time.Now().After(deadline):
			e.Errorf("grant %s can't be ended: %s, %s", id, t.State, describe(err))
			return
		case err != nil && !backenderr.Retryable(err):
			e.Errorf("end grant %s: %s", id, describe(err))
			return
		}
		timer := time.NewTimer(5 * time.Millisecond)
		<-timer.C
	}
}
