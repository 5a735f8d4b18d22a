package main

import (
	"flag"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden file")

// list runs go list as CI and Docker build: as a module by itself.
func list(t *testing.T, format string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", format, ".")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	lines := strings.Fields(string(out))
	slices.Sort(lines)
	return slices.Compact(lines)
}

// What the router links can't grow unnoticed: go test -update . writes the list
// again, and a reviewer sees the difference.
func TestTheRouterLinksTheseModulesOnly(t *testing.T) {
	const golden = "deps.golden"
	got := strings.Join(list(t, "{{with .Module}}{{.Path}}{{end}}"), "\n") + "\n"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("modules (-%s +now; go test -update writes it again):\n%s", golden, diff)
	}
}

// The router never touches a provider.
func TestTheRouterLinksNoComputeSDKAndNoSSH(t *testing.T) {
	forbidden := regexp.MustCompile(`aws-sdk|azure-sdk|cloud\.google\.com/go/compute|google\.golang\.org/api|golang\.org/x/crypto/ssh|pkg/sftp|gliderlabs/ssh|go-libvirt|go-systemd|godbus`)
	packages := list(t, "{{.ImportPath}}")
	if !slices.Contains(packages, "google.golang.org/grpc") {
		t.Fatalf("go list says that the router doesn't even link gRPC: %v", packages)
	}
	for _, p := range packages {
		if forbidden.MatchString(p) {
			t.Errorf("the router links %s", p)
		}
	}
}
