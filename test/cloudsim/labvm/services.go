package labvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// services are what a cloud's network has for one machine, for one boot: the
// metadata service, in the machine's own network, and a DHCP server on the lab's.
type services struct {
	imds  *http.Server
	dhcp  net.PacketConn
	group sync.WaitGroup
}

// serve starts a machine's services.
func serve(l *lab.Lab, host *lab.Host, boot cloudsim.Boot) (*services, error) {
	var listener net.Listener
	err := host.Inside(func() error {
		var config net.ListenConfig
		var err error
		// The context of a listener is for names, and this is an address.
		listener, err = config.Listen(context.Background(), "tcp", netip.AddrPortFrom(imdsAddr(), 80).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("metadata service: %w", err)
	}
	conn, err := listenDHCP(l)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("DHCP server: %w", err), listener.Close())
	}
	s := &services{
		dhcp: conn,
		imds: &http.Server{Handler: newIMDS(boot, l, host, time.Now), ReadHeaderTimeout: time.Minute},
	}
	s.group.Go(func() { _ = s.imds.Serve(listener) }) // until it is closed
	lease := lease{
		mac: host.MAC(), addr: host.Addr, prefix: l.Prefix(), router: l.Addr(), server: l.Addr(),
	}
	s.group.Go(func() { lease.serve(s.dhcp) })
	return s, nil
}

// close ends them, with all connections: a socket would keep the machine's network
// from ending.
func (s *services) close() {
	_ = s.imds.Close()
	_ = s.dhcp.Close()
	s.group.Wait()
}

// listenDHCP opens a socket that hears what clients without an address say in the
// lab's network. Each machine's server has one, hence shares the port.
func listenDHCP(l *lab.Lab) (net.PacketConn, error) {
	var conn net.PacketConn
	err := l.Inside(func() error {
		device, err := deviceOf(l.Addr())
		if err != nil {
			return err
		}
		config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			var errs []error
			err := raw.Control(func(fd uintptr) {
				for _, option := range []int{
					unix.SO_REUSEADDR, unix.SO_BROADCAST,
					// Nobody fills in checksums that the sender leaves to the hardware,
					// where there is none, and clients read raw packets.
					unix.SO_NO_CHECK,
				} {
					errs = append(errs, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, 1))
				}
				errs = append(errs, unix.BindToDevice(int(fd), device))
			})
			return errors.Join(append(errs, err)...)
		}}
		conn, err = config.ListenPacket(context.Background(), "udp4", ":67")
		return err
	})
	return conn, err
}

// deviceOf returns the name of the interface with an address.
func deviceOf(addr netip.Addr) (string, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			return "", err
		}
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr() == addr {
				return i.Name, nil
			}
		}
	}
	return "", fmt.Errorf("no interface has the address %s", addr)
}
