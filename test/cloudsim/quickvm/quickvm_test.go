package quickvm_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/userdata"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/quickvm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a busy machine may take for what is done at once.
const patience = 30 * time.Second

var grant = strings.Repeat("ab", 32)

// site serves what machines fetch, and knows how often they did.
type site struct {
	machines *quickvm.Machines
	url      string
	digests  map[string]string // by path
	login    ssh.Signer
	host     ssh.Signer
	hostPEM  string

	mu      sync.Mutex
	fetched []string
}

func newSite(t *testing.T, o quickvm.Options) *site {
	t.Helper()
	s := &site{machines: quickvm.New(o), digests: map[string]string{}}
	t.Cleanup(s.machines.Close)
	files := map[string][]byte{"/guest": []byte("a guest"), "/image": archive(t, "oci-layout"), "/other": archive(t, "README")}
	for path, data := range files {
		sum := sha256.Sum256(data)
		s.digests[path] = hex.EncodeToString(sum[:])
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.fetched = append(s.fetched, r.URL.Path)
		s.mu.Unlock()
		data, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		if _, err := w.Write(data); err != nil {
			t.Errorf("serve: %v", err)
		}
	}))
	t.Cleanup(server.Close)
	s.url = server.URL
	s.login, _ = newKey(t)
	s.host, s.hostPEM = newKey(t)
	return s
}

func archive(t *testing.T, name string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func newKey(t *testing.T) (signer ssh.Signer, text string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err = ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	return signer, string(pem.EncodeToMemory(block))
}

// machine is what a machine of the site is told.
func (s *site) machine() guestapi.Machine {
	return guestapi.Machine{
		Guest: guestapi.Config{
			Version: guestapi.ConfigVersion, HostKey: guestapi.NewHostKey(s.hostPEM), ListenPort: 22,
			AuthorizedKeys: []string{string(ssh.MarshalAuthorizedKey(s.login.PublicKey()))},
			Environment:    map[string]string{"NAME": "value"},
		},
		GrantID: grant, Attempt: 1, Deadline: time.Now().Add(time.Hour).Truncate(time.Second).UTC(),
		Image: guestapi.MachineImage{URL: s.url + "/image", Digest: "sha256:" + s.digests["/image"], MaxBytes: 1 << 20},
		AtEnd: guestapi.AtEndPowerOff,
	}
}

// boot starts a machine.
func (s *site) boot(t *testing.T, m guestapi.Machine) cloudsim.Machine {
	t.Helper()
	encoded, err := guestapi.EncodeMachine(m)
	if err != nil {
		t.Fatal(err)
	}
	data, err := userdata.Render(userdata.Spec{
		GuestURL: s.url + "/guest", GuestSHA256: s.digests["/guest"], Machine: encoded, Deadline: m.Deadline,
		PowerOffAtEnd: m.AtEnd == guestapi.AtEndPowerOff,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.bootData(t, data)
}

func (s *site) bootData(t *testing.T, data []byte) cloudsim.Machine {
	t.Helper()
	machine, err := s.machines.Start(t.Context(), cloudsim.Boot{ID: "i-" + rand.Text(), UserData: data})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := machine.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return machine
}

func (s *site) wantFetched(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.fetched, want) {
		t.Errorf("machines fetched %v, want %v", s.fetched, want)
	}
}

// verdict waits for a verdict in a phase.
func verdict(t *testing.T, m cloudsim.Machine, phase string) guestapi.Verdict {
	t.Helper()
	var v guestapi.Verdict
	eventually(t, "there is a verdict "+phase, func() bool {
		var found bool
		v, found = guestapi.FindVerdict(m.Console(), grant, 1)
		return found && v.Phase == phase
	})
	return v
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !holds(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("it never holds that %s", what)
		}
	}
}

func powersOff(t *testing.T, m cloudsim.Machine) {
	t.Helper()
	select {
	case <-m.Off():
	case <-time.After(patience):
		t.Fatalf("the machine stays on; its console:\n%s", m.Console())
	}
}

// exec logs in and runs a command.
func (s *site) exec(m cloudsim.Machine, user string, login ssh.Signer, stdin, command string) (string, error) {
	client, err := ssh.Dial("tcp", net.JoinHostPort(m.Addr().String(), "22"), &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(login)}, HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()),
		Timeout: patience,
	})
	if err != nil {
		return "", err
	}
	defer client.Close() //nolint:errcheck // All was read.
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	session.Stdin = strings.NewReader(stdin)
	out, err := session.Output(command)
	return string(out), err
}

func TestSSHOpensWithTheKeysOfTheUserData(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	m := s.boot(t, s.machine())
	verdict(t, m, guestapi.PhaseReady)
	for _, c := range []struct{ user, stdin, command, want string }{
		{"compute", "", "echo is $NAME", "is value\n"},
		{"root", "", "env", "NAME=value\n"},
		{"compute", "through", "cat", "through"},
	} {
		if out, err := s.exec(m, c.user, s.login, c.stdin, c.command); err != nil || out != c.want {
			t.Errorf("%s by %s: %q, %v; want %q", c.command, c.user, out, err, c.want)
		}
	}
	if _, err := s.exec(m, "compute", s.login, "", "exit 3"); err == nil || !strings.Contains(err.Error(), "status 3") {
		t.Errorf("exit 3: %v", err)
	}
	stranger, _ := newKey(t)
	if _, err := s.exec(m, "compute", stranger, "", "env"); err == nil {
		t.Error("a stranger got in")
	}
	if _, err := s.exec(m, "admin", s.login, "", "env"); err == nil {
		t.Error("another user got in")
	}
	s.wantFetched(t, "/guest", "/image")
}

func TestAFailureIsToldOnTheConsoleAndPowersOff(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		change       func(*site, *guestapi.Machine)
	}{
		{"a wrong digest", guestapi.ReasonImageHashMismatch, func(_ *site, m *guestapi.Machine) {
			m.Image.Digest = "sha256:" + strings.Repeat("0", 64)
		}},
		{"no image", guestapi.ReasonImageUnavailable, func(s *site, m *guestapi.Machine) { m.Image.URL = s.url + "/none" }},
		{"no OCI archive", guestapi.ReasonImageInvalid, func(s *site, m *guestapi.Machine) {
			m.Image.URL, m.Image.Digest = s.url+"/other", "sha256:"+s.digests["/other"]
		}},
		{"another guest", guestapi.ReasonHostUnfit, func(s *site, _ *guestapi.Machine) {
			s.digests["/guest"] = strings.Repeat("0", 64)
		}},
		{"a workload that ends", guestapi.ReasonWorkloadFailed, func(s *site, _ *guestapi.Machine) {
			s.machines.FailNext("first\nno such file")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, quickvm.Options{})
			told := s.machine()
			c.change(s, &told)
			m := s.boot(t, told)
			powersOff(t, m)
			if v := verdict(t, m, guestapi.PhaseFailed); v.Reason != c.reason {
				t.Errorf("the verdict is %+v, want the reason %s", v, c.reason)
			}
			if c.reason == guestapi.ReasonWorkloadFailed && !bytes.Contains(m.Console(), []byte("first\r\nno such file\r\n")) {
				t.Errorf("the console is %q", m.Console())
			}
			if _, err := s.exec(m, "compute", s.login, "", "env"); err == nil {
				t.Error("SSH is open")
			}
		})
	}
}

func TestAMachineThatIsToStayStaysShut(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	told := s.machine()
	told.AtEnd = guestapi.AtEndStay
	m := s.boot(t, told)
	verdict(t, m, guestapi.PhaseReady)
	if err := s.machines.Exit(t.Context(), grant, 3, ""); err != nil {
		t.Fatal(err)
	}
	if v := verdict(t, m, guestapi.PhaseExited); v.Code == nil || *v.Code != 3 || v.Signal != "" {
		t.Errorf("the verdict is %+v", v)
	}
	if _, err := s.exec(m, "compute", s.login, "", "env"); err == nil {
		t.Error("SSH is open")
	}
	select {
	case <-m.Off():
		t.Error("the machine is off")
	default:
	}
}

func TestAWorkloadThatEndsPowersOff(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	m := s.boot(t, s.machine())
	if err := s.machines.Exit(t.Context(), strings.Repeat("cd", 32), 0, ""); err == nil {
		t.Error("another grant's workload ended")
	}
	verdict(t, m, guestapi.PhaseReady)
	if err := s.machines.Exit(t.Context(), grant, 0, "KILL"); err != nil {
		t.Fatal(err)
	}
	powersOff(t, m)
	if v := verdict(t, m, guestapi.PhaseExited); v.Code != nil || v.Signal != "KILL" {
		t.Errorf("the verdict is %+v", v)
	}
	if err := s.machines.Exit(t.Context(), grant, 0, ""); err == nil {
		t.Error("it ended twice")
	}
}

func TestTheDeadlineComesWithoutAnyone(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	told := s.machine()
	told.Deadline = time.Now().Add(2 * time.Second).Truncate(time.Second).UTC()
	m := s.boot(t, told)
	powersOff(t, m)
	if time.Now().Before(told.Deadline) {
		t.Error("it came too early")
	}
}

func TestMachinesCanBeMadeToMisbehave(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	s.machines.IgnoreDeadlines()
	told := s.machine()
	told.Deadline = time.Now().Add(time.Second).Truncate(time.Second).UTC()
	late := s.boot(t, told)
	verdict(t, late, guestapi.PhaseReady)
	s.machines.Hang(true)
	hangs := s.boot(t, s.machine())
	eventually(t, "it has its image", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.fetched) == 4
	})
	timer := time.NewTimer(time.Until(told.Deadline) + 100*time.Millisecond)
	<-timer.C
	if out, err := s.exec(late, "compute", s.login, "", "echo on"); err != nil || out != "on\n" {
		t.Errorf("the machine ended at its deadline: %q, %v", out, err)
	}
	if _, found := guestapi.FindVerdict(hangs.Console(), grant, 1); found {
		t.Errorf("it got ready: %s", hangs.Console())
	}
}

func TestARebootBringsTheSameBack(t *testing.T) {
	s := newSite(t, quickvm.Options{BootDelay: 20 * time.Millisecond})
	m := s.boot(t, s.machine())
	verdict(t, m, guestapi.PhaseReady)
	if err := m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "SSH is open again", func() bool {
		out, err := s.exec(m, "compute", s.login, "", "echo $NAME")
		return err == nil && out == "value\n"
	})
	if n := bytes.Count(m.Console(), []byte(guestapi.VerdictPrefix)); n != 2 {
		t.Errorf("the console has %d verdicts:\n%s", n, m.Console())
	}
	s.wantFetched(t, "/guest", "/image")
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.Reboot(t.Context()); err == nil {
		t.Error("a machine that is off rebooted")
	}
}

func TestMachinesHaveAddressesOfTheirOwn(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	seen := map[string]bool{}
	for range 20 {
		m := s.boot(t, s.machine())
		verdict(t, m, guestapi.PhaseReady)
		seen[m.Addr().String()] = true
		if !m.Addr().IsLoopback() {
			t.Errorf("%s is not of this machine", m.Addr())
		}
	}
	if len(seen) != 20 {
		t.Errorf("20 machines have %d addresses", len(seen))
	}
	if n := len(s.machines.Running(grant)); n != 20 {
		t.Errorf("%d run", n)
	}
}

func TestUserDataOfOthersRunsNothing(t *testing.T) {
	s := newSite(t, quickvm.Options{})
	for _, data := range []string{"", "#!/bin/sh\n", "#cloud-config\nwrite_files: 3\n", "#cloud-config\n{}\n"} {
		m := s.bootData(t, []byte(data))
		eventually(t, "it is told", func() bool { return bytes.Contains(m.Console(), []byte("cloud-init: ")) })
		if _, err := s.exec(m, "compute", s.login, "", "env"); err == nil {
			t.Errorf("SSH is open with %q", data)
		}
	}
}
