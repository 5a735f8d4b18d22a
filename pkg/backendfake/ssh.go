package backendfake

import (
	"context"
	"fmt"
	"net"
	"strconv"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/pkg/sshtest"
)

// User is the login name of every instance.
const User = "compute"

// loopback is where everything is reached.
const loopback = "127.0.0.1"

// startSSH starts the SSH server of an instance, on a port of its own.
func startSSH(r request) (*sshtest.Server, uint16, error) {
	s, err := sshtest.New(sshtest.Config{
		HostKey: r.hostKey, AuthorizedKeys: []string{r.loginKey}, Users: []string{User}, Environment: r.environment,
	})
	if err != nil {
		return nil, 0, err
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return nil, 0, fmt.Errorf("listen: %w", err)
	}
	s.Serve(listener)
	address, _ := listener.Addr().(*net.TCPAddr)
	return s, address.AddrPort().Port(), nil
}

// probe checks that SSH answers with the host key.
func probe(ctx context.Context, port uint16, hostKey string) error {
	want, err := sshkey.ParsePublicKey(hostKey)
	if err != nil {
		return backenderr.Wrap(backenderr.Internal, err, "read the host key")
	}
	if err := sshkey.Probe(ctx, net.JoinHostPort(loopback, strconv.Itoa(int(port))), User, want); err != nil {
		return backenderr.Wrap(backenderr.BootTimeout, err, "SSH of the instance")
	}
	return nil
}
