package aws

import (
	"context"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/test/internal/suite"
)

// takeover is how long a replica may take, by the contract, until it watches what
// another one has left.
const takeover = 10 * time.Second

// replica starts a second worker beside a bridge's own: another process with the
// same name, secret, ledger and cloud.
func (b *bridge) replica(t *testing.T) backend.Backend {
	t.Helper()
	const name = "replica"
	w := b.Worker(workerName, 1)
	w.Ledger = b.worker.Ledger
	file := b.Path(workerName, name+".toml")
	text := strings.ReplaceAll(b.config(w), "worker.sock", name+".sock")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b.known = append(b.known, name+".log", workerName+"/"+name+".toml")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var conns []*grpc.ClientConn
	process, err := suite.Serve(ctx, b.Site, name, "aws-worker", file, w.Addr())
	t.Cleanup(func() {
		for _, conn := range conns {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		if process == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if code, err := process.Stop(ctx); err != nil || code != 0 {
			t.Errorf("the replica: exit code %d after SIGTERM, %v", code, errors.Join(err, process.Kill()))
		}
		if t.Failed() {
			t.Logf("the replica's log:\n%s", process.LogTail())
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := suite.Dial(b.Site, w.Addr(), &conns)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// asOwner are calls of the requester's.
func asOwner(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return backend.WithCaller(ctx, backend.Caller{Identity: "backendtest-owner", Role: backend.RoleClient})
}

// provisionedBy asks a worker for a grant until it has it, as a requester does who
// is told to come again.
func provisionedBy(t *testing.T, b backend.Backend, g backend.Grant, e backend.Envelope) backend.Provisioned {
	t.Helper()
	ctx := asOwner(t)
	for {
		p, err := b.Provision(ctx, g, e)
		if err == nil {
			return p
		}
		if !backenderr.Is(err, backenderr.OtherReplica, backenderr.OperationInProgress) {
			t.Fatalf("Provision: %v", err)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// watched watches until the end. It closes began when it hears of the instance.
func watched(ctx context.Context, b backend.Backend, id backend.GrantID, began chan<- struct{}) (*backend.SignedLog, error) {
	var log *backend.SignedLog
	err := b.WatchUntilExit(ctx, backend.HandleFor(id), func(event backend.Event) error {
		if event.Instance != nil && began != nil {
			close(began)
			began = nil
		}
		if event.Log != nil {
			log = event.Log
		}
		return nil
	})
	return log, err
}

// TestAReplicaGoesOnWithWhatAnotherLeft kills one of two workers with SIGKILL while
// a grant runs, while one is being made, and while one is being ended. The other
// goes on as if it had been its own, and the first, started again, says the same.
func TestAReplicaGoesOnWithWhatAnotherLeft(t *testing.T) {
	b := newGround(t, pgtest.Start(t, pgtest.Options{})).newBridge(t)
	f := b.fixture(t)
	second := b.replica(t)

	// While it runs.
	g, e := f.Satisfiable()
	made := provisionedBy(t, f.Backend, g, e)
	f.Kill()
	died := time.Now()
	began, ended := make(chan struct{}), make(chan *backend.SignedLog, 1)
	go func() {
		log, err := watched(asOwner(t), second, g.ID, began)
		if err != nil {
			t.Errorf("the replica's watch: %v", err)
		}
		ended <- log
	}()
	select {
	case <-began:
		if took := time.Since(died); took > takeover {
			t.Errorf("the replica watches after %s, at most %s is allowed", took, takeover)
		}
	case <-time.After(patience):
		t.Fatal("the replica doesn't watch what the other had")
	}
	if again := provisionedBy(t, second, g, e); !reflect.DeepEqual(again, made) {
		t.Errorf("the replica answers %+v, the other said %+v", again, made)
	}
	if err := f.Exit(g.ID, backendtest.ExitStatus{Code: 7}); err != nil {
		t.Fatal(err)
	}
	log := <-ended
	if log == nil || log.Log.Exit.Reason != backend.EndWorkloadExited || log.Log.Exit.Code == nil || *log.Log.Exit.Code != 7 {
		t.Fatalf("the replica's log: %+v", log)
	}
	first, err := f.Reopen(t)
	if err != nil {
		t.Fatal(err)
	}
	if own, err := watched(asOwner(t), first, g.ID, nil); err != nil || !reflect.DeepEqual(own, log) {
		t.Errorf("the first, started again: %v, %+v; the replica said %+v", err, own, log)
	}

	// While it is being made, once EC2 has its order, and once it has not.
	for _, kind := range []backendtest.FaultKind{backendtest.FaultCrashBefore, backendtest.FaultCrashAfter} {
		g, e := f.Satisfiable()
		dies := f.Inject(backendtest.Fault{Point: f.CreatePoint, Kind: kind, GrantID: g.ID})
		if _, err := first.Provision(asOwner(t), g, e); err == nil {
			t.Errorf("%s: the dead answer", kind)
		}
		dies.Release()
		made := provisionedBy(t, second, g, e)
		if h := f.History(g.ID); h.AtOnce != 1 || h.Created > int(made.Instance.Attempt) || !f.Runs(g.ID) {
			t.Errorf("%s: %d instances at once, %d in %d attempts, and it runs: %t", kind, h.AtOnce, h.Created, made.Instance.Attempt, f.Runs(g.ID))
		}
		if first, err = f.Reopen(t); err != nil {
			t.Fatal(err)
		}
		if own := provisionedBy(t, first, g, e); !reflect.DeepEqual(own, made) {
			t.Errorf("%s: the first, started again, answers %+v, the replica said %+v", kind, own, made)
		}

		// While it is being ended.
		dies = f.Inject(backendtest.Fault{Point: "ec2.TerminateInstances", Kind: kind, GrantID: g.ID})
		if _, err := first.Terminate(asOwner(t), backend.HandleFor(g.ID)); err == nil {
			t.Errorf("%s: the dead answer", kind)
		}
		dies.Release()
		over, err := second.Terminate(asOwner(t), backend.HandleFor(g.ID))
		if err != nil || over.State != backend.StateTerminated || over.Log == nil || over.Log.Log.Exit.Reason != backend.EndTerminated {
			t.Errorf("%s: the replica's Terminate: %+v, %v", kind, over, err)
		}
		left, err := f.Leftovers(t.Context())
		for _, l := range left {
			if l.GrantID == g.ID {
				t.Errorf("%s: left over: %+v", kind, l)
			}
		}
		if err != nil {
			t.Error(err)
		}
		if first, err = f.Reopen(t); err != nil {
			t.Fatal(err)
		}
		if own, err := watched(asOwner(t), first, g.ID, nil); err != nil || !reflect.DeepEqual(own, over.Log) {
			t.Errorf("%s: the first, started again: %v, %+v; the replica said %+v", kind, err, own, over.Log)
		}
	}
}
