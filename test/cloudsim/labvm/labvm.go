// Package labvm is the simulators' real machine: a lab host that boots as an
// instance of EC2 does. Debian's own cloud-init finds out that it is on EC2, gets
// an address by DHCP, reads the very user-data that the instance was started with
// from a metadata service (IMDSv2) at 169.254.169.254 in the machine's own network,
// and does what it says. What systemd, cloud-init and the guest write to
// /dev/console is the instance's console; a power-off from within ends it.
//
// What such a machine lacks is a kernel and a disk of its own size: see package
// lab.
package labvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// imdsAddr is where EC2's metadata service answers.
func imdsAddr() netip.Addr { return netip.MustParseAddr("169.254.169.254") }

// resetAfter is how long a machine has for a reboot in order before it is reset. EC2
// gives it four minutes.
const resetAfter = 90 * time.Second

// endLimit bounds clean-ups whose context has ended.
const endLimit = 2 * time.Minute

// Options says what machines to make.
type Options struct {
	// Lab is where they are. The lab of this process ([lab.Current]) when nil.
	Lab *lab.Lab
	// Release is Debian's: "bookworm", or that of the lab's hosts when empty.
	Release string
	// Log is told what takes long before it is done. Standard error when nil.
	Log io.Writer
}

// Machines starts machines in a lab. It implements [cloudsim.Machines].
type Machines struct {
	lab  *lab.Lab
	root string

	mu      sync.Mutex
	started map[*Machine]struct{}
	closed  bool
}

// Open returns a factory, after building the machines' root file system if the
// cache has none. Close it.
func Open(ctx context.Context, opts Options) (*Machines, error) {
	if opts.Lab == nil {
		current, err := lab.Current()
		if err != nil {
			return nil, fmt.Errorf("labvm: %w", err)
		}
		opts.Lab = current
	}
	if opts.Log == nil {
		opts.Log = os.Stderr
	}
	root, err := lab.CloudRootFS(ctx, opts.Log, opts.Release)
	if err != nil {
		return nil, fmt.Errorf("labvm: %w", err)
	}
	return &Machines{lab: opts.Lab, root: root, started: map[*Machine]struct{}{}}, nil
}

// architecture is this machine's, as EC2 names it.
func architecture() string {
	if runtime.GOARCH == "arm64" {
		return "arm64"
	}
	return "x86_64"
}

// Start implements [cloudsim.Machines].
func (f *Machines) Start(ctx context.Context, boot cloudsim.Boot) (cloudsim.Machine, error) {
	if arch := cmp.Or(boot.Architecture, architecture()); arch != architecture() {
		return nil, fmt.Errorf("labvm: %s: this machine can't run %s", boot.ID, arch)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, errors.New("labvm: closed")
	}
	m, err := f.start(ctx, boot)
	if err != nil {
		return nil, fmt.Errorf("labvm: %s: %w", boot.ID, err)
	}
	f.started[m] = struct{}{}
	return m, nil
}

// Close stops all machines.
func (f *Machines) Close(ctx context.Context) error {
	f.mu.Lock()
	f.closed = true
	var machines []*Machine
	for m := range f.started {
		machines = append(machines, m)
	}
	f.mu.Unlock()
	errs := make([]error, len(machines))
	var group sync.WaitGroup
	for i, m := range machines {
		group.Go(func() { errs[i] = m.Stop(ctx) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// forget is called when nothing is left of a machine.
func (f *Machines) forget(m *Machine) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.started, m)
}

// Machine is a machine in the lab. It implements [cloudsim.Machine].
type Machine struct {
	factory *Machines
	boot    cloudsim.Boot
	host    *lab.Host
	console *console
	off     chan struct{} // closed when it is down for good
	watched chan struct{} // closed when nobody waits for its end any more
	cancel  context.CancelFunc

	mu      sync.Mutex // the power state, and what follows
	service *services  // of the latest boot
	reset   bool       // Reboot lost patience: its end is no power-off
	booted  chan struct{}
	stopped bool
	removed bool
}

// start starts a machine and the goroutine that waits for its end.
func (f *Machines) start(ctx context.Context, boot cloudsim.Boot) (*Machine, error) {
	console, err := openConsole()
	if err != nil {
		return nil, err
	}
	watching, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m := &Machine{
		factory: f, boot: boot, console: console, cancel: cancel,
		off: make(chan struct{}), watched: make(chan struct{}), booted: make(chan struct{}),
	}
	m.host, err = f.lab.StartMachine(ctx, lab.MachineOptions{
		Name: boot.ID, RootFS: f.root, Console: console.terminal, Loopback: []netip.Addr{imdsAddr()},
		// What tells cloud-init that it is on EC2, where there is no firmware to ask.
		Sys: map[string]string{"hypervisor/uuid": "ec2" + hostUUID(boot.ID)[3:] + "\n"},
		Files: map[string]string{
			"etc/cloud/ds-identify.cfg": "datasource: Ec2\n",
			"etc/cloud/cloud.cfg.d/95-simulation.cfg": "datasource_list: [Ec2]\n" +
				// Without udev there is nothing to plug in.
				"updates: {network: {when: [boot-new-instance]}}\n",
		},
		Connected: m.connected,
	})
	if err != nil {
		cancel()
		m.closeServices()
		return nil, errors.Join(err, console.close())
	}
	go m.watch(watching)
	return m, nil
}

// connected starts what the cloud's network has for a machine, in each boot.
func (m *Machine) connected(_ context.Context, host *lab.Host) error {
	m.closeServices()
	var err error
	m.service, err = serve(m.factory.lab, host, m.boot)
	return err
}

// closeServices ends what connected started.
func (m *Machine) closeServices() {
	if m.service != nil {
		m.service.close()
		m.service = nil
	}
}

// watch waits for the machine's end, and boots it again when it reboots.
func (m *Machine) watch(ctx context.Context) {
	defer close(m.watched)
	for {
		how, err := m.host.WaitEnd(ctx)
		m.mu.Lock()
		if err == nil && !m.stopped && (how == lab.Rebooting || m.reset) {
			m.reset = false
			err = m.host.Reboot(ctx)
			if err == nil {
				close(m.booted)
				m.booted = make(chan struct{})
				m.mu.Unlock()
				continue
			}
			m.console.show(fmt.Sprintf("\nThe machine doesn't boot again: %v\n", err))
		}
		m.closeServices()
		close(m.off)
		m.mu.Unlock()
		return
	}
}

// Host is the lab host behind the machine as it is in this boot, to look into.
func (m *Machine) Host() *lab.Host {
	m.mu.Lock()
	defer m.mu.Unlock()
	host := *m.host // watch changes the other
	return &host
}

// Addr implements [cloudsim.Machine].
func (m *Machine) Addr() netip.Addr { return m.host.Addr }

// Off implements [cloudsim.Machine].
func (m *Machine) Off() <-chan struct{} { return m.off }

// Console implements [cloudsim.Machine].
func (m *Machine) Console() []byte { return m.console.text() }

// Reboot implements [cloudsim.Machine]: in order if it can be, and returns when the
// machine boots again.
func (m *Machine) Reboot(ctx context.Context) error {
	m.mu.Lock()
	booted := m.booted
	err := m.pressReset()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	patience := time.NewTimer(resetAfter)
	defer patience.Stop()
	for {
		select {
		case <-booted:
			return nil
		case <-m.off:
			return fmt.Errorf("labvm: %s powered off", m.boot.ID)
		case <-ctx.Done():
			return fmt.Errorf("labvm: reboot %s: %w", m.boot.ID, context.Cause(ctx))
		case <-patience.C:
			if err := m.hardReset(ctx, booted); err != nil {
				return err
			}
		}
	}
}

// pressReset asks the machine to reboot. The caller holds the lock.
func (m *Machine) pressReset() error {
	if m.stopped || !m.host.Running() {
		return fmt.Errorf("labvm: %s is off", m.boot.ID)
	}
	return m.host.CtrlAltDel()
}

// hardReset kills a machine that didn't reboot, so that watch boots it again.
func (m *Machine) hardReset(ctx context.Context, booted <-chan struct{}) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-booted: // it did after all
		return nil
	default:
	}
	if m.stopped {
		return nil // off is closed any moment
	}
	m.reset = true
	m.closeServices()
	return m.host.Kill(ctx)
}

// Stop implements [cloudsim.Machine]. It pulls the plug.
func (m *Machine) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	m.mu.Lock()
	m.stopped = true
	m.closeServices()
	err := m.host.Kill(ctx)
	m.mu.Unlock()
	m.cancel()
	<-m.watched
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.removed {
		return nil
	}
	if err := errors.Join(err, m.host.Destroy(ctx), m.console.close()); err != nil {
		return fmt.Errorf("labvm: stop %s: %w", m.boot.ID, err)
	}
	m.removed = true
	m.factory.forget(m)
	return nil
}
