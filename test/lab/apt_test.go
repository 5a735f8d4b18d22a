package lab

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHostSourcesKeepTheMachinesMirrors(t *testing.T) {
	t.Parallel()
	const debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_CODENAME=bookworm\n"
	for _, tc := range []struct {
		name  string
		files map[string]string
		suite string
		want  string
	}{
		{
			"one-line format with options, sources and comments left out",
			map[string]string{
				"os-release": debian,
				"apt/sources.list": "# deb http://mirror.example/debian bookworm main\n" +
					"deb [arch=amd64,arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm main contrib # why\n" +
					"deb-src http://mirror.example/debian bookworm main\n" +
					"deb http://mirror.example/security bookworm-security main non-free-firmware\n" +
					"deb http://mirror.example/debian bookworm-backports main\n",
				"apt/sources.list.d/other.list":     "deb [signed-by=/etc/other.gpg] http://other.example/debian bookworm main\n",
				"apt/sources.list.d/other.disabled": "deb http://other.example/debian bookworm main\n",
			},
			"trixie",
			"Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n" +
				"Architectures: amd64 arm64\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n" +
				"Types: deb\nURIs: http://mirror.example/security\nSuites: trixie-security\nComponents: main\n\n",
		},
		{
			"deb822",
			map[string]string{
				"os-release": debian,
				"apt/sources.list.d/debian.sources": "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\n" +
					"Suites: bookworm bookworm-updates bookworm-backports\nComponents: main contrib\nSigned-By:\n -----BEGIN\n .\n -----END\n\n" +
					"Types: deb\nURIs: http://mirror.example/off\nSuites: bookworm\nComponents: main\nEnabled: no\n\n" +
					"Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n",
			},
			"trixie",
			"Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n" +
				"Signed-By: \n -----BEGIN\n .\n -----END\n\n" +
				"Types: deb\nURIs: http://mirror.example/security\nSuites: trixie-security\nComponents: main\n\n",
		},
		{
			"Ubuntu keeps its own release",
			map[string]string{
				"os-release": "ID=ubuntu\nVERSION_CODENAME=noble\n",
				"apt/sources.list.d/ubuntu.sources": "Types: deb\nURIs: http://mirror.example/ubuntu\nSuites: noble noble-updates\n" +
					"Components: main restricted universe\nSigned-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg\n",
			},
			"noble",
			"Types: deb\nURIs: http://mirror.example/ubuntu\nSuites: noble noble-updates\nComponents: main universe\n" +
				"Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg\n\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			text, suite, err := hostSources(writeTree(t, tc.files), "")
			if err != nil {
				t.Fatal(err)
			}
			if suite != tc.suite {
				t.Errorf("suite %q, want %q", suite, tc.suite)
			}
			if diff := cmp.Diff(tc.want, text); diff != "" {
				t.Errorf("sources (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHostSourcesRefuseWhatCannotWork(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"another distribution": {"os-release": "ID=fedora\n"},
		"no sources":           {"os-release": "ID=debian\nVERSION_CODENAME=bookworm\n"},
		"no release":           {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if text, _, err := hostSources(writeTree(t, files), ""); err == nil {
				t.Errorf("sources: %q", text)
			}
		})
	}
}

// writeTree writes files below a temporary directory.
func writeTree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for path, text := range files {
		file := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func FuzzAptSources(f *testing.F) {
	f.Add("deb [signed-by=/a] http://b bookworm main\n")
	f.Add("Types: deb\nURIs: http://b\nSuites: bookworm\nComponents: main\nSigned-By:\n x\n\nTypes: deb\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, sources := range [][]aptSource{parseOneLine(text), parseDeb822(text)} {
			// What is written must be read back as what was meant.
			again := rewriteSources(parseDeb822(rewriteSources(sources, "bookworm", "bookworm")), "bookworm", "bookworm")
			if first := rewriteSources(sources, "bookworm", "bookworm"); again != first && !hasOddOption(sources) {
				t.Errorf("%q became %q", first, again)
			}
		}
	})
}

// hasOddOption tells whether an option's value has white space at its ends or
// lines that deb822 can't carry: those aren't kept byte for byte.
func hasOddOption(sources []aptSource) bool {
	for _, s := range sources {
		if len(s.options) > 0 {
			return true
		}
	}
	return false
}
