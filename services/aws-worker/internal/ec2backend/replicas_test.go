package ec2backend

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

// replica starts another worker beside a site's own, on the same ledger and cloud.
func (s *suiteSite) replica(t *testing.T) backend.Backend {
	t.Helper()
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "aws", Ledger: s.ledger, Secret: s.secret, Metrics: prometheus.NewRegistry(),
		Log: slog.New(slog.NewJSONHandler(&s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})).With("replica", "second"),
	})
	if err != nil {
		t.Fatal(err)
	}
	driver, err := Open(t.Context(), s.config, runtime.Env())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		runtime.Close()
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := runtime.Start(context.WithoutCancel(t.Context()), driver); err != nil {
		t.Fatal(err)
	}
	return runtime
}

// A requester whose connection breaks comes again, by way of another replica,
// while the first still undoes what it has begun, or has not yet noticed: it is
// one instance whatever comes first.
func TestRetryAtAnotherReplicaGetsOneInstance(t *testing.T) {
	t.Parallel()
	s, first := openBridge(t, nil)
	second := s.replica(t)
	for _, overlap := range []time.Duration{0, 20 * time.Millisecond, 200 * time.Millisecond} {
		g, e := s.grant()
		s.cloud.Machines.Hang(true)
		ctx, leave := context.WithCancel(asRequester(t.Context()))
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			_, _ = first.Provision(ctx, g, e) // it may have had its answer before it left
		}()
		waitFor(t, "the launch", func() bool { return s.history(g.ID) > 0 })
		s.cloud.Machines.Hang(false)
		retried := make(chan error, 1)
		var made backend.Provisioned
		go func() {
			var err error
			for {
				if made, err = second.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.OtherReplica, backenderr.OperationInProgress, backenderr.BootTimeout) {
					break
				}
				_ = sleep(t.Context(), 50*time.Millisecond) // ends with the test
			}
			retried <- err
		}()
		if err := sleep(t.Context(), overlap); err != nil {
			t.Fatal(err)
		}
		leave()
		<-gone
		if err := <-retried; err != nil {
			t.Fatalf("overlap %s: %v", overlap, err)
		}
		running := 0
		for _, i := range s.cloud.Cloud.Instances() {
			if i.Tags[ec2tags.Grant] == g.ID.String() && i.State == ec2sim.StateRunning {
				running++
			}
		}
		if running != 1 || len(s.cloud.Machines.Running(g.ID.String())) != 1 {
			t.Errorf("overlap %s: %d instances run for %+v", overlap, running, made.Instance)
		}
		terminate(t, second, g.ID)
	}
}

// history counts the launches of a grant.
func (s *suiteSite) history(id backend.GrantID) int {
	n := 0
	for _, i := range s.cloud.Cloud.History() {
		if i.Tags[ec2tags.Grant] == id.String() {
			n++
		}
	}
	return n
}

// What one replica ends, another that watches tells of.
func TestEndAtOneReplicaIsToldByAnother(t *testing.T) {
	t.Parallel()
	s, first := openBridge(t, nil)
	second := s.replica(t)
	g, _ := s.provision(t, first)
	ended := make(chan backend.ComputeLog, 1)
	watching := make(chan struct{})
	go func() {
		var final backend.ComputeLog
		told := sync.OnceFunc(func() { close(watching) })
		err := second.WatchUntilExit(asRequester(t.Context()), backend.HandleFor(g.ID), func(e backend.Event) error {
			told()
			if e.Log != nil {
				final = e.Log.Log
			}
			return nil
		})
		told()
		if err != nil {
			t.Error(err)
		}
		ended <- final
	}()
	<-watching
	terminate(t, first, g.ID)
	select {
	case log := <-ended:
		if log.Exit.Reason != backend.EndTerminated {
			t.Errorf("exit %+v", log.Exit)
		}
	case <-time.After(suitePatience):
		t.Error("the other replica's watch doesn't end")
	}
}
