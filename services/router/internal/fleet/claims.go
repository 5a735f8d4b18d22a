package fleet

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

// Claim says which backend a grant was given to.
type Claim struct {
	GrantID backend.GrantID
	// Backend is the member that has the grant, "" if there is no claim.
	Backend string
	// Generation numbers the placements of the claim: it grows whenever the claim
	// goes to a backend, be it again to the same one. It is the fence of the calls
	// that are made under the placement; 0 if there is no claim.
	Generation uint64
	// Leaving says that a router has given up an unclear attempt at Backend:
	// the grant is ended there, or about to be, and goes to another member once
	// that is confirmed.
	Leaving bool
	// Owner is the client identity that provisioned.
	Owner string
	// Content is the hash of grant and envelope; see [Content].
	Content [32]byte
	// ValidTo is the grant's deadline.
	ValidTo time.Time
	// Closed says that the grant was ended; a closed grant need not have a
	// claim.
	Closed bool
}

// Claims stores claims. It is shared by all routers that serve the same grants,
// and survives them. Implementations are safe for concurrent use.
//
// The fence of a method is that of the call for which it is called, 0 for none.
// A call that was refused before gets a [RefusedError] and changes nothing.
type Claims interface {
	// Get returns what is stored of a grant; Backend is empty if it has no
	// claim.
	Get(ctx context.Context, id backend.GrantID) (Claim, error)

	// Put stores the claim, at generation 1, if the grant has none yet. It
	// returns what is stored then, which may be another's, and whether this call
	// stored it.
	Put(ctx context.Context, c Claim, fence uint64) (stored Claim, created bool, err error)

	// Leave marks the claim as Leaving if it is still where was says, in the same
	// generation, and not closed, and returns what is stored then.
	Leave(ctx context.Context, was Claim) (Claim, error)

	// Move gives the grant to a backend, another or the same, if the claim is
	// still where was says, in the same generation, Leaving or not as was says,
	// and not closed. The new generation is above was's and above the given one.
	// Move returns what is stored then and whether this call stored it.
	Move(ctx context.Context, was Claim, to string, above, fence uint64) (stored Claim, moved bool, err error)

	// Refuse records that calls up to fence are refused for good, if the claim is
	// still as at says, or missing if at.Backend is empty. It returns the highest
	// fence that is refused. The caller knows that nothing exists under at and
	// that nothing more is made under it.
	Refuse(ctx context.Context, at Claim, fence uint64) (refused uint64, err error)

	// Close records that the grant is over. It is idempotent.
	Close(ctx context.Context, id backend.GrantID, by string) error
}

// RefusedError says that calls with the fence of this one were refused before.
type RefusedError struct {
	// Fence is the highest that was refused.
	Fence uint64
}

// Error implements error.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("calls up to fence %d were refused before", e.Fence)
}

// contentDomain separates this hash from all others.
const contentDomain = "computebridge/v1 router content\x00"

// Content returns the hash over everything in grant and envelope. Two calls for
// one grant are the same call if, and only if, it is equal.
//
// It is stored, so it must not change with the program: fields that a later
// version adds are left out while they are zero.
func Content(grant backend.Grant, envelope backend.Envelope) [32]byte {
	image, shape := grant.Image, grant.Shape
	content := struct {
		ID              string            `json:"request_id"`
		ProviderID      []byte            `json:"provider_id,omitempty"`
		PostHash        []byte            `json:"post_hash"`
		Digest          string            `json:"digest"`
		Kind            int32             `json:"kind"`
		CPU             int64             `json:"cpu_millicores"`
		RAM             int64             `json:"ram_mib"`
		Storage         int64             `json:"storage_gib"`
		MinIsolation    int32             `json:"min_isolation"`
		Region          string            `json:"region,omitempty"`
		Ports           []string          `json:"ports,omitempty"`
		Environment     map[string]string `json:"environment,omitempty"`
		NetworkMode     int32             `json:"network_mode"`
		AllowedPrefixes []string          `json:"allowed_prefixes,omitempty"`
		ValidTo         time.Time         `json:"valid_to"`
		AlmanacSequence uint64            `json:"almanac_sequence,omitempty"`
		PeerID          []byte            `json:"peer_id,omitempty"`
		X25519          []byte            `json:"x25519_public_key,omitempty"`
		SSHPublicKey    string            `json:"ssh_public_key,omitempty"`
		EnvelopeHash    []byte            `json:"envelope_post_hash"`
		ImagePointer    string            `json:"image_pointer,omitempty"`
		RegionHint      string            `json:"region_hint,omitempty"`
		Nonce           []byte            `json:"nonce,omitempty"`
	}{
		ID: grant.ID.String(), ProviderID: grant.ProviderID, PostHash: grant.PostHash[:],
		Digest: image.Digest.String(), Kind: int32(image.Kind),
		CPU: int64(shape.CPU), RAM: int64(shape.RAM), Storage: int64(shape.Storage),
		MinIsolation: int32(grant.MinIsolation), Region: string(grant.Region), Environment: grant.Environment,
		NetworkMode: int32(max(grant.Network.Mode, backend.NetworkOpen)), AllowedPrefixes: grant.Network.AllowedPrefixes,
		ValidTo: grant.ValidTo.UTC(), AlmanacSequence: grant.AlmanacSequence,
		PeerID: envelope.PeerID, X25519: envelope.X25519PublicKey, SSHPublicKey: envelope.SSHPublicKey,
		EnvelopeHash: envelope.PostHash[:], ImagePointer: envelope.ImagePointer,
		RegionHint: string(envelope.RegionHint), Nonce: envelope.Nonce,
	}
	for _, p := range grant.Ports {
		content.Ports = append(content.Ports, p.String())
	}
	text, err := json.Marshal(content)
	if err != nil {
		// Only a year beyond 9999 can't be written; all such deadlines are
		// refused by every backend.
		text = fmt.Appendf(nil, "%+v", content)
	}
	return sha256.Sum256(append([]byte(contentDomain), text...))
}
