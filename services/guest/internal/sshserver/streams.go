package sshserver

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"time"
)

// Bounds of what is still read from a terminal after its command has ended: a process in the background may hold it
// open and write for ever. A terminal's own buffer is far smaller.
const (
	terminalDrainTime  = 100 * time.Millisecond
	terminalDrainBytes = 256 << 10
)

// streams are this process's ends of a command's standard streams.
type streams struct {
	tty    bool
	stdin  *os.File
	stdout *os.File
	stderr *os.File // nil for a terminal
	// child are the command's ends, which this process closes once the command has started.
	child [3]*os.File

	ended atomic.Bool
}

// pipes makes three pipes.
func pipes() (*streams, error) {
	var files []*os.File
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			return nil, err
		}
		files = append(files, r, w)
	}
	return &streams{
		stdin:  files[1],
		stdout: files[2],
		stderr: files[4],
		child:  [3]*os.File{files[0], files[3], files[5]},
	}, nil
}

// closeChild closes the command's ends: they are its own now, or nobody's.
func (st *streams) closeChild() {
	for _, f := range st.child {
		_ = f.Close()
	}
}

// endInput passes on the client's end of input. A terminal has no such thing: the client sends ^D.
func (st *streams) endInput() {
	if !st.tty {
		_ = st.stdin.Close()
	}
}

// close closes this process's ends. A command that still writes gets SIGPIPE; a terminal's processes get SIGHUP.
func (st *streams) close() {
	_ = st.stdin.Close()
	_ = st.stdout.Close()
	if st.stderr != nil {
		_ = st.stderr.Close()
	}
}

// exited tells the copying that the command has ended.
func (st *streams) exited() {
	st.ended.Store(true)
	if st.tty {
		// Wakes a read that began before; the deadline is set anew before each further one.
		_ = st.stdout.SetReadDeadline(time.Now().Add(terminalDrainTime))
	}
}

// copyOutput copies until the end of src, which for pipes is when the last process that has it open closes it, as
// with sshd. If dst fails, src is closed, so that the command learns that nobody reads.
func (st *streams) copyOutput(dst io.Writer, src *os.File) {
	if !st.tty {
		if _, err := io.Copy(dst, src); err != nil {
			_ = src.Close()
		}
		return
	}
	buf := make([]byte, 32<<10)
	left := terminalDrainBytes
	for left > 0 {
		ended := st.ended.Load()
		if ended {
			_ = src.SetReadDeadline(time.Now().Add(terminalDrainTime))
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				_ = src.Close()
				return
			}
			if ended {
				left -= n
			}
		}
		// A deadline that passed during a long write is no sign of an empty terminal.
		if errors.Is(err, os.ErrDeadlineExceeded) && !ended {
			continue
		}
		if err != nil {
			return
		}
	}
}
