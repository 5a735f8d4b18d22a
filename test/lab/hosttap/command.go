package hosttap

import (
	"path"
	"slices"
	"strings"
)

// Programs that carry a socket's bytes, where sshd doesn't forward the socket.
const (
	bridgeDBus   = "systemd-stdio-bridge"
	bridgePodman = "podman system dial-stdio"
)

// command is what a command line says.
type command struct {
	call   *Call
	bridge string // what is spoken on its input and output, if it's such a program
}

// reading are the programs that change nothing, whatever their arguments.
var reading = map[string]bool{
	"date": true, "test": true, "sha256sum": true, "journalctl": true, "cat": true, "stat": true, "uname": true, "ls": true, "true": true,
	"guest digest": true, "nft list": true, "ip show": true,
	"podman version": true, "podman info": true, "podman inspect": true, "podman ps": true, "podman image inspect": true,
	"podman image ls": true, "podman images": true, "podman network ls": true, "podman network inspect": true,
}

// parseCommand understands a command line of the worker's.
func parseCommand(line string) command {
	words := split(line)
	// env NAME=value …
	for len(words) > 0 && (path.Base(words[0]) == "env" || strings.Contains(words[0], "=")) {
		words = words[1:]
	}
	name := "?"
	if len(words) > 0 {
		name = programName(words)
	}
	if name == bridgeDBus || name == bridgePodman {
		return command{bridge: name}
	}
	return command{call: &Call{Point: stable("exec." + name), Mutates: !reading[name], Mentions: mentioned([]byte(line))}}
}

// programName is a program, and what it is to do.
func programName(words []string) string {
	program, args := words[0], words[1:]
	name := path.Base(program)
	if path.Base(path.Dir(program)) == "guest" {
		name = "guest" // the file is named after its hash
	}
	args = slices.DeleteFunc(slices.Clone(args), func(s string) bool { return strings.HasPrefix(s, "-") })
	if len(args) == 0 {
		return name
	}
	first, _, _ := strings.Cut(args[0], " ")
	switch name {
	case "guest":
		return name + " " + first
	case "podman":
		if len(args) > 1 && slices.Contains([]string{"image", "network", "system", "container", "volume"}, first) {
			return name + " " + first + " " + args[1]
		}
		return name + " " + first
	case "nft":
		if first == "list" {
			return name + " list"
		}
	case "ip":
		if slices.Contains(args, "show") {
			return name + " show"
		}
	case "sh":
		first, _, _ = strings.Cut(strings.TrimSpace(args[0]), " ")
		return name + " " + strings.TrimSpace(first)
	}
	return name
}

// split takes a command line apart as a shell does that knows quotes and no
// more.
func split(line string) []string {
	var words []string
	var word strings.Builder
	var quote byte
	has := false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case quote == '\'' && c != '\'', quote == '"' && c != '"' && c != '\\':
			word.WriteByte(c)
		case quote != 0 && c == quote:
			quote = 0
		case c == '\\' && i+1 < len(line):
			i++
			word.WriteByte(line[i])
			has = true
		case quote == 0 && (c == '\'' || c == '"'):
			quote, has = c, true
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n'):
			if has {
				words = append(words, word.String())
			}
			word.Reset()
			has = false
		default:
			word.WriteByte(c)
			has = true
		}
	}
	if has {
		words = append(words, word.String())
	}
	return words
}
