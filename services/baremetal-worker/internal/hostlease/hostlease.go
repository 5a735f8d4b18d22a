// Package hostlease is a worker's side of `guest lease`, by which replicas of a
// worker agree whose a host is: the one whose SSH connection has a session that
// holds a lock there. The session dies with the connection, and the host ends
// the connection when the session is silent for too long, so that a host never
// has two owners. See package guestapi for what is said, and the guest's own
// package hostlease for how the host makes sure.
package hostlease

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Config is how a lease is asked for.
type Config struct {
	// Guest is the path of the guest binary on the host.
	Guest string
	// File is what is locked there.
	File string
	// Name is the worker's own, for people.
	Name string
	// After is how long a free lease is left to others that may want it first.
	After time.Duration
	// TTL is how long the worker may be silent. Default is the guest's.
	TTL time.Duration
}

func (c Config) ttl() time.Duration {
	if c.TTL > 0 {
		return c.TTL
	}
	return guestapi.DefaultLeaseTTL
}

// beats is how many signs of life go into a TTL.
const beats = 5

// maxLine bounds a line of the host's, in bytes.
const maxLine = 4096

// Args is the command to run on the host. Its input and output are the stream
// for [Start]. It waits for another holder to go.
func (c Config) Args() []string {
	return []string{
		c.Guest, "lease", "-file", c.File, "-holder", guestapi.LeaseHolderName(c.Name), "-ttl", c.ttl().String(), "-wait", "-after", c.After.String(),
	}
}

// State is where a lease stands.
type State int

// The states, in order; a lease never goes back.
const (
	// Asked: the host hasn't answered yet.
	Asked State = iota
	// Waiting for another holder.
	Waiting
	// Held.
	Held
	// Lost, or never got. Another lease needs another connection.
	Lost
)

// Status is what is known of a lease.
type Status struct {
	State State
	// Holder is who holds it, while Waiting.
	Holder guestapi.LeaseHolder
	// Err is why it is Lost.
	Err error
}

// Lease is a lease that was asked for. Its methods may be called at any time.
type Lease struct {
	config Config
	stream io.ReadWriteCloser
	done   chan struct{}

	mu      sync.Mutex // protects the fields below
	status  Status
	changed chan struct{} // closed and replaced whenever status changes
	joining map[int]chan error
	// Time is counted in ticks, of which there are LeaseTicks in a TTL: a tick that
	// comes late counts once, for a process that stood still hasn't listened.
	ticks        int
	acknowledged int   // when the last beat was sent that the host has answered
	sent         []int // when the beats were sent that have no answer yet

	writing sync.Mutex // one line at a time
}

// Start keeps a lease over the stream of [Config.Args], until it is lost or
// closed. It owns the stream.
func Start(c Config, stream io.ReadWriteCloser) *Lease {
	l := &Lease{
		config: c, stream: stream, done: make(chan struct{}), changed: make(chan struct{}),
		joining: map[int]chan error{},
	}
	go l.read()
	go l.beat()
	return l
}

// Observe returns the status and a channel that is closed when it is no longer
// true.
func (l *Lease) Observe() (Status, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status, l.changed
}

// Close lets go of the lease. The host then ends the connection.
func (l *Lease) Close() {
	l.lose(errors.New("let go"))
}

// Join makes the connection that an sshd process serves end with the lease.
// An error means that it must not be used.
func (l *Lease) Join(ctx context.Context, sshd int) error {
	answer := make(chan error, 1)
	l.mu.Lock()
	l.joining[sshd] = answer
	l.mu.Unlock()
	if err := l.write(guestapi.LeaseJoin + " " + strconv.Itoa(sshd)); err != nil {
		return fmt.Errorf("join connection to the host's lease: %w", err)
	}
	select {
	case err := <-answer:
		return err
	case <-l.done:
		return errors.New("the host's lease was lost")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lose ends the lease, once.
func (l *Lease) lose(err error) {
	l.mu.Lock()
	if l.status.State == Lost {
		l.mu.Unlock()
		return
	}
	l.set(Status{State: Lost, Err: err})
	close(l.done)
	l.mu.Unlock()
	_ = l.stream.Close() // ends what reads and writes
}

// set needs mu.
func (l *Lease) set(s Status) {
	l.status = s
	close(l.changed)
	l.changed = make(chan struct{})
}

// beat gives signs of life, and gives the lease up when they aren't answered: by
// then the host has ended it, or is about to.
func (l *Lease) beat() {
	ttl := l.config.ttl()
	ticker := time.NewTicker(ttl / beats)
	defer ticker.Stop()
	watchdog := time.NewTicker(ttl / guestapi.LeaseTicks)
	defer watchdog.Stop()
	writes := make(chan error, 1)
	writes <- nil
	for {
		select {
		case <-l.done:
			return
		case <-watchdog.C:
			l.mu.Lock()
			l.ticks++
			silent := l.ticks - l.acknowledged
			l.mu.Unlock()
			if silent > guestapi.LeaseTicks {
				l.lose(fmt.Errorf("no answer from the host's lease for %s", ttl))
			}
		case <-ticker.C:
			// A write may block on a dead network. The watchdog must not.
			select {
			case err := <-writes:
				if err != nil {
					l.lose(err)
					return
				}
				go func() { writes <- l.sendBeat() }()
			default:
			}
		}
	}
}

func (l *Lease) sendBeat() error {
	l.mu.Lock()
	l.sent = append(l.sent, l.ticks)
	l.mu.Unlock()
	return l.write(guestapi.LeaseBeat)
}

func (l *Lease) write(line string) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	_, err := io.WriteString(l.stream, line+"\n")
	return err
}

// read reads what the host says.
func (l *Lease) read() {
	scanner := bufio.NewScanner(l.stream)
	scanner.Buffer(make([]byte, 256), maxLine)
	for scanner.Scan() {
		l.hear(scanner.Text())
	}
	err := scanner.Err()
	if err == nil {
		err = errors.New("the host has ended it")
	}
	l.lose(err)
}

func (l *Lease) hear(line string) {
	word, rest, _ := strings.Cut(line, " ")
	l.mu.Lock()
	defer l.mu.Unlock()
	switch word {
	case guestapi.LeaseAlive:
		if len(l.sent) > 0 {
			l.acknowledged = l.sent[0]
			l.sent = l.sent[1:]
		}
	case guestapi.LeaseWaiting:
		if l.status.State <= Waiting {
			l.set(Status{State: Waiting, Holder: guestapi.ParseLeaseHolder(rest)})
		}
	case guestapi.LeaseHeld:
		if l.status.State <= Waiting {
			l.set(Status{State: Held})
		}
	case guestapi.LeaseJoined, guestapi.LeaseRefused:
		id, why, _ := strings.Cut(rest, " ")
		pid, err := strconv.Atoi(id)
		if err != nil || l.joining[pid] == nil {
			return
		}
		var answer error
		if word == guestapi.LeaseRefused {
			answer = fmt.Errorf("the host's lease refuses a connection: %s", why)
		}
		l.joining[pid] <- answer
		delete(l.joining, pid)
	}
}
