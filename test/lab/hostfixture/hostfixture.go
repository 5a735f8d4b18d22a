// Package hostfixture is the provider's side of a backendtest.Fixture whose
// provider is a set of lab hosts: what the conformance suite sees of them and
// does to them behind the worker's back, the same for a worker in the test's own
// process and for the built program.
package hostfixture

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// Site is a bridge on lab hosts. Its methods may be called at the same time.
type Site struct {
	// BridgeID is the bridge's name.
	BridgeID string
	// Hosts are the worker's.
	Hosts []*lab.Host
	// Patience is how long a busy machine may take for what takes a second on an
	// idle one.
	Patience time.Duration
	// Usable blocks until a running worker can use its hosts again, after they
	// were cut off. It is needed by Inject only.
	Usable func(ctx context.Context) error

	mu        sync.Mutex // protects what follows
	state     [sha256.Size]byte
	mutations int
	faults    int
}

// reconnects is how long a worker's way back to a host may take: the longest pause
// between two dials, 30 s, and a dial and a look at the host on a busy machine.
const reconnects = 45 * time.Second

// Fill sets those parts of a fixture that are the hosts'. The workloads of the
// fixture's grants must be shells that read their standard input, and have
// NAME=value in their environment.
func (s *Site) Fill(t testing.TB, f *backendtest.Fixture) {
	t.Helper()
	f.Login = backendtest.LogIn
	f.Reconnects = reconnects
	f.Leftovers = s.leftovers
	f.Runs = func(id backend.GrantID) bool {
		units, err := s.everywhere(t.Context(), "systemctl", "list-units", "--plain", "--no-legend", s.units(&id))
		if err != nil {
			t.Errorf("list units: %v", err)
		}
		return len(units) > 0
	}
	f.Mutations = func() int { return s.countMutations(t) }
	f.Exit = func(id backend.GrantID, status backendtest.ExitStatus) error {
		line := "exit " + strconv.Itoa(int(status.Code))
		if status.Signal != "" {
			line = "kill -" + status.Signal + " $$"
		}
		return s.typeInto(t.Context(), s.units(&id), line)
	}
	f.Vanish = func(id backend.GrantID) error { return s.vanish(t.Context(), id) }
	f.FailBoot = func(console string) { s.failBoot(t, console) }
	f.History = func(id backend.GrantID) backendtest.History { return s.history(t, id) }
	f.Inject = func(fault backendtest.Fault) backendtest.Injection { return s.inject(t, fault) }
	f.Record = func(id backend.GrantID) func() []backendtest.Call { return s.record(t, id) }
	f.CreatePoint = stepDisk
	f.ReadPoint = lookAtHosts
}

// units returns a pattern for the units of a grant, or of all.
func (s *Site) units(id *backend.GrantID) string {
	if id == nil {
		return "cb-" + s.BridgeID + "-*.service"
	}
	return "cb-" + s.BridgeID + "-" + id.String() + "-*.service"
}

// everywhere runs a command on all hosts and returns the lines that it prints.
func (s *Site) everywhere(ctx context.Context, args ...string) ([]string, error) {
	var lines []string
	for _, h := range s.Hosts {
		out, err := h.Exec(ctx, args...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			lines = append(lines, h.Name+": "+strings.TrimSpace(line))
		}
	}
	return lines, nil
}

// quickLook lists what a grant makes on a host, by one command: h.Leftovers
// finds more and takes half a second. Containers and disks are in the grants'
// directories. systemd lists a start that comes too late as an inactive unit
// until it has looked at the unit's condition, which refuses it: what is inactive is
// given a second to be gone, or to be something else. $1 is the bridge.
const quickLook = `
cd "/var/lib/compute-bridge/$1/grants" 2>/dev/null && find . -mindepth 1 -maxdepth 1 -printf 'directory %f\n'
for try in $(seq 20); do
	units=$(systemctl list-units --all --plain --no-legend 'cb-*')
	echo "$units" | grep -q ' inactive ' || break
	sleep 0.05
done
echo "$units" | while read -r unit rest; do [ -z "$unit" ] || echo "unit $unit"; done
for file in /etc/containers/networks/cb-* /sys/class/net/cb* /run/compute-bridge/"$1"/*; do [ ! -e "$file" ] || [ "${file##*/}" = lease ] || echo "$file"; done
grep -o ' /var/lib/compute-bridge/[^ ]* ' /proc/self/mounts
nft list table inet "compute_bridge_$(echo "$1" | tr - _)" 2>/dev/null | grep 'elements ='
true`

var (
	grantIDs  = regexp.MustCompile(`[0-9a-f]{64}`)
	unitNamed = regexp.MustCompile(`cb-[a-z0-9-]+-[0-9a-f]{64}-[0-9]+\.service`)
)

func (s *Site) leftovers(ctx context.Context) ([]backendtest.Leftover, error) {
	lines, err := s.everywhere(ctx, "sh", "-c", quickLook, "sh", s.BridgeID)
	var out []backendtest.Leftover
	for _, line := range lines {
		l := backendtest.Leftover{Name: line}
		if text := grantIDs.FindString(line); text != "" {
			if l.GrantID, err = backend.ParseGrantID(text); err != nil {
				return nil, err
			}
		}
		out = append(out, l)
	}
	return out, err
}

// countMutations counts how often the hosts were found changed.
func (s *Site) countMutations(t testing.TB) int {
	t.Helper()
	lines, err := s.everywhere(t.Context(), "sh", "-c", quickLook+`
find /var/lib/compute-bridge /etc/containers -printf '%p %s %T@ %C@\n' | sort
nft list ruleset
podman images --all --quiet --no-trunc`, "sh", s.BridgeID)
	if err != nil {
		t.Errorf("look at the hosts: %v", err)
	}
	state := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	s.mu.Lock()
	defer s.mu.Unlock()
	if state != s.state {
		s.state = state
		s.mutations++
	}
	return s.mutations
}

// typeLine writes a line to the standard input of a unit's workload, which is a
// shell. Its exit code is 3 if there is none.
const typeLine = `
for unit in $(systemctl list-units --plain --no-legend "$1" | cut -d ' ' -f 1); do
	group=$(systemctl show --property=ControlGroup --value "$unit")
	for pid in $(find "/sys/fs/cgroup$group" -name cgroup.procs -exec cat {} +); do
		if [ "$(tr '\0' ' ' <"/proc/$pid/cmdline")" = 'sh ' ]; then
			echo "$2" >"/proc/$pid/fd/0"
			exit 0
		fi
	done
done
exit 3`

var errNoWorkload = errors.New("no workload runs")

// typeInto types a line into the workload of a unit.
func (s *Site) typeInto(ctx context.Context, units, line string) error {
	for _, h := range s.Hosts {
		_, err := h.Exec(ctx, "sh", "-c", typeLine, "sh", units, line)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 3 {
			continue
		}
		return err
	}
	return errNoWorkload
}

// vanish takes away a grant's instance with all traces. Its unit ends in good
// order, so that nothing stays on the host, but it can't write down its usage,
// for a directory is in the place of that file.
func (s *Site) vanish(ctx context.Context, id backend.GrantID) error {
	_, err := s.everywhere(ctx, "sh", "-c", `
cd "/var/lib/compute-bridge/$1/grants" && [ -d "$2" ] || exit 0
mkdir "$2/$4"
systemctl stop "$3"
rm --recursive --force "$2"`,
		"sh", s.BridgeID, id.String(), s.units(&id), guestapi.SpoolFileName)
	return err
}

// failBoot has the next workload end before it is ready: its SSH is kept closed
// meanwhile.
func (s *Site) failBoot(t testing.TB, console string) {
	t.Helper()
	for _, h := range s.Hosts {
		if _, err := h.Exec(t.Context(), "nft", "add table inet closed; add chain inet closed forward { type filter hook forward priority -500; }; "+
			"add rule inet closed forward tcp dport 61022 reject with tcp reset"); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), s.Patience)
	done := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-done
	})
	go func() {
		defer close(done)
		defer cancel()
		all := s.units(nil)
		quoted := "'" + strings.ReplaceAll(console, "\n", `\n`) + `\n'`
		if err := poll(ctx, func() error { return s.typeInto(ctx, all, "printf "+quoted+"; exit 127") }); err != nil {
			t.Errorf("make a workload fail: %v", err)
		}
		err := poll(ctx, func() error {
			units, err := s.everywhere(ctx, "systemctl", "list-units", "--plain", "--no-legend", all)
			if err == nil && len(units) > 0 {
				err = fmt.Errorf("still there: %s", units)
			}
			return err
		})
		if err != nil {
			t.Errorf("wait for the end of a failed workload: %v", err)
		}
		if _, err := s.everywhere(ctx, "nft", "delete table inet closed"); err != nil {
			t.Errorf("open SSH again: %v", err)
		}
	}()
}

// poll repeats a look until it succeeds or ctx ends.
func poll(ctx context.Context, look func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := look()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// history reads from the hosts' journals which units were ever started for a
// grant, and when they had gone.
func (s *Site) history(t testing.TB, id backend.GrantID) backendtest.History {
	t.Helper()
	lines, err := s.everywhere(context.WithoutCancel(t.Context()), "sh", "-c",
		`journalctl --sync; journalctl --output=short-unix --quiet --identifier=systemd --grep="$1" || true`, "sh", id.String())
	if err != nil {
		t.Errorf("read the journals: %v", err)
	}
	// Each line is a host, the time there, which is the same machine's, and text.
	at := func(line string) string { return strings.Fields(line)[1] }
	slices.SortStableFunc(lines, func(a, b string) int { return strings.Compare(at(a), at(b)) })
	var out backendtest.History
	running := map[string]bool{}
	for _, line := range lines {
		unit := strings.Fields(line)[0] + unitNamed.FindString(line)
		switch {
		case strings.Contains(line, "]: Starting cb-"):
			out.Created++
			running[unit] = true
		case strings.Contains(line, ".service: Deactivated successfully"), strings.Contains(line, ".service: Failed with result"):
			delete(running, unit)
		}
		out.AtOnce = max(out.AtOnce, len(running))
	}
	return out
}

// CheckNothingIsLeft searches the hosts thoroughly, for anything but images that
// a worker may keep for the next grant.
func (s *Site) CheckNothingIsLeft(t testing.TB) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // The test may be over.
	for _, h := range s.Hosts {
		left, err := h.Leftovers(ctx, "image ")
		if err != nil {
			t.Error(err)
		}
		if len(left) > 0 {
			t.Errorf("left behind on %s:\n\t%s", h.Name, strings.Join(left, "\n\t"))
		}
	}
}
