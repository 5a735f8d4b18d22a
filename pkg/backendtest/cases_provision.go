package backendtest

import (
	"context"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// sealed gives an envelope an X25519 key in place of the SSH key.
func (e *env) sealed(envelope *backend.Envelope) *ecdh.PrivateKey {
	e.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		e.Fatal(err)
	}
	envelope.SSHPublicKey, envelope.X25519PublicKey = "", key.PublicKey().Bytes()
	return key
}

// open opens a receipt's login key as the requester does, by the words of
// instance.proto alone.
func (e *env) open(key *ecdh.PrivateKey, r backend.Receipt) redact.Secret {
	e.Helper()
	if r.SealedKey == nil {
		e.Fatalf("the receipt has no sealed key")
	}
	s := r.SealedKey.Sealed
	if len(s) < 1+32+16 || s[0] != 1 {
		e.Fatalf("the sealed key has %d bytes or another version than 1", len(s))
	}
	private, err := hpke.NewDHKEMPrivateKey(key)
	if err != nil {
		e.Fatal(err)
	}
	recipient, err := hpke.NewRecipient(s[1:33], private, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte("compute-bridge/v1/sealed-login-key"))
	if err != nil {
		e.Fatalf("the encapsulated key: %v", err)
	}
	plain, err := recipient.Open(slices.Concat(s[:1], r.GrantID[:]), s[33:])
	if err != nil {
		e.Fatalf("open the sealed login key: %v", err)
	}
	signer, err := ssh.ParsePrivateKey(plain)
	if err != nil {
		e.Fatalf("the sealed login key is no OpenSSH private key")
	}
	if got := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))); got != withoutComment(r.SealedKey.PublicKey) {
		e.Errorf("the sealed key's public half is %q, the receipt says %q", got, r.SealedKey.PublicKey)
	}
	for line := range strings.Lines(string(plain)) {
		if line = strings.TrimSpace(line); len(line) > 40 {
			e.secret(line)
		}
	}
	return redact.New(plain)
}

// beforeCreation returns where a new grant's Provision can be held before it has
// the instance made: at its first provider call, or, of a worker that asks
// nothing but what it asks for all grants together, at its last call to the
// ledger.
func (e *env) beforeCreation() Fault {
	e.Helper()
	g, envelope := e.grant()
	calls := e.untilCreation(g, envelope, g.ID)
	for _, c := range calls {
		if c.Side == SideProvider && c.Point != e.f.CreatePoint && (!c.Varies || e.isItsOwn(c.Point)) {
			return Fault{Side: c.Side, Point: c.Point}
		}
	}
	at, nth := Fault{}, map[string]int{}
	for _, c := range calls {
		if c.Side == SideLedger && !c.Varies {
			nth[c.Point]++
			at = Fault{Side: c.Side, Point: c.Point, Nth: nth[c.Point]}
		}
	}
	if at.Point == "" {
		e.Fatalf("Provision made no call for the grant before the provider's %s", e.f.CreatePoint)
	}
	return at
}

// isItsOwn reports whether each Provision makes a provider call for its own grant
// before it has the instance made. One that is made for all grants, or for none,
// may be held for somebody else, at any time.
func (e *env) isItsOwn(point string) bool {
	e.Helper()
	is := func(c Call) bool { return c.Side == SideProvider && c.Point == point }
	bystander, _ := e.f.Satisfiable()
	for _, own := range []bool{true, false} {
		g, envelope := e.grant()
		of := bystander.ID
		if own {
			of = g.ID
		}
		if slices.ContainsFunc(e.untilCreation(g, envelope, of), is) != own {
			return false
		}
	}
	return true
}

// untilCreation provisions a grant, ends it, and returns the calls that count for
// a grant, this one or another, until the one that creates.
func (e *env) untilCreation(g backend.Grant, envelope backend.Envelope, of backend.GrantID) []Call {
	e.Helper()
	stop := e.f.Record(of)
	hold := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
	defer hold.Release()
	call := e.begin(e.ctx(), g, envelope)
	receive(e, "the provider call "+e.f.CreatePoint, hold.Reached())
	calls := stop()
	hold.Release()
	if o := receive(e, "Provision", call); o.err != nil {
		e.Fatalf("Provision: %s", describe(o.err))
	}
	e.terminate(e.handle(g.ID))
	return calls
}

// closedAt provisions a new grant that another process closes while a call of
// Provision is held. It returns Provision's error, which must be that the grant
// has ended, and ends the grant.
func (e *env) closedAt(at Fault) (backend.Grant, error) {
	e.Helper()
	g, envelope := e.grant()
	point := at.Point
	at.Kind, at.GrantID = FaultSlow, g.ID
	hold := e.f.Inject(at)
	defer hold.Release()
	call := e.begin(e.ctx(), g, envelope)
	receive(e, "the call "+point, hold.Reached())
	if err := e.f.CloseGrant(e.ctx(), g.ID); err != nil {
		e.Fatalf("CloseGrant: %v", err)
	}
	hold.Release()
	o := receive(e, "Provision", call)
	e.want(o.err, "Provision of a grant that another process closed during "+point, backenderr.GrantEnded)
	if left := e.left(g.ID); o.err != nil && backenderr.CreatedOf(o.err) == backenderr.CreatedNone && len(left) > 0 {
		e.Errorf("closed during %s: Provision says created=none while %v exists", point, left)
	}
	e.terminate(e.handle(g.ID))
	_, err := e.b.Provision(e.ctx(), g, envelope)
	e.want(err, "Provision, once more, of a grant that another process closed during "+point, backenderr.GrantEnded)
	return g, o.err
}

func withoutComment(line string) string {
	fields := strings.Fields(line)
	return strings.Join(fields[:min(2, len(fields))], " ")
}

// own gives an envelope a new SSH key and returns its private half.
func (e *env) own(envelope *backend.Envelope) redact.Secret {
	e.Helper()
	line, private := newKeyPair(e)
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		e.Fatal(err)
	}
	envelope.SSHPublicKey = line
	return redact.New(pem.EncodeToMemory(block))
}

// different are changes that make another content of a grant.
var different = map[string]func(*backend.Grant, *backend.Envelope){
	"shape":       func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU-- },
	"deadline":    func(g *backend.Grant, _ *backend.Envelope) { g.ValidTo = g.ValidTo.Add(time.Second) },
	"environment": func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"OTHER": "1"} },
	"ports": func(g *backend.Grant, _ *backend.Envelope) {
		g.Ports = []backend.Port{{Number: 4711, Protocol: backend.TCP}}
	},
	"image digest":      func(g *backend.Grant, _ *backend.Envelope) { g.Image.Digest.Sum[0]++ },
	"almanac sequence":  func(g *backend.Grant, _ *backend.Envelope) { g.AlmanacSequence++ },
	"provider identity": func(g *backend.Grant, _ *backend.Envelope) { g.ProviderID = make([]byte, 32) },
	"post hash":         func(g *backend.Grant, v *backend.Envelope) { g.PostHash[0]++; v.PostHash[0]++ },
	"nonce":             func(_ *backend.Grant, v *backend.Envelope) { v.Nonce = []byte("other") },
	"peer":              func(_ *backend.Grant, v *backend.Envelope) { v.PeerID = []byte("other") },
	"x25519 key": func(_ *backend.Grant, v *backend.Envelope) {
		v.X25519PublicKey = slices.Concat([]byte{9}, make([]byte, 31))
	},
}

// invalid are changes that make a grant malformed, with the reason.
var invalid = map[string]struct {
	change func(*backend.Grant, *backend.Envelope)
	reason backenderr.Reason
}{
	"zero CPU":          {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU = 0 }, backenderr.GrantInvalid},
	"negative memory":   {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.RAM = -1 }, backenderr.GrantInvalid},
	"absurd disk":       {func(g *backend.Grant, _ *backend.Envelope) { g.Shape.Storage = 1 << 62 }, backenderr.GrantInvalid},
	"no deadline":       {func(g *backend.Grant, _ *backend.Envelope) { g.ValidTo = time.Time{} }, backenderr.GrantInvalid},
	"past deadline":     {func(g *backend.Grant, _ *backend.Envelope) { g.ValidTo = time.Now().Add(-time.Minute) }, backenderr.GrantInvalid},
	"no isolation":      {func(g *backend.Grant, _ *backend.Envelope) { g.MinIsolation = 0 }, backenderr.GrantInvalid},
	"unknown isolation": {func(g *backend.Grant, _ *backend.Envelope) { g.MinIsolation = 17 }, backenderr.GrantInvalid},
	"no image kind":     {func(g *backend.Grant, _ *backend.Envelope) { g.Image.Kind = 0 }, backenderr.GrantInvalid},
	"no digest":         {func(g *backend.Grant, _ *backend.Envelope) { g.Image.Digest = backend.Digest{} }, backenderr.GrantInvalid},
	"malformed region":  {func(g *backend.Grant, _ *backend.Envelope) { g.Region = "../Region" }, backenderr.GrantInvalid},
	"port 0": {func(g *backend.Grant, _ *backend.Envelope) {
		g.Ports = []backend.Port{{Number: 0, Protocol: backend.TCP}}
	}, backenderr.GrantInvalid},
	"port without protocol": {func(g *backend.Grant, _ *backend.Envelope) { g.Ports = []backend.Port{{Number: 80}} }, backenderr.GrantInvalid},
	"port twice": {func(g *backend.Grant, _ *backend.Envelope) {
		g.Ports = []backend.Port{{Number: 80, Protocol: backend.TCP}, {Number: 80, Protocol: backend.TCP}}
	}, backenderr.GrantInvalid},
	"name with =":           {func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"A=B": ""} }, backenderr.GrantInvalid},
	"value with line break": {func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"A": "a\nb"} }, backenderr.GrantInvalid},
	"value with NUL":        {func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"A": "a\x00b"} }, backenderr.GrantInvalid},
	"environment too large": {func(g *backend.Grant, _ *backend.Envelope) {
		g.Environment = map[string]string{}
		for n := range 8 {
			g.Environment[fmt.Sprintf("A%d", n)] = strings.Repeat("a", 8000)
		}
	}, backenderr.GrantInvalid},
	"prefixes without allowlist": {func(g *backend.Grant, _ *backend.Envelope) {
		g.Network = backend.NetworkPolicy{Mode: backend.NetworkOpen, AllowedPrefixes: []string{"192.0.2.0/24"}}
	}, backenderr.GrantInvalid},
	"malformed prefix": {func(g *backend.Grant, _ *backend.Envelope) {
		g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"192.0.2.0/33"}}
	}, backenderr.GrantInvalid},
	"malformed provider id": {func(g *backend.Grant, _ *backend.Envelope) { g.ProviderID = []byte{1} }, backenderr.GrantInvalid},
	"malformed x25519 key":  {func(_ *backend.Grant, v *backend.Envelope) { v.X25519PublicKey = make([]byte, 31) }, backenderr.GrantInvalid},
	"weak x25519 key": {func(_ *backend.Grant, v *backend.Envelope) {
		v.SSHPublicKey, v.X25519PublicKey = "", make([]byte, 32)
	}, backenderr.GrantInvalid},
	"malformed SSH key": {func(_ *backend.Grant, v *backend.Envelope) { v.SSHPublicKey = "ssh-ed25519 nonsense" }, backenderr.GrantInvalid},
	"SSH key with options": {func(_ *backend.Grant, v *backend.Envelope) {
		v.SSHPublicKey = `command="true" ` + v.SSHPublicKey
	}, backenderr.GrantInvalid},
	"two SSH keys":   {func(_ *backend.Grant, v *backend.Envelope) { v.SSHPublicKey += "\n" + v.SSHPublicKey }, backenderr.GrantInvalid},
	"long nonce":     {func(_ *backend.Grant, v *backend.Envelope) { v.Nonce = make([]byte, 65) }, backenderr.GrantInvalid},
	"long peer id":   {func(_ *backend.Grant, v *backend.Envelope) { v.PeerID = make([]byte, 65) }, backenderr.GrantInvalid},
	"malformed hint": {func(_ *backend.Grant, v *backend.Envelope) { v.RegionHint = "Not A Region" }, backenderr.GrantInvalid},
	"another image":  {func(_ *backend.Grant, v *backend.Envelope) { v.PostHash[0]++ }, backenderr.ImageMismatch},
}

func provisionCases() []testCase {
	return []testCase{
		{name: "provision/receipt names the requester's key", run: func(e *env) {
			g, envelope := e.grant()
			e.own(&envelope)
			p := e.provision(g, envelope)
			key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(envelope.SSHPublicKey))
			if err != nil {
				e.Fatal(err)
			}
			if want := ssh.FingerprintSHA256(key); p.Receipt.RequesterKey != want {
				e.Errorf("the receipt names key %q, want %q", p.Receipt.RequesterKey, want)
			}
		}},
		{name: "provision/login key is sealed to the requester", run: func(e *env) {
			g, envelope := e.grant()
			key := e.sealed(&envelope)
			p := e.provision(g, envelope)
			e.open(key, p.Receipt)
			again := e.provision(g, envelope)
			e.same("two answers with a sealed key", p, again)
		}},
		{name: "provision/the receipt's key logs in", needs: []need{needLogin}, run: func(e *env) {
			g, envelope := e.grant()
			key := e.own(&envelope)
			p := e.provision(g, envelope)
			if err := e.f.Login(e.ctx(), p.Receipt, key); err != nil {
				e.Errorf("login with the requester's key: %v", err)
			}
			var other backend.Envelope
			if err := e.f.Login(e.ctx(), p.Receipt, e.own(&other)); err == nil {
				e.Errorf("a stranger's key logs in")
			}
			g, envelope = e.grant()
			x25519 := e.sealed(&envelope)
			p = e.provision(g, envelope)
			if err := e.f.Login(e.ctx(), p.Receipt, e.open(x25519, p.Receipt)); err != nil {
				e.Errorf("login with the sealed key: %v", err)
			}
		}},
		{name: "provision/neither key is refused or in clear", run: func(e *env) {
			g, envelope := e.grant()
			envelope.SSHPublicKey, envelope.X25519PublicKey = "", nil
			p, err := e.b.Provision(e.ctx(), g, envelope)
			if err == nil && p.Receipt.PlaintextKey != nil {
				return // The operator allows it.
			}
			e.want(err, "Provision without any key", backenderr.GrantInvalid, backenderr.GrantNotSatisfiable)
			e.wantNone(err, "Provision without any key")
		}},
		{name: "provision/grants share neither instance nor keys", run: func(e *env) {
			_, _, a := e.ready()
			_, _, b := e.ready()
			if a.Instance.ID == b.Instance.ID || a.Instance.Handle == b.Instance.Handle || a.Receipt.HostKey == b.Receipt.HostKey {
				e.Errorf("two grants have one instance or host key: %+v and %+v", a.Instance, b.Instance)
			}
			if a.Receipt.Host == b.Receipt.Host && a.Receipt.Port == b.Receipt.Port {
				e.Errorf("two grants have SSH at one address, %s port %d", a.Receipt.Host, a.Receipt.Port)
			}
			var keys []string
			for range 2 {
				g, envelope := e.grant()
				if len(keys) == 0 && e.f.Capacity < 4 {
					e.terminate(a.Instance.Handle)
					e.terminate(b.Instance.Handle)
				}
				e.sealed(&envelope)
				keys = append(keys, e.provision(g, envelope).Receipt.SealedKey.PublicKey)
			}
			if keys[0] == keys[1] {
				e.Errorf("two grants have one login key")
			}
		}},
		{name: "provision/twice is one instance and the same answer", run: func(e *env) {
			g, envelope, p := e.ready()
			for range 3 {
				e.same("answers of repeated Provision", p, e.provision(g, envelope))
			}
			e.created(g.ID, 1)
		}},
		{name: "provision/the same answer after a restart", needs: []need{needReopen}, run: func(e *env) {
			g, envelope := e.grant()
			e.sealed(&envelope)
			p := e.provision(g, envelope)
			e.reopen()
			e.same("answers before and after a restart", p, e.provision(g, envelope))
			e.created(g.ID, 1)
		}},
		{name: "provision/other content is a conflict", run: func(e *env) {
			g, envelope, p := e.ready()
			for what, change := range different {
				g2, envelope2 := g, envelope
				change(&g2, &envelope2)
				_, err := e.b.Provision(e.ctx(), g2, envelope2)
				e.want(err, "Provision with another "+what, backenderr.GrantConflict)
			}
			e.same("answers before and after conflicts", p, e.provision(g, envelope))
			e.created(g.ID, 1)
		}},
		{name: "provision/other content is a conflict while it is made", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			making := e.begin(e.ctx(), g, envelope)
			receive(e, "the create call", fault.Reached())
			g2 := g
			g2.Shape.CPU--
			_, err := e.b.Provision(e.ctx(), g2, envelope)
			e.want(err, "Provision with another shape", backenderr.GrantConflict)
			fault.Release()
			if o := receive(e, "Provision", making); o.err != nil {
				e.Errorf("Provision: %s", describe(o.err))
			}
			e.created(g.ID, 1)
		}},
		{name: "provision/the deadline is kept to the nanosecond", run: func(e *env) {
			g, envelope := e.grant()
			g.ValidTo = g.ValidTo.Truncate(time.Second).Add(123456789)
			p := e.provision(g, envelope)
			if !p.Receipt.ValidTo.Equal(g.ValidTo) || !p.Instance.ValidTo.Equal(g.ValidTo) {
				e.Errorf("granted until %s, the receipt says %s and the instance %s", g.ValidTo, p.Receipt.ValidTo, p.Instance.ValidTo)
			}
			if log := e.terminate(p.Instance.Handle); !log.Log.ValidTo.Equal(g.ValidTo) {
				e.Errorf("granted until %s, the log says %s", g.ValidTo, log.Log.ValidTo)
			}
		}},
		{name: "provision/malformed grants are refused", run: func(e *env) {
			for what, c := range invalid {
				g, envelope := e.grant()
				c.change(&g, &envelope)
				_, err := e.b.Provision(e.ctx(), g, envelope)
				e.want(err, "Provision with "+what, c.reason)
				e.wantNone(err, "Provision with "+what)
				if c.reason != backenderr.GrantInvalid || !backenderr.Is(err, backenderr.GrantInvalid) {
					continue
				}
				violations := backenderr.From(err).Violations
				if len(violations) == 0 {
					e.Errorf("Provision with %s: no field is named: %v", what, err)
				}
				for _, v := range violations {
					if !strings.HasPrefix(v.Field, "grant.") && !strings.HasPrefix(v.Field, "envelope.") {
						e.Errorf("Provision with %s: field %q is not of the request", what, v.Field)
					}
				}
			}
			if left := e.left(); len(left) > 0 {
				e.Errorf("malformed grants made %v", left)
			}
		}},
		{name: "provision/joined calls are one instance", run: func(e *env) {
			g, envelope := e.grant()
			var calls []<-chan outcome
			for range 20 {
				calls = append(calls, e.begin(e.ctx(), g, envelope))
			}
			var answer *backend.Provisioned
			for _, c := range calls {
				o := receive(e, "a joined Provision", c)
				if o.err != nil {
					e.Fatalf("a joined Provision: %s", describe(o.err))
				}
				if answer == nil {
					answer = &o.provisioned
				}
				e.same("answers of joined calls", *answer, o.provisioned)
			}
			e.created(g.ID, 1)
		}},
		{name: "provision/one of several callers may go", needs: []need{needInject, needHistory}, run: func(e *env) {
			// Nothing tells when a call has joined another. One that comes too
			// late gets an attempt of its own, which is right; one that was in
			// time must not, and of several some are.
			for round := 1; ; round++ {
				g, envelope := e.grant()
				fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
				ctx, cancel := context.WithCancel(e.ctx())
				e.Cleanup(cancel)
				leaving := e.begin(ctx, g, envelope)
				receive(e, "the create call", fault.Reached())
				staying := e.begin(e.ctx(), g, envelope)
				e.joined(g, envelope)
				cancel()
				e.want(receive(e, "the cancelled call", leaving).err, "the cancelled call", backenderr.Cancelled)
				fault.Release()
				o := receive(e, "the other call", staying)
				if o.err != nil {
					e.Fatalf("the other call: %s", describe(o.err))
				}
				if o.provisioned.Instance.Attempt == 1 {
					return
				}
				if round == 6 {
					e.Fatalf("when one of two callers goes, the attempt is undone")
				}
				e.terminate(o.provisioned.Instance.Handle)
			}
		}},
		{name: "provision/when the last caller goes it is undone", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			// Hang where the instance exists already.
			points := e.provisionPoints()
			last := points[len(points)-1]
			fault := e.f.Inject(Fault{Point: last, Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			ctx, cancel := context.WithCancel(e.ctx())
			defer cancel()
			calls := []<-chan outcome{e.begin(ctx, g, envelope)}
			receive(e, "the provider call "+last, fault.Reached())
			calls = append(calls, e.begin(ctx, g, envelope), e.begin(ctx, g, envelope))
			e.joined(g, envelope)
			cancel()
			for _, c := range calls {
				e.want(receive(e, "a cancelled call", c).err, "a cancelled call", backenderr.Cancelled)
			}
			e.eventually("it is undone", func() bool { return len(e.left(g.ID)) == 0 })
			fault.Release()
			e.provision(g, envelope)
		}},
		{name: "provision/cancelled at each step is undone and may be retried", needs: []need{needInject}, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				g, envelope := e.grant()
				fault := e.f.Inject(Fault{Point: point, Kind: FaultSlow, GrantID: g.ID})
				ctx, cancel := context.WithCancel(e.ctx())
				call := e.begin(ctx, g, envelope)
				receive(e, "the provider call "+point, fault.Reached())
				cancel()
				e.want(receive(e, "the cancelled call", call).err, "Provision, cancelled at "+point, backenderr.Cancelled)
				e.eventually("what was made until "+point+" is undone", func() bool { return len(e.left(g.ID)) == 0 })
				fault.Release()
				p := e.provision(g, envelope)
				e.terminate(p.Instance.Handle)
			}
		}},
		{name: "provision/cut off by a restart may be retried", needs: []need{needInject, needReopen}, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				g, envelope := e.grant()
				fault := e.f.Inject(Fault{Point: point, Kind: FaultSlow, GrantID: g.ID})
				call := e.begin(e.ctx(), g, envelope)
				receive(e, "the provider call "+point, fault.Reached())
				e.reopen()
				if o := receive(e, "the call that was cut off", call); o.err == nil {
					e.Errorf("Provision succeeded although the worker stopped while %s hung", point)
				}
				fault.Release()
				p := e.provision(g, envelope)
				e.checkLog(p, e.terminate(p.Instance.Handle), backend.EndTerminated)
			}
		}},
		{name: "provision/cancelled before it begins", run: func(e *env) {
			ctx, cancel := context.WithCancel(e.ctx())
			cancel()
			g, envelope := e.grant()
			if _, err := e.b.Provision(ctx, g, envelope); err != nil {
				e.want(err, "Provision", backenderr.Cancelled)
				e.eventually("nothing exists", func() bool { return len(e.left(g.ID)) == 0 })
			}
			p := e.provision(g, envelope)
			if _, err := e.b.Provision(ctx, g, envelope); err != nil {
				e.want(err, "Provision of what is ready", backenderr.Cancelled)
			}
			e.same("answers before and after a cancelled call", p, e.provision(g, envelope))
		}},
		{name: "provision/parallel grants never exceed capacity", run: func(e *env) {
			var calls []<-chan outcome
			for range 2*e.f.Capacity + 3 {
				g, envelope := e.grant()
				calls = append(calls, e.begin(e.ctx(), g, envelope))
			}
			var ready []backend.Provisioned
			for _, c := range calls {
				o := receive(e, "a parallel Provision", c)
				if o.err == nil {
					ready = append(ready, o.provisioned)
					continue
				}
				e.want(o.err, "a grant too many", backenderr.CapacityExhausted, backenderr.WorkerFull)
				e.wantNone(o.err, "a grant too many")
				if backenderr.From(o.err).RetryAfter <= 0 {
					e.Errorf("a grant too many: no hint when to retry: %s", describe(o.err))
				}
			}
			if len(ready) != e.f.Capacity {
				e.Fatalf("%d grants were provisioned at once, the capacity is %d", len(ready), e.f.Capacity)
			}
			g, envelope := e.grant()
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "one more", backenderr.CapacityExhausted, backenderr.WorkerFull)
			e.terminate(ready[0].Instance.Handle)
			e.provision(g, envelope)
		}},
		{name: "provision/capacity outlives a restart", needs: []need{needReopen}, run: func(e *env) {
			for range e.f.Capacity {
				e.ready()
			}
			e.reopen()
			g, envelope := e.grant()
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "a grant too many after a restart", backenderr.CapacityExhausted, backenderr.WorkerFull)
		}},
		{name: "provision/never again after Terminate", run: func(e *env) {
			g, envelope, p := e.ready()
			e.terminate(p.Instance.Handle)
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of a terminated grant", backenderr.GrantEnded)
			if left := e.left(g.ID); len(left) > 0 {
				e.Errorf("a terminated grant runs again: %v", left)
			}
			e.created(g.ID, 1)
		}},
		{name: "provision/never again after the workload's end", needs: []need{needExit}, run: func(e *env) {
			g, envelope, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			if err := e.f.Exit(g.ID, ExitStatus{}); err != nil {
				e.Fatal(err)
			}
			w.log()
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of an ended grant", backenderr.GrantEnded)
			e.created(g.ID, 1)
		}},
		{name: "provision/never again after the end and a restart", needs: []need{needReopen}, run: func(e *env) {
			g, envelope, p := e.ready()
			e.terminate(p.Instance.Handle)
			e.reopen()
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of an ended grant after a restart", backenderr.GrantEnded)
			e.created(g.ID, 1)
		}},
		{name: "provision/never after Terminate came first", run: func(e *env) {
			g, envelope := e.grant()
			e.terminate(e.handle(g.ID))
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of a closed grant", backenderr.GrantEnded)
			e.wantNone(err, "Provision of a closed grant")
			e.created(g.ID, 0)
		}},
		{name: "provision/a closure by another process is seen before anything is made", needs: []need{needInject, needHistory, needClose}, run: func(e *env) {
			// A worker that has seen no closure yet looks again right before it creates.
			g, err := e.closedAt(e.beforeCreation())
			e.wantNone(err, "Provision of a grant that was closed before it was made")
			if n := e.f.History(g.ID).Created; n > 0 {
				e.Errorf("%d instances were made of a grant that was closed", n)
			}
		}},
		{name: "provision/a closure by another process is seen before it is ready", needs: []need{needInject, needClose}, run: func(e *env) {
			for _, point := range e.provisionPoints() {
				_, _ = e.closedAt(Fault{Point: point}) // It has checked the error.
			}
		}},
		{name: "provision/what is passed and returned isn't shared", run: func(e *env) {
			g, envelope := e.grant()
			g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}}
			e.sealed(&envelope)
			pristine, pristineEnvelope := cloneGrant(g), cloneEnvelope(envelope)
			p := e.provision(g, envelope)
			e.same("a grant before and after Provision", pristine, g)
			e.same("an envelope before and after Provision", pristineEnvelope, envelope)
			want := backendgrpc.ProvisionedFromProto(proto.CloneOf(backendgrpc.ProvisionedToProto(p)))
			// Spoil everything that the backend has seen or given out.
			g.Environment["SPOILED"] = "1"
			g.Ports[0].Number = 1
			clear(envelope.X25519PublicKey)
			p.Instance.Ports[0].PublicPort = 1
			clear(p.Receipt.SealedKey.Sealed)
			p.Receipt.SealedKey.PublicKey = "spoiled"
			e.same("answers before and after a caller changed its own", want, e.provision(pristine, pristineEnvelope))
		}},
		{name: "provision/only the operator is told the owner", run: func(e *env) {
			_, _, p := e.ready()
			if p.Instance.Owner != "" {
				e.Errorf("Provision tells a client the owner, %q", p.Instance.Owner)
			}
			w := e.watch(e.ctx(), p.Instance.Handle)
			if event := receive(e, "the first event", w.events); event.Instance != nil && event.Instance.Owner != "" {
				e.Errorf("a watch tells a client the owner, %q", event.Instance.Owner)
			}
			e.terminate(p.Instance.Handle)
			w.log()
		}},
		{name: "provision/mixed calls on one grant agree", run: func(e *env) {
			g, envelope := e.grant()
			var calls []<-chan outcome
			for n := range 12 {
				ctx, cancel := context.WithCancel(e.ctx())
				e.Cleanup(cancel)
				calls = append(calls, e.begin(ctx, g, envelope))
				if n%3 == 2 {
					cancel()
				}
			}
			for _, c := range calls {
				if o := receive(e, "a Provision", c); o.err != nil {
					e.want(o.err, "a Provision", backenderr.Cancelled)
				}
			}
			e.provision(g, envelope)
		}},
	}
}

// joined gives a call that was just begun the time to reach the backend: a
// probe with other content is answered after it. Each waits a moment first, or a
// process with one processor would go on with the probes alone.
func (e *env) joined(g backend.Grant, envelope backend.Envelope) {
	e.Helper()
	g.AlmanacSequence++
	for range 3 {
		timer := time.NewTimer(2 * time.Millisecond)
		<-timer.C
		_, err := e.b.Provision(e.ctx(), g, envelope)
		e.want(err, "Provision with another almanac sequence", backenderr.GrantConflict)
	}
}

// created fails unless so many instances were ever made for a grant.
func (e *env) created(id backend.GrantID, want int) {
	e.Helper()
	if e.f.History == nil {
		return
	}
	if h := e.f.History(id); h.Created != want {
		e.Errorf("%d instances were made for one grant, want %d", h.Created, want)
	}
}

func cloneGrant(g backend.Grant) backend.Grant {
	g.ProviderID, g.Ports = slices.Clone(g.ProviderID), slices.Clone(g.Ports)
	g.Network.AllowedPrefixes = slices.Clone(g.Network.AllowedPrefixes)
	environment := map[string]string{}
	maps.Copy(environment, g.Environment)
	g.Environment = environment
	return g
}

func cloneEnvelope(v backend.Envelope) backend.Envelope {
	v.PeerID, v.X25519PublicKey, v.Nonce = slices.Clone(v.PeerID), slices.Clone(v.X25519PublicKey), slices.Clone(v.Nonce)
	return v
}
