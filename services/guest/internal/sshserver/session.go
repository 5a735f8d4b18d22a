package sshserver

import (
	"regexp"
	"strings"
	"sync"
	"syscall"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/process"
)

// Limits of what a client may set in its environment.
const (
	maxClientEnv      = 64
	maxClientEnvBytes = 4 << 10
)

// clientEnvName is what a client may set: language and terminal, as sshd's AcceptEnv has it in distributions, and the
// two conventions for colour. Everything else belongs to the image and the grant; a client that wants more says so in
// its command.
var clientEnvName = regexp.MustCompile(`^(LANG|LANGUAGE|LC_[A-Z_]+|TERM|COLORTERM|NO_COLOR)$`)

// session is one session channel. Its request loop owns the fields and starts the command; the goroutine that then
// moves data only reads what no longer changes.
type session struct {
	srv   *Server
	conn  *gossh.ServerConn
	ch    gossh.Channel
	login string

	clientEnv []string
	term      *terminal
	agent     *agentForward
	started   bool

	// proc is the running command, nil before it runs.
	proc *process.Process

	// gone is closed when the channel is closed by the client or with the connection.
	gone chan struct{}
}

// handleSession implements ssh.ChannelHandler.
func (s *Server) handleSession(_ *ssh.Server, conn *gossh.ServerConn, newChannel gossh.NewChannel, ctx ssh.Context) {
	if !s.sessions.add() {
		_ = newChannel.Reject(gossh.ResourceShortage, "the instance is ending")
		return
	}
	defer s.sessions.done()
	ch, requests, err := newChannel.Accept()
	if err != nil {
		return
	}
	sess := &session{srv: s, conn: conn, ch: ch, login: ctx.User(), gone: make(chan struct{})}
	var running sync.WaitGroup
	for req := range requests {
		ok, follow := sess.handle(req)
		if req.WantReply {
			_ = req.Reply(ok, nil)
		}
		if follow != nil {
			running.Go(follow)
		}
	}
	close(sess.gone)
	running.Wait()
	_ = ch.Close()
	sess.release()
}

// release frees what was asked for and not handed over to a command.
func (sess *session) release() {
	if sess.term != nil {
		sess.term.close()
	}
	if sess.agent != nil {
		sess.agent.close()
	}
}

// handle acts on one channel request and says whether it was granted. follow, if not nil, is what is left to do after
// the answer has been sent: to see a command through to its end.
func (sess *session) handle(req *gossh.Request) (ok bool, follow func()) {
	switch req.Type {
	case "env":
		return sess.handleEnv(req.Payload), nil
	case "pty-req":
		return sess.handlePTY(req.Payload), nil
	case "window-change":
		return sess.handleWindow(req.Payload), nil
	case "signal":
		return sess.handleSignal(req.Payload), nil
	case "auth-agent-req@openssh.com":
		return sess.handleAgent(), nil
	}
	// Only one command runs in a session.
	if sess.started {
		return false, nil
	}
	switch req.Type {
	case "shell":
		follow = sess.startShell()
	case "exec":
		var payload struct{ Command string }
		if gossh.Unmarshal(req.Payload, &payload) != nil {
			return false, nil
		}
		follow = sess.startCommand(payload.Command)
	case "subsystem":
		var payload struct{ Name string }
		if gossh.Unmarshal(req.Payload, &payload) != nil || payload.Name != "sftp" {
			return false, nil
		}
		follow = sess.startSFTP()
	default:
		return false, nil
	}
	sess.started = true
	return true, follow
}

func (sess *session) handleEnv(payload []byte) bool {
	var env struct{ Name, Value string }
	if gossh.Unmarshal(payload, &env) != nil || sess.started || len(sess.clientEnv) >= maxClientEnv {
		return false
	}
	if !clientEnvName.MatchString(env.Name) || len(env.Value) > maxClientEnvBytes || strings.ContainsRune(env.Value, 0) {
		return false
	}
	sess.clientEnv = append(sess.clientEnv, env.Name+"="+env.Value)
	return true
}

func (sess *session) handlePTY(payload []byte) bool {
	req, err := parsePTYRequest(payload)
	if err != nil || sess.started || sess.term != nil {
		return false
	}
	term, err := openTerminal(req, sess.srv.opts.Accounts.Login(sess.login))
	if err != nil {
		sess.srv.opts.Logger.Warn("Cannot open a terminal for a session", "error", err)
		return false
	}
	sess.term = term
	return true
}

func (sess *session) handleWindow(payload []byte) bool {
	var size windowSize
	if gossh.Unmarshal(payload, &size) != nil || sess.term == nil {
		return false
	}
	return sess.term.resize(size) == nil
}

// handleSignal sends a client's signal to the command's process group.
func (sess *session) handleSignal(payload []byte) bool {
	var req struct{ Name string }
	if gossh.Unmarshal(payload, &req) != nil {
		return false
	}
	if sess.proc == nil {
		return false
	}
	for sig, name := range signalNames() {
		if name == req.Name {
			return sess.proc.SignalGroup(sig) == nil
		}
	}
	return false
}

func (sess *session) handleAgent() bool {
	if sess.started || sess.agent != nil {
		return false
	}
	agent, err := listenAgent(sess.srv.opts.Accounts.Login(sess.login), sess.conn)
	if err != nil {
		sess.srv.opts.Logger.Warn("Cannot forward an agent", "error", err)
		return false
	}
	sess.agent = agent
	return true
}

// signalNames are the signals that RFC 4254, section 6.10, names.
func signalNames() map[syscall.Signal]string {
	return map[syscall.Signal]string{
		syscall.SIGABRT: "ABRT",
		syscall.SIGALRM: "ALRM",
		syscall.SIGFPE:  "FPE",
		syscall.SIGHUP:  "HUP",
		syscall.SIGILL:  "ILL",
		syscall.SIGINT:  "INT",
		syscall.SIGKILL: "KILL",
		syscall.SIGPIPE: "PIPE",
		syscall.SIGQUIT: "QUIT",
		syscall.SIGSEGV: "SEGV",
		syscall.SIGTERM: "TERM",
		syscall.SIGUSR1: "USR1",
		syscall.SIGUSR2: "USR2",
	}
}
