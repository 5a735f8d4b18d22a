package replicas

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// TestReplicas has a bridge with two hosts through everything that may happen to
// an owner, one after the other.
func TestReplicas(t *testing.T) {
	t.Parallel()
	h1, h2 := lab.NewHost(t, lab.HostOptions{}), lab.NewHost(t, lab.HostOptions{})
	b := newBridge(t, h1, h2)
	a, other := b.workers[0], b.workers[1]
	ra, rb := b.routers[0], b.routers[1]

	t.Run("EachRouterReachesEveryHost", func(t *testing.T) {
		b.t = t
		var handles []backend.Handle
		places := map[int]int{}
		for i := range 2 * slots {
			_, p := b.provision(b.routers[i%2])
			places[b.place(p)]++
			handles = append(handles, p.Instance.Handle)
		}
		if places[0] != slots || places[1] != slots {
			t.Errorf("grants on the hosts: %v", places)
		}
		// All replicas say the same of the worker as a whole.
		for _, w := range b.workers {
			eventually(t, func() error {
				c, err := w.client.Capabilities(call(t))
				if err == nil && (c.Regions[0].ActiveInstances != 2*slots || c.Regions[0].Free.CPU != 0) {
					err = fmt.Errorf("%s: %+v", w.name, c.Regions[0])
				}
				return err
			})
		}
		g, e := b.grant()
		_, err := ra.client.Provision(call(t), g, e)
		refused(t, err)
		for i, handle := range handles {
			b.end(b.routers[i%2], handle)
		}
	})

	t.Run("ARetryAtAnotherReplicaGetsTheSameReceipt", func(t *testing.T) {
		b.t = t
		g, e := b.grant()
		first, err := ra.client.Provision(call(t), g, e)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []*process{rb, a, other} {
			again, err := p.client.Provision(call(t), g, e)
			if err != nil || again.Receipt.HostKey != first.Receipt.HostKey || again.Receipt.Port != first.Receipt.Port {
				t.Errorf("%s: %+v, %v", p.name, again.Receipt, err)
			}
		}
		// Who can't act says so, and the closure is written all the same.
		wrong := b.workers[1-b.place(first)]
		if _, err := wrong.client.Terminate(call(t), backend.HandleFor(g.ID)); !backenderr.Is(err, backenderr.OtherReplica) ||
			backenderr.CreatedOf(err) != backenderr.CreatedUnknown || backenderr.From(err).RetryAfter <= 0 {
			t.Errorf("Terminate at %s: %v", wrong.name, err)
		}
		_, end, log := b.watch(rb, first.Instance.Handle)
		select { // the owner learns of it from the ledger
		case err := <-end:
			if err != nil || log.Exit.Reason != backend.EndTerminated {
				t.Errorf("%v, %+v", err, log)
			}
		case <-time.After(patience):
			t.Error("the owner never heard of the end")
		}
	})

	t.Run("AKilledOwnerIsFollowed", func(t *testing.T) {
		b.t = t
		p := b.provisionOn(ra, 0)
		ready, end, log := b.watch(rb, p.Instance.Handle)
		<-ready
		took := stopwatch(t)
		a.kill()
		b.heldBy(h1, other)
		// It watches now what it has never heard of before.
		ready, direct := b.watchAt(other, p)
		<-ready
		took("kill -9 of the owner: the other one watches")
		if n := units(t, h1); n != 1 {
			t.Errorf("%d units", n)
		}
		// New grants go on, too.
		q := b.provisionOn(ra, 0)
		b.end(rb, q.Instance.Handle)
		b.ended(end, log, b.end(ra, p.Instance.Handle))
		if err := <-direct; err != nil {
			t.Error(err)
		}
		a.start()
		b.serves(a, false)
	})

	t.Run("AStoppedOwnerIsFenced", func(t *testing.T) {
		b.t = t
		// The other one has both hosts now.
		_, p := b.provision(ra)
		ready, end, log := b.watch(rb, p.Instance.Handle)
		<-ready
		// In the middle of a Provision.
		g, e := b.grant()
		answer := make(chan error, 1)
		go func() {
			_, err := ra.client.Provision(call(t), g, e)
			answer <- err
		}()
		eventually(t, func() error {
			if units(t, h1)+units(t, h2) < 2 {
				return errors.New("not begun")
			}
			return nil
		})
		took := stopwatch(t)
		other.signal(syscall.SIGSTOP)
		b.heldBy(h1, a)
		b.heldBy(h2, a)
		took("SIGSTOP of the owner: taken over")
		// The grant is ended and gone for good before the old owner wakes up.
		final := b.endAt(a, g.ID)
		other.signal(syscall.SIGCONT)
		b.serves(other, false)
		if _, err := other.client.Terminate(call(t), backend.HandleFor(p.Instance.GrantID)); err != nil && !backenderr.Is(err, backenderr.OtherReplica) {
			t.Errorf("the old owner: %v", err)
		}
		t.Logf("the call under way: %v", <-answer) // whatever it is
		if n := units(t, h1) + units(t, h2); n > 1 {
			t.Errorf("%d units; the old owner has written after the takeover", n)
		}
		if final.GrantID != g.ID {
			t.Errorf("%+v", final)
		}
		b.ended(end, log, b.end(ra, p.Instance.Handle))
	})

	t.Run("AnOwnerWithoutNetworkIsFollowed", func(t *testing.T) {
		b.t = t
		p := b.provisionOn(rb, 0) // worker a has both
		ready, end, log := b.watch(ra, p.Instance.Handle)
		<-ready
		took := stopwatch(t)
		mend := cut(t, a)
		b.heldBy(h1, other)
		ready, direct := b.watchAt(other, p)
		<-ready
		took("owner without network: the other one watches")
		b.ended(end, log, b.end(rb, p.Instance.Handle))
		if err := <-direct; err != nil {
			t.Error(err)
		}
		mend()
		b.serves(a, false)
	})

	t.Run("BothKilledAndStartedAgain", func(t *testing.T) {
		b.t = t
		_, p := b.provision(ra)
		_, q := b.provision(rb)
		ready, end, log := b.watch(ra, p.Instance.Handle)
		<-ready
		a.kill()
		other.kill()
		a.start()
		other.start()
		b.ended(end, log, b.end(rb, p.Instance.Handle))
		b.end(ra, q.Instance.Handle)
	})

	t.Run("ARouterDiesAfterAnAmbiguousAnswer", func(t *testing.T) {
		b.t = t
		g, e := b.grant()
		lost := make(chan error, 1)
		go func() {
			_, err := ra.client.Provision(call(t), g, e)
			lost <- err
		}()
		eventually(t, func() error {
			if units(t, h1)+units(t, h2) == 0 {
				return errors.New("not begun")
			}
			return nil
		})
		ra.kill()
		if err := <-lost; err == nil {
			t.Log("the answer came before the router died")
		}
		p, err := rb.client.Provision(call(t), g, e)
		if err != nil {
			t.Fatal(err)
		}
		again, err := rb.client.Provision(call(t), g, e)
		if err != nil || again.Receipt.HostKey != p.Receipt.HostKey || again.Receipt.Port != p.Receipt.Port {
			t.Errorf("%+v, %v", again.Receipt, err)
		}
		if n := units(t, h1) + units(t, h2); n != 1 {
			t.Errorf("%d instances", n)
		}
		ra.start()
		b.end(rb, p.Instance.Handle)
	})

	t.Run("TheLedgerGoesAndComes", func(t *testing.T) {
		b.t = t
		_, p := b.provision(ra)
		ready, end, log := b.watch(rb, p.Instance.Handle)
		<-ready
		g, e := b.grant()
		answer := make(chan error, 1)
		go func() {
			_, err := ra.client.Provision(call(t), g, e)
			answer <- err
		}()
		b.server.Kill(t)
		err := <-answer
		t.Logf("without the ledger: %v", err)
		b.server.Start(t)
		q, err := rb.client.Provision(call(t), g, e)
		for deadline := time.Now().Add(patience); err != nil && backenderr.Retryable(err) && time.Now().Before(deadline); {
			q, err = rb.client.Provision(call(t), g, e)
		}
		if err != nil {
			t.Fatal(err)
		}
		if n := units(t, h1) + units(t, h2); n != 2 {
			t.Errorf("%d instances, want 2", n)
		}
		b.ended(end, log, b.end(ra, p.Instance.Handle))
		b.end(rb, q.Instance.Handle)
	})
	b.t = t
}

// watchAt watches at a worker itself, which refuses until it has the host.
func (b *bridge) watchAt(w *process, p backend.Provisioned) (ready chan struct{}, end chan error) {
	ready, end = make(chan struct{}), make(chan error, 1)
	once := sync.OnceFunc(func() { close(ready) })
	ctx := call(b.t)
	go func() {
		for {
			err := w.client.WatchUntilExit(ctx, backend.HandleFor(p.Instance.GrantID), func(backend.Event) error {
				once()
				return nil
			})
			if !backenderr.Is(err, backenderr.OtherReplica, backenderr.BackendUnreachable) || ctx.Err() != nil {
				once()
				end <- err
				return
			}
		}
	}()
	return ready, end
}

// endAt ends a grant at a worker itself.
func (b *bridge) endAt(w *process, id backend.GrantID) backend.ComputeLog {
	b.t.Helper()
	return b.end(w, backend.HandleFor(id))
}

// serves waits until a worker says by gRPC health whether it serves.
func (b *bridge) serves(w *process, want bool) {
	b.t.Helper()
	eventually(b.t, func() error {
		err := healthy(w)
		switch {
		case (err == nil) == want:
			return nil
		case err == nil:
			return fmt.Errorf("%s serves", w.name)
		}
		return fmt.Errorf("%s doesn't serve: %w", w.name, err)
	})
}

// cut drops every packet of a worker's to the hosts, so that its connections are
// half open, until the returned function is called.
func cut(t *testing.T, w *process) (mend func()) {
	t.Helper()
	run := func(script string) {
		t.Helper()
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "nft", script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft %s: %v: %s", script, err, out)
		}
	}
	run("add table ip cut; add chain ip cut out { type filter hook output priority 0; }; add rule ip cut out meta skgid " +
		strconv.Itoa(int(w.group)) + " ip daddr 10.77.0.0/16 drop")
	mend = sync.OnceFunc(func() { run("delete table ip cut") })
	t.Cleanup(mend)
	return mend
}

// race has both routers provision a grant each for the last slot, rounds times.
func race(t *testing.T, rounds int) {
	t.Helper()
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	b := newBridge(t, h)
	var held []backend.Handle
	for range slots - 1 {
		_, p := b.provision(b.routers[0])
		held = append(held, p.Instance.Handle)
	}
	for round := range rounds {
		type outcome struct {
			p   backend.Provisioned
			err error
		}
		outcomes := make([]outcome, 2)
		var wg sync.WaitGroup
		for i, r := range b.routers {
			g, e := b.grant()
			wg.Go(func() { outcomes[i].p, outcomes[i].err = r.client.Provision(call(t), g, e) })
		}
		wg.Wait()
		won := 0
		for i, o := range outcomes {
			if o.err != nil {
				refused(t, o.err)
				continue
			}
			won++
			b.end(b.routers[1-i], o.p.Instance.Handle)
		}
		if won != 1 {
			t.Fatalf("round %d: %d grants got the last slot", round, won)
		}
	}
	for _, handle := range held {
		b.end(b.routers[0], handle)
	}
	t.Logf("%d rounds", rounds)
}

func TestRaceForTheLastSlot(t *testing.T) { race(t, 3) }

// TestLongRaceForTheLastSlot is the same, many times.
func TestLongRaceForTheLastSlot(t *testing.T) { race(t, 25) }
