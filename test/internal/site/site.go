// Package site runs a bridge on lab hosts as an operator would: the built
// programs as processes, certificates made by `bridgectl certs`, configuration
// files. The demo and the end-to-end tests share it.
package site

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// TrustDomain is that of the certificates, bridgectl's default.
const TrustDomain = "compute-bridge.internal"

// Site is a bridge in a lab's network. Nothing of it is anywhere but in Dir.
type Site struct {
	// Lab is where hosts and processes are.
	Lab *lab.Lab
	// Bin is the directory with the built programs.
	Bin string
	// Dir holds certificates, images, configurations, ledgers, logs.
	Dir string
	// IP is the loopback address of the lab's network on which router and
	// workers listen. Sites of one lab differ in it.
	IP string
}

// Ports on a site's address.
const (
	routerPort        = 7443
	routerMetricsPort = 9463
	firstWorkerPort   = 8443
	firstWorkerMetric = 9464
)

// RouterAddr is where the router listens.
func (s *Site) RouterAddr() string { return s.addr(routerPort) }

// RouterMetrics is where the router serves its metrics.
func (s *Site) RouterMetrics() string { return s.addr(routerMetricsPort) }

func (s *Site) addr(port int) string { return s.IP + ":" + strconv.Itoa(port) }

// Path returns the path of a file of the site.
func (s *Site) Path(elements ...string) string {
	return filepath.Join(append([]string{s.Dir}, elements...)...)
}

// Program returns the path of a built program.
func (s *Site) Program(name string) string { return filepath.Join(s.Bin, name) }

// Identity returns the identity that the certificate of a name shows.
func Identity(name string) string { return "spiffe://" + TrustDomain + "/" + name }

// Environment returns what `bridgectl` and its caller need to act as the
// identity of that name towards the router, as NAME=VALUE.
func (s *Site) Environment(identity string) []string {
	return []string{
		"PATH=" + s.Bin + string(os.PathListSeparator) + os.Getenv("PATH"),
		"XDG_STATE_HOME=" + s.Path("state"),
		"BRIDGECTL_TARGET=" + s.RouterAddr(),
		"BRIDGECTL_IDENTITY=" + s.Path("certs", identity),
	}
}

// Command returns a command in the lab's network, in the site's directory, that
// acts as the identity of that name. The program is one of the site's, or one in
// PATH.
func (s *Site) Command(ctx context.Context, identity, program string, args ...string) *exec.Cmd {
	if own := s.Program(program); isFile(own) {
		program = own
	}
	cmd := s.Lab.Command(ctx, program, args...)
	cmd.Dir = s.Dir
	cmd.Env = append(cmd.Env, s.Environment(identity)...)
	return cmd
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// CertCommands are the arguments of the bridgectl commands that make a
// certificate authority and identities, the roles of which are values.
func (s *Site) CertCommands(names ...[2]string) [][]string {
	commands := [][]string{{"certs", "init", "certs"}}
	for _, n := range names {
		issue := []string{"certs", "issue", "certs", n[0], "--role", n[1]}
		if s.IP != "127.0.0.1" && (n[1] == "router" || n[1] == "reader") {
			issue = append(issue, "--ip", s.IP)
		}
		commands = append(commands, issue)
	}
	return commands
}

// AddImage puts a test image into the image store and returns its digest,
// "sha256:…".
func (s *Site) AddImage(ctx context.Context, kind ociimage.Kind) (string, error) {
	root, err := lab.RootFS(ctx, os.Stderr)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(s.Path("images", "sha256"), 0o755); err != nil {
		return "", err
	}
	temp := s.Path("images", string(kind)+".tar")
	archive, err := ociimage.WriteFile(ctx, temp, kind, ociimage.Options{RootFS: root})
	if err != nil {
		return "", err
	}
	return "sha256:" + archive.SHA256, os.Rename(temp, s.Path("images", "sha256", archive.SHA256))
}

// Client is somebody who may call.
type Client struct {
	Identity, Role string
	Router         bool
}

// Host is a host as a worker's configuration has it.
type Host struct {
	*lab.Host
	// CPUMillicores and MaxInstances are what is sold of it; 4000 and 20 when
	// zero.
	CPUMillicores, MaxInstances int
	// Tap, if not nil, is what the worker reaches in place of the host's sshd.
	Tap Tap
	// Ports is the range of the grants' ports; empty means the default.
	Ports string
}

// Tap stands in for a host's sshd.
type Tap interface {
	Addr() string
	HostKeyLine() string
}

// Worker is a bare-metal worker.
type Worker struct {
	site *Site
	// Name is the backend's, the process's and the certificate's.
	Name  string
	index int
	Hosts []Host
	// Ledger is the [ledger] section; empty means a file in the worker's
	// directory.
	Ledger string
	// Settings are more lines of the [backend] section.
	Settings string
	// Program is the worker's; empty means baremetal-worker.
	Program string
}

// Worker returns the site's worker number index, from 0.
func (s *Site) Worker(name string, index int, hosts ...Host) *Worker {
	return &Worker{site: s, Name: name, index: index, Hosts: hosts}
}

// Addr is where the worker listens.
func (w *Worker) Addr() string { return w.site.addr(firstWorkerPort + w.index) }

// Metrics is where the worker serves its metrics.
func (w *Worker) Metrics() string { return w.site.addr(firstWorkerMetric + w.index) }

// ConfigFile is the worker's configuration.
func (w *Worker) ConfigFile() string { return w.site.Path(w.Name, "worker.toml") }

// Socket is the worker's unix socket.
func (w *Worker) Socket() string { return w.site.Path(w.Name, "worker.sock") }

// Frame returns the text of the configuration without the backend's sections: what
// every worker has.
func (w *Worker) Frame(bridgeID string, clients ...Client) string {
	var b strings.Builder
	fmt.Fprintf(&b, `bridge_id = %q
name = %q
secret_file = "worker.secret"
metrics_address = %q

[ledger]
%s

[sweep]
interval = "2s"
orphan_age = "10s"

[tls]
cert_file = "../certs/%s/cert.pem"
key_file = "../certs/%s/key.pem"
ca_file = "../certs/%s/ca.pem"

[[listen]]
address = %q

[[listen]]
address = "unix:%s"
`, bridgeID, w.Name, w.Metrics(), cmp.Or(strings.TrimSpace(w.Ledger), `path = "ledger.db"`), w.Name, w.Name, w.Name, w.Addr(), w.Socket())
	writeClients(&b, clients)
	return b.String()
}

// Config returns the text of the configuration.
func (w *Worker) Config(bridgeID string, clients ...Client) string {
	var b strings.Builder
	b.WriteString(w.Frame(bridgeID, clients...))
	fmt.Fprintf(&b, `
[backend]
guest_binary = %q
stop_grace = "3s"
%s
[backend.image_store]
base = %q
`, w.site.Program("guest"), w.Settings, w.site.Path("images"))
	for _, h := range w.Hosts {
		cpu, most := h.CPUMillicores, h.MaxInstances
		if cpu == 0 {
			cpu = 4000
		}
		if most == 0 {
			most = 20
		}
		addr, hostKey := net.JoinHostPort(h.Addr.String(), strconv.Itoa(h.SSHPort)), h.HostKeyLine()
		if h.Tap != nil {
			addr, hostKey = h.Tap.Addr(), h.Tap.HostKeyLine()
		}
		fmt.Fprintf(&b, `
[[backend.host]]
name = %q
address = %q
public_host = %q
key_file = %q
host_keys = [%q]
region = "lab"
cpu_millicores = %d
ram_mib = 4096
storage_gib = 40
max_instances = %d
`, h.Name, addr, h.Addr, h.UserKeyFile, hostKey, cpu, most)
		if h.Ports != "" {
			fmt.Fprintf(&b, "ports = %q\n", h.Ports)
		}
	}
	return b.String()
}

func writeClients(b *strings.Builder, clients []Client) {
	for _, c := range clients {
		fmt.Fprintf(b, "\n[[client]]\nidentity = %q\nrole = %q\n", c.Identity, c.Role)
		if c.Router {
			b.WriteString("router = true\n")
		}
	}
}

// WriteConfig writes the configuration and its directory.
func (w *Worker) WriteConfig(text string) error { return writeConfig(w.ConfigFile(), text) }

func writeConfig(file, text string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(text), 0o600)
}

// RouterConfigFile is the router's configuration.
func (s *Site) RouterConfigFile() string { return s.Path("router", "router.toml") }

// RouterSocket is the router's unix socket.
func (s *Site) RouterSocket() string { return s.Path("router", "router.sock") }

// RouterConfig returns the text of the router's configuration, with the workers
// in this order.
func (s *Site) RouterConfig(bridgeID string, clients []Client, workers ...*Worker) string {
	var b strings.Builder
	fmt.Fprintf(&b, `bridge_id = %q
metrics_address = %q

[ledger]
path = "router.db"

[tls]
cert_file = "../certs/router/cert.pem"
key_file = "../certs/router/key.pem"
ca_file = "../certs/router/ca.pem"

[[listen]]
address = %q

[[listen]]
address = "unix:%s"
`, bridgeID, s.RouterMetrics(), s.RouterAddr(), s.RouterSocket())
	writeClients(&b, clients)
	for _, w := range workers {
		fmt.Fprintf(&b, `
[[backend]]
name = %q
target = %q
poll_interval = "1s"
`, w.Name, w.Addr())
	}
	return b.String()
}

// WriteRouterConfig writes the router's configuration and its directory.
func (s *Site) WriteRouterConfig(text string) error { return writeConfig(s.RouterConfigFile(), text) }

// StartWorker starts a worker's process and waits until it serves.
func (s *Site) StartWorker(ctx context.Context, w *Worker) (*Process, error) {
	return s.serve(ctx, w.Name, cmp.Or(w.Program, "baremetal-worker"), w.ConfigFile())
}

// StartRouter starts the router's process and waits until it serves.
func (s *Site) StartRouter(ctx context.Context) (*Process, error) {
	return s.serve(ctx, "router", "router", s.RouterConfigFile())
}

func (s *Site) serve(ctx context.Context, name, program, config string) (*Process, error) {
	p, err := s.Start(ctx, name, program, "-config", config)
	if err != nil {
		return nil, err
	}
	if err := s.waitHealthy(ctx, p, program, config); err != nil {
		_ = p.Kill() // It is of no use.
		return nil, err
	}
	return p, nil
}
