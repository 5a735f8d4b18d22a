package podman_test

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, args []string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", name)
	got := strings.Join(args, "\n") + "\n"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func fullSpec() podman.RunSpec {
	return podman.RunSpec{
		Engine: podman.Engine{Root: "/var/lib/cb/store", RunRoot: "/run/cb/store", ImageStore: "/var/lib/containers/storage"},
		Name:   "cb-demo-00ff-1", Hostname: "grant-00ff", ImageID: strings.Repeat("0a", 32), Network: "cb-demo-00ff-1",
		Publish: []podman.PortMap{
			{HostPort: 40000, ContainerPort: 61022, Protocol: "tcp"},
			{HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 40001, ContainerPort: 53, Protocol: "udp"},
			{HostIP: netip.MustParseAddr("2001:db8::1"), HostPort: 40002, ContainerPort: 80, Protocol: "tcp"},
		},
		Mounts: []podman.Mount{
			{Source: "/var/lib/cb/guest", Target: "/.cb/guest", ReadOnly: true},
			{Source: "/var/lib/cb/g/guest.json", Target: "/.cb/guest.json", ReadOnly: true, MapIDs: true},
			{Target: "/tmp", SizeBytes: 64 << 20},
		},
		Labels: map[string]string{"compute-bridge.grant": "00ff", "a": "b=c,d --privileged"},
		IDMap:  &podman.IDMap{Base: 1000000, Size: 65536}, Env: map[string]string{"A": "$(id) 'x'", "B": ""},
		User: "0:0", WorkingDir: "/", PidsLimit: 0, CgroupsSplit: true, SDNotifyConmon: true, LogPath: "/var/lib/cb/g/console.log", LogMaxBytes: 1 << 20,
		StorageBytes: 10 << 30, ShmBytes: 64 << 20, CapAdd: []string{"NET_RAW"}, CapDrop: []string{"ALL"}, NoNewPrivileges: true, ReadOnly: true,
		Entrypoint: []string{"/.cb/guest", "init"}, Args: []string{"--privileged", "-config", "/.cb/guest.json"}, StopSeconds: 10,
	}
}

func TestArgs(t *testing.T) {
	args, err := podman.RunArgs(fullSpec())
	golden(t, "run.golden", args, err)
	args, err = podman.RunArgs(podman.RunSpec{Name: "a", ImageID: strings.Repeat("0", 64)})
	golden(t, "run-minimal.golden", args, err)
	args, err = podman.NetworkCreateArgs(podman.NetworkSpec{
		Engine: podman.Engine{Root: "/var/lib/cb/store"}, Name: "cb-demo-00ff-1", Interface: "cb0123456789", Isolate: true,
		Labels: map[string]string{"compute-bridge.grant": "00ff"}, Subnet: netip.MustParsePrefix("10.89.3.7/24"), Options: map[string]string{"mtu": "1400"},
	})
	golden(t, "network-create.golden", args, err)
	args, err = podman.RemoveArgs(podman.Engine{}, "cb-demo-00ff-1")
	golden(t, "rm.golden", args, err)
	args, err = podman.StopArgs(podman.Engine{}, "cb-demo-00ff-1", 10)
	golden(t, "stop.golden", args, err)
	args, err = podman.NetworkRemoveArgs(podman.Engine{Binary: "/usr/local/bin/podman"}, "cb-demo-00ff-1")
	golden(t, "network-rm.golden", args, err)
}

func TestRunArgsRefuse(t *testing.T) {
	for name, change := range map[string]func(*podman.RunSpec){
		"no name":                  func(s *podman.RunSpec) { s.Name = "" },
		"option as name":           func(s *podman.RunSpec) { s.Name = "--privileged" },
		"newline after the name":   func(s *podman.RunSpec) { s.Name = "a\n" },
		"image by name":            func(s *podman.RunSpec) { s.ImageID = "docker.io/library/debian" },
		"image with prefix":        func(s *podman.RunSpec) { s.ImageID = "sha256:" + strings.Repeat("0", 64) },
		"host's network namespace": func(s *podman.RunSpec) { s.Network = "ns:/proc/1/ns/net" },
		"port 0":                   func(s *podman.RunSpec) { s.Publish[0].HostPort = 0 },
		"port's protocol":          func(s *podman.RunSpec) { s.Publish[0].Protocol = "tcp,x" },
		"mount's options":          func(s *podman.RunSpec) { s.Mounts[0].Source = "/a,ro=false" },
		"mount of a relative path": func(s *podman.RunSpec) { s.Mounts[0].Source = "a" },
		"mount of a parent":        func(s *podman.RunSpec) { s.Mounts[0].Source = "/a/../b" },
		"mount on a volume option": func(s *podman.RunSpec) { s.Mounts[0].Target = "/a:O" },
		"label with =":             func(s *podman.RunSpec) { s.Labels["a=b"] = "" },
		"empty id map":             func(s *podman.RunSpec) { s.IDMap.Size = 0 },
		"id map overflow":          func(s *podman.RunSpec) { s.IDMap.Base = 1<<32 - 2 },
		"variable with =":          func(s *podman.RunSpec) { s.Env["A=B"] = "" },
		"variable without name":    func(s *podman.RunSpec) { s.Env[""] = "" },
		"all variables":            func(s *podman.RunSpec) { s.Env["*"] = "" },
		"NUL in variable":          func(s *podman.RunSpec) { s.Env["A"] = "\x00" },
		"user":                     func(s *podman.RunSpec) { s.User = "0:0 --privileged" },
		"relative directory":       func(s *podman.RunSpec) { s.WorkingDir = "a" },
		"log path":                 func(s *podman.RunSpec) { s.LogPath = "console.log" },
		"capability":               func(s *podman.RunSpec) { s.CapAdd = []string{"all,x"} },
		"NUL in entrypoint":        func(s *podman.RunSpec) { s.Entrypoint = []string{"\x00"} },
		"NUL in argument":          func(s *podman.RunSpec) { s.Args = []string{"\x00"} },
		"relative store":           func(s *podman.RunSpec) { s.Engine.Root = "x" },
		"relative binary":          func(s *podman.RunSpec) { s.Engine.Binary = "podman" },
		"host name":                func(s *podman.RunSpec) { s.Hostname = "a b" },
	} {
		spec := fullSpec()
		change(&spec)
		if args, err := podman.RunArgs(spec); err == nil {
			t.Errorf("%s: no error: %q", name, args)
		}
	}
	for _, name := range []string{"", "-f", "a b", "a/b", "a\n", "--all"} {
		_, err := podman.RemoveArgs(podman.Engine{}, name)
		_, err2 := podman.NetworkRemoveArgs(podman.Engine{}, name)
		_, err3 := podman.NetworkCreateArgs(podman.NetworkSpec{Name: name})
		if err == nil || err2 == nil || err3 == nil {
			t.Errorf("name %q: %v, %v, %v", name, err, err2, err3)
		}
	}
}

// FuzzRunArgs checks that values can't become anything but values: the number
// and names of the options are those of the same spec with harmless values.
func FuzzRunArgs(f *testing.F) {
	f.Add("a", "--privileged", "x=y,z", "/a", "u")
	f.Add("A", "\n--", "'", "/../", "0:0")
	options := func(args []string) []string {
		var out []string
		for _, a := range args[:slices.Index(args, "--")] {
			name, _, _ := strings.Cut(a, "=")
			out = append(out, name)
		}
		return out
	}
	f.Fuzz(func(t *testing.T, key, value, argument, dir, user string) {
		spec, harmless := fullSpec(), fullSpec()
		spec.Labels, harmless.Labels = map[string]string{key: value}, map[string]string{"a": "b"}
		spec.Env, harmless.Env = map[string]string{key: value}, map[string]string{"a": "b"}
		spec.Args, spec.Entrypoint = []string{argument, value}, []string{value, argument}
		spec.WorkingDir, spec.User, spec.LogPath = dir, user, dir
		spec.Mounts[0].Source = dir
		if spec.WorkingDir == "" || spec.User == "" {
			return
		}
		got, err := podman.RunArgs(spec)
		if err != nil {
			return
		}
		want, err := podman.RunArgs(harmless)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(options(want), options(got)); diff != "" {
			t.Errorf("other options (-want +got):\n%s", diff)
		}
		if end := slices.Index(got, "--"); !slices.Equal(got[end:], []string{"--", spec.ImageID, argument, value}) {
			t.Errorf("after the options is %q", got[end:])
		}
	})
}
