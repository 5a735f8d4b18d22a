package ec2sim_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"
	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// racks are machines that do nothing but be on or off.
type racks struct {
	mu      sync.Mutex
	started map[string]*machine
	refuse  error
}

type machine struct {
	boot    cloudsim.Boot
	once    sync.Once
	off     chan struct{}
	mu      sync.Mutex
	stopped bool
}

func (r *racks) Start(_ context.Context, boot cloudsim.Boot) (cloudsim.Machine, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refuse != nil {
		return nil, r.refuse
	}
	m := &machine{boot: boot, off: make(chan struct{})}
	if r.started == nil {
		r.started = map[string]*machine{}
	}
	r.started[boot.ID] = m
	return m, nil
}

// get waits for a machine to be started.
func (r *racks) get(t *testing.T, id string) *machine {
	t.Helper()
	var m *machine
	eventually(t, "the machine starts", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		m = r.started[id]
		return m != nil
	})
	return m
}

func (m *machine) Addr() netip.Addr             { return netip.MustParseAddr("127.0.0.9") }
func (m *machine) Off() <-chan struct{}         { return m.off }
func (m *machine) Console() []byte              { return []byte("booted " + m.boot.ID + "\r\n") }
func (m *machine) Reboot(context.Context) error { return errors.New("racks don't reboot") }

func (m *machine) Stop(context.Context) error {
	m.powerOff()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
	return nil
}

func (m *machine) powerOff() { m.once.Do(func() { close(m.off) }) }

func (m *machine) isStopped() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stopped
}

// site is a cloud and a client of it.
type site struct {
	*ec2sim.Cloud
	racks *racks
	url   string
	aws   aws.Config
	ec2   *ec2.Client
}

const home = "eu-central-1"

// open starts a cloud that is as fast as it can be, unless the options say
// otherwise.
func open(t *testing.T, options ec2sim.Options) *site {
	t.Helper()
	s := &site{racks: &racks{}}
	options.Machines = s.racks
	s.Cloud = ec2sim.New(options)
	s.url = s.Cloud.Start(t)
	s.aws = s.config(t, home)
	s.ec2 = ec2.NewFromConfig(s.aws)
	return s
}

// config is a client's configuration for a region: it doesn't retry, so that a
// test sees every answer.
func (s *site) config(t *testing.T, region string) aws.Config {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return aws.Config{
		Region: region, BaseEndpoint: &s.url, HTTPClient: &http.Client{Transport: plainBodies{transport}},
		Credentials: credentials.NewStaticCredentialsProvider(ec2sim.AccessKeyID, ec2sim.SecretAccessKey, ""),
		Retryer:     func() aws.Retryer { return aws.NopRetryer{} },
	}
}

// plainBodies hides that a request's body can write itself: the SDK takes it away
// as soon as the answer begins, WriteTo then fails, and net/http, which may still
// look for more of it, closes the connection in the middle of the answer. Only a
// server that is as quick as this one sees it.
type plainBodies struct{ http.RoundTripper }

func (p plainBodies) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		r.Body = struct{ io.ReadCloser }{r.Body}
	}
	return p.RoundTripper.RoundTrip(r)
}

// code is the error code of an answer.
func code(err error) string {
	if fault, ok := errors.AsType[smithy.APIError](err); ok {
		return fault.ErrorCode()
	}
	if err != nil {
		return "no answer: " + err.Error()
	}
	return ""
}

func wantCode(t *testing.T, err error, want string) {
	t.Helper()
	if got := code(err); got != want {
		t.Errorf("answered %q (%v), want %q", got, err, want)
	}
}

// eventually waits for something that the cloud does by itself.
func eventually(t *testing.T, what string, happened func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for !happened() {
		if !cloudsim.WaitReal(ctx, 2*time.Millisecond, nil) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

const grant = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// order is a launch as the worker orders one.
func order(token string, changes ...func(*ec2.RunInstancesInput)) *ec2.RunInstancesInput {
	tags := []types.Tag{{Key: aws.String(ec2tags.Grant), Value: aws.String(grant)}, {Key: aws.String(ec2tags.Bridge), Value: aws.String("b")}}
	input := &ec2.RunInstancesInput{
		ImageId: aws.String(image("debian-13-amd64-20261012-2508")), InstanceType: types.InstanceTypeT3Micro,
		MinCount: aws.Int32(1), MaxCount: aws.Int32(1), ClientToken: aws.String(token),
		InstanceInitiatedShutdownBehavior: types.ShutdownBehaviorTerminate,
		UserData:                          aws.String("I2Nsb3VkLWNvbmZpZwo="),
		MetadataOptions:                   &types.InstanceMetadataOptionsRequest{HttpTokens: types.HttpTokensStateRequired, HttpPutResponseHopLimit: aws.Int32(1)},
		BlockDeviceMappings: []types.BlockDeviceMapping{{DeviceName: aws.String("/dev/xvda"), Ebs: &types.EbsBlockDevice{
			VolumeSize: aws.Int32(20), VolumeType: types.VolumeTypeGp3, Encrypted: aws.Bool(true), DeleteOnTermination: aws.Bool(true),
		}}},
		TagSpecifications: []types.TagSpecification{
			{ResourceType: types.ResourceTypeInstance, Tags: tags},
			{ResourceType: types.ResourceTypeVolume, Tags: tags},
			{ResourceType: types.ResourceTypeNetworkInterface, Tags: tags},
		},
		NetworkInterfaces: []types.InstanceNetworkInterfaceSpecification{{
			DeviceIndex: aws.Int32(0), AssociatePublicIpAddress: aws.Bool(true), DeleteOnTermination: aws.Bool(true),
		}},
	}
	for _, change := range changes {
		change(input)
	}
	return input
}

func image(name string) string { return ec2sim.ImageID(home, name) }

// launch launches one and returns its id.
func (s *site) launch(t *testing.T, input *ec2.RunInstancesInput) string {
	t.Helper()
	answer, err := s.ec2.RunInstances(t.Context(), input)
	if err != nil {
		t.Fatalf("launching: %v", err)
	}
	return *answer.Instances[0].InstanceId
}

// show is an instance as DescribeInstances shows it.
func (s *site) show(t *testing.T, id string) types.Instance {
	t.Helper()
	answer, err := s.ec2.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
	if err != nil {
		t.Fatalf("describing %s: %v", id, err)
	}
	return answer.Reservations[0].Instances[0]
}

// until waits until an instance is in a state.
func (s *site) until(t *testing.T, id string, state ec2sim.State) {
	t.Helper()
	eventually(t, id+" is "+string(state), func() bool {
		for _, i := range s.Instances() {
			if i.ID == id {
				return i.State == state
			}
		}
		return false
	})
}

func (s *site) terminate(t *testing.T, ids ...string) error {
	t.Helper()
	_, err := s.ec2.TerminateInstances(t.Context(), &ec2.TerminateInstancesInput{InstanceIds: ids})
	return err
}
