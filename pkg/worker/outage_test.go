package worker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
)

// watched lets a test put faults between a runtime and its ledger. Each start of
// the runtime is another life of the process.
type watched struct {
	points *ledgertest.Points
	real   *ledger.Ledger
	life   *ledgertest.Ledger
}

func watchLedger(t *testing.T) (*watched, func(*RuntimeConfig)) {
	t.Helper()
	w := &watched{points: new(ledgertest.Points)}
	return w, func(c *RuntimeConfig) {
		l, ok := c.Ledger.(*ledger.Ledger)
		if !ok {
			t.Fatal("the ledger is watched already")
		}
		w.real = l
		c.Ledger = w.next()
	}
}

func (w *watched) next() Ledger {
	w.life = ledgertest.New(w.real, w.points)
	return w.life
}

// exits is a driver's script: the workload ends with code 3 when exit is closed,
// and the provider knows how long it ran until it is gone.
func exits(d *scripted, exit <-chan struct{}) {
	code := int32(3)
	script(d, &d.watch, func(ctx context.Context, _ backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
		select {
		case <-exit:
			return backend.Exit{Reason: backend.EndWorkloadExited, Code: &code}, nil
		case <-ctx.Done():
			return backend.Exit{}, ctx.Err()
		}
	})
	script(d, &d.terminate, func(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
		return &backend.ComputeLog{
			InstanceID: "i-1", Attempt: 1, Exit: backend.Exit{Reason: backend.EndWorkloadExited, Code: &code},
			Usage: backend.Usage{CPU: &backend.Measurement{Value: 42, Source: backend.UsageHostMeasured}},
		}, d.gone(ctx, id)
	})
}

func wantWholeLog(t *testing.T, log backend.ComputeLog) {
	t.Helper()
	if log.Exit.Reason != backend.EndWorkloadExited || log.Exit.Code == nil || *log.Exit.Code != 3 || log.Usage.CPU == nil || log.Usage.CPU.Value != 42 {
		t.Errorf("the log says %s, code %v, CPU %v", log.Exit.Reason, log.Exit.Code, log.Usage.CPU)
	}
}

// Whatever happens to the ledger while a grant ends, its log is written as soon
// as the ledger takes it, with all that was measured.
func TestAFinalLogIsNeverLost(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"ledger.CloseGrant", "ledger.MarkGone", "ledger.PutFinal"} {
		for _, kind := range ledgertest.Kinds() {
			t.Run(string(kind)+"/"+point, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w, change := watchLedger(t)
					s := running(t, change)
					exit := make(chan struct{})
					exits(s.driver, exit)
					g, _, _ := s.ready()
					other, otherEnvelope := grantFor(t, 2)
					if _, err := s.Provision(as(t, alice), other, otherEnvelope); err != nil {
						t.Fatal(err)
					}
					fault := w.points.Inject(ledgertest.Fault{Point: point, RequestID: ledger.RequestID(g.ID), Kind: kind, Always: true})
					close(exit)
					time.Sleep(time.Hour / 2) //nolint:forbidigo // time in a bubble
					synctest.Wait()
					select {
					case <-fault.Reached():
					default:
						t.Fatal("the ledger was never asked")
					}
					// The other grant is none the worse, unless all is dead.
					crashed := kind == ledgertest.CrashBefore || kind == ledgertest.CrashAfter
					if !crashed {
						wantWholeLog(t, s.final(other.ID))
					}
					stored, err := w.real.Log(t.Context(), ledger.RequestID(g.ID))
					effect := point == "ledger.PutFinal" && (kind == ledgertest.LoseAnswer || kind == ledgertest.CrashAfter)
					if effect != (err == nil && stored.Final) {
						t.Errorf("while it fails, the log in the ledger is %v, %v", stored.Final, err)
					}
					fault.Release()
					if crashed {
						s.stop()
						s.config.Ledger = w.next()
						s.start()
						exits(s.driver, exit)
						s.run()
						wantWholeLog(t, s.final(other.ID))
					}
					wantWholeLog(t, s.final(g.ID))
					stored, err = w.real.Log(t.Context(), ledger.RequestID(g.ID))
					if err != nil || !stored.Final {
						t.Errorf("the log in the ledger is %v, %v", stored.Final, err)
					}
					attempts, err := w.real.Attempts(t.Context(), ledger.RequestID(g.ID))
					if err != nil || len(attempts) != 1 || attempts[0].Open {
						t.Errorf("attempts: %+v, %v", attempts, err)
					}
				})
			})
		}
	}
}

// While the ledger can't be reached at all, nothing begins, what runs is watched,
// and what ends meanwhile is written down afterwards.
func TestWatchingGoesOnWithoutALedger(t *testing.T) {
	t.Parallel()
	for _, kind := range []ledgertest.Kind{ledgertest.Refuse, ledgertest.Slow} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, change := watchLedger(t)
				s := running(t, change)
				measure, exit := make(chan int64), make(chan struct{})
				exits(s.driver, exit)
				ends := s.driver.watch
				script(s.driver, &s.driver.watch, func(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
					if id != (backend.GrantID{1}) { // the others run
						<-ctx.Done()
						return backend.Exit{}, ctx.Err()
					}
					for {
						select {
						case n := <-measure:
							usage(backend.Usage{CPU: &backend.Measurement{Value: n, Source: backend.UsageHostMeasured}})
						case <-exit:
							return ends(ctx, id, usage)
						case <-ctx.Done():
							return backend.Exit{}, ctx.Err()
						}
					}
				})
				g, _, p := s.ready()
				seen := make(chan int64, 10)
				over := make(chan error, 1)
				go func() {
					over <- s.WatchUntilExit(as(t, alice), p.Instance.Handle, func(e backend.Event) error {
						if e.Usage != nil && e.Usage.Log.Usage.CPU != nil {
							seen <- e.Usage.Log.Usage.CPU.Value
						}
						return nil
					})
				}()
				synctest.Wait()
				outage := w.points.Inject(ledgertest.Fault{Kind: kind, Always: true})
				for n := range int64(3) {
					measure <- n + 1
					if got := <-seen; got != n+1 {
						t.Errorf("usage %d, want %d", got, n+1)
					}
				}
				other, envelope := grantFor(t, 2)
				ctx, cancel := context.WithTimeout(as(t, alice), time.Minute)
				defer cancel()
				_, err := s.Provision(ctx, other, envelope)
				want := backenderr.LedgerUnavailable
				if kind == ledgertest.Slow {
					want = backenderr.DeadlineExceeded
				}
				wantReason(t, err, want, backenderr.CreatedUnknown)
				if n := s.driver.count("provision"); n != 1 {
					t.Errorf("%d were made", n)
				}
				close(exit)
				time.Sleep(time.Minute) //nolint:forbidigo // time in a bubble
				outage.Release()
				if err := <-over; err != nil {
					t.Errorf("the watch ended with %v", err)
				}
				wantWholeLog(t, s.final(g.ID))
				if _, err := s.Provision(as(t, alice), other, envelope); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

// The same with a real server that is stopped, killed and started again under a
// runtime: nobody has to do anything.
func TestAPostgresMayRestartUnderAWorker(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{})
	l, err := ledger.Open(t.Context(), ledger.Config{Driver: ledger.DriverPostgres, DSN: server.Database(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	s := newSite(t, func(c *RuntimeConfig) {
		sqlite, ok := c.Ledger.(*ledger.Ledger)
		if !ok {
			t.Fatal("no ledger")
		}
		t.Cleanup(func() { _ = sqlite.Close() })
		c.Ledger, c.SweepInterval = l, 50*time.Millisecond
	})
	defer s.stop()
	exit := map[backend.GrantID]chan struct{}{}
	for n := byte(1); n <= 4; n++ {
		exit[backend.GrantID{n}] = make(chan struct{})
	}
	exits(s.driver, nil)
	code := int32(3)
	script(s.driver, &s.driver.watch, func(ctx context.Context, id backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
		select {
		case <-exit[id]:
			return backend.Exit{Reason: backend.EndWorkloadExited, Code: &code}, nil
		case <-ctx.Done():
			return backend.Exit{}, ctx.Err()
		}
	})
	s.run()
	provision := func(n byte) error {
		g, e := grantFor(t, n)
		_, err := s.Provision(as(t, alice), g, e)
		return err
	}
	for n, end := range map[byte]func(testing.TB){1: server.Stop, 3: server.Kill} {
		if err := errors.Join(provision(n), provision(n+1)); err != nil {
			t.Fatal(err)
		}
		end(t)
		close(exit[backend.GrantID{n}])
		wantReason(t, provision(n+10), backenderr.LedgerUnavailable, backenderr.CreatedUnknown)
		server.Start(t)
		wantWholeLog(t, s.final(backend.GrantID{n}))
		close(exit[backend.GrantID{n + 1}])
		wantWholeLog(t, s.final(backend.GrantID{n + 1}))
		if err := provision(n + 10); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	if made := s.driver.count("provision"); made != 6 {
		t.Errorf("%d were made, want 6", made)
	}
}
