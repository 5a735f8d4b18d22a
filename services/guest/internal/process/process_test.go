package process

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, script string) *Process {
	t.Helper()
	p, err := Start(exec.Command("/bin/sh", "-c", script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.SignalGroup(syscall.SIGKILL)
		<-p.Done()
	})
	return p
}

func wait(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(3 * time.Minute):
		t.Fatal("the process did not end")
	}
}

func TestExitCodes(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -KILL $$": 137, "kill -TERM $$": 143} {
		p := start(t, script)
		wait(t, p)
		if got := ExitCode(p.Status()); got != want {
			t.Errorf("%s: %d, want %d", script, got, want)
		}
		if err := p.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal after the end: %v", err)
		}
		if err := p.SignalGroup(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("group signal after the end: %v", err)
		}
	}
}

func TestGroupSignalReachesGrandchildren(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/bin/sh", "-c", "sleep 1000 & echo x; wait")
	cmd.Stdout = w
	p, err := Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if _, err := r.Read(make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if err := p.SignalGroup(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wait(t, p)
	// The end of the pipe comes when sleep, which holds it too, is gone.
	_ = r.SetReadDeadline(time.Now().Add(3 * time.Minute))
	if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the grandchild lives: %v", err)
	}
}

func TestStartFails(t *testing.T) {
	if _, err := Start(exec.Command("/no/such")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestCredential(t *testing.T) {
	got := Credential(account.Account{UID: 5, GID: 6, Groups: []uint32{6, 7}})
	if os.Geteuid() != 0 {
		if got != nil {
			t.Errorf("without privilege: %+v", got)
		}
		return
	}
	if got == nil || got.Uid != 5 || got.Gid != 6 || len(got.Groups) != 2 {
		t.Errorf("got %+v", got)
	}
}
