package replicas

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// smallDisk is the disk of the database that gets full.
const smallDisk = 256 << 20

// TestLongLedgerFaults has the ledger of two workers and two routers slow,
// unreachable, silent and full: never are there two instances of a grant, and
// never is a log lost.
func TestLongLedgerFaults(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	server := pgtest.Start(t, pgtest.Options{SmallDisk: smallDisk})
	tap := pgtest.NewTap(t, server)
	b := &bridge{t: t, hosts: []*lab.Host{h}, dir: t.TempDir(), server: server}
	small := server.SmallDatabase(t)
	b.prepare(tap.DSN(small), tap.DSN(server.Database(t)))
	for _, p := range []*process{b.workers[0], b.workers[1], b.routers[0], b.routers[1]} {
		p.start()
	}
	b.settled()
	ra, rb := b.routers[0], b.routers[1]

	// through has a grant provisioned by one router and another one ended by the
	// other while the fault is there, and then, without it, all comes to its end.
	through := func(t *testing.T, patient time.Duration, fault, mend func()) (failed bool) {
		t.Helper()
		b.t = t
		_, old := b.provision(ra)
		ready, end, log := b.watch(rb, old.Instance.Handle)
		<-ready
		g, e := b.grant()
		fault()
		type outcome struct {
			p   backend.Provisioned
			err error
		}
		made := make(chan outcome, 1)
		ended := make(chan error, 1)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patient)
		defer cancel()
		go func() {
			p, err := ra.client.Provision(ctx, g, e)
			made <- outcome{p, err}
		}()
		go func() {
			_, err := rb.client.Terminate(ctx, old.Instance.Handle)
			ended <- err
		}()
		first, errEnd := <-made, <-ended
		t.Logf("Provision: %v; Terminate: %v", first.err, errEnd)
		mend()
		var p backend.Provisioned
		eventually(t, func() (err error) {
			p, err = rb.client.Provision(call(t), g, e)
			if err != nil && !backenderr.Retryable(err) {
				t.Fatal(err)
			}
			return err
		})
		if first.err == nil && first.p.Receipt.HostKey != p.Receipt.HostKey {
			t.Error("the retry got another instance")
		}
		b.ended(end, log, b.end(ra, old.Instance.Handle))
		if n := units(t, h); n != 1 {
			t.Errorf("%d instances, want 1", n)
		}
		b.end(ra, p.Instance.Handle)
		return first.err != nil || errEnd != nil
	}

	t.Run("Slow", func(t *testing.T) {
		through(t, patience, func() { tap.Delay(100 * time.Millisecond) }, func() { tap.Delay(0) })
	})
	t.Run("Unreachable", func(t *testing.T) {
		if !through(t, 10*time.Second, func() {
			tap.Refuse(true)
			tap.Cut()
		}, func() { tap.Refuse(false) }) {
			t.Error("it made no difference")
		}
	})
	t.Run("Silent", func(t *testing.T) {
		if !through(t, 10*time.Second, func() { tap.Blackhole(true) }, func() { tap.Blackhole(false) }) {
			t.Error("it made no difference")
		}
	})
	t.Run("Full", func(t *testing.T) {
		filler := filepath.Join(server.SmallDiskRoot(), "filler")
		// Each row wants a page of its own, which there is no room for.
		pg := pgtest.Open(t, small)
		if _, err := pg.ExecContext(t.Context(), `DO $$ DECLARE r record; BEGIN
			FOR r IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
				EXECUTE format('ALTER TABLE %I SET (fillfactor = 10)', r.tablename);
			END LOOP; END $$`); err != nil {
			t.Fatal(err)
		}
		if !through(t, 10*time.Second, func() { fill(t, filler) }, func() {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
		}) {
			t.Error("it made no difference")
		}
	})
	b.t = t
}

// fill writes a file until the disk is full.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size >= 1<<10; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	if info, err := f.Stat(); err != nil || info.Size() == 0 {
		t.Fatal(fmt.Errorf("nothing was filled: %w", err))
	}
}
