package backenderr_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// docs/errors.md is for people; what it says about a reason has to be so.
func TestDocumentedErrorsAreTheRealOnes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	section, seen, inSection := "", map[string]bool{}, map[string]map[string]bool{}
	row := regexp.MustCompile("^\\| `([A-Z_]+)` \\| ([A-Z_]+) \\| (.+) \\| (.+) \\| (yes|no)\\b.* \\|$")
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if title, ok := strings.CutPrefix(line, "## "); ok {
			section = title
			inSection[section] = map[string]bool{}
		}
		m := row.FindStringSubmatch(line)
		if m == nil {
			if regexp.MustCompile("^\\| `[A-Z]").MatchString(line) {
				t.Errorf("a row in another form: %s", line)
			}
			continue
		}
		reason := backenderr.Reason(m[1])
		seen[m[1]], inSection[section][m[1]] = true, true
		if got := codeName(reason.Code()); got != m[2] {
			t.Errorf("%s: %s is documented with code %s, has %s", section, reason, m[2], got)
		}
		if retry := m[5] == "yes"; retry != backenderr.Retryable(backenderr.New(reason, "x")) {
			t.Errorf("%s: %s is documented as retry: %s", section, reason, m[5])
		}
	}
	for _, name := range wireNames() {
		if !seen[name] {
			t.Errorf("%s isn't documented", name)
		}
		delete(seen, name)
	}
	for name := range seen {
		t.Errorf("%s is documented and doesn't exist", name)
	}

	// The contract lists each method's reasons.
	contract, err := os.ReadFile("../../proto/computebridge/v1/backend.proto")
	if err != nil {
		t.Fatal(err)
	}
	methods := regexp.MustCompile(`((?:  //.*\n)+)  rpc (\w+)\(`).FindAllSubmatch(contract, -1)
	if len(methods) != 6 {
		t.Fatalf("%d methods in the contract", len(methods))
	}
	for _, m := range methods {
		_, reasons, ok := strings.Cut(strings.ReplaceAll(string(m[1]), "//", ""), "Reasons:")
		method := string(m[2])
		for _, name := range regexp.MustCompile(`[A-Z_]{3,}`).FindAllString(reasons, -1) {
			if !inSection[method][name] {
				t.Errorf("%s of %s is in the contract and not in its table", name, method)
			}
			delete(inSection[method], name)
		}
		for name := range inSection[method] {
			t.Errorf("%s of %s is in its table and not in the contract", name, method)
		}
		if _, documented := inSection[method]; documented != ok {
			t.Errorf("%s: reasons in the contract: %t, a table here: %t", method, ok, documented)
		}
	}
}
