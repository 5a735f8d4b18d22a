package e2e

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// grpcurl prepares a call: over mTLS as an identity, or plaintext without one.
func (b *bridge) grpcurl(identity string, args ...string) *exec.Cmd {
	b.t.Helper()
	flags := []string{"-plaintext"}
	if identity != "" {
		flags = []string{"-cacert", "certs/ca.pem", "-cert", "certs/" + identity + "/cert.pem", "-key", "certs/" + identity + "/key.pem"}
	}
	return b.grpcurlWith(append(flags, args...)...)
}

// grpcurlWith prepares a run of the pinned grpcurl.
func (b *bridge) grpcurlWith(args ...string) *exec.Cmd {
	b.t.Helper()
	program, err := filepath.Abs(filepath.Join("..", "..", ".bin", "grpcurl"))
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		b.t.Fatalf("run make test, or make tools: %v", err)
	}
	return b.cmd(market, program, args...)
}

// curl runs a call that must succeed and returns the answer.
func (b *bridge) curl(identity string, args ...string) string {
	b.t.Helper()
	r := b.run(b.grpcurl(identity, args...))
	if r.code != 0 {
		b.t.Fatalf("grpcurl %v: %s", args, r.all())
	}
	return r.stdout
}

// The contract can be used with grpcurl alone: on the router and on the worker,
// over mTLS and over their unix sockets.
func TestGrpcurlNeedsNoMoreThanReflection(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	worker := b.workers[0]
	for name, target := range map[string]struct {
		identity string
		address  []string
		services []string
	}{
		"router":            {market, []string{b.RouterAddr()}, []string{"BackendService", "InventoryService", "FleetService", "OperatorService"}},
		"router's socket":   {"", []string{"-unix", b.RouterSocket()}, []string{"BackendService", "InventoryService", "FleetService"}},
		"worker":            {operator, []string{worker.Addr()}, []string{"BackendService", "InventoryService", "OperatorService"}},
		"worker's socket":   {"", []string{"-unix", worker.Socket()}, []string{"BackendService", "InventoryService", "OperatorService"}},
		"router, a reader":  {reader, []string{b.RouterAddr()}, []string{"BackendService"}},
		"router's operator": {operator, []string{b.RouterAddr()}, []string{"BackendService"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := b.in(t)
			list := b.curl(target.identity, append(target.address, "list")...)
			for _, service := range append(target.services, "Health") {
				if !strings.Contains(list, service+"\n") {
					t.Errorf("no %s among:\n%s", service, list)
				}
			}
			if methods := b.curl(target.identity, append(target.address, "list", "computebridge.v1.BackendService")...); strings.Count(methods, "\n") != 6 {
				t.Errorf("not six methods:\n%s", methods)
			}
			if got := b.curl(target.identity, append(target.address, "computebridge.v1.BackendService/Capabilities")...); !strings.Contains(got, `"region": "lab"`) {
				t.Errorf("capabilities:\n%s", got)
			}
			if got := b.curl(target.identity, append(target.address, "describe", "computebridge.v1.Grant")...); !strings.Contains(got, "bytes request_id = 1") {
				t.Errorf("description:\n%s", got)
			}
		})
	}
	for name, target := range map[string]struct {
		identity string
		address  []string
	}{
		"a grant through the router":          {market, []string{b.RouterAddr()}},
		"a grant through the router's socket": {"", []string{"-unix", b.RouterSocket()}},
		"a grant at the worker":               {operator, []string{worker.Addr()}},
		"a grant at the worker's socket":      {"", []string{"-unix", worker.Socket()}},
	} {
		t.Run(name, func(t *testing.T) {
			b := b.in(t)
			b.wholeGrant(target.identity, target.address)
		})
	}
}

// wholeGrant provisions, watches and terminates with grpcurl.
func (b *bridge) wholeGrant(identity string, address []string) {
	b.t.Helper()
	request, err := json.Marshal(b.request())
	if err != nil {
		b.t.Fatal(err)
	}
	call := func(method, data string) []string {
		return append([]string{"-d", data}, append(address, "computebridge.v1.BackendService/"+method)...)
	}
	var made struct {
		Instance struct {
			Handle, State string
		} `json:"instance"`
		Receipt struct {
			Host    string `json:"instanceHost"`
			Port    int    `json:"instancePort"`
			User    string `json:"user"`
			HostKey string `json:"hostKey"`
		} `json:"receipt"`
	}
	if err := json.Unmarshal([]byte(b.curl(identity, call("Provision", string(request))...)), &made); err != nil {
		b.t.Fatal(err)
	}
	var p provisioned
	p.Receipt.Host, p.Receipt.Port, p.Receipt.User, p.Receipt.HostKey = made.Receipt.Host, made.Receipt.Port, made.Receipt.User, made.Receipt.HostKey
	b.says(b.run(b.ssh(p, "requester", nil, "echo logged in")), 0, "logged in")

	handle, err := json.Marshal(map[string]string{"handle": made.Instance.Handle})
	if err != nil {
		b.t.Fatal(err)
	}
	watch := b.startCmd(b.grpcurl(identity, call("WatchUntilExit", string(handle))...))
	b.soon("the watch has begun", func() error { return hasText(watch.output(), "INSTANCE_STATE_READY") })
	if got := b.curl(identity, call("Terminate", string(handle))...); !strings.Contains(got, "INSTANCE_STATE_TERMINATED") || !strings.Contains(got, "computeLog") {
		b.t.Errorf("terminate:\n%s", got)
	}
	if code := watch.wait(); code != 0 || !strings.Contains(watch.output(), "END_REASON_TERMINATED") {
		b.t.Errorf("watch: exit code %d:\n%s", code, watch.output())
	}
}

// request is a ProvisionRequest in Protobuf's JSON, by the contract's own names.
func (b *bridge) request() map[string]any {
	b.t.Helper()
	digest, err := hex.DecodeString(strings.TrimPrefix(b.image, "sha256:"))
	if err != nil {
		b.t.Fatal(err)
	}
	id := b.run(b.cmd(market, "sh", "-c", "head -c 32 /dev/urandom | base64 -w0")).stdout
	post := base64.StdEncoding.EncodeToString(digest)
	return map[string]any{
		"grant": map[string]any{
			"request_id": id, "post_hash": post,
			"image":         map[string]any{"kind": "IMAGE_KIND_OCI_ARCHIVE", "digest": map[string]any{"algorithm": "DIGEST_ALGORITHM_SHA256", "value": post}},
			"shape":         map[string]any{"cpu_millicores": 500, "ram_mib": 128, "storage_gib": 1},
			"min_isolation": "ISOLATION_LEVEL_CONTAINER",
			"valid_to":      time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
		},
		"envelope": map[string]any{"post_hash": post, "ssh_public_key": strings.TrimSpace(b.read("requester.pub"))},
	}
}

// Who isn't listed, shows no certificate of the authority, or speaks plaintext,
// gets nothing; and a role allows no more than it says.
func TestCallersAreRefused(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	worker := b.workers[0].Addr()

	// A certificate of the right authority that no configuration lists.
	b.refused(stranger, 6, []string{"CALLER_UNAUTHENTICATED", "stranger"}, "card")
	b.refused(stranger, 6, []string{"CALLER_UNAUTHENTICATED"}, b.grantArgs(own()...)...)
	// market is the router's to know, not the worker's.
	b.refused(market, 6, []string{"CALLER_UNAUTHENTICATED"}, "--target", worker, "list")

	// A certificate of another authority.
	for _, args := range [][]string{{"certs", "init", "forged"}, {"certs", "issue", "forged", market}} {
		b.ok(market, args...)
	}
	forged := b.bridgectl(market, "--cert", "forged/market/cert.pem", "--key", "forged/market/key.pem", "--ca", "certs/ca.pem", "card")
	if forged.code != 5 && forged.code != 6 {
		// In TLS 1.3 the server judges when the client's handshake is done: the
		// client may see no more than a connection that was closed.
		t.Errorf("a certificate of another authority: %s", forged.all())
	}
	// A server of another authority than the caller believes.
	b.refused(market, 6, nil, "--ca", "forged/ca.pem", "card")

	for _, address := range []string{b.RouterAddr(), worker} {
		if r := b.run(b.grpcurlWith("-cacert", "certs/ca.pem", "-max-time", "5", address, "list")); r.code == 0 {
			t.Errorf("%s answers without a certificate: %s", address, r.all())
		}
		if r := b.run(b.grpcurl("", "-max-time", "5", address, "list")); r.code == 0 {
			t.Errorf("%s answers in plaintext: %s", address, r.all())
		}
		if r := b.run(b.grpcurl(stranger, "-max-time", "5", address, "list")); r.code == 0 {
			t.Errorf("%s shows a stranger its services: %s", address, r.all())
		}
	}

	// Roles.
	b.ok(reader, "card")
	b.refused(reader, 6, []string{"CALLER_DENIED", "reader"}, b.grantArgs(own()...)...)
	b.ok(operator, "sweep", "--dry-run")
	b.ok(operator, "--target", worker, "sweep", "--dry-run")
	b.refused("router", 6, []string{"CALLER_DENIED"}, "--target", worker, "drain")

	if got := b.list(operator); len(got) != 0 {
		t.Errorf("something was made: %+v", got)
	}
}

// Prometheus finds metrics of both processes.
func TestMetricsAreServed(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	p := b.provision(own()...)
	for address, want := range map[string][]string{
		b.RouterMetrics():      {"go_goroutines", "computebridge_"},
		b.workers[0].Metrics(): {"go_goroutines", "computebridge_"},
	} {
		text, err := scrape(t.Context(), "http://"+address+"/metrics")
		if err != nil {
			t.Error(err)
		}
		for _, name := range want {
			if !strings.Contains(text, name) {
				t.Errorf("no %s at %s:\n%s", name, address, text)
			}
		}
	}
	b.terminate(p)
}

func scrape(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, res.Status)
	}
	return string(text), err
}
