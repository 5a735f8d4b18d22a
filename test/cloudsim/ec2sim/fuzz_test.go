package ec2sim_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

// FuzzRequests has any request answered, with a status that a client understands.
func FuzzRequests(f *testing.F) {
	f.Add("ec2", http.MethodPost, "/", "Action=DescribeInstances&Version=2016-11-15&Filter.1.Name=tag:a&Filter.1.Value.1=*?\\")
	f.Add("ec2", http.MethodPost, "/", "Action=RunInstances&Version=2016-11-15&NetworkInterface.1.DeviceIndex=0&UserData=x")
	f.Add("sts", http.MethodPost, "/", "Action=GetCallerIdentity&Version=2011-06-15")
	f.Add("ssm", http.MethodPost, "/", `{"Name":["x",{"y":1}]}`)
	f.Add("scheduler", http.MethodPost, "/schedules/a", `{"Target":{"Input":"{}"}}`)
	f.Add("scheduler", http.MethodGet, "/schedules?=1&maxResults=2", "")
	f.Add("monitoring", http.MethodPost, "/service/GraniteServiceVersion20100801/operation/GetMetricData", "\xa1aa\x80")
	cloud := ec2sim.New(ec2sim.Options{Machines: &racks{}, NoBuckets: true})
	f.Cleanup(cloud.Close)
	f.Fuzz(func(t *testing.T, service, method, target, body string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://cloud", strings.NewReader(body))
		if err != nil {
			return
		}
		if r.URL, err = r.URL.Parse(target); err != nil {
			return
		}
		contentTypes := map[string]string{"ec2": "application/x-www-form-urlencoded", "sts": "application/x-www-form-urlencoded", "ssm": "application/x-amz-json-1.1", "monitoring": "application/cbor"}
		r.Header.Set("Content-Type", contentTypes[service])
		r.Header.Set("X-Amz-Target", "AmazonSSM.GetParameter")
		if service == "monitoring" {
			r.Header.Set("Smithy-Protocol", "rpc-v2-cbor")
		}
		r.Header.Set("X-Amz-Date", time.Now().UTC().Format("20060102T150405Z"))
		r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+ec2sim.AccessKeyID+"/20261123/eu-central-1/"+service+
			"/aws4_request, SignedHeaders=host, Signature="+strings.Repeat("0", 64))
		w := httptest.NewRecorder()
		cloud.ServeHTTP(w, r)
		if w.Code < 200 || w.Code > 599 || w.Code >= 400 && w.Body.Len() == 0 {
			t.Errorf("%s %s answered %d with %d bytes", method, target, w.Code, w.Body.Len())
		}
	})
}
