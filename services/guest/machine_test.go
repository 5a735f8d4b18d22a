package main

import (
	"crypto/rand"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// TestWorkloadOfAMachineIsLikeAContainers runs the guest as a virtual machine's unit does: systemd hears when SSH is
// open, and nothing of what systemd has put into the environment reaches the workload or a session.
func TestWorkloadOfAMachineIsLikeAContainers(t *testing.T) {
	t.Parallel()
	// The container has this network, and so its abstract sockets.
	name := "@compute-bridge-" + rand.Text()
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = systemd.Close() }()
	img := distro()
	img.Machine = true
	c := startContainer(t, img, guestapi.Config{
		Command:     []string{"bash", "-c", "trap 'echo stopping; exit 9' TERM; env -0 | tr '\\0' '|'; echo; while :; do sleep 0.05; done"},
		Environment: map[string]string{"FROM_GRANT": "yes"},
	}, "NOTIFY_SOCKET="+name, "INVOCATION_ID=0123", "JOURNAL_STREAM=1:2", "LANG=xx")

	if err := systemd.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 4096)
	n, err := systemd.Read(message)
	if err != nil || string(message[:n]) != "READY=1" {
		t.Fatalf("systemd heard %q, %v", message[:n], err)
	}
	session, stderr, code := c.ssh(t, "compute", "env -0 | tr '\\0' '|'")
	if code != 0 {
		t.Fatal(stderr)
	}
	c.console(t, "FROM_GRANT=yes|")
	for who, text := range map[string]string{"the workload": c.output.String(), "a session": session} {
		for _, strange := range []string{"NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "LANG=xx"} {
			if strings.Contains(text, strange) {
				t.Errorf("%s has %s: %s", who, strange, text)
			}
		}
		for _, want := range []string{"FROM_GRANT=yes|", "HOSTNAME=", "/usr/local/sbin:"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %s: %s", who, want, text)
			}
		}
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 9 {
		t.Errorf("exit code %d: %s", code, c.output)
	}
}
