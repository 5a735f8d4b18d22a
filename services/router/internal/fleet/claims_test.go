package fleet_test

import (
	"encoding/hex"
	"reflect"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/router/internal/fleet"
)

// The hash is stored in ledgers: it must never change for a content that
// exists already.
func TestContentHashIsStable(t *testing.T) {
	grant, envelope := grantOf(1)
	hash := fleet.Content(grant, envelope)
	if got, want := hex.EncodeToString(hash[:]), "283a4ba518e31044fac64d738813796402219dcaf7ae9c865496f93e677a9cea"; got != want {
		t.Errorf("hash is %s, want %s", got, want)
	}
}

func TestContentHashSeesEveryField(t *testing.T) {
	grant, envelope := grantOf(1)
	grant.Environment = map[string]string{"A": "1", "B": "2"}
	base := fleet.Content(grant, envelope)
	seen := map[[32]byte]string{base: "base"}
	differs := func(what string, g backend.Grant, e backend.Envelope) {
		t.Helper()
		hash := fleet.Content(g, e)
		if other, taken := seen[hash]; taken {
			t.Errorf("%s has the hash of %s", what, other)
		}
		seen[hash] = what
	}
	fill := func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Slice:
			s := reflect.MakeSlice(v.Type(), 1, 1)
			v.Set(s)
		case reflect.Array:
			v.Index(0).SetUint(v.Index(0).Uint() + 1)
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Map:
			v.Set(reflect.ValueOf(map[string]string{"A": "12"}))
		case reflect.Int32, reflect.Int64:
			v.SetInt(v.Int() + 5)
		case reflect.Uint64:
			v.SetUint(5)
		case reflect.Struct:
			if v.Type() == reflect.TypeFor[time.Time]() {
				v.Set(reflect.ValueOf(time.Unix(5, 0)))
				return
			}
			t.Fatalf("%s needs a case of its own", v.Type())
		default:
			t.Fatalf("a field of kind %s needs a case", v.Kind())
		}
	}
	for _, path := range fieldsOf(reflect.TypeFor[backend.Grant](), nil) {
		g := grant
		fill(reflect.ValueOf(&g).Elem().FieldByIndex(path))
		differs("grant."+reflect.TypeFor[backend.Grant]().FieldByIndex(path).Name, g, envelope)
	}
	for _, path := range fieldsOf(reflect.TypeFor[backend.Envelope](), nil) {
		e := envelope
		fill(reflect.ValueOf(&e).Elem().FieldByIndex(path))
		differs("envelope."+reflect.TypeFor[backend.Envelope]().FieldByIndex(path).Name, grant, e)
	}
	g := grant
	g.Network.Mode = backend.NetworkOpen
	g.ValidTo = g.ValidTo.In(time.FixedZone("elsewhere", 3600))
	g.Environment = map[string]string{"B": "2", "A": "1"}
	g.Ports, g.ProviderID = []backend.Port{}, []byte{}
	if fleet.Content(g, envelope) != base {
		t.Error("the same content written in another way has another hash")
	}
}

// fieldsOf lists the paths of all fields, those of nested structs in place of
// the struct.
func fieldsOf(typ reflect.Type, path []int) [][]int {
	if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() {
		return [][]int{path}
	}
	var all [][]int
	for i := range typ.NumField() {
		all = append(all, fieldsOf(typ.Field(i).Type, append(append([]int(nil), path...), i))...)
	}
	return all
}
