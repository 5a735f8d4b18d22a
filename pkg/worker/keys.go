package worker

import (
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
)

// keys are all keys that follow from the worker secret, and what is made of
// them.
type keys struct {
	deriver *sshkey.Deriver
	signer  *signer
}

// hostKeyEpoch is part of every derived host key. It changes with a release
// that must change every host key, and never while grants live.
const hostKeyEpoch = "1"

func newKeys(secret redact.Secret) (*keys, error) {
	d, err := sshkey.NewDeriver(secret, hostKeyEpoch)
	if err != nil {
		return nil, err
	}
	k, err := d.LogKey()
	if err != nil {
		return nil, err
	}
	return &keys{deriver: d, signer: &signer{key: k}}, nil
}

// hostKey implements Env.HostKey.
func (k *keys) hostKey(id backend.GrantID, attempt uint32) (private redact.Secret, public string, err error) {
	pair, err := k.deriver.HostKey(id, attempt)
	if err != nil {
		return redact.Secret{}, "", backenderr.Wrap(backenderr.Internal, err, "derive host key")
	}
	return pair.Private, pair.Public.String(), nil
}

// loginKey is who may log in, as the claim keeps it.
type loginKey struct {
	// public is the key's authorized_keys line.
	public string
	// sealed is the private key, sealed to the requester; nil if the requester
	// has it, or gets it in clear.
	sealed []byte
}

// login decides how the requester of a grant will log in: with its own key; with
// one that is made now and sealed; with one in clear, if that is allowed.
func (k *keys) login(id backend.GrantID, e backend.Envelope, allowPlaintext bool) (loginKey, error) {
	if e.SSHPublicKey != "" {
		key, err := sshkey.ParsePublicKey(e.SSHPublicKey)
		if err != nil {
			return loginKey{}, invalidEnvelope("envelope.ssh_public_key", err.Error())
		}
		return loginKey{public: key.String()}, nil
	}
	if len(e.X25519PublicKey) > 0 {
		if err := receipt.CheckPublicKey(e.X25519PublicKey); err != nil {
			return loginKey{}, invalidEnvelope("envelope.x25519_public_key", err.Error())
		}
		pair, err := sshkey.GenerateLoginKey()
		if err != nil {
			return loginKey{}, backenderr.Wrap(backenderr.Internal, err, "make login key").WithCreated(backenderr.CreatedNone)
		}
		defer pair.Private.Wipe()
		sealed, err := receipt.Seal(e.X25519PublicKey, id, pair.Private)
		if err != nil {
			return loginKey{}, backenderr.Wrap(backenderr.Internal, err, "seal login key").WithCreated(backenderr.CreatedNone)
		}
		return loginKey{public: pair.Public.String(), sealed: sealed}, nil
	}
	if !allowPlaintext {
		return loginKey{}, invalidEnvelope("envelope.ssh_public_key",
			"is missing, and so is envelope.x25519_public_key: one of them is needed, for the bridge hands out no private key in clear")
	}
	_, public, err := k.plaintextLogin(id)
	if err != nil {
		return loginKey{}, err
	}
	return loginKey{public: public}, nil
}

func invalidEnvelope(field, description string) error {
	return backenderr.Invalid(backenderr.GrantInvalid, backenderr.Violation{Field: field, Description: description})
}

func (k *keys) plaintextLogin(id backend.GrantID) (private redact.Secret, public string, err error) {
	pair, err := k.deriver.LoginKey(id)
	if err != nil {
		return redact.Secret{}, "", backenderr.Wrap(backenderr.Internal, err, "derive login key").WithCreated(backenderr.CreatedNone)
	}
	return pair.Private, pair.Public.String(), nil
}

// receipt returns the part of the receipt that follows from the claim. A
// plaintext key's private half is left out: it is not stored.
func (k *keys) receipt(claim ledger.Claim, e backend.Envelope) (backend.Receipt, error) {
	r := backend.Receipt{GrantID: backend.GrantID(claim.RequestID), ValidTo: claim.ValidTo}
	switch {
	case e.SSHPublicKey != "":
		key, err := sshkey.ParsePublicKey(claim.LoginPublicKey)
		if err != nil {
			return backend.Receipt{}, backenderr.Wrap(backenderr.Internal, err, "login key in the ledger")
		}
		r.RequesterKey = key.Fingerprint()
	case claim.SealedKey != nil:
		r.SealedKey = &backend.SealedKey{PublicKey: claim.LoginPublicKey, Sealed: claim.SealedKey}
	default:
		r.PlaintextKey = &backend.PlaintextKey{PublicKey: claim.LoginPublicKey}
	}
	return r, nil
}

// signer signs compute logs.
type signer struct{ key *sshkey.LogKey }

func (s *signer) logKey() backend.LogKey {
	return backend.LogKey{ID: s.key.ID(), PublicKey: s.key.PublicKey()}
}

func (s *signer) sign(log backend.ComputeLog) (*backend.SignedLog, error) {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(backendgrpc.LogToProto(log))
	if err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "marshal compute log")
	}
	signature, err := receipt.SignLog(s.key, body)
	if err != nil {
		return nil, backenderr.Wrap(backenderr.Internal, err, "sign compute log")
	}
	return &backend.SignedLog{Log: log, Body: body, KeyID: s.key.ID(), Signature: signature}, nil
}
