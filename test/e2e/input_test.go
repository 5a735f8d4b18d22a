package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// part returns a part of a request, by its path.
func part(request map[string]any, path ...string) map[string]any {
	for _, name := range path {
		request, _ = request[name].(map[string]any)
	}
	return request
}

// Bad grants are refused by field, through the router, before anything is made.
func TestBadGrants(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	zeros := base64.StdEncoding.EncodeToString(make([]byte, 32))
	in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(time.RFC3339) }
	ports := func(numbers ...int) []any {
		var all []any
		for _, n := range numbers {
			all = append(all, map[string]any{"number": n, "protocol": "PROTOCOL_TCP"})
		}
		return all
	}
	for name, c := range map[string]struct {
		change func(grant, envelope map[string]any)
		want   []string
	}{
		"no memory":             {func(g, _ map[string]any) { part(g, "shape")["ram_mib"] = 0 }, []string{"GRANT_INVALID", "shape.ram_mib"}},
		"negative CPU":          {func(g, _ map[string]any) { part(g, "shape")["cpu_millicores"] = -1 }, []string{"GRANT_INVALID", "shape.cpu_millicores"}},
		"absurd disk":           {func(g, _ map[string]any) { part(g, "shape")["storage_gib"] = int64(1) << 62 }, []string{"GRANT_INVALID", "shape.storage_gib"}},
		"more than any host":    {func(g, _ map[string]any) { part(g, "shape")["cpu_millicores"] = 5000 }, []string{"GRANT_NOT_SATISFIABLE"}},
		"a deadline past":       {func(g, _ map[string]any) { g["valid_to"] = in(-time.Second) }, []string{"GRANT_INVALID", "valid_to"}},
		"a deadline too far":    {func(g, _ map[string]any) { g["valid_to"] = in(365 * 24 * time.Hour) }, []string{"valid_to"}},
		"no deadline":           {func(g, _ map[string]any) { delete(g, "valid_to") }, []string{"GRANT_INVALID", "valid_to"}},
		"a short id":            {func(g, _ map[string]any) { g["request_id"] = "c2hvcnQ=" }, []string{"GRANT_INVALID", "request_id"}},
		"an unknown region":     {func(g, _ map[string]any) { g["region"] = "atlantis" }, []string{"GRANT_NOT_SATISFIABLE", "atlantis"}},
		"a region with slashes": {func(g, _ map[string]any) { g["region"] = "../lab" }, []string{"GRANT_INVALID", "region"}},
		"a port twice":          {func(g, _ map[string]any) { g["ports"] = ports(80, 80) }, []string{"GRANT_INVALID", "ports"}},
		"a port out of range":   {func(g, _ map[string]any) { g["ports"] = ports(65536) }, []string{"GRANT_INVALID", "ports[0].number"}},
		"no such isolation":     {func(g, _ map[string]any) { g["min_isolation"] = "ISOLATION_LEVEL_TDX" }, []string{"GRANT_NOT_SATISFIABLE"}},
		"= in a name":           {func(g, _ map[string]any) { g["environment"] = map[string]string{"A=B": "c"} }, []string{"GRANT_INVALID", "environment"}},
		"a line break":          {func(g, _ map[string]any) { g["environment"] = map[string]string{"A": "b\nc"} }, []string{"GRANT_INVALID", "environment"}},
		"a NUL":                 {func(g, _ map[string]any) { g["environment"] = map[string]string{"A": "b\x00c"} }, []string{"GRANT_INVALID", "environment"}},
		"no digest":             {func(g, _ map[string]any) { delete(part(g, "image"), "digest") }, []string{"GRANT_INVALID", "image.digest"}},
		"a short digest":        {func(g, _ map[string]any) { part(g, "image", "digest")["value"] = "c2hvcnQ=" }, []string{"GRANT_INVALID", "image.digest.value"}},
		"another post-hash":     {func(_, e map[string]any) { e["post_hash"] = zeros }, []string{"IMAGE_MISMATCH"}},
		"no SSH key":            {func(_, e map[string]any) { e["ssh_public_key"] = "ssh-ed25519 AAAA" }, []string{"GRANT_INVALID", "ssh_public_key"}},
		"an SSH key with options": {
			func(_, e map[string]any) { e["ssh_public_key"] = fmt.Sprintf(`command="id" %s`, e["ssh_public_key"]) },
			[]string{"GRANT_INVALID", "ssh_public_key"},
		},
		"an X25519 key of zeros": {func(_, e map[string]any) {
			delete(e, "ssh_public_key")
			e["x25519_public_key"] = zeros
		}, []string{"GRANT_INVALID", "x25519_public_key"}},
		"a short X25519 key": {func(_, e map[string]any) {
			delete(e, "ssh_public_key")
			e["x25519_public_key"] = "c2hvcnQ="
		}, []string{"GRANT_INVALID", "x25519_public_key"}},
		"no key at all": {func(_, e map[string]any) { delete(e, "ssh_public_key") }, []string{"GRANT_INVALID", "ssh_public_key"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := b.in(t)
			request := b.request()
			c.change(part(request, "grant"), part(request, "envelope"))
			text, err := json.Marshal(request)
			if err != nil {
				t.Fatal(err)
			}
			cmd := b.grpcurl(market, "-d", "@", b.RouterAddr(), "computebridge.v1.BackendService/Provision")
			cmd.Stdin = strings.NewReader(string(text))
			r := b.run(cmd)
			if r.code == 0 {
				t.Fatalf("it was taken: %s", r.all())
			}
			for _, want := range append(c.want, `"created": "none"`) {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("the error doesn't say %s: %s", want, r.all())
				}
			}
		})
	}
	if got := b.list(operator); len(got) != 0 {
		t.Errorf("something was made: %+v", got)
	}
}

// What tries to be shell, a specifier, a variable, a path or nft syntax stays a
// string.
func TestStringsStayStrings(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	values := map[string]string{
		"SHELL_1": `$(touch /tmp/owned); ` + "`id`" + ` && "quoted" 'single' \\ !`, "SPECIFIER": "%i %n %%", "VARIABLE": "$HOME ${PATH}",
		"TRAVERSAL": "../../../etc/passwd", "NFT": "} ; flush ruleset ; {", "UNICODE": "grüß\t☃", "EMPTY": "", "DASHES": "--rm -v /:/host",
	}
	args := own()
	for name, value := range values {
		args = append(args, "--env", name+"="+value)
	}
	p := b.provision(args...)
	for name, value := range values {
		if r := b.run(b.ssh(p, "requester", nil, `printf %s "$`+name+`"`)); r.code != 0 || r.stdout != value {
			t.Errorf("%s is not %q: %s", name, value, r.all())
		}
	}
	b.terminate(p)
}

// Images that can't be had or run give an error of their own, and leave nothing.
func TestBadImages(t *testing.T) {
	t.Parallel()
	b := newBridge(t)
	images := map[ociimage.Kind]string{}
	for _, kind := range []ociimage.Kind{ociimage.NotOCI, ociimage.Corrupt, ociimage.Exit3, ociimage.Distroless} {
		digest, err := b.AddImage(t.Context(), kind)
		if err != nil {
			t.Fatal(err)
		}
		images[kind] = digest
	}
	tampered := "sha256:" + strings.Repeat("ab", 32)
	b.write(b.Path("images", strings.Replace(tampered, ":", "/", 1)), "these are other bytes\n")
	// The broken layer comes before images that have the same one unbroken, which
	// podman would take in its place.
	for _, c := range []struct{ name, digest, reason string }{
		{"not in the store", "sha256:" + strings.Repeat("01", 32), "IMAGE_UNAVAILABLE"},
		{"other bytes in the store", tampered, "IMAGE_HASH_MISMATCH"},
		{"no OCI image", images[ociimage.NotOCI], "IMAGE_INVALID"},
		{"a broken layer", images[ociimage.Corrupt], "IMAGE_INVALID"},
		{"it exits at once", images[ociimage.Exit3], "WORKLOAD_FAILED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.in(t)
			b.image = c.digest
			b.refused(market, 9, []string{c.reason}, b.grantArgs(own()...)...)
		})
	}
	b.image = images[ociimage.Distroless]
	p := b.provision(own()...)
	b.says(b.run(b.ssh(p, "requester", nil, "/no/such/program")), 127, "")
	b.terminate(p)
	if got := b.list(operator); len(got) != 0 {
		t.Errorf("something is left: %+v", got)
	}
}
