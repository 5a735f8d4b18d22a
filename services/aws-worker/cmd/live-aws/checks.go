package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/scheduler"
	schedulertypes "github.com/aws/aws-sdk-go-v2/service/scheduler/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// first is the instance that most of the list is about.
type first struct {
	grant    backend.Grant
	envelope backend.Envelope
	key      sshkey.KeyPair
	made     backend.Provisioned
	seen     found
}

// checks goes through the list between the permissions and the clean-up.
func (p *site) checks(ctx context.Context, l *list) {
	f := &first{}
	steps := []struct {
		name string
		run  func(context.Context, *first) error
		// alone says that it needs no step before it.
		alone bool
	}{
		{name: "provision to SSH", run: p.provision},
		{name: "tags while it runs", run: p.tags},
		{name: "disk and interface", run: p.parts},
		{name: "metadata", run: p.metadata},
		{name: "provision again", run: p.provisionAgain},
		{name: "schedule", run: p.schedule},
		{name: "terminate", run: p.terminate},
		{name: "failed boot", run: p.failedBoot, alone: true},
		{name: "deadline with a dead bridge", run: p.deadline, alone: true},
	}
	broken := false
	for _, step := range steps {
		switch {
		case step.name == "schedule" && p.config.Deadline != deadlinePlatform:
			continue
		case ctx.Err() != nil, broken && !step.alone:
			l.skipped(step.name)
			continue
		}
		err := step.run(operator(ctx), f)
		l.done(step.name, err)
		// Without an instance there is nothing to look at.
		broken = broken || err != nil && step.name == "provision to SSH"
	}
}

func (p *site) provision(ctx context.Context, f *first) error {
	key, err := sshkey.GenerateLoginKey()
	if err != nil {
		return err
	}
	f.key = key
	f.grant, f.envelope = p.grant(p.settings.timing.life, key.Public.String())
	if f.made, err = p.runtime.Provision(ctx, f.grant, f.envelope); err != nil {
		return err
	}
	const words = "logged in"
	out, err := p.ssh(ctx, f.made.Receipt, f.key, "", "echo", words)
	if err != nil {
		return err
	}
	if !strings.Contains(out, words) {
		return fmt.Errorf("ssh answered %q", out)
	}
	return nil
}

// sshTimeout bounds one session.
const sshTimeout = time.Minute

// ssh runs the real OpenSSH client with the receipt's host key pinned.
func (p *site) ssh(ctx context.Context, r backend.Receipt, key sshkey.KeyPair, input string, args ...string) (string, error) {
	host, err := sshkey.ParsePublicKey(r.HostKey)
	if err != nil {
		return "", err
	}
	known, err := sshkey.KnownHostsLine(r.Host, r.Port, host)
	if err != nil {
		return "", err
	}
	knownFile, keyFile := filepath.Join(p.dir, "known_hosts"), filepath.Join(p.dir, "key")
	for file, data := range map[string][]byte{knownFile: []byte(known), keyFile: key.Private.Expose()} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, sshTimeout)
	defer cancel()
	options := []string{"-F", "none", "-i", keyFile, "-p", strconv.Itoa(int(r.Port))}
	for _, option := range []string{
		"UserKnownHostsFile=" + knownFile, "GlobalKnownHostsFile=none", "StrictHostKeyChecking=yes",
		"IdentitiesOnly=yes", "IdentityAgent=none", "BatchMode=yes", "ConnectTimeout=20", "LogLevel=ERROR",
	} {
		options = append(options, "-o", option)
	}
	// Options of the call come before the host, its command after it.
	target := []string{r.User + "@" + r.Host}
	if len(args) > 0 && strings.HasPrefix(args[0], "-") {
		args = append(args, target...)
	} else {
		args = append(target, args...)
	}
	cmd := exec.CommandContext(ctx, "ssh", append(options, args...)...) //nolint:gosec // our own arguments
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ssh: %w: %s", err, out)
	}
	return string(out), nil
}

// tags looks at AWS itself: who finds the instance later finds it by these.
func (p *site) tags(ctx context.Context, f *first) error {
	seen, err := p.look(ctx, &f.grant.ID)
	if err != nil {
		return err
	}
	f.seen = seen
	if len(seen.instances) != 1 || len(seen.volumes) != 1 || len(seen.interfaces) != 1 {
		return fmt.Errorf("found by their tags: %s; want an instance, a volume and an interface", seen)
	}
	want := map[string]string{
		tagBridge: p.bridgeID, tagBackend: backendName, tagGrant: f.grant.ID.String(), tagAttempt: strconv.Itoa(int(f.made.Instance.Attempt)),
		tagValidTo: f.grant.ValidTo.Format(time.RFC3339), tagShape: fmt.Sprintf("%d/%d/%d", shape.CPU, shape.RAM, shape.Storage),
	}
	var problems []error
	for what, tags := range map[string][]types.Tag{
		"instance": seen.instances[0].Tags, "volume": seen.volumes[0].Tags, "network interface": seen.interfaces[0].TagSet,
	} {
		have := map[string]string{}
		for _, t := range tags {
			have[aws.ToString(t.Key)] = aws.ToString(t.Value)
		}
		for key, value := range want {
			if have[key] != value {
				problems = append(problems, fmt.Errorf("%s: tag %s is %q, want %q", what, key, have[key], value))
			}
		}
	}
	return errors.Join(problems...)
}

// parts looks at what the instance consists of.
func (p *site) parts(ctx context.Context, f *first) error {
	if len(f.seen.instances) != 1 || len(f.seen.volumes) != 1 {
		return errors.New("the instance was not found by its tags")
	}
	i, v := f.seen.instances[0], f.seen.volumes[0]
	var problems []error
	if !aws.ToBool(v.Encrypted) {
		problems = append(problems, fmt.Errorf("volume %s is not encrypted", aws.ToString(v.VolumeId)))
	}
	if want, err := p.diskGiB(ctx, aws.ToString(i.ImageId)); err != nil {
		problems = append(problems, err)
	} else if size := int64(aws.ToInt32(v.Size)); size != want {
		problems = append(problems, fmt.Errorf("volume %s has %d GiB, want %d", aws.ToString(v.VolumeId), size, want))
	}
	if len(i.BlockDeviceMappings) != 1 || len(i.NetworkInterfaces) != 1 {
		return errors.Join(append(problems, fmt.Errorf("%d volumes and %d interfaces are attached", len(i.BlockDeviceMappings), len(i.NetworkInterfaces)))...)
	}
	if ebs := i.BlockDeviceMappings[0].Ebs; ebs == nil || !aws.ToBool(ebs.DeleteOnTermination) {
		problems = append(problems, errors.New("the volume would outlive the instance"))
	}
	if a := i.NetworkInterfaces[0].Attachment; a == nil || !aws.ToBool(a.DeleteOnTermination) {
		problems = append(problems, errors.New("the interface would outlive the instance"))
	}
	return errors.Join(problems...)
}

// diskGiB is how large the root volume of an instance is to be, as docs/aws.md has
// it: a volume can't be smaller than the snapshot that it is made from.
func (p *site) diskGiB(ctx context.Context, image string) (int64, error) {
	answer, err := p.ec2.DescribeImages(ctx, &ec2.DescribeImagesInput{ImageIds: []string{image}})
	if err != nil {
		return 0, err
	}
	for _, i := range answer.Images {
		for _, m := range i.BlockDeviceMappings {
			if m.Ebs != nil && aws.ToString(m.DeviceName) == aws.ToString(i.RootDeviceName) {
				return max(int64(shape.Storage)+p.config.ExtraDiskGiB, int64(aws.ToInt32(m.Ebs.VolumeSize))), nil
			}
		}
	}
	return 0, fmt.Errorf("AWS doesn't tell the root volume of image %q", image)
}

// metadata looks at the options, and tries from within the workload.
func (p *site) metadata(ctx context.Context, f *first) error {
	if len(f.seen.instances) != 1 {
		return errors.New("the instance was not found by its tags")
	}
	options := f.seen.instances[0].MetadataOptions
	switch {
	case options == nil:
		return errors.New("AWS doesn't tell the metadata options")
	case options.HttpTokens != types.HttpTokensStateRequired:
		return fmt.Errorf("tokens are %s", options.HttpTokens)
	case aws.ToInt32(options.HttpPutResponseHopLimit) != 1:
		return fmt.Errorf("the hop limit is %d", aws.ToInt32(options.HttpPutResponseHopLimit))
	}
	// The guest's own forwarding connects from where the workload is, whatever
	// programs its image has. That it fails is what is wanted.
	out, err := p.ssh(ctx, f.made.Receipt, f.key, "GET / HTTP/1.0\r\n\r\n", "-W", "169.254.169.254:80")
	if strings.Contains(out, "HTTP/") {
		return fmt.Errorf("the workload reaches the metadata service: %q", out)
	}
	if err == nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return nil
}

func (p *site) provisionAgain(ctx context.Context, f *first) error {
	again, err := p.runtime.Provision(ctx, f.grant, f.envelope)
	if err != nil {
		return err
	}
	if again.Instance.ID != f.made.Instance.ID || again.Receipt.HostKey != f.made.Receipt.HostKey {
		return fmt.Errorf("instance %s, before %s", again.Instance.ID, f.made.Instance.ID)
	}
	seen, err := p.look(ctx, &f.grant.ID)
	if err != nil {
		return err
	}
	if len(seen.instances) != 1 {
		return fmt.Errorf("the grant has %d instances", len(seen.instances))
	}
	return nil
}

// schedule reads what AWS will do at the deadline.
func (p *site) schedule(ctx context.Context, f *first) error {
	seen, err := p.look(ctx, &f.grant.ID)
	if err != nil {
		return err
	}
	if len(seen.schedules) != 1 {
		return fmt.Errorf("%d schedules", len(seen.schedules))
	}
	s, err := p.scheduler.GetSchedule(ctx, &scheduler.GetScheduleInput{Name: aws.String(seen.schedules[0]), GroupName: aws.String(p.config.ScheduleGroup)})
	if err != nil {
		return err
	}
	var problems []error
	compare := func(what, have, want string) {
		if have != want {
			problems = append(problems, fmt.Errorf("%s is %q, want %q", what, have, want))
		}
	}
	compare("the expression", aws.ToString(s.ScheduleExpression), f.grant.ValidTo.UTC().Format("at(2006-01-02T15:04:05)"))
	compare("the time zone", aws.ToString(s.ScheduleExpressionTimezone), "UTC")
	compare("the state", string(s.State), string(schedulertypes.ScheduleStateEnabled))
	compare("what follows", string(s.ActionAfterCompletion), string(schedulertypes.ActionAfterCompletionDelete))
	if w := s.FlexibleTimeWindow; w == nil || w.Mode != schedulertypes.FlexibleTimeWindowModeOff {
		problems = append(problems, errors.New("it may be late"))
	}
	if s.Target == nil {
		return errors.Join(append(problems, errors.New("it has no target"))...)
	}
	// What is between is the partition.
	if target := aws.ToString(s.Target.Arn); !strings.HasSuffix(target, ":scheduler:::aws-sdk:ec2:terminateInstances") {
		problems = append(problems, fmt.Errorf("the target is %q", target))
	}
	compare("the role", aws.ToString(s.Target.RoleArn), p.config.ScheduleRole)
	var input struct{ InstanceIds []string } //nolint:revive // EC2's own name of it
	if err := json.Unmarshal([]byte(aws.ToString(s.Target.Input)), &input); err != nil {
		return errors.Join(append(problems, fmt.Errorf("the target's input: %w", err))...)
	}
	compare("whom it ends", strings.Join(input.InstanceIds, ", "), string(f.made.Instance.ID))
	return errors.Join(problems...)
}

func (p *site) terminate(ctx context.Context, f *first) error {
	var end backend.Termination
	for {
		var err error
		end, err = p.runtime.Terminate(ctx, backend.HandleFor(f.grant.ID))
		if err != nil {
			return err
		}
		if end.State == backend.StateTerminated {
			break
		}
		if err := sleep(ctx, p.settings.timing.poll); err != nil {
			return err
		}
	}
	if end.Log == nil || end.Log.Log.Usage.CPUAllocated == nil {
		return errors.New("there is no compute log with what was allocated")
	}
	return p.nothingLeft(ctx, f.grant.ID)
}

// nothingLeft fails if AWS shows anything of a grant.
func (p *site) nothingLeft(ctx context.Context, grant backend.GrantID) error {
	left, err := p.look(ctx, &grant)
	if err != nil {
		return err
	}
	if text := left.String(); text != "" {
		return fmt.Errorf("left behind: %s", text)
	}
	return nil
}

// failedBoot makes an instance that finds, at the place of the image, another
// than the one that was granted: it has to boot to learn that.
func (p *site) failedBoot(ctx context.Context, _ *first) error {
	key, err := sshkey.GenerateLoginKey()
	if err != nil {
		return err
	}
	grant, envelope := p.grant(p.settings.timing.life, key.Public.String())
	envelope.ImagePointer = fmt.Sprintf("%s/%x", grant.Image.Digest.Algorithm, grant.Image.Digest.Sum)
	for i := range grant.Image.Digest.Sum {
		grant.Image.Digest.Sum[i] ^= 0xff
	}
	made, err := p.runtime.Provision(ctx, grant, envelope)
	switch {
	case err == nil:
		return fmt.Errorf("instance %s runs another image than was granted", made.Instance.ID)
	case !backenderr.Is(err, backenderr.ImageHashMismatch):
		return fmt.Errorf("want %s, got %w", backenderr.ImageHashMismatch, err)
	case backenderr.CreatedOf(err) != backenderr.CreatedNone:
		return fmt.Errorf("its end is not confirmed: %w", err)
	case !strings.Contains(backenderr.From(err).Metadata[backenderr.MetaConsole], guestapi.VerdictPrefix):
		return fmt.Errorf("what the guest said on the console is not told: %w", err)
	}
	return p.nothingLeft(ctx, grant.ID)
}

// deadline makes the last instance, ends the bridge, and waits.
func (p *site) deadline(ctx context.Context, _ *first) error {
	key, err := sshkey.GenerateLoginKey()
	if err != nil {
		return err
	}
	grant, envelope := p.grant(p.settings.timing.short, key.Public.String())
	made, err := p.runtime.Provision(ctx, grant, envelope)
	if err != nil {
		return err
	}
	p.close()
	// Nothing of the bridge lives now. AWS is asked directly.
	over := []types.InstanceStateName{
		types.InstanceStateNameShuttingDown, types.InstanceStateNameTerminated, types.InstanceStateNameStopping, types.InstanceStateNameStopped,
	}
	for {
		state, err := p.state(ctx, string(made.Instance.ID))
		now := time.Now()
		switch {
		case err != nil && ctx.Err() == nil:
			return err
		case slices.Contains(over, state) && now.Before(grant.ValidTo):
			return fmt.Errorf("the instance was %s %s before its deadline", state, grant.ValidTo.Sub(now).Round(time.Second))
		case state == types.InstanceStateNameShuttingDown || state == types.InstanceStateNameTerminated:
			return nil
		case slices.Contains(over, state):
			return fmt.Errorf("the instance is %s: it goes on costing", state)
		case now.After(grant.ValidTo.Add(p.settings.timing.late)):
			return fmt.Errorf("the instance is %s %s after its deadline", state, now.Sub(grant.ValidTo).Round(time.Second))
		}
		if err := sleep(ctx, p.settings.timing.poll); err != nil {
			return err
		}
	}
}

func (p *site) state(ctx context.Context, instance string) (types.InstanceStateName, error) {
	answer, err := p.ec2.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{instance}})
	if err != nil {
		return "", err
	}
	for _, r := range answer.Reservations {
		for _, i := range r.Instances {
			if i.State != nil {
				return i.State.Name, nil
			}
		}
	}
	return "", fmt.Errorf("AWS doesn't show instance %s", instance)
}
