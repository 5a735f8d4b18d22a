package backendtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// testCase is one sentence of the contract.
type testCase struct {
	// name is group/case.
	name string
	// needs are the optional parts of the fixture that it uses.
	needs []need
	// direct means in process only: it is about the provider's side and slow.
	direct bool
	run    func(e *env)
}

// cases returns the whole suite.
func cases() []testCase {
	return slices.Concat(
		identityCases(), capabilitiesCases(), satisfyCases(), provisionCases(), watchCases(),
		terminateCases(), errorCases(), ownershipCases(), crashCases(), faultCases(),
	)
}

// mode is the way from the suite to the backend.
type mode string

const (
	direct mode = "direct"
	grpc   mode = "grpc"
)

// Run holds a backend to the contract. Tests of other things must not run at
// the same time: it watches the process's goroutines.
func Run(t *testing.T, h Harness) {
	t.Helper()
	all := cases()
	for _, problem := range checkHarness(all, h) {
		t.Error(problem)
	}
	modes := []mode{direct, grpc}
	if h.DirectOnly {
		modes = modes[:1]
	}
	swept := &report{}
	defer swept.tell(t)
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			for _, c := range all {
				if reason, ok := h.Skip[c.name]; ok {
					t.Logf("excepted: %s: %s", c.name, reason)
					continue
				}
				if !h.wants(c) || c.direct && m != direct {
					continue
				}
				t.Run(c.name, func(t *testing.T) { runCase(t, h, c, m, swept) })
			}
		})
	}
}

// wants tells whether a case is to run.
func (h Harness) wants(c testCase) bool {
	return len(h.Only) == 0 || slices.Contains(h.Only, c.group())
}

func (c testCase) group() string {
	group, _, _ := strings.Cut(c.name, "/")
	return group
}

// checkHarness returns what is wrong with the choice of cases.
func checkHarness(all []testCase, h Harness) []string {
	var problems []string
	for _, group := range h.Only {
		if !slices.ContainsFunc(all, func(c testCase) bool { return c.group() == group }) {
			problems = append(problems, fmt.Sprintf("Only names %q, which is no group of cases", group))
		}
	}
	for name, reason := range h.Skip {
		if !slices.ContainsFunc(all, func(c testCase) bool { return c.name == name }) {
			problems = append(problems, fmt.Sprintf("Skip names %q, which is no case", name))
		}
		if strings.TrimSpace(reason) == "" {
			problems = append(problems, fmt.Sprintf("Skip gives no reason for %q", name))
		}
	}
	return problems
}

// runCase runs one case on a fresh fixture.
func runCase(t testing.TB, h Harness, c testCase, m mode, swept *report) {
	t.Helper()
	present := goleak.IgnoreCurrent()
	// Registered first and therefore run last.
	t.Cleanup(func() {
		if err := goleak.Find(present); err != nil {
			t.Errorf("goroutines are left: %v", err)
		}
	})
	f := h.Open(t)
	for _, n := range c.needs {
		if !f.has(n) {
			t.Fatalf("the fixture has no %s; give it one, or name the case in Skip with the reason", n)
		}
	}
	e := newEnv(t, h, f, m)
	e.name, e.report = string(m)+" "+c.name, swept
	defer e.finish()
	c.run(e)
}
