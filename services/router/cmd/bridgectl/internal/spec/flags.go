// Package spec makes a ProvisionRequest of what an operator writes: flags, or
// a grant as a JSON or YAML file.
//
// Values are read strictly. A unit that is missing, or a part of one that the
// contract can't express, is an error and never rounded: who asks for 1.5
// thousandths of a core should learn that there is no such thing.
package spec

import (
	"encoding/hex"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// maxNumber is far longer than any sensible number; it bounds the work.
const maxNumber = 32

// decimal reads a positive decimal number, exactly. Fractions, exponents and
// signs are no decimal numbers here.
func decimal(s string) (*big.Rat, bool) {
	if s == "" || len(s) > maxNumber || s[0] == '.' || s[len(s)-1] == '.' || strings.Count(s, ".") > 1 {
		return nil, false
	}
	for _, r := range s {
		if r != '.' && (r < '0' || r > '9') {
			return nil, false
		}
	}
	return new(big.Rat).SetString(s)
}

// whole returns v times factor if that is a whole number from 1 to most.
func whole(s string, v *big.Rat, factor, most int64, unit string) (int64, error) {
	n := new(big.Rat).Mul(v, new(big.Rat).SetInt64(factor))
	switch {
	case !n.IsInt():
		return 0, fmt.Errorf("%q is no whole number of %s", s, unit)
	case n.Sign() <= 0:
		return 0, fmt.Errorf("%q: must be more than zero", s)
	case n.Cmp(new(big.Rat).SetInt64(most)) > 0:
		return 0, fmt.Errorf("%q: more than %d %s", s, most, unit)
	}
	return n.Num().Int64(), nil
}

// CPU reads "500m" (thousandths of a core), "2" or "1.5" (cores).
func CPU(s string) (int64, error) {
	text, milli := strings.CutSuffix(s, "m")
	v, ok := decimal(text)
	if !ok {
		return 0, fmt.Errorf("%q: want cores such as 2 or 1.5, or thousandths of a core such as 500m", s)
	}
	factor := int64(1000)
	if milli {
		factor = 1
	}
	return whole(s, v, factor, int64(backend.MaxCPU), "thousandths of a core")
}

// units are the powers of 1024, from MiB.
var units = map[string]int64{"Mi": 1, "Gi": 1 << 10, "Ti": 1 << 20, "Pi": 1 << 30}

// size reads "512Mi", "2Gi", "1.5Ti", with or without a B, in MiB.
func size(s string) (*big.Rat, error) {
	digits := strings.TrimRight(s, "KMGTPEkmgtpeiBb")
	v, ok := decimal(digits)
	if !ok {
		return nil, fmt.Errorf("%q: want a size such as 512Mi, 2Gi or 1Ti", s)
	}
	unit := strings.TrimSuffix(s[len(digits):], "B")
	factor, ok := units[unit]
	switch {
	case ok:
		return v.Mul(v, new(big.Rat).SetInt64(factor)), nil
	case unit == "":
		return nil, fmt.Errorf("%q: the unit is missing, one of Mi, Gi, Ti, Pi", s)
	}
	return nil, fmt.Errorf("%q: unknown unit %q, want one of Mi, Gi, Ti, Pi (powers of 1024)", s, s[len(digits):])
}

// RAM reads an amount of memory in MiB.
func RAM(s string) (int64, error) {
	v, err := size(s)
	if err != nil {
		return 0, err
	}
	return whole(s, v, 1, int64(backend.MaxRAM), "MiB")
}

// Disk reads an amount of disk in GiB.
func Disk(s string) (int64, error) {
	v, err := size(s)
	if err != nil {
		return 0, err
	}
	return whole(s, v.Quo(v, new(big.Rat).SetInt64(1<<10)), 1, int64(backend.MaxStorage), "GiB")
}

// Port reads "80/tcp", "53/udp" or "80", which is TCP.
func Port(s string) (*bridgev1.Port, error) {
	number, protocol, given := strings.Cut(s, "/")
	if !given {
		protocol = "tcp"
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 || number[0] == '0' || number[0] == '+' {
		return nil, fmt.Errorf("%q: want a port from 1 to 65535 with its protocol, such as 80/tcp", s)
	}
	switch protocol {
	case "tcp":
		return &bridgev1.Port{Number: uint32(n), Protocol: bridgev1.Protocol_PROTOCOL_TCP}, nil
	case "udp":
		return &bridgev1.Port{Number: uint32(n), Protocol: bridgev1.Protocol_PROTOCOL_UDP}, nil
	}
	return nil, fmt.Errorf("%q: unknown protocol %q, want tcp or udp", s, protocol)
}

// maxSpan keeps a slip of the pen from overflowing; the backends' own limit is
// far below.
const maxSpan = 100 * 365 * 24 * time.Hour

// Span reads a length of time: Go's notation with days before it, such as
// "90s", "1h30m", "2d" or "1d12h".
func Span(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q: want a length of time such as 90s, 1h30m or 2d", s)
	if len(s) > maxNumber || strings.HasPrefix(s, "-") || strings.HasPrefix(s, "+") {
		return 0, bad
	}
	var total time.Duration
	rest := s
	if days, after, found := strings.Cut(s, "d"); found {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > uint64(maxSpan/(24*time.Hour)) {
			return 0, bad
		}
		total, rest = time.Duration(n)*24*time.Hour, after
		if strings.HasPrefix(rest, "-") || strings.HasPrefix(rest, "+") {
			return 0, bad
		}
	}
	if rest != "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d > maxSpan {
			return 0, bad
		}
		total += d
	} else if s == "" {
		return 0, bad
	}
	if total <= 0 {
		return 0, fmt.Errorf("%q: must be more than zero", s)
	}
	return total, nil
}

// Env reads "NAME=VALUE". The value may be empty and may hold "=".
func Env(s string) (name, value string, err error) {
	name, value, found := strings.Cut(s, "=")
	if !found || name == "" {
		return "", "", fmt.Errorf("%q: want NAME=VALUE", s)
	}
	return name, value, nil
}

// EnvFile reads lines of NAME=VALUE. Blank lines and those that begin with #
// don't count. Nothing is unquoted or expanded.
func EnvFile(data []byte) (map[string]string, error) {
	env := map[string]string{}
	for i, text := range strings.Split(string(data), "\n") {
		text = strings.TrimSuffix(text, "\r")
		if trimmed := strings.TrimSpace(text); trimmed == "" || trimmed[0] == '#' {
			continue
		}
		name, value, err := Env(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
		if _, twice := env[name]; twice {
			return nil, fmt.Errorf("line %d: %s is set twice", i+1, name)
		}
		env[name] = value
	}
	return env, nil
}

// Bytes32 reads 64 hex digits.
func Bytes32(s string) ([]byte, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return nil, fmt.Errorf("%q: want 64 hex digits", s)
	}
	return b, nil
}

// Digest reads "sha256:<64 hex digits>" or "blake3:…".
func Digest(s string) (*bridgev1.Digest, error) {
	d, err := backend.ParseDigest(s)
	if err != nil {
		return nil, err
	}
	return &bridgev1.Digest{Algorithm: bridgev1.DigestAlgorithm(d.Algorithm), Value: d.Sum[:]}, nil
}
