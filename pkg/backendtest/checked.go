package backendtest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// checked passes every call on and checks what holds in every case.
type checked struct {
	backend.Backend
	e *env
}

// always are the reasons that every method may have.
var always = []backenderr.Reason{
	backenderr.Cancelled, backenderr.DeadlineExceeded, backenderr.CallerDenied, backenderr.CallerUnauthenticated,
}

// The reasons of each method, as its comment in backend.proto lists them.
var (
	canSatisfyReasons = []backenderr.Reason{backenderr.GrantInvalid}
	provisionReasons  = []backenderr.Reason{
		backenderr.GrantInvalid, backenderr.ImageMismatch, backenderr.GrantConflict, backenderr.GrantEnded,
		backenderr.GrantNotSatisfiable, backenderr.CapacityExhausted, backenderr.QuotaExceeded, backenderr.WorkerFull,
		backenderr.ProviderDenied, backenderr.ProviderUnauthenticated, backenderr.ClockSkew, backenderr.HostUnfit,
		backenderr.ProviderUnavailable, backenderr.LedgerUnavailable, backenderr.BackendUnreachable,
		backenderr.OtherReplica, backenderr.ImageUnavailable, backenderr.ImageHashMismatch, backenderr.ImageInvalid, backenderr.AttestationFailed,
		backenderr.BootTimeout, backenderr.WorkloadFailed, backenderr.OperationInProgress,
	}
	watchReasons = []backenderr.Reason{
		backenderr.InstanceNotFound, backenderr.RequestInvalid, backenderr.LedgerUnavailable, backenderr.ProviderUnavailable,
		backenderr.BackendUnreachable, backenderr.OtherReplica,
	}
	terminateReasons = []backenderr.Reason{
		backenderr.RequestInvalid, backenderr.LedgerUnavailable, backenderr.ProviderUnavailable, backenderr.ProviderDenied,
		backenderr.BackendUnreachable, backenderr.OtherReplica,
	}
)

// checkError checks an error of a method.
func (c *checked) checkError(method string, err error, reasons ...backenderr.Reason) {
	if err == nil {
		return
	}
	if _, ok := errors.AsType[*backenderr.Error](err); !ok {
		c.e.Errorf("%s: the error is no *backenderr.Error: %T %v", method, err, err)
	}
	reason := backenderr.ReasonOf(err)
	if !slices.Contains(reasons, reason) && !slices.Contains(always, reason) {
		c.e.Errorf("%s: reason %s is not one of this method's: %v", method, reason, err)
	}
	texts := []string{err.Error()}
	for _, v := range backenderr.From(err).Metadata {
		texts = append(texts, v)
	}
	if s, found := c.e.leak(strings.Join(texts, "\n")); found {
		c.e.Errorf("%s: the error holds a secret (%d characters)", method, len(s))
	}
}

func (c *checked) Name(ctx context.Context) (string, error) {
	name, err := c.Backend.Name(ctx)
	c.checkError("Name", err)
	return name, err
}

func (c *checked) Capabilities(ctx context.Context) (backend.Capabilities, error) {
	out, err := c.Backend.Capabilities(ctx)
	c.checkError("Capabilities", err)
	if err == nil {
		checkCapabilities(c.e, out)
	}
	return out, err
}

func (c *checked) CanSatisfy(ctx context.Context, g backend.Grant) (backend.Satisfaction, error) {
	out, err := c.Backend.CanSatisfy(ctx, g)
	c.checkError("CanSatisfy", err, canSatisfyReasons...)
	if err == nil && !out.Satisfiable && out.Reason == "" {
		c.e.Errorf("CanSatisfy says no without a reason")
	}
	return out, err
}

func (c *checked) Provision(ctx context.Context, g backend.Grant, envelope backend.Envelope) (backend.Provisioned, error) {
	c.e.track(g)
	p, err := c.Backend.Provision(ctx, g, envelope)
	c.checkError("Provision", err, provisionReasons...)
	switch {
	case err == nil:
		checkProvisioned(c.e, g, p)
	case backenderr.CreatedOf(err) == backenderr.CreatedNone &&
		// These are about a call whose grant another call provisioned.
		!backenderr.Is(err, backenderr.GrantConflict, backenderr.GrantEnded, backenderr.GrantInvalid, backenderr.ImageMismatch):
		if left := c.e.left(g.ID); len(left) > 0 {
			c.e.Errorf("Provision says created=none while %v exists: %s", left, describe(err))
		}
	}
	return p, err
}

func (c *checked) WatchUntilExit(ctx context.Context, h backend.Handle, emit func(backend.Event) error) error {
	n, over, last := 0, false, uint32(0)
	err := c.Backend.WatchUntilExit(ctx, h, func(event backend.Event) error {
		set := 0
		for _, is := range []bool{event.Instance != nil, event.Usage != nil, event.Heartbeat, event.Log != nil} {
			if is {
				set++
			}
		}
		switch {
		case set != 1:
			c.e.Errorf("a watch's event has %d contents, want 1", set)
		case over:
			c.e.Errorf("a watch went on after the compute log")
		case n == 0 && event.Instance == nil:
			c.e.Errorf("a watch's first event is not the state: %+v", event)
		}
		if event.At.IsZero() {
			c.e.Errorf("a watch's event has no time")
		}
		n++
		over = event.Log != nil
		switch {
		case over && !event.Log.Log.Final:
			c.e.Errorf("the compute log that ends a watch is not final")
		case over && event.Log.Log.Sequence <= last:
			c.e.Errorf("the final compute log has number %d, an earlier log of the same watch %d", event.Log.Log.Sequence, last)
		case over:
			c.e.onlyFinal(event.Log)
		case event.Usage != nil && event.Usage.Log.Sequence < last:
			c.e.Errorf("the numbers of a watch's logs go from %d back to %d", last, event.Usage.Log.Sequence)
		case event.Usage != nil:
			last = event.Usage.Log.Sequence
		}
		return emit(event)
	})
	if _, ok := errors.AsType[*emitError](err); ok {
		return err
	}
	c.checkError("WatchUntilExit", err, watchReasons...)
	if err == nil && !over {
		c.e.Errorf("a watch ended well without the compute log")
	}
	return err
}

// onlyFinal fails if another final log of the grant was seen before. A grant has
// one, whoever asks and however often: it is what is paid for.
func (e *env) onlyFinal(log *backend.SignedLog) {
	id := log.Log.GrantID
	e.mu.Lock()
	first, seen := e.finals[id]
	if !seen {
		if e.finals == nil {
			e.finals = map[backend.GrantID]backend.SignedLog{}
		}
		first = *log
		// The cases spoil what they are given.
		first.Body, first.Signature = bytes.Clone(log.Body), bytes.Clone(log.Signature)
		e.finals[id] = first
	}
	e.mu.Unlock()
	if !bytes.Equal(first.Body, log.Body) || !bytes.Equal(first.Signature, log.Signature) || first.KeyID != log.KeyID {
		e.Errorf("grant %s has two final compute logs: number %d ended at %s, number %d at %s", id,
			first.Log.Sequence, first.Log.EndedAt, log.Log.Sequence, log.Log.EndedAt)
	}
}

// emitError is an error of a watcher's own.
type emitError struct{}

func (*emitError) Error() string { return "the watcher has had enough" }

func (c *checked) Terminate(ctx context.Context, h backend.Handle) (backend.Termination, error) {
	t, err := c.Backend.Terminate(ctx, h)
	c.checkError("Terminate", err, terminateReasons...)
	if err != nil {
		return t, err
	}
	switch t.State {
	case backend.StateTerminating:
	case backend.StateTerminated:
		id, idErr := h.GrantID()
		if idErr != nil {
			c.e.Errorf("Terminate took handle %q: %v", h, idErr)
			break
		}
		if left := c.e.left(id); len(left) > 0 {
			c.e.Errorf("Terminate answered TERMINATED while the provider holds %v", left)
		}
		switch {
		case t.Log == nil:
		case !t.Log.Log.Final:
			c.e.Errorf("Terminate answered TERMINATED with a log that is not final")
		default:
			c.e.onlyFinal(t.Log)
		}
	default:
		c.e.Errorf("Terminate answered %s", t.State)
	}
	return t, nil
}

// checkProvisioned checks that an answer is complete.
func checkProvisioned(e *env, g backend.Grant, p backend.Provisioned) {
	i, r := p.Instance, p.Receipt
	asked := e.b
	if c, ok := asked.(*checked); ok {
		asked = c.Backend // The suite asks, not the case: the worker may have died since it answered.
	}
	name, err := asked.Name(backend.WithCaller(e.Context(), owner))
	for what, wrong := range map[string]bool{
		"instance: grant id":                      i.GrantID != g.ID,
		"instance: handle names another grant":    !names(i.Handle, g.ID),
		"instance: state is not READY":            i.State != backend.StateReady,
		"instance: has an end reason":             i.EndReason != 0,
		"instance: backend's name":                err == nil && i.Backend != name,
		"instance: no id":                         i.ID == "",
		"instance: no region":                     i.Region == "",
		"instance: another region than granted":   g.Region != "" && i.Region != g.Region,
		"instance: isolation is too weak":         i.Isolation < g.MinIsolation,
		"instance: shape is too small":            !g.Shape.Fits(i.Shape),
		"instance: attempts count from 1":         i.Attempt < 1,
		"instance: not started":                   i.StartedAt.IsZero(),
		"instance: another deadline than granted": !i.ValidTo.Equal(g.ValidTo),
		"instance: no deadline enforcement":       i.Enforcement == 0,
		"instance: ports":                         len(i.Ports) != len(g.Ports),
		"receipt: no host":                        r.Host == "",
		"receipt: no port":                        r.Port == 0,
		"receipt: no user":                        r.User == "",
		"receipt: host key is not ssh-ed25519":    !strings.HasPrefix(r.HostKey, "ssh-ed25519 "),
		"receipt: grant id":                       r.GrantID != g.ID,
		"receipt: another deadline than granted":  !r.ValidTo.Equal(g.ValidTo),
		"receipt: not exactly one login key":      countKeys(r) != 1,
		"receipt: no evidence for TDX":            g.MinIsolation == backend.IsolationTDX && r.Evidence == nil,
	} {
		if wrong {
			e.Errorf("Provision's answer: %s", what)
		}
	}
}

func names(h backend.Handle, id backend.GrantID) bool {
	got, err := h.GrantID()
	return err == nil && got == id
}

func countKeys(r backend.Receipt) int {
	n := 0
	for _, has := range []bool{r.RequesterKey != "", r.SealedKey != nil, r.PlaintextKey != nil} {
		if has {
			n++
		}
	}
	return n
}

// checkCapabilities checks that capabilities make sense.
func checkCapabilities(t testing.TB, c backend.Capabilities) {
	t.Helper()
	if c.ObservedAt.IsZero() && !c.Stale {
		t.Errorf("capabilities don't say when they were observed")
	}
	for n, r := range c.Regions {
		for what, wrong := range map[string]bool{
			"has no name":                         r.Region == "",
			"is not sorted":                       n > 0 && c.Regions[n-1].Region >= r.Region,
			"offers no isolation":                 len(r.Isolation) == 0,
			"isolation is not ascending":          !ascending(r.Isolation),
			"network policies are not ascending":  !ascending(r.NetworkModes),
			"has no deadline enforcement":         r.Enforcement == 0,
			"free exceeds total":                  !r.Free.Fits(r.Total),
			"largest single exceeds total":        !r.LargestSingle.Fits(r.Total),
			"largest free exceeds free":           !r.LargestFree.Fits(r.Free),
			"largest free exceeds largest single": !r.LargestFree.Fits(r.LargestSingle),
			"has negative figures":                min(r.Free.CPU, r.Total.CPU, r.LargestFree.CPU, r.LargestSingle.CPU) < 0 || min(r.Free.RAM, r.Total.RAM) < 0 || min(r.Free.Storage, r.Total.Storage) < 0,
			"has more instances than it may":      r.ActiveInstances > r.MaxInstances,
			"has a negative number of instances":  r.ActiveInstances < 0,
		} {
			if wrong {
				t.Errorf("capabilities: region %q %s: %+v", r.Region, what, r)
			}
		}
	}
}

func ascending[T ~int32](levels []T) bool {
	return slices.IsSorted(levels) && len(slices.Compact(slices.Clone(levels))) == len(levels)
}
