package quickvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	"github.com/compute-bridge/compute-bridge/pkg/sshtest"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// Machine is one quick machine.
type Machine struct {
	boot    cloudsim.Boot
	addr    netip.Addr
	factory *Machines
	end     context.CancelFunc
	off     chan struct{}
	// exits and reboots are taken while there is something to end.
	exits   chan exit
	reboots chan struct{}
	// image is true once the image is on the disk. Only the machine's own
	// goroutine uses it.
	image bool

	mu      sync.Mutex // protects what follows
	grant   string
	console bytes.Buffer
}

// exit is how a workload ends by itself.
type exit struct {
	code   int32
	signal string
}

var _ cloudsim.Machine = (*Machine)(nil)

// Addr implements cloudsim.Machine.
func (m *Machine) Addr() netip.Addr { return m.addr }

// Off implements cloudsim.Machine.
func (m *Machine) Off() <-chan struct{} { return m.off }

func (m *Machine) isOff() bool {
	select {
	case <-m.off:
		return true
	default:
		return false
	}
}

// Console implements cloudsim.Machine.
func (m *Machine) Console() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.console.Bytes())
}

// print shows lines on the console, which ends them as a serial one does.
func (m *Machine) print(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for line := range strings.Lines(text) {
		m.console.WriteString(strings.TrimSuffix(line, "\n") + "\r\n")
	}
}

// Grant is whose the machine is, in hexadecimal, "" before it has read that.
func (m *Machine) Grant() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.grant
}

// Stop implements cloudsim.Machine.
func (m *Machine) Stop(ctx context.Context) error {
	m.end()
	select {
	case <-m.off:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("machine %s still runs: %w", m.boot.ID, ctx.Err())
	}
}

// errOff says that a machine is off.
var errOff = errors.New("the machine is off")

// Reboot implements cloudsim.Machine.
func (m *Machine) Reboot(ctx context.Context) error {
	select {
	case m.reboots <- struct{}{}:
		return nil
	case <-m.off:
		return errOff
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Exit makes the workload end by itself, with a signal ("KILL") or, if that is
// empty, a code. The machine says so on its console and powers off, or stays, as
// it was told. It waits for a workload that is yet to start.
func (m *Machine) Exit(ctx context.Context, code int32, signal string) error {
	select {
	case m.exits <- exit{code, signal}:
		return nil
	case <-m.off:
		return errNoWorkload
	case <-ctx.Done():
		return errors.Join(errNoWorkload, ctx.Err())
	}
}

// run is the machine's whole time from power-on to power-off.
func (m *Machine) run(ctx context.Context) {
	for m.life(ctx) {
		m.print("reboot: Restarting system")
	}
	// More than anybody keeps of a console, as systemd prints.
	for n := range shutdownLines {
		m.print(fmt.Sprintf("[  OK  ] Stopped quickvm-%02d.service - Nothing that anybody has to know about.", n))
	}
	m.print("reboot: Power down")
}

// shutdownLines are what a machine prints on its way down.
const shutdownLines = 40

// life is the time from one boot to the next. It returns false when the machine
// is to be off.
func (m *Machine) life(ctx context.Context) (again bool) {
	if again, up := m.wait(ctx, m.factory.options.BootDelay); !up {
		return again
	}
	told, err := readUserData(m.boot.UserData)
	if err != nil {
		// A stock image without our user-data stays on for ever.
		m.print("cloud-init: " + err.Error())
		return m.idle(ctx)
	}
	m.mu.Lock()
	m.grant = told.machine.GrantID
	m.mu.Unlock()
	due := make(chan struct{})
	deadline := time.AfterFunc(time.Until(told.machine.Deadline), func() {
		if !m.factory.late.Load() {
			close(due)
		}
	})
	defer deadline.Stop()

	served := make(chan struct{})
	bootContext, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var server *sshtest.Server
	go func() {
		defer close(served)
		server, err = m.start(bootContext, told)
	}()
	// What is begun is always waited for.
	finish := func() {
		giveUp()
		<-served
		if server != nil {
			server.Close()
		}
	}
	select {
	case <-served:
	case <-ctx.Done():
		finish()
		return false
	case <-due:
		finish()
		return false
	case <-m.reboots:
		finish()
		return true
	}
	defer finish()
	verdict := guestapi.Verdict{Grant: told.machine.GrantID, Attempt: told.machine.Attempt}
	if failure, failed := errors.AsType[*failureError](err); failed {
		verdict.Phase, verdict.Reason, verdict.Message = guestapi.PhaseFailed, failure.reason, failure.message
		m.print(verdict.Line())
		return m.over(ctx, told.machine.AtEnd, due)
	}
	verdict.Phase = guestapi.PhaseReady
	m.print(verdict.Line())
	select {
	case <-ctx.Done():
		return false
	case <-due:
		return false
	case <-m.reboots:
		return true
	case e := <-m.exits:
		verdict.Phase = guestapi.PhaseExited
		verdict.Signal = e.signal
		if e.signal == "" {
			verdict.Code = &e.code
		}
		server.Close()
		m.print(verdict.Line())
		return m.over(ctx, told.machine.AtEnd, due)
	}
}

// wait lets time pass. up is false if the machine went down meanwhile.
func (m *Machine) wait(ctx context.Context, d time.Duration) (again, up bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return false, true
	case <-ctx.Done():
		return false, false
	case <-m.reboots:
		return true, false
	}
}

// idle is a machine on which nothing runs.
func (m *Machine) idle(ctx context.Context) (again bool) {
	select {
	case <-ctx.Done():
		return false
	case <-m.reboots:
		return true
	}
}

// over is a machine whose workload has ended.
func (m *Machine) over(ctx context.Context, end guestapi.AtEnd, due <-chan struct{}) (again bool) {
	if end == guestapi.AtEndPowerOff {
		again, _ = m.wait(ctx, m.factory.options.StopDelay)
		return again
	}
	select {
	case <-ctx.Done():
		return false
	case <-due:
		return false
	case <-m.reboots:
		return true
	}
}

// failureError is why a guest gives up.
type failureError struct {
	// reason is one of guestapi's.
	reason, message string
}

// Error implements error.
func (f *failureError) Error() string { return f.reason + ": " + f.message }

// root is who may log in beside the configured user.
const root = "root"

// start does what the guest does until it is ready.
func (m *Machine) start(ctx context.Context, told instructions) (*sshtest.Server, error) {
	if err := m.prepare(ctx, told); err != nil {
		return nil, err
	}
	if console, fails := m.factory.nextFailure(); fails {
		m.print(console)
		return nil, &failureError{guestapi.ReasonWorkloadFailed, "the workload ended with exit status 127"}
	}
	if m.factory.hangs.Load() {
		m.print("cloud-init: still waiting for the network")
		<-ctx.Done()
		return nil, ctx.Err()
	}
	guest := told.machine.Guest
	server, err := sshtest.New(sshtest.Config{
		HostKey: redact.New([]byte(guest.HostKey.Reveal())), AuthorizedKeys: guest.AuthorizedKeys,
		Users: []string{guest.User, root}, Environment: guest.Environment,
	})
	if err != nil {
		return nil, &failureError{guestapi.ReasonHostUnfit, err.Error()}
	}
	endpoint := net.JoinHostPort(m.addr.String(), strconv.Itoa(int(guest.ListenPort)))
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", endpoint)
	if err != nil {
		return nil, &failureError{guestapi.ReasonHostUnfit, err.Error()}
	}
	server.Serve(listener)
	return server, nil
}
