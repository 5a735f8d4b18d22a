package lab

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// helperEnv marks a process as the lab's own helper. Its value is the path of
// the boot order.
const helperEnv = "CBLAB_HELPER"

// bootOrder is what a host's first process must know before it becomes systemd.
type bootOrder struct {
	RootFS   string `json:"root_fs"`  // shared lower layer
	Disk     string `json:"disk"`     // disk image with the upper layer
	Mounts   string `json:"mounts"`   // directory for mount points, seen by the host's mount namespace only
	Netns    string `json:"netns"`    // path of the network namespace
	Hostname string `json:"hostname"` // also the lab's name of the host
	// Files are written into the host before each boot. A path maps to text;
	// paths that end in .key and the authorized keys are private to root.
	Files  map[string]string `json:"files"`
	Remove []string          `json:"remove"` // paths removed from the host before each boot
	// Devices are device nodes of the machine that the host gets too.
	Devices []string `json:"devices"`
	// Console is a terminal of the machine that is the host's /dev/console.
	Console string `json:"console,omitempty"`
	// Sys are files that /sys has beside the kernel's.
	Sys map[string]string `json:"sys,omitempty"`
}

// Helper must be the first call in main of a program that opens a lab. In an
// ordinary run it returns at once. In the lab's own child process, which is
// the same binary, it becomes a host's PID 1 and never returns.
func Helper() {
	path := os.Getenv(helperEnv)
	if path == "" {
		return
	}
	// The parent reads the reason from descriptor 3, or end of file when exec
	// closed it.
	report := os.NewFile(3, "boot report")
	err := bootHost(path)
	fmt.Fprint(report, err)
	os.Exit(1)
}

// bootHost turns this process, which is PID 1 of a new PID namespace in its own
// mount, UTS and IPC namespaces, into the host's systemd. It returns only on
// failure; every mount it made ends with its mount namespace.
func bootHost(orderPath string) error {
	runtime.LockOSThread() // namespaces and capability bounds belong to threads until exec
	unix.CloseOnExec(3)
	text, err := os.ReadFile(orderPath)
	if err != nil {
		return err
	}
	var order bootOrder
	if err := json.Unmarshal(text, &order); err != nil {
		return fmt.Errorf("boot order: %w", err)
	}
	netns, err := os.Open(order.Netns)
	if err != nil {
		return err
	}
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", order.Netns, err)
	}
	// Here and not at clone: the group of the namespace's root is the one this
	// process is in, and clone would take its parent's.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare the cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(order.Hostname)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	root, err := mountRoot(order)
	if err != nil {
		return err
	}
	if err := writeFiles(root, order); err != nil {
		return err
	}
	if err := mountSystem(root, order.Devices); err != nil {
		return err
	}
	if err := addToSys(root, order.Sys); err != nil {
		return err
	}
	if order.Console != "" {
		if err := mountConsole(root, order.Console); err != nil {
			return err
		}
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter %s: %w", root, err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the machine's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// systemd does so on a machine, and leaves it to others where it takes itself
	// to be in a container. Without it, what conmon has podman clean up after a
	// container that ended by itself doesn't see its network namespace.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	for _, drop := range []uintptr{unix.CAP_SYS_MODULE, unix.CAP_SYS_TIME, unix.CAP_SYSLOG} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, drop, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", drop, err)
		}
	}
	unix.Umask(0o022)
	env := []string{
		"container=lab", "TERM=dumb",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
	return fmt.Errorf("exec /sbin/init: %w", syscall.Exec("/sbin/init", []string{"/sbin/init"}, env))
}

// mountRoot mounts the host's disk and its root on top, and returns the root.
func mountRoot(order bootOrder) (string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("make mounts private: %w", err)
	}
	// A tmpfs of its own, so that mount points leave no directory behind.
	if err := mountAt(order.Mounts, "tmpfs", "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return "", err
	}
	disk, root := filepath.Join(order.Mounts, "disk"), filepath.Join(order.Mounts, "root")
	if err := os.MkdirAll(disk, 0o755); err != nil {
		return "", err
	}
	if err := mountImage(order.Disk, disk); err != nil {
		return "", err
	}
	for _, dir := range []string{"upper", "work", "containers"} {
		if err := os.MkdirAll(filepath.Join(disk, dir), 0o755); err != nil {
			return "", err
		}
	}
	err := mountAt(root, "overlay", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s",
		order.RootFS, filepath.Join(disk, "upper"), filepath.Join(disk, "work")))
	if err != nil {
		return "", err
	}
	// podman's overlays can't have an overlay below them: the store is on the
	// disk itself.
	return root, bind(filepath.Join(disk, "containers"), filepath.Join(root, "var/lib/containers"), 0)
}

// mountImage mounts an ext4 image by a loop device that frees itself when the
// mount ends.
func mountImage(image, dir string) error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("this machine has no loop devices, which hosts' disks need: %w", err)
	}
	defer control.Close()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	// Another process may take the free device between the two calls.
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		if err := ensureNode(device, unix.S_IFBLK|0o660, 7, uint32(n)); err != nil {
			return err
		}
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd())}
		config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		copy(config.Info.File_name[:], image)
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if errors.Is(err, unix.EBUSY) {
			_ = loop.Close()
			continue
		}
		if err == nil {
			err = unix.Mount(device, dir, "ext4", unix.MS_NOATIME, "noinit_itable")
		}
		_ = loop.Close() // the mount keeps the device
		if err != nil {
			return fmt.Errorf("mount %s by %s: %w", image, device, err)
		}
		return nil
	}
	return errors.New("no free loop device in 64 tries")
}

// writeFiles gives the host its identity and its configuration.
func writeFiles(root string, order bootOrder) error {
	for _, path := range order.Remove {
		if err := os.RemoveAll(filepath.Join(root, path)); err != nil {
			return err
		}
	}
	for path, text := range order.Files {
		file := filepath.Join(root, path)
		mode, dirMode := fs.FileMode(0o644), fs.FileMode(0o755)
		if strings.HasSuffix(path, "_key") || strings.HasSuffix(path, "authorized_keys") {
			mode = 0o600
		}
		if strings.HasSuffix(path, "authorized_keys") {
			dirMode = 0o700
		}
		if err := os.MkdirAll(filepath.Dir(file), dirMode); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			return err
		}
	}
	return nil
}

// mountSystem mounts what a booted Linux has beside its root.
func mountSystem(root string, devices []string) error {
	at := func(path string) string { return filepath.Join(root, path) }
	const guarded = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	type mount struct {
		path, kind string
		flags      uintptr
		data       string
	}
	for _, m := range []mount{
		{"proc", "proc", guarded, ""},
		{"sys", "sysfs", guarded | unix.MS_RDONLY, ""},
		{"sys/fs/cgroup", "cgroup2", guarded, ""},
		{"dev", "tmpfs", unix.MS_NOSUID, "mode=0755,size=1m"},
		{"dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		// The kernel lets a user namespace mount proc and sysfs only where some
		// whole mount of them can be seen; the guards on /proc/sys below hide
		// parts of the first. Containers with --uidmap need these two.
		{"dev/.lab/proc", "proc", guarded, ""},
		{"dev/.lab/sys", "sysfs", guarded | unix.MS_RDONLY, ""},
	} {
		if err := mountAt(at(m.path), m.kind, m.kind, m.flags, m.data); err != nil {
			return err
		}
	}
	// The machine's kernel settings can be read, and only the network's, which
	// belong to the host's namespace, can be written.
	if err := bind(at("proc/sys"), at("proc/sys"), unix.MS_RDONLY|guarded); err != nil {
		return err
	}
	if err := bind(at("dev/.lab/proc/sys/net"), at("proc/sys/net"), 0); err != nil {
		return err
	}
	// Each boot has an id of its own, as on a machine; the kernel's would stay
	// the same.
	bootID := uuid4()
	if err := os.WriteFile(at("dev/.lab/boot_id"), []byte(bootID+"\n"), 0o444); err != nil {
		return err
	}
	if err := bind(at("dev/.lab/boot_id"), at("proc/sys/kernel/random/boot_id"), unix.MS_RDONLY|guarded); err != nil {
		return err
	}
	if !exists(at("proc/sysrq-trigger")) { // a kernel without it
		return makeDevices(root, devices)
	}
	if err := bind(at("proc/sysrq-trigger"), at("proc/sysrq-trigger"), unix.MS_RDONLY|guarded); err != nil {
		return err
	}
	return makeDevices(root, devices)
}

// addToSys gives /sys further files, which sysfs itself can't have: a file system
// in its place holds them beside what is sysfs's.
func addToSys(root string, files map[string]string) error {
	if len(files) == 0 {
		return nil
	}
	whole, made := filepath.Join(root, "dev/.lab/sys"), filepath.Join(root, "dev/.lab/more-sys")
	const guarded = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := mountAt(made, "tmpfs", "tmpfs", guarded, "mode=0755,size=1m"); err != nil {
		return err
	}
	entries, err := os.ReadDir(whole)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		// Its mount stays read-only.
		if err := bind(filepath.Join(whole, entry.Name()), filepath.Join(made, entry.Name()), 0); err != nil {
			return err
		}
	}
	for path, text := range files {
		file := filepath.Join(made, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o444); err != nil {
			return err
		}
	}
	// systemd takes a /sys that can be written for one with devices to manage.
	if err := unix.Mount("", made, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|guarded, ""); err != nil {
		return fmt.Errorf("guard %s: %w", made, err)
	}
	sys := filepath.Join(root, "sys")
	if err := unix.Mount(filepath.Join(sys, "fs/cgroup"), filepath.Join(made, "fs/cgroup"), "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the control groups: %w", err)
	}
	if err := unix.Unmount(sys, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", sys, err)
	}
	if err := unix.Mount(made, sys, "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("put %s in its place: %w", sys, err)
	}
	return nil
}

// mountConsole makes a terminal the host's console.
func mountConsole(root, terminal string) error {
	console := filepath.Join(root, "dev/console")
	if err := os.WriteFile(console, nil, 0o600); err != nil {
		return err
	}
	return bind(terminal, console, 0)
}

// uuid4 returns a random UUID (RFC 9562, version 4).
func uuid4() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// makeDevices makes the few device nodes of a host without hardware.
func makeDevices(root string, devices []string) error {
	type node struct {
		path         string
		major, minor uint32
	}
	nodes := []node{
		{"null", 1, 3},
		{"zero", 1, 5},
		{"full", 1, 7},
		{"random", 1, 8},
		{"urandom", 1, 9},
		{"tty", 5, 0},
		{"fuse", 10, 229},
		{"net/tun", 10, 200},
		{"loop-control", 10, 237},
	}
	for n := range uint32(64) {
		nodes = append(nodes, node{fmt.Sprintf("loop%d", n), 7, n})
	}
	for _, n := range nodes {
		kind := uint32(unix.S_IFCHR | 0o666)
		if strings.HasPrefix(n.path, "loop") && n.path != "loop-control" {
			kind = unix.S_IFBLK | 0o660
		}
		if err := ensureNode(filepath.Join(root, "dev", n.path), kind, n.major, n.minor); err != nil {
			return err
		}
	}
	for _, path := range devices {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			return fmt.Errorf("device %s: %w", path, err)
		}
		err := ensureNode(filepath.Join(root, path), stat.Mode, unix.Major(stat.Rdev), unix.Minor(stat.Rdev))
		if err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
		"ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, filepath.Join(root, "dev", link)); err != nil {
			return err
		}
	}
	return nil
}

// ensureNode makes a device node where there is none.
func ensureNode(path string, mode, major, minor uint32) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	old := unix.Umask(0)
	err := unix.Mknod(path, mode, int(unix.Mkdev(major, minor)))
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

// mountAt makes the directory and mounts there.
func mountAt(dir, source, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, dir, err)
	}
	return nil
}

// bind mounts from on to, with flags set on the new mount only.
func bind(from, to string, flags uintptr) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if info, err := os.Stat(from); err == nil && info.IsDir() {
		if err := os.MkdirAll(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.EROFS) {
			return err
		}
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", from, to, err)
	}
	if flags == 0 {
		return nil
	}
	if err := unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		return fmt.Errorf("guard %s: %w", to, err)
	}
	return nil
}
