package ec2backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/logging"
	smithymiddleware "github.com/aws/smithy-go/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

const (
	// callTimeout bounds one attempt of a call. EC2 answers within seconds, a
	// RunInstances at a bad time within some ten.
	callTimeout = 30 * time.Second
	// callAttempts of a call, the first included.
	callAttempts = 3
	// maxSkew is how far this machine's clock may be off: half the grace of
	// deadlines, at whose end the bridge ends what has not ended itself.
	maxSkew = 30 * time.Second
	// refusedSkew is how far it is off where that explains a refused signature: AWS
	// refuses requests that are 5 min old (pageEC2, RequestExpired).
	refusedSkew = 4 * time.Minute
)

// clients are the APIs of the regions of the allowlist. They are made once and
// shared by all calls.
type clients struct {
	config    Config
	env       worker.Env
	log       *slog.Logger
	aws       aws.Config
	transport *http.Transport
	metrics   *callMetrics
	order     []*regionClients // in the operator's order

	// What the check renders the call from that it tries out; newCatalogue and
	// newImages set them.
	catalogue *catalogue
	images    *images

	mu    sync.Mutex          // protects the field below
	found map[string][]string // problems of regions
}

// regionClients are the APIs of one region.
type regionClients struct {
	name      string
	config    RegionConfig
	ec2       *ec2.Client
	ssm       *ssm.Client
	sts       *sts.Client
	scheduler *scheduler.Client
	metrics   *cloudwatch.Client

	buckets        *buckets
	skewed         atomic.Int64  // nanoseconds
	timeout        time.Duration // of an attempt
	metricsTimeout time.Duration
}

// newClients reads the credentials' configuration. It calls nothing.
func newClients(ctx context.Context, c Config, env worker.Env) (*clients, error) {
	loaded, err := awsconfig.LoadDefaultConfig(ctx, loadOptions(c)...)
	if err != nil {
		return nil, backenderr.Wrap(backenderr.ProviderUnauthenticated, err, "load the AWS configuration")
	}
	metrics, err := newCallMetrics(env.Metrics)
	if err != nil {
		return nil, err
	}
	out := &clients{config: c, env: env, log: env.Log, metrics: metrics, found: map[string][]string{}}
	// The SDK's own client, which knows AWS_CA_BUNDLE, but with a transport that
	// can be closed.
	built, ok := loaded.HTTPClient.(*awshttp.BuildableClient)
	if !ok {
		built = awshttp.NewBuildableClient()
	}
	out.transport = built.GetTransport()
	out.transport.MaxIdleConnsPerHost = idleConnections
	loaded.HTTPClient = &http.Client{Transport: plainBodies{out.transport}, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // no API sends us elsewhere
	}}
	loaded.Logger = sdkLog{env.Log, context.WithoutCancel(ctx)}
	if loaded.Credentials != nil {
		loaded.Credentials = credentialsProvider{loaded.Credentials}
	}
	loaded.Retryer = func() aws.Retryer { return newRetryer(c.retryBackoff) }
	if c.Endpoint != "" {
		loaded.BaseEndpoint = aws.String(c.Endpoint)
	}
	out.aws = loaded
	for _, rc := range c.Regions {
		rc.setDefaults()
		out.order = append(out.order, out.newRegion(rc))
	}
	return out, nil
}

// plainBodies hides from the transport that the SDK's request bodies can write
// themselves. They fail to once they are closed, which the SDK does as soon as an
// answer begins; to the transport, which looks whether there is more to send, that
// is a connection that broke, and it closes it in the middle of the answer.
type plainBodies struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (p plainBodies) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = struct{ io.ReadCloser }{r.Body}
	}
	return p.RoundTripper.RoundTrip(r)
}

// idleConnections to one endpoint are kept, which is how many calls are under
// way at once when many grants start.
const idleConnections = 16

func loadOptions(c Config) []func(*awsconfig.LoadOptions) error {
	options := []func(*awsconfig.LoadOptions) error{awsconfig.WithHTTPClient(awshttp.NewBuildableClient())}
	if len(c.Regions) > 0 {
		options = append(options, awsconfig.WithRegion(c.Regions[0].Name))
	}
	profile := c.Profile
	if c.CredentialsFile != "" {
		// A profile that is named comes before the environment's credentials.
		if profile == "" {
			profile = awsconfig.DefaultSharedConfigProfile
		}
		options = append(options, awsconfig.WithSharedCredentialsFiles([]string{string(c.CredentialsFile)}), awsconfig.WithSharedConfigFiles([]string{}))
	}
	if profile != "" {
		options = append(options, awsconfig.WithSharedConfigProfile(profile))
	}
	return options
}

func (c *clients) newRegion(rc RegionConfig) *regionClients {
	r := &regionClients{name: rc.Name, config: rc, buckets: newBuckets(c.config.APILimits), timeout: callTimeout, metricsTimeout: c.config.MetricsTimeout.Duration}
	regional := c.aws.Copy()
	regional.Region = rc.Name
	regional.APIOptions = append(regional.APIOptions, func(stack *smithymiddleware.Stack) error {
		if _, ok := stack.Finalize.Get(retryStep); !ok {
			return nil // rendering a pre-signed address
		}
		if err := stack.Finalize.Insert(wholeCall(), retryStep, smithymiddleware.Before); err != nil {
			return err
		}
		return stack.Finalize.Insert(oneAttempt(r, c.metrics), retryStep, smithymiddleware.After)
	})
	r.ec2 = ec2.NewFromConfig(regional)
	r.ssm = ssm.NewFromConfig(regional)
	r.sts = sts.NewFromConfig(regional)
	r.scheduler = scheduler.NewFromConfig(regional)
	r.metrics = cloudwatch.NewFromConfig(regional)
	return r
}

// presigner signs addresses of buckets in a region.
func (c *clients) presigner(region string) *s3.PresignClient {
	regional := c.aws.Copy()
	regional.Region = region
	return s3.NewPresignClient(s3.NewFromConfig(regional, func(o *s3.Options) { o.UsePathStyle = c.config.Endpoint != "" }))
}

// region returns the APIs of a region of the allowlist, and
// GRANT_NOT_SATISFIABLE for any other.
func (c *clients) region(name backend.Region) (*regionClients, error) {
	var allowed []string
	for _, r := range c.order {
		if r.name == string(name) {
			return r, nil
		}
		allowed = append(allowed, r.name)
	}
	return nil, backenderr.New(backenderr.GrantNotSatisfiable, "region %q is not in the operator's allowlist (%s)", string(name), strings.Join(allowed, ", ")).
		WithCreated(backenderr.CreatedNone)
}

// close lets go of connections.
func (c *clients) close() { c.transport.CloseIdleConnections() }

// skew is how far AWS's clock is ahead of this machine's, as the last answer
// showed; zero if there was none.
func (r *regionClients) skew() time.Duration { return time.Duration(r.skewed.Load()) }

func tooSkewed(d time.Duration) bool { return d.Abs() > maxSkew }

// newRetryer is the SDK's standard one without what another try at once doesn't
// mend: a stock-out, a quota.
func newRetryer(backoff time.Duration) aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = callAttempts
		if backoff > 0 {
			o.MaxBackoff = backoff
		}
		settled := retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
			row, ok := known(vendorErrors, codeOf(err))
			if ok && (row.effect == capacity || row.reason == backenderr.QuotaExceeded) {
				return aws.FalseTernary
			}
			if isNotSent(err) {
				return aws.FalseTernary
			}
			return aws.UnknownTernary
		})
		o.Retryables = append([]retry.IsErrorRetryable{settled}, o.Retryables...)
	})
}

// credentialsProvider marks the errors of the SDK's, which have no type.
type credentialsProvider struct{ aws.CredentialsProvider }

// Retrieve implements aws.CredentialsProvider.
func (p credentialsProvider) Retrieve(ctx context.Context) (aws.Credentials, error) {
	found, err := p.CredentialsProvider.Retrieve(ctx)
	if err != nil && ctx.Err() == nil {
		return found, &credentialsError{err}
	}
	return found, err
}

// sdkLog is where the SDK's own words go. What matters of them comes back as an
// error, too.
type sdkLog struct {
	log  *slog.Logger
	life context.Context //nolint:containedctx // the SDK gives none to its logger
}

// Logf implements logging.Logger.
func (l sdkLog) Logf(_ logging.Classification, format string, args ...any) {
	l.log.DebugContext(l.life, "The AWS SDK says something", "text", fmt.Sprintf(format, args...))
}

// retryStep is the SDK's step that repeats a call.
const retryStep = "Retry"

// attempts is what the attempts of one call were like.
type attempts struct {
	unclear bool // before the last
	last    bool // the last one was unclear
	skew    time.Duration
}

type attemptsKey struct{}

// wholeCall goes around all attempts of a call.
func wholeCall() smithymiddleware.FinalizeMiddleware {
	return smithymiddleware.FinalizeMiddlewareFunc("ComputeBridgeCall", func(ctx context.Context, in smithymiddleware.FinalizeInput, next smithymiddleware.FinalizeHandler) (
		smithymiddleware.FinalizeOutput, smithymiddleware.Metadata, error,
	) {
		record := &attempts{}
		out, metadata, err := next.HandleFinalize(context.WithValue(ctx, attemptsKey{}, record), in)
		if err != nil {
			err = &callError{earlierUnclear: record.unclear, skew: record.skew, err: err}
		}
		return out, metadata, err
	})
}

// oneAttempt goes around each attempt: it waits for its turn, bounds it, and
// takes note of what came of it.
func oneAttempt(r *regionClients, metrics *callMetrics) smithymiddleware.FinalizeMiddleware {
	return smithymiddleware.FinalizeMiddlewareFunc("ComputeBridgeAttempt", func(ctx context.Context, in smithymiddleware.FinalizeInput, next smithymiddleware.FinalizeHandler) (
		out smithymiddleware.FinalizeOutput, metadata smithymiddleware.Metadata, err error,
	) {
		record, _ := ctx.Value(attemptsKey{}).(*attempts)
		if record == nil {
			record = &attempts{}
		}
		record.unclear = record.unclear || record.last
		record.last = false
		api := awsmiddleware.GetOperationName(ctx)
		began := time.Now()
		if err := r.buckets.wait(ctx, api); err != nil {
			return out, metadata, &notSentError{err}
		}
		metrics.waited.WithLabelValues(r.name, api).Add(time.Since(began).Seconds())
		bounded, cancel := context.WithTimeout(ctx, r.timeout)
		defer cancel()
		out, metadata, err = next.HandleFinalize(bounded, in)
		if err != nil && bounded.Err() != nil && ctx.Err() == nil && codeOf(err) == "" {
			err = &attemptTimeoutError{r.timeout}
		}
		if skew, ok := awsmiddleware.GetAttemptSkew(metadata); ok {
			record.skew = skew
			r.skewed.Store(int64(skew))
		}
		record.last = err != nil && !refusedAttempt(err)
		metrics.calls.WithLabelValues(r.name, api, resultOf(err)).Inc()
		return out, metadata, err
	})
}

// resultOf names the outcome of an attempt: AWS's code, or what else went wrong.
func resultOf(err error) string {
	if err == nil {
		return "ok"
	}
	if code := codeOf(err); code != "" {
		return code
	}
	if _, ok := errors.AsType[*attemptTimeoutError](err); ok {
		return "timeout"
	}
	if _, ok := errors.AsType[*credentialsError](err); ok {
		return "credentials"
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return "cancelled"
	}
	return "connection"
}

// callMetrics count calls.
type callMetrics struct {
	calls  *prometheus.CounterVec
	waited *prometheus.CounterVec
}

func newCallMetrics(registry prometheus.Registerer) (*callMetrics, error) {
	m := &callMetrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "computebridge_aws_calls_total", Help: "Attempts of calls of AWS APIs, by result: ok, AWS's error code, or timeout, connection, credentials, cancelled.",
		}, []string{"region", "api", "code"}),
		waited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "computebridge_aws_throttle_wait_seconds_total", Help: "Time that calls waited here so as to stay within AWS's limits.",
		}, []string{"region", "api"}),
	}
	if registry == nil {
		return m, nil
	}
	for _, vector := range []**prometheus.CounterVec{&m.calls, &m.waited} {
		err := registry.Register(*vector)
		if before, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
			// The driver was opened before in this process.
			if same, ok := before.ExistingCollector.(*prometheus.CounterVec); ok {
				*vector, err = same, nil
			}
		}
		if err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// apiLimit is a token bucket.
type apiLimit struct {
	action string
	burst  int
	second float64
}

// withHeadroom is the limit with a fifth of its size less. AWS counts a call when
// it arrives, the worker when it leaves: of a burst that was held up on its way,
// AWS's bucket has not yet got back what the worker's has, and with buckets of the
// same size the next call is refused.
func (l apiLimit) withHeadroom() apiLimit {
	l.burst -= l.burst / 5
	return l
}

// apiLimits are the documented ones of each account and region (pageThrottling),
// which an account shares among all that call in its name. The worker doesn't
// know what of it others use; where they use it, AWS answers
// RequestLimitExceeded and the call is repeated. A fifth of their size stays
// unused (withHeadroom). RunInstances has a second bucket, of instances, with 1000
// and 2 each second, which the first keeps from running dry: a call here makes one
// instance.
var apiLimits = []apiLimit{
	{"RunInstances", 5, 2},
	{"TerminateInstances", 100, 5},
	{"CreateTags", 100, 10},
	// https://docs.aws.amazon.com/general/latest/gr/ssm.html
	{"GetParameter", 40, 40},
	// https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/cloudwatch_limits.html
	{"GetMetricData", 50, 50},
	// https://docs.aws.amazon.com/scheduler/latest/UserGuide/scheduler-quotas.html,
	// those of the smaller regions.
	{"CreateSchedule", 50, 50},
	{"DeleteSchedule", 50, 50},
	{"GetSchedule", 50, 50},
	{"ListSchedules", 50, 50},
}

// The limits of the actions that have none of their own (pageThrottling). Reads
// are held to the smaller of two, that of unfiltered and unpaginated ones.
const (
	readBurst    = 50
	readPerSec   = 10
	changeBurst  = 50
	changePerSec = 5
	anyAction    = "*"
)

// buckets are one region's.
type buckets struct {
	limits []apiLimit // the first that matches counts

	mu      sync.Mutex // protects the field below
	buckets map[string]*rate.Limiter
}

func newBuckets(own []APILimitConfig) *buckets {
	b := &buckets{buckets: map[string]*rate.Limiter{}}
	for _, wanted := range []bool{false, true} { // what names an action comes first
		for _, l := range own {
			if (l.Action == anyAction) == wanted {
				b.limits = append(b.limits, apiLimit{l.Action, int(l.Burst), l.PerSecond})
			}
		}
	}
	for _, l := range apiLimits {
		b.limits = append(b.limits, l.withHeadroom())
	}
	return b
}

// wait blocks until the action's bucket has a token for the call.
func (b *buckets) wait(ctx context.Context, action string) error { return b.bucket(action).Wait(ctx) }

func (b *buckets) bucket(action string) *rate.Limiter {
	b.mu.Lock()
	defer b.mu.Unlock()
	bucket := b.buckets[action]
	if bucket == nil {
		limit := b.limit(action)
		bucket = rate.NewLimiter(rate.Limit(limit.second), limit.burst)
		b.buckets[action] = bucket
	}
	return bucket
}

func (b *buckets) limit(action string) apiLimit {
	for _, l := range b.limits {
		if l.action == action || l.action == anyAction {
			return l
		}
	}
	for _, prefix := range []string{"Describe", "Get", "List"} {
		if strings.HasPrefix(action, prefix) {
			return apiLimit{action, readBurst, readPerSec}.withHeadroom()
		}
	}
	return apiLimit{action, changeBurst, changePerSec}.withHeadroom()
}
