package hostbackend

import (
	"flag"
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

// TestMain runs more tests at once than there are processors: each has a host
// of its own, and waits for it most of the time.
func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "6"); err != nil { // the command line's goes before it
		panic(err)
	}
	lab.Main(m)
}
