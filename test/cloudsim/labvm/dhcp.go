package labvm

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
)

// Numbers of RFC 2131 and RFC 2132.
const (
	bootRequest, bootReply = 1, 2

	dhcpDiscover, dhcpOffer, dhcpRequest, dhcpAck = 1, 2, 3, 5

	optionMask, optionRouter, optionLease = 1, 3, 51
	optionType, optionServer              = 53, 54
	optionPad, optionEnd                  = 0, 255

	clientPort = 68
	// headerSize is that of the fixed part, the magic number included.
	headerSize = 240
	magic      = 0x63825363
)

// leaseTime is longer than any machine lives: nobody renews.
const leaseTime = 24 * time.Hour

// lease is what one machine is told, and nobody else.
type lease struct {
	mac            net.HardwareAddr
	addr           netip.Addr
	prefix         netip.Prefix
	router, server netip.Addr
}

// serve answers the machine until the socket is closed.
func (l lease) serve(conn net.PacketConn) {
	buffer := make([]byte, 1500)
	everybody := &net.UDPAddr{IP: net.IPv4bcast, Port: clientPort}
	for {
		n, _, err := conn.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if answer := l.answer(buffer[:n]); answer != nil {
			// One that is lost is asked for again.
			_, _ = conn.WriteTo(answer, everybody)
		}
	}
}

// answer returns the answer to a client's message, or nil to one that gets none.
func (l lease) answer(message []byte) []byte {
	kind, ok := readMessage(message, l.mac)
	if !ok {
		return nil
	}
	switch kind {
	case dhcpDiscover:
		kind = dhcpOffer
	case dhcpRequest:
		kind = dhcpAck
	default:
		return nil
	}
	answer := make([]byte, headerSize, headerSize+64)
	copy(answer, message[:headerSize]) // transaction, flags, hardware address
	answer[0], answer[3] = bootReply, 0
	clear(answer[8:28])
	copy(answer[16:], l.addr.AsSlice())
	copy(answer[20:], l.server.AsSlice())
	clear(answer[44:236])
	add := func(option byte, value []byte) {
		answer = append(append(answer, option, byte(len(value))), value...)
	}
	add(optionType, []byte{kind})
	add(optionServer, l.server.AsSlice())
	add(optionLease, binary.BigEndian.AppendUint32(nil, uint32(leaseTime/time.Second)))
	add(optionMask, net.CIDRMask(l.prefix.Bits(), 32))
	add(optionRouter, l.router.AsSlice())
	return append(answer, optionEnd)
}

// readMessage returns what kind of message a client with this hardware address
// sent, and false if it is none.
func readMessage(message []byte, mac net.HardwareAddr) (kind byte, ok bool) {
	if len(message) < headerSize || message[0] != bootRequest || message[1] != 1 || int(message[2]) != len(mac) ||
		binary.BigEndian.Uint32(message[236:]) != magic || string(message[28:28+len(mac)]) != string(mac) {
		return 0, false
	}
	for options := message[headerSize:]; len(options) > 0; {
		switch option := options[0]; {
		case option == optionPad:
			options = options[1:]
			continue
		case option == optionEnd:
			return kind, kind != 0
		case len(options) < 2 || len(options) < 2+int(options[1]):
			return 0, false
		case option == optionType && options[1] == 1:
			kind = options[2]
		}
		options = options[2+int(options[1]):]
	}
	return kind, kind != 0
}
