package ec2sim

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

// ssm is Systems Manager, as far as its public parameters name images.
func (c *Cloud) ssm() *service {
	return &service{
		name: "ssm",
		actions: map[string]handler{
			// https://docs.aws.amazon.com/general/latest/gr/ssm.html
			"GetParameter": {prepare: getParameter, tokens: cloudsim.Limit{Burst: 40, PerSecond: 40}},
		},
		decode: func(r *http.Request, body []byte) (string, url.Values, *Error) {
			action, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "AmazonSSM.")
			if !ok || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
				return "", nil, refusal("UnknownOperationException", "")
			}
			values, err := flattenJSON(body)
			return action, values, err
		},
		unknownAction: func(string) *Error { return refusal("UnknownOperationException", "") },
		answer: func(w http.ResponseWriter, _, _ string, result any) {
			writeJSON(w, http.StatusOK, "application/x-amz-json-1.1", result)
		},
		refuse: func(w http.ResponseWriter, id string, err *Error) {
			w.Header().Set("X-Amzn-Requestid", id)
			writeJSON(w, err.Status, "application/x-amz-json-1.1", map[string]any{"__type": err.Code, "message": err.Message})
		},
		codes: codesJSON(),
	}
}

// codesJSON are the common errors of the services that speak JSON.
func codesJSON() codes {
	return codes{
		unknownKey: refusal("UnrecognizedClientException", "The security token included in the request is invalid."),
		expired:    refusal("InvalidSignatureException", "Signature expired: it is not of this time"),
		denied:     refusal("AccessDeniedException", "User: %s is not authorized to perform the operation", Caller),
		throttled:  refusal("ThrottlingException", "Rate exceeded"),
	}
}

func getParameter(q *call) effect {
	name := q.params.required("Name")
	q.params.boolean("WithDecryption", false)
	return func() (any, *Error) {
		for _, image := range q.region.Images {
			if image.Parameter != "" && image.Parameter == name {
				return map[string]any{"Parameter": map[string]any{
					"ARN":  fmt.Sprintf("arn:aws:ssm:%s::parameter%s", q.region.Name, name),
					"Name": name, "Type": "String", "Value": image.ID, "Version": 1, "DataType": "aws:ec2:image",
					"LastModifiedDate": seconds(image.Created),
				}}, nil
			}
		}
		return nil, refusal("ParameterNotFound", "")
	}
}

// seconds is a time as the JSON protocols have it.
func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func writeJSON(w http.ResponseWriter, status int, contentType string, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	write(w, status, contentType, body)
}

// flattenJSON reads an object into the flattened form of the query protocol.
func flattenJSON(body []byte) (url.Values, *Error) {
	values := url.Values{}
	if len(body) == 0 {
		return values, nil
	}
	var object map[string]any
	if err := json.Unmarshal(body, &object); err != nil {
		return nil, refusal("SerializationException", "%v", err)
	}
	flatten(values, "", object, "")
	return values, nil
}

// flatten adds a value under a name; list is what lists have between their name
// and their numbers.
func flatten(values url.Values, name string, value any, list string) {
	switch value := value.(type) {
	case nil:
	case map[string]any:
		for key, below := range value {
			if name != "" {
				key = name + "." + key
			}
			flatten(values, key, below, list)
		}
	case []any:
		for i, below := range value {
			flatten(values, name+list+"."+strconv.Itoa(i+1), below, list)
		}
	case float64:
		values.Set(name, strconv.FormatFloat(value, 'f', -1, 64))
	default:
		values.Set(name, fmt.Sprint(value))
	}
}
