package hosttap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"
	"sync/atomic"
)

// Types of D-Bus messages (D-Bus specification, "Message Format").
const (
	dbusCall   = 1
	dbusReturn = 2
	dbusError  = 3
)

// Header fields.
const (
	dbusPath        = 1
	dbusInterface   = 2
	dbusMember      = 3
	dbusErrorName   = 4
	dbusReplySerial = 5
	dbusSender      = 7
	dbusSignature   = 8
)

const (
	// dbusNoReply is the flag of a call that wants no answer.
	dbusNoReply = 1
	// dbusFixed is the length of the header before its fields.
	dbusFixed = 16
	// dbusMax is the longest message that the specification allows.
	dbusMax = 128 << 20
)

var errDBus = errors.New("no D-Bus message")

// message is what counts of a D-Bus message.
type message struct {
	kind        byte
	flags       byte
	serial      uint32
	replySerial uint32
	path        string
	iface       string
	member      string
	errorName   string
}

// parseMessage reads the first message in b. A length of 0 says that b has only
// a part of it.
func parseMessage(b []byte) (m message, length int, err error) {
	if len(b) < dbusFixed {
		return message{}, 0, nil
	}
	var order binary.ByteOrder
	switch b[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return message{}, 0, errDBus
	}
	if b[3] != 1 { // the protocol's version
		return message{}, 0, errDBus
	}
	body, fields := uint64(order.Uint32(b[4:])), uint64(order.Uint32(b[12:]))
	header := (dbusFixed + fields + 7) &^ 7
	total := header + body
	if total > dbusMax {
		return message{}, 0, errDBus
	}
	if uint64(len(b)) < total {
		return message{}, 0, nil
	}
	m = message{kind: b[1], flags: b[2], serial: order.Uint32(b[8:])}
	if err := m.fields(b[:dbusFixed+fields], order); err != nil {
		return message{}, 0, err
	}
	return m, int(total), nil
}

// fields reads the header's fields: a byte and a variant each, aligned to 8.
func (m *message) fields(b []byte, order binary.ByteOrder) error {
	for at := dbusFixed; ; {
		at = (at + 7) &^ 7
		if at >= len(b) {
			return nil
		}
		// Code, length of the signature, signature, NUL.
		if at+4 > len(b) || b[at+1] != 1 || b[at+3] != 0 {
			return errDBus
		}
		code, kind := b[at], b[at+2]
		at += 4
		switch kind {
		case 'u':
			if at+4 > len(b) {
				return errDBus
			}
			if code == dbusReplySerial {
				m.replySerial = order.Uint32(b[at:])
			}
			at += 4
		case 's', 'o', 'g':
			var size int
			width := 4
			switch {
			case kind == 'g' && at < len(b):
				size, width = int(b[at]), 1
			case kind != 'g' && at+4 <= len(b) && order.Uint32(b[at:]) <= math.MaxInt32:
				size = int(order.Uint32(b[at:]))
			default:
				return errDBus
			}
			at += width
			if at+size+1 > len(b) {
				return errDBus
			}
			text := string(b[at : at+size])
			at += size + 1
			switch code {
			case dbusPath:
				m.path = text
			case dbusInterface:
				m.iface = text
			case dbusMember:
				m.member = text
			case dbusErrorName:
				m.errorName = text
			}
		default:
			return errDBus
		}
	}
}

// dbus is the system bus.
type dbus struct {
	requestsBegun, answersBegun atomic.Bool // after the authentication
}

func newDBus() *dbus { return &dbus{} }

// line is a line of the authentication.
func line(b []byte) unit { return unit{length: bytes.IndexByte(b, '\n') + 1} }

// request implements protocol.
func (d *dbus) request(b []byte) (unit, error) {
	if !d.requestsBegun.Load() {
		u := line(b)
		if strings.TrimSpace(string(b[:u.length])) == "BEGIN" {
			d.requestsBegun.Store(true)
		}
		return u, nil
	}
	m, length, err := parseMessage(b)
	if err != nil || length == 0 {
		return unit{}, err
	}
	u := unit{length: length, id: m.serial, independent: true}
	if m.kind != dbusCall {
		return u, nil
	}
	u.answers = m.flags&dbusNoReply == 0
	u.call = &Call{Point: m.point(), Mutates: m.mutates(), Mentions: mentioned(b[:length])}
	return u, nil
}

// answer implements protocol.
func (d *dbus) answer(b []byte) (unit, error) {
	if !d.answersBegun.Load() {
		// No line of an authentication begins so.
		if b[0] != 'l' && b[0] != 'B' {
			return line(b), nil
		}
		d.answersBegun.Store(true)
	}
	m, length, err := parseMessage(b)
	if err != nil || length == 0 {
		return unit{}, err
	}
	return unit{length: length, id: m.replySerial, answers: m.kind == dbusReturn || m.kind == dbusError}, nil
}

// services are short names of interfaces.
var services = map[string]string{
	"org.freedesktop.systemd1.Manager": "systemd",
	"org.freedesktop.DBus":             "dbus",
	"org.freedesktop.DBus.Properties":  "properties",
	"org.freedesktop.timedate1":        "timedate",
	"org.fedoraproject.FirewallD1":     "firewalld",
}

func (m message) point() string {
	service, ok := services[m.iface]
	if !ok {
		service = m.iface[strings.LastIndexByte(m.iface, '.')+1:]
	}
	return stable(service + "." + m.member)
}

func (m message) mutates() bool {
	switch m.iface {
	case "org.freedesktop.DBus", "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer":
		return false
	}
	if m.member == "Subscribe" {
		return false // of this connection only
	}
	return !slices.ContainsFunc([]string{"Get", "List", "get", "list", "query"}, func(p string) bool { return strings.HasPrefix(m.member, p) })
}

// refuse implements protocol.
func (d *dbus) refuse(id uint32, kind Kind) []byte {
	name := "org.freedesktop.DBus.Error.NoReply"
	switch kind {
	case Denied:
		name = "org.freedesktop.DBus.Error.AccessDenied"
	case Unauthenticated:
		name = "org.freedesktop.DBus.Error.AuthFailed"
	case Capacity, Quota, Throttled:
		name = "org.freedesktop.DBus.Error.LimitsExceeded"
	case Unavailable, Slow, LostAnswer, CrashBefore, CrashAfter:
	}
	return errorMessage(id, name, said(kind))
}

// errorMessage renders an error as the bus itself sends it.
func errorMessage(replySerial uint32, name, text string) []byte {
	order := binary.LittleEndian
	var fields []byte
	field := func(code, kind byte, value []byte) {
		for len(fields)%8 != 0 { // they begin at 16, which is aligned
			fields = append(fields, 0)
		}
		fields = append(fields, code, 1, kind, 0)
		fields = append(fields, value...)
	}
	str := func(s string) []byte { return append(append(order.AppendUint32(nil, uint32(len(s))), s...), 0) }
	field(dbusErrorName, 's', str(name))
	field(dbusReplySerial, 'u', order.AppendUint32(nil, replySerial))
	field(dbusSender, 's', str("org.freedesktop.DBus"))
	field(dbusSignature, 'g', []byte{1, 's', 0})
	body := str(text)
	out := []byte{'l', dbusError, dbusNoReply, 1}
	out = order.AppendUint32(out, uint32(len(body)))
	out = order.AppendUint32(out, math.MaxUint32) // a serial that the bus is far from
	out = order.AppendUint32(out, uint32(len(fields)))
	out = append(out, fields...)
	for len(out)%8 != 0 {
		out = append(out, 0)
	}
	return append(out, body...)
}
