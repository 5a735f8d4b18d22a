// Package e2e holds the end-to-end tests: the built programs as processes with
// mutual TLS on real lab hosts, used with bridgectl, grpcurl and OpenSSH's own
// clients. `make test` builds what they use.
package e2e

import (
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines(), lab.CloudMachines("")) }
