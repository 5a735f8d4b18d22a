package backendgrpc_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

var sameSecret = cmp.Comparer(redact.Secret.Equal)

// fill sets everything in v to something that is not zero.
func fill(v reflect.Value, r *rand.Rand) {
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(r.Int64N(1<<35), 1+r.Int64N(999_999_998)).UTC()))
		return
	case redact.Secret:
		v.Set(reflect.ValueOf(redact.New([]byte(fmt.Sprint(r.Uint64())))))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			fill(field, r)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), r)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+r.IntN(3), 4))
		for i := range v.Len() {
			fill(v.Index(i), r)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), r)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 1 + r.IntN(3) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(key, r)
			fill(value, r)
			v.SetMapIndex(key, value)
		}
	case reflect.String:
		v.SetString(fmt.Sprintf("é%x", r.Uint32()))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int32:
		v.SetInt(1 + r.Int64N(9))
	case reflect.Int64:
		v.SetInt(int64(r.Uint64() | 1))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1 + r.Uint64N(250))
	default:
		panic("no filling for " + v.Type().String())
	}
}

func filled[T any](r *rand.Rand) T {
	var t T
	fill(reflect.ValueOf(&t).Elem(), r)
	return t
}

// there and back over real bytes.
func overTheWire[P proto.Message](t *testing.T, in, empty P) P {
	t.Helper()
	raw, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(raw, empty); err != nil {
		t.Fatal(err)
	}
	return empty
}

func same[T any](t *testing.T, want, got T) {
	t.Helper()
	if diff := cmp.Diff(want, got, sameSecret); diff != "" {
		t.Errorf("%T changed on its way (-sent +came):\n%s", want, diff)
	}
}

func roundTrips(t *testing.T, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	grant := filled[backend.Grant](r)
	same(t, grant, backendgrpc.GrantFromProto(overTheWire(t, backendgrpc.GrantToProto(grant), &bridgev1.Grant{})))
	envelope := filled[backend.Envelope](r)
	same(t, envelope, backendgrpc.EnvelopeFromProto(overTheWire(t, backendgrpc.EnvelopeToProto(envelope), &bridgev1.Envelope{})))
	instance := filled[backend.Instance](r)
	same(t, instance, backendgrpc.InstanceFromProto(overTheWire(t, backendgrpc.InstanceToProto(instance), &bridgev1.Instance{})))
	capabilities := filled[backend.Capabilities](r)
	same(t, capabilities, backendgrpc.CapabilitiesFromProto(overTheWire(t, backendgrpc.CapabilitiesToProto(capabilities), &bridgev1.CapabilitySet{})))
	log := filled[backend.SignedLog](r)
	same(t, &log, backendgrpc.SignedLogFromProto(overTheWire(t, backendgrpc.SignedLogToProto(&log), &bridgev1.SignedComputeLog{})))
	same(t, log.Log, backendgrpc.LogFromProto(overTheWire(t, backendgrpc.LogToProto(log.Log), &bridgev1.ComputeLog{})))
	for i := range 3 {
		p := backend.Provisioned{Instance: instance, Receipt: filled[backend.Receipt](r)}
		if i != 0 {
			p.Receipt.RequesterKey = ""
		}
		if i != 1 {
			p.Receipt.SealedKey = nil
		}
		if i != 2 {
			p.Receipt.PlaintextKey = nil
		}
		same(t, p, backendgrpc.ProvisionedFromProto(overTheWire(t, backendgrpc.ProvisionedToProto(p), &bridgev1.ProvisionResponse{})))
	}
	at := filled[time.Time](r)
	for _, e := range []backend.Event{{At: at, Instance: &instance}, {At: at, Usage: &log}, {At: at, Heartbeat: true}, {At: at, Log: &log}} {
		same(t, e, backendgrpc.EventFromProto(overTheWire(t, backendgrpc.EventToProto(e), &bridgev1.WatchUntilExitResponse{})))
	}
}

func TestEveryFieldSurvivesTheWire(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		roundTrips(t, seed)
	}
}

func FuzzEveryFieldSurvivesTheWire(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(roundTrips)
}

// Every field of the messages that both sides hold is used: a field that is
// added to the contract and forgotten here stays unset.
func TestEveryFieldOfTheContractIsSet(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	grant, log := filled[backend.Grant](r), filled[backend.SignedLog](r)
	receipt := filled[backend.Receipt](r)
	for _, m := range []proto.Message{
		backendgrpc.GrantToProto(grant), backendgrpc.EnvelopeToProto(filled[backend.Envelope](r)), backendgrpc.InstanceToProto(filled[backend.Instance](r)),
		backendgrpc.CapabilitiesToProto(filled[backend.Capabilities](r)), backendgrpc.SignedLogToProto(&log), backendgrpc.ReceiptToProto(receipt),
	} {
		unset(t, m.ProtoReflect().Descriptor().FullName(), m)
	}
}

func unset(t *testing.T, path any, m proto.Message) {
	t.Helper()
	message := m.ProtoReflect()
	fields := message.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if field.ContainingOneof() != nil && !field.HasOptionalKeyword() {
			continue // one of several
		}
		where := fmt.Sprint(path, ".", field.Name())
		if !message.Has(field) {
			t.Errorf("%s is not set", where)
			continue
		}
		switch value := message.Get(field); {
		case field.IsMap():
		case field.IsList() && field.Message() != nil:
			unset(t, where, value.List().Get(0).Message().Interface())
		case !field.IsList() && field.Message() != nil && !strings.HasPrefix(string(field.Message().FullName()), "google."):
			unset(t, where, value.Message().Interface())
		}
	}
}

func TestZeroValuesSurviveTheWire(t *testing.T) {
	t.Parallel()
	same(t, backend.Envelope{}, backendgrpc.EnvelopeFromProto(backendgrpc.EnvelopeToProto(backend.Envelope{})))
	same(t, backend.Instance{}, backendgrpc.InstanceFromProto(backendgrpc.InstanceToProto(backend.Instance{})))
	same(t, backend.Receipt{}, backendgrpc.ReceiptFromProto(backendgrpc.ReceiptToProto(backend.Receipt{})))
	same(t, backend.Capabilities{}, backendgrpc.CapabilitiesFromProto(backendgrpc.CapabilitiesToProto(backend.Capabilities{})))
	same(t, backend.ComputeLog{}, backendgrpc.LogFromProto(backendgrpc.LogToProto(backend.ComputeLog{})))
	same(t, backend.Event{}, backendgrpc.EventFromProto(backendgrpc.EventToProto(backend.Event{})))
	// An absent network policy is an open one.
	same(t, backend.Grant{Network: backend.NetworkPolicy{Mode: backend.NetworkOpen}}, backendgrpc.GrantFromProto(backendgrpc.GrantToProto(backend.Grant{})))
	if backendgrpc.SignedLogToProto(nil) != nil || backendgrpc.SignedLogFromProto(nil) != nil {
		t.Error("no log became a log")
	}
}

func TestConversionsShareNothing(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 3))
	p := backend.Provisioned{Instance: filled[backend.Instance](r), Receipt: filled[backend.Receipt](r)}
	sealed, quote := p.Receipt.SealedKey.Sealed[0], p.Receipt.Evidence.Quote[0]
	wire := backendgrpc.ProvisionedToProto(p)
	wire.GetReceipt().GetSealedKey().GetSealed()[0]++
	wire.GetReceipt().GetEvidence().GetQuote()[0]++
	if p.Receipt.SealedKey.Sealed[0] != sealed || p.Receipt.Evidence.Quote[0] != quote {
		t.Error("the message shares bytes with the receipt")
	}
}

// What a peer sends may be anything: conversions don't panic, and what they
// make of it converts again to the same.
func FuzzArbitraryMessages(f *testing.F) {
	r := rand.New(rand.NewPCG(4, 4))
	log := filled[backend.SignedLog](r)
	for _, m := range []proto.Message{
		backendgrpc.GrantToProto(filled[backend.Grant](r)), backendgrpc.InstanceToProto(filled[backend.Instance](r)), backendgrpc.SignedLogToProto(&log),
		backendgrpc.EventToProto(backend.Event{Usage: &log}), &bridgev1.SignedComputeLog{Log: &bridgev1.ComputeLog{}},
		&bridgev1.ProvisionResponse{Receipt: &bridgev1.Receipt{LoginKey: &bridgev1.Receipt_SealedKey{}}},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		again(t, raw, &bridgev1.Grant{}, backendgrpc.GrantFromProto, backendgrpc.GrantToProto)
		again(t, raw, &bridgev1.Envelope{}, backendgrpc.EnvelopeFromProto, backendgrpc.EnvelopeToProto)
		again(t, raw, &bridgev1.ProvisionResponse{}, backendgrpc.ProvisionedFromProto, backendgrpc.ProvisionedToProto)
		again(t, raw, &bridgev1.CapabilitySet{}, backendgrpc.CapabilitiesFromProto, backendgrpc.CapabilitiesToProto)
		again(t, raw, &bridgev1.WatchUntilExitResponse{}, backendgrpc.EventFromProto, backendgrpc.EventToProto)
		again(t, raw, &bridgev1.SignedComputeLog{}, backendgrpc.SignedLogFromProto, backendgrpc.SignedLogToProto)
	})
}

func again[P proto.Message, T any](t *testing.T, raw []byte, p P, from func(P) T, to func(T) P) {
	t.Helper()
	if proto.Unmarshal(raw, p) != nil {
		return
	}
	first := from(p)
	if second := from(to(first)); !cmp.Equal(first, second, sameSecret) {
		t.Errorf("%T isn't stable:\n%s", p, cmp.Diff(first, second, sameSecret))
	}
}
