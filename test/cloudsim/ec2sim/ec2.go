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

// The request token buckets of EC2's actions, which every region has of its own
// (https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html).
// Describe actions have the smaller bucket, that of calls without filters and
// pages: which of the two a call takes from is the service's to say.
var (
	bucketRead         = cloudsim.Limit{Burst: 50, PerSecond: 10}   //nolint:gochecknoglobals // a constant that Go can't declare
	bucketFiltered     = cloudsim.Limit{Burst: 100, PerSecond: 20}  //nolint:gochecknoglobals // a constant that Go can't declare
	bucketMutating     = cloudsim.Limit{Burst: 50, PerSecond: 5}    //nolint:gochecknoglobals // a constant that Go can't declare
	bucketRunInstances = cloudsim.Limit{Burst: 5, PerSecond: 2}     //nolint:gochecknoglobals // a constant that Go can't declare
	bucketTerminate    = cloudsim.Limit{Burst: 100, PerSecond: 5}   //nolint:gochecknoglobals // a constant that Go can't declare
	resourcesRun       = cloudsim.Limit{Burst: 1000, PerSecond: 2}  //nolint:gochecknoglobals // a constant that Go can't declare
	resourcesTerminate = cloudsim.Limit{Burst: 1000, PerSecond: 20} //nolint:gochecknoglobals // a constant that Go can't declare
)

// ec2 is EC2's query protocol.
func (c *Cloud) ec2() *service {
	return &service{
		name:   "ec2",
		dryRun: true,
		actions: map[string]handler{
			"RunInstances":                  {mutates: true, prepare: runInstances, tokens: bucketRunInstances},
			"TerminateInstances":            {mutates: true, prepare: terminateInstances, tokens: bucketTerminate},
			"DescribeInstances":             {prepare: describeInstances, tokens: bucketRead},
			"DescribeVolumes":               {prepare: describeVolumes, tokens: bucketRead},
			"DescribeNetworkInterfaces":     {prepare: describeInterfaces, tokens: bucketRead},
			"DescribeInstanceTypes":         {prepare: describeInstanceTypes, tokens: bucketFiltered},
			"DescribeInstanceTypeOfferings": {prepare: describeOfferings, tokens: bucketFiltered},
			"DescribeImages":                {prepare: describeImages, tokens: bucketRead},
			"DescribeVpcs":                  {prepare: describeVPCs, tokens: bucketFiltered},
			"DescribeSubnets":               {prepare: describeSubnets, tokens: bucketFiltered},
			"DescribeSecurityGroups":        {prepare: describeGroups, tokens: bucketRead},
			"CreateSecurityGroup":           {mutates: true, prepare: createGroup, tokens: bucketMutating},
			"DeleteSecurityGroup":           {mutates: true, prepare: deleteGroup, tokens: bucketMutating},
			"AuthorizeSecurityGroupIngress": {mutates: true, prepare: authorizeGroup(false), tokens: bucketMutating},
			"AuthorizeSecurityGroupEgress":  {mutates: true, prepare: authorizeGroup(true), tokens: bucketMutating},
			"RevokeSecurityGroupEgress":     {mutates: true, prepare: revokeEgress, tokens: bucketMutating},
			"GetConsoleOutput":              {prepare: getConsoleOutput, tokens: bucketFiltered},
			"CreateTags":                    {mutates: true, prepare: createTags, tokens: bucketMutating},
			"DeleteVolume":                  {mutates: true, prepare: deleteVolume, tokens: bucketMutating},
			"DeleteNetworkInterface":        {mutates: true, prepare: deleteInterface, tokens: bucketMutating},
			"DescribeManagedPrefixLists":    {prepare: describePrefixLists, tokens: bucketFiltered},
			"GetManagedPrefixListEntries":   {prepare: getPrefixListEntries, tokens: bucketFiltered},
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
