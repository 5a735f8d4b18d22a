package machine

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/console"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var grant = strings.Repeat("ab", 32)

// store serves images; each answer can be replaced.
type store struct {
	*httptest.Server

	image   []byte
	fetched atomic.Int64
	answer  func(n int64, w http.ResponseWriter) bool // true: answered
}

func newStore(t *testing.T, image []byte) *store {
	t.Helper()
	s := &store{image: image, answer: func(int64, http.ResponseWriter) bool { return false }}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !s.answer(s.fetched.Add(1), w) {
			_, _ = w.Write(s.image)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// ociImage is an archive with one file.
func ociImage(t *testing.T, config string) []byte {
	t.Helper()
	layer := archive(t, map[string]string{"bin/sh": "#!", "etc/resolv.conf": "the image's", "etc/hosts": "the image's"})
	sum := func(data []byte) string {
		s := sha256.Sum256(data)
		return hex.EncodeToString(s[:])
	}
	configBlob := []byte(fmt.Sprintf(`{"architecture":%q,"os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`,
		runtime.GOARCH, config, sum(layer)))
	describe := func(mediaType string, data []byte) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":%d}`, mediaType, sum(data), len(data))
	}
	manifest := []byte(fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`,
		describe("application/vnd.oci.image.config.v1+json", configBlob),
		describe("application/vnd.oci.image.layer.v1.tar", layer)))
	files := map[string]string{
		"index.json": fmt.Sprintf(`{"schemaVersion":2,"manifests":[%s]}`,
			describe("application/vnd.oci.image.manifest.v1+json", manifest)),
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`,
	}
	for _, blob := range [][]byte{layer, configBlob, manifest} {
		files["blobs/sha256/"+sum(blob)] = string(blob)
	}
	return archive(t, files)
}

func archive(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, content := range files {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(content))})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// fakeSystem is a machine's systemd.
type fakeSystem struct {
	mu       sync.Mutex
	stopping bool
	oom      bool
	tail     string
	hangs    bool  // Tail doesn't answer
	late     error // of PowerOff's context
	off      int
}

func (f *fakeSystem) Stopping(context.Context) bool { return f.stopping }

func (f *fakeSystem) OOMKilled() bool { return f.oom }

func (f *fakeSystem) Tail(ctx context.Context, _ string, _ int) ([]byte, error) {
	if f.hangs {
		<-ctx.Done()
	}
	if f.tail == "" {
		return nil, errors.New("no journal")
	}
	return []byte(f.tail), nil
}

func (f *fakeSystem) PowerOff(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.late = ctx.Err()
	f.off++
	return nil
}

// bench is a machine in a directory.
type bench struct {
	*Machine

	config guestapi.Machine
	log    bytes.Buffer
	fake   *fakeSystem
}

const goodConfig = `{"Entrypoint":["/bin/sh"],"Cmd":["-c","x"],"Env":["A=image","B=image"],"WorkingDir":"srv","User":"1000"}`

func newBench(t *testing.T, s *store) *bench {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	blob := "\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20" + strings.Repeat("\x00", 32)
	sum := sha256.Sum256(s.image)
	dir := t.TempDir()
	b := &bench{fake: &fakeSystem{}, config: guestapi.Machine{
		Guest: guestapi.Config{
			Version: 1, ListenPort: 22, User: "compute",
			HostKey:        guestapi.NewHostKey(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))),
			AuthorizedKeys: []string{"ssh-ed25519 " + base64.StdEncoding.EncodeToString([]byte(blob))},
			Environment:    map[string]string{"B": "grant", "C": "grant"},
		},
		GrantID: grant, Attempt: 2, Deadline: time.Now().Add(time.Hour).Truncate(time.Second),
		Image: guestapi.MachineImage{
			URL: s.URL + "/image?X-Amz-Signature=hunter2", Digest: "sha256:" + hex.EncodeToString(sum[:]), MaxBytes: 1 << 30,
		},
		AtEnd: guestapi.AtEndPowerOff,
	}}
	dirs := Dirs{
		Config: filepath.Join(dir, "config"), State: filepath.Join(dir, "state/below"), Run: filepath.Join(dir, "run"),
		Etc: filepath.Join(dir, "etc"), Console: filepath.Join(dir, "console"),
	}
	for _, d := range []string{dirs.Config, dirs.Etc} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{dirs.Console, filepath.Join(dirs.Etc, "resolv.conf")} {
		if err := os.WriteFile(name, []byte("the machine's\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.Machine = New(dirs, slog.New(console.New(&b.log).Handler()))
	b.system = b.fake
	b.fetch.pause = time.Millisecond
	b.fetch.patience = 200 * time.Millisecond
	b.write(t)
	return b
}

// write writes the machine's file.
func (b *bench) write(t *testing.T) {
	t.Helper()
	data, err := guestapi.EncodeMachine(b.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dirs.Config, machineFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// verdict is what the console says.
func (b *bench) verdict(t *testing.T) *guestapi.Verdict {
	t.Helper()
	text, err := os.ReadFile(b.dirs.Console)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text)+b.log.String(), "hunter2") {
		t.Errorf("the console or the log shows the URL: %s%s", text, &b.log)
	}
	v, ok := guestapi.FindVerdict(text, grant, 2)
	if !ok {
		return nil
	}
	return &v
}

func (b *bench) root(name string) string { return filepath.Join(b.state(rootDir), name) }

func (b *bench) read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestPreparedMachineHasAllThatTheWorkloadNeeds(t *testing.T) {
	b := newBench(t, newStore(t, ociImage(t, goodConfig)))
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(b.state(guestFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := guestapi.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	want := b.config.Guest
	want.Command = []string{"/bin/sh", "-c", "x"}
	want.Environment = map[string]string{"A": "image", "B": "grant", "C": "grant"}
	want.WorkingDir, want.RunAs, want.StopGraceSeconds = "/srv", "1000", guestapi.DefaultStopGraceSeconds
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the guest's configuration (-want +got):\n%s", diff)
	}
	if got := b.read(t, b.root("etc/resolv.conf")); got != "the machine's\n" {
		t.Errorf("resolv.conf is %q", got)
	}
	if got := b.read(t, b.root("etc/hosts")); !strings.HasPrefix(got, "127.0.0.1 localhost\n") {
		t.Errorf("hosts is %q", got)
	}
	for name, mode := range map[string]os.FileMode{
		"": 0o755 | os.ModeDir, "tmp": 0o777 | os.ModeDir | os.ModeSticky, "bin/sh": 0o755, "etc/hosts": 0o644,
		".compute-bridge": 0o755 | os.ModeDir, ".compute-bridge/guest": 0o600, ".compute-bridge/config.json": 0o600,
		"proc": 0o555 | os.ModeDir, "run": 0o755 | os.ModeDir,
	} {
		if info, err := os.Lstat(b.root(name)); err != nil || info.Mode() != mode {
			t.Errorf("/%s: %v, %v", name, info, err)
		}
	}
	for _, name := range []string{guestFile, imageFile} {
		if info, err := os.Stat(b.state(name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	entries, err := os.ReadDir(b.dirs.State)
	if err != nil || len(entries) != 3 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if v := b.verdict(t); v != nil {
		t.Errorf("a verdict: %+v", v)
	}
}

func TestRebootFetchesNothingAndKeepsTheRoot(t *testing.T) {
	s := newStore(t, ociImage(t, goodConfig))
	b := newBench(t, s)
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.root("made-by-the-workload"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.answer = func(_ int64, w http.ResponseWriter) bool { w.WriteHeader(http.StatusForbidden); return true }
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.fetched.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	if _, err := os.Stat(b.root("made-by-the-workload")); err != nil {
		t.Error(err)
	}
}

func TestHalfARootIsMadeAgain(t *testing.T) {
	for name, leave := range map[string]func(b *bench) error{
		"no description": func(b *bench) error { return os.Remove(b.state(imageFile)) },
		"cut description": func(b *bench) error {
			return os.WriteFile(b.state(imageFile), []byte(`{"digest":"sha`), 0o600)
		},
		"another image": func(b *bench) error {
			return os.WriteFile(b.state(imageFile), []byte(`{"digest":"sha256:00"}`), 0o600)
		},
		"in the middle": func(b *bench) error {
			return errors.Join(os.Remove(b.state(imageFile)), os.Mkdir(b.state(scratchDir), 0o700),
				os.WriteFile(b.state(archiveFile), []byte("half"), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, ociImage(t, goodConfig))
			b := newBench(t, s)
			if err := b.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.WriteFile(b.root("half"), nil, 0o600), leave(b)); err != nil {
				t.Fatal(err)
			}
			if err := b.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(b.root("half")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what was left is there: %v", err)
			}
			if got := b.read(t, b.root("bin/sh")); got != "#!" || s.fetched.Load() != 2 {
				t.Errorf("got %q after %d fetches", got, s.fetched.Load())
			}
		})
	}
}

func TestFailureToPrepareIsAVerdict(t *testing.T) {
	image := ociImage(t, goodConfig)
	status := func(code int) func(int64, http.ResponseWriter) bool {
		return func(_ int64, w http.ResponseWriter) bool { w.WriteHeader(code); return true }
	}
	for name, tc := range map[string]struct {
		change  func(b *bench, s *store)
		reason  string
		message string
		fetches int64 // 0: any
	}{
		"missing": {
			func(_ *bench, s *store) { s.answer = status(404) },
			"IMAGE_UNAVAILABLE", "the store answers 404 Not Found", 1,
		},
		"expired URL": {
			func(_ *bench, s *store) { s.answer = status(403) },
			"IMAGE_UNAVAILABLE", "the store answers 403 Forbidden", 1,
		},
		"store is down": {
			func(_ *bench, s *store) { s.answer = status(503) },
			"IMAGE_UNAVAILABLE", "the store answers 503", 0,
		},
		"no store": {
			func(_ *bench, s *store) { s.Close() },
			"IMAGE_UNAVAILABLE", "connection refused", 0,
		},
		"wrong bytes": {
			func(_ *bench, s *store) { s.image = append(slices.Clip(s.image), 0) },
			"IMAGE_HASH_MISMATCH", "the image has sha256 ", 2,
		},
		"wrong digest": {
			func(b *bench, _ *store) {
				b.config.Image.Digest = "blake3:" + strings.Repeat("00", 32)
			},
			"IMAGE_HASH_MISMATCH", "the image has blake3 ", 2,
		},
		"too large": {
			func(b *bench, s *store) {
				b.config.Image.MaxBytes = 100
				s.answer = func(_ int64, w http.ResponseWriter) bool {
					w.Header().Set("Content-Length", strconv.Itoa(len(s.image)))
					_, _ = w.Write(s.image)
					return true
				}
			},
			"IMAGE_INVALID", "at most 100 are allowed", 1,
		},
		"too large, unannounced": {
			func(b *bench, s *store) {
				b.config.Image.MaxBytes = 100
				s.answer = func(_ int64, w http.ResponseWriter) bool {
					_ = http.NewResponseController(w).Flush()
					_, _ = w.Write(s.image)
					return true
				}
			},
			"IMAGE_INVALID", "more than the 100 bytes", 1,
		},
		"no archive": {
			func(b *bench, s *store) {
				s.image = []byte("no archive")
				sum := blake3.Sum256(s.image)
				b.config.Image.Digest = "blake3:" + hex.EncodeToString(sum[:])
			},
			"IMAGE_INVALID", "the image can't be unpacked: not an OCI archive", 1,
		},
		"refused configuration": {
			func(b *bench, s *store) {
				s.image = ociImage(t, `{"User":"a b"}`)
				sum := sha256.Sum256(s.image)
				b.config.Image.Digest = "sha256:" + hex.EncodeToString(sum[:])
			},
			"IMAGE_INVALID", "the image's configuration is refused: run_as", 1,
		},
		"past the deadline": {
			func(b *bench, _ *store) {
				b.config.Deadline = time.Now().Add(-time.Minute).Truncate(time.Second)
			},
			"HOST_UNFIT", "after its deadline", 0,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, bytes.Clone(image))
			b := newBench(t, s)
			tc.change(b, s)
			b.write(t)
			err := b.Prepare(t.Context())
			if failure, ok := errors.AsType[*FailureError](err); !ok || failure.Reason != tc.reason {
				t.Errorf("got %v", err)
			}
			v := b.verdict(t)
			if v == nil || v.Phase != guestapi.PhaseFailed || v.Reason != tc.reason || !strings.Contains(v.Message, tc.message) {
				t.Errorf("the verdict is %+v, want %s with %q", v, tc.reason, tc.message)
			}
			if n := s.fetched.Load(); tc.fetches != 0 && n != tc.fetches {
				t.Errorf("%d fetches, want %d", n, tc.fetches)
			}
			if _, err := os.Stat(b.state(imageFile)); !errors.Is(err, os.ErrNotExist) && name != "refused configuration" {
				t.Errorf("a description was left: %v", err)
			}
			if _, err := os.Stat(filepath.Join(b.dirs.Run, verdictFile)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFullDiskIsTheMachinesFault(t *testing.T) {
	b := newBench(t, newStore(t, ociImage(t, goodConfig)))
	if err := os.MkdirAll(b.dirs.State, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", b.dirs.State, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.dirs.State, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	err := b.Prepare(t.Context())
	if v := b.verdict(t); err == nil || v == nil || v.Reason != guestapi.ReasonHostUnfit ||
		!strings.Contains(v.Message, "disk is too small") {
		t.Errorf("got %v, verdict %+v", err, v)
	}
}

// fullDisk has the machine's state on a disk of its own, on which fill leaves no space.
func fullDisk(t *testing.T, b *bench) (fill func()) {
	t.Helper()
	if err := os.MkdirAll(b.dirs.State, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", b.dirs.State, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.dirs.State, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return func() {
		f, err := os.Create(b.root("all-there-is"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

func TestRebootWithAFullDiskGoesOn(t *testing.T) {
	for name, renamed := range map[string]bool{"same names": false, "other name servers": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, newStore(t, ociImage(t, goodConfig)))
			fill := fullDisk(t, b)
			if err := b.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			fill()
			if renamed {
				if err := os.WriteFile(filepath.Join(b.dirs.Etc, "resolv.conf"), []byte("another\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := b.Prepare(t.Context()); err != nil || b.verdict(t) != nil {
				t.Fatalf("%v, verdict %+v", err, b.verdict(t))
			}
			if warned := strings.Contains(b.log.String(), "The disk is full"); warned != renamed {
				t.Errorf("warned: %v: %s", warned, &b.log)
			}
			// What the boot before has left, whole.
			if got := b.read(t, b.root("etc/resolv.conf")); got != "the machine's\n" {
				t.Errorf("resolv.conf is %q", got)
			}
			for _, name := range []string{b.root(".compute-bridge/guest"), b.root(".compute-bridge/config.json"), b.state(guestFile)} {
				if _, err := os.Lstat(name); err != nil {
					t.Error(err)
				}
			}
			for _, name := range []string{b.root("etc/.compute-bridge.new"), b.state(guestFile + ".new")} {
				if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was left: %v", name, err)
				}
			}
		})
	}
}

func TestWhatPassesIsTriedAgain(t *testing.T) {
	s := newStore(t, ociImage(t, goodConfig))
	s.answer = func(n int64, w http.ResponseWriter) bool {
		switch n {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 2:
			w.WriteHeader(http.StatusTooManyRequests)
		case 3: // cut in the middle
			w.Header().Set("Content-Length", strconv.Itoa(len(s.image)))
			_, _ = w.Write(s.image[:len(s.image)/2])
		case 4: // another file's bytes, once
			_, _ = w.Write(s.image[1:])
		default:
			return false
		}
		return true
	}
	b := newBench(t, s)
	b.fetch.patience = time.Minute
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.fetched.Load(); n != 5 {
		t.Errorf("%d fetches", n)
	}
	for _, want := range []string{"503", "429", "unexpected EOF", "sha256"} {
		if !strings.Contains(b.log.String(), want) {
			t.Errorf("the log lacks %s: %s", want, &b.log)
		}
	}
}

func TestStoreThatSendsNothingIsGivenUp(t *testing.T) {
	s := newStore(t, ociImage(t, goodConfig))
	release := make(chan struct{})
	s.answer = func(_ int64, w http.ResponseWriter) bool {
		_, _ = w.Write(s.image[:100])
		_ = http.NewResponseController(w).Flush()
		<-release
		return true
	}
	b := newBench(t, s)
	b.fetch.patience, b.fetch.stall = 0, 20*time.Millisecond
	err := b.Prepare(t.Context())
	close(release)
	if v := b.verdict(t); err == nil || v == nil || v.Reason != guestapi.ReasonImageUnavailable ||
		!strings.Contains(v.Message, "no data arrived") {
		t.Errorf("got %v, verdict %+v", err, v)
	}
}

func TestDeadlineEndsAFetch(t *testing.T) {
	s := newStore(t, ociImage(t, goodConfig))
	s.answer = func(_ int64, w http.ResponseWriter) bool { w.WriteHeader(http.StatusServiceUnavailable); return true }
	b := newBench(t, s)
	b.fetch.patience, b.fetch.pause = time.Hour, time.Hour
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.Prepare(ctx); err == nil {
		t.Error("no error")
	}
	if v := b.verdict(t); v == nil || v.Reason != guestapi.ReasonImageUnavailable {
		t.Errorf("verdict %+v", v)
	}
}

func TestImageCannotTakeTheGuestsPlace(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, newStore(t, ociImage(t, goodConfig)))
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	// As an image, or a workload before a reboot, may have left it.
	for name, target := range map[string]string{
		".compute-bridge": outside, "etc/hostname": "/", "etc/resolv.conf": outside, "etc/hosts": "../../../" + outside, "proc": "/",
	} {
		if err := errors.Join(os.RemoveAll(b.root(name)), os.Symlink(target, b.root(name))); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.read(t, outside); got != "untouched" {
		t.Errorf("a file outside is %q", got)
	}
	if got := b.read(t, b.root("etc/resolv.conf")); got != "the machine's\n" {
		t.Errorf("resolv.conf is %q", got)
	}
	for _, name := range []string{".compute-bridge", "proc"} {
		if info, err := os.Lstat(b.root(name)); err != nil || !info.IsDir() {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func TestMachineWithoutAFileSaysNothing(t *testing.T) {
	b := newBench(t, newStore(t, nil))
	if err := os.WriteFile(filepath.Join(b.dirs.Config, machineFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"prepare": b.Prepare(t.Context()), "ready": b.Ready(), "end": b.End(t.Context(), Result{}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if v := b.verdict(t); v != nil {
		t.Errorf("verdict %+v", v)
	}
}

func TestEndTellsHowAndPowersOff(t *testing.T) {
	for name, tc := range map[string]struct {
		ready  bool
		result Result
		tail   string
		want   guestapi.Verdict
		oom    bool
	}{
		"success": {
			true,
			Result{"success", "exited", "0"},
			"",
			guestapi.Verdict{Phase: "exited", Code: new(int32(0))},
			false,
		},
		"exit code": {
			true,
			Result{"exit-code", "exited", "7"},
			"last words\n",
			guestapi.Verdict{Phase: "exited", Code: new(int32(7))},
			false,
		},
		"signal of the workload": {
			true,
			Result{"exit-code", "exited", "139"},
			"",
			guestapi.Verdict{Phase: "exited", Code: new(int32(139)), Signal: "SEGV"},
			false,
		},
		"signal of the guest": {
			true,
			Result{"signal", "killed", "KILL"},
			"",
			guestapi.Verdict{Phase: "exited", Signal: "KILL"},
			false,
		},
		"out of memory": {
			true,
			Result{"oom-kill", "killed", "KILL"},
			"",
			guestapi.Verdict{
				Phase: "exited", Reason: "OUT_OF_MEMORY", Signal: "KILL", Message: "the machine ran out of memory",
			},
			false,
		},
		"out of memory, the guest": {
			true,
			Result{"signal", "killed", "KILL"},
			"",
			guestapi.Verdict{
				Phase: "exited", Reason: "OUT_OF_MEMORY", Signal: "KILL", Message: "the machine ran out of memory",
			},
			true,
		},
		"out of memory, the workload": {
			true,
			Result{"exit-code", "exited", "137"},
			"",
			guestapi.Verdict{
				Phase: "exited", Reason: "OUT_OF_MEMORY", Code: new(int32(137)), Signal: "KILL",
				Message: "the machine ran out of memory",
			},
			true,
		},
		"out of memory, another process": {
			true,
			Result{"exit-code", "exited", "3"},
			"",
			guestapi.Verdict{Phase: "exited", Code: new(int32(3))},
			true,
		},
		"out of memory early": {
			false,
			Result{"exit-code", "exited", "137"},
			"",
			guestapi.Verdict{
				Phase: "failed", Reason: "WORKLOAD_FAILED", Code: new(int32(137)), Signal: "KILL",
				Message: "the machine ran out of memory",
			},
			true,
		},
		"no such command": {
			false,
			Result{"exit-code", "exited", "127"},
			guestapi.LogPrefix + "error: The workload cannot run reason=\"no such file\"\n",
			guestapi.Verdict{
				Phase: "failed", Reason: "WORKLOAD_FAILED", Code: new(int32(127)),
				Message: `The workload cannot run reason="no such file"`,
			},
			false,
		},
		"ended early": {
			false,
			Result{"protocol", "exited", "0"},
			"",
			guestapi.Verdict{
				Phase: "failed", Reason: "WORKLOAD_FAILED", Code: new(int32(0)),
				Message: "the workload ended with exit code 0 before SSH was open",
			},
			false,
		},
		"killed early": {
			false,
			Result{"timeout", "killed", "TERM"},
			"",
			guestapi.Verdict{
				Phase: "failed", Reason: "WORKLOAD_FAILED", Signal: "TERM", Message: "the workload was killed before SSH was open",
			},
			false,
		},
		"guest failed": {
			false,
			Result{"exit-code", "exited", "71"},
			"",
			guestapi.Verdict{Phase: "failed", Reason: "HOST_UNFIT", Code: new(int32(71)), Message: "the guest could not run"},
			false,
		},
		"unit failed": {
			false,
			Result{"exit-code", "exited", "226"},
			"",
			guestapi.Verdict{
				Phase: "failed", Reason: "HOST_UNFIT", Code: new(int32(226)),
				Message: "the workload's unit could not be started (status 226, see systemd.exec)",
			},
			false,
		},
		"nothing ran": {
			false,
			Result{Result: "resources"},
			"",
			guestapi.Verdict{
				Phase: "failed", Reason: "HOST_UNFIT", Message: "the workload's unit could not be started (resources)",
			},
			false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, newStore(t, nil))
			b.fake.tail, b.fake.oom = tc.tail, tc.oom
			if tc.ready {
				if err := b.Ready(); err != nil {
					t.Fatal(err)
				}
				if v := b.verdict(t); v == nil || v.Phase != guestapi.PhaseReady {
					t.Fatalf("verdict %+v", v)
				}
			}
			if err := b.End(t.Context(), tc.result); err != nil {
				t.Fatal(err)
			}
			tc.want.Grant, tc.want.Attempt = grant, 2
			v := b.verdict(t)
			if v == nil {
				t.Fatal("no verdict")
			}
			if diff := cmp.Diff(tc.want, *v); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if text := b.read(t, b.dirs.Console); !strings.Contains(text, strings.ReplaceAll(tc.tail, "\n", "\r\n")) {
				t.Errorf("the console lacks the last lines: %q", text)
			}
			if b.fake.off != 1 {
				t.Errorf("powered off %d times", b.fake.off)
			}
			if _, err := os.Stat(b.state(endedFile)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestJournalThatDoesNotAnswerDelaysNoPowerOff(t *testing.T) {
	b := newBench(t, newStore(t, nil))
	b.fake.hangs = true
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := b.End(t.Context(), Result{"success", "exited", "0"}); err != nil {
			t.Error(err)
		}
		// The questions, and twice as much to power off, are within the unit's TimeoutStopSec.
		if took := time.Since(began); 3*took >= 25*time.Second {
			t.Errorf("it took %v", took)
		}
	})
	if b.fake.off != 1 || b.fake.late != nil || b.verdict(t) == nil {
		t.Errorf("powered off %d times (%v), verdict %+v", b.fake.off, b.fake.late, b.verdict(t))
	}
}

func TestTailOnTheConsoleIsShort(t *testing.T) {
	for name, tc := range map[string]struct{ tail, want string }{
		"lines": {strings.Repeat("old\n", 5000) + "last\n", "old\r\nlast\r\n"},
		"one":   {strings.Repeat("old", 5000) + "last", "oldlast\r\n"},
		"ended": {strings.Repeat("old", 5000) + "last\n", "oldlast\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, newStore(t, nil))
			b.fake.tail = tc.tail
			if err := b.End(t.Context(), Result{"success", "exited", "0"}); err != nil {
				t.Fatal(err)
			}
			shown, _, _ := strings.Cut(b.read(t, b.dirs.Console), guestapi.VerdictPrefix)
			shown = strings.TrimSuffix(shown, "\r\n")
			if n := len(strings.ReplaceAll(shown, "\r", "")); n > tailBytes+100 || !strings.HasSuffix(shown, tc.want) {
				t.Errorf("%d bytes: %q", n, shown)
			}
		})
	}
	for text, want := range map[string]string{"": "", "a\nb\n": "a\nb\n", "x\na\nb\n": "a\nb\n", "xa\nbc\n": "bc\n", "abcdef": "cdef"} {
		if got := string(lastBytes([]byte(text), 4)); got != want {
			t.Errorf("of %q: %q, want %q", text, got, want)
		}
	}
}

func TestOOMKillsAreCounted(t *testing.T) {
	const events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill %s\noom_group_kill 0\n"
	for text, want := range map[string]uint64{
		fmt.Sprintf(events, "0"): 0, fmt.Sprintf(events, "2"): 2, fmt.Sprintf(events, "x"): 0, "oom_group_kill 5\n": 0, "": 0,
	} {
		if got := oomKills([]byte(text)); got != want {
			t.Errorf("of %q: %d, want %d", text, got, want)
		}
	}
}

func TestMachineThatStaysIsNotPoweredOff(t *testing.T) {
	b := newBench(t, newStore(t, nil))
	b.config.AtEnd = guestapi.AtEndStay
	b.write(t)
	if err := b.End(t.Context(), Result{"success", "exited", "0"}); err != nil {
		t.Fatal(err)
	}
	if b.fake.off != 0 || b.verdict(t) == nil {
		t.Errorf("powered off %d times, verdict %+v", b.fake.off, b.verdict(t))
	}
	if _, err := os.Stat(b.state(endedFile)); err != nil {
		t.Error(err)
	}
}

func TestRebootIsNoEnd(t *testing.T) {
	b := newBench(t, newStore(t, nil))
	b.fake.stopping = true
	if err := b.End(t.Context(), Result{"success", "killed", "TERM"}); err != nil {
		t.Fatal(err)
	}
	if v := b.verdict(t); v != nil || b.fake.off != 0 {
		t.Errorf("verdict %+v, powered off %d times", v, b.fake.off)
	}
	if _, err := os.Stat(b.state(endedFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the workload would not run again: %v", err)
	}
}

func TestEndPowersOffWithoutAConsole(t *testing.T) {
	b := newBench(t, newStore(t, nil))
	if err := os.Remove(b.dirs.Console); err != nil {
		t.Fatal(err)
	}
	if err := b.End(t.Context(), Result{"success", "exited", "0"}); err == nil {
		t.Error("no error")
	}
	if b.fake.off != 1 {
		t.Errorf("powered off %d times", b.fake.off)
	}
}
