// Package replicas holds the tests of a bridge with two of everything: two
// bare-metal workers on the same lab hosts and two routers, as processes, on one
// PostgreSQL server. They use the built programs (make build).
package replicas

import (
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }
