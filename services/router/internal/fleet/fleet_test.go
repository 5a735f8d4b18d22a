package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFirstMatchInOrderGetsTheGrant(t *testing.T) {
	b := newBridge(t, "a", "b", "c")
	b.fakes[0].no = "no such region"
	grant, envelope := grantOf(1)
	p, err := b.Provision(as(t.Context(), "alice"), grant, envelope)
	wantOn(t, p, err, "b")
	if got := b.fakes[0].did("Provision") + b.fakes[2].did("Provision"); got != 0 {
		t.Errorf("%d Provision calls reached other backends", got)
	}
	claim, err := b.claims.Get(t.Context(), grant.ID)
	want := fleet.Claim{Generation: 1, GrantID: grant.ID, Backend: "b", Owner: "alice", Content: fleet.Content(grant, envelope), ValidTo: grant.ValidTo}
	if diff := cmp.Diff(want, claim); diff != "" || err != nil {
		t.Errorf("claim (-want +got):\n%s\n%v", diff, err)
	}
}

// row says what the fleet does when the first of two backends fails for good
// with a reason.
type row struct {
	reason backenderr.Reason
	// asked is how often the first backend is asked, with created=none and
	// created=unknown.
	asked, askedUnknown int
	// moves says that the second backend gets the grant, with created=none;
	// movesUnknown: with created=unknown, after Terminate.
	moves, movesUnknown bool
	// health of the first backend afterwards.
	health fleet.Health
	// inherited is what becomes of a claim that an earlier call made, with
	// created=none.
	inherited fate
}

// fate is what becomes of an inherited claim.
type fate int

const (
	// stays: the error is answered as it is.
	stays fate = iota
	// doubted: the backend hasn't looked at the grant, so the error is answered
	// with created=unknown.
	doubted
	// moved: the second backend gets the grant.
	moved
)

var errorTable = []row{
	{backenderr.GrantInvalid, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.ImageMismatch, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.GrantConflict, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.GrantEnded, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.GrantNotSatisfiable, 1, 3, true, true, fleet.Serving, moved},
	{backenderr.CapacityExhausted, 1, 3, true, true, fleet.Serving, moved},
	{backenderr.QuotaExceeded, 1, 3, true, true, fleet.Serving, moved},
	{backenderr.WorkerFull, 1, 3, true, true, fleet.Serving, moved},
	{backenderr.ProviderDenied, 1, 3, true, true, fleet.Degraded, moved},
	{backenderr.ProviderUnauthenticated, 1, 3, true, true, fleet.Degraded, moved},
	{backenderr.ClockSkew, 1, 3, true, true, fleet.Degraded, moved},
	{backenderr.HostUnfit, 1, 3, true, true, fleet.Degraded, moved},
	{backenderr.CallerUnauthenticated, 1, 3, true, true, fleet.Degraded, doubted},
	{backenderr.ProviderUnavailable, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.LedgerUnavailable, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.BackendUnreachable, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.OtherReplica, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.Unknown, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.Cancelled, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.DeadlineExceeded, 3, 3, true, true, fleet.Serving, doubted},
	{backenderr.ImageUnavailable, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.ImageHashMismatch, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.ImageInvalid, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.AttestationFailed, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.BootTimeout, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.WorkloadFailed, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.OperationInProgress, 30, 30, false, false, fleet.Serving, stays},
	{backenderr.InstanceNotFound, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.RequestInvalid, 1, 1, false, false, fleet.Serving, doubted},
	{backenderr.CallerDenied, 1, 1, false, false, fleet.Serving, doubted},
	{backenderr.HopLimitExceeded, 1, 1, false, false, fleet.Serving, doubted},
	{backenderr.Internal, 1, 1, false, false, fleet.Serving, stays},
	{backenderr.Unimplemented, 1, 1, false, false, fleet.Serving, doubted},
}

func TestErrorTableHasARowForEveryReason(t *testing.T) {
	rows := map[string]bool{}
	for _, r := range errorTable {
		rows["ERROR_REASON_"+string(r.reason)] = true
	}
	for name, value := range bridgev1.ErrorReason_value {
		if value != 0 && !rows[name] {
			t.Errorf("no row for %s", name)
		}
	}
}

func TestEveryRowOfTheErrorTable(t *testing.T) {
	for _, r := range errorTable {
		for _, created := range []backenderr.Created{backenderr.CreatedNone, backenderr.CreatedUnknown} {
			for _, strict := range []bool{false, true} {
				asked, moves, terminated := r.asked, r.moves && !strict, 0
				// A refusal at the door is recorded nowhere; see certain.
				if moves && r.reason == backenderr.CallerUnauthenticated {
					terminated = 1
				}
				if created == backenderr.CreatedUnknown {
					asked, moves = r.askedUnknown, r.movesUnknown && !strict
					if moves {
						terminated = 1
					}
				}
				t.Run(fmt.Sprintf("%s/%s/strict=%t", r.reason, created, strict), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						b := newBridge(t, "a", "b")
						b.Fleet = b.router(t, strict)
						o := fails(r.reason, created)
						o.made = created == backenderr.CreatedUnknown
						b.fakes[0].always = &o
						grant, envelope := grantOf(1)
						p, err := b.Provision(as(t.Context(), "alice"), grant, envelope)
						holder := "a"
						if moves {
							holder = "b"
							wantOn(t, p, err, "b")
						} else {
							wantReason(t, err, r.reason, created)
							if e := backenderr.From(err); e.Metadata[backenderr.MetaBackend] != "a" || !strings.HasPrefix(err.Error(), "backend a: ") {
								t.Errorf("error %q with metadata %v does not name its backend", err, e.Metadata)
							}
						}
						if got := b.fakes[0].did("Provision"); got != asked {
							t.Errorf("the first backend was asked %d times, want %d", got, asked)
						}
						if got := b.fakes[0].did("Terminate " + string(backend.HandleFor(grant.ID))); got != terminated {
							t.Errorf("the first backend got %d Terminate calls, want %d", got, terminated)
						}
						if got := b.claims.backend(grant.ID); got != holder {
							t.Errorf("the claim is with %q, want %q", got, holder)
						}
						if got := b.world.atOnce[grant.ID]; got > 1 {
							t.Errorf("%d instances at once", got)
						}
						if got := b.Status()[0].Health; got != r.health {
							t.Errorf("health is %d, want %d", got, r.health)
						}
					})
				})
			}
		}
	}
}

func TestEveryRowOfTheErrorTableForAnInheritedClaim(t *testing.T) {
	for _, r := range errorTable {
		for _, created := range []backenderr.Created{backenderr.CreatedNone, backenderr.CreatedUnknown} {
			t.Run(fmt.Sprintf("%s/%s", r.reason, created), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := newBridge(t, "a", "b")
					grant, envelope := grantOf(1)
					ctx := as(t.Context(), "alice")
					claim := fleet.Claim{GrantID: grant.ID, Backend: "a", Owner: "alice", Content: fleet.Content(grant, envelope)}
					if _, _, err := b.claims.Put(ctx, claim, 0); err != nil {
						t.Fatal(err)
					}
					o := fails(r.reason, created)
					b.fakes[0].always = &o
					p, err := b.Provision(ctx, grant, envelope)
					holder := "a"
					switch {
					case created == backenderr.CreatedNone && r.inherited == moved:
						holder = "b"
						wantOn(t, p, err, "b")
					case r.inherited == doubted:
						wantReason(t, err, r.reason, backenderr.CreatedUnknown)
					default:
						wantReason(t, err, r.reason, created)
					}
					if got := b.claims.backend(grant.ID); got != holder {
						t.Errorf("the claim is with %q, want %q", got, holder)
					}
					if got := b.fakes[0].did("Terminate " + grant.ID.String()); got != 0 {
						t.Errorf("another call's attempt got %d Terminate calls", got)
					}
				})
			})
		}
	}
}

func TestAGrantThatRunsStaysWhenItsBackendNoLongerKnowsTheRouter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		grant, envelope := grantOf(1)
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
		stranger := fails(backenderr.CallerUnauthenticated, backenderr.CreatedNone)
		b.fakes[0].set(func() { b.fakes[0].always = &stranger })
		_, err = b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.CallerUnauthenticated, backenderr.CreatedUnknown)
		if b.claims.backend(grant.ID) != "a" || b.world.running[grant.ID] != 1 || b.fakes[1].did("Provision") != 0 {
			t.Error("the grant was given to another backend while it runs")
		}
	})
}

func TestAForeignErrorLeavesTheOutcomeInDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		b.fakes[0].script = []outcome{{err: errTransport, made: true}}
		grant, envelope := grantOf(1)
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
		if got := b.world.atOnce[grant.ID]; got != 1 || b.fakes[0].did("Provision") != 2 {
			t.Errorf("%d instances after %d calls", got, b.fakes[0].did("Provision"))
		}
	})
}

func TestABackendThatCanNotSeeDoesNotClearUpADoubt(t *testing.T) {
	for _, r := range errorTable {
		if r.inherited != doubted {
			continue
		}
		t.Run(string(r.reason), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBridge(t, "a", "b")
				blind := fails(r.reason, backenderr.CreatedNone)
				b.fakes[0].script, b.fakes[0].always, b.fakes[0].endErr = []outcome{{err: errTransport, made: true}}, &blind, errTransport
				grant, envelope := grantOf(1)
				_, err := b.Provision(t.Context(), grant, envelope)
				wantReason(t, err, r.reason, backenderr.CreatedUnknown)
				if b.fakes[1].did("Provision") != 0 {
					t.Error("another backend got the grant")
				}
			})
		})
	}
}

// A router may die, or lose its ledger or its patience, between ending an
// unclear attempt and giving the grant to the next backend.
func TestAnUnfinishedMoveIsFinishedByTheNextCall(t *testing.T) {
	unclear := outcome{err: errTransport, made: true}
	for name, c := range map[string]struct {
		cut, mend func(*bridge)
		reason    backenderr.Reason
	}{
		"before the move is stored": {
			func(b *bridge) { b.claims.beforeMove = func() { b.claims.fail = errors.New("killed") } },
			func(b *bridge) { b.claims.beforeMove, b.claims.fail = nil, nil },
			backenderr.LedgerUnavailable,
		},
		"before the end is confirmed": {
			func(b *bridge) { b.fakes[0].ending = 1 << 30 },
			func(b *bridge) { b.fakes[0].ending = 1 },
			backenderr.Unknown,
		},
		"before the end": {
			func(b *bridge) { b.fakes[0].endErr = errTransport },
			func(b *bridge) { b.fakes[0].endErr = nil },
			backenderr.Unknown,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBridge(t, "a", "b")
				b.fakes[0].script = []outcome{unclear, unclear, unclear}
				c.cut(b)
				grant, envelope := grantOf(1)
				_, err := b.Provision(t.Context(), grant, envelope)
				wantReason(t, err, c.reason, backenderr.CreatedUnknown)
				c.mend(b)
				restarted := b.router(t, false)
				p, err := restarted.Provision(t.Context(), grant, envelope)
				wantOn(t, p, err, "b")
				p, err = restarted.Provision(t.Context(), grant, envelope)
				wantOn(t, p, err, "b")
				if b.world.atOnce[grant.ID] != 1 || b.claims.backend(grant.ID) != "b" {
					t.Errorf("%d instances at once, the claim is with %q", b.world.atOnce[grant.ID], b.claims.backend(grant.ID))
				}
			})
		})
	}
}

func TestAnUnfinishedMoveWaitsForTheBackendThatItLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		b.fakes[0].always, b.fakes[0].endErr = &outcome{err: errTransport, made: true}, errTransport
		grant, envelope := grantOf(1)
		for range 2 {
			_, err := b.Provision(t.Context(), grant, envelope)
			wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
		}
		if b.fakes[1].did("Provision") != 0 || b.claims.backend(grant.ID) != "a" {
			t.Error("the grant moved on without confirmation")
		}
		// Nobody else takes it now: what is confirmed is that nothing exists.
		b.fakes[0].endErr, b.fakes[1].no = nil, "no such region"
		_, err := b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.GrantNotSatisfiable, backenderr.CreatedNone)
		// Its owner may still end it.
		term, err := b.Terminate(t.Context(), backend.HandleFor(grant.ID))
		if err != nil || term.State != backend.StateTerminated {
			t.Errorf("Terminate answers %+v, %v", term, err)
		}
		_, err = b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedUnknown)
	})
}

// The second router joins the attempt that the first one gives up.
func TestALateSuccessAtABackendThatIsBeingLeftIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		second := b.router(t, false)
		grant, envelope := grantOf(1)
		unclear := outcome{err: errTransport}
		first, late := make(chan struct{}), make(chan struct{})
		b.fakes[0].script = []outcome{unclear, unclear, {err: errTransport, wait: first}, {wait: late}}
		b.fakes[0].endErr = errTransport
		type result struct {
			p   backend.Provisioned
			err error
		}
		gaveUp, joined := make(chan error, 1), make(chan result, 1)
		go func() {
			_, err := b.Provision(t.Context(), grant, envelope)
			gaveUp <- err
		}()
		<-time.After(time.Minute) // The third call waits.
		go func() {
			p, err := second.Provision(t.Context(), grant, envelope)
			joined <- result{p, err}
		}()
		synctest.Wait()
		close(first)
		wantReason(t, <-gaveUp, backenderr.Unknown, backenderr.CreatedUnknown)
		b.fakes[0].set(func() { b.fakes[0].endErr = nil })
		close(late)
		r := <-joined
		wantOn(t, r.p, r.err, "b")
		if b.world.running[grant.ID] != 1 || b.world.atOnce[grant.ID] != 1 {
			t.Errorf("%d instances are left, %d at once", b.world.running[grant.ID], b.world.atOnce[grant.ID])
		}
	})
}

func TestAnUnclearOutcomeIsKeptUntilTerminateIsConfirmed(t *testing.T) {
	unclear := outcome{err: errTransport, made: true}
	t.Run("confirmed after a while", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBridge(t, "a", "b")
			b.fakes[0].always, b.fakes[0].ending = &unclear, 3
			grant, envelope := grantOf(1)
			p, err := b.Provision(t.Context(), grant, envelope)
			wantOn(t, p, err, "b")
			if got := b.world.atOnce[grant.ID]; got != 1 {
				t.Errorf("%d instances at once", got)
			}
		})
	})
	t.Run("not confirmed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBridge(t, "a", "b")
			b.fakes[0].always, b.fakes[0].endErr = &unclear, errTransport
			grant, envelope := grantOf(1)
			_, err := b.Provision(t.Context(), grant, envelope)
			wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
			if b.fakes[1].did("Provision") != 0 || b.claims.backend(grant.ID) != "a" {
				t.Error("the grant moved on without confirmation")
			}
		})
	})
	t.Run("terminating for ever", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBridge(t, "a", "b")
			b.fakes[0].always, b.fakes[0].ending = &unclear, 1<<30
			grant, envelope := grantOf(1)
			_, err := b.Provision(t.Context(), grant, envelope)
			wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
			if b.fakes[1].did("Provision") != 0 {
				t.Error("the grant moved on without confirmation")
			}
		})
	})
	t.Run("nowhere else to go", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBridge(t, "a")
			b.fakes[0].always = &unclear
			grant, envelope := grantOf(1)
			_, err := b.Provision(t.Context(), grant, envelope)
			wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
			if b.fakes[0].did("Terminate "+grant.ID.String()) != 0 {
				t.Error("a grant was ended for nothing")
			}
		})
	})
}

func TestARunningGrantIsNotEndedBecauseItsBackendIsInTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		grant, envelope := grantOf(1)
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
		// A worker whose ledger is away can't know of its instances, and may
		// still say, of this call, that it created none.
		for _, created := range []backenderr.Created{backenderr.CreatedUnknown, backenderr.CreatedNone} {
			o := fails(backenderr.LedgerUnavailable, created)
			b.fakes[0].set(func() { b.fakes[0].always = &o })
			_, err = b.Provision(t.Context(), grant, envelope)
			wantReason(t, err, backenderr.LedgerUnavailable, backenderr.CreatedUnknown)
		}
		if b.world.running[grant.ID] != 1 || b.fakes[1].did("Provision") != 0 {
			t.Error("the running instance was given up")
		}
	})
}

func TestAnUnreachableClaimedBackendMeansWaitAndNeverTheNextOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		grant, envelope := grantOf(1)
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
		o := outcome{err: backenderr.New(backenderr.BackendUnreachable, "connection refused")}
		b.fakes[0].set(func() { b.fakes[0].always = &o; b.fakes[0].observed.LastError = "connection refused" })
		_, err = b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.BackendUnreachable, backenderr.CreatedUnknown)
		if b.fakes[1].did("Provision")+b.fakes[1].did("CanSatisfy") != 1 {
			t.Error("another backend was turned to")
		}
		b.fakes[0].set(func() { b.fakes[0].always = nil })
		p, err = b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
	})
}

func TestAClaimOfABackendThatIsNotConfiguredIsNotGivenToAnother(t *testing.T) {
	b := newBridge(t, "a", "b")
	grant, envelope := grantOf(1)
	if _, err := b.Provision(t.Context(), grant, envelope); err != nil {
		t.Fatal(err)
	}
	b.fakes = b.fakes[1:]
	rest := b.router(t, false)
	_, err := rest.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.BackendUnreachable, backenderr.CreatedUnknown)
	_, err = rest.Terminate(t.Context(), backend.HandleFor(grant.ID))
	wantReason(t, err, backenderr.BackendUnreachable, backenderr.CreatedUnknown)
	_, err = rest.Terminate(t.Context(), backend.HandleFor(grant.ID).Via("a"))
	wantReason(t, err, backenderr.InstanceNotFound, backenderr.CreatedNone)
}

func TestEveryBackendsReasonIsListedWhenNoneSatisfies(t *testing.T) {
	b := newBridge(t, "a", "b")
	b.fakes[0].no, b.fakes[1].no = "no TDX here", "largest machine has 2 cores"
	grant, envelope := grantOf(1)
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantNotSatisfiable, backenderr.CreatedNone)
	want := "no backend takes the grant: backend a: no TDX here; backend b: largest machine has 2 cores"
	if err.Error() != want {
		t.Errorf("message is %q, want %q", err, want)
	}
	metadata := map[string]string{"reason-a": "GRANT_NOT_SATISFIABLE: no TDX here", "reason-b": "GRANT_NOT_SATISFIABLE: largest machine has 2 cores"}
	if diff := cmp.Diff(metadata, backenderr.From(err).Metadata); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	if b.claims.backend(grant.ID) != "" {
		t.Error("a grant that nobody takes was claimed")
	}
	s, err := b.CanSatisfy(t.Context(), grant)
	if err != nil || s.Satisfiable || s.Reason != want {
		t.Errorf("CanSatisfy answers %+v, %v", s, err)
	}
}

func TestTheMostHopefulReasonIsAnsweredWhenAllRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b", "c")
		b.fakes[0].no = "no TDX here"
		full := outcome{err: backenderr.New(backenderr.CapacityExhausted, "no room").WithCreated(backenderr.CreatedNone).WithRetryAfter(time.Minute)}
		denied := fails(backenderr.ProviderDenied, backenderr.CreatedNone)
		b.fakes[1].always, b.fakes[2].always = &full, &denied
		grant, envelope := grantOf(1)
		_, err := b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		if e := backenderr.From(err); e.RetryAfter != time.Minute || len(e.Metadata) != 3 {
			t.Errorf("retry after %s, metadata %v", e.RetryAfter, e.Metadata)
		}
	})
}

func TestAGrantThatEverybodyRefusedIsTriedEverywhereAgain(t *testing.T) {
	b := newBridge(t, "a", "b")
	full := fails(backenderr.CapacityExhausted, backenderr.CreatedNone)
	b.fakes[0].script, b.fakes[1].script = []outcome{full}, []outcome{full, full}
	grant, envelope := grantOf(1)
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone)
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "a")
}

func TestABackendThatARouterGaveUpDoesNotEndTheGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b", "c")
		unclear, full := outcome{err: errTransport, made: true}, fails(backenderr.CapacityExhausted, backenderr.CreatedNone)
		b.fakes[0].script = []outcome{unclear, unclear, unclear}
		b.fakes[1].script, b.fakes[2].script = []outcome{full}, []outcome{full, full}
		grant, envelope := grantOf(1)
		_, err := b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		// c has the claim and is full; a was ended by the router; b has room now.
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "b")
	})
}

func TestAHungBackendDelaysNobodyForLongAndIsSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b", "c")
		never := make(chan struct{})
		hang := func(context.Context) (backend.Satisfaction, error) { <-never; return backend.Satisfaction{}, nil }
		b.fakes[0].satisfy, b.fakes[1].satisfy = hang, hang
		grant, envelope := grantOf(1)
		start := time.Now()
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "c")
		if took := time.Since(start); took != answerTimeout {
			t.Errorf("two hung backends cost %s, want their common limit of %s", took, answerTimeout)
		}
		// Once the watch over the backend has seen it, it costs nothing.
		for _, f := range b.fakes[:2] {
			f.set(func() { f.observed.LastError = "no answer" })
		}
		start = time.Now()
		grant, envelope = grantOf(2)
		p, err = b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "c")
		if took := time.Since(start); took != 0 {
			t.Errorf("backends known to hang cost %s", took)
		}
		close(never)
	})
}

func TestUnreachableIsNotUnsatisfiable(t *testing.T) {
	b := newBridge(t, "a", "b")
	b.fakes[0].observed.LastError = "connection refused"
	b.fakes[1].no = "too big"
	grant, envelope := grantOf(1)
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.BackendUnreachable, backenderr.CreatedNone)
	_, err = b.CanSatisfy(t.Context(), grant)
	wantReason(t, err, backenderr.BackendUnreachable, backenderr.CreatedNone)
}

func TestADrainingBackendGetsNothingNewAndKeepsWhatItHas(t *testing.T) {
	b := newBridge(t, "a", "b")
	old, envelope := grantOf(1)
	if _, err := b.Provision(t.Context(), old, envelope); err != nil {
		t.Fatal(err)
	}
	b.fakes[0].set(func() { b.fakes[0].observed.Capabilities.Draining = true })
	fresh, _ := grantOf(2)
	p, err := b.Provision(t.Context(), fresh, envelope)
	wantOn(t, p, err, "b")
	p, err = b.Provision(t.Context(), old, envelope)
	wantOn(t, p, err, "a")
	if got := b.Status()[0].Health; got != fleet.Draining {
		t.Errorf("health is %d", got)
	}
	s, err := b.CanSatisfy(t.Context(), fresh)
	if err != nil || !s.Satisfiable {
		t.Errorf("CanSatisfy answers %+v, %v", s, err)
	}
	term, err := b.Terminate(t.Context(), p.Instance.Handle)
	if err != nil || term.State != backend.StateTerminated {
		t.Errorf("Terminate answers %+v, %v", term, err)
	}
}

func TestAShortageIsRememberedForTheSameOrMoreInTheSamePlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b")
		b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
		provision := func(n byte, change func(*backend.Grant)) string {
			t.Helper()
			grant, envelope := grantOf(n)
			change(&grant)
			p, err := b.Provision(t.Context(), grant, envelope)
			if err != nil {
				t.Fatal(err)
			}
			name, _, _ := p.Instance.Handle.Split()
			return name
		}
		for n, c := range []struct {
			what   string
			change func(*backend.Grant)
			wait   time.Duration
			want   string
		}{
			{"the first, which finds a full", func(*backend.Grant) {}, 0, "b"},
			{"the same again", func(*backend.Grant) {}, 0, "b"},
			{"a larger one", func(g *backend.Grant) { g.Shape.RAM *= 2 }, 0, "b"},
			{"a smaller one", func(g *backend.Grant) { g.Shape.RAM /= 2 }, 0, "a"},
			{"another region", func(g *backend.Grant) { g.Region = "there" }, 0, "a"},
			{"stronger isolation", func(g *backend.Grant) { g.MinIsolation = backend.IsolationVM }, 0, "a"},
			{"just before three minutes are over", func(*backend.Grant) {}, 3*time.Minute - time.Nanosecond, "b"},
			{"after three minutes", func(*backend.Grant) {}, time.Nanosecond, "a"},
		} {
			<-time.After(c.wait)
			if got := provision(byte(n+1), c.change); got != c.want {
				t.Errorf("%s went to %s, want %s", c.what, got, c.want)
			}
		}
	})
}

func TestAFullBackendIsTheLastResort(t *testing.T) {
	b := newBridge(t, "a")
	b.fakes[0].script = []outcome{fails(backenderr.WorkerFull, backenderr.CreatedNone)}
	grant, envelope := grantOf(1)
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.WorkerFull, backenderr.CreatedNone)
	other, _ := grantOf(2)
	p, err := b.Provision(t.Context(), other, envelope)
	wantOn(t, p, err, "a")
}

func TestSomethingEndedMakesRoom(t *testing.T) {
	b := newBridge(t, "a", "b")
	first, envelope := grantOf(1)
	p, err := b.Provision(t.Context(), first, envelope)
	wantOn(t, p, err, "a")
	b.fakes[0].set(func() { b.fakes[0].script = []outcome{fails(backenderr.WorkerFull, backenderr.CreatedNone)} })
	second, _ := grantOf(2)
	q, err := b.Provision(t.Context(), second, envelope)
	wantOn(t, q, err, "b")
	if _, err := b.Terminate(t.Context(), p.Instance.Handle); err != nil {
		t.Fatal(err)
	}
	third, _ := grantOf(3)
	q, err = b.Provision(t.Context(), third, envelope)
	wantOn(t, q, err, "a")
}

func TestDegradedShowsUntilAProvisionSucceeds(t *testing.T) {
	b := newBridge(t, "a", "b")
	b.fakes[0].script = []outcome{fails(backenderr.ProviderDenied, backenderr.CreatedNone)}
	for n, want := range []fleet.Health{fleet.Degraded, fleet.Serving} {
		grant, envelope := grantOf(byte(n))
		if _, err := b.Provision(t.Context(), grant, envelope); err != nil {
			t.Fatal(err)
		}
		if got := b.Status()[0]; got.Health != want {
			t.Errorf("after %d grants health is %d with warnings %q, want %d", n+1, got.Health, got.Capabilities.Warnings, want)
		}
	}
}

func TestTheSameGrantWithOtherContentOrOwnerIsAConflict(t *testing.T) {
	b := newBridge(t, "a")
	grant, envelope := grantOf(1)
	alice := as(t.Context(), "alice")
	if _, err := b.Provision(alice, grant, envelope); err != nil {
		t.Fatal(err)
	}
	changed := grant
	changed.Shape.RAM++
	// The grant runs: nobody may take the answer for leave to start it elsewhere.
	_, err := b.Provision(alice, changed, envelope)
	wantReason(t, err, backenderr.GrantConflict, backenderr.CreatedUnknown)
	_, err = b.Provision(as(t.Context(), "bob"), grant, envelope)
	wantReason(t, err, backenderr.GrantConflict, backenderr.CreatedUnknown)
	_, err = b.Terminate(as(t.Context(), "bob"), backend.HandleFor(grant.ID).Via("a"))
	wantReason(t, err, backenderr.CallerDenied, backenderr.CreatedNone)
	operator := backend.WithCaller(t.Context(), backend.Caller{Identity: "root", Role: backend.RoleOperator})
	if _, err := b.Provision(operator, grant, envelope); err != nil {
		t.Errorf("an operator gets %v", err)
	}
	if _, err := b.Provision(alice, grant, envelope); err != nil {
		t.Errorf("the owner gets %v", err)
	}
	if got := b.fakes[0].did("Provision"); got != 3 {
		t.Errorf("%d calls reached the backend, want 3", got)
	}
}

func TestAGrantThatIsWrongIsNotClaimedAndMayBeCorrected(t *testing.T) {
	b := newBridge(t, "a")
	grant, envelope := grantOf(1)
	envelope.PostHash[0]++
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.ImageMismatch, backenderr.CreatedNone)
	envelope.PostHash, envelope.SSHPublicKey = grant.PostHash, "not a key"
	_, err = b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantInvalid, backenderr.CreatedNone)
	if b.claims.backend(grant.ID) != "" {
		t.Error("it was claimed")
	}
	_, envelope = grantOf(1)
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "a")
}

func TestAnInvalidGrantIsAnsweredAtOnce(t *testing.T) {
	b := newBridge(t, "a", "b")
	b.fakes[0].satisfy = func(context.Context) (backend.Satisfaction, error) {
		return backend.Satisfaction{}, backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: "grant.valid_to", Description: "is past"})
	}
	grant, envelope := grantOf(1)
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantInvalid, backenderr.CreatedNone)
	if v := backenderr.From(err).Violations; len(v) != 1 || b.claims.backend(grant.ID) != "" {
		t.Errorf("violations %v, claim %q", v, b.claims.backend(grant.ID))
	}
	_, err = b.CanSatisfy(t.Context(), grant)
	wantReason(t, err, backenderr.GrantInvalid, backenderr.CreatedNone)
}

func TestTwoRoutersNeverGiveAGrantToTwoBackends(t *testing.T) {
	const grants, callers = 20, 6
	b := newBridge(t, "a", "b")
	routers := []*fleet.Fleet{b.Fleet, b.router(t, false)}
	var wg sync.WaitGroup
	handles := make([][]backend.Handle, grants)
	for n := range grants {
		handles[n] = make([]backend.Handle, callers)
		for c := range callers {
			wg.Go(func() {
				grant, envelope := grantOf(byte(n))
				p, err := routers[c%2].Provision(t.Context(), grant, envelope)
				if err != nil {
					t.Error(err)
				}
				handles[n][c] = p.Instance.Handle
			})
		}
		// Which backend is first differs from call to call.
		b.fakes[0].set(func() { b.fakes[0].observed.Capabilities.Draining = n%2 == 0 })
	}
	wg.Wait()
	for n := range grants {
		for _, h := range handles[n] {
			if h != handles[n][0] {
				t.Errorf("grant %d has handles %q and %q", n, h, handles[n][0])
			}
		}
		if got := b.world.atOnce[idOf(byte(n))]; got != 1 {
			t.Errorf("grant %d had %d instances", n, got)
		}
	}
}

// late is a backend as a router with a slow network sees it: calls of Provision
// leave at once and arrive when they are let through.
type late struct {
	backend.Backend
	left    chan struct{}
	through chan struct{}
}

func (l late) Provision(ctx context.Context, g backend.Grant, e backend.Envelope) (backend.Provisioned, error) {
	l.left <- struct{}{}
	<-l.through
	return l.Backend.Provision(ctx, g, e)
}

// The second router reads the claim and calls; the first one is refused, moves
// the claim and provisions elsewhere; then the second one's call arrives, and
// there is room now.
func TestACallThatArrivesAfterARefusalMakesNothing(t *testing.T) {
	for _, forgetful := range []bool{false, true} {
		t.Run(fmt.Sprintf("the worker forgets=%t", forgetful), func(t *testing.T) {
			b := newBridge(t, "a", "b")
			b.fakes[0].forgets = forgetful
			slow := late{b.fakes[0], make(chan struct{}, 1), make(chan struct{})}
			second := b.over(t, map[string]backend.Backend{"a": slow})
			b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
			grant, envelope := grantOf(1)
			type result struct {
				p   backend.Provisioned
				err error
			}
			joined := make(chan result, 1)
			b.claims.beforeMove = sync.OnceFunc(func() { // The refusal has come, the move has not.
				go func() {
					p, err := second.Provision(t.Context(), grant, envelope)
					joined <- result{p, err}
				}()
				<-slow.left
			})
			p, err := b.Provision(t.Context(), grant, envelope)
			wantOn(t, p, err, "b")
			close(slow.through)
			r := <-joined
			wantOn(t, r.p, r.err, "b")
			// A worker that forgets its refusals is what fences are for: for a moment
			// there are two, until the router notices.
			most := 1
			if forgetful {
				most = 2
			}
			if b.world.running[grant.ID] != 1 || b.world.atOnce[grant.ID] != most {
				t.Errorf("%d instances are left, there were %d at once, want %d", b.world.running[grant.ID], b.world.atOnce[grant.ID], most)
			}
		})
	}
}

// A refusal at the door is recorded nowhere: a call that was under way may still
// be let in.
func TestARefusalThatWasNotRecordedMovesNothingBeforeTheEndIsConfirmed(t *testing.T) {
	b := newBridge(t, "a", "b")
	slow := late{b.fakes[0], make(chan struct{}, 1), make(chan struct{})}
	second := b.over(t, map[string]backend.Backend{"a": slow})
	door := fails(backenderr.CallerUnauthenticated, backenderr.CreatedNone)
	refuse := make(chan struct{})
	door.wait = refuse
	b.fakes[0].script = []outcome{door}
	grant, envelope := grantOf(1)
	joined := make(chan error, 1)
	go func() {
		defer close(refuse)
		for b.fakes[0].did("Provision") == 0 {
			runtime.Gosched()
		}
		go func() {
			_, err := second.Provision(t.Context(), grant, envelope)
			joined <- err
		}()
		<-slow.left // It has read the claim.
	}()
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "b")
	if n := b.fakes[0].did("Terminate " + grant.ID.String()); n != 1 {
		t.Errorf("%d calls of Terminate at the first backend", n)
	}
	close(slow.through)
	if err := <-joined; err != nil {
		t.Errorf("the call that followed: %v", err)
	}
	if b.world.atOnce[grant.ID] != 1 {
		t.Errorf("%d instances at once", b.world.atOnce[grant.ID])
	}
}

// Everybody refuses; the next call finds the door shut where the claim is, and
// asks under another number.
func TestARetryAfterARefusalHasAHigherFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a")
		b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone), fails(backenderr.ProviderUnavailable, backenderr.CreatedNone)}
		b.fakes[0].refused[idOf(1)] = 6 // By a router that had another ledger.
		grant, envelope := grantOf(1)
		_, err := b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.CapacityExhausted, backenderr.CreatedNone)
		if backend.RefusedFence(err) != 0 {
			t.Error("a caller without a fence is told of fences")
		}
		p, err := b.Provision(t.Context(), grant, envelope)
		wantOn(t, p, err, "a")
		if diff := cmp.Diff([]uint64{1, 7, 7, 8, 9}, b.fakes[0].fences); diff != "" {
			t.Errorf("fences (-want +got):\n%s", diff)
		}
	})
}

func TestLosingTheRaceForAMoveFollowsTheWinner(t *testing.T) {
	b := newBridge(t, "a", "b", "c")
	b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
	grant, envelope := grantOf(1)
	b.claims.beforeMove = func() {
		b.claims.steal(t, grant.ID, "c")
	}
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "c")
	if got := b.fakes[1].did("Provision"); got != 0 {
		t.Errorf("b was asked %d times", got)
	}
}

func TestAnUnclearAttemptUnderAnothersClaimIsNotEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBridge(t, "a", "b", "c")
		grant, envelope := grantOf(1)
		// Another router moves the claim to c while this one moves it to b.
		b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
		b.fakes[2].always = &outcome{err: errTransport, made: true}
		b.claims.beforeMove = func() {
			b.claims.steal(t, grant.ID, "c")
		}
		_, err := b.Provision(t.Context(), grant, envelope)
		wantReason(t, err, backenderr.Unknown, backenderr.CreatedUnknown)
		if b.world.running[grant.ID] != 1 || b.fakes[1].did("Provision") != 0 {
			t.Error("the grant was given up in another call's name")
		}
	})
}

func TestALostRaceForTheClaimKeepsTheFirstMatchAvailable(t *testing.T) {
	b := newBridge(t, "a", "b")
	grant, envelope := grantOf(1)
	// Between Get and Put another router claims for b, which then refuses.
	b.fakes[0].satisfy = func(context.Context) (backend.Satisfaction, error) {
		_, _, err := b.claims.Put(t.Context(), fleet.Claim{GrantID: grant.ID, Backend: "b", Content: fleet.Content(grant, envelope)}, 0)
		return backend.Satisfaction{Satisfiable: true}, err
	}
	b.fakes[1].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "a")
}

func TestTerminateDuringAMoveEndsTheGrant(t *testing.T) {
	b := newBridge(t, "a", "b")
	b.fakes[0].script = []outcome{fails(backenderr.CapacityExhausted, backenderr.CreatedNone)}
	grant, envelope := grantOf(1)
	b.claims.beforeMove = func() {
		if _, err := b.Terminate(t.Context(), backend.HandleFor(grant.ID)); err != nil {
			t.Error(err)
		}
	}
	_, err := b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedUnknown)
	if b.world.running[grant.ID] != 0 || b.fakes[1].did("Provision") != 0 {
		t.Error("the ended grant went on")
	}
}

func TestAnEndThatIsNotConfirmedIsNotCalledNothing(t *testing.T) {
	b := newBridge(t, "a", "b")
	grant, envelope := grantOf(1)
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "a")
	b.fakes[0].ending = 1
	term, err := b.Terminate(t.Context(), p.Instance.Handle)
	if err != nil || term.State != backend.StateTerminating {
		t.Fatalf("Terminate answers %+v, %v", term, err)
	}
	_, err = b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedUnknown)
}

func TestAGrantEndedBeforeItWasSeenNeverRuns(t *testing.T) {
	b := newBridge(t, "a", "b")
	grant, envelope := grantOf(1)
	term, err := b.Terminate(t.Context(), backend.HandleFor(grant.ID).Via("b"))
	if err != nil || term.State != backend.StateTerminated {
		t.Fatalf("Terminate answers %+v, %v", term, err)
	}
	_, err = b.Provision(t.Context(), grant, envelope)
	wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedNone)
}

func TestTheLedgerIsNeededToStartAndNotToEnd(t *testing.T) {
	b := newBridge(t, "a")
	running, envelope := grantOf(1)
	if _, err := b.Provision(t.Context(), running, envelope); err != nil {
		t.Fatal(err)
	}
	b.claims.fail = errors.New("disk full")
	fresh, _ := grantOf(2)
	_, err := b.Provision(t.Context(), fresh, envelope)
	wantReason(t, err, backenderr.LedgerUnavailable, backenderr.CreatedUnknown)
	if b.fakes[0].did("Provision") != 1 {
		t.Error("a grant without a claim reached a backend")
	}
	b.fakes[0].event = []backend.Event{{Heartbeat: true}}
	if err := b.WatchUntilExit(t.Context(), backend.HandleFor(running.ID).Via("a"), func(backend.Event) error { return nil }); err != nil {
		t.Errorf("Watch: %v", err)
	}
	if _, err := b.Terminate(t.Context(), backend.HandleFor(running.ID).Via("a")); err != nil {
		t.Errorf("Terminate: %v", err)
	}
}

func TestHandlesLeadToTheMemberTheyName(t *testing.T) {
	b := newBridge(t, "a", "b")
	grant, envelope := grantOf(1)
	b.fakes[0].no = "not here"
	p, err := b.Provision(t.Context(), grant, envelope)
	wantOn(t, p, err, "b")
	b.fakes[1].event = []backend.Event{
		{Instance: &backend.Instance{Handle: backend.HandleFor(grant.ID), GrantID: grant.ID}},
		{Log: &backend.SignedLog{KeyID: "b"}},
	}
	for _, handle := range []backend.Handle{p.Instance.Handle, backend.HandleFor(grant.ID)} {
		var got []backend.Event
		if err := b.WatchUntilExit(t.Context(), handle, func(e backend.Event) error { got = append(got, e); return nil }); err != nil {
			t.Fatal(err)
		}
		if len(got) != 2 || got[0].Instance.Handle != p.Instance.Handle || got[1].Log.KeyID != "b" {
			t.Errorf("watch of %q saw %+v", handle, got)
		}
	}
	if h := b.fakes[1].event[0].Instance.Handle; h != backend.HandleFor(grant.ID) {
		t.Errorf("the member's own instance was changed: handle %q", h)
	}
	stop := errors.New("the watcher has seen enough")
	if err := b.WatchUntilExit(t.Context(), p.Instance.Handle, func(backend.Event) error { return stop }); !errors.Is(err, stop) || err.Error() != stop.Error() {
		t.Errorf("an error of emit came back as %v", err)
	}
	b.fakes[1].watchErr = backenderr.New(backenderr.ProviderUnavailable, "host is gone")
	err = b.WatchUntilExit(t.Context(), p.Instance.Handle, func(backend.Event) error { return nil })
	if !backenderr.Is(err, backenderr.ProviderUnavailable) || err.Error() != "backend b: host is gone" {
		t.Errorf("a member's error came back as %v", err)
	}
	for _, handle := range []backend.Handle{backend.HandleFor(grant.ID).Via("c"), backend.HandleFor(backend.GrantID{9})} {
		err := b.WatchUntilExit(t.Context(), handle, func(backend.Event) error { return nil })
		wantReason(t, err, backenderr.InstanceNotFound, backenderr.CreatedNone)
	}
	id := backend.HandleFor(grant.ID)
	for _, handle := range []backend.Handle{"", "zz", "b/zz", "/" + id, "../" + id, "b/../" + id, "b//" + id, "B/" + id, id + "/b", "b/" + id + "0"} {
		err := b.WatchUntilExit(t.Context(), handle, func(backend.Event) error { return nil })
		wantReason(t, err, backenderr.RequestInvalid, backenderr.CreatedNone)
		_, err = b.Terminate(t.Context(), handle)
		wantReason(t, err, backenderr.RequestInvalid, backenderr.CreatedNone)
	}
}

func TestTerminateEndsTheGrantWhereverItIs(t *testing.T) {
	grant, envelope := grantOf(1)
	id := backend.HandleFor(grant.ID)
	for _, c := range []struct {
		what   string
		handle backend.Handle
		claim  bool
		want   []int // Terminate calls at a and b
	}{
		{"the handle", id.Via("b"), true, []int{0, 1}},
		{"the handle of a member that lost the claim", id.Via("a"), true, []int{1, 1}},
		{"no path, claimed", id, true, []int{0, 1}},
		{"no path, nobody knows", id, false, []int{1, 1}},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := newBridge(t, "a", "b")
			if c.claim {
				b.fakes[0].no = "not here"
				p, err := b.Provision(t.Context(), grant, envelope)
				wantOn(t, p, err, "b")
			}
			term, err := b.Terminate(t.Context(), c.handle)
			if err != nil || term.State != backend.StateTerminated || (term.Log != nil) != c.claim {
				t.Fatalf("Terminate answers %+v, %v", term, err)
			}
			for i, f := range b.fakes {
				if got := f.did("Terminate " + string(id)); got != c.want[i] {
					t.Errorf("%s got %d Terminate calls, want %d", f.name, got, c.want[i])
				}
			}
			b.fakes[1].ending = 1
			term, err = b.Terminate(t.Context(), id.Via("b"))
			if err != nil || term.State != backend.StateTerminating {
				t.Errorf("while one is still ending: %+v, %v", term, err)
			}
			b.fakes[1].endErr = backenderr.New(backenderr.ProviderUnavailable, "host is gone")
			_, err = b.Terminate(t.Context(), id.Via("b"))
			wantReason(t, err, backenderr.ProviderUnavailable, backenderr.CreatedUnknown)
		})
	}
}

func TestAMemberSeesWhoCalls(t *testing.T) {
	b := newBridge(t, "a")
	ctx := backend.WithCaller(t.Context(), backend.Caller{Identity: "alice", Role: backend.RoleClient, Hops: 2})
	grant, envelope := grantOf(1)
	p, err := b.Provision(ctx, grant, envelope)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.WatchUntilExit(ctx, p.Instance.Handle, func(backend.Event) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Terminate(ctx, p.Instance.Handle); err != nil {
		t.Fatal(err)
	}
	for i, c := range b.fakes[0].callers {
		if want := backend.CallerFrom(ctx); c != want {
			t.Errorf("%s came from %+v, want %+v", b.fakes[0].calls[i], c, want)
		}
	}
}

func TestWhenTheCallerGoesNothingElseIsTried(t *testing.T) {
	for _, phase := range []string{"asking", "provisioning", "pausing"} {
		t.Run(phase, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBridge(t, "a", "b")
				ctx, cancel := context.WithCancel(t.Context())
				switch phase {
				case "asking":
					b.fakes[0].satisfy = func(ctx context.Context) (backend.Satisfaction, error) {
						<-ctx.Done()
						return backend.Satisfaction{}, ctx.Err()
					}
				case "provisioning":
					b.fakes[0].always = &outcome{wait: make(chan struct{})}
				case "pausing":
					b.fakes[0].always = &outcome{err: errTransport}
				}
				grant, envelope := grantOf(1)
				done := make(chan error, 1)
				go func() {
					_, err := b.Provision(ctx, grant, envelope)
					done <- err
				}()
				synctest.Wait()
				cancel()
				synctest.Wait()
				select {
				case err := <-done:
					if err == nil {
						t.Error("it succeeded")
					}
				default:
					t.Fatal("it goes on")
				}
				if got := b.fakes[1].did("Provision"); got != 0 {
					t.Errorf("the next backend was asked %d times", got)
				}
			})
		})
	}
}

func TestCapabilitiesAreTheUnionAndNeverBlank(t *testing.T) {
	b := newBridge(t, "a", "b", "never-seen")
	b.fakes[2].observed = fleet.Observation{LastError: "connection refused"}
	region := func() (backend.Capabilities, backend.RegionCapabilities) {
		t.Helper()
		c, err := b.Capabilities(t.Context())
		if err != nil || c.Backend != "bridge" || len(c.Regions) != 1 {
			t.Fatalf("capabilities %+v, %v", c, err)
		}
		return c, c.Regions[0]
	}
	c, r := region()
	if c.Stale || r.Total.CPU != 8000 || r.Free.CPU != 4000 || r.LargestSingle.CPU != 1000 || len(c.Warnings) != 1 {
		t.Errorf("all well: %+v", c)
	}
	b.fakes[0].set(func() { b.fakes[0].observed.LastError = "no answer" })
	c, r = region()
	if c.Stale || r.Total.CPU != 8000 || r.Free.CPU != 2000 || len(c.Warnings) != 2 {
		t.Errorf("one stale: %+v", c)
	}
	if s := b.Status(); s[0].Health != fleet.Unreachable || !s[0].Capabilities.Stale || s[1].Health != fleet.Serving || s[2].Health != fleet.Unreachable {
		t.Errorf("status %+v", s)
	}
	b.fakes[1].set(func() { b.fakes[1].observed.LastError = "no answer" })
	c, r = region()
	if !c.Stale || r.Total.CPU != 8000 || r.Free.CPU != 0 {
		t.Errorf("all stale: %+v", c)
	}
	if b.fakes[0].observed.Capabilities.Stale {
		t.Error("the observation itself was changed")
	}
}

func TestAFleetNeedsDistinctBackends(t *testing.T) {
	if _, err := fleet.New(fleet.Config{}); err == nil {
		t.Error("a fleet of none was made")
	}
	a := newFake(newWorld(), "a").member()
	if _, err := fleet.New(fleet.Config{Members: []fleet.Member{a, a}}); err == nil {
		t.Error("a fleet with one backend twice was made")
	}
}
