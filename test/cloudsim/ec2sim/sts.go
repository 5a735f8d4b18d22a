package ec2sim

import (
	"net/http"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

const stsNamespace = "https://sts.amazonaws.com/doc/2011-06-15/"

// Caller is who all requests come from.
const Caller = "arn:aws:iam::" + Account + ":user/compute-bridge"

// sts is the Security Token Service, as far as it says who the caller is.
func (c *Cloud) sts() *service {
	return &service{
		name: "sts",
		actions: map[string]handler{
			"GetCallerIdentity": {prepare: getCallerIdentity, tokens: cloudsim.Limit{Burst: 600, PerSecond: 600}},
		},
		decode:        decodeQuery("2011-06-15"),
		unknownAction: invalidAction,
		answer:        answerQuery(stsNamespace),
		refuse:        refuseQuery(stsNamespace),
		codes: codes{
			unknownKey: &Error{Status: http.StatusForbidden, Code: "InvalidClientTokenId", Message: "The security token included in the request is invalid."},
			expired:    &Error{Status: http.StatusForbidden, Code: "SignatureDoesNotMatch", Message: "Signature expired: it is not of this time"},
			denied:     &Error{Status: http.StatusForbidden, Code: "AccessDenied", Message: "User: " + Caller + " is not authorized to perform the operation"},
			throttled:  refusal("Throttling", "Rate exceeded"),
		},
	}
}

func getCallerIdentity(*call) effect {
	return func() (any, *Error) {
		return []element{text("UserId", "AIDATESTCOMPUTEBRIDG"), text("Account", Account), text("Arn", Caller)}, nil
	}
}

func invalidAction(action string) *Error {
	return refusal("InvalidAction", "Could not find operation %s", action)
}

// answerQuery and refuseQuery write the query protocol of all services but EC2.
func answerQuery(namespace string) func(http.ResponseWriter, string, string, any) {
	return func(w http.ResponseWriter, id, action string, result any) {
		kids, _ := result.([]element)
		write(w, http.StatusOK, "text/xml", document(action+"Response", namespace,
			node(action+"Result", kids...), node("ResponseMetadata", text("RequestId", id))))
	}
}

func refuseQuery(namespace string) func(http.ResponseWriter, string, *Error) {
	return func(w http.ResponseWriter, id string, err *Error) {
		fault := "Sender"
		if err.Status >= http.StatusInternalServerError {
			fault = "Receiver"
		}
		write(w, err.Status, "text/xml", document("ErrorResponse", namespace,
			node("Error", text("Type", fault), text("Code", err.Code), text("Message", err.Message)), text("RequestId", id)))
	}
}
