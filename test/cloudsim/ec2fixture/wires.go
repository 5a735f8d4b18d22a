package ec2fixture

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

// record writes down the calls to the cloud and to the ledger, if that is
// watched.
func (s *Site) record(id backend.GrantID) (stop func() []backendtest.Call) {
	all := id == backend.GrantID{}
	var ids []ledger.RequestID
	if !all {
		ids = append(ids, ledger.RequestID(id))
	}
	requests := s.points.record(id)
	stored := s.ledger().Record(ids...)
	return func() []backendtest.Call {
		calls := requests()
		for n := range calls {
			calls[n].Varies = calls[n].Varies || all
		}
		for _, c := range stored() {
			varies := all || c.RequestID == ledger.RequestID{}
			calls = append(calls, backendtest.Call{Side: backendtest.SideLedger, Point: c.Point, Mutates: c.Mutates, Varies: varies})
		}
		return calls
	}
}

// ledger returns where the calls to the ledger pass, which may be nowhere.
func (s *Site) ledger() *ledgertest.Points {
	if s.options.Ledger == nil {
		return new(ledgertest.Points)
	}
	return s.options.Ledger
}

// inject has a call fail.
func (s *Site) inject(f backendtest.Fault) backendtest.Injection {
	if f.Side == backendtest.SideLedger {
		return s.injectLedger(f)
	}
	return s.points.inject(f)
}

func (s *Site) injectLedger(f backendtest.Fault) backendtest.Injection {
	dead := make(chan struct{})
	died := sync.OnceFunc(func() { close(dead) })
	i := s.ledger().Inject(ledgertest.Fault{
		Point: f.Point, Nth: f.Nth, Kind: ledgertest.Kind(f.Kind), Always: f.Always, RequestID: ledger.RequestID(f.GrantID),
		Crash: func() {
			s.kill()
			died()
		},
	})
	if f.Kind != backendtest.FaultCrashBefore && f.Kind != backendtest.FaultCrashAfter {
		return i
	}
	return &crash{Injection: i, dead: dead}
}

// crash is a death at a call to the ledger.
type crash struct {
	backendtest.Injection
	dead <-chan struct{}
}

// Reached implements backendtest.Injection.
func (c *crash) Reached() <-chan struct{} { return c.dead }

// logIn logs in as a requester does and runs a command.
func logIn(ctx context.Context, r backend.Receipt, key redact.Secret) error {
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(r.HostKey))
	if err != nil {
		return fmt.Errorf("host key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(key.Expose())
	if err != nil {
		return fmt.Errorf("login key: %w", err)
	}
	address := net.JoinHostPort(r.Host, strconv.Itoa(int(r.Port)))
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	c, channels, requests, err := ssh.NewClientConn(conn, address, &ssh.ClientConfig{
		User: r.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey),
		HostKeyAlgorithms: []string{hostKey.Type()},
	})
	if err != nil {
		return err
	}
	client := ssh.NewClient(c, channels, requests)
	defer client.Close() //nolint:errcheck // all was read
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	out, err := session.Output("echo $NAME")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(out)); got != "value" {
		return fmt.Errorf("the workload's environment has NAME=%q", got)
	}
	return nil
}
