package backendtest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// exit makes the workload of a grant end.
func (e *env) exit(id backend.GrantID, status ExitStatus) {
	e.Helper()
	if err := e.f.Exit(id, status); err != nil {
		e.Fatalf("Exit: %v", err)
	}
}

// short provisions a new grant whose deadline is near. On a busy machine that
// may be too near: then it takes a later one.
func (e *env) short() (backend.Grant, backend.Envelope, backend.Provisioned) {
	e.Helper()
	return e.shortFrom(e.f.ShortestLife)
}

// shortFrom does so with at least a given time from Provision to the deadline.
func (e *env) shortFrom(life time.Duration) (backend.Grant, backend.Envelope, backend.Provisioned) {
	e.Helper()
	for ; ; life *= 2 {
		g, envelope := e.grant()
		g.ValidTo = time.Now().Add(life).UTC().Truncate(time.Microsecond)
		p, err := e.b.Provision(e.ctx(), g, envelope)
		if err == nil {
			return g, envelope, p
		}
		if !backenderr.Is(err, backenderr.GrantEnded, backenderr.GrantInvalid) || time.Now().Before(g.ValidTo) || life > e.patience/4 {
			e.Fatalf("Provision until %s from now: %s", life, describe(err))
		}
	}
}

// cutOffWithShortLife begins to provision a new grant whose deadline is near, and
// has the worker die the moment that the instance is created. It takes a later
// deadline if the worker doesn't get as far on a busy machine.
func (e *env) cutOffWithShortLife() backend.Grant {
	e.Helper()
	for life := e.f.ShortestLife; life <= e.patience/2; life *= 2 {
		g, envelope := e.grant()
		g.ValidTo = time.Now().Add(life).UTC().Truncate(time.Microsecond)
		crash := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultCrashAfter, GrantID: g.ID})
		ctx := e.ctx()
		acted := make(chan error, 1)
		go func() {
			_, err := e.b.Provision(ctx, g, envelope)
			acted <- err
		}()
		reached, err := e.reaches(crash, acted, e.cut)
		crash.Release()
		if reached {
			return g
		}
		if !backenderr.Is(err, backenderr.GrantEnded, backenderr.GrantInvalid) {
			e.Fatalf("Provision until %s from now, in which the worker was to die: %s", life, describe(err))
		}
	}
	e.Fatalf("the worker never came as far as to create an instance within %s", e.patience/2)
	return backend.Grant{}
}

// checkLog checks the final compute log of a grant that was ready as p says.
func (e *env) checkLog(p backend.Provisioned, signed *backend.SignedLog, reason backend.EndReason) {
	e.Helper()
	if signed == nil {
		e.Fatalf("no compute log")
	}
	log, i := signed.Log, p.Instance
	for what, wrong := range map[string]bool{
		"another grant":              log.GrantID != i.GrantID,
		"another backend":            log.Backend != i.Backend,
		"another instance":           log.InstanceID != i.ID,
		"another region":             log.Region != i.Region,
		"another attempt":            log.Attempt != i.Attempt,
		"another shape":              log.Shape != i.Shape,
		"another deadline":           !log.ValidTo.Equal(i.ValidTo),
		"it isn't final":             !log.Final,
		"no sequence number":         log.Sequence == 0,
		"no start":                   log.StartedAt.IsZero(),
		"it ended before it started": log.EndedAt.Before(log.StartedAt),
		"another reason than " + reason.String() + ": " + log.Exit.Reason.String(): log.Exit.Reason != reason,
	} {
		if wrong {
			e.Errorf("compute log: %s: %+v", what, log)
		}
	}
	e.checkUsage(log)
	e.checkSignature(signed)
}

func (e *env) checkUsage(log backend.ComputeLog) {
	e.Helper()
	u := log.Usage
	measured := 0
	for what, m := range map[string]*backend.Measurement{
		"CPU": u.CPU, "allocated CPU": u.CPUAllocated, "allocated memory": u.RAMAllocated, "memory peak": u.RAMPeak,
		"allocated disk": u.StorageAllocated, "network in": u.NetworkReceived, "network out": u.NetworkSent,
		"disk reads": u.DiskRead, "disk writes": u.DiskWritten,
	} {
		if m == nil {
			continue
		}
		if m.Source != backend.UsageAllocated {
			measured++
		}
		if m.Value < 0 || m.Source == 0 || m.From.IsZero() || m.To.Before(m.From) {
			e.Errorf("compute log: %s is %+v", what, *m)
		}
	}
	if log.StartedAt.IsZero() {
		return
	}
	var want backend.Usage
	want.Allocated(log.Shape, log.StartedAt, log.EndedAt)
	e.same("allocated CPU and what follows from reservation and time", want.CPUAllocated, u.CPUAllocated)
	e.same("allocated memory and what follows from reservation and time", want.RAMAllocated, u.RAMAllocated)
	e.same("allocated disk and what follows from reservation and time", want.StorageAllocated, u.StorageAllocated)
	if measured == 0 && !log.Partial {
		e.Errorf("compute log: nothing was measured, yet it isn't partial")
	}
}

// checkSignature verifies a log by the words of usage.proto alone.
func (e *env) checkSignature(signed *backend.SignedLog) {
	e.Helper()
	keys := e.capabilities().LogKeys
	n := slices.IndexFunc(keys, func(k backend.LogKey) bool { return k.ID == signed.KeyID })
	if n < 0 {
		e.Errorf("compute log: signed with key %q, which the capabilities don't have", signed.KeyID)
		return
	}
	message := slices.Concat([]byte("compute-bridge/v1/compute-log\x00"), signed.Body)
	if len(keys[n].PublicKey) != ed25519.PublicKeySize || !ed25519.Verify(keys[n].PublicKey, message, signed.Signature) {
		e.Errorf("compute log: the signature doesn't verify")
	}
	var body bridgev1.ComputeLog
	if err := proto.Unmarshal(signed.Body, &body); err != nil {
		e.Errorf("compute log: the body is no ComputeLog: %v", err)
		return
	}
	e.same("the signed body and the decoded log", backendgrpc.LogFromProto(&body), backendgrpc.LogFromProto(backendgrpc.LogToProto(signed.Log)))
}

// shrinks reports whether a figure that counts went back or got lost.
func shrinks(from, to backend.Usage) bool {
	less := func(a, b *backend.Measurement) bool { return a != nil && (b == nil || b.Value < a.Value) }
	return less(from.CPU, to.CPU) || less(from.CPUAllocated, to.CPUAllocated) || less(from.RAMAllocated, to.RAMAllocated) ||
		less(from.RAMPeak, to.RAMPeak) || less(from.StorageAllocated, to.StorageAllocated) ||
		less(from.NetworkReceived, to.NetworkReceived) || less(from.NetworkSent, to.NetworkSent) ||
		less(from.DiskRead, to.DiskRead) || less(from.DiskWritten, to.DiskWritten)
}

func watchCases() []testCase {
	return []testCase{
		{name: "watch/begins with the state and ends with the log", needs: []need{needExit}, run: func(e *env) {
			g, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			if s := w.state(); s != backend.StateReady {
				e.Errorf("the first state is %s, want READY", s)
			}
			e.exit(g.ID, ExitStatus{Code: 7})
			log := w.log()
			e.checkLog(p, log, backend.EndWorkloadExited)
			if log.Log.Exit.Code == nil || *log.Log.Exit.Code != 7 {
				e.Errorf("exit is %+v, want code 7", log.Log.Exit)
			}
			if log.Log.Exit.Signal != "" {
				e.Errorf("exit by signal %q, want none", log.Log.Exit.Signal)
			}
		}},
		{name: "watch/tells the signal", needs: []need{needExit}, run: func(e *env) {
			g, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			w.state()
			e.exit(g.ID, ExitStatus{Signal: "KILL"})
			if exit := w.log().Log.Exit; exit.Signal != "KILL" {
				e.Errorf("exit is %+v, want signal KILL", exit)
			}
		}},
		{name: "watch/an instance that is gone is VANISHED", needs: []need{needVanish}, run: func(e *env) {
			g, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			w.state()
			if err := e.f.Vanish(g.ID); err != nil {
				e.Fatal(err)
			}
			log := w.log()
			e.checkLog(p, log, backend.EndVanished)
			if !log.Log.Partial {
				e.Errorf("the log of a vanished instance isn't partial")
			}
		}},
		{name: "watch/an instance that the provider took back is INTERRUPTED", needs: []need{needInterrupt}, run: func(e *env) {
			g, envelope, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			w.state()
			if err := e.f.Interrupt(g.ID); err != nil {
				e.Fatal(err)
			}
			e.checkLog(p, w.log(), backend.EndInterrupted)
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision of an interrupted grant", backenderr.GrantEnded)
		}},
		{name: "watch/usage so far grows and is signed", needs: []need{needUsage}, run: func(e *env) {
			_, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			var last *backend.SignedLog
			for seen := 0; seen < 3; {
				event := receive(e, "usage so far", w.events)
				if event.Usage == nil {
					continue
				}
				seen++
				log := event.Usage.Log
				if log.Final || log.GrantID != p.Instance.GrantID || !log.EndedAt.IsZero() || log.Exit.Reason != 0 {
					e.Errorf("usage so far looks final, or is another grant's: %+v", log)
				}
				e.checkSignature(event.Usage)
				if last != nil && shrinks(last.Log.Usage, log.Usage) {
					e.Errorf("usage went from %+v to %+v", last.Log.Usage, log.Usage)
				}
				last = event.Usage
			}
			final := e.terminate(p.Instance.Handle)
			if shrinks(last.Log.Usage, final.Log.Usage) {
				e.Errorf("usage went from %+v to, finally, %+v", last.Log.Usage, final.Log.Usage)
			}
			if final.Log.Sequence <= last.Log.Sequence {
				e.Errorf("the final log has number %d, an earlier one %d", final.Log.Sequence, last.Log.Sequence)
			}
			w.log()
		}},
		{name: "watch/ends at the deadline", run: func(e *env) {
			g, envelope, p := e.short()
			w := e.watch(e.ctx(), p.Instance.Handle)
			log := w.log()
			e.checkLog(p, log, backend.EndDeadline)
			if ended := log.Log.EndedAt; ended.Before(g.ValidTo.Add(-time.Second)) || ended.After(time.Now().Add(time.Second)) {
				e.Errorf("it ended at %s, the deadline was %s", ended, g.ValidTo)
			}
			_, err := e.b.Provision(e.ctx(), g, envelope)
			e.want(err, "Provision after the deadline", backenderr.GrantEnded)
		}},
		{name: "watch/the deadline needs no watcher", run: func(e *env) {
			g, _, p := e.short()
			e.eventually("nothing is left after the deadline", func() bool { return len(e.left(g.ID)) == 0 })
			if time.Now().Before(g.ValidTo) {
				e.Errorf("it was ended before its deadline")
			}
			e.checkLog(p, e.watch(e.ctx(), p.Instance.Handle).log(), backend.EndDeadline)
		}},
		{name: "watch/the deadline passes during a restart", needs: []need{needReopen}, run: func(e *env) {
			_, _, p := e.short()
			e.reopen()
			e.checkLog(p, e.watch(e.ctx(), p.Instance.Handle).log(), backend.EndDeadline)
		}},
		{name: "watch/watchers agree", needs: []need{needExit}, run: func(e *env) {
			g, _, p := e.ready()
			var watchers []*watcher
			for range 3 {
				w := e.watch(e.ctx(), p.Instance.Handle)
				w.state()
				watchers = append(watchers, w)
			}
			e.exit(g.ID, ExitStatus{})
			log := watchers[0].log()
			for _, w := range watchers[1:] {
				e.same("two watchers' logs", log, w.log())
			}
		}},
		{name: "watch/answers after the end", needs: []need{needExit}, run: func(e *env) {
			g, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			e.exit(g.ID, ExitStatus{Code: 3})
			log := w.log()
			late := e.watch(e.ctx(), p.Instance.Handle)
			if s := late.state(); s != backend.StateTerminated {
				e.Errorf("after the end the first state is %s, want TERMINATED", s)
			}
			e.same("logs of watches before and after the end", log, late.log())
		}},
		{name: "watch/answers after the end and a restart", needs: []need{needExit, needReopen}, run: func(e *env) {
			g, _, p := e.ready()
			w := e.watch(e.ctx(), p.Instance.Handle)
			e.exit(g.ID, ExitStatus{Code: 3})
			log := w.log()
			e.reopen()
			e.same("logs before and after a restart", log, e.watch(e.ctx(), p.Instance.Handle).log())
		}},
		{name: "watch/attaches again after a restart", needs: []need{needExit, needReopen}, run: func(e *env) {
			g, _, p := e.ready()
			before := e.watch(e.ctx(), p.Instance.Handle)
			before.state()
			e.reopen()
			if before.err() == nil {
				e.Errorf("the watch ended well although the worker went away")
			}
			w := e.watch(e.ctx(), p.Instance.Handle)
			if s := w.state(); s != backend.StateReady {
				e.Errorf("after a restart the state is %s, want READY", s)
			}
			e.exit(g.ID, ExitStatus{Code: 9})
			log := w.log()
			e.checkLog(p, log, backend.EndWorkloadExited)
			if log.Log.Exit.Code == nil || *log.Log.Exit.Code != 9 {
				e.Errorf("exit is %+v, want code 9", log.Log.Exit)
			}
		}},
		{name: "watch/an end that nobody saw is told after a restart", needs: []need{needExit, needKill}, run: func(e *env) {
			g, _, p := e.ready()
			e.f.Kill()
			e.exit(g.ID, ExitStatus{Code: 5})
			e.reopen()
			log := e.watch(e.ctx(), p.Instance.Handle).log()
			e.checkLog(p, log, backend.EndWorkloadExited)
			if log.Log.Exit.Code == nil || *log.Log.Exit.Code != 5 {
				e.Errorf("exit is %+v, want code 5", log.Log.Exit)
			}
		}},
		{name: "watch/the deadline needs no worker", needs: []need{needKill}, run: func(e *env) {
			g, _, p := e.short()
			if p.Instance.Enforcement != backend.EnforcedByPlatform {
				return // A weaker enforcement promises less.
			}
			e.f.Kill()
			e.eventually("nothing runs after the deadline, with the worker dead", func() bool { return !e.f.Runs(g.ID) })
			e.reopen()
			e.checkLog(p, e.watch(e.ctx(), p.Instance.Handle).log(), backend.EndDeadline)
		}},
		{name: "watch/the deadline needs no worker, even one that died as it created", needs: []need{needKill, needInject}, run: func(e *env) {
			if slices.ContainsFunc(e.capabilities().Regions, func(r backend.RegionCapabilities) bool { return r.Enforcement != backend.EnforcedByPlatform }) {
				return // A weaker enforcement promises less.
			}
			g := e.cutOffWithShortLife()
			timer := time.NewTimer(time.Until(g.ValidTo))
			defer timer.Stop()
			<-timer.C // Before, it may be that nothing runs yet.
			e.eventually("nothing runs after the deadline, with the worker dead since it created it", func() bool { return !e.f.Runs(g.ID) })
			e.reopen()
			if log := e.terminate(e.handle(g.ID)); log == nil || log.Log.Exit.Reason != backend.EndDeadline {
				e.Errorf("the final log of what ended at its deadline is %+v", log)
			}
		}},
		{name: "watch/unknown and malformed handles", run: func(e *env) {
			g, _ := e.f.Satisfiable()
			err := e.watch(e.ctx(), e.handle(g.ID)).err()
			e.want(err, "a watch of an unknown grant", backenderr.InstanceNotFound)
			for _, h := range []backend.Handle{"", "nonsense", "../" + backend.HandleFor(g.ID), backend.HandleFor(g.ID)[1:]} {
				err := e.watch(e.ctx(), h).err()
				e.want(err, "a watch of handle "+string(h), backenderr.RequestInvalid)
			}
		}},
		{name: "watch/cancelling stops the watch and nothing else", run: func(e *env) {
			g, envelope, p := e.ready()
			ctx, cancel := context.WithCancel(e.ctx())
			w := e.watch(ctx, p.Instance.Handle)
			w.state()
			began := time.Now()
			cancel()
			e.want(w.err(), "a cancelled watch", backenderr.Cancelled)
			if took := time.Since(began); took > e.patience/4 {
				e.Errorf("a cancelled watch took %s to end", took)
			}
			if len(e.left(g.ID)) == 0 {
				e.Errorf("cancelling a watch ended the instance")
			}
			e.same("answers before and after a watch", p, e.provision(g, envelope))
		}},
		{name: "watch/a watcher's own error ends it", run: func(e *env) {
			_, _, p := e.ready()
			err := e.b.WatchUntilExit(e.ctx(), p.Instance.Handle, func(backend.Event) error { return &emitError{} })
			if _, ok := errors.AsType[*emitError](err); !ok {
				e.Errorf("a watch ended with %v, want the watcher's own error", err)
			}
		}},
		{name: "watch/sees the making", needs: []need{needInject}, run: func(e *env) {
			g, envelope := e.grant()
			fault := e.f.Inject(Fault{Point: e.f.CreatePoint, Kind: FaultSlow, GrantID: g.ID})
			defer fault.Release()
			making := e.begin(e.ctx(), g, envelope)
			receive(e, "the create call", fault.Reached())
			w := e.watch(e.ctx(), e.handle(g.ID))
			if s := w.state(); s != backend.StateProvisioning {
				e.Errorf("while it is made the state is %s, want PROVISIONING", s)
			}
			fault.Release()
			o := receive(e, "Provision", making)
			if o.err != nil {
				e.Fatalf("Provision: %s", describe(o.err))
			}
			for s := w.state(); s != backend.StateReady; s = w.state() {
				if s != backend.StateProvisioning {
					e.Fatalf("state %s came before READY", s)
				}
			}
			e.terminate(o.provisioned.Instance.Handle)
			w.log()
		}},
		{name: "watch/logs aren't shared", run: func(e *env) {
			_, _, p := e.ready()
			a, b := e.watch(e.ctx(), p.Instance.Handle), e.watch(e.ctx(), p.Instance.Handle)
			a.state()
			b.state()
			own := e.terminate(p.Instance.Handle)
			spoiled, kept := a.log(), b.log()
			clear(spoiled.Body)
			clear(spoiled.Signature)
			if u := spoiled.Log.Usage.CPUAllocated; u != nil {
				u.Value = -1
			}
			for what, log := range map[string]*backend.SignedLog{
				"Terminate": own, "another watch": kept, "Terminate, again": e.terminate(p.Instance.Handle),
				"a later watch": e.watch(e.ctx(), p.Instance.Handle).log(),
			} {
				if bytes.Count(log.Body, []byte{0}) == len(log.Body) {
					e.Errorf("the log of %s was changed by a watcher that changed its own", what)
				}
				e.checkLog(p, log, backend.EndTerminated)
			}
		}},
	}
}
