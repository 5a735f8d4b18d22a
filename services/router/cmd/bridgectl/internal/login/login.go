// Package login runs the stock OpenSSH client for a grant: against the host
// key of the receipt and no other, and with a login key that is never in a
// file. A key that the bridge made is held by an SSH agent of this process, on
// a socket in a private directory that is removed in the end.
package login

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// maxSocketPath is what sockaddr_un holds, less the terminating zero.
const maxSocketPath = 107

// Key is how the requester proves itself: with a key in memory, or one that its
// own OpenSSH finds.
type Key struct {
	// Private is an OpenSSH private key, empty for the requester's own.
	Private redact.Secret
	// Public is its public half, in authorized_keys format.
	Public string
	// Identity is the file of the requester's own private key. Empty: the
	// requester's agent has it.
	Identity string
}

// Destination is where a receipt leads, checked to be nothing but that.
type Destination struct {
	Host    string
	Port    uint16
	User    string
	HostKey sshkey.PublicKey
}

// FromReceipt returns where a receipt leads. A receipt comes over the network:
// what could be an option of ssh, or mean something in its files, is refused.
func FromReceipt(r *bridgev1.Receipt) (Destination, error) {
	key, err := sshkey.ParsePublicKey(r.GetHostKey())
	if err != nil {
		return Destination{}, fmt.Errorf("receipt: host key: %w", err)
	}
	if r.GetInstancePort() == 0 || r.GetInstancePort() > 65535 {
		return Destination{}, fmt.Errorf("receipt: port %d", r.GetInstancePort())
	}
	d := Destination{Host: r.GetInstanceHost(), Port: uint16(r.GetInstancePort()), User: r.GetUser(), HostKey: key} //nolint:gosec // Checked above.
	if _, err := sshkey.KnownHostsLine(d.Host, d.Port, key); err != nil || strings.HasPrefix(d.Host, "-") || strings.ContainsAny(d.Host, "[]%") {
		return Destination{}, fmt.Errorf("receipt: %q is no host", d.Host)
	}
	if d.User == "" || d.User[0] == '-' || strings.Trim(d.User, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") != "" {
		return Destination{}, fmt.Errorf("receipt: %q is no login name", d.User)
	}
	return d, nil
}

// hostKeyAlgorithms returns the signature algorithms of a host key, which are
// its type but for RSA.
func (d Destination) hostKeyAlgorithms() string {
	if d.HostKey.Type() == ssh.KeyAlgoRSA {
		return ssh.KeyAlgoRSASHA512 + "," + ssh.KeyAlgoRSASHA256
	}
	return d.HostKey.Type()
}

// KnownHosts returns the one line that pins the host key.
func (d Destination) KnownHosts() (string, error) {
	return sshkey.KnownHostsLine(d.Host, d.Port, d.HostKey)
}

// options are those that bind the client to the receipt. knownHosts is the
// path of the file with the host key.
func (d Destination) options(knownHosts string) [][2]string {
	return [][2]string{
		{"User", d.User},
		{"Port", strconv.Itoa(int(d.Port))},
		{"UserKnownHostsFile", quote(knownHosts)},
		{"GlobalKnownHostsFile", "none"},
		{"StrictHostKeyChecking", "yes"},
		{"HostKeyAlgorithms", d.hostKeyAlgorithms()},
		{"UpdateHostKeys", "no"},
		{"VerifyHostKeyDNS", "no"},
		{"CheckHostIP", "no"},
		{"PreferredAuthentications", "publickey"},
		{"PasswordAuthentication", "no"},
		{"KbdInteractiveAuthentication", "no"},
		{"IdentitiesOnly", "yes"},
		{"AddKeysToAgent", "no"},
	}
}

// quote writes a path as ssh_config takes it: in quotes, and with its % and ~
// taken literally as far as OpenSSH can.
func quote(path string) string { return `"` + strings.ReplaceAll(path, "%", "%%") + `"` }

// Config returns a stanza for ssh_config(5) by the given alias, for a requester
// with a key of its own.
func (d Destination) Config(alias, knownHosts, identity string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Host %s\n  HostName %s\n", alias, d.Host)
	for _, o := range d.options(knownHosts) {
		fmt.Fprintf(&b, "  %s %s\n", o[0], o[1])
	}
	if identity != "" {
		fmt.Fprintf(&b, "  IdentityFile %s\n", quote(identity))
	}
	return b.String()
}

// Session is a private directory with what the client needs. Close it.
type Session struct {
	dest     Destination
	dir      string
	identity string
	agent    *keyAgent
}

// Open prepares a session.
func Open(dest Destination, key Key) (*Session, error) {
	dir, err := os.MkdirTemp("", "bridgectl-") // Mode 0700.
	if err != nil {
		return nil, fmt.Errorf("private directory: %w", err)
	}
	if len(filepath.Join(dir, "agent")) > maxSocketPath {
		_ = os.Remove(dir)
		if dir, err = os.MkdirTemp("/tmp", "bridgectl-"); err != nil {
			return nil, fmt.Errorf("private directory: %w", err)
		}
	}
	s := &Session{dest: dest, dir: dir, identity: key.Identity}
	if err := s.fill(key); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Session) fill(key Key) error {
	line, err := s.dest.KnownHosts()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "known_hosts"), []byte(line+"\n"), 0o600); err != nil {
		return fmt.Errorf("known hosts: %w", err)
	}
	if s.identity == "" {
		// A public key as IdentityFile picks the agent's key that belongs to it.
		s.identity = filepath.Join(s.dir, "login.pub")
		if err := os.WriteFile(s.identity, []byte(strings.TrimSpace(key.Public)+"\n"), 0o600); err != nil {
			return fmt.Errorf("login key: %w", err)
		}
	}
	if key.Private.IsZero() {
		return nil
	}
	s.agent, err = startAgent(filepath.Join(s.dir, "agent"), key)
	return err
}

// Close stops the agent and removes the directory.
func (s *Session) Close() error {
	if s.agent != nil {
		s.agent.close()
	}
	return os.RemoveAll(s.dir)
}

// arguments are the options of ssh and its kin. The first value of an option
// counts, so that what a user adds after them can't weaken them.
func (s *Session) arguments() []string {
	args := []string{"-F", "none"}
	for _, o := range s.dest.options(filepath.Join(s.dir, "known_hosts")) {
		args = append(args, "-o", o[0]+"="+o[1])
	}
	args = append(args, "-o", "IdentityFile="+quote(s.identity))
	if s.agent != nil {
		args = append(args, "-o", "IdentityAgent="+quote(s.agent.path))
	}
	return args
}

// SSH returns the arguments of ssh: further options or a command after the
// destination, as ssh itself takes them.
func (s *Session) SSH(args []string) []string {
	return append(append(s.arguments(), s.dest.Host), args...)
}

// SCP returns the arguments of scp. A path that begins with ":" is one on the
// instance.
func (s *Session) SCP(args []string) []string {
	host := s.dest.Host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	out := s.arguments()
	for _, a := range args {
		if strings.HasPrefix(a, ":") {
			a = host + a
		}
		out = append(out, a)
	}
	return out
}

// SFTP returns the arguments of sftp.
func (s *Session) SFTP(args []string) []string {
	host := s.dest.Host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return append(append(s.arguments(), args...), host)
}

// Stdio are the files that a client gets, as they are: it asks them whether
// they are a terminal.
type Stdio struct{ In, Out, Err *os.File }

// Run runs a client until it ends and returns its exit status, 128+n if signal
// n ended it. Signals that would end this process are passed on instead, and
// the client's end is waited for, so that the caller can clean up. A context
// that has ended keeps the client from starting; later it changes nothing, for
// it is the client that decides what a signal means.
func Run(ctx context.Context, name string, args []string, stdio Stdio) (int, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return 0, fmt.Errorf("OpenSSH's client is needed: %w", err)
	}
	//nolint:gosec,noctx // The client of the user's own PATH, with arguments that were checked; signals end it.
	cmd := exec.Command(path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.In, stdio.Out, stdio.Err

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", name, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case err := <-done:
			return status(err)
		case sig := <-signals:
			_ = cmd.Process.Signal(sig) // It may just have ended.
		}
	}
}

func status(err error) (int, error) {
	if err == nil {
		return 0, nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, err
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// keyAgent is an SSH agent with one key.
type keyAgent struct {
	path     string
	listener net.Listener
	keys     agent.Agent
	running  sync.WaitGroup

	mu     sync.Mutex // protects the fields below
	closed bool
	conns  map[net.Conn]struct{}
}

// onlySigns refuses everything that changes an agent.
type onlySigns struct{ agent.ExtendedAgent }

var errReadOnly = errors.New("this agent holds one key and takes no other")

// Add implements agent.Agent.
func (onlySigns) Add(agent.AddedKey) error { return errReadOnly }

// Remove implements agent.Agent.
func (onlySigns) Remove(ssh.PublicKey) error { return errReadOnly }

// RemoveAll implements agent.Agent.
func (onlySigns) RemoveAll() error { return errReadOnly }

// Lock implements agent.Agent.
func (onlySigns) Lock([]byte) error { return errReadOnly }

// Unlock implements agent.Agent.
func (onlySigns) Unlock([]byte) error { return errReadOnly }

func startAgent(path string, key Key) (*keyAgent, error) {
	private, err := ssh.ParseRawPrivateKey(key.Private.Expose())
	if err != nil {
		return nil, errors.New("the login key is no private key") // The cause may hold parts of it.
	}
	keyring, ok := agent.NewKeyring().(agent.ExtendedAgent)
	if !ok {
		return nil, errors.New("the agent can't be extended")
	}
	if err := keyring.Add(agent.AddedKey{PrivateKey: private, Comment: "compute-bridge login key"}); err != nil {
		return nil, fmt.Errorf("login key: %w", err)
	}
	if err := matches(keyring, key.Public); err != nil {
		return nil, err
	}
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", path) //nolint:forbidigo // Nothing to wait for.
	if err != nil {
		return nil, fmt.Errorf("agent's socket: %w", err)
	}
	a := &keyAgent{path: path, listener: listener, keys: onlySigns{keyring}, conns: map[net.Conn]struct{}{}}
	a.running.Go(a.accept)
	return a, nil
}

// matches checks that the receipt's public key is that of its private key:
// ssh would look for the former and never find it.
func matches(keyring agent.Agent, public string) error {
	keys, err := keyring.List()
	if err != nil {
		return fmt.Errorf("login key: %w", err)
	}
	want, err := sshkey.ParsePublicKey(public)
	if err != nil {
		return fmt.Errorf("receipt: login key: %w", err)
	}
	if len(keys) != 1 || !bytes.Equal(keys[0].Marshal(), want.Wire()) {
		return errors.New("receipt: public and private login key don't belong together")
	}
	return nil
}

func (a *keyAgent) accept() {
	for {
		conn, err := a.listener.Accept()
		if err != nil {
			return
		}
		a.mu.Lock()
		if a.closed {
			a.mu.Unlock()
			_ = conn.Close()
			return
		}
		a.conns[conn] = struct{}{}
		a.running.Go(func() {
			_ = agent.ServeAgent(a.keys, conn) // Ends with its connection.
			_ = conn.Close()
			a.mu.Lock()
			delete(a.conns, conn)
			a.mu.Unlock()
		})
		a.mu.Unlock()
	}
}

func (a *keyAgent) close() {
	_ = a.listener.Close()
	a.mu.Lock()
	a.closed = true
	for c := range a.conns {
		_ = c.Close()
	}
	a.mu.Unlock()
	a.running.Wait()
}
