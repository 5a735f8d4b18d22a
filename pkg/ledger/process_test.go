package ledger_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

// The variables that turn the test binary into another process on one store.
const (
	childMode   = "LEDGER_TEST_CHILD"
	childDriver = "LEDGER_TEST_DRIVER"
	childPath   = "LEDGER_TEST_PATH"
	childDSN    = "LEDGER_TEST_DSN"
	childName   = "LEDGER_TEST_NAME"
)

func TestMain(m *testing.M) {
	config := ledger.Config{Driver: os.Getenv(childDriver), Path: os.Getenv(childPath), DSN: os.Getenv(childDSN)}
	switch os.Getenv(childMode) {
	case "":
		goleak.VerifyTestMain(m)
	case "claim":
		exitWith(claimAll(config, os.Getenv(childName)))
	case "full":
		exitWith(fillUp(config))
	case "churn":
		exitWith(churn(config, os.Getenv(childName)))
	}
}

func exitWith(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (s store) child(t *testing.T, mode, name string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childMode+"="+mode, childName+"="+name,
		childDriver+"="+s.config.Driver, childPath+"="+s.config.Path, childDSN+"="+s.config.DSN)
	cmd.Stderr = os.Stderr
	return cmd
}

const contested = 100

// claimAll claims the same grants as its sibling does, and prints for each what
// is stored.
func claimAll(config ledger.Config, name string) error {
	ctx := context.Background()
	l, err := ledger.Open(ctx, config)
	if err != nil {
		return err
	}
	for i := range contested {
		c := aClaim(i)
		c.Backend = name
		stored, created, err := l.PutClaim(ctx, c)
		if err != nil {
			return err
		}
		fmt.Printf("%d %s %v\n", i, stored.Backend, created)
	}
	return l.Close()
}

func TestTwoProcessesAgreeOnEveryClaim(t *testing.T) { both(t, testTwoProcessesAgreeOnEveryClaim) }

// The processes also race to create the store.
func testTwoProcessesAgreeOnEveryClaim(t *testing.T, s store) {
	names := []string{"a", "b", "c"}
	outs := make([]strings.Builder, len(names))
	var cmds []*exec.Cmd
	for i, name := range names {
		cmd := s.child(t, "claim", name)
		cmd.Stdout = &outs[i]
		must(t, cmd.Start())
		cmds = append(cmds, cmd)
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Fatalf("child: %v", err)
		}
	}
	holder, winners := map[string]string{}, map[string]int{}
	for i := range outs {
		for line := range strings.Lines(outs[i].String()) {
			f := strings.Fields(line)
			if other, ok := holder[f[0]]; ok && other != f[1] {
				t.Errorf("grant %s is with %s and with %s", f[0], other, f[1])
			}
			holder[f[0]] = f[1]
			if f[2] == "true" {
				winners[f[0]]++
			}
		}
	}
	for i := range contested {
		if n := winners[strconv.Itoa(i)]; n != 1 {
			t.Errorf("grant %d was created %d times", i, n)
		}
	}
}

// churn takes grants through their whole life and prints each step after the
// ledger has confirmed it, until it is killed.
func churn(config ledger.Config, first string) error {
	ctx := context.Background()
	l, err := ledger.Open(ctx, config)
	if err != nil {
		return err
	}
	start, err := strconv.Atoi(first)
	if err != nil {
		return err
	}
	for i := start; ; i++ {
		if _, _, err := l.PutClaim(ctx, aClaim(i)); err != nil {
			return err
		}
		fmt.Println("claim", i)
		for n := 1; n <= 2; n++ {
			if _, _, err := l.BeginAttempt(ctx, id(i), hash("content"), render("p")); err != nil {
				return err
			}
			fmt.Println("begin", i, n)
			if err := l.PutInterim(ctx, ledger.Log{RequestID: id(i), Sequence: uint64(n)}); err != nil {
				return err
			}
			if err := l.MarkGone(ctx, id(i), uint32(n)); err != nil {
				return err
			}
			fmt.Println("gone", i, n)
		}
		if _, _, err := l.CloseGrant(ctx, ledger.Closure{RequestID: id(i)}); err != nil {
			return err
		}
		fmt.Println("closed", i)
		if _, _, err := l.PutFinal(ctx, ledger.Log{RequestID: id(i)}); err != nil {
			return err
		}
		fmt.Println("final", i)
	}
}

func TestKilledProcessLosesNothingConfirmed(t *testing.T) {
	both(t, testKilledProcessLosesNothingConfirmed)
}

func testKilledProcessLosesNothingConfirmed(t *testing.T, s store) {
	confirmed := map[string]bool{}
	next := 0
	for round := range 6 {
		cmd := s.child(t, "churn", strconv.Itoa(next))
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			confirmed[lines.Text()] = true
			if n == 20+7*round { // Another step of the life each time.
				must(t, cmd.Process.Kill())
			}
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("the child ended by itself: %v", err)
		}
		next += 1000
	}

	if !s.postgres() {
		var verdict string
		must(t, s.raw(t).QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&verdict))
		if verdict != "ok" {
			t.Fatalf("integrity check: %s", verdict)
		}
	}
	l := s.open(t)
	for line := range confirmed {
		var what string
		var i, n int
		_, _ = fmt.Sscan(line, &what, &i, &n)
		c, err := l.Claim(t.Context(), id(i))
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		attempts, err := l.Attempts(t.Context(), id(i))
		must(t, err)
		switch what {
		case "begin":
			if len(attempts) < n {
				t.Errorf("%s: only %d attempts are stored", line, len(attempts))
			}
		case "gone":
			if len(attempts) < n || attempts[n-1].Open {
				t.Errorf("%s: not stored", line)
			}
		case "closed":
			if _, err := l.Closure(t.Context(), id(i)); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		case "final":
			g, err := l.Log(t.Context(), id(i))
			if err != nil || !g.Final || c.EndedAt.IsZero() {
				t.Errorf("%s: %+v, %v, ended %v", line, g, err, c.EndedAt)
			}
		}
	}
	for c, err := range l.LiveClaims(t.Context(), "") {
		must(t, err)
		if g, err := l.Log(t.Context(), c.RequestID); err == nil && g.Final {
			t.Errorf("%s lives and has a final log", c.RequestID)
		}
	}
	for a, err := range l.OpenIntents(t.Context()) {
		must(t, err)
		if _, err := l.Closure(t.Context(), a.RequestID); err == nil {
			t.Errorf("%s is closed and attempt %d is open", a.RequestID, a.Number)
		}
	}
}
