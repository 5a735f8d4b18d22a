package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/test/internal/site"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// What is wrong with a configuration is said at once, by key, and nothing
// starts.
func TestBadBoots(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	b := newSite(t, site.Host{Host: host})
	worker, router := b.workerConfig(b.workers[0]), b.routerConfig()
	replace := func(text, old, with string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("no %q in the configuration:\n%s", old, text)
		}
		return strings.Replace(text, old, with, 1)
	}
	lineOf := func(text, part string) int { return 1 + strings.Count(text[:strings.Index(text, part)], "\n") }
	taken, err := net.Listen("tcp", b.IP+":7999")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	b.write(b.Path("certs", "garbage.pem"), "this is no certificate\n")
	b.sshKey("other")
	otherKey := strings.Join(strings.Fields(b.read("other.pub"))[:2], " ")

	type boot struct {
		program, config string
		want            []string
		// checks says that -check-config finds it too.
		checks bool
	}
	unknownWorker := replace(worker, "stop_grace =", "stop_grease =")
	unknownRouter := replace(router, "metrics_address =", "metric_address =")
	noBackend, _, _ := strings.Cut(router, "\n[[backend]]")
	noHost, _, _ := strings.Cut(worker, "\n[[backend.host]]")
	beforeClients, _, _ := strings.Cut(worker, "\n[[client]]")
	_, driver, _ := strings.Cut(worker, "\n[backend]")
	for name, c := range map[string]boot{
		"worker, unknown key": {"baremetal-worker", unknownWorker, []string{fmt.Sprintf("bad.toml:%d:", lineOf(unknownWorker, "stop_grease")), "stop_grease"}, true},
		"router, unknown key": {"router", unknownRouter, []string{fmt.Sprintf("bad.toml:%d:", lineOf(unknownRouter, "metric_address")), "metric_address"}, true},
		"worker, no TOML":     {"baremetal-worker", "bridge_id = ", []string{"bad.toml:1:"}, true},
		"router, no backend":  {"router", noBackend, []string{"backend", "no [[backend]] section"}, true},
		"worker, no host":     {"baremetal-worker", noHost, []string{"backend.host", "no [[backend.host]] section"}, true},
		"worker, no client":   {"baremetal-worker", beforeClients + "\n[backend]" + driver, []string{"client: no [[client]] section"}, true},
		"worker, no certificate": {
			"baremetal-worker", replace(worker, "certs/metal1/cert.pem", "certs/metal1/nowhere.pem"),
			[]string{"tls.cert_file", "nowhere.pem", "no such file"},
			true,
		},
		"router, bad certificate": {"router", replace(router, "certs/router/cert.pem", "certs/garbage.pem"), []string{"tls", "garbage.pem"}, true},
		"router, bad authority":   {"router", replace(router, "certs/router/ca.pem", "certs/garbage.pem"), []string{"tls", "garbage.pem"}, true},
		"router, another's key":   {"router", replace(router, "certs/router/key.pem", "certs/metal1/key.pem"), []string{"tls", "private key does not match"}, true},
		"worker, TLS left out":    {"baremetal-worker", replace(worker, "[tls]\ncert_file = \"../certs/metal1/cert.pem\"\n", "[tls]\n"), []string{"tls.cert_file: missing"}, true},
		"worker, plaintext beyond loopback": {
			"baremetal-worker", replace(worker, fmt.Sprintf("address = %q\n", b.workers[0].Addr()), "address = \"10.77.0.1:8443\"\ninsecure = true\n"),
			[]string{"listen[0].insecure", "loopback"},
			true,
		},
		"worker, unpinned host key": {
			"baremetal-worker", replace(worker, fmt.Sprintf("host_keys = [%q]\n", host.HostKeyLine()), ""),
			[]string{"backend.host[0].host_keys", "pinned"},
			true,
		},
		"worker, malformed host key": {
			"baremetal-worker", replace(worker, host.HostKeyLine(), "ssh-ed25519 AAAA"), []string{"backend.host[0].host_keys[0]"}, true,
		},
		"worker, another host key": {
			"baremetal-worker", replace(worker, host.HostKeyLine(), otherKey), []string{host.Name, "host key"}, false,
		},
		"worker, a host that isn't there": {
			"baremetal-worker",
			replace(replace(worker, host.Addr.String()+":", "10.77.99.99:"), "[backend]\n", "[backend]\nconnect_timeout = \"1s\"\n"),
			[]string{host.Name},
			false,
		},
		"worker, port taken": {"baremetal-worker", replace(worker, fmt.Sprintf("%q", b.workers[0].Addr()), fmt.Sprintf("%q", taken.Addr())), []string{"listen[0]", "address already in use"}, false},
		"router, port taken": {"router", replace(router, fmt.Sprintf("%q", b.RouterAddr()), fmt.Sprintf("%q", taken.Addr())), []string{"listen[0]", "address already in use"}, false},
		"router, metrics port taken": {
			"router", replace(router, fmt.Sprintf("%q", b.RouterMetrics()), fmt.Sprintf("%q", taken.Addr())), []string{"metrics_address", "address already in use"}, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := b.in(t)
			file := b.Path("metal1", "bad.toml")
			b.write(file, c.config)
			r := b.run(b.cmd(operator, c.program, "-config", file))
			b.saysAll(r, 1, c.want)
			r = b.run(b.cmd(operator, c.program, "-config", file, "-check-config"))
			if c.checks {
				b.saysAll(r, 1, c.want)
			} else if r.code != 0 || !strings.Contains(r.stdout, "valid") {
				t.Errorf("-check-config: %s", r.all())
			}
		})
	}
}

// saysAll fails the test unless a command had this code and said these texts.
func (b *bridge) saysAll(r result, code int, texts []string) {
	b.t.Helper()
	if r.code != code {
		b.t.Errorf("want exit code %d, got %s", code, r.all())
	}
	for _, text := range texts {
		if !strings.Contains(r.stderr, text) {
			b.t.Errorf("it doesn't say %q: %s", text, r.all())
		}
	}
}

// The command line that operators and container platforms use.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	for program, config := range map[string]string{"router": b.RouterConfigFile(), "baremetal-worker": b.workers[0].ConfigFile()} {
		b.says(b.run(b.cmd(operator, program, "-config", config, "-check-config")), 0, "valid")
		b.says(b.run(b.cmd(operator, program, "-config", config, "-healthcheck")), 0, "")
		b.says(b.run(b.cmd(operator, program, "-version")), 0, "^"+program+" ")
		b.says(b.run(b.cmd(operator, program, "-no-such-flag")), 2, "no-such-flag")
		b.says(b.run(b.cmd(operator, program, "-config", b.Path("nowhere.toml"))), 1, "nowhere.toml")
	}
	stopped := map[string]string{"router": b.RouterConfigFile(), "baremetal-worker": b.workers[0].ConfigFile()}
	if code, err := b.router.Stop(t.Context()); code != 0 || err != nil {
		t.Errorf("router: exit code %d, %v", code, err)
	}
	if code, err := b.processes[b.workers[0].Name].Stop(t.Context()); code != 0 || err != nil {
		t.Errorf("worker: exit code %d, %v", code, err)
	}
	for program, config := range stopped {
		b.says(b.run(b.cmd(operator, program, "-config", config, "-healthcheck")), 1, program)
	}
	// Sockets don't outlive their processes.
	for _, socket := range []string{b.RouterSocket(), b.workers[0].Socket()} {
		if _, err := os.Stat(socket); !os.IsNotExist(err) {
			t.Errorf("%s: %v", filepath.Base(socket), err)
		}
	}
}

// With lenient_boot a worker starts without its hosts, which join when they
// come.
func TestALenientBoot(t *testing.T) {
	t.Parallel()
	host := lab.NewHost(t, lab.HostOptions{})
	b := newSite(t, site.Host{Host: host})
	text := strings.Replace(b.workerConfig(b.workers[0]), "[backend]\n", "[backend]\nlenient_boot = true\nconnect_timeout = \"2s\"\n", 1)
	b.write(b.workers[0].ConfigFile(), text)
	if err := host.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.checkEnd)
	b.startWorker(b.workers[0])
	b.startRouter()
	if card := b.ok(market, "card"); !strings.Contains(card, host.Name) {
		t.Errorf("the card has no warning about %s:\n%s", host.Name, card)
	}
	if err := host.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.soon("the host has joined", func() error {
		var answer struct {
			Card struct {
				Capabilities struct {
					Warnings []string `json:"warnings"`
					Regions  []any    `json:"regions"`
				} `json:"capabilities"`
			} `json:"card"`
		}
		b.json(&answer, market, "card")
		if c := answer.Card.Capabilities; len(c.Warnings) > 0 || len(c.Regions) != 1 {
			return fmt.Errorf("card: %+v", answer)
		}
		return nil
	})
}
