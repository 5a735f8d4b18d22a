package main

import (
	"os"
	"reflect"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/compute-bridge/compute-bridge/pkg/worker/workertest"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

// The example is the reference of the configuration: it must load as it is,
// with the files that it names beside it.
func TestExampleIsValid(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("aws-worker.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	c := workertest.LoadConfig[ec2backend.Config](t, example, nil)
	b := c.Backend
	if c.BridgeID != "example" || len(c.Listen) != 2 || len(c.Clients) != 2 || len(b.Regions) != 1 || b.Regions[0].Name != "eu-central-1" ||
		b.Guest.AMD64.URL == "" || len(b.Prices) != 1 {
		t.Errorf("loaded %+v", c)
	}
}

// What is written in the example without a comment sign is what the worker does
// without it: people read defaults there.
func TestExampleShowsTheDefaults(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("aws-worker.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	var part struct {
		Backend ec2backend.Config `toml:"backend"`
	}
	if err := toml.Unmarshal(example, &part); err != nil {
		t.Fatal(err)
	}
	got := part.Backend
	var want ec2backend.Config
	want.SetDefaults()
	// What has no default, or is the site's.
	want.InstanceFamilies, want.Regions, want.Guest, want.Prices = got.InstanceFamilies, got.Regions, got.Guest, got.Prices
	want.ImageStore.Base, want.ImageStore.Region = got.ImageStore.Base, got.ImageStore.Region
	want.ScheduleGroup = got.ScheduleGroup // shown in a comment
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the example says\n%+v\nthe defaults are\n%+v", got, want)
	}
}
