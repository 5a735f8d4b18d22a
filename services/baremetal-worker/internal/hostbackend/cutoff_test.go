package hostbackend

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// TestAnEndThatIsCutOffIsToldAsItWas kills the worker while it removes a grant's
// directory, at the files that say how the grant has ended. The log of the next
// worker must not be made of what is left of them.
func TestAnEndThatIsCutOffIsToldAsItWas(t *testing.T) {
	t.Parallel()
	dir, image := suiteFiles(t)
	var hosts []*lab.Host
	for range suiteRoom {
		hosts = append(hosts, lab.NewHost(t, lab.HostOptions{}))
	}
	f := openSuiteSite(t, hosts, dir, image).fixture(t)
	b := f.Backend
	for _, point := range []string{"sftp.remove grant.json", "sftp.remove spool.json", "sftp.remove ended", "sftp.rmdir ID"} {
		g, envelope := f.Satisfiable()
		ctx, cancel := context.WithTimeout(caller(t.Context()), suitePatience)
		defer cancel()
		p, err := b.Provision(ctx, g, envelope)
		if err != nil {
			t.Fatal(err)
		}
		stop := f.Record(g.ID)
		fault := f.Inject(backendtest.Fault{Point: point, Kind: backendtest.FaultCrashAfter, GrantID: g.ID})
		over := make(chan struct{})
		go func() {
			defer close(over)
			_, _ = b.Terminate(ctx, p.Instance.Handle) // nobody answers
		}()
		select {
		case <-fault.Reached():
		case <-time.After(suitePatience):
			t.Fatalf("%s: never called", point)
		}
		// What comes first is up to us, what comes after it to the file system.
		for _, call := range stop() {
			if strings.HasPrefix(call.Point, "sftp.remove ") {
				if call.Point != "sftp.remove grant.json" {
					t.Errorf("the first file to go is that of %s", call.Point)
				}
				break
			}
		}
		if b, err = f.Reopen(t); err != nil {
			t.Fatal(err)
		}
		<-over
		end, err := b.Terminate(ctx, p.Instance.Handle)
		if err != nil || end.State != backend.StateTerminated || end.Log == nil {
			t.Fatalf("%s: %+v, %v", point, end, err)
		}
		if log := end.Log.Log; log.Exit.Reason != backend.EndTerminated || log.Partial || log.Usage.CPU == nil {
			t.Errorf("%s: the log says %s, partial %t, CPU %v", point, log.Exit.Reason, log.Partial, log.Usage.CPU)
		}
	}
}
