// Package machine is the guest's part in the life of a virtual machine that is one grant's instance: it makes the root
// file system, says how the machine fares on its console, and ends it. What runs inside the root file system is package
// instance, as in a container.
package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/ociroot"
)

// Dirs are where things are; tests have them elsewhere.
type Dirs struct {
	// Config has the machine's file.
	Config string
	// State is kept over reboots.
	State string
	// Run isn't.
	Run string
	// Etc has the machine's resolv.conf.
	Etc string
	// Console is the device that the cloud records.
	Console string
}

// SystemDirs are those of a machine; pkg/userdata knows them too.
func SystemDirs() Dirs {
	return Dirs{
		Config:  "/etc/compute-bridge",
		State:   "/var/lib/compute-bridge",
		Run:     "/run/compute-bridge",
		Etc:     "/etc",
		Console: "/dev/console",
	}
}

// Names below Dirs.
const (
	machineFile = "machine.json" // below Config

	rootDir     = "rootfs"
	scratchDir  = "unpacking"
	archiveFile = "image.part"
	// imageFile describes the unpacked image, and is what says that it is complete.
	imageFile = "image.json"
	guestFile = "guest.json"
	// endedFile says that the workload must not run again; a condition of the units.
	endedFile = "ended"

	// readyFile says that SSH has been open since the machine started, verdictFile that a verdict was given.
	readyFile   = "ready"
	verdictFile = "verdict"
)

// Machine is the machine that this process runs on.
type Machine struct {
	dirs   Dirs
	logger *slog.Logger
	now    func() time.Time
	fetch  *fetcher
	system system
}

// New returns the machine with its directories at dirs.
func New(dirs Dirs, logger *slog.Logger) *Machine {
	m := &Machine{dirs: dirs, logger: logger, now: time.Now, system: systemd{}}
	m.fetch = newFetcher(func(failure *FailureError) {
		logger.Warn("The image could not be fetched and is tried again", "reason", failure.Message)
	})
	return m
}

// FailureError is why a machine can't run its workload. Its message has no secret.
type FailureError struct {
	// Reason is one of guestapi's.
	Reason string
	// Message is for people.
	Message string

	final bool // another attempt won't change it
}

// Error implements error.
func (f *FailureError) Error() string { return f.Reason + ": " + f.Message }

func failed(reason, format string, args ...any) *FailureError {
	return &FailureError{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

func finally(reason, format string, args ...any) *FailureError {
	f := failed(reason, format, args...)
	f.final = true
	return f
}

func (m *Machine) config() (guestapi.Machine, error) {
	f, err := os.Open(filepath.Join(m.dirs.Config, machineFile))
	if err != nil {
		return guestapi.Machine{}, err
	}
	defer f.Close()
	return guestapi.DecodeMachine(f)
}

func (m *Machine) state(name string) string { return filepath.Join(m.dirs.State, name) }

// unpacked is what imageFile holds.
type unpacked struct {
	Digest string         `json:"digest"`
	Config ociroot.Config `json:"config"`
}

// Prepare has the image's root file system and the guest's configuration in place. What is complete is kept: after a
// reboot nothing is fetched. What isn't is made again. A failure is told to the console, and is returned.
func (m *Machine) Prepare(ctx context.Context) error {
	config, err := m.config()
	if err != nil {
		// Without the grant's name there is nothing to say to the bridge; the unit's failure ends the machine.
		return fmt.Errorf("the machine's file is refused: %w", err)
	}
	ctx, cancel := context.WithDeadline(ctx, config.Deadline)
	defer cancel()
	if failure := m.prepare(ctx, config); failure != nil {
		return errors.Join(failure, m.say(guestapi.Verdict{
			Grant: config.GrantID, Attempt: config.Attempt, Phase: guestapi.PhaseFailed,
			Reason: failure.Reason, Message: failure.Message,
		}))
	}
	return nil
}

func (m *Machine) prepare(ctx context.Context, config guestapi.Machine) *FailureError {
	if !m.now().Before(config.Deadline) {
		return failed(guestapi.ReasonHostUnfit, "the machine started after its deadline")
	}
	if err := os.MkdirAll(m.dirs.State, 0o700); err != nil {
		return unfit(err)
	}
	image, err := m.unpacked()
	if err != nil {
		return unfit(err)
	}
	kept := image != nil && image.Digest == config.Image.Digest
	if !kept {
		var failure *FailureError
		if image, failure = m.unpack(ctx, config.Image); failure != nil {
			return failure
		}
	}
	guest, err := merge(config.Guest, image.Config)
	if err != nil {
		return failed(guestapi.ReasonImageInvalid, "the image's configuration is refused: %v", err)
	}
	err = m.furnish()
	if full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT); full && kept {
		// The workload has filled the disk, and goes on with what the boot before has left.
		m.logger.Warn("The disk is full, and not all of the machine's files were renewed", "reason", err)
	} else if err != nil {
		return unfit(err)
	}
	if err := writeFile(m.state(guestFile), guest); err != nil {
		return unfit(err)
	}
	return nil
}

// unpacked is the image that is complete, or nil.
func (m *Machine) unpacked() (*unpacked, error) {
	data, err := os.ReadFile(m.state(imageFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var image unpacked
	if err := json.Unmarshal(data, &image); err != nil {
		return nil, nil //nolint:nilerr // Whatever it is, it says nothing of a complete image.
	}
	return &image, nil
}

// unpack fetches the image and makes its root file system, from nothing.
func (m *Machine) unpack(ctx context.Context, image guestapi.MachineImage) (*unpacked, *FailureError) {
	// The description goes first: half a root file system is then never taken for a whole one.
	for _, name := range []string{imageFile, rootDir, scratchDir, archiveFile} {
		if err := os.RemoveAll(m.state(name)); err != nil {
			return nil, unfit(err)
		}
	}
	archive := m.state(archiveFile)
	defer func() { _ = os.Remove(archive) }()
	m.logger.Info("The image is fetched", "digest", image.Digest)
	if failure := m.fetch.fetch(ctx, image, archive); failure != nil {
		return nil, failure
	}
	m.logger.Info("The image is unpacked")
	for name, mode := range map[string]os.FileMode{scratchDir: 0o700, rootDir: 0o755} {
		if err := mkdir(m.state(name), mode); err != nil {
			return nil, unfit(err)
		}
	}
	config, err := ociroot.Unpack(ctx, archive, m.state(scratchDir), m.state(rootDir), runtime.GOARCH)
	if err != nil {
		if errors.Is(err, ociroot.ErrInvalid) {
			return nil, failed(guestapi.ReasonImageInvalid, "the image can't be unpacked: %v", err)
		}
		return nil, unfit(err)
	}
	if err := os.RemoveAll(m.state(scratchDir)); err != nil {
		return nil, unfit(err)
	}
	done := &unpacked{Digest: image.Digest, Config: config}
	data, err := json.Marshal(done)
	if err != nil {
		return nil, unfit(err)
	}
	if err := syncAll(m.state(rootDir)); err != nil {
		return nil, unfit(err)
	}
	if err := writeFile(m.state(imageFile), data); err != nil {
		return nil, unfit(err)
	}
	return done, nil
}

// mkdir makes a directory with that very mode, whatever the umask is.
func mkdir(name string, mode os.FileMode) error {
	if err := os.Mkdir(name, mode); err != nil {
		return err
	}
	return os.Chmod(name, mode)
}

// syncAll waits until the disk has the file system of dir, so that a power cut after it can't leave empty files.
func syncAll(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd())) // #nosec G115 -- a descriptor
}

// writeFile replaces a file, whole or not at all, with mode 0600. One that has these very bytes stays, which needs no
// space on a disk that is full.
func writeFile(name string, data []byte) error {
	if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, data) {
		return nil
	}
	temp := name + ".new"
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(temp, name)
}

// merge is the guest's configuration: what the bridge says laid over what the image says.
func merge(guest guestapi.Config, image ociroot.Config) ([]byte, error) {
	environment := map[string]string{}
	for _, entry := range image.Environment {
		name, value, _ := strings.Cut(entry, "=")
		environment[name] = value
	}
	maps.Copy(environment, guest.Environment)
	guest.Environment = environment
	guest.Command = image.Command
	guest.RunAs = image.User
	guest.WorkingDir = image.WorkingDir
	if guest.WorkingDir != "" && !filepath.IsAbs(guest.WorkingDir) {
		guest.WorkingDir = "/" + guest.WorkingDir // as engines take it
	}
	return guestapi.Encode(guest)
}

// furnish puts into the root file system what every machine gives to its processes, each time anew: names of hosts, the
// way to the name servers, and the directories that the unit mounts over. What an image has made impossible, with links
// that lead elsewhere, it has to do without.
func (m *Machine) furnish() error {
	root, err := os.OpenRoot(m.state(rootDir))
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	for _, dir := range []struct {
		name string
		mode os.FileMode
		// mounted directories may not be links: the mount would be elsewhere.
		mounted bool
	}{
		{"proc", 0o555, true},
		{"sys", 0o555, true},
		{"dev", 0o755, true},
		{"run", 0o755, true},
		{"etc", 0o755, false},
		{"tmp", 0o777 | os.ModeSticky, false},
	} {
		if err := haveDir(root, dir.name, dir.mode, dir.mounted); err != nil {
			return err
		}
	}
	if err := makeOwn(root); err != nil {
		return err
	}
	return m.nameHosts(root)
}

// makeOwn makes what the unit mounts the guest and its configuration over. Nothing of the image's may be there.
func makeOwn(root *os.Root) error {
	own := filepath.Dir(guestapi.ContainerBinaryPath)[1:]
	files := []string{guestapi.ContainerBinaryPath[1:], guestapi.ContainerConfigPath[1:]}
	// What is right stays: a disk that is full may have no place for another.
	if isOwn(root, own, files) {
		return nil
	}
	if err := root.RemoveAll(own); err != nil {
		return err
	}
	if err := haveDir(root, own, 0o755, true); err != nil {
		return err
	}
	for _, name := range files {
		if err := newFile(root, name, 0o600, ""); err != nil {
			return err
		}
	}
	return nil
}

// isOwn says that the directory is as makeOwn makes it.
func isOwn(root *os.Root, dir string, files []string) bool {
	info, err := root.Lstat(dir)
	if err != nil || info.Mode() != fs.ModeDir|0o755 {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	entries, err := fs.ReadDir(root.FS(), dir)
	return ok && int64(stat.Uid) == int64(os.Geteuid()) && err == nil && len(entries) == len(files) &&
		!slices.ContainsFunc(files, func(name string) bool { return !isFile(root, name, 0o600, "") })
}

// isFile says that there is such a file, and no link to one.
func isFile(root *os.Root, name string, mode os.FileMode, content string) bool {
	info, err := root.Lstat(name)
	if err != nil || info.Mode() != mode || info.Size() != int64(len(content)) {
		return false
	}
	data, err := root.ReadFile(name)
	return err == nil && string(data) == content
}

// haveDir makes a directory unless there is one, or, where that will do, a link to one.
func haveDir(root *os.Root, name string, mode os.FileMode, itself bool) error {
	stat := root.Stat
	if itself {
		stat = root.Lstat
	}
	if info, err := stat(name); err == nil && info.IsDir() {
		return nil
	}
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	if err := root.Mkdir(name, mode.Perm()); err != nil { // It refuses the sticky bit.
		return err
	}
	return root.Chmod(name, mode)
}

// nameHosts writes the files by which programs find hosts.
func (m *Machine) nameHosts(root *os.Root) error {
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "localhost"
	}
	// The machine's own stub resolver, if it has one, is reachable: the network is the same.
	resolv, err := os.ReadFile(filepath.Join(m.dirs.Etc, "resolv.conf"))
	if err != nil {
		m.logger.Warn("The machine has no resolv.conf", "reason", err)
	}
	for name, content := range map[string]string{
		"etc/resolv.conf": string(resolv),
		"etc/hostname":    hostname + "\n",
		"etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 " +
			hostname + "\n",
	} {
		if isFile(root, name, 0o644, content) {
			continue
		}
		err := replaceFile(root, name, 0o644, content)
		switch {
		case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EIO):
			return err
		case err != nil:
			m.logger.Warn("The image's file can't be replaced", "file", name, "reason", err)
		}
	}
	return nil
}

// replaceFile puts a file where another, or a link or a directory, may be. On a disk that is full, what was there stays.
func replaceFile(root *os.Root, name string, mode os.FileMode, content string) error {
	temp := filepath.Join(filepath.Dir(name), ".compute-bridge.new")
	if err := root.RemoveAll(temp); err != nil {
		return err
	}
	if err := newFile(root, temp, mode, content); err != nil {
		return errors.Join(err, root.RemoveAll(temp))
	}
	// An image may have a link there, to where a service of its own would write, which goes; a directory has to go first.
	if info, err := root.Lstat(name); err == nil && info.IsDir() {
		if err := root.RemoveAll(name); err != nil {
			return errors.Join(err, root.RemoveAll(temp))
		}
	}
	if err := root.Rename(temp, name); err != nil {
		return errors.Join(err, root.RemoveAll(temp))
	}
	return nil
}

// newFile makes a file where there is none, with that very mode.
func newFile(root *os.Root, name string, mode os.FileMode, content string) error {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, content)
	return errors.Join(err, f.Chmod(mode), f.Close())
}
