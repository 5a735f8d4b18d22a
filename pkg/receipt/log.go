package receipt

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
)

// logDomain keeps a log's signature from being valid for anything else that
// the same key may sign.
const logDomain = "compute-bridge/v1/compute-log\x00"

// ErrBadSignature says that a compute log is not what its signer signed.
var ErrBadSignature = errors.New("bad signature on the compute log")

func logInput(message []byte) []byte { return append([]byte(logDomain), message...) }

// SignLog signs the exact bytes of a compute log. The signer must hold an
// Ed25519 key.
func SignLog(signer crypto.Signer, message []byte) ([]byte, error) {
	if _, ok := signer.Public().(ed25519.PublicKey); !ok {
		return nil, fmt.Errorf("sign compute log: the key is a %T, want Ed25519", signer.Public())
	}
	signature, err := signer.Sign(nil, logInput(message), crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("sign compute log: %w", err)
	}
	return signature, nil
}

// VerifyLog checks a signature of [SignLog]; it returns [ErrBadSignature] for
// one that does not hold, and for a public key that is none.
func VerifyLog(public ed25519.PublicKey, message, signature []byte) error {
	if len(public) != ed25519.PublicKeySize {
		return fmt.Errorf("%w: public key has %d bytes, want %d", ErrBadSignature, len(public), ed25519.PublicKeySize)
	}
	if !ed25519.Verify(public, logInput(message), signature) {
		return ErrBadSignature
	}
	return nil
}
