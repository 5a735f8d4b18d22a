package hostfs_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

func connect(t testing.TB, h *lab.Host) *sshconn.Conn {
	t.Helper()
	conn, err := sshconn.Open(t.Context(), sshconn.Config{
		Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root",
		Key: h.Lab().UserKey(), HostKeys: []ssh.PublicKey{h.HostKey},
		BackoffMin: 50 * time.Millisecond, BackoffMax: 500 * time.Millisecond,
	}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	return conn
}

const dir = "/var/lib/test"

func TestFiles(t *testing.T) {
	host := lab.NewHost(t, lab.HostOptions{DiskMiB: 512})
	conn := connect(t, host)
	files := hostfs.New(conn)
	sh := func(script string, args ...string) string {
		t.Helper()
		out, err := host.Exec(t.Context(), append([]string{"sh", "-c", script, "sh"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}

	t.Run("MkdirAllSetsModes", func(t *testing.T) {
		for range 2 {
			if err := files.MkdirAll(t.Context(), dir+"/a/b", 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if got := sh("stat -c %a /var/lib/test /var/lib/test/a /var/lib/test/a/b"); got != "700\n700\n700" {
			t.Errorf("modes %q", got)
		}
		if err := files.MkdirAll(t.Context(), dir+"/a/b", 0o755); err != nil || sh("stat -c %a /var/lib/test/a/b") != "755" {
			t.Errorf("mode isn't changed, error %v", err)
		}
		if err := files.MkdirAll(t.Context(), "/etc/passwd/x", 0o700); err == nil {
			t.Error("a directory in a file")
		}
	})

	t.Run("WriteFileIsWholeAndPrivate", func(t *testing.T) {
		name := dir + "/it's $(a) file"
		for _, text := range []string{"one", "", "three"} {
			if err := files.WriteFile(t.Context(), name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := files.ReadFile(t.Context(), name, 100)
			if err != nil || string(got) != text {
				t.Errorf("read %q, %v", got, err)
			}
		}
		if got := sh("stat -c %a:%u -- \"$1\"", name); got != "600:0" {
			t.Errorf("mode and owner %s", got)
		}
		if got := sh("ls -A " + dir + " | grep -c '^.tmp' || true"); got != "0" {
			t.Errorf("%s temporary files are left", got)
		}
		if err := files.WriteFile(t.Context(), dir+"/no/such/dir", nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("ReadFileHasALimit", func(t *testing.T) {
		if err := files.WriteFile(t.Context(), dir+"/ten", []byte("0123456789"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := files.ReadFile(t.Context(), dir+"/ten", 10); err != nil || len(got) != 10 {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := files.ReadFile(t.Context(), dir+"/ten", 9); !errors.Is(err, hostfs.ErrTooLarge) {
			t.Errorf("error is %v", err)
		}
		if _, err := files.ReadFile(t.Context(), dir+"/none", 9); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
		// A file whose size is a lie.
		if got, err := files.ReadFile(t.Context(), "/proc/sys/kernel/random/boot_id", 100); err != nil || len(got) != 37 {
			t.Errorf("boot id %q, %v", got, err)
		}
		for n, want := range map[int64]string{3: "789", 10: "0123456789", 99: "0123456789", 0: ""} {
			if got, err := files.Tail(t.Context(), dir+"/ten", n); err != nil || string(got) != want {
				t.Errorf("Tail(%d) = %q, %v", n, got, err)
			}
		}
	})

	t.Run("BootIDChangesOnlyWithTheBoot", func(t *testing.T) {
		one, err := files.BootID(t.Context())
		if err != nil || len(one) != 36 {
			t.Fatalf("%q, %v", one, err)
		}
	})

	t.Run("RemoveAllTakesTreesAndNoTargetsOfLinks", func(t *testing.T) {
		sh(`mkdir -p /var/lib/keep "$1/t/u/v" && echo x >/var/lib/keep/file && echo y >"$1/t/u/v/- f" && ln -s /var/lib/keep "$1/t/u/link"`, dir)
		for range 2 {
			if err := files.RemoveAll(t.Context(), dir+"/t"); err != nil {
				t.Fatal(err)
			}
		}
		if got := sh(`cat /var/lib/keep/file; ls "$1" | grep -cx t || true`, dir); got != "x\n0" {
			t.Errorf("%q", got)
		}
		for _, name := range []string{"/", "", "x", "/..", "//"} {
			if err := files.RemoveAll(t.Context(), name); err == nil {
				t.Errorf("RemoveAll(%q) is allowed", name)
			}
		}
	})

	t.Run("ExistsAndListAndRename", func(t *testing.T) {
		if err := files.Rename(t.Context(), dir+"/ten", dir+"/eleven"); err != nil {
			t.Fatal(err)
		}
		if ok, err := files.Exists(t.Context(), dir+"/ten"); ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
		if ok, err := files.Exists(t.Context(), dir+"/eleven"); !ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
		entries, err := files.ReadDir(t.Context(), dir)
		if err != nil || len(entries) < 2 {
			t.Errorf("%v, %v", entries, err)
		}
	})

	t.Run("UploadIsHashedOnTheWayAndAcceptedFirst", func(t *testing.T) {
		data := make([]byte, 5<<20+17)
		_, _ = rand.Read(data)
		hash := sha256.New()
		name := dir + "/big"
		n, err := files.Upload(t.Context(), name, 0o640, io.TeeReader(bytes.NewReader(data), hash), func(n int64) error {
			if ok, err := files.Exists(t.Context(), name); ok || err != nil {
				t.Errorf("it has its name before it's accepted: %v, %v", ok, err)
			}
			if n != int64(len(data)) {
				t.Errorf("accept is asked about %d bytes", n)
			}
			return nil
		})
		if err != nil || n != int64(len(data)) {
			t.Fatalf("%d, %v", n, err)
		}
		want := sha256.Sum256(data)
		if got := sh("sha256sum "+name+" | cut -c1-64; stat -c %a "+name, name); got != hex.EncodeToString(want[:])+"\n640" {
			t.Errorf("%s", got)
		}
		if !bytes.Equal(hash.Sum(nil), want[:]) {
			t.Error("another hash in transit")
		}

		no := errors.New("wrong hash")
		if _, err := files.Upload(t.Context(), dir+"/bad", 0o640, bytes.NewReader(data), func(int64) error { return no }); !errors.Is(err, no) {
			t.Errorf("error is %v", err)
		}
		broken := errors.New("the source broke")
		if _, err := files.Upload(t.Context(), dir+"/bad", 0o640, io.MultiReader(bytes.NewReader(data), failing{broken}), nil); !errors.Is(err, broken) {
			t.Errorf("error is %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := files.Upload(ctx, dir+"/bad", 0o640, io.MultiReader(bytes.NewReader(data), calling{cancel}), nil); !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
		if got := sh("ls -A " + dir + " | grep -c 'bad\\|tmp' || true"); got != "0" {
			t.Errorf("%s files of failed uploads are left", got)
		}
		if n, err := files.Upload(t.Context(), dir+"/empty", 0o600, bytes.NewReader(nil), nil); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	})

	t.Run("AFullDiskIsSaid", func(t *testing.T) {
		before, err := files.Free(t.Context(), dir)
		if err != nil || before.Bytes == 0 || before.Bytes > before.Total || before.Total > 512<<20 || before.Inodes == 0 {
			t.Fatalf("%+v, %v", before, err)
		}
		if err := host.FillDisk(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := host.FreeDisk(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		data := make([]byte, 2<<20)
		for doing, err := range map[string]error{
			"write": files.WriteFile(t.Context(), dir+"/full", data, 0o600),
			"upload": func() error {
				_, err := files.Upload(t.Context(), dir+"/full", 0o600, bytes.NewReader(data), nil)
				return err
			}(),
		} {
			if backenderr.ReasonOf(err) != backenderr.HostUnfit || !strings.Contains(err.Error(), "disk is full") {
				t.Errorf("%s: %v", doing, err)
			}
		}
	})

	t.Run("ALostConnectionIsSaid", func(t *testing.T) {
		generation := conn.State().Generation
		_, err := files.Upload(t.Context(), dir+"/lost", 0o600, io.MultiReader(bytes.NewReader(make([]byte, 1<<20)),
			calling{func() { _ = host.ResetConnections(t.Context()) }}, endless{}), nil)
		if backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
			t.Errorf("upload: %v", err)
		}
		for conn.State().Generation == generation {
			_, changed := conn.Changed()
			<-changed
		}
		if ok, err := files.Exists(t.Context(), dir+"/lost"); ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
	})
}

// failing fails.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// calling calls something, once, and is empty.
type calling struct{ f func() }

func (c calling) Read([]byte) (int, error) {
	c.f()
	return 0, io.EOF
}

// endless never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func BenchmarkUpload(b *testing.B) {
	host := lab.NewHost(b, lab.HostOptions{})
	conn := connect(b, host)
	files := hostfs.New(conn)
	if err := files.MkdirAll(b.Context(), dir, 0o700); err != nil {
		b.Fatal(err)
	}
	const size = 256 << 20
	source := func() io.Reader { return io.LimitReader(endless{}, size) }
	b.Run("Upload", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if _, err := files.Upload(b.Context(), dir+"/big", 0o600, source(), nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	for name, args := range map[string][]string{
		"cat":        {"sh", "-c", `cat >"$1"`, "sh", dir + "/big2"},
		"cat-sync":   {"sh", "-c", `cat >"$1"; sync "$1"`, "sh", dir + "/big2"},
		"dd-64k":     {"dd", "of=" + dir + "/big2", "bs=64k", "iflag=fullblock", "status=none"},
		"dd-256k":    {"dd", "of=" + dir + "/big2", "bs=256k", "iflag=fullblock", "status=none"},
		"dd-1M":      {"dd", "of=" + dir + "/big2", "bs=1M", "iflag=fullblock", "status=none"},
		"dd-1M-sync": {"dd", "of=" + dir + "/big2", "bs=1M", "iflag=fullblock", "conv=fsync", "status=none"},
		"null":       {"sh", "-c", "cat >/dev/null"},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				r, err := conn.Run(b.Context(), sshconn.Command{Args: args, Stdin: source()})
				if err != nil || r.ExitCode != 0 {
					b.Fatal(r, err)
				}
			}
		})
	}
	b.Run("SFTP", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			client, err := conn.SFTP(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			file, err := client.Create(dir + "/big3")
			if err != nil {
				b.Fatal(err)
			}
			if _, err := file.ReadFromWithConcurrency(source(), 64); err != nil {
				b.Fatal(err)
			}
			_ = file.Close()
		}
	})
	b.Run("WriteFile-1KB", func(b *testing.B) {
		for b.Loop() {
			if err := files.WriteFile(b.Context(), fmt.Sprintf("%s/%d", dir, b.N%7), make([]byte, 1024), 0o600); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Stat", func(b *testing.B) {
		for b.Loop() {
			if _, err := files.Stat(b.Context(), dir); err != nil {
				b.Fatal(err)
			}
		}
	})
}
