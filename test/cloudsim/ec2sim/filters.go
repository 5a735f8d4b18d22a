package ec2sim

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// maxFilterValues is of DescribeInstances' page: 200 values in all.
const maxFilterValues = 200

// filter is one condition: any of its values, which may have wildcards.
type filter struct {
	name   string
	values []string
}

// attributes are what a kind of resource can be filtered by, beside its tags.
type attributes[T any] map[string]func(T) []string

// readFilters reads Filter.N and refuses names that the attributes don't have.
func readFilters[T any](p params, known attributes[T], tagged bool) []filter {
	var filters []filter
	total := 0
	for _, below := range p.structs("Filter") {
		f := filter{name: below.required("Name"), values: below.list("Value")}
		total += len(f.values)
		_, ok := known[f.name]
		if !ok && tagged {
			ok = f.name == "tag-key" || strings.HasPrefix(f.name, "tag:")
		}
		if !ok {
			p.fail(invalidValue("The filter '%s' is invalid", f.name))
		}
		if len(f.values) == 0 {
			p.fail(invalidValue("The filter '%s' must have at least one value", f.name))
		}
		filters = append(filters, f)
	}
	if total > maxFilterValues {
		p.fail(refusal("FilterLimitExceeded", "The maximum number of filter values specified on a single call is %d", maxFilterValues))
	}
	return filters
}

// passes says whether a resource meets all conditions.
func passes[T any](resource T, filters []filter, known attributes[T], tags map[string]string) bool {
	for _, f := range filters {
		var have []string
		switch key, isTag := strings.CutPrefix(f.name, "tag:"); {
		case isTag:
			if value, ok := tags[key]; ok {
				have = []string{value}
			}
		case f.name == "tag-key":
			have = slices.Collect(maps.Keys(tags))
		default:
			have = known[f.name](resource)
		}
		if !slices.ContainsFunc(have, func(value string) bool {
			return slices.ContainsFunc(f.values, func(pattern string) bool { return glob(pattern, value) })
		}) {
			return false
		}
	}
	return true
}

// glob says whether a value meets a pattern with * and ?, which a backslash
// makes ordinary.
func glob(pattern, value string) bool {
	for pattern != "" {
		switch pattern[0] {
		case '*':
			for i := range len(value) + 1 {
				if glob(pattern[1:], value[i:]) {
					return true
				}
			}
			return false
		case '?':
			if value == "" {
				return false
			}
		default:
			if pattern[0] == '\\' && len(pattern) > 1 {
				pattern = pattern[1:]
			}
			if value == "" || value[0] != pattern[0] {
				return false
			}
		}
		pattern, value = pattern[1:], value[1:]
	}
	return value == ""
}

// page is what part of an answer the caller wants.
type page struct {
	// size is 0 where the caller wants all.
	size int
	// after is the serial of the last resource that it has.
	after int64
	// query ties a token to the request that it came from.
	query string
}

// readPage reads MaxResults and NextToken. Most actions take neither beside ids.
func readPage(p params, smallest, largest int64, ids []string) page {
	var wanted page
	size, sized := p.get("MaxResults")
	if sized {
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil || n < smallest || n > largest {
			p.fail(invalidValue("Value ( %s ) for parameter maxResults is invalid. Expecting a value between %d and %d.", size, smallest, largest))
		}
		if len(ids) > 0 {
			p.fail(refusal("InvalidParameterCombination", "The parameter maxResults cannot be used with the parameter that names the resources"))
		}
		wanted.size = int(n)
	}
	wanted.query = p.query()
	if token := p.text("NextToken"); token != "" {
		raw, err := base64.RawURLEncoding.DecodeString(token)
		query, after, ok := strings.Cut(string(raw), " ")
		n, numberErr := strconv.ParseInt(after, 10, 64)
		if err != nil || numberErr != nil || !ok || query != wanted.query {
			p.fail(refusal("InvalidNextToken", "The token '%s' is invalid", token))
		}
		wanted.after = n
	}
	return wanted
}

// query is a hash of the filters of a request.
func (p params) query() string {
	hash := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		if strings.HasPrefix(name, "Filter.") || name == "Action" {
			fmt.Fprintf(hash, "%q=%q;", name, p.values[name])
		}
	}
	return hex.EncodeToString(hash.Sum(nil)[:8])
}

// cut takes a page out of resources, which are in the order of their serials,
// and returns the token for the next one.
func cut[T any](all []T, wanted page, serial func(T) int64) ([]T, element) {
	start, _ := slices.BinarySearchFunc(all, wanted.after+1, func(resource T, serialWanted int64) int {
		return int(serial(resource) - serialWanted)
	})
	rest := all[start:]
	if wanted.size == 0 || len(rest) <= wanted.size {
		return rest, element{}
	}
	rest = rest[:wanted.size]
	token := fmt.Sprintf("%s %d", wanted.query, serial(rest[len(rest)-1]))
	return rest, text("nextToken", base64.RawURLEncoding.EncodeToString([]byte(token)))
}
