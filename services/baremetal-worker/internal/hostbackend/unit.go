package hostbackend

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/firewall"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/podman"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/systemd"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Programs of the host, where Debian, Ubuntu and Fedora have them (merged /usr).
const (
	truncateProgram = "/usr/bin/truncate"
	mkdirProgram    = "/usr/bin/mkdir"
	mkfsProgram     = "/usr/sbin/mkfs.ext4"
	mountProgram    = "/usr/bin/mount"
	umountProgram   = "/usr/bin/umount"
	rmProgram       = "/usr/bin/rm"
	ipProgram       = "/usr/sbin/ip"
)

// tasksMax bounds processes and threads of a grant: far above what services
// need, and a fork bomb stays the grant's own problem.
const tasksMax = 8192

// startTimeout bounds everything that a unit does until its container runs. The
// image is on the host by then.
const startTimeout = time.Minute

// minStopTimeout is what a phase of the unit's stop has at least, however short the
// grace: on a busy host, what cleans up takes seconds, and if it were cut off
// something of the grant would stay until the worker comes.
const minStopTimeout = 15 * time.Second

// runRootSize bounds what podman keeps for a container until the next boot: some
// hundred KiB, and what a workload writes to /etc/hosts.
const runRootSize = "16m"

// consoleBytes bounds the console that is kept of a grant.
const consoleBytes = 1 << 20

// Labels of what podman has of ours.
const (
	labelBridge = "computebridge.bridge"
	labelGrant  = "computebridge.grant"
)

// workload is everything that a grant's unit is rendered from.
type workload struct {
	names   names
	params  params
	dir     string // the grant's directory on the host
	runRoot string
	// guest is the guest binary on the host.
	guest string
	// images is the store of the host's own podman.
	images  string
	imageID string
	// transient keeps podman's records of the container off the grant's disk.
	transient bool
	subnet    netip.Prefix
	uidBase   uint32
	table     firewall.Table
	// firewallScript is a file on the host with the table's rules.
	firewallScript string
	// firewalld says that the ports must be opened there, too, in zone.
	firewalld bool
	zone      string
	grant     backend.Grant
	stopGrace time.Duration
	// lifetime is the time until the grant's deadline.
	lifetime time.Duration
}

// disk is where the grant's limited file system is mounted. The container's own
// podman store is on it, so that everything which the workload writes is
// bounded by the disk of the grant.
func (w workload) disk() string { return w.dir + "/" + diskDir }

// store is the container's own podman store.
func (w workload) store() string { return w.disk() + "/store" }

func (w workload) engine() podman.Engine {
	return podman.Engine{Root: w.store(), RunRoot: w.runRoot, ImageStore: w.images, Transient: w.transient}
}

func (w workload) firewallGrant() (firewall.Grant, error) {
	g := firewall.Grant{
		Interface:  w.names.networkInterface(),
		Ports:      w.params.firewallPorts(),
		Restricted: w.grant.Network.Mode == backend.NetworkAllowlist,
	}
	for _, s := range w.grant.Network.AllowedPrefixes {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return firewall.Grant{}, fmt.Errorf("allowed prefix: %w", err)
		}
		g.Allow = append(g.Allow, p)
	}
	return g, nil
}

// unit renders the grant's systemd unit: deadline, limits, accounting, start
// and clean-up, all in the one call that starts it.
func (w workload) unit() (systemd.Unit, error) {
	grace := uint32(w.stopGrace / time.Second) //nolint:gosec // at most 30
	run, errRun := podman.RunArgs(podman.RunSpec{
		Engine: w.engine(), Name: w.names.stem(), Hostname: "cb-" + w.names.grant.String()[:12], ImageID: w.imageID, Network: w.names.stem(),
		Publish: w.publish(),
		Mounts: []podman.Mount{
			{Source: w.guest, Target: guestapi.ContainerBinaryPath, ReadOnly: true},
			{Source: w.dir + "/" + guestapi.ConfigFileName, Target: guestapi.ContainerConfigPath, ReadOnly: true},
		},
		Labels:       w.labels(),
		IDMap:        &podman.IDMap{Base: w.uidBase, Size: uidsPerSlot},
		User:         "0:0",
		WorkingDir:   "/",
		CgroupsSplit: true, SDNotifyConmon: true, Detach: true,
		LogPath: w.dir + "/" + consoleFile, LogMaxBytes: consoleBytes,
		Entrypoint: []string{guestapi.ContainerBinaryPath, "init", "-config", guestapi.ContainerConfigPath},
		Args:       []string{}, StopSeconds: grace,
	})
	// The networks of all grants are in one place, whatever the store.
	network, errNetwork := podman.NetworkCreateArgs(podman.NetworkSpec{
		Name: w.names.stem(), Interface: w.names.networkInterface(), Labels: w.labels(), Isolate: true, Subnet: w.subnet,
	})
	stop, errStop := podman.StopArgs(w.engine(), w.names.stem(), grace)
	remove, errRemove := podman.RemoveArgs(w.engine(), w.names.stem())
	grant, errGrant := w.firewallGrant()
	ensure, errEnsure := firewall.EnsureArgs(w.firewallScript)
	open, errOpen := firewall.OpenArgs(w.table, grant, w.lifetime+time.Minute)
	cleanup, errCleanup := w.cleanup()
	if err := errors.Join(errRun, errNetwork, errStop, errRemove, errGrant, errEnsure, errOpen, errCleanup); err != nil {
		return systemd.Unit{}, err
	}

	image := w.dir + "/" + diskFile
	start := []systemd.Exec{
		// A sparse file: space is taken as the workload writes.
		{Args: []string{truncateProgram, "--size=" + strconv.FormatInt(int64(w.params.Shape.Storage), 10) + "G", image}},
		// No journal: the file system ends with its grant, or with the host.
		{Args: []string{mkfsProgram, "-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", image}},
		{Args: []string{mountProgram, "-o", "loop,nodev", image, w.disk()}},
		// podman mounts files of its run directory into the container, for the
		// workload to write to: a limit keeps it from filling the host's /run.
		{Args: []string{mkdirProgram, "--parents", "--mode=0711", w.runRoot}},
		{Args: []string{mountProgram, "-t", "tmpfs", "-o", "size=" + runRootSize + ",mode=0711,nosuid,nodev", "computebridge", w.runRoot}},
		{Args: ensure},
		{Args: open},
		{Args: network},
	}
	if w.firewalld {
		for _, port := range grant.Ports {
			remove, errRemove := firewall.FirewalldRemoveArgs(w.zone, port)
			add, errAdd := firewall.FirewalldAddArgs(w.zone, port, w.lifetime+time.Minute)
			if err := errors.Join(errRemove, errAdd); err != nil {
				return systemd.Unit{}, err
			}
			start = append(start, systemd.Exec{Args: remove, IgnoreFailure: true}, systemd.Exec{Args: add})
		}
	}
	spool := []string{
		w.guest, "spool", "-dir", w.dir, "-unit", w.names.unit(), "-ifname", w.names.networkInterface(), "-table", w.table.Name(),
	}
	noSwap := uint64(0)
	return systemd.Unit{
		Name:             w.names.unit(),
		Description:      "Compute bridge grant " + w.names.grant.String(),
		SyslogIdentifier: w.names.stem(),
		Delegate:         true,
		RuntimeMax:       w.lifetime,
		TimeoutStart:     startTimeout,
		// Each of the stop's phases has this long; together they stay within
		// the minute that an end may take.
		TimeoutStop:   max(w.stopGrace+5*time.Second, minStopTimeout),
		CPUMillicores: uint64(w.params.Shape.CPU),       //nolint:gosec // validated
		MemoryMax:     uint64(w.params.Shape.RAM) << 20, //nolint:gosec // validated
		MemorySwapMax: &noSwap,
		TasksMax:      tasksMax,
		// An ended or removed attempt never starts, however late the call comes,
		// not even when a later attempt is there.
		ConditionPathExists: []string{w.dir + "/" + attemptFile(w.names.attempt), "!" + w.dir + "/" + guestapi.EndedFileName},
		ExecStartPre:        start,
		ExecStart:           []systemd.Exec{{Args: run}},
		// conmon has podman clean up after the container, in the unit's cgroup.
		// The removal waits for that: systemd would kill it in the middle, and
		// the network's rules and interface would stay.
		ExecStop:     []systemd.Exec{{Args: stop, IgnoreFailure: true}, {Args: remove, IgnoreFailure: true}},
		ExecStopPost: append([]systemd.Exec{{Args: spool, IgnoreFailure: true}}, cleanup...),
	}, nil
}

// cleanup renders what takes everything of a grant away but its directory, the
// container first. It runs in the unit, and again by the worker if anything of
// it is left; each command does no harm if there is nothing.
func (w workload) cleanup() ([]systemd.Exec, error) {
	remove, errRemove := podman.RemoveArgs(w.engine(), w.names.stem())
	network, errNetwork := podman.NetworkRemoveArgs(podman.Engine{}, w.names.stem())
	grant, errGrant := w.firewallGrant()
	closing, errClose := firewall.CloseArgs(w.table, grant)
	if err := errors.Join(errRemove, errNetwork, errGrant, errClose); err != nil {
		return nil, err
	}
	commands := [][]string{
		remove, network, closing,
		// What a podman that was killed has forgotten.
		{ipProgram, "link", "delete", "dev", w.names.networkInterface()},
	}
	if w.firewalld {
		for _, port := range grant.Ports {
			args, err := firewall.FirewalldRemoveArgs(w.zone, port)
			if err != nil {
				return nil, err
			}
			commands = append(commands, args)
		}
	}
	commands = append(commands,
		[]string{umountProgram, "--recursive", "--lazy", w.disk()},
		[]string{umountProgram, "--recursive", "--lazy", w.runRoot},
		[]string{rmProgram, "--force", w.dir + "/" + diskFile},
		[]string{rmProgram, "--recursive", "--force", "--one-file-system", w.runRoot},
	)
	var out []systemd.Exec
	for _, c := range commands {
		out = append(out, systemd.Exec{Args: c, IgnoreFailure: true})
	}
	return out, nil
}

func (w workload) labels() map[string]string {
	return map[string]string{labelBridge: w.names.bridge, labelGrant: w.names.grant.String()}
}

func (w workload) publish() []podman.PortMap {
	out := []podman.PortMap{{HostPort: w.params.SSHPort, ContainerPort: guestapi.DefaultListenPort, Protocol: "tcp"}}
	for _, p := range w.params.Ports {
		out = append(out, podman.PortMap{HostPort: p.HostPort, ContainerPort: p.Port, Protocol: p.Protocol})
	}
	return out
}
