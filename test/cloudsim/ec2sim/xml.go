package ec2sim

import (
	"bytes"
	"encoding/xml"
	"strconv"
	"time"
)

// element is a piece of an answer. One without a name is left out.
type element struct {
	name string
	text string
	kids []element
}

// text is an element with text in it.
func text(name, value string) element { return element{name: name, text: value} }

// optional is text, unless it is empty.
func optional(name, value string) element {
	if value == "" {
		return element{}
	}
	return text(name, value)
}

func number[T ~int | ~int32 | ~int64](name string, value T) element {
	return text(name, strconv.FormatInt(int64(value), 10))
}

func boolean(name string, value bool) element { return text(name, strconv.FormatBool(value)) }

// instant is a time as EC2 writes it.
func instant(name string, value time.Time) element {
	if value.IsZero() {
		return element{}
	}
	return text(name, value.UTC().Format("2006-01-02T15:04:05.000Z"))
}

// node is an element with others in it.
func node(name string, kids ...element) element { return element{name: name, kids: kids} }

// set is a list, whose items EC2 calls "item".
func set[T any](name string, values []T, item func(T) []element) element {
	list := element{name: name}
	for _, value := range values {
		list.kids = append(list.kids, node("item", item(value)...))
	}
	return list
}

// texts is a list of texts.
func texts(name string, values []string) element {
	list := element{name: name}
	for _, value := range values {
		list.kids = append(list.kids, text("item", value))
	}
	return list
}

func (e element) write(b *bytes.Buffer) {
	if e.name == "" {
		return
	}
	b.WriteString("<" + e.name + ">")
	// EscapeText to a buffer can't fail.
	_ = xml.EscapeText(b, []byte(e.text))
	for _, kid := range e.kids {
		kid.write(b)
	}
	b.WriteString("</" + e.name + ">")
}

// document renders an answer whose root has a namespace.
func document(root, namespace string, kids ...element) []byte {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	b.WriteString("<" + root)
	if namespace != "" {
		b.WriteString(` xmlns="` + namespace + `"`)
	}
	b.WriteString(">")
	for _, kid := range kids {
		kid.write(&b)
	}
	b.WriteString("</" + root + ">")
	return b.Bytes()
}
