package replicas

import (
	"context"
	"fmt"
	"time"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
)

// healthy asks a worker whether it serves as a backend.
func healthy(w *process) error {
	conn, err := grpcx.Dial(grpcx.ClientConfig{Target: w.addr(), Insecure: true}, grpcx.TLSConfig{})
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	res, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: "computebridge.v1.BackendService"})
	if err != nil {
		return err
	}
	if res.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		return fmt.Errorf("%s", res.GetStatus())
	}
	return nil
}
