// Package hostlease makes a host one worker's: `guest lease` runs on the host as a session of the worker's SSH
// connection and holds an exclusive lock on a file for as long as that connection is good.
//
// The lock alone would not do. A worker that was stopped and goes on, or whose packets come late, would still write to
// a host that is another's by then. So the lock never outlives the connection, nor the connection the lock: when the
// worker is silent for too long, or its session ends, everything that its connection runs on the host is killed first,
// the sshd that serves it included, and only when all of that is gone the lock is let go.
package hostlease

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// maxLine bounds a line of the worker's, in bytes.
const maxLine = 4096

// unread is how many answers may wait for the worker to read them.
const unread = 64

// Request is what `guest lease` is asked for.
type Request struct {
	// File is locked. It and its directory are made; it is never removed.
	File string
	// Holder is written into it, for people and for who waits.
	Holder string
	// Wait waits for another holder to go.
	Wait bool
	// After is how long a lease that is free is left to others that may want it first.
	After time.Duration
	// TTL is how long the worker may be silent.
	TTL time.Duration
}

// Run holds the lease until ctx ends or the worker goes away, and returns the process's exit code. An error is a lease
// that was never asked for.
func Run(ctx context.Context, req Request, in io.Reader, out io.Writer, log *slog.Logger) (int, error) {
	// The kernel's choice of whom to kill when memory is short must not be who holds the lock.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // an improvement that it works without
	own, err := serverOf(os.Getpid())
	if err != nil {
		return 0, err
	}
	if err := os.MkdirAll(filepath.Dir(req.File), 0o711); err != nil { // containers' users pass through
		return 0, err
	}
	l := &lease{req: req, servers: []*server{own}, log: log, out: make(chan string, unread)}
	locked := make(chan error, 1)
	waiting := false
	if req.After > 0 && req.Wait {
		err = unix.EWOULDBLOCK
	} else {
		l.file, err = lock(req.File, false)
	}
	switch {
	case err == nil:
		locked <- nil
	case !errors.Is(err, unix.EWOULDBLOCK):
		return 0, err
	case !req.Wait:
		_, err := fmt.Fprintln(out, guestapi.LeaseBusy, readHolder(req.File))
		return guestapi.ExitLeaseBusy, err
	default:
		waiting = true
		go func() {
			select {
			case <-time.After(req.After):
			case <-ctx.Done():
				return
			}
			var err error
			l.file, err = lock(req.File, true)
			locked <- err
		}()
	}
	go func() {
		for line := range l.out {
			if _, err := fmt.Fprintln(out, line); err != nil {
				return // in ends, too
			}
		}
	}()
	reason := l.serve(ctx, lines(in), locked, waiting)
	log.Info("The lease ends", "reason", reason)
	fence(l.servers, log)
	return guestapi.ExitLeaseLost, nil
}

type lease struct {
	req     Request
	file    *os.File // set before locked is told
	servers []*server
	log     *slog.Logger
	out     chan string
}

// serve talks with the worker until the lease must end, and says why.
func (l *lease) serve(ctx context.Context, in <-chan string, locked <-chan error, waiting bool) (reason string) {
	// A tick that comes late counts once: while this process stood still, in a
	// machine that was paused or starved, it could not listen either.
	tick := time.NewTicker(l.req.TTL / guestapi.LeaseTicks)
	defer tick.Stop()
	silent := 0
	var told string // the holder
	// A worker that waits hears who holds the lease, and when that changes.
	tell := func() bool {
		holder := readHolder(l.req.File)
		if !waiting || holder == told {
			return true
		}
		told = holder
		return l.say(guestapi.LeaseWaiting, holder)
	}
	tell()
	for {
		select {
		case <-ctx.Done():
			return "asked to end"
		case <-tick.C:
			if silent++; silent <= guestapi.LeaseTicks {
				continue
			}
			return fmt.Sprintf("no sign of life within %s", l.req.TTL)
		case err := <-locked:
			if err == nil {
				err = l.sign()
			}
			if err != nil {
				return "lock: " + err.Error()
			}
			waiting = false
			if !l.say(guestapi.LeaseHeld) {
				return "the worker doesn't read"
			}
		case line, ok := <-in:
			if !ok {
				return "the worker's session has ended"
			}
			silent = 0
			if !l.answer(line) || !tell() {
				return "the worker doesn't read"
			}
		}
	}
}

// answer answers a line of the worker's. It returns false if the worker doesn't read answers.
func (l *lease) answer(line string) bool {
	word, rest, _ := strings.Cut(line, " ")
	if word != guestapi.LeaseJoin {
		return l.say(guestapi.LeaseAlive)
	}
	pid, err := strconv.Atoi(rest)
	if err != nil {
		return l.say(guestapi.LeaseRefused, strconv.Quote(rest), "no process id")
	}
	joined, err := openServer(pid)
	if err != nil {
		return l.say(guestapi.LeaseRefused, rest, err.Error())
	}
	l.servers = append(l.servers, joined)
	return l.say(guestapi.LeaseJoined, rest)
}

func (l *lease) say(words ...string) bool {
	select {
	case l.out <- strings.Join(words, " "):
		return true
	default:
		return false
	}
}

// sign writes the holder into the locked file.
func (l *lease) sign() error {
	text := guestapi.LeaseHolder{Name: l.req.Holder, Since: time.Now()}.String() + "\n"
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err := l.file.WriteAt([]byte(text), 0)
	return err
}

// lock opens and locks the file. A file that somebody has removed meanwhile locks nobody out; then it is done again.
func lock(name string, wait bool) (*os.File, error) {
	how := unix.LOCK_EX
	if !wait {
		how |= unix.LOCK_NB
	}
	for {
		file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Flock(int(file.Fd()), how)
		}
		if err != nil {
			_ = file.Close()
			return nil, err
		}
		mine, err := file.Stat()
		if err != nil {
			_ = file.Close()
			return nil, err
		}
		if there, err := os.Stat(name); err == nil && os.SameFile(mine, there) {
			return file, nil
		}
		_ = file.Close()
	}
}

// readHolder returns the line in the file, cleaned.
func readHolder(name string) string {
	file, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxLine))
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return guestapi.LeaseHolderName(line)
}

// lines returns the lines of in; the channel is closed at its end, or at a line that is too long.
func lines(in io.Reader) <-chan string {
	out := make(chan string)
	go func() {
		defer close(out)
		scanner := bufio.NewScanner(in)
		scanner.Buffer(make([]byte, 256), maxLine)
		for scanner.Scan() {
			out <- scanner.Text()
		}
	}()
	return out
}
