package sshtest_test

import (
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/sshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a server that serves, and the keys.
type site struct {
	*sshtest.Server
	address          string
	host, login, own ssh.Signer
}

func newKey(t *testing.T) (sshkey.KeyPair, ssh.Signer) {
	t.Helper()
	pair, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := pair.Signer()
	if err != nil {
		t.Fatal(err)
	}
	return pair, signer
}

func open(t *testing.T) *site {
	t.Helper()
	var s site
	hostKey, host := newKey(t)
	_, s.login = newKey(t)
	_, s.own = newKey(t)
	s.host = host
	server, err := sshtest.New(sshtest.Config{
		HostKey: hostKey.Private, Users: []string{"compute"}, Environment: map[string]string{"NAME": "value"},
		AuthorizedKeys: []string{string(ssh.MarshalAuthorizedKey(s.login.PublicKey())), string(ssh.MarshalAuthorizedKey(s.own.PublicKey()))},
	})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server.Serve(listener)
	t.Cleanup(server.Close)
	s.Server, s.address = server, listener.Addr().String()
	return &s
}

func (s *site) dial(user string, login ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", s.address, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(login)}, HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()),
		Timeout: 10 * time.Second,
	})
}

func TestCommands(t *testing.T) {
	s := open(t)
	for _, test := range []struct {
		command, stdin, want, err string
		login                     ssh.Signer
	}{
		{command: "echo is $NAME", want: "is value\n", login: s.login},
		{command: "env", want: "NAME=value\n", login: s.own},
		{command: "cat", stdin: "through", want: "through", login: s.login},
		{command: "exit 3", err: "status 3", login: s.login},
		{command: "exit soon", err: "status 2", login: s.login},
		{command: "reboot", err: "status 127", login: s.login},
	} {
		client, err := s.dial("compute", test.login)
		if err != nil {
			t.Fatal(err)
		}
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		session.Stdin = strings.NewReader(test.stdin)
		out, err := session.Output(test.command)
		if string(out) != test.want || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %q, %v; want %q, %q", test.command, out, err, test.want, test.err)
		}
		if err := client.Close(); err != nil {
			t.Errorf("%s: close: %v", test.command, err)
		}
	}
}

func TestOnlyTheKeysAndUsersLogIn(t *testing.T) {
	s := open(t)
	_, stranger := newKey(t)
	for _, test := range []struct {
		name, user string
		login      ssh.Signer
	}{
		{"another key", "compute", stranger},
		{"another user", "root", s.login},
	} {
		if client, err := s.dial(test.user, test.login); err == nil {
			_ = client.Close()
			t.Errorf("%s logged in", test.name)
		}
	}
}

func TestCloseEndsConnections(t *testing.T) {
	s := open(t)
	client, err := s.dial("compute", s.login)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := client.Wait(); err == nil {
		t.Error("the connection ended without an error")
	}
	if _, err := s.dial("compute", s.login); err == nil {
		t.Error("a closed server takes connections")
	}
}

func TestKeysThatAreNone(t *testing.T) {
	pair, login := newKey(t)
	line := string(ssh.MarshalAuthorizedKey(login.PublicKey()))
	for _, test := range []struct {
		want string
		c    sshtest.Config
	}{
		{"the host key is no private key", sshtest.Config{HostKey: redact.New([]byte("none")), AuthorizedKeys: []string{line}}},
		{"login key: ", sshtest.Config{HostKey: pair.Private, AuthorizedKeys: []string{line, "none"}}},
	} {
		if _, err := sshtest.New(test.c); err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("%v, want %s", err, test.want)
		}
	}
}
