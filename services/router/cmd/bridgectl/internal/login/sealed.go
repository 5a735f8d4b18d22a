package login

import (
	"fmt"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Unseal opens a login key that was sealed to an x25519 key of ours. A sealed
// key is bound to its grant.
func Unseal(x25519 redact.Secret, id backend.GrantID, key *bridgev1.SealedKey) (redact.Secret, error) {
	private, err := receipt.Open(x25519, id, key.GetSealed())
	if err != nil {
		return redact.Secret{}, fmt.Errorf("login key: %w", err)
	}
	return private, nil
}
