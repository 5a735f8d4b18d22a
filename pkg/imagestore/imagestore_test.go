package imagestore_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"
	"lukechampine.com/blake3"

	"github.com/compute-bridge/compute-bridge/pkg/imagestore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var content = bytes.Repeat([]byte("an image archive\n"), 10_000)

func sha(b []byte) imagestore.Digest {
	return imagestore.Digest{Algorithm: imagestore.SHA256, Sum: sha256.Sum256(b)}
}

func b3(b []byte) imagestore.Digest {
	return imagestore.Digest{Algorithm: imagestore.BLAKE3, Sum: blake3.Sum256(b)}
}

func newStore(t *testing.T, cfg imagestore.Config) imagestore.Store {
	t.Helper()
	s, err := imagestore.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// fetch reads an image to its end.
func fetch(ctx context.Context, s imagestore.Store, image imagestore.Image) ([]byte, int64, error) {
	r, size, err := s.Open(ctx, image)
	if err != nil {
		return nil, 0, err
	}
	got, err := io.ReadAll(r)
	return got, size, errors.Join(err, r.Close())
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// layout makes a store's directory.
func layout(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "images")
	for path, b := range map[string][]byte{
		"sha256/" + sha(content).Hex(): content, "blake3/" + b3(content).Hex(): content,
		"team/app-1.0.tar": content, "wrong.tar": content[1:], "empty": {},
	} {
		write(t, filepath.Join(dir, path), b)
	}
	write(t, filepath.Join(filepath.Dir(dir), "outside"), content)
	return dir
}

// stores serves the same directory in every way that there is.
func stores(t *testing.T) map[string]imagestore.Config {
	t.Helper()
	dir := layout(t)
	plain := httptest.NewServer(http.StripPrefix("/base", http.FileServer(http.Dir(dir))))
	t.Cleanup(plain.Close)
	secure := httptest.NewTLSServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(secure.Close)
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	return map[string]imagestore.Config{
		"directory": {Base: dir}, "file URL": {Base: "file://" + dir + "/"},
		"http": {Base: plain.URL + "/base/"}, "https": {Base: secure.URL, RootCAs: roots},
	}
}

func TestImagesAreFoundByDigestAndByPointer(t *testing.T) {
	t.Parallel()
	for name, cfg := range stores(t) {
		s := newStore(t, cfg)
		base := strings.TrimSuffix(cfg.Base, "/")
		if name == "directory" {
			base = "file://" + base
		}
		for _, image := range []imagestore.Image{
			{Digest: sha(content)},
			{Digest: b3(content)},
			{Digest: b3(content), Pointer: "team/app-1.0.tar"},
			{Digest: sha(content), Pointer: base + "/team/app-1.0.tar"},
			{Digest: sha(content), MaxBytes: int64(len(content))},
		} {
			got, size, err := fetch(t.Context(), s, image)
			if err != nil || !bytes.Equal(got, content) || size != int64(len(content)) {
				t.Errorf("%s: %+v: %d bytes of %d, %v", name, image, len(got), size, err)
			}
		}
		got, size, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(nil), Pointer: "empty"})
		if err != nil || len(got) != 0 || size != 0 {
			t.Errorf("%s: empty image: %d bytes of %d, %v", name, len(got), size, err)
		}
	}
}

func TestWrongImagesAreRefused(t *testing.T) {
	t.Parallel()
	for name, cfg := range stores(t) {
		s := newStore(t, cfg)
		for what, tc := range map[string]struct {
			image imagestore.Image
			want  error
		}{
			"absent":         {imagestore.Image{Digest: sha([]byte("other"))}, imagestore.ErrNotFound},
			"absent pointer": {imagestore.Image{Digest: sha(content), Pointer: "team/app-2.0.tar"}, imagestore.ErrNotFound},
			"wrong bytes":    {imagestore.Image{Digest: sha(content), Pointer: "wrong.tar"}, imagestore.ErrHashMismatch},
			"wrong blake3":   {imagestore.Image{Digest: b3(content), Pointer: "wrong.tar"}, imagestore.ErrHashMismatch},
			"too large":      {imagestore.Image{Digest: sha(content), MaxBytes: int64(len(content)) - 1}, imagestore.ErrTooLarge},
			"no digest":      {imagestore.Image{Pointer: "empty"}, imagestore.ErrInvalidPointer},
		} {
			if _, _, err := fetch(t.Context(), s, tc.image); !errors.Is(err, tc.want) {
				t.Errorf("%s, %s: %v, want %v", name, what, err, tc.want)
			}
		}
	}
}

func TestPointersCannotLeaveTheBase(t *testing.T) {
	t.Parallel()
	for name, cfg := range stores(t) {
		s := newStore(t, cfg)
		base := strings.TrimSuffix(cfg.Base, "/")
		for _, pointer := range []string{
			"../outside", "team/../../outside", "..", ".", "./x", "/etc/passwd", "//other.example/x", "team//app", "team/",
			"https://other.example/x", "http://user:pass@127.0.0.1/x", "file:///etc/passwd", base + "/../outside", base + "@other/x",
			base + ".evil.example/x", base, base + "/", `..\outside`, "%2e%2e/outside", "a?b", "a#b", "a:b", "a b", "a\nb", "a\x00b", "ü",
			strings.Repeat("x", 1025),
		} {
			_, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(content), Pointer: pointer})
			if !errors.Is(err, imagestore.ErrInvalidPointer) {
				t.Errorf("%s: %q: %v", name, pointer, err)
			}
		}
	}
}

func FuzzPointer(f *testing.F) {
	for _, seed := range []string{"a/b", "../x", "", "a//b", "http://127.0.0.1/x", "%2e%2e/x", "a/./b", "..a/b..", "-/~"} {
		f.Add(seed)
	}
	dir := filepath.Join(f.TempDir(), "base")
	if err := os.Mkdir(dir, 0o700); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "outside"), content, 0o600); err != nil {
		f.Fatal(err)
	}
	s, err := imagestore.New(imagestore.Config{Base: dir})
	if err != nil {
		f.Fatal(err)
	}
	var asked string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.RequestURI
		http.NotFound(w, r)
	}))
	f.Cleanup(server.Close)
	web, err := imagestore.New(imagestore.Config{Base: server.URL + "/base"})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = web.Close() })
	f.Fuzz(func(t *testing.T, pointer string) {
		image := imagestore.Image{Digest: sha(content), Pointer: pointer}
		if r, _, err := s.Open(t.Context(), image); err == nil {
			_ = r.Close()
			t.Fatalf("%q reads a file outside the empty base", pointer)
		}
		asked = ""
		_, _, err := web.Open(t.Context(), image)
		if errors.Is(err, imagestore.ErrInvalidPointer) != (asked == "") {
			t.Fatalf("%q: error %v, asked for %q", pointer, err, asked)
		}
		if asked != "" && (!strings.HasPrefix(asked, "/base/") || strings.ContainsAny(asked, "?#%\\") || strings.Contains(asked+"/", "/../")) {
			t.Fatalf("%q asks for %q", pointer, asked)
		}
	})
}

func TestDirectoryLeadsNowhereElse(t *testing.T) {
	t.Parallel()
	dir := layout(t)
	for name, target := range map[string]string{"link": "../outside", "absolute": filepath.Join(filepath.Dir(dir), "outside"), "up": ".."} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("team/app-1.0.tar", filepath.Join(dir, "inside")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newStore(t, imagestore.Config{Base: dir})
	for _, pointer := range []string{"link", "absolute", "up/outside", "pipe", "team"} {
		if got, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(content), Pointer: pointer}); err == nil {
			t.Errorf("%s: read %d bytes", pointer, len(got))
		}
	}
	if _, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(content), Pointer: "inside"}); err != nil {
		t.Errorf("a link inside the store: %v", err)
	}
	gone := newStore(t, imagestore.Config{Base: filepath.Join(dir, "absent")})
	_, _, err := fetch(t.Context(), gone, imagestore.Image{Digest: sha(content)})
	if !errors.Is(err, imagestore.ErrUnavailable) || errors.Is(err, imagestore.ErrNotFound) {
		t.Errorf("a store that is not there: %v; a missing mount is no missing image", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, _, err := s.Open(ctx, imagestore.Image{Digest: sha(content)})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	_ = r.Close()
}

// serve runs a handler as a store.
func serve(t *testing.T, cfg imagestore.Config, handler http.HandlerFunc) imagestore.Store {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	cfg.Base = server.URL
	return newStore(t, cfg)
}

func TestFailingServersAreUnavailable(t *testing.T) {
	t.Parallel()
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	idle := imagestore.Config{IdleTimeout: 100 * time.Millisecond}
	for name, tc := range map[string]struct {
		cfg     imagestore.Config
		handler http.HandlerFunc
		want    error
		text    string
	}{
		"404":     {handler: status(404), want: imagestore.ErrNotFound},
		"410":     {handler: status(410), want: imagestore.ErrNotFound},
		"500":     {handler: status(500), want: imagestore.ErrUnavailable, text: "500"},
		"403":     {handler: status(403), want: imagestore.ErrUnavailable, text: "403"},
		"partial": {handler: status(206), want: imagestore.ErrUnavailable, text: "206"},
		"truncated": {handler: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			_, _ = w.Write(content[:1000])
		}, want: imagestore.ErrUnavailable, text: "EOF"},
		"truncated without a length": {handler: func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(content[:1000])
		}, want: imagestore.ErrHashMismatch},
		"longer without a length": {handler: func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(append(bytes.Clone(content), 1))
		}, want: imagestore.ErrTooLarge, cfg: imagestore.Config{MaxBytes: int64(len(content))}},
		"no answer": {
			handler: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			want:    imagestore.ErrUnavailable, text: "no data arrived", cfg: idle,
		},
		"stall": {handler: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			_, _ = w.Write(content[:1000])
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, want: imagestore.ErrUnavailable, text: "no data arrived", cfg: idle},
		"redirect to another host": {handler: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://localhost:1/x", http.StatusFound)
		}, want: imagestore.ErrUnavailable, text: "redirect to another host"},
		"redirect loop": {handler: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/again", http.StatusFound)
		}, want: imagestore.ErrUnavailable, text: "redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, tc.cfg, tc.handler)
			_, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(content)})
			if !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("%v, want %v with %q", err, tc.want, tc.text)
			}
		})
	}
}

func TestSlowButAliveServerIsNoStall(t *testing.T) {
	t.Parallel()
	const idle, parts = 3 * time.Second, 10
	s := serve(t, imagestore.Config{IdleTimeout: idle}, func(w http.ResponseWriter, _ *http.Request) {
		tick := time.NewTicker(idle / 6)
		defer tick.Stop()
		for range parts {
			_, _ = w.Write(content)
			_ = http.NewResponseController(w).Flush()
			<-tick.C
		}
	})
	want := bytes.Repeat(content, parts)
	got, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(want)})
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestRedirectWithinTheHostIsFollowed(t *testing.T) {
	t.Parallel()
	s := serve(t, imagestore.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/there" {
			http.Redirect(w, r, "/there", http.StatusTemporaryRedirect)
			return
		}
		_, _ = w.Write(content)
	})
	if _, _, err := fetch(t.Context(), s, imagestore.Image{Digest: sha(content)}); err != nil {
		t.Error(err)
	}
}

func TestCancelEndsATransferAsTheCallersOwn(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	s := serve(t, imagestore.Config{}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(content[:1000])
		_ = http.NewResponseController(w).Flush()
		close(started)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	_, _, err := fetch(ctx, s, imagestore.Image{Digest: sha(content)})
	if !errors.Is(err, context.Canceled) || errors.Is(err, imagestore.ErrUnavailable) {
		t.Errorf("%v, want only the cancellation", err)
	}
}

func TestUnreachableOrUntrustedServerIsUnavailable(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "http://" + l.Addr().String()
	_ = l.Close()
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secure.Close)
	for name, base := range map[string]string{"closed port": closed, "unknown authority": secure.URL} {
		_, _, err := fetch(t.Context(), newStore(t, imagestore.Config{Base: base}), imagestore.Image{Digest: sha(content)})
		if !errors.Is(err, imagestore.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBasesAreChecked(t *testing.T) {
	t.Parallel()
	for _, base := range []string{
		"", "relative/dir", "http://images.example", "http://127.0.0.1.example", "ftp://x/y", "https://", "https://u:p@h/x",
		"https://h/x?y", "https://h/x#y", "file://host/dir", "file:relative", "oci://registry.example/x", "https:opaque", "http://[::1",
	} {
		if s, err := imagestore.New(imagestore.Config{Base: base}); err == nil {
			t.Errorf("%q was accepted as %T", base, s)
		} else if strings.Contains(err.Error(), "u:p@") {
			t.Errorf("the error repeats a password: %v", err)
		}
	}
	for _, cfg := range []imagestore.Config{
		{Base: "http://images.example", Insecure: true}, {Base: "http://localhost:1"}, {Base: "http://[::1]:1"}, {Base: "https://h/deep/er/"},
	} {
		if _, err := imagestore.New(cfg); err != nil {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	if _, err := imagestore.New(imagestore.Config{Base: "/x", MaxBytes: -1}); err == nil {
		t.Error("a negative limit was accepted")
	}
}

func TestDigestsAreReadStrictly(t *testing.T) {
	t.Parallel()
	for _, want := range []imagestore.Digest{sha(content), b3(content)} {
		got, err := imagestore.ParseDigest(want.String())
		if err != nil || got != want {
			t.Errorf("%s: %s, %v", want, got, err)
		}
	}
	hex := sha(content).Hex()
	for _, bad := range []string{
		"", hex, "sha256:", "sha256:" + hex[1:], "sha256:" + hex + "0", "sha256:" + strings.ToUpper(hex), "md5:" + hex, "SHA256:" + hex,
		"sha256:" + hex[1:] + "g", ":" + hex,
	} {
		if d, err := imagestore.ParseDigest(bad); err == nil {
			t.Errorf("%q was read as %s", bad, d)
		}
	}
	if _, err := imagestore.Algorithm("md5").New(); err == nil {
		t.Error("md5 was accepted")
	}
}

func TestVerifyingReaderKeepsItsVerdict(t *testing.T) {
	t.Parallel()
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"plain": func(r io.Reader) io.Reader { return r }, "one byte": iotest.OneByteReader, "data with EOF": iotest.DataErrReader,
	} {
		good := imagestore.NewVerifyingReader(wrap(bytes.NewReader(content)), b3(content), int64(len(content)))
		if got, err := io.ReadAll(good); err != nil || !bytes.Equal(got, content) || good.BytesRead() != int64(len(content)) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		bad := imagestore.NewVerifyingReader(wrap(bytes.NewReader(content)), sha(nil), int64(len(content)))
		_, err := io.ReadAll(bad)
		_, again := bad.Read(make([]byte, 1))
		if !errors.Is(err, imagestore.ErrHashMismatch) || !errors.Is(again, imagestore.ErrHashMismatch) {
			t.Errorf("%s: %v, then %v", name, err, again)
		}
		long := imagestore.NewVerifyingReader(wrap(bytes.NewReader(content)), sha(content), 10)
		got, err := io.ReadAll(long)
		if !errors.Is(err, imagestore.ErrTooLarge) || len(got) > 10 {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	broken := errors.New("broken")
	if _, err := io.ReadAll(imagestore.NewVerifyingReader(iotest.ErrReader(broken), sha(nil), 1)); !errors.Is(err, broken) {
		t.Errorf("%v, want the reader's own error", err)
	}
	if _, err := io.ReadAll(imagestore.NewVerifyingReader(bytes.NewReader(nil), imagestore.Digest{}, 1)); err == nil {
		t.Error("a digest without an algorithm was verified")
	}
}
