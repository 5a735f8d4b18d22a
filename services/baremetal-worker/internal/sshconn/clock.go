package sshconn

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// Clock is a host's clock compared with ours.
type Clock struct {
	// Offset is how much the host's is ahead of ours.
	Offset time.Duration
	// Uncertainty is how far Offset may be off, either way.
	Uncertainty time.Duration
}

// Clock compares the host's clock with ours. Deadlines are kept by the host's
// clock: a host that is minutes off ends grants minutes off.
func (c *Conn) Clock(ctx context.Context) (Clock, error) {
	before := time.Now()
	result, err := c.Run(ctx, Command{Args: []string{"date", "-u", "+%s.%N"}, Timeout: 30 * time.Second})
	after := time.Now()
	if err != nil {
		return Clock{}, err
	}
	if err := result.Err("date"); err != nil {
		return Clock{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.cfg.Name)
	}
	host, err := parseDate(string(result.Stdout))
	if err != nil {
		return Clock{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.cfg.Name)
	}
	half := after.Sub(before) / 2
	return Clock{Offset: host.Sub(before.Add(half)), Uncertainty: half}, nil
}

// parseDate reads seconds, a point and nanoseconds since 1970.
func parseDate(text string) (time.Time, error) {
	seconds, nanos, _ := strings.Cut(strings.TrimSpace(text), ".")
	s, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("date said %q", text)
	}
	n, err := strconv.ParseInt(nanos, 10, 64)
	if err != nil || len(nanos) != len("000000000") || n < 0 {
		return time.Time{}, fmt.Errorf("date said %q", text)
	}
	return time.Unix(s, n), nil
}
