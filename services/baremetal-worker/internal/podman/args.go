package podman

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// DefaultBinary is where Debian and Ubuntu, Fedora and openSUSE have podman.
const DefaultBinary = "/usr/bin/podman"

// Engine selects where podman keeps its things. The zero value is the host's
// own podman.
type Engine struct {
	// Binary is podman's path, default DefaultBinary.
	Binary string
	// Root and RunRoot are directories of a store of one's own: a grant whose
	// containers live on a disk of their own, with a limited size.
	Root, RunRoot string
	// ImageStore is a store whose images can be used from Root, read-only.
	ImageStore string
	// Transient keeps podman's records of containers in RunRoot, not in Root
	// (podman 4.4): they can be changed, and removed, when Root's disk is full.
	Transient bool
}

// TransientOption is podman's own for it. One that doesn't know it fails.
const TransientOption = "--transient-store"

func (e Engine) args() ([]string, error) {
	binary := e.Binary
	if binary == "" {
		binary = DefaultBinary
	}
	args := []string{binary}
	for _, o := range []struct{ option, dir string }{
		{"--root=", e.Root}, {"--runroot=", e.RunRoot}, {"--storage-opt=additionalimagestore=", e.ImageStore},
	} {
		if o.dir == "" {
			continue
		}
		if err := checkPath(o.dir); err != nil {
			return nil, err
		}
		args = append(args, o.option+o.dir)
	}
	if e.Transient {
		args = append(args, TransientOption)
	}
	return args, checkPath(binary)
}

// PortMap publishes a port of a container on the host.
type PortMap struct {
	// HostIP is the address on the host; the zero value is all addresses.
	HostIP netip.Addr
	// HostPort and ContainerPort are the two ends.
	HostPort, ContainerPort uint16
	// Protocol is "tcp" or "udp".
	Protocol string
}

// Mount is a file or directory of the host in the container, or a tmpfs.
type Mount struct {
	// Source is the path on the host; empty for a tmpfs.
	Source string
	// Target is the path in the container.
	Target string
	// ReadOnly forbids writing.
	ReadOnly bool
	// MapIDs shows the files with their owners mapped as the container's are
	// (idmap), for files that belong to root on the host. Not every file system
	// can: overlayfs can't.
	MapIDs bool
	// SizeBytes limits a tmpfs.
	SizeBytes uint64
}

// IDMap maps the container's users and groups 0…Size-1 to Base… on the host.
type IDMap struct {
	Base, Size uint32
}

// RunSpec is a container to run as a systemd unit. All its
// values reach podman as values: none can become an option, another value, or
// anything to a shell.
type RunSpec struct {
	// Engine is where.
	Engine Engine
	// Name is the container's, also its host name if Hostname is empty.
	Name string
	// Hostname is what the container calls itself.
	Hostname string
	// ImageID is the image's id in hex: never a name, which could be pulled.
	ImageID string
	// Network is the name of a network, or "none".
	Network string
	// Publish are the ports reachable from outside.
	Publish []PortMap
	// Mounts are in the container besides its image.
	Mounts []Mount
	// Labels mark it.
	Labels map[string]string
	// IDMap gives it users of its own; nil: the host's.
	IDMap *IDMap
	// Env is set besides the image's own.
	Env map[string]string
	// User is as whom to run ("0:0"); empty: the image's.
	User string
	// WorkingDir is where; empty: the image's.
	WorkingDir string
	// PidsLimit is podman's own limit of processes; 0: none, which is right
	// where systemd limits them.
	PidsLimit uint32
	// CgroupsSplit puts the container into cgroups below the unit's, so that
	// the unit's limits and accounting cover it.
	CgroupsSplit bool
	// SDNotifyConmon reports to systemd that it runs, for a unit of type
	// notify.
	SDNotifyConmon bool
	// Detach lets podman itself end once the container runs: its monitor is
	// the unit's main process then, which saves some 40 MB a container.
	Detach bool
	// LogPath is the file for its output (format k8s-file); empty: none is
	// kept. LogMaxBytes limits it.
	LogPath     string
	LogMaxBytes uint64
	// StorageBytes limits what it may write into its own file system, where
	// the host's can (XFS with project quotas).
	StorageBytes uint64
	// ShmBytes sizes /dev/shm; 0: podman's default.
	ShmBytes uint64
	// CapAdd and CapDrop change its capabilities, "NET_RAW" or "ALL".
	CapAdd, CapDrop []string
	// NoNewPrivileges forbids set-user-ID programs to work.
	NoNewPrivileges bool
	// ReadOnly makes the image's own file system read-only.
	ReadOnly bool
	// Entrypoint replaces the image's, if not nil.
	Entrypoint []string
	// Args follow the entrypoint; the image's command if nil.
	Args []string
	// StopSeconds is how long podman waits from SIGTERM to SIGKILL.
	StopSeconds uint32
}

var (
	nameRegexp   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)
	idRegexp     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	capRegexp    = regexp.MustCompile(`^[A-Z_]{2,40}$`)
	labelRegexp  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._/-]{0,127}$`)
	userRegexp   = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?$`)
	ifaceRegexp  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}$`)
	hostRegexp   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)
	optionRegexp = regexp.MustCompile(`^[a-z0-9_.]+$`)
)

// checkPath accepts absolute, clean paths that podman's own little syntaxes
// (src:dst:options, key=value,key=value) can hold.
func checkPath(p string) error {
	switch {
	case !path.IsAbs(p) || path.Clean(p) != p:
		return fmt.Errorf("path %q is not absolute and clean", p)
	case strings.ContainsAny(p, ",:\"'\\"):
		return fmt.Errorf("path %q has a comma, colon, quote or backslash", p)
	}
	return checkValue(p)
}

// checkValue accepts what an argument of a unit's program can be.
func checkValue(v string) error {
	if strings.IndexByte(v, 0) >= 0 {
		return fmt.Errorf("value %q has a NUL byte", v)
	}
	return nil
}

func match(re *regexp.Regexp, what, value string) error {
	if !re.MatchString(value) || strings.HasSuffix(value, "\n") {
		return fmt.Errorf("%s %q is not of the form %s", what, value, re)
	}
	return nil
}

// RunArgs renders `podman run` for a spec.
func RunArgs(s RunSpec) ([]string, error) {
	args, err := s.Engine.args()
	if err != nil {
		return nil, err
	}
	errs := []error{match(nameRegexp, "container name", s.Name), match(idRegexp, "image id", s.ImageID)}
	check := func(err error) { errs = append(errs, err) }
	add := func(a ...string) { args = append(args, a...) }

	// A health check of the image's would be run by the host's systemd, outside
	// of the grant's limits.
	add("run", "--rm", "--replace", "--pull=never", "--no-healthcheck", "--name="+s.Name)
	if s.Hostname != "" {
		check(match(hostRegexp, "host name", s.Hostname))
		add("--hostname=" + s.Hostname)
	}
	if s.Network != "" {
		check(match(nameRegexp, "network", s.Network))
		add("--network=" + s.Network)
	}
	if s.CgroupsSplit {
		add("--cgroups=split")
	}
	if s.SDNotifyConmon {
		add("--sdnotify=conmon")
	}
	if s.Detach {
		add("--detach")
	}
	add("--pids-limit=" + strconv.FormatUint(uint64(s.PidsLimit), 10))
	if s.IDMap != nil {
		if s.IDMap.Size == 0 || uint64(s.IDMap.Base)+uint64(s.IDMap.Size) > 1<<32-1 {
			check(fmt.Errorf("id map %d+%d is empty or too big", s.IDMap.Base, s.IDMap.Size))
		}
		m := fmt.Sprintf("0:%d:%d", s.IDMap.Base, s.IDMap.Size)
		add("--uidmap="+m, "--gidmap="+m)
	}
	for _, p := range s.Publish {
		rendered, err := p.render()
		check(err)
		add("--publish=" + rendered)
	}
	for _, m := range s.Mounts {
		rendered, err := m.render()
		check(err)
		add("--mount=" + rendered)
	}
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		check(errors.Join(match(labelRegexp, "label", k), checkValue(s.Labels[k])))
		add("--label=" + k + "=" + s.Labels[k])
	}
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		if k == "" || strings.ContainsAny(k, "=\x00\n*") || strings.TrimSpace(k) != k {
			check(fmt.Errorf("environment variable's name %q", k))
		}
		check(checkValue(s.Env[k]))
		add("--env=" + k + "=" + s.Env[k])
	}
	if s.User != "" {
		check(match(userRegexp, "user", s.User))
		add("--user=" + s.User)
	}
	if s.WorkingDir != "" {
		if !path.IsAbs(s.WorkingDir) {
			check(fmt.Errorf("working directory %q is not absolute", s.WorkingDir))
		}
		check(checkValue(s.WorkingDir))
		add("--workdir=" + s.WorkingDir)
	}
	if s.LogPath == "" {
		add("--log-driver=none")
	} else {
		check(checkPath(s.LogPath))
		add("--log-driver=k8s-file", "--log-opt=path="+s.LogPath)
		if s.LogMaxBytes > 0 {
			add("--log-opt=max-size=" + strconv.FormatUint(s.LogMaxBytes, 10))
		}
	}
	if s.StorageBytes > 0 {
		add("--storage-opt=size=" + strconv.FormatUint(s.StorageBytes, 10))
	}
	if s.ShmBytes > 0 {
		add("--shm-size=" + strconv.FormatUint(s.ShmBytes, 10) + "b")
	}
	for _, c := range s.CapDrop {
		check(match(capRegexp, "capability", c))
		add("--cap-drop=" + c)
	}
	for _, c := range s.CapAdd {
		check(match(capRegexp, "capability", c))
		add("--cap-add=" + c)
	}
	if s.NoNewPrivileges {
		add("--security-opt=no-new-privileges")
	}
	if s.ReadOnly {
		add("--read-only")
	}
	if s.StopSeconds > 0 {
		add("--stop-timeout=" + strconv.FormatUint(uint64(s.StopSeconds), 10))
	}
	if s.Entrypoint != nil {
		// podman takes a JSON array, or else splits a string by its own rules.
		encoded, err := json.Marshal(s.Entrypoint)
		check(err)
		for _, a := range s.Entrypoint {
			check(checkValue(a))
		}
		add("--entrypoint=" + string(encoded))
	}
	add("--", s.ImageID)
	for _, a := range s.Args {
		check(checkValue(a))
	}
	add(s.Args...)
	return args, errors.Join(errs...)
}

func (p PortMap) render() (string, error) {
	if p.Protocol != "tcp" && p.Protocol != "udp" {
		return "", fmt.Errorf("protocol %q of a port is neither tcp nor udp", p.Protocol)
	}
	if p.HostPort == 0 || p.ContainerPort == 0 {
		return "", errors.New("port 0 can't be published")
	}
	rendered := fmt.Sprintf("%d:%d/%s", p.HostPort, p.ContainerPort, p.Protocol)
	switch {
	case !p.HostIP.IsValid():
	case p.HostIP.Zone() != "":
		return "", fmt.Errorf("address %s has a zone", p.HostIP)
	case p.HostIP.Is6():
		rendered = "[" + p.HostIP.String() + "]:" + rendered
	default:
		rendered = p.HostIP.String() + ":" + rendered
	}
	return rendered, nil
}

func (m Mount) render() (string, error) {
	if err := checkPath(m.Target); err != nil {
		return "", err
	}
	options := "type=tmpfs,dst=" + m.Target
	if m.Source != "" {
		if err := checkPath(m.Source); err != nil {
			return "", err
		}
		options = "type=bind,src=" + m.Source + ",dst=" + m.Target
		if m.MapIDs {
			options += ",idmap"
		}
	} else if m.SizeBytes > 0 {
		options += ",tmpfs-size=" + strconv.FormatUint(m.SizeBytes, 10)
	}
	if m.ReadOnly {
		options += ",ro=true"
	}
	return options, nil
}

// NetworkSpec is a bridge network to make.
type NetworkSpec struct {
	// Engine is where.
	Engine Engine
	// Name is the network's.
	Name string
	// Interface is the bridge's name on the host.
	Interface string
	// Labels mark it.
	Labels map[string]string
	// DNS runs podman's name server for the network's containers, on the
	// host's end of the bridge.
	DNS bool
	// Isolate forbids traffic from and to all other networks of podman.
	Isolate bool
	// Subnet is the network's addresses; podman chooses for the zero value.
	Subnet netip.Prefix
	// Options are the driver's further options, "mtu" for example.
	Options map[string]string
}

// NetworkCreateArgs renders `podman network create`.
func NetworkCreateArgs(s NetworkSpec) ([]string, error) {
	args, err := s.Engine.args()
	if err != nil {
		return nil, err
	}
	errs := []error{match(nameRegexp, "network name", s.Name)}
	args = append(args, "network", "create", "--driver=bridge")
	if s.Interface != "" {
		errs = append(errs, match(ifaceRegexp, "interface", s.Interface))
		args = append(args, "--interface-name="+s.Interface)
	}
	if !s.DNS {
		args = append(args, "--disable-dns")
	}
	if s.Isolate {
		args = append(args, "--opt=isolate=strict")
	}
	for _, k := range slices.Sorted(maps.Keys(s.Options)) {
		errs = append(errs, match(optionRegexp, "network option", k), match(optionRegexp, "network option's value", s.Options[k]))
		args = append(args, "--opt="+k+"="+s.Options[k])
	}
	if s.Subnet.IsValid() {
		args = append(args, "--subnet="+s.Subnet.Masked().String())
	}
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		errs = append(errs, match(labelRegexp, "label", k), checkValue(s.Labels[k]))
		args = append(args, "--label="+k+"="+s.Labels[k])
	}
	return append(args, "--", s.Name), errors.Join(errs...)
}

// StopArgs renders the orderly stop of a container, there or not: SIGTERM, and
// SIGKILL after the grace.
func StopArgs(e Engine, name string, graceSeconds uint32) ([]string, error) {
	args, err := e.args()
	return append(args, "stop", "--ignore", "--time="+strconv.FormatUint(uint64(graceSeconds), 10), "--", name), errors.Join(err, match(nameRegexp, "container name", name))
}

// RemoveArgs renders the removal of a container, running or not, there or not.
func RemoveArgs(e Engine, name string) ([]string, error) {
	args, err := e.args()
	return append(args, "rm", "--force", "--ignore", "--volumes", "--time=0", "--", name), errors.Join(err, match(nameRegexp, "container name", name))
}

// NetworkReloadArgs renders the renewal of what a running container has in the
// host's firewall: the translation of its ports and addresses.
func NetworkReloadArgs(e Engine, container string) ([]string, error) {
	args, err := e.args()
	return append(args, "network", "reload", container), errors.Join(err, match(nameRegexp, "container name", container))
}

// NetworkRemoveArgs renders the removal of a network with its containers. Old
// podmans fail if it isn't there.
func NetworkRemoveArgs(e Engine, name string) ([]string, error) {
	args, err := e.args()
	return append(args, "network", "rm", "--force", "--", name), errors.Join(err, match(nameRegexp, "network name", name))
}
