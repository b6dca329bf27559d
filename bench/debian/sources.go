package debian

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// suites are those whose packages go into an image.
var suites = []string{suite, suite + "-updates", suite + "-security"}

// hostSources returns, in apt's formats, those sources of an apt directory
// that serve the suites; it is "" if none serves the main one, as on Ubuntu.
// The result is in the one-line format: "deb [options] uri suite component...".
func hostSources(dir string) (string, error) {
	names := []string{filepath.Join(dir, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		more, err := filepath.Glob(filepath.Join(dir, "sources.list.d", pattern))
		if err != nil {
			return "", err
		}
		names = append(names, more...)
	}
	var lines []string
	main := false
	for _, name := range names {
		p, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return "", err
		}
		parse := parseList
		if strings.HasSuffix(name, ".sources") {
			parse = parseDeb822
		}
		for _, s := range parse(string(p)) {
			if s.debian() {
				main = main || s.suite == suite
				lines = append(lines, s.String())
			}
		}
	}
	if !main {
		return "", nil
	}
	slices.Sort(lines)
	return strings.Join(slices.Compact(lines), ""), nil
}

// source is one line of a sources.list.
type source struct {
	uri, suite string
	components []string
	signedBy   string // path of a keyring, or ""
}

func (s source) String() string {
	opt := ""
	if s.signedBy != "" {
		opt = "[signed-by=" + s.signedBy + "] "
	}
	return "deb " + opt + s.uri + " " + s.suite + " main\n"
}

// debian tells whether the source is (a mirror of) Debian's own archive.
// Others also name their suites after Debian's.
func (s source) debian() bool {
	return slices.Contains(suites, s.suite) && slices.Contains(s.components, "main") &&
		(s.signedBy == "" || strings.Contains(filepath.Base(s.signedBy), "debian-archive"))
}

// parseList reads the one-line format.
func parseList(text string) []source {
	var out []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		var s source
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if rest = strings.TrimSpace(rest); !ok {
			continue
		}
		if opts, after, ok := strings.Cut(strings.TrimPrefix(rest, "["), "]"); ok && strings.HasPrefix(rest, "[") {
			rest = after
			for _, o := range strings.Fields(opts) {
				if key, ok := strings.CutPrefix(o, "signed-by="); ok {
					s.signedBy = key
				}
			}
		}
		if f := strings.Fields(rest); len(f) >= 3 && strings.Contains(f[0], ":") {
			s.uri, s.suite, s.components = f[0], f[1], f[2:]
			out = append(out, s)
		}
	}
	return out
}

// parseDeb822 reads the format of *.sources files: stanzas of "Key: words".
func parseDeb822(text string) []source {
	var out []source
	stanza := map[string][]string{}
	key := ""
	flush := func() {
		enabled := !slices.Contains(stanza["enabled"], "no")
		if enabled && slices.Contains(stanza["types"], "deb") {
			signedBy := ""
			if s := stanza["signed-by"]; len(s) == 1 {
				signedBy = s[0]
			} else if len(s) > 1 {
				signedBy = "inline" // a key in the file itself is not Debian's
			}
			for _, uri := range stanza["uris"] {
				for _, suite := range stanza["suites"] {
					out = append(out, source{uri, suite, stanza["components"], signedBy})
				}
			}
		}
		stanza, key = map[string][]string{}, ""
	}
	for line := range strings.Lines(text) {
		switch trimmed := strings.TrimSpace(line); {
		case strings.HasPrefix(trimmed, "#"):
		case trimmed == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			stanza[key] = append(stanza[key], strings.Fields(trimmed)...)
		default:
			name, value, _ := strings.Cut(trimmed, ":")
			key = strings.ToLower(name)
			stanza[key] = append(stanza[key], strings.Fields(value)...)
		}
	}
	flush()
	return out
}
