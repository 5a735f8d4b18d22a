package main

import (
	"os"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/worker/workertest"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

// Who copies the configuration from docs/aws.md has one that loads, with and
// without the part about deadlines.
func TestTheDocumentedConfigurationIsValid(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, rest := range strings.Split(string(text), "\n```toml\n")[1:] {
		block, _, _ := strings.Cut(rest, "\n```")
		blocks = append(blocks, block)
	}
	if len(blocks) != 2 {
		t.Fatalf("docs/aws.md has %d blocks of TOML, want the least that works and the deadline's", len(blocks))
	}
	deadline, ok := strings.CutPrefix(blocks[1], "[backend]\n")
	if !ok {
		t.Fatalf("the second block doesn't begin with [backend]: %s", blocks[1])
	}
	for name, c := range map[string]struct{ text, deadline string }{
		"guest":    {blocks[0], "guest"},
		"platform": {strings.Replace(blocks[0], "[backend]\n", "[backend]\n"+deadline+"\n", 1), "platform"},
	} {
		loaded := workertest.LoadConfig[ec2backend.Config](t, []byte(c.text), nil)
		if loaded.Backend.Deadline != c.deadline {
			t.Errorf("%s: the deadline is the %s's", name, loaded.Backend.Deadline)
		}
	}
}
