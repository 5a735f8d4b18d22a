package hostspool

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// unitCgroup returns the path of the unit's own cgroup in the unified hierarchy, from the content of
// /proc/self/cgroup. Commands of a unit with Delegate= run in cgroups below the unit's own (".control", for example),
// so it is the path up to the element that is the unit's name.
func unitCgroup(data []byte, unit string) (string, error) {
	for line := range bytes.Lines(data) {
		// "0::/path" is the unified hierarchy, see cgroups(7).
		cgroup, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), "0::")
		if !ok {
			continue
		}
		elements := strings.Split(cgroup, "/")
		for i, element := range elements {
			if element == unit {
				return path.Clean(strings.Join(elements[:i+1], "/")), nil
			}
		}
		return "", fmt.Errorf("this process isn't in a cgroup of %s", unit)
	}
	return "", errors.New("this host has no unified cgroup hierarchy")
}

// cgroupMount returns where the unified hierarchy is mounted, from the content of /proc/self/mountinfo, and which
// cgroup is at that place.
func cgroupMount(data []byte) (mountPoint, root string, err error) {
	for line := range bytes.Lines(data) {
		// proc_pid_mountinfo(5): the optional fields end with "-", the file system type follows.
		before, after, ok := strings.Cut(string(line), " - ")
		if !ok || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		fields := strings.Fields(before)
		if len(fields) < 5 {
			continue
		}
		return fields[4], fields[3], nil
	}
	return "", "", errors.New("the unified cgroup hierarchy isn't mounted")
}

// statValue returns the number after a key of a flat keyed file such as cpu.stat.
func statValue(data []byte, key string) (uint64, error) {
	for line := range bytes.Lines(data) {
		fields := strings.Fields(string(line))
		if len(fields) == 2 && fields[0] == key {
			return strconv.ParseUint(fields[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s", key)
}

// ioTotals adds up io.stat, a nested keyed file with a line per device. Sums saturate.
func ioTotals(data []byte) (read, write uint64, err error) {
	for line := range bytes.Lines(data) {
		for field := range strings.FieldsSeq(string(line)) {
			key, value, ok := strings.Cut(field, "=")
			if !ok || key != "rbytes" && key != "wbytes" {
				continue
			}
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("malformed %s", key)
			}
			if key == "rbytes" {
				read = addSaturated(read, n)
			} else {
				write = addSaturated(write, n)
			}
		}
	}
	return read, write, nil
}

func addSaturated(a, b uint64) uint64 {
	if a+b < a {
		return 1<<64 - 1
	}
	return a + b
}
