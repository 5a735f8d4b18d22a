package backend

import "testing"

func TestOnlyKnownRolesAreRead(t *testing.T) {
	t.Parallel()
	for _, role := range []Role{RoleReader, RoleClient, RoleOperator} {
		if got, err := ParseRole(role.String()); err != nil || got != role {
			t.Errorf("%s is read as %s: %v", role, got, err)
		}
	}
	for _, s := range []string{"", "none", "Operator", " client", "root"} {
		if got, err := ParseRole(s); err == nil || got != RoleNone {
			t.Errorf("%q is read as %s", s, got)
		}
	}
}

func TestWhoOwnsAndWhoSeesAll(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		caller        Caller
		owns, seesAll bool
	}{
		{Caller{}, false, false},
		{Caller{Identity: "alice"}, false, false},
		{Caller{Identity: "alice", Role: RoleReader}, false, true},
		{Caller{Identity: "alice", Role: RoleClient}, true, false},
		{Caller{Identity: "bob", Role: RoleClient}, false, false},
		{Caller{Identity: "bob", Role: RoleOperator}, true, true},
	} {
		if c.caller.Owns("alice") != c.owns || c.caller.SeesAll() != c.seesAll {
			t.Errorf("%+v: owns %t, sees all %t", c.caller, c.caller.Owns("alice"), c.caller.SeesAll())
		}
	}
	if (Caller{Identity: "", Role: RoleNone}).Owns("") {
		t.Error("nobody owns what has no owner")
	}
}

func TestCallerTravelsInTheContext(t *testing.T) {
	t.Parallel()
	if got := CallerFrom(t.Context()); got != (Caller{}) {
		t.Errorf("without a word the caller is %+v", got)
	}
	want := Caller{Identity: "alice", Role: RoleClient, Hops: 2}
	if got := CallerFrom(WithCaller(t.Context(), want)); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
