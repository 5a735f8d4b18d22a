// Package devca is a certificate authority for development: a key in a file
// and certificates that are good for servers and clients alike. Production has
// an authority of its own, with keys that don't lie beside what they sign.
package devca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

// The files of an authority and of an identity.
const (
	CertFile  = "cert.pem"
	KeyFile   = "key.pem"
	CAFile    = "ca.pem"
	CAKeyFile = "ca-key.pem"
)

// backdate makes certificates valid on machines whose clock is a little late.
const backdate = 5 * time.Minute

var (
	// ErrExists says that a file would be overwritten.
	ErrExists = errors.New("exists already")
	// ErrName says that a name can't be an identity's.
	ErrName = errors.New("invalid name")
)

var (
	nameForm   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	domainForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// Init makes an authority in dir, for identities of this SPIFFE trust domain.
func Init(dir, trustDomain string, validity time.Duration, force bool) error {
	if !domainForm.MatchString(trustDomain) {
		return fmt.Errorf("%w: trust domain %q, want a lower-case DNS name", ErrName, trustDomain)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the authority's key: %w", err)
	}
	template, err := template(validity)
	if err != nil {
		return err
	}
	template.Subject = pkix.Name{CommonName: "compute bridge development CA for " + trustDomain}
	template.URIs = []*url.URL{{Scheme: "spiffe", Host: trustDomain}}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("sign the authority's certificate: %w", err)
	}
	return write(dir, force, []output{{CAKeyFile, keyPEM(key), 0o600}, {CAFile, certPEM(der), 0o644}})
}

// Identity is what a certificate shows.
type Identity struct {
	// Name is the identity's, also a DNS name of the certificate.
	Name string
	// DNS and IPs are further names and addresses of a server.
	DNS []string
	IPs []net.IP
}

// Issue makes a key and certificate for an identity in dir/name, beside a copy
// of the authority's certificate. It returns the identity's URI.
func Issue(dir string, id Identity, validity time.Duration, force bool) (string, error) {
	if !nameForm.MatchString(id.Name) {
		return "", fmt.Errorf("%w: %q, want lower-case letters, digits and hyphens", ErrName, id.Name)
	}
	ca, caKey, err := load(dir)
	if err != nil {
		return "", err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make the key of %s: %w", id.Name, err)
	}
	template, err := template(validity)
	if err != nil {
		return "", err
	}
	if template.NotAfter.After(ca.NotAfter) {
		template.NotAfter = ca.NotAfter // A chain is valid no longer than its root.
	}
	uri := &url.URL{Scheme: "spiffe", Host: ca.URIs[0].Host, Path: "/" + id.Name}
	template.Subject = pkix.Name{CommonName: id.Name}
	template.URIs = []*url.URL{uri}
	template.DNSNames = []string{id.Name, "localhost"}
	for _, name := range id.DNS {
		if !slices.Contains(template.DNSNames, name) {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	template.IPAddresses = append([]net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}, id.IPs...)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return "", fmt.Errorf("sign the certificate of %s: %w", id.Name, err)
	}
	return uri.String(), write(filepath.Join(dir, id.Name), force, []output{
		{KeyFile, keyPEM(key), 0o600}, {CertFile, certPEM(der), 0o644}, {CAFile, certPEM(ca.Raw), 0o644},
	})
}

func template(validity time.Duration) (*x509.Certificate, error) {
	// 128 random bits, as RFC 5280 asks for a unique number of at most 20 bytes.
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-backdate), NotAfter: now.Add(validity)}, nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil // Not with a key of P-256; write refuses an empty file.
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func load(dir string) (*x509.Certificate, crypto.Signer, error) {
	read := func(name, kind string) ([]byte, error) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no authority in %s: run bridgectl certs init first: %w", dir, err)
		}
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(text)
		if block == nil || block.Type != kind {
			return nil, fmt.Errorf("%s: no PEM block of type %s", filepath.Join(dir, name), kind)
		}
		return block.Bytes, nil
	}
	der, err := read(CAFile, "CERTIFICATE")
	if err != nil {
		return nil, nil, err
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", filepath.Join(dir, CAFile), err)
	}
	if !ca.IsCA || len(ca.URIs) == 0 {
		return nil, nil, fmt.Errorf("%s: not made by bridgectl certs init", filepath.Join(dir, CAFile))
	}
	if der, err = read(CAKeyFile, "PRIVATE KEY"); err != nil {
		return nil, nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: no private key in PKCS #8", filepath.Join(dir, CAKeyFile))
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(ca.PublicKey) {
		return nil, nil, fmt.Errorf("%s is not the key of %s", CAKeyFile, CAFile)
	}
	return ca, key, nil
}

type output struct {
	name string
	data []byte
	mode fs.FileMode
}

// write writes all files, or none if one exists and force is not set.
func write(dir string, force bool, files []output) error {
	if !force {
		for _, f := range files {
			if _, err := os.Lstat(filepath.Join(dir, f.name)); err == nil {
				return fmt.Errorf("%s %w; --force replaces it", filepath.Join(dir, f.name), ErrExists)
			}
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, f := range files {
		if len(f.data) == 0 {
			return fmt.Errorf("%s: empty", f.name)
		}
		path := filepath.Join(dir, f.name)
		// A new file: the mode of an old one would stay.
		temp, err := os.CreateTemp(dir, ".tmp-*")
		if err != nil {
			return err
		}
		_, err = temp.Write(f.data)
		err = errors.Join(err, temp.Chmod(f.mode), temp.Close())
		if err == nil {
			err = os.Rename(temp.Name(), path)
		}
		if err != nil {
			_ = os.Remove(temp.Name())
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}
