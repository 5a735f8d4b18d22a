package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cacheEnv names the environment variable that moves the lab's cache and disks.
const cacheEnv = "CBLAB_CACHE"

// defaultCache holds built root file systems, and the disks of running hosts.
const defaultCache = "/var/cache/compute-bridge-lab"

// recipeVersion changes whenever this file changes what it does to a root file
// system after the packages are installed.
const recipeVersion = "3"

// packages are what a lab host has, beside the release's essential packages.
// libfaketime is for [Host.SetClockSkew] alone, busybox for the test images.
func packages() []string {
	return []string{
		"systemd", "systemd-sysv", "dbus", "udev", "openssh-server", "openssh-sftp-server", "podman", "crun",
		"netavark", "aardvark-dns", "nftables", "iproute2", "procps", "kmod", "ca-certificates", "libfaketime",
		"busybox-static", "e2fsprogs",
	}
}

// cloudPackages are what a machine with cloud-init has, beside the release's
// essential packages: what the distribution's images for clouds have, too, of what
// matters to user-data.
func cloudPackages() []string {
	return []string{
		"systemd", "systemd-sysv", "dbus", "udev", "cloud-init", "python3", "openssh-server", "openssh-sftp-server",
		"iproute2", "procps", "kmod", "ca-certificates", "e2fsprogs", "netbase",
	}
}

// left out of the root file system: nobody reads them on a lab host.
func excludedPaths() []string {
	return []string{"/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"}
}

// maskedUnits would reach beyond the host's namespaces or only cost time.
// systemd-sysctl first of all: a boot with it changes the machine's own sysctls.
func maskedUnits() []string {
	return []string{
		"systemd-sysctl.service", "systemd-modules-load.service", "systemd-binfmt.service",
		"proc-sys-fs-binfmt_misc.automount", "proc-sys-fs-binfmt_misc.mount",
		"sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
		"dev-hugepages.mount", "systemd-pstore.service", "systemd-udevd.service", "systemd-udev-trigger.service",
		"systemd-udevd-kernel.socket", "systemd-udevd-control.socket", "kmod-static-nodes.service",
		"console-getty.service", "getty@tty1.service", "getty.target", "systemd-networkd.service", "systemd-networkd.socket",
		"systemd-logind.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer",
		"e2scrub_all.timer", "e2scrub_reap.service", "sshd-keygen.service",
		"netavark-dhcp-proxy.socket", "netavark-dhcp-proxy.service", "podman-auto-update.timer",
	}
}

// need returns the path of a program of the machine, or an error that names
// the Debian package to install.
func need(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	pkg := map[string]string{
		"mmdebstrap": "mmdebstrap", "ip": "iproute2", "ss": "iproute2", "bridge": "iproute2", "tc": "iproute2",
		"nsenter": "util-linux", "mkfs.ext4": "e2fsprogs", "ssh": "openssh-client",
	}[program]
	return "", fmt.Errorf("%s is not installed: apt-get install %s", program, pkg)
}

// CacheDir is the directory of built root file systems and of the disks of
// running hosts: $CBLAB_CACHE, or /var/cache/compute-bridge-lab.
func CacheDir() string {
	if dir := os.Getenv(cacheEnv); dir != "" {
		return dir
	}
	return defaultCache
}

// recipe says what a root file system is made of.
type recipe struct {
	title          string // for people
	suite, sources string
	packages       []string
	masked         []string
	enabled        []string // units that the packages leave off
	size           string   // for people
}

// RootFS returns the directory of the root file system that all lab hosts share
// as their lower layer, and builds it first when the cache has none for this
// recipe: about 70 seconds and 350 MB, announced on log before it starts.
// Processes that ask at the same time build it once; the others wait. A build
// that is broken off leaves nothing that a later call would take for finished.
func RootFS(ctx context.Context, log io.Writer) (string, error) {
	sources, suite, err := hostSources("/etc", "")
	if err != nil {
		return "", err
	}
	return rootFS(ctx, log, recipe{
		title: "the lab hosts' root file system", size: "350 MB",
		suite: suite, sources: sources, packages: packages(), masked: maskedUnits(),
	})
}

// CloudRootFS is RootFS for machines that boot as a cloud's instances do
// ([Lab.StartMachine]): the release's own cloud-init, systemd-networkd and sshd,
// and no podman. suite is a release of the machine's distribution, such as
// "bookworm"; empty means that of the lab's hosts.
func CloudRootFS(ctx context.Context, log io.Writer, suite string) (string, error) {
	sources, suite, err := hostSources("/etc", suite)
	if err != nil {
		return "", err
	}
	return rootFS(ctx, log, recipe{
		title: "a root file system with cloud-init", size: "300 MB",
		suite: suite, sources: sources, packages: cloudPackages(),
		masked: slices.DeleteFunc(maskedUnits(), func(unit string) bool {
			// It sets up the network that cloud-init tells it.
			return strings.HasPrefix(unit, "systemd-networkd.")
		}),
		enabled: []string{"systemd-networkd.service"},
	})
}

// rootFS returns the directory of a root file system of this recipe.
func rootFS(ctx context.Context, log io.Writer, made recipe) (string, error) {
	hash := sha256.New()
	fmt.Fprintf(hash, "%s\n%s\n%s\n%s\n%q\n%q\n%q\n", recipeVersion, runtime.GOARCH, made.suite, made.sources,
		made.packages, excludedPaths(), made.masked)
	if len(made.enabled) > 0 {
		fmt.Fprintf(hash, "%q\n", made.enabled)
	}
	dir := filepath.Join(CacheDir(), hex.EncodeToString(hash.Sum(nil))[:16])
	root := filepath.Join(dir, "root")
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := os.MkdirAll(CacheDir(), 0o755); err != nil {
		return "", fmt.Errorf("make the lab's cache: %w", err)
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := buildRootFS(ctx, log, dir, made); err != nil {
		return "", fmt.Errorf("build %s: %w", made.title, err)
	}
	return root, nil
}

// buildRootFS builds into a temporary directory and renames it to dir.
func buildRootFS(ctx context.Context, log io.Writer, dir string, made recipe) (err error) {
	mmdebstrap, err := need("mmdebstrap")
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it takes root")
	}
	start := time.Now()
	fmt.Fprintf(log, "lab: building %s (%s, %d packages and what they need) with mmdebstrap\n"+
		"lab: from this machine's own apt sources, into %s: %s, once, in one to three minutes\n",
		made.title, made.suite, len(made.packages), dir, made.size)
	// What earlier builds left when they were broken off. We hold the lock.
	stale, err := filepath.Glob(dir + ".tmp-*")
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".tmp-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	sourcesFile := filepath.Join(tmp, "lab.sources")
	if err := os.WriteFile(sourcesFile, []byte(made.sources), 0o644); err != nil {
		return err
	}
	args := []string{
		"--mode=root", "--variant=minbase", "--include=" + strings.Join(made.packages, ","),
		"--aptopt=APT::Install-Recommends \"false\"",
	}
	proxies, err := aptTransport(ctx)
	if err != nil {
		return err
	}
	for _, option := range proxies {
		args = append(args, "--aptopt="+option)
	}
	for _, path := range excludedPaths() {
		args = append(args, "--dpkgopt=path-exclude="+path)
	}
	for _, unit := range made.enabled {
		args = append(args, `--customize-hook=chroot "$1" systemctl enable `+unit)
	}
	root := filepath.Join(tmp, "root")
	args = append(args, made.suite, root, sourcesFile)
	var output strings.Builder
	cmd := exec.CommandContext(ctx, mmdebstrap, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	// SIGTERM first: mmdebstrap unmounts what it mounted in the new root.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, lastLines(output.String(), 25))
	}
	if err := finishRootFS(root, made.masked); err != nil {
		return err
	}
	// mmdebstrap makes its temporary directory private; hosts' services that
	// aren't root must get through.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	fmt.Fprintf(log, "lab: root file system built in %.0f s\n", time.Since(start).Seconds())
	return nil
}

// finishRootFS makes a root file system that no host has booted from yet:
// without identity, and without the units that must not run in a namespace.
func finishRootFS(root string, masked []string) error {
	keys, err := filepath.Glob(filepath.Join(root, "etc/ssh/ssh_host_*"))
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := os.Remove(key); err != nil {
			return err
		}
	}
	for _, unit := range masked {
		link := filepath.Join(root, "etc/systemd/system", unit)
		if err := os.RemoveAll(link); err != nil {
			return err
		}
		if err := os.Symlink("/dev/null", link); err != nil {
			return err
		}
	}
	for path, text := range map[string]string{
		"etc/machine-id":  "",
		"etc/fstab":       "",
		"etc/resolv.conf": "",
		// Nothing to rebuild at boot: see systemd-update-done.service(8).
		"etc/.updated": "", "var/.updated": "",
		"etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n" +
			"ReadKMsg=no\nAudit=no\nRateLimitIntervalSec=0\n",
	} {
		file := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// aptTransport returns the machine's apt options that say how archives are
// reached (proxies, date checks), as apt.conf lines.
func aptTransport(ctx context.Context) ([]string, error) {
	aptConfig, err := need("apt-config")
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, aptConfig, "dump").Output()
	if err != nil {
		return nil, fmt.Errorf("apt-config dump: %w", err)
	}
	var options []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		lower := strings.ToLower(line)
		for _, prefix := range []string{
			"acquire::http", "acquire::check-valid-until", "acquire::check-date", "acquire::retries",
		} {
			if strings.HasPrefix(lower, prefix) && !strings.HasSuffix(line, `"";`) {
				options = append(options, line)
			}
		}
	}
	return options, nil
}

// lockFile takes an exclusive lock on path and returns the function that gives
// it back. It waits until ctx ends.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	err = poll(ctx, 50*time.Millisecond, func() (bool, error) {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), file.Close())
	}
	return func() {
		_ = file.Close() // the lock ends with the descriptor, whatever close says
	}, nil
}

// poll calls done until it says true or fails, or ctx ends.
func poll(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		ok, err := done()
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// lastLines returns the last n lines of text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
