package sshkey

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/crypto/ssh"
)

// probeTimeout bounds one try to reach an SSH server.
const probeTimeout = 5 * time.Second

// Probe connects to an SSH server and checks its host key. It does not log in:
// it has no key that could, and a server that lets it in without one is an
// error. It takes at most 5 s.
func Probe(ctx context.Context, endpoint, user string, want PublicKey) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", endpoint)
	if err != nil {
		return fmt.Errorf("connect to SSH: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	matched := false
	fixed := ssh.FixedHostKey(want.key)
	client, _, _, err := ssh.NewClientConn(conn, endpoint, &ssh.ClientConfig{
		User:              user,
		HostKeyAlgorithms: []string{want.key.Type()},
		HostKeyCallback: func(name string, remote net.Addr, key ssh.PublicKey) error {
			err := fixed(name, remote, key)
			matched = err == nil
			return err
		},
	})
	switch {
	case err == nil:
		_ = client.Close()
		return errors.New("the SSH server lets everyone in without a key")
	case matched:
		return nil
	}
	return fmt.Errorf("SSH handshake: %w", err)
}
