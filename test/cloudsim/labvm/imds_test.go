package labvm

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// newTestIMDS returns a service with a clock of its own.
func newTestIMDS(now *time.Time) *imds {
	boot := cloudsim.Boot{
		ID: "i-0123456789abcdef0", Image: image, UserData: []byte{0x1f, 0x8b, 0},
		Metadata: map[string]string{"placement/region": "us-east-1", "tags/instance/Name": "x"},
	}
	return &imds{
		files: metadataFiles(boot, "10.77.1.1", "02:77:00:00:00:00", "10.77.0.0/16"),
		now:   func() time.Time { return *now }, tokens: map[string]time.Time{},
	}
}

// ask sends a request with headers, "name: value".
func ask(t *testing.T, s http.Handler, method, path string, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), method, path, http.NoBody)
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	recorder := httptest.NewRecorder()
	s.ServeHTTP(recorder, request)
	return recorder
}

func TestMetadataTakesATokenThatStillHolds(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	s := newTestIMDS(&now)
	const file = "/latest/meta-data/instance-id"
	for _, tc := range []struct {
		name, method, path string
		headers            []string
		want               int
	}{
		{"no token", "GET", file, nil, 401},
		{"no such token", "GET", file, []string{tokenHeader + ": nonsense"}, 401},
		{"a token without a life", "PUT", "/latest/api/token", nil, 400},
		{"a token with too long a life", "PUT", "/latest/api/token", []string{ttlHeader + ": 21601"}, 400},
		{"a token for somebody behind a proxy", "PUT", "/latest/api/token", []string{ttlHeader + ": 60", "X-Forwarded-For: 10.0.0.1"}, 403},
		{"a token by GET", "GET", "/latest/api/token", []string{ttlHeader + ": 60"}, 405},
		{"metadata by POST", "POST", file, nil, 405},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if got := ask(t, s, tc.method, tc.path, tc.headers...); got.Code != tc.want {
				t.Errorf("answer %d, want %d", got.Code, tc.want)
			}
		})
	}
	token := ask(t, s, "PUT", "/latest/api/token", ttlHeader+": 60").Body.String()
	if got := ask(t, s, "GET", file, tokenHeader+": "+token); got.Code != 200 || got.Body.String() != "i-0123456789abcdef0" {
		t.Errorf("with a token: %d %q", got.Code, got.Body)
	}
	now = now.Add(61 * time.Second)
	if got := ask(t, s, "GET", file, tokenHeader+": "+token); got.Code != 401 {
		t.Errorf("after the token's life: %d", got.Code)
	}
}

func TestMetadataIsATree(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	s := newTestIMDS(&now)
	token := ask(t, s, "PUT", "/latest/api/token", ttlHeader+": 60").Body.String()
	for _, tc := range []struct{ path, want string }{
		{"/latest/", "dynamic/\nmeta-data/\nuser-data"},
		{"/latest/meta-data/placement", "availability-zone\nregion"},
		{"/latest/meta-data/placement/", "availability-zone\nregion"},
		{"/2021-03-23/meta-data/placement/region", "us-east-1"},
		{"/latest/meta-data/tags/instance/", "Name"},
		{"/latest/meta-data/network/interfaces/macs/", "02:77:00:00:00:00/"},
		{"/latest/user-data", "\x1f\x8b\x00"},
		{"/latest/dynamic/instance-identity/", "document"},
	} {
		if got := ask(t, s, "GET", tc.path, tokenHeader+": "+token); got.Code != 200 || got.Body.String() != tc.want {
			t.Errorf("%s: %d %q, want %q", tc.path, got.Code, got.Body, tc.want)
		}
	}
	for _, path := range []string{"/", "/1.0/meta-data/", "/latest/meta-data/public-keys/", "/latest/meta-data/iam/", "/latest/meta"} {
		if got := ask(t, s, "GET", path, tokenHeader+": "+token); got.Code != 404 {
			t.Errorf("%s: %d %q, want 404", path, got.Code, got.Body)
		}
	}
	if all, _ := s.read("meta-data"); strings.Contains(all, "public-keys") {
		t.Error("there is a key pair")
	}
}
