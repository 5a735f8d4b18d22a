// Package boto3 runs scripts that drive a simulated cloud through boto3, AWS's own
// client for Python: a second reading of the protocols beside the SDK for Go.
package boto3

import (
	"context"
	"os/exec"
)

// python is Debian's own, whose boto3 is a package of Debian's too; another in
// PATH may have none, or any.
const python = "/usr/bin/python3"

// Command is a script with its arguments, to be run. It sees nothing of this
// machine's own configuration of AWS.
func Command(ctx context.Context, script string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, python, append([]string{script}, args...)...)
	c.Env = []string{"AWS_EC2_METADATA_DISABLED=true", "AWS_CONFIG_FILE=/nonexistent", "AWS_SHARED_CREDENTIALS_FILE=/nonexistent", "PYTHONDONTWRITEBYTECODE=1"}
	return c
}
