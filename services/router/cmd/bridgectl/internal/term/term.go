// Package term writes for people: styles that are colours on a terminal and
// nothing elsewhere, aligned tables, one line that changes while something
// goes on, and the cleaning of text that others wrote.
//
// What a server, a provider or a tenant's console says may hold escape
// sequences; every such text passes [Clean] before it reaches a terminal.
package term

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// Style is how a piece of text looks.
type Style int

// The styles. What they look like is decided in one place, in Paint.
const (
	Plain Style = iota
	Bold
	Faint
	Good
	Busy
	Bad
	Accent
)

// codes are the SGR parameters of ECMA-48 for each style.
var codes = map[Style]string{Bold: "1", Faint: "2", Good: "32", Busy: "33", Bad: "31", Accent: "36"}

// Painter paints text, or leaves it as it is.
type Painter struct {
	// On makes Paint add colour.
	On bool
}

// Paint returns text in a style.
func (p Painter) Paint(style Style, text string) string {
	code, ok := codes[style]
	if !p.On || !ok || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Width returns how many columns a terminal has, 0 if w is none.
func Width(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// Clean replaces what could steer a terminal by a visible character: control
// characters, and the invisible ones that change the direction of text. Line
// ends and tabs become spaces.
func Clean(s string) string { return clean(s, false) }

// CleanLines is [Clean] for text of several lines, which it returns.
func CleanLines(s string) []string {
	return strings.Split(strings.TrimRight(clean(s, true), "\n"), "\n")
}

func clean(s string, lines bool) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' && lines:
			return r
		case r == '\r' && lines:
			return -1
		case r == '\n', r == '\t', r == '\r':
			return ' '
		case r == utf8.RuneError, unicode.Is(unicode.C, r):
			return '\uFFFD'
		}
		return r
	}, s)
}

// Cell is one field of a table.
type Cell struct {
	Text  string
	Style Style
	// Right aligns numbers.
	Right bool
}

// T returns a plain cell.
func T(text string) Cell { return Cell{Text: text} }

// S returns a cell in a style.
func S(style Style, text string) Cell { return Cell{Text: text, Style: style} }

// R returns a plain cell that is aligned to the right.
func R(text string) Cell { return Cell{Text: text, Right: true} }

// Table is a table of text. The zero value is an empty one.
type Table struct {
	head []Cell
	rows [][]Cell
}

// Head sets the titles of the columns.
func (t *Table) Head(titles ...string) {
	t.head = t.head[:0]
	for _, title := range titles {
		t.head = append(t.head, S(Bold, title))
	}
}

// Row adds a row. Empty cells are shown as "-".
func (t *Table) Row(cells ...Cell) { t.rows = append(t.rows, cells) }

// Len returns the number of rows.
func (t *Table) Len() int { return len(t.rows) }

// Write writes the table with each line indented.
func (t *Table) Write(w io.Writer, p Painter, indent string) error {
	var all [][]Cell
	if len(t.head) > 0 {
		all = append(all, t.head)
	}
	all = append(all, t.rows...)
	var widths []int
	var right []bool
	for _, row := range all {
		for i := range row {
			if i == len(widths) {
				widths, right = append(widths, 0), append(right, false)
			}
			row[i].Text = Clean(row[i].Text)
			if row[i].Text == "" {
				row[i].Text, row[i].Style = "-", Faint
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i].Text))
			right[i] = right[i] || row[i].Right
		}
	}
	var b strings.Builder
	for _, row := range all {
		b.WriteString(indent)
		for i, c := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.Text))
			if right[i] {
				b.WriteString(pad + p.Paint(c.Style, c.Text))
			} else {
				b.WriteString(p.Paint(c.Style, c.Text))
			}
			if i < len(row)-1 {
				if !right[i] {
					b.WriteString(pad)
				}
				b.WriteString("  ")
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Fields writes names and values, the values aligned. Empty values are left
// out.
func Fields(w io.Writer, p Painter, indent string, pairs ...[2]string) error {
	width := 0
	for _, pair := range pairs {
		if pair[1] != "" {
			width = max(width, utf8.RuneCountInString(pair[0]))
		}
	}
	for _, pair := range pairs {
		if pair[1] == "" {
			continue
		}
		pad := strings.Repeat(" ", width-utf8.RuneCountInString(pair[0]))
		if _, err := fmt.Fprintf(w, "%s%s%s  %s\n", indent, p.Paint(Faint, pair[0]), pad, pair[1]); err != nil {
			return err
		}
	}
	return nil
}

// Live shows what goes on: on a terminal one line that changes, elsewhere a
// line for each new text. It is used by one goroutine at a time.
type Live struct {
	w     io.Writer
	p     Painter
	tty   bool
	last  string
	drawn bool
}

// NewLive returns a Live on w.
func NewLive(w io.Writer, p Painter) *Live { return &Live{w: w, p: p, tty: IsTerminal(w)} }

// Show shows text, and aside after it, which on its own is no reason for a new
// line where the output is no terminal (the elapsed time).
func (l *Live) Show(style Style, text, aside string) {
	text, aside = Clean(text), Clean(aside)
	if !l.tty {
		if text != l.last {
			l.last = text
			if aside != "" {
				text += "  " + l.p.Paint(Faint, aside)
			}
			fmt.Fprintln(l.w, text)
		}
		return
	}
	if width := Width(l.w); width > 0 {
		room := max(width-1-utf8.RuneCountInString(aside)-2, 1)
		if runes := []rune(text); len(runes) > room {
			text = string(runes[:room-1]) + "…"
		}
	}
	// Carriage return, erase to the end of the line.
	fmt.Fprintf(l.w, "\r\x1b[K%s  %s", l.p.Paint(style, text), l.p.Paint(Faint, aside))
	l.drawn = true
}

// Line writes a line that stays, above the changing one.
func (l *Live) Line(text string) {
	l.Clear()
	fmt.Fprintln(l.w, text)
}

// Clear removes the changing line.
func (l *Live) Clear() {
	if l.drawn {
		fmt.Fprint(l.w, "\r\x1b[K")
		l.drawn = false
	}
}
