package sshserver

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/shlex"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/environ"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/execpath"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/process"
)

// exitSyntax is the shell's exit code for a command line that it can't parse.
const exitSyntax = 2

// program is what a session runs.
type program struct {
	path string
	args []string
}

// startShell starts the account's login shell.
func (sess *session) startShell() func() {
	acct := sess.srv.opts.Accounts.Login(sess.login)
	shell, err := sess.srv.opts.Accounts.Shell(acct)
	if err != nil {
		return sess.failure(guestapi.ExitNotFound, "this image has no shell. Run one of its programs directly "+
			"(ssh ... /path/to/program arguments), or bring one along: scp a static busybox, then ssh -t ... ./busybox sh")
	}
	return sess.startProgram(acct, shell.Path, program{shell.Path, []string{"-" + shell.Name}})
}

// startCommand starts a command line by the account's shell, or, where the image has none, directly: quotes and
// backslashes then work, nothing else of a shell does.
func (sess *session) startCommand(line string) func() {
	acct := sess.srv.opts.Accounts.Login(sess.login)
	if strings.ContainsRune(line, 0) {
		return sess.failure(exitSyntax, "the command has a NUL byte")
	}
	shell, err := sess.srv.opts.Accounts.Shell(acct)
	if err == nil {
		return sess.startProgram(acct, shell.Path, program{shell.Path, []string{shell.Name, "-c", line}})
	}
	args, err := shlex.Split(line)
	if err != nil {
		return sess.failure(exitSyntax, "can't split the command (this image has no shell): "+err.Error())
	}
	if len(args) == 0 {
		return sess.failure(0, "")
	}
	pathList, _ := environ.Get(sess.environ(acct, ""), "PATH")
	path, err := execpath.Look(args[0], pathList, sess.srv.opts.Accounts.HomeDir(acct))
	if err != nil {
		return sess.failure(execpath.ExitCode(err), fmt.Sprintf(
			"%s: %s (this image has no shell; the command was run directly)", args[0], execpath.Reason(err)))
	}
	return sess.startProgram(acct, "", program{path, args})
}

// startSFTP starts the SFTP server, always without a terminal.
func (sess *session) startSFTP() func() {
	if sess.term != nil {
		sess.term.close()
		sess.term = nil
	}
	argv := sess.srv.opts.SFTPCommand
	return sess.startProgram(sess.srv.opts.Accounts.Login(sess.login), "", program{argv[0], argv})
}

// failure ends a session whose command can't run, with a message on its standard error.
func (sess *session) failure(code int, message string) func() {
	newline := "\n"
	if sess.term != nil {
		// The client's terminal is raw.
		newline = "\r\n"
	}
	return func() {
		if message != "" {
			_, _ = io.WriteString(sess.ch.Stderr(), guestapi.LogPrefix+message+newline)
		}
		sess.exit(code)
	}
}

// exit sends an exit code and closes the channel.
func (sess *session) exit(code int) {
	_, _ = sess.ch.SendRequest("exit-status", false, gossh.Marshal(struct{ Status uint32 }{uint32(code)})) // #nosec G115 -- 0 to 255
	_ = sess.ch.Close()
}

// exitWith sends how a process ended and closes the channel.
func (sess *session) exitWith(status syscall.WaitStatus) {
	if !status.Signaled() {
		sess.exit(status.ExitStatus())
		return
	}
	name, ok := signalNames()[status.Signal()]
	if !ok {
		// As sshd does for signals that the RFC has no name for.
		name = strings.TrimPrefix(unix.SignalName(status.Signal()), "SIG") + "@openssh.com"
	}
	payload := struct {
		Name     string
		Core     bool
		Message  string
		Language string
	}{Name: name, Core: status.CoreDump()}
	_, _ = sess.ch.SendRequest("exit-signal", false, gossh.Marshal(payload))
	_ = sess.ch.Close()
}

// environ is the environment of a session: the image's and the grant's, under the session's own identity and what the
// client may set.
func (sess *session) environ(acct account.Account, shell string) []string {
	env := environ.Unset(sess.srv.opts.Env, "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "SSH_AUTH_SOCK", "MAIL", "OLDPWD",
		"PWD", "SHLVL", "_")
	env = environ.Set(env, "USER", acct.Name)
	env = environ.Set(env, "LOGNAME", acct.Name)
	env = environ.Set(env, "HOME", sess.srv.opts.Accounts.HomeDir(acct))
	if path, ok := environ.Get(env, "PATH"); !ok || path == "" {
		env = environ.Set(env, "PATH", execpath.DefaultPath)
	}
	if shell != "" {
		env = environ.Set(env, "SHELL", shell)
	}
	remoteHost, remotePort, err1 := net.SplitHostPort(sess.conn.RemoteAddr().String())
	localHost, localPort, err2 := net.SplitHostPort(sess.conn.LocalAddr().String())
	if err1 == nil && err2 == nil {
		env = environ.Set(env, "SSH_CLIENT", remoteHost+" "+remotePort+" "+localPort)
		env = environ.Set(env, "SSH_CONNECTION", remoteHost+" "+remotePort+" "+localHost+" "+localPort)
	}
	for _, entry := range sess.clientEnv {
		name, value, _ := strings.Cut(entry, "=")
		env = environ.Set(env, name, value)
	}
	if sess.term != nil {
		env = environ.Set(env, "SSH_TTY", sess.term.name)
		if sess.term.kind != "" {
			env = environ.Set(env, "TERM", sess.term.kind)
		}
	}
	if sess.agent != nil {
		env = environ.Set(env, "SSH_AUTH_SOCK", sess.agent.path)
	}
	return env
}

// startProgram starts prog as acct and returns what sees it through.
func (sess *session) startProgram(acct account.Account, shell string, prog program) func() {
	var st *streams
	var err error
	if sess.term != nil {
		st = sess.term.streams()
	} else if st, err = pipes(); err != nil {
		return sess.failure(guestapi.ExitNotExecutable, err.Error())
	}
	env := sess.environ(acct, shell)
	start := func(dir string) (*process.Process, error) {
		return process.Start(&exec.Cmd{
			Path:   prog.path,
			Args:   prog.args,
			Env:    env,
			Dir:    dir,
			Stdin:  st.child[0],
			Stdout: st.child[1],
			Stderr: st.child[2],
			SysProcAttr: &syscall.SysProcAttr{
				Credential: process.Credential(acct),
				Setctty:    st.tty, // of file descriptor 0
			},
		})
	}
	home := sess.srv.opts.Accounts.HomeDir(acct)
	proc, err := start(home)
	if errors.Is(err, os.ErrPermission) && home != "/" {
		// A home directory that its owner can't enter is no reason to lock the owner out.
		proc, err = start("/")
	}
	st.closeChild()
	if err != nil {
		st.close()
		return sess.failure(execpath.ExitCode(err), prog.args[0]+": "+execpath.Reason(err))
	}
	sess.proc = proc
	return func() { sess.stream(proc, st) }
}

// stream copies between channel and process until the process has ended and its output is delivered, the client has
// gone, or the instance ends.
func (sess *session) stream(proc *process.Process, st *streams) {
	// Input is not waited for: it may be blocked on a client that sends nothing, and ends with the channel.
	go func() {
		_, _ = io.Copy(st.stdin, sess.ch)
		st.endInput()
	}()
	var output sync.WaitGroup
	output.Go(func() { st.copyOutput(sess.ch, st.stdout) })
	if st.stderr != nil {
		output.Go(func() { st.copyOutput(sess.ch.Stderr(), st.stderr) })
	}
	drained := make(chan struct{})
	go func() {
		<-proc.Done()
		st.exited()
		output.Wait()
		close(drained)
	}()

	select {
	case <-drained:
		sess.exitWith(proc.Status())
	case <-sess.gone:
		sess.abandon(proc, st)
	case <-sess.srv.stopping:
		if st.tty {
			// Only people see terminals; a command's error output stays its own.
			go func() {
				_, _ = io.WriteString(sess.ch.Stderr(), "\r\n"+guestapi.LogPrefix+"the instance has ended\r\n")
			}()
		}
		sess.hangUp(proc, sess.srv.opts.StopGrace)
		select {
		case <-drained:
		case <-sess.gone:
		case <-time.After(flushTime):
			// A process in the background holds the output open.
		}
		sess.exitWith(proc.Status())
	}
	st.close()
	<-drained
}

// abandon does what is due when the client has gone.
func (sess *session) abandon(proc *process.Process, st *streams) {
	st.close()
	if st.tty {
		sess.hangUp(proc, sess.srv.opts.KillGrace)
		return
	}
	select {
	case <-proc.Done():
	case <-sess.srv.stopping:
		sess.hangUp(proc, sess.srv.opts.StopGrace)
	}
}

// hangUp sends SIGHUP to the process group, and SIGKILL after grace, and waits for the end.
func (sess *session) hangUp(proc *process.Process, grace time.Duration) {
	_ = proc.SignalGroup(syscall.SIGHUP)
	// A stopped process acts on nothing until it goes on.
	_ = proc.SignalGroup(syscall.SIGCONT)
	select {
	case <-proc.Done():
		return
	case <-time.After(grace):
	}
	_ = proc.SignalGroup(syscall.SIGKILL)
	<-proc.Done()
}
