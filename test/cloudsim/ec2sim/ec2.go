package ec2sim

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

const (
	ec2Version   = "2016-11-15"
	ec2Namespace = "http://ec2.amazonaws.com/doc/2016-11-15/"
)

// bucket is a kind of token bucket.
type bucket int

const (
	bucketRead bucket = iota
	// bucketUnfiltered is what some of the reads take from that have neither a
	// filter nor a page.
	bucketUnfiltered
	bucketMutating
	bucketTags
	bucketRunInstances
	// bucketEnd is TerminateInstances', DeleteVolume's and DeleteNetworkInterface's.
	bucketEnd
	// Two actions have a second bucket, from which each instance takes a token.
	resourcesRun
	resourcesTerminate
)

// limits are those of EC2's buckets, of which every region has its own, one for
// each action
// (https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html).
var limits = map[bucket]cloudsim.Limit{
	bucketRead:         {Burst: 100, PerSecond: 20},
	bucketUnfiltered:   {Burst: 50, PerSecond: 10},
	bucketMutating:     {Burst: 50, PerSecond: 5},
	bucketTags:         {Burst: 100, PerSecond: 10},
	bucketRunInstances: {Burst: 5, PerSecond: 2},
	bucketEnd:          {Burst: 100, PerSecond: 5},
	resourcesRun:       {Burst: 1000, PerSecond: 2},
	resourcesTerminate: {Burst: 1000, PerSecond: 20},
}

// ec2 is EC2's query protocol.
func (c *Cloud) ec2() *service {
	return &service{
		name:   "ec2",
		dryRun: true,
		actions: map[string]handler{
			"RunInstances":                  {mutates: true, prepare: runInstances, tokens: limits[bucketRunInstances]},
			"TerminateInstances":            {mutates: true, prepare: terminateInstances, tokens: limits[bucketEnd]},
			"DescribeInstances":             {prepare: describeInstances, tokens: limits[bucketRead], unfiltered: limits[bucketUnfiltered]},
			"DescribeVolumes":               {prepare: describeVolumes, tokens: limits[bucketRead], unfiltered: limits[bucketUnfiltered]},
			"DescribeNetworkInterfaces":     {prepare: describeInterfaces, tokens: limits[bucketRead], unfiltered: limits[bucketUnfiltered]},
			"DescribeInstanceTypes":         {prepare: describeInstanceTypes, tokens: limits[bucketRead]},
			"DescribeInstanceTypeOfferings": {prepare: describeOfferings, tokens: limits[bucketRead]},
			"DescribeImages":                {prepare: describeImages, tokens: limits[bucketRead]},
			"DescribeVpcs":                  {prepare: describeVPCs, tokens: limits[bucketRead]},
			"DescribeSubnets":               {prepare: describeSubnets, tokens: limits[bucketRead]},
			"DescribeSecurityGroups":        {prepare: describeGroups, tokens: limits[bucketRead], unfiltered: limits[bucketUnfiltered]},
			"CreateSecurityGroup":           {mutates: true, prepare: createGroup, tokens: limits[bucketMutating]},
			"DeleteSecurityGroup":           {mutates: true, prepare: deleteGroup, tokens: limits[bucketMutating]},
			"AuthorizeSecurityGroupIngress": {mutates: true, prepare: authorizeGroup(false), tokens: limits[bucketMutating]},
			"AuthorizeSecurityGroupEgress":  {mutates: true, prepare: authorizeGroup(true), tokens: limits[bucketMutating]},
			"RevokeSecurityGroupEgress":     {mutates: true, prepare: revokeEgress, tokens: limits[bucketMutating]},
			"GetConsoleOutput":              {prepare: getConsoleOutput, tokens: limits[bucketRead]},
			"CreateTags":                    {mutates: true, prepare: createTags, tokens: limits[bucketTags]},
			"DeleteVolume":                  {mutates: true, prepare: deleteVolume, tokens: limits[bucketEnd]},
			"DeleteNetworkInterface":        {mutates: true, prepare: deleteInterface, tokens: limits[bucketEnd]},
			"DescribeManagedPrefixLists":    {prepare: describePrefixLists, tokens: limits[bucketRead]},
			"GetManagedPrefixListEntries":   {prepare: getPrefixListEntries, tokens: limits[bucketRead]},
		},
		decode: decodeQuery(ec2Version),
		unknownAction: func(action string) *Error {
			return refusal("InvalidAction", "The action %s is not valid for this web service.", action)
		},
		answer: func(w http.ResponseWriter, id, action string, result any) {
			kids, _ := result.([]element)
			body := document(action+"Response", ec2Namespace, append([]element{text("requestId", id)}, kids...)...)
			write(w, http.StatusOK, "text/xml;charset=UTF-8", body)
		},
		refuse: func(w http.ResponseWriter, id string, err *Error) {
			body := document("Response", "",
				node("Errors", node("Error", text("Code", err.Code), text("Message", err.Message))), text("RequestID", id))
			write(w, err.Status, "text/xml;charset=UTF-8", body)
		},
		codes: codes{
			unknownKey: &Error{Status: http.StatusUnauthorized, Code: "AuthFailure", Message: "AWS was not able to validate the provided access credentials"},
			expired:    refusal("RequestExpired", "Request has expired."),
			denied:     Unauthorized(),
			throttled:  Throttled(),
		},
	}
}

// decodeQuery reads the query protocol, whose version is the API's.
func decodeQuery(version string) func(*http.Request, []byte) (string, url.Values, *Error) {
	return func(r *http.Request, body []byte) (string, url.Values, *Error) {
		if r.Method != http.MethodPost || r.URL.Path != "/" || r.URL.RawQuery != "" ||
			!strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded") {
			return "", nil, refusal("InvalidRequest", "The request must be a form that is posted to /")
		}
		values, err := url.ParseQuery(string(body))
		if err != nil {
			return "", nil, refusal("MalformedQueryString", "The query string contains a syntax error")
		}
		action := values.Get("Action")
		if action == "" {
			return "", nil, refusal("MissingAction", "The request is missing an action or a required parameter.")
		}
		if values.Get("Version") != version {
			return "", nil, refusal("NoSuchVersion", "The requested version (%s) is not valid", values.Get("Version"))
		}
		values.Del("Action")
		values.Del("Version")
		return action, values, nil
	}
}

func write(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	// A caller that is gone doesn't read what is said.
	_, _ = w.Write(body)
}
