package hostspool

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
)

// tableName is what nft takes as an identifier. nft parses its arguments as its language, so nothing else may reach it.
var tableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)

// errNoElement says that the set counts nothing for the interface.
var errNoElement = errors.New("no such element")

// setCounter returns the bytes counted for the interface in a set, from the output of `nft -j list table`
// (libnftables-json(5)).
func setCounter(data []byte, set, ifname string) (uint64, error) {
	var output struct {
		Objects []struct {
			Set *struct {
				Name     string            `json:"name"`
				Elements []json.RawMessage `json:"elem"`
			} `json:"set"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(data, &output); err != nil {
		return 0, fmt.Errorf("parse nft output: %w", err)
	}
	found := false
	for _, object := range output.Objects {
		if object.Set == nil || object.Set.Name != set {
			continue
		}
		found = true
		for _, raw := range object.Set.Elements {
			// An element without attributes is a bare value: it has no counter, and another form.
			var element struct {
				Element struct {
					Value   json.RawMessage `json:"val"`
					Counter *struct {
						Bytes *uint64 `json:"bytes"`
					} `json:"counter"`
				} `json:"elem"`
			}
			if json.Unmarshal(raw, &element) != nil {
				continue
			}
			var name string
			if json.Unmarshal(element.Element.Value, &name) != nil || name != ifname {
				continue
			}
			if element.Element.Counter == nil || element.Element.Counter.Bytes == nil {
				return 0, fmt.Errorf("set %s: element %s has no counter", set, ifname)
			}
			return *element.Element.Counter.Bytes, nil
		}
	}
	if !found {
		return 0, fmt.Errorf("no set %s", set)
	}
	return 0, fmt.Errorf("set %s, element %s: %w", set, ifname, errNoElement)
}
