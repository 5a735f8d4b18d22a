package ec2backend

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
)

// The tags that everything the worker makes carries. They are a documented
// format (docs/aws.md): a later version has to find what this one made.
const (
	tagBridge  = "compute-bridge:bridge"
	tagBackend = "compute-bridge:backend"
	tagGrant   = "compute-bridge:grant"
	tagAttempt = "compute-bridge:attempt"
	tagValidTo = "compute-bridge:valid-to"
	tagShape   = "compute-bridge:shape"
	// tagContent is a hash of what was granted: whoever finds an instance
	// without a record of it adopts it only for the same grant.
	tagContent = "compute-bridge:content"
	// tagGroup is on shared security groups only: a hash of their rules.
	tagGroup = "compute-bridge:group"
	tagName  = "Name"
)

// identity says whose a resource is.
type identity struct {
	grant   backend.GrantID
	attempt uint32
}

// tags returns what an attempt's resources carry.
func (b *Backend) tags(id identity, p params) []types.Tag {
	all := map[string]string{
		tagBridge:  b.env.BridgeID,
		tagBackend: b.env.Backend,
		tagGrant:   id.grant.String(),
		tagAttempt: strconv.FormatUint(uint64(id.attempt), 10),
		tagValidTo: p.ValidTo.UTC().Format(time.RFC3339),
		tagShape:   fmt.Sprintf("%d/%d/%d", p.Shape.CPU, p.Shape.RAM, p.Shape.Storage),
		tagContent: p.Content,
		tagName:    b.instanceName(id),
	}
	return tagList(all)
}

func tagList(all map[string]string) []types.Tag {
	out := make([]types.Tag, 0, len(all))
	for key, value := range all {
		out = append(out, types.Tag{Key: aws.String(key), Value: aws.String(value)})
	}
	// The same bytes each time: a repeated create call must be equal.
	slices.SortFunc(out, func(a, b types.Tag) int { return strings.Compare(*a.Key, *b.Key) })
	return out
}

// instanceName is for people who look at the console.
func (b *Backend) instanceName(id identity) string {
	return fmt.Sprintf("cb-%s-%s-%d", b.env.BridgeID, id.grant.String()[:12], id.attempt)
}

// ownFilters select what this worker's bridge has.
func (b *Backend) ownFilters() []types.Filter {
	return []types.Filter{
		{Name: aws.String("tag:" + tagBridge), Values: []string{b.env.BridgeID}},
		{Name: aws.String("tag:" + tagBackend), Values: []string{b.env.Backend}},
	}
}

// labels are a resource's tags, read.
type labels struct {
	identity

	validTo time.Time
	shape   backend.Shape
	content string
}

// readTags returns what tags say; false if they don't name a grant and an
// attempt, as when somebody changed them by hand.
func readTags(tags []types.Tag) (labels, bool) {
	var out labels
	named, numbered := false, false
	for _, t := range tags {
		value := aws.ToString(t.Value)
		switch aws.ToString(t.Key) {
		case tagGrant:
			id, err := hex.DecodeString(value)
			if err == nil && len(id) == len(out.grant) {
				copy(out.grant[:], id)
				named = true
			}
		case tagAttempt:
			n, err := strconv.ParseUint(value, 10, 32)
			out.attempt, numbered = uint32(n), err == nil && n > 0
		case tagValidTo:
			if at, err := time.Parse(time.RFC3339, value); err == nil {
				out.validTo = at.UTC()
			}
		case tagShape:
			out.shape, _ = readShape(value) // only for people and logs
		case tagContent:
			out.content = value
		}
	}
	return out, named && numbered
}

func readShape(text string) (backend.Shape, bool) {
	fields := strings.Split(text, "/")
	if len(fields) != 3 {
		return backend.Shape{}, false
	}
	var n [3]int64
	for i, f := range fields {
		v, err := strconv.ParseInt(f, 10, 64)
		if err != nil || v < 0 {
			return backend.Shape{}, false
		}
		n[i] = v
	}
	return backend.Shape{CPU: backend.Millicores(n[0]), RAM: backend.MiB(n[1]), Storage: backend.GiB(n[2])}, true
}

// scheduleName names an attempt's schedule. EventBridge Scheduler allows 64
// characters of [0-9a-zA-Z-_.], too few for the hexadecimal grant id and the
// bridge's name, and shows no tags of schedules in lists: so the name alone
// says whose it is.
func (b *Backend) scheduleName(id identity) string {
	return fmt.Sprintf("%s%s.%d", b.schedulePrefix(), base64.RawURLEncoding.EncodeToString(id.grant[:]), id.attempt)
}

// schedulePrefix begins the names of this worker's schedules.
func (b *Backend) schedulePrefix() string {
	sum := fnv.New32a()
	_, _ = sum.Write([]byte(b.env.BridgeID + "/" + b.env.Backend)) // never fails
	return fmt.Sprintf("cb%08x", sum.Sum32())
}

// readScheduleName is the inverse of scheduleName.
func (b *Backend) readScheduleName(name string) (identity, bool) {
	rest, ours := strings.CutPrefix(name, b.schedulePrefix())
	encoded, number, ok := strings.Cut(rest, ".")
	if !ours || !ok {
		return identity{}, false
	}
	var out identity
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	n, errN := strconv.ParseUint(number, 10, 32)
	if err != nil || errN != nil || len(raw) != len(out.grant) || n == 0 {
		return identity{}, false
	}
	copy(out.grant[:], raw)
	out.attempt = uint32(n)
	return out, true
}
