package worker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// The janitor is a sweep by itself: it runs with every other process dead, or
// beside workers that live. A worker knows what it works on by its keepers; the
// janitor knows nothing but the platform and the ledger, so that it is more
// patient: whatever a living worker may be at is left alone until it is older
// than a worker needs.

// Limits of one pass.
const (
	// defaultPause is between the two looks: longer than a platform takes to
	// show what it has just changed, shorter than an operator's patience.
	defaultPause = 5 * time.Second
	// defaultActLimit is for one grant: a stop with its grace and clean-up takes
	// seconds; what hangs is left to the next run.
	defaultActLimit = 2 * time.Minute
	// actsAtOnce bounds how many grants are worked on at the same time.
	actsAtOnce = 8
)

// SweepOptions say how one pass of the janitor goes.
type SweepOptions struct {
	// DryRun changes nothing.
	DryRun bool
	// Pause between the two looks; 0 means 5 s.
	Pause time.Duration
	// ActLimit is how long ending one grant may take; 0 means 2 min.
	ActLimit time.Duration
}

// SweepAction is what the janitor does about something.
type SweepAction string

// What the janitor does.
const (
	// SweepEnd ends the grant: closes it, tears down what is left of it and
	// writes its final compute log.
	SweepEnd SweepAction = "end"
	// SweepFinish does the same for a grant whose instance has ended by itself,
	// for the reason that the platform gives.
	SweepFinish SweepAction = "finish"
	// SweepUndo removes an unfinished attempt and leaves the grant open.
	SweepUndo SweepAction = "undo"
	// SweepDelete removes what belongs to no grant that lives.
	SweepDelete SweepAction = "delete"
)

// SweepResult is what came of it.
type SweepResult string

// What can come of it.
const (
	// SweepWould says that it was a dry run.
	SweepWould SweepResult = "would be done"
	// SweepDone says that it is done and confirmed.
	SweepDone SweepResult = "done"
	// SweepFailed says that it is not done or not confirmed.
	SweepFailed SweepResult = "failed"
	// SweepBlind says that nothing was done, because a part of the platform
	// that it concerns can't be seen or is another's to change.
	SweepBlind SweepResult = "blind"
)

// SweepFinding is a grant of which something exists that should not, or that
// has ended and nobody has written so.
type SweepFinding struct {
	GrantID backend.GrantID
	// Resources are what the platform holds of it; none if only its end is not
	// written.
	Resources []backend.Resource
	// Where are the hosts or regions of it.
	Where []string
	// Since is since when something of it exists, zero if unknown.
	Since time.Time
	// ValidTo is its deadline, zero if unknown.
	ValidTo time.Time
	// Why it should not exist, for people.
	Why    string
	Action SweepAction
	Result SweepResult
	// Err says why it is not done.
	Err error

	claim  *ledger.Claim
	ready  *backend.Provisioned
	reason backend.EndReason
}

// SweepReport is what one pass of the janitor found and did.
type SweepReport struct {
	// Findings, sorted by grant.
	Findings []SweepFinding
	// Blind names the parts of the platform that could not be seen, sorted.
	// Nothing was done there.
	Blind []string
	// Looked is how many grants there were something of.
	Looked int
	// WorkerSeen is when a worker last said that it works, zero if none does.
	WorkerSeen time.Time
}

// look is one look at platform and ledger.
type look struct {
	findings map[backend.GrantID]SweepFinding
	blind    []string
	looked   int
	beat     time.Time
}

// SweepOnce looks for what should not exist, and for grants that have ended
// with nobody there to write so, twice with a pause between, and deals with
// what both looks found. It runs in a process of its own, with a runtime that
// is not started.
//
// If the platform or the ledger can't be read it does nothing at all and
// returns the error. What concerns a part of the platform that can't be seen is
// left alone.
func (r *Runtime) SweepOnce(ctx context.Context, driver Driver, o SweepOptions) (SweepReport, error) {
	o.Pause, o.ActLimit = cmp.Or(o.Pause, defaultPause), cmp.Or(o.ActLimit, defaultActLimit)
	r.attach(ctx, driver)
	defer r.Close()
	first, err := r.look(ctx)
	if err != nil {
		return SweepReport{}, err
	}
	report := func(l look) SweepReport {
		slices.Sort(l.blind)
		return SweepReport{Blind: slices.Compact(l.blind), Looked: l.looked, WorkerSeen: l.beat}
	}
	if len(first.findings) == 0 {
		return report(first), nil
	}
	timer := time.NewTimer(o.Pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return SweepReport{}, ctx.Err()
	}
	second, err := r.look(ctx)
	if err != nil {
		return SweepReport{}, err
	}
	second.blind = append(second.blind, first.blind...)
	out := report(second)
	for id, f := range second.findings {
		before, again := first.findings[id]
		if again && before.Action == f.Action && sameResources(before.Resources, f.Resources) {
			out.Findings = append(out.Findings, f)
		}
	}
	slices.SortFunc(out.Findings, func(a, b SweepFinding) int { return bytes.Compare(a.GrantID[:], b.GrantID[:]) })
	slots := make(chan struct{}, actsAtOnce)
	var acts sync.WaitGroup
	for i := range out.Findings {
		f := &out.Findings[i]
		if parts := r.unseen(ctx, *f, out.Blind); len(parts) > 0 {
			f.Result, f.Err = SweepBlind, fmt.Errorf("%s can't be seen", strings.Join(parts, ", "))
			continue
		}
		if o.DryRun {
			f.Result = SweepWould
			continue
		}
		slots <- struct{}{}
		acts.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, o.ActLimit)
			defer cancel()
			f.Result = SweepDone
			if f.Err = r.act(ctx, f); f.Err != nil {
				f.Result = SweepFailed
			}
			r.log.WarnContext(ctx, "Swept", "grant_id", f.GrantID.String(), "why", f.Why, "action", string(f.Action), "result", string(f.Result))
		})
	}
	acts.Wait()
	return out, nil
}

func sameResources(a, b []backend.Resource) bool {
	return slices.EqualFunc(a, b, func(a, b backend.Resource) bool {
		return a.Attempt == b.Attempt && a.InstanceID == b.InstanceID && a.Running == b.Running
	})
}

// look looks at the platform first, so that what is made afterwards isn't judged
// by it, and then at the ledger.
func (r *Runtime) look(ctx context.Context) (look, error) {
	listing, err := r.driver.List(ctx)
	if err != nil {
		return look{}, fmt.Errorf("list what exists: %w", err)
	}
	l := look{findings: map[backend.GrantID]SweepFinding{}, blind: listing.Blind}
	if l.beat, err = r.config.Ledger.LastBeat(ctx, r.config.Backend, ""); err != nil {
		return look{}, ledgerError(err, "read which workers live")
	}
	now := time.Now()
	held := map[backend.GrantID][]backend.Resource{}
	for _, resource := range listing.Resources {
		held[resource.GrantID] = append(held[resource.GrantID], resource)
	}
	for claim, err := range r.config.Ledger.LiveClaims(ctx, r.config.Backend) {
		if err != nil {
			return look{}, ledgerError(err, "read live grants")
		}
		if _, known := held[backend.GrantID(claim.RequestID)]; !known {
			held[backend.GrantID(claim.RequestID)] = nil
		}
	}
	l.looked = len(held)
	for id, resources := range held {
		j := judgement{runtime: r, id: id, resources: resources, now: now, attended: r.lives(l.beat, now)}
		f, err := j.judge(ctx)
		if err != nil {
			return look{}, err
		}
		if f.Action == "" {
			continue
		}
		f.GrantID, f.Resources = id, resources
		for _, resource := range resources {
			f.Where = append(f.Where, resource.Placement)
			if !resource.CreatedAt.IsZero() && (f.Since.IsZero() || resource.CreatedAt.Before(f.Since)) {
				f.Since = resource.CreatedAt
			}
			if resource.ValidTo.After(f.ValidTo) {
				f.ValidTo = resource.ValidTo
			}
		}
		slices.Sort(f.Where)
		f.Where = slices.Compact(f.Where)
		if f.claim != nil {
			f.ValidTo = f.claim.ValidTo
			if f.Since.IsZero() {
				f.Since = f.claim.CreatedAt
			}
		}
		l.findings[id] = f
	}
	return l, nil
}

// judgement is the janitor's about one grant.
type judgement struct {
	runtime   *Runtime
	id        backend.GrantID
	resources []backend.Resource
	now       time.Time
	// attended says that a worker lives, who may be at work on the grant.
	attended bool

	claim    *ledger.Claim
	attempts []Attempt
}

// judge says what should be done about the grant; an empty action means
// nothing. It acts on a grant as a whole: as long as anything of it may live,
// nothing of it is touched.
func (j *judgement) judge(ctx context.Context) (SweepFinding, error) {
	l := j.runtime.config.Ledger
	log, err := readLog(ctx, l, j.id)
	if err != nil {
		return SweepFinding{}, err
	}
	if log != nil && log.Log.Final {
		if len(j.resources) == 0 {
			return SweepFinding{}, nil
		}
		return SweepFinding{Action: SweepDelete, Why: "the grant ended at " + log.Log.EndedAt.UTC().Format(time.RFC3339)}, nil
	}
	claim, err := l.Claim(ctx, ledger.RequestID(j.id))
	switch {
	case err == nil && claim.Backend != j.runtime.config.Backend:
		return SweepFinding{}, nil // another backend's, whatever it does here
	case err == nil:
		j.claim = &claim
	case !errors.Is(err, ledger.ErrNotFound):
		return SweepFinding{}, ledgerError(err, "read claim")
	}
	closure, err := l.Closure(ctx, ledger.RequestID(j.id))
	switch {
	case err == nil:
		return j.closed(closure), nil
	case !errors.Is(err, ledger.ErrNotFound):
		return SweepFinding{}, ledgerError(err, "read closure")
	}
	if j.claim != nil && j.past(j.claim.ValidTo) {
		return SweepFinding{Action: SweepEnd, Why: "past its deadline", claim: j.claim, reason: backend.EndDeadline}, nil
	}
	if j.attempts, err = j.runtime.journal.Attempts(ctx, j.id); err != nil {
		return SweepFinding{}, err
	}
	if open, ok := j.open(); ok {
		return j.begun(ctx, open)
	}
	return j.stray(), nil
}

// closed judges a grant that somebody has closed: who did so ends it, and gets
// the time to.
func (j *judgement) closed(closure ledger.Closure) SweepFinding {
	if j.now.Sub(closure.At) <= j.runtime.config.OrphanAge {
		return SweepFinding{}
	}
	f := SweepFinding{Why: "the grant was closed: " + closure.Reason, Action: SweepDelete}
	switch {
	case j.claim != nil:
		f.Action, f.claim, f.reason = SweepEnd, j.claim, closureReason(closure)
	case len(j.resources) == 0:
		return SweepFinding{}
	}
	return f
}

// past reports whether a deadline and its grace are over.
func (j *judgement) past(deadline time.Time) bool {
	return !deadline.IsZero() && j.now.After(deadline.Add(j.runtime.config.Grace))
}

func (j *judgement) open() (Attempt, bool) {
	for _, a := range j.attempts {
		if !a.Gone {
			return a, true
		}
	}
	return Attempt{}, false
}

// begun judges a grant with an open attempt.
func (j *judgement) begun(ctx context.Context, open Attempt) (SweepFinding, error) {
	if j.attended || j.claim == nil || j.now.Sub(open.BeganAt) <= j.runtime.config.OrphanAge {
		return SweepFinding{}, nil
	}
	ready, err := j.runtime.readyInstance(ctx, j.id)
	if err != nil {
		return SweepFinding{}, err
	}
	if ready == nil {
		return SweepFinding{
			Action: SweepUndo, claim: j.claim,
			Why: fmt.Sprintf("attempt %d was begun at %s and never finished, and no worker lives", open.Number, open.BeganAt.UTC().Format(time.RFC3339)),
		}, nil
	}
	// Its requester was told of it. It ends when the platform says that it has
	// ended, not when the platform says nothing.
	for _, resource := range j.resources {
		if resource.Running || resource.Attempt != open.Number {
			return SweepFinding{}, nil
		}
	}
	if len(j.resources) == 0 {
		return SweepFinding{}, nil
	}
	return SweepFinding{Action: SweepFinish, Why: "its instance has ended, and no worker lives to write so", claim: j.claim, ready: ready}, nil
}

// stray judges resources that no attempt stands for. What runs within its own
// deadline stays even if this ledger has never heard of it: the ledger may be
// an older copy, or a new one.
func (j *judgement) stray() SweepFinding {
	why := ""
	for _, resource := range j.resources {
		switch {
		case j.past(resource.ValidTo):
			why = "past its deadline"
		case resource.Running, resource.CreatedAt.IsZero(), j.now.Sub(resource.CreatedAt) <= j.runtime.config.OrphanAge:
			return SweepFinding{}
		default:
			why = cmp.Or(why, "left over from an attempt without a live intent")
		}
	}
	if why == "" {
		return SweepFinding{}
	}
	if j.claim != nil {
		return SweepFinding{Action: SweepUndo, Why: why, claim: j.claim}
	}
	return SweepFinding{Action: SweepDelete, Why: why}
}

// unseen returns the blind parts that a finding concerns: those where it is, or
// where the ledger says that it was begun. Of a grant that the ledger doesn't
// know, something may be anywhere.
func (r *Runtime) unseen(ctx context.Context, f SweepFinding, blind []string) []string {
	if len(blind) == 0 {
		return nil
	}
	attempts, err := r.journal.Attempts(ctx, f.GrantID)
	if err != nil || len(attempts) == 0 {
		return blind
	}
	var parts []string
	for _, part := range blind {
		open := slices.ContainsFunc(attempts, func(a Attempt) bool { return !a.Gone && a.Placement == part })
		if open || slices.Contains(f.Where, part) {
			parts = append(parts, part)
		}
	}
	return parts
}

// act does what a finding asks for and returns when that is confirmed.
func (r *Runtime) act(ctx context.Context, f *SweepFinding) error {
	var k *keeper
	switch f.Action {
	case SweepDelete:
		_, err := r.driver.Terminate(ctx, f.GrantID)
		return err
	case SweepEnd:
		k = r.keep(*f.claim, nil, phaseEnd, f.reason)
	case SweepFinish:
		k = r.keep(*f.claim, f.ready, phaseWatch, 0)
	case SweepUndo:
		k = r.keep(*f.claim, nil, phaseUndo, 0)
	default:
		return backenderr.New(backenderr.Internal, "no such action: %q", f.Action)
	}
	if err := k.wait(ctx); err != nil {
		return fmt.Errorf("%w: %s", err, cmp.Or(k.snapshot().instance.Progress, "not confirmed yet"))
	}
	// The keeper has left; whether it got through is in the ledger.
	if f.Action == SweepUndo {
		open, err := r.journal.Attempts(ctx, f.GrantID)
		if err == nil && slices.ContainsFunc(open, func(a Attempt) bool { return !a.Gone }) {
			err = errors.New("not confirmed; the log says why")
		}
		return err
	}
	log, err := readLog(ctx, r.config.Ledger, f.GrantID)
	if err == nil && (log == nil || !log.Log.Final) {
		err = errors.New("not confirmed; the log says why")
	}
	return err
}
