package ec2backend

import (
	"context"
	"log/slog"

	"github.com/aws/aws-sdk-go-v2/service/cloudwatch"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/worker"
)

// clients are the APIs of the regions of the allowlist.
type clients struct {
	config Config
	env    worker.Env
	log    *slog.Logger
	order  []*regionClients
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
	s3        *s3.PresignClient
}

func newClients(ctx context.Context, c Config, env worker.Env) (*clients, error) {
	_ = ctx
	return &clients{config: c, env: env, log: env.Log}, nil
}

func (c *clients) region(name backend.Region) (*regionClients, error) { panic("soon") }

func (c *clients) close() {}
