package guestapi

import (
	"strconv"
	"strings"
	"time"
)

// The conversation of a worker with `guest lease` on a host: lines of text, a word first. A worker says LeaseBeat at
// least once a second and is answered LeaseAlive; it says LeaseJoin for each further connection of its own.
const (
	// LeaseBeat is the worker's sign of life.
	LeaseBeat = "beat"
	// LeaseAlive answers it.
	LeaseAlive = "alive"
	// LeaseJoin and the process id of an sshd: that connection ends with this one.
	LeaseJoin = "join"
	// LeaseJoined and the same id confirms it.
	LeaseJoined = "joined"
	// LeaseRefused, the same id and why: it is no such process. The worker must not use that connection.
	LeaseRefused = "refused"
	// LeaseHeld says that the host is the worker's from now on.
	LeaseHeld = "held"
	// LeaseWaiting and the holder, in [LeaseHolder]'s form, says that it is another's. It is said again when the
	// holder changes.
	LeaseWaiting = "waiting"
	// LeaseBusy and the holder says the same to who doesn't want to wait.
	LeaseBusy = "busy"
)

// Exit codes of `guest lease`.
const (
	// ExitLeaseBusy says that another holds the lease.
	ExitLeaseBusy = 3
	// ExitLeaseLost says that the worker stopped giving signs of life, or went away: everything that its connection
	// ran on the host has ended.
	ExitLeaseLost = 4
)

// DefaultLeaseTTL is how long a worker may be silent before its connection is ended.
const DefaultLeaseTTL = 5 * time.Second

// LeaseTicks is in how many steps both sides count how long the other is silent.
const LeaseTicks = 10

// MaxLeaseHolder bounds a holder's name, in bytes.
const MaxLeaseHolder = 200

// LeaseHolder is who holds a lease, as the lease's file says it to people and to the other workers.
type LeaseHolder struct {
	// Name is the worker's own.
	Name string
	// Since is when it got the lease, by the host's clock.
	Since time.Time
}

// String is one line: the time in RFC 3339, a space, the name.
func (h LeaseHolder) String() string {
	return h.Since.UTC().Format(time.RFC3339) + " " + LeaseHolderName(h.Name)
}

// ParseLeaseHolder reads what String wrote. What it can't read is a holder without a name: there is one all the same.
func ParseLeaseHolder(line string) LeaseHolder {
	at, name, _ := strings.Cut(strings.TrimSpace(line), " ")
	since, err := time.Parse(time.RFC3339, at)
	if err != nil {
		return LeaseHolder{}
	}
	return LeaseHolder{Name: LeaseHolderName(name), Since: since}
}

// LeaseHolderName returns a name as it may stand in a lease's file: one line of printable characters, not too long.
func LeaseHolderName(name string) string {
	name = strings.TrimSpace(strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(name, "?")))
	if len(name) > MaxLeaseHolder {
		name = strings.ToValidUTF8(name[:MaxLeaseHolder], "")
	}
	return name
}
