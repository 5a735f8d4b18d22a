package receipt_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

var requestID = [32]byte{1, 2}

func pair(t testing.TB) (redact.Secret, []byte) {
	t.Helper()
	private, public, err := receipt.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

// fixedPair is a key pair that is the same in every run.
func fixedPair(t testing.TB) (redact.Secret, []byte) {
	t.Helper()
	key, err := hpke.DHKEM(ecdh.X25519()).DeriveKeyPair([]byte("a test key that protects nothing at all"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return redact.New(raw), key.PublicKey().Bytes()
}

func TestOnlyTheRequesterOpens(t *testing.T) {
	t.Parallel()
	private, public := pair(t)
	for _, plain := range []string{"", "x", strings.Repeat("k", 500), strings.Repeat("k", 64<<10)} {
		sealed, err := receipt.Seal(public, requestID, redact.New([]byte(plain)))
		if err != nil {
			t.Fatal(err)
		}
		if len(plain) > 8 && bytes.Contains(sealed, []byte(plain)) {
			t.Error("the sealed key holds the plaintext")
		}
		got, err := receipt.Open(private, requestID, sealed)
		if err != nil || string(got.Expose()) != plain {
			t.Errorf("%d bytes did not come back: %v", len(plain), err)
		}
		other, _ := pair(t)
		if _, err := receipt.Open(other, requestID, sealed); !errors.Is(err, receipt.ErrOpen) {
			t.Errorf("another key: %v", err)
		}
	}
	if _, err := receipt.Seal(public, requestID, redact.New(make([]byte, 64<<10+1))); err == nil {
		t.Error("a huge plaintext was sealed")
	}
}

func TestSealedKeyIsBoundToItsGrant(t *testing.T) {
	t.Parallel()
	private, public := pair(t)
	sealed, err := receipt.Seal(public, requestID, redact.New([]byte("key")))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range [][32]byte{{}, {1}, {1, 2, 3}} {
		if _, err := receipt.Open(private, id, sealed); !errors.Is(err, receipt.ErrOpen) {
			t.Errorf("%x opens it: %v", id, err)
		}
	}
}

func TestEveryChangedByteIsNoticed(t *testing.T) {
	t.Parallel()
	private, public := pair(t)
	sealed, err := receipt.Seal(public, requestID, redact.New([]byte("key")))
	if err != nil {
		t.Fatal(err)
	}
	// The top bit of an X25519 point is ignored by definition (RFC 7748), but
	// the encapsulated key is also part of the key schedule.
	for i := range sealed {
		for bit := range 8 {
			bad := bytes.Clone(sealed)
			bad[i] ^= 1 << bit
			if _, err := receipt.Open(private, requestID, bad); !errors.Is(err, receipt.ErrOpen) {
				t.Errorf("byte %d bit %d: %v", i, bit, err)
			}
		}
	}
	for n := range sealed {
		if _, err := receipt.Open(private, requestID, sealed[:n]); !errors.Is(err, receipt.ErrOpen) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := receipt.Open(private, requestID, append(bytes.Clone(sealed), 0)); !errors.Is(err, receipt.ErrOpen) {
		t.Errorf("a byte more: %v", err)
	}
}

// lowOrder are the encodings of the points of order 1, 2, 4 and 8, as listed in
// RFC 7748's references (cr.yp.to/ecdh.html, "validate").
var lowOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
	"5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

func TestUnusableKeysAreRefused(t *testing.T) {
	t.Parallel()
	bad := [][]byte{nil, {}, make([]byte, 31), make([]byte, 33)}
	for _, h := range lowOrder {
		b, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		high := bytes.Clone(b)
		high[31] |= 0x80
		bad = append(bad, b, high)
	}
	for _, key := range bad {
		if err := receipt.CheckPublicKey(key); !errors.Is(err, receipt.ErrInvalidKey) {
			t.Errorf("CheckPublicKey(%x) = %v", key, err)
		}
		if _, err := receipt.Seal(key, requestID, redact.New([]byte("k"))); !errors.Is(err, receipt.ErrInvalidKey) {
			t.Errorf("Seal to %x = %v", key, err)
		}
	}
	_, public := pair(t)
	if err := receipt.CheckPublicKey(public); err != nil {
		t.Errorf("a good key: %v", err)
	}
	sealed, err := receipt.Seal(public, requestID, redact.New([]byte("k")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := receipt.Open(redact.New(make([]byte, 31)), requestID, sealed); !errors.Is(err, receipt.ErrInvalidKey) {
		t.Errorf("a short private key: %v", err)
	}
}

// storedVector was sealed once to fixedPair's key with this file's request id.
func storedVector(t testing.TB) []byte {
	t.Helper()
	sealed, err := hex.DecodeString("01fbcfe1a620704f31ca744b15c25fb22df245374d0263dcde285fb4db5f7a1550" +
		"42c8f80b06d6eb25aa2b5bd3c3555753aacdbeaa9c953ce85ac7c4")
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

// TestFormatDoesNotDrift opens what an earlier build sealed, and checks the
// layout against HPKE used directly, as a client in another language does.
func TestFormatDoesNotDrift(t *testing.T) {
	t.Parallel()
	private, public := fixedPair(t)
	sealed := storedVector(t)
	got, err := receipt.Open(private, requestID, sealed)
	if err != nil || string(got.Expose()) != "a login key" {
		t.Fatalf("the stored vector: %v", err)
	}

	key, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	enc, sender, err := hpke.NewSender(key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte("compute-bridge/v1/sealed-login-key"))
	if err != nil {
		t.Fatal(err)
	}
	aad := append([]byte{1}, requestID[:]...)
	ciphertext, err := sender.Seal(aad, []byte("by hand"))
	if err != nil {
		t.Fatal(err)
	}
	got, err = receipt.Open(private, requestID, append(append([]byte{1}, enc...), ciphertext...))
	if err != nil || string(got.Expose()) != "by hand" {
		t.Errorf("sealed by hand: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	private, _ := fixedPair(f)
	sealed := storedVector(f) // The fuzzer's processes must agree on it.
	f.Add(sealed)
	f.Add(sealed[:33])
	f.Add(append([]byte{1}, make([]byte, 48)...))
	f.Add([]byte{2})
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := receipt.Open(private, requestID, in)
		if err != nil {
			if !errors.Is(err, receipt.ErrOpen) || !got.IsZero() {
				t.Fatalf("error %v with %d bytes", err, got.Len())
			}
			return
		}
		if !bytes.Equal(in, sealed) {
			t.Fatalf("a forgery was opened: %x", in)
		}
	})
}

func TestLogSignatureHoldsForItsBytesOnly(t *testing.T) {
	t.Parallel()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("cpu 5 s")
	signature, err := receipt.SignLog(private, message)
	if err != nil {
		t.Fatal(err)
	}
	if err := receipt.VerifyLog(public, message, signature); err != nil {
		t.Error(err)
	}
	if ed25519.Verify(public, message, signature) {
		t.Error("the signature is also one of the bare message")
	}
	otherPublic, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"other message":   receipt.VerifyLog(public, []byte("cpu 6 s"), signature),
		"other key":       receipt.VerifyLog(otherPublic, message, signature),
		"short signature": receipt.VerifyLog(public, message, signature[:63]),
		"no signature":    receipt.VerifyLog(public, message, nil),
		"no key":          receipt.VerifyLog(nil, message, signature),
		"bare signature":  receipt.VerifyLog(public, message, ed25519.Sign(private, message)),
	} {
		if !errors.Is(err, receipt.ErrBadSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := receipt.SignLog(ec, message); err == nil {
		t.Error("an ECDSA key signed a log")
	}
}
