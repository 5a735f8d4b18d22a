package ec2backend

import (
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

func testBackend() *Backend {
	return &Backend{env: worker.Env{BridgeID: "bridge", Backend: "aws"}}
}

func TestTagsSayWhatTheyWereMadeFrom(t *testing.T) {
	t.Parallel()
	b := testBackend()
	id := identity{backend.GrantID{1, 2, 0xff}, 3}
	p := params{
		ValidTo: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC), Content: "abc",
		Shape: backend.Shape{CPU: 2000, RAM: 4096, Storage: 20},
	}
	got, ok := readTags(b.tags(id, p))
	want := labels{identity: id, validTo: p.ValidTo, shape: p.Shape, content: "abc"}
	if !ok || got != want {
		t.Errorf("got %+v, %t; want %+v", got, ok, want)
	}
}

func TestTagsThatNameNobodyAreNobodys(t *testing.T) {
	t.Parallel()
	grant := strings.Repeat("ab", 32)
	for name, tags := range map[string]map[string]string{
		"none":            {},
		"no attempt":      {tagGrant: grant},
		"attempt zero":    {tagGrant: grant, tagAttempt: "0"},
		"attempt no word": {tagGrant: grant, tagAttempt: "one"},
		"short grant":     {tagGrant: "abcd", tagAttempt: "1"},
		"no hex":          {tagGrant: strings.Repeat("zz", 32), tagAttempt: "1"},
	} {
		if got, ok := readTags(tagList(tags)); ok {
			t.Errorf("%s: read as %+v", name, got)
		}
	}
}

func TestEqualTagsAreEqualEachTime(t *testing.T) {
	t.Parallel()
	b := testBackend()
	first := b.tags(identity{attempt: 1}, params{})
	for range 20 {
		if diff := cmp.Diff(names(first), names(b.tags(identity{attempt: 1}, params{}))); diff != "" {
			t.Fatal(diff)
		}
	}
}

func names(tags []types.Tag) (out []string) {
	for _, t := range tags {
		out = append(out, aws.ToString(t.Key))
	}
	return out
}

func FuzzReadTags(f *testing.F) {
	f.Add(strings.Repeat("ab", 32), "1", "2026-11-22T10:00:00Z", "1/2/3")
	f.Add("", "-1", "never", "//")
	f.Fuzz(func(t *testing.T, grant, attempt, validTo, shape string) {
		got, ok := readTags(tagList(map[string]string{tagGrant: grant, tagAttempt: attempt, tagValidTo: validTo, tagShape: shape}))
		if ok && (got.attempt == 0 || !strings.EqualFold(got.grant.String(), grant)) {
			t.Errorf("%q, %q read as %s, %d", grant, attempt, got.grant, got.attempt)
		}
		if got.shape.CPU < 0 || got.shape.RAM < 0 || got.shape.Storage < 0 {
			t.Errorf("%q read as %s", shape, got.shape)
		}
	})
}

func TestScheduleNamesFitAndSayWhoseTheyAre(t *testing.T) {
	t.Parallel()
	b, other := testBackend(), testBackend()
	other.env.BridgeID = "another"
	id := identity{backend.GrantID{0xfb, 0xff, 9}, 4294967295}
	name := b.scheduleName(id)
	if len(name) > 64 || strings.Trim(name, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.") != "" {
		t.Errorf("EventBridge Scheduler refuses %q (%d characters)", name, len(name))
	}
	if got, ok := b.readScheduleName(name); !ok || got != id {
		t.Errorf("%q read as %v, %t", name, got, ok)
	}
	if got, ok := other.readScheduleName(name); ok {
		t.Errorf("another bridge reads %q as its own: %v", name, got)
	}
}

func FuzzReadScheduleName(f *testing.F) {
	b := testBackend()
	f.Add(b.scheduleName(identity{backend.GrantID{1}, 1}))
	f.Add(b.schedulePrefix() + "!.1")
	f.Fuzz(func(t *testing.T, name string) {
		id, ok := b.readScheduleName(name)
		if ok && id.attempt == 0 {
			t.Errorf("%q read as attempt 0", name)
		}
	})
}
