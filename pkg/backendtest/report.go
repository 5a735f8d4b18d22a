package backendtest

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// ReportDirectory names the environment variable that holds the directory into
// which [Run] writes how much it swept, a file for each test, named by its
// package's directory and its own name. Without it, that is only logged.
const ReportDirectory = "BACKENDTEST_REPORT"

// report is how much one Run swept.
type report struct {
	mu      sync.Mutex
	tallies []*tally
}

// tally is how much one case swept.
type tally struct {
	name string
	mu   *sync.Mutex
	// calls of the clean run, by side.
	calls map[Side]int
	// runs by side and kind, of which some never reached their call.
	runs      map[Side]map[FaultKind]int
	unreached map[string]int
	left      int
}

func (e *env) tally(calls []Call) *tally {
	t := &tally{name: e.name, mu: &sync.Mutex{}, calls: map[Side]int{}, runs: map[Side]map[FaultKind]int{}, unreached: map[string]int{}}
	for _, c := range calls {
		t.calls[c.Side]++
	}
	if e.report != nil {
		e.report.mu.Lock()
		defer e.report.mu.Unlock()
		e.report.tallies = append(e.report.tallies, t)
	}
	return t
}

func (t *tally) leftOut(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left = n
}

func (t *tally) did(j job, reached bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !reached {
		t.unreached[fmt.Sprintf("%s#%d", j.Point, j.nth)]++
		return
	}
	if t.runs[j.Side] == nil {
		t.runs[j.Side] = map[FaultKind]int{}
	}
	t.runs[j.Side][j.kind]++
}

// missed returns how many runs never reached their call.
func (t *tally) missed() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, times := range t.unreached {
		n += times
	}
	return n
}

// String is one line for people.
func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	total := 0
	var sides []string
	for _, side := range slices.Sorted(maps.Keys(t.calls)) {
		sum := 0
		var kinds []string
		for _, kind := range slices.Sorted(maps.Keys(t.runs[side])) {
			sum += t.runs[side][kind]
			kinds = append(kinds, fmt.Sprintf("%d %s", t.runs[side][kind], kind))
		}
		total += sum
		sides = append(sides, fmt.Sprintf("%s: %d calls, %d runs (%s)", side, t.calls[side], sum, strings.Join(kinds, ", ")))
	}
	text := fmt.Sprintf("%s: swept %d; %s", t.name, total, strings.Join(sides, "; "))
	if len(t.unreached) > 0 {
		text += fmt.Sprintf("; not reached: %s", strings.Join(slices.Sorted(maps.Keys(t.unreached)), ", "))
	}
	if t.left > 0 {
		text += fmt.Sprintf("; left out: %d", t.left)
	}
	return text
}

// tell logs what was swept, and writes it where it is wanted.
func (r *report) tell(t *testing.T) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.tallies) == 0 {
		return
	}
	slices.SortStableFunc(r.tallies, func(a, b *tally) int { return cmp.Compare(a.name, b.name) })
	var text strings.Builder
	crashes, faults, missed := 0, 0, 0
	for _, one := range r.tallies {
		t.Log(one)
		fmt.Fprintf(&text, "%s\n", one)
		for _, kinds := range one.runs {
			for kind, n := range kinds {
				if kind == FaultCrashBefore || kind == FaultCrashAfter {
					crashes += n
				} else {
					faults += n
				}
			}
		}
		missed += one.missed()
	}
	fmt.Fprintf(&text, "in all: %d crashes, %d faults, %d runs that didn't reach their call\n", crashes, faults, missed)
	dir := os.Getenv(ReportDirectory)
	if dir == "" {
		return
	}
	// Tests of two packages may have the same name; they run in their directories.
	wd, err := os.Getwd()
	if err != nil {
		t.Error(err)
	}
	name := filepath.Base(wd) + "." + strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()) + ".txt"
	if err := os.MkdirAll(dir, 0o755); err != nil { // Anyone may read it.
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text.String()), 0o644); err != nil {
		t.Error(err)
	}
}
