package hosttap

import (
	"encoding/binary"
	"errors"
	"path"
	"strings"
	"sync"
)

// Types of SFTP packets (draft-ietf-secsh-filexfer-02).
const (
	sftpInit     = 1
	sftpVersion  = 2
	sftpOpen     = 3
	sftpClose    = 4
	sftpRead     = 5
	sftpWrite    = 6
	sftpFsetstat = 10
	sftpReaddir  = 12
	sftpRename   = 18
	sftpFstat    = 8
	sftpOpendir  = 11
	sftpStatus   = 101
	sftpHandle   = 102
	sftpExtended = 200
)

// sftpNames are the requests whose first field is a path or a handle.
var sftpNames = map[byte]string{
	sftpOpen: "open", sftpClose: "close", sftpRead: "read", sftpWrite: "write", 7: "lstat", sftpFstat: "fstat", 9: "setstat",
	sftpFsetstat: "fsetstat", sftpOpendir: "opendir", sftpReaddir: "readdir", 13: "remove", 14: "mkdir", 15: "rmdir", 16: "realpath",
	17: "stat", sftpRename: "rename", 19: "readlink", 20: "symlink",
}

// sftpReads are the requests that change nothing. Closing a file, or making it
// durable, doesn't change what anybody sees.
var sftpReads = map[string]bool{
	"open": true, "close": true, "read": true, "lstat": true, "fstat": true, "opendir": true, "readdir": true, "realpath": true, "stat": true,
	"readlink": true, "statvfs": true, "fstatvfs": true, "fsync": true, "limits": true, "expand-path": true,
}

// Status codes.
const (
	sftpDenied  = 3
	sftpFailure = 4
)

// sftpWriting are the flags of an open that may change the file.
const sftpWriting = 0x02 | 0x04 | 0x08 | 0x10

// sftpMax is far more than any server takes.
const sftpMax = 1 << 20

var errSFTP = errors.New("no SFTP packet")

// packet is an SFTP packet, as far as all have the same form.
type packet struct {
	kind byte
	id   uint32
	rest []byte
}

// parsePacket reads the first packet in b. A length of 0 says that b has only a
// part of it.
func parsePacket(b []byte) (p packet, length int, err error) {
	if len(b) < 4 {
		return packet{}, 0, nil
	}
	size := binary.BigEndian.Uint32(b)
	if size < 1 || size > sftpMax {
		return packet{}, 0, errSFTP
	}
	length = 4 + int(size)
	if len(b) < length {
		return packet{}, 0, nil
	}
	p = packet{kind: b[4], rest: b[5:length]}
	if p.kind == sftpInit || p.kind == sftpVersion {
		return p, length, nil // these have no id
	}
	if len(p.rest) < 4 {
		return packet{}, 0, errSFTP
	}
	p.id, p.rest = binary.BigEndian.Uint32(p.rest), p.rest[4:]
	return p, length, nil
}

// str takes a string off the front of a packet.
func str(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 || uint64(len(b)-4) < uint64(binary.BigEndian.Uint32(b)) {
		return "", nil, false
	}
	n := 4 + int(binary.BigEndian.Uint32(b))
	return string(b[4:n]), b[n:], true
}

// sftp is an SFTP session.
type sftp struct {
	mu      sync.Mutex
	opening map[uint32]string    // paths by the request that opens them
	open    map[string]*openFile // by handle
}

// openFile is what is known of a handle.
type openFile struct {
	path              string
	read, wrote, list bool
}

func newSFTP() *sftp { return &sftp{opening: map[uint32]string{}, open: map[string]*openFile{}} }

// request implements protocol.
func (s *sftp) request(b []byte) (unit, error) {
	p, length, err := parsePacket(b)
	if err != nil || length == 0 {
		return unit{}, err
	}
	u := unit{length: length, id: p.id, answers: p.kind != sftpInit, independent: true}
	u.call = s.call(p)
	return u, nil
}

// call says what a request asks for, nil for what belongs to an earlier call.
func (s *sftp) call(p packet) *Call {
	name, ok := sftpNames[p.kind]
	rest := p.rest
	if p.kind == sftpExtended {
		if name, rest, ok = str(rest); ok {
			name, _, _ = strings.Cut(name, "@")
		}
	}
	if !ok {
		return nil
	}
	target, rest, _ := str(rest) // empty where there is none
	s.mu.Lock()
	defer s.mu.Unlock()
	mutates := !sftpReads[name]
	switch {
	case p.kind == sftpOpen:
		if len(rest) >= 4 && binary.BigEndian.Uint32(rest)&sftpWriting != 0 {
			name, mutates = "create", true
		}
		s.opening[p.id] = target
	case p.kind == sftpOpendir:
		s.opening[p.id] = target
	case p.kind == sftpRename, name == "posix-rename", name == "hardlink":
		if to, _, ok := str(rest); ok {
			target = to // it has the name that says more
		}
	}
	if f := s.open[target]; f != nil {
		again := false
		switch p.kind {
		case sftpClose:
			delete(s.open, target)
		case sftpRead:
			again, f.read = f.read, true
		case sftpWrite:
			again, f.wrote = f.wrote, true
		case sftpReaddir:
			again, f.list = f.list, true
		}
		if again {
			return nil
		}
		target = f.path
	}
	return &Call{Point: stable("sftp." + name + " " + path.Base(target)), Mutates: mutates, Mentions: mentioned([]byte(target))}
}

// answer implements protocol.
func (s *sftp) answer(b []byte) (unit, error) {
	p, length, err := parsePacket(b)
	if err != nil || length == 0 {
		return unit{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if name, ok := s.opening[p.id]; ok && p.kind > sftpVersion {
		delete(s.opening, p.id)
		if handle, _, ok := str(p.rest); ok && p.kind == sftpHandle {
			s.open[handle] = &openFile{path: name}
		}
	}
	return unit{length: length, id: p.id, answers: p.kind != sftpVersion}, nil
}

// refuse implements protocol. sshd has no other word for a full disk than
// "Failure".
func (s *sftp) refuse(id uint32, kind Kind) []byte {
	s.mu.Lock()
	delete(s.opening, id)
	s.mu.Unlock()
	code, text := uint32(sftpFailure), "Failure"
	if kind == Denied || kind == Unauthenticated {
		code, text = sftpDenied, "Permission denied"
	}
	order := binary.BigEndian
	body := order.AppendUint32([]byte{sftpStatus}, id)
	body = order.AppendUint32(body, code)
	for _, s := range []string{text, ""} {
		body = append(order.AppendUint32(body, uint32(len(s))), s...)
	}
	return append(order.AppendUint32(nil, uint32(len(body))), body...)
}
