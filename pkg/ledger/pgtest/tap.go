package pgtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
)

// Tap is a proxy in front of a server, which reads the protocol. Every statement
// that a client runs is a call that passes its [ledgertest.Points], so that it
// can be recorded and made to fail, in a process that knows nothing of it.
//
// A call is named by what the statement does: "ledger.INSERT claims",
// "ledger.SELECT closures", "ledger.LOCK" for the lock of a grant, "ledger.BEGIN",
// "ledger.COMMIT". Its request id is that of the lock that the transaction holds,
// or else the first of the statement's parameters that could be one. What opens a
// connection, and listings, have none. COMMIT counts as mutating when the
// transaction wrote.
//
// On a wire, the kinds of fault are:
//
//   - Refuse: the connection is cut before the statement reaches the server.
//   - LoseAnswer: it is cut after the server has answered.
//   - Slow: the statement waits on its way to the server.
//   - CrashBefore, CrashAfter: as the first two, but Crash is called first. For a
//     real process it kills that; only then does the connection go.
//
// What had not been committed when a connection is cut is rolled back.
type Tap struct {
	*ledgertest.Points

	server   string
	listener net.Listener
	routines sync.WaitGroup

	mu     sync.Mutex // protects all below
	conns  map[*tapped]bool
	open   chan struct{} // closed while anything passes
	refuse bool
	delay  time.Duration
}

// NewTap starts a tap in front of a server, on a port of the loopback interface,
// until the end of the test.
func NewTap(t testing.TB, s *Server) *Tap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Tap{Points: new(ledgertest.Points), server: s.Addr(), listener: l, conns: map[*tapped]bool{}, open: make(chan struct{})}
	close(p.open)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	p.routines.Go(func() { p.accept(ctx) })
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		p.Cut()
		p.routines.Wait()
	})
	return p
}

// DSN turns the address of a database into that of the same through the tap.
func (p *Tap) DSN(dsn string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err) // it is one of ours
	}
	u.Host = p.Addr()
	return u.String()
}

// Addr is the tap's address, host:port.
func (p *Tap) Addr() string { return p.listener.Addr().String() }

// Refuse starts or stops refusing new connections.
func (p *Tap) Refuse(refuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = refuse
}

// Cut cuts all connections; new ones are welcome.
func (p *Tap) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.close()
	}
}

// Blackhole starts or stops swallowing everything: connections stay open, new
// ones are taken, and nothing is heard in either direction. What was sent in the
// meantime arrives afterwards.
func (p *Tap) Blackhole(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.open:
		if on {
			p.open = make(chan struct{})
		}
	default:
		if !on {
			close(p.open)
		}
	}
}

// Delay lets every call wait for d on its way to the server.
func (p *Tap) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

func (p *Tap) accept(ctx context.Context) {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		c := &tapped{tap: p, client: client, in: bufio.NewReader(client), done: make(chan struct{}), statements: map[string]string{}}
		p.mu.Lock()
		if p.refuse {
			_ = client.Close()
		} else {
			p.conns[c] = true
			p.routines.Go(func() { c.serve(ctx) })
		}
		p.mu.Unlock()
	}
}

// tapped is a connection through the tap.
type tapped struct {
	tap    *Tap
	client net.Conn
	in     *bufio.Reader

	mu     sync.Mutex // protects all below
	server net.Conn   // nil until the client has introduced itself
	closed bool
	done   chan struct{} // closed with the connection
	// holding swallows the server's answer; it is closed when that is complete.
	holding chan struct{}

	// What only the client's side uses.
	statements map[string]string // prepared ones
	grant      ledger.RequestID  // that the transaction has locked
	wrote      bool              // the transaction
}

func (c *tapped) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	close(c.done)
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
}

// pass waits as long as nothing passes the tap. It reports whether the connection
// still is.
func (c *tapped) pass() bool {
	c.tap.mu.Lock()
	open := c.tap.open
	c.tap.mu.Unlock()
	select {
	case <-open:
		return true
	case <-c.done:
		return false
	}
}

func (c *tapped) serve(ctx context.Context) {
	defer func() {
		c.close()
		c.tap.mu.Lock()
		delete(c.tap.conns, c)
		c.tap.mu.Unlock()
	}()
	if !c.introduce(ctx) {
		return
	}
	c.tap.routines.Go(c.answers)
	units := make(chan unit)
	c.tap.routines.Go(func() {
		defer c.close() // the client has gone, whatever is on its way
		for {
			u, err := readUnit(c.in)
			if err != nil {
				return
			}
			select {
			case units <- u:
			case <-c.done:
				return
			}
		}
	})
	for {
		select {
		case u := <-units:
			if !c.pass() || !c.forward(u) {
				return
			}
		case <-c.done:
			return
		}
	}
}

// Codes that a first message has instead of a version of the protocol.
const (
	codeCancel = 80877102
	codeTLS    = 80877103
	codeGSS    = 80877104
)

// introduce forwards the client's first message, without encryption.
func (c *tapped) introduce(ctx context.Context) bool {
	for {
		var head [8]byte
		if _, err := io.ReadFull(c.in, head[:]); err != nil || !c.pass() {
			return false
		}
		code, length := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[:])
		if code == codeTLS || code == codeGSS {
			if _, err := c.client.Write([]byte("N")); err != nil {
				return false
			}
			continue
		}
		if length < 8 || length > maxFrame {
			return false
		}
		rest := make([]byte, length-8)
		if _, err := io.ReadFull(c.in, rest); err != nil {
			return false
		}
		server, err := new(net.Dialer).DialContext(ctx, "tcp", c.tap.server)
		if err != nil {
			return false
		}
		c.mu.Lock()
		c.server = server
		if c.closed {
			_ = server.Close()
		}
		c.mu.Unlock()
		_, err = server.Write(append(head[:], rest...))
		return err == nil && code != codeCancel
	}
}

// answers forwards what the server says.
func (c *tapped) answers() {
	defer c.close()
	in := bufio.NewReader(c.server)
	for {
		f, err := readFrame(in)
		if err != nil || !c.pass() {
			return
		}
		c.mu.Lock()
		holding := c.holding
		if holding != nil && f.kind == 'Z' { // ready for the next
			c.holding = nil
			close(holding)
		}
		c.mu.Unlock()
		if holding == nil {
			if _, err := c.client.Write(f.bytes); err != nil {
				return
			}
		}
	}
}

// forward sends a unit to the server, unless a fault says otherwise, and reports
// whether the connection goes on.
func (c *tapped) forward(u unit) bool {
	call, ok := c.callOf(u)
	if !ok {
		return c.send(u)
	}
	c.tap.mu.Lock()
	delay := c.tap.delay
	c.tap.mu.Unlock()
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-c.done:
			return false
		}
	}
	hit := c.tap.Reach(call)
	if hit == nil {
		return c.send(u)
	}
	fault := hit.Fault()
	switch fault.Kind {
	case ledgertest.Refuse:
		return false
	case ledgertest.CrashBefore:
		return !hit.Crash() && c.send(u)
	case ledgertest.Slow:
		select {
		case <-hit.Released():
			return c.send(u)
		case <-c.done:
			return false
		}
	case ledgertest.LoseAnswer, ledgertest.CrashAfter:
		answered := make(chan struct{})
		c.mu.Lock()
		c.holding = answered
		c.mu.Unlock()
		if c.send(u) {
			select {
			case <-answered:
			case <-c.done:
			}
		}
		if fault.Kind == ledgertest.CrashAfter {
			hit.Crash() // or it was released: then only the answer is lost
		}
		return false
	}
	panic(fmt.Sprintf("pgtest: unknown kind of fault %q", fault.Kind))
}

func (c *tapped) send(u unit) bool {
	for _, f := range u {
		if _, err := c.server.Write(f.bytes); err != nil {
			return false
		}
	}
	return true
}

// maxFrame is far above any message of ours.
const maxFrame = 64 << 20

// frame is a message of the protocol, with its head in bytes.
type frame struct {
	kind  byte
	bytes []byte
}

func (f frame) payload() []byte { return f.bytes[5:] }

func readFrame(in *bufio.Reader) (frame, error) {
	var head [5]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return frame{}, err
	}
	length := binary.BigEndian.Uint32(head[1:])
	if length < 4 || length > maxFrame {
		return frame{}, errors.New("a message has no sensible length")
	}
	all := make([]byte, length+1)
	copy(all, head[:])
	_, err := io.ReadFull(in, all[5:])
	return frame{head[0], all}, err
}

// unit is what a client sends before it waits for an answer.
type unit []frame

func readUnit(in *bufio.Reader) (unit, error) {
	var u unit
	for {
		f, err := readFrame(in)
		if err != nil {
			return nil, err
		}
		u = append(u, f)
		switch f.kind {
		case 'P', 'B', 'D', 'E', 'C': // parse, bind, describe, execute, close
		default:
			return u, nil
		}
	}
}

// callOf names what a unit runs, if it runs anything.
func (c *tapped) callOf(u unit) (call ledgertest.Call, ok bool) {
	var text string
	var params [][]byte
	for _, f := range u {
		switch f.kind {
		case 'Q':
			text, ok = cString(f.payload()), true
		case 'P':
			name := cString(f.payload())
			c.statements[name] = cString(f.payload()[len(name)+1:])
		case 'B':
			portal := cString(f.payload())
			name := cString(f.payload()[len(portal)+1:])
			text, params = c.statements[name], boundParams(f.payload()[len(portal)+len(name)+2:])
		case 'E':
			ok = true
		}
	}
	if !ok {
		return ledgertest.Call{}, false
	}
	point, mutates, ok := pointOf(text)
	if !ok {
		return ledgertest.Call{}, false
	}
	call = ledgertest.Call{Point: point, RequestID: c.grant, Mutates: mutates}
	switch point {
	case pointBegin:
		c.grant, c.wrote = ledger.RequestID{}, false
		call.RequestID = c.grant
	case pointCommit, pointRollback:
		call.Mutates = point == pointCommit && c.wrote
		c.grant, c.wrote = ledger.RequestID{}, false
	case pointLock:
		c.grant = grantOf(text, params)
		call.RequestID = c.grant
	default:
		c.wrote = c.wrote || mutates
		if call.RequestID == (ledger.RequestID{}) {
			call.RequestID = grantOf(text, params)
		}
	}
	return call, true
}

func cString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}

// boundParams reads the values of a bind message, from its formats on.
func boundParams(b []byte) (params [][]byte) {
	number := func() int {
		if len(b) < 2 {
			return 0
		}
		n := int(binary.BigEndian.Uint16(b))
		b = b[2:]
		return n
	}
	formats := number()
	b = b[min(2*formats, len(b)):]
	for range number() {
		if len(b) < 4 {
			return params
		}
		length := int(int32(binary.BigEndian.Uint32(b))) // -1 is null
		b = b[4:]
		if length < 0 {
			params = append(params, nil)
			continue
		}
		length = min(length, len(b))
		params = append(params, b[:length])
		b = b[length:]
	}
	return params
}

// Points that transactions are made of.
const (
	pointBegin    = "ledger.BEGIN"
	pointCommit   = "ledger.COMMIT"
	pointRollback = "ledger.ROLLBACK"
	pointLock     = "ledger.LOCK"
)

var (
	writes  = regexp.MustCompile(`(?is)^\s*(INSERT)\s+INTO\s+(\w+)|^\s*(UPDATE)\s+(\w+)|^\s*(DELETE)\s+FROM\s+(\w+)`)
	selects = regexp.MustCompile(`(?is)^\s*SELECT\b.*?\bFROM\s+(\w+)`)
	listing = regexp.MustCompile(`(?is)\brequest_id\s*>`)
	hexID   = regexp.MustCompile(`[0-9a-f]{64}`)
)

// pointOf names a statement, unless it is the driver's own.
func pointOf(text string) (point string, mutates, ok bool) {
	if m := writes.FindStringSubmatch(text); m != nil {
		return "ledger." + strings.ToUpper(m[1]+m[3]+m[5]) + " " + m[2] + m[4] + m[6], true, true
	}
	if strings.Contains(text, "ledger_lock(") && !strings.Contains(strings.ToUpper(text), "FUNCTION") {
		return pointLock, false, true
	}
	if strings.Contains(text, "pg_advisory_xact_lock(") && !strings.Contains(strings.ToUpper(text), "FUNCTION") {
		return "ledger.LOCK schema", false, true
	}
	if m := selects.FindStringSubmatch(text); m != nil {
		return "ledger.SELECT " + m[1], false, true
	}
	words := strings.Fields(text)
	if len(words) == 0 {
		return "", false, false
	}
	switch word := strings.ToUpper(strings.TrimSuffix(words[0], ";")); word {
	case "--", "SHOW", "DEALLOCATE", "DISCARD": // a ping, a look around
		if word == "--" && strings.Contains(text, "\n") {
			return "ledger.MIGRATE", true, true
		}
		return "", false, false
	case "CREATE", "ALTER":
		return "ledger.MIGRATE", true, true
	default:
		return "ledger." + word, false, true
	}
}

// grantOf returns the first parameter, or else the first literal, that could be
// a request id.
func grantOf(text string, params [][]byte) (id ledger.RequestID) {
	if listing.MatchString(text) {
		return id
	}
	for _, p := range params {
		if len(p) == len(id) {
			copy(id[:], p)
			return id
		}
		if len(p) == 2+2*len(id) && bytes.HasPrefix(p, []byte(`\x`)) {
			if _, err := hex.Decode(id[:], p[2:]); err == nil {
				return id
			}
		}
	}
	if literal := hexID.FindString(text); literal != "" {
		_, _ = hex.Decode(id[:], []byte(literal)) // it is hexadecimal
	}
	return id
}
