package labvm

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/userdata"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// site is what a grant's instance needs beside a machine: a server with the guest
// and an image, and keys.
type site struct {
	t         *testing.T
	machines  *Machines
	dir       string
	grant     string
	hostKey   string // PEM
	knownHost string // the public one
	loginKey  string // authorized_keys line of the file "login"

	files   map[string]string // path of the URL → file
	fetched map[string]*atomic.Int64
	server  string // host:port
	guest   string // SHA-256
	image   ociimage.Archive
}

// newSite serves the guest and an image from the lab's own address.
func newSite(t *testing.T, release string, kind ociimage.Kind) *site {
	t.Helper()
	machines, l := open(t, release)
	s := &site{t: t, machines: machines, dir: t.TempDir(), image: ociimage.Make(t, kind)}
	root, err := filepath.Abs(filepath.Join("..", "..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	guest := filepath.Join(root, "bin", "guest")
	text, err := os.ReadFile(guest)
	if err != nil {
		t.Fatalf("run make build first: %v", err)
	}
	sum := sha256.Sum256(text)
	s.guest = hex.EncodeToString(sum[:])
	s.files = map[string]string{"/guest": guest, "/image": s.image.Path}
	s.fetched = map[string]*atomic.Int64{"/guest": {}, "/image": {}}
	var config net.ListenConfig
	listener, err := config.Listen(t.Context(), "tcp", net.JoinHostPort(l.Addr().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	s.server = listener.Addr().String()
	server := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	s.grant = hex.EncodeToString(id[:])
	s.hostKey, s.knownHost = newKey(t)
	login, public := newKey(t)
	s.loginKey = public
	if err := os.WriteFile(s.path("login"), []byte(login), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// path of a file of the site.
func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// ServeHTTP implements [http.Handler].
func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	file, ok := s.files[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	s.fetched[r.URL.Path].Add(1)
	http.ServeFile(w, r, file)
}

// newKey makes a key pair, as OpenSSH writes it.
func newKey(t *testing.T) (private, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(block)), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub)))
}

// spec changes what a machine is told.
type spec func(*guestapi.Machine)

// start starts a machine for the site's grant.
func (s *site) start(changes ...spec) *Machine {
	s.t.Helper()
	m := guestapi.Machine{
		Guest: guestapi.Config{
			Version: guestapi.ConfigVersion, HostKey: guestapi.NewHostKey(s.hostKey), AuthorizedKeys: []string{s.loginKey},
			ListenPort: 22, Environment: map[string]string{"GREETING": "hello 'world' $HOME %h"},
		},
		GrantID: s.grant, Attempt: 1, Deadline: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
		Image: guestapi.MachineImage{
			URL: "http://" + s.server + "/image", Digest: "sha256:" + s.image.SHA256, MaxBytes: 1 << 30,
		},
		AtEnd: guestapi.AtEndPowerOff,
	}
	for _, change := range changes {
		change(&m)
	}
	encoded, err := guestapi.EncodeMachine(m)
	if err != nil {
		s.t.Fatal(err)
	}
	data, err := userdata.Render(userdata.Spec{
		GuestURL: "http://" + s.server + "/guest", GuestSHA256: s.guest, Machine: encoded,
		Deadline: m.Deadline, PowerOffAtEnd: m.AtEnd == guestapi.AtEndPowerOff,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return start(s.t, s.machines, "i-0"+s.grant[:16], data)
}

// verdict waits for what the guest says on the console in a phase.
func (s *site) verdict(m *Machine, phase string) guestapi.Verdict {
	s.t.Helper()
	until := time.Now().Add(patience)
	for off := false; ; {
		if v, ok := guestapi.FindVerdict(m.Console(), s.grant, 1); ok && v.Phase == phase {
			return v
		}
		if off || time.Now().After(until) {
			s.t.Fatalf("no verdict %q on the console", phase)
		}
		select {
		case <-m.Off():
			off = true // one more look
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ssh returns OpenSSH's own client with the host key pinned.
func (s *site) ssh(ctx context.Context, m *Machine, command ...string) *exec.Cmd {
	s.t.Helper()
	known := s.path("known_hosts")
	if err := os.WriteFile(known, []byte(m.Addr().String()+" "+s.knownHost+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return exec.CommandContext(ctx, "ssh", append([]string{
		"-F", "none", "-i", s.path("login"), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
		"-o", "UserKnownHostsFile=" + known, "-o", "GlobalKnownHostsFile=none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20",
		"compute@" + m.Addr().String(),
	}, command...)...)
}

// asRoot runs a command of the workload's root by SSH.
func (s *site) asRoot(m *Machine, command string) (string, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	cmd := s.ssh(ctx, m, command)
	cmd.Args[len(cmd.Args)-2] = "root@" + m.Addr().String()
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// says runs a command by SSH, which must succeed, and returns what it prints.
func (s *site) says(m *Machine, command string) string {
	s.t.Helper()
	out, err := s.ssh(s.t.Context(), m, command).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

// exitCode returns a program's.
func exitCode(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

// isGrantsInstance checks what a requester sees of a machine whose workload runs.
func (s *site) isGrantsInstance(m *Machine) {
	t := s.t
	t.Helper()
	s.verdict(m, guestapi.PhaseReady)
	if got, want := s.says(m, `echo "$GREETING"; test ! -e /etc/debian_version`), "hello 'world' $HOME %h"; got != want {
		t.Errorf("in the workload: %q, want %q", got, want)
	}
	if err := s.ssh(t.Context(), m, "exit 7").Run(); exitCode(err) != 7 {
		t.Errorf("exit 7: %v", err)
	}
	shell := s.ssh(t.Context(), m)
	shell.Args = append(shell.Args[:len(shell.Args)-1], "-tt", shell.Args[len(shell.Args)-1])
	shell.Stdin = strings.NewReader("test -t 0 && echo terminal-$((6*7))\nexit 3\n")
	if out, err := shell.CombinedOutput(); exitCode(err) != 3 || !strings.Contains(string(out), "terminal-42") {
		t.Errorf("a shell: %v\n%s", err, out)
	}
	s.isShut(m)
}

// isShut checks what a tenant must not get at.
func (s *site) isShut(m *Machine) {
	t, ctx := s.t, s.t.Context()
	t.Helper()
	if out, err := m.Host().Exec(ctx, "journalctl", "-b", "--no-pager", "-u", "ssh.service", "-u", "ssh.socket", "-o", "cat"); err != nil ||
		strings.Contains(out, "Started") || strings.Contains(out, "Listening on") {
		t.Errorf("the machine's own sshd ran (%v):\n%s", err, out)
	}
	// What the machine itself reaches refuses it for want of a token; the workload
	// doesn't get that far.
	if _, err := m.Host().Exec(ctx, "python3", "-c", `import urllib.request; urllib.request.urlopen("http://169.254.169.254/latest/user-data")`); err == nil ||
		!strings.Contains(err.Error(), "401") {
		t.Errorf("the metadata service tells the machine: %v", err)
	}
	out, err := s.ssh(ctx, m, "wget -T 5 -O - http://169.254.169.254/latest/user-data").CombinedOutput()
	if err == nil || strings.Contains(string(out), "401") {
		t.Errorf("the workload reaches the metadata service (%v):\n%s", err, out)
	}
	s.says(m, "test ! -e /run/systemd/private && test ! -e /run/dbus/system_bus_socket && test ! -e /etc/compute-bridge && test ! -r /proc/1/root/etc")
	// With a /proc of its own, too, it can't set the kernel's core_pattern.
	s.says(m, "grep -q ' /proc/sys ro' /proc/self/mountinfo")
	if shown := string(m.Console()); strings.Contains(shown, "failed schema validation") {
		t.Error("cloud-init doesn't like the user-data")
	}
}

// The whole path of a good grant: a stock image becomes the grant's instance, which
// ends with its command, and the machine with it.
func TestAStockImageBecomesAGrantsInstance(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Shell)
	s.runsToItsEnd(s.start())
}

// runsToItsEnd checks a machine from its boot to the end of its workload.
func (s *site) runsToItsEnd(m *Machine) {
	s.t.Helper()
	s.isGrantsInstance(m)
	// The shell that is the image's command.
	if out, err := s.ssh(s.t.Context(), m, "echo its-pid-$(pgrep -o -x sh)").CombinedOutput(); err != nil {
		s.t.Errorf("the workload's shell: %v\n%s", err, out)
	}
	if out, err := m.Host().Exec(s.t.Context(), "sh", "-c", workloadShell+` && kill -HUP "$pid"`); err != nil {
		s.t.Fatalf("end the workload: %v\n%s", err, out)
	}
	v := s.verdict(m, guestapi.PhaseExited)
	if v.Signal != "HUP" {
		s.t.Errorf("verdict %+v", v)
	}
	isOff(s.t, m, time.Minute)
}

// workloadShell finds the image's command: its parent is the guest, which is the
// unit's main process or that one's only child.
const workloadShell = `main=$(systemctl show -P MainPID compute-bridge-workload.service) && pid=$(pgrep -P "$main,$(pgrep -d, -P "$main")" -x sh)`

// From systemd 257 the workload has processes of its own: its root finds neither the
// machine's PID 1 nor the timer of the deadline, and what it does to its own PID 1,
// the guest, ends the machine.
func TestTheWorkloadsRootCannotReachTheMachinesPID1(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Shell)
	m := s.start()
	s.verdict(m, guestapi.PhaseReady)
	machines, err := m.Host().Exec(t.Context(), "readlink", "/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e
		test "$(id -u)" = 0
		readlink /proc/1/ns/pid
		cat /proc/[0-9]*/comm`
	out, err := s.asRoot(m, script)
	own, comms, _ := strings.Cut(out, "\n")
	if err != nil || !strings.HasPrefix(own, "pid:[") || own == strings.TrimSpace(machines) || strings.Contains(comms, "systemd") {
		t.Errorf("the workload's root sees, in %s of %s (%v):\n%s", own, machines, err, comms)
	}
	// SIGRTMIN+13 would halt the machine, and an orphan that nobody waits for would stay.
	if out, err := s.asRoot(m, `kill -47 1; kill -KILL 1; sh -c 'sleep 0.1 & exit'
		for i in $(seq 100); do sleep 0.1; grep -qs '^State:.*Z' /proc/[0-9]*/status || exit 0; done; exit 1`); err != nil {
		t.Errorf("signals to PID 1 (%v):\n%s", err, out)
	}
	if out, err := m.Host().Exec(t.Context(), "systemctl", "is-active", "compute-bridge-deadline.timer", "compute-bridge-workload.service"); err != nil {
		t.Errorf("after signals (%v):\n%s", err, out)
	}
	// On an older systemd this would freeze it, and the timer with it.
	_, _ = s.asRoot(m, "kill -SEGV 1")
	s.verdict(m, guestapi.PhaseExited)
	isOff(t, m, time.Minute)
}

// An image that isn't what the grant says never runs.
func TestAnImageWithAnotherDigestPowersTheMachineOff(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Shell)
	m := s.start(func(m *guestapi.Machine) { m.Image.Digest = "sha256:" + strings.Repeat("0", 64) })
	v := s.verdict(m, guestapi.PhaseFailed)
	if v.Reason != guestapi.ReasonImageHashMismatch {
		t.Errorf("verdict %+v", v)
	}
	isOff(t, m, time.Minute)
	if strings.Contains(string(m.Console()), s.hostKey[40:80]) {
		t.Error("the console shows the host key")
	}
}

// What ends a machine that never gets ready, and what it says.
func TestLongMachinesThatCannotGetReadySayWhyAndPowerOff(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, want string
		kind       ociimage.Kind
		change     spec
	}{
		{"the image is not there", guestapi.ReasonImageUnavailable, ociimage.Shell, func(m *guestapi.Machine) {
			m.Image.URL = strings.Replace(m.Image.URL, "/image", "/nothing", 1)
		}},
		{"the image is no OCI archive", guestapi.ReasonImageInvalid, ociimage.NotOCI, nil},
		{"a layer of the image is broken", guestapi.ReasonImageInvalid, ociimage.Corrupt, nil},
		{"the image is larger than it may be", guestapi.ReasonImageInvalid, ociimage.Shell, func(m *guestapi.Machine) { m.Image.MaxBytes = 1000 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "", tc.kind)
			var changes []spec
			if tc.change != nil {
				changes = append(changes, tc.change)
			}
			m := s.start(changes...)
			if v := s.verdict(m, guestapi.PhaseFailed); v.Reason != tc.want {
				t.Errorf("verdict %+v, want %s", v, tc.want)
			}
			isOff(t, m, time.Minute)
		})
	}
}

// The image's own end, with its exit code.
func TestLongAnExitCodeIsInTheVerdict(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Exit3)
	m := s.start()
	if v := s.verdict(m, guestapi.PhaseExited); v.Code == nil || *v.Code != 3 {
		t.Errorf("verdict %+v", v)
	}
	isOff(t, m, time.Minute)
}

// A reboot, in order or not, brings the same workload back with what it wrote, and
// fetches nothing again.
func TestLongARebootBringsTheSameWorkloadBack(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"by the cloud", "by the machine", "a crash"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "", ociimage.Shell)
			m := s.start()
			s.isGrantsInstance(m)
			s.says(m, "echo kept >/tmp/kept; sync")
			boot := s.bootOf(m)
			switch way {
			case "by the cloud":
				if err := m.Reboot(t.Context()); err != nil {
					t.Fatal(err)
				}
			case "by the machine":
				if _, err := m.Host().Exec(t.Context(), "systemctl", "reboot", "--no-block"); err != nil {
					t.Fatal(err)
				}
			default:
				if err := m.hardReset(t.Context(), nil); err != nil {
					t.Fatal(err)
				}
			}
			s.comesBack(m, boot)
			if got := s.says(m, "cat /tmp/kept"); got != "kept" {
				t.Errorf("what it wrote: %q", got)
			}
			for path, n := range s.fetched {
				if n.Load() != 1 {
					t.Errorf("%s was fetched %d times", path, n.Load())
				}
			}
			s.runsToItsEnd(m)
		})
	}
}

// bootOf returns the id of the boot that runs, or "" while none does.
func (s *site) bootOf(m *Machine) string {
	s.t.Helper()
	out, err := m.Host().Exec(s.t.Context(), "cat", "/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(out)
}

// comesBack waits until SSH answers in another boot.
func (s *site) comesBack(m *Machine, boot string) {
	s.t.Helper()
	until := time.Now().Add(patience)
	for again := false; ; {
		now := s.bootOf(m)
		again = again || now != "" && now != boot
		if again && s.ssh(s.t.Context(), m, "true").Run() == nil {
			return
		}
		if time.Now().After(until) {
			s.t.Fatalf("the workload isn't back; boot %q, before %q", now, boot)
		}
		<-time.After(100 * time.Millisecond)
	}
}

// The deadline ends a machine that nobody watches: while its workload runs, and
// when it was never to get ready.
func TestLongTheDeadlineEndsAMachineThatNobodyWatches(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		kind  ociimage.Kind
		after time.Duration
		// breaks is a command of the machine once the workload runs.
		breaks string
	}{
		{"a workload that goes on SIGTERM", ociimage.Shell, 40 * time.Second, ""},
		{"a workload that ignores SIGTERM", ociimage.Stubborn, 40 * time.Second, ""},
		{"a deadline that has passed when it boots", ociimage.Shell, 0, ""},
		// As where it has no processes left; in the lab they are this machine's own.
		{"a machine that can start nothing", ociimage.Shell, 40 * time.Second, "mv /usr/bin/env /usr/bin/no-env"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "", tc.kind)
			deadline := time.Now().Add(tc.after).UTC().Truncate(time.Second)
			m := s.start(func(m *guestapi.Machine) { m.Deadline = deadline })
			if tc.after > 0 {
				s.verdict(m, guestapi.PhaseReady)
			}
			if tc.breaks != "" {
				if out, err := m.Host().Exec(t.Context(), "sh", "-c", tc.breaks); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			isOff(t, m, time.Until(deadline)+time.Minute)
			if early := time.Until(deadline); early > 0 {
				t.Errorf("it was off %v before its deadline", early)
			}
			t.Logf("off %v after the deadline", time.Since(deadline))
		})
	}
}

// A machine that was reset between its workload's end and its power-off powers off
// when it boots again.
func TestLongAnEndedMachineThatBootsAgainPowersOff(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Shell)
	m := s.start()
	s.verdict(m, guestapi.PhaseReady)
	// What the first boot enables for the next is enabled at cloud-init's end.
	if out, err := m.Host().Exec(t.Context(), "sh", "-c", "cloud-init status --wait; touch /var/lib/compute-bridge/ended; sync"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := m.hardReset(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	isOff(t, m, patience)
	if shown := string(m.Console()); strings.Count(shown, guestapi.VerdictPrefix) != 1 {
		t.Error("the second boot gives a verdict")
	}
}

// The release before.
func TestLongDebian12BecomesAGrantsInstance(t *testing.T) {
	t.Parallel()
	s := newSite(t, "bookworm", ociimage.Shell)
	m := s.start()
	s.isGrantsInstance(m)
	if out, err := m.Host().Exec(t.Context(), "cat", "/etc/debian_version"); err != nil || !strings.HasPrefix(out, "12.") {
		t.Errorf("Debian %q, %v", out, err)
	}
	boot := s.bootOf(m)
	if err := m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.comesBack(m, boot)
	s.runsToItsEnd(m)
}

// An image without a shell says so, and runs.
func TestLongAnImageWithoutAShellRuns(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", ociimage.Distroless)
	m := s.start()
	s.verdict(m, guestapi.PhaseReady)
	out, err := s.ssh(t.Context(), m).CombinedOutput()
	if err == nil || len(out) == 0 {
		t.Errorf("a shell: %v\n%s", err, out)
	}
	if err := s.ssh(t.Context(), m, "/tiny exit 5").Run(); exitCode(err) != 5 {
		t.Errorf("a program of the image: %v", err)
	}
}
