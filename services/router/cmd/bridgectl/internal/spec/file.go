package spec

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// maxFile is far above the largest legal grant.
const maxFile = 1 << 20

// ParseFile reads a ProvisionRequest from JSON or YAML; name stands in errors.
//
// The keys are the contract's, as in Protobuf's JSON mapping (both ram_mib and
// ramMib). Beyond that mapping, for people: bytes of 32 may be 64 hex digits
// beside base64 (whose 32 bytes never have 64 digits), and an enum's value may
// lack its prefix ("container", "oci-archive", "tcp"). Unknown keys, keys that
// stand twice and YAML's anchors are refused. Every problem has its line.
func ParseFile(name string, data []byte) (*bridgev1.ProvisionRequest, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: longer than %d bytes", name, maxFile)
	}
	var document, more yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF) || err == nil && len(document.Content) == 0:
		return nil, fmt.Errorf("%s: empty", name)
	case err != nil:
		return nil, fmt.Errorf("%s: %s", name, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one document", name)
	}
	req := &bridgev1.ProvisionRequest{}
	p := parser{name: name}
	value := p.message(document.Content[0], req.ProtoReflect().Descriptor(), "")
	if len(p.problems) > 0 {
		return nil, errors.Join(p.problems...)
	}
	text, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := protojson.Unmarshal(text, req); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return req, nil
}

// parser turns a YAML tree into what Protobuf's JSON mapping takes, led by the
// contract's descriptors.
type parser struct {
	name     string
	problems []error
}

func (p *parser) problem(n *yaml.Node, format string, args ...any) {
	p.problems = append(p.problems, fmt.Errorf("%s:%d: %s", p.name, n.Line, fmt.Sprintf(format, args...)))
}

// pairs returns the keys and values of a mapping, having refused what is none.
func (p *parser) pairs(n *yaml.Node, path string) [][2]*yaml.Node {
	if n.Kind != yaml.MappingNode {
		p.problem(n, "%s: want keys and values", at(path))
		return nil
	}
	var out [][2]*yaml.Node
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		switch {
		case key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge":
			p.problem(key, "%s: a key must be a plain word", at(path))
			continue
		case seen[key.Value]:
			p.problem(key, "%s: stands twice", at(join(path, key.Value)))
			continue
		}
		seen[key.Value] = true
		out = append(out, [2]*yaml.Node{key, n.Content[i+1]})
	}
	return out
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func at(path string) string {
	if path == "" {
		return "the file"
	}
	return path
}

func (p *parser) message(n *yaml.Node, d protoreflect.MessageDescriptor, path string) any {
	if d.FullName() == "google.protobuf.Timestamp" {
		// YAML knows times; what stands in the text is RFC 3339 or wrong.
		if n.Kind != yaml.ScalarNode {
			p.problem(n, "%s: want a time such as 2030-01-31T12:00:00Z", at(path))
			return nil
		}
		if _, err := time.Parse(time.RFC3339Nano, n.Value); err != nil {
			p.problem(n, "%s: %q is no time such as 2030-01-31T12:00:00Z", at(path), n.Value)
		}
		return n.Value
	}
	out := map[string]any{}
	fields := map[protoreflect.Name]bool{}
	for _, pair := range p.pairs(n, path) {
		key := pair[0].Value
		f := d.Fields().ByJSONName(key)
		if f == nil {
			f = d.Fields().ByTextName(key)
		}
		switch {
		case f == nil:
			p.problem(pair[0], "unknown key %s%s", join(path, key), suggestion(key, d))
		case fields[f.Name()]:
			p.problem(pair[0], "%s: stands twice", join(path, key))
		default:
			fields[f.Name()] = true
			if v := p.field(pair[1], f, join(path, string(f.Name()))); v != nil {
				out[string(f.Name())] = v
			}
		}
	}
	return out
}

func suggestion(key string, d protoreflect.MessageDescriptor) string {
	var names []string
	for i := range d.Fields().Len() {
		names = append(names, string(d.Fields().Get(i).Name()))
	}
	bare := strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(key))
	for _, name := range names {
		other := strings.ReplaceAll(name, "_", "")
		if len(bare) > 1 && (strings.HasPrefix(other, bare) || strings.HasPrefix(bare, other)) {
			return "; did you mean " + name + "?"
		}
	}
	slices.Sort(names)
	return "; there are " + strings.Join(names, ", ")
}

func (p *parser) field(n *yaml.Node, f protoreflect.FieldDescriptor, path string) any {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		p.problem(n, "%s: anchors and aliases are not supported", path)
		return nil
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null":
		return nil
	case f.IsMap():
		out := map[string]any{}
		for _, pair := range p.pairs(n, path) {
			if v := p.single(pair[1], f.MapValue(), join(path, pair[0].Value)); v != nil {
				out[pair[0].Value] = v
			}
		}
		return out
	case f.IsList():
		if n.Kind != yaml.SequenceNode {
			p.problem(n, "%s: want a list", path)
			return nil
		}
		out := []any{}
		for i, item := range n.Content {
			if v := p.single(item, f, fmt.Sprintf("%s[%d]", path, i)); v != nil {
				out = append(out, v)
			}
		}
		return out
	}
	return p.single(n, f, path)
}

func (p *parser) single(n *yaml.Node, f protoreflect.FieldDescriptor, path string) any {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		p.problem(n, "%s: anchors and aliases are not supported", path)
		return nil
	}
	if f.Message() != nil {
		return p.message(n, f.Message(), path)
	}
	if n.Kind != yaml.ScalarNode {
		p.problem(n, "%s: want a single value", path)
		return nil
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		if n.ShortTag() != "!!str" && n.ShortTag() != "!!timestamp" {
			p.problem(n, "%s: want text; put %s in quotes", path, n.Value)
			return nil
		}
		return n.Value
	case protoreflect.BytesKind:
		return p.bytes(n, path)
	case protoreflect.EnumKind:
		return p.enum(n, f.Enum(), path)
	case protoreflect.BoolKind:
		if n.Value == "true" || n.Value == "false" {
			return n.Value == "true"
		}
		p.problem(n, "%s: want true or false", path)
		return nil
	default:
		return p.number(n, f, path)
	}
}

func (p *parser) bytes(n *yaml.Node, path string) any {
	if b, err := hex.DecodeString(n.Value); err == nil && len(b) == 32 {
		return base64.StdEncoding.EncodeToString(b)
	}
	text := strings.TrimRight(n.Value, "=")
	text = strings.NewReplacer("-", "+", "_", "/").Replace(text)
	if _, err := base64.RawStdEncoding.DecodeString(text); err != nil {
		p.problem(n, "%s: want 64 hex digits or base64", path)
		return nil
	}
	return n.Value
}

func (p *parser) enum(n *yaml.Node, d protoreflect.EnumDescriptor, path string) any {
	values := d.Values()
	// All values of one enum share the prefix of its zero value.
	prefix := strings.TrimSuffix(string(values.Get(0).Name()), "UNSPECIFIED")
	if number, err := strconv.ParseInt(n.Value, 10, 32); err == nil {
		if v := values.ByNumber(protoreflect.EnumNumber(number)); v != nil {
			return string(v.Name())
		}
	}
	name := strings.ToUpper(strings.ReplaceAll(n.Value, "-", "_"))
	for _, candidate := range []string{name, prefix + name} {
		if v := values.ByName(protoreflect.Name(candidate)); v != nil {
			return string(v.Name())
		}
	}
	var names []string
	for i := 1; i < values.Len(); i++ {
		names = append(names, EnumWord(values.Get(i).Name(), prefix))
	}
	p.problem(n, "%s: unknown value %q, want one of %s", path, n.Value, strings.Join(names, ", "))
	return nil
}

// EnumWord returns the short form of an enum's value, "oci-archive".
func EnumWord(name protoreflect.Name, prefix string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(string(name), prefix), "_", "-"))
}

// Enum reads a value of an enum by its name or short form.
func Enum(s string, d protoreflect.EnumDescriptor) (protoreflect.EnumNumber, error) {
	p := parser{}
	v, ok := p.enum(&yaml.Node{Kind: yaml.ScalarNode, Value: s}, d, "value").(string)
	if !ok {
		_, text, _ := strings.Cut(p.problems[0].Error(), "value: ")
		return 0, errors.New(text)
	}
	return d.Values().ByName(protoreflect.Name(v)).Number(), nil
}

func (p *parser) number(n *yaml.Node, f protoreflect.FieldDescriptor, path string) any {
	bits := 64
	unsigned := false
	switch f.Kind() {
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		bits, unsigned = 32, true
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		unsigned = true
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		bits = 32
	default:
	}
	if unsigned {
		if v, err := strconv.ParseUint(n.Value, 10, bits); err == nil {
			return strconv.FormatUint(v, 10)
		}
	} else if v, err := strconv.ParseInt(n.Value, 10, bits); err == nil {
		return strconv.FormatInt(v, 10)
	}
	p.problem(n, "%s: %q is no whole number of %d bits", path, n.Value, bits)
	return nil
}
