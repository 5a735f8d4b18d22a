package hosttap

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/test/lab"
)

// patience is how long a busy machine may take for what should happen at once.
const patience = 3 * time.Minute

// someGrant is an id that calls can mention.
var someGrant = strings.Repeat("0123456789abcdef", 4)

// tapped is a host, the group of its tap, and a client of the tap.
type tapped struct {
	*testing.T
	host   *lab.Host
	group  *Group
	tap    *Tap
	killed atomic.Bool
	client *ssh.Client
}

func newTapped(t *testing.T) *tapped {
	t.Helper()
	s := &tapped{T: t, host: lab.NewHost(t, lab.HostOptions{})}
	s.group = NewGroup(func() { s.killed.Store(true) })
	s.tap = s.group.Open(t, s.host, Options{Address: "127.0.1.1", FirstPort: 40000, LastPort: 40003})
	s.client = s.dial()
	return s
}

func (s *tapped) dial() *ssh.Client {
	s.Helper()
	client, err := s.dialAs(s.key())
	if err != nil {
		s.Fatal(err)
	}
	return client
}

// key is the key that may log in.
func (s *tapped) key() ssh.Signer {
	s.Helper()
	pem, err := os.ReadFile(s.host.UserKeyFile)
	if err != nil {
		s.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		s.Fatal(err)
	}
	return key
}

// dialAs connects with a key.
func (s *tapped) dialAs(key ssh.Signer) (*ssh.Client, error) {
	s.Helper()
	pinned, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.tap.HostKeyLine()))
	if err != nil {
		s.Fatal(err)
	}
	client, err := ssh.Dial("tcp", s.tap.Addr(), &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(pinned), Timeout: patience,
	})
	if err != nil {
		return nil, err
	}
	s.Cleanup(func() { _ = client.Close() })
	return client, nil
}

// run runs a command and returns what it says and its exit code, -1 if the
// connection broke.
func (s *tapped) run(line, stdin string) (stdout, stderr string, code int) {
	s.Helper()
	session, err := s.client.NewSession()
	if err != nil {
		return "", "", -1
	}
	defer session.Close() //nolint:errcheck // over
	var out, errs bytes.Buffer
	session.Stdin, session.Stdout, session.Stderr = strings.NewReader(stdin), &out, &errs
	err = session.Run(line)
	var exit *ssh.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.Signal() != "":
		return out.String(), errs.String(), 1000
	case errors.As(err, &exit):
		code = exit.ExitStatus()
	default:
		code = -1
	}
	return out.String(), errs.String(), code
}

func (s *tapped) reached(i *Injection) {
	s.Helper()
	select {
	case <-i.Reached():
	case <-time.After(patience):
		s.Fatal("the fault was not reached")
	}
}

func TestTapForwardsWhatTheHostSays(t *testing.T) {
	s := newTapped(t)
	if out, errs, code := s.run("cat; echo no >&2; exit 7", "text"); out != "text" || errs != "no\n" || code != 7 {
		t.Errorf("a command: %q, %q, %d", out, errs, code)
	}
	if _, _, code := s.run("kill -9 $$", ""); code != 1000 {
		t.Errorf("a killed command has exit code %d", code)
	}
	big := make([]byte, 5<<20)
	_, _ = rand.Read(big)
	sum := sha256.Sum256(big)
	if out, _, code := s.run("sha256sum", string(big)); code != 0 || !strings.HasPrefix(out, hex.EncodeToString(sum[:])) {
		t.Errorf("5 MiB arrive as %q, %d", out, code)
	}
	if out, _, code := s.run("head -c 3000000 /dev/zero | tee /dev/stderr", ""); len(out) != 3000000 || code != 0 {
		t.Errorf("%d bytes of 3000000 come back, %d", len(out), code)
	}
	// sshd refuses this request, and says so.
	if ok, _, err := s.client.SendRequest("keepalive@openssh.com", true, nil); ok || err != nil {
		t.Errorf("keepalive: %t, %v", ok, err)
	}
	var refusal *ssh.OpenChannelError
	if _, err := s.client.Dial("unix", "/run/nothing"); !errors.As(err, &refusal) || refusal.Reason != ssh.ConnectionFailed {
		t.Errorf("a socket that isn't there: %v", err)
	}
	session, err := s.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close() //nolint:errcheck // over
	out, err := session.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Start("echo ready; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	// sshd has no process group to send a signal to at first.
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Fatal(err)
	}
	if err := session.Signal(ssh.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := session.Wait(); !errors.As(err, &exit) || exit.Signal() != "TERM" {
		t.Errorf("a command that got a signal: %v", err)
	}
}

func TestTapPinsKeys(t *testing.T) {
	s := newTapped(t)
	_, other, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.dialAs(other); err == nil {
		t.Error("another key may log in")
	}
}

func TestTapForwardsPorts(t *testing.T) {
	s := newTapped(t)
	ctx := t.Context()
	if _, err := s.host.Exec(ctx, "systemd-run", "--unit=echo", "--service-type=exec", "sh", "-c",
		"exec systemd-socket-activate -l 40002 --inetd -a cat"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		conn, err := s.host.Lab().Dial(ctx, "tcp", "127.0.1.1:40002")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "text\n")
		got := make([]byte, 5)
		_, err = io.ReadFull(conn, got)
		_ = conn.Close()
		if err == nil && string(got) == "text\n" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// sftpSession is a session of the SFTP subsystem.
type sftpSession struct {
	in  io.WriteCloser
	out io.Reader
}

func (s *tapped) sftp() *sftpSession {
	s.Helper()
	session, err := s.client.NewSession()
	if err != nil {
		s.Fatal(err)
	}
	in, err := session.StdinPipe()
	if err != nil {
		s.Fatal(err)
	}
	out, err := session.StdoutPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := session.RequestSubsystem("sftp"); err != nil {
		s.Fatal(err)
	}
	f := &sftpSession{in, out}
	if p, err := f.ask([]byte{sftpInit, 0, 0, 0, 3}); err != nil || p.kind != sftpVersion {
		s.Fatalf("SFTP: %v, %v", p, err)
	}
	return f
}

// text is a string in a packet.
func text(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }

// frame is a packet on the wire.
func frame(kind byte, id uint32, fields ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, id), bytes.Join(fields, nil)...)
}

func (f *sftpSession) ask(body []byte) (packet, error) {
	if _, err := f.in.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)); err != nil {
		return packet{}, err
	}
	return f.answer()
}

func (f *sftpSession) answer() (packet, error) {
	head := make([]byte, 4)
	if _, err := io.ReadFull(f.out, head); err != nil {
		return packet{}, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head))
	if _, err := io.ReadFull(f.out, b); err != nil {
		return packet{}, err
	}
	p, _, err := parsePacket(slices.Concat(head, b))
	return p, err
}

// status is the code in a status packet.
func status(p packet) uint32 {
	if p.kind != sftpStatus || len(p.rest) < 4 {
		return 1 << 31
	}
	return binary.BigEndian.Uint32(p.rest)
}

// bus is a connection to the system bus.
type bus struct {
	io.ReadWriteCloser
	buf []byte
}

func (s *tapped) bus() *bus {
	s.Helper()
	conn, err := s.client.Dial("unix", "/run/dbus/system_bus_socket")
	if err != nil {
		s.Fatal(err)
	}
	b := &bus{ReadWriteCloser: conn}
	_, _ = io.WriteString(conn, "\x00AUTH EXTERNAL 30\r\n")
	got := make([]byte, 256)
	if n, err := conn.Read(got); err != nil || !strings.HasPrefix(string(got[:n]), "OK ") {
		s.Fatalf("authenticate: %q, %v", got[:n], err)
	}
	_, _ = io.WriteString(conn, "BEGIN\r\n")
	if m, err := b.ask(1, "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello", "org.freedesktop.DBus"); err != nil || m.kind != dbusReturn {
		s.Fatalf("hello: %+v, %v", m, err)
	}
	return b
}

// callMessage renders a method call whose arguments are strings.
func callMessage(serial uint32, path, iface, member, dest string, args ...string) []byte {
	order := binary.LittleEndian
	str := func(s string) []byte { return append(append(order.AppendUint32(nil, uint32(len(s))), s...), 0) }
	var fields, body []byte
	field := func(code, kind byte, value []byte) {
		for len(fields)%8 != 0 {
			fields = append(fields, 0)
		}
		fields = append(append(fields, code, 1, kind, 0), value...)
	}
	field(dbusPath, 'o', str(path))
	field(dbusInterface, 's', str(iface))
	field(dbusMember, 's', str(member))
	field(6, 's', str(dest))
	if len(args) > 0 {
		field(dbusSignature, 'g', append(append([]byte{byte(len(args))}, strings.Repeat("s", len(args))...), 0))
	}
	for _, a := range args {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		body = append(body, str(a)...)
	}
	out := []byte{'l', dbusCall, 0, 1}
	out = order.AppendUint32(out, uint32(len(body)))
	out = order.AppendUint32(out, serial)
	out = order.AppendUint32(out, uint32(len(fields)))
	out = append(out, fields...)
	for len(out)%8 != 0 {
		out = append(out, 0)
	}
	return append(out, body...)
}

func (b *bus) ask(serial uint32, path, iface, member, dest string, args ...string) (message, error) {
	if _, err := b.Write(callMessage(serial, path, iface, member, dest, args...)); err != nil {
		return message{}, err
	}
	return b.answer(serial)
}

func (b *bus) answer(serial uint32) (message, error) {
	for {
		m, n, err := parseMessage(b.buf)
		if err != nil {
			return message{}, err
		}
		b.buf = b.buf[n:]
		if n > 0 && m.replySerial == serial {
			return m, nil
		}
		if n > 0 {
			continue
		}
		chunk := make([]byte, 4096)
		k, err := b.Read(chunk)
		b.buf = append(b.buf, chunk[:k]...)
		if err != nil {
			return message{}, err
		}
	}
}

func (b *bus) resetFailed(serial uint32, unit string) (message, error) {
	return b.ask(serial, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "ResetFailedUnit", "org.freedesktop.systemd1", unit)
}

func TestTapNamesAndRefusesCalls(t *testing.T) {
	s := newTapped(t)
	all, ours := s.group.Record(""), s.group.Record(someGrant)
	dir := "/run/" + someGrant

	files := s.sftp()
	mkdir := func(id uint32) uint32 {
		p, err := files.ask(frame(14, id, text(dir), make([]byte, 4)))
		if err != nil || p.id != id {
			t.Fatalf("mkdir: %+v, %v", p, err)
		}
		return status(p)
	}
	fault := s.group.Inject(Fault{Point: "sftp.mkdir ID", Kind: Denied, Grant: someGrant})
	if code := mkdir(1); code != sftpDenied {
		t.Errorf("a refused mkdir has status %d", code)
	}
	s.reached(fault)
	if code := mkdir(2); code != 0 {
		t.Errorf("the mkdir after it has status %d", code)
	}
	p, err := files.ask(frame(sftpOpen, 3, text(dir+"/.tmp-00ff17"), binary.BigEndian.AppendUint32(nil, 0x0a), make([]byte, 4)))
	handle, _, ok := str(p.rest)
	if err != nil || p.kind != sftpHandle || !ok {
		t.Fatalf("open: %+v, %v", p, err)
	}
	for n := range uint32(3) {
		if p, err = files.ask(frame(sftpWrite, 4+n, text(handle), make([]byte, 8), text("data"))); err != nil || status(p) != 0 {
			t.Fatalf("write: %+v, %v", p, err)
		}
	}
	for _, f := range [][]byte{
		frame(sftpClose, 7, text(handle)),
		frame(sftpExtended, 8, text("posix-rename@openssh.com"), text(dir+"/.tmp-00ff17"), text(dir+"/file.json")),
		frame(13, 9, text(dir+"/file.json")),
		frame(15, 10, text(dir)),
	} {
		if p, err = files.ask(f); err != nil || status(p) != 0 {
			t.Fatalf("SFTP request %d: %+v, %v", f[0], p, err)
		}
	}

	b := s.bus()
	fault = s.group.Inject(Fault{Point: "systemd.ResetFailedUnit", Nth: 2, Kind: Quota, Grant: someGrant, Always: true})
	unit := "cb-test-" + someGrant + "-1.service"
	for serial, want := range []string{
		2: "org.freedesktop.systemd1.NoSuchUnit", 3: "org.freedesktop.DBus.Error.LimitsExceeded", 4: "org.freedesktop.DBus.Error.LimitsExceeded",
	} {
		if want == "" {
			continue
		}
		if m, err := b.resetFailed(uint32(serial), unit); err != nil || m.errorName != want {
			t.Errorf("call %d: %+v, %v; want %s", serial, m, err, want)
		}
	}
	s.reached(fault)
	fault.Release()
	if m, err := b.resetFailed(5, unit); err != nil || m.errorName != "org.freedesktop.systemd1.NoSuchUnit" {
		t.Errorf("after the fault: %+v, %v", m, err)
	}
	_ = b.Close()

	fault = s.group.Inject(Fault{Point: "exec.guest digest", Kind: Unavailable})
	if _, errs, code := s.run("'env' LC_ALL=C /x/guest/"+strings.Repeat("ab", 32)+" digest -algorithm sha256 /x", ""); code != 1 || !strings.Contains(errs, "Input/output error") {
		t.Errorf("a refused command: %q, %d", errs, code)
	}
	s.reached(fault)

	fault = s.group.Inject(Fault{Point: "podman.GET /networks/json", Kind: Denied})
	if _, err := s.host.Exec(t.Context(), "systemctl", "start", "podman.socket"); err != nil {
		t.Fatal(err)
	}
	podman := http.Client{Transport: &http.Transport{DialContext: s.dialPodman}}
	defer podman.CloseIdleConnections()
	for _, want := range []int{http.StatusForbidden, http.StatusOK} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://podman/v4.0.0/libpod/networks/json?x="+someGrant, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r, err := podman.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, r.Body)
		_ = r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("podman answers %d, want %d", r.StatusCode, want)
		}
	}
	s.reached(fault)

	want := []string{
		"sftp.mkdir ID!", "sftp.mkdir ID!", "sftp.create .tmp!", "sftp.write .tmp!", "sftp.close .tmp", "sftp.posix-rename file.json!",
		"sftp.remove file.json!", "sftp.rmdir ID!",
		"systemd.ResetFailedUnit!", "systemd.ResetFailedUnit!", "systemd.ResetFailedUnit!", "systemd.ResetFailedUnit!",
		"podman.GET /networks/json", "podman.GET /networks/json",
	}
	if got := names(ours()); !slices.Equal(got, want) {
		t.Errorf("calls for the grant:\n%q, want\n%q", got, want)
	}
	if got := names(all()); !slices.Contains(got, "exec.guest digest") || !slices.Contains(got, "dbus.Hello") {
		t.Errorf("all calls: %q", got)
	}
}

// names lists calls, with a mark for those that mutate.
func names(calls []Call) []string {
	var out []string
	for _, c := range calls {
		if c.Mutates {
			c.Point += "!"
		}
		out = append(out, c.Point)
	}
	return out
}

func TestTapHoldsSlowCalls(t *testing.T) {
	s := newTapped(t)
	fault := s.group.Inject(Fault{Point: "systemd.ResetFailedUnit", Kind: Slow, Grant: someGrant})
	b := s.bus()
	unit := "x" + someGrant + ".service"
	if _, err := b.Write(callMessage(2, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "ResetFailedUnit", "org.freedesktop.systemd1", unit)); err != nil {
		t.Fatal(err)
	}
	s.reached(fault)
	if m, err := b.resetFailed(3, "other.service"); err != nil || m.errorName == "" {
		t.Errorf("another call meanwhile: %+v, %v", m, err)
	}
	fault.Release()
	if m, err := b.answer(2); err != nil || m.errorName == "" {
		t.Errorf("the slow call: %+v, %v", m, err)
	}
	_ = b.Close()

	fault = s.group.Inject(Fault{Point: "exec.touch", Kind: Slow})
	done := make(chan int, 1)
	go func() {
		_, _, code := s.run("touch /run/slow", "")
		done <- code
	}()
	s.reached(fault)
	if _, err := s.host.Exec(t.Context(), "test", "!", "-e", "/run/slow"); err != nil {
		t.Errorf("a held command has run: %v", err)
	}
	fault.Release()
	if code := <-done; code != 0 {
		t.Errorf("a held command ends with %d", code)
	}
}

func TestTapLosesAnswersAndKills(t *testing.T) {
	s := newTapped(t)
	exists := func(file string, want bool) {
		t.Helper()
		_, err := s.host.Exec(t.Context(), "test", "-e", file)
		if (err == nil) != want {
			t.Errorf("%s exists: %t, want %t", file, err == nil, want)
		}
	}
	for _, kind := range []Kind{LostAnswer, CrashBefore, CrashAfter} {
		for _, way := range []string{"sftp", "exec"} {
			name := fmt.Sprintf("/run/%s-%s", way, strings.ReplaceAll(string(kind), " ", "-"))
			s.killed.Store(false)
			s.client = s.dial()
			if way == "sftp" {
				files := s.sftp()
				fault := s.group.Inject(Fault{Point: stable("sftp.mkdir " + name[5:]), Kind: kind})
				if p, err := files.ask(frame(14, 1, text(name), make([]byte, 4))); err == nil {
					t.Errorf("%s: mkdir is answered: %+v", kind, p)
				}
				s.reached(fault)
			} else {
				fault := s.group.Inject(Fault{Point: "exec.mkdir", Kind: kind})
				if _, _, code := s.run("mkdir "+name, ""); code != -1 {
					t.Errorf("%s: a command is answered: %d", kind, code)
				}
				s.reached(fault)
			}
			exists(name, kind != CrashBefore)
			if s.killed.Load() != (kind != LostAnswer) {
				t.Errorf("%s: killed is %t", kind, s.killed.Load())
			}
			if err := s.client.Wait(); err == nil {
				t.Errorf("%s: the connection ended in good order", kind)
			}
		}
	}
	s.client = s.dial()
	s.group.Refuse(true)
	_ = s.client.Wait()
	if _, err := s.dialAs(s.key()); err == nil {
		t.Error("a connection is taken although they are refused")
	}
	s.group.Refuse(false)
	s.client = s.dial()
}

func TestTapFreezes(t *testing.T) {
	s := newTapped(t)
	thaw := s.group.Freeze()
	done := make(chan int, 1)
	go func() {
		_, _, code := s.run("touch /run/frozen", "")
		done <- code
	}()
	select {
	case code := <-done:
		t.Errorf("a command went through a frozen connection: %d", code)
	case <-time.After(100 * time.Millisecond): // long enough for one that isn't
	}
	thaw()
	if code := <-done; code != 0 {
		t.Errorf("after the thaw: %d", code)
	}
	s.group.Freeze()
	s.group.Cut()
	if err := s.client.Wait(); err == nil {
		t.Error("the connection ended in good order")
	}
}

func (s *tapped) dialPodman(context.Context, string, string) (net.Conn, error) {
	return s.client.Dial("unix", "/run/podman/podman.sock")
}

func newKey() (ed25519.PublicKey, ssh.Signer, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	signer, err := ssh.NewSignerFromKey(private)
	return public, signer, err
}

// The end of a command that is over at once must not overtake the answer that it
// has begun.
func TestTapKeepsTheOrderOfShortCommands(t *testing.T) {
	s := newTapped(t)
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for n := range 100 {
				if _, _, code := s.run("exit 3", ""); code != 3 {
					t.Errorf("command %d: %d", n, code)
					return
				}
			}
		})
	}
	callers.Wait()
}
