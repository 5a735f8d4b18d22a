package server_test

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
)

// aged makes the connections to a router short-lived.
func (r *router) aged(t *testing.T, age, grace time.Duration) *router {
	t.Helper()
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	keys := "max_connection_age = \"" + age.String() + "\"\nmax_connection_age_grace = \"" + grace.String() + "\"\n"
	write(t, r.path, append([]byte(keys), text...))
	return r.patient(t)
}

// patient is the router that waits for a connection however long it takes.
func (r *router) patient(t *testing.T) *router {
	t.Helper()
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, r.path, bytes.ReplaceAll(text, []byte(`connect_timeout = "100ms"`), []byte(`connect_timeout = "3m"`)))
	return r
}

// seen is what a watcher saw.
type seen struct {
	states   []backend.State // changes
	usages   []string        // signed bodies
	repeated int             // events of state that said nothing new
	attached int             // how often it attached
	log      *backend.SignedLog
	breaks   []string
	err      error
}

// follow watches to the end, and attaches again when the connection is lost.
// Each new state goes to states, too.
func follow(t *testing.T, b backend.Backend, handle backend.Handle, states chan<- backend.State) <-chan seen {
	t.Helper()
	done := make(chan seen, 1)
	go func() {
		var s seen
		defer func() { done <- s }()
		for t.Context().Err() == nil {
			s.attached++
			s.err = b.WatchUntilExit(t.Context(), handle, func(e backend.Event) error {
				switch {
				case e.Instance != nil && len(s.states) > 0 && s.states[len(s.states)-1] == e.Instance.State:
					s.repeated++
				case e.Instance != nil:
					s.states = append(s.states, e.Instance.State)
					states <- e.Instance.State
				case e.Usage != nil:
					s.usages = append(s.usages, string(e.Usage.Body))
				case e.Log != nil:
					s.log = e.Log
				}
				return nil
			})
			if !backenderr.Is(s.err, backenderr.BackendUnreachable) {
				return
			}
			s.breaks = append(s.breaks, s.err.Error())
		}
	}()
	return done
}

// Connections end, of age, between a client and two routers and a worker; a
// watch goes on to the final log, and nobody sees a state twice but who had to
// attach again himself.
func TestAWatchOutlivesTheAgeLimitsOfItsConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := s.machine(t, "deep", 1)
	m.clients = []grpcx.ClientEntry{{Identity: "spiffe://test/alice", Role: "client"}}
	// Provisioned while connections are old enough for it.
	stop := m.start(t)
	grant, envelope := newGrant(t)
	direct := connect(t, grpcx.ClientConfig{Target: m.address, ServerName: "localhost"}, s.ca.identity(t, "alice", "spiffe://test/alice"))
	if _, err := backendgrpc.NewClient(direct).Provision(t.Context(), grant, envelope); err != nil {
		t.Fatal(err)
	}
	stop()
	const grace = 50 * time.Millisecond
	m.age, m.grace = 300*time.Millisecond, grace
	m.start(t)
	inner, _ := s.router(t, m).aged(t, 350*time.Millisecond, grace).start(t)
	over := target{"inner", inner.Listen[0].Address}
	aged, _ := s.routerOver(t, "outer", over).aged(t, 400*time.Millisecond, grace).start(t)
	calm, _ := s.routerOver(t, "outer", over).patient(t).start(t)

	handle := backend.HandleFor(grant.ID).Via("deep").Via("inner")
	told := [2]chan backend.State{make(chan backend.State, 100), make(chan backend.State, 100)}
	patient := follow(t, backendgrpc.NewClient(s.dial(t, aged, "alice")), handle, told[0])
	undisturbed := follow(t, backendgrpc.NewClient(s.dial(t, calm, "alice")), handle, told[1])
	for _, states := range told {
		if first := <-states; first != backend.StateReady {
			t.Errorf("a watch begins with %s", first)
		}
	}
	const often = 4
	eventually(t, "watches are attached again and again", func() bool {
		families, err := m.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		begun := 0.0
		for _, f := range families {
			if f.GetName() != "grpc_server_started_total" {
				continue
			}
			for _, metric := range f.GetMetric() {
				for _, l := range metric.GetLabel() {
					if l.GetValue() == "WatchUntilExit" {
						begun += metric.GetCounter().GetValue()
					}
				}
			}
		}
		return begun >= often && watchesBegun(t, metrics(t, inner)) >= often && watchesBegun(t, metrics(t, aged)) >= often/2
	})
	// A state that lasts is told to everybody, however often he has to attach.
	deleting := m.provider.Inject(backendfake.OpDelete, backendfake.Fault{Kind: backendfake.Slow})
	const code = 7
	if !m.provider.Exit(grant.ID, backendfake.ExitStatus{Code: code}) {
		t.Fatal("the instance does not run")
	}
	for _, states := range told {
		for state := range states {
			if state == backend.StateExited {
				break
			}
		}
	}
	deleting.Release()
	states := []backend.State{backend.StateReady, backend.StateExited, backend.StateTerminated}
	for name, watcher := range map[string]<-chan seen{"of age": patient, "calm": undisturbed} {
		got := <-watcher
		if got.err != nil || got.log == nil || got.log.Log.GrantID != grant.ID || got.log.Log.Exit.Code == nil || *got.log.Log.Exit.Code != code {
			t.Fatalf("%s: the watch ends with %v, log %+v", name, got.err, got.log)
		}
		if diff := cmp.Diff(states, got.states); diff != "" {
			t.Errorf("%s: states (-want +got):\n%s", name, diff)
		}
		if got.repeated >= got.attached {
			t.Errorf("%s: attached %d times and told the same state again %d times", name, got.attached, got.repeated)
		}
		if name != "calm" {
			continue
		}
		if got.attached != 1 {
			t.Errorf("the router that lives let the watch break: %q", got.breaks)
		}
		if unique := slices.Compact(slices.Clone(got.usages)); len(unique) != len(got.usages) || len(unique) == 0 {
			t.Errorf("%d reports of usage, %d of them new", len(got.usages), len(unique))
		}
	}
}

var begun = regexp.MustCompile(`(?m)^grpc_server_started_total\{.*grpc_method="WatchUntilExit".*grpc_service="computebridge.* (\d+)$`)

// watchesBegun reads how many watches a router was asked for.
func watchesBegun(t *testing.T, text string) int {
	t.Helper()
	found := begun.FindStringSubmatch(text)
	if found == nil {
		return 0
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
