package lab

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// stateDir holds one directory per lab, with all that is needed to clean up
// after a process that was killed.
const stateDir = "/run/compute-bridge-lab"

// labEnv names the lab in whose network namespace a process runs. [Main] sets
// it for the tests.
const labEnv = "CBLAB_LAB"

// ByHand is the name of the lab that `lab up` starts.
const ByHand = "cblab"

// Options says what lab to open. The zero value is a lab for this process, with
// a random name, that the next sweep removes if this process dies.
type Options struct {
	// Name of the lab, and of its network namespace. Random when empty.
	Name string
	// Persistent labs outlive the process that opened them and are never swept.
	Persistent bool
	// Log is told what takes long before it is done. Standard error when nil.
	Log io.Writer
}

// Lab is a network of its own in which hosts can be started. Its methods can be
// used by several goroutines and several processes at once.
type Lab struct {
	name string
	log  io.Writer
	key  ssh.Signer
}

// labRecord is a lab's lab.json.
type labRecord struct {
	Name       string `json:"name"`
	Persistent bool   `json:"persistent"`
	Owner      proc   `json:"owner"`
}

// proc identifies a process for good: a PID comes back, with another start time.
type proc struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since the machine's boot
}

// Open makes a new lab, after sweeping away labs whose owner died. The error of
// a name that is taken is [fs.ErrExist].
func Open(ctx context.Context, opts Options) (*Lab, error) {
	if os.Getenv(helperEnv) != "" {
		return nil, errors.New("lab: main must call lab.Helper first")
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: hosts take root")
	}
	for _, program := range []string{"ip", "bridge", "nsenter", "mkfs.ext4"} {
		if _, err := need(program); err != nil {
			return nil, fmt.Errorf("lab: %w", err)
		}
	}
	if opts.Log == nil {
		opts.Log = os.Stderr
	}
	if opts.Name == "" {
		suffix := make([]byte, 4)
		if _, err := rand.Read(suffix); err != nil {
			return nil, err
		}
		opts.Name = "cblab-" + hex.EncodeToString(suffix)
	}
	if err := checkName(opts.Name); err != nil {
		return nil, err
	}
	if err := Sweep(ctx); err != nil {
		return nil, err
	}
	// Before the lock: it can take minutes, and has a lock of its own.
	if _, err := RootFS(ctx, opts.Log); err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, filepath.Join(stateDir, ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	lab, err := create(ctx, opts)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, errors.Join(fmt.Errorf("open lab %s: %w", opts.Name, err), destroy(context.WithoutCancel(ctx), opts.Name))
	}
	return lab, err
}

// create makes a lab's state and network. The caller holds the lock.
func create(ctx context.Context, opts Options) (*Lab, error) {
	dir := filepath.Join(stateDir, opts.Name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "hosts"), 0o700); err != nil {
		return nil, err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	text, signer, err := encodeKey(private, "lab")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "id_ed25519"), []byte(text), 0o600); err != nil {
		return nil, err
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "id_ed25519.pub"), ssh.MarshalAuthorizedKey(sshPublic), 0o644); err != nil {
		return nil, err
	}
	if err := addLabNetwork(ctx, opts.Name); err != nil {
		return nil, err
	}
	owner, err := procOf(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := writeJSON(filepath.Join(dir, "lab.json"), labRecord{opts.Name, opts.Persistent, owner}); err != nil {
		return nil, err
	}
	return &Lab{name: opts.Name, log: opts.Log, key: signer}, nil
}

// Load returns a lab that exists. The error of one that doesn't is
// [fs.ErrNotExist].
func Load(name string) (*Lab, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	dir := filepath.Join(stateDir, name)
	if _, err := os.Stat(filepath.Join(dir, "lab.json")); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no lab %s: %w", name, fs.ErrNotExist)
		}
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "id_ed25519"))
	if err != nil {
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	return &Lab{name: name, log: os.Stderr, key: signer}, nil
}

// Current returns the lab in whose network this process runs: the one that
// [Main] made, or the one of `lab shell`.
func Current() (*Lab, error) {
	name := os.Getenv(labEnv)
	if name == "" {
		return nil, errors.New("this process isn't in a lab: call lab.Main from TestMain")
	}
	return Load(name)
}

// List returns the names of all labs on this machine.
func List() ([]string, error) {
	entries, err := os.ReadDir(stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if entry.IsDir() {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// Sweep destroys the labs whose owner died without doing so.
func Sweep(ctx context.Context) error {
	unlock, err := lockFile(ctx, filepath.Join(stateDir, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	names, err := List()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		var record labRecord
		err := readJSON(filepath.Join(stateDir, name, "lab.json"), &record)
		// Without a record its making was broken off: we hold the lock, so
		// nobody is making it now.
		if err == nil && (record.Persistent || record.Owner.alive()) {
			continue
		}
		errs = append(errs, destroy(ctx, name))
	}
	return errors.Join(errs...)
}

// Name of the lab and of its network namespace.
func (l *Lab) Name() string { return l.name }

// Dir is the lab's state directory. It ends with the lab.
func (l *Lab) Dir() string { return filepath.Join(stateDir, l.name) }

// UserKeyFile is the private key that opens root's account on every host of the
// lab, in OpenSSH's format.
func (l *Lab) UserKeyFile() string { return filepath.Join(l.Dir(), "id_ed25519") }

// UserKey is the key in [Lab.UserKeyFile].
func (l *Lab) UserKey() ssh.Signer { return l.key }

// Addr is the lab's own address in its network.
func (l *Lab) Addr() netip.Addr { return labAddr() }

// Command returns a command of the machine that will run in the lab's network.
func (l *Lab) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + netnsPath(l.name), "--", program}, args...)...)
	cmd.Env = append(os.Environ(), labEnv+"="+l.name)
	return cmd
}

// Dial connects from the lab's network, wherever the calling process is. addr
// must be an IP address with a port.
func (l *Lab) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, err
	}
	var conn net.Conn
	err := inNetns(l.name, func() error {
		var dialer net.Dialer
		var err error
		conn, err = dialer.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Close destroys the lab with all its hosts.
func (l *Lab) Close(ctx context.Context) error {
	unlock, err := lockFile(ctx, filepath.Join(stateDir, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	return destroy(ctx, l.name)
}

// destroy removes everything of a lab, however far its making got.
func destroy(ctx context.Context, name string) error {
	tree, err := openCgroupTree()
	if err != nil {
		return err
	}
	defer tree.close() //nolint:errcheck // nothing was written to it
	if err := tree.remove(ctx, name); err != nil {
		return err
	}
	namespaces, err := labNamespaces(name)
	if err != nil {
		return err
	}
	for _, netns := range namespaces {
		if err := removeNetns(ctx, netns); err != nil {
			return err
		}
	}
	disks := disksDir(name)
	if err := waitLoopsFree(ctx, disks); err != nil {
		return err
	}
	if err := os.RemoveAll(disks); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(stateDir, name)); err != nil {
		return err
	}
	if others, err := List(); err == nil && len(others) == 0 {
		// The last lab takes the lab's own group along. Callers hold the lock, so
		// no lab is being made; and a group that won't go is empty.
		_ = os.Remove(tree.path())
	}
	return nil
}

// labNamespaces lists a lab's network namespaces.
func labNamespaces(lab string) ([]string, error) {
	entries, err := os.ReadDir(netnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		// "cblab" must not take "cblab-1a2b3c4d" for its host: hosts' names are
		// set off by a dot.
		if entry.Name() == lab || strings.HasPrefix(entry.Name(), lab+".") {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// Remains lists what a closed lab left on the machine: network namespaces,
// directories, control groups, mounts, loop devices. It should be nothing.
func Remains(name string) ([]string, error) {
	var left []string
	namespaces, err := labNamespaces(name)
	if err != nil {
		return nil, err
	}
	for _, netns := range namespaces {
		left = append(left, "network namespace "+netns)
	}
	for _, dir := range []string{filepath.Join(stateDir, name), disksDir(name)} {
		if exists(dir) {
			left = append(left, "directory "+dir)
		}
	}
	tree, err := openCgroupTree()
	if err != nil {
		return nil, err
	}
	defer tree.close() //nolint:errcheck // nothing was written to it
	if exists(tree.path(name)) {
		left = append(left, "cgroup "+filepath.Join(cgroupParent, name))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		for _, dir := range []string{filepath.Join(stateDir, name) + "/", disksDir(name) + "/"} {
			if strings.Contains(line, dir) {
				left = append(left, "mount "+strings.TrimSpace(line))
			}
		}
	}
	loops, err := loopsBelow(disksDir(name))
	if err != nil {
		return nil, err
	}
	for _, loop := range loops {
		left = append(left, "loop device "+loop)
	}
	return left, nil
}

// disksDir holds the disk images of a lab's hosts. They are too big for /run.
func disksDir(lab string) string { return filepath.Join(CacheDir(), "disks", lab) }

// loopsBelow lists the loop devices whose image is below dir.
func loopsBelow(dir string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var loops []string
	for _, file := range files {
		image, err := os.ReadFile(file)
		if err != nil {
			continue // freed since
		}
		if path := strings.TrimSpace(string(image)); path == dir || strings.HasPrefix(path, dir+"/") {
			loops = append(loops, strings.Split(file, "/")[3])
		}
	}
	return loops, nil
}

// waitLoopsFree waits until no loop device uses an image below dir. A host's
// mounts end some time after its last process.
func waitLoopsFree(ctx context.Context, dir string) error {
	err := poll(ctx, 5*time.Millisecond, func() (bool, error) {
		loops, err := loopsBelow(dir)
		return len(loops) == 0, err
	})
	if err != nil {
		return fmt.Errorf("wait for the disks below %s: %w", dir, err)
	}
	return nil
}

// checkName refuses names that can't be a directory, a namespace and a host name.
func checkName(name string) error {
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`).MatchString(name) {
		return fmt.Errorf("lab: bad name %q: small letters, digits and dashes, at most 40", name)
	}
	return nil
}

// encodeKey returns a private key in OpenSSH's format, and as a signer.
func encodeKey(private ed25519.PrivateKey, comment string) (string, ssh.Signer, error) {
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return "", nil, err
	}
	signer, err := ssh.NewSignerFromKey(private)
	return string(pem.EncodeToMemory(block)), signer, err
}

// procOf identifies a running process.
func procOf(pid int) (proc, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return proc{}, err
	}
	// The name in parentheses may hold anything; field 22 counts from 1.
	_, rest, _ := strings.Cut(string(text), ") ")
	if i := strings.LastIndex(string(text), ") "); i >= 0 {
		rest = string(text)[i+2:]
	}
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return proc{}, fmt.Errorf("/proc/%d/stat: too short", pid)
	}
	if fields[0] == "Z" {
		return proc{}, fs.ErrNotExist
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return proc{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return proc{pid, start}, nil
}

// alive tells whether the process still runs. A zombie doesn't.
func (p proc) alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := procOf(p.PID)
	return err == nil && now == p
}

// wait waits until the process has ended, and reaps it if it is a child.
func (p proc) wait(ctx context.Context) error {
	return poll(ctx, 2*time.Millisecond, func() (bool, error) {
		if p.alive() {
			return false, nil
		}
		if p.PID > 0 {
			var status unix.WaitStatus
			// ECHILD: another process's child, or reaped already.
			if _, err := unix.Wait4(p.PID, &status, syscall.WNOHANG, nil); err != nil && !errors.Is(err, unix.ECHILD) {
				return false, err
			}
		}
		return true, nil
	})
}

// writeJSON replaces a file in one step.
func writeJSON(path string, value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// readJSON reads what writeJSON wrote.
func readJSON(path string, value any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, value); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Hosts returns the lab's hosts in the order of their addresses.
func (l *Lab) Hosts() ([]*Host, error) {
	entries, err := os.ReadDir(filepath.Join(l.Dir(), "hosts"))
	if err != nil {
		return nil, err
	}
	var hosts []*Host
	for _, entry := range entries {
		host, err := l.Host(entry.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is being destroyed
		}
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, host)
	}
	slices.SortFunc(hosts, func(a, b *Host) int { return a.Addr.Compare(b.Addr) })
	return hosts, nil
}
