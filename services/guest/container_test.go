package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// containerVariable marks the process that becomes a container: this test binary in namespaces of its own.
const containerVariable = "GUEST_TEST_CONTAINER"

// patience bounds every wait; nothing waits that long unless it fails.
const patience = 3 * time.Minute

// built are the programs under test, built once by TestMain.
var built struct{ guest, probe string }

func TestMain(m *testing.M) {
	if spec := os.Getenv(containerVariable); spec != "" {
		fmt.Fprintln(os.Stderr, becomeContainer(spec))
		os.Exit(99)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "guest-test-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	built.guest, built.probe = filepath.Join(dir, "guest"), filepath.Join(dir, "probe")
	for output, source := range map[string]string{built.guest: ".", built.probe: "./testdata/probe"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", output, source)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", source, err, out)
			return 1
		}
	}
	return m.Run()
}

// image is what a container's root file system has.
type image struct {
	// Distro gives it this machine's /usr, read-only, with a writable rest; else it has the probe and nothing more.
	Distro bool
	// Files are written below the root, with mode 0644.
	Files map[string]string
	// Programs are files with mode 0755.
	Programs map[string]string
	// ReadOnly makes the root file system read-only at the end.
	ReadOnly bool
	// MountedPasswd mounts a file over /etc/passwd, as podman does: it can then be written but not replaced.
	MountedPasswd bool
	// Machine runs it as a virtual machine's unit does, not as a container.
	Machine bool
}

// containerSpec is what the child needs to know.
type containerSpec struct {
	Image  image
	Root   string
	Guest  string
	Probe  string
	Config string
	Env    []string
}

// becomeContainer makes the root file system, enters it and becomes the guest. It runs as PID 1 of new PID and mount
// namespaces, so that all of it disappears with the process.
func becomeContainer(text string) error {
	var spec containerSpec
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return err
	}
	root := spec.Root
	at := func(name string) string { return filepath.Join(root, name) }
	var failed error
	do := func(what string, err error) {
		if err != nil && failed == nil {
			failed = fmt.Errorf("%s: %w", what, err)
		}
	}
	bind := func(from, to string, flags uintptr) {
		do("bind "+to, unix.Mount(from, at(to), "", unix.MS_BIND, ""))
		if flags != 0 {
			do("remount "+to, unix.Mount("", at(to), "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""))
		}
	}
	touch := func(name string) { do("touch "+name, os.WriteFile(at(name), nil, 0o644)) }

	do("private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	do("tmpfs", unix.Mount("tmpfs", root, "tmpfs", 0, "mode=755"))
	for _, dir := range []string{"proc", "dev/pts", "tmp", ".compute-bridge"} {
		do("mkdir "+dir, os.MkdirAll(at(dir), 0o755))
	}
	do("chmod", os.Chmod(at("tmp"), 0o1777))
	do("proc", unix.Mount("proc", at("proc"), "proc", 0, ""))
	do("devpts", unix.Mount("devpts", at("dev/pts"), "devpts", 0, "newinstance,ptmxmode=0666,mode=620,gid=5"))
	do("ptmx", os.Symlink("pts/ptmx", at("dev/ptmx")))
	for _, device := range []string{"null", "zero", "urandom", "random", "tty"} {
		touch("dev/" + device)
		bind("/dev/"+device, "dev/"+device, 0)
	}
	if spec.Image.Distro {
		for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
			do("link "+name, os.Symlink("usr/"+name, at(name)))
		}
		for _, dir := range []string{"usr", "etc/skel", "root"} {
			do("mkdir "+dir, os.MkdirAll(at(dir), 0o755))
		}
		bind("/usr", "usr", unix.MS_RDONLY)
		do("skel", os.WriteFile(at("etc/skel/.profile"), []byte("PROFILE=read; export PROFILE\n"), 0o644))
	} else {
		touch("probe")
		bind(spec.Probe, "probe", unix.MS_RDONLY)
	}
	for mode, files := range map[os.FileMode]map[string]string{0o644: spec.Image.Files, 0o755: spec.Image.Programs} {
		for name, content := range files {
			do("mkdir for "+name, os.MkdirAll(filepath.Dir(at(name)), 0o755))
			do("write "+name, os.WriteFile(at(name), []byte(content), mode))
		}
	}
	if spec.Image.MountedPasswd {
		do("copy passwd", os.WriteFile(at("tmp/passwd"), []byte(spec.Image.Files["etc/passwd"]), 0o644))
		bind(at("tmp/passwd"), "etc/passwd", 0)
	}
	touch(guestapi.ContainerBinaryPath)
	bind(spec.Guest, guestapi.ContainerBinaryPath, unix.MS_RDONLY)
	do("config", os.WriteFile(at(guestapi.ContainerConfigPath), []byte(spec.Config), 0o600))
	if spec.Image.ReadOnly {
		do("read-only", unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, "mode=755"))
	}
	do("chroot", unix.Chroot(root))
	do("chdir", os.Chdir("/"))
	if failed != nil {
		return failed
	}
	command := []string{"guest", "init", "-config", guestapi.ContainerConfigPath}
	if spec.Image.Machine {
		command = []string{"guest", "machine", "run"}
	}
	return unix.Exec(guestapi.ContainerBinaryPath, command, spec.Env)
}

// distro is an image like any distribution's.
func distro() image {
	return image{Distro: true, Files: map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n" +
			"app:x:1000:1000::/srv/app:/bin/sh\n",
		"etc/group":  "root:x:0:\ntty:x:5:\napp:x:1000:\nvideo:x:44:app,compute\n",
		"etc/shadow": "root:*:19000:0:99999:7:::\n",
	}}
}

// container is a running instance.
type container struct {
	port      uint16
	hostKey   ssh.PublicKey
	clientKey string // private key file for stock clients
	known     string // known_hosts file
	cmd       *exec.Cmd
	output    *output
	done      chan struct{}
}

// output collects what the console shows.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("did not happen: %s", what)
		}
	}
}

// freePort finds a port that nothing listens on now.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("a TCP listener at %T", l.Addr())
	}
	return address.AddrPort().Port()
}

// newKey makes a key pair: the private half in OpenSSH's form, and the public one.
func newKey(t *testing.T) (string, ssh.PublicKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(block)), sshPublic
}

// startContainer starts an instance. Its end is waited for and cleaned up after the test.
func startContainer(t *testing.T, img image, config guestapi.Config, env ...string) *container {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make containers of their own (mount and PID namespaces) and must run as root")
	}
	hostPEM, hostKey := newKey(t)
	clientPEM, clientKey := newKey(t)
	c := &container{
		port: freePort(t), hostKey: hostKey, output: &output{}, done: make(chan struct{}),
		clientKey: filepath.Join(t.TempDir(), "id"),
	}
	c.known = c.clientKey + ".known_hosts"
	knownLine := fmt.Sprintf("[127.0.0.1]:%d %s", c.port, ssh.MarshalAuthorizedKey(hostKey))
	for name, content := range map[string]string{c.clientKey: clientPEM, c.known: knownLine} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config.Version = guestapi.ConfigVersion
	config.HostKey = guestapi.NewHostKey(hostPEM)
	config.AuthorizedKeys = []string{string(ssh.MarshalAuthorizedKey(clientKey))}
	config.ListenPort = c.port
	data, err := guestapi.Encode(config)
	if err != nil {
		t.Fatal(err)
	}
	c.run(t, img, string(data), env)
	return c
}

func (c *container) run(t *testing.T, img image, config string, env []string) {
	t.Helper()
	spec, err := json.Marshal(containerSpec{
		Image: img, Root: t.TempDir(), Guest: built.guest, Probe: built.probe, Config: config,
		Env: append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/root"}, env...),
	})
	if err != nil {
		t.Fatal(err)
	}
	c.cmd = exec.Command("/proc/self/exe")
	c.cmd.Env = []string{containerVariable + "=" + string(spec)}
	c.cmd.Stdout, c.cmd.Stderr = c.output, c.output
	c.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Setsid:     true,
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatalf("start a container: %v", err)
	}
	go func() {
		defer close(c.done)
		_ = c.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.done
		if t.Failed() {
			t.Logf("console:\n%s", c.output)
		}
	})
}

// wait waits for the instance's end and returns its exit code.
func (c *container) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		t.Fatal("the instance did not end")
	}
	return c.cmd.ProcessState.ExitCode()
}

func (c *container) console(t *testing.T, text string) {
	t.Helper()
	eventually(t, "console shows "+text, func() bool { return strings.Contains(c.output.String(), text) })
}

// ready waits until SSH is open.
func (c *container) ready(t *testing.T) {
	t.Helper()
	c.console(t, "SSH is open")
}

// stock returns a command of OpenSSH's, configured by nothing but what follows.
func (c *container) stock(t *testing.T, program string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%s is needed (Debian package openssh-client): %v", program, err)
	}
	portFlag := "-P"
	if program == "ssh" {
		portFlag = "-p"
	}
	common := []string{
		"-F", "none", "-i", c.clientKey, portFlag, strconv.Itoa(int(c.port)),
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes",
		"-o", "UserKnownHostsFile=" + c.known, "-o", "GlobalKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		"-o", "ConnectTimeout=10",
	}
	cmd := exec.CommandContext(t.Context(), path, append(common, args...)...)
	cmd.WaitDelay = time.Second
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	return cmd
}

// ssh runs a command as a login and returns what it shows.
func (c *container) ssh(t *testing.T, login string, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := c.stock(t, "ssh", append([]string{login + "@127.0.0.1"}, command...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	_ = cmd.Run()
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}
