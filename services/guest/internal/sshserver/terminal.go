package sshserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/creack/pty"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

// ttyGroup is the gid of the group tty on every Linux distribution; mesg and write expect it.
const ttyGroup = 5

// windowSize is the payload of a window-change request.
type windowSize struct {
	Columns, Rows, Width, Height uint32
}

// ptyRequest is the payload of a pty-req request.
type ptyRequest struct {
	term  string
	size  windowSize
	modes []terminalMode
}

// terminalMode is one encoded terminal mode, RFC 4254, section 8.
type terminalMode struct {
	opcode byte
	value  uint32
}

func parsePTYRequest(payload []byte) (ptyRequest, error) {
	var wire struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	if err := gossh.Unmarshal(payload, &wire); err != nil {
		return ptyRequest{}, err
	}
	for _, r := range wire.Term {
		if r <= ' ' || r >= 0x7f {
			return ptyRequest{}, errors.New("terminal type has a character that none has")
		}
	}
	return ptyRequest{
		term:  wire.Term,
		size:  windowSize{wire.Columns, wire.Rows, wire.Width, wire.Height},
		modes: parseModes([]byte(wire.Modes)),
	}, nil
}

// parseModes reads modes up to TTY_OP_END or the first that can't be read: opcodes from 160 have no defined length.
func parseModes(data []byte) []terminalMode {
	var modes []terminalMode
	for len(data) >= 5 && data[0] != 0 && data[0] < 160 {
		modes = append(modes, terminalMode{opcode: data[0], value: binary.BigEndian.Uint32(data[1:5])})
		data = data[5:]
	}
	return modes
}

// terminal is a pseudo-terminal that a session asked for.
type terminal struct {
	kind string // TERM
	name string // path of the slave
	ptmx *os.File
	tty  *os.File
}

// openTerminal makes a terminal that belongs to acct.
func openTerminal(req ptyRequest, acct account.Account) (*terminal, error) {
	blocking, tty, err := pty.Open()
	if err != nil {
		return nil, err
	}
	ptmx, err := pollable(blocking)
	if err != nil {
		_ = tty.Close()
		return nil, err
	}
	t := &terminal{kind: req.term, name: tty.Name(), ptmx: ptmx, tty: tty}
	if os.Geteuid() == 0 {
		gid := ttyGroup
		if err := tty.Chown(int(acct.UID), gid); err != nil {
			// The group may not exist in this user namespace.
			err = tty.Chown(int(acct.UID), int(acct.GID))
			if err != nil {
				t.close()
				return nil, err
			}
		}
		if err := tty.Chmod(0o620); err != nil {
			t.close()
			return nil, err
		}
	}
	if err := t.resize(req.size); err != nil {
		t.close()
		return nil, err
	}
	if err := setModes(tty, req.modes); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// pollable replaces a file by one whose reads end with Close and with deadlines. The library leaves its files in
// blocking mode, in which neither does anything to a read that waits.
func pollable(f *os.File) (*os.File, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("unblock %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil // #nosec G115 -- a descriptor
}

// resize must not take the file's descriptor out of the poller, as the library's function does.
func (t *terminal) resize(size windowSize) error {
	clamp := func(n uint32) uint16 { return uint16(min(n, 1<<16-1)) } // #nosec G115 -- that is what min is for
	winsize := unix.Winsize{
		Row: clamp(size.Rows), Col: clamp(size.Columns), Xpixel: clamp(size.Width), Ypixel: clamp(size.Height),
	}
	return control(t.ptmx, func(fd int) error { return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &winsize) })
}

// control runs f on the descriptor of a file.
func control(file *os.File, f func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = conn.Control(func(fd uintptr) { inner = f(int(fd)) }) // #nosec G115 -- a descriptor
	return errors.Join(err, inner)
}

// streams makes the terminal a command's standard streams.
func (t *terminal) streams() *streams {
	return &streams{tty: true, stdin: t.ptmx, stdout: t.ptmx, child: [3]*os.File{t.tty, t.tty, t.tty}}
}

func (t *terminal) close() {
	_ = t.ptmx.Close()
	_ = t.tty.Close()
}

// setModes applies what the client's own terminal has set, so that for example its erase character works. Unknown
// modes are passed over, as the RFC wants.
func setModes(tty *os.File, modes []terminalMode) error {
	return control(tty, func(fd int) error {
		termios, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		for _, mode := range modes {
			applyMode(termios, mode)
		}
		return unix.IoctlSetTermios(fd, unix.TCSETS, termios)
	})
}

// applyMode sets one mode. Opcodes are those of RFC 4254, section 8, and RFC 8160 for IUTF8.
func applyMode(t *unix.Termios, mode terminalMode) {
	if index, ok := controlCharacters()[mode.opcode]; ok {
		// 255 means that the client has none.
		t.Cc[index] = 0
		if mode.value < 255 {
			t.Cc[index] = byte(mode.value)
		}
		return
	}
	flag, ok := modeFlags()[mode.opcode]
	if !ok {
		return
	}
	var field *uint32
	switch flag.field {
	case inputFlags:
		field = &t.Iflag
	case localFlags:
		field = &t.Lflag
	case outputFlags:
		field = &t.Oflag
	}
	if mode.value != 0 {
		*field |= flag.bit
	} else {
		*field &^= flag.bit
	}
}

func controlCharacters() map[byte]int {
	return map[byte]int{
		1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2,
		8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT,
		18: unix.VDISCARD,
	}
}

type flagField int

const (
	inputFlags flagField = iota
	localFlags
	outputFlags
)

type modeFlag struct {
	field flagField
	bit   uint32
}

// modeFlags leaves out character size and parity: a pseudo-terminal has eight bits and none.
func modeFlags() map[byte]modeFlag {
	return map[byte]modeFlag{
		30: {inputFlags, unix.IGNPAR}, 31: {inputFlags, unix.PARMRK}, 32: {inputFlags, unix.INPCK},
		33: {inputFlags, unix.ISTRIP}, 34: {inputFlags, unix.INLCR}, 35: {inputFlags, unix.IGNCR},
		36: {inputFlags, unix.ICRNL}, 37: {inputFlags, unix.IUCLC}, 38: {inputFlags, unix.IXON},
		39: {inputFlags, unix.IXANY}, 40: {inputFlags, unix.IXOFF}, 41: {inputFlags, unix.IMAXBEL},
		42: {inputFlags, unix.IUTF8},
		50: {localFlags, unix.ISIG}, 51: {localFlags, unix.ICANON}, 52: {localFlags, unix.XCASE},
		53: {localFlags, unix.ECHO}, 54: {localFlags, unix.ECHOE}, 55: {localFlags, unix.ECHOK},
		56: {localFlags, unix.ECHONL}, 57: {localFlags, unix.NOFLSH}, 58: {localFlags, unix.TOSTOP},
		59: {localFlags, unix.IEXTEN}, 60: {localFlags, unix.ECHOCTL}, 61: {localFlags, unix.ECHOKE},
		62: {localFlags, unix.PENDIN},
		70: {outputFlags, unix.OPOST}, 71: {outputFlags, unix.OLCUC}, 72: {outputFlags, unix.ONLCR},
		73: {outputFlags, unix.OCRNL}, 74: {outputFlags, unix.ONOCR}, 75: {outputFlags, unix.ONLRET},
	}
}
