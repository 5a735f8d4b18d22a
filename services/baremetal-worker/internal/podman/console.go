package podman

import (
	"bytes"
	"strings"
)

// ConsoleText returns what a container wrote, from a log file of the format
// k8s-file, or the end of one: each line is a time, the stream's name, F for a
// whole line or P for a part of one, and the text.
func ConsoleText(log []byte) string {
	var text strings.Builder
	for line := range bytes.Lines(log) {
		fields := bytes.SplitN(line, []byte(" "), 4)
		const stream, kind, words = 1, 2, 3
		if len(fields) != 4 || (string(fields[stream]) != "stdout" && string(fields[stream]) != "stderr") {
			continue // The tail of a line whose beginning isn't there.
		}
		written := fields[words]
		if string(fields[kind]) == "P" {
			written = bytes.TrimSuffix(written, []byte("\n"))
		}
		text.Write(written)
	}
	return text.String()
}
