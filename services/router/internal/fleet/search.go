package fleet

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// search is one call's search for a member that takes its grant. It is for one
// goroutine.
type search struct {
	fleet *Fleet
	grant backend.Grant
	// answers has one function for each member, which waits for its answer; nil
	// until somebody must be asked.
	answers []func() satisfied
	cancel  context.CancelFunc
	// passed are the members that had their turn.
	passed   map[string]bool
	refusals []refusal
	// inherited is the member that had the claim when the call began, "" if
	// none had.
	inherited string
	// ours says that this call gave the claim to the member that has it now.
	ours bool
	// nothing is the claim, or its absence, under which nothing exists and nothing
	// more is made; nil while that isn't known.
	nothing *Claim
}

// satisfied is a member's answer to CanSatisfy.
type satisfied struct {
	backend.Satisfaction
	err error
}

// refusal is why a member doesn't take the grant.
type refusal struct {
	member *Member
	err    *backenderr.Error
}

func (f *Fleet) search(grant backend.Grant) *search {
	return &search{fleet: f, grant: grant, cancel: func() {}, passed: map[string]bool{}}
}

// stop ends the questions that nobody waits for any more.
func (s *search) stop() { s.cancel() }

// ask puts the question to all members that have not had their turn, at once:
// the answers are used in the operator's order, but one that doesn't come
// costs its own time limit only once.
func (s *search) ask(ctx context.Context) {
	if s.answers != nil {
		return
	}
	ctx, s.cancel = context.WithCancel(ctx)
	s.answers = make([]func() satisfied, len(s.fleet.members))
	for i, m := range s.fleet.members {
		if !s.passed[m.Name] {
			s.answers[i] = m.canSatisfy(ctx, s.grant)
		}
	}
}

// canSatisfy asks one member and returns how to wait for the answer, which
// comes in time, whatever the member does.
func (m *Member) canSatisfy(ctx context.Context, grant backend.Grant) func() satisfied {
	if o := m.Observe(); o.LastError != "" {
		return func() satisfied { return satisfied{err: unanswered("%s", o.LastError)} }
	}
	ctx, cancel := context.WithTimeout(ctx, m.AnswerTimeout)
	asked := make(chan satisfied, 1)
	go func() {
		defer cancel()
		s, err := m.Backend.CanSatisfy(ctx, grant)
		asked <- satisfied{s, err}
	}()
	return sync.OnceValue(func() satisfied {
		select {
		case a := <-asked:
			return a
		case <-ctx.Done():
		}
		// The answer may have come first: cancel follows it.
		select {
		case a := <-asked:
			return a
		default:
			return satisfied{err: unanswered("no answer within %s", m.AnswerTimeout)}
		}
	})
}

func unanswered(format string, args ...any) error {
	return backenderr.New(backenderr.BackendUnreachable, format, args...).WithRetryAfter(unreachableRetry)
}

// next returns the next member in order that satisfies the grant, nil if there
// is none. Members that were out of room a short while ago come last: they are
// asked rather than the grant be refused without asking.
func (s *search) next(ctx context.Context) (*Member, error) {
	s.ask(ctx)
	for _, lastResort := range []bool{false, true} {
		for i, m := range s.fleet.members {
			if s.passed[m.Name] || (!lastResort && s.fleet.fallThrough && s.fleet.isFull(m, s.grant)) {
				continue
			}
			a := s.answers[i]()
			if ctx.Err() != nil {
				return nil, gone(ctx)
			}
			s.passed[m.Name] = true
			switch {
			case backenderr.Is(a.err, backenderr.GrantInvalid, backenderr.ImageMismatch):
				return nil, m.fails(a.err).WithCreated(backenderr.CreatedNone)
			case a.err != nil:
				s.fleet.log.WarnContext(ctx, "Skipped backend", "backend", m.Name, "grant_id", s.grant.ID.String(), "error", a.err)
				s.refuse(m, a.err)
			case !a.Satisfiable:
				s.refuse(m, backenderr.New(backenderr.GrantNotSatisfiable, "%s", a.Reason))
			case m.Observe().Capabilities.Draining:
				s.refuse(m, backenderr.New(backenderr.WorkerFull, "it takes no new grants").WithRetryAfter(fullFor))
			default:
				return m, nil
			}
		}
	}
	return nil, nil //nolint:nilnil // No member is no failure; the caller knows what was tried.
}

// gaveUp reports whether GRANT_ENDED only means that a router has ended an
// unclear attempt at this member in an earlier call, and moved on. That can
// only be where the claim was not when this call began.
func (s *search) gaveUp(m *Member, err error) bool {
	return backenderr.Is(err, backenderr.GrantEnded) && s.inherited != "" && s.inherited != m.Name
}

// refuse notes why a member doesn't take the grant; nothing of it exists there.
func (s *search) refuse(m *Member, err error) {
	s.passed[m.Name] = true
	s.refusals = append(s.refusals, refusal{m, m.fails(err).WithCreated(backenderr.CreatedNone)})
}

// rank orders what a caller is told when every backend refused for another
// reason: the one that gives most hope for a later try.
func rank(r backenderr.Reason) int {
	switch rule := rules[r]; {
	case r == backenderr.GrantNotSatisfiable:
		return 0
	case rule.remember == full:
		return 3
	case rule.then == again, rule.then == attach:
		return 2
	}
	return 1
}

// Limits of the texts of a collective refusal, in bytes. They travel twice, in
// message and metadata, in trailers that proxies limit to 8 KiB.
const (
	longestReason  = 200
	longestReasons = 2400
)

// failure returns the error when no member took the grant: the only refusal
// as it is, or one that lists them all, in message and metadata.
func (s *search) failure() error {
	if len(s.refusals) == 0 {
		return backenderr.New(backenderr.Internal, "the search for a backend ended without an answer")
	}
	best := slices.MaxFunc(s.refusals, func(a, b refusal) int { return cmp.Compare(rank(a.err.Reason), rank(b.err.Reason)) })
	if len(s.refusals) == 1 {
		return best.err
	}
	limit := min(longestReason, longestReasons/len(s.refusals))
	texts := make([]string, len(s.refusals))
	metadata := map[string]string{}
	var retryAfter time.Duration
	for i, r := range s.refusals {
		texts[i] = shorten(r.err.Error(), limit)
		metadata["reason-"+r.member.Name] = string(r.err.Reason) + ": " + shorten(errors.Unwrap(r.err).Error(), limit)
		if after := r.err.RetryAfter; after > 0 && (retryAfter == 0 || after < retryAfter) {
			retryAfter = after
		}
	}
	all := backenderr.New(best.err.Reason, "no backend takes the grant: %s", strings.Join(texts, "; "))
	all.Created, all.RetryAfter, all.Metadata = backenderr.CreatedNone, retryAfter, metadata
	return all
}

func shorten(text string, limit int) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "…"
}

// fails returns err as a failure of this member: with all its details, its name
// before the text and in the metadata.
func (m *Member) fails(err error) *backenderr.Error {
	e := backenderr.From(err)
	w := backenderr.Wrap(e.Reason, err, "backend %s", m.Name)
	w.Created, w.RetryAfter, w.Violations, w.Metadata = e.Created, e.RetryAfter, slices.Clone(e.Violations), maps.Clone(e.Metadata)
	return w.WithMetadata(backenderr.MetaBackend, m.Name)
}
