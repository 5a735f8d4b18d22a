package ec2backend

import (
	"cmp"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
)

// What docs/aws.md has where an operator puts names of their own.
const (
	documentedBridge  = "example"
	documentedAccount = "123456789012"
	documentedGroup   = "compute-bridge"
	documentedRole    = "arn:aws:iam::123456789012:role/compute-bridge-deadline"
	documentedBucket  = "example-images"
)

// statement is one of an IAM policy's, of those forms that the documented ones
// use.
type statement struct {
	Sid       string
	Effect    string
	Action    oneOrMore
	Resource  oneOrMore
	Condition struct {
		StringEquals map[string]oneOrMore
	}
}

// oneOrMore is a list that IAM lets be written without brackets.
type oneOrMore []string

func (l *oneOrMore) UnmarshalJSON(data []byte) error {
	var one string
	if err := json.Unmarshal(data, &one); err == nil {
		*l = oneOrMore{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(l))
}

type policy []statement

// readPolicy returns the policy that follows its name in docs/aws.md.
func readPolicy(t *testing.T, name string) policy {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "<!-- policy: "+name+" -->\n```json\n")
	block, _, ends := strings.Cut(rest, "\n```")
	if !found || !ends {
		t.Fatalf("docs/aws.md has no policy %q", name)
	}
	var document struct {
		Version   string
		Statement policy
	}
	d := json.NewDecoder(strings.NewReader(block))
	d.DisallowUnknownFields() // a condition that this test doesn't understand is no condition
	if err := d.Decode(&document); err != nil {
		t.Fatalf("policy %q: %v", name, err)
	}
	if document.Version != "2012-10-17" || len(document.Statement) == 0 {
		t.Fatalf("policy %q has version %q and %d statements", name, document.Version, len(document.Statement))
	}
	for _, s := range document.Statement {
		if s.Effect != "Allow" || len(s.Action) == 0 || len(s.Resource) == 0 {
			t.Fatalf("policy %q: statement %q allows nothing", name, s.Sid)
		}
	}
	return document.Statement
}

// act is what IAM is asked: may this be done to that resource.
type act struct {
	action, resource string
	context          map[string]string
}

// String names it as a message does.
func (a act) String() string { return fmt.Sprintf("%s on %s with %v", a.action, a.resource, a.context) }

// allows decides as IAM does: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
func (p policy) allows(a act) bool {
	return slices.ContainsFunc(p, func(s statement) bool {
		if !slices.Contains(s.Action, a.action) || !slices.ContainsFunc(s.Resource, func(pattern string) bool { return matches(pattern, a.resource) }) {
			return false
		}
		for key, values := range s.Condition.StringEquals {
			have, ok := a.context[key]
			if !ok || !slices.Contains(values, have) {
				return false
			}
		}
		return true
	})
}

// matches knows IAM's wildcard, which slashes and colons don't stop.
func matches(pattern, resource string) bool {
	parts := strings.Split(pattern, "*")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile("^" + strings.Join(parts, ".*") + "$").MatchString(resource)
}

func (p policy) actions() []string {
	var all []string
	for _, s := range p {
		all = append(all, s.Action...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// iamPrefix is what a service's actions begin with in policies, by the name that
// its requests are signed for and by that of its Go package.
var iamPrefix = map[string]string{
	"ec2": "ec2", "ssm": "ssm", "scheduler": "scheduler", "s3": "s3", "sts": "sts", "monitoring": "cloudwatch", "cloudwatch": "cloudwatch",
}

// whoAmI needs no permission
// (https://docs.aws.amazon.com/STS/latest/APIReference/API_GetCallerIdentity.html).
const whoAmI = "sts:GetCallerIdentity"

// tagged are the tags of all that a test's cloud ever had, by id.
type tagged map[string]map[string]string

func (all tagged) collect(cloud *ec2sim.Cloud) {
	for _, i := range cloud.History() {
		all[i.ID] = i.Tags
	}
	for _, v := range cloud.Volumes() {
		all[v.ID] = v.Tags
	}
	for _, n := range cloud.NetworkInterfaces() {
		all[n.ID] = n.Tags
	}
	for _, g := range cloud.SecurityGroups() {
		all[g.ID] = g.Tags
	}
}

// arn of a resource of EC2's; images belong to whoever made them.
func arn(region, kind, id string) string {
	owner := documentedAccount
	if kind == "image" {
		owner = ""
	}
	return fmt.Sprintf("arn:aws:ec2:%s:%s:%s/%s", region, owner, kind, id)
}

// list reads a numbered parameter.
func numbered(params url.Values, name string) []string {
	var out []string
	for n := 1; params.Has(name + "." + strconv.Itoa(n)); n++ {
		out = append(out, params.Get(name+"."+strconv.Itoa(n)))
	}
	return out
}

// asked are the questions that a request puts to IAM: one for each resource that
// it makes, uses or names
// (https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html).
func asked(t *testing.T, r ec2sim.Request, known tagged) []act {
	t.Helper()
	action := iamPrefix[r.Service] + ":" + r.Action
	on := func(kind, id string) act {
		a := act{action, arn(r.Region, kind, id), map[string]string{}}
		for key, value := range known[id] {
			a.context["aws:ResourceTag/"+key] = value
		}
		return a
	}
	// made is a resource with the tags that the request gives it, which is a
	// question of its own.
	made := func(kind string) []act {
		tags := map[string]string{}
		for n := 1; r.Params.Has(fmt.Sprintf("TagSpecification.%d.ResourceType", n)); n++ {
			prefix := fmt.Sprintf("TagSpecification.%d.", n)
			if r.Params.Get(prefix+"ResourceType") != kind {
				continue
			}
			for m := 1; r.Params.Has(fmt.Sprintf("%sTag.%d.Key", prefix, m)); m++ {
				tags["aws:RequestTag/"+r.Params.Get(fmt.Sprintf("%sTag.%d.Key", prefix, m))] = r.Params.Get(fmt.Sprintf("%sTag.%d.Value", prefix, m))
			}
		}
		out := []act{{action, arn(r.Region, kind, "*"), tags}}
		if len(tags) > 0 {
			withAction := maps.Clone(tags)
			withAction["ec2:CreateAction"] = r.Action
			out = append(out, act{"ec2:CreateTags", arn(r.Region, kind, "*"), withAction})
		}
		return out
	}
	var out []act
	switch action {
	case whoAmI:
		return nil
	case "ec2:RunInstances":
		subnet := cmp.Or(r.Params.Get("NetworkInterface.1.SubnetId"), r.Params.Get("SubnetId"))
		out = append(out, on("image", r.Params.Get("ImageId")), on("subnet", subnet))
		groups := append(numbered(r.Params, "NetworkInterface.1.SecurityGroupId"), numbered(r.Params, "SecurityGroupId")...)
		if len(groups) == 0 {
			groups = []string{"sg-default"}
		}
		for _, id := range groups {
			out = append(out, on("security-group", id))
		}
		return slices.Concat(out, made("instance"), made("volume"), made("network-interface"))
	case "ec2:CreateSecurityGroup":
		return append(made("security-group"), on("vpc", r.Params.Get("VpcId")))
	case "ec2:AuthorizeSecurityGroupIngress", "ec2:AuthorizeSecurityGroupEgress", "ec2:RevokeSecurityGroupEgress", "ec2:DeleteSecurityGroup":
		return []act{on("security-group", r.Params.Get("GroupId"))}
	case "ec2:TerminateInstances":
		for _, id := range numbered(r.Params, "InstanceId") {
			out = append(out, on("instance", id))
		}
		return out
	case "ec2:GetConsoleOutput":
		return []act{on("instance", r.Params.Get("InstanceId"))}
	case "ec2:DeleteVolume":
		return []act{on("volume", r.Params.Get("VolumeId"))}
	case "ec2:DeleteNetworkInterface":
		return []act{on("network-interface", r.Params.Get("NetworkInterfaceId"))}
	case "ssm:GetParameter":
		return []act{{action: action, resource: fmt.Sprintf("arn:aws:ssm:%s::parameter%s", r.Region, r.Params.Get("Name"))}}
	case "scheduler:CreateSchedule":
		out = []act{{"iam:PassRole", r.Params.Get("Target.RoleArn"), map[string]string{"iam:PassedToService": "scheduler.amazonaws.com"}}}
		fallthrough
	case "scheduler:DeleteSchedule", "scheduler:GetSchedule":
		group, name := cmp.Or(r.Params.Get("GroupName"), "default"), r.Params.Get("Name")
		return append(out, act{action: action, resource: fmt.Sprintf("arn:aws:scheduler:%s:%s:schedule/%s/%s", r.Region, documentedAccount, group, name)})
	}
	if r.Mutates {
		t.Errorf("%s changes something, and this test doesn't know what", action)
	}
	return []act{{action: action, resource: "*"}}
}

// The life of a grant with everything that the worker ever calls: each request
// must be allowed, for the very resources that it is about.
func TestThePolicyAllowsWhatTheWorkerCalls(t *testing.T) {
	t.Parallel()
	known := tagged{}
	s := openSuiteSite(t, 0)
	cloud := s.cloud.Cloud
	s.config.Deadline, s.config.ScheduleRole = deadlinePlatform, documentedRole
	s.config.Regions[0].AllowlistEgress = []string{"192.0.2.0/24"}
	b, err := s.start(t)
	if err != nil {
		t.Fatal(err)
	}

	// A boot that fails, whose console is read.
	s.cloud.Machines.FailNext("no such file")
	g, e := s.grant()
	if _, err := b.Provision(asRequester(t.Context()), g, e); !backenderr.Is(err, backenderr.WorkloadFailed) {
		t.Fatalf("a boot that fails: %v", err)
	}
	known.collect(cloud)
	// A group with ports and destinations, for which there is no room but that of
	// the group before, and what an instance leaves behind.
	fillUp(cloud, 1)
	s.mu.Lock()
	driver, ok := s.driver.(*Backend)
	s.mu.Unlock()
	if !ok {
		t.Fatalf("the driver is a %T", s.driver)
	}
	driver.groups.forgetAsked()
	g, e = s.grant()
	g.Ports = []backend.Port{{Number: 8080, Protocol: backend.TCP}}
	g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"198.51.100.0/24"}}
	p, err := b.Provision(asRequester(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	if err := cloud.LeaveParts(string(p.Instance.ID)); err != nil {
		t.Fatal(err)
	}
	known.collect(cloud)
	terminate(t, b, g.ID)
	if _, err := driver.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	known.collect(cloud)

	allowed := slices.Concat(readPolicy(t, "worker"), readPolicy(t, "platform deadline"))
	seen := map[string]bool{}
	for _, r := range cloud.Requests() {
		for _, a := range asked(t, r, known) {
			seen[a.action] = true
			a = documented(a)
			if !allowed.allows(a) && !isProbe(r) {
				t.Errorf("not allowed: %s", a)
			}
		}
	}
	// What nobody called proves nothing.
	for _, action := range allowed.actions() {
		if !seen[action] && action != "s3:GetObject" {
			t.Errorf("the policy allows %s, which this life of a grant never used", action)
		}
	}
}

// isProbe says that a request only asks whether an instance might be ended that
// doesn't exist: see tryTerminate.
func isProbe(r ec2sim.Request) bool {
	return r.DryRun && r.Action == "TerminateInstances" && r.Params.Get("InstanceId.1") == probedInstance
}

// documented has the names that docs/aws.md uses in place of the fixture's.
func documented(a act) act {
	out := act{a.action, strings.Replace(a.resource, ":schedule/default/", ":schedule/"+documentedGroup+"/", 1), map[string]string{}}
	for key, value := range a.context {
		if strings.HasSuffix(key, "/"+ec2tags.Bridge) && value == "test" {
			value = documentedBridge
		}
		out.context[key] = value
	}
	return out
}

// calledActions are the IAM actions that the worker's source can use: of the
// calls whose parameters it names, and those that certain parameters imply.
func calledActions(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d source files, %v", len(files), err)
	}
	var out []string
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		services := map[string]string{} // local name of the package to its service
		for _, i := range file.Imports {
			imported, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if service, ok := strings.CutPrefix(imported, "github.com/aws/aws-sdk-go-v2/service/"); ok && !strings.Contains(service, "/") {
				local := path.Base(imported)
				if i.Name != nil {
					local = i.Name.Name
				}
				services[local] = service
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			literal, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			of, ok := literal.Type.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			from, ok := of.X.(*ast.Ident)
			if !ok {
				return true
			}
			if action, ok := strings.CutSuffix(of.Sel.Name, "Input"); ok && services[from.Name] != "" {
				out = append(out, iamPrefix[services[from.Name]]+":"+action)
			}
			for _, element := range literal.Elts {
				if pair, ok := element.(*ast.KeyValueExpr); ok {
					switch key, _ := pair.Key.(*ast.Ident); {
					case key == nil:
					case key.Name == "TagSpecifications":
						out = append(out, "ec2:CreateTags")
					case key.Name == "RoleArn":
						out = append(out, "iam:PassRole")
					}
				}
			}
			return true
		})
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(action string) bool { return action == whoAmI })
}

func TestThePolicyAllowsNothingThatTheWorkerNeverCalls(t *testing.T) {
	t.Parallel()
	called := calledActions(t)
	allowed := slices.Concat(readPolicy(t, "worker"), readPolicy(t, "platform deadline")).actions()
	for _, action := range allowed {
		if !slices.Contains(called, action) {
			t.Errorf("the policy allows %s, which the source never calls", action)
		}
	}
	for _, action := range called {
		if !slices.Contains(allowed, action) {
			t.Errorf("the source calls %s, which the policy doesn't allow", action)
		}
	}
	for _, action := range readPolicy(t, "worker").actions() {
		if strings.HasPrefix(action, "scheduler:") || strings.HasPrefix(action, "iam:") {
			t.Errorf("workers without schedules are allowed %s", action)
		}
	}
}

// What isn't the bridge's is out of reach of its worker's credentials, too.
func TestThePolicyReachesNothingOfOthers(t *testing.T) {
	t.Parallel()
	allowed := slices.Concat(readPolicy(t, "worker"), readPolicy(t, "platform deadline"))
	const region = "eu-central-1"
	ours, theirs := map[string]string{"aws:ResourceTag/" + ec2tags.Bridge: documentedBridge}, map[string]string{"aws:ResourceTag/" + ec2tags.Bridge: "another"}
	named := map[string]string{"aws:RequestTag/" + ec2tags.Bridge: documentedBridge}
	schedule := func(group, name string) string {
		return fmt.Sprintf("arn:aws:scheduler:%s:%s:schedule/%s/%s", region, documentedAccount, group, name)
	}
	passes := map[string]string{"iam:PassedToService": "scheduler.amazonaws.com"}
	for _, c := range []struct {
		name string
		act  act
		want bool
	}{
		{"end an instance of the bridge's", act{"ec2:TerminateInstances", arn(region, "instance", "i-1"), ours}, true},
		{"end an instance of another bridge's", act{"ec2:TerminateInstances", arn(region, "instance", "i-1"), theirs}, false},
		{"end an instance without tags", act{"ec2:TerminateInstances", arn(region, "instance", "i-1"), nil}, false},
		{"delete a volume of another bridge's", act{"ec2:DeleteVolume", arn(region, "volume", "vol-1"), theirs}, false},
		{"delete an interface without tags", act{"ec2:DeleteNetworkInterface", arn(region, "network-interface", "eni-1"), nil}, false},
		{"delete a group of others", act{"ec2:DeleteSecurityGroup", arn(region, "security-group", "sg-1"), nil}, false},
		{"delete a group of another bridge's", act{"ec2:DeleteSecurityGroup", arn(region, "security-group", "sg-1"), theirs}, false},
		{"open a group of others", act{"ec2:AuthorizeSecurityGroupIngress", arn(region, "security-group", "sg-1"), nil}, false},
		{"read the console of others", act{"ec2:GetConsoleOutput", arn(region, "instance", "i-1"), theirs}, false},
		{"make an instance of the bridge's", act{"ec2:RunInstances", arn(region, "instance", "*"), named}, true},
		{"make an instance without tags", act{"ec2:RunInstances", arn(region, "instance", "*"), nil}, false},
		{"make an instance in another bridge's name", act{"ec2:RunInstances", arn(region, "instance", "*"), map[string]string{"aws:RequestTag/" + ec2tags.Bridge: "another"}}, false},
		{"make a volume without tags", act{"ec2:RunInstances", arn(region, "volume", "*"), nil}, false},
		{"tag what is there already", act{"ec2:CreateTags", arn(region, "instance", "i-1"), named}, false},
		{"tag an image", act{"ec2:CreateTags", arn(region, "image", "ami-1"), map[string]string{"ec2:CreateAction": "RunInstances"}}, false},
		{"read a parameter of the account's", act{"ssm:GetParameter", "arn:aws:ssm:" + region + ":" + documentedAccount + ":parameter/database/password", nil}, false},
		{"read an image", act{"s3:GetObject", "arn:aws:s3:::" + documentedBucket + "/images/sha256/00", nil}, true},
		{"read another bucket", act{"s3:GetObject", "arn:aws:s3:::" + documentedBucket + "-2/secret", nil}, false},
		{"make a schedule", act{"scheduler:CreateSchedule", schedule(documentedGroup, "cb00000000.x.1"), nil}, true},
		{"make a schedule in another group", act{"scheduler:CreateSchedule", schedule("default", "cb00000000.x.1"), nil}, false},
		{"delete a schedule of others", act{"scheduler:DeleteSchedule", schedule(documentedGroup, "backup"), nil}, false},
		{"hand the role to schedules", act{"iam:PassRole", documentedRole, passes}, true},
		{"hand the role to instances", act{"iam:PassRole", documentedRole, map[string]string{"iam:PassedToService": "ec2.amazonaws.com"}}, false},
		{"hand over another role", act{"iam:PassRole", "arn:aws:iam::" + documentedAccount + ":role/admin", passes}, false},
		{"read user-data", act{"ec2:DescribeInstanceAttribute", arn(region, "instance", "i-1"), ours}, false},
	} {
		if got := allowed.allows(c.act); got != c.want {
			t.Errorf("%s: allowed %t, want %t", c.name, got, c.want)
		}
	}
}

// The documented names of schedules are the worker's.
func TestSchedulesAreNamedAsThePolicySays(t *testing.T) {
	t.Parallel()
	b := &Backend{}
	b.env.BridgeID, b.env.Backend = "test", "aws"
	name := b.scheduleName(identity{backend.GrantID{1, 2, 3}, 4})
	pattern := fmt.Sprintf("arn:aws:scheduler:*:%s:schedule/%s/cb*", documentedAccount, documentedGroup)
	if !matches(pattern, fmt.Sprintf("arn:aws:scheduler:%s:%s:schedule/%s/%s", suiteRegion, documentedAccount, documentedGroup, name)) {
		t.Errorf("schedule %q", name)
	}
	if !slices.ContainsFunc(readPolicy(t, "platform deadline"), func(s statement) bool { return slices.Contains(s.Resource, pattern) }) {
		t.Errorf("no statement is about %s", pattern)
	}
}
