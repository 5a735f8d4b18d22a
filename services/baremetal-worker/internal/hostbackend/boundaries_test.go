package hostbackend

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// What a tenant, or somebody at the host, does to one grant stays with it.
func TestHarmStaysWithItsGrant(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	for _, tt := range []struct {
		name string
		test func(*testing.T, *site)
	}{
		{"names in an archive mean nothing", testNamesInArchives},
		{"an archive that is not one OCI image leaves nothing", testArchivesOfOtherKinds},
		{"a health check in an image is run by nobody", testHealthCheck},
		{"a damaged record is a problem of its grant alone", testDamagedRecord},
		{"an upload that was cut off is removed", testCutOffUpload},
		{"the files of podman in a container are bounded", testFilesOfPodman},
		{"an earlier attempt never starts", testEarlierAttempt},
		{"a flushed firewall gives no rights and is restored", testFlushedFirewall},
		{"a full disk doesn't keep a grant from ending", testEndOnAFullDisk},
	} {
		ok := t.Run(tt.name, func(t *testing.T) {
			tt.test(t, s)
			soon(t, func() error { return s.allFree(t.Context()) })
			if left, err := h.Leftovers(t.Context(), "image "); err != nil || len(left) > 0 {
				t.Errorf("left behind (%v):\n\t%s", err, strings.Join(left, "\n\t"))
			}
		})
		if !ok {
			return // the next would find what this one left
		}
	}
}

// entry is a file of a tar archive.
type entry struct {
	name string
	data []byte
}

func untar(t *testing.T, archive []byte) []entry {
	t.Helper()
	var entries []entry
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		head, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{head.Name, data})
	}
}

func retar(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// ociIndex is the index.json of an OCI archive.
type ociIndex struct {
	SchemaVersion int              `json:"schemaVersion"`
	MediaType     string           `json:"mediaType"`
	Manifests     []map[string]any `json:"manifests"`
}

// indexOf reads the index of an archive's entries.
func indexOf(t *testing.T, entries []entry) (at int, index ociIndex) {
	t.Helper()
	at = slices.IndexFunc(entries, func(e entry) bool { return e.name == "index.json" })
	if at < 0 {
		t.Fatal("no index.json")
	}
	if err := json.Unmarshal(entries[at].data, &index); err != nil {
		t.Fatal(err)
	}
	return at, index
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// renamed is an OCI archive that calls its image something else.
func renamed(t *testing.T, archive []byte, name string) []byte {
	t.Helper()
	entries := untar(t, archive)
	at, index := indexOf(t, entries)
	index.Manifests[0]["annotations"] = map[string]string{"org.opencontainers.image.ref.name": name}
	entries[at].data = marshal(t, index)
	return retar(t, entries...)
}

// merged is an OCI archive of the images of two.
func merged(t *testing.T, a, b []byte) []byte {
	t.Helper()
	entries, more := untar(t, a), untar(t, b)
	at, index := indexOf(t, entries)
	_, other := indexOf(t, more)
	index.Manifests = append(index.Manifests, other.Manifests...)
	entries[at].data = marshal(t, index)
	for _, e := range more {
		if strings.HasPrefix(e.name, "blobs/") {
			entries = append(entries, e)
		}
	}
	return retar(t, entries...)
}

// dockerArchive is what `docker save` makes of OCI archives, all with the same
// names.
func dockerArchive(t *testing.T, tags []string, archives ...[]byte) []byte {
	t.Helper()
	type described struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var images []described
	var files []entry
	for i, archive := range archives {
		entries := untar(t, archive)
		blob := func(digest string) []byte {
			t.Helper()
			for _, e := range entries {
				if e.name == "blobs/"+strings.Replace(digest, ":", "/", 1) {
					return e.data
				}
			}
			t.Fatalf("no blob %s", digest)
			return nil
		}
		var manifest struct {
			Config struct{ Digest string }
			Layers []struct{ Digest string }
		}
		_, index := indexOf(t, entries)
		if err := json.Unmarshal(blob(fmt.Sprint(index.Manifests[0]["digest"])), &manifest); err != nil {
			t.Fatal(err)
		}
		layer := strconv.Itoa(i) + "/layer.tar"
		config := strings.TrimPrefix(manifest.Config.Digest, "sha256:") + ".json"
		files = append(files, entry{config, blob(manifest.Config.Digest)}, entry{layer, blob(manifest.Layers[0].Digest)})
		images = append(images, described{config, []string{tags[i]}, []string{layer}})
	}
	return retar(t, append(files, entry{"manifest.json", marshal(t, images)})...)
}

// checkedHealth is an OCI archive of the image of another one, with Docker's
// HEALTHCHECK, of OCI's types or of Docker's. OCI has none, but tools leave it in.
func checkedHealth(t *testing.T, archive []byte, docker bool, command string) []byte {
	t.Helper()
	entries := untar(t, archive)
	at, index := indexOf(t, entries)
	blob := func(descriptor map[string]any) (at int, decoded map[string]any) {
		t.Helper()
		name := "blobs/" + strings.Replace(fmt.Sprint(descriptor["digest"]), ":", "/", 1)
		at = slices.IndexFunc(entries, func(e entry) bool { return e.name == name })
		if at < 0 {
			t.Fatalf("no %s", name)
		}
		if err := json.Unmarshal(entries[at].data, &decoded); err != nil {
			t.Fatal(err)
		}
		return at, decoded
	}
	put := func(at int, descriptor, content map[string]any) {
		t.Helper()
		data := marshal(t, content)
		sum := sha256.Sum256(data)
		entries[at] = entry{"blobs/sha256/" + hex.EncodeToString(sum[:]), data}
		descriptor["digest"], descriptor["size"] = "sha256:"+hex.EncodeToString(sum[:]), len(data)
	}
	object := func(of map[string]any, key string) map[string]any {
		t.Helper()
		out, ok := of[key].(map[string]any)
		if !ok {
			t.Fatalf("%s is %v", key, of[key])
		}
		return out
	}
	top := index.Manifests[0]
	atManifest, manifest := blob(top)
	config := object(manifest, "config")
	atConfig, content := blob(config)
	object(content, "config")["Healthcheck"] = map[string]any{"Test": []string{"CMD-SHELL", command}, "Interval": time.Second, "Timeout": time.Second, "Retries": 1}
	if docker {
		const manifestType = "application/vnd.docker.distribution.manifest.v2+json"
		top["mediaType"], manifest["mediaType"] = manifestType, manifestType
		config["mediaType"] = "application/vnd.docker.container.image.v1+json"
		layers, ok := manifest["layers"].([]any)
		if !ok {
			t.Fatalf("layers are %v", manifest["layers"])
		}
		for _, l := range layers {
			layer, ok := l.(map[string]any)
			if !ok {
				t.Fatalf("a layer is %v", l)
			}
			layer["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar"
		}
	}
	put(atConfig, config, content)
	put(atManifest, top, manifest)
	entries[at].data = marshal(t, index)
	return retar(t, entries...)
}

// podman would have the host's systemd run an image's health check, in units that
// are no part of the grant's. An image with one runs like any other, without it;
// with Docker's types, of which it is a part, an archive is refused like all that
// isn't OCI's.
func testHealthCheck(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	shell := makeArchive(t, ociimage.Shell).data
	const command = "echo checked >>/checked; exit 1"
	g, e := grant(storeNew(s, checkedHealth(t, shell, false, command)), key)
	p := s.provision(t, g, e)
	// Some of its intervals.
	if out, err := run(t, p, key, "sleep 3; cat /checked 2>/dev/null; echo alive"); err != nil || out != "alive\n" {
		t.Errorf("the workload says %q, %v", out, err)
	}
	if units := onHost(t, s.hosts[0], "systemctl list-units --all --plain --no-legend | grep 'healthcheck run' || true"); units != "" {
		t.Errorf("the host has\n%s", units)
	}
	if log := s.terminate(t, p); log.Exit.Reason != backend.EndTerminated {
		t.Errorf("it ended by %s", log.Exit.Reason)
	}
	g, e = grant(storeNew(s, checkedHealth(t, shell, true, command)), key)
	_, err := s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.ImageInvalid, "not OCI's")
}

// hostImages are the names and ids in the host's own podman.
func hostImages(t *testing.T, s *site) string {
	t.Helper()
	out, err := s.hosts[0].Exec(t.Context(), "podman", "images", "--all", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// bridgeImages are those in the bridge's store.
func bridgeImages(t *testing.T, s *site) []string {
	t.Helper()
	out, err := s.hosts[0].Exec(t.Context(), "podman", "--root", s.driver.dirs.images.String(), "--runroot", runDir+"/images/test",
		"images", "--all", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.FieldsFunc(out, func(r rune) bool { return r == '\n' })
	slices.Sort(lines)
	return lines
}

// storeNew puts an archive into the store under its own digest.
func storeNew(s *site, archive []byte) backend.Image {
	sum := sha256.Sum256(archive)
	return s.store("sha256:"+hex.EncodeToString(sum[:]), archive)
}

func testNamesInArchives(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	honest := s.image(ociimage.Shell)
	// The operator's own image, which has a name that others may know.
	a := makeArchive(t, ociimage.Exit3)
	const own = "docker.io/library/x:latest"
	if err := s.hosts[0].Run(t.Context(), bytes.NewReader(renamed(t, a.data, own)), nil, nil, "podman", "load", "--quiet"); err != nil {
		t.Fatal(err)
	}
	before := hostImages(t, s)
	if !strings.Contains(before, own) {
		t.Fatalf("host's own images: %s", before)
	}
	runsHonest := func() {
		t.Helper()
		g, e := grant(honest, key)
		p := s.provision(t, g, e)
		if out, err := run(t, p, key, "echo honest"); err != nil || out != "honest\n" {
			t.Errorf("the honest image: %q, %v", out, err)
		}
		s.terminate(t, p)
	}
	runsHonest()
	f, err := s.driver.hosts[0].ready()
	if err != nil {
		t.Fatal(err)
	}
	unpacked, err := s.driver.hosts[0].images.unpacked(t.Context(), f, honest.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	hexSum := hex.EncodeToString(honest.Digest.Sum[:])
	for _, name := range []string{
		"localhost/compute-bridge/test/sha256-" + hexSum + ":latest", own, unpacked.ID,
	} {
		g, e := grant(storeNew(s, renamed(t, makeArchive(t, ociimage.Distroless).data, name)), key)
		p := s.provision(t, g, e)
		if out, err := run(t, p, key, "/tiny exit 9"); err == nil || !strings.Contains(err.Error(), "9") {
			t.Errorf("archive that calls itself %s: %q, %v", name, out, err)
		}
		s.terminate(t, p)
		runsHonest()
	}
	if diff := cmp.Diff(before, hostImages(t, s)); diff != "" {
		t.Errorf("the host's own images changed (-before +after):\n%s", diff)
	}
	for _, line := range bridgeImages(t, s) {
		if !strings.HasPrefix(line, "<none>:<none> ") {
			t.Errorf("in the bridge's store there is a name: %s", line)
		}
	}
}

func testArchivesOfOtherKinds(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	shell, tiny := makeArchive(t, ociimage.Configured).data, makeArchive(t, ociimage.Stubborn).data
	inHost, inBridge := hostImages(t, s), bridgeImages(t, s)
	const a, b = "docker.io/library/a:latest", "docker.io/library/b:latest"
	for _, tt := range []struct {
		name    string
		archive []byte
	}{
		{"OCI with two images", merged(t, renamed(t, shell, a), renamed(t, tiny, b))},
		{"OCI with two images of one name", merged(t, renamed(t, shell, a), renamed(t, tiny, a))},
		{"Docker's", dockerArchive(t, []string{a}, tiny)},
		{"Docker's with two images", dockerArchive(t, []string{a, b}, tiny, shell)},
	} {
		image := storeNew(s, tt.archive)
		g, e := grant(image, key)
		_, err := s.runtime.Provision(caller(t.Context()), g, e)
		if !backenderr.Is(err, backenderr.ImageInvalid) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
			t.Errorf("%s: got %v (%s), created %s", tt.name, err, backenderr.ReasonOf(err), backenderr.CreatedOf(err))
		}
		if diff := cmp.Diff(inHost, hostImages(t, s)); diff != "" {
			t.Errorf("%s: the host's own images (-before +after):\n%s", tt.name, diff)
		}
		if diff := cmp.Diff(inBridge, bridgeImages(t, s)); diff != "" {
			t.Errorf("%s: the bridge's store (-before +after):\n%s", tt.name, diff)
		}
	}
}

func testFlushedFirewall(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	h, image := s.hosts[0], s.image(ociimage.Shell)
	outside := endpoint{"outside", h.Lab().Addr().String(), listenHere(t, h.Lab().Addr().String())}
	allowed := endpoint{"allowed", "10.77.0.2", outside.port}
	network := func(allow ...string) backend.Provisioned {
		t.Helper()
		g, e := grant(image, key)
		g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}}
		if len(allow) > 0 {
			g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: allow}
		}
		p := s.provision(t, g, e)
		serve(t, p, key, g.Ports[0], "served")
		return p
	}
	restricted, open := network(allowed.host+"/32"), network()
	ifaceOf := func(p backend.Provisioned) string {
		return names{bridge: "test", grant: p.Instance.GrantID, attempt: p.Instance.Attempt}.networkInterface()
	}
	serves := func(p backend.Provisioned) error {
		port := p.Instance.Ports[0]
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(port.PublicHost, strconv.Itoa(int(port.PublicPort))), time.Second)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		text, err := io.ReadAll(conn)
		if string(text) != "served\n" {
			return fmt.Errorf("port %d says %q: %w", port.PublicPort, text, errors.Join(err, errors.ErrUnsupported))
		}
		return nil
	}
	// never fails if the restricted grant may go where it may not, at any time.
	never := func() {
		t.Helper()
		state, err := s.driver.hosts[0].nft.Read(t.Context())
		if err == nil && slices.Contains(state.OpenEgress, ifaceOf(restricted)) {
			t.Error("the restricted grant may go anywhere")
		}
	}
	for _, round := range []string{"flush alone", "flush, and another grant at once"} {
		if _, err := h.Exec(t.Context(), "nft", "flush", "ruleset"); err != nil {
			t.Fatal(err)
		}
		never()
		var third backend.Provisioned
		if round != "flush alone" {
			third = network()
			never()
		}
		if _, err := s.driver.List(t.Context()); err != nil {
			t.Fatal(err)
		}
		never()
		state, err := s.driver.hosts[0].nft.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(state.OpenEgress, ifaceOf(open)) {
			t.Errorf("%s: the open grant is not let out: %+v", round, state)
		}
		if got := fmt.Sprint(state.Allow[ifaceOf(restricted)]); got != "["+allowed.host+"/32]" {
			t.Errorf("%s: the restricted grant may reach %s", round, got)
		}
		for _, p := range []backend.Provisioned{restricted, open} {
			soon(t, func() error { return serves(p) })
		}
		if got := reachable(t, restricted, key, outside); len(got) > 0 {
			t.Errorf("%s: the restricted grant reaches %v", round, got)
		}
		if got := reachable(t, open, key, outside); len(got) != 1 {
			t.Errorf("%s: the open grant reaches %v", round, got)
		}
		if third.Instance.ID != "" {
			if err := serves(third); err != nil {
				t.Errorf("%s: the third grant: %v", round, err)
			}
			measured(t, s.terminate(t, third))
		}
	}
	measured(t, s.terminate(t, restricted))
	measured(t, s.terminate(t, open))
}

// measured checks that the host measured what an instance used.
func measured(t *testing.T, log backend.ComputeLog) {
	t.Helper()
	u := log.Usage
	if log.Partial || u.CPU == nil || u.CPU.Value <= 0 || u.NetworkReceived == nil || u.NetworkReceived.Value <= 0 {
		t.Errorf("usage of grant %s: partial %t, CPU %+v, received %+v", log.GrantID, log.Partial, u.CPU, u.NetworkReceived)
	}
}

// reconnect breaks the worker's connection and waits for the next.
func (s *site) reconnect(t *testing.T) {
	t.Helper()
	before := s.driver.hosts[0].conn
	state, _ := before.Changed()
	if err := s.hosts[0].ResetConnections(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error {
		found, problem := s.driver.hosts[0].known()
		if found == nil || found.generation == state.Generation {
			return fmt.Errorf("not connected again: %w", errors.Join(problem, errors.ErrUnsupported))
		}
		return nil
	})
}

func testDamagedRecord(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	for _, content := range []string{`{"version": 1, "gra`, strings.Repeat("x", maxRecordBytes+1)} {
		g, e := grant(image, key)
		damaged := s.provision(t, g, e)
		file := s.driver.dirs.grant(g.ID) + "/" + recordFile
		if err := s.hosts[0].Run(t.Context(), strings.NewReader(content), nil, nil, "sh", "-c", `cat >"$1"`, "sh", file); err != nil {
			t.Fatal(err)
		}
		s.reconnect(t)
		if _, err := s.driver.hosts[0].usable(); err != nil {
			t.Errorf("host with a damaged record: %v", err)
		}
		other, e := grant(image, key)
		p := s.provision(t, other, e)
		if p.Receipt.Port == damaged.Receipt.Port {
			t.Errorf("both grants have port %d", p.Receipt.Port)
		}
		if _, err := run(t, damaged, key, "true"); err != nil {
			t.Errorf("the grant whose record is damaged: %v", err)
		}
		s.terminate(t, damaged)
		s.terminate(t, p)
	}
}

// stalled is a reader that has something, and then nothing until it is closed.
type stalled struct {
	begin  io.Reader
	ending <-chan struct{}
}

func (r stalled) Read(p []byte) (int, error) {
	if n, err := r.begin.Read(p); err == nil {
		return n, nil
	}
	<-r.ending
	return 0, io.ErrUnexpectedEOF
}

func testCutOffUpload(t *testing.T, s *site) {
	t.Helper()
	h, d := s.driver.hosts[0], s.driver.dirs
	temps := func() string {
		t.Helper()
		out, err := s.hosts[0].Exec(t.Context(), "find", d.base.String(), "-name", hostfs.TempPrefix+"*")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	ending, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := h.fs.Upload(t.Context(), d.cache.String()+"/sha256-"+strings.Repeat("0", 64), 0o600, stalled{bytes.NewReader(make([]byte, 4<<20)), ending}, nil)
		failed <- err
	}()
	soon(t, func() error {
		if temps() == "" {
			return errors.New("nothing is sent yet")
		}
		return nil
	})
	for _, dir := range []hostfs.Base{d.base, d.guest, d.index} {
		if _, err := s.hosts[0].Exec(t.Context(), "touch", dir.String()+"/"+hostfs.TempPrefix+"1234"); err != nil {
			t.Fatal(err)
		}
	}
	s.reconnect(t)
	close(ending)
	if err := <-failed; err == nil {
		t.Error("the upload says that it succeeded")
	}
	if left := temps(); left != "" {
		t.Errorf("left of the uploads: %s", left)
	}
}

func testFilesOfPodman(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	used := func() int {
		t.Helper()
		out, err := s.hosts[0].Exec(t.Context(), "sh", "-c", "df --output=used -B1M /run | tail -n 1")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(out))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := used()
	for _, file := range []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv"} {
		// As root of the container. What counts is that it ends before 64 MiB.
		out, err := run(t, p, key, "dd if=/dev/zero of="+file+" bs=1M count=64 2>&1; wc -c <"+file)
		lines := strings.Fields(out)
		size, errSize := strconv.Atoi(lines[len(lines)-1])
		if errSize != nil || size >= 64<<20 {
			t.Errorf("%s: %d bytes: %v %q", file, size, err, out)
		}
	}
	if grown := used() - before; grown > 1 {
		t.Errorf("the host's /run grew by %d MiB", grown)
	}
	measured(t, s.terminate(t, p))
}

func testEarlierAttempt(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	a := makeArchive(t, ociimage.Shell)
	digest, err := backend.ParseDigest("blake3:" + a.blake3)
	if err != nil {
		t.Fatal(err)
	}
	g, e := grant(backend.Image{Digest: digest, Kind: backend.ImageOCIArchive}, key)
	_, err = s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.ImageUnavailable)
	s.store("blake3:"+a.blake3, a.data)
	p := s.provision(t, g, e)
	if p.Instance.Attempt != 2 {
		t.Fatalf("attempt %d", p.Instance.Attempt)
	}
	// The call that began the first attempt comes only now.
	h := s.driver.hosts[0]
	found, err := h.ready()
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.record(t.Context(), g.ID)
	if err != nil {
		t.Fatal(err)
	}
	w := h.workload(found, g, &attempt{number: 1, params: r.params})
	image, err := h.images.unpacked(t.Context(), found, g.Image.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	w.imageID, w.lifetime = image.ID, time.Minute
	unit, err := w.unit()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.bus.StartTransient(t.Context(), unit); !errors.Is(err, systemd.ErrConditionFailed) {
		t.Errorf("start of the first attempt: %v", err)
	}
	if n := containers(t, s.hosts[0]); n != 1 {
		t.Errorf("%d containers", n)
	}
	if _, err := run(t, p, key, "true"); err != nil {
		t.Errorf("the second attempt: %v", err)
	}
	measured(t, s.terminate(t, p))
}

func testEndOnAFullDisk(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	h, image := s.hosts[0], s.image(ociimage.Shell)
	g, e := grant(image, key)
	p := s.provision(t, g, e)
	if err := h.FillDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.FreeDisk(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	s.reconnect(t)
	soon(t, func() error {
		if _, err := s.driver.hosts[0].usable(); !backenderr.Is(err, backenderr.HostUnfit) {
			return fmt.Errorf("full host: %w", errors.Join(err, errors.ErrUnsupported))
		}
		return nil
	})
	s.terminate(t, p)
	if out, err := h.Exec(t.Context(), "systemctl", "list-units", "--plain", "--no-legend", "cb-*"); err != nil || out != "" {
		t.Errorf("units on the full host: %s, %v", out, err)
	}
	other, e := grant(image, key)
	_, err := s.runtime.Provision(caller(t.Context()), other, e)
	refused(t, err, backenderr.HostUnfit)
	if err := h.FreeDisk(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.reconnect(t) // it would look again by itself, but not so soon
	soon(t, func() error { _, err := s.driver.hosts[0].usable(); return err })
	c, err := s.runtime.Capabilities(t.Context())
	if err != nil || len(c.Warnings) > 0 || c.Regions[0].Free != c.Regions[0].Total {
		t.Errorf("capabilities %+v, %v", c, err)
	}
	s.terminate(t, s.provision(t, other, e))
}
