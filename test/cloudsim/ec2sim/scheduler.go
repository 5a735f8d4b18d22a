package ec2sim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
)

const (
	// TerminateTarget is the one target that schedules have here.
	TerminateTarget = "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances"
	// defaultScheduleGroup is the group that every account has.
	defaultScheduleGroup = "default"
	// schedulePrecision is how late a schedule may be
	// (https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html):
	// within the minute.
	schedulePrecision = 30 * time.Second
)

// Schedule is what there is to know of a schedule.
type Schedule struct {
	Name, Region, Group string
	// At is when it is due.
	At                  time.Time
	Expression          string
	Timezone            string
	Target, Role, Input string
	Description         string
	State               string
	// DeleteAfter says that it goes once it has been carried out.
	DeleteAfter bool
}

// schedule is a schedule in its place. The cloud's mu guards it.
type schedule struct {
	Schedule
	serial int64
	token  string
	made   time.Time
	// gone is closed when it is deleted before it is due.
	gone chan struct{}
}

func (s *schedule) order() int64 { return s.serial }

func (s *schedule) arn() string {
	return fmt.Sprintf("arn:aws:scheduler:%s:%s:schedule/%s/%s", s.Region, Account, s.Group, s.Name)
}

// scheduler is EventBridge Scheduler, as far as one-shot schedules go that
// terminate instances.
func (c *Cloud) scheduler() *service {
	// https://docs.aws.amazon.com/scheduler/latest/UserGuide/scheduler-quotas.html
	// has requests per second in the hundreds; a burst as large as that is assumed.
	limit := cloudsim.Limit{Burst: 250, PerSecond: 250}
	return &service{
		name: "scheduler",
		actions: map[string]handler{
			"CreateSchedule": {mutates: true, prepare: createSchedule, tokens: limit},
			"GetSchedule":    {prepare: getSchedule, tokens: limit},
			"DeleteSchedule": {mutates: true, prepare: deleteSchedule, tokens: limit},
			"ListSchedules":  {prepare: listSchedules, tokens: limit},
		},
		decode:        decodeScheduler,
		unknownAction: func(action string) *Error { return notFound("No operation is at %s", action) },
		answer: func(w http.ResponseWriter, id, _ string, result any) {
			w.Header().Set("X-Amzn-Requestid", id)
			writeJSON(w, http.StatusOK, "application/json", result)
		},
		refuse: func(w http.ResponseWriter, id string, err *Error) {
			w.Header().Set("X-Amzn-Requestid", id)
			w.Header().Set("X-Amzn-Errortype", err.Code)
			writeJSON(w, err.Status, "application/json", map[string]any{"Message": err.Message})
		},
		codes: codesREST(),
	}
}

func codesREST() codes {
	common := codesJSON()
	common.unknownKey.Status = http.StatusForbidden
	common.expired.Status = http.StatusForbidden
	common.denied.Status = http.StatusForbidden
	common.throttled.Status = http.StatusTooManyRequests
	return common
}

func notFound(format string, args ...any) *Error {
	return &Error{Status: http.StatusNotFound, Code: "ResourceNotFoundException", Message: fmt.Sprintf(format, args...)}
}

func invalidSchedule(format string, args ...any) *Error {
	return refusal("ValidationException", format, args...)
}

// decodeScheduler finds the action by method and path. What is in the query is
// named as in the body.
func decodeScheduler(r *http.Request, body []byte) (string, url.Values, *Error) {
	values, fault := flattenJSON(body)
	if fault != nil {
		return "", nil, fault
	}
	for key, given := range r.URL.Query() {
		values[strings.ToUpper(key[:min(1, len(key))])+key[min(1, len(key)):]] = given
	}
	name, named := strings.CutPrefix(r.URL.Path, "/schedules/")
	switch {
	case r.URL.Path == "/schedules" && r.Method == http.MethodGet:
		return "ListSchedules", values, nil
	case !named:
		return r.Method + " " + r.URL.Path, values, nil
	}
	values.Set("Name", name)
	actions := map[string]string{http.MethodPost: "CreateSchedule", http.MethodGet: "GetSchedule", http.MethodDelete: "DeleteSchedule"}
	if action, ok := actions[r.Method]; ok {
		return action, values, nil
	}
	return r.Method + " " + r.URL.Path, values, nil
}

var (
	scheduleName = regexp.MustCompile(`^[0-9a-zA-Z-_.]{1,64}$`)
	scheduleAt   = regexp.MustCompile(`^at\((\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})\)$`)
	roleARN      = regexp.MustCompile(`^arn:aws:iam::\d{12}:role/[\w+=,.@/-]+$`)
)

func createSchedule(q *call) effect {
	p := q.params
	s := &schedule{
		Schedule: Schedule{
			Name: p.required("Name"), Region: q.region.Name, Group: p.oneOf("GroupName", defaultScheduleGroup),
			Expression: p.required("ScheduleExpression"), Timezone: p.text("ScheduleExpressionTimezone"),
			Description: p.text("Description"), State: p.oneOf("State", "ENABLED", "DISABLED"),
			DeleteAfter: p.oneOf("ActionAfterCompletion", "NONE", "DELETE") == "DELETE",
		},
		token: p.text("ClientToken"), gone: make(chan struct{}),
	}
	if s.Timezone == "" {
		s.Timezone = "UTC"
	}
	target := p.below("Target")
	s.Target, s.Role, s.Input = target.required("Arn"), target.required("RoleArn"), target.required("Input")
	retry := target.below("RetryPolicy")
	retry.integer("MaximumRetryAttempts", 185)
	retry.integer("MaximumEventAgeInSeconds", 86400)
	if mode := p.below("FlexibleTimeWindow").required("Mode"); mode != "OFF" {
		p.fail(invalidSchedule("FlexibleTimeWindow's mode must be OFF here"))
	}
	if group := p.text("GroupName"); group != "" && group != defaultScheduleGroup {
		*p.fault = notFound("Schedule group %s does not exist.", group)
	}
	s.check(p)
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		if other := r.schedules[s.Name]; other != nil {
			if s.token != "" && other.token == s.token && other.Schedule == s.Schedule {
				return map[string]any{"ScheduleArn": other.arn()}, nil
			}
			return nil, &Error{Status: http.StatusConflict, Code: "ConflictException", Message: fmt.Sprintf("Schedule %s already exists.", s.Name)}
		}
		s.serial, s.made = c.nextSerial(), c.clock.Now()
		r.schedules[s.Name] = s
		// One in the past is kept and never carried out.
		if s.State == "ENABLED" && s.At.After(s.made) {
			c.background(func() { c.carryOutSchedule(r, s) })
		}
		return map[string]any{"ScheduleArn": s.arn()}, nil
	}
}

// check is what the service looks at before it takes a schedule.
func (s *schedule) check(p params) {
	if !scheduleName.MatchString(s.Name) {
		p.fail(invalidSchedule("Value '%s' at 'name' failed to satisfy constraint", s.Name))
	}
	zone, err := time.LoadLocation(s.Timezone)
	at := scheduleAt.FindStringSubmatch(s.Expression)
	if err != nil || at == nil {
		p.fail(invalidSchedule("Invalid Schedule Expression %s.", s.Expression))
		return
	}
	if s.At, err = time.ParseInLocation("2006-01-02T15:04:05", at[1], zone); err != nil {
		p.fail(invalidSchedule("Invalid Schedule Expression %s.", s.Expression))
	}
	if s.Target != TerminateTarget {
		p.fail(invalidSchedule("Provided Arn is not in correct format."))
	}
	if !roleARN.MatchString(s.Role) {
		p.fail(invalidSchedule("Provided role is not in correct format."))
	}
	if _, err := s.instances(); err != nil {
		p.fail(invalidSchedule("The input is not that of TerminateInstances: %v", err))
	}
}

// instances reads whom the target is to terminate.
func (s *schedule) instances() ([]string, error) {
	var input struct{ InstanceIds []string } //nolint:revive // the service's own name of it
	decoder := json.NewDecoder(bytes.NewReader([]byte(s.Input)))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&input); err != nil {
		return nil, err
	}
	return input.InstanceIds, nil
}

// carryOutSchedule waits until a schedule is due and does what it says.
func (c *Cloud) carryOutSchedule(r *region, s *schedule) {
	// Its time is the world's; how late it is, the simulator's.
	if !cloudsim.WaitReal(c.life, s.At.Sub(c.clock.Now()), s.gone) || !c.clock.Wait(c.life, schedulePrecision, s.gone) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ids, err := s.instances()
	if err == nil {
		if _, fault := c.terminate(r, ids); fault != nil {
			err = fault
		}
	}
	if err != nil {
		c.log.Warn("A schedule did not terminate its instance", "schedule", s.Name, "error", err)
	}
	if s.DeleteAfter && r.schedules[s.Name] == s {
		delete(r.schedules, s.Name)
	}
}

// readSchedule reads which schedule is meant.
func readSchedule(q *call) func() (*schedule, *Error) {
	name, group := q.params.required("Name"), q.params.text("GroupName")
	return func() (*schedule, *Error) {
		s := q.region.schedules[name]
		if s == nil || group != "" && group != s.Group {
			return nil, notFound("Schedule %s does not exist.", name)
		}
		return s, nil
	}
}

func getSchedule(q *call) effect {
	find := readSchedule(q)
	return func() (any, *Error) {
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		s, fault := find()
		if fault != nil {
			return nil, fault
		}
		answer := s.summary()
		answer["Target"] = map[string]any{"Arn": s.Target, "RoleArn": s.Role, "Input": s.Input}
		answer["ScheduleExpression"] = s.Expression
		answer["ScheduleExpressionTimezone"] = s.Timezone
		answer["FlexibleTimeWindow"] = map[string]any{"Mode": "OFF"}
		answer["ActionAfterCompletion"] = map[bool]string{true: "DELETE", false: "NONE"}[s.DeleteAfter]
		if s.Description != "" {
			answer["Description"] = s.Description
		}
		return answer, nil
	}
}

func (s *schedule) summary() map[string]any {
	return map[string]any{
		"Arn": s.arn(), "Name": s.Name, "GroupName": s.Group, "State": s.State,
		"CreationDate": seconds(s.made), "LastModificationDate": seconds(s.made),
		"Target": map[string]any{"Arn": s.Target},
	}
}

func deleteSchedule(q *call) effect {
	find := readSchedule(q)
	q.params.text("ClientToken")
	return func() (any, *Error) {
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		s, fault := find()
		if fault != nil {
			return nil, fault
		}
		close(s.gone)
		delete(q.region.schedules, s.Name)
		return map[string]any{}, nil
	}
}

func listSchedules(q *call) effect {
	p := q.params
	prefix, state := p.text("NamePrefix"), p.oneOf("State", "", "ENABLED", "DISABLED")
	group := p.text("ScheduleGroup")
	wanted := readPage(p, 1, 100, nil)
	if wanted.size == 0 {
		wanted.size = 100
	}
	return func() (any, *Error) {
		q.cloud.mu.Lock()
		defer q.cloud.mu.Unlock()
		if group != "" && group != defaultScheduleGroup {
			return nil, notFound("Schedule group %s does not exist.", group)
		}
		all := slices.DeleteFunc(inOrder(q.region.schedules), func(s *schedule) bool {
			return !strings.HasPrefix(s.Name, prefix) || state != "" && s.State != state
		})
		all, token := cut(all, wanted, (*schedule).order)
		summaries := make([]any, len(all))
		for i, s := range all {
			summaries[i] = s.summary()
		}
		answer := map[string]any{"Schedules": summaries}
		if token.text != "" {
			answer["NextToken"] = token.text
		}
		return answer, nil
	}
}

// Schedules are all that exist.
func (c *Cloud) Schedules() []Schedule {
	return list(c, func(r *region) map[string]*schedule { return r.schedules }, func(s *schedule) Schedule { return s.Schedule })
}
