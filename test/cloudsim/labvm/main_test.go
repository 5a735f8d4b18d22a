package labvm

import (
	"flag"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) {
	flag.Parse()
	releases := []string{""}
	// It takes a minute to build, and only the long tests boot it.
	if skip := flag.Lookup("test.skip"); skip == nil || !strings.Contains(skip.Value.String(), "TestLong") {
		releases = append(releases, "bookworm")
	}
	lab.Main(m, lab.CheckGoroutines(), lab.CloudMachines(releases...))
}
