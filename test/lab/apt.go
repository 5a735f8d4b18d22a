package lab

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// aptSource is one archive as the machine's own apt configuration names it.
type aptSource struct {
	uris       []string
	suites     []string
	components []string
	// options are lines as a deb822 stanza holds them ("Signed-By: …"), in
	// their order. One-line options are translated to these.
	options []string
	// signedBy is the key ring's path, or empty.
	signedBy string
}

// debianSuite is the release that lab hosts run when the machine is Debian.
const debianSuite = "trixie"

// osRelease reads ID and VERSION_CODENAME from an os-release file.
func osRelease(text string) (id, codename string) {
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			id = value
		case "VERSION_CODENAME":
			codename = value
		}
	}
	return id, codename
}

// hostSources returns the deb822 text from which a root file system of a lab
// host is built, and its suite, which is the one that is wanted if any is. It is the machine's own configuration with only
// the suite's name changed, so that mirrors, proxies and keys stay the
// machine's. Ubuntu's archives hold no Debian: an Ubuntu machine gets hosts of
// its own release.
func hostSources(etc, wanted string) (text, suite string, err error) {
	release, err := os.ReadFile(filepath.Join(etc, "os-release"))
	if err != nil {
		return "", "", fmt.Errorf("read the machine's release: %w", err)
	}
	id, codename := osRelease(string(release))
	switch id {
	case "debian":
		suite = debianSuite
	case "ubuntu":
		suite = codename
	default:
		return "", "", fmt.Errorf("lab hosts are built on Debian or Ubuntu, and this machine is %q", id)
	}
	if wanted != "" {
		suite = wanted
	}
	sources, err := readAptSources(filepath.Join(etc, "apt"))
	if err != nil {
		return "", "", err
	}
	text = rewriteSources(sources, codename, suite)
	if text == "" {
		return "", "", fmt.Errorf("no source of suite %q in %s/apt", codename, etc)
	}
	return text, suite, nil
}

// readAptSources reads sources.list, *.list and *.sources below an apt
// configuration directory, in apt's order.
func readAptSources(dir string) ([]aptSource, error) {
	var all []aptSource
	text, err := os.ReadFile(filepath.Join(dir, "sources.list"))
	switch {
	case err == nil:
		all = append(all, parseOneLine(string(text))...)
	case !os.IsNotExist(err):
		return nil, fmt.Errorf("read apt's sources: %w", err)
	}
	parts := filepath.Join(dir, "sources.list.d")
	entries, err := os.ReadDir(parts)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read apt's sources: %w", err)
	}
	for _, entry := range entries {
		if entry.Type()&fs.ModeDir != 0 {
			continue
		}
		ext := filepath.Ext(entry.Name())
		if ext != ".list" && ext != ".sources" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(parts, entry.Name()))
		if err != nil {
			return nil, fmt.Errorf("read apt's sources: %w", err)
		}
		if ext == ".list" {
			all = append(all, parseOneLine(string(text))...)
		} else {
			all = append(all, parseDeb822(string(text))...)
		}
	}
	return all, nil
}

// parseOneLine reads the format of sources.list: "deb [options] uri suite
// component…". Lines of other types are left out.
func parseOneLine(text string) []aptSource {
	var all []aptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		rest, ok := strings.CutPrefix(line, "deb")
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '\t' && rest[0] != '[') {
			continue
		}
		rest = strings.TrimSpace(rest)
		var source aptSource
		if inside, after, ok := strings.Cut(rest, "]"); ok && strings.HasPrefix(inside, "[") {
			rest = after
			for option := range strings.FieldsSeq(inside[1:]) {
				key, value, ok := strings.Cut(option, "=")
				if !ok {
					continue
				}
				switch strings.ToLower(key) {
				case "signed-by":
					source.signedBy = value
					source.options = append(source.options, "Signed-By: "+value)
				case "trusted":
					source.options = append(source.options, "Trusted: "+value)
				case "arch":
					source.options = append(source.options, "Architectures: "+strings.ReplaceAll(value, ",", " "))
				case "check-valid-until":
					source.options = append(source.options, "Check-Valid-Until: "+value)
				}
			}
		}
		fields := strings.Fields(rest)
		if len(fields) < 3 {
			continue
		}
		source.uris, source.suites, source.components = fields[:1], fields[1:2], fields[2:]
		all = append(all, source)
	}
	return all
}

// parseDeb822 reads the stanzas of a .sources file.
func parseDeb822(text string) []aptSource {
	var all []aptSource
	for stanza := range strings.SplitSeq(strings.ReplaceAll(text, "\r\n", "\n"), "\n\n") {
		fields := map[string]string{}
		var order []string
		last := ""
		for line := range strings.SplitSeq(stanza, "\n") {
			if strings.HasPrefix(line, "#") || strings.TrimSpace(line) == "" {
				continue
			}
			if line[0] == ' ' || line[0] == '\t' {
				if last != "" {
					fields[last] += "\n" + line
				}
				continue
			}
			key, value, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			last = strings.ToLower(key)
			fields[last] = strings.TrimSpace(value)
			order = append(order, last)
		}
		if !slices.Contains(strings.Fields(fields["types"]), "deb") || fields["enabled"] == "no" {
			continue
		}
		source := aptSource{
			uris:       strings.Fields(fields["uris"]),
			suites:     strings.Fields(fields["suites"]),
			components: strings.Fields(fields["components"]),
		}
		for _, key := range order {
			switch key {
			case "signed-by":
				if !strings.Contains(fields[key], "\n") {
					source.signedBy = fields[key]
				}
				source.options = append(source.options, "Signed-By: "+fields[key])
			case "trusted":
				source.options = append(source.options, "Trusted: "+fields[key])
			case "architectures":
				source.options = append(source.options, "Architectures: "+fields[key])
			case "check-valid-until":
				source.options = append(source.options, "Check-Valid-Until: "+fields[key])
			}
		}
		all = append(all, source)
	}
	return all
}

// rewriteSources keeps the sources of the distribution itself (the release, its
// updates and its security fixes), changes codename to suite in them, and
// returns them as deb822 text. Third parties' sources are left out: they need
// not have the new suite.
func rewriteSources(sources []aptSource, codename, suite string) string {
	wanted := map[string]string{
		codename:               suite,
		codename + "-updates":  suite + "-updates",
		codename + "-security": suite + "-security",
	}
	ownKeys := slices.ContainsFunc(sources, func(s aptSource) bool { return isArchiveKey(s.signedBy) })
	var text strings.Builder
	for _, source := range sources {
		if ownKeys && source.signedBy != "" && !isArchiveKey(source.signedBy) {
			continue
		}
		var suites, components []string
		for _, name := range source.suites {
			if to, ok := wanted[name]; ok {
				suites = append(suites, to)
			}
		}
		for _, name := range source.components {
			if name == "main" || name == "universe" {
				components = append(components, name)
			}
		}
		if len(source.uris) == 0 || len(suites) == 0 || len(components) == 0 {
			continue
		}
		fmt.Fprintf(&text, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n",
			strings.Join(source.uris, " "), strings.Join(suites, " "), strings.Join(components, " "))
		for _, option := range source.options {
			text.WriteString(option + "\n")
		}
		text.WriteString("\n")
	}
	return text.String()
}

// isArchiveKey tells whether a key ring is Debian's or Ubuntu's own.
func isArchiveKey(path string) bool {
	name := filepath.Base(path)
	return strings.Contains(name, "debian-archive") || strings.Contains(name, "ubuntu-archive")
}
