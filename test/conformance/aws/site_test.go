package aws

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2fixture"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/internal/suite"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

const (
	bridgeID = "suite"
	// workerName is the backend's name and the process's.
	workerName = "aws"
	region     = "eu-central-1"
	// room is how many grants fit at once.
	room = 4
	// speed is how many times faster than the real one the cloud is.
	speed = 500
	// patience is how long a busy machine with two cores may take for what takes
	// a second on an idle one.
	patience = 90 * time.Second
	// usageInterval is how often the suite's watches report usage.
	usageInterval = 200 * time.Millisecond
)

// suiteShape is what a grant of the suite takes: a small type.
var suiteShape = backend.Shape{CPU: 500, RAM: 256, Storage: 1}

// ground is what bridges stand on: programs, and files that no process writes.
type ground struct {
	site *site.Site
	// postgres has the ledgers; if it is nil, they are files.
	postgres *pgtest.Server
	// orphanAge is how long after its beginning the worker by itself undoes what
	// was cut off; 0 means so late that no case sees it, so that it can't hide
	// what a retry should have done.
	orphanAge time.Duration

	mu sync.Mutex
	n  byte // of bridges, for addresses of their own
}

// newGround makes certificates for processes.
func newGround(t *testing.T, postgres *pgtest.Server) *ground {
	t.Helper()
	l, err := lab.Current()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(filepath.Join("..", "..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"aws-worker", "bridgectl"} {
		if _, err := os.Stat(filepath.Join(root, "bin", program)); err != nil {
			t.Fatalf("run make build first: %v", err)
		}
	}
	g := &ground{postgres: postgres, site: &site.Site{Lab: l, Bin: filepath.Join(root, "bin"), Dir: t.TempDir(), IP: "127.0.0.1"}}
	commands := g.site.CertCommands(suite.Identities()...)
	issue := []string{"certs", "issue", "certs", workerName, "--role", "reader"}
	for n := range byte(maxBridges) {
		issue = append(issue, "--ip", address(n))
	}
	for _, args := range append(commands, issue) {
		if out, err := g.site.Command(t.Context(), "", "bridgectl", args...).CombinedOutput(); err != nil {
			t.Fatalf("bridgectl %v: %v\n%s", args, err, out)
		}
	}
	return g
}

// maxBridges is how many bridges there may be at a time.
const maxBridges = 8

// address is where the processes of a bridge listen: the lab's network namespace
// has all of 127.0.0.0/8.
func address(n byte) string { return fmt.Sprintf("127.3.0.%d", n+1) }

// bridge is a worker as a process of the built program: a case's fixture. Nothing
// is started before the fixture is asked for.
type bridge struct {
	*site.Site
	ground *ground
	cloud  *ec2fixture.Site
	worker *site.Worker
	login  string   // the requester's key
	known  []string // files that are there by design, beside the worker's own

	mu      sync.Mutex // protects what follows
	process *site.Process
	conns   []*grpc.ClientConn
}

// newBridge writes the files of a bridge with an empty ledger and a cloud of its
// own.
func (g *ground) newBridge(t testing.TB) *bridge {
	t.Helper()
	g.mu.Lock()
	ip := address(g.n % maxBridges)
	g.n++
	g.mu.Unlock()
	b := &bridge{
		Site:   &site.Site{Lab: g.site.Lab, Bin: g.site.Bin, Dir: t.TempDir(), IP: ip},
		ground: g, login: backendtest.NewLogin(t),
	}
	b.worker = b.Worker(workerName, 0)
	var points *ledgertest.Points
	if g.postgres != nil {
		tap := pgtest.NewTap(t, g.postgres)
		points, b.worker.Ledger = tap.Points, fmt.Sprintf("driver = \"postgres\"\ndsn = %q\n", tap.DSN(g.postgres.Database(t)))
	}
	b.cloud = ec2fixture.Open(t, ec2fixture.Options{
		BridgeID: bridgeID, Backend: workerName, Region: region, Speed: speed, Ledger: points,
		Kill: func() {
			if err := b.kill(); err != nil {
				t.Errorf("kill the worker: %v", err)
			}
		},
	})
	if err := os.Symlink(g.site.Path("certs"), b.Path("certs")); err != nil {
		t.Fatal(err)
	}
	if err := b.worker.WriteConfig(b.config(b.worker)); err != nil {
		t.Fatal(err)
	}
	credentials := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", b.cloud.AccessKey, b.cloud.SecretKey)
	if err := os.WriteFile(b.Path(workerName, "credentials"), []byte(credentials), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.end(t) })
	return b
}

// config is the text of a worker's configuration.
func (b *bridge) config(w *site.Worker) string {
	text := w.Frame(bridgeID, suite.Clients()...)
	sweep := strings.NewReplacer(`interval = "2s"`, `interval = "500ms"`, `orphan_age = "10s"`, fmt.Sprintf("orphan_age = %q", cmp.Or(b.ground.orphanAge, time.Hour)))
	return sweep.Replace(text) + fmt.Sprintf(`
[backend]
credentials_file = "credentials"
endpoint = %q
instance_families = ["t3"]
max_concurrent_instances = %d
boot_timeout = "20s"
undo_timeout = "5s"
poll_interval = "10ms"
usage_interval = %q
visibility_delay = "50ms"
metrics_timeout = "1s"
stock_out_memory = "1ms" # or a retry is refused what a fault has refused

[[backend.api_limit]] # the cloud has none either: the suite would mostly wait for them
action = "*"
burst = 10000
per_second = 10000

[[backend.region]]
name = %q
image.ssm_parameter = %q

[backend.guest.amd64]
file = %q
url = %q

[backend.image_store]
base = %q
`, b.cloud.Endpoint, room, usageInterval, region, b.cloud.ImageParameter, b.cloud.GuestFile, b.cloud.GuestURL, b.cloud.StoreBase)
}

// start starts the process, unless it runs, and connects to it as everyone whom
// the suite plays.
func (b *bridge) start(ctx context.Context) (backend.Backend, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if b.process == nil || !b.process.Running() {
		p, err := suite.Serve(ctx, b.Site, workerName, "aws-worker", b.worker.ConfigFile(), b.worker.Addr())
		if p != nil {
			b.process = p
		}
		if err != nil {
			return nil, err
		}
	}
	all, err := suite.Dial(b.Site, b.worker.Addr(), &b.conns)
	if err != nil {
		return nil, err
	}
	running := []*site.Process{b.process}
	return all, suite.Soon(ctx, func() error { return suite.AllIsWell(ctx, all, running) })
}

// kill kills the process with SIGKILL.
func (b *bridge) kill() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.process == nil || !b.process.Running() {
		return nil
	}
	return b.process.Kill()
}

// logs returns all that the process has printed.
func (b *bridge) logs() []byte {
	text, _ := os.ReadFile(b.Path(workerName + ".log")) // There may be none yet.
	return text
}

// end stops the process in good order and looks at what it leaves in the cloud
// and in the bridge's directory.
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
	if b.process != nil && b.process.Running() {
		if code, err := b.process.Stop(ctx); err != nil || code != 0 {
			t.Errorf("exit code %d after SIGTERM, %v", code, errors.Join(err, b.process.Kill()))
		}
	}
	b.cloud.CheckNothingIsLeft(t)
	if t.Failed() {
		t.Logf("the process's log:\n%s", b.logs())
	}
	known := append(b.known, "certs", workerName+".log", workerName+"/worker.toml", workerName+"/worker.secret", workerName+"/ledger.db", workerName+"/credentials")
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
		Capacity:      room,
		ShortestLife:  4 * time.Second,
		Patience:      patience,
		UsageInterval: usageInterval,
		OrphanAge:     b.ground.orphanAge,
		Logs:          b.logs,
		Satisfiable: func() (backend.Grant, backend.Envelope) {
			return backendtest.NewGrant(b.cloud.Image, suiteShape, b.login)
		},
		CloseGrant: b.closeGrant,
		Kill: func() {
			if err := b.kill(); err != nil {
				t.Errorf("kill: %v", err)
			}
		},
	}
	f.Reopen = func(t testing.TB) (backend.Backend, error) {
		t.Helper()
		f.Kill()
		return b.start(t.Context())
	}
	b.cloud.Fill(t, f)
	f.Unsatisfiable = func() (backend.Grant, backend.Envelope) {
		g, envelope := f.Satisfiable()
		g.Shape.CPU = 64000 // more than any t3 has
		return g, envelope
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
