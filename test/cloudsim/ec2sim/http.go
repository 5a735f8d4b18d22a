package ec2sim

import (
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/hex"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

const (
	// maxBody is more than any request of these services may have.
	maxBody = 1 << 20
	// maxSkew is how far a request's date may be off
	// (https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html).
	maxSkew = 5 * time.Minute
)

// Request is an API request, as it was understood.
type Request struct {
	// Service is its name in signatures: "ec2", "sts", "ssm", "monitoring" or
	// "scheduler".
	Service string
	Action  string
	Region  string
	// Params are the parameters, in the flattened form of the query protocol
	// whatever the service speaks.
	Params url.Values
	DryRun bool
	// Mutates says that it changes something, or would.
	Mutates bool
	// Grants are those that the request is for, from the tags of what it makes or
	// names. None means no grant in particular.
	Grants []string
	Time   time.Time
	// Answer is the error code of the answer, empty for success. In an
	// interceptor there is none yet.
	Answer string
	// Lost says that the caller got no answer.
	Lost bool
}

// Intervention is what happens to a request that would not happen by itself.
type Intervention struct {
	// Before is called before the effect, with the request's context, which ends
	// when the caller leaves; it may block. With an error there is no effect, and
	// the connection is closed without an answer.
	Before func(context.Context) error
	// Refuse is answered in place of the effect.
	Refuse *Error
	// After is called after the effect, or the refusal, before the answer; it may
	// block. If the answer is lost, the connection is closed without it.
	After func() (lost bool)
}

// Intercept has every request that was understood shown to a function, which says
// what happens to it. It is called concurrently. Nil removes it.
func (c *Cloud) Intercept(intercept func(Request) Intervention) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.intercept = intercept
}

// Requests are all requests so far, in the order in which they arrived, those too
// that are being answered.
func (c *Cloud) Requests() []Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	log := make([]Request, len(c.requests))
	for i, request := range c.requests {
		log[i] = *request
	}
	return log
}

// ForgetRequests empties the log, for a test that counts from now on.
func (c *Cloud) ForgetRequests() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = nil
}

// call is one request on its way through.
type call struct {
	cloud  *Cloud
	region *region
	params params
	// id is the request's, for the answer.
	id string
}

// handler serves one action.
type handler struct {
	mutates bool
	// prepare reads the parameters, all of them, and returns the effect.
	prepare func(*call) effect
	// tokens is the limit of its bucket; unfiltered that of the one from which it
	// takes without a filter and a page, if there is one.
	tokens, unfiltered cloudsim.Limit
}

// effect does what was asked for, once, and returns the answer in whatever form
// the service writes.
type effect func() (any, *Error)

// service is one of the services' protocols.
type service struct {
	name    string
	actions map[string]handler
	// decode finds the action and the parameters.
	decode func(r *http.Request, body []byte) (action string, values url.Values, err *Error)
	// unknownAction is the answer to one that isn't served.
	unknownAction func(action string) *Error
	// dryRun says whether requests have that parameter.
	dryRun bool
	answer func(w http.ResponseWriter, id, action string, result any)
	refuse func(w http.ResponseWriter, id string, err *Error)
	// errors by which the service names what all services have.
	codes codes
}

// codes are a service's names of the errors that all have.
type codes struct {
	unknownKey, expired, denied, throttled *Error
}

// credentialScope is the part of a signature that says where it is good.
var credentialScope = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/, ]+)/(\d{8})/([^/, ]+)/([^/, ]+)/aws4_request, ?SignedHeaders=[^ ,]+, ?Signature=[0-9a-f]{64}$`)

// ServeHTTP serves all services and regions: the request's signature says which
// one is meant.
func (c *Cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := requestID()
	// Clients take the service's time from here.
	if protocol := r.Header.Get("Smithy-Protocol"); protocol != "" {
		w.Header().Set("Smithy-Protocol", protocol)
	}
	w.Header().Set("Date", c.clock.Now().UTC().Format(http.TimeFormat))
	body, err := readBody(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	scope := credentialScope.FindStringSubmatch(r.Header.Get("Authorization"))
	if scope == nil {
		c.services["ec2"].refuse(w, id, &Error{
			Status: http.StatusUnauthorized, Code: "AuthFailure", Message: "The request has no signature that can be read",
		})
		return
	}
	key, regionName, serviceName := scope[1], scope[3], scope[4]
	s, ok := c.services[serviceName]
	if !ok {
		http.Error(w, "no service "+serviceName+" here", http.StatusNotFound)
		return
	}
	if fault := c.authenticate(s, r, key, regionName); fault != nil {
		s.refuse(w, id, fault)
		return
	}
	action, values, fault := s.decode(r, body)
	if fault != nil {
		s.refuse(w, id, fault)
		return
	}
	c.serve(r.Context(), w, s, id, action, regionName, values)
}

func readBody(r *http.Request) ([]byte, error) {
	reader := http.MaxBytesReader(nil, r.Body, maxBody)
	if r.Header.Get("Content-Encoding") != "gzip" {
		return io.ReadAll(reader)
	}
	unzipped, err := gzip.NewReader(reader)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(unzipped, maxBody))
}

func requestID() string {
	var raw [16]byte
	// It never fails.
	_, _ = rand.Read(raw[:])
	text := hex.EncodeToString(raw[:])
	return strings.Join([]string{text[:8], text[8:12], text[12:16], text[16:20], text[20:]}, "-")
}

// authenticate looks at who asks, when and where. The signature itself isn't
// computed again.
func (c *Cloud) authenticate(s *service, r *http.Request, key, regionName string) *Error {
	if _, ok := c.options.Credentials[key]; !ok {
		return s.codes.unknownKey
	}
	// A region that the account has not opted in to answers like this too.
	if c.regions[regionName] == nil {
		return s.codes.unknownKey
	}
	date, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		return s.codes.expired
	}
	if off := c.clock.Now().Sub(date); off > maxSkew || off < -maxSkew {
		return s.codes.expired
	}
	return nil
}

// serve carries a request out that was decoded.
func (c *Cloud) serve(ctx context.Context, w http.ResponseWriter, s *service, id, action, regionName string, values url.Values) {
	request := Request{
		Service: s.name, Action: action, Region: regionName, Params: values,
		DryRun: s.dryRun && values.Get("DryRun") == "true", Time: c.clock.Now(),
	}
	h, known := s.actions[action]
	request.Mutates = known && h.mutates && !request.DryRun

	c.mu.Lock()
	request.Grants = c.grantsOf(regionName, values)
	logged := request
	c.requests = append(c.requests, &logged)
	intercept := c.intercept
	c.mu.Unlock()

	var intervention Intervention
	if intercept != nil {
		intervention = intercept(request)
	}
	if intervention.Before != nil {
		if err := intervention.Before(ctx); err != nil {
			c.mu.Lock()
			logged.Lost = true
			c.mu.Unlock()
			panic(http.ErrAbortHandler)
		}
	}
	result, fault := any(nil), intervention.Refuse
	if fault == nil {
		result, fault = c.carryOut(s, h, known, request, id)
	}
	lost := intervention.After != nil && intervention.After()

	c.mu.Lock()
	if fault != nil {
		logged.Answer = fault.Code
	}
	logged.Lost = lost
	c.mu.Unlock()

	switch {
	case lost:
		// The server closes the connection and says nothing.
		panic(http.ErrAbortHandler)
	case fault != nil:
		s.refuse(w, id, fault)
	default:
		s.answer(w, id, action, result)
	}
}

// carryOut reads the parameters and has the effect.
func (c *Cloud) carryOut(s *service, h handler, known bool, request Request, id string) (any, *Error) {
	if !known {
		return nil, s.unknownAction(request.Action)
	}
	bucket, limit := request.Action, h.tokens
	if h.unfiltered.Burst > 0 && !request.Params.Has("Filter.1.Name") && !request.Params.Has("MaxResults") && !request.Params.Has("NextToken") {
		bucket, limit = bucket+" unfiltered", h.unfiltered
	}
	if !c.take(request.Region, request.Service, bucket, limit, 1) {
		return nil, s.codes.throttled
	}
	p := newParams(request.Params)
	if s.dryRun {
		p.boolean("DryRun", false)
	}
	run := h.prepare(&call{cloud: c, region: c.regions[request.Region], params: p, id: id})
	if fault := p.done(); fault != nil {
		return nil, fault
	}
	c.mu.Lock()
	denied := c.denied[request.Service+":"+request.Action]
	c.mu.Unlock()
	if denied {
		return nil, s.codes.denied
	}
	if request.DryRun {
		return nil, &Error{
			Status: http.StatusPreconditionFailed, Code: "DryRunOperation",
			Message: "Request would have succeeded, but DryRun flag is set.",
		}
	}
	return run()
}

// take takes tokens out of a bucket, which every region has of its own.
func (c *Cloud) take(regionName, serviceName, what string, limit cloudsim.Limit, n int) bool {
	if c.options.NoBuckets || limit.Burst == 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := regionName + " " + serviceName + " " + what
	// Real time: what is measured is the caller, and not the cloud.
	now := time.Now()
	if c.buckets[name] == nil {
		c.buckets[name] = cloudsim.NewBucket(limit, now)
	}
	return c.buckets[name].Take(float64(n), now)
}

// Actions are all that is served, by service and action ("ec2:RunInstances").
func (c *Cloud) Actions() []string {
	var names []string
	for _, s := range c.services {
		for action := range s.actions {
			names = append(names, s.name+":"+action)
		}
	}
	slices.Sort(names)
	return names
}

// Deny takes a permission away ("ec2:RunInstances"), or all that are named; Allow
// gives them back.
func (c *Cloud) Deny(actions ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, action := range actions {
		c.denied[action] = true
	}
}

// Allow gives back what Deny took.
func (c *Cloud) Allow(actions ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, action := range actions {
		delete(c.denied, action)
	}
}

// grantsOf finds the grants that a request is for. The caller holds mu.
func (c *Cloud) grantsOf(regionName string, values url.Values) []string {
	r := c.regions[regionName]
	found := map[string]bool{}
	for name, given := range values {
		value := given[0]
		if parent, isKey := strings.CutSuffix(name, ".Key"); isKey && value == ec2tags.Grant {
			found[values.Get(parent+".Value")] = true
		}
		if parent, isName := strings.CutSuffix(name, ".Name"); isName && value == "tag:"+ec2tags.Grant {
			for other, pattern := range values {
				if strings.HasPrefix(other, parent+".Value.") {
					found[pattern[0]] = true
				}
			}
		}
		// Whatever it calls the resource: in a filter, a list, or the input of a
		// schedule.
		for _, id := range resourceID.FindAllString(value, -1) {
			found[r.tagsOf(id)[ec2tags.Grant]] = true
		}
		if s := r.schedules[value]; s != nil {
			for _, id := range resourceID.FindAllString(s.Input, -1) {
				found[r.tagsOf(id)[ec2tags.Grant]] = true
			}
		}
		if token := r.tokens[value]; token != nil && len(token.instances) > 0 {
			found[token.instances[0].Tags[ec2tags.Grant]] = true
		}
	}
	delete(found, "")
	return slices.Sorted(maps.Keys(found))
}

var resourceID = regexp.MustCompile(`\b(i|vol|eni)-[0-9a-f]{17}\b`)

// tagsOf are the tags of a resource, of whichever kind.
func (r *region) tagsOf(id string) map[string]string {
	if i := r.instances[id]; i != nil {
		return i.Tags
	}
	if v := r.volumes[id]; v != nil {
		return v.Tags
	}
	if n := r.interfaces[id]; n != nil {
		return n.Tags
	}
	if g := r.groups[id]; g != nil {
		return g.Tags
	}
	return nil
}
