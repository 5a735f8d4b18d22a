package reaper

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// roleVariable makes this test binary a reaper: the real one can't share a process with os/exec.
const roleVariable = "REAPER_TEST_SCRIPT"

func TestMain(m *testing.M) {
	if script, ok := os.LookupEnv(roleVariable); ok {
		code, err := Run("/bin/sh", []string{"sh", "-c", script}, os.Stdout)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(200)
		}
		os.Exit(code)
	}
	os.Exit(m.Run())
}

func reaperRunning(t *testing.T, script string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(out)
}

func line(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	text, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(text)
}

func TestExitCodeIsTheChilds(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -KILL $$": 137, "kill -SEGV $$": 139} {
		cmd, _ := reaperRunning(t, script)
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%s: %d, want %d", script, got, want)
		}
	}
}

func TestExtraFilesAreTheChilds(t *testing.T) {
	cmd, out := reaperRunning(t, "echo hello >&3")
	if got := line(t, out); got != "hello" {
		t.Error(got)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestSignalsAreForwarded(t *testing.T) {
	cmd, out := reaperRunning(t, `for s in INT HUP QUIT USR1 USR2; do trap "echo $s" $s; done
trap "echo TERM; exit 3" TERM; echo ready; while :; do sleep 0.01; done`)
	if got := line(t, out); got != "ready" {
		t.Fatal(got)
	}
	for sig, name := range map[syscall.Signal]string{
		syscall.SIGINT: "INT", syscall.SIGHUP: "HUP", syscall.SIGQUIT: "QUIT", syscall.SIGUSR1: "USR1", syscall.SIGUSR2: "USR2",
	} {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if got := line(t, out); got != name {
			t.Errorf("got %q, want %q", got, name)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := line(t, out); got != "TERM" {
		t.Errorf("got %q, want TERM", got)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

// eventually polls until ok, which is the only way to see another process's doing.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(3 * time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("did not happen: %s", what)
		}
	}
}

// children lists the children of all threads of a process.
func children(t *testing.T, pid int) []string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	var all []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(data))...)
	}
	return all
}

func TestOrphansAreReapedOutsideOfPID1(t *testing.T) {
	// Many at once: SIGCHLD comes once for several.
	cmd, out := reaperRunning(t, `for i in 1 2 3 4 5 6 7 8 9; do (sleep 0.05 & sleep 0.05 &); done; echo started; while :; do sleep 0.01; done`)
	if got := line(t, out); got != "started" {
		t.Fatal(got)
	}
	eventually(t, "one child is left", func() bool { return len(children(t, cmd.Process.Pid)) == 1 })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 143 {
		t.Errorf("exit code %d", code)
	}
}

func TestChildEndsWithAKilledReaper(t *testing.T) {
	cmd, out := reaperRunning(t, `echo $$; while :; do sleep 0.01; done`)
	pid, err := strconv.Atoi(line(t, out))
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "the child ends", func() bool {
		if syscall.Kill(pid, 0) != nil {
			return true
		}
		// Nobody may reap it here, but it has ended.
		state, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return strings.Contains(string(state), ") Z ")
	})
}

func TestMissingProgram(t *testing.T) {
	if _, err := Run("/no/such/program", []string{"x"}); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("got %v", err)
	}
}
