package account

import (
	"bytes"
	"strconv"
	"strings"
)

// passwdEntry is one usable line of passwd(5).
type passwdEntry struct {
	name     string
	uid, gid uint32
	home     string
	shell    string
}

// groupEntry is one usable line of group(5).
type groupEntry struct {
	name    string
	gid     uint32
	members []string
}

// parsePasswd returns the usable lines of a passwd file. Comments, NIS markers and malformed lines are passed over, as
// C libraries do.
func parsePasswd(data []byte) []passwdEntry {
	var entries []passwdEntry
	for line := range bytes.Lines(data) {
		fields := splitLine(line)
		if len(fields) != 7 {
			continue
		}
		uid, ok1 := parseID(fields[2])
		gid, ok2 := parseID(fields[3])
		if !ok1 || !ok2 {
			continue
		}
		entries = append(entries, passwdEntry{name: fields[0], uid: uid, gid: gid, home: fields[5], shell: fields[6]})
	}
	return entries
}

// parseGroup returns the usable lines of a group file.
func parseGroup(data []byte) []groupEntry {
	var entries []groupEntry
	for line := range bytes.Lines(data) {
		fields := splitLine(line)
		if len(fields) != 4 {
			continue
		}
		gid, ok := parseID(fields[2])
		if !ok {
			continue
		}
		var members []string
		for member := range strings.SplitSeq(fields[3], ",") {
			if member = strings.TrimSpace(member); member != "" {
				members = append(members, member)
			}
		}
		entries = append(entries, groupEntry{name: fields[0], gid: gid, members: members})
	}
	return entries
}

// splitLine returns the fields of a line, or nil for a line that is no entry. A NUL can stand in no path and no name.
func splitLine(line []byte) []string {
	text := strings.TrimRight(string(line), "\r\n")
	text = strings.TrimLeft(text, " \t")
	if text == "" || strings.ContainsRune("#+-:", rune(text[0])) || strings.ContainsRune(text, 0) {
		return nil
	}
	return strings.Split(text, ":")
}

// parseID refuses the id -1, which means "leave unchanged" to the kernel.
func parseID(text string) (uint32, bool) {
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil || id == 1<<32-1 {
		return 0, false
	}
	return uint32(id), true
}

// idMap is the content of /proc/self/uid_map or gid_map: which ids exist in this user namespace.
type idMap []idRange

type idRange struct{ first, count uint64 }

// parseIDMap reads a map of user_namespaces(7). What it can't read maps everything, so that a machine without /proc
// works as one without namespaces.
func parseIDMap(data []byte) idMap {
	var m idMap
	for line := range bytes.Lines(data) {
		fields := strings.Fields(string(line))
		if len(fields) != 3 {
			return nil
		}
		first, err1 := strconv.ParseUint(fields[0], 10, 32)
		count, err2 := strconv.ParseUint(fields[2], 10, 32)
		if err1 != nil || err2 != nil {
			return nil
		}
		m = append(m, idRange{first, count})
	}
	return m
}

func (m idMap) has(id uint32) bool {
	if m == nil {
		return true
	}
	for _, r := range m {
		if uint64(id) >= r.first && uint64(id)-r.first < r.count {
			return true
		}
	}
	return false
}
