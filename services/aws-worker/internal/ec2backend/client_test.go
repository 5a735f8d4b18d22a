package ec2backend

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/config"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

const testRegion = "eu-central-1"

// credentialsFile writes a shared credentials file with one profile.
func credentialsFile(t *testing.T, profile, key, secret string) config.Path {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials")
	text := fmt.Sprintf("[%s]\naws_access_key_id = %s\naws_secret_access_key = %s\n", profile, key, secret)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return config.Path(path)
}

// validConfig is a configuration without a fault, for the cloud at an endpoint.
func validConfig(t *testing.T, endpoint string) Config {
	t.Helper()
	var c Config
	c.SetDefaults()
	c.Regions = []RegionConfig{{Name: testRegion, Image: ImageConfig{ID: "ami-0123456789abcdef0"}}}
	c.InstanceFamilies = []string{"t3", "m7i"}
	c.CredentialsFile = credentialsFile(t, "default", "AKIATESTCOMPUTEBRIDG", "a secret for tests")
	c.Endpoint = endpoint
	c.Guest.AMD64 = GuestBinary{SHA256: strings.Repeat("ab", 32), URL: "https://store.example/guest"}
	c.ImageStore.Base = "https://store.example/images"
	c.APILimits = []APILimitConfig{{Action: anyAction, Burst: maxRate, PerSecond: maxRate}}
	c.retryBackoff = 10 * time.Millisecond
	return c
}

func testEnv(t *testing.T) worker.Env {
	t.Helper()
	return worker.Env{BridgeID: "test", Backend: "aws", Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Metrics: prometheus.NewRegistry()}
}

func openClients(t *testing.T, c Config) *clients {
	t.Helper()
	all, err := newClients(t.Context(), c, testEnv(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(all.close)
	return all
}

// oneRegion are the clients of a cloud that answers each request with a handler.
func oneRegion(t *testing.T, answer http.HandlerFunc) *regionClients {
	t.Helper()
	server := httptest.NewServer(answer)
	t.Cleanup(server.Close)
	return openClients(t, validConfig(t, server.URL)).order[0]
}

// refuse answers as EC2 does when something is wrong.
func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	w.WriteHeader(status)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>%s</Code><Message>%s</Message></Error></Errors><RequestID>req-1</RequestID></Response>`, code, message)
}

func answerIdentity(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/xml")
	fmt.Fprint(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::123456789012:user/bridge</Arn><UserId>AIDA</UserId><Account>123456789012</Account></GetCallerIdentityResult>
<ResponseMetadata><RequestId>req-1</RequestId></ResponseMetadata></GetCallerIdentityResponse>`)
}

func TestARegionOutsideTheAllowlistIsRefusedByName(t *testing.T) {
	t.Parallel()
	all := openClients(t, validConfig(t, ""))
	_, err := all.region("us-east-1")
	if !backenderr.Is(err, backenderr.GrantNotSatisfiable) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
		t.Errorf("reason %s, created %s", backenderr.ReasonOf(err), backenderr.CreatedOf(err))
	}
	for _, name := range []string{"us-east-1", testRegion} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%q doesn't name %s", err, name)
		}
	}
	found, err := all.region(testRegion)
	if err != nil || found.name != testRegion {
		t.Errorf("region %s: %v, %v", testRegion, found, err)
	}
}

func TestAFileOfCredentialsComesBeforeTheEnvironment(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "of the environment")
	for _, profile := range []string{"default", "bridge"} {
		c := validConfig(t, "")
		c.CredentialsFile = credentialsFile(t, profile, "AKIAOFTHEFILE", "of the file")
		if profile != "default" {
			c.Profile = profile
		}
		got, err := openClients(t, c).aws.Credentials.Retrieve(t.Context())
		if err != nil || got.AccessKeyID != "AKIAOFTHEFILE" {
			t.Errorf("profile %s: key %q, %v", profile, got.AccessKeyID, err)
		}
	}
	c := validConfig(t, "")
	c.CredentialsFile = ""
	got, err := openClients(t, c).aws.Credentials.Retrieve(t.Context())
	if err != nil || got.AccessKeyID != "AKIAENVIRONMENT" {
		t.Errorf("without a file: key %q, %v", got.AccessKeyID, err)
	}
}

func TestMissingCredentialsSendNothing(t *testing.T) {
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer server.Close()
	c := validConfig(t, server.URL)
	c.CredentialsFile = ""
	_, err := openClients(t, c).order[0].ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)})
	if got := classify(err, "create"); got == nil || got.Reason != backenderr.ProviderUnauthenticated {
		t.Errorf("classified as %v", got)
	}
	if !refused(err) || asked.Load() != 0 {
		t.Errorf("refused: %t, %d requests; nothing can have been sent", refused(err), asked.Load())
	}
}

// Some environments name their own certificate authorities so; the SDK refuses
// HTTP clients of a type that it doesn't know.
func TestACABundleOfTheEnvironmentIsUsed(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answerIdentity(w) }))
	defer server.Close()
	bundle := filepath.Join(t.TempDir(), "ca.pem")
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(bundle, data, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", bundle)
	who, err := openClients(t, validConfig(t, server.URL)).order[0].sts.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
	if err != nil || aws.ToString(who.Account) != "123456789012" {
		t.Errorf("identity %v, %v", who, err)
	}
}

// The SDK's request bodies break connections in the middle of long answers that
// come at once; see plainBodies.
func TestLongAnswersArriveWhole(t *testing.T) {
	t.Parallel()
	const n = 200
	var long strings.Builder
	long.WriteString(`<DescribeVolumesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><volumeSet>`)
	for i := range n {
		fmt.Fprintf(&long, "<item><volumeId>vol-%017x</volumeId><status>in-use</status></item>", i)
	}
	long.WriteString("</volumeSet></DescribeVolumesResponse>")
	var asked atomic.Int32
	r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		fmt.Fprint(w, long.String())
	})
	const calls = 100
	for range calls {
		answer, err := r.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{})
		if err != nil || len(answer.Volumes) != n {
			t.Fatal(err)
		}
	}
	if asked.Load() != calls {
		t.Errorf("%d requests for %d calls", asked.Load(), calls)
	}
}

func TestWhatAnotherTryDoesntMendIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		code   string
		status int
		tries  int32
	}{
		// EC2 answers a stock-out with a status that the SDK would repeat.
		{"InsufficientInstanceCapacity", 500, 1},
		{"InstanceLimitExceeded", 400, 1},
		{"MaxSpotInstanceCountExceeded", 400, 1},
		{"UnauthorizedOperation", 403, 1},
		{"RequestLimitExceeded", 503, 3},
		{"InternalError", 500, 3},
	} {
		t.Run(test.code, func(t *testing.T) {
			t.Parallel()
			var tries atomic.Int32
			r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
				tries.Add(1)
				refuse(w, test.status, test.code, "no")
			})
			_, err := r.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{})
			if codeOf(err) != test.code || tries.Load() != test.tries {
				t.Errorf("code %q after %d tries, want %q after %d", codeOf(err), tries.Load(), test.code, test.tries)
			}
		})
	}
}

// The last answer alone says nothing about what an earlier attempt did whose
// answer was lost.
func TestARefusalAfterALostAnswerProvesNothing(t *testing.T) {
	t.Parallel()
	lose := func(w http.ResponseWriter) {
		connection, _, err := w.(http.Hijacker).Hijack() //nolint:errcheck // the test server's can
		if err == nil {
			_ = connection.Close()
		}
	}
	for _, test := range []struct {
		name    string
		answers []func(http.ResponseWriter)
		want    bool
	}{
		{"refused", []func(http.ResponseWriter){func(w http.ResponseWriter) { refuse(w, 400, "InstanceLimitExceeded", "no") }}, true},
		{"throttled, then refused", []func(http.ResponseWriter){
			func(w http.ResponseWriter) { refuse(w, 503, "RequestLimitExceeded", "slow down") },
			func(w http.ResponseWriter) { refuse(w, 400, "InstanceLimitExceeded", "no") },
		}, true},
		{"lost, then refused", []func(http.ResponseWriter){lose, func(w http.ResponseWriter) { refuse(w, 400, "InstanceLimitExceeded", "no") }}, false},
		{"failed, then refused", []func(http.ResponseWriter){
			func(w http.ResponseWriter) { refuse(w, 500, "InternalError", "oops") },
			func(w http.ResponseWriter) { refuse(w, 400, "UnauthorizedOperation", "no") },
		}, false},
		{"lost each time", []func(http.ResponseWriter){lose, lose, lose}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var n atomic.Int32
			r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
				test.answers[min(int(n.Add(1))-1, len(test.answers)-1)](w)
			})
			_, err := r.ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1), ClientToken: aws.String("t")})
			if err == nil || refused(err) != test.want {
				t.Errorf("refused(%v) = %t, want %t", err, refused(err), test.want)
			}
			if n.Load() != int32(len(test.answers)) {
				t.Errorf("%d requests, want %d", n.Load(), len(test.answers))
			}
		})
	}
}

func TestNoConnectionCarriesNothing(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close()
	_, err := openClients(t, validConfig(t, server.URL)).order[0].ec2.RunInstances(t.Context(), &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)})
	if got := classify(err, "create"); got == nil || got.Reason != backenderr.ProviderUnavailable || !refused(err) {
		t.Errorf("%v, refused: %t", got, refused(err))
	}
}

func TestAnAttemptWithoutAnAnswerIsRepeated(t *testing.T) {
	t.Parallel()
	var tries atomic.Int32
	release := make(chan struct{})
	r := oneRegion(t, func(w http.ResponseWriter, request *http.Request) {
		if tries.Add(1) == 1 {
			select {
			case <-release:
			case <-request.Context().Done():
			}
			return
		}
		answerIdentity(w)
	})
	defer close(release)
	r.timeout = 50 * time.Millisecond
	if _, err := r.sts.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{}); err != nil || tries.Load() != 2 {
		t.Errorf("%v after %d tries, want an answer to the second", err, tries.Load())
	}
}

func TestTheEndOfTheCallersPatienceIsNoTimeoutOfAWS(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	r := oneRegion(t, func(_ http.ResponseWriter, request *http.Request) {
		// A server sees that its client left once it has read the request.
		_, _ = io.Copy(io.Discard, request.Body)
		asked <- struct{}{}
		<-request.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	_, err := r.ec2.RunInstances(ctx, &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)})
	if got := classify(err, "create"); got == nil || got.Reason != backenderr.Cancelled || refused(err) {
		t.Errorf("%v, refused: %t", got, refused(err))
	}
}

func TestCallsWaitForTheDocumentedBuckets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBuckets(nil)
		began := time.Now()
		for range 24 {
			if err := b.wait(t.Context(), "RunInstances"); err != nil {
				t.Fatal(err)
			}
		}
		// 4 at once, then 2 each second.
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("24 launches took %s, want 10s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := b.wait(ctx, "RunInstances"); err == nil {
			t.Error("a call got a token that isn't there")
		}
		began = time.Now()
		for range 50 {
			if err := b.wait(t.Context(), "DescribeInstances"); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("50 reads took %s, want 1s", took)
		}
	})
}

// AWS's buckets count calls when they arrive, so that a burst that was held up on
// its way must not leave them emptier than the worker's are.
func TestABurstThatWasHeldUpDoesNotGetTheNextCallRefused(t *testing.T) {
	t.Parallel()
	for _, l := range apiLimits {
		synctest.Test(t, func(t *testing.T) {
			const heldUp = 150 * time.Millisecond
			b := newBuckets(nil)
			var mu sync.Mutex // protects theirs
			theirs := cloudsim.NewBucket(cloudsim.Limit{Burst: float64(l.burst), PerSecond: l.second}, time.Now())
			began := time.Now()
			var wg sync.WaitGroup
			for i := range 3 * l.burst {
				if err := b.wait(t.Context(), l.action); err != nil {
					t.Fatal(err)
				}
				wg.Go(func() {
					<-time.After(time.Until(began.Add(heldUp))) // later calls are on time
					mu.Lock()
					defer mu.Unlock()
					if !theirs.Take(1, time.Now()) {
						t.Errorf("call %d of %s was refused", i, l.action)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestLimitsOfAnAction(t *testing.T) {
	t.Parallel()
	own := []APILimitConfig{{Action: anyAction, Burst: 7, PerSecond: 3}, {Action: "RunInstances", Burst: 100, PerSecond: 20}}
	for _, test := range []struct {
		name, action string
		own          []APILimitConfig
		burst        int
		second       float64
	}{
		{"documented", "RunInstances", nil, 4, 2},
		{"documented", "TerminateInstances", nil, 80, 5},
		{"a read", "DescribeVolumes", nil, 40, 10},
		{"a read", "GetConsoleOutput", nil, 40, 10},
		{"a change", "CreateSecurityGroup", nil, 40, 5},
		{"the operator's", "RunInstances", own, 100, 20},
		{"the operator's for all others", "TerminateInstances", own, 7, 3},
		{"the operator's for all others", "DescribeVolumes", own, 7, 3},
		{"beside the operator's", "RunInstances", []APILimitConfig{{Action: "CreateTags", Burst: 1, PerSecond: 1}}, 4, 2},
	} {
		got := newBuckets(test.own).limit(test.action)
		if got.burst != test.burst || got.second != test.second {
			t.Errorf("%s, %s: %d and %v per second, want %d and %v", test.name, test.action, got.burst, got.second, test.burst, test.second)
		}
	}
}

func TestACallThatNeverGotItsTurnWasNotSent(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		refuse(w, 400, "InstanceLimitExceeded", "no")
	}))
	t.Cleanup(server.Close)
	c := validConfig(t, server.URL)
	c.APILimits = []APILimitConfig{{Action: "RunInstances", Burst: 1, PerSecond: 0.001}}
	r := openClients(t, c).order[0]
	input := &ec2.RunInstancesInput{MinCount: aws.Int32(1), MaxCount: aws.Int32(1)}
	_, _ = r.ec2.RunInstances(t.Context(), input) // takes the one token
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := r.ec2.RunInstances(ctx, input)
	if got := classify(err, "create"); got == nil || got.Reason != backenderr.ProviderUnavailable || !refused(err) || asked.Load() != 1 {
		t.Errorf("%v, refused: %t, %d requests", got, refused(err), asked.Load())
	}
}

func TestTheClocksDifferenceIsMeasured(t *testing.T) {
	t.Parallel()
	ahead := time.Duration(0)
	r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(ahead).UTC().Format(http.TimeFormat))
		answerIdentity(w)
	})
	for _, ahead = range []time.Duration{0, 10 * time.Minute, -7 * time.Minute} {
		if _, err := r.sts.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{}); err != nil {
			t.Fatal(err)
		}
		// The header has whole seconds.
		if off := (r.skew() - ahead).Abs(); off > 30*time.Second {
			t.Errorf("measured %s, want %s", r.skew(), ahead)
		}
	}
}

func TestABadSignatureOfAWrongClockIsTheClocks(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		ahead time.Duration
		want  backenderr.Reason
	}{
		{0, backenderr.ProviderUnauthenticated},
		{time.Hour, backenderr.ClockSkew},
		{-time.Hour, backenderr.ClockSkew},
	} {
		r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", time.Now().Add(test.ahead).UTC().Format(http.TimeFormat))
			refuse(w, 401, "AuthFailure", "AWS was not able to validate the provided access credentials")
		})
		_, err := r.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{})
		if got := classify(err, "look"); got == nil || got.Reason != test.want {
			t.Errorf("AWS %s ahead: %v, want %s", test.ahead, got, test.want)
		}
	}
}

func TestCallsAreCountedByResult(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if err := request.ParseForm(); err == nil && request.Form.Get("Action") == "GetCallerIdentity" {
			answerIdentity(w)
			return
		}
		refuse(w, 403, "UnauthorizedOperation", "no")
	}))
	t.Cleanup(server.Close)
	all := openClients(t, validConfig(t, server.URL))
	r := all.order[0]
	_, _ = r.sts.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
	_, _ = r.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{})
	for _, labels := range [][]string{{testRegion, "GetCallerIdentity", "ok"}, {testRegion, "DescribeVolumes", "UnauthorizedOperation"}} {
		if n := testutil.ToFloat64(all.metrics.calls.WithLabelValues(labels...)); n != 1 {
			t.Errorf("%v: %v calls, want 1", labels, n)
		}
	}
}

func TestMetricsOfAnEarlierOpenAreGoneOnWith(t *testing.T) {
	t.Parallel()
	env, c := testEnv(t), validConfig(t, "")
	first, err := newClients(t.Context(), c, env)
	if err != nil {
		t.Fatal(err)
	}
	second, err := newClients(t.Context(), c, env)
	if err != nil {
		t.Fatal(err)
	}
	if first.metrics.calls != second.metrics.calls {
		t.Error("the second has counters that nobody reads")
	}
}

func TestCredentialsAreNotInErrors(t *testing.T) {
	t.Parallel()
	r := oneRegion(t, func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, 403, "UnauthorizedOperation", "You are not authorized. Encoded authorization failure message: c2VjcmV0IHBhcnQ")
	})
	_, err := r.ec2.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{})
	text := classify(err, "list the volumes").Error()
	for _, never := range []string{"c2VjcmV0", "a secret for tests", "AKIATEST"} {
		if strings.Contains(text, never) {
			t.Errorf("%q has %q", text, never)
		}
	}
	if want := "list the volumes: UnauthorizedOperation: You are not authorized. (request req-1)"; text != want {
		t.Errorf("%q, want %q", text, want)
	}
}
