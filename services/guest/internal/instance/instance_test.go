package instance

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"strings"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func newKey(t *testing.T) (ed25519.PrivateKey, gossh.PublicKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sshPublic, err := gossh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return private, sshPublic
}

// TestKeysThatCannotBeUsedAreRefused covers what guestapi can't see in a key's form.
func TestKeysThatCannotBeUsedAreRefused(t *testing.T) {
	private, public := newKey(t)
	plain, err := gossh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	encrypted, err := gossh.MarshalPrivateKeyWithPassphrase(private, "", []byte("pass"))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certificate := &gossh.Certificate{Key: public, CertType: gossh.UserCert, ValidBefore: gossh.CertTimeInfinity}
	if err := certificate.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	good := string(gossh.MarshalAuthorizedKey(public))
	for want, tc := range map[string]struct {
		block *pem.Block
		keys  []string
	}{
		"":                                  {plain, []string{good, good}},
		"host_key_pem: is encrypted":        {encrypted, []string{good}},
		"host_key_pem: is not a private":    {&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}, []string{good}},
		"authorized_keys: key 1: certifica": {plain, []string{good, string(gossh.MarshalAuthorizedKey(certificate))}},
		"authorized_keys: key 0: ssh: no k": {plain, []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"}},
	} {
		hostKey, keys, err := parseKeys(guestapi.Config{
			HostKey: guestapi.NewHostKey(string(pem.EncodeToMemory(tc.block))), AuthorizedKeys: tc.keys,
		})
		if want == "" {
			if err != nil || hostKey == nil || len(keys) != 2 {
				t.Errorf("good keys: %v", err)
			}
			continue
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
