package worker

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// loud is a log that a test reads.
type loud struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *loud) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// panics returns the lines that tell of panics of a driver's method.
func (l *loud) panics(method string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lines []string
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, `"Panic in driver"`) && strings.Contains(line, `"method":"`+method+`"`) {
			lines = append(lines, line)
		}
	}
	return lines
}

// panicText is what a panic says. It may hold anything, so nobody else may see it.
const panicText = "the driver's own secret"

// panicking runs a worker whose log the test reads.
func panicking(t *testing.T) (*site, *loud) {
	t.Helper()
	log := &loud{}
	return running(t, func(c *RuntimeConfig) { c.Log = slog.New(slog.NewJSONHandler(log, nil)) }), log
}

// told checks how often a panic was told of, and how.
func (l *loud) told(t *testing.T, method string, g backend.Grant, times int) {
	t.Helper()
	lines := l.panics(method)
	if len(lines) != times {
		t.Errorf("%d panics of %s are in the log, want %d:\n%s", len(lines), method, times, strings.Join(lines, ""))
	}
	for _, line := range lines {
		for _, part := range []string{panicText, "guard_test.go", g.ID.String()} {
			if !strings.Contains(line, part) {
				t.Errorf("%q is missing in %s", part, line)
			}
		}
	}
}

// A driver whose Watch panics is asked again: the grant lives on, and so does
// everybody else's.
func TestAWatchThatPanicsIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, log := panicking(t)
		const times = 3
		exit, panics := make(chan struct{}), 0
		exits(s.driver, exit)
		ends := s.driver.watch
		script(s.driver, &s.driver.watch, func(ctx context.Context, id backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
			if id == (backend.GrantID{1}) && panics < times {
				panics++
				usage(backend.Usage{CPU: &backend.Measurement{Value: int64(panics), Source: backend.UsageHostMeasured}})
				panic(panicText)
			}
			return ends(ctx, id, usage)
		})
		g, _, p := s.ready()
		other, otherEnvelope := grantFor(t, 2)
		if _, err := s.Provision(as(t, alice), other, otherEnvelope); err != nil {
			t.Fatal(err)
		}
		var states []backend.State
		over := make(chan error, 1)
		go func() {
			over <- s.WatchUntilExit(as(t, alice), p.Instance.Handle, func(e backend.Event) error {
				if e.Instance != nil {
					states = append(states, e.Instance.State)
				}
				return nil
			})
		}()
		time.Sleep(time.Minute) //nolint:forbidigo // time in a bubble
		synctest.Wait()
		log.told(t, "Watch", g, times)
		if n := s.driver.count("watch"); n != times+2 {
			t.Errorf("Watch was called %d times for two grants, want %d", n, times+2)
		}
		if n := s.driver.count("terminate"); n != 0 {
			t.Errorf("a panic of Watch ended %d grants", n)
		}
		close(exit)
		if err := <-over; err != nil {
			t.Errorf("the watch ended with %v", err)
		}
		if len(states) == 0 || states[0] != backend.StateReady || states[len(states)-1] != backend.StateTerminated {
			t.Errorf("states: %v", states)
		}
		wantWholeLog(t, s.final(g.ID))
		wantWholeLog(t, s.final(other.ID))
	})
}

// A Provision that panics may have made something; the next call finds out.
func TestAProvisionThatPanicsIsUnclear(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, log := panicking(t)
		first := true
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			if ready, err := s.driver.make(ctx, o); !first {
				return ready, err
			}
			first = false
			panic(panicText)
		})
		g, e := grantFor(t, 1)
		_, err := s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.Internal, backenderr.CreatedUnknown)
		if strings.Contains(err.Error(), panicText) {
			t.Errorf("the caller is told what the panic said: %v", err)
		}
		log.told(t, "Provision", g, 1)
		p, err := s.Provision(as(t, alice), g, e)
		if err != nil || p.Instance.Attempt != 1 {
			t.Errorf("the next call: attempt %d, %v", p.Instance.Attempt, err)
		}
	})
}

// A Terminate that panics has confirmed nothing: it is called until it has.
func TestATerminateThatPanicsIsRepeated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, log := panicking(t)
		const times = 2
		panics := 0
		script(s.driver, &s.driver.terminate, func(ctx context.Context, id backend.GrantID) (*backend.ComputeLog, error) {
			if panics++; panics <= times {
				panic(panicText)
			}
			return nil, s.driver.gone(ctx, id)
		})
		g, _, p := s.ready()
		got, err := s.Terminate(as(t, alice), p.Instance.Handle)
		if err != nil || got.State != backend.StateTerminated || got.Log == nil || strings.Contains(got.Log.Log.Exit.Message, panicText) {
			t.Errorf("Terminate: %+v, %v", got, err)
		}
		log.told(t, "Terminate", g, times)
	})
}

// A sweep whose look panics is blind, once.
func TestAListThatPanicsSweepsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, log := panicking(t)
		script(s.driver, &s.driver.list, func() (backend.Listing, error) { panic(panicText) })
		if out, err := s.Sweep(t.Context(), false); !backenderr.Is(err, backenderr.Internal) || len(out) > 0 {
			t.Errorf("Sweep: %v, %v", out, err)
		}
		if n := len(log.panics("List")); n == 0 {
			t.Error("the log doesn't tell of it")
		}
	})
}
