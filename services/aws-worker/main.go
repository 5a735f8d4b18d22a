// Command aws-worker serves the Backend contract for EC2 instances.
package main

import (
	"github.com/compute-bridge/compute-bridge/pkg/worker"
	"github.com/compute-bridge/compute-bridge/services/aws-worker/internal/ec2backend"
)

func main() { worker.Main("aws-worker", ec2backend.Open) }
