package userdata_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/compute-bridge/compute-bridge/pkg/userdata"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func spec() userdata.Spec {
	return userdata.Spec{
		GuestURL:      "https://store.example.org/guest?X-Amz-Signature=hunter2%20&a='b'$c`d",
		GuestSHA256:   strings.Repeat("ab", 32),
		Machine:       []byte(`{"version":1,"grant_id":"` + strings.Repeat("cd", 32) + `","attempt":2}` + "\n"),
		Deadline:      time.Date(2027, 3, 4, 5, 6, 7, 0, time.FixedZone("", 3600)),
		PowerOffAtEnd: true,
	}
}

// config is the part of a cloud-config that we render.
type config struct {
	Bootcmd    [][]string
	Runcmd     [][]string
	Users      []string
	WriteFiles []struct {
		Path, Permissions, Owner, Encoding, Content string
	} `yaml:"write_files"`
	DisableRoot    bool            `yaml:"disable_root"`
	SSHPwauth      bool            `yaml:"ssh_pwauth"`
	SSHGenkeytypes []string        `yaml:"ssh_genkeytypes"`
	SSH            map[string]bool `yaml:"ssh"`
}

// read reads rendered user-data as cloud-init does.
func read(t testing.TB, data []byte) (config, map[string]string) {
	t.Helper()
	text, err := userdata.Open(data)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(text, []byte("#cloud-config\n")) {
		t.Fatalf("begins with %.40q", text)
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	var c config
	if err := dec.Decode(&c); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	files := map[string]string{}
	decode := func(name, content string) {
		decoded, err := base64.StdEncoding.DecodeString(content)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, ok := files[name]; ok {
			t.Fatalf("%s is written twice", name)
		}
		files[name] = string(decoded)
	}
	for _, f := range c.WriteFiles {
		if f.Encoding != "b64" || f.Owner != "root:root" {
			t.Fatalf("%s: encoding %q, owner %q", f.Path, f.Encoding, f.Owner)
		}
		decode(f.Path, f.Content)
	}
	for _, command := range c.Bootcmd {
		if command[0] == "sh" {
			decode(command[5], command[4])
		}
	}
	return c, files
}

func render(t testing.TB, s userdata.Spec) []byte {
	t.Helper()
	data, err := userdata.Render(s)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestUserDataHasTheAgreedForm(t *testing.T) {
	s := spec()
	data := render(t, s)
	text, err := userdata.Open(data)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "cloud-config.golden.yaml", text)
	_, files := read(t, data)
	var all strings.Builder
	for _, name := range sortedKeys(files) {
		// The program is in the repository as it is.
		if path.Ext(name) != ".py" {
			fmt.Fprintf(&all, "==> %s <==\n%s\n", name, files[name])
		}
	}
	golden(t, "files.golden.txt", []byte(all.String()))
	for range 5 {
		if !bytes.Equal(data, render(t, s)) {
			t.Fatal("equal specs give different bytes")
		}
	}
	t.Logf("%d of %d bytes", len(data), userdata.MaxBytes)
}

func sortedKeys(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; rewrite with -update):\n%s", name, diff)
	}
}

func TestImageServerIsMaskedBeforeAllElse(t *testing.T) {
	c, _ := read(t, render(t, spec()))
	first := c.Bootcmd[0]
	if !slices.Equal(first[:4], []string{"systemctl", "mask", "ssh.service", "ssh.socket"}) {
		t.Errorf("the first command is %q", first)
	}
	if c.Users == nil || len(c.Users) != 0 || !c.DisableRoot || c.SSHPwauth {
		t.Error("cloud-init would let somebody in")
	}
}

func TestSecretsAreForRootOnly(t *testing.T) {
	c, files := read(t, render(t, spec()))
	for _, f := range c.WriteFiles {
		if strings.HasSuffix(f.Path, ".json") && f.Permissions != "0600" {
			t.Errorf("%s has mode %s", f.Path, f.Permissions)
		}
	}
	for name, content := range files {
		if strings.Contains(content, "hunter2") && path.Dir(name) != path.Dir(userdata.MachinePath) {
			t.Errorf("a secret is in %s", name)
		}
	}
}

func TestSpecShowsNoSecret(t *testing.T) {
	s := spec()
	s.Machine = []byte(`"hunter2"`)
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "spec", s)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "spec", &s)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb, s)
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	log.Write(data)
	for _, secret := range []string{"hunter2", fmt.Sprintf("%x", "hunter2"), fmt.Sprint([]byte("hunter2"))} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("%q is shown", secret)
		}
	}
}

func TestWhatIsTooLargeSaysByHowMuch(t *testing.T) {
	s := spec()
	noise := make([]byte, 20<<10)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	machine, err := json.Marshal(noise)
	if err != nil {
		t.Fatal(err)
	}
	s.Machine = machine
	_, err = userdata.Render(s)
	if err == nil {
		t.Fatal("accepted")
	}
	var size, over int
	if _, scanErr := fmt.Sscanf(err.Error(), "user-data has %d bytes compressed, %d more than", &size, &over); scanErr != nil ||
		size-over != userdata.MaxBytes || over < 4<<10 {
		t.Error(err)
	}
}

func TestSpecThatCannotWorkIsRefused(t *testing.T) {
	for name, change := range map[string]func(*userdata.Spec){
		"scheme":   func(s *userdata.Spec) { s.GuestURL = "ftp://hunter2/x" },
		"no host":  func(s *userdata.Spec) { s.GuestURL = "https:///hunter2" },
		"no URL":   func(s *userdata.Spec) { s.GuestURL = "https://hunter2:x/\x7f" },
		"spaces":   func(s *userdata.Spec) { s.GuestURL += " hunter2" },
		"not UTF8": func(s *userdata.Spec) { s.GuestURL += "\xff" },
		"digest":   func(s *userdata.Spec) { s.GuestSHA256 = "hunter2" },
		"capitals": func(s *userdata.Spec) { s.GuestSHA256 = strings.Repeat("AB", 32) },
		"machine":  func(s *userdata.Spec) { s.Machine = []byte("hunter2") },
		"deadline": func(s *userdata.Spec) { s.Deadline = time.Time{} },
		"fraction": func(s *userdata.Spec) { s.Deadline = s.Deadline.Add(1) },
		"1969":     func(s *userdata.Spec) { s.Deadline = time.Date(1969, 12, 31, 23, 59, 59, 0, time.UTC) },
		"2200":     func(s *userdata.Spec) { s.Deadline = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		s := spec()
		change(&s)
		if _, err := userdata.Render(s); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// The last second of systemd's calendar: systemd-analyze calendar '2199-12-31 23:59:59 UTC'.
func TestDeadlineMayBeAllThatTheTimerCanBe(t *testing.T) {
	for _, deadline := range []time.Time{time.Unix(0, 0), time.Date(2199, 12, 31, 23, 59, 59, 0, time.UTC)} {
		s := spec()
		s.Deadline = deadline
		if _, err := userdata.Render(s); err != nil {
			t.Errorf("%v: %v", deadline, err)
		}
	}
}

// Where a stopped machine goes on costing, only the deadline powers it off.
func TestMachineThatStaysHasNoUnitThatPowersOff(t *testing.T) {
	for _, powerOff := range []bool{true, false} {
		s := spec()
		s.PowerOffAtEnd = powerOff
		c, files := read(t, render(t, s))
		for name, content := range files {
			if path.Base(name) != "compute-bridge-deadline.service" && strings.Contains(content, "Action=poweroff") && !powerOff {
				t.Errorf("%s powers off:\n%s", name, content)
			}
			if strings.Contains(content, "[[") || strings.Contains(content, "]]") {
				t.Errorf("%s is not rendered:\n%s", name, content)
			}
		}
		const ended = "compute-bridge-ended.service"
		_, written := files["/etc/systemd/system/"+ended]
		enabled := slices.ContainsFunc(c.Runcmd, func(command []string) bool { return slices.Contains(command, ended) })
		if written != powerOff || enabled != powerOff {
			t.Errorf("power-off %v: %s is written: %v, enabled: %v", powerOff, ended, written, enabled)
		}
	}
}

func TestOpenRefusesWhatIsNoUserData(t *testing.T) {
	data := render(t, spec())
	for name, bad := range map[string][]byte{"empty": nil, "text": []byte("#cloud-config\n"), "cut": data[:len(data)-9]} {
		if _, err := userdata.Open(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzNoValueBreaksOut renders any values and reads the text again: nothing but
// these values may have changed.
func FuzzNoValueBreaksOut(f *testing.F) {
	f.Add("/x", `{"a":"'\"\n- [reboot]\n$(reboot)`+"`reboot`"+`"}`, int64(1<<31))
	f.Add("/%s%n$HOME\n#", `"[[.Guest]] {{ds.meta_data}} ## template: jinja"`, int64(0))
	f.Add("", "null", int64(1e11))
	f.Add("\xca\xed\xa1", "0", int64(1))
	f.Add("", "1", time.Date(2199, 12, 31, 23, 59, 59, 0, time.UTC).Unix())
	plain, plainFiles := read(f, render(f, spec()))
	f.Fuzz(func(t *testing.T, suffix, machine string, unix int64) {
		s := spec()
		s.GuestURL += suffix
		s.Machine = []byte(machine)
		s.Deadline = time.Unix(unix, 0)
		data, err := userdata.Render(s)
		if err != nil {
			return
		}
		c, files := read(t, data)
		if files[userdata.MachinePath] != machine {
			t.Fatalf("the machine's file is %q", files[userdata.MachinePath])
		}
		var fetch struct{ URL string }
		if err := json.Unmarshal([]byte(files["/etc/compute-bridge/fetch.json"]), &fetch); err != nil {
			t.Fatal(err)
		}
		if fetch.URL != s.GuestURL {
			t.Fatalf("the URL is %q", fetch.URL)
		}
		timer := files["/etc/systemd/system/compute-bridge-deadline.timer"]
		if !strings.Contains(timer, "\nOnCalendar="+s.Deadline.UTC().Format(time.DateTime)+" UTC\n") {
			t.Fatalf("the timer is %q", timer)
		}
		if !slices.EqualFunc(c.Runcmd, plain.Runcmd, slices.Equal) || len(c.Bootcmd) != len(plain.Bootcmd) ||
			len(files) != len(plainFiles) {
			t.Fatal("other commands or files")
		}
		for name, content := range files {
			if !strings.HasSuffix(name, ".json") && !strings.HasSuffix(name, ".timer") && content != plainFiles[name] {
				t.Fatalf("%s is %q", name, content)
			}
		}
	})
}
