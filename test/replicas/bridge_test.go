package replicas

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

const (
	// patience is how long a test waits for what must happen on a busy machine.
	patience = 3 * time.Minute
	// takeover is how long the other replica may take, by the contract.
	takeover = 10 * time.Second
	// slots is how many grants a host takes.
	slots = 3
)

// stopwatch begins to measure a takeover. What it returns ends that, and fails
// the test if it took too long.
func stopwatch(t *testing.T) (stop func(what string)) {
	t.Helper()
	began := time.Now()
	return func(what string) {
		t.Helper()
		took := time.Since(began)
		t.Logf("%s after %s", what, took.Round(time.Millisecond))
		if took > takeover {
			t.Errorf("%s after %s, at most %s is allowed", what, took, takeover)
		}
	}
}

// process is a worker or a router.
type process struct {
	t       *testing.T
	name    string
	program string
	config  string
	port    int
	group   uint32 // its group id, by which its packets are known
	run     func(func())
	client  backend.Backend

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
}

// starter returns a function that runs others on a thread that lives until the
// test ends: a process dies with the thread that started it, which is how none
// outlives the tests.
func starter(t *testing.T) func(func()) {
	t.Helper()
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	t.Cleanup(func() { close(work) })
	return func(f func()) {
		done := make(chan struct{})
		work <- func() {
			defer close(done)
			f()
		}
		<-done
	}
}

// groups counts processes, for group ids of their own.
var groups atomic.Uint32

func nextGroup() uint32 { return 5000 + groups.Add(1) }

// bridge is two workers and two routers.
type bridge struct {
	t       *testing.T
	hosts   []*lab.Host
	dir     string
	server  *pgtest.Server
	workers []*process
	routers []*process
	image   backend.Image
	sshKey  string
}

// newBridge starts a bridge on hosts. Worker i takes host i first and has the
// others on standby, so that with two hosts each has one.
func newBridge(t *testing.T, hosts ...*lab.Host) *bridge {
	t.Helper()
	b := prepare(t, hosts...)
	for _, p := range append(append([]*process(nil), b.workers...), b.routers...) {
		p.start()
	}
	b.settled()
	return b
}

// prepare writes all files of a bridge and starts nothing.
func prepare(t *testing.T, hosts ...*lab.Host) *bridge {
	t.Helper()
	b := &bridge{t: t, hosts: hosts, dir: t.TempDir(), server: pgtest.Start(t, pgtest.Options{})}
	b.prepare(b.server.Database(t), b.server.Database(t))
	return b
}

func (b *bridge) prepare(workerDSN, routerDSN string) {
	t := b.t
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(root, "bin")
	archive := ociimage.Make(t, ociimage.Shell)
	images := filepath.Join(b.dir, "images", "sha256")
	if err := errors.Join(os.MkdirAll(images, 0o755), os.Link(archive.Path, filepath.Join(images, archive.SHA256))); err != nil {
		data, err := os.ReadFile(archive.Path)
		if err == nil {
			err = os.WriteFile(filepath.Join(images, archive.SHA256), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	digest, err := backend.ParseDigest("sha256:" + archive.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	b.image = backend.Image{Digest: digest, Kind: backend.ImageOCIArchive}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	b.sshKey = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))

	const listen = `
[[listen]]
address = "127.0.0.1:%d"
insecure = true

[[client]]
identity = "insecure"
role = "operator"
router = true
`
	run := starter(t)
	var targets []string
	for i := range 2 {
		p := &process{t: t, name: "worker-" + string(rune('a'+i)), program: filepath.Join(bin, "baremetal-worker"), port: freePort(t), group: nextGroup(), run: run}
		var c strings.Builder
		fmt.Fprintf(&c, "bridge_id = \"replicas\"\nname = \"metal\"\nsecret_file = %q\nlog_level = \"debug\"\n\n[ledger]\ndriver = \"postgres\"\ndsn = %q\n\n[sweep]\ninterval = \"2s\"\norphan_age = \"30s\"\n",
			filepath.Join(b.dir, "worker.secret"), workerDSN)
		fmt.Fprintf(&c, listen, p.port)
		fmt.Fprintf(&c, "\n[backend]\nreplica = %q\nguest_binary = %q\nstop_grace = \"2s\"\nlenient_boot = true\n\n[backend.image_store]\nbase = %q\n", p.name, filepath.Join(bin, "guest"), filepath.Join(b.dir, "images"))
		for j, h := range b.hosts {
			fmt.Fprintf(&c, "\n[[backend.host]]\nname = %q\naddress = \"%s:%d\"\nkey_file = %q\nhost_keys = [%q]\nregion = \"lab\"\ncpu_millicores = 4000\nram_mib = 4096\nstorage_gib = 40\nmax_instances = %d\nstandby = %t\n",
				h.Name, h.Addr, h.SSHPort, h.UserKeyFile, h.HostKeyLine(), slots, j%2 != i)
		}
		p.config = filepath.Join(b.dir, p.name+".toml")
		if err := os.WriteFile(p.config, []byte(c.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		b.workers = append(b.workers, p)
		targets = append(targets, p.addr())
	}
	for i := range 2 {
		p := &process{t: t, name: "router-" + string(rune('a'+i)), program: filepath.Join(bin, "router"), port: freePort(t), group: nextGroup(), run: run}
		var c strings.Builder
		fmt.Fprintf(&c, "bridge_id = \"replicas\"\nlog_level = \"debug\"\n\n[ledger]\ndriver = \"postgres\"\ndsn = %q\n", routerDSN)
		fmt.Fprintf(&c, listen, p.port)
		fmt.Fprintf(&c, "\n[[backend]]\nname = \"metal\"\ntarget = %q\ninsecure = true\npoll_interval = \"1s\"\n", strings.Join(targets, ","))
		p.config = filepath.Join(b.dir, p.name+".toml")
		if err := os.WriteFile(p.config, []byte(c.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		b.routers = append(b.routers, p)
	}
	t.Cleanup(b.checkEnd)
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("listening on %s", l.Addr())
	}
	return addr.Port
}

func (p *process) addr() string { return "127.0.0.1:" + strconv.Itoa(p.port) }

// start starts the process; it may serve a little later.
func (p *process) start() {
	p.t.Helper()
	out, err := os.OpenFile(p.config+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(p.program, "-config", p.config)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 0, Gid: p.group}, Pdeathsig: syscall.SIGKILL}
	p.run(func() { err = cmd.Start() })
	if err != nil {
		p.t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	p.mu.Lock()
	p.cmd, p.exited = cmd, exited
	p.mu.Unlock()
	if p.client == nil {
		conn, err := grpcx.Dial(grpcx.ClientConfig{Target: p.addr(), Insecure: true}, grpcx.TLSConfig{})
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { _ = conn.Close() })
		p.client = backendgrpc.NewClient(conn)
	}
}

// signal sends a signal.
func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Error(err)
	}
}

// kill ends the process by SIGKILL and waits for that.
func (p *process) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.mu.Lock()
	exited := p.exited
	p.mu.Unlock()
	if exited != nil {
		<-exited
	}
}

// stop ends the process in order.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGCONT)
	p.signal(syscall.SIGTERM)
	p.mu.Lock()
	exited := p.exited
	p.mu.Unlock()
	if exited == nil {
		return
	}
	select {
	case <-exited:
	case <-time.After(patience):
		p.t.Errorf("%s doesn't stop", p.name)
		p.kill()
	}
}

func (p *process) log() string {
	data, _ := os.ReadFile(p.config + ".log")
	return string(data)
}

// call returns a context for one call.
func call(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// holder returns who holds a host's lease, by the host itself.
func holder(h *lab.Host) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	file := "/run/compute-bridge/replicas/lease"
	if _, err := h.Exec(ctx, "flock", "-n", file, "true"); err == nil {
		return "", nil
	}
	out, err := h.Exec(ctx, "cat", file)
	if err != nil {
		return "", err
	}
	// When it was taken, the replica, and which of its processes.
	fields := strings.Fields(out)
	if len(fields) != 3 {
		return "", fmt.Errorf("%s: the lease says %q", h.Name, out)
	}
	return fields[1], nil
}

// heldBy waits until a worker holds a host.
func (b *bridge) heldBy(h *lab.Host, w *process) {
	b.t.Helper()
	eventually(b.t, func() error {
		name, err := holder(h)
		if err == nil && name != w.name {
			err = fmt.Errorf("%s is held by %q, want %s", h.Name, name, w.name)
		}
		return err
	})
}

// settled waits until each worker has its hosts, finds nothing wrong with any,
// and the routers see the worker.
func (b *bridge) settled() {
	b.t.Helper()
	for i, h := range b.hosts {
		b.heldBy(h, b.workers[i%2])
	}
	for _, w := range b.workers {
		eventually(b.t, func() error {
			c, err := w.client.Capabilities(call(b.t))
			for _, warning := range c.Warnings {
				if !strings.Contains(warning, "held by ") {
					err = errors.Join(err, fmt.Errorf("%s warns: %s", w.name, warning))
				}
			}
			return err
		})
	}
	for _, r := range b.routers {
		eventually(b.t, func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			c, err := r.client.Capabilities(ctx)
			if err == nil && (len(c.Regions) != 1 || c.Regions[0].Free.CPU != backend.Millicores(4000*len(b.hosts))) {
				err = fmt.Errorf("capabilities are %+v", c)
			}
			return err
		})
	}
}

// grant returns a new grant.
func (b *bridge) grant() (backend.Grant, backend.Envelope) {
	var id backend.GrantID
	_, _ = rand.Read(id[:])
	g := backend.Grant{
		ID: id, Image: b.image, PostHash: b.image.Digest.Sum, Shape: backend.Shape{CPU: 500, RAM: 256, Storage: 1}, MinIsolation: backend.IsolationContainer,
		Network: backend.NetworkPolicy{Mode: backend.NetworkOpen}, ValidTo: time.Now().Add(time.Hour).Truncate(time.Microsecond).UTC(),
	}
	return g, backend.Envelope{PostHash: g.PostHash, SSHPublicKey: b.sshKey}
}

// provision makes a grant's instance, by a router.
func (b *bridge) provision(r *process) (backend.Grant, backend.Provisioned) {
	b.t.Helper()
	g, e := b.grant()
	p, err := r.client.Provision(call(b.t), g, e)
	if err != nil {
		b.t.Fatal(err)
	}
	return g, p
}

// end terminates a grant and returns its log.
func (b *bridge) end(r *process, h backend.Handle) backend.ComputeLog {
	b.t.Helper()
	var log *backend.SignedLog
	eventually(b.t, func() error {
		t, err := r.client.Terminate(call(b.t), h)
		if err == nil && (t.State != backend.StateTerminated || t.Log == nil || !t.Log.Log.Final) {
			err = fmt.Errorf("%v", t.State)
		}
		log = t.Log
		return err
	})
	return log.Log
}

// units counts the grants' units on a host.
func units(t *testing.T, h *lab.Host) int {
	t.Helper()
	out, err := h.Exec(call(t), "systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating,deactivating", "cb-replicas-*.service")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "\n")
}

// place returns the index of the host that a receipt names.
func (b *bridge) place(p backend.Provisioned) int {
	b.t.Helper()
	for i, h := range b.hosts {
		if h.Addr.String() == p.Receipt.Host {
			return i
		}
	}
	b.t.Fatalf("no host is %s", p.Receipt.Host)
	return 0
}

// provisionOn makes an instance on a host, however many it takes elsewhere.
func (b *bridge) provisionOn(r *process, host int) backend.Provisioned {
	b.t.Helper()
	for {
		_, p := b.provision(r)
		if b.place(p) == host {
			return p
		}
		defer b.end(r, p.Instance.Handle)
	}
}

// watch watches a grant until its end.
func (b *bridge) watch(r *process, h backend.Handle) (ready chan struct{}, end chan error, log *backend.ComputeLog) {
	ready, end, log = make(chan struct{}), make(chan error, 1), &backend.ComputeLog{}
	once := sync.OnceFunc(func() { close(ready) })
	go func() {
		end <- r.client.WatchUntilExit(call(b.t), h, func(e backend.Event) error {
			once()
			if e.Log != nil {
				*log = e.Log.Log
			}
			return nil
		})
	}()
	return ready, end, log
}

// ended waits for the end of a watch, which must have the same log as the end.
func (b *bridge) ended(end chan error, got *backend.ComputeLog, want backend.ComputeLog) {
	b.t.Helper()
	select {
	case err := <-end:
		if err != nil {
			b.t.Errorf("watch: %v", err)
		} else if got.GrantID != want.GrantID || !got.Final || got.Exit.Reason != want.Exit.Reason || !got.EndedAt.Equal(want.EndedAt) {
			b.t.Errorf("the watch's log is %+v, want %+v", *got, want)
		}
	case <-time.After(patience):
		b.t.Error("the watch doesn't end")
	}
}

// checkEnd stops everything and looks what is left.
func (b *bridge) checkEnd() {
	for _, p := range append(append([]*process(nil), b.routers...), b.workers...) {
		if p.exited != nil {
			p.stop()
		}
		if log := p.log(); strings.Contains(log, "panic") || strings.Contains(log, "DATA RACE") {
			b.t.Errorf("%s panicked", p.name)
		}
		if b.t.Failed() {
			lines := strings.Split(p.log(), "\n")
			b.t.Logf("%s:\n%s", p.name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
		}
	}
	for _, h := range b.hosts {
		if h.IsCutOff() {
			_ = h.Restore(context.Background())
		}
		eventually(b.t, func() error {
			if out, err := h.Exec(context.Background(), "pgrep", "-af", "guest.* lease|/guest/.* lease"); err == nil {
				return fmt.Errorf("%s has a lease although no worker lives: %s", h.Name, out)
			}
			return nil
		})
		left, err := h.Leftovers(context.Background(), "image ")
		if err != nil || len(left) > 0 {
			b.t.Errorf("left on %s: %v, %v", h.Name, left, err)
		}
	}
}

// refused checks that a refusal is clean: nothing was made.
func refused(t *testing.T, err error) {
	t.Helper()
	if !backenderr.Is(err, backenderr.CapacityExhausted, backenderr.WorkerFull) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("want a clean refusal, got %v (%s)", err, backenderr.CreatedOf(err))
	}
}
