package environ

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEnvironmentsAreNeverSharedAndHaveEachNameOnce(t *testing.T) {
	base := make([]string, 0, 10)
	base = append(base, "A=1", "B=2", "A=3", "odd", "C=x=y")
	if value, ok := Get(base, "A"); value != "3" || !ok {
		t.Errorf("A is %q, %v", value, ok)
	}
	if value, ok := Get(base, "C"); value != "x=y" || !ok {
		t.Errorf("C is %q, %v", value, ok)
	}
	if _, ok := Get(base, "odd"); ok {
		t.Error("an entry without '=' has a value")
	}
	for name, tc := range map[string]struct{ got, want []string }{
		"set":     {Set(base, "A", "4"), []string{"B=2", "odd", "C=x=y", "A=4"}},
		"unset":   {Unset(base, "A", "C"), []string{"B=2", "odd"}},
		"overlay": {Overlay(base, map[string]string{"Z": "", "A": "9", "B": "8"}), []string{"odd", "C=x=y", "A=9", "B=8", "Z="}},
		"nothing": {Overlay(nil, nil), []string{}},
	} {
		if diff := cmp.Diff(tc.want, tc.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if diff := cmp.Diff([]string{"A=1", "B=2", "A=3", "odd", "C=x=y"}, base); diff != "" {
		t.Errorf("the base was changed:\n%s", diff)
	}
}
