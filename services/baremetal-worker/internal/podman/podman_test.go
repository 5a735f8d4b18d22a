package podman_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/hostfs"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

// rig is a lab host and what speaks to it.
type rig struct {
	host    *lab.Host
	conn    *sshconn.Conn
	files   *hostfs.FS
	systemd *systemd.Client
	podman  *podman.Client
}

const dir = "/var/lib/test"

func newRig(t testing.TB) rig {
	t.Helper()
	h := lab.NewHost(t, lab.HostOptions{})
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	conn, err := sshconn.Open(t.Context(), sshconn.Config{
		Name: h.Name, Address: net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), User: "root",
		Key: h.Lab().UserKey(), HostKeys: []ssh.PublicKey{h.HostKey},
		BackoffMin: 50 * time.Millisecond, BackoffMax: 500 * time.Millisecond,
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	units := systemd.Open(t.Context(), conn, log)
	t.Cleanup(func() { _ = units.Close() })
	client := podman.New(conn)
	t.Cleanup(client.Close)
	r := rig{h, conn, hostfs.New(conn), units, client}
	if err := units.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(units.Start(t.Context(), "podman.socket"), r.files.MkdirAll(t.Context(), dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	return r
}

// load sends an image to the host and loads it.
func (r rig) load(t testing.TB, e podman.Engine, kind ociimage.Kind) (podman.Image, error) {
	t.Helper()
	archive := ociimage.Make(t, kind)
	file, err := os.Open(archive.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	name := dir + "/" + string(kind)
	if _, err := r.files.Upload(t.Context(), name, 0o600, file, nil); err != nil {
		t.Fatal(err)
	}
	return r.podman.LoadImage(t.Context(), e, name)
}

func TestPodman(t *testing.T) {
	r := newRig(t)

	t.Run("PingAndVersion", func(t *testing.T) {
		if err := r.podman.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		if v, err := r.podman.Version(t.Context()); err != nil || !strings.HasPrefix(v, "5.") {
			t.Errorf("%q, %v", v, err)
		}
	})

	t.Run("Images", func(t *testing.T) {
		own := podman.Engine{Root: "/var/lib/containers/images", RunRoot: "/run/images"}
		var first podman.Image
		for i := range 2 { // Loading again changes nothing.
			image, err := r.load(t, own, ociimage.Configured)
			if err != nil {
				t.Fatal(err)
			}
			if len(image.ID) != 64 || image.Size == 0 || len(image.Entrypoint) == 0 || len(image.Cmd) == 0 || len(image.Env) == 0 || image.User == "" || image.WorkingDir == "" ||
				image.OS != "linux" || image.Architecture != "amd64" {
				t.Errorf("%+v", image)
			}
			if i == 1 && image.ID != first.ID {
				t.Errorf("loaded again: %s, was %s", image.ID, first.ID)
			}
			first = image
		}
		if out, err := r.host.Exec(t.Context(), "podman", "--root="+own.Root, "--runroot="+own.RunRoot, "images", "--format={{.ID}} {{.Names}}", "--no-trunc"); err != nil ||
			strings.TrimSpace(out) != "sha256:"+first.ID+" []" {
			t.Errorf("the store has %q, %v; want the image without a name", out, err)
		}
		if out, err := r.host.Exec(t.Context(), "podman", "images", "--quiet"); err != nil || out != "" {
			t.Errorf("the host's own store has %q, %v", out, err)
		}
		for range 2 {
			if err := r.podman.DropImages(t.Context(), own, first.ID); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("WhatIsNoImageIsSaid", func(t *testing.T) {
		for _, kind := range []ociimage.Kind{ociimage.NotOCI, ociimage.Corrupt} {
			if image, err := r.load(t, podman.Engine{}, kind); backenderr.ReasonOf(err) != backenderr.ImageInvalid {
				t.Errorf("%s: %v, %v", kind, image, err)
			}
		}
		if err := r.files.WriteFile(t.Context(), dir+"/noise", []byte("no image at all"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := r.podman.LoadImage(t.Context(), podman.Engine{}, dir+"/noise"); !errors.Is(err, podman.ErrNotAnImage) {
			t.Errorf("error is %v", err)
		}
		if _, err := r.podman.LoadImage(t.Context(), podman.Engine{}, dir+"/missing"); backenderr.ReasonOf(err) != backenderr.HostUnfit {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("AContainerInAUnitGetsItsValuesAsTheyAre", func(t *testing.T) {
		image, err := r.load(t, podman.Engine{}, ociimage.Shell)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.host.Exec(t.Context(), "podman", "tag", image.ID, "localhost/shell"); err != nil {
			t.Fatal(err)
		}
		const name = "cb-demo-00ff-1"
		label := map[string]string{"compute-bridge": "demo", "hostile": `--privileged, "x=y" $HOME %i ; $(id)`}
		args := []string{"$HOME", "%i", "$(id)", "; id", "a b", "'", `"`, "", "--privileged", "é", "\t"}
		// Writable but for the mount's being read-only.
		if err := errors.Join(r.files.MkdirAll(t.Context(), dir+"/mnt", 0o755), r.files.Chown(t.Context(), dir+"/mnt", 1000000, 1000000)); err != nil {
			t.Fatal(err)
		}
		network, err := podman.NetworkCreateArgs(podman.NetworkSpec{Name: name, Interface: "cb0123456789", Isolate: true, Labels: label})
		if err != nil {
			t.Fatal(err)
		}
		run, err := podman.RunArgs(podman.RunSpec{
			Name: name, Hostname: "grant-00ff", ImageID: image.ID, Network: name, Publish: []podman.PortMap{{HostPort: 40000, ContainerPort: 80, Protocol: "tcp"}},
			Mounts: []podman.Mount{{Source: dir + "/mnt", Target: "/mnt/ro", ReadOnly: true}, {Target: "/scratch", SizeBytes: 1 << 20}},
			Labels: label, IDMap: &podman.IDMap{Base: 1000000, Size: 65536},
			Env:          map[string]string{"HOSTILE": "$HOME %i $(id) 'x' \"y\" --privileged\nSECOND=1", "EMPTY": "", "STAR": "*"},
			CgroupsSplit: true, SDNotifyConmon: true, LogPath: dir + "/console.log", LogMaxBytes: 1 << 20, ShmBytes: 1 << 20, WorkingDir: "/tmp",
			CapDrop: []string{"NET_RAW"}, NoNewPrivileges: true, StopSeconds: 1,
			Entrypoint: []string{"/bin/sh", "-c", `printf '<%s>' "$HOSTILE" "$EMPTY" "$STAR" "${SECOND-unset}" "$@"; echo; pwd; cat /proc/self/uid_map; touch /mnt/ro/x || echo read-only; trap 'exit 0' TERM; sleep 600 & wait`, "sh"},
			Args:       args,
		})
		if err != nil {
			t.Fatal(err)
		}
		remove, err := podman.RemoveArgs(podman.Engine{}, name)
		if err != nil {
			t.Fatal(err)
		}
		removeNetwork, err := podman.NetworkRemoveArgs(podman.Engine{}, name)
		if err != nil {
			t.Fatal(err)
		}
		cleanUp := []systemd.Exec{{Args: remove, IgnoreFailure: true}, {Args: removeNetwork, IgnoreFailure: true}}
		unit := systemd.Unit{
			Name: name + ".service", Delegate: true, TimeoutStart: time.Minute, TimeoutStop: 20 * time.Second,
			ExecStartPre: append(slices.Clone(cleanUp), systemd.Exec{Args: network}), ExecStart: []systemd.Exec{{Args: run}}, ExecStopPost: cleanUp,
		}
		if err := r.systemd.StartTransient(t.Context(), unit); err != nil {
			t.Fatal(err)
		}

		list, err := r.podman.ListContainers(t.Context(), "compute-bridge=demo")
		if err != nil || len(list) != 1 || !slices.Equal(list[0].Names, []string{name}) || list[0].State != "running" || list[0].Labels["hostile"] != label["hostile"] ||
			list[0].ImageID != image.ID {
			t.Errorf("%+v, %v", list, err)
		}
		container, err := r.podman.InspectContainer(t.Context(), name)
		if err != nil || container.State != "running" || container.PID == 0 || container.Started.IsZero() || container.Name != name || container.Labels["hostile"] != label["hostile"] {
			t.Errorf("%+v, %v", container, err)
		}
		networks, err := r.podman.ListNetworks(t.Context(), "compute-bridge=demo")
		if err != nil || len(networks) != 1 || networks[0].Name != name || networks[0].Interface != "cb0123456789" || len(networks[0].Subnets) != 1 {
			t.Errorf("%+v, %v", networks, err)
		}

		want := fmt.Sprintf("<%s><><*><unset><%s>", "$HOME %i $(id) 'x' \"y\" --privileged\nSECOND=1", strings.Join(args, "><"))
		var console string
		deadline := time.Now().Add(3 * time.Minute)
		for !strings.Contains(console, "read-only") && time.Now().Before(deadline) {
			raw, err := r.files.Tail(t.Context(), dir+"/console.log", 1<<16)
			if err != nil {
				t.Fatal(err)
			}
			console = podman.ConsoleText(raw)
		}
		head, rest, _ := strings.Cut(console, ">\n")
		if head+">" != want {
			t.Errorf("the container got %q, want %q", head+">", want)
		}
		if fields := strings.Fields(rest); len(fields) < 4 || !slices.Equal(fields[:4], []string{"/tmp", "0", "1000000", "65536"}) {
			t.Errorf("working directory and users: %q", rest)
		}

		if err := r.systemd.Stop(t.Context(), unit.Name); err != nil {
			t.Error(err)
		}
		if list, err := r.podman.ListContainers(t.Context(), "compute-bridge"); err != nil || len(list) != 0 {
			t.Errorf("%+v, %v", list, err)
		}
		if networks, err := r.podman.ListNetworks(t.Context(), "compute-bridge"); err != nil || len(networks) != 0 {
			t.Errorf("%+v, %v", networks, err)
		}
		if _, err := r.podman.InspectContainer(t.Context(), name); !podman.NotFound(err) {
			t.Errorf("error is %v", err)
		}
	})

	t.Run("RemovalOfWhatIsThereOrNot", func(t *testing.T) {
		if _, err := r.host.Exec(t.Context(), "sh", "-c", "podman network create --label a=b n1 && podman run -d --pids-limit=0 --label a=b --name c1 --network n1 localhost/shell sleep 600"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := r.podman.RemoveContainer(t.Context(), "c1"); err != nil {
				t.Error(err)
			}
			if err := r.podman.RemoveNetwork(t.Context(), "n1"); err != nil {
				t.Error(err)
			}
		}
		list, err := r.podman.ListContainers(t.Context(), "a")
		networks, err2 := r.podman.ListNetworks(t.Context(), "a")
		if err != nil || err2 != nil || len(list) != 0 || len(networks) != 0 {
			t.Errorf("%+v %+v, %v %v", list, networks, err, err2)
		}
	})

	t.Run("AHungPodmanIsGivenUp", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := r.host.CutOff(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := r.host.Restore(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		if err := r.podman.Ping(ctx); backenderr.ReasonOf(err) != backenderr.ProviderUnavailable {
			t.Errorf("error is %v", err)
		}
	})
}

func BenchmarkPodman(b *testing.B) {
	r := newRig(b)
	for _, c := range []struct {
		name string
		call func(context.Context) error
	}{
		{"Ping", r.podman.Ping},
		{"ListContainers", func(ctx context.Context) error { _, err := r.podman.ListContainers(ctx, "a"); return err }},
		{"ListNetworks", func(ctx context.Context) error { _, err := r.podman.ListNetworks(ctx, "a"); return err }},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if err := c.call(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("Load", func(b *testing.B) {
		for b.Loop() {
			if _, err := r.load(b, podman.Engine{}, ociimage.Shell); err != nil {
				b.Fatal(err)
			}
		}
	})
}
