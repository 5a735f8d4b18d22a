package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backendfake"
)

// bashCompletion is where Debian's package bash-completion has what completion
// scripts build on.
const bashCompletion = "/usr/share/bash-completion/bash_completion"

// completer completes command lines as a person's bash does: with the script
// that bridgectl prints.
type completer struct {
	site *site
	bin  string
	env  []string
}

func newCompleter(t *testing.T, s *site, env ...string) completer {
	t.Helper()
	if _, err := os.Stat(bashCompletion); err != nil {
		t.Fatalf("the package bash-completion is lacking (make prerequisites installs it): %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(s.home, "bin")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "bridgectl")); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return completer{site: s, bin: bin, env: env}
}

// complete returns what bash offers for the last of the words, and what was
// printed to standard error.
func (c completer) complete(t *testing.T, words ...string) []string {
	t.Helper()
	script := `set -u
compopt() { return 0; } # Of use only at a prompt.
set +u
source "$1"
source <(bridgectl completion bash)
shift
COMP_WORDS=(bridgectl "$@")
COMP_CWORD=$#
COMP_LINE="bridgectl $*"
COMP_POINT=${#COMP_LINE}
COMP_TYPE=63
complete -p bridgectl | grep -q __start_bridgectl || exit 3
__start_bridgectl
for word in "${COMPREPLY[@]}"; do printf '%s\n' "$word"; done`
	// One that waits for its target for ever is ended, and fails.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", append([]string{"--norc", "-c", script, "bash", bashCompletion}, words...)...)
	cmd.Env = append(c.site.command().Env, "PATH="+c.bin+":"+os.Getenv("PATH"))
	cmd.Env = append(cmd.Env, c.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("completing %q: %v\n%s", words, err, stderr.String())
	}
	if stderr.Len() > 0 {
		t.Errorf("completing %q printed %q", words, stderr.String())
	}
	var offered []string
	for line := range strings.Lines(stdout.String()) {
		if word, _, _ := strings.Cut(strings.TrimSpace(line), " "); word != "" {
			offered = append(offered, word)
		}
	}
	return offered
}

func TestBashCompletes(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	id := s.grant(t)
	other := s.grant(t)
	if err := os.RemoveAll(filepath.Join(s.home, "state", "bridgectl", "grants", other+".json")); err != nil {
		t.Fatal(err)
	}
	c := newCompleter(t, s, "BRIDGECTL_COMPLETION_TIMEOUT=5m")
	for name, test := range map[string]struct {
		words []string
		want  []string
	}{
		"a command":                      {[]string{"swe"}, []string{"sweep"}},
		"a flag":                         {[]string{"sweep", "--dry"}, []string{"--dry-run"}},
		"a backend":                      {[]string{"sweep", "--backend", ""}, []string{"metal"}},
		"no such backend":                {[]string{"sweep", "--backend", "x"}, nil},
		"a region":                       {[]string{"provision", "--region", "eu"}, []string{"eu-north"}},
		"an isolation":                   {[]string{"provision", "--isolation", "v"}, []string{"vm"}},
		"an output":                      {[]string{"list", "-o", "j"}, []string{"json"}},
		"a grant that is stored here":    {[]string{"watch", id[:3]}, []string{id[:12]}},
		"a grant that the target knows":  {[]string{"terminate", other[:3]}, []string{other[:12]}},
		"a grant's handle":               {[]string{"ssh", "metal/" + id[:3]}, []string{"metal/" + id}},
		"a whole id":                     {[]string{"usage", id[:20]}, []string{id}},
		"at a target that a flag names":  {[]string{"--target", s.workerSock, "usage", other[:20]}, []string{other}},
		"nothing after the grant":        {[]string{"watch", id, ""}, nil},
		"a worker has no other backends": {[]string{"--target", s.workerSock, "sweep", "--backend", ""}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := c.complete(t, test.words...); !slices.Equal(got, test.want) {
				t.Errorf("%q is completed by %q, want %q", test.words, got, test.want)
			}
		})
	}
}

// A target that isn't there, or hangs, is given up and not spoken of; what is
// stored here is offered all the same.
func TestCompletionIsSilentWithoutATarget(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	id := s.grant(t)
	hangs, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", filepath.Join(filepath.Dir(s.home), "hangs.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	for name, target := range map[string]string{
		"nobody listens":      "unix:/nonexistent",
		"nobody answers":      "unix:" + hangs.Addr().String(),
		"no certificates":     s.router,
		"nonsense for target": "unix:",
	} {
		t.Run(name, func(t *testing.T) {
			c := newCompleter(t, s, "BRIDGECTL_TARGET="+target)
			if got := c.complete(t, "sweep", "--backend", ""); len(got) > 0 {
				t.Errorf("backends: %q", got)
			}
			if got := c.complete(t, "watch", id[:4]); !slices.Equal(got, []string{id[:12]}) {
				t.Errorf("grants: %q", got)
			}
		})
	}
}

// The other shells' scripts are made by the same hand; that they are there, and
// ask the program, is what can be said without these shells.
func TestOtherShellsHaveScripts(t *testing.T) {
	t.Parallel()
	s := newSite(t, backendfake.Options{}, backendfake.DriverOptions{})
	for shell, want := range map[string]string{"zsh": "#compdef bridgectl", "fish": "complete -c bridgectl", "powershell": "Register-ArgumentCompleter"} {
		contains(t, s.must(t, "completion", shell), want, "__complete")
	}
}
