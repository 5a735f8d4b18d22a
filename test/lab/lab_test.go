package lab_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestMain(m *testing.M) { lab.Main(m, lab.CheckGoroutines()) }

// ok fails the test on an error.
func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onHost runs a program on the host and returns its trimmed output.
func onHost(t *testing.T, h *lab.Host, argv ...string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), argv...)
	ok(t, err)
	return strings.TrimSpace(out)
}

// overSSH runs a command in a session of its own.
func overSSH(t *testing.T, client *ssh.Client, command string) string {
	t.Helper()
	session, err := client.NewSession()
	ok(t, err)
	defer session.Close() //nolint:errcheck // ended with the command
	out, err := session.Output(command)
	ok(t, err)
	return strings.TrimSpace(string(out))
}

// login opens an SSH connection that ends with the test.
func login(t *testing.T, h *lab.Host) *ssh.Client {
	t.Helper()
	client, err := h.DialSSH(t.Context())
	ok(t, err)
	t.Cleanup(func() { _ = client.Close() }) // some tests break it
	return client
}

func TestHostsBootToSystemdAndReachEachOther(t *testing.T) {
	t.Parallel()
	a, b := lab.NewHost(t, lab.HostOptions{}), lab.NewHost(t, lab.HostOptions{Name: "second"})
	for _, h := range []*lab.Host{a, b} {
		if got := onHost(t, h, "systemctl", "is-system-running"); got != "running" {
			t.Errorf("%s: systemd says %q", h.Name, got)
		}
		if got := onHost(t, h, "cat", "/proc/1/comm"); got != "systemd" {
			t.Errorf("%s: PID 1 is %q", h.Name, got)
		}
		if got := onHost(t, h, "hostname"); got != h.Name {
			t.Errorf("host name %q, want %q", got, h.Name)
		}
		if got := overSSH(t, login(t, h), "id -u; cat /etc/hostname"); got != "0\n"+h.Name {
			t.Errorf("over SSH to %s: %q", h.Name, got)
		}
	}
	if a.Addr == b.Addr {
		t.Fatalf("both hosts have address %s", a.Addr)
	}
	if slices.Equal(a.HostKey.Marshal(), b.HostKey.Marshal()) {
		t.Error("both hosts have the same host key")
	}
	banner := onHost(t, a, "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/22; head -c 4 <&3", b.Addr))
	if banner != "SSH-" {
		t.Errorf("from one host to the other: %q", banner)
	}
}

func TestStockOpenSSHLogsInWithThePinnedKey(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	known := filepath.Join(t.TempDir(), "known_hosts")
	login := func(key string) ([]byte, error) {
		ok(t, os.WriteFile(known, []byte(h.Addr.String()+" "+key+"\n"), 0o600))
		return exec.CommandContext(t.Context(), "ssh", "-F", "none", "-i", h.UserKeyFile, "-o", "BatchMode=yes",
			"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile="+known, "root@"+h.Addr.String(), "echo", "hello").CombinedOutput()
	}
	out, err := login(h.HostKeyLine())
	if err != nil || strings.TrimSpace(string(out)) != "hello" {
		t.Errorf("ssh said %q, %v", out, err)
	}
	other := lab.NewHost(t, lab.HostOptions{})
	if out, err := login(other.HostKeyLine()); err == nil {
		t.Errorf("ssh took another host's key: %q", out)
	}
}

func TestSSHDTakesExtraConfiguration(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{"MaxSessions 1", "AllowStreamLocalForwarding no"}})
	client := login(t, h)
	first, err := client.NewSession()
	ok(t, err)
	defer first.Close() //nolint:errcheck // ended with the connection
	if second, err := client.NewSession(); err == nil {
		t.Error("a second session was opened")
		_ = second.Close()
	}
	if conn, err := client.Dial("unix", "/run/dbus/system_bus_socket"); err == nil {
		t.Error("a socket was forwarded")
		_ = conn.Close()
	}
}

func TestPodmanRunsEveryKindOfImage(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	for _, tc := range []struct {
		kind     ociimage.Kind
		args     []string
		want     string
		wantCode int
	}{
		{ociimage.Shell, []string{"sh", "-c", "echo from $(id -un) in busybox"}, "from root in busybox", 0},
		{ociimage.Distroless, []string{"exit", "0"}, "", 0},
		{ociimage.Exit3, nil, "", 3},
		{ociimage.Stubborn, []string{"exit", "4"}, "", 4},
		{ociimage.Big, []string{"sh", "-c", "stat -c %s /noise"}, "209715200", 0},
	} {
		archive := ociimage.Make(t, tc.kind)
		file, err := os.Open(archive.Path)
		ok(t, err)
		var said strings.Builder
		err = h.Run(t.Context(), file, &said, &said, "podman", "load", "-q")
		ok(t, file.Close())
		if err != nil {
			t.Errorf("%s: podman load: %v: %s", tc.kind, err, said.String())
			continue
		}
		out, err := h.Exec(t.Context(), append([]string{"podman", "run", "--rm", "--pids-limit=0", tc.kind.Reference()}, tc.args...)...)
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else {
			ok(t, err)
		}
		if got := strings.TrimSpace(out); got != tc.want || code != tc.wantCode {
			t.Errorf("%s: printed %q with code %d, want %q with %d (%v)", tc.kind, got, code, tc.want, tc.wantCode, err)
		}
	}
}

func TestPodmanRefusesWhatIsNoImage(t *testing.T) {
	t.Parallel()
	// A host of its own: podman doesn't read a layer that it has already.
	h := lab.NewHost(t, lab.HostOptions{})
	for _, kind := range []ociimage.Kind{ociimage.NotOCI, ociimage.Corrupt} {
		file, err := os.Open(ociimage.Make(t, kind).Path)
		ok(t, err)
		if err := h.Run(t.Context(), file, nil, nil, "podman", "load", "-q"); err == nil {
			t.Errorf("podman loaded an image of kind %s", kind)
		}
		ok(t, file.Close())
	}
}

func TestConfiguredImageCarriesItsConfiguration(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	file, err := os.Open(ociimage.Make(t, ociimage.Configured).Path)
	ok(t, err)
	ok(t, h.Run(t.Context(), file, nil, nil, "podman", "load", "-q"))
	ok(t, file.Close())
	onHost(t, h, "podman", "run", "-d", "--name", "configured", "--pids-limit=0", ociimage.Configured.Reference())
	want := "user=app group=staff dir=/srv/work env=of the image args=from cmd"
	eventually(t, func() bool { return onHost(t, h, "podman", "logs", "configured") == want })
}

// eventually waits until f is true, for three minutes at most.
func eventually(t *testing.T, f func() bool) {
	t.Helper()
	deadline := time.After(3 * time.Minute)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatal("it didn't come true within 10 s")
		case <-tick.C:
		}
	}
}

func TestRebootKeepsTheDiskAndForgetsTheRest(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	onHost(t, h, "sh", "-c", "echo kept >/root/kept; echo gone >/run/gone; mkdir -p /var/lib/containers/kept; nft add table inet gone")
	boot, key := onHost(t, h, "cat", "/proc/1/stat"), h.HostKeyLine()
	machine := onHost(t, h, "cat", "/etc/machine-id")
	ok(t, h.Reboot(t.Context()))
	t.Logf("rebooted in %.2f s", h.BootTime.Seconds())
	if onHost(t, h, "cat", "/proc/1/stat") == boot {
		t.Error("the host didn't reboot")
	}
	if got := onHost(t, h, "cat", "/root/kept", "/etc/machine-id"); got != "kept\n"+machine {
		t.Errorf("after the reboot: %q", got)
	}
	if got := onHost(t, h, "sh", "-c", "ls -d /run/gone /var/lib/containers/kept 2>/dev/null; nft list tables"); got != "/var/lib/containers/kept" {
		t.Errorf("after the reboot: %q", got)
	}
	if h.HostKeyLine() != key {
		t.Error("the host key changed")
	}
	overSSH(t, login(t, h), "true")
}

func TestShutdownEndsTheHost(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	ok(t, h.Shutdown(t.Context()))
	if h.Running() {
		t.Error("the host still runs")
	}
	if _, err := h.Exec(t.Context(), "true"); err == nil {
		t.Error("a program ran on a host that is down")
	}
	ok(t, h.Reboot(t.Context()))
	onHost(t, h, "true")
}

func TestCutOffIsSilentAndRestoreGoesOn(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	conn, err := h.Lab().Dial(t.Context(), "tcp", h.Addr.String()+":22")
	ok(t, err)
	defer conn.Close()
	banner := make([]byte, 4)
	_, err = io.ReadFull(conn, banner)
	ok(t, err)
	rest := make([]byte, 1024)
	_, err = conn.Read(rest) // the rest of the banner
	ok(t, err)

	ok(t, h.CutOff(t.Context()))
	// The write goes out without an error, and no answer comes: half-open.
	_, err = conn.Write([]byte("SSH-2.0-lab\r\n"))
	ok(t, err)
	ok(t, conn.SetReadDeadline(time.Now().Add(500*time.Millisecond)))
	if n, err := conn.Read(rest); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d bytes, %v from a host that is cut off", n, err)
	}
	dialing, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := h.Lab().Dial(dialing, "tcp", h.Addr.String()+":22"); err == nil {
		t.Error("a new connection was made")
	} else if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("a new connection failed with %v, want silence", err)
	}
	if got := onHost(t, h, "echo", "alive"); got != "alive" {
		t.Errorf("out of band: %q", got)
	}

	ok(t, h.Restore(t.Context()))
	ok(t, conn.SetReadDeadline(time.Now().Add(3*time.Minute)))
	if _, err := conn.Read(rest); err != nil { // sshd's key exchange
		t.Errorf("after Restore: %v", err)
	}
}

func TestResetConnectionsIsSeenByTheClient(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	conn, err := h.Lab().Dial(t.Context(), "tcp", h.Addr.String()+":22")
	ok(t, err)
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1024))
	ok(t, err)
	ok(t, h.ResetConnections(t.Context()))
	ok(t, conn.SetReadDeadline(time.Now().Add(3*time.Minute)))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
	overSSH(t, login(t, h), "true")
}

func TestFillDiskFailsWritesUntilFreed(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{DiskMiB: 1024})
	write := []string{"dd", "if=/dev/zero", "of=/root/file", "bs=1M", "count=1", "conv=fsync"}
	ok(t, h.FillDisk(t.Context()))
	if _, err := h.Exec(t.Context(), write...); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("a write to a full disk: %v", err)
	}
	overSSH(t, login(t, h), "true")
	ok(t, h.FreeDisk(t.Context()))
	onHost(t, h, write...)
}

func TestClockSkewIsWhatProgramsSee(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	ahead := func() time.Duration {
		t.Helper()
		seconds, err := strconv.ParseInt(overSSH(t, login(t, h), "date +%s"), 10, 64)
		ok(t, err)
		return time.Until(time.Unix(seconds, 0)).Round(10 * time.Second)
	}
	for _, skew := range []time.Duration{2 * time.Minute, -time.Hour, 0} {
		ok(t, h.SetClockSkew(t.Context(), skew))
		if got := ahead(); got != skew {
			t.Errorf("the host's clock is %v ahead, want %v", got, skew)
		}
		bus := onHost(t, h, "busctl", "get-property", "org.freedesktop.timedate1", "/org/freedesktop/timedate1", "org.freedesktop.timedate1", "TimeUSec")
		usec, err := strconv.ParseInt(strings.TrimPrefix(bus, "t "), 10, 64)
		ok(t, err)
		if got := time.Until(time.UnixMicro(usec)).Round(10 * time.Second); got != skew {
			t.Errorf("over D-Bus the host's clock is %v ahead, want %v", got, skew)
		}
	}
}

func TestLatencyIsAddedOrRefusedPlainly(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	err := h.SetLatency(t.Context(), 50*time.Millisecond)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Logf("this kernel can't delay packets: %v", err)
		return
	}
	ok(t, err)
	start := time.Now()
	conn, err := h.Lab().Dial(t.Context(), "tcp", h.Addr.String()+":22")
	ok(t, err)
	ok(t, conn.Close())
	if took := time.Since(start); took < 100*time.Millisecond {
		t.Errorf("connected after %v, want two delays of 50 ms", took)
	}
	ok(t, h.SetLatency(t.Context(), 0))
}

func TestExecEndsWithItsContext(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := h.Exec(ctx, "sleep", "4242"); err == nil {
		t.Error("no error")
	}
	eventually(t, func() bool {
		out, _ := h.Exec(t.Context(), "pgrep", "-f", "sleep 4242")
		return out == ""
	})
}

// Nothing is done by a shell that isn't on the host: its kill would be of this
// machine's processes. The type of a shell is no program, so that it tells, and harms
// nobody.
func TestExecRunsEverythingOnTheHost(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	outer, err := os.Readlink("/proc/self/ns/pid")
	ok(t, err)
	inner, err := h.Exec(t.Context(), "readlink", "/proc/self/ns/pid")
	ok(t, err)
	if strings.TrimSpace(inner) == outer {
		t.Errorf("a program is in %s, this machine's", outer)
	}
	for _, none := range [][]string{{"no-such-program"}, {"type", "sh"}} {
		out, err := h.Exec(t.Context(), none...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 127 {
			t.Errorf("%v, which is no program: %q, %v", none, out, err)
		}
	}
}

// A machine that goes down stops all its processes for a moment. Whoever waits for
// one must not stop with it: nobody outside goes on for him.
func TestExecOutlivesAStopOfItsProgram(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := h.Exec(ctx, "sh", "-c", `(sleep 0.2; kill -CONT $$) & kill -STOP $$; wait; echo went on; exit 3`)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || out != "went on\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// holdEnv makes TestHoldAHost hold a host until its process is killed.
const holdEnv = "CBLAB_TEST_HOLD"

// TestHoldAHost is the process that TestSweepRemovesWhatAKilledRunLeft kills.
func TestHoldAHost(t *testing.T) {
	t.Parallel()
	if os.Getenv(holdEnv) == "" {
		return
	}
	h := lab.NewHost(t, lab.HostOptions{})
	fmt.Println("holding", h.Lab().Name())
	<-t.Context().Done()
}

func TestSweepRemovesWhatAKilledRunLeft(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestHoldAHost$")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "CBLAB_LAB=") }), holdEnv+"=1")
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	var name string
	for lines := bufio.NewScanner(out); name == "" && lines.Scan(); {
		name, _ = strings.CutPrefix(lines.Text(), "holding ")
	}
	ok(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	l, err := lab.Load(name)
	ok(t, err)
	hosts, err := l.Hosts()
	ok(t, err)
	if len(hosts) != 1 || !hosts[0].Running() {
		t.Fatalf("the killed run left no running host: %v", hosts)
	}
	ok(t, lab.Sweep(t.Context()))
	left, err := lab.Remains(name)
	ok(t, err)
	if len(left) > 0 || hosts[0].Running() {
		t.Errorf("after the sweep: %q", left)
	}
}

func TestHostWithoutPodman(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{NoPodman: true})
	if _, err := h.Exec(t.Context(), "podman", "version"); err == nil {
		t.Error("podman is there")
	}
	left, err := h.Leftovers(t.Context())
	ok(t, err)
	if len(left) > 0 {
		t.Errorf("leftovers of a fresh host: %q", left)
	}
}

func TestLeftoversSeeEverythingThatAGrantMakes(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	none := func(when string) {
		t.Helper()
		left, err := h.Leftovers(t.Context(), "image ")
		ok(t, err)
		if len(left) > 0 {
			t.Errorf("leftovers %s: %q", when, left)
		}
	}
	none("of a fresh host")
	file, err := os.Open(ociimage.Make(t, ociimage.Distroless).Path)
	ok(t, err)
	ok(t, h.Run(t.Context(), file, nil, nil, "podman", "load", "-q"))
	ok(t, file.Close())
	onHost(t, h, "sh", "-ec", `
		podman network create --disable-dns --interface-name cb0123456789 --opt isolate=strict cb-x-1
		nft 'add table inet cb_x; add set inet cb_x ifs { type ifname; counter; }; add element inet cb_x ifs { "cb0123456789" }'
		mkdir -p /var/lib/compute-bridge/x/grants/1 /var/lib/compute-bridge/x/cache
		touch /var/lib/compute-bridge/x/cache/.tmp-1 /var/lib/compute-bridge/x/cache/sha256-1
		truncate -s 1M /var/lib/compute-bridge/x/grants/1.img
		losetup --find /var/lib/compute-bridge/x/grants/1.img
		id=$(printf '%064d' 1)
		mkdir -p /run/compute-bridge/x/$id
		mount -t tmpfs cb /run/compute-bridge/x/$id
		systemd-run -q --unit other.service setpriv --reuid=1048576 --clear-groups sleep 600
		systemd-run -q --unit cb-x-1.service -p Type=notify -p NotifyAccess=all -p Delegate=yes podman run --rm --name cb-x-1 \
			--network cb-x-1 -p 20000:80 --pids-limit=0 --cgroups=split --sdnotify=conmon localhost/distroless:latest`)
	left, err := h.Leftovers(t.Context())
	ok(t, err)
	for _, want := range []string{
		"unit cb-x-1.service", "interface cb0123456789", "container cb-x-1", "network cb-x-1", "image localhost/distroless",
		"nft element inet cb_x ifs", "nft rule netavark", "file /var/lib/compute-bridge/x/grants/1",
		"file /var/lib/compute-bridge/x/cache/.tmp-1", "process ",
		"podman locks: 2047 of 2048", "loop device /dev/loop", "mount /run/compute-bridge/x/", "file /run/compute-bridge/x/0000",
		"file /run/netns/netns-", "file /run/crun/", "file /sys/fs/cgroup/",
	} {
		if !slices.ContainsFunc(left, func(line string) bool { return strings.HasPrefix(line, want) }) {
			t.Errorf("not seen: %s", want)
		}
	}
	ofUser := func(line string) bool {
		return strings.HasPrefix(line, "process ") && strings.HasSuffix(line, ": sleep 600")
	}
	if !slices.ContainsFunc(left, ofUser) {
		t.Error("not seen: a process of a grant's user")
	}
	if t.Failed() {
		t.Logf("seen:\n%s", strings.Join(left, "\n"))
	}
	onHost(t, h, "sh", "-ec", `
		systemctl stop other.service
		umount /run/compute-bridge/x/*; rmdir /run/compute-bridge/x/*
		losetup --detach "$(losetup --noheadings --output NAME --associated /var/lib/compute-bridge/x/grants/1.img)"
		systemctl stop cb-x-1.service; podman rm -fi cb-x-1; podman network rm cb-x-1
		nft 'delete element inet cb_x ifs { "cb0123456789" }'; rm -r /var/lib/compute-bridge/x`)
	none("after the clean-up")
}

func TestDestroyLeavesNothing(t *testing.T) {
	t.Parallel()
	l, err := lab.Open(t.Context(), lab.Options{})
	ok(t, err)
	h, err := l.StartHost(t.Context(), lab.HostOptions{})
	ok(t, err)
	if _, err := l.StartHost(t.Context(), lab.HostOptions{Name: h.Name}); err == nil {
		t.Error("two hosts got the same name")
	}
	reloaded, err := lab.Load(l.Name())
	ok(t, err)
	same, err := reloaded.Host(h.Name)
	ok(t, err)
	if out, err := same.Exec(t.Context(), "echo", "same"); err != nil || out != "same\n" {
		t.Errorf("through the reloaded lab: %q, %v", out, err)
	}
	ok(t, h.Destroy(t.Context()))
	ok(t, h.Destroy(t.Context())) // idempotent
	hosts, err := l.Hosts()
	ok(t, err)
	if len(hosts) > 0 {
		t.Errorf("%d hosts after Destroy", len(hosts))
	}
	_, err = l.StartHost(t.Context(), lab.HostOptions{}) // Close takes it along
	ok(t, err)
	ok(t, l.Close(t.Context()))
	left, err := lab.Remains(l.Name())
	ok(t, err)
	if len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
