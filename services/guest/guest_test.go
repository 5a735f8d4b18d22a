package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func TestStockClients(t *testing.T) {
	t.Parallel()
	c := startContainer(t, distro(), guestapi.Config{
		Command:     []string{"bash"}, // ends at once unless its standard input stays open
		Environment: map[string]string{"FROM_GRANT": "a b'c\nd", "FROM_IMAGE": "overlaid"},
		Banner:      "banner\n",
	}, "FROM_IMAGE=image", "ONLY_IMAGE=yes")
	c.ready(t)

	t.Run("exit codes and streams", func(t *testing.T) {
		for command, want := range map[string]int{
			"exit 0": 0, "exit 7": 7, "exit 255": 255, "kill -KILL $$": 255, "no-such-program": 127, "/etc/passwd": 126,
		} {
			if _, _, code := c.ssh(t, "compute", command); code != want {
				t.Errorf("%s: got %d, want %d", command, code, want)
			}
		}
		stdout, stderr, code := c.ssh(t, "compute", "echo out; echo err >&2; exit 3")
		if stdout != "out\n" || stderr != "err\n" || code != 3 {
			t.Errorf("got %q, %q, %d", stdout, stderr, code)
		}
	})

	t.Run("identity", func(t *testing.T) {
		for login, want := range map[string]string{
			"compute": "uid=1001(compute) gid=1001(compute) groups=1001(compute),44(video)|/home/compute|compute:1001:700",
			"root":    "uid=0(root) gid=0(root) groups=0(root)|/root|root:0:755",
		} {
			stdout, stderr, _ := c.ssh(t, login, `echo "$(id)|$(pwd)|$(stat -c %U:%u:%a ~)"`)
			if strings.TrimSpace(stdout) != want {
				t.Errorf("%s: got %q %s, want %q", login, stdout, stderr, want)
			}
		}
		stdout, _, _ := c.ssh(t, "root", "cat /etc/passwd /etc/group /etc/shadow; stat -c %a /etc/passwd /etc/group /etc/shadow; ls -A /etc")
		for _, line := range []string{
			"compute:x:1001:1001::/home/compute:/bin/bash\n", "compute:x:1001:\n", "compute:*:", "644\n644\n644\n",
			"app:x:1000:1000::/srv/app:/bin/sh\n",
		} {
			if !strings.Contains(stdout, line) {
				t.Errorf("the user database lacks %q: %s", line, stdout)
			}
		}
		if strings.Contains(stdout, ".compute-bridge") {
			t.Errorf("a temporary file was left: %s", stdout)
		}
	})

	t.Run("environment", func(t *testing.T) {
		stdout, _, _ := c.ssh(t, "compute", "-o", "SetEnv=LANG=tlh LC_TIME=x FOO=bar", "env")
		for _, want := range []string{
			"FROM_GRANT=a b'c\nd\n", "FROM_IMAGE=overlaid\n", "ONLY_IMAGE=yes\n", "USER=compute\n", "LOGNAME=compute\n",
			"HOME=/home/compute\n", "SHELL=/bin/bash\n", "PATH=/usr/local/bin:/usr/bin:/bin\n", "LANG=tlh\n",
			"LC_TIME=x\n", "SSH_CONNECTION=127.0.0.1 ",
		} {
			if !strings.Contains("\n"+stdout, "\n"+want) {
				t.Errorf("no %q in %s", want, stdout)
			}
		}
		if strings.Contains(stdout, "FOO=") {
			t.Error("FOO was accepted")
		}
	})

	t.Run("login shell", func(t *testing.T) {
		cmd := c.stock(t, "ssh", "compute@127.0.0.1")
		cmd.Stdin = strings.NewReader("shopt -q login_shell && echo $0 $PROFILE\nexit 5\n")
		out, _ := cmd.Output()
		if string(out) != "-bash read\n" || cmd.ProcessState.ExitCode() != 5 {
			t.Errorf("got %q, %v", out, cmd.ProcessState)
		}
	})

	t.Run("large data", func(t *testing.T) {
		data := randomBytes(t, 10<<20)
		cmd := c.stock(t, "ssh", "compute@127.0.0.1", "cat")
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil || !bytes.Equal(out, data) {
			t.Errorf("%d bytes came back, %v", len(out), err)
		}
	})

	t.Run("scp and sftp", func(t *testing.T) {
		dir := t.TempDir()
		data := randomBytes(t, 3<<20)
		source, back := filepath.Join(dir, "source"), filepath.Join(dir, "back")
		if err := os.WriteFile(source, data, 0o640); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"-p", source, "compute@127.0.0.1:there"}, {"compute@127.0.0.1:there", back}} {
			if out, err := c.stock(t, "scp", args...).CombinedOutput(); err != nil {
				t.Fatalf("scp %v: %v: %s", args, err, out)
			}
		}
		got, err := os.ReadFile(back)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back, %v", len(got), err)
		}
		if stdout, _, _ := c.ssh(t, "root", "stat -c %U:%a /home/compute/there"); stdout != "compute:640\n" {
			t.Errorf("the copy is %s", stdout)
		}
		// The kernel refuses what the session's user may not do.
		if out, err := c.stock(t, "scp", source, "compute@127.0.0.1:/etc/shadow").CombinedOutput(); err == nil ||
			!strings.Contains(strings.ToLower(string(out)), "permission denied") {
			t.Errorf("writing to /etc/shadow: %v: %s", err, out)
		}
		cmd := c.stock(t, "sftp", "-b", "-", "root@127.0.0.1")
		cmd.Stdin = strings.NewReader("pwd\nmkdir d\nput " + source + " d/f\nrename d/f d/g\nls -l d\nrm d/g\nrmdir d\n")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "/root\n") || !strings.Contains(string(out), "3145728") {
			t.Errorf("sftp: %v: %s", err, out)
		}
	})

	t.Run("forwarding", func(t *testing.T) {
		// The container shares this test's loopback, so both ends of each tunnel are here.
		target, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer target.Close()
		go func() {
			for {
				conn, err := target.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					data, _ := io.ReadAll(conn)
					_, _ = conn.Write(bytes.ToUpper(data))
				}()
			}
		}()
		local, remote := freePort(t), freePort(t)
		cmd := c.stock(t, "ssh", "-N", "-o", "ExitOnForwardFailure=yes",
			"-L", fmt.Sprintf("127.0.0.1:%d:%s", local, target.Addr()), "-R", fmt.Sprintf("%d:%s", remote, target.Addr()),
			"compute@127.0.0.1")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		for name, port := range map[string]uint16{"-L": local, "-R": remote} {
			var conn net.Conn
			eventually(t, name+" listens", func() bool {
				var err error
				conn, err = net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
				return err == nil
			})
			_, _ = io.WriteString(conn, "through the tunnel")
			tunnel, ok := conn.(*net.TCPConn)
			if !ok {
				t.Fatalf("a TCP connection of type %T", conn)
			}
			_ = tunnel.CloseWrite()
			got, err := io.ReadAll(conn)
			_ = conn.Close()
			if string(got) != "THROUGH THE TUNNEL" {
				t.Errorf("%s: got %q, %v", name, got, err)
			}
		}
	})

	t.Run("terminal", func(t *testing.T) {
		cmd := c.stock(t, "ssh", "-t", "compute@127.0.0.1")
		cmd.Env = append(cmd.Env, "TERM=xterm-256color")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 30, Cols: 100})
		if err != nil {
			t.Fatal(err)
		}
		defer terminal.Close()
		shown := &output{}
		copied := make(chan struct{})
		go func() {
			defer close(copied)
			_, _ = io.Copy(shown, terminal)
		}()
		expect := func(text string) {
			t.Helper()
			eventually(t, "terminal shows "+text, func() bool { return strings.Contains(shown.String(), text) })
		}
		_, _ = io.WriteString(terminal, "stty size; echo T=$TERM; tty; stat -c %U:%G $(tty)\n")
		expect("30 100\r\n")
		expect("T=xterm-256color\r\n")
		expect("compute:tty\r\n")
		if err := pty.Setsize(terminal, &pty.Winsize{Rows: 43, Cols: 117}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "new size arrives", func() bool {
			_, _ = io.WriteString(terminal, "stty size\n")
			return strings.Contains(shown.String(), "43 117\r\n")
		})
		_, _ = io.WriteString(terminal, "exit 4\n")
		_ = cmd.Wait()
		<-copied
		if code := cmd.ProcessState.ExitCode(); code != 4 {
			t.Errorf("exit code %d, want 4", code)
		}
	})

	t.Run("refusals", func(t *testing.T) {
		if _, stderr, code := c.ssh(t, "admin", "true"); code != 255 || !strings.Contains(stderr, "Permission denied (publickey)") {
			t.Errorf("unknown user: %d %s", code, stderr)
		}
		stranger := *c
		stranger.clientKey = filepath.Join(t.TempDir(), "other")
		private, _ := newKey(t)
		if err := os.WriteFile(stranger.clientKey, []byte(private), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := stranger.ssh(t, "compute", "true"); code != 255 || !strings.Contains(stderr, "Permission denied (publickey)") {
			t.Errorf("other key: %d %s", code, stderr)
		}
		mistrusting := *c
		mistrusting.known = filepath.Join(t.TempDir(), "known")
		_, other := newKey(t)
		line := fmt.Sprintf("[127.0.0.1]:%d %s", c.port, ssh.MarshalAuthorizedKey(other))
		if err := os.WriteFile(mistrusting.known, []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := mistrusting.ssh(t, "compute", "true"); code != 255 || !strings.Contains(stderr, "IDENTIFICATION HAS CHANGED") {
			t.Errorf("other host key: %d %s", code, stderr)
		}
	})

	t.Run("orphans are reaped", func(t *testing.T) {
		c.ssh(t, "root", "for i in 1 2 3 4 5 6 7 8; do (setsid sleep 0.05 >/dev/null 2>&1 </dev/null &); done")
		eventually(t, "no zombies and no sleepers", func() bool {
			stdout, _, code := c.ssh(t, "root", "ps -e -o stat=,comm= | grep -e '^Z' -e sleep; true")
			return code == 0 && stdout == ""
		})
		stdout, _, _ := c.ssh(t, "root", "cat /proc/1/comm")
		if strings.TrimSpace(stdout) != "guest" {
			t.Errorf("PID 1 is %q", stdout)
		}
	})

	t.Run("nothing secret in sight", func(t *testing.T) {
		stdout, _, _ := c.ssh(t, "compute", "cat "+guestapi.ContainerConfigPath+" 2>&1; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'")
		if strings.Contains(stdout+c.output.String(), "PRIVATE KEY") || !strings.Contains(stdout, "Permission denied") {
			t.Error("the host key can be read")
		}
	})

	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// An interactive-less bash dies of SIGTERM.
	if code := c.wait(t); code != guestapi.ExitSignalBase+int(syscall.SIGTERM) {
		t.Errorf("exit code %d", code)
	}
}

func randomBytes(t *testing.T, n int) []byte {
	t.Helper()
	data := make([]byte, n)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestImageWithoutShell(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{Command: []string{"/probe", "sleep"}})
	c.ready(t)
	c.console(t, "warning: The login user could not be made, so another is used user=compute used=root reason=\"the image has no /etc/passwd\"")
	for command, want := range map[string]struct {
		stdout, stderr string
		code           int
	}{
		`/probe args 'a  b' "c" d\ e`: {"a  b|c|d e\n", "", 0},
		`/probe exit 7`:               {"", "", 7},
		`/probe id`:                   {"0 0 [0] <nil>\n", "", 0},
		`ls -l`:                       {"", "compute-bridge guest: ls: no such file or directory (this image has no shell; the command was run directly)\n", 127},
		`/dev/null`:                   {"", "compute-bridge guest: /dev/null: not an executable file (this image has no shell; the command was run directly)\n", 126},
	} {
		stdout, stderr, code := c.ssh(t, "compute", command)
		if stdout != want.stdout || stderr != want.stderr || code != want.code {
			t.Errorf("%s: got %q, %q, %d", command, stdout, stderr, code)
		}
	}
	for _, args := range [][]string{{"compute@127.0.0.1"}, {"-tt", "compute@127.0.0.1"}} {
		cmd := c.stock(t, "ssh", args...)
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 127 || !strings.Contains(string(out), "this image has no shell. Run one of") {
			t.Errorf("ssh %v: %d, %q", args, code, out)
		}
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("to a distroless image"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := c.stock(t, "scp", file, "compute@127.0.0.1:/tmp/f").CombinedOutput(); err != nil {
		t.Errorf("scp: %v: %s", err, out)
	}
}

func TestUserDatabasesOfAllSorts(t *testing.T) {
	t.Parallel()
	readOnly := distro()
	readOnly.ReadOnly = true
	mounted := distro()
	mounted.MountedPasswd = true
	existing := distro()
	existing.Files["etc/passwd"] += "compute:x:1234:100:the image's own:/tmp:/bin/sh"
	bare := image{Distro: true, Files: map[string]string{"etc/passwd": "root:x:0:0:root:/root:/sbin/nologin"}}
	for name, tc := range map[string]struct {
		image   image
		want    string
		console string
	}{
		"read-only":        {readOnly, "0:0:root:/root:/bin/bash", "another is used user=compute used=root reason=\"add compute to /etc/group: read-only file system\""},
		"mounted passwd":   {mounted, "1001:1001:compute:/home/compute:/bin/bash", ""},
		"user of image":    {existing, "1234:100:compute:/tmp:/bin/sh", ""},
		"one line, no end": {bare, "1000:1000:compute:/home/compute:/bin/bash", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startContainer(t, tc.image, guestapi.Config{})
			c.ready(t)
			stdout, stderr, _ := c.ssh(t, "compute", "echo $(id -u):$(id -g):$USER:$HOME:$SHELL")
			if strings.TrimSpace(stdout) != tc.want {
				t.Errorf("got %q %s, want %q", stdout, stderr, tc.want)
			}
			// nologin locks accounts; root's login was asked for.
			if stdout, stderr, _ := c.ssh(t, "root", "id -u"); stdout != "0\n" {
				t.Errorf("root: %q %s", stdout, stderr)
			}
			if warned := strings.Contains(c.output.String(), "warning:"); warned != (tc.console != "") {
				t.Errorf("warned: %v", warned)
			}
			if tc.console != "" {
				c.console(t, tc.console)
			}
		})
	}
}

func TestWorkload(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		config  guestapi.Config
		code    int
		console string
	}{
		"exit code":   {guestapi.Config{Command: []string{"sh", "-c", "exit 7"}}, 7, "The workload has ended exit_code=7"},
		"signal":      {guestapi.Config{Command: []string{"sh", "-c", "kill -KILL $$"}}, 137, "exit_code=137"},
		"missing":     {guestapi.Config{Command: []string{"no-such"}}, 127, `error: The workload cannot run reason="can't start the workload \"no-such\": no such file or directory"`},
		"no file":     {guestapi.Config{Command: []string{"/bin/no-such"}}, 127, "no such file or directory"},
		"not allowed": {guestapi.Config{Command: []string{"/etc/passwd"}}, 126, "not an executable file"},
		"directory":   {guestapi.Config{Command: []string{"/etc"}}, 126, "not an executable file"},
		"interpreter": {guestapi.Config{Command: []string{"./script"}, WorkingDir: "/opt"}, 127, "the file exists, but its interpreter or dynamic loader does not"},
		"machine":     {guestapi.Config{Command: []string{"/opt/alien"}}, 126, "not an executable for this machine"},
		"no user":     {guestapi.Config{Command: []string{"true"}, RunAs: "ghost"}, 126, `the image's /etc/passwd has no user \"ghost\"`},
		"no group":    {guestapi.Config{Command: []string{"true"}, RunAs: "app:ghost"}, 126, `the image's /etc/group has no group \"ghost\"`},
		"run as name": {
			guestapi.Config{Command: []string{"sh", "-c", "echo $(id) $HOME $(pwd) $X"}, RunAs: "app", WorkingDir: "/made/for/it", Environment: map[string]string{"X": "$HOME %i"}},
			0,
			"uid=1000(app) gid=1000(app) groups=1000(app),44(video) /srv/app /made/for/it $HOME %i\n",
		},
		"run as ids":    {guestapi.Config{Command: []string{"sh", "-c", "echo $(id) $HOME"}, RunAs: "4711:44"}, 0, "uid=4711 gid=44(video) groups=44(video) /\n"},
		"run as number": {guestapi.Config{Command: []string{"sh", "-c", "echo $(id -u):$(id -g):$(id -G)"}, RunAs: "4711"}, 0, "4711:0:0\n"},
		"path of grant": {guestapi.Config{Command: []string{"true"}, Environment: map[string]string{"PATH": "/nowhere"}}, 127, "no such file"},
		"unusable dir":  {guestapi.Config{Command: []string{"true"}, WorkingDir: "/etc/passwd/x"}, 126, `can't make the working directory \"/etc/passwd/x\": not a directory`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := distro()
			img.Programs = map[string]string{"opt/script": "#!/no/such/interpreter\n", "opt/alien": "\x7fELF of another kind"}
			c := startContainer(t, img, tc.config)
			if code := c.wait(t); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if !strings.Contains(c.output.String(), tc.console) {
				t.Errorf("the console lacks %q", tc.console)
			}
		})
	}
}

func TestWorkloadEndsTheInstanceWithItsSessions(t *testing.T) {
	t.Parallel()
	c := startContainer(t, distro(), guestapi.Config{Command: []string{"sh", "-c", "while [ ! -e /tmp/end ]; do sleep 0.05; done; exit 9"}})
	c.ready(t)
	session := c.stock(t, "ssh", "compute@127.0.0.1", "echo here; exec sleep 1000")
	shown := &output{}
	session.Stdout = shown
	if err := session.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "session runs", func() bool { return shown.String() == "here\n" })
	c.ssh(t, "compute", "touch /tmp/end")
	if code := c.wait(t); code != 9 {
		t.Errorf("exit code %d, want 9", code)
	}
	_ = session.Wait()
	if code := session.ProcessState.ExitCode(); code != 255 {
		t.Errorf("session ended with %d", code)
	}
}

func TestSignalsReachTheWorkload(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{Command: []string{"/probe", "report-signals"}})
	c.console(t, "ready\n")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2} {
		if err := c.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		c.console(t, fmt.Sprintf("got %v\n", sig))
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 42 {
		t.Errorf("exit code %d, want 42", code)
	}
}

func TestStubbornWorkloadIsKilledAfterItsGrace(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{Command: []string{"/probe", "ignore-term"}, StopGraceSeconds: 1})
	c.console(t, "ignoring\n")
	c.ready(t)
	begin := time.Now()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != guestapi.ExitSignalBase+int(syscall.SIGKILL) {
		t.Errorf("exit code %d, want 137", code)
	}
	if took := time.Since(begin); took < time.Second {
		t.Errorf("killed after %v", took)
	}
	c.console(t, "warning: The workload did not stop in time and is killed grace_seconds=1")
}

func TestInstanceWithoutCommandStaysUntilStopped(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{})
	c.ready(t)
	if stdout, stderr, _ := c.ssh(t, "compute", "/probe args it lives"); stdout != "it|lives\n" {
		t.Errorf("%q %s", stdout, stderr)
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

func TestRefusedConfiguration(t *testing.T) {
	t.Parallel()
	hostKey, public := newKey(t)
	key := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public)))
	for name, tc := range map[string]struct{ config, console string }{
		"empty":     {"", "configuration is empty"},
		"not JSON":  {"{", "configuration ends in the middle"},
		"unknown":   {`{"version":1,"secret_of_the_test":1}`, `unknown field \"secret_of_the_test\"`},
		"version":   {`{"version":2}`, "version: 2 is not supported"},
		"wrong key": {fmt.Sprintf(`{"version":1,"host_key_pem":"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n","authorized_keys":[%q]}`, key), "host_key_pem: is not a private key that SSH can use"},
		"user":      {fmt.Sprintf(`{"version":1,"host_key_pem":%q,"authorized_keys":[%q],"user":"a:b"}`, hostKey, key), "user: must match"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := &container{output: &output{}, done: make(chan struct{})}
			c.run(t, image{}, tc.config, nil)
			if code := c.wait(t); code != guestapi.ExitInvalidConfig {
				t.Errorf("exit code %d", code)
			}
			c.console(t, "compute-bridge guest: error: The configuration is refused error=")
			c.console(t, tc.console)
			if strings.Contains(c.output.String(), "BEGIN") {
				t.Error("the console shows a key")
			}
		})
	}
}

func TestTakenPort(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{Command: []string{"/probe", "sleep"}})
	c.ready(t)
	hostKey, public := newKey(t)
	data, err := guestapi.Encode(guestapi.Config{
		Version: 1, HostKey: guestapi.NewHostKey(hostKey), ListenPort: c.port, Command: []string{"/probe", "sleep"},
		AuthorizedKeys: []string{string(ssh.MarshalAuthorizedKey(public))},
	})
	if err != nil {
		t.Fatal(err)
	}
	second := &container{output: &output{}, done: make(chan struct{})}
	second.run(t, image{}, string(data), nil)
	if code := second.wait(t); code != guestapi.ExitGuestFailed {
		t.Errorf("exit code %d", code)
	}
	second.console(t, "error: The SSH port cannot be opened")
}

func TestPID1ReapsOrphans(t *testing.T) {
	t.Parallel()
	c := startContainer(t, image{}, guestapi.Config{Command: []string{"/probe", "sleep"}})
	c.ready(t)
	for range 5 {
		if _, stderr, code := c.ssh(t, "compute", "/probe orphan"); code != 0 {
			t.Fatal(stderr)
		}
	}
	// Children of the container's PID 1, all threads, seen from outside: serve and nothing else, once the naps are over.
	threads := fmt.Sprintf("/proc/%d/task/*/children", c.cmd.Process.Pid)
	eventually(t, "only one child left", func() bool {
		files, err := filepath.Glob(threads)
		if err != nil || len(files) == 0 {
			t.Fatalf("no threads: %v", err)
		}
		var children []string
		for _, file := range files {
			data, _ := os.ReadFile(file) // a thread may have ended
			children = append(children, strings.Fields(string(data))...)
		}
		return len(children) == 1
	})
}

func TestHostHelpers(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "abc")
	if err := os.WriteFile(file, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args           []string
		stdout, stderr string
		code           int
	}{
		"sha256":        {[]string{"digest", "-algorithm", "sha256", file}, `{"algorithm":"sha256","hex":"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad","size":3}` + "\n", "", 0},
		"blake3":        {[]string{"digest", "-algorithm", "blake3", file}, `{"algorithm":"blake3","hex":"6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85","size":3}` + "\n", "", 0},
		"algorithm":     {[]string{"digest", "-algorithm", "md5", file}, "", "unknown algorithm", 1},
		"missing file":  {[]string{"digest", "/no/such"}, "", "no such file", 1},
		"no file":       {[]string{"digest"}, "", "0 arguments given, 1 expected", 2},
		"directory":     {[]string{"digest", t.TempDir()}, "", "is not a regular file", 1},
		"version":       {[]string{"version"}, "guest ", "", 0},
		"help":          {[]string{"help"}, "guest spool -dir DIR", "", 0},
		"nothing":       {nil, "", "guest spool -dir DIR", 2},
		"unknown":       {[]string{"destroy"}, "", `unknown command "destroy"`, 2},
		"unknown flag":  {[]string{"spool", "-force"}, "", "not defined: -force", 2},
		"machine":       {[]string{"machine"}, "", "guest machine: prepare, run, ready or end?", 2},
		"machine what":  {[]string{"machine", "destroy"}, "", `unknown command "machine destroy"`, 2},
		"machine flag":  {[]string{"machine", "end", "-now"}, "", "not defined: -now", 2},
		"spool no unit": {[]string{"spool", "-dir", t.TempDir()}, "", "no name of a service unit", 1},
		"spool nft":     {[]string{"spool", "-dir", t.TempDir(), "-unit", "a.service", "-table", "x; flush ruleset"}, "", "no name of a table", 1},
	} {
		cmd := exec.Command(built.guest, tc.args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run()
		if !strings.HasPrefix(stdout.String(), tc.stdout) && !strings.Contains(stdout.String(), tc.stdout) ||
			!strings.Contains(stderr.String(), tc.stderr) || cmd.ProcessState.ExitCode() != tc.code {
			t.Errorf("%s: got %q, %q, %d", name, &stdout, &stderr, cmd.ProcessState.ExitCode())
		}
	}
}

func TestBinaryIsStatic(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(built.guest)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, []byte("ld-linux")) {
		t.Error("the binary names a dynamic loader")
	}
	// It goes to every host over the network: growth must be noticed. 10 MB are far below an image's size.
	if len(data) > 10<<20 {
		t.Errorf("the binary has %d bytes", len(data))
	}
}
