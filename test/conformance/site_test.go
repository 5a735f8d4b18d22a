package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/pgtest"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/internal/suite"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/hostfixture"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

const (
	bridgeID = "suite"
	// workerName is the backend's name and the process's. A router is called
	// like its bridge; the suite wants instances to have the name of the backend
	// that it asked.
	workerName = bridgeID
	// patience is how long a busy machine with two cores may take for what takes
	// a second on an idle one.
	patience = 90 * time.Second
	// usageInterval is how often the suite's watches report usage.
	usageInterval = 200 * time.Millisecond
)

// suiteShape is what a grant of the suite takes, suiteRoom how many of them fit
// on each host. CPU is what there is little of.
var (
	suiteShape = backend.Shape{CPU: 500, RAM: 128, Storage: 1}
	suiteRoom  = []int{2, 1}
)

// processes are the identities of the processes, with what their certificates are
// for.
var processes = [][2]string{{workerName, "reader"}, {"router", "router"}}

// ground is what bridges stand on, one at a time: hosts, an address, and files
// that no process writes.
type ground struct {
	hosts []*lab.Host
	// site has the certificates and images.
	site  *site.Site
	image backend.Image
	// postgres has the ledgers; if it is nil, they are files.
	postgres *pgtest.Server
	// orphanAge is how long after its beginning the worker by itself undoes what
	// was cut off; 0 means so late that no case sees it, so that it can't hide
	// what a retry should have done.
	orphanAge time.Duration
}

// grounds counts them, for addresses of their own.
var grounds struct {
	sync.Mutex
	n byte
}

// newGround boots hosts and makes certificates for processes on them.
func newGround(t *testing.T) *ground {
	t.Helper()
	l, err := lab.Current()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"router", "baremetal-worker", "bridgectl", "guest"} {
		if _, err := os.Stat(filepath.Join(root, "bin", program)); err != nil {
			t.Fatalf("run make build first: %v", err)
		}
	}
	grounds.Lock()
	grounds.n++
	ip := fmt.Sprintf("127.2.0.%d", grounds.n)
	grounds.Unlock()
	g := &ground{site: &site.Site{Lab: l, Bin: filepath.Join(root, "bin"), Dir: t.TempDir(), IP: ip}}
	for _, args := range g.site.CertCommands(append(suite.Identities(), processes...)...) {
		if out, err := g.site.Command(t.Context(), "", "bridgectl", args...).CombinedOutput(); err != nil {
			t.Fatalf("bridgectl %v: %v\n%s", args, err, out)
		}
	}
	digest, err := g.site.AddImage(t.Context(), ociimage.Shell)
	if err != nil {
		t.Fatal(err)
	}
	g.image.Kind = backend.ImageOCIArchive
	if g.image.Digest, err = backend.ParseDigest(digest); err != nil {
		t.Fatal(err)
	}
	for range suiteRoom {
		h := lab.NewHost(t, lab.HostOptions{})
		g.hosts = append(g.hosts, h)
	}
	// Runs before the hosts are destroyed.
	t.Cleanup(func() { (&hostfixture.Site{BridgeID: bridgeID, Hosts: g.hosts}).CheckNothingIsLeft(t) })
	return g
}

// newGrounds returns grounds that nothing stands on.
func newGrounds(t *testing.T, n int, postgres *pgtest.Server) chan *ground {
	t.Helper()
	free := make(chan *ground, n)
	for range n {
		g := newGround(t)
		g.postgres = postgres
		free <- g
	}
	return free
}

// take takes a ground until the end of t.
func take(t testing.TB, free chan *ground) *ground {
	t.Helper()
	select {
	case g := <-free:
		t.Cleanup(func() { free <- g })
		return g
	default:
		t.Fatal("more fixtures at a time than there are hosts for")
		return nil
	}
}

// bridge is a worker, and a router before it if wanted, as processes of the
// built programs: a case's fixture. Nothing is started before the fixture is
// asked for.
type bridge struct {
	*site.Site
	ground *ground
	hosts  *hostfixture.Site
	wires  *hostfixture.Wires // between the worker and its hosts
	worker *site.Worker
	ledger *ledgertest.Points // where the worker's calls to PostgreSQL pass
	routed bool               // A router is before the worker.
	login  string             // the requester's key

	mu        sync.Mutex // protects what follows
	processes []*site.Process
	conns     []*grpc.ClientConn
	client    backend.Backend // of those that run
}

// newBridge writes the files of a bridge with an empty ledger.
func newBridge(t testing.TB, g *ground) *bridge {
	t.Helper()
	b := &bridge{
		Site:   &site.Site{Lab: g.site.Lab, Bin: g.site.Bin, Dir: t.TempDir(), IP: g.site.IP},
		ground: g, login: backendtest.NewLogin(t),
	}
	b.hosts = &hostfixture.Site{BridgeID: bridgeID, Hosts: g.hosts, Patience: patience, Usable: b.usable}
	for _, shared := range []string{"certs", "images"} {
		if err := os.Symlink(g.site.Path(shared), b.Path(shared)); err != nil {
			t.Fatal(err)
		}
	}
	b.worker = b.Worker(workerName, 0)
	b.ledger, b.worker.Ledger = g.ledger(t)
	b.wires = hostfixture.NewWires(b.ledger, func() {
		if err := b.kill(workerName); err != nil {
			t.Errorf("kill the worker: %v", err)
		}
	})
	for i, tap := range b.wires.Open(t, g.hosts...) {
		b.worker.Hosts = append(b.worker.Hosts, site.Host{Host: g.hosts[i], Tap: tap, Ports: hostfixture.Ports, CPUMillicores: suiteRoom[i] * int(suiteShape.CPU)})
	}
	b.worker.Settings = fmt.Sprintf("usage_interval = %q\n", usageInterval)
	sweep := strings.NewReplacer(`interval = "2s"`, `interval = "500ms"`, `orphan_age = "10s"`, fmt.Sprintf("orphan_age = %q", cmp.Or(g.orphanAge, time.Hour)))
	router := site.Client{Identity: site.Identity("router"), Role: "reader", Router: true}
	if err := b.worker.WriteConfig(sweep.Replace(b.worker.Config(bridgeID, append(suite.Clients(), router)...))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.end(t) })
	return b
}

// ledger makes an empty ledger. It returns where calls to it pass, unless it is a
// file, and what a configuration says of it.
func (g *ground) ledger(t testing.TB) (calls *ledgertest.Points, section string) {
	t.Helper()
	if g.postgres == nil {
		return nil, ""
	}
	tap := pgtest.NewTap(t, g.postgres)
	return tap.Points, fmt.Sprintf("driver = \"postgres\"\ndsn = %q\n", tap.DSN(g.postgres.Database(t)))
}

// routeTo puts a router before the worker, which it reaches at an address. It
// returns where the router's calls to its ledger pass, unless that is a file.
func (b *bridge) routeTo(t testing.TB, addr string) *ledgertest.Points {
	t.Helper()
	b.routed = true
	text := strings.Replace(b.RouterConfig(bridgeID, suite.Clients(), b.worker), b.worker.Addr(), addr, 1)
	calls, section := b.ground.ledger(t)
	if calls != nil {
		text = strings.Replace(text, `path = "router.db"`, section, 1)
	}
	if err := b.WriteRouterConfig(text); err != nil {
		t.Fatal(err)
	}
	return calls
}

// start starts the processes, those that don't run, and connects to them as
// everyone whom the suite plays.
func (b *bridge) start(ctx context.Context) (backend.Backend, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	addr := b.worker.Addr()
	if err := b.serve(ctx, workerName, "baremetal-worker", b.worker.ConfigFile(), addr); err != nil {
		return nil, err
	}
	if b.routed {
		addr = b.RouterAddr()
		if err := b.serve(ctx, "router", "router", b.RouterConfigFile(), addr); err != nil {
			return nil, err
		}
	}
	all, err := suite.Dial(b.Site, addr, &b.conns)
	if err != nil {
		return nil, err
	}
	b.client = all
	// A new router has yet to hear from its worker.
	running := b.running()
	return all, suite.Soon(ctx, func() error { return suite.AllIsWell(ctx, all, running) })
}

// serve starts a process, unless it runs already, and waits until it takes
// calls, which programs do last.
func (b *bridge) serve(ctx context.Context, name, program, file, addr string) error {
	if slices.ContainsFunc(b.running(), func(p *site.Process) bool { return p.Name == name }) {
		return nil
	}
	p, err := suite.Serve(ctx, b.Site, name, program, file, addr)
	if p != nil {
		b.processes = append(b.processes, p)
	}
	return err
}

// kill kills the named processes, or all, with SIGKILL.
func (b *bridge) kill(names ...string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, p := range b.running() {
		if len(names) == 0 || slices.Contains(names, p.Name) {
			errs = append(errs, p.Kill())
		}
	}
	return errors.Join(errs...)
}

// usable waits until the worker, if it runs, can use its hosts.
func (b *bridge) usable(ctx context.Context) error {
	b.mu.Lock()
	client, running := b.client, b.running()
	b.mu.Unlock()
	for _, p := range running {
		if p.Name == workerName {
			return suite.Soon(ctx, func() error { return suite.AllIsWell(ctx, client, running) })
		}
	}
	return nil
}

// running returns the processes that run. The caller holds b.mu.
func (b *bridge) running() []*site.Process {
	return slices.DeleteFunc(slices.Clone(b.processes), func(p *site.Process) bool { return !p.Running() })
}

// logs returns all that the processes have printed.
func (b *bridge) logs() []byte {
	var all []byte
	for _, name := range []string{workerName, "router"} {
		text, _ := os.ReadFile(b.Path(name + ".log")) // There may be no router.
		all = append(all, text...)
	}
	return all
}

// end stops the processes in good order and looks at what they leave in the
// bridge's directory.
func (b *bridge) end(t testing.TB) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	for _, conn := range b.conns {
		if err := conn.Close(); err != nil {
			t.Errorf("close a connection: %v", err)
		}
	}
	running := b.running()
	slices.Reverse(running) // routers first
	for _, p := range running {
		if code, err := p.Stop(ctx); err != nil || code != 0 {
			t.Errorf("%s: exit code %d after SIGTERM, %v", p.Name, code, errors.Join(err, p.Kill()))
		}
	}
	if t.Failed() {
		t.Logf("the processes' logs:\n%s", b.logs())
	}
	own := []string{workerName + ".log", workerName + "/worker.toml", workerName + "/worker.secret", workerName + "/ledger.db"}
	known := append(own, "certs", "images", "router.log", "router/router.toml", "router/router.db")
	suite.CheckFiles(t, b.Dir, known...)
}

// fixture starts the bridge.
func (b *bridge) fixture(t testing.TB) *backendtest.Fixture {
	t.Helper()
	all, err := b.start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := &backendtest.Fixture{
		Backend:       all,
		ShortestLife:  2 * time.Second,
		Patience:      patience,
		UsageInterval: usageInterval,
		Measures:      true,
		Logs:          b.logs,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			return backendtest.NewGrant(b.ground.image, suiteShape, b.login)
		},
		OrphanAge:  b.ground.orphanAge,
		CloseGrant: b.closeGrant,
	}
	b.dies(t, f)
	b.hosts.Fill(t, f)
	b.wires.Fill(t, b.hosts, f)
	for _, n := range suiteRoom {
		f.Capacity += n
	}
	f.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := f.Satisfiable()
		g.Shape = suiteShape.Times(3) // more than any one host has
		return g, envelope
	}
	if b.routed {
		f.Handle = func(id backend.GrantID) backend.Handle { return backend.HandleFor(id).Via(workerName) }
	}
	return f
}

// closeGrant closes a grant in the worker's ledger, which is a file.
func (b *bridge) closeGrant(ctx context.Context, id backend.GrantID) error {
	if b.ground.postgres != nil {
		return errors.New("the worker's ledger is no file")
	}
	l, err := ledger.Open(ctx, ledger.Config{Path: b.Path(workerName, "ledger.db"), Existing: true})
	if err != nil {
		return err
	}
	return errors.Join(ledgertest.CloseGrant(ctx, l, ledger.RequestID(id), backend.EndTerminated.String()), l.Close())
}

// dies has the named processes die, or all, when the suite says so, and start
// again.
func (b *bridge) dies(t testing.TB, f *backendtest.Fixture, names ...string) {
	t.Helper()
	f.Kill = func() {
		if err := b.kill(names...); err != nil {
			t.Errorf("kill: %v", err)
		}
	}
	f.Reopen = func(t testing.TB) (backend.Backend, error) {
		t.Helper()
		f.Kill()
		return b.start(t.Context())
	}
}
