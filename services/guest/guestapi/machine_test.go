package guestapi_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

func fullMachine(t *testing.T) guestapi.Machine {
	t.Helper()
	config := fullConfig(t)
	config.Command, config.WorkingDir, config.RunAs = nil, "", ""
	config.ListenPort = 22
	return guestapi.Machine{
		Guest:    config,
		GrantID:  strings.Repeat("0123456789abcdef", 4),
		Attempt:  3,
		Deadline: time.Date(2027, 3, 4, 5, 6, 7, 0, time.UTC),
		Image: guestapi.MachineImage{
			URL:    "https://store.example.org/images/a%20b?X-Amz-Signature=hunter2",
			Digest: "sha256:" + strings.Repeat("ab", 32), MaxBytes: 5 << 30,
		},
		AtEnd: guestapi.AtEndPowerOff,
	}
}

func TestMachineComesBackAsItWas(t *testing.T) {
	want := fullMachine(t)
	data, err := guestapi.EncodeMachine(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := guestapi.DecodeMachine(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for range 20 {
		again, err := guestapi.EncodeMachine(fullMachine(t))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(data, again) {
			t.Fatal("equal machines give different bytes")
		}
	}
}

func TestMachineDeadlineMayBeAllThatATimerCanBe(t *testing.T) {
	machine := fullMachine(t)
	for _, deadline := range []time.Time{time.Unix(0, 0), time.Date(2199, 12, 31, 23, 59, 59, 0, time.UTC)} {
		machine.Deadline = deadline
		if err := machine.Validate(); err != nil {
			t.Errorf("%v: %v", deadline, err)
		}
	}
}

func TestMachineDeadlineIsWrittenInUTC(t *testing.T) {
	machine := fullMachine(t)
	want, err := guestapi.EncodeMachine(machine)
	if err != nil {
		t.Fatal(err)
	}
	machine.Deadline = machine.Deadline.In(time.FixedZone("", 3600))
	got, err := guestapi.EncodeMachine(machine)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) {
		t.Error("the time zone changes the bytes")
	}
}

func TestMachineRefusesWhatNoGuestCanDo(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*guestapi.Machine)
		want   string
	}{
		"no grant":             {func(m *guestapi.Machine) { m.GrantID = "" }, "grant_id: "},
		"grant in capitals":    {func(m *guestapi.Machine) { m.GrantID = strings.Repeat("AB", 32) }, "grant_id: "},
		"attempt":              {func(m *guestapi.Machine) { m.Attempt = 0 }, "attempt: "},
		"no deadline":          {func(m *guestapi.Machine) { m.Deadline = time.Time{} }, "deadline: "},
		"fraction":             {func(m *guestapi.Machine) { m.Deadline = m.Deadline.Add(1) }, "deadline: "},
		"before 1970":          {func(m *guestapi.Machine) { m.Deadline = time.Unix(-1, 0) }, "deadline: "},
		"after 2199":           {func(m *guestapi.Machine) { m.Deadline = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC) }, "deadline: "},
		"end":                  {func(m *guestapi.Machine) { m.AtEnd = "reboot" }, "at_end: "},
		"no URL":               {func(m *guestapi.Machine) { m.Image.URL = "" }, "image.url: "},
		"scheme":               {func(m *guestapi.Machine) { m.Image.URL = "file:///etc/shadow" }, "image.url: "},
		"no host":              {func(m *guestapi.Machine) { m.Image.URL = "https:///hunter2" }, "image.url: "},
		"credentials in URL":   {func(m *guestapi.Machine) { m.Image.URL = "https://a:hunter2@b/c" }, "image.url: "},
		"line in URL":          {func(m *guestapi.Machine) { m.Image.URL = "https://b/hunter2\nc" }, "image.url: "},
		"no URL at all":        {func(m *guestapi.Machine) { m.Image.URL = "https://b:hunter2/" }, "image.url: "},
		"fragment":             {func(m *guestapi.Machine) { m.Image.URL = "https://b/#hunter2" }, "image.url: "},
		"long URL":             {func(m *guestapi.Machine) { m.Image.URL = "https://b/" + strings.Repeat("a", 9000) }, "image.url: "},
		"algorithm":            {func(m *guestapi.Machine) { m.Image.Digest = "md5:" + strings.Repeat("0", 64) }, "image.digest: "},
		"short digest":         {func(m *guestapi.Machine) { m.Image.Digest = "sha256:00" }, "image.digest: "},
		"size":                 {func(m *guestapi.Machine) { m.Image.MaxBytes = 0 }, "image.max_bytes: "},
		"no host key":          {func(m *guestapi.Machine) { m.Guest.HostKey = guestapi.HostKey{} }, "guest: host_key_pem: "},
		"command":              {func(m *guestapi.Machine) { m.Guest.Command = []string{"hunter2"} }, "guest: command: "},
		"working directory":    {func(m *guestapi.Machine) { m.Guest.WorkingDir = "/" }, "guest: working_dir: "},
		"user of the workload": {func(m *guestapi.Machine) { m.Guest.RunAs = "0" }, "guest: run_as: "},
		"much": {func(m *guestapi.Machine) {
			m.Guest.Environment = map[string]string{}
			for i := range 40 {
				m.Guest.Environment[fmt.Sprint("V", i)] = strings.Repeat("a", 100<<10)
			}
		}, "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			machine := fullMachine(t)
			tc.change(&machine)
			_, err := guestapi.EncodeMachine(machine)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret is in %v", err)
			}
		})
	}
}

func TestMachineFileIsReadStrictly(t *testing.T) {
	data, err := guestapi.EncodeMachine(fullMachine(t))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.TrimSpace(string(data))
	for name, tc := range map[string]struct{ text, want string }{
		"empty":         {"", "is empty"},
		"cut":           {text[:len(text)/2], "ends in the middle"},
		"trailing":      {text + "{}", "after its end"},
		"unknown":       {strings.Replace(text, `"attempt"`, `"attempts"`, 1), `unknown field "attempts"`},
		"unknown below": {strings.Replace(text, `"user"`, `"users"`, 1), `unknown field "users"`},
		"version":       {strings.Replace(text, `"version":1`, `"version":2`, 1), "version: 2 is not supported"},
		"type":          {strings.Replace(text, `"attempt":3`, `"attempt":"hunter2"`, 1), "attempt: expected uint32"},
		"deadline":      {strings.Replace(text, "2027-03-04T", "2027-03-04 ", 1), "deadline: "},
		"encoding":      {strings.Replace(text, "hunter2", "\xff", 1), "not valid UTF-8"},
		"too long":      {text + strings.Repeat(" ", guestapi.MaxMachineBytes), "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := guestapi.DecodeMachine(strings.NewReader(tc.text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret is in %v", err)
			}
		})
	}
}

func TestMachineShowsNoSecret(t *testing.T) {
	machine := fullMachine(t)
	key := strings.Split(hostKeyPEM(t), "\n")[1]
	var log bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(handler).Info("x", "machine", machine, "pointer", &machine, "image", machine.Image)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb, machine)
		fmt.Fprintf(&log, verb, &machine)
		fmt.Fprintf(&log, verb, machine.Image)
		fmt.Fprintf(&log, verb, struct{ M guestapi.Machine }{machine})
	}
	data, err := json.Marshal(machine)
	if err != nil {
		t.Fatal(err)
	}
	log.Write(data)
	for _, secret := range []string{"hunter2", fmt.Sprintf("%x", "hunter2"), key, fmt.Sprintf("%x", key)} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("%q is shown", secret)
		}
	}
	if !strings.Contains(log.String(), machine.GrantID) {
		t.Error("the grant is not shown")
	}
}

func FuzzDecodeMachine(f *testing.F) {
	data, err := guestapi.EncodeMachine(fullMachine(&testing.T{}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Add(bytes.Replace(data, []byte("sha256"), []byte("blake3"), 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		machine, err := guestapi.DecodeMachine(bytes.NewReader(data))
		if err != nil {
			return
		}
		encoded, err := guestapi.EncodeMachine(machine)
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		again, err := guestapi.DecodeMachine(bytes.NewReader(encoded))
		if err != nil {
			t.Fatalf("what was written can't be read: %v", err)
		}
		second, err := guestapi.EncodeMachine(again)
		if err != nil || !bytes.Equal(encoded, second) {
			t.Fatalf("two encodings differ, %v", err)
		}
	})
}
