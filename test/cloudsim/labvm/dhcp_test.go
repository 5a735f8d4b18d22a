package labvm

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
)

// testLease is a machine's.
func testLease() lease {
	return lease{
		mac: net.HardwareAddr{2, 0x77, 0, 0, 0, 1}, addr: netip.MustParseAddr("10.77.1.2"),
		prefix: netip.MustParsePrefix("10.77.0.0/16"), router: netip.MustParseAddr("10.77.0.1"), server: netip.MustParseAddr("10.77.0.1"),
	}
}

// message is a client's.
func message(mac net.HardwareAddr, options ...byte) []byte {
	m := make([]byte, headerSize+len(options))
	m[0], m[1], m[2] = bootRequest, 1, byte(len(mac))
	binary.BigEndian.PutUint32(m[4:], 0xdecade)
	copy(m[28:], mac)
	binary.BigEndian.PutUint32(m[236:], magic)
	copy(m[headerSize:], options)
	return m
}

func TestAMachineIsTheOnlyOneWhomItsLeaseIsGivenTo(t *testing.T) {
	t.Parallel()
	l := testLease()
	other := net.HardwareAddr{2, 0x77, 0, 0, 0, 2}
	reply := message(l.mac, optionType, 1, dhcpDiscover, optionEnd)
	reply[0] = bootReply
	for _, tc := range []struct {
		name    string
		message []byte
		want    byte // 0: no answer
	}{
		{"discover", message(l.mac, optionType, 1, dhcpDiscover, optionEnd), dhcpOffer},
		{"request, after other options", message(l.mac, optionPad, 61, 2, 1, 2, optionType, 1, dhcpRequest, optionEnd), dhcpAck},
		{"request without an end", message(l.mac, optionType, 1, dhcpRequest), dhcpAck},
		{"release", message(l.mac, optionType, 1, 7, optionEnd), 0},
		{"another machine's", message(other, optionType, 1, dhcpDiscover, optionEnd), 0},
		{"another server's", reply, 0},
		{"no type", message(l.mac, optionEnd), 0},
		{"cut off in an option", message(l.mac, optionType, 4, dhcpDiscover), 0},
		{"cut off in the header", message(l.mac)[:100], 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			answer := l.answer(tc.message)
			if tc.want == 0 {
				if answer != nil {
					t.Errorf("answered: % x", answer)
				}
				return
			}
			if len(answer) < headerSize+3 || answer[headerSize] != optionType || answer[headerSize+2] != tc.want {
				t.Fatalf("answer: % x", answer)
			}
			if xid := binary.BigEndian.Uint32(answer[4:]); answer[0] != bootReply || xid != 0xdecade {
				t.Errorf("operation %d, transaction %x", answer[0], xid)
			}
			if got, _ := netip.AddrFromSlice(answer[16:20]); got != l.addr {
				t.Errorf("address %s", got)
			}
		})
	}
}

func FuzzDHCPMessagesAreReadOrRefused(f *testing.F) {
	l := testLease()
	f.Add(message(l.mac, optionType, 1, dhcpDiscover, optionEnd))
	f.Add(message(l.mac, optionPad, 61, 2, 1, 2, optionType, 1, dhcpRequest))
	f.Add(message(l.mac, 255))
	f.Fuzz(func(t *testing.T, data []byte) {
		kind, ok := readMessage(data, l.mac)
		if ok && kind == 0 {
			t.Error("a message of no kind")
		}
		if answer := l.answer(data); answer != nil && (!ok || len(answer) < headerSize || string(answer[28:34]) != string(l.mac)) {
			t.Errorf("% x was answered % x", data, answer)
		}
	})
}
