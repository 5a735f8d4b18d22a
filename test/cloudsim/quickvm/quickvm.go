// Package quickvm has machines that take milliseconds to boot: in place of an
// operating system, code of the test's own process reads the user-data and does
// what cloud-init and the guest would do.
//
// It is strict where they are: the guest binary and the image are really fetched
// and their digests checked, SSH opens only when the workload runs, has the host
// key of the user-data and takes its login keys only, the machine ends at its
// deadline by itself, and what the bridge is to know is printed to the console.
package quickvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// Options say how machines behave. The zero value boots at once.
type Options struct {
	// BootDelay passes from the start, and from each reboot, until the user-data
	// is read.
	BootDelay time.Duration
	// StopDelay passes from the end of a workload until the machine is off.
	StopDelay time.Duration
	// HTTP fetches guests and images; nil means a client of its own.
	HTTP *http.Client
}

// Machines starts quick machines. It is safe for concurrent use.
type Machines struct {
	options Options
	// hangs and late are what Hang and IgnoreDeadlines say.
	hangs, late atomic.Bool

	mu       sync.Mutex // protects what follows
	machines []*Machine
	failures []string
}

var _ cloudsim.Machines = (*Machines)(nil)

// New returns a factory that has started nothing.
func New(o Options) *Machines {
	o.HTTP = cmp.Or(o.HTTP, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}})
	return &Machines{options: o}
}

// FailNext makes the workload of the next machine that boots print console and
// end before it is ready.
func (f *Machines) FailNext(console string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = append(f.failures, console)
}

// Hang has the machines that boot from now on never get ready, or does so no
// more.
func (f *Machines) Hang(on bool) { f.hangs.Store(on) }

// IgnoreDeadlines has no machine end at its deadline by itself any more.
func (f *Machines) IgnoreDeadlines() { f.late.Store(true) }

// nextFailure takes what FailNext ordered.
func (f *Machines) nextFailure() (console string, fails bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.failures) == 0 {
		return "", false
	}
	console, f.failures = f.failures[0], f.failures[1:]
	return console, true
}

// Start implements cloudsim.Machines.
func (f *Machines) Start(ctx context.Context, boot cloudsim.Boot) (cloudsim.Machine, error) {
	addr, reservation, err := reserve(ctx)
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	m := &Machine{
		boot: boot, addr: addr, factory: f, end: end,
		off: make(chan struct{}), exits: make(chan exit), reboots: make(chan struct{}),
	}
	f.mu.Lock()
	f.machines = append(f.machines, m)
	f.mu.Unlock()
	go func() {
		defer close(m.off)
		defer reservation.Close() //nolint:errcheck // A socket that nothing was written to.
		defer end()
		m.run(life)
	}()
	return m, nil
}

// Of returns the machine of an instance, by the cloud's name for it, nil if there
// never was one.
func (f *Machines) Of(id string) *Machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		if m.boot.ID == id {
			return m
		}
	}
	return nil
}

// Running returns the machines that aren't off, of the grant whose id in
// hexadecimal is given.
func (f *Machines) Running(grant string) []*Machine {
	f.mu.Lock()
	all := slices.Clone(f.machines)
	f.mu.Unlock()
	return slices.DeleteFunc(all, func(m *Machine) bool { return m.isOff() || m.Grant() != grant })
}

// Consoles returns what the machines that there ever were have shown, by the
// cloud's names for the instances.
func (f *Machines) Consoles() map[string]string {
	f.mu.Lock()
	all := slices.Clone(f.machines)
	f.mu.Unlock()
	consoles := map[string]string{}
	for _, m := range all {
		consoles[m.boot.ID] = string(m.Console())
	}
	return consoles
}

// errNoWorkload says that nothing runs that could end.
var errNoWorkload = errors.New("no workload runs")

// Exit ends the workload of a grant, as [Machine.Exit] does.
func (f *Machines) Exit(ctx context.Context, grant string, code int32, signal string) error {
	for _, m := range f.Running(grant) {
		if err := m.Exit(ctx, code, signal); !errors.Is(err, errNoWorkload) {
			return err
		}
	}
	return fmt.Errorf("grant %s: %w", grant, errNoWorkload)
}

// Close stops all machines and waits for their end.
func (f *Machines) Close() {
	f.mu.Lock()
	all := slices.Clone(f.machines)
	f.mu.Unlock()
	for _, m := range all {
		m.end()
	}
	for _, m := range all {
		<-m.off
	}
	f.options.HTTP.CloseIdleConnections()
}

// Machines have addresses in 127.64.0.0/10: nothing else in this repository does.
// Several processes use it at the same time.
const (
	firstAddr = 127<<24 | 64<<16
	addrs     = 1 << 22
	tries     = 1000
)

// reserve finds an address that no other machine has, and keeps it until the
// reservation is closed: a UDP socket, so that connections are refused as long as
// SSH is closed.
func reserve(ctx context.Context) (netip.Addr, net.PacketConn, error) {
	var last error
	for range tries {
		n := uint32(firstAddr + 1 + rand.IntN(addrs-2))
		addr := netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		reservation, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", net.JoinHostPort(addr.String(), strconv.Itoa(reservedPort)))
		if err == nil {
			return addr, reservation, nil
		}
		last = err
	}
	return netip.Addr{}, nil, fmt.Errorf("no free address: %w", last)
}

// reservedPort is the one whose UDP socket stands for the whole address. It needs
// no more rights than SSH's.
const reservedPort = 22
