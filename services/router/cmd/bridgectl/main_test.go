package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/server"
)

// contains fails the test unless text holds all parts.
func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is missing in\n%s", part, text)
		}
	}
}

// leftovers are the files in the temporary directory of the runs, and their
// contents: a session removes what it put there.
func (s *site) leftovers(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(s.home, "bridgectl-*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// noKeyOnDisk fails the test if a private SSH key lies anywhere in the home.
func (s *site) noKeyOnDisk(t *testing.T) {
	t.Helper()
	home := os.DirFS(s.home)
	err := fs.WalkDir(home, ".", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !e.Type().IsRegular() {
			return nil // What a session holds may go while this looks.
		}
		if err != nil {
			return err
		}
		text, err := fs.ReadFile(home, path)
		if bytes.Contains(text, []byte("OPENSSH PRIVATE KEY")) {
			t.Errorf("%s holds a private key", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// keygen makes a key of the requester's own in ~/.ssh and returns its public
// file.
func (s *site) keygen(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(s.home, ".ssh", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path + ".pub"
}

func TestFromGrantToUsageOnTheCommandLine(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	contains(t, s.must(t, "card"), "demo-bridge", "eu-north", "8 / 16Gi / 100Gi", "platform")
	contains(t, s.must(t, "backends"), "metal", "serving")
	contains(t, s.must(t, "list"), "No instances.")

	r := s.run(t, append([]string{"provision", "--port", "80/tcp", "--env", "A=b"}, size...)...)
	if r.code != 0 {
		t.Fatal(r)
	}
	contains(t, r.stdout, "Ready.", "metal, eu-north, container", "500m / 512Mi / 1Gi", "sealed to this machine", "80/tcp→127.0.0.1:", "bridgectl ssh ")
	list := s.must(t, "list")
	contains(t, list, "ready", "metal")
	id := strings.Fields(strings.Split(list, "\n")[1])[0]

	var instances bridgev1.ListInstancesResponse
	if err := protojson.Unmarshal([]byte(s.must(t, "list", "-o", "json")), &instances); err != nil || len(instances.GetInstances()) != 1 {
		t.Fatal(err, &instances)
	}
	handle := instances.GetInstances()[0].GetHandle()

	// A key that was made for the grant logs in, and is nowhere on disk.
	if got := s.must(t, "ssh", id, "--", "echo", "hello there"); got != "hello there\n" {
		t.Errorf("ssh printed %q", got)
	}
	for _, status := range []int{1, 7, 255} {
		if r := s.run(t, "ssh", id, "exit", strconv.Itoa(status)); r.code != status {
			t.Errorf("the remote status %d became %d: %s", status, r.code, r.stderr)
		}
	}
	s.noKeyOnDisk(t)
	if left := s.leftovers(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if r := s.run(t, "ssh-config", id); r.code != 1 || !strings.Contains(r.stderr, "sealed") {
		t.Errorf("ssh-config of a sealed key: %+v", r)
	}
	path := filepath.Join(s.home, "state", "bridgectl", "grants", instancesID(&instances)+".json")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("stored receipt: %v, %v", info, err)
	}

	// The same grant again is the same instance.
	var again bridgev1.ProvisionResponse
	if err := protojson.Unmarshal([]byte(s.must(t, "provision", "--again", id, "-o", "json")), &again); err != nil || again.GetInstance().GetHandle() != handle {
		t.Error(err, &again)
	}

	// A watch sees the end that another run makes.
	watch := s.command("watch", id)
	var seen bytes.Buffer
	watch.Stdout = &seen
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	contains(t, s.must(t, "terminate", id), "Terminated: nothing of it is left.", "CPU used", "measured by host", "all of it")
	if err := watch.Wait(); err != nil {
		t.Error(err)
	}
	contains(t, seen.String(), "ended", "CPU reserved", "reservation × time")
	contains(t, s.must(t, "terminate", handle), "Terminated")
	contains(t, s.must(t, "logs", "--verify"), id, "terminated", "good")
	contains(t, s.must(t, "logs", id, "--verify"), "signature", "good", "ed25519:")
	contains(t, s.must(t, "usage", id), "memory peak")
	contains(t, s.must(t, "watch", id), "ended")

	// What ended does not come back.
	if r := s.run(t, "provision", "--again", id); r.code != 8 || !strings.Contains(r.stderr, "GRANT_ENDED") {
		t.Errorf("provision of an ended grant: %+v", r)
	}
	if r := s.run(t, "ssh", id); r.code != 1 || !strings.Contains(r.stderr, "not stored here") {
		t.Errorf("ssh after the end: %+v", r)
	}
}

func instancesID(l *bridgev1.ListInstancesResponse) string {
	return backend.GrantID(l.GetInstances()[0].GetRequestId()).String()
}

func TestOwnKeyLogsIn(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	s.keygen(t, "id_ed25519")
	id := s.grant(t)
	if got := s.must(t, "ssh", id[:8], "echo", "mine"); got != "mine\n" {
		t.Errorf("ssh printed %q", got)
	}
	config := s.must(t, "ssh-config", id)
	contains(t, config, "Host grant-"+id[:12], "StrictHostKeyChecking yes", "IdentityFile \""+filepath.Join(s.home, ".ssh", "id_ed25519")+"\"")
	path := filepath.Join(s.home, "ssh_config")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ssh", "-F", path, "grant-"+id[:12], "echo", "stanza").CombinedOutput()
	if err != nil || string(out) != "stanza\n" {
		t.Errorf("ssh with the stanza: %v, %s", err, out)
	}

	// Another key, named by its file, only in an agent.
	public := s.keygen(t, "other")
	id = s.grant(t, "--ssh-key", public)
	agent := filepath.Join(s.home, "agent")
	daemon := exec.Command("ssh-agent", "-D", "-a", agent)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = daemon.Process.Kill()
		_ = daemon.Wait()
	}()
	eventually(t, "the agent listens", func() bool { _, err := os.Stat(agent); return err == nil })
	add := exec.Command("ssh-add", "-q", strings.TrimSuffix(public, ".pub"))
	add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+agent)
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Rename(strings.TrimSuffix(public, ".pub"), filepath.Join(s.home, "moved")); err != nil {
		t.Fatal(err)
	}
	stored := filepath.Join(s.home, "state", "bridgectl", "grants", id+".json")
	text, err := os.ReadFile(stored)
	if err != nil {
		t.Fatal(err)
	}
	var file map[string]any
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	delete(file, "identity_file")
	if text, err = json.Marshal(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stored, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := s.command("ssh", id, "echo", "agent")
	cmd.Env = append(cmd.Env, "SSH_AUTH_SOCK="+agent)
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "agent\n" {
		t.Errorf("ssh with the agent's key: %v, %s", err, out)
	}
}

func TestAnotherHostKeyIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	first, second := s.grant(t), s.grant(t)
	dir := filepath.Join(s.home, "state", "bridgectl", "grants")
	read := func(id string) (*bridgev1.ProvisionResponse, map[string]json.RawMessage) {
		text, err := os.ReadFile(filepath.Join(dir, id+".json"))
		if err != nil {
			t.Fatal(err)
		}
		file := map[string]json.RawMessage{}
		if err := json.Unmarshal(text, &file); err != nil {
			t.Fatal(err)
		}
		res := &bridgev1.ProvisionResponse{}
		if err := protojson.Unmarshal(file["response"], res); err != nil {
			t.Fatal(err)
		}
		return res, file
	}
	res, file := read(first)
	other, _ := read(second)
	res.Receipt.HostKey = other.GetReceipt().GetHostKey()
	var err error
	if file["response"], err = protojson.Marshal(res); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, first+".json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	// Nothing after the grant weakens what is before it.
	r := s.run(t, "ssh", first, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "echo", "reached")
	if r.code != 255 || strings.Contains(r.stdout, "reached") || !strings.Contains(r.stderr, "verification failed") {
		t.Errorf("another host key: %+v", r)
	}
	s.noKeyOnDisk(t)
}

func TestNothingIsLeftWhenSSHIsKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	id := s.grant(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		// -N waits for ever.
		cmd := s.command("ssh", id, "-N", "-v")
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		connected := false
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			if strings.Contains(lines.Text(), "Authenticated to") {
				connected = true
				break
			}
		}
		if !connected {
			t.Fatal("ssh never logged in")
		}
		if left := s.leftovers(t); len(left) != 1 {
			t.Errorf("while it runs there are %v", left)
		}
		s.noKeyOnDisk(t)
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // To the end, so that Wait may be called.
		}
		_ = cmd.Wait() // What ssh makes of a signal is its own affair.
		if left := s.leftovers(t); len(left) > 0 {
			t.Errorf("%v left %v behind", sig, left)
		}
	}
}

func TestInterruptTakesTheGrantBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{BootTime: time.Minute}, backendfake.DriverOptions{BootTimeout: time.Minute})
	cmd := s.command(append([]string{"provision"}, size...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an instance is being made", func() bool { return len(s.provider.Names()) == 1 })
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit code %d", code)
	}
	contains(t, stderr.String(), "interrupted; grant", "was taken back, nothing of it is left")
	if names := s.provider.Names(); len(names) > 0 {
		t.Errorf("left at the provider: %v", names)
	}
	if files, _ := os.ReadDir(filepath.Join(s.home, "state", "bridgectl", "grants")); len(files) > 0 {
		t.Errorf("left in the store: %v", files)
	}
	// A time limit does the same.
	r := s.run(t, append([]string{"provision", "--timeout", "2s"}, size...)...)
	if r.code != 5 || !strings.Contains(r.stderr, "timed out; grant") {
		t.Errorf("%+v", r)
	}
}

func TestProvisionIsSentAgainUntilTheRouterIsBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{BootTime: time.Second}, backendfake.DriverOptions{})
	s.stopRouter()
	cmd := s.command(append([]string{"provision", "-o", "json", "-v"}, size...)...)
	var stdout bytes.Buffer
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = &stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "sending it again") {
			break
		}
	}
	s.startRouter()
	for lines.Scan() { // To the end, so that Wait may be called.
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	var res bridgev1.ProvisionResponse
	if err := protojson.Unmarshal(stdout.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	if h := s.provider.History(backend.GrantID(res.GetInstance().GetRequestId())); h.Created != 1 {
		t.Errorf("%d instances were made", h.Created)
	}
}

func TestWatchIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	id := s.grant(t)
	cmd := s.command("watch", id, "-o", "json")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() {
		t.Fatal("no first event")
	}
	s.stopRouter()
	s.startRouter()
	full, err := backend.ParseGrantID(id)
	if err != nil {
		t.Fatal(err)
	}
	s.provider.Exit(full, backendfake.ExitStatus{Code: 3})
	last := &bridgev1.WatchUntilExitResponse{}
	for lines.Scan() {
		last = &bridgev1.WatchUntilExitResponse{}
		if err := protojson.Unmarshal(lines.Bytes(), last); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if log := last.GetComputeLog().GetLog(); log.GetExit().GetCode() != 3 {
		t.Errorf("the last event is %v", last)
	}
	contains(t, stderr.String(), "taking it up again")
}

// Connections to a router end of age, over and over; who reads what bridgectl
// prints sees one watch.
func TestAWatchOutlivesTheAgeLimitOfItsConnections(t *testing.T) {
	t.Parallel()
	// Seldom enough that a report is still the last one when the watch is taken up.
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{UsageInterval: 3 * time.Second})
	id := s.grant(t)
	s.stopRouter()
	s.change = func(c *server.Config) {
		c.MaxConnectionAge.Duration, c.MaxConnectionAgeGrace.Duration = 200*time.Millisecond, 50*time.Millisecond
	}
	s.startRouter()
	cmd := s.command("watch", id, "-o", "json")
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	const often = 4
	broke := 0
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if !strings.Contains(lines.Text(), "taking it up again") {
			t.Errorf("unexpected: %s", lines.Text())
		}
		if broke++; broke == often {
			grant, err := backend.ParseGrantID(id)
			if err != nil {
				t.Fatal(err)
			}
			s.provider.Exit(grant, backendfake.ExitStatus{Code: 3})
		}
	}
	if err := cmd.Wait(); err != nil || broke < often {
		t.Fatalf("the watch broke %d times and ended with %v:\n%s", broke, err, stdout.Bytes())
	}
	var states []bridgev1.InstanceState
	var last *bridgev1.WatchUntilExitResponse
	usages := map[string]bool{}
	for line := range bytes.Lines(stdout.Bytes()) {
		if last.GetComputeLog() != nil {
			t.Errorf("after the compute log there is %s", line)
		}
		last = &bridgev1.WatchUntilExitResponse{}
		if err := protojson.Unmarshal(line, last); err != nil {
			t.Fatal(err)
		}
		if i := last.GetInstance(); i != nil {
			states = append(states, i.GetState())
		}
		if body := last.GetUsage().GetBody(); body != nil {
			if usages[string(body)] {
				t.Errorf("told twice: %s", line)
			}
			usages[string(body)] = true
		}
	}
	if len(states) == 0 || states[0] != bridgev1.InstanceState_INSTANCE_STATE_READY || len(slices.Compact(slices.Clone(states))) != len(states) {
		t.Errorf("states: %v", states)
	}
	if len(usages) == 0 {
		t.Errorf("%d reports of usage", len(usages))
	}
	if log := last.GetComputeLog().GetLog(); log.GetExit().GetCode() != 3 {
		t.Errorf("the last event is %v", last)
	}
}

func TestWorkersAreDrainedAndSwept(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	contains(t, s.must(t, "--target", s.workerSock, "drain"), "Draining:")
	if r := s.run(t, append([]string{"provision"}, size...)...); r.code != 4 || !strings.Contains(r.stderr, "try again in") {
		t.Errorf("provision at a draining worker: %+v", r)
	}
	contains(t, s.must(t, "--target", s.workerSock, "resume"), "Taking new grants.")
	contains(t, s.must(t, "--target", s.workerSock, "sweep", "--dry-run"), "Nothing that should not exist.")
	contains(t, s.must(t, "sweep"), "Nothing that should not exist.")
	if r := s.run(t, "drain"); r.code != 1 || !strings.Contains(r.stderr, "only a worker can be drained") {
		t.Errorf("drain of a router: %+v", r)
	}
}

// An operator sweeps through the router.
func TestSweepThroughTheRouter(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	id := s.grant(t)
	s.must(t, "terminate", id)
	s.revive(t, id)
	contains(t, s.must(t, "sweep", "--dry-run"), id[:12], "metal host1", "would be deleted", "the grant ended at")
	if len(s.provider.Names()) != 1 {
		t.Fatal("a dry run deleted it")
	}
	eventually(t, "the sweep has deleted it", func() bool {
		s.must(t, "sweep", "--backend", "metal")
		return len(s.provider.Names()) == 0
	})
	if r := s.run(t, "sweep", "--backend", "cloud"); r.code != 3 || !strings.Contains(r.stderr, "there are: metal") {
		t.Errorf("sweep of an unknown backend: %+v", r)
	}
	if r := s.run(t, "--target", s.router, "--identity", filepath.Join(s.certs, "alice"), "sweep"); r.code != 6 || !strings.Contains(r.stderr, "CALLER_DENIED") {
		t.Errorf("sweep by a client: %+v", r)
	}
	// Blind, and unreachable: nothing is known to be clean.
	blind := s.provider.Inject(backendfake.OpList, backendfake.Fault{Kind: backendfake.Unavailable, Times: -1})
	if r := s.run(t, "sweep"); r.code != 5 || !strings.Contains(r.stdout, "Did not sweep: metal") {
		t.Errorf("sweep of a blind backend: %+v", r)
	}
	var res bridgev1.SweepResponse
	r := s.run(t, "sweep", "-o", "json")
	if err := protojson.Unmarshal([]byte(r.stdout), &res); err != nil || r.code != 5 || len(res.GetFailures()) != 1 || res.GetFailures()[0].GetBackend() != "metal" {
		t.Errorf("as JSON: %v, %+v", err, r)
	}
	blind.Release()
	contains(t, s.must(t, "sweep"), "Nothing that should not exist.")
}

// revive makes an instance of a grant again, as a worker with an older copy of
// the ledger would.
func (s *site) revive(t *testing.T, id string) {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	runtime, err := worker.NewRuntime(worker.RuntimeConfig{
		BridgeID: "test", Backend: "metal", Ledger: ledgertest.Open(t), Secret: redact.New(secret), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := runtime.Start(t.Context(), backendfake.Open(s.provider, runtime.Env(), backendfake.DriverOptions{})); err != nil {
		t.Fatal(err)
	}
	defer runtime.Close()
	full, err := backend.ParseGrantID(id)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	hash := [32]byte{1}
	_, err = runtime.Provision(t.Context(), backend.Grant{
		ID: full, PostHash: hash, ProviderID: make([]byte, 32), Shape: backend.Shape{CPU: 500, RAM: 512, Storage: 1},
		Image:        backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: hash}, Kind: backend.ImageOCIArchive},
		MinIsolation: backend.IsolationContainer, ValidTo: time.Now().Add(time.Hour),
	}, backend.Envelope{SSHPublicKey: pair.Public.String(), PostHash: hash})
	if err != nil {
		t.Fatal(err)
	}
}

func TestExitCodesTellWhatToDo(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	alice, mallory := filepath.Join(s.certs, "alice"), filepath.Join(s.certs, "mallory")
	provision := func(args ...string) []string { return append(append([]string{"provision"}, size...), args...) }
	bad := filepath.Join(s.home, "bad.yaml")
	if err := os.WriteFile(bad, []byte("grant:\n  shape: {ram: 1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	id := strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"help":            {[]string{"--help"}, 0, nil},
		"version":         {[]string{"version"}, 0, nil},
		"version json":    {[]string{"version", "-o", "json"}, 0, nil},
		"completion":      {[]string{"completion", "bash"}, 0, nil},
		"unknown command": {[]string{"frobnicate"}, 2, []string{`unknown command "frobnicate"`}},
		"unknown certs":   {[]string{"certs", "frobnicate"}, 2, []string{`unknown command "frobnicate"`}},
		"unknown flag":    {[]string{"list", "--frob"}, 2, []string{"unknown flag: --frob"}},
		"bad output":      {[]string{"list", "-o", "xml"}, 2, []string{"want table or json"}},
		"bad colour":      {[]string{"list", "--color", "blue"}, 2, []string{"want auto, always or never"}},
		"bad timeout":     {[]string{"list", "--timeout", "5"}, 2, []string{"--timeout"}},
		"no grant":        {[]string{"watch"}, 2, []string{"wants GRANT"}},
		"not a grant":     {[]string{"terminate", "xyz"}, 2, []string{"want a grant's id"}},
		"all missing":     {[]string{"provision"}, 2, []string{"--cpu is missing", "--ram is missing", "--disk is missing", "--image-digest is missing", "--for or --until is missing"}},
		"bad values":      {provision("--cpu", "x", "--port", "0/tcp"), 2, []string{`--cpu "x"`, `--port "0/tcp"`}},
		"both ends":       {provision("--until", "2030-01-01T00:00:00Z"), 2, []string{"for until"}},
		"bad isolation":   {provision("--isolation", "chroot"), 2, []string{"want one of container, vm, tdx"}},
		"allow alone":     {provision("--allow", "192.0.2.0/24"), 2, []string{"--allow needs --network allowlist"}},
		"private as key":  {provision("--ssh-key", filepath.Join(s.certs, "ca-key.pem")), 2, []string{"--ssh-key"}},
		"unknown key":     {[]string{"provision", "-f", bad}, 3, []string{"bad.yaml:2: unknown key grant.shape.ram; did you mean ram_mib?"}},
		"invalid":         {provision("--region", "EU North", "--port", "80/tcp", "--port", "80/tcp"), 3, []string{"GRANT_INVALID", "grant.region", "grant.ports"}},
		"dry run":         {provision("--dry-run", "--port", "80/tcp", "--port", "80/tcp"), 3, []string{"grant.ports"}},
		"no such region":  {provision("--region", "mars"), 3, []string{"GRANT_NOT_SATISFIABLE"}},
		"no tdx":          {provision("--isolation", "tdx"), 3, []string{"GRANT_NOT_SATISFIABLE"}},
		"unreachable":     {[]string{"--target", "unix:/nonexistent", "list"}, 5, []string{"BACKEND_UNREACHABLE", "no such file"}},
		"no TLS":          {[]string{"--target", s.router, "list"}, 2, []string{"needs mutual TLS"}},
		"insecure abroad": {[]string{"--target", "192.0.2.1:1", "--insecure", "list"}, 2, []string{"loopback"}},
		"missing files":   {[]string{"--target", s.router, "--identity", s.home, "list"}, 2, []string{"--cert", "--key", "--ca"}},
		"mTLS":            {[]string{"--target", s.router, "--identity", alice, "list"}, 0, nil},
		"single files":    {[]string{"--target", s.router, "--cert", alice + "/cert.pem", "--key", alice + "/key.pem", "--ca", alice + "/ca.pem", "list"}, 0, nil},
		"wrong name":      {[]string{"--target", s.router, "--identity", alice, "--server-name", "bank.example", "list"}, 6, []string{"BACKEND_UNREACHABLE", "bank.example"}},
		"not listed":      {[]string{"--target", s.router, "--identity", mallory, "list"}, 6, []string{"CALLER_UNAUTHENTICATED", "mallory"}},
		"not here":        {[]string{"ssh", "abababab"}, 7, []string{"is stored on this machine"}},
		"nowhere":         {[]string{"watch", "abababab"}, 7, []string{"no grant begins with"}},
		"never seen":      {[]string{"watch", id}, 7, []string{"INSTANCE_NOT_FOUND"}},
		"no log":          {[]string{"logs", id}, 7, []string{"no compute log"}},
		"certs again":     {[]string{"certs", "init", s.certs}, 8, []string{"exists already"}},
		"bad name":        {[]string{"certs", "issue", s.certs, "../x"}, 2, []string{"invalid name"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := s.run(t, c.args...)
			if r.code != c.code {
				t.Errorf("exit code %d, want %d\n%s%s", r.code, c.code, r.stdout, r.stderr)
			}
			contains(t, r.stderr, c.want...)
			if c.code == 0 {
				return
			}
			// The same for scripts.
			if strings.Contains(name, "bad output") {
				return
			}
			r = s.run(t, append([]string{"-o", "json"}, c.args...)...)
			var out struct {
				Error struct {
					Message  string `json:"message"`
					ExitCode int    `json:"exit_code"`
				} `json:"error"`
			}
			if err := json.Unmarshal([]byte(lastLine(r.stderr)), &out); err != nil || out.Error.Message == "" || out.Error.ExitCode != c.code {
				t.Errorf("as JSON: %v in %q", err, r.stderr)
			}
		})
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestFailuresOfTheBridgeAreTold(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{Hosts: []backendfake.Host{{
		Name: "h", Region: "eu", Capacity: backend.Shape{CPU: 1000, RAM: gib, Storage: 2}, MaxInstances: 1,
	}}}, backendfake.DriverOptions{})
	s.provider.FailBoot(backendfake.ExitStatus{Code: 1, Console: "cannot open /etc/app.conf\x1b[2J\nexiting"})
	r := s.run(t, append([]string{"provision"}, size...)...)
	if r.code != 9 {
		t.Errorf("exit code %d", r.code)
	}
	contains(t, r.stderr, "WORKLOAD_FAILED", "  console:\n  | cannot open /etc/app.conf", "  | exiting")
	if strings.Contains(r.stderr, "\x1b[2J") {
		t.Error("the tenant steers the terminal")
	}
	// The first try left nothing, and a new grant takes its place.
	id := s.grant(t)
	r = s.run(t, append([]string{"provision", "--request-id", id}, size...)...)
	if r.code != 8 || !strings.Contains(r.stderr, "stored here already") {
		t.Errorf("the same id: %+v", r)
	}
	if err := os.Rename(filepath.Join(s.home, "state"), filepath.Join(s.home, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	r = s.run(t, append([]string{"provision", "--request-id", id}, size...)...)
	if r.code != 8 || !strings.Contains(r.stderr, "GRANT_CONFLICT") {
		t.Errorf("the same id with other content: %+v", r)
	}
	r = s.run(t, append([]string{"provision"}, size...)...)
	if r.code != 4 {
		t.Errorf("a full host: %+v", r)
	}
	contains(t, r.stderr, "try again in")
}

func TestDryRunIsReadBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	args := append([]string{"provision", "--dry-run", "--port", "53/udp", "--env", "A=x y", "--network", "allowlist", "--allow", "192.0.2.0/24", "--isolation", "vm"}, size...)
	first := s.must(t, args...)
	path := filepath.Join(s.home, "grant.json")
	if err := os.WriteFile(path, []byte(first), 0o600); err != nil {
		t.Fatal(err)
	}
	if second := s.must(t, "provision", "--dry-run", "-f", path); second != first {
		t.Errorf("%s\nbecame\n%s", first, second)
	}
	// Flags win over the file.
	contains(t, s.must(t, "provision", "--dry-run", "-f", path, "--cpu", "2"), `"cpu_millicores": "2000"`, `"ram_mib": "512"`)
	if len(s.provider.Calls()) > 0 && s.provider.Mutations() > 0 {
		t.Error("a dry run changed something")
	}
}
