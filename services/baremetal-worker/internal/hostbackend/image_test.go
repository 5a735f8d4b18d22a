package hostbackend

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func sumOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func TestImagesThatCanNotRunAreRefused(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	shell := makeArchive(t, ociimage.Shell)
	flipped := bytes.Clone(shell.data)
	flipped[len(flipped)/2] ^= 1
	for _, tt := range []struct {
		name  string
		image backend.Image
		want  backenderr.Reason
		texts []string
	}{
		{"not in the store", backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: [32]byte{1}}, Kind: backend.ImageOCIArchive}, backenderr.ImageUnavailable, []string{"not found"}},
		{"wrong bytes in the store", s.store("sha256:"+strings.Repeat("11", 32), shell.data), backenderr.ImageHashMismatch, nil},
		{"one bit wrong", s.store(sumOf(shell.data), flipped), backenderr.ImageHashMismatch, nil},
		{"cut off in the store", s.store("sha256:"+strings.Repeat("22", 32), shell.data[:1000]), backenderr.ImageHashMismatch, nil},
		{"no OCI image", s.image(ociimage.NotOCI), backenderr.ImageInvalid, nil},
		{"an OCI image with a wrong layer", s.image(ociimage.Corrupt), backenderr.ImageInvalid, nil},
		{"no archive at all", s.store(sumOf([]byte("hello")), []byte("hello")), backenderr.ImageInvalid, nil},
		{"empty", s.store(sumOf(nil), nil), backenderr.ImageInvalid, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, e := grant(tt.image, key)
			_, err := s.runtime.Provision(caller(t.Context()), g, e)
			refused(t, err, tt.want, tt.texts...)
		})
	}
}

func TestImageTamperedOnTheHostHeals(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	g, e := grant(image, key)
	runs := s.provision(t, g, e)
	defer s.terminate(t, runs)
	file := s.driver.dirs.cache.String() + "/" + strings.Replace(image.Digest.String(), ":", "-", 1)

	if _, err := h.Exec(t.Context(), "sh", "-c", "printf x | dd of="+file+" bs=1 seek=5000 conv=notrunc"); err != nil {
		t.Fatal(err)
	}
	g, e = grant(image, key)
	_, err := s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.ImageHashMismatch, h.Name)
	// What runs from it goes on, with all of its files.
	if out, err := run(t, runs, key, "cat /etc/passwd"); err != nil || !strings.Contains(out, "app:") {
		t.Errorf("%v: %s", err, out)
	}
	s.terminate(t, s.provision(t, g, e))
}

func TestWorkloadThatExits(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	t.Run("at once", func(t *testing.T) {
		g, e := grant(s.image(ociimage.Exit3), key)
		p, err := s.runtime.Provision(caller(t.Context()), g, e)
		if err != nil {
			refused(t, err, backenderr.WorkloadFailed)
			var own *backenderr.Error
			if !errors.As(err, &own) || !strings.Contains(own.Metadata[backenderr.MetaConsole], "3") {
				t.Errorf("no code 3 on the console: %+v", err)
			}
			return
		}
		ended(t, s, p, backend.EndWorkloadExited, 3)
	})
	t.Run("later", func(t *testing.T) {
		g, e := grant(s.image(ociimage.Configured), key)
		p := s.provision(t, g, e)
		// Only root of the container may: the workload has a user of its own.
		if out, err := run(t, p, key, "true"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		r := p
		r.Receipt.User = "root"
		// The end that it brings may hang up its own session.
		if out, err := run(t, r, key, "killall sleep"); err != nil {
			t.Logf("%v: %s", err, out)
		}
		ended(t, s, p, backend.EndWorkloadExited, 128+15)
	})
}

// ended waits for the end of an instance by Watch and checks its compute log.
func ended(t *testing.T, s *site, p backend.Provisioned, reason backend.EndReason, code int32) backend.ComputeLog {
	t.Helper()
	var last backend.Event
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	err := s.runtime.WatchUntilExit(caller(ctx), p.Instance.Handle, func(e backend.Event) error { last = e; return nil })
	if err != nil {
		t.Fatal(err)
	}
	log := last.Log
	if log == nil || !log.Log.Final || log.Log.Exit.Reason != reason {
		t.Fatalf("last event %+v, log %+v; want reason %s", last, log, reason)
	}
	if code >= 0 && (log.Log.Exit.Code == nil || *log.Log.Exit.Code != code) {
		t.Errorf("exit %+v, want code %d", log.Log.Exit, code)
	}
	return log.Log
}

func TestImageWithoutShell(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil, lab.NewHost(t, lab.HostOptions{}))
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Distroless), key)
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	c := client(t, p.Receipt, key)
	if out, code := c.ssh(t, "/tiny exit 9"); code != 9 {
		t.Errorf("command: code %d, %q", code, out)
	}
	if out, code := c.ssh(t); code == 0 || !strings.Contains(out, "no shell") {
		t.Errorf("shell: code %d, %q", code, out)
	}
}

func TestStubbornWorkloadEndsAfterTheGrace(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil, lab.NewHost(t, lab.HostOptions{}))
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Stubborn), key)
	p := s.provision(t, g, e)
	began := time.Now()
	log := s.terminate(t, p)
	if took := time.Since(began); took > s.config.StopGrace.Duration+15*time.Second {
		t.Errorf("took %s", took)
	}
	if log.Exit.Reason != backend.EndTerminated {
		t.Errorf("exit %+v", log.Exit)
	}
}

func TestImageByBLAKE3AndPointer(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil, lab.NewHost(t, lab.HostOptions{}))
	key := newLogin(t)
	a := makeArchive(t, ociimage.Shell)
	image := s.store("blake3:"+a.blake3, a.data)
	if err := os.Rename(filepath.Join(s.images, "blake3", a.blake3), filepath.Join(s.images, "elsewhere.tar")); err != nil {
		t.Fatal(err)
	}
	g, e := grant(image, key)
	e.ImagePointer = "elsewhere.tar"
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	if out, err := run(t, p, key, "echo runs"); err != nil || out != "runs\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// A store that takes its time, and an image of 300 MB: progress is told, and the
// time that it took is not added to the deadline.
func TestLargeImageFromASlowStore(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{DiskMiB: 4096})
	root, err := lab.RootFS(t.Context(), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "big.tar")
	big, err := ociimage.WriteFile(t.Context(), file, ociimage.Big, ociimage.Options{RootFS: root, SizeMiB: 300})
	if err != nil {
		t.Fatal(err)
	}
	const delay = 2 * time.Second
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
		}
		http.ServeFile(w, r, file)
	}))
	defer store.Close()
	s := newSite(t, func(c *Config) { c.ImageStore.Base = store.URL }, h)
	key := newLogin(t)
	digest, err := backend.ParseDigest("sha256:" + big.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	g, e := grant(backend.Image{Digest: digest, Kind: backend.ImageOCIArchive}, key)

	var mu sync.Mutex
	said := map[string]time.Time{} // when it was seen first
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for t.Context().Err() == nil {
			for _, i := range s.runtime.Instances(caller(t.Context())) {
				mu.Lock()
				if text := strings.TrimRight(i.Progress, "0123456789 %ofMiB"); said[text].IsZero() {
					said[text] = time.Now()
				}
				mu.Unlock()
				if i.State == backend.StateReady {
					return
				}
			}
			select {
			case <-tick.C:
			case <-t.Context().Done():
			}
		}
	}()
	began := time.Now()
	p := s.provision(t, g, e)
	t.Logf("%d MiB: ready after %s", big.Size>>20, time.Since(began))
	<-watching
	for _, want := range []string{"sending image", "verifying image", "unpacking image", "starting", "waiting for SSH"} {
		if said[want].IsZero() {
			t.Errorf("progress never said %q, but %v", want, said)
		}
	}
	out, err := h.Exec(t.Context(), "systemctl", "show", "--timestamp=unix", "--property=InactiveExitTimestamp,ActiveEnterTimestamp,RuntimeMaxUSec", unitOf(s, g.ID, 1))
	if err != nil {
		t.Fatal(err)
	}
	times, lifetime := map[string]time.Time{}, time.Duration(0)
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch name {
		case "InactiveExitTimestamp", "ActiveEnterTimestamp":
			seconds, err := strconv.ParseInt(strings.TrimPrefix(value, "@"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			times[name] = time.Unix(seconds, 0)
		case "RuntimeMaxUSec":
			lifetime = systemdSpan(t, value)
		}
	}
	// systemd counts from when the unit was active, the worker from when it asked.
	// What is printed is cut to whole seconds, and on a busy machine it takes more
	// than one until systemd hears of the unit: the time is held against what the
	// image took here.
	starting, image := times["ActiveEnterTimestamp"].Sub(times["InactiveExitTimestamp"]), said["starting"].Sub(began)
	if late := times["ActiveEnterTimestamp"].Add(lifetime).Sub(g.ValidTo); late > starting+image/2 || late < -2*time.Second {
		t.Errorf("the unit ends %s after the grant's deadline; it took %s to start, and the image %s", late, starting, image)
	}
	s.terminate(t, p)
}

// systemdSpan reads "59min 58.123s".
func systemdSpan(t *testing.T, text string) time.Duration {
	t.Helper()
	text = strings.NewReplacer("min", "m", " ", "").Replace(text)
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func unitOf(s *site, id backend.GrantID, attempt uint32) string {
	return names{bridge: s.driver.env.BridgeID, grant: id, attempt: attempt}.unit()
}
