package sshkey_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
)

func must[T any](t testing.TB, v T, err error) T {
	t.Helper()
	check(t, err)
	return v
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func line(t testing.TB, public any) string {
	t.Helper()
	key, err := ssh.NewPublicKey(public)
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(must(t, key, err))))
}

func wireLine(keyType string, wire []byte) string {
	return keyType + " " + base64.StdEncoding.EncodeToString(wire)
}

// rsaOf makes a public key of a size without the cost of finding its primes.
func rsaOf(bits int) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
}

func goodKeys(t testing.TB) map[string]string {
	t.Helper()
	edPub, _, err := ed25519.GenerateKey(rand.Reader)
	keys := map[string]string{"ed25519": line(t, must(t, edPub, err))}
	for name, curve := range map[string]elliptic.Curve{"p256": elliptic.P256(), "p384": elliptic.P384(), "p521": elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		keys[name] = line(t, &must(t, key, err).PublicKey)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	keys["rsa 2048"] = line(t, &must(t, rsaKey, err).PublicKey)
	keys["sk ed25519"] = wireLine(ssh.KeyAlgoSKED25519, ssh.Marshal(struct {
		Type string
		Key  []byte
		App  string
	}{ssh.KeyAlgoSKED25519, edPub, "ssh:"}))
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	point, err2 := must(t, p256, err).PublicKey.Bytes()
	keys["sk p256"] = wireLine(ssh.KeyAlgoSKECDSA256, ssh.Marshal(struct {
		Type, Curve string
		Key         []byte
		App         string
	}{ssh.KeyAlgoSKECDSA256, "nistp256", must(t, point, err2), "ssh:"}))
	return keys
}

func TestPlainKeysAreAcceptedAndMadeCanonical(t *testing.T) {
	t.Parallel()
	for name, want := range goodKeys(t) {
		for form, in := range map[string]string{
			"plain": want, "comment": want + " me@home with words", "line end": want + "\n", "crlf": want + "\r\n",
			"blanks": "  " + strings.Replace(want, " ", "\t ", 1) + "  ", "comment that looks like a key": want + " ssh-rsa AAAA",
		} {
			key, err := sshkey.ParsePublicKey(in)
			if err != nil {
				t.Errorf("%s, %s: %v", name, form, err)
				continue
			}
			if key.String() != want || key.Type() != strings.Fields(want)[0] {
				t.Errorf("%s, %s: came back as %q", name, form, key)
			}
			if key.Fingerprint() != ssh.FingerprintSHA256(key.SSH()) || !strings.HasPrefix(key.Fingerprint(), "SHA256:") {
				t.Errorf("%s: fingerprint %q", name, key.Fingerprint())
			}
		}
	}
}

func TestOtherKeysAreRefusedWithAReason(t *testing.T) {
	t.Parallel()
	good := goodKeys(t)["ed25519"]
	b64 := strings.Fields(good)[1]
	wire, err := base64.StdEncoding.DecodeString(b64)
	check(t, err)
	caPublic, caPrivate, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	ca, err := ssh.NewSignerFromKey(caPrivate)
	check(t, err)
	sshPublic, err := ssh.NewPublicKey(caPublic)
	cert := &ssh.Certificate{Key: must(t, sshPublic, err), CertType: ssh.UserCert}
	check(t, cert.SignCert(rand.Reader, ca))

	for name, tc := range map[string]struct{ in, want string }{
		"empty":              {"", "empty"},
		"blank":              {" \t \n", "empty"},
		"type only":          {"ssh-ed25519", "base64 part is missing"},
		"comment line":       {"# " + good, "options"},
		"options":            {`command="rm -rf /" ` + good, "options"},
		"bare option":        {"no-pty " + good, "options"},
		"certificate":        {string(ssh.MarshalAuthorizedKey(cert)), "certificates"},
		"cert in plain type": {wireLine("ssh-ed25519", cert.Marshal()), "the key is"},
		"two lines":          {good + "\n" + good, "more than one line"},
		"two line ends":      {good + "\n\n", "more than one line"},
		"NUL":                {good + "\x00", "control"},
		"bad UTF-8":          {good + " \xff", "control or malformed"},
		"PEM":                {"-----BEGIN OPENSSH PRIVATE KEY-----", "PEM"},
		"dss":                {"ssh-dss " + b64, "DSA"},
		"unknown type":       {"ssh-ed448 " + b64, `unknown key type "ssh-ed448"`},
		"type mismatch":      {"ssh-rsa " + b64, "the line says ssh-rsa"},
		"bad base64":         {"ssh-ed25519 " + b64 + "!", "base64"},
		"truncated":          {wireLine("ssh-ed25519", wire[:len(wire)-1]), "invalid"},
		"trailing bytes":     {wireLine("ssh-ed25519", append(bytes.Clone(wire), 0)), "invalid"},
		"empty blob":         {"ssh-ed25519 =", "base64"},
		"short rsa":          {line(t, rsaOf(2047)), "2047 bits"},
		"long rsa":           {line(t, rsaOf(16385)), "too large"},
		"too long":           {good + " " + strings.Repeat("x", 9000), "longer than"},
	} {
		key, err := sshkey.ParsePublicKey(tc.in)
		if !errors.Is(err, sshkey.ErrInvalidKey) || !strings.Contains(err.Error(), tc.want) || !key.IsZero() {
			t.Errorf("%s: %v, %v; want an error with %q", name, key, err, tc.want)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("%s: the error repeats raw input: %q", name, err)
		}
	}
}

func FuzzParsePublicKey(f *testing.F) {
	for _, key := range goodKeys(f) {
		f.Add(key + " comment\n")
	}
	f.Add(`command="x" ssh-ed25519 AAAA`)
	f.Add("ssh-rsa AAAAB3NzaC1yc2E=")
	f.Fuzz(func(t *testing.T, in string) {
		key, err := sshkey.ParsePublicKey(in)
		if err != nil {
			if !errors.Is(err, sshkey.ErrInvalidKey) || !key.IsZero() {
				t.Fatalf("%v with key %v", err, key)
			}
			return
		}
		out := key.String()
		if strings.ContainsAny(out, "\n\r\x00") || len(strings.Fields(out)) != 2 {
			t.Fatalf("%q is not a plain line", out)
		}
		again, err := sshkey.ParsePublicKey(out)
		if err != nil || !again.Equal(key) {
			t.Fatalf("%q does not parse back: %v", out, err)
		}
		// OpenSSH's own reading of the line must find the same key.
		other, _, options, _, err := ssh.ParseAuthorizedKey([]byte(out))
		if err != nil || len(options) != 0 || !bytes.Equal(other.Marshal(), key.Wire()) {
			t.Fatalf("%q reads otherwise as an authorized_keys line: %v", out, err)
		}
	})
}

func TestLoginKeysAreRandomAndUsable(t *testing.T) {
	t.Parallel()
	a, err := sshkey.GenerateLoginKey()
	check(t, err)
	b, err := sshkey.GenerateLoginKey()
	check(t, err)
	if a.Public.Equal(b.Public) {
		t.Fatal("two login keys are equal")
	}
	checkPair(t, a)
	if out := fmt.Sprintf("%v %+v %#v", a, a, a); strings.Contains(out, "BEGIN") {
		t.Error("printing a key pair shows the private key")
	}
}

// checkPair signs with the private half and verifies with the public one.
func checkPair(t *testing.T, pair sshkey.KeyPair) {
	t.Helper()
	signer, err := pair.Signer()
	check(t, err)
	sig, err := signer.Sign(rand.Reader, []byte("data"))
	check(t, err)
	if err := pair.Public.SSH().Verify([]byte("data"), sig); err != nil {
		t.Errorf("the halves do not belong together: %v", err)
	}
	if _, err := sshkey.ParsePublicKey(pair.Public.String()); err != nil {
		t.Error(err)
	}
}

// testSecret is 32 distinct bytes, for derivations that must not drift.
func testSecret() redact.Secret {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(i)
	}
	return redact.New(b)
}

func deriver(t *testing.T, epoch string) *sshkey.Deriver {
	t.Helper()
	d, err := sshkey.NewDeriver(testSecret(), epoch)
	return must(t, d, err)
}

func TestHostKeyIsByteEqualOnRepeat(t *testing.T) {
	t.Parallel()
	first, err := deriver(t, "e1").HostKey([32]byte{1}, 1)
	check(t, err)
	again, err := deriver(t, "e1").HostKey([32]byte{1}, 1)
	check(t, err)
	if !first.Private.Equal(again.Private) || !first.Public.Equal(again.Public) {
		t.Error("the same inputs give another key")
	}
	checkPair(t, first)
	// A drift of the derivation would change every host key in the field.
	const want = "SHA256:XUWWeAtaz0HiAPKwX3kZxmsvjJ5vXjmdW9a3kN+3/DA"
	if got := first.Public.Fingerprint(); got != want {
		t.Errorf("fingerprint = %s, want %s", got, want)
	}
}

func TestEveryInputChangesTheHostKey(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	add := func(what string, d *sshkey.Deriver, id [32]byte, attempt uint32) {
		pair, err := d.HostKey(id, attempt)
		check(t, err)
		if other, ok := seen[pair.Public.String()]; ok {
			t.Errorf("%s and %s share a key", what, other)
		}
		seen[pair.Public.String()] = what
	}
	add("base", deriver(t, "e1"), [32]byte{1}, 1)
	add("epoch", deriver(t, "e2"), [32]byte{1}, 1)
	add("no epoch", deriver(t, ""), [32]byte{1}, 1)
	add("longer epoch", deriver(t, "e1\x01"), [32]byte{}, 1)
	add("grant", deriver(t, "e1"), [32]byte{2}, 1)
	add("attempt", deriver(t, "e1"), [32]byte{1}, 2)
	other, err := sshkey.NewDeriver(redact.New(bytes.Repeat([]byte("0123456789"), 4)), "e1")
	add("secret", must(t, other, err), [32]byte{1}, 1)
	log, err := deriver(t, "e1").LogKey()
	check(t, err)
	if _, ok := seen[line(t, log.PublicKey())]; ok {
		t.Error("the log key is a host key")
	}
	if _, err := deriver(t, "").HostKey([32]byte{}, 0); err == nil {
		t.Error("attempt 0 has a key")
	}
	if _, err := sshkey.NewDeriver(testSecret(), strings.Repeat("e", 65)); err == nil {
		t.Error("an epoch of 65 bytes was accepted")
	}
}

func TestLogKeySignsAndStaysOverEpochs(t *testing.T) {
	t.Parallel()
	a, err := deriver(t, "e1").LogKey()
	check(t, err)
	b, err := deriver(t, "e2").LogKey()
	check(t, err)
	if !bytes.Equal(a.PublicKey(), b.PublicKey()) || a.ID() != b.ID() || a.ID() != sshkey.LogKeyID(a.PublicKey()) {
		t.Error("the log key changes with the epoch")
	}
	if !strings.HasPrefix(a.ID(), "ed25519:") || len(a.ID()) != len("ed25519:")+32 {
		t.Errorf("id = %q", a.ID())
	}
	sig, err := a.Sign(nil, []byte("m"), crypto.Hash(0))
	if !ed25519.Verify(a.PublicKey(), []byte("m"), must(t, sig, err)) {
		t.Error("the signature does not verify")
	}
	if out := fmt.Sprintf("%v %+v %#v", a, *a, a); strings.Contains(out, "[0 1 2") {
		t.Error("printing a log key shows it")
	}
}

func TestKnownHostsLinesPinExactlyOneAddress(t *testing.T) {
	t.Parallel()
	pair, err := deriver(t, "").HostKey([32]byte{1}, 1)
	check(t, err)
	for _, tc := range []struct {
		host string
		port uint16
		want string
	}{
		{"host.example", 22, "host.example"},
		{"host.example", 31022, "[host.example]:31022"},
		{"192.0.2.7", 31022, "[192.0.2.7]:31022"},
		{"2001:db8::7", 22, "2001:db8::7"},
		{"2001:db8::7", 31022, "[2001:db8::7]:31022"},
		{"[2001:db8::7]", 31022, "[2001:db8::7]:31022"},
	} {
		got, err := sshkey.KnownHostsLine(tc.host, tc.port, pair.Public)
		if err != nil || got != tc.want+" "+pair.Public.String() {
			t.Errorf("%s %d: %q, %v", tc.host, tc.port, got, err)
		}
		file := filepath.Join(t.TempDir(), "known_hosts")
		check(t, os.WriteFile(file, []byte(got+"\n"), 0o600))
		verify, err := knownhosts.New(file)
		check(t, err)
		addr := net.JoinHostPort(strings.Trim(tc.host, "[]"), fmt.Sprint(tc.port))
		if err := verify(addr, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: int(tc.port)}, pair.Public.SSH()); err != nil {
			t.Errorf("%s: a client does not find the pinned key: %v", addr, err)
		}
	}
	for _, host := range []string{"", "a,b", "*.example", "a b", "!a", "|1|x|y", "@cert-authority", "#x", "a\nb", "a?", "[a]:1 b"} {
		if got, err := sshkey.KnownHostsLine(host, 22, pair.Public); err == nil {
			t.Errorf("%q was accepted: %q", host, got)
		}
	}
	if _, err := sshkey.KnownHostsLine("a", 0, pair.Public); err == nil {
		t.Error("port 0 was accepted")
	}
	if _, err := sshkey.KnownHostsLine("a", 22, sshkey.PublicKey{}); err == nil {
		t.Error("no key was accepted")
	}
}

func TestSecretFileIsMadeOnceAndPrivate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	if _, err := sshkey.LoadSecret(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("LoadSecret of nothing = %v", err)
	}
	var wg sync.WaitGroup
	secrets := make([]redact.Secret, 20)
	for i := range secrets {
		wg.Go(func() {
			var err error
			if secrets[i], err = sshkey.CreateSecret(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, s := range secrets {
		if s.Len() != 32 || !s.Equal(secrets[0]) {
			t.Fatal("not all got the same secret")
		}
	}
	info, err := os.Stat(path)
	if must(t, info, err).Mode().Perm() != 0o600 {
		t.Errorf("mode = %04o", info.Mode().Perm())
	}
	left, err := os.ReadDir(dir)
	if len(must(t, left, err)) != 1 {
		t.Errorf("left behind: %v", left)
	}
	loaded, err := sshkey.LoadSecret(path)
	if err != nil || !loaded.Equal(secrets[0]) {
		t.Errorf("LoadSecret: %v", err)
	}
}

func TestWeakSecretFilesAreRefused(t *testing.T) {
	t.Parallel()
	random := make([]byte, 5000)
	_, _ = rand.Read(random)
	for name, tc := range map[string]struct {
		content []byte
		mode    os.FileMode
		want    string
	}{
		"short":          {random[:31], 0o600, "31 bytes"},
		"zeros":          {make([]byte, 64), 0o600, "not random"},
		"huge":           {random, 0o600, "longer than"},
		"group readable": {random[:32], 0o640, "0640"},
		"world readable": {random[:32], 0o604, "0604"},
	} {
		path := filepath.Join(t.TempDir(), "secret")
		check(t, os.WriteFile(path, tc.content, 0o600))
		check(t, os.Chmod(path, tc.mode))
		for _, load := range []func(string) (redact.Secret, error){sshkey.LoadSecret, sshkey.CreateSecret} {
			if _, err := load(path); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s: %v, want %q and the path", name, err, tc.want)
			}
		}
	}
	if _, err := sshkey.LoadSecret(t.TempDir()); err == nil || !strings.Contains(err.Error(), "regular") {
		t.Errorf("a directory: %v", err)
	}
	if _, err := sshkey.CreateSecret(filepath.Join(t.TempDir(), "absent", "s")); err == nil {
		t.Error("a secret was made in a directory that does not exist")
	}
}
