package sshserver

import (
	"net"
	"os"
	"path/filepath"

	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

// agentForward is a unix socket in the container behind which is the client's agent.
type agentForward struct {
	dir      string
	path     string
	listener net.Listener
}

// listenAgent makes a socket that only acct can reach and hands its connections to the client.
func listenAgent(acct account.Account, conn *gossh.ServerConn) (*agentForward, error) {
	dir, err := os.MkdirTemp("", "compute-bridge-agent-*")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "agent.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	a := &agentForward{dir: dir, path: path, listener: listener}
	if os.Geteuid() == 0 {
		for _, name := range []string{path, dir} {
			if err := os.Chown(name, int(acct.UID), int(acct.GID)); err != nil {
				a.close()
				return nil, err
			}
		}
	}
	go a.accept(conn)
	return a, nil
}

func (a *agentForward) accept(conn *gossh.ServerConn) {
	for {
		incoming, err := a.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			source, ok := incoming.(duplex)
			if !ok {
				_ = incoming.Close()
				return
			}
			ch, requests, err := conn.OpenChannel("auth-agent@openssh.com", nil)
			if err != nil {
				_ = incoming.Close()
				return
			}
			pipe(ch, requests, source)
		}()
	}
}

func (a *agentForward) close() {
	_ = a.listener.Close()
	_ = os.RemoveAll(a.dir)
}
