package ec2backend

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// imageServer has one image, and answers for other paths as they say.
func imageServer(t *testing.T, image []byte) (address string, order worker.Order) {
	t.Helper()
	sum := sha256.Sum256(image)
	mux := http.NewServeMux()
	serve := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(image)))
	}
	mux.HandleFunc("/images/sha256/"+hex.EncodeToString(sum[:]), serve)
	mux.HandleFunc("/images/by/name.tar", serve)
	mux.HandleFunc("/images/whole", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(image)))
		_, _ = w.Write(image)
	})
	mux.HandleFunc("/images/moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/images/by/name.tar", http.StatusFound)
	})
	mux.HandleFunc("/images/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/images/round", http.StatusFound) })
	for _, status := range []int{403, 410, 500} {
		mux.HandleFunc(fmt.Sprintf("/images/status/%d", status), func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
	}
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	order.Grant.Image = backend.Image{Kind: backend.ImageOCIArchive, Digest: backend.Digest{Algorithm: backend.SHA256, Sum: sum}}
	return server.URL, order
}

func TestAGuestThatIsNoFileIsRefusedButToAJanitor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "guest")
	if err := os.WriteFile(file, []byte("a guest"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, fine := range map[string]bool{file: true, dir: false, filepath.Join(dir, "none"): false} {
		c := validConfig(t, "")
		c.Guest.AMD64.SHA256, c.Guest.AMD64.File = "", config.Path(path)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		_, err := newStore(c, openClients(t, c))
		if (err == nil) != fine || err != nil && !strings.Contains(err.Error(), "backend.guest.amd64.file") {
			t.Errorf("%s: %v", path, err)
		}
		env := testEnv(t)
		env.Janitor = true
		driver, err := Open(t.Context(), c, env)
		if err != nil {
			t.Errorf("a janitor, with %s: %v", path, err)
			continue
		}
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
	}
}

func openStore(t *testing.T, c Config) *store {
	t.Helper()
	s, err := newStore(c, openClients(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAnImageIsWhereItsDigestOrPointerSays(t *testing.T) {
	t.Parallel()
	base, order := imageServer(t, []byte("an image"))
	c := validConfig(t, "")
	c.ImageStore.Base = base + "/images/"
	s := openStore(t, c)
	digest := order.Grant.Image.Digest.String()
	for pointer, path := range map[string]string{
		"":                           "/images/sha256/" + strings.TrimPrefix(digest, "sha256:"),
		"by/name.tar":                "/images/by/name.tar",
		base + "/images/by/name.tar": "/images/by/name.tar",
		"moved":                      "/images/moved",
		"whole":                      "/images/whole",
	} {
		order.ImagePointer = pointer
		got, err := s.image(t.Context(), order)
		if err != nil || got.URL != base+path || got.Digest != digest || got.MaxBytes != c.ImageStore.MaxMiB<<20 {
			t.Errorf("%q: %+v, %v; want %s", pointer, got, err, path)
		}
	}
}

func TestAnImageThatCantBeFetchedIsRefusedBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	base, order := imageServer(t, make([]byte, 2<<20))
	down := httptest.NewServer(http.NotFoundHandler())
	down.Close()
	for _, test := range []struct {
		name, base, pointer string
		want                backenderr.Reason
	}{
		{"missing", base + "/images", "none", backenderr.ImageUnavailable},
		{"gone", base + "/images", "status/410", backenderr.ImageUnavailable},
		{"denied", base + "/images", "status/403", backenderr.ImageUnavailable},
		{"failing", base + "/images", "status/500", backenderr.ImageUnavailable},
		{"sent round in circles", base + "/images", "round", backenderr.ImageUnavailable},
		{"unreachable", down.URL, "", backenderr.ImageUnavailable},
		{"too large", base + "/images", "by/name.tar", backenderr.ImageInvalid},
		{"too large, told otherwise", base + "/images", "whole", backenderr.ImageInvalid},
		{"elsewhere", base + "/images", "http://169.254.169.254/latest/meta-data", backenderr.GrantInvalid},
		{"above the base", base + "/images", "../secret", backenderr.GrantInvalid},
		{"a query", base + "/images", "a?b", backenderr.GrantInvalid},
	} {
		c := validConfig(t, "")
		c.ImageStore.Base, c.ImageStore.MaxMiB = test.base, 1
		order.ImagePointer = test.pointer
		_, err := openStore(t, c).image(t.Context(), order)
		if !backenderr.Is(err, test.want) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
			t.Errorf("%s: %s, created %s: %v; want %s", test.name, backenderr.ReasonOf(err), backenderr.CreatedOf(err), err, test.want)
		}
	}
}

// An instance gets a signature for one object and a short time, and nothing that
// signs.
func TestAnAddressInABucketIsSignedForOneObjectAndNotForLong(t *testing.T) {
	t.Parallel()
	var asked []string
	bucket := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked = append(asked, r.Method+" "+r.URL.Path) }))
	t.Cleanup(bucket.Close)
	_, order := imageServer(t, []byte("an image"))
	c := validConfig(t, bucket.URL)
	c.ImageStore.Base, c.ImageStore.Region = "s3://images/bridge", "us-east-1"
	c.Guest.AMD64.URL = "s3://images/guest-amd64"
	s := openStore(t, c)
	key := strings.Replace(order.Grant.Image.Digest.String(), ":", "/", 1)
	got, err := s.image(t.Context(), order)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(got.URL)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	if q.Get("X-Amz-Expires") != "3600" {
		t.Errorf("works for %s s, want as long as configured", q.Get("X-Amz-Expires"))
	}
	if u.Path != "/images/bridge/"+key || q.Get("X-Amz-Signature") == "" || !strings.Contains(q.Get("X-Amz-Credential"), "/us-east-1/s3/") {
		t.Errorf("address %s", got.URL)
	}
	if strings.Contains(got.URL, "a secret for tests") {
		t.Errorf("the secret is in %s", got.URL)
	}
	if asked[0] != "GET /images/bridge/"+key {
		t.Errorf("looked with %s", asked[0])
	}
	guest, _, err := s.guest(t.Context(), archAMD64)
	if err != nil || !strings.HasPrefix(guest, bucket.URL+"/images/guest-amd64?") || !strings.Contains(guest, "X-Amz-Signature=") {
		t.Errorf("guest at %s, %v", guest, err)
	}
}

func TestASignatureIsNotInErrors(t *testing.T) {
	t.Parallel()
	down := httptest.NewServer(http.NotFoundHandler())
	down.Close()
	_, order := imageServer(t, []byte("an image"))
	c := validConfig(t, down.URL)
	c.ImageStore.Base = "s3://images/bridge"
	_, err := openStore(t, c).image(t.Context(), order)
	if err == nil || strings.Contains(err.Error(), "X-Amz") {
		t.Errorf("says %v", err)
	}
}

func TestTheGuestsDigestIsItsFiles(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "guest")
	if err := os.WriteFile(file, []byte("a guest"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := validConfig(t, "")
	c.Guest.AMD64 = GuestBinary{File: config.Path(file), URL: "https://store.example/guest"}
	c.Guest.ARM64 = GuestBinary{SHA256: strings.Repeat("cd", 32), URL: "https://store.example/guest-arm64"}
	s := openStore(t, c)
	sum := sha256.Sum256([]byte("a guest"))
	if address, got, err := s.guest(t.Context(), archAMD64); err != nil || address != c.Guest.AMD64.URL || got != hex.EncodeToString(sum[:]) {
		t.Errorf("amd64: %s, %s, %v", address, got, err)
	}
	if address, got, err := s.guest(t.Context(), archARM64); err != nil || address != c.Guest.ARM64.URL || got != c.Guest.ARM64.SHA256 {
		t.Errorf("arm64: %s, %s, %v", address, got, err)
	}
	if _, _, err := s.guest(t.Context(), "riscv64"); !backenderr.Is(err, backenderr.GrantNotSatisfiable) {
		t.Errorf("riscv64: %v", err)
	}
}
