package worker

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// cloud is a provider that several replicas use, each for all grants: what is
// there is there for each.
type cloud struct {
	mu      sync.Mutex
	there   map[backend.GrantID]map[uint32]bool
	deleted int
}

func (c *cloud) make(id backend.GrantID, attempt uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.there[id] == nil {
		c.there[id] = map[uint32]bool{}
	}
	c.there[id][attempt] = true
}

// attempts returns those of a grant of which something is there.
func (c *cloud) attempts(id backend.GrantID) map[uint32]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[uint32]bool{}
	for attempt := range c.there[id] {
		out[attempt] = true
	}
	return out
}

func (c *cloud) delete(id backend.GrantID, attempt uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.there[id][attempt] {
		c.deleted++
	}
	delete(c.there[id], attempt)
}

// provisionTimeout is how long a Provision of the cloud's replicas may take.
const provisionTimeout = 20 * time.Minute

// equal is a scripted driver of which several replicas use one cloud.
type equal struct {
	*scripted

	cloud *cloud
	// boot is what a Provision waits for once there is an instance, nil for
	// nothing.
	boot func(ctx context.Context) error
}

var _ Replicated = (*equal)(nil)

func (e *equal) ProvisionTimeout() time.Duration { return provisionTimeout }

func (e *equal) Provision(ctx context.Context, o Order) (Ready, error) {
	e.called("provision")
	id, j := o.Grant.ID, e.env.Journal
	a, err := j.Begin(ctx, id, "region", []byte("params"))
	for err == nil && a.Ending {
		e.cloud.delete(id, a.Number)
		if err = j.Gone(ctx, id, a.Number); err == nil {
			a, err = j.Begin(ctx, id, "region", []byte("params"))
		}
	}
	if err == nil && !a.New {
		a, err = j.Resume(ctx, id, a.Number)
	}
	if err != nil {
		return Ready{}, err
	}
	e.cloud.make(id, a.Number)
	if e.boot != nil {
		if err := e.boot(ctx); err != nil {
			return Ready{}, e.undo(context.WithoutCancel(ctx), a, err)
		}
	}
	_, public, err := e.env.HostKey(id, a.Number)
	if err != nil {
		return Ready{}, err
	}
	return Ready{
		Instance: backend.Instance{ID: "i", Region: "r", Isolation: backend.IsolationVM, Shape: o.Grant.Shape, Attempt: a.Number, StartedAt: time.Now()},
		Host:     "host.example", Port: 22, User: "compute", HostKey: public, ResumedAt: a.ResumedAt,
	}, nil
}

func (e *equal) undo(ctx context.Context, a Attempt, cause error) error {
	if err := e.env.Journal.End(ctx, a); err != nil {
		return err
	}
	e.cloud.delete(a.GrantID, a.Number)
	if err := e.env.Journal.Gone(ctx, a.GrantID, a.Number); err != nil {
		return err
	}
	return backenderr.From(cause).Clone().WithCreated(backenderr.CreatedNone)
}

func (e *equal) Watch(ctx context.Context, id backend.GrantID, _ func(backend.Usage)) (backend.Exit, error) {
	for len(e.cloud.attempts(id)) > 0 {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return backend.Exit{}, ctx.Err()
		}
	}
	return backend.Exit{}, backenderr.New(backenderr.InstanceNotFound, "nothing is there")
}

func (e *equal) Terminate(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
	e.called("terminate")
	there := e.cloud.attempts(id)
	closed := e.env.Journal.Check(ctx, id) != nil
	attempts, err := e.env.Journal.Attempts(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, a := range attempts {
		if !a.Gone && !a.Ending && !closed {
			delete(there, a.Number)
			continue
		}
		err = errors.Join(err, e.env.Journal.Gone(ctx, id, a.Number))
	}
	for attempt := range there {
		e.cloud.delete(id, attempt)
	}
	return nil, err
}

// equals is two replicas on one ledger and one cloud.
func equals(t *testing.T) (c *cloud, a, b *site, da, db *equal) {
	t.Helper()
	a = newSite(t, nil)
	b = &site{t: t, path: a.path, config: a.config}
	b.config.Metrics = prometheus.NewRegistry()
	b.start()
	c = &cloud{there: map[backend.GrantID]map[uint32]bool{}}
	da, db = &equal{scripted: a.driver, cloud: c}, &equal{scripted: b.driver, cloud: c}
	return c, a, b, da, db
}

func (s *site) runs(d Driver) {
	s.t.Helper()
	if err := s.Start(s.t.Context(), d); err != nil {
		s.t.Fatal(err)
	}
}

// booting returns a boot that goes on when told to, and a channel that tells of
// each that has begun.
func booting() (boot func(context.Context) error, began <-chan struct{}, done chan<- struct{}) {
	begins, ends := make(chan struct{}, 10), make(chan struct{})
	return func(ctx context.Context) error {
		begins <- struct{}{}
		select {
		case <-ends:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}, begins, ends
}

// whole is what a grant must have come to: one instance, that of the answer.
func (c *cloud) whole(t *testing.T, p backend.Provisioned) {
	t.Helper()
	if there := c.attempts(p.Instance.GrantID); len(there) != 1 || !there[p.Instance.Attempt] {
		t.Errorf("the answer is attempt %d, and there are %v", p.Instance.Attempt, there)
	}
}

func TestAnAttemptThatAnotherReplicaResumedIsNotUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		a.runs(da)
		b.runs(db)
		defer a.stop()
		defer b.stop()
		g, e := grantFor(t, 1)
		var beganA, beganB <-chan struct{}
		var doneB chan<- struct{}
		da.boot, beganA, _ = booting()
		db.boot, beganB, doneB = booting()
		ctx, cancel := context.WithCancel(as(t, alice))
		first := a.begin(ctx, g, e)
		<-beganA
		retry := b.begin(as(t, alice), g, e)
		<-beganB
		cancel()
		wantReason(t, (<-first).err, backenderr.Cancelled, backenderr.CreatedUnknown)
		synctest.Wait()
		doneB <- struct{}{}
		o := <-retry
		if o.err != nil || o.p.Instance.Attempt != 1 {
			t.Fatalf("attempt %d, %v; want the one that was resumed", o.p.Instance.Attempt, o.err)
		}
		c.whole(t, o.p)
	})
}

// Who has resumed an attempt undoes it as if it had begun it.
func TestAnAttemptThatWasResumedIsUndoneByWhoDidSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		b.runs(db)
		defer b.stop()
		a.attach(t.Context(), da)
		defer a.stop()
		g, e := grantFor(t, 1)
		claim, err := a.claimed(as(t, alice), alice, g, e)
		if err == nil {
			_, err = da.env.Journal.Begin(t.Context(), backend.GrantID(claim.RequestID), "region", nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.make(g.ID, 1)
		db.boot = func(context.Context) error { return backenderr.New(backenderr.BootTimeout, "it never came up") }
		_, err = b.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.BootTimeout, backenderr.CreatedNone)
		if there := c.attempts(g.ID); len(there) > 0 {
			t.Errorf("left over: %v", there)
		}
	})
}

// What the ledger decides is told by the reasons that drivers go by.
func TestTheJournalTellsWhoseAnAttemptIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, nil)
		s.attach(t.Context(), s.driver)
		defer s.stop()
		j, id := s.driver.env.Journal, backend.GrantID{1}
		g, e := grantFor(t, 1)
		if _, err := s.claimed(as(t, alice), alice, g, e); err != nil {
			t.Fatal(err)
		}
		begun, err := j.Begin(t.Context(), id, "region", []byte("p"))
		if err != nil || !begun.New || begun.Ending || !begun.ResumedAt.IsZero() {
			t.Fatalf("%+v, %v", begun, err)
		}
		resumed, err := j.Resume(t.Context(), id, 1)
		if err != nil || resumed.ResumedAt.IsZero() || string(resumed.Params) != "p" || resumed.Number != 1 {
			t.Fatalf("%+v, %v", resumed, err)
		}
		wantReason(t, j.End(t.Context(), begun), backenderr.OtherReplica, backenderr.CreatedUnknown)
		if err := j.End(t.Context(), resumed); err != nil {
			t.Fatal(err)
		}
		_, err = j.Resume(t.Context(), id, 1)
		wantReason(t, err, backenderr.OperationInProgress, backenderr.CreatedUnknown)
		again, err := j.Begin(t.Context(), id, "region", []byte("other"))
		if err != nil || again.New || !again.Ending || !again.ResumedAt.Equal(resumed.ResumedAt) {
			t.Fatalf("%+v, %v", again, err)
		}
		if err := j.Gone(t.Context(), id, 1); err != nil {
			t.Fatal(err)
		}
		if _, err := j.Begin(t.Context(), id, "region", nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.config.Ledger.CloseGrant(t.Context(), ledger.Closure{RequestID: ledger.RequestID(id), Reason: "TERMINATED", By: "alice"}); err != nil {
			t.Fatal(err)
		}
		_, err = j.Resume(t.Context(), id, 2)
		wantReason(t, err, backenderr.GrantEnded, backenderr.CreatedUnknown)
	})
}

func TestAnAttemptThatIsBeingUndoneIsNotResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		a.runs(da)
		b.runs(db)
		defer a.stop()
		defer b.stop()
		g, e := grantFor(t, 1)
		var began <-chan struct{}
		da.boot, began, _ = booting()
		ctx, cancel := context.WithCancel(as(t, alice))
		first := a.begin(ctx, g, e)
		<-began
		// The replica has said that it undoes the attempt, and is cut off.
		open, err := da.env.Journal.Attempts(t.Context(), g.ID)
		if err == nil {
			err = da.env.Journal.End(t.Context(), open[0])
		}
		if err != nil {
			t.Fatal(err)
		}
		p, err := b.Provision(as(t, alice), g, e)
		if err != nil || p.Instance.Attempt != 2 {
			t.Fatalf("attempt %d, %v; want the next one", p.Instance.Attempt, err)
		}
		cancel()
		<-first
		synctest.Wait()
		c.whole(t, p)
	})
}

// Nobody waits any more for what a replica has just finished, but at another.
func TestWhatAnotherReplicaResumedIsNotTakenBack(t *testing.T) {
	for _, resumed := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c, a, _, da, db := equals(t)
			a.runs(da)
			defer a.stop()
			g, e := grantFor(t, 1)
			ctx, cancel := context.WithCancel(as(t, alice))
			defer cancel()
			da.boot = func(ctx context.Context) error {
				if resumed {
					if _, err := db.env.Journal.Resume(ctx, g.ID, 1); err != nil {
						return err
					}
				}
				cancel()
				<-ctx.Done()
				return nil // It was there in time.
			}
			_, err := a.Provision(ctx, g, e)
			wantReason(t, err, backenderr.Cancelled, backenderr.CreatedUnknown)
			synctest.Wait()
			if there := c.attempts(g.ID); there[1] != resumed {
				t.Errorf("resumed by another: %t; there is %v", resumed, there)
			}
		})
	}
}

func TestAnAttemptIsLeftToAReplicaThatMayBeAtIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		a.runs(da)
		b.runs(db)
		defer a.stop()
		defer b.stop()
		g, e := grantFor(t, 1)
		var began <-chan struct{}
		var done chan<- struct{}
		db.boot, began, done = booting()
		call := b.begin(as(t, alice), g, e)
		<-began
		time.Sleep(provisionTimeout - time.Minute) //nolint:forbidigo // time in a bubble: it sweeps, settles
		if there := c.attempts(g.ID); !there[1] || da.count("terminate") > 0 {
			t.Errorf("%v is there, and the other replica has called Terminate %d times", there, da.count("terminate"))
		}
		done <- struct{}{}
		o := <-call
		if o.err != nil {
			t.Fatal(o.err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // as above
		c.whole(t, o.p)
		// Both know of it.
		for _, s := range []*site{a, b} {
			if all := s.Instances(as(t, alice)); len(all) != 1 || all[0].State != backend.StateReady {
				t.Errorf("instances: %+v", all)
			}
		}
		again, err := a.Provision(as(t, alice), g, e)
		if err != nil || again.Receipt.HostKey != o.p.Receipt.HostKey {
			t.Errorf("%+v, %v; want the same answer of the other replica", again, err)
		}
		if end, err := a.Terminate(as(t, alice), o.p.Instance.Handle); err != nil || end.State != backend.StateTerminated {
			t.Errorf("%+v, %v", end, err)
		}
		if there := c.attempts(g.ID); len(there) > 0 {
			t.Errorf("left over: %v", there)
		}
	})
}

func TestWhatADeadReplicaLeftIsUndone(t *testing.T) {
	for name, lasts := range map[string]time.Duration{"with nobody else": 3 * time.Minute, "while a third lives": provisionTimeout + 3*time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, a, b, da, db := equals(t)
				a.runs(da)
				defer a.stop()
				g, e := grantFor(t, 1)
				// What a process leaves that dies while it waits for a boot.
				b.attach(t.Context(), db)
				defer b.stop()
				claim, err := b.claimed(as(t, alice), alice, g, e)
				if err == nil {
					_, err = db.env.Journal.Begin(t.Context(), backend.GrantID(claim.RequestID), "region", nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				c.make(g.ID, 1)
				began := time.Now()
				third := name != "with nobody else"
				for time.Since(began) < lasts {
					if third {
						if err := a.config.Ledger.Beat(t.Context(), "metal", "third"); err != nil {
							t.Fatal(err)
						}
					}
					if there := c.attempts(g.ID); len(there) == 0 {
						break
					}
					time.Sleep(10 * time.Second) //nolint:forbidigo // time in a bubble
				}
				took := time.Since(began)
				if there := c.attempts(g.ID); len(there) > 0 {
					t.Errorf("after %s there is still %v", took, there)
				}
				if third && took < provisionTimeout {
					t.Errorf("it was undone after %s, while another might have been at it", took)
				}
			})
		})
	}
}

// What is left of an earlier attempt is swept, and the one that another replica
// is at stays.
func TestSweepingAnEarlierAttemptSparesTheOpenOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		g, e := grantFor(t, 1)
		script(da.scripted, &da.list, func() (backend.Listing, error) {
			if !c.attempts(g.ID)[1] {
				return backend.Listing{}, nil
			}
			return backend.Listing{Resources: []backend.Resource{{GrantID: g.ID, Attempt: 1, CreatedAt: time.Now().Add(-time.Hour), ValidTo: g.ValidTo}}}, nil
		})
		a.runs(da)
		b.runs(db)
		defer a.stop()
		defer b.stop()
		db.boot = func(context.Context) error { return backenderr.New(backenderr.CapacityExhausted, "full") }
		if _, err := b.Provision(as(t, alice), g, e); !backenderr.Is(err, backenderr.CapacityExhausted) {
			t.Fatal(err)
		}
		c.make(g.ID, 1) // A volume comes to light that stayed.
		var began <-chan struct{}
		var done chan<- struct{}
		db.boot, began, done = booting()
		call := b.begin(as(t, alice), g, e)
		<-began
		time.Sleep(5 * time.Minute) //nolint:forbidigo // time in a bubble: it sweeps
		if there := c.attempts(g.ID); there[1] || !there[2] {
			t.Errorf("after sweeps there are %v", there)
		}
		done <- struct{}{}
		if o := <-call; o.err != nil || o.p.Instance.Attempt != 2 {
			t.Errorf("attempt %d, %v", o.p.Instance.Attempt, o.err)
		}
	})
}

// An end that one replica is asked for comes also where another provisions.
func TestAReplicaSeesThatAGrantWasClosedAtAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b, da, db := equals(t)
		a.runs(da)
		b.runs(db)
		defer a.stop()
		defer b.stop()
		g, e := grantFor(t, 1)
		var began <-chan struct{}
		db.boot, began, _ = booting()
		call := b.begin(as(t, alice), g, e)
		<-began
		end, err := a.Terminate(as(t, alice), backend.HandleFor(g.ID))
		if err != nil || end.State != backend.StateTerminated {
			t.Fatalf("%+v, %v", end, err)
		}
		closed := time.Now()
		wantReason(t, (<-call).err, backenderr.GrantEnded, backenderr.CreatedUnknown)
		if took := time.Since(closed); took > 2*followInterval {
			t.Errorf("it took %s", took)
		}
		synctest.Wait()
		if there := c.attempts(g.ID); len(there) > 0 {
			t.Errorf("left over: %v", there)
		}
		log, err := a.config.Ledger.Log(t.Context(), ledger.RequestID(g.ID))
		if err != nil {
			t.Errorf("%+v, %v", log, err)
		}
	})
}
