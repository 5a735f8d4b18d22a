package filedigest

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func TestKnownDigests(t *testing.T) {
	dir := t.TempDir()
	// The official test vectors' input: bytes 0 to 250, again and again. This long one takes BLAKE3 through many chunks.
	long := make([]byte, 31744)
	for i := range long {
		long[i] = byte(i % 251)
	}
	large := bytes.Repeat([]byte("a"), 1_000_000)
	for _, tc := range []struct {
		algorithm string
		content   []byte
		hex       string
	}{
		{SHA256, nil, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{SHA256, large, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
		{BLAKE3, nil, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"},
		{BLAKE3, long, "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47"},
	} {
		path := filepath.Join(dir, "f")
		if err := os.WriteFile(path, tc.content, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := File(tc.algorithm, path)
		want := guestapi.Digest{Algorithm: tc.algorithm, Hex: tc.hex, Size: int64(len(tc.content))}
		if err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	for want, args := range map[string][2]string{
		"unknown algorithm":     {"md5", filepath.Join(dir, "f")},
		"no such file":          {SHA256, filepath.Join(dir, "f")},
		"is not a regular file": {SHA256, dir},
	} {
		if _, err := File(args[0], args[1]); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
