package state_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/state"
)

func open(t *testing.T) (state.Store, string) {
	t.Helper()
	dir := t.TempDir()
	store, err := state.Default(func(name string) string {
		return map[string]string{"XDG_STATE_HOME": dir}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	return store, filepath.Join(dir, "bridgectl", "grants")
}

func TestWhatIsSavedComesBack(t *testing.T) {
	t.Parallel()
	store, dir := open(t)
	id := backend.GrantID{1, 2, 3}
	if _, err := store.Load(id); !errors.Is(err, state.ErrNotFound) {
		t.Error(err)
	}
	want := state.Grant{
		ID: id, Target: "unix:/x", CreatedAt: time.Date(2030, 1, 31, 12, 0, 0, 0, time.UTC), Identity: "/home/a/.ssh/id",
		X25519:  redact.New([]byte("0123456789abcdef0123456789abcdef")),
		Request: &bridgev1.ProvisionRequest{Grant: &bridgev1.Grant{RequestId: id[:], Environment: map[string]string{"A": "b"}}},
	}
	if err := store.Save(want); err != nil {
		t.Fatal(err)
	}
	if got, err := store.Load(id); err != nil || got.Handle() != id.String() {
		t.Errorf("before the answer: %v, handle %s", err, got.Handle())
	}
	want.Response = &bridgev1.ProvisionResponse{Instance: &bridgev1.Instance{Handle: "metal/" + id.String()}, Receipt: &bridgev1.Receipt{InstanceHost: "h"}}
	if err := store.Save(want); err != nil {
		t.Fatal(err)
	}
	got, err := store.Load(id)
	if err != nil {
		t.Fatal(err)
	}
	if !got.X25519.Equal(want.X25519) || got.Handle() != "metal/"+id.String() {
		t.Error("the key or the handle did not come back")
	}
	if diff := cmp.Diff(want.Request, got.Request, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want.Response, got.Response, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if got.Target != want.Target || got.Identity != want.Identity || !got.CreatedAt.Equal(want.CreatedAt) {
		t.Errorf("%+v", got)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, store.Path(id, ".json"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if ids, err := store.IDs(); err != nil || len(ids) != 1 || ids[0] != id {
		t.Error(ids, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("%d files", len(entries))
	}
	if err := errors.Join(store.Remove(id), store.Remove(id)); err != nil {
		t.Error(err)
	}
	if ids, err := store.IDs(); err != nil || len(ids) != 0 {
		t.Error(ids, err)
	}
}

func TestLoginKeyInClearIsNotStored(t *testing.T) {
	t.Parallel()
	store, _ := open(t)
	id := backend.GrantID{1}
	res := &bridgev1.ProvisionResponse{Receipt: &bridgev1.Receipt{LoginKey: &bridgev1.Receipt_PlaintextKey{PlaintextKey: &bridgev1.PlaintextKey{PrivateKey: []byte("SECRET")}}}}
	if err := store.Save(state.Grant{ID: id, Request: &bridgev1.ProvisionRequest{}, Response: res}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(store.Path(id, ".json"))
	if err != nil || bytes.Contains(text, []byte("SECRET")) || bytes.Contains(text, []byte("U0VDUkVU")) {
		t.Errorf("%v: %s", err, text)
	}
	if len(res.GetReceipt().GetPlaintextKey().GetPrivateKey()) == 0 {
		t.Error("the caller's message was changed")
	}
}

func TestDamagedFilesAreNamed(t *testing.T) {
	t.Parallel()
	store, dir := open(t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, text := range []string{"", "{", `{"version": 2}`, `{"version": 1, "request": 7}`, `{"version": 1, "request": {}, "x25519_private_key": "%"}`, `{"version": 1, "request": {}, "response": []}`} {
		id := backend.GrantID{byte(i)}
		if err := os.WriteFile(store.Path(id, ".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Load(id); err == nil || errors.Is(err, state.ErrNotFound) || !bytes.Contains([]byte(err.Error()), []byte(id.String())) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, env := range []map[string]string{{}, {"HOME": "relative"}} {
		if _, err := state.Default(func(name string) string { return env[name] }); err == nil {
			t.Errorf("%v: there is a place", env)
		}
	}
}
