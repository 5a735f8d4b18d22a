package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Each cloud's SDK is in its own worker alone, and no simulator or fake is in any
// program that ships.
func TestTheWorkerLinksOneCloudsSDK(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "GOWORK=off") // as CI and Docker build
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	packages := strings.Fields(string(out))
	if !slices.Contains(packages, "github.com/aws/aws-sdk-go-v2/service/ec2") {
		t.Fatalf("go list says that the worker doesn't even link EC2's SDK: %v", packages)
	}
	forbidden := regexp.MustCompile(`azure-sdk|Azure/|cloud\.google\.com/go|google\.golang\.org/api(/|$)|go-libvirt|go-systemd|godbus|pkg/sftp` +
		`|compute-bridge/test(/|$)|backendfake|backendtest|ledgertest|^testing$`)
	for _, p := range packages {
		if forbidden.MatchString(p) {
			t.Errorf("the worker links %s", p)
		}
	}
}
