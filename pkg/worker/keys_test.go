package worker

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

func TestRequestersOwnKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		_, e, p := s.ready()
		key, err := sshkey.ParsePublicKey(e.SSHPublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if p.Receipt.RequesterKey != key.Fingerprint() || p.Receipt.SealedKey != nil || p.Receipt.PlaintextKey != nil {
			t.Errorf("receipt: %+v", p.Receipt)
		}
	})
}

func TestSealedKeyIsTheSameEachTimeAndOpens(t *testing.T) {
	t.Parallel()
	private, public, err := receipt.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		e.SSHPublicKey, e.X25519PublicKey = "", public
		var authorized string
		script(s.driver, &s.driver.provision, func(ctx context.Context, o Order) (Ready, error) {
			authorized = o.LoginKey
			return s.driver.make(ctx, o)
		})
		first, err := s.Provision(as(t, alice), g, e)
		if err != nil {
			t.Fatal(err)
		}
		s.stop()
		s.start()
		s.run()
		second, err := s.Provision(as(t, alice), g, e)
		if err != nil || !cmp.Equal(first.Receipt, second.Receipt, cmp.Comparer(redact.Secret.Equal)) {
			t.Errorf("after a restart the receipt differs: %v", err)
		}
		opened, err := receipt.Open(private, g.ID, first.Receipt.SealedKey.Sealed)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.ParsePrivateKey(opened.Expose())
		if err != nil {
			t.Fatal(err)
		}
		key, err := sshkey.ParsePublicKey(authorized)
		if err != nil || !bytes.Equal(signer.PublicKey().Marshal(), key.Wire()) || first.Receipt.SealedKey.PublicKey != authorized {
			t.Errorf("the sealed key isn't the one that may log in: %v", err)
		}
		s.neverStored(opened)
	})
}

// neverStored fails if a login key, or its seed, is in the ledger's files.
func (s *site) neverStored(key redact.Secret) {
	s.t.Helper()
	raw, err := ssh.ParseRawPrivateKey(key.Expose())
	if err != nil {
		s.t.Fatal(err)
	}
	seeds := [][]byte{key.Expose(), []byte("PRIVATE KEY")}
	if seed, ok := raw.(interface{ Seed() []byte }); ok {
		seeds = append(seeds, seed.Seed(), []byte(base64.StdEncoding.EncodeToString(seed.Seed())))
	} else {
		s.t.Fatalf("key is a %T", raw)
	}
	// With its worker secret it could be derived, but that has a file of its
	// own.
	seeds = append(seeds, s.config.Secret.Expose())
	for _, suffix := range []string{"", "-wal"} {
		content, err := os.ReadFile(s.path + suffix)
		if err != nil {
			if suffix != "" && errors.Is(err, os.ErrNotExist) {
				continue
			}
			s.t.Fatal(err)
		}
		for i, seed := range seeds {
			if bytes.Contains(content, seed) {
				s.t.Errorf("the ledger's file%s holds the login key (form %d)", suffix, i)
			}
		}
	}
}

func TestPlaintextKeyOnlyIfAllowedAndNeverStored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		g, e := grantFor(t, 1)
		e.SSHPublicKey = ""
		_, err := s.Provision(as(t, alice), g, e)
		wantReason(t, err, backenderr.GrantInvalid, backenderr.CreatedNone)
		if n := s.driver.count("provision"); n != 0 {
			t.Error("made without a key")
		}
		s.stop()

		s.config.AllowPlaintextReceipts = true
		s.start()
		s.run()
		first, err := s.Provision(as(t, alice), g, e)
		if err != nil {
			t.Fatal(err)
		}
		key := first.Receipt.PlaintextKey
		if key == nil {
			t.Fatalf("receipt: %+v", first.Receipt)
		}
		signer, err := ssh.ParsePrivateKey(key.PrivateKey.Expose())
		if err != nil {
			t.Fatal(err)
		}
		if public, err := sshkey.ParsePublicKey(key.PublicKey); err != nil || !bytes.Equal(signer.PublicKey().Marshal(), public.Wire()) {
			t.Errorf("the halves of the key don't belong together: %v", err)
		}
		s.neverStored(key.PrivateKey)
		s.stop()
		s.start()
		s.run()
		second, err := s.Provision(as(t, alice), g, e)
		if err != nil || second.Receipt.PlaintextKey == nil || !second.Receipt.PlaintextKey.PrivateKey.Equal(key.PrivateKey) {
			t.Errorf("another key after a restart: %v", err)
		}
	})
}

func TestUnusableKeysAreRefusedBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		for name, c := range map[string]struct {
			change func(*backend.Envelope)
			field  string
		}{
			"low order x25519 key": {func(e *backend.Envelope) { e.SSHPublicKey, e.X25519PublicKey = "", make([]byte, 32) }, "envelope.x25519_public_key"},
			"short ed25519 key": {func(e *backend.Envelope) {
				e.SSHPublicKey = "ssh-ed25519 " + base64.StdEncoding.EncodeToString([]byte("\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x01x"))
			}, "envelope.ssh_public_key"},
			"neither": {func(e *backend.Envelope) { e.SSHPublicKey = "" }, "envelope.ssh_public_key"},
		} {
			g, e := grantFor(t, 1)
			c.change(&e)
			_, err := s.Provision(as(t, alice), g, e)
			wantReason(t, err, backenderr.GrantInvalid, backenderr.CreatedNone)
			if v := backenderr.From(err).Violations; len(v) != 1 || v[0].Field != c.field {
				t.Errorf("%s: violations %+v", name, v)
			}
		}
		if n := s.driver.count("provision"); n != 0 {
			t.Error("the driver was asked")
		}
	})
}

func TestComputeLogsVerifyWithTheDeclaredKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := running(t, nil)
		script(s.driver, &s.driver.watch, func(_ context.Context, _ backend.GrantID, usage func(backend.Usage)) (backend.Exit, error) {
			usage(backend.Usage{CPU: &backend.Measurement{Value: 5, Source: backend.UsageHostMeasured}})
			time.Sleep(time.Minute) //nolint:forbidigo // time in a bubble
			return backend.Exit{Reason: backend.EndWorkloadExited}, nil
		})
		c, err := s.Capabilities(t.Context())
		if err != nil || c.Backend != "metal" || len(c.LogKeys) != 1 {
			t.Fatalf("capabilities: %+v, %v", c, err)
		}
		g, _, _ := s.ready()
		var logs []backend.SignedLog
		err = s.WatchUntilExit(as(t, alice), backend.HandleFor(g.ID), func(e backend.Event) error {
			for _, log := range []*backend.SignedLog{e.Usage, e.Log} {
				if log != nil {
					logs = append(logs, *log)
				}
			}
			return nil
		})
		if err != nil || len(logs) == 0 {
			t.Fatalf("watch: %v, %v", logs, err)
		}
		all, err := s.ComputeLogs(as(t, root), time.Time{}, 10)
		if err != nil || len(all) != 1 || !cmp.Equal(all[0], logs[len(logs)-1]) {
			t.Errorf("listed: %+v, %v", all, err)
		}
		for _, log := range logs {
			if log.KeyID != c.LogKeys[0].ID {
				t.Errorf("signed with %s", log.KeyID)
			}
			if err := receipt.VerifyLog(c.LogKeys[0].PublicKey, log.Body, log.Signature); err != nil {
				t.Error(err)
			}
			var body bridgev1.ComputeLog
			if err := proto.Unmarshal(log.Body, &body); err != nil || !cmp.Equal(backendgrpc.LogFromProto(&body), log.Log) {
				t.Errorf("what is shown isn't what is signed: %v", err)
			}
		}
	})
}
