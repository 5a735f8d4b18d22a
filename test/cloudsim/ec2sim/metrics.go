package ec2sim

import (
	"encoding/base64"
	"errors"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/smithy-go/encoding/cbor"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

const (
	metricsNamespace = "http://monitoring.amazonaws.com/doc/2010-08-01/"
	// Instances send figures every five minutes, or every minute where they are
	// watched in detail
	// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/manage-detailed-monitoring.html).
	figuresEvery         = 5 * time.Minute
	figuresEveryDetailed = time.Minute
	// figuresLate is how long they take until they can be read.
	figuresLate = 2 * time.Minute
	// Limits of GetMetricData's page.
	maxMetricQueries = 500
	maxDatapoints    = 100800
)

// What every running instance shows, unless a test records something else: its
// CPUs' use in per cent, and bytes per second.
const (
	FigureCPU        = 25.0
	FigureNetworkIn  = 1000.0
	FigureNetworkOut = 2000.0
	FigureEBSRead    = 3000.0
	FigureEBSWrite   = 4000.0
)

var figures = map[string]struct {
	perSecond float64
	// level is a figure that doesn't add up.
	level float64
}{
	"CPUUtilization": {level: FigureCPU},
	"NetworkIn":      {perSecond: FigureNetworkIn},
	"NetworkOut":     {perSecond: FigureNetworkOut},
	"EBSReadBytes":   {perSecond: FigureEBSRead},
	"EBSWriteBytes":  {perSecond: FigureEBSWrite},
}

// sample is one figure.
type sample struct {
	at      time.Time
	visible time.Time
	value   float64
}

// Record has an instance show a figure; from the first on it shows nothing but
// what is recorded, of that metric.
func (c *Cloud) Record(instance, metric string, at time.Time, value float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range c.history {
		if i.ID == instance {
			r, key := c.regions[i.Region], instance+" "+metric
			r.samples[key] = append(r.samples[key], sample{at: at, visible: c.clock.Now().Add(c.clock.Scale(figuresLate)), value: value})
		}
	}
}

// metrics is CloudWatch, as far as it has figures of instances. It speaks the two
// protocols that clients do: CBOR, which the newer ones choose, and query.
func (c *Cloud) metrics() *service {
	return &service{
		name: "monitoring",
		actions: map[string]handler{
			// https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/cloudwatch_limits.html
			"GetMetricData": {prepare: getMetricData, tokens: cloudsim.Limit{Burst: 50, PerSecond: 50}},
		},
		decode: func(r *http.Request, body []byte) (string, url.Values, *Error) {
			if r.Header.Get("Smithy-Protocol") != "rpc-v2-cbor" {
				return decodeQuery("2010-08-01")(r, body)
			}
			action, ok := strings.CutPrefix(r.URL.Path, "/service/GraniteServiceVersion20100801/operation/")
			if !ok || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/cbor" {
				return "", nil, refusal("UnknownOperationException", "no such operation")
			}
			decoded, err := cbor.Decode(body)
			if err != nil {
				return "", nil, refusal("SerializationException", "%v", err)
			}
			plain, err := fromCBOR(decoded)
			if err != nil {
				return "", nil, refusal("SerializationException", "%v", err)
			}
			values := url.Values{}
			flatten(values, "", plain, ".member")
			return action, values, nil
		},
		unknownAction: invalidAction,
		answer:        answerMetrics,
		refuse:        refuseMetrics,
		codes: codes{
			unknownKey: &Error{Status: http.StatusForbidden, Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid."},
			expired:    &Error{Status: http.StatusForbidden, Code: "SignatureDoesNotMatch", Message: "Signature expired: it is not of this time"},
			denied:     &Error{Status: http.StatusForbidden, Code: "AccessDenied", Message: "User: " + Caller + " is not authorized to perform the operation"},
			throttled:  refusal("Throttling", "Rate exceeded"),
		},
	}
}

// fromCBOR makes what flatten reads of a value.
func fromCBOR(value cbor.Value) (any, error) {
	switch value := value.(type) {
	case cbor.Map:
		object := map[string]any{}
		for key, below := range value {
			plain, err := fromCBOR(below)
			if err != nil {
				return nil, err
			}
			object[key] = plain
		}
		return object, nil
	case cbor.List:
		list := make([]any, len(value))
		for i, below := range value {
			plain, err := fromCBOR(below)
			if err != nil {
				return nil, err
			}
			list[i] = plain
		}
		return list, nil
	case *cbor.Tag:
		at, err := cbor.AsTime(value)
		if err != nil {
			return nil, err
		}
		return at.UTC().Format(time.RFC3339Nano), nil
	case cbor.String:
		return string(value), nil
	case cbor.Bool:
		return bool(value), nil
	case cbor.Uint, cbor.NegInt:
		return cbor.AsInt64(value)
	case cbor.Float32, cbor.Float64:
		return cbor.AsFloat64(value)
	case *cbor.Nil, *cbor.Undefined:
		return nil, nil
	default:
		return nil, errors.New("a type that no parameter has")
	}
}

// metricResult is a query's answer.
type metricResult struct {
	id, label string
	points    []point
	partial   bool
}

type point struct {
	at    time.Time
	value float64
}

// metricAnswer is GetMetricData's, in whichever protocol.
type metricAnswer struct {
	results []metricResult
	token   string
}

func (r metricResult) status() string {
	if r.partial {
		return "PartialData"
	}
	return "Complete"
}

// answerMetrics answers in the protocol of the request: its header was noted in
// the answer's.
func answerMetrics(w http.ResponseWriter, id, action string, result any) {
	answer, _ := result.(metricAnswer)
	if !speaksCBOR(w) {
		list := element{name: "MetricDataResults"}
		for _, r := range answer.results {
			timestamps, values := element{name: "Timestamps"}, element{name: "Values"}
			for _, p := range r.points {
				timestamps.kids = append(timestamps.kids, text("member", p.at.UTC().Format(time.RFC3339)))
				values.kids = append(values.kids, text("member", strconv.FormatFloat(p.value, 'g', -1, 64)))
			}
			list.kids = append(list.kids, node("member", text("Id", r.id), text("Label", r.label), timestamps, values, text("StatusCode", r.status())))
		}
		answerQuery(metricsNamespace)(w, id, action, []element{list, optional("NextToken", answer.token), node("Messages")})
		return
	}
	list := cbor.List{}
	for _, r := range answer.results {
		timestamps, values := cbor.List{}, cbor.List{}
		for _, p := range r.points {
			timestamps = append(timestamps, &cbor.Tag{ID: 1, Value: cbor.Float64(seconds(p.at))})
			values = append(values, cbor.Float64(p.value))
		}
		list = append(list, cbor.Map{
			"Id": cbor.String(r.id), "Label": cbor.String(r.label), "Timestamps": timestamps, "Values": values,
			"StatusCode": cbor.String(r.status()),
		})
	}
	body := cbor.Map{"MetricDataResults": list, "Messages": cbor.List{}}
	if answer.token != "" {
		body["NextToken"] = cbor.String(answer.token)
	}
	w.Header().Set("X-Amzn-Requestid", id)
	write(w, http.StatusOK, "application/cbor", cbor.Encode(body))
}

// metricErrors are the errors that CloudWatch's model has, by their codes in the
// query protocol. In CBOR they go by the names of their shapes, and what they say
// is in a member that not all of them call the same.
// https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_Operations.html
var metricErrors = map[string]struct{ shape, message string }{
	"InternalServiceError":        {"InternalServiceFault", "Message"},
	"InternalServiceFault":        {"InternalServiceFault", "Message"}, // as the pages of calls have it
	"InvalidFormat":               {"InvalidFormatFault", "message"},
	"InvalidNextToken":            {"InvalidNextToken", "message"},
	"InvalidParameterCombination": {"InvalidParameterCombinationException", "message"},
	"InvalidParameterValue":       {"InvalidParameterValueException", "message"},
	"LimitExceeded":               {"LimitExceededFault", "message"},
	"LimitExceededException":      {"LimitExceededException", "Message"},
	"MissingParameter":            {"MissingRequiredParameterException", "message"},
	"ResourceNotFound":            {"ResourceNotFound", "message"},
}

func refuseMetrics(w http.ResponseWriter, id string, err *Error) {
	if !speaksCBOR(w) {
		refuseQuery(metricsNamespace)(w, id, err)
		return
	}
	fault := "Sender"
	if err.Status >= http.StatusInternalServerError {
		fault = "Receiver"
	}
	known, ok := metricErrors[err.Code]
	if !ok {
		known.shape, known.message = err.Code, "message"
	}
	w.Header().Set("X-Amzn-Requestid", id)
	// The code of the query protocol, for clients that know no other.
	// https://smithy.io/2.0/aws/protocols/aws-query-protocol.html#aws-protocols-awsquerycompatible-trait
	w.Header().Set("X-Amzn-Query-Error", err.Code+";"+fault)
	write(w, err.Status, "application/cbor", cbor.Encode(cbor.Map{
		"__type": cbor.String("com.amazonaws.cloudwatch#" + known.shape), known.message: cbor.String(err.Message),
	}))
}

// speaksCBOR says whether the answer is to be in CBOR.
func speaksCBOR(w http.ResponseWriter) bool { return w.Header().Get("Smithy-Protocol") != "" }

// metricQuery is one of a request's.
type metricQuery struct {
	id, label, instance, metric, stat string
	period                            time.Duration
}

var metricQueryID = regexp.MustCompile(`^[a-z][a-zA-Z0-9_]{0,254}$`)

func getMetricData(q *call) effect {
	p := q.params
	from, to := readTime(p, "StartTime"), readTime(p, "EndTime")
	if !from.Before(to) {
		p.fail(refusal("ValidationError", "The parameter StartTime must be less than the parameter EndTime."))
	}
	descending := p.oneOf("ScanBy", "TimestampDescending", "TimestampAscending") == "TimestampDescending"
	most := p.integer("MaxDatapoints", maxDatapoints)
	if most < 1 || most > maxDatapoints {
		p.fail(refusal("ValidationError", "The parameter MaxDatapoints must be from 1 to %d.", maxDatapoints))
	}
	skip := readMetricToken(p)
	var queries []metricQuery
	seen := map[string]bool{}
	for _, below := range p.below("MetricDataQueries").structs("member") {
		one := readMetricQuery(below)
		if seen[one.id] {
			p.fail(refusal("ValidationError", "The values for parameter id in MetricDataQueries are not unique."))
		}
		seen[one.id] = true
		queries = append(queries, one)
	}
	if len(queries) == 0 || len(queries) > maxMetricQueries {
		p.fail(refusal("ValidationError", "The collection MetricDataQueries must have from 1 to %d members.", maxMetricQueries))
	}
	return func() (any, *Error) {
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		var answer metricAnswer
		// A page ends after so many points, wherever that is.
		passed, left := int64(0), most
		for _, one := range queries {
			result := metricResult{id: one.id, label: one.label, points: q.cloud.points(q.region, one, from, to)}
			if descending {
				slices.Reverse(result.points)
			}
			all := int64(len(result.points))
			start := min(all, max(0, skip-passed))
			end := min(all, start+left)
			result.points, result.partial = result.points[start:end], end < all
			passed, left = passed+all, left-(end-start)
			answer.results = append(answer.results, result)
			if result.partial {
				answer.token = base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(skip+most, 10)))
			}
		}
		return answer, nil
	}
}

func readMetricToken(p params) int64 {
	token := p.text("NextToken")
	if token == "" {
		return 0
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	skip, numberErr := strconv.ParseInt(string(raw), 10, 64)
	if err != nil || numberErr != nil {
		p.fail(refusal("InvalidNextToken", "The next token specified is invalid."))
	}
	return skip
}

func readTime(p params, name string) time.Time {
	value := p.required(name)
	at, err := time.Parse(time.RFC3339Nano, value)
	if err != nil {
		p.fail(refusal("ValidationError", "The value '%s' of the parameter %s is no time.", value, name))
	}
	return at
}

func readMetricQuery(p params) metricQuery {
	stat := p.below("MetricStat")
	metric := stat.below("Metric")
	one := metricQuery{
		id: p.required("Id"), metric: metric.required("MetricName"),
		stat:   stat.oneOf("Stat", "", "Average", "Sum", "Minimum", "Maximum", "SampleCount"),
		period: time.Duration(stat.integer("Period", 0)) * time.Second,
	}
	one.label = p.text("Label")
	if one.label == "" {
		one.label = one.metric
	}
	stat.text("Unit")
	if !p.boolean("ReturnData", true) {
		p.fail(refusal("ValidationError", "A query without an expression must return data here."))
	}
	if !metricQueryID.MatchString(one.id) {
		p.fail(refusal("ValidationError", "The value '%s' of the parameter Id is not valid.", one.id))
	}
	if one.stat == "" || one.period < time.Minute || one.period%time.Minute != 0 {
		p.fail(refusal("ValidationError", "A query needs a Stat and a Period that is a multiple of 60."))
	}
	if metric.required("Namespace") != "AWS/EC2" {
		p.fail(refusal("ValidationError", "Only the namespace AWS/EC2 is simulated."))
	}
	for _, dimension := range metric.below("Dimensions").structs("member") {
		name, value := dimension.required("Name"), dimension.required("Value")
		if name != "InstanceId" {
			p.fail(refusal("ValidationError", "Only the dimension InstanceId is simulated."))
		}
		one.instance = value
	}
	return one
}

// points are a query's figures by period, oldest first. The caller holds mu.
func (c *Cloud) points(r *region, q metricQuery, from, to time.Time) []point {
	now := c.clock.Now()
	periods := map[time.Time][]float64{}
	for _, s := range c.samplesOf(r, q.instance, q.metric) {
		start := s.at.Truncate(q.period)
		if s.visible.After(now) || start.Before(from.Truncate(q.period)) || !start.Before(to) {
			continue
		}
		periods[start] = append(periods[start], s.value)
	}
	points := make([]point, 0, len(periods))
	for start, values := range periods {
		sum := 0.0
		for _, value := range values {
			sum += value
		}
		value := map[string]float64{
			"Average": sum / float64(len(values)), "Sum": sum, "SampleCount": float64(len(values)),
			"Minimum": slices.Min(values), "Maximum": slices.Max(values),
		}[q.stat]
		points = append(points, point{at: start, value: value})
	}
	slices.SortFunc(points, func(a, b point) int { return a.at.Compare(b.at) })
	return points
}

// samplesOf are an instance's figures: those that were recorded, or one for each
// interval that it has run. The caller holds mu.
func (c *Cloud) samplesOf(r *region, instanceID, metric string) []sample {
	if recorded := r.samples[instanceID+" "+metric]; recorded != nil {
		return recorded
	}
	figure, known := figures[metric]
	n := slices.IndexFunc(c.history, func(i *instance) bool { return i.ID == instanceID && i.Region == r.Name })
	if !known || n < 0 || c.history[n].started.IsZero() {
		return nil
	}
	i := c.history[n]
	every := c.clock.Scale(figuresEvery)
	if i.detailed {
		every = c.clock.Scale(figuresEveryDetailed)
	}
	// Not more often than somebody could want to look.
	every = max(every, 100*time.Millisecond)
	end := c.clock.Now()
	if !i.Terminated.IsZero() {
		end = i.Terminated
	}
	var samples []sample
	for at := i.started; !at.Add(every).After(end); at = at.Add(every) {
		value := figure.level
		if figure.perSecond > 0 {
			value = math.Round(figure.perSecond * every.Seconds())
		}
		samples = append(samples, sample{at: at, visible: at.Add(every).Add(c.clock.Scale(figuresLate)), value: value})
	}
	return samples
}
