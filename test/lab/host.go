package lab

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// defaultDiskMiB is the size of a host's disk. The image is sparse: it costs
// what was written to it.
const defaultDiskMiB = 8 << 10

// bootLimit bounds a boot whose context has no deadline of its own.
const bootLimit = 5 * time.Minute

// HostOptions says what host to start. The zero value is a host with podman and
// Debian's own sshd configuration.
type HostOptions struct {
	// Name of the host in its lab, and its host name. "host1", "host2" … when
	// empty.
	Name string
	// NoPodman starts a host on which podman isn't installed.
	NoPodman bool
	// SSHDConfig are lines for sshd_config; they win over Debian's.
	SSHDConfig []string
	// Files are written before each boot: path → text.
	Files map[string]string
	// Devices are device nodes of the machine that the host gets too, such as
	// /dev/kvm.
	Devices []string
	// DiskMiB is the size of the host's disk, 8192 when zero.
	DiskMiB int

	// machine is set for what StartMachine starts.
	machine *MachineOptions
}

// Host is a Debian host that runs, or ran, in a lab. Its methods can be called
// by several goroutines, but for those that change its power state.
type Host struct {
	// Name of the host in its lab.
	Name string
	// Addr is the host's address in the lab's network.
	Addr netip.Addr
	// SSHPort is the port of its sshd.
	SSHPort int
	// HostKey is its sshd's only host key, nil of a machine.
	HostKey ssh.PublicKey
	// UserKeyFile is the private key that opens root's account, in OpenSSH's
	// format.
	UserKeyFile string
	// BootTime is how long the latest boot took until systemd said "running".
	BootTime time.Duration

	lab       *Lab
	record    hostRecord
	connected func(context.Context, *Host) error // a machine's
}

// hostRecord is a host's host.json.
type hostRecord struct {
	Name     string        `json:"name"`
	Index    int           `json:"index"`
	HostKey  string        `json:"host_key"` // an authorized_keys line
	Init     proc          `json:"init"`     // the host's PID 1 as the machine sees it
	BootTime time.Duration `json:"boot_time"`
	CutOff   bool          `json:"cut_off"`
	Order    bootOrder     `json:"order"`
	// Machine is set for machines only, which have no host key that we know.
	Machine *machineRecord `json:"machine,omitempty"`
}

// StartHost adds a host to the lab and boots it. It returns when systemd says
// that the host is running and sshd answers: after about two seconds. Safe to
// call concurrently. When it fails nothing of the host is left, and the error
// holds the end of the host's journal.
func (l *Lab) StartHost(ctx context.Context, opts HostOptions) (*Host, error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	root, err := RootFS(ctx, l.log)
	if err != nil {
		return nil, err
	}
	host, err := l.addHost(ctx, root, opts)
	if err != nil {
		return nil, fmt.Errorf("start lab host: %w", err)
	}
	if err := host.boot(ctx); err != nil {
		err = fmt.Errorf("start lab host %s: %w\n%s", host.Name, err, host.console(context.WithoutCancel(ctx)))
		return nil, errors.Join(err, host.Destroy(context.WithoutCancel(ctx)))
	}
	return host, nil
}

// Host returns a host of the lab by its name.
func (l *Lab) Host(name string) (*Host, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	var record hostRecord
	if err := readJSON(filepath.Join(l.Dir(), "hosts", name, "host.json"), &record); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("lab %s has no host %s: %w", l.name, name, fs.ErrNotExist)
		}
		return nil, fmt.Errorf("host %s of lab %s: %w", name, l.name, err)
	}
	return l.hostOf(record)
}

// hostOf makes a Host of its record.
func (l *Lab) hostOf(record hostRecord) (*Host, error) {
	var key ssh.PublicKey
	if record.Machine == nil {
		var err error
		if key, _, _, _, err = ssh.ParseAuthorizedKey([]byte(record.HostKey)); err != nil {
			return nil, fmt.Errorf("host key of %s: %w", record.Name, err)
		}
	}
	return &Host{
		Name: record.Name, Addr: hostAddr(record.Index), SSHPort: 22, HostKey: key,
		UserKeyFile: l.UserKeyFile(), BootTime: record.BootTime, lab: l, record: record,
	}, nil
}

// addHost reserves a name and an address, and makes the host's keys and disk.
func (l *Lab) addHost(ctx context.Context, root string, opts HostOptions) (*Host, error) {
	unlock, err := lockFile(ctx, filepath.Join(l.Dir(), ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	hosts, err := l.Hosts()
	if err != nil {
		return nil, err
	}
	used := map[int]bool{}
	names := map[string]bool{}
	for _, host := range hosts {
		used[host.record.Index], names[host.Name] = true, true
	}
	index := 0
	for used[index] {
		index++
	}
	if opts.Name == "" {
		n := 1
		for names["host"+strconv.Itoa(n)] {
			n++
		}
		opts.Name = "host" + strconv.Itoa(n)
	}
	if err := checkName(opts.Name); err != nil {
		return nil, err
	}
	if names[opts.Name] {
		return nil, fmt.Errorf("lab %s has a host %q already", l.name, opts.Name)
	}
	order, hostKey, err := l.bootOrder(root, opts)
	if err != nil {
		return nil, err
	}
	record := hostRecord{Name: opts.Name, Index: index, HostKey: hostKey, Order: order}
	if opts.machine != nil {
		record.Machine = &machineRecord{Loopback: opts.machine.Loopback}
	}
	host, err := l.hostOf(record)
	if err != nil {
		return nil, err
	}
	if opts.machine != nil {
		host.connected = opts.machine.Connected
	}
	dir := host.dir()
	if err := os.MkdirAll(order.Mounts, 0o700); err != nil {
		return nil, err
	}
	if err := host.save(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	size := opts.DiskMiB
	if size == 0 {
		size = defaultDiskMiB
	}
	if err := makeDisk(ctx, order.Disk, size); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir), os.RemoveAll(filepath.Dir(order.Disk)))
	}
	return host, nil
}

// bootOrder decides all that a host boots with, and its host key.
func (l *Lab) bootOrder(root string, opts HostOptions) (bootOrder, string, error) {
	if opts.machine != nil {
		order, err := l.machineOrder(root, opts)
		return order, "", err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return bootOrder{}, "", err
	}
	privateText, _, err := encodeKey(private, opts.Name)
	if err != nil {
		return bootOrder{}, "", err
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		return bootOrder{}, "", err
	}
	publicText := string(ssh.MarshalAuthorizedKey(sshPublic))
	machineID := make([]byte, 16)
	if _, err := rand.Read(machineID); err != nil {
		return bootOrder{}, "", err
	}
	order := l.emptyOrder(root, opts.Name)
	order.Devices = opts.Devices
	order.Files = map[string]string{
		"etc/hostname":                     opts.Name + "\n",
		"etc/hosts":                        "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 " + opts.Name + "\n",
		"etc/machine-id":                   hex.EncodeToString(machineID) + "\n",
		"etc/ssh/ssh_host_ed25519_key":     privateText,
		"etc/ssh/ssh_host_ed25519_key.pub": publicText,
		"etc/ssh/sshd_config.d/00-lab.conf": "HostKey /etc/ssh/ssh_host_ed25519_key\n" +
			strings.Join(append(opts.SSHDConfig, ""), "\n"),
		"root/.ssh/authorized_keys": string(ssh.MarshalAuthorizedKey(l.key.PublicKey())),
	}
	maps.Copy(order.Files, opts.Files)
	if opts.NoPodman {
		order.Remove = append(order.Remove, "usr/bin/podman",
			"usr/lib/systemd/system/podman.socket", "usr/lib/systemd/system/podman.service")
	}
	return order, publicText, nil
}

// emptyOrder is the order of a host of that name, so far without files.
func (l *Lab) emptyOrder(root, name string) bootOrder {
	return bootOrder{
		RootFS: root, Hostname: name,
		Disk:   filepath.Join(disksDir(l.name), name, "disk.img"),
		Mounts: filepath.Join(l.Dir(), "hosts", name, "mounts"),
		Netns:  netnsPath(l.name + "." + name),
	}
}

// makeDisk makes a sparse ext4 image. No journal: a lab host's power cut keeps
// the machine's page cache.
func makeDisk(ctx context.Context, image string, sizeMiB int) error {
	if err := os.MkdirAll(filepath.Dir(image), 0o700); err != nil {
		return err
	}
	file, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(int64(sizeMiB)<<20), file.Close()); err != nil {
		return err
	}
	return run(ctx, "", "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", image)
}

// dir is the host's state directory.
func (h *Host) dir() string { return filepath.Join(h.lab.Dir(), "hosts", h.Name) }

// netns is the name of the host's network namespace.
func (h *Host) netns() string { return h.lab.name + "." + h.Name }

// save writes the host's record.
func (h *Host) save() error { return writeJSON(filepath.Join(h.dir(), "host.json"), h.record) }

// boot makes the host's network and starts its systemd. The host is down.
func (h *Host) boot(ctx context.Context) error {
	start := time.Now()
	if err := removeHostNetwork(ctx, h.lab.name, h.netns(), h.record.Index); err != nil {
		return err
	}
	// The disk of the boot before may still be mounted for a moment; mounted
	// twice it would be lost.
	if err := waitLoopsFree(ctx, h.record.Order.Disk); err != nil {
		return err
	}
	network := addHostNetwork
	if h.record.Machine != nil {
		network = func(ctx context.Context, _, _ string, _ int) error { return h.connect(ctx) }
	}
	if err := network(ctx, h.lab.name, h.netns(), h.record.Index); err != nil {
		return err
	}
	if err := h.startInit(ctx); err != nil {
		return err
	}
	h.record.CutOff = false
	if err := h.save(); err != nil {
		return err
	}
	if h.record.Machine != nil {
		return nil
	}
	if err := h.waitSSH(ctx); err != nil {
		return err
	}
	if out, err := h.Exec(ctx, "systemctl", "is-system-running", "--wait"); err != nil {
		failed, _ := h.Exec(ctx, "systemctl", "--failed", "--no-legend", "--plain")
		return fmt.Errorf("systemd says %q: %w\n%s", strings.TrimSpace(out), err, failed)
	}
	h.BootTime = time.Since(start)
	h.record.BootTime = h.BootTime
	return h.save()
}

// startInit starts the process that becomes the host's PID 1.
func (h *Host) startInit(ctx context.Context) (err error) {
	order := filepath.Join(h.dir(), "boot.json")
	if err := writeJSON(order, h.record.Order); err != nil {
		return err
	}
	console, err := os.Create(filepath.Join(h.dir(), "console.log"))
	if err != nil {
		return err
	}
	defer console.Close()
	tree, err := openCgroupTree()
	if err != nil {
		return err
	}
	defer tree.close() //nolint:errcheck // nothing was written to it
	if err := tree.remove(ctx, h.lab.name, h.Name); err != nil {
		return err
	}
	if err := tree.make(h.lab.name, h.Name); err != nil {
		return err
	}
	group, err := os.Open(tree.path(h.lab.name, h.Name))
	if err != nil {
		return err
	}
	defer group.Close()
	report, reportWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{helperEnv + "=" + order}
	cmd.Stdout, cmd.Stderr = console, console
	cmd.ExtraFiles = []*os.File{reportWrite}
	cmd.SysProcAttr = &unix.SysProcAttr{
		Setsid:      true,
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		UseCgroupFD: true,
		CgroupFD:    int(group.Fd()),
	}
	err = cmd.Start()
	_ = reportWrite.Close()
	if err != nil {
		return fmt.Errorf("start the host's first process: %w", err)
	}
	h.record.Init, err = procOf(cmd.Process.Pid)
	if err != nil {
		return err
	}
	// End of file comes with the exec of systemd.
	reason, err := io.ReadAll(report)
	if err != nil {
		return err
	}
	if len(reason) > 0 {
		return errors.New(string(reason))
	}
	return nil
}

// waitSSH waits until sshd sends its banner.
func (h *Host) waitSSH(ctx context.Context) error {
	var last error
	err := poll(ctx, 20*time.Millisecond, func() (bool, error) {
		if !h.Running() {
			return false, errors.New("the host's systemd ended")
		}
		last = h.lab.sshAnswers(ctx, h.sshAddr())
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("wait for sshd: %w (last try: %w)", err, last)
	}
	return nil
}

// sshAnswerLimit is how long one look at sshd may take. Where nothing answers at all,
// as before the network is up, the next look finds what this one would wait for.
const sshAnswerLimit = 5 * time.Second

// sshAnswers tells whether something at addr speaks SSH.
func (l *Lab) sshAnswers(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, sshAnswerLimit)
	defer cancel()
	conn, err := l.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(sshAnswerLimit)); err != nil {
		return err
	}
	banner := make([]byte, 4)
	if _, err := io.ReadFull(conn, banner); err != nil {
		return err
	}
	if !bytes.Equal(banner, []byte("SSH-")) {
		return fmt.Errorf("not SSH: %q", banner)
	}
	return nil
}

// sshAddr is the address of the host's sshd.
func (h *Host) sshAddr() string {
	return netip.AddrPortFrom(h.Addr, uint16(h.SSHPort)).String()
}

// HostKeyLine is the host's public key as an authorized_keys line.
func (h *Host) HostKeyLine() string { return strings.TrimSpace(h.record.HostKey) }

// Lab is the host's lab.
func (h *Host) Lab() *Lab { return h.lab }

// Running tells whether the host's systemd runs.
func (h *Host) Running() bool { return h.record.Init.alive() }

// IsCutOff tells whether CutOff was called and Restore wasn't yet.
func (h *Host) IsCutOff() bool { return h.record.CutOff }

// DialSSH logs in as root over SSH, with the host key pinned. Close the client.
func (h *Host) DialSSH(ctx context.Context) (*ssh.Client, error) {
	conn, err := h.lab.Dial(ctx, "tcp", h.sshAddr())
	if err != nil {
		return nil, fmt.Errorf("log in to %s: %w", h.Name, err)
	}
	// The handshake knows no context: a context that ends closes the connection.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	c, channels, requests, err := ssh.NewClientConn(conn, h.sshAddr(), &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(h.lab.key)},
		HostKeyCallback: ssh.FixedHostKey(h.HostKey), HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("log in to %s: %w", h.Name, err), ignoreClosed(conn.Close()))
	}
	return ssh.NewClient(c, channels, requests), nil
}

// ignoreClosed forgets the error of closing a connection twice.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Exec runs a program on the host as root, not over SSH but by entering the
// host's namespaces, so that it also works when the host's network or sshd
// doesn't. It returns standard output; the error of a program that failed wraps
// [exec.ExitError] and holds its standard error.
func (h *Host) Exec(ctx context.Context, argv ...string) (string, error) {
	cmd, done, err := h.command(ctx, argv...)
	if err != nil {
		return "", err
	}
	defer done()
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("on %s: %s: %w: %s", h.Name, strings.Join(argv, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Run is Exec with the caller's own streams, any of which may be nil.
func (h *Host) Run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, argv ...string) error {
	cmd, done, err := h.command(ctx, argv...)
	if err != nil {
		return err
	}
	defer done()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	return cmd.Run()
}

// command prepares a program that will run on the host, in a cgroup of its own
// there. Call done once it ended.
func (h *Host) command(ctx context.Context, argv ...string) (cmd *exec.Cmd, done func(), err error) {
	if len(argv) == 0 {
		return nil, nil, errors.New("lab: no program to run")
	}
	if !h.Running() {
		return nil, nil, fmt.Errorf("host %s is down", h.Name)
	}
	nsenter, err := need("nsenter")
	if err != nil {
		return nil, nil, err
	}
	tree, err := openCgroupTree()
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tree.close())
		}
	}()
	all := tree.path(h.lab.name, h.Name, "lab.exec")
	if err := os.MkdirAll(all, 0o755); err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp(all, "")
	if err != nil {
		return nil, nil, err
	}
	group, err := os.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	// A shell waits for the program, as the last that is outside the host's PID
	// namespace. nsenter itself would stop with a program that is stopped, as systemd
	// stops all when it shuts down, and nobody would have it go on. The shell itself
	// must do nothing: its own kill would mean this machine's processes. Hence exec,
	// which knows no built-in commands, in a child that is on the host.
	args := []string{"-t", strconv.Itoa(h.record.Init.PID), "-m", "-u", "-i", "-n", "-p", "-C", "--no-fork", "--", "/bin/sh", "-c", `(exec "$@"); exit $?`, "sh"}
	cmd = exec.CommandContext(ctx, nsenter, append(args, argv...)...)
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root",
		"LANG=C.UTF-8", "TERM=" + os.Getenv("TERM"),
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	cmd.Cancel = func() error { return killOthers(dir, cmd.Process) }
	cmd.WaitDelay = time.Minute
	return cmd, func() {
		_ = group.Close()
		_ = os.Remove(dir) // what the program left running keeps the group
		_ = tree.close()
	}, nil
}

// killOthers ends a program that a shell outside runs. The shell itself must live
// to reap its child: a zombie whose parent is outside keeps the host's PID
// namespace, and so its PID 1, from ending.
func killOthers(group string, shell *os.Process) error {
	text, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	if err != nil {
		return err
	}
	killed := false
	for field := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		if pid == shell.Pid {
			continue
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		killed = true
	}
	if killed {
		return nil
	}
	return shell.Kill()
}

// console returns what is known of a boot that failed.
func (h *Host) console(ctx context.Context) string {
	var text strings.Builder
	if log, err := os.ReadFile(filepath.Join(h.dir(), "console.log")); err == nil && len(log) > 0 {
		fmt.Fprintf(&text, "console:\n%s\n", lastLines(string(log), 20))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if jobs, err := h.Exec(ctx, "systemctl", "list-jobs", "--no-legend"); err == nil {
		fmt.Fprintf(&text, "jobs:\n%s", jobs)
	}
	if journal, err := h.Journal(ctx); err == nil {
		fmt.Fprintf(&text, "journal:\n%s\n", lastLines(journal, 40))
	}
	return text.String()
}

// Journal returns the journal of the current boot.
func (h *Host) Journal(ctx context.Context) (string, error) {
	return h.Exec(ctx, "journalctl", "-b", "--no-pager", "-o", "short-precise")
}
