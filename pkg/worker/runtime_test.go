package worker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Everything here runs in a bubble of testing/synctest: time stands still while
// anything moves, so that hours of back-off take no time and the moment of each
// call is exact.

// The callers.
var (
	alice = backend.Caller{Identity: "alice", Role: backend.RoleClient}
	bob   = backend.Caller{Identity: "bob", Role: backend.RoleClient}
	root  = backend.Caller{Identity: "root", Role: backend.RoleOperator}
)

// emptyLedger returns the file of a new ledger; making one takes long under the
// race detector.
var emptyLedger = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "worker")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "ledger.db")
	l, err := ledger.Open(context.Background(), ledger.Config{Path: path})
	if err != nil {
		return nil, err
	}
	if err := l.Close(); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
})

// scripted is a driver whose verbs a test may replace. Without that it makes
// instances at once that run until they are terminated.
type scripted struct {
	env Env

	mu         sync.Mutex
	provision  func(context.Context, Order) (Ready, error)
	watch      func(context.Context, backend.GrantID, func(backend.Usage)) (backend.Exit, error)
	terminate  func(context.Context, backend.GrantID) (*backend.ComputeLog, error)
	list       func() (backend.Listing, error)
	satisfies  func(backend.Grant) (backend.Satisfaction, error)
	calls      []string
	terminated []time.Time
}

var _ Driver = (*scripted)(nil)

func (d *scripted) called(what string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, what)
	if what == "terminate" {
		d.terminated = append(d.terminated, time.Now())
	}
}

// count returns how often a verb was called.
func (d *scripted) count(what string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, c := range d.calls {
		if c == what {
			n++
		}
	}
	return n
}

// torndown returns when Terminate was called.
func (d *scripted) torndown() []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.terminated)
}

// all returns every call so far.
func (d *scripted) all() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

func script[F any](d *scripted, field *F, f F) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*field = f
}

func (d *scripted) Capabilities(context.Context) (backend.Capabilities, error) {
	return backend.Capabilities{Backend: "the driver's", Regions: []backend.RegionCapabilities{{Region: "r"}}}, nil
}

func (d *scripted) CanSatisfy(_ context.Context, g backend.Grant) (backend.Satisfaction, error) {
	d.called("satisfy")
	d.mu.Lock()
	f := d.satisfies
	d.mu.Unlock()
	if f != nil {
		return f(g)
	}
	return backend.Satisfaction{Satisfiable: true}, nil
}

func (d *scripted) Provision(ctx context.Context, o Order) (Ready, error) {
	d.called("provision")
	d.mu.Lock()
	f := d.provision
	d.mu.Unlock()
	if f != nil {
		return f(ctx, o)
	}
	return d.make(ctx, o)
}

// make is a driver's Provision that has nothing to do.
func (d *scripted) make(ctx context.Context, o Order) (Ready, error) {
	a, err := d.env.Journal.Begin(ctx, o.Grant.ID, "host-1", []byte("params"))
	if err != nil {
		return Ready{}, err
	}
	_, public, err := d.env.HostKey(o.Grant.ID, a.Number)
	if err != nil {
		return Ready{}, err
	}
	return Ready{
		Instance: backend.Instance{
			ID: backend.InstanceID(fmt.Sprintf("i-%d", a.Number)), Region: "r", Isolation: backend.IsolationContainer,
			Shape: o.Grant.Shape, Attempt: a.Number, StartedAt: time.Now(), Ports: []backend.PublishedPort{{PublicHost: "h", PublicPort: 1}},
		},
		Host: "host.example", Port: 22, User: "compute", HostKey: public,
	}, nil
}

func (d *scripted) Watch(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
	d.called("watch")
	d.mu.Lock()
	f := d.watch
	d.mu.Unlock()
	if f != nil {
		return f(ctx, id, usage)
	}
	<-ctx.Done()
	return backend.Exit{}, ctx.Err()
}

func (d *scripted) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	d.called("terminate")
	d.mu.Lock()
	f := d.terminate
	d.mu.Unlock()
	if f != nil {
		return f(ctx, id)
	}
	return nil, d.gone(ctx, id)
}

// gone records that nothing of a grant is left.
func (d *scripted) gone(ctx context.Context, id backend.GrantID) error {
	attempts, err := d.env.Journal.Attempts(ctx, id)
	for _, a := range attempts {
		err = errors.Join(err, d.env.Journal.Gone(ctx, id, a.Number))
	}
	return err
}

func (d *scripted) List(context.Context) (backend.Listing, error) {
	d.called("list")
	d.mu.Lock()
	f := d.list
	d.mu.Unlock()
	if f != nil {
		return f()
	}
	return backend.Listing{}, nil
}

func (d *scripted) Close() error { return nil }

// site is a runtime on a scripted driver.
type site struct {
	*Runtime
	t      *testing.T
	driver *scripted
	config RuntimeConfig
	path   string
	closed bool
}

func newSite(t *testing.T, change func(*RuntimeConfig)) *site {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger.db")
	empty, err := emptyLedger()
	if err == nil {
		err = os.WriteFile(path, empty, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.Open(t.Context(), ledger.Config{Path: path, BusyTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	s := &site{t: t, path: path, config: RuntimeConfig{
		BridgeID: "test", Backend: "metal", Ledger: l, Secret: redact.New(secret), Log: slog.New(slog.DiscardHandler),
	}}
	if change != nil {
		change(&s.config)
	}
	s.start()
	t.Cleanup(func() {
		s.stop()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *site) start() {
	s.t.Helper()
	s.config.Metrics = prometheus.NewRegistry()
	r, err := NewRuntime(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Runtime, s.driver, s.closed = r, &scripted{env: r.Env()}, false
}

// run starts the runtime; before it the test may write the driver's script.
func (s *site) run() {
	s.t.Helper()
	if err := s.Start(s.t.Context(), s.driver); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) stop() {
	if !s.closed && s.Runtime.stop != nil {
		s.Close()
	}
	s.closed = true
}

func running(t *testing.T, change func(*RuntimeConfig)) *site {
	t.Helper()
	s := newSite(t, change)
	s.run()
	return s
}

func as(t *testing.T, c backend.Caller) context.Context {
	t.Helper()
	return backend.WithCaller(t.Context(), c)
}

// grantFor returns a valid grant for an hour, with a key of the requester's.
func grantFor(t *testing.T, n byte) (backend.Grant, backend.Envelope) {
	t.Helper()
	pair, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	g := backend.Grant{
		ID: backend.GrantID{n}, PostHash: [32]byte{7}, ProviderID: slices.Repeat([]byte{5}, 32),
		Image:        backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{8}}, Kind: backend.ImageOCIArchive},
		Shape:        backend.Shape{CPU: 1000, RAM: 512, Storage: 2},
		MinIsolation: backend.IsolationContainer,
		ValidTo:      time.Now().Add(time.Hour).Add(789 * time.Nanosecond),
	}
	return g, backend.Envelope{SSHPublicKey: pair.Public.String(), PostHash: g.PostHash}
}

func (s *site) ready() (backend.Grant, backend.Envelope, backend.Provisioned) {
	s.t.Helper()
	g, e := grantFor(s.t, 1)
	p, err := s.Provision(as(s.t, alice), g, e)
	if err != nil {
		s.t.Fatalf("Provision: %v", err)
	}
	return g, e, p
}

type outcome struct {
	p   backend.Provisioned
	err error
}

// begin starts a Provision.
func (s *site) begin(ctx context.Context, g backend.Grant, e backend.Envelope) <-chan outcome {
	done := make(chan outcome, 1)
	go func() {
		p, err := s.Provision(ctx, g, e)
		done <- outcome{p, err}
	}()
	return done
}

// final waits for a grant's final log by watching it.
func (s *site) final(id backend.GrantID) backend.ComputeLog {
	s.t.Helper()
	var log *backend.SignedLog
	err := s.WatchUntilExit(as(s.t, root), backend.HandleFor(id), func(e backend.Event) error {
		if e.Log != nil {
			log = e.Log
		}
		return nil
	})
	if err != nil || log == nil || !log.Log.Final {
		s.t.Fatalf("no final log: %v, %v", log, err)
	}
	return log.Log
}

func wantReason(t *testing.T, err error, reason backenderr.Reason, created backenderr.Created) {
	t.Helper()
	if !backenderr.Is(err, reason) || backenderr.CreatedOf(err) != created {
		t.Errorf("got %s (created=%s): %v, want %s (created=%s)", backenderr.ReasonOf(err), backenderr.CreatedOf(err), err, reason, created)
	}
}

func TestManyCallersAreOneAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		release := make(chan struct{})
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			<-release
			return s.driver.make(ctx, o)
		})
		g, e := grantFor(t, 1)
		var calls []<-chan outcome
		for range 20 {
			calls = append(calls, s.begin(as(t, alice), g, e))
		}
		synctest.Wait()
		close(release)
		first := <-calls[0]
		for _, c := range calls[1:] {
			o := <-c
			if o.err != nil {
				t.Fatal(o.err)
			}
			if diff := cmp.Diff(first.p, o.p, cmp.Comparer(redact.Secret.Equal)); diff != "" {
				t.Errorf("answers differ:\n%s", diff)
			}
		}
		again, err := s.Provision(as(t, alice), g, e)
		if err != nil || !cmp.Equal(first.p, again, cmp.Comparer(redact.Secret.Equal)) {
			t.Errorf("a later call: %v, %v", again, err)
		}
		if n := s.driver.count("provision"); n != 1 {
			t.Errorf("the driver was called %d times", n)
		}
		if !first.p.Instance.ValidTo.Equal(g.ValidTo) || !first.p.Receipt.ValidTo.Equal(g.ValidTo) {
			t.Errorf("granted until %s, got %s and %s", g.ValidTo, first.p.Instance.ValidTo, first.p.Receipt.ValidTo)
		}
		if first.p.Instance.Owner != "" {
			t.Error("a client sees an owner")
		}
	})
}

func TestTheAttemptLivesAsLongAsACallerWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		var cancelled bool
		script(s.driver, &s.driver.provision, func(ctx context.Context, _ Order) (Ready, error) {
			<-ctx.Done()
			cancelled = true
			return Ready{}, backenderr.Wrap(backenderr.Cancelled, ctx.Err(), "undone").WithCreated(backenderr.CreatedNone)
		})
		g, e := grantFor(t, 1)
		var calls []<-chan outcome
		var leave []context.CancelFunc
		for range 3 {
			ctx, cancel := context.WithCancel(as(t, alice))
			leave = append(leave, cancel)
			calls = append(calls, s.begin(ctx, g, e))
		}
		synctest.Wait()
		for i := range 2 {
			leave[i]()
			wantReason(t, (<-calls[i]).err, backenderr.Cancelled, backenderr.CreatedUnknown)
			synctest.Wait()
			if cancelled {
				t.Fatalf("undone although %d callers wait", 2-i)
			}
		}
		leave[2]()
		<-calls[2]
		synctest.Wait()
		if !cancelled || s.driver.count("provision") != 1 {
			t.Error("not undone when the last caller went")
		}
		// That was no end.
		script(s.driver, &s.driver.provision, nil)
		if _, err := s.Provision(as(t, alice), g, e); err != nil {
			t.Errorf("a retry: %v", err)
		}
	})
}

func TestCallersThatGoTogetherAreNoticed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		for n := range byte(30) {
			undone := make(chan struct{})
			script(s.driver, &s.driver.provision, func(ctx context.Context, _ Order) (Ready, error) {
				<-ctx.Done()
				close(undone)
				return Ready{}, ctx.Err()
			})
			g, e := grantFor(t, n+1)
			ctx, cancel := context.WithCancel(as(t, alice))
			var calls []<-chan outcome
			for range 5 {
				calls = append(calls, s.begin(ctx, g, e))
			}
			synctest.Wait()
			cancel()
			for _, c := range calls {
				<-c
			}
			select {
			case <-undone:
			case <-time.After(time.Minute):
				t.Fatal("nobody waits, and the attempt goes on")
			}
		}
	})
}

func TestWhoComesAfterTheLastLeftGetsTheNextAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		cleaned := make(chan struct{})
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			if s.driver.count("provision") > 1 {
				return s.driver.make(ctx, o)
			}
			<-ctx.Done()
			<-cleaned
			return Ready{}, backenderr.New(backenderr.Cancelled, "undone").WithCreated(backenderr.CreatedNone)
		})
		g, e := grantFor(t, 1)
		ctx, cancel := context.WithCancel(as(t, alice))
		first := s.begin(ctx, g, e)
		synctest.Wait()
		cancel()
		<-first
		late := s.begin(as(t, alice), g, e)
		synctest.Wait()
		if n := s.driver.count("provision"); n != 1 {
			t.Fatalf("%d attempts at the same time", n)
		}
		close(cleaned)
		if o := <-late; o.err != nil {
			t.Errorf("the late caller: %v", o.err)
		}
		if n := s.driver.count("provision"); n != 2 {
			t.Errorf("%d attempts, want 2", n)
		}
	})
}

func TestFailureReachesEveryCallerAndIsNoEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		release := make(chan struct{})
		script(s.driver, &s.driver.provision, func(context.Context, Order) (Ready, error) {
			<-release
			return Ready{}, backenderr.New(backenderr.CapacityExhausted, "full").WithCreated(backenderr.CreatedNone).WithRetryAfter(time.Minute)
		})
		g, e := grantFor(t, 1)
		a, b := s.begin(as(t, alice), g, e), s.begin(as(t, alice), g, e)
		synctest.Wait()
		close(release)
		wantReason(t, (<-a).err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		wantReason(t, (<-b).err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		synctest.Wait()
		err := s.WatchUntilExit(as(t, alice), backend.HandleFor(g.ID), func(backend.Event) error { return nil })
		wantReason(t, err, backenderr.InstanceNotFound, backenderr.CreatedUnknown)
		script(s.driver, &s.driver.provision, nil)
		if _, err := s.Provision(as(t, alice), g, e); err != nil {
			t.Errorf("a retry: %v", err)
		}
	})
}

func TestTerminateDuringProvision(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			if _, err := s.driver.env.Journal.Begin(ctx, o.Grant.ID, "", nil); err != nil {
				return Ready{}, err
			}
			<-ctx.Done()
			return Ready{}, ctx.Err()
		})
		g, e := grantFor(t, 1)
		call := s.begin(as(t, alice), g, e)
		synctest.Wait()
		got, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID))
		if err != nil || got.State != backend.StateTerminated || got.Log == nil || got.Log.Log.Exit.Reason != backend.EndTerminated {
			t.Errorf("Terminate: %+v, %v", got, err)
		}
		wantReason(t, (<-call).err, backenderr.GrantEnded, backenderr.CreatedUnknown)
		_, err = s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedNone)
		again, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID))
		if err != nil || !cmp.Equal(got, again) {
			t.Errorf("Terminate again: %+v, %v", again, err)
		}
		if n := s.driver.count("terminate"); n != 1 {
			t.Errorf("torn down %d times", n)
		}
		if !got.Log.Log.StartedAt.IsZero() {
			t.Error("it never ran")
		}
	})
}

// An instance that became ready while its last caller left is taken back at
// once, and not left running until somebody sweeps.
func TestCallerThatLeavesAtTheLastMomentLeavesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		ctx, cancel := context.WithCancel(as(t, alice))
		defer cancel()
		script(s.driver, &s.driver.provision, func(made context.Context, o Order) (Ready, error) {
			ready, err := s.driver.make(made, o)
			cancel()
			<-made.Done()
			return ready, err
		})
		g, e := grantFor(t, 1)
		_, err := s.Provision(ctx, g, e)
		wantReason(t, err, backenderr.Cancelled, backenderr.CreatedUnknown)
		synctest.Wait()
		if s.driver.count("terminate") != 1 {
			t.Errorf("taken back %d times, want once", s.driver.count("terminate"))
		}
		if n := len(s.Instances(as(t, alice))); n != 0 {
			t.Errorf("%d instances are still there", n)
		}
		script(s.driver, &s.driver.provision, s.driver.make)
		if _, err := s.Provision(as(t, alice), g, e); err != nil {
			t.Errorf("the next try: %v", err)
		}
		if _, err := s.Terminate(as(t, alice), backend.HandleFor(g.ID)); err != nil {
			t.Error(err)
		}
	})
}

// Callers may go between the storing of an answer and its giving out. The
// instance is taken back then, and its answer is nobody's, in this process and
// the next.
func TestAnswerOfAnAttemptThatIsGoneIsNotGivenAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e, first := s.ready()
		s.stop()
		if err := s.config.Ledger.MarkGone(t.Context(), ledger.RequestID(g.ID), first.Instance.Attempt); err != nil {
			t.Fatal(err)
		}
		s.start()
		s.run()
		if n := len(s.Instances(as(t, alice))); n != 0 {
			t.Errorf("%d instances are there", n)
		}
		again, err := s.Provision(as(t, alice), g, e)
		if err != nil {
			t.Fatal(err)
		}
		if again.Instance.Attempt != first.Instance.Attempt+1 || s.driver.count("provision") != 1 {
			t.Errorf("attempt %d, after %d calls of the driver", again.Instance.Attempt, s.driver.count("provision"))
		}
	})
}

func TestClosureBeforeTheAnswerWins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			ready, err := s.driver.make(ctx, o)
			// Another replica closes the grant at this moment.
			_, _, closeErr := s.config.Ledger.CloseGrant(ctx, ledger.Closure{RequestID: ledger.RequestID(o.Grant.ID), Reason: "TERMINATED", By: "another"})
			return ready, errors.Join(err, closeErr)
		})
		g, e := grantFor(t, 1)
		_, err := s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedNone)
		if log := s.final(g.ID); log.Exit.Reason != backend.EndTerminated {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
		if s.driver.count("terminate") == 0 {
			t.Error("what was made stays")
		}
	})
}

func TestDeadlineIsEnforcedInEveryPhase(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(*testing.T, *site) backend.GrantID{
		"while it is made": func(t *testing.T, s *site) backend.GrantID {
			t.Helper()
			script(s.driver, &s.driver.provision, func(ctx context.Context, _ Order) (Ready, error) {
				<-ctx.Done()
				return Ready{}, ctx.Err()
			})
			g, e := grantFor(t, 1)
			_, err := s.Provision(as(t, alice), g, e)
			wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedUnknown)
			return g.ID
		},
		"while it runs and nobody watches": func(_ *testing.T, s *site) backend.GrantID {
			g, _, _ := s.ready()
			return g.ID
		},
		"while the host can't be seen": func(_ *testing.T, s *site) backend.GrantID {
			script(s.driver, &s.driver.watch, func(context.Context, backend.GrantID, func(backend.Usage)) (backend.Exit, error) {
				return backend.Exit{}, backenderr.New(backenderr.ProviderUnavailable, "cut off")
			})
			g, _, _ := s.ready()
			return g.ID
		},
		"while a driver notices late": func(_ *testing.T, s *site) backend.GrantID {
			script(s.driver, &s.driver.watch, func(ctx context.Context, _ backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
				<-ctx.Done()
				return backend.Exit{}, backenderr.New(backenderr.Unknown, "interrupted")
			})
			g, _, _ := s.ready()
			return g.ID
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := running(t, nil)
				valid := time.Now().Add(time.Hour)
				id := run(t, s)
				time.Sleep(time.Until(valid) + time.Second) //nolint:forbidigo // time in a bubble
				synctest.Wait()
				if at := s.driver.torndown(); len(at) != 1 || at[0].Sub(valid) > time.Millisecond {
					t.Errorf("granted until %s, torn down at %v", valid, at)
				}
				if log := s.final(id); log.Exit.Reason != backend.EndDeadline {
					t.Errorf("ended by %s", log.Exit.Reason)
				}
			})
		})
	}
}

func TestDeadlineThatPassedWhileNoProcessRan(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, _, _ := s.ready()
		s.stop()
		time.Sleep(2 * time.Hour) //nolint:forbidigo // time in a bubble
		s.start()
		s.run()
		if log := s.final(g.ID); log.Exit.Reason != backend.EndDeadline {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
		if s.driver.count("provision") != 0 || s.driver.count("terminate") != 1 {
			t.Errorf("calls: %v", s.driver.all())
		}
	})
}

func TestTeardownNeverGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// Nothing else is to happen in three hours.
		s := running(t, func(c *RuntimeConfig) { c.SweepInterval, c.OrphanAge = 24*time.Hour, 24*time.Hour })
		var down atomic.Bool
		down.Store(true)
		script(s.driver, &s.driver.terminate, func(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
			if down.Load() {
				return nil, backenderr.New(backenderr.ProviderUnavailable, "unreachable")
			}
			return nil, s.driver.gone(ctx, id)
		})
		g, _, _ := s.ready()
		ctx, cancel := context.WithTimeout(as(t, alice), 10*time.Second)
		defer cancel()
		began := time.Now()
		got, err := s.Terminate(ctx, backend.HandleFor(g.ID))
		if err != nil || got.State != backend.StateTerminating {
			t.Errorf("Terminate: %+v, %v", got, err)
		}
		if took := time.Since(began); took != 10*time.Second-answerMargin {
			t.Errorf("answered after %s: too late for the caller, or too early", took)
		}
		time.Sleep(3 * time.Hour) //nolint:forbidigo // time in a bubble
		tries := s.driver.torndown()
		for i := 1; i < len(tries); i++ {
			gap, want := tries[i].Sub(tries[i-1]), min(minBackoff<<min(i-1, 20), maxBackoff)
			if gap < want || gap > want+time.Millisecond {
				t.Fatalf("try %d came %s after the one before, want %s", i, gap, want)
			}
		}
		if len(tries) < 3*60*4-20 {
			t.Errorf("only %d tries in three hours", len(tries))
		}
		instances := s.Instances(as(t, alice))
		if len(instances) != 1 || instances[0].State != backend.StateTerminating || instances[0].Progress == "" {
			t.Errorf("it is shown as %+v", instances)
		}
		down.Store(false)
		if log := s.final(g.ID); log.Exit.Reason != backend.EndTerminated {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
	})
}

func TestWatchIsTakenUpAgainUntilTheEnd(t *testing.T) {
	t.Parallel()
	code := int32(3)
	for name, c := range map[string]struct {
		exit backend.Exit
		err  error
		want backend.EndReason
	}{
		"the workload ended": {backend.Exit{Reason: backend.EndWorkloadExited, Code: &code}, nil, backend.EndWorkloadExited},
		"out of memory":      {backend.Exit{Reason: backend.EndOutOfMemory, Signal: "KILL"}, nil, backend.EndOutOfMemory},
		"rebooted":           {backend.Exit{Reason: backend.EndHostRebooted}, nil, backend.EndHostRebooted},
		"vanished":           {backend.Exit{}, backenderr.New(backenderr.InstanceNotFound, "no such unit"), backend.EndVanished},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := running(t, nil)
				script(s.driver, &s.driver.watch, func(context.Context, backend.GrantID, func(backend.Usage)) (backend.Exit, error) {
					if s.driver.count("watch") < 5 {
						return backend.Exit{}, backenderr.New(backenderr.ProviderUnavailable, "connection lost")
					}
					return c.exit, c.err
				})
				g, _, _ := s.ready()
				log := s.final(g.ID)
				if log.Exit.Reason != c.want || log.Exit.Signal != c.exit.Signal || !cmp.Equal(log.Exit.Code, c.exit.Code) {
					t.Errorf("ended with %+v", log.Exit)
				}
				if s.driver.count("watch") != 5 || s.driver.count("terminate") != 1 {
					t.Errorf("calls: %v", s.driver.all())
				}
			})
		})
	}
}

func TestRestartTakesUpWhatRuns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e, before := s.ready()
		var watched error
		done := make(chan struct{})
		go func() {
			watched = s.WatchUntilExit(as(t, alice), before.Instance.Handle, func(backend.Event) error { return nil })
			close(done)
		}()
		synctest.Wait()
		s.stop()
		<-done
		wantReason(t, watched, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)
		if s.driver.count("terminate") != 0 {
			t.Error("the stop of the process touched the tenant")
		}
		_, err := s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)

		s.start()
		s.run()
		synctest.Wait()
		if s.driver.count("watch") != 1 {
			t.Errorf("nobody watches: %v", s.driver.all())
		}
		after, err := s.Provision(as(t, alice), g, e)
		if err != nil || !cmp.Equal(before, after, cmp.Comparer(redact.Secret.Equal)) {
			t.Errorf("a retry after the restart: %v\n%s", err, cmp.Diff(before, after, cmp.Comparer(redact.Secret.Equal)))
		}
		if s.driver.count("provision") != 0 {
			t.Error("it was made again")
		}
	})
}

func TestRestartGoesOnEnding(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.terminate, func(context.Context, backend.GrantID) (*backend.ComputeLog, error) { return nil, errors.New("no") })
		g, _, _ := s.ready()
		ctx, cancel := context.WithTimeout(as(t, alice), time.Second)
		defer cancel()
		if got, err := s.Terminate(ctx, backend.HandleFor(g.ID)); err != nil || got.State != backend.StateTerminating {
			t.Errorf("Terminate: %+v, %v", got, err)
		}
		s.stop()
		s.start()
		s.run()
		if log := s.final(g.ID); log.Exit.Reason != backend.EndTerminated {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
	})
}

func TestHalfMadeAttemptIsUndoneOnceNobodyComesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			if _, err := s.driver.env.Journal.Begin(ctx, o.Grant.ID, "", nil); err != nil {
				return Ready{}, err
			}
			<-ctx.Done()
			return Ready{}, ctx.Err()
		})
		g, e := grantFor(t, 1)
		call := s.begin(as(t, alice), g, e)
		synctest.Wait()
		s.stop()
		wantReason(t, (<-call).err, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)

		s.start()
		s.run()
		time.Sleep(s.Runtime.config.OrphanAge - s.Runtime.config.SweepInterval) //nolint:forbidigo // time in a bubble
		synctest.Wait()
		if s.driver.count("terminate") != 0 {
			t.Error("undone before a caller could come back")
		}
		time.Sleep(2 * s.Runtime.config.SweepInterval) //nolint:forbidigo // time in a bubble
		synctest.Wait()
		open, err := s.journal.Open(t.Context())
		if s.driver.count("terminate") != 1 || len(open) != 0 || err != nil {
			t.Errorf("not undone: %v, %v", open, err)
		}
		// The grant stays open.
		p, err := s.Provision(as(t, alice), g, e)
		if err != nil || p.Instance.Attempt != 2 {
			t.Errorf("a retry: %+v, %v", p.Instance, err)
		}
	})
}

func TestLedgerOutageEndsNothingAndStartsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		exit := make(chan struct{})
		script(s.driver, &s.driver.watch, func(ctx context.Context, _ backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
			select {
			case <-exit:
				return backend.Exit{Reason: backend.EndWorkloadExited}, nil
			case <-ctx.Done():
				return backend.Exit{}, ctx.Err()
			}
		})
		g, e, _ := s.ready()
		unlock := lockLedger(t, s.path)
		close(exit)
		time.Sleep(10 * time.Minute) //nolint:forbidigo // time in a bubble
		synctest.Wait()
		if s.driver.count("terminate") != 0 {
			t.Error("torn down before the closure is written: a retry could make it again")
		}
		other, otherEnvelope := grantFor(t, 2)
		_, err := s.Provision(as(t, alice), other, otherEnvelope)
		wantReason(t, err, backenderr.LedgerUnavailable, backenderr.CreatedUnknown)
		if s.driver.count("provision") != 1 {
			t.Error("made without a claim")
		}
		unlock()
		if log := s.final(g.ID); log.Exit.Reason != backend.EndWorkloadExited {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
		_, err = s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedNone)
	})
}

func TestUnreadableClaimSaysNothingAboutWhatExists(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e, _ := s.ready()
		ctx, cancel := context.WithCancel(as(t, alice))
		cancel()
		_, err := s.Provision(ctx, g, e)
		wantReason(t, err, backenderr.Cancelled, backenderr.CreatedUnknown)
	})
}
