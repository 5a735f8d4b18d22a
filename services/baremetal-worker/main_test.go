package main

import (
	"os"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker/workertest"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostbackend"
)

// The example is the reference of the configuration: it must load as it is,
// with the files that it names beside it.
func TestExampleIsValid(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("baremetal-worker.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	login, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	c := workertest.LoadConfig[hostbackend.Config](t, example, map[string][]byte{"ssh/id_ed25519": login.Private.Expose()})
	if c.BridgeID != "example" || len(c.Listen) != 2 || len(c.Clients) != 2 || len(c.Backend.Hosts) != 1 || c.Backend.Hosts[0].Name != "rack1-a" {
		t.Errorf("loaded %+v", c)
	}
}
