package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// The identities of a bridge. bob is a second client, stranger one whom nobody
// listed.
const (
	market, bob, reader, operator, stranger = "market", "bob", "reader", "operator", "stranger"
)

// patience is how long a test waits for what is under way. What depends on it
// has failed.
const patience = 3 * time.Minute

// sites counts bridges, for addresses of their own.
var sites atomic.Uint32

// bridge is a router and its workers, running.
type bridge struct {
	*site.Site
	t       *testing.T
	hosts   []*lab.Host
	workers []*site.Worker
	image   string // digest of the image with a shell

	router    *site.Process
	processes map[string]*site.Process // the workers', by name
	outputs   *bytes.Buffer            // of every command, for the search for secrets
}

// newSite makes the files of a bridge that has one worker on each group of
// hosts, and starts nothing.
func newSite(t *testing.T, hosts ...site.Host) *bridge {
	t.Helper()
	l, err := lab.Current()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	b := &bridge{t: t, processes: map[string]*site.Process{}, outputs: &bytes.Buffer{}}
	// Sites have addresses of their own, so that nothing depends on which
	// ports an earlier test has freed.
	ip := netip.AddrFrom4([4]byte{127, 1, 0, byte(sites.Add(1))})
	b.Site = &site.Site{Lab: l, Bin: filepath.Join(root, "bin"), Dir: t.TempDir(), IP: ip.String()}
	b.programs("router", "bridgectl", "guest")
	if len(hosts) > 0 {
		b.programs("baremetal-worker")
	}
	identities := [][2]string{{"router", "router"}, {market, "client"}, {bob, "client"}, {reader, "reader"}, {operator, "operator"}, {stranger, "client"}}
	for i, host := range hosts {
		b.hosts = append(b.hosts, host.Host)
		b.workers = append(b.workers, b.Worker(fmt.Sprintf("metal%d", i+1), i, host))
		identities = append(identities, [2]string{b.workers[i].Name, "reader"})
	}
	for _, args := range b.CertCommands(identities...) {
		if r := b.bridgectl("", args...); r.code != 0 {
			t.Fatalf("bridgectl %v: %s", args, r.all())
		}
	}
	for _, w := range b.workers {
		b.write(w.ConfigFile(), b.workerConfig(w))
	}
	b.write(b.RouterConfigFile(), b.routerConfig())
	b.sshKey("requester")
	return b
}

// programs fails the test unless these are built.
func (b *bridge) programs(names ...string) {
	b.t.Helper()
	for _, name := range names {
		if _, err := os.Stat(b.Program(name)); err != nil {
			b.t.Fatalf("run make build first: %v", err)
		}
	}
}

// workerConfig is a worker's configuration.
func (b *bridge) workerConfig(w *site.Worker) string {
	return w.Config("e2e",
		site.Client{Identity: site.Identity("router"), Role: "reader", Router: true},
		site.Client{Identity: site.Identity(operator), Role: "operator"},
		site.Client{Identity: "unix:0", Role: "operator"},
	)
}

// routerConfig is the router's configuration.
func (b *bridge) routerConfig() string {
	return b.RouterConfig("e2e", []site.Client{
		{Identity: site.Identity(market), Role: "client"},
		{Identity: site.Identity(bob), Role: "client"},
		{Identity: site.Identity(reader), Role: "reader"},
		{Identity: site.Identity(operator), Role: "operator"},
		{Identity: "unix:0", Role: "operator"},
	}, b.workers...)
}

// newBridge starts a bridge with one worker on each host. When the test ends,
// the processes must stop in order, nothing may be left on the hosts but images,
// and no secret may be in any log or output.
func newBridge(t *testing.T, hosts ...site.Host) *bridge {
	t.Helper()
	if len(hosts) == 0 {
		hosts = []site.Host{{Host: lab.NewHost(t, lab.HostOptions{})}}
	}
	b := newSite(t, hosts...)
	var err error
	if b.image, err = b.AddImage(t.Context(), ociimage.Shell); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.checkEnd)
	for _, w := range b.workers {
		b.startWorker(w)
	}
	b.startRouter()
	b.waitForHealth("BACKEND_HEALTH_SERVING")
	return b
}

func (b *bridge) startWorker(w *site.Worker) {
	b.t.Helper()
	p, err := b.StartWorker(b.t.Context(), w)
	if err != nil {
		b.t.Fatal(err)
	}
	b.processes[w.Name] = p
}

func (b *bridge) startRouter() {
	b.t.Helper()
	p, err := b.StartRouter(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	b.router = p
}

// checkEnd ends the bridge and looks at what it leaves.
func (b *bridge) checkEnd() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.t.Context()), 2*patience)
	defer cancel()
	for _, h := range b.hosts {
		var left []string
		err := poll(ctx, patience, func() (err error) {
			if left, err = h.Leftovers(ctx, "image "); err == nil && len(left) > 0 {
				err = errors.New("something is left")
			}
			return err
		})
		if err != nil {
			b.t.Errorf("%s: %v:\n\t%s", h.Name, err, strings.Join(left, "\n\t"))
		}
	}
	for _, p := range append([]*site.Process{b.router}, b.all()...) {
		if p == nil {
			continue
		}
		if code, err := p.Stop(ctx); err != nil {
			b.t.Error(err, p.Kill())
		} else if code != 0 && code != -1 { // -1: a test has killed it
			b.t.Errorf("%s: exit code %d after SIGTERM", p.Name, code)
		}
		if b.t.Failed() {
			b.t.Logf("the end of %s's log:\n%s", p.Name, p.LogTail())
		}
	}
	b.checkSecrets(ctx)
}

func (b *bridge) all() []*site.Process {
	var all []*site.Process
	for _, p := range b.processes {
		all = append(all, p)
	}
	return all
}

// checkSecrets looks for every secret of the bridge in every log and output.
func (b *bridge) checkSecrets(ctx context.Context) {
	secrets := map[string][]byte{
		"an OpenSSH private key": []byte("b3BlbnNzaC1rZXktdjE"), // "openssh-key-v1", in Base64
		"a private key":          []byte("PRIVATE KEY"),
	}
	add := func(what string, secret []byte) {
		if len(secret) < 16 {
			b.t.Errorf("%s is too short for a secret: %d bytes", what, len(secret))
			return
		}
		secrets[what] = secret
		secrets[what+" in hex"] = []byte(hex.EncodeToString(secret))
		secrets[what+" in Base64"] = []byte(base64.StdEncoding.EncodeToString(secret))
		secrets[what+" in URL Base64"] = []byte(base64.RawURLEncoding.EncodeToString(secret))
	}
	for _, w := range b.workers {
		file := b.Path(w.Name, "worker.secret")
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // It never started.
		}
		if err != nil {
			b.t.Error(err)
			continue
		}
		add("the worker secret", text)
	}
	receipts, err := filepath.Glob(b.Path("state", "bridgectl", "grants", "*.json"))
	if err != nil {
		b.t.Error(err)
	}
	for _, file := range receipts {
		var stored struct {
			X25519 []byte `json:"x25519_private_key"`
		}
		text, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(text, &stored)
		}
		if err != nil {
			b.t.Error(err)
		} else if stored.X25519 != nil {
			add("the key to which a login key is sealed", stored.X25519)
		}
	}
	logs := map[string][]byte{"the commands' output": b.outputs.Bytes()}
	files, err := filepath.Glob(b.Path("*.log"))
	if err != nil {
		b.t.Error(err)
	}
	for _, file := range files {
		if logs[file], err = os.ReadFile(file); err != nil {
			b.t.Error(err)
		}
	}
	for _, h := range b.hosts {
		if journal, err := h.Journal(ctx); err != nil {
			b.t.Error(err)
		} else {
			logs["the journal of "+h.Name] = []byte(journal)
		}
	}
	for name, log := range logs {
		for what, secret := range secrets {
			if bytes.Contains(log, secret) {
				b.t.Errorf("%s is in %s", what, name)
			}
		}
	}
}

// write writes a file of the site.
func (b *bridge) write(file, text string) {
	b.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		b.t.Fatal(err)
	}
}

// read reads a file of the site.
func (b *bridge) read(elements ...string) string {
	b.t.Helper()
	text, err := os.ReadFile(b.Path(elements...))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

// sshKey makes a key pair NAME and NAME.pub.
func (b *bridge) sshKey(name string) {
	b.t.Helper()
	if r := b.run(b.cmd(market, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name)); r.code != 0 {
		b.t.Fatal(r.all())
	}
}

// --- Commands --------------------------------------------------------------

// result is how a command ended.
type result struct {
	code           int
	stdout, stderr string
}

func (r result) all() string { return fmt.Sprintf("exit code %d\n%s%s", r.code, r.stdout, r.stderr) }

// cmd prepares a command, which ends with the test at the latest.
func (b *bridge) cmd(identity, program string, args ...string) *exec.Cmd {
	cmd := b.Command(b.t.Context(), identity, program, args...)
	cmd.Env = append(cmd.Env, "HOME="+b.Dir, "NO_COLOR=1")
	return cmd
}

// run runs a command to its end.
func (b *bridge) run(cmd *exec.Cmd) result {
	b.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.t.Fatal(err)
	}
	b.outputs.Write(stdout.Bytes())
	b.outputs.Write(stderr.Bytes())
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// bridgectl runs bridgectl as an identity.
func (b *bridge) bridgectl(identity string, args ...string) result {
	b.t.Helper()
	return b.run(b.cmd(identity, "bridgectl", args...))
}

// ok runs bridgectl, which must succeed, and returns its standard output.
func (b *bridge) ok(identity string, args ...string) string {
	b.t.Helper()
	r := b.bridgectl(identity, args...)
	if r.code != 0 {
		b.t.Fatalf("bridgectl %s: %s", strings.Join(args, " "), r.all())
	}
	return r.stdout
}

// refused runs bridgectl, which must fail with a code and say these texts.
func (b *bridge) refused(identity string, code int, texts []string, args ...string) {
	b.t.Helper()
	r := b.bridgectl(identity, args...)
	if r.code != code {
		b.t.Errorf("bridgectl %s: want exit code %d, got %s", strings.Join(args, " "), code, r.all())
		return
	}
	for _, text := range texts {
		if !strings.Contains(r.stderr, text) {
			b.t.Errorf("bridgectl %s doesn't say %q: %s", strings.Join(args, " "), text, r.all())
		}
	}
}

// json runs bridgectl -o json and reads the answer.
func (b *bridge) json(into any, identity string, args ...string) {
	b.t.Helper()
	out := b.ok(identity, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		b.t.Fatalf("bridgectl %v: %v:\n%s", args, err, out)
	}
}

// background is a command that goes on.
type background struct {
	b      *bridge
	cmd    *exec.Cmd
	stdout *os.File
	done   chan error
}

// start starts bridgectl, as the market.
func (b *bridge) start(args ...string) *background {
	b.t.Helper()
	return b.startCmd(b.cmd(market, "bridgectl", args...))
}

// startCmd starts a command whose output goes into a file.
func (b *bridge) startCmd(cmd *exec.Cmd) *background {
	b.t.Helper()
	g := &background{b: b, cmd: cmd, done: make(chan error, 1)}
	var err error
	if g.stdout, err = os.CreateTemp(b.Dir, "background-*.log"); err != nil {
		b.t.Fatal(err)
	}
	g.cmd.Stdout, g.cmd.Stderr = g.stdout, g.stdout
	if err := g.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	go func() { g.done <- g.cmd.Wait() }()
	return g
}

// kill ends it.
func (g *background) kill() {
	g.b.t.Helper()
	if err := g.cmd.Process.Kill(); err != nil {
		g.b.t.Error(err)
	}
	g.wait()
}

// output is what it has printed so far.
func (g *background) output() string {
	text, err := os.ReadFile(g.stdout.Name())
	if err != nil {
		g.b.t.Error(err)
	}
	return string(text)
}

// wait waits for its end and returns its exit code.
func (g *background) wait() int {
	g.b.t.Helper()
	select {
	case err := <-g.done:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			g.b.t.Fatal(err)
		}
		_ = g.stdout.Close() // It was the command's to write.
		return g.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		g.b.t.Fatalf("%v still runs:\n%s", g.cmd.Args, g.output())
		return 0
	}
}

// --- Grants ----------------------------------------------------------------

// provisioned is what bridgectl provision -o json prints, as far as needed.
type provisioned struct {
	Instance instance `json:"instance"`
	Receipt  struct {
		Host    string    `json:"instance_host"`
		Port    int       `json:"instance_port"`
		User    string    `json:"user"`
		HostKey string    `json:"host_key"`
		ValidTo time.Time `json:"valid_to"`
		Sealed  *struct {
			PublicKey string `json:"public_key"`
			Sealed    []byte `json:"sealed"`
		} `json:"sealed_key"`
		Requester *struct {
			Fingerprint string `json:"fingerprint"`
		} `json:"requester_key"`
	} `json:"receipt"`
}

// instance is an instance in JSON, as far as needed.
type instance struct {
	Handle     string `json:"handle"`
	RequestID  []byte `json:"request_id"`
	Backend    string `json:"backend"`
	InstanceID string `json:"instance_id"`
	State      string `json:"state"`
	Attempt    int    `json:"attempt"`
	Ports      []struct {
		Port struct {
			Number int `json:"number"`
		} `json:"port"`
		PublicHost string `json:"public_host"`
		PublicPort int    `json:"public_port"`
	} `json:"ports"`
}

// id is the grant's, in hex.
func (i instance) id() string { return hex.EncodeToString(i.RequestID) }

// computeLog is a compute log in JSON, as far as needed.
type computeLog struct {
	Log struct {
		RequestID []byte `json:"request_id"`
		Backend   string `json:"backend"`
		Final     bool   `json:"final"`
		Exit      struct {
			Reason string `json:"reason"`
			Code   *int   `json:"code"`
		} `json:"exit"`
		Usage map[string]struct {
			Value  string `json:"value"` // Protobuf's JSON writes int64 as a string
			Source string `json:"source"`
		} `json:"usage"`
		StartedAt time.Time `json:"started_at"`
		EndedAt   time.Time `json:"ended_at"`
		ValidTo   time.Time `json:"valid_to"`
	} `json:"log"`
}

// grantArgs are those of a small grant.
func (b *bridge) grantArgs(more ...string) []string {
	return append([]string{"provision", "--image-digest", b.image, "--cpu", "500m", "--ram", "128Mi", "--disk", "1Gi"}, more...)
}

// provision makes an instance for market, by its requester's key unless more
// says otherwise.
func (b *bridge) provision(more ...string) provisioned {
	b.t.Helper()
	var p provisioned
	b.json(&p, market, b.grantArgs(more...)...)
	if p.Instance.State != "INSTANCE_STATE_READY" {
		b.t.Fatalf("provisioned: %+v", p)
	}
	return p
}

// own are the flags for an hour with the requester's own key.
func own(more ...string) []string {
	return append([]string{"--for", "1h", "--ssh-key", "requester.pub"}, more...)
}

// list returns the instances that an identity sees.
func (b *bridge) list(identity string) []instance {
	b.t.Helper()
	var list struct {
		Instances []instance `json:"instances"`
	}
	b.json(&list, identity, "list")
	return list.Instances
}

// terminate ends a grant for good.
func (b *bridge) terminate(p provisioned) {
	b.t.Helper()
	b.ok(market, "terminate", p.Instance.Handle)
}

// finalLog waits for a grant's final compute log.
func (b *bridge) finalLog(p provisioned) computeLog {
	b.t.Helper()
	var log computeLog
	b.soon("the final compute log", func() error {
		r := b.bridgectl(market, "logs", p.Instance.id(), "--verify", "-o", "json")
		if r.code != 0 {
			return errors.New(r.all())
		}
		var list struct {
			Logs []computeLog `json:"compute_logs"`
		}
		if err := json.Unmarshal([]byte(r.stdout), &list); err != nil {
			return err
		}
		if len(list.Logs) != 1 || !list.Logs[0].Log.Final {
			return fmt.Errorf("no final log yet: %s", r.stdout)
		}
		log = list.Logs[0]
		return nil
	})
	return log
}

// health returns each backend's health, in order.
func (b *bridge) health() []string {
	b.t.Helper()
	var list struct {
		Backends []struct {
			Health string `json:"health"`
		} `json:"backends"`
	}
	b.json(&list, operator, "backends")
	all := make([]string, len(list.Backends))
	for i, backend := range list.Backends {
		all[i] = backend.Health
	}
	return all
}

// waitForHealth waits until the router says so of all backends.
func (b *bridge) waitForHealth(want string) {
	b.t.Helper()
	b.soon("the router sees "+want, func() error {
		for _, got := range b.health() {
			if got != want {
				return fmt.Errorf("a backend is %s", got)
			}
		}
		return nil
	})
}

// soon polls until look returns no error.
func (b *bridge) soon(what string, look func() error) {
	b.t.Helper()
	if err := poll(b.t.Context(), patience, look); err != nil {
		b.t.Fatalf("waiting until %s: %v", what, err)
	}
}

// poll repeats a look until it succeeds, and returns its last error if that
// takes too long.
func poll(ctx context.Context, limit time.Duration, look func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := look()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// ssh returns a command of OpenSSH, with no more than a receipt and a private
// key. options come before the destination.
func (b *bridge) ssh(p provisioned, key string, options []string, command ...string) *exec.Cmd {
	b.t.Helper()
	args := append(b.sshOptions(p, key), options...)
	args = append(args, "-p", fmt.Sprint(p.Receipt.Port), p.Receipt.User+"@"+p.Receipt.Host)
	return b.cmd(market, "ssh", append(args, command...)...)
}

// sshOptions pin the host key and choose the login key.
func (b *bridge) sshOptions(p provisioned, key string) []string {
	b.t.Helper()
	file := b.Path("known_hosts-" + p.Instance.id())
	host := fmt.Sprintf("[%s]:%d", p.Receipt.Host, p.Receipt.Port)
	if p.Receipt.Port == 22 {
		host = p.Receipt.Host // as OpenSSH writes it
	}
	b.write(file, host+" "+p.Receipt.HostKey+"\n")
	return []string{
		"-F", "none", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=" + file, "-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes",
	}
}

// says fails the test unless a command had this code and output.
func (b *bridge) says(r result, code int, want string) {
	b.t.Helper()
	if r.code != code || !regexp.MustCompile(want).MatchString(r.stdout+r.stderr) {
		b.t.Errorf("want exit code %d and %q, got %s", code, want, r.all())
	}
}
