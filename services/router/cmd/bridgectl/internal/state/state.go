// Package state keeps what a requester needs to log in to its grants: one file
// of mode 0600 for each grant, below $XDG_STATE_HOME/bridgectl/grants.
//
// A file is written before the grant is sent, so that neither a crash nor a
// lost answer loses the key to which the login key will be sealed. A login key
// itself is never written.
package state

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// ErrNotFound says that nothing is stored for a grant.
var ErrNotFound = errors.New("not stored on this machine")

// Grant is what is stored of a grant.
type Grant struct {
	ID backend.GrantID
	// Target is where it was sent.
	Target string
	// Request is what was sent.
	Request *bridgev1.ProvisionRequest
	// Response is the answer, without a login key in clear; nil until there is
	// one.
	Response *bridgev1.ProvisionResponse
	// X25519 is the private key to which the login key is sealed, empty when the
	// requester logs in with a key of its own.
	X25519 redact.Secret
	// Identity is the file of the requester's own private key, empty if unknown.
	Identity string
	// CreatedAt is when it was first sent.
	CreatedAt time.Time
}

// Handle returns the grant's handle, which before the answer is that of a
// worker.
func (g Grant) Handle() string {
	if h := g.Response.GetInstance().GetHandle(); h != "" {
		return h
	}
	return string(backend.HandleFor(g.ID))
}

// file is the format on disk.
type file struct {
	Version   int             `json:"version"`
	Target    string          `json:"target"`
	CreatedAt time.Time       `json:"created_at"`
	Handle    string          `json:"handle,omitempty"`
	Identity  string          `json:"identity_file,omitempty"`
	X25519    string          `json:"x25519_private_key,omitempty"`
	Request   json.RawMessage `json:"request"`
	Response  json.RawMessage `json:"response,omitempty"`
}

// version is that of the format.
const version = 1

// Store is a directory with grants. Processes may use one at the same time:
// files are replaced as a whole.
type Store struct{ dir string }

// Default returns the store of the environment: below $XDG_STATE_HOME, or
// ~/.local/state.
func Default(getenv func(string) string) (Store, error) {
	base := getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) { // The XDG specification says to ignore a relative one.
		home := getenv("HOME")
		if !filepath.IsAbs(home) {
			return Store{}, errors.New("neither XDG_STATE_HOME nor HOME says where to keep receipts")
		}
		base = filepath.Join(home, ".local", "state")
	}
	return Store{dir: filepath.Join(base, "bridgectl", "grants")}, nil
}

// Path returns the path of a grant's file with this extension.
func (s Store) Path(id backend.GrantID, extension string) string {
	return filepath.Join(s.dir, id.String()+extension)
}

// withoutSecrets returns the answer without a login key in clear.
func withoutSecrets(res *bridgev1.ProvisionResponse) *bridgev1.ProvisionResponse {
	if res.GetReceipt().GetPlaintextKey() == nil {
		return res
	}
	clone, _ := proto.Clone(res).(*bridgev1.ProvisionResponse)
	clone.GetReceipt().GetPlaintextKey().PrivateKey = nil
	return clone
}

// Save stores a grant in place of what was stored of it.
func (s Store) Save(g Grant) error {
	f := file{Version: version, Target: g.Target, CreatedAt: g.CreatedAt.UTC(), Identity: g.Identity}
	var err error
	if f.Request, err = protojson.Marshal(g.Request); err != nil {
		return fmt.Errorf("store grant: %w", err)
	}
	if g.Response != nil {
		f.Handle = g.Response.GetInstance().GetHandle()
		if f.Response, err = protojson.Marshal(withoutSecrets(g.Response)); err != nil {
			return fmt.Errorf("store grant: %w", err)
		}
	}
	if !g.X25519.IsZero() {
		f.X25519 = base64.StdEncoding.EncodeToString(g.X25519.Expose())
	}
	text, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return fmt.Errorf("store grant: %w", err)
	}
	return s.Write(s.Path(g.ID, ".json"), append(text, '\n'))
}

// Write replaces a file of the store, mode 0600.
func (s Store) Write(path string, data []byte) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("store grant: %w", err)
	}
	temp, err := os.CreateTemp(s.dir, ".tmp-*") // Mode 0600.
	if err != nil {
		return fmt.Errorf("store grant: %w", err)
	}
	_, err = temp.Write(data)
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(temp.Name())
		return fmt.Errorf("store grant: %w", err)
	}
	return nil
}

// Load returns what is stored of a grant, or [ErrNotFound].
func (s Store) Load(id backend.GrantID) (Grant, error) {
	path := s.Path(id, ".json")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Grant{}, fmt.Errorf("grant %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return Grant{}, fmt.Errorf("stored grant: %w", err)
	}
	var f file
	if err := json.Unmarshal(text, &f); err != nil {
		return Grant{}, fmt.Errorf("stored grant %s: %w", path, err)
	}
	if f.Version != version {
		return Grant{}, fmt.Errorf("stored grant %s: version %d, want %d: written by another bridgectl", path, f.Version, version)
	}
	g := Grant{ID: id, Target: f.Target, Identity: f.Identity, CreatedAt: f.CreatedAt, Request: &bridgev1.ProvisionRequest{}}
	// What a newer contract added is no reason not to log in.
	options := protojson.UnmarshalOptions{DiscardUnknown: true}
	if err := options.Unmarshal(f.Request, g.Request); err != nil {
		return Grant{}, fmt.Errorf("stored grant %s: %w", path, err)
	}
	if len(f.Response) > 0 {
		g.Response = &bridgev1.ProvisionResponse{}
		if err := options.Unmarshal(f.Response, g.Response); err != nil {
			return Grant{}, fmt.Errorf("stored grant %s: %w", path, err)
		}
	}
	if f.X25519 != "" {
		raw, err := base64.StdEncoding.DecodeString(f.X25519)
		if err != nil {
			return Grant{}, fmt.Errorf("stored grant %s: the x25519 key is damaged", path)
		}
		g.X25519 = redact.New(raw)
		clear(raw)
	}
	return g, nil
}

// Remove forgets a grant.
func (s Store) Remove(id backend.GrantID) error {
	var errs []error
	for _, extension := range []string{".json", ".known_hosts", ".pub"} {
		if err := os.Remove(s.Path(id, extension)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// IDs returns the ids of the stored grants, sorted.
func (s Store) IDs() ([]backend.GrantID, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("stored grants: %w", err)
	}
	var ids []backend.GrantID
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			if id, err := backend.ParseGrantID(name); err == nil {
				ids = append(ids, id)
			}
		}
	}
	slices.SortFunc(ids, func(a, b backend.GrantID) int { return slices.Compare(a[:], b[:]) })
	return ids, nil
}
