package process

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/grpcx"
)

type testConfig struct {
	LogLevel string `toml:"log_level"`
	Fail     bool   `toml:"fail"`
}

func program(ran *testConfig) Program[testConfig] {
	return Program[testConfig]{
		Name: "thing",
		Serves: func(testConfig) grpcx.ServerConfig {
			return grpcx.ServerConfig{Listen: []grpcx.ListenConfig{{Address: "unix:/nonexistent/thing.sock"}}}
		},
		LogLevel: func(c testConfig) string { return c.LogLevel },
		Run: func(_ context.Context, c testConfig, log *slog.Logger) error {
			*ran = c
			log.Info("Ran")
			if c.Fail {
				return errors.New("it broke")
			}
			return nil
		},
		Commands: []Command[testConfig]{{Name: "count", Summary: "count to a number", Prepare: func(flags *flag.FlagSet) func(context.Context, testConfig, *slog.Logger, io.Writer) (int, error) {
			to := flags.Int("to", 0, "the number")
			return func(_ context.Context, c testConfig, log *slog.Logger, stdout io.Writer) (int, error) {
				log.Info("Counting")
				switch {
				case c.Fail:
					return 0, errors.New("it broke")
				case *to == 0:
					return 0, UsageError("count wants -to")
				}
				_, _ = fmt.Fprintf(stdout, "counted to %d", *to)
				return *to, nil
			}
		}}},
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good.toml", "log_level = \"info\"\n")
	tests := map[string]struct {
		args   []string
		code   int
		stdout string
		stderr string
	}{
		"serves":              {[]string{"-config", good}, 0, "", "Ran"},
		"fails":               {[]string{"-config", file("fail.toml", "fail = true\n")}, 1, "", "thing: it broke"},
		"unknown key":         {[]string{"-config", file("typo.toml", "\nlog_lvl = \"info\"\n")}, 1, "", "typo.toml:2:1"},
		"unknown level":       {[]string{"-config", file("level.toml", "log_level = \"loud\"\n")}, 1, "", "log_level"},
		"no such file":        {[]string{"-config", filepath.Join(dir, "none.toml")}, 1, "", "none.toml"},
		"check":               {[]string{"-config", good, "-check-config"}, 0, "the configuration is valid", ""},
		"version":             {[]string{"-version"}, 0, "thing ", ""},
		"help":                {[]string{"-h"}, 0, "", "-check-config"},
		"unknown flag":        {[]string{"-frobnicate"}, 2, "", "frobnicate"},
		"argument":            {[]string{"now"}, 2, "", `unexpected argument "now"`},
		"two dashes":          {[]string{"--config", good, "--check-config"}, 0, "the configuration is valid", ""},
		"help names commands": {[]string{"-h"}, 0, "", "count to a number"},
		"command":             {[]string{"count", "-config", good, "-to", "3"}, 3, "counted to 3", "Counting"},
		"command, two dashes": {[]string{"count", "--config=" + good, "--to=3"}, 3, "counted to 3", ""},
		"command fails":       {[]string{"count", "-config", file("fail2.toml", "fail = true\n")}, 1, "", "thing count: it broke"},
		"command misused":     {[]string{"count", "-config", good}, 2, "", "thing count: count wants -to"},
		"command's flag":      {[]string{"count", "-frobnicate"}, 2, "", "frobnicate"},
		"command's argument":  {[]string{"count", "-config", good, "now"}, 2, "", `unexpected argument "now"`},
		"command's config":    {[]string{"count", "-config", filepath.Join(dir, "none.toml")}, 1, "", "none.toml"},
		"command's help":      {[]string{"count", "-h"}, 0, "", "the number"},
		"command comes first": {[]string{"-config", good, "count"}, 2, "", `unexpected argument "count"`},
		"nobody to be asked":  {[]string{"-config", good, "-healthcheck"}, 1, "", "thing: "},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			var ran testConfig
			code := program(&ran).Execute(t.Context(), test.args, &stdout, &stderr)
			if code != test.code {
				t.Errorf("exit code %d, want %d\n%s", code, test.code, stderr.String())
			}
			if !strings.Contains(stdout.String(), test.stdout) || !strings.Contains(stderr.String(), test.stderr) {
				t.Errorf("stdout %q, stderr %q; want %q and %q in them", stdout.String(), stderr.String(), test.stdout, test.stderr)
			}
		})
	}
}
