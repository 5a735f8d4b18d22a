package labvm

import (
	"testing"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines(), lab.CloudMachines("", "bookworm")) }
