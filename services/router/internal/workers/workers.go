// Package workers keeps the connections to the router's backends: one channel to
// each, over as many connections as it has replicas, with a watch over it that knows what the backend last declared, when it last
// answered and why it doesn't answer now.
//
// Each backend is watched by itself, so that one that hangs delays no other,
// and nothing here blocks a caller for longer than the caller's own deadline
// and [Config.ConnectTimeout].
package workers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// Config says how to reach a backend and how to watch over it.
type Config struct {
	// Name by which the router calls it.
	Name string
	// Client is the way there.
	Client grpcx.ClientConfig
	// PollInterval is how often its capabilities are read.
	PollInterval time.Duration
	// PollTimeout is how long one reading may take.
	PollTimeout time.Duration
	// AnswerTimeout is how long the fleet waits for its CanSatisfy.
	AnswerTimeout time.Duration
	// ConnectTimeout is how long a call waits for a connection that is lost.
	ConnectTimeout time.Duration
}

// Worker is a connection to one backend. Make it with [Dial], watch over it
// with [Worker.Watch], and close it when nobody uses it any more.
type Worker struct {
	config    Config
	conn      *grpc.ClientConn
	backend   backend.Backend
	inventory bridgev1.InventoryServiceClient
	operator  bridgev1.OperatorServiceClient
	fleet     bridgev1.FleetServiceClient
	health    healthv1.HealthClient
	log       *slog.Logger
	// changed has an item when the backend should be looked at now.
	changed chan struct{}

	mu       sync.Mutex // protects fields below
	seen     fleet.Observation
	refusing bool // by gRPC health
	leaf     bool // known to be no router
}

// Dial makes a Worker. It doesn't wait for the connection; options are for
// tests.
func Dial(c Config, tls grpcx.TLSConfig, log *slog.Logger, options ...grpc.DialOption) (*Worker, error) {
	w := &Worker{config: c, log: log.With("backend", c.Name), changed: make(chan struct{}, 1)}
	conn, err := grpcx.DialLogging(w.log, c.Client, tls, append([]grpc.DialOption{
		grpc.WithChainUnaryInterceptor(w.unary), grpc.WithChainStreamInterceptor(w.stream),
		grpcx.Replicas(bridgev1.BackendService_ServiceDesc.ServiceName),
	}, options...)...)
	if err != nil {
		return nil, fmt.Errorf("backend %s: %w", c.Name, err)
	}
	w.conn = conn
	w.backend = &replicated{
		Backend: backendgrpc.NewClient(conn), log: w.log,
		down: func() bool { return conn.GetState() == connectivity.TransientFailure },
	}
	w.inventory = bridgev1.NewInventoryServiceClient(conn)
	w.operator = bridgev1.NewOperatorServiceClient(conn)
	w.fleet = bridgev1.NewFleetServiceClient(conn)
	w.health = healthv1.NewHealthClient(conn)
	w.seen.LastError = "not asked yet"
	return w, nil
}

// Close ends the connection; calls under way fail.
func (w *Worker) Close() error { return w.conn.Close() }

// Name returns the router's name for the backend.
func (w *Worker) Name() string { return w.config.Name }

// Member returns the backend as a member of a fleet.
func (w *Worker) Member() fleet.Member {
	return fleet.Member{Name: w.config.Name, Backend: w.backend, AnswerTimeout: w.config.AnswerTimeout, Observe: w.Observe}
}

// Observe returns what was last seen of the backend.
func (w *Worker) Observe() fleet.Observation {
	w.mu.Lock()
	defer w.mu.Unlock()
	o := w.seen
	if o.LastError == "" && w.refusing {
		o.LastError = "it says that it does not serve"
	}
	return o
}

// Watch watches over the backend until ctx ends: it reads capabilities at the
// interval, and at once when the backend's health changes or the connection is
// lost or there again. ready is called after each reading.
func (w *Worker) Watch(ctx context.Context, ready func()) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { w.watchHealth(ctx) })
	wg.Go(func() { w.watchConnection(ctx) })
	ticker := time.NewTicker(w.config.PollInterval)
	defer ticker.Stop()
	for {
		w.poll(ctx)
		ready()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-w.changed:
		}
	}
}

// poll reads what the backend declares. What it declared before stays known
// when it doesn't answer.
func (w *Worker) poll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, w.config.PollTimeout)
	defer cancel()
	capabilities, err := w.backend.Capabilities(ctx)
	var nested []string
	if err == nil {
		nested, err = w.nested(ctx)
	}
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return // The router stops; that says nothing about the backend.
	}
	w.mu.Lock()
	before := w.seen.LastError
	if err == nil {
		w.seen = fleet.Observation{Capabilities: capabilities, Backends: nested, LastSeen: time.Now()}
	} else {
		w.seen.LastError = err.Error()
		w.leaf = false // Who answers next may be another.
	}
	now := w.seen.LastError
	w.mu.Unlock()
	switch {
	case before != "" && now == "":
		w.log.InfoContext(ctx, "Backend answers")
	case before == "" && now != "":
		w.log.WarnContext(ctx, "Backend does not answer", "error", err)
	}
}

// nested returns the names of the backends of a backend that is a router, nil
// for a worker.
func (w *Worker) nested(ctx context.Context) ([]string, error) {
	w.mu.Lock()
	leaf := w.leaf
	w.mu.Unlock()
	if leaf {
		return nil, nil
	}
	res, err := w.fleet.GetProviderCard(ctx, &bridgev1.GetProviderCardRequest{})
	if backenderr.Is(err, backenderr.Unimplemented) {
		w.mu.Lock()
		w.leaf = true
		w.mu.Unlock()
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return res.GetCard().GetBackends(), nil
}

// watchHealth follows gRPC health, which tells of a worker that stops before
// the next poll would, until ctx ends. A backend without health is only polled.
func (w *Worker) watchHealth(ctx context.Context) {
	for ctx.Err() == nil {
		err := w.followHealth(ctx)
		w.setRefusing(false) // Nothing is known now but what polls find.
		if backenderr.Is(err, backenderr.Unimplemented) {
			return
		}
		timer := time.NewTimer(w.config.PollInterval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// followHealth follows the health of one replica that serves. When it stops
// doing so, another one is asked, and if there is none, the backend refuses until
// there is.
func (w *Worker) followHealth(ctx context.Context) error {
	for {
		refused, err := w.followOne(ctx)
		if !refused {
			return err
		}
		w.setRefusing(true)
	}
}

func (w *Worker) followOne(ctx context.Context) (refused bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := w.health.Watch(ctx, &healthv1.HealthCheckRequest{Service: bridgev1.BackendService_ServiceDesc.ServiceName}, grpc.WaitForReady(true))
	if err != nil {
		return false, err
	}
	for {
		res, err := stream.Recv()
		if err != nil {
			return false, err
		}
		if res.GetStatus() == healthv1.HealthCheckResponse_NOT_SERVING {
			return true, nil
		}
		w.setRefusing(false)
	}
}

func (w *Worker) setRefusing(refusing bool) {
	w.mu.Lock()
	w.refusing = refusing
	w.mu.Unlock()
	w.look()
}

// watchConnection has the backend looked at when it goes and when it comes back,
// perhaps as another one, until ctx ends.
func (w *Worker) watchConnection(ctx context.Context) {
	for state := w.conn.GetState(); w.conn.WaitForStateChange(ctx, state); {
		if state = w.conn.GetState(); state == connectivity.Ready || state == connectivity.TransientFailure {
			w.look()
		}
	}
}

// look has the backend looked at soon.
func (w *Worker) look() {
	select {
	case w.changed <- struct{}{}:
	default: // It is due already.
	}
}

// awaitReady waits, for a limited time, until there is a connection. Then the
// call itself fails at once if there is none: a deadline on the call would end
// a Provision that only takes long.
func (w *Worker) awaitReady(ctx context.Context, conn *grpc.ClientConn) {
	ctx, cancel := context.WithTimeout(ctx, w.config.ConnectTimeout)
	defer cancel()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		conn.Connect()
		if state == connectivity.Shutdown || !conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// patient are the calls that wait for a connection: those of a grant that was
// given to this backend. Others can be answered without it.
func patient(method string) bool {
	switch method {
	case bridgev1.BackendService_Provision_FullMethodName, bridgev1.BackendService_WatchUntilExit_FullMethodName, bridgev1.BackendService_Terminate_FullMethodName:
		return true
	}
	return false
}

func (w *Worker) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	if patient(method) {
		w.awaitReady(ctx, cc)
	}
	return invoke(grpcx.PassCaller(ctx), method, req, reply, cc, options...)
}

func (w *Worker) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	if patient(method) {
		w.awaitReady(ctx, cc)
	}
	return stream(grpcx.PassCaller(ctx), desc, cc, method, options...)
}
