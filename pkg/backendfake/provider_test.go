package backendfake

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var hosts = []Host{{Name: "one", Region: "east", Capacity: backend.Shape{CPU: 2000, RAM: 1024, Storage: 8}}}

func requestOf(n byte, life time.Duration) request {
	id := backend.GrantID{n}
	return request{
		bridge: "test", id: id, attempt: 1, name: "cb-test-" + id.String() + "-1", token: string('a' + rune(n)), host: "one",
		shape: backend.Shape{CPU: 1000, RAM: 512, Storage: 4}, validTo: time.Now().Add(life),
	}
}

func wantCode(t *testing.T, what string, err error, want string) {
	t.Helper()
	if got := codeOf(err); got != want || (want == "" && err != nil) {
		t.Errorf("%s: got %v, want code %q", what, err, want)
	}
}

func TestCreateIsIdempotentByToken(t *testing.T) {
	p := NewProvider(Options{Hosts: hosts})
	t.Cleanup(p.Close)
	from := newProcess()
	r := requestOf(1, time.Hour)
	first, err := p.create(t.Context(), from, r)
	wantCode(t, "create", err, "")
	again, err := p.create(t.Context(), from, r)
	wantCode(t, "create again", err, "")
	if first.instanceID != again.instanceID || p.History(r.id).Created != 1 {
		t.Errorf("one token made %s and %s", first.instanceID, again.instanceID)
	}
	other := r
	other.params = "other"
	_, err = p.create(t.Context(), from, other)
	wantCode(t, "create with other parameters", err, CodeMismatch)
	other.token = "another"
	_, err = p.create(t.Context(), from, other)
	wantCode(t, "create of a taken name", err, CodeNameInUse)
}

func TestPlatformEndsInstancesAtTheirDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProvider(Options{Hosts: hosts, BootTime: time.Second})
		defer p.Close()
		from := newProcess()
		r := requestOf(1, time.Minute)
		_, err := p.create(t.Context(), from, r)
		wantCode(t, "create", err, "")
		v, err := p.until(t.Context(), from, OpReady, r.id, r.name, view.running)
		wantCode(t, "await", err, "")
		if booted := v.startedAt.Sub(v.createdAt); booted != time.Second {
			t.Errorf("it booted for %s, want 1s", booted)
		}
		from.kill()
		<-time.After(time.Until(r.validTo))
		synctest.Wait()
		if p.Running(r.id) != 0 {
			t.Errorf("it runs after its deadline")
		}
		v, err = p.describe(t.Context(), newProcess(), r.id, r.name)
		wantCode(t, "describe", err, "")
		if v.exit.Reason != backend.EndDeadline || !v.endedAt.Equal(r.validTo) {
			t.Errorf("it ended by %s at %s, want DEADLINE at %s", v.exit.Reason, v.endedAt, r.validTo)
		}
	})
}

func TestDeleteTakesTimeAndReadsLag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProvider(Options{Hosts: hosts, DeleteTime: time.Minute, VisibleAfter: time.Second})
		defer p.Close()
		from := newProcess()
		r := requestOf(1, time.Hour)
		_, err := p.create(t.Context(), from, r)
		wantCode(t, "create", err, "")
		wantCode(t, "delete before it is visible", p.delete(t.Context(), from, r.id, r.name), CodeNotFound)
		if views, err := p.list(t.Context(), from, backend.GrantID{}, "test"); err != nil || len(views) != 0 {
			t.Errorf("list shows %d instances before they are visible (%v)", len(views), err)
		}
		<-time.After(time.Second)
		if views, err := p.list(t.Context(), from, backend.GrantID{}, "other"); err != nil || len(views) != 0 {
			t.Errorf("list shows %d instances of another bridge (%v)", len(views), err)
		}
		wantCode(t, "delete", p.delete(t.Context(), from, r.id, r.name), "")
		wantCode(t, "delete again", p.delete(t.Context(), from, r.id, r.name), "")
		began := time.Now()
		_, err = p.until(t.Context(), from, OpConfirm, r.id, r.name, func(view) bool { return false })
		wantCode(t, "confirm", err, CodeNotFound)
		if took := time.Since(began); took != time.Minute || len(p.Names()) != 0 {
			t.Errorf("the delete took %s and left %v", took, p.Names())
		}
	})
}

func TestCapacityIsEnforcedOnlyOnRequest(t *testing.T) {
	for _, enforce := range []bool{false, true} {
		p := NewProvider(Options{Hosts: hosts, EnforceCapacity: enforce})
		refused := 0
		for n := range byte(3) {
			if _, err := p.create(t.Context(), newProcess(), requestOf(n, time.Hour)); codeOf(err) == CodeCapacity {
				refused++
			}
		}
		if want := map[bool]int{true: 1}[enforce]; refused != want {
			t.Errorf("enforce=%v: %d of 3 were refused, want %d", enforce, refused, want)
		}
		p.Close()
	}
}

func TestFaults(t *testing.T) {
	for kind, code := range refusals {
		p := NewProvider(Options{Hosts: hosts})
		r := requestOf(1, time.Hour)
		p.FailNext(OpCreate, kind)
		_, err := p.create(t.Context(), newProcess(), r)
		wantCode(t, kind.String(), err, code)
		if len(p.Names()) != 0 || p.Mutations() != 0 {
			t.Errorf("%s had an effect", kind)
		}
		_, err = p.create(t.Context(), newProcess(), r)
		wantCode(t, "after "+kind.String(), err, "")
		p.Close()
	}

	t.Run("lost answer", func(t *testing.T) {
		p := NewProvider(Options{Hosts: hosts})
		t.Cleanup(p.Close)
		p.FailNext(OpCreate, LostAnswer)
		_, err := p.create(t.Context(), newProcess(), requestOf(1, time.Hour))
		wantCode(t, "create", err, CodeUnavailable)
		if len(p.Names()) != 1 {
			t.Errorf("it had no effect")
		}
	})
	t.Run("skip, times and grant", func(t *testing.T) {
		p := NewProvider(Options{Hosts: hosts})
		t.Cleanup(p.Close)
		from := newProcess()
		p.Inject(OpList, Fault{Kind: Denied, Skip: 1, Times: 2})
		var codes []string
		for range 4 {
			_, err := p.list(t.Context(), from, backend.GrantID{}, "test")
			codes = append(codes, codeOf(err))
		}
		if want := []string{"", CodeDenied, CodeDenied, ""}; !slices.Equal(codes, want) {
			t.Errorf("got %q, want %q", codes, want)
		}
		endless := p.Inject(OpCreate, Fault{Kind: Quota, Times: -1, GrantID: backend.GrantID{1}})
		for range 3 {
			_, err := p.create(t.Context(), from, requestOf(1, time.Hour))
			wantCode(t, "create", err, CodeQuota)
		}
		_, err := p.create(t.Context(), from, requestOf(2, time.Hour))
		wantCode(t, "create for another grant", err, "")
		endless.Release()
		_, err = p.create(t.Context(), from, requestOf(1, time.Hour))
		wantCode(t, "create after the fault", err, "")
	})
	t.Run("slow", func(t *testing.T) {
		p := NewProvider(Options{Hosts: hosts})
		t.Cleanup(p.Close)
		fault := p.FailNext(OpList, Slow)
		done := make(chan error, 1)
		go func() {
			_, err := p.list(t.Context(), newProcess(), backend.GrantID{}, "test")
			done <- err
		}()
		<-fault.Reached()
		fault.Release()
		if err := <-done; err != nil {
			t.Errorf("after its release a slow call fails: %v", err)
		}
		fault = p.FailNext(OpList, Slow)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			_, err := p.list(ctx, newProcess(), backend.GrantID{}, "test")
			done <- err
		}()
		<-fault.Reached()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("a slow call that is cancelled: %v", err)
		}
	})
	for kind, left := range map[Kind]int{CrashBefore: 0, CrashAfter: 1} {
		t.Run(kind.String(), func(t *testing.T) {
			p := NewProvider(Options{Hosts: hosts})
			t.Cleanup(p.Close)
			from := newProcess()
			p.FailNext(OpCreate, kind)
			if _, err := p.create(t.Context(), from, requestOf(1, time.Hour)); !errors.Is(err, errKilled) {
				t.Errorf("create: %v", err)
			}
			if got := len(p.Names()); got != left {
				t.Errorf("%d instances exist, want %d", got, left)
			}
			if _, err := p.list(t.Context(), from, backend.GrantID{}, "test"); !errors.Is(err, errKilled) {
				t.Errorf("a dead process lists: %v", err)
			}
			if _, err := p.list(t.Context(), newProcess(), backend.GrantID{}, "test"); err != nil {
				t.Errorf("another process can't list: %v", err)
			}
		})
	}
}

func TestCallsAreWrittenDown(t *testing.T) {
	p := NewProvider(Options{Hosts: hosts})
	t.Cleanup(p.Close)
	from := newProcess()
	r := requestOf(1, time.Hour)
	_, _ = p.describe(t.Context(), from, r.id, r.name)
	_, err := p.create(t.Context(), from, r)
	wantCode(t, "create", err, "")
	calls := p.Calls()
	if len(calls) != 2 || calls[0].Op != OpDescribe || calls[0].Effect || calls[0].Err == "" ||
		calls[1].Op != OpCreate || !calls[1].Effect || calls[1].Err != "" || calls[1].GrantID != r.id {
		t.Errorf("calls are %+v", calls)
	}
}

func TestHowAnInstanceEnds(t *testing.T) {
	for name, c := range map[string]struct {
		end    func(*Provider, backend.GrantID) bool
		reason backend.EndReason
		code   string
	}{
		"exit": {func(p *Provider, id backend.GrantID) bool {
			return p.Exit(id, ExitStatus{Code: 3})
		}, backend.EndWorkloadExited, ""},
		"memory": {func(p *Provider, id backend.GrantID) bool {
			return p.Exit(id, ExitStatus{Signal: "KILL", OutOfMemory: true})
		}, backend.EndOutOfMemory, ""},
		"interruption": {(*Provider).Interrupt, backend.EndInterrupted, ""},
		"vanishing":    {(*Provider).Vanish, 0, CodeNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			p := NewProvider(Options{Hosts: hosts})
			t.Cleanup(p.Close)
			from := newProcess()
			r := requestOf(1, time.Hour)
			if c.end(p, r.id) {
				t.Errorf("something ended before it was made")
			}
			_, err := p.create(t.Context(), from, r)
			wantCode(t, "create", err, "")
			if !c.end(p, r.id) || p.Running(r.id) != 0 {
				t.Errorf("it didn't end")
			}
			v, err := p.describe(t.Context(), from, r.id, r.name)
			wantCode(t, "describe", err, c.code)
			if v.exit.Reason != c.reason {
				t.Errorf("it ended by %s, want %s", v.exit.Reason, c.reason)
			}
		})
	}
}
