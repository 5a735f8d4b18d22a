package worker

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// quiet is a runtime that doesn't sweep by itself for the time of a test.
func quiet(t *testing.T) *site {
	t.Helper()
	return running(t, func(c *RuntimeConfig) { c.SweepInterval = 1000 * time.Hour })
}

func (s *site) holds(resources ...backend.Resource) {
	script(s.driver, &s.driver.list, func() (backend.Listing, error) { return backend.Listing{Resources: resources}, nil })
}

func TestWhatShouldNotExist(t *testing.T) {
	t.Parallel()
	id := backend.GrantID{9}
	for name, c := range map[string]struct {
		prepare  func(*testing.T, *site)
		resource func(now time.Time) backend.Resource
		why      string // "" if it stays
	}{
		"runs within its deadline, and this ledger never heard of it": {
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, CreatedAt: now.Add(-time.Hour), ValidTo: now.Add(time.Hour)}
			},
		},
		"runs, and says no deadline": {
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, CreatedAt: now.Add(-time.Hour)}
			},
		},
		"runs past its deadline within grace": {
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, ValidTo: now.Add(-time.Minute)}
			},
		},
		"runs past deadline and grace": {
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, ValidTo: now.Add(-time.Minute - 1)}
			},
			why: "past its deadline",
		},
		"parts of no known attempt": {
			resource: func(now time.Time) backend.Resource { return backend.Resource{CreatedAt: now.Add(-2*time.Minute - 1)} },
			why:      "without a live intent",
		},
		"parts that are young": {
			resource: func(now time.Time) backend.Resource { return backend.Resource{CreatedAt: now.Add(-2 * time.Minute)} },
		},
		"parts of unknown age": {
			resource: func(time.Time) backend.Resource { return backend.Resource{} },
		},
		"parts of an open attempt": {
			prepare: func(t *testing.T, s *site) {
				t.Helper()
				s.attempt(id)
			},
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Attempt: 1, CreatedAt: now.Add(-time.Hour)}
			},
		},
		"parts of another attempt than the open one": {
			prepare: func(t *testing.T, s *site) {
				t.Helper()
				s.attempt(id)
			},
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Attempt: 2, CreatedAt: now.Add(-time.Hour)}
			},
			why: "without a live intent",
		},
		"parts of an attempt that is gone": {
			prepare: func(t *testing.T, s *site) {
				t.Helper()
				s.attempt(id)
				if err := s.journal.Gone(t.Context(), id, 1); err != nil {
					t.Fatal(err)
				}
			},
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Attempt: 1, CreatedAt: now.Add(-time.Hour)}
			},
			why: "without a live intent",
		},
		"runs for a closed grant": {
			prepare: func(t *testing.T, s *site) {
				t.Helper()
				if _, _, err := s.config.Ledger.CloseGrant(t.Context(), ledger.Closure{RequestID: ledger.RequestID(id), Reason: "TERMINATED"}); err != nil {
					t.Fatal(err)
				}
			},
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, ValidTo: now.Add(time.Hour)}
			},
			why: "closed: TERMINATED",
		},
		"runs for an ended grant": {
			prepare: func(t *testing.T, s *site) {
				t.Helper()
				signed, err := s.keys.signer.sign(backend.ComputeLog{GrantID: id, Final: true, EndedAt: time.Now()})
				if err != nil {
					t.Fatal(err)
				}
				body, err := marshalSigned(signed)
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := s.config.Ledger.PutFinal(t.Context(), ledger.Log{RequestID: ledger.RequestID(id), Sequence: 2, Body: body, KeyID: signed.KeyID}); err != nil {
					t.Fatal(err)
				}
			},
			resource: func(now time.Time) backend.Resource {
				return backend.Resource{Running: true, ValidTo: now.Add(time.Hour)}
			},
			why: "the grant ended at",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := quiet(t)
				if c.prepare != nil {
					c.prepare(t, s)
				}
				resource := c.resource(time.Now())
				resource.GrantID = id
				s.holds(resource)
				// The first look never deletes, nor does a dry run, which
				// doesn't count as a look either.
				for i, dryRun := range []bool{false, true, true, false} {
					got, err := s.Sweep(t.Context(), dryRun)
					if err != nil {
						t.Fatal(err)
					}
					if c.why == "" {
						if len(got) != 0 {
							t.Errorf("found %+v", got)
						}
						continue
					}
					if len(got) != 1 || !strings.Contains(got[0].Why, c.why) {
						t.Fatalf("found %+v, want %q", got, c.why)
					}
					if deleted := i == 3; got[0].Deleted != deleted || got[0].Err != nil {
						t.Errorf("look %d: deleted %t, %v", i, got[0].Deleted, got[0].Err)
					}
				}
				want := 0
				if c.why != "" {
					want = 1
				}
				if n := s.driver.count("terminate"); n != want {
					t.Errorf("torn down %d times, want %d", n, want)
				}
			})
		})
	}
}

// attempt begins an attempt of a grant with a claim.
func (s *site) attempt(id backend.GrantID) {
	s.t.Helper()
	g, e := grantFor(s.t, 0)
	g.ID = id
	if _, err := s.claimed(as(s.t, alice), alice, g, e); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.journal.Begin(s.t.Context(), id, "", nil); err != nil {
		s.t.Fatal(err)
	}
}

func TestDryRunsAreNoSighting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		s.holds(backend.Resource{GrantID: backend.GrantID{9}, Running: true, ValidTo: time.Now().Add(-time.Hour)})
		for range 3 {
			if _, err := s.Sweep(t.Context(), true); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := s.Sweep(t.Context(), false); err != nil || got[0].Deleted {
			t.Errorf("deleted at first sight: %+v, %v", got, err)
		}
		// Not there for one look, then again: that is a first sight.
		s.holds()
		if _, err := s.Sweep(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		s.holds(backend.Resource{GrantID: backend.GrantID{9}, Running: true, ValidTo: time.Now().Add(-time.Hour)})
		if got, err := s.Sweep(t.Context(), false); err != nil || got[0].Deleted {
			t.Errorf("deleted at first sight: %+v, %v", got, err)
		}
	})
}

func TestBlindSweepTouchesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		script(s.driver, &s.driver.list, func() (backend.Listing, error) {
			return backend.Listing{Resources: []backend.Resource{{GrantID: backend.GrantID{9}, Running: true, ValidTo: time.Now().Add(-time.Hour)}}},
				backenderr.New(backenderr.ProviderUnavailable, "one host is silent")
		})
		for range 3 {
			if got, err := s.Sweep(t.Context(), false); !backenderr.Is(err, backenderr.ProviderUnavailable) || got != nil {
				t.Errorf("got %v, %v", got, err)
			}
		}
		if s.driver.count("terminate") != 0 {
			t.Error("it deleted while blind")
		}
	})
}

func TestSweepLeavesLiveGrantsAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		g, _, _ := s.ready()
		stray := backend.GrantID{9}
		past := time.Now().Add(-time.Hour)
		s.holds(
			backend.Resource{GrantID: g.ID, Attempt: 1, Running: true, ValidTo: past}, // its keeper knows better
			backend.Resource{GrantID: stray, Attempt: 1, Running: true, ValidTo: past},
		)
		var torn []backend.GrantID
		script(s.driver, &s.driver.terminate, func(_ context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
			torn = append(torn, id)
			return nil, nil
		})
		for range 2 {
			if _, err := s.Sweep(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
		if len(torn) != 1 || torn[0] != stray {
			t.Errorf("torn down: %v", torn)
		}
	})
}

func TestFailedRemovalIsReportedAndTriedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		down := errors.New("host is down")
		script(s.driver, &s.driver.terminate, func(context.Context, backend.GrantID) (*backend.ComputeLog, error) { return nil, down })
		s.holds(backend.Resource{GrantID: backend.GrantID{9}, Running: true, ValidTo: time.Now().Add(-time.Hour)})
		for i := range 3 {
			got, err := s.Sweep(t.Context(), false)
			if err != nil || len(got) != 1 || got[0].Deleted || (i > 0) != errors.Is(got[0].Err, down) {
				t.Errorf("look %d: %+v, %v", i, got, err)
			}
		}
	})
}

func TestHangingRemovalDoesNotHoldUpTheSweep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		hangs, other := backend.GrantID{8}, backend.GrantID{9}
		past := time.Now().Add(-time.Hour)
		s.holds(
			backend.Resource{GrantID: hangs, Running: true, ValidTo: past},
			backend.Resource{GrantID: other, Running: true, ValidTo: past},
		)
		torn := make(chan backend.GrantID, 100)
		script(s.driver, &s.driver.terminate, func(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
			if id == hangs {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			torn <- id
			return nil, nil
		})
		select {
		case <-torn:
		case <-time.After(time.Hour):
			t.Error("one host that is silent keeps the sweep from the others")
		}
	})
}

func TestSweepEndsAClosedGrantTheUsualWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := quiet(t)
		id := backend.GrantID{9}
		s.attempt(id)
		if _, _, err := s.config.Ledger.CloseGrant(t.Context(), ledger.Closure{RequestID: ledger.RequestID(id), Reason: "DEADLINE"}); err != nil {
			t.Fatal(err)
		}
		s.holds(backend.Resource{GrantID: id, Attempt: 1, Running: true})
		for range 2 {
			if _, err := s.Sweep(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
		if log := s.final(id); log.Exit.Reason != backend.EndDeadline {
			t.Errorf("ended by %s", log.Exit.Reason)
		}
	})
}

func TestSettleFindsClosedGrantsWithoutAKeeper(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		id := backend.GrantID{9}
		s.attempt(id)
		if _, _, err := s.config.Ledger.CloseGrant(t.Context(), ledger.Closure{RequestID: ledger.RequestID(id), Reason: "TERMINATED", By: "another process"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * s.Runtime.config.SweepInterval) //nolint:forbidigo // time in a bubble
		synctest.Wait()
		log, err := s.ComputeLog(as(t, root), id)
		if err != nil || log == nil || !log.Log.Final || log.Log.Exit.Reason != backend.EndTerminated {
			t.Errorf("got %+v, %v", log, err)
		}
	})
}
