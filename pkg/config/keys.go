package config

import (
	"encoding"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// dotted writes a key as it stands in a table header.
func dotted(parts []string) string {
	out := make([]string, len(parts))
	for i, p := range parts {
		out[i] = p
		if p == "" || strings.Trim(p, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != "" {
			out[i] = strconv.Quote(p)
		}
	}
	return strings.Join(out, ".")
}

// tableOf strips pointers and slices and reports whether a type is written as a
// table whose keys are known.
func tableOf(t reflect.Type) (reflect.Type, bool) {
	for {
		if reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			return t, false
		}
		switch t.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Array:
			t = t.Elem()
		default:
			return t, t.Kind() == reflect.Struct
		}
	}
}

// fields returns the keys of a struct with their types.
func fields(t reflect.Type) map[string]reflect.Type {
	all := map[string]reflect.Type{}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		switch {
		case name == "-":
		case f.Anonymous && name == "":
			if inner, ok := tableOf(f.Type); ok {
				maps.Copy(all, fields(inner))
			}
		case !f.IsExported():
		case name == "":
			all[f.Name] = f.Type
		default:
			all[name] = f.Type
		}
	}
	return all
}

// checkKeys returns an error for every key in the text that t has no field for,
// and for every value that should be a string such as "30s" and is none, of
// which the decoder does not tell the place. A syntax error ends it silently:
// the decoder reports that.
func checkKeys(data []byte, t reflect.Type) []error {
	w := keyWalker{}
	w.parser.Reset(data)
	var table reflect.Type // Nil: below an unknown key, or a free-form table.
	table = t
	var prefix []string
	for w.parser.NextExpression() {
		e := w.parser.Expression()
		switch e.Kind { //nolint:exhaustive // Others have no keys.
		case unstable.Table, unstable.ArrayTable:
			prefix = nil
			table, prefix = w.descend(t, prefix, e.Key())
		case unstable.KeyValue:
			w.keyValue(table, prefix, e)
		}
	}
	return w.problems
}

// keyWalker compares the text's keys with a type.
type keyWalker struct {
	parser   unstable.Parser
	problems []error
}

// descend follows a dotted key from a table and returns where it ends.
func (w *keyWalker) descend(t reflect.Type, prefix []string, key unstable.Iterator) (reflect.Type, []string) {
	path := slices.Clone(prefix)
	for key.Next() {
		node := key.Node()
		name := string(node.Data)
		path = append(path, name)
		if t == nil {
			continue
		}
		table, ok := tableOf(t)
		switch {
		case ok:
			known := fields(table)
			next, found := known[name]
			if !found {
				start := w.parser.Shape(node.Raw).Start
				w.problems = append(w.problems, fmt.Errorf(":%d:%d: %s: unknown key%s",
					start.Line, start.Column, dotted(path), suggestion(name, known)))
				t = nil
				continue
			}
			t = next
		case table.Kind() == reflect.Map:
			t = table.Elem()
		default:
			t = nil // A value where a table is written: the decoder says so.
		}
	}
	return t, path
}

func (w *keyWalker) keyValue(t reflect.Type, prefix []string, e *unstable.Node) {
	t, path := w.descend(t, prefix, e.Key())
	w.value(t, path, e.Value())
}

// value checks the kind of a value and looks for inline tables in it.
func (w *keyWalker) value(t reflect.Type, path []string, v *unstable.Node) {
	if t == nil {
		return
	}
	switch v.Kind { //nolint:exhaustive // Others are written otherwise.
	case unstable.Integer, unstable.Float, unstable.Bool:
		if leaf, _ := tableOf(t); reflect.PointerTo(leaf).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			start := w.parser.Shape(v.Raw).Start
			w.problems = append(w.problems, fmt.Errorf(":%d:%d: %s: want a string, got %s",
				start.Line, start.Column, dotted(path), v.Data))
		}
		return
	}
	children := v.Children()
	for children.Next() {
		child := children.Node()
		switch v.Kind { //nolint:exhaustive // Others have no keys.
		case unstable.Array:
			w.value(t, path, child)
		case unstable.InlineTable:
			if child.Kind == unstable.KeyValue {
				w.keyValue(t, path, child)
			}
		}
	}
}

// suggestion names the known key that was probably meant, or all when they are
// few.
func suggestion(name string, known map[string]reflect.Type) string {
	names := make([]string, 0, len(known))
	for k := range known {
		names = append(names, k)
	}
	slices.Sort(names)
	// Two edits are one swap of neighbours; more only in long names, and never
	// so many that nothing of the name is left.
	best, distance := "", min(1+max(2, len(name)/3), len(name))
	for _, k := range names {
		if d := editDistance(strings.ToLower(name), strings.ToLower(k)); d < distance {
			best, distance = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	const few = 12
	if len(names) > 0 && len(names) <= few {
		return "; known here: " + strings.Join(names, ", ")
	}
	return ""
}

// editDistance is Levenshtein's, over bytes; keys are ASCII.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
