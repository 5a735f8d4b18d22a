package redact_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
)

const plain = "hunter2-correct-horse"

// leaks returns the form in which out holds the secret, or "".
func leaks(out string) string {
	spaced := strings.Trim(fmt.Sprint([]byte(plain)), "[]")
	lower := strings.ToLower(out)
	for form, needle := range map[string]string{
		"plain":         plain,
		"base64":        strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(plain)), "="),
		"hex":           hex.EncodeToString([]byte(plain)),
		"spaced hex":    strings.TrimSpace(fmt.Sprintf("% x", plain)),
		"decimal":       spaced,
		"decimal comma": strings.ReplaceAll(spaced, " ", ","),
		"go syntax":     "0x68, 0x75, 0x6e",
		"octal":         "150 165 156",
		"binary":        "1101000 1110101",
		"unicode":       "u+0068",
	} {
		if strings.Contains(lower, strings.ToLower(needle)) {
			return form
		}
	}
	return ""
}

type inner struct {
	secret redact.Secret
	ptr    *redact.Secret
	any    any
}

type outer struct {
	Public  redact.Secret
	Pointer *redact.Secret
	Any     any
	List    []redact.Secret
	Map     map[string]redact.Secret
	hidden  inner
	deep    map[string][]inner
}

func holders() map[string]any {
	s := redact.New([]byte(plain))
	in := inner{secret: s, ptr: &s, any: s}
	out := outer{
		Public: s, Pointer: &s, Any: s, List: []redact.Secret{s}, Map: map[string]redact.Secret{"k": s},
		hidden: in, deep: map[string][]inner{"k": {in}},
	}
	return map[string]any{
		"value": s, "pointer": &s, "slice": []redact.Secret{s}, "map": map[string]redact.Secret{"k": s},
		"array": [1]redact.Secret{s}, "struct": out, "pointer to struct": &out, "unexported": in,
		"pointer to pointer": func() any { p := &s; return &p }(),
	}
}

func TestNoVerbPrintsASecret(t *testing.T) {
	t.Parallel()
	for name, v := range holders() {
	verbs:
		for verb := rune('A'); verb <= 'z'; verb++ {
			for _, flags := range []string{"", "+", "#", "-", " ", "0", "# ", "40", ".3", "+40.10"} {
				format := "%" + flags + string(verb)
				if form := leaks(fmt.Sprintf(format, v)); form != "" {
					t.Errorf("%s with %q leaks as %s", name, format, form)
					break verbs
				}
			}
		}
		for _, out := range []string{fmt.Sprint(v), fmt.Sprintln(v), fmt.Errorf("wrapped: %v", v).Error()} {
			if form := leaks(out); form != "" {
				t.Errorf("%s leaks as %s in %q", name, form, out)
			}
		}
	}
	if got := fmt.Sprintf("%s", redact.New([]byte(plain))); got != redact.Placeholder {
		t.Errorf("%%s = %q, want the placeholder", got)
	}
}

func TestNoLogHandlerWritesASecret(t *testing.T) {
	t.Parallel()
	for name, v := range holders() {
		var buf bytes.Buffer
		opts := &slog.HandlerOptions{AddSource: true}
		for _, h := range []slog.Handler{slog.NewJSONHandler(&buf, opts), slog.NewTextHandler(&buf, opts)} {
			log := slog.New(h)
			log.Info("A", "value", v)
			log.With("value", v).Info("B")
			log.WithGroup("g").Info("C", slog.Group("g", slog.Any("value", v)))
			log.Error("D", "err", fmt.Errorf("wrapped: %v", v))
		}
		if form := leaks(buf.String()); form != "" {
			t.Errorf("%s leaks as %s: %s", name, form, buf.String())
		}
	}
}

func TestNoEncoderWritesASecret(t *testing.T) {
	t.Parallel()
	encoders := map[string]func(any) ([]byte, error){
		"json": json.Marshal,
		"xml":  xml.Marshal,
		"toml": toml.Marshal,
		"gob": func(v any) ([]byte, error) {
			var b bytes.Buffer
			err := gob.NewEncoder(&b).Encode(v)
			return b.Bytes(), err
		},
	}
	for name, v := range holders() {
		for enc, marshal := range encoders {
			out, err := marshal(v) // An encoder may refuse; it may not leak.
			if form := leaks(string(out)); form != "" {
				t.Errorf("%s through %s leaks as %s: %s", name, enc, form, out)
			}
			if err != nil {
				if form := leaks(err.Error()); form != "" {
					t.Errorf("%s through %s leaks as %s in its error", name, enc, form)
				}
			}
		}
	}
	out, err := json.Marshal(redact.New([]byte(plain)))
	if err != nil || string(out) != `"`+redact.Placeholder+`"` {
		t.Errorf("json = %s, %v; want the placeholder", out, err)
	}
}

func TestPanicValueDoesNotLeak(t *testing.T) {
	t.Parallel()
	defer func() {
		if form := leaks(fmt.Sprint(recover())); form != "" {
			t.Errorf("leaks as %s", form)
		}
	}()
	panic(fmt.Errorf("broken: %+v: %w", holders()["struct"], errors.ErrUnsupported))
}

func TestEqualComparesBytes(t *testing.T) {
	t.Parallel()
	a, b := redact.New([]byte("same")), redact.New([]byte("same"))
	if !a.Equal(b) {
		t.Error("equal secrets differ")
	}
	for _, other := range []redact.Secret{redact.New([]byte("samf")), redact.New([]byte("sam")), {}} {
		if a.Equal(other) {
			t.Errorf("a secret of %d bytes equals another", other.Len())
		}
	}
	if !(redact.Secret{}).Equal(redact.New(nil)) {
		t.Error("two empty secrets differ")
	}
}

func TestNewCopiesItsArgument(t *testing.T) {
	t.Parallel()
	b := []byte(plain)
	s := redact.New(b)
	clear(b)
	if string(s.Expose()) != plain {
		t.Error("clearing the argument changed the secret")
	}
}

func TestWipeReachesEveryCopy(t *testing.T) {
	t.Parallel()
	s := redact.New([]byte(plain))
	copied, exposed := s, s.Expose()
	s.Wipe()
	s.Wipe()
	if !copied.IsZero() || copied.Len() != 0 {
		t.Error("a copy still holds the secret")
	}
	if !bytes.Equal(exposed, make([]byte, len(plain))) {
		t.Error("the exposed bytes were not overwritten")
	}
	var zero redact.Secret
	zero.Wipe()
	if zero.Expose() != nil || fmt.Sprint(zero) != redact.Placeholder {
		t.Error("the zero secret is not an empty secret")
	}
}
