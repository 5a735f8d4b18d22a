package labvm

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// patience is how long a test waits for what a machine does. What depends on it has
// failed.
const patience = 2 * time.Minute

// image is what instances say that they were started from.
const image = "ami-0123456789abcdef0"

// open returns a factory that ends with the test, and the lab.
func open(t *testing.T, release string) (*Machines, *lab.Lab) {
	t.Helper()
	l, err := lab.Current()
	if err != nil {
		t.Fatal(err)
	}
	machines, err := Open(t.Context(), Options{Release: release})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := machines.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return machines, l
}

// start starts a machine, and shows what is known of it if the test fails.
func start(t *testing.T, machines *Machines, id string, userData []byte) *Machine {
	t.Helper()
	started, err := machines.Start(t.Context(), cloudsim.Boot{
		ID: id, Image: image, UserData: userData,
		Metadata: map[string]string{"instance-type": "m7i.large", "placement/region": "eu-central-1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	m, ok := started.(*Machine)
	if !ok {
		t.Fatalf("the machine is a %T", started)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		if m.Host().Running() {
			journal, err := m.Host().Journal(context.WithoutCancel(t.Context()))
			t.Logf("journal of %s (%v):\n%s", id, err, journal)
		}
		t.Logf("console of %s:\n%s", id, m.Console())
	})
	return m
}

// eventually waits until a machine's console shows a text, and returns what it
// shows.
func eventually(t *testing.T, m *Machine, text string) string {
	t.Helper()
	until := time.Now().Add(patience)
	for {
		shown := string(m.Console())
		if strings.Contains(shown, text) {
			return shown
		}
		select {
		case <-m.Off():
			if shown = string(m.Console()); strings.Contains(shown, text) {
				return shown
			}
			t.Fatalf("the machine is off and its console doesn't show %q", text)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(until) {
			t.Fatalf("the console doesn't show %q", text)
		}
	}
}

// isOff waits until a machine is powered off.
func isOff(t *testing.T, m *Machine, within time.Duration) {
	t.Helper()
	select {
	case <-m.Off():
	case <-time.After(within):
		t.Fatalf("the machine is still on after %v", within)
	}
}

// asksIMDS asks the metadata service as a program of the machine can, and writes
// what it gets to the console.
const asksIMDS = `#cloud-config
write_files:
- path: /root/ask.py
  content: |
    import sys, urllib.error, urllib.request
    def ask(path, method="GET", **headers):
        request = urllib.request.Request("http://169.254.169.254/" + path, method=method,
            headers={"X-aws-ec2-metadata-" + k.replace("_", "-"): v for k, v in headers.items()})
        try:
            return urllib.request.urlopen(request, timeout=10).read().decode()
        except urllib.error.HTTPError as e:
            return "answer %d" % e.code
    token = ask("latest/api/token", "PUT", token_ttl_seconds="60")
    with open("/dev/console", "w") as console:
        print("without a token:", ask("latest/meta-data/instance-id"), file=console)
        for path in sys.argv[1:]:
            print(path + ":", ask(path, token=token).replace("\n", " "), file=console)
        print("asked", file=console)
runcmd:
- [python3, /root/ask.py, latest/meta-data/instance-id, latest/meta-data/instance-type, latest/meta-data/placement/,
   latest/meta-data/nothing, latest/dynamic/instance-identity/document]
- [sh, -c, 'echo boot of $(cat /etc/hostname) >/dev/console']
`

// A machine is what EC2's are to cloud-init: found out to be one, told what it is,
// given an address. It reboots and powers off by itself.
func TestAMachineBootsAsAnInstanceOfEC2Does(t *testing.T) {
	t.Parallel()
	machines, l := open(t, "")
	m := start(t, machines, "i-0aaaaaaaaaaaaaaa1", []byte(asksIMDS))
	shown := eventually(t, m, "boot of ip-")
	for _, want := range []string{
		"without a token: answer 401", "instance-id: i-0aaaaaaaaaaaaaaa1", "instance-type: m7i.large",
		"placement/: availability-zone region", "meta-data/nothing: answer 404", `"instanceId": "i-0aaaaaaaaaaaaaaa1"`,
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	if !l.Prefix().Contains(m.Addr()) || !strings.Contains(shown, m.Addr().String()) {
		t.Errorf("the machine at %s has another address", m.Addr())
	}
	ctx := t.Context()
	status, err := m.Host().Exec(ctx, "cloud-init", "status", "--wait", "--long")
	if !strings.Contains(status, "DataSourceEc2") || !strings.Contains(status, "status: done") {
		t.Errorf("cloud-init's status (%v):\n%s", err, status)
	}

	if _, err := m.Host().Exec(ctx, "touch", "/root/kept"); err != nil {
		t.Fatal(err)
	}
	if err := m.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	// The address comes by DHCP again.
	if out, err := m.Host().Exec(ctx, "sh", "-c", "until ip address show eth0 | grep -q inet\\ ; do sleep 0.1; done; ls /root/kept"); err != nil {
		t.Errorf("after a reboot: %v\n%s", err, out)
	}
	if again := string(m.Console()); strings.Count(again, "boot of") != 1 {
		t.Error("user-data ran again")
	}
	if _, err := m.Host().Exec(ctx, "systemctl", "poweroff", "--no-block"); err != nil {
		t.Error(err)
	}
	isOff(t, m, patience)
	if err := m.Reboot(ctx); err == nil {
		t.Error("what is off rebooted")
	}
	for range 2 {
		if err := m.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.Host(m.Host().Name); err == nil {
		t.Error("something is left of what was stopped")
	}
}

func TestAnotherArchitectureIsRefused(t *testing.T) {
	t.Parallel()
	machines, _ := open(t, "")
	other := map[string]string{"x86_64": "arm64", "arm64": "x86_64"}[architecture()]
	if _, err := machines.Start(t.Context(), cloudsim.Boot{ID: "i-0aaaaaaaaaaaaaaa2", Architecture: other}); err == nil {
		t.Error("it was started")
	}
}

func TestAClosedFactoryStartsNothing(t *testing.T) {
	t.Parallel()
	machines, _ := open(t, "")
	if err := machines.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := machines.Start(t.Context(), cloudsim.Boot{ID: "i-0aaaaaaaaaaaaaaa3"}); err == nil {
		t.Error("it started a machine")
	}
}

func TestAConsoleKeepsWhatWasShownLast(t *testing.T) {
	t.Parallel()
	c, err := openConsole()
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(c.terminal, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 99) + "\n"
	for n := 0; n < 3*consoleLimit; n += len(line) {
		if _, err := terminal.WriteString(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := terminal.WriteString("the end\n"); err != nil {
		t.Fatal(err)
	}
	if err := terminal.Close(); err != nil {
		t.Fatal(err)
	}
	until := time.Now().Add(patience)
	for !bytes.HasSuffix(c.text(), []byte("the end\r\n")) {
		if time.Now().After(until) {
			t.Fatal("the end isn't shown")
		}
		<-time.After(time.Millisecond)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
	if n := len(c.text()); n < consoleLimit || n > 2*consoleLimit {
		t.Errorf("%d bytes are kept", n)
	}
}
