package hosttap

import (
	"io"
	"slices"
	"sync"

	"golang.org/x/crypto/ssh"
)

// readSize is what is read of a channel at a time.
const readSize = 64 << 10

// protocol understands the two directions of a stream. Its methods may be
// called by two goroutines at once, one for each direction.
type protocol interface {
	// request returns the first unit of what the worker sends; a length of 0
	// says that more is needed.
	request(b []byte) (unit, error)
	// answer returns the first unit of what the host sends.
	answer(b []byte) (unit, error)
	// refuse renders the host's answer to a request that it refuses.
	refuse(id uint32, kind Kind) []byte
}

// unit is what is forwarded as a whole.
type unit struct {
	length int
	// id is the request's, and in an answer that of the request that it answers.
	id uint32
	// call is what a request asks, nil if nothing that counts.
	call *Call
	// answers says that an answer is one; of a request, that it wants one.
	answers bool
	// part says that a request's unit is more of the one before.
	part bool
	// independent says that later requests may overtake this one.
	independent bool
}

// channel is a channel of the worker and the one to the host for it.
type channel struct {
	link     *link
	down, up ssh.Channel
	protocol protocol

	fromWorker, fromHost sync.WaitGroup
	held                 sync.WaitGroup // slow calls that others may overtake
	begun                chan struct{}  // closed when the worker knows that the channel's stream has begun, or won't
	stderr               chan struct{}  // closed when the host's standard error has ended
	dropping             bool           // the rest of a refused request; of the goroutine that reads the worker

	// Whole units only are sent either way.
	toWorker, toHost sync.Mutex

	mu      sync.Mutex // protects the fields below
	pending map[uint32]*Injection
	exit    *Injection // waits for the command's end
}

func (c *channel) understand(p protocol) { c.protocol = p }

// start begins to forward the channel's data.
func (c *channel) start() {
	c.fromWorker.Go(c.requests)
	c.fromHost.Go(c.answers)
	c.fromHost.Go(func() {
		defer close(c.stderr)
		c.copy(c.down.Stderr(), c.up.Stderr())
	})
}

// run forwards the channel's requests until both sides have closed it. A session
// has to be begun by one of them.
func (c *channel) run(fromWorker, fromHost <-chan *ssh.Request, session bool) {
	var over sync.WaitGroup
	over.Go(func() {
		// A short command may have ended before the worker was told that it began.
		<-c.begun
		for r := range fromHost {
			if c.ended(r) {
				continue
			}
			c.forward(r, c.down)
		}
		c.fromHost.Wait()
		if c.link.gate() == nil {
			_ = c.down.Close()
		}
	})
	begun := sync.OnceFunc(func() { close(c.begun) })
	if !session {
		begun()
	}
	for r := range fromWorker {
		switch r.Type {
		case "exec", "subsystem", "shell":
			c.begin(r)
			begun()
		default:
			c.forward(r, c.up)
		}
	}
	begun()
	c.fromWorker.Wait()
	if c.link.gate() == nil {
		_ = c.up.Close()
	}
	over.Wait()
}

func (c *channel) forward(r *ssh.Request, to ssh.Channel) {
	if c.link.gate() != nil {
		return
	}
	ok, err := to.SendRequest(r.Type, r.WantReply, r.Payload)
	if r.WantReply && c.link.gate() == nil {
		_ = r.Reply(ok && err == nil, nil)
	}
}

// begin forwards what starts a session: a command is a call.
func (c *channel) begin(r *ssh.Request) {
	var asked struct{ Text string }
	_ = ssh.Unmarshal(r.Payload, &asked) // else it is empty
	var call *Call
	switch {
	case r.Type == "subsystem" && asked.Text == "sftp":
		c.understand(newSFTP())
	case r.Type == "exec":
		command := parseCommand(asked.Text)
		switch command.bridge {
		case bridgeDBus:
			c.understand(newDBus())
		case bridgePodman:
			c.understand(newHTTP())
		default:
			call = command.call
		}
	}
	if hit := c.link.tap.group.arrive(call); hit != nil {
		switch hit.fault.Kind {
		case Slow:
			hit.trigger.Strike(nil)
			if !c.hold(hit) {
				return
			}
		case LostAnswer, CrashAfter:
			c.mu.Lock()
			c.exit = hit
			c.mu.Unlock()
		case CrashBefore:
			if hit.trigger.Strike(c.link.tap.group.crash) {
				return
			}
		case Capacity, Quota, Denied, Unauthenticated, Throttled, Unavailable:
			if hit.trigger.Strike(func() { c.refuseCommand(r, call, hit.fault.Kind) }) {
				return
			}
		}
	}
	c.forward(r, c.up)
	c.start()
}

// hold waits until a slow call may go on.
func (c *channel) hold(i *Injection) bool {
	select {
	case <-i.trigger.Released():
		return true
	case <-c.link.done:
		return false
	}
}

// refuseCommand answers as a host whose command fails.
func (c *channel) refuseCommand(r *ssh.Request, call *Call, kind Kind) {
	if c.link.gate() != nil {
		return
	}
	if r.WantReply {
		_ = r.Reply(true, nil)
	}
	_, _ = io.WriteString(c.down.Stderr(), call.Point+": "+said(kind)+"\n")
	_ = c.down.CloseWrite()
	_, _ = c.down.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{1}))
	_ = c.down.Close()
	_ = c.up.Close()
}

// said is what a host says of a failure: the text of the error code that its
// system calls fail with.
func said(kind Kind) string {
	switch kind {
	case Denied, Unauthenticated:
		return "Permission denied"
	case Capacity:
		return "No space left on device"
	case Quota:
		return "Disk quota exceeded"
	case Throttled:
		return "Resource temporarily unavailable"
	case Unavailable, Slow, LostAnswer, CrashBefore, CrashAfter:
	}
	return "Input/output error"
}

// ended handles the end of a command that a fault waits for.
func (c *channel) ended(r *ssh.Request) bool {
	if r.Type != "exit-status" && r.Type != "exit-signal" {
		return false
	}
	c.mu.Lock()
	hit := c.exit
	c.exit = nil
	c.mu.Unlock()
	if hit == nil {
		return false
	}
	if !c.lost(hit) {
		c.link.close() // It was released, and the command's output is gone.
	}
	return true
}

// lost is what happens in place of an answer. It returns false if the fault was
// released meanwhile.
func (c *channel) lost(hit *Injection) bool {
	if c.link.dead.Load() {
		return true
	}
	if hit.fault.Kind == CrashAfter {
		return hit.trigger.Strike(c.link.tap.group.crash)
	}
	return hit.trigger.Strike(c.link.close)
}

// copy forwards a stream as it is.
func (c *channel) copy(to io.Writer, from io.Reader) {
	buf := make([]byte, readSize)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if c.link.gate() != nil {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// requests forwards what the worker sends, unit by unit, and then its end.
func (c *channel) requests() {
	c.pump(c.down, c.protocolRequest, c.pass)
	c.held.Wait()
	if c.link.gate() == nil {
		_ = c.up.CloseWrite()
	}
}

func (c *channel) protocolRequest(b []byte) (unit, error) { return c.protocol.request(b) }
func (c *channel) protocolAnswer(b []byte) (unit, error)  { return c.protocol.answer(b) }

// answers forwards what the host sends, and its end once standard error has
// ended, too: both end at once.
func (c *channel) answers() {
	c.pump(c.up, c.protocolAnswer, c.deliver)
	<-c.stderr
	if c.link.gate() == nil {
		_ = c.down.CloseWrite()
	}
}

// pump reads a stream and hands on its units. What can't be understood is handed
// on as it is from there on.
func (c *channel) pump(from io.Reader, parse func([]byte) (unit, error), hand func([]byte, unit) error) {
	raw := c.protocol == nil
	buf := make([]byte, 0, readSize)
	for {
		if cap(buf)-len(buf) < readSize/2 {
			buf = append(make([]byte, 0, 2*cap(buf)), buf...)
		}
		n, err := from.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		rest := buf
		for len(rest) > 0 {
			u := unit{length: len(rest)}
			if !raw {
				var bad error
				if u, bad = parse(rest); bad != nil {
					raw = true
					continue
				}
				if u.length == 0 {
					break
				}
			}
			if c.link.gate() != nil || hand(rest[:u.length], u) != nil {
				return
			}
			rest = rest[u.length:]
		}
		buf = buf[:copy(buf[:cap(buf)], rest)]
		if err != nil {
			// The end of the stream cuts off the unit that it is in.
			if len(buf) > 0 && c.link.gate() == nil {
				_ = hand(buf, unit{length: len(buf)})
			}
			return
		}
	}
}

// pass hands a unit of the worker's on to the host, as its fault says.
func (c *channel) pass(b []byte, u unit) error {
	if u.part && c.dropping {
		return nil
	}
	c.dropping = false
	hit := c.link.tap.group.arrive(u.call)
	if hit == nil {
		return c.ask(b)
	}
	switch hit.fault.Kind {
	case Slow:
		hit.trigger.Strike(nil)
		if !u.independent {
			if !c.hold(hit) {
				return errDead
			}
			return c.ask(b)
		}
		b = slices.Clone(b)
		c.held.Go(func() {
			if c.hold(hit) {
				_ = c.ask(b) // an error is the connection's, which others see
			}
		})
		return nil
	case LostAnswer, CrashAfter:
		c.mu.Lock()
		if u.answers {
			c.pending[u.id] = hit
		}
		c.mu.Unlock()
		if err := c.ask(b); err != nil {
			return err
		}
		if !u.answers {
			c.lost(hit)
		}
		return nil
	case CrashBefore:
		if hit.trigger.Strike(c.link.tap.group.crash) {
			return errDead
		}
		return c.ask(b)
	case Capacity, Quota, Denied, Unauthenticated, Throttled, Unavailable:
	}
	var err error
	refused := hit.trigger.Strike(func() {
		c.dropping = true
		if u.answers {
			err = c.tell(c.protocol.refuse(u.id, hit.fault.Kind))
		}
	})
	if !refused {
		return c.ask(b)
	}
	return err
}

// ask sends a whole unit to the host.
func (c *channel) ask(b []byte) error {
	c.toHost.Lock()
	defer c.toHost.Unlock()
	if err := c.link.gate(); err != nil {
		return err
	}
	_, err := c.up.Write(b)
	return err
}

// deliver hands a unit of the host's on to the worker, unless a fault waits for
// it.
func (c *channel) deliver(b []byte, u unit) error {
	c.mu.Lock()
	var hit *Injection
	if u.answers {
		hit = c.pending[u.id]
		delete(c.pending, u.id)
	}
	if hit == nil && c.exit != nil {
		c.mu.Unlock()
		return nil // the output of a command whose end nobody will see
	}
	c.mu.Unlock()
	if hit != nil && c.lost(hit) {
		return errDead
	}
	return c.tell(b)
}

// tell sends a whole unit to the worker.
func (c *channel) tell(b []byte) error {
	c.toWorker.Lock()
	defer c.toWorker.Unlock()
	if err := c.link.gate(); err != nil {
		return err
	}
	_, err := c.down.Write(b)
	return err
}
