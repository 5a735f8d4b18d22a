package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// screen writes for a person, on a terminal or into a file.
type screen struct {
	w     io.Writer
	color bool
	steps int
}

func newScreen(f *os.File) *screen {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &screen{w: f, color: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s *screen) paint(code, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// step begins a part.
func (s *screen) step(title string) {
	s.steps++
	fmt.Fprintf(s.w, "\n%s\n", s.paint("1;34", fmt.Sprintf("== %d. %s", s.steps, title)))
}

// text writes a line of explanation.
func (s *screen) text(format string, args ...any) { fmt.Fprintf(s.w, format+"\n", args...) }

// command shows a command line.
func (s *screen) command(line string) { fmt.Fprintf(s.w, "\n%s\n", s.paint("1", "$ "+line)) }

// good says what was expected and is so.
func (s *screen) good(format string, args ...any) {
	fmt.Fprintf(s.w, "%s %s\n", s.paint("32", "ok:"), fmt.Sprintf(format, args...))
}

// fail says what went wrong.
func (s *screen) fail(err error) { fmt.Fprintf(s.w, "\n%s %v\n", s.paint("1;31", "FAILED:"), err) }

// output returns a writer for a program's output, which is set off.
func (s *screen) output() io.Writer { return &indenter{w: s.w, start: true} }

// indenter sets lines off.
type indenter struct {
	w     io.Writer
	start bool
}

// Write implements io.Writer.
func (i *indenter) Write(p []byte) (int, error) {
	var b bytes.Buffer
	for _, c := range p {
		if i.start && c != '\n' {
			b.WriteString("  ")
		}
		b.WriteByte(c)
		i.start = c == '\n'
	}
	_, err := i.w.Write(b.Bytes())
	return len(p), err
}

// quote writes a command line as a shell reads it.
func quote(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		if a != "" && strings.Trim(a, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%+,-./:=@_") == "" {
			words[i] = a
			continue
		}
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return strings.Join(words, " ")
}
