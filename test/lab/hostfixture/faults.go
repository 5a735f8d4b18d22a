package hostfixture

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// The steps that a host takes for a grant and at which the suite has it fail,
// as program and argument, and the looking at what it holds.
const (
	stepDisk    = "mkfs.ext4 -q"
	stepRun     = "podman run"
	stepStop    = "podman stop"
	stepNetwork = "podman network"
	lookAtHosts = "network"
)

// record names the steps that can be made to fail: those of the making of a
// grant, or, if the hosts hold it, those of its end.
func (s *Site) record(t testing.TB, id backend.GrantID) (stop func() []backendtest.Call) {
	t.Helper()
	steps := []string{stepDisk, stepRun}
	left, err := s.leftovers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(left, func(l backendtest.Leftover) bool { return l.GrantID == id }) {
		steps = []string{stepStop, stepNetwork}
	}
	return func() []backendtest.Call {
		var calls []backendtest.Call
		for _, step := range steps {
			calls = append(calls, backendtest.Call{Side: backendtest.SideProvider, Point: step, Mutates: true})
		}
		return calls
	}
}

// faultProgram stands in for a program of the host. It looks whether a fault
// waits for this call: what is told of it in a file is the step, the grant, what
// to do instead, and whether to do so again. It says that the fault was reached,
// waits until it may go on, and does what the program does, or fails.
const faultProgram = `#!/bin/sh
name=${0##*/}
for fault in /run/faults/*; do
	[ -e "$fault/told" ] || continue
	read -r program argument grant instead times <"$fault/told"
	[ "$program" = "$name" ] || continue
	case " $* " in *" $argument "*) ;; *) continue ;; esac
	case "$*" in *"$grant"*) ;; *) continue ;; esac
	[ "$times" = always ] || rm "$fault/told"
	touch "$fault/reached"
	while [ -e "$fault/hold" ]; do sleep 0.01; done
	[ "$instead" = go ] || exit 1
	break
done
exec "/usr/lib/unfaulted/$name" "$@"
`

// MakeFaulty puts faultProgram in the place of the programs of the
// steps at which Inject works.
func MakeFaulty(t testing.TB, h *lab.Host) {
	t.Helper()
	_, err := h.Exec(t.Context(), "sh", "-ec", `
mkdir -p /usr/lib/unfaulted /run/faults
for program in /usr/sbin/mkfs.ext4 /usr/bin/podman; do
	cp -a "$(readlink -f "$program")" "/usr/lib/unfaulted/${program##*/}"
	rm "$program"
	printf %s "$1" >"$program"
	chmod 755 "$program"
done`, "sh", faultProgram)
	if err != nil {
		t.Fatal(err)
	}
}

// injection is a fault that is waiting or at work.
type injection struct {
	reached <-chan struct{}
	release func()
}

// Reached implements backendtest.Injection.
func (i *injection) Reached() <-chan struct{} { return i.reached }

// Release implements backendtest.Injection.
func (i *injection) Release() { i.release() }

// inject has the hosts fail. A call that fails for the worker is one during
// which its connections are lost: before the step has its effect, or after.
func (s *Site) inject(t testing.TB, f backendtest.Fault) backendtest.Injection {
	t.Helper()
	if f.Point == lookAtHosts {
		return s.cutOff(t, f.Kind)
	}
	instead, times := "go", "once"
	if f.Kind == backendtest.FaultUnavailable || f.Kind == backendtest.FaultThrottled {
		instead = "fail"
	}
	if f.Always {
		times = "always"
	}
	s.mu.Lock()
	s.faults++
	dir := fmt.Sprintf("/run/faults/%d", s.faults)
	s.mu.Unlock()
	told := strings.Join([]string{f.Point, f.GrantID.String(), instead, times}, " ")
	if _, err := s.everywhere(t.Context(), "sh", "-ec", `mkdir "$1"; touch "$1/hold"; echo "$2" >"$1/new"; mv "$1/new" "$1/told"`, "sh", dir, told); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*s.Patience)
	reached := make(chan struct{})
	i := &injection{reached: reached}
	var watches sync.WaitGroup
	var once sync.Once
	for _, h := range s.Hosts {
		watches.Go(func() {
			for ctx.Err() == nil {
				if _, err := h.Exec(ctx, "sh", "-c", `until [ -e "$1/reached" ]; do sleep 0.01; done; rm "$1/reached"`, "sh", dir); err != nil {
					return // it was released
				}
				once.Do(func() { close(reached) })
				if f.Kind != backendtest.FaultSlow {
					// A release meanwhile waits for both.
					whole := context.WithoutCancel(ctx)
					if err := h.ResetConnections(whole); err != nil {
						t.Errorf("reset connections: %v", err)
					}
					if _, err := h.Exec(whole, "rm", "-f", dir+"/hold"); err != nil {
						t.Errorf("let a step go on: %v", err)
					}
				}
			}
		})
	}
	i.release = sync.OnceFunc(func() {
		cancel()
		watches.Wait()
		clean := context.WithoutCancel(t.Context())
		if _, err := s.everywhere(clean, "rm", "-rf", dir); err != nil {
			t.Errorf("end a fault: %v", err)
		}
		if f.Kind != backendtest.FaultSlow {
			s.waitForHosts(t)
		}
	})
	t.Cleanup(i.release)
	return i
}

// waitForHosts waits until a running worker can use its hosts again.
func (s *Site) waitForHosts(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), s.Patience)
	defer cancel()
	if err := s.Usable(ctx); err != nil {
		t.Errorf("wait for the hosts: %v", err)
	}
}

// cutOff takes the hosts off the network, with or without a word to the worker.
func (s *Site) cutOff(t testing.TB, kind backendtest.FaultKind) backendtest.Injection {
	t.Helper()
	for _, h := range s.Hosts {
		if kind != backendtest.FaultSlow {
			if err := h.ResetConnections(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.CutOff(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	reached := make(chan struct{})
	close(reached)
	i := &injection{reached: reached}
	i.release = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), s.Patience)
		defer cancel()
		for _, h := range s.Hosts {
			if err := h.Restore(ctx); err != nil {
				t.Errorf("end a fault: %v", err)
			}
		}
		s.waitForHosts(t)
	})
	t.Cleanup(i.release)
	return i
}
