package ec2sim

import (
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// params are a request's parameters in the flattened form of the query protocol
// ("Filter.1.Value.2"). Handlers read them by name, and what no handler has read
// is a parameter that isn't known: nothing is ever ignored.
type params struct {
	values url.Values
	prefix string
	// shared by all that were made of the same request.
	read  map[string]bool
	fault **Error
}

func newParams(values url.Values) params {
	return params{values: values, read: map[string]bool{}, fault: new(*Error)}
}

// fail keeps the first error; done returns it.
func (p params) fail(err *Error) {
	if *p.fault == nil {
		*p.fault = err
	}
}

// done is asked once all is read: the first error, or a parameter that nobody
// wanted.
func (p params) done() *Error {
	if *p.fault != nil {
		return *p.fault
	}
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		if !p.read[name] {
			return unknownParameter(name)
		}
		if len(p.values[name]) > 1 {
			return invalidValue("The parameter %s was given twice", name)
		}
	}
	return nil
}

func (p params) get(name string) (string, bool) {
	name = p.prefix + name
	values, ok := p.values[name]
	p.read[name] = true
	if !ok {
		return "", false
	}
	return values[0], true
}

func (p params) text(name string) string {
	value, _ := p.get(name)
	return value
}

func (p params) required(name string) string {
	value, ok := p.get(name)
	if !ok || value == "" {
		p.fail(refusal("MissingParameter", "The request must contain the parameter %s", p.prefix+name))
	}
	return value
}

// oneOf reads a value out of a list; the first is that of a parameter that isn't
// there.
func (p params) oneOf(name string, values ...string) string {
	value, ok := p.get(name)
	if !ok {
		return values[0]
	}
	if !slices.Contains(values, value) {
		p.fail(invalidValue("Value (%s) for parameter %s is invalid", value, p.prefix+name))
	}
	return value
}

func (p params) boolean(name string, absent bool) bool {
	value, ok := p.get(name)
	switch {
	case !ok:
		return absent
	case value == "true":
		return true
	case value == "false":
		return false
	default:
		p.fail(invalidValue("Invalid value '%s' for parameter %s: expecting boolean", value, p.prefix+name))
		return absent
	}
}

func (p params) integer(name string, absent int64) int64 {
	value, ok := p.get(name)
	if !ok {
		return absent
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		p.fail(invalidValue("Invalid value '%s' for parameter %s: expecting integer", value, p.prefix+name))
		return absent
	}
	return n
}

// indices are the numbers that follow a name, in order.
func (p params) indices(name string) []int {
	found := map[int]bool{}
	for key := range p.values {
		rest, ok := strings.CutPrefix(key, p.prefix+name+".")
		if !ok {
			continue
		}
		number, _, _ := strings.Cut(rest, ".")
		if n, err := strconv.Atoi(number); err == nil && n > 0 && strconv.Itoa(n) == number {
			found[n] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// list reads name.1, name.2 and so on.
func (p params) list(name string) []string {
	var values []string
	for _, i := range p.indices(name) {
		if value, ok := p.get(name + "." + strconv.Itoa(i)); ok {
			values = append(values, value)
		}
	}
	return values
}

// structs are what is below name.1, name.2 and so on.
func (p params) structs(name string) []params {
	indices := p.indices(name)
	below := make([]params, len(indices))
	for i, index := range indices {
		below[i] = p.below(name + "." + strconv.Itoa(index))
	}
	return below
}

// below is what has a name in front of it.
func (p params) below(name string) params {
	p.prefix += name + "."
	return p
}
