package hostlease

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// server is the sshd process that serves one connection.
type server struct {
	pid int
	// handle is a pidfd: a process id may be given to another process.
	handle int
}

// serverOf returns the sshd that started a process, however many shells are between.
func serverOf(pid int) (*server, error) {
	for p, err := parent(pid); ; p, err = parent(p) {
		if err != nil {
			return nil, fmt.Errorf("look for the sshd of process %d: %w", pid, err)
		}
		if p <= 1 {
			return nil, errors.New("not started by an sshd: there is no connection that could be held to the lease")
		}
		if isServer(p) {
			return openServer(p)
		}
	}
}

// openServer takes hold of the sshd process that serves a connection. It refuses every other process, above all the
// sshd that listens: to kill that one would cut the host off.
func openServer(pid int) (*server, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("process %d is not an sshd", pid)
	}
	handle, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("take hold of process %d: %w", pid, err)
	}
	// Looked at after it is held, so that it is this process that is looked at.
	listens, err := listening(pid)
	switch {
	case !isServer(pid):
		err = fmt.Errorf("process %d is not an sshd", pid)
	case listens:
		err = fmt.Errorf("process %d is the sshd that listens", pid)
	}
	if err != nil {
		_ = unix.Close(handle)
		return nil, err
	}
	return &server{pid: pid, handle: handle}, nil
}

// isServer tells by its name: sshd, or sshd-session from OpenSSH 9.8 on. Its program is looked at, too, where the kernel
// lets us: a name alone is anyone's to choose.
func isServer(pid int) bool {
	name, err := os.ReadFile(proc(pid, "comm"))
	if err != nil || !strings.HasPrefix(string(name), "sshd") {
		return false
	}
	program, err := os.Readlink(proc(pid, "exe"))
	return err != nil || strings.HasPrefix(program[strings.LastIndexByte(program, '/')+1:], "sshd")
}

// listening reports whether a process listens on a TCP port.
func listening(pid int) (bool, error) {
	const listen = "0A" // in include/net/tcp_states.h
	sockets := map[string]bool{}
	for _, table := range []string{"net/tcp", "net/tcp6"} {
		data, err := os.ReadFile(proc(pid, table))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
		for line := range strings.Lines(string(data)) {
			if fields := strings.Fields(line); len(fields) > 9 && fields[3] == listen {
				sockets["socket:["+fields[9]+"]"] = true
			}
		}
	}
	files, err := os.ReadDir(proc(pid, "fd"))
	if err != nil {
		return false, err
	}
	for _, f := range files {
		if link, err := os.Readlink(proc(pid, "fd") + "/" + f.Name()); err == nil && sockets[link] {
			return true, nil
		}
	}
	return false, nil
}

// parent returns the id of a process's parent.
func parent(pid int) (int, error) {
	data, err := os.ReadFile(proc(pid, "stat"))
	if err != nil {
		return 0, err
	}
	// "pid (name) state ppid ...": the name may hold anything.
	end := bytes.LastIndexByte(data, ')')
	if end < 0 {
		return 0, fmt.Errorf("%s: no name", proc(pid, "stat"))
	}
	fields := strings.Fields(string(data[end+1:]))
	if len(fields) < 2 {
		return 0, fmt.Errorf("%s: too short", proc(pid, "stat"))
	}
	return strconv.Atoi(fields[1])
}

func proc(pid int, name string) string { return "/proc/" + strconv.Itoa(pid) + "/" + name }

// fence ends the connections and everything that they run here, and returns when it is gone. Without a time limit: a
// process that the kernel won't let go may still write, and a host with such a process is nobody's.
func fence(servers []*server, log *slog.Logger) {
	var all []*server
	known := map[int]bool{os.Getpid(): true}
	for _, s := range servers {
		known[s.pid] = true
		// Stopped, so that it starts nothing while we look for what it has started.
		_ = unix.PidfdSendSignal(s.handle, unix.SIGSTOP, nil, 0)
		all = append(all, s)
	}
	connection := os.Getenv("SSH_CONNECTION")
	for {
		found := offspring(servers, connection, known)
		if len(found) == 0 {
			break
		}
		for _, pid := range found {
			known[pid] = true
			handle, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue // it is gone
			}
			// It may be another process with the same id by now.
			if !belongs(pid, servers, connection) {
				_ = unix.Close(handle)
				continue
			}
			_ = unix.PidfdSendSignal(handle, unix.SIGSTOP, nil, 0)
			all = append(all, &server{pid: pid, handle: handle})
		}
	}
	for _, s := range all {
		if err := unix.PidfdSendSignal(s.handle, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			log.Warn("A process can't be killed", "pid", s.pid, "error", err)
		}
	}
	for _, s := range all {
		ready := []unix.PollFd{{Fd: int32(s.handle), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		for n := 0; n == 0; {
			n, _ = unix.Poll(ready, -1) // interrupted: again
		}
	}
}

// offspring returns the processes of the connections that aren't known yet.
func offspring(servers []*server, connection string, known map[int]bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && !known[pid] && belongs(pid, servers, connection) {
			out = append(out, pid)
		}
	}
	return out
}

// belongs reports whether a process is one of a connection's: below its sshd, or, when its parents are gone, with what
// sshd gave its programs as environment.
func belongs(pid int, servers []*server, connection string) bool {
	for p, err := parent(pid); err == nil && p > 1; p, err = parent(p) {
		for _, s := range servers {
			if p == s.pid {
				return true
			}
		}
	}
	if connection == "" {
		return false
	}
	environ, err := os.ReadFile(proc(pid, "environ"))
	if err != nil {
		return false
	}
	for variable := range strings.SplitSeq(string(environ), "\x00") {
		if variable == "SSH_CONNECTION="+connection {
			return true
		}
	}
	return false
}
